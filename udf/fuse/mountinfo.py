"""The kernel's table of mounts, /proc/self/mountinfo.

Owns reading it and walking it. Must never touch a mounted filesystem: a look at
the table is safe where a stat(2) would wait for a server that hangs. Called by
mount.py and by whoever wants to know what is mounted.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:  # not needed at run time, and the shim pays for it
    from collections.abc import Iterable

_ESCAPE = re.compile(rb"\\([0-7]{3})")  # the kernel writes space, tab, newline, backslash and # like this


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the table. `mountpoint` is as seen from our root directory; options are comma-separated."""

    id: int
    parent: int  # the mount that the mountpoint lies in
    device: tuple[int, int]  # major, minor
    root: str  # what of the filesystem is mounted
    mountpoint: str
    options: str  # of this mount
    fstype: str
    source: str
    super_options: str  # of the filesystem

    @property
    def is_fuse(self) -> bool:
        """Whether a process serves this filesystem."""
        return self.fstype.partition(".")[0] in ("fuse", "fuseblk")

    def super_option(self, name: str) -> str | None:
        """The value of `name=value` among the filesystem's options."""
        for option in self.super_options.split(","):
            key, _, value = option.partition("=")
            if key == name:
                return value
        return None


def _text(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes((int(match[1], 8),)), field))


def parse_mountinfo(table: bytes) -> list[Mount]:
    """The mounts in a table's text, in its order."""
    mounts = []
    for line in table.split(b"\n"):
        fields = line.split(b" ")
        try:
            separator = fields.index(b"-", 6)  # optional fields end here
            major, _, minor = fields[2].partition(b":")
            mounts.append(
                Mount(
                    id=int(fields[0]),
                    parent=int(fields[1]),
                    device=(int(major), int(minor)),
                    root=_text(fields[3]),
                    mountpoint=_text(fields[4]),
                    options=_text(fields[5]),
                    fstype=_text(fields[separator + 1]),
                    source=_text(fields[separator + 2]),
                    super_options=_text(fields[separator + 3]),
                )
            )
        except (ValueError, IndexError):
            continue  # the empty end, or a line of a future kernel
    return mounts


def read_mountinfo() -> list[Mount]:
    """All mounts that can be reached from our root directory."""
    with open("/proc/self/mountinfo", "rb") as table:
        return parse_mountinfo(table.read())


def find_mount(path: str, mounts: Iterable[Mount] | None = None) -> Mount | None:
    """The top-most mount exactly at `path`, or None; from the table alone, without touching the path.

    `path` must be free of symbolic links (they cannot be followed without looking at it). A mount that
    another one hides, at this path or at a directory above it, is not found: path look-ups cannot reach it either.
    """
    path = os.path.abspath(path)
    table = read_mountinfo() if mounts is None else list(mounts)
    ids = {mount.id for mount in table}
    children: dict[int | None, list[Mount]] = {}
    for mount in table:
        outermost = mount.parent not in ids or mount.parent == mount.id
        children.setdefault(None if outermost else mount.parent, []).append(mount)
    # As a path look-up does: cross the first mountpoint met on the way, go on inside it.
    current: Mount | None = None
    while True:
        on_the_way = [m for m in children.pop(current.id if current else None, []) if _leads_to(m.mountpoint, path)]
        if not on_the_way:
            return current if current is not None and current.mountpoint == path else None
        current = min(on_the_way, key=lambda mount: len(mount.mountpoint))


def _leads_to(mountpoint: str, path: str) -> bool:
    return path == mountpoint or path.startswith(mountpoint if mountpoint.endswith("/") else mountpoint + "/")
