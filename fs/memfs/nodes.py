"""The nodes of the tree: what an inode is, one class per kind.

Owns their fields and a directory's order of names; limits, link counts and times are tree.py's. Slots, and nothing
that is only sometimes there: an empty file is to cost a few hundred bytes.
"""

from __future__ import annotations

import stat
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from .contents import Contents

DOT, DOTDOT, FIRST = 1, 2, 3  # directory offsets: of ".", of "..", of the first name


class Node:
    """One inode; fifos, sockets and devices are plain nodes."""

    __slots__ = ("atime", "ctime", "gid", "ino", "lookups", "mode", "mtime", "nlink", "rdev", "uid", "xattrs")

    def __init__(self, ino: int, mode: int, uid: int, gid: int, now: int) -> None:
        self.ino = ino
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.atime = self.mtime = self.ctime = now  # nanoseconds
        self.nlink = 0
        self.lookups = 0  # how many times the kernel was told of this node and has not forgotten it
        self.rdev = 0
        self.xattrs: dict[bytes, bytes] | None = None

    @property
    def is_directory(self) -> bool:
        """Whether this is a directory."""
        return stat.S_ISDIR(self.mode)


class File(Node):
    """A regular file."""

    __slots__ = ("contents",)

    def __init__(self, ino: int, mode: int, uid: int, gid: int, now: int) -> None:
        super().__init__(ino, mode, uid, gid, now)
        self.contents: Contents | None = None  # None: of length zero, as most new files are at first


class Symlink(Node):
    """A symbolic link."""

    __slots__ = ("target",)

    def __init__(self, ino: int, target: bytes, uid: int, gid: int, now: int) -> None:
        super().__init__(ino, stat.S_IFLNK | 0o777, uid, gid, now)
        self.target = target


class Directory(Node):
    """A directory: its names, and for each one an offset that never changes and is never given to another name.

    `_offsets` (ascending) and `_names` run side by side; a name that is gone leaves b"" until the next compaction.
    """

    __slots__ = ("_names", "_offsets", "entries", "next_offset", "parent")

    def __init__(self, ino: int, mode: int, uid: int, gid: int, now: int) -> None:
        super().__init__(ino, mode, uid, gid, now)
        self.parent = self
        self.entries: dict[bytes, tuple[int, Node]] = {}
        self.next_offset = FIRST
        self._offsets: list[int] = []
        self._names: list[bytes] = []

    def add(self, name: bytes, node: Node) -> None:
        """Append a name that is not there yet."""
        offset = self.next_offset
        self.next_offset = offset + 1
        self.entries[name] = (offset, node)
        self._offsets.append(offset)
        self._names.append(name)

    def exchange(self, name: bytes, node: Node) -> None:
        """Let a name that is there mean another node; it keeps its place in listings."""
        self.entries[name] = (self.entries[name][0], node)

    def remove(self, name: bytes) -> None:
        """Remove a name that is there."""
        offset, _ = self.entries.pop(name)
        offsets = self._offsets
        names = self._names
        if offsets[-1] == offset:
            offsets.pop()
            names.pop()
            return
        names[bisect_left(offsets, offset)] = b""
        if len(names) > 2 * len(self.entries) + 32:
            pairs = [(offset, name) for offset, name in zip(offsets, names, strict=True) if name]
            self._offsets = [offset for offset, _ in pairs]
            self._names = [name for _, name in pairs]

    def adopt_order(self) -> None:
        """Bring the order of the names, as their offsets say it, up to date with `entries`."""
        self._offsets = [offset for offset, _ in self.entries.values()]
        self._names = list(self.entries)
        if self._offsets != sorted(self._offsets):
            pairs = sorted(zip(self._offsets, self._names, strict=True))
            self._offsets = [offset for offset, _ in pairs]
            self._names = [name for _, name in pairs]

    def after(self, offset: int) -> Iterator[tuple[int, bytes, Node]]:
        """Yield (offset, name, node) of the names behind *offset*; the directory must not change meanwhile."""
        offsets = self._offsets
        names = self._names
        for i in range(bisect_right(offsets, offset), len(offsets)):
            name = names[i]
            if name:
                yield offsets[i], name, self.entries[name][1]
