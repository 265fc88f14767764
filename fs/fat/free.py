"""Free clusters: which they are, how many, and which are taken next.

Owns: what is known of the free clusters, window by window of the table, and the count for statfs and FSInfo.
Must never: look at the whole table to find one cluster, hold more of it than a few windows, give out a cluster twice,
or one that was freed since the last flush: what its old owner had must be there if the power goes.
Called by: volume.py and stream.py, within a change; contents.py, ahead of one.

A window is 16384 entries. Its map has a byte for each: 1 for free. Of a window that was ever looked at its number of
free clusters is remembered, so that full ones are passed over.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict

from .boot import Geometry
from .change import Run, no_space
from .table import Table

WINDOW = 16384  # clusters
_MAPS = 64  # that are kept: 1 MiB
_NEAR = 4  # windows that are looked at for a run that is long enough, before pieces are taken


class Free:
    """The free clusters of one volume."""

    def __init__(self, geometry: Geometry, table: Table) -> None:
        self._table = table
        self._end = geometry.last_cluster + 1
        self._windows = -(-self._end // WINDOW)
        self._maps: OrderedDict[int, bytearray] = OrderedDict()
        self._known = array("i", [-1]) * self._windows  # free ones in each window; -1: not looked at
        self._taken: set[Run] = set()  # and not yet used in the table
        self._held: list[Run] = []  # about to be freed
        self._young: list[Run] = []  # freed, and not to be used before a flush
        self._unsure = self._windows  # windows that were not looked at
        self.total: int | None = None  # None: not known
        self.next = 2

    def start(self, total: int | None, following: int | None) -> None:
        """Begin with what somebody wrote down."""
        self.total = total
        self.next = following or 2

    # ---- windows

    async def _map(self, window: int) -> bytearray:
        found = self._maps.get(window)
        if found is not None:
            self._maps.move_to_end(window)
            return found
        first = max(window * WINDOW, 2)
        free = await self._table.free_map(first, min((window + 1) * WINDOW, self._end) - first)
        return self.look(window, free)

    def look(self, window: int, free: bytearray) -> bytearray:
        """Take a window's map, as the table has it, without the two entries that are no clusters."""
        if window == 0:
            free[:0] = b"\0\0"
        for first, count in (*self._taken, *self._held, *self._young):
            self._mark(free, window, first, count, 0)
        self._maps[window] = free
        if len(self._maps) > _MAPS:
            self._maps.popitem(last=False)
        self._count(window, free.count(1))
        return free

    def _count(self, window: int, count: int) -> None:
        if self._known[window] < 0:
            self._unsure -= 1
        self._known[window] = count
        if not self._unsure:  # what was written down may have been wrong: now it is known
            pending = sum(count for _, count in (*self._taken, *self._young))
            self.total = sum(self._known) + pending

    @staticmethod
    def _mark(free: bytearray, window: int, first: int, count: int, value: int) -> None:
        begin = max(first - window * WINDOW, 0)
        end = min(first + count - window * WINDOW, len(free))
        if begin < end:
            free[begin:end] = bytes((value,)) * (end - begin)

    def _change(self, runs: list[Run], value: int) -> None:
        for first, count in runs:
            for window in range(first // WINDOW, (first + count - 1) // WINDOW + 1):
                here = min(first + count, (window + 1) * WINDOW) - max(first, window * WINDOW)
                if self._known[window] >= 0:
                    self._known[window] += here if value else -here
                free = self._maps.get(window)
                if free is not None:
                    self._mark(free, window, first, count, value)

    @property
    def unknown(self) -> int | None:
        """A window that was never looked at."""
        if not self._unsure:
            return None
        return self._known.index(-1)

    @property
    def so_far(self) -> int:
        """How many are free; as many as were found when it is not known."""
        return sum(count for count in self._known if count > 0) if self.total is None else self.total

    def span(self, window: int) -> Run:
        """Its clusters."""
        first = max(window * WINDOW, 2)
        return first, min((window + 1) * WINDOW, self._end) - first

    # ---- taking

    async def take(self, want: int, goal: int = 0, *, partial: bool = False) -> list[Run]:
        """So many clusters, at *goal* and behind it if that is free. They must be used or put back.

        ENOSPC when there are not so many; *partial*: only when there is none at all.
        """
        if not partial and self.total is not None and not self._unsure and want > self.total:
            raise no_space()
        runs: list[Run] = []
        try:
            if 2 <= goal < self._end:
                window, at = divmod(goal, WINDOW)
                free = await self._map(window)
                if free[at]:
                    self._grab(runs, window, free, at, want)
                    want -= runs[-1][1]
            if want:
                want -= await self._whole(runs, want)
            if want:
                await self._pieces(runs, want, partial)
        except BaseException:
            self.put_back(runs)
            raise
        self.next = runs[-1][0] + runs[-1][1]
        if self.next >= self._end:
            self.next = 2
        return runs

    def _grab(self, runs: list[Run], window: int, free: bytearray, at: int, want: int) -> None:
        end = free.find(0, at, at + want)
        count = (end if end >= 0 else min(len(free), at + want)) - at
        run = window * WINDOW + at, count
        self._change([run], 0)
        self._taken.add(run)
        runs.append(run)

    async def _whole(self, runs: list[Run], want: int) -> int:
        """Take one run that is long enough, if there is one near."""
        pattern = b"\1" * min(want, WINDOW)
        window, at = divmod(self.next, WINDOW)
        for _ in range(min(_NEAR, self._windows)):
            if self._known[window] < 0 or self._known[window] >= len(pattern):
                free = await self._map(window)
                found = free.find(pattern, at)
                if found >= 0:
                    self._grab(runs, window, free, found, len(pattern))
                    return len(pattern)
            window, at = (window + 1) % self._windows, 0
        return 0

    async def _pieces(self, runs: list[Run], want: int, partial: bool) -> None:
        """Take what there is, all around the volume."""
        window, at = divmod(self.next, WINDOW)
        for _ in range(self._windows + 1):
            if self._known[window]:
                free = await self._map(window)
                while want and (at := free.find(1, at)) >= 0:
                    self._grab(runs, window, free, at, want)
                    want -= runs[-1][1]
                if not want:
                    return
            window, at = (window + 1) % self._windows, 0
        if not partial or not runs:
            raise no_space()

    # ---- what became of it

    def put_back(self, runs: list[Run]) -> None:
        """They were not used."""
        runs = [run for run in runs if run in self._taken]
        self._taken.difference_update(runs)
        self._change(runs, 1)

    def hold(self, runs: list[Run]) -> None:
        """These are about to be freed: the table may say so before it is true."""
        self._held += runs

    def let_go(self, runs: list[Run]) -> None:
        """They are not freed after all; the table says again that they are used."""
        self._held = [run for run in self._held if run not in runs]

    def settle(self, taken: list[Run], freed: list[Run]) -> None:
        """A change is on the device."""
        self._taken.difference_update(taken)
        if freed:
            self.let_go(freed)
            self._young += freed
        if self.total is not None:
            self.total += sum(count for _, count in freed) - sum(count for _, count in taken)
            self.total = min(max(self.total, 0), self._end - 2)

    @property
    def young(self) -> int:
        """How many runs there would be more after a flush."""
        return len(self._young)

    def flushed(self, young: int) -> None:
        """The first so many of the runs that were freed may be used again."""
        runs, self._young = self._young[:young], self._young[young:]
        self._change(runs, 1)
