"""What is in one file: its length, and where in the arena its pages are.

Owns the extents of a file: (first page in the file, first page in the arena, count), sorted, never overlapping;
what no extent covers is a hole and reads as zeros. Knows nothing of inodes, names or permissions.
Invariant: in an allocated page every byte at or beyond the file's length is zero, so growing a file needs no work.

What a kill leaves: the length and the time of the last write are words of the table (the slot), so a write into pages
that are there needs no record. A write sets the length before the bytes (a kill between leaves zeros, never
old bytes, behind the old end), fills new pages before the record that makes them the file's, and sets the time last. A
truncation goes on in a new slot: its record is one change of length and time. Pages are released after that record.
"""

from __future__ import annotations

import errno
from bisect import bisect_right

from pyfuse3 import FUSEError

from . import records
from .arena import PAGE, Arena
from .kept import PAGE_SHIFT

_LAST = 1 << 64  # sorts behind every arena page
_NO_HINT = -1
_ZEROS = bytes(PAGE)
_COPY = 16384  # below this a copy is as cheap as a view

Extent = tuple[int, int, int]


class Contents:
    """The bytes of one regular file."""

    __slots__ = ("_arena", "_extents", "pages", "size", "slot")

    def __init__(self, arena: Arena, slot: int | None = None) -> None:
        """Make empty contents, in a new slot, or those of a slot that is filled (`adopt_words` is to follow)."""
        self._arena = arena
        self._extents: list[Extent] = []
        self.pages = 0
        self.slot = arena.kept.take_slot(0, 0) if slot is None else slot
        self.size = 0

    @property
    def extents(self) -> tuple[Extent, ...]:
        """Where the allocated pages are, in the order of the file."""
        return tuple(self._extents)

    def read(self, offset: int, length: int) -> bytes | bytearray | memoryview:
        """Return what is at *offset*, shorter only at the end of the file.

        A long result may be a view of the arena: it is valid until the next change of any file.
        """
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        extents = self._extents
        arena = self._arena
        i = bisect_right(extents, (offset >> PAGE_SHIFT, _LAST, 0)) - 1
        if i >= 0:
            start, place, count = extents[i]
            if end <= (start + count) << PAGE_SHIFT:
                at = ((place - start) << PAGE_SHIFT) + offset
                if end - offset < _COPY:
                    return arena.memory[at : at + end - offset]
                return arena.view[at : at + end - offset]
        else:
            i = 0
        result = bytearray(end - offset)
        view = arena.view
        for i in range(i, len(extents)):  # noqa: B020 - goes on from the extent found above
            start, place, count = extents[i]
            low = max(offset, start << PAGE_SHIFT)
            high = min(end, (start + count) << PAGE_SHIFT)
            if low >= end:
                break
            if low < high:
                shift = (place - start) << PAGE_SHIFT
                result[low - offset : high - offset] = view[low + shift : high + shift]
        return result

    def write(self, offset: int, data: bytes | memoryview) -> int:
        """Write *data* at *offset*; return how much fitted, which is less only when space ran out (ENOSPC: nothing)."""
        if not data:
            return 0
        end = offset + len(data)
        extents = self._extents
        i = bisect_right(extents, (offset >> PAGE_SHIFT, _LAST, 0)) - 1
        if i >= 0:
            start, place, count = extents[i]
            if end <= (start + count) << PAGE_SHIFT:
                at = ((place - start) << PAGE_SHIFT) + offset
                if end > self.size:
                    self._grow(end)
                self._arena.memory[at : at + end - offset] = data
                return end - offset
        journal = self._arena.kept.journal
        journal.require(((len(data) >> PAGE_SHIFT) + 2) * records.run.size + 64)
        added: list[Extent] = []
        filled = self._fill(offset, end, added)
        if filled < end:
            if filled <= offset:
                raise FUSEError(errno.ENOSPC)
            end = filled
        if end > self.size:
            self._grow(end)
        self._copy_in(offset, end, data)
        if added:
            runs = b"".join([records.run.pack(*extent) for extent in added])
            journal.append(records.pages.pack(records.PAGES, self.slot, len(added)) + runs)
        return end - offset

    def _grow(self, size: int) -> None:
        self._arena.kept.table[self.slot] = size
        self.size = size

    def stamp(self, now: int) -> None:
        """Keep the time of a write."""
        self._arena.kept.table[self.slot + 1] = now

    def _fill(self, offset: int, end: int, added: list[Extent]) -> int:
        """Allocate what is missing of the pages of [offset, end); return the end of what is there now.

        Of the new pages, the bytes outside [offset, end) are zeroed; those inside are the caller's to overwrite.
        """
        extents = self._extents
        view = self._arena.view
        first = page = offset >> PAGE_SHIFT
        last = (end - 1) >> PAGE_SHIFT
        i = bisect_right(extents, (page, _LAST, 0)) - 1
        while page <= last:
            if i + 1 < len(extents) and extents[i + 1][0] <= page:
                i += 1
            hint = _NO_HINT
            if i >= 0:
                start, place, count = extents[i]
                if page < start + count:
                    page = start + count
                    continue
                if page == start + count:
                    hint = place + count
            stop = last + 1 if i + 1 >= len(extents) else min(last + 1, extents[i + 1][0])
            for place, count in self._arena.allocate(stop - page, hint):
                if page == first and offset % PAGE:
                    at = place << PAGE_SHIFT
                    view[at : at + offset % PAGE] = _ZEROS[: offset % PAGE]
                if page + count == last + 1 and end % PAGE:
                    at = (place + count) << PAGE_SHIFT
                    view[at - PAGE + end % PAGE : at] = _ZEROS[end % PAGE :]
                i = self._insert(i, page, place, count)
                added.append((page, place, count))
                self.pages += count
                page += count
            if page < stop:
                return min(end, page << PAGE_SHIFT)
        return end

    def _insert(self, i: int, page: int, place: int, count: int) -> int:
        """Put a new extent behind extent *i*, merged with it where both run on; return its index."""
        extents = self._extents
        if i >= 0:
            start, before, length = extents[i]
            if start + length == page and before + length == place:
                extents[i] = (start, before, length + count)
                return i
        extents.insert(i + 1, (page, place, count))
        return i + 1

    def _copy_in(self, offset: int, end: int, data: bytes | memoryview) -> None:
        """Copy data over [offset, end), all of which is allocated."""
        source = memoryview(data)
        view = self._arena.view
        extents = self._extents
        i = bisect_right(extents, (offset >> PAGE_SHIFT, _LAST, 0)) - 1
        low = offset
        while low < end:
            start, place, count = extents[i]
            high = min(end, (start + count) << PAGE_SHIFT)
            shift = (place - start) << PAGE_SHIFT
            view[low + shift : high + shift] = source[low - offset : high - offset]
            low = high
            i += 1

    def prepare(self, size: int, stamp: int) -> tuple[int, bytes]:
        """Return a slot with this length and time, and the record that makes it ours; `cut` is to follow."""
        slot = self._arena.kept.take_slot(size, stamp)
        return slot, records.move.pack(records.MOVE, self.slot, slot, size)

    def cut(self, slot: int, size: int) -> None:
        """Go on in the new slot: pages beyond the length are freed, bytes behind the old one read as zeros."""
        self._arena.kept.give_slot(self.slot)
        self.slot = slot
        self._shorten(size)

    def drop(self) -> None:
        """Free all pages and the slot; the record that says so is committed."""
        self._shorten(0)
        self._arena.kept.give_slot(self.slot)

    def _shorten(self, size: int) -> None:
        if size < self.size and self._extents:
            keep = (size + PAGE - 1) >> PAGE_SHIFT
            extents = self._extents
            while extents:
                start, place, count = extents[-1]
                if start >= keep:
                    extents.pop()
                    self._arena.release(place, count)
                    self.pages -= count
                    continue
                over = start + count - keep
                if over > 0:
                    extents[-1] = (start, place, count - over)
                    self._arena.release(place + count - over, over)
                    self.pages -= over
                elif start + count < keep:
                    break  # the last page is a hole
                if size % PAGE:
                    at = (place + keep - start) << PAGE_SHIFT
                    self._arena.view[at - PAGE + size % PAGE : at] = _ZEROS[size % PAGE :]
                break
        self.size = size

    # what records do to contents that are being loaded; the arena and the table learn of them later

    def adopt_run(self, page: int, place: int, count: int) -> None:
        """Take over a run of pages. It may be there already, when a snapshot was taken in the middle of a write."""
        extents = self._extents
        i = bisect_right(extents, (page, _LAST, 0)) - 1
        if i >= 0 and page < extents[i][0] + extents[i][2]:
            return
        self._insert(i, page, place, count)
        self.pages += count

    def adopt_runs(self, extents: list[Extent]) -> None:
        """Take over all runs of a snapshot."""
        self._extents = extents
        self.pages = extents[0][2] if len(extents) == 1 else sum([count for _, _, count in extents])

    def adopt_words(self, table: memoryview[int], used: set[int], runs: list[tuple[int, int]]) -> int:
        """Take over the length; add slot and runs to those in use; return the time of the last write, 0 for none."""
        slot = self.slot
        self.size = table[slot]
        used.add(slot)
        extents = self._extents
        if len(extents) == 1:  # as most have
            runs.append(extents[0][1:])
        else:
            runs += [(place, count) for _, place, count in extents]
        return table[slot + 1]

    def adopt_move(self, slot: int, size: int) -> None:
        """Take over a truncation."""
        keep = (size + PAGE - 1) >> PAGE_SHIFT
        extents = self._extents
        while extents and extents[-1][0] + extents[-1][2] > keep:
            start, place, count = extents.pop()
            if start < keep:
                extents.append((start, place, keep - start))
                self.pages -= start + count - keep
                break
            self.pages -= count
        self.slot = slot

    def zero_tail(self) -> None:
        """Do what `cut` does last: a kill may have come between."""
        extents = self._extents
        page = self.size >> PAGE_SHIFT
        if self.size % PAGE and extents:
            start, place, count = extents[-1]
            if start <= page < start + count:
                at = (place + page - start) << PAGE_SHIFT
                self._arena.view[at + self.size % PAGE : at + PAGE] = _ZEROS[self.size % PAGE :]
