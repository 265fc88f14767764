"""What of a memfs outlives its process: the journal, the arena and the table of a state store, opened together.

Owns their sizes and which rows of the table are free. Knows nothing of what is in them. Called by: arena.py, tree.py,
contents.py and xattrs.py, for each change.
"""

from __future__ import annotations

import errno

from pyfuse3 import FUSEError

from udf import Store

from . import records
from .space import Space

PAGE_SHIFT = 12

_MIB = 1 << 20
_PER_INODE = 1024  # bytes of the journal for one inode with its name and the record of its pages
_ROW = 2  # words of one slot: the length of the contents, the time of the last write


class Kept:
    """The parts of one store as memfs uses them."""

    __slots__ = ("_free", "_top", "journal", "memory", "table")

    def __init__(self, store: Store, space: Space) -> None:
        try:
            self.memory = store.arena(space.size)
            self.journal = store.journal(
                schema=records.SCHEMA,
                limit=64 * _MIB + space.inodes * _PER_INODE + space.size,  # xattrs are in it too, and count as space
                full=lambda: FUSEError(errno.ENOSPC),
            )
            self.table = store.table(_ROW * (space.inodes + (space.size >> PAGE_SHIFT) + 64))
        except (OSError, OverflowError) as error:
            raise ValueError(f"size {space.size} is more than a process can address here") from error
        self._free: list[int] = []
        self._top = 0

    def take_slot(self, size: int, stamp: int) -> int:
        """Take a row of the table that no record names, and fill it; return the index of its first word."""
        free = self._free
        if free:
            slot = free.pop()
        else:
            slot = self._top
            self._top = slot + _ROW
        self.table[slot] = size
        self.table[slot + 1] = stamp
        return slot

    def give_slot(self, slot: int) -> None:
        """Take a row back; no record that counts names it any more."""
        self._free.append(slot)

    def adopt_slots(self, used: set[int]) -> None:
        """Begin with these rows in use."""
        self._top = max(used, default=-_ROW) + _ROW
        self._free = [slot for slot in range(self._top - _ROW, -1, -_ROW) if slot not in used]
