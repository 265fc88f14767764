"""Where the clusters of one file or directory are: the runs of its chain, as far as they were looked up.

Owns: the way from a position in a file to a place on the volume, and the bounds that keep a damaged chain from leading
anywhere or nowhere for ever. Must never: change the table. Called by: stream.py and contents.py.

Eight bytes for each run. A chain is looked up no further than it is asked for, and never further than its limit.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right

from .change import Run
from .damage import Damaged
from .table import END, Table
from .turns import Turn


class Chain:
    """One chain. `first` is 0 while there is none."""

    __slots__ = ("_at", "_first", "_limit", "_mark", "_next", "_steps", "_table", "_turn", "first", "known")

    def __init__(self, table: Table, first: int, limit: int) -> None:
        """*limit*: more clusters than that make no sense for it. Damaged if *first* cannot be."""
        if first and not 2 <= first <= table.last:
            raise Damaged(f"an entry names cluster {first}, which does not exist")
        self._table = table
        self._limit = limit
        self._turn = Turn()
        self.first = first
        self._at = array("I")  # of each run: where in the file it begins, in clusters,
        self._first = array("I")  # and where on the volume
        self.known = 0  # clusters that are looked up
        self._next = first or END
        self._mark = 0  # of Brent's search for a loop: a run that was passed, and how far to go until the next
        self._steps = 1

    @property
    def is_complete(self) -> bool:
        """Whether `known` is all."""
        return self._next == END

    @property
    def last(self) -> int:
        """The last of the known clusters, 0 if there is none."""
        return self._first[-1] + self.known - self._at[-1] - 1 if self.known else 0

    def has(self, index: int) -> bool:
        """Whether the cluster of this index is looked up."""
        return index < self.known

    async def reach(self, count: int) -> int:
        """Look up the first *count* clusters; how many of them there are."""
        if count > self.known and self._next != END:
            async with self._turn:
                while count > self.known and self._next != END:
                    if self.known > self._limit:
                        raise Damaged("a chain of clusters has no end")
                    await self._extend(count)
        return min(count, self.known)

    async def all(self) -> int:
        """Look up everything; how many there are. Damaged if that is more than the limit."""
        await self.reach(self._limit + 1)
        if self.known > self._limit:
            raise Damaged("a chain of clusters has no end")
        return self.known

    async def _extend(self, count: int) -> None:
        begin = self._next
        if begin < 2:
            raise Damaged("a chain of clusters leads into one that is free or bad")
        if begin == self._mark:
            raise Damaged("a chain of clusters is a loop")
        length, following = await self._table.run(begin, min(count, self._limit + 1) - self.known)
        if begin < self._mark < begin + length:
            raise Damaged("a chain of clusters is a loop")
        self._steps -= 1
        if not self._steps:
            self._mark = begin
            self._steps = len(self._at) + 1
        self._add(begin, length)
        self._next = following

    def _add(self, first: int, count: int) -> None:
        if not self.known or self.last + 1 != first:
            self._at.append(self.known)
            self._first.append(first)
        self.known += count

    def place(self, index: int) -> Run:
        """The cluster of this index, which is looked up, and how many follow each other from there."""
        run = bisect_right(self._at, index) - 1
        within = index - self._at[run]
        stop = self._at[run + 1] if run + 1 < len(self._at) else self.known
        return self._first[run] + within, stop - index

    def runs(self, index: int, stop: int) -> list[Run]:
        """All from this index on to that one; they are looked up."""
        found = []
        while index < stop:
            first, count = self.place(index)
            count = min(count, stop - index)
            found.append((first, count))
            index += count
        return found

    # ---- after a change

    def append(self, runs: list[Run]) -> None:
        """These were added; everything had been looked up."""
        if not self.first:
            self.first = runs[0][0]
        for first, count in runs:
            self._add(first, count)

    def cut(self, count: int) -> None:
        """Only so many clusters are left."""
        if not count:
            self.first = 0
        while self._at and self._at[-1] >= count:
            self._at.pop()
            self._first.pop()
        self.known = min(self.known, count)
        self._next = END
        self._mark, self._steps = 0, len(self._at) + 1
