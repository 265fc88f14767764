"""Flat tables in one sparse memfd: columns of integers, a name arena, linear hash indexes.

Owns the memory that the shim's node table lives in. A node costs bytes here, not Python objects, and the whole
file can be handed to a successor process by its descriptor. Nothing here knows what a node is.

Slots are small integers from 1; 0 means none. Pages are touched only when a slot is used, so a large capacity is free.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing would cost the shim memory
    from typing import Literal

NAME_UNIT = 8
NAME_MAX = 4095  # the kernel's FUSE_NAME_MAX since it lifts 1024 for max_pages > 1


class Columns:
    """A bump allocator of columns over one sparse, shared memory file.

    The capacity is fixed when the file is made; the memory is charged as it is touched.
    """

    def __init__(self, name: str, size: int) -> None:
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self._map = mmap.mmap(self.fd, size)
        self._view = memoryview(self._map)
        self._used = 0

    def bytes(self, size: int) -> memoryview:
        """Return the next *size* bytes, page-aligned, zero-filled."""
        start = self._used
        self._used = start + (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
        if self._used > len(self._view):
            raise MemoryError("column file too small")
        return self._view[start : start + size]

    def integers(self, code: Literal["I", "Q"], count: int) -> memoryview[int]:
        """Return a column of *count* integers of struct code *code*."""
        return self.bytes(count * (4 if code == "I" else 8)).cast(code)

    def floats(self, count: int) -> memoryview[float]:
        """Return a column of *count* doubles."""
        return self.bytes(count * 8).cast("d")


class SlotsExhausted(Exception):
    """The table is full: the caller answers ENOMEM."""


class Slots:
    """Allocation of slot numbers: a free list through one column, then the next unused number."""

    def __init__(self, next_free: memoryview) -> None:
        self._next = next_free
        self._free = 0
        self.top = 1  # no slot from here on was ever used
        self.used = 0

    def take(self) -> int:
        """Return a free slot number. Raises SlotsExhausted."""
        slot = self._free
        if slot:
            self._free = self._next[slot]
        else:
            slot = self.top
            if slot >= len(self._next):
                raise SlotsExhausted
            self.top = slot + 1
        self.used += 1
        return slot

    def give(self, slot: int) -> None:
        """Return *slot* to the free list."""
        self._next[slot] = self._free
        self._free = slot
        self.used -= 1


class Index:
    """A linear hash: chains through a column, growing by a bucket for every other entry, so that no insert is slow.

    The hash of an entry is asked for again when its bucket splits (*hash_of*), or kept in a column by the owner.
    """

    def __init__(self, buckets: memoryview, chain: memoryview, hash_of: Callable[[int], int]) -> None:
        self.buckets = buckets
        self.chain = chain
        self._hash_of = hash_of
        self.base = 256  # buckets before the current doubling
        self.split = 0  # of these, how many are already split
        self.count = 0

    def first(self, hashed: int) -> int:
        """Return the first slot of the chain that *hashed* belongs to (0: none)."""
        bucket = hashed & (self.base - 1)
        if bucket < self.split:
            bucket = hashed & (2 * self.base - 1)
        slot: int = self.buckets[bucket]
        return slot

    def _bucket(self, hashed: int) -> int:
        bucket = hashed & (self.base - 1)
        return hashed & (2 * self.base - 1) if bucket < self.split else bucket

    def add(self, slot: int, hashed: int) -> None:
        """Put *slot* in front of its chain."""
        bucket = hashed & (self.base - 1)
        if bucket < self.split:
            bucket = hashed & (2 * self.base - 1)
        buckets = self.buckets
        self.chain[slot] = buckets[bucket]
        buckets[bucket] = slot
        self.count += 1
        if self.count > 2 * (self.base + self.split) and 2 * self.base <= len(self.buckets):
            self._grow()

    def remove(self, slot: int, hashed: int) -> None:
        """Take *slot* out of its chain."""
        bucket = self._bucket(hashed)
        chain = self.chain
        at = self.buckets[bucket]
        if at == slot:
            self.buckets[bucket] = chain[slot]
        else:
            while chain[at] != slot:
                at = chain[at]
            chain[at] = chain[slot]
        self.count -= 1

    def _grow(self) -> None:
        old, new = self.split, self.split + self.base
        mask = 2 * self.base - 1
        chain, hash_of = self.chain, self._hash_of
        at, stay, move = self.buckets[old], 0, 0
        while at:
            following = chain[at]
            if hash_of(at) & mask == old:
                chain[at], stay = stay, at
            else:
                chain[at], move = move, at
            at = following
        self.buckets[old], self.buckets[new] = stay, move
        self.split += 1
        if self.split == self.base:
            self.base *= 2
            self.split = 0


class Names:
    """The name arena: names in whole 8-byte units, freed ones on lists by length; a reference is an int."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._top = 1  # unit 0 is never used, so that a reference is never 0
        self._free: dict[int, list[int]] = {}

    def put(self, name: bytes) -> int:
        """Store *name* (at most NAME_MAX bytes). Raises SlotsExhausted when the arena is full."""
        size = len(name)
        units = (size + 2 + NAME_UNIT - 1) // NAME_UNIT
        free = self._free.get(units)
        if free:
            ref = free.pop()
        else:
            ref = self._top
            if (ref + units) * NAME_UNIT > len(self._memory):
                raise SlotsExhausted
            self._top = ref + units
        at = ref * NAME_UNIT
        self._memory[at : at + 2 + size] = size.to_bytes(2, "little") + name
        return ref

    def get(self, ref: int) -> bytes:
        """Return the name at *ref*."""
        at = ref * NAME_UNIT
        memory = self._memory
        return bytes(memory[at + 2 : at + 2 + (memory[at] | memory[at + 1] << 8)])

    def drop(self, ref: int) -> None:
        """Free the name at *ref*."""
        at = ref * NAME_UNIT
        size = self._memory[at] | self._memory[at + 1] << 8
        self._free.setdefault((size + 2 + NAME_UNIT - 1) // NAME_UNIT, []).append(ref)
