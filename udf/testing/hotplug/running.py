"""One run of a scenario: in a thread of its own, with an end.

Owns: the thread, the bound on its time, and what is known of a run afterwards. Must never: wait for a scenario longer
than its bound and a short grace, or keep an exception (its traceback would keep the driver's objects alive, and hide
what is left behind). Called by: trial.py.

A run that does not end is made to: first its transfers fail with GivenUpError, then the exception is raised in the
thread itself. A thread that waits for a lock for ever cannot be ended in Python; it is left alone, as a daemon.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

_GRACE = 0.5  # seconds for a run that was given up
_TRIES = 4  # to end a thread


class GivenUpError(BaseException):
    """The run is over for the exploration. No driver should catch it; a bare `except:` meets it again."""


@dataclass
class Outcome:
    """How a run ended."""

    kind: str  # value, error, hang
    value: Any = None
    error: str = ""  # type and text of the exception
    bases: tuple[type, ...] = ()
    errno: int | None = None
    stack: str = ""  # of an error: the traceback; of a hang: where it was
    states: list[Any] = field(default_factory=list)  # of the devices, if that belongs to the result

    @property
    def last_line(self) -> str:
        """Of a traceback: where the driver was."""
        places = [line.strip() for line in self.stack.splitlines() if line.startswith("  File ")]
        mine = [place for place in places if not _is_ours(place)]
        return mine[-1] if mine else ""

    def __str__(self) -> str:
        return repr(self.value) if self.kind == "value" else self.error or "no end"


def run(
    scenario: Callable[[], object],
    bound: float,
    give_up: Callable[[], None],
    abandon: Callable[[threading.Thread], object],
) -> Outcome:
    """Run it to its end, or until the bound is over: then `give_up`, and `abandon` a thread that does not end."""
    ended = threading.Event()
    outcomes: list[Outcome] = []

    def attempt() -> None:
        try:
            value = scenario()
            if inspect.iscoroutine(value):
                value = asyncio.run(_wait_for(value))
            outcomes.append(Outcome("value", value))
        except GivenUpError:
            raise
        except BaseException as error:
            outcomes.append(_failed(error))

    def main() -> None:
        try:
            attempt()
        except GivenUpError:  # also one that end() has raised in the midst of the above
            outcomes.insert(0, Outcome("hang"))
        finally:
            ended.set()

    thread = threading.Thread(target=main, name="scenario", daemon=True)
    thread.start()
    if ended.wait(bound):
        thread.join(_GRACE)
        return outcomes[0]
    stack = stack_of(thread)
    give_up()
    if not end(thread):
        abandon(thread)
    return Outcome("hang", error=f"no end within {bound:g} s", stack=stack)


async def _wait_for(value: Coroutine[Any, Any, object]) -> object:
    return await value


def _failed(error: BaseException) -> Outcome:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    number = getattr(error, "errno", None)
    lines = traceback.format_exception(error)
    return Outcome(
        "error", error=text, bases=type(error).__mro__, errno=number if isinstance(number, int) else None,
        stack="".join(lines),
    )  # fmt: skip


def end(thread: threading.Thread) -> bool:
    """Have a thread end that ought to have ended; whether it did."""
    for _ in range(_TRIES):
        if thread.ident is None or not thread.is_alive():
            break
        # More than once: what is raised in the midst of a finalizer or a bare `except` is lost there.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(GivenUpError))
        thread.join(_GRACE)
    return not thread.is_alive()


def stack_of(thread: threading.Thread) -> str:
    """Where a thread is, without what belongs to the exploration."""
    frame = sys._current_frames().get(thread.ident or 0)
    if frame is None:
        return ""
    lines = [
        f"{each.filename}:{each.lineno} in {each.name}: {each.line}"
        for each in traceback.extract_stack(frame)
        if not _is_ours(each.filename)
    ]
    return "\n".join(lines[-8:])


def _is_ours(path: str) -> bool:
    return any(each in path for each in ("/udf/testing/hotplug/", "/udf/usb/", "/site-packages/usb/", "/threading.py"))
