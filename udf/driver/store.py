"""The state store as authors get it: what is in it outlives the driver's process.

Owns the parts of one store and who uses them: either dicts and files (shelf.py), or the raw journal, arena and table
of a driver that keeps its own records (fs/memfs). Must never: hold state of a driver itself.
Called by: a driver whose manifest says `durability = "store"`; the host makes it from the descriptors that the
supervisor holds and gives to each generation, and passes it as the keyword `store`.

A handler answers only when the change is committed; each call below commits before it returns.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from udf.driver.journal import Full, Journal, Migration
from udf.driver.memory import ARENA, TABLE, Memory
from udf.driver.shelf import Shelf, StoreDict, StoreFile

LIMIT = 1 << 30  # bytes of records, and bytes of files, unless the author says otherwise


class Store:
    """The state of one mount. One process at a time may have it open."""

    def __init__(self, fds: Sequence[int]) -> None:
        """Open the store with these descriptors, which become the store's own."""
        self._memory = Memory(fds)
        self._shelf: Shelf | None = None
        self._journal: Journal | None = None

    @classmethod
    def temporary(cls) -> Store:
        """Make a store that ends with this process: for a driver that is mounted without a supervisor."""
        store = cls.__new__(cls)
        store._memory = Memory(None)
        store._shelf = None
        store._journal = None
        return store

    # for most drivers

    def open(self, *, schema: int = 1, limit: int = LIMIT, size: int = LIMIT) -> None:
        """Say which schema the dicts and files have (1), and their bounds: bytes of records, bytes of files.

        UserError when the store has another schema. Without this call the first `dict` or `file` opens it so.
        """
        if self._shelf is not None or self._journal is not None:
            raise RuntimeError("the state store is open already")
        journal = self._journal = Journal(self._memory, limit, schema)
        self._shelf = Shelf(journal, self.arena(size))

    def dict(self, name: str) -> StoreDict:
        """Return the dict of this name: keys are str or bytes, values what msgpack has. A change is there for good."""
        return self._shelves().dict(name)

    def file(self, name: str) -> StoreFile:
        """Return the file of this name, empty when it is new."""
        return self._shelves().file(name)

    def _shelves(self) -> Shelf:
        if self._shelf is None:
            self.open()
        assert self._shelf is not None
        return self._shelf

    # for drivers that keep their own records

    def journal(
        self, *, schema: int, limit: int = LIMIT, migrate: Migration | None = None, full: Full | None = None
    ) -> Journal:
        """Open the raw journal of at most *limit* bytes; *full* makes the exception raised then, else OSError(ENOSPC).

        `migrate(found schema, records)` gives the records of this schema; the old ones stay until all are there.
        UserError when the schema is another and there is no migration.
        """
        if self._journal is not None:
            raise RuntimeError("the state store is open already")
        self._journal = Journal(self._memory, limit, schema, migrate, full)
        return self._journal

    def arena(self, size: int) -> mmap.mmap:
        """Map the bulk memory, *size* bytes: zeros at first, then what was last written there, by whichever process."""
        return self._memory.map(ARENA, size)

    def table(self, count: int) -> memoryview[int]:
        """Map *count* signed words of 64 bits; setting one is done entirely or not at all."""
        return self._memory.words(TABLE, count, "q")

    def close(self) -> None:
        """Let go of all memory; what was got from this store must not be used any more."""
        self._memory.close()
