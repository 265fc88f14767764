"""What a driver leaves behind: threads and descriptors.

Owns: the comparison of before and after. Must never: wait longer than a thread's grace, or blame a driver for what
others keep (idle worker threads of an event loop). Called by: bus.py, trial.py.
"""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from time import monotonic

from udf.testing.hotplug.running import stack_of

GRACE = 0.5  # seconds in which a thread that was told to end may do so
_IDLE = "Trio thread"  # kept by trio for the next call, of whatever run
_FOLDERS = ("/proc/self/fd", "/dev/fd")


@dataclass(frozen=True)
class Before:
    """What there was."""

    threads: frozenset[threading.Thread]
    descriptors: frozenset[tuple[int, str]]

    @classmethod
    def now(cls) -> Before:
        """As it is now."""
        return cls(frozenset(threading.enumerate()), frozenset(_descriptors()))

    def new_threads(self) -> list[threading.Thread]:
        """Those that were not there before, and are somebody's."""
        return [each for each in threading.enumerate() if each not in self.threads and not each.name.startswith(_IDLE)]

    def threads_left(self, grace: float = GRACE) -> list[threading.Thread]:
        """New threads that do not end within their grace."""
        until = monotonic() + grace
        left = []
        for thread in self.new_threads():
            thread.join(max(0.0, until - monotonic()))
            if thread.is_alive() and not thread.name.startswith(_IDLE):
                left.append(thread)
        return left

    def descriptors_left(self) -> list[tuple[int, str]]:
        """New descriptors, with what they are open on."""
        return sorted(set(_descriptors()) - self.descriptors)


def describe_thread(thread: threading.Thread) -> tuple[str, str]:
    """A sentence, and where it is."""
    return f"the thread {thread.name!r} is left", stack_of(thread)


def _descriptors() -> list[tuple[int, str]]:
    for folder in _FOLDERS:
        with contextlib.suppress(OSError):
            found = []
            for name in os.listdir(folder):
                with contextlib.suppress(OSError, ValueError):
                    number = int(name)
                    os.fstat(number)  # the one on the folder itself is closed again
                    found.append((number, _target(folder, name)))
            return found
    return []


def _target(folder: str, name: str) -> str:
    try:
        return os.readlink(f"{folder}/{name}")
    except OSError:
        return "something"
