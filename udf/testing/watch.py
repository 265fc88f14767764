"""What happens at each request that passes the relay: nothing, a note, or the driver's death.

Owns: the count of the steps, and the moment of a death. Must never: start or replace a driver (bench.py does).
Called by: relay.py, for each request and reply; bench.py says what is wanted.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from udf.testing.steps import NOT_STEPS, Place, Record, Step, Target
from udf.testing.tracer import Tracer

if TYPE_CHECKING:
    from udf.testing.bench import Bench


class BenchFailedError(Exception):
    """The mount does not go on; one sentence."""


class Watch:
    """What happens at each request: nothing, a note, or the driver's death."""

    def __init__(self, bench: Bench) -> None:
        self.operation = 0
        self.killed = False  # by us, and not replaced yet
        self.hit = False
        self.link = 0  # inode of the driver's end of the present link
        self.seen = 0  # requests
        self.waiting: set[int] = set()  # that the present driver has not answered
        self._bench = bench
        self._record: Record | None = None
        self._section = ""
        self._target: Target | None = None
        self._number = 0
        self._lost = 0  # unique of the request whose reply is to be lost
        self._tracer: Tracer | None = None
        self._trace_over = trio.Event()
        self._began: dict[int, int] = {}  # unique -> index of its step

    def record(self, section: str, record: Record) -> None:
        """Note the steps of a section in *record*."""
        self._section, self._number, self._record, self._target = section, 0, record, None
        self._began.clear()

    def aim(self, target: Target) -> None:
        """Have the driver die there; steps count from now."""
        self._target, self._number, self._record, self.hit, self.operation = target, 0, None, False, 0

    @property
    def is_traced(self) -> bool:
        """Whether the driver is traced."""
        return self._tracer is not None

    def rest(self) -> None:
        """Do nothing any more."""
        self._target = self._record = None

    async def trace(self) -> None:
        """Count the points of each step, as long as this driver lives. BenchFailedError if that cannot be."""
        token = trio.lowlevel.current_trio_token()
        over = self._trace_over = trio.Event()
        done: Callable[[], None] = lambda: _ring(token, over)  # noqa: E731 - the thread's word to the loop
        tracer = self._tracer = Tracer(self._bench.driver_pid, self.link, done)
        if not tracer.start():
            raise BenchFailedError(f"the driver cannot be traced: {tracer.error}")

    async def traced(self) -> None:
        """Wait until nothing is traced any more: a dead driver is reaped by who traces it first."""
        if self._tracer is not None:
            await self._trace_over.wait()
            self._tracer.join()
            if self._tracer.killed:
                self.hit = True
            elif self._tracer.error:
                self._bench.remarks.append(f"the driver could not be traced: {self._tracer.error}")
            self._tracer = None

    async def on_request(self, opcode: int, unique: int) -> bool:
        """See Watcher."""
        if self.killed:
            return False  # what comes behind the driver's last request is its successor's, in each run
        if opcode in NOT_STEPS:
            return True
        self.seen += 1
        self.waiting.add(unique)
        if self._record is None and self._target is None:
            return True
        self._number += 1
        if self._record is not None:
            tracer = self._tracer
            self._began[unique] = len(self._record.steps)
            self._record.steps.append(Step(self._section, self._number, opcode, self.operation))
            if tracer:
                tracer.begin()
        elif self._target is not None and self._number == self._target.step.number:
            return await self._strike(self._target, opcode, unique)
        return True

    async def _strike(self, target: Target, opcode: int, unique: int) -> bool:
        self._target = None
        if opcode != target.step.opcode:
            return True  # not the step that was numbered; `hit` tells
        if target.place is Place.HALF:
            await self.trace()
            self.killed = True
            assert self._tracer is not None
            self._tracer.kill_at(target.point, unique)
            return True
        self.killed = True
        if target.place is Place.BEFORE:
            self.hit = True
            self._bench.kill()
            return False
        self._lost = unique
        return True

    async def on_reply(self, unique: int, error: int) -> bool:
        """See Watcher."""
        self.waiting.discard(unique)
        if unique and unique == self._lost:
            self._lost = 0
            self.hit = True
            self._bench.kill()
            return False
        if self._record is not None and unique in self._began:
            index = self._began.pop(unique)
            step = self._record.steps[index]
            if error == -errno.ENOSYS:
                self._record.unsupported.add(step.opcode)
            if self._tracer is not None:
                self._record.steps[index] = replace(step, points=self._tracer.points.pop(unique, 0))
        return True


def _ring(token: trio.lowlevel.TrioToken, event: trio.Event) -> None:
    with suppress(trio.RunFinishedError):
        token.run_sync_soon(event.set)
