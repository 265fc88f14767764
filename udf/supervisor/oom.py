"""Whether a process was killed because memory ran out.

Owns: the question whom the kernel's OOM killer has killed. Must never: wait. Called by: generation.py, at a death.

The counter that procfs.py reads is there for everyone and counts every kill of the system, those of a cgroup's limit
too: if it has not moved, nobody was killed. If it has, the kernel's log names the process; where we may not read that
(it is root's, as a rule), the kill is taken for ours, because another at the same time is unlikely.
"""

from __future__ import annotations

import os
import re

from udf.supervisor import procfs

_MAX_RECORDS = 20_000  # of the kernel's log; more than its buffer has
_KILLED = re.compile(rb"Killed process (\d+) ")


def was_killed(pid: int, before: int) -> bool:
    """Whether the process, which died by SIGKILL, was one of the kills since procfs.oom_kills() said `before`."""
    last = procfs.oom_kills() - before
    if last <= 0:
        return False
    named = _named(last)
    return named is None or pid in named


def _named(last: int) -> list[int] | None:
    """The pids of the last kills in the kernel's log; None if it cannot be read or does not tell all of them."""
    found: list[int] = []
    try:
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
