"""What the kernel tells of a process: its memory and its name.

Owns: the reading of /proc for these two. Must never: read what can wait for the process itself (its command line and
its maps need its address space, which may hang on a mount of ours). Called by: generation.py, control.py.
"""

from __future__ import annotations

import os
from pathlib import Path

from udf.supervisor.output import printable

_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(pid: int) -> int | None:
    """Bytes of a process in memory, or None if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return None


def command_of(pid: int) -> str:
    """The name of a process, or "" if it is gone (or lives in a PID namespace that we do not see)."""
    try:
        return printable(Path(f"/proc/{pid}/comm").read_bytes()[:64])
    except OSError:
        return ""
