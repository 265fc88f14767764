"""Who keeps a mount busy: processes with a descriptor, directory, root or mapping below a mountpoint.

Owns: the scan of /proc behind a refused `udf umount`. Must never: access a path below the mountpoint (it may hang);
only the kernel's own names for what a process holds are read. Called by udf.cli.commands.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

MOST_NAMED = 5
SCAN_SECONDS = 2.0


@dataclass(frozen=True)
class Holder:
    """A process and the first thing of it that was found below the mountpoint."""

    pid: int
    name: str
    path: str

    def __str__(self) -> str:
        """As it stands in the sentence for the operator."""
        return f"{self.name} ({self.pid}): {self.path}"


def find_holders(
    mountpoint: str, *, most: int = MOST_NAMED, seconds: float = SCAN_SECONDS
) -> tuple[list[Holder], bool]:
    """At most `most` holders, and whether there may be more that were not looked for or could not be seen."""
    until = time.monotonic() + seconds
    found: list[Holder] = []
    incomplete = False
    for entry in sorted(os.listdir("/proc"), key=len):
        if not entry.isdigit():
            continue
        if len(found) >= most or time.monotonic() > until:
            return found, True
        try:
            path = next(_held_below(entry, mountpoint), None)
        except PermissionError:
            incomplete = True
            continue
        except OSError:  # it ended while we looked
            continue
        if path is not None:
            found.append(Holder(int(entry), _name(entry), path))
    return found, incomplete


def describe(mountpoint: str) -> str:
    """The processes in words, for the end of a sentence."""
    found, incomplete = find_holders(mountpoint)
    if not found:
        hidden = " of another user, or of the kernel (a mount on top, a loop device, swap)" if incomplete else ""
        return f"a process that cannot be seen from here{hidden}"
    return "; ".join(map(str, found)) + ("; and perhaps others" if incomplete else "")


def _held_below(pid: str, mountpoint: str) -> Iterator[str]:
    base = f"/proc/{pid}"
    for link in ("cwd", "root", "exe"):
        yield from _inside(_target(f"{base}/{link}"), mountpoint)
    for number in os.listdir(f"{base}/fd"):
        yield from _inside(_target(f"{base}/fd/{number}"), mountpoint)
    with open(f"{base}/maps", "rb") as maps:
        for line in maps:
            fields = line.split(maxsplit=5)
            if len(fields) == 6:
                yield from _inside(os.fsdecode(fields[5].rstrip(b"\n")), mountpoint)


def _target(link: str) -> str:
    """What a /proc link says; "" for one that is gone. readlink asks the kernel, not the filesystem behind it."""
    try:
        return os.readlink(link)
    except FileNotFoundError:
        return ""


def _inside(path: str, mountpoint: str) -> Iterator[str]:
    if path == mountpoint or path.startswith(mountpoint.rstrip("/") + "/"):
        yield path


def _name(pid: str) -> str:
    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
        return comm.read().strip()
