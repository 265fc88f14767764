"""The memory of a state store: one sparse memfd that outlives every driver process, and its regions.

Owns where in the memfd what is, and the header's words. Knows nothing of records (journal.py) or of what authors keep.
Must never: import more than the standard library, because the supervisor makes the memfd and holds it.
Called by: the supervisor (`create_memfds`), store.py and journal.py.

What a process wrote through a shared mapping stays when it is killed at any instruction, in the order in which it
wrote: one machine, one writer, no power loss. So a commit needs no flush, only that its word is written last, by one
store instruction. Native formats of `memoryview` and `struct` do that; "<Q" writes byte by byte and does not.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Literal

DESCRIPTORS = 1  # how many travel beside the link in `start` and `take_over`

# Regions are far apart: a memfd is sparse, and what was never written costs nothing.
HEADER = 0
JOURNALS = (1 << 40, 2 << 40)
TABLE = 3 << 40
ARENA = 4 << 40

HEADER_SIZE = 4096
_MAP_NORESERVE = 0x4000  # not in the module before Python 3.13


def create_memfds(name: str) -> list[int]:
    """Make the descriptors of an empty store; whoever holds one of them keeps what is in it alive."""
    return [os.memfd_create(f"udf-store-{name}"[:200], os.MFD_CLOEXEC)]


class Memory:
    """The mapped regions of one store."""

    def __init__(self, fds: Sequence[int] | None) -> None:
        """Take the descriptors over, or, with None, use memory that ends with this process."""
        if fds is not None and len(fds) != DESCRIPTORS:
            raise ValueError(f"a state store has {DESCRIPTORS} descriptors, not {len(fds)}")
        self._fd = None if fds is None else fds[0]
        self._maps: list[mmap.mmap] = []
        self._views: list[memoryview[int]] = []
        self.header = self.words(HEADER, HEADER_SIZE // 8, "Q")

    def map(self, region: int, size: int) -> mmap.mmap:
        """Map the first *size* bytes of a region; what was never written reads as zeros."""
        # Shared, so that MADV_REMOVE frees memory in the middle; not reserved, because most of it is never used.
        flags = mmap.MAP_SHARED | _MAP_NORESERVE
        if self._fd is None:
            mapped = mmap.mmap(-1, size, flags=flags | mmap.MAP_ANONYMOUS)
        else:
            if os.fstat(self._fd).st_size < region + size:
                os.ftruncate(self._fd, region + size)
            mapped = mmap.mmap(self._fd, size, flags=flags, offset=region)
        self._maps.append(mapped)
        return mapped

    def words(self, region: int, count: int, kind: Literal["q", "Q"]) -> memoryview[int]:
        """Map the first *count* words of a region, signed (q) or not (Q)."""
        view = memoryview(self.map(region, count * 8)).cast(kind)
        self._views.append(view)
        return view

    def close(self) -> None:
        """Let go of descriptors and mappings; nobody may have a view of them any more."""
        for view in self._views:
            view.release()
        for mapped in self._maps:
            mapped.close()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def give_back(mapped: mmap.mmap, start: int, end: int) -> None:
    """Give the memory of whole pages within [start, end) back to the system; they read as zeros then."""
    start = (start + mmap.PAGESIZE - 1) & -mmap.PAGESIZE
    end &= -mmap.PAGESIZE
    if end > start:
        mapped.madvise(mmap.MADV_REMOVE, start, end - start)
