"""Entries into slots: where they go, and in which order their bytes are written.

Owns: the order of writes, the end mark, growth, and what of a directory is given up so that one write is enough.
Must never: know a name; which slots are free is the index's.
Called by: directory.py, which explains why it is done like this.
"""

from __future__ import annotations

import errno
import itertools
from typing import Protocol

from . import entries
from .damage import Damaged
from .entries import END, FREE, MAX_SLOTS, PER_SECTOR, SLOT, Found
from .index import Index

_PIECE = 64 * 1024  # read at once
_PADDED = 64 * 1024  # directories up to this size waste slots so that no entry straddles sectors


class Stream(Protocol):
    """The bytes of a directory."""

    @property
    def size(self) -> int:
        """Allocated bytes: whole clusters, or all of the fixed root."""
        ...

    async def read(self, offset: int, size: int) -> bytes:
        """Exactly these bytes."""
        ...

    async def write(self, offset: int, data: bytes) -> None:
        """They are on the device when this returns; what lies in one sector is done or not done."""
        ...

    async def grow(self) -> None:
        """One cluster of zeros more; OSError with ENOSPC when there is none, or none is possible."""
        ...


class Slots:
    """The slots of one directory, for writing."""

    def __init__(self, stream: Stream, is_fixed: bool) -> None:
        """*is_fixed*: it cannot grow."""
        self.stream = stream
        self.is_fixed = is_fixed
        self.is_touched = False  # something was written, or may have been, since the caller set it to False

    def capacity(self) -> int:
        """Slots that are there and that FAT allows."""
        return min(self.stream.size // SLOT, MAX_SLOTS)

    async def patch(self, slot: int, raw: bytes) -> None:
        """Replace one slot."""
        await self._store(slot * SLOT, raw)

    async def write(self, index: Index, raw: bytes, units: bytes) -> Found:
        """Write an entry where there is room, the long name first. Its names are not in the index yet."""
        data = (entries.long_slots(units, raw[:11]) if units else b"") + raw
        slots = len(data) // SLOT
        slot = await self._room(index, slots)
        await self._keep_apart(index, slot, slots)
        # From behind: what is to end at a sector's edge for a moment must not show what was left there.
        for _, last in reversed(_sectors(slot, slots)):
            await self._end_at(index, last)
        for first, last in _sectors(slot, slots):
            await self._store(first * SLOT, data[(first - slot) * SLOT : (last - slot) * SLOT])
        index.take(slot, slots)
        return Found(raw, units, slot, slots)

    async def _keep_apart(self, index: Index, slot: int, slots: int) -> None:
        """What a cut has left of a long name must not lie next to an entry, as if it were a part of one: it goes."""
        for near in (slot - 1, slot + slots):
            if 0 <= near < index.end and index.is_free(near) and await self._first_of(near) != FREE:
                await self.clear_orphans(index)

    async def _first_of(self, slot: int) -> int:
        return (await self.stream.read(slot * SLOT, SLOT))[0]

    async def _room(self, index: Index, slots: int) -> int:
        """Where there are so many slots: in a hole of one sector, at the end, in any hole, in a new cluster."""
        if (slot := index.hole(slots, in_one_sector=True)) is not None:
            return slot
        end = index.end
        left = -end % PER_SECTOR  # in the sector of the end
        skip = left if left < slots <= PER_SECTOR and end < self._padded() else 0
        if end + slots > self.capacity():
            if (slot := index.hole(slots, in_one_sector=False)) is not None:
                return slot
            skip = await self._grow(end, skip, slots)
        elif end + skip + slots > self.capacity():
            skip = 0
        if skip:
            await self._end_at(index, end + skip)
            await self._store(end * SLOT, bytes((FREE,)).ljust(SLOT, b"\0") * skip)
            index.pass_by(end + skip)
        return end + skip

    def _padded(self) -> int:
        """Up to which slot room is wasted: in a large directory, and in half of the fixed root, it matters more."""
        return min(_PADDED, self.stream.size // 2 if self.is_fixed else _PADDED) // SLOT

    async def _grow(self, end: int, skip: int, slots: int) -> int:
        """Grow until the entry fits. How many slots may be skipped for it."""
        if end + skip + slots > MAX_SLOTS:
            skip = 0
        if end + slots > MAX_SLOTS:
            raise OSError(errno.ENOSPC, "the directory is full: FAT gives it 65,536 entries of 32 bytes")
        if self.is_fixed:
            raise OSError(errno.ENOSPC, "the root directory of this volume is full, and cannot grow")
        while end + skip + slots > self.capacity():
            before = self.stream.size
            await self.stream.grow()
            if self.stream.size <= before:
                raise Damaged("the directory does not grow")
        return skip

    async def _end_at(self, index: Index, end: int) -> None:
        """See to it that what is written up to here ends the directory."""
        if index.end < end < self.capacity() and await self._first_of(end) != END:
            await self._store(end * SLOT, bytes(SLOT))

    async def move(self, index: Index, old: Found, new: Found) -> None:
        """Replace an entry by another in the same sector, in one write."""
        await self._keep_apart(index, new.slot, new.slots)
        await self._end_at(index, new.slot + new.slots)
        first = min(old.slot, new.slot)
        last = max(old.slot + old.slots, new.slot + new.slots)
        image = bytearray(await self.stream.read(first * SLOT, (last - first) * SLOT))
        _delete(image, old.slot - first, old.slots)
        data = (entries.long_slots(new.units, new.raw[:11]) if new.units else b"") + new.raw
        at = (new.slot - first) * SLOT
        image[at : at + len(data)] = data
        await self._store(first * SLOT, bytes(image))

    async def erase(self, found: Found) -> None:
        """Mark an entry's slots as deleted, the short entry first."""
        for first, last in reversed(_sectors(found.slot, found.slots)):
            image = bytearray(await self.stream.read(first * SLOT, (last - first) * SLOT))
            _delete(image, 0, last - first)
            await self._store(first * SLOT, bytes(image))

    async def clear_orphans(self, index: Index) -> int:
        """Delete what is neither an entry nor deleted. How many slots that were."""
        cleared = 0
        for start in range(0, index.end, _PIECE // SLOT):
            end = min(start + _PIECE // SLOT, index.end)
            piece = bytearray(await self.stream.read(start * SLOT, (end - start) * SLOT))
            for first, last in _sectors(start, end - start):
                wrong = [n for n in range(first, last) if index.is_free(n) and piece[(n - start) * SLOT] != FREE]
                for slot in wrong:
                    _delete(piece, slot - start, 1)
                if wrong:
                    await self._store(first * SLOT, bytes(piece[(first - start) * SLOT : (last - start) * SLOT]))
                    cleared += len(wrong)
        return cleared

    async def _store(self, offset: int, data: bytes) -> None:
        self.is_touched = True
        await self.stream.write(offset, data)


def _sectors(slot: int, slots: int) -> list[tuple[int, int]]:
    """A run of slots in pieces that are written as one: (first, behind the last)."""
    end = slot + slots
    edges = [slot, *range((slot // PER_SECTOR + 1) * PER_SECTOR, end, PER_SECTOR), end]
    return list(itertools.pairwise(edges))


def _delete(image: bytearray, first: int, slots: int) -> None:
    for slot in range(first, first + slots):
        image[slot * SLOT] = FREE
