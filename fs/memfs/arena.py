"""Pages of memory for file contents: the store's arena, handed out in runs of 4 KiB pages.

Owns which pages are in use and gives the memory of unused ones back to the system. Knows nothing of files; contents.py
is its only user. A run is (first page, count). Pages come with arbitrary old bytes in them: whoever takes
them overwrites or zeroes them. Which pages are in use is not kept: it follows from the files (`adopt`).

Runs that are free are kept by start, by end (to merge neighbours) and in buckets by the power of two of their length
(to find one that is long enough at once); pages from `_top` on were never used or are free again.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable

from udf import Store

from .kept import PAGE_SHIFT, Kept
from .space import Space

PAGE = 1 << PAGE_SHIFT

_TRIM_AT_ONCE = 64  # a freed run of this many pages goes back to the system in its own call
_TRIM_RUN = 16  # shorter free runs are not worth a system call even in a sweep
_TRIM_STALE = 4096  # sweep when this many freed pages still hold memory (16 MiB)


class Arena:
    """A page allocator over one mapping; its limit is the `Space` it draws on."""

    __slots__ = (
        "_buckets",
        "_by_end",
        "_by_start",
        "_mask",
        "_peak",
        "_stale",
        "_top",
        "kept",
        "memory",
        "space",
        "view",
    )

    def __init__(self, space: Space, kept: Kept | None = None) -> None:
        """Start with all pages free; without *kept* they end with this process."""
        self.space = space
        self.kept = kept = kept or Kept(Store.temporary(), space)
        self.memory = kept.memory
        self.view = memoryview(self.memory)
        self._by_start: dict[int, int] = {}  # first page -> count
        self._by_end: dict[int, int] = {}  # page after the last -> first page
        self._buckets: list[dict[int, None]] = [{} for _ in range(64)]
        self._mask = 0  # bit k: bucket k (counts of 2**k … 2**(k+1)-1) is not empty
        self._top = 0
        self._peak = 0  # pages from here on hold no memory
        self._stale = 0

    def adopt(self, runs: Iterable[tuple[int, int]]) -> None:
        """Begin with these runs in use, all others free. ValueError when they overlap or are not within the arena."""
        top = 0
        for start, count in sorted(runs):
            if start < top:
                raise ValueError("two files have the same page")
            if start > top:
                self._insert(top, start - top)
                self._stale += start - top  # what they hold is given back by the next sweep
            top = start + count
            self.space.left -= count << PAGE_SHIFT
        if top << PAGE_SHIFT > self.space.size:
            raise ValueError(f"the files there are need more than size {self.space.size}")
        self._top = self._peak = top
        end = self.space.size >> PAGE_SHIFT
        if end > top:
            self._trim(top, end - top)

    def allocate(self, count: int, hint: int) -> list[tuple[int, int]]:
        """Take runs of together *count* pages, or of fewer when space is out; at *hint* first where that is free."""
        count = max(0, min(count, self.space.left >> PAGE_SHIFT))
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
