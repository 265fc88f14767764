"""The one thread that talks to the device, and how the driver's tasks ask it for something.

Owns: the thread and the order of the jobs: as they come, one after another. The next one begins as soon as the one
before is done, without a turn of the driver's loop in between. Must never: drop a job that
is not cancelled: each is answered once.
Called by: driver.py.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar

import outcome
import trio

log = logging.getLogger("usb_storage")

P = ParamSpec("P")
T = TypeVar("T")

_Outcome = outcome.Value[Any] | outcome.Error
# Whoever takes the function out of the list has the job; what has come of it is told in the loop.
_Job = tuple[list[Callable[[], Any]], Callable[[_Outcome], object]]


class Engine:
    """Runs jobs in a thread of its own. Make it in the loop whose tasks ask."""

    def __init__(self, idle: Callable[[], float | None]) -> None:
        """`idle` is called in the thread when there is nothing to do; it says in how many seconds it wants to be again.

        None: not before the next job.
        """
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._idle = idle
        self._loop = trio.lowlevel.current_trio_token()
        self._thread = threading.Thread(target=self._work, name="usb-storage", daemon=True)
        self._thread.start()

    async def run(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a job in the thread. Once it has begun only its own time-outs end it: it has the caller's data."""
        function = [lambda: job(*args, **kwargs)]

        def abort(_: Any) -> trio.lowlevel.Abort:
            return trio.lowlevel.Abort.SUCCEEDED if _take(function) else trio.lowlevel.Abort.FAILED

        self._jobs.put((function, partial(trio.lowlevel.reschedule, trio.lowlevel.current_task())))
        result: T = await trio.lowlevel.wait_task_rescheduled(abort)
        return result

    def begin(self, done: Callable[[Exception | None], None], job: Callable[[], object]) -> None:
        """The same without a task: `done` is called in the loop."""

        def tell(result: _Outcome) -> None:
            error = result.error if isinstance(result, outcome.Error) else None
            if error is not None and not isinstance(error, Exception):
                raise error
            done(error)

        self._jobs.put(([job], tell))

    def tell(self, function: Callable[[], object]) -> None:
        """Called in the thread: run this in the loop soon."""
        try:
            self._loop.run_sync_soon(function)
        except trio.RunFinishedError:
            pass

    def close(self) -> None:
        """No further job; what is under way ends the thread when it is done."""
        self._jobs.put(None)

    def _work(self) -> None:
        pause: float | None = None
        while True:
            try:
                job = self._jobs.get(timeout=pause)
            except queue.Empty:
                pause = self._rest()
                continue
            if job is None:
                return
            holder, deliver = job
            function = _take(holder)
            if function is None:
                continue  # cancelled
            result = outcome.capture(function)
            self.tell(partial(deliver, result))
            if self._jobs.empty():
                pause = self._rest()

    def _rest(self) -> float | None:
        try:
            return self._idle()
        except Exception:
            log.exception("what is done between commands failed")
            return None


def _take(holder: list[Callable[[], Any]]) -> Callable[[], Any] | None:
    try:
        return holder.pop()
    except IndexError:
        return None
