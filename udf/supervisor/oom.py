"""Whether a process was killed because memory ran out.

Owns: what the kernel tells of its OOM killer. Must never: wait. Called by: process.py, at a host's start, with each
heartbeat that is due, and at its death by SIGKILL.

The counter in /proc/vmstat is there for everyone and counts every kill of the system, those of a cgroup's limit too: if
it has not moved, nobody was killed. If it has, the kernel's log names the process; where we may not read that (it is
root's, as a rule), or where processes have other numbers than the log's (in a container), the kill is taken for ours,
because another at the same time is unlikely.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

_MAX_RECORDS = 20_000  # of the kernel's log; more than its buffer has
_INITIAL = "pid:[4026531836]"  # the kernel's own PID namespace, whose numbers the log has: PROC_PID_INIT_INO
_KILLED = re.compile(rb"Killed process (\d+) ")


def kills() -> int | None:
    """How many processes the OOM killer has ended since boot; None where the kernel does not count them."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/vmstat").read_bytes().partition(b"\noom_kill ")[2].split(b"\n", 1)[0])
    return None


def was_killed(pid: int, before: int | None, now: int | None) -> bool:
    """Whether the process, which died by SIGKILL, was one of the kills between the two counts."""
    if before is None or now is None or now <= before:
        return False
    named = _named(now - before)
    return named is None or pid in named


def _named(last: int) -> list[int] | None:
    """The pids of the last kills in the kernel's log; None if it cannot be read or does not tell all of them."""
    found: list[int] = []
    try:
        if os.readlink("/proc/self/ns/pid") != _INITIAL:
            return None
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        for _ in range(_MAX_RECORDS):
            try:
                record = os.read(log, 8192)
            except BlockingIOError:
                break
            except BrokenPipeError:
                continue  # overwritten meanwhile; the next one is there
            found += [int(match) for match in _KILLED.findall(record)]
    except OSError:
        return None
    finally:
        os.close(log)
    return found[-last:] if len(found) >= last else None
