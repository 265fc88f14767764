"""Pages of memory for file contents: one sparse mapping, handed out in runs of 4 KiB pages.

Owns which pages are in use and gives the memory of unused ones back to the system. Knows nothing of files; contents.py
is its only user. A run is (first page, count). Pages come with arbitrary old bytes in them: whoever takes
them overwrites or zeroes them.

Runs that are free are kept by start, by end (to merge neighbours) and in buckets by the power of two of their length
(to find one that is long enough at once); pages from `_top` on were never used or are free again.
"""

from __future__ import annotations

import mmap

from .space import Space

PAGE_SHIFT = 12
PAGE = 1 << PAGE_SHIFT

_MAP_NORESERVE = 0x4000  # not in the module before Python 3.13
_TRIM_AT_ONCE = 64  # a freed run of this many pages goes back to the system in its own call
_TRIM_RUN = 16  # shorter free runs are not worth a system call even in a sweep
_TRIM_STALE = 4096  # sweep when this many freed pages still hold memory (16 MiB)


class Arena:
    """A page allocator over one mapping; its limit is the `Space` it draws on."""

    __slots__ = ("_buckets", "_by_end", "_by_start", "_mask", "_peak", "_stale", "_top", "memory", "space", "view")

    def __init__(self, space: Space) -> None:
        self.space = space
        # Shared, so that MADV_REMOVE frees memory in the middle; not reserved, because most of it is never used.
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            self.memory = mmap.mmap(-1, space.size, flags=flags)
        except (OSError, OverflowError) as error:
            raise ValueError(f"size {space.size} is more than a process can address here") from error
        self.view = memoryview(self.memory)
        self._by_start: dict[int, int] = {}  # first page -> count
        self._by_end: dict[int, int] = {}  # page after the last -> first page
        self._buckets: list[dict[int, None]] = [{} for _ in range(64)]
        self._mask = 0  # bit k: bucket k (counts of 2**k … 2**(k+1)-1) is not empty
        self._top = 0
        self._peak = 0  # pages from here on hold no memory
        self._stale = 0

    def allocate(self, count: int, hint: int) -> list[tuple[int, int]]:
        """Take runs of together *count* pages, or of fewer when space is out; at *hint* first where that is free."""
        count = min(count, self.space.left >> PAGE_SHIFT)
        self.space.left -= count << PAGE_SHIFT
        runs = []
        while count:
            start, length = self._find(count, hint)
            if length > count:
                self._insert(start + count, length - count)
                length = count
            count -= length
            hint = start + length
            runs.append((start, length))
        return runs

    def _find(self, count: int, hint: int) -> tuple[int, int]:
        """Take a free run out: the one at *hint*, else one that is long enough, else new pages, else the longest."""
        if hint in self._by_start:
            return hint, self._remove(hint)
        end = self.space.size >> PAGE_SHIFT
        fits = self._mask >> (count - 1).bit_length()
        if self._top < end and (hint == self._top or (not fits and self._top + count <= end) or not self._mask):
            start = self._top
            length = min(count, end - start)
            self._top = start + length
            self._peak = max(self._peak, self._top)
            return start, length
        if fits:
            fits &= -fits
            start = next(iter(self._buckets[fits.bit_length() - 1 + (count - 1).bit_length()]))
        else:
            start = next(iter(self._buckets[self._mask.bit_length() - 1]))
        return start, self._remove(start)

    def release(self, start: int, count: int) -> None:
        """Take the run back; its memory goes back to the system now or in a later sweep."""
        self.space.left += count << PAGE_SHIFT
        if count >= _TRIM_AT_ONCE:
            self._trim(start, count)
        else:
            self._stale += count
        before = self._by_end.get(start)
        if before is not None:
            count += self._remove(before)
            start = before
        if start + count in self._by_start:
            count += self._remove(start + count)
        if start + count == self._top:
            self._top = start
        else:
            self._insert(start, count)
        if self._stale >= _TRIM_STALE:
            self._sweep()

    def _insert(self, start: int, count: int) -> None:
        self._by_start[start] = count
        self._by_end[start + count] = start
        bucket = count.bit_length() - 1
        self._buckets[bucket][start] = None
        self._mask |= 1 << bucket

    def _remove(self, start: int) -> int:
        count = self._by_start.pop(start)
        del self._by_end[start + count]
        bucket = count.bit_length() - 1
        runs = self._buckets[bucket]
        del runs[start]
        if not runs:
            self._mask &= ~(1 << bucket)
        return count

    def _trim(self, start: int, count: int) -> None:
        self.memory.madvise(mmap.MADV_REMOVE, start << PAGE_SHIFT, count << PAGE_SHIFT)

    def _sweep(self) -> None:
        for bucket in range(_TRIM_RUN.bit_length() - 1, self._mask.bit_length()):
            for start in self._buckets[bucket]:
                self._trim(start, self._by_start[start])
        if self._peak > self._top:
            self._trim(self._top, self._peak - self._top)
            self._peak = self._top
        self._stale = 0
