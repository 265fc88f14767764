"""The file allocation table: what follows a cluster, for all three widths.

Owns: the coding of entries, the copies of the table, and what a chain may be. An entry that leads nowhere is Damaged.
Must never: read more of the table than was asked for, or decide which cluster is used (free.py does).
Called by: chain.py, free.py, volume.py.

Consecutive entries are compared and written as one piece of memory: a file of a gigabyte without gaps is looked
through in milliseconds.
"""

from __future__ import annotations

import struct
from operator import not_

from .boot import Geometry
from .change import Change, Run
from .damage import Damaged
from .sectors import PAGE, Sectors

FREE = 0
END = -1
BAD = -2

_PIECES = 256  # runs that are freed at once


class Table:
    """The table of one volume. Values that are given out: END, BAD, FREE or a cluster that is there."""

    def __init__(self, geometry: Geometry, sectors: Sectors) -> None:
        self._geometry = geometry
        self._sectors = sectors
        kind = self._kind = geometry.kind
        copies = geometry.fat_copies()
        self._offset = copies[-1]
        self._distances = tuple(offset - self._offset for offset in copies[:-1])
        self.last = geometry.last_cluster
        self._width = kind // 8  # bytes; of FAT12 it is not used
        self._mask = {12: 0xFFF, 16: 0xFFFF, 32: 0x0FFFFFFF}[kind]
        self._code = {12: "", 16: "H", 32: "I"}[kind]

    def _meaning(self, value: int) -> int:
        if 2 <= value <= self.last:
            return value
        if value == 0:
            return FREE
        if value >= self._mask - 7:
            return END
        if value == self._mask - 8:
            return BAD
        raise Damaged(f"the file allocation table leads to cluster {value}, which does not exist")

    async def _raw(self, cluster: int) -> int:
        if self._kind == 12:
            pair = int.from_bytes(await self._sectors.read(self._offset + cluster * 3 // 2, 2), "little")
            return pair >> 4 if cluster & 1 else pair & 0xFFF
        number, at = divmod(self._offset + cluster * self._width, PAGE)
        page = self._sectors.peek(number) or await self._sectors.page(number)
        return int.from_bytes(page[at : at + self._width], "little")

    async def get(self, cluster: int) -> int:
        """What follows this cluster."""
        return self._meaning(await self._raw(cluster) & self._mask)

    async def run(self, cluster: int, most: int) -> tuple[int, int]:
        """How many consecutive clusters the chain goes on from here (at most `most`), and what follows the last."""
        first = cluster
        end = min(first + most, self.last + 1)
        if self._kind == 12:
            while (following := await self.get(cluster)) == cluster + 1 and following < end:
                cluster = following
            return cluster - first + 1, following
        width = self._width
        while True:
            number, at = divmod(self._offset + cluster * width, PAGE)
            page = self._sectors.peek(number) or await self._sectors.page(number)
            count = min((PAGE - at) // width, end - cluster)
            same = self._same(page, at, cluster, count)
            cluster += same
            if cluster == end:
                return cluster - first, await self.get(cluster - 1)
            if same < count:
                return cluster - first + 1, await self.get(cluster)

    def _same(self, page: bytearray, at: int, cluster: int, count: int) -> int:
        """How many of these entries just lead to the next cluster."""
        code, width = self._code, self._width
        expected = struct.pack(f"<{count}{code}", *range(cluster + 1, cluster + 1 + count))
        view = memoryview(page)[at : at + count * width]
        if view == expected:
            return count
        for n, (value,) in enumerate(struct.iter_unpack(f"<{code}", view)):
            if value & self._mask != cluster + 1 + n:
                return n
        return count

    async def free_map(self, first: int, count: int) -> bytearray:
        """For each of these clusters 1 if it is free, else 0."""
        if self._kind == 12:
            return bytearray([not await self._raw(cluster) for cluster in range(first, first + count)])
        width = self._width
        data = await self._sectors.read(self._offset + first * width, count * width)
        return self.mapped(data)

    def mapped(self, data: bytes | bytearray) -> bytearray:
        """The same of a piece of the table."""
        values = struct.unpack(f"<{len(data) // self._width}{self._code}", data)
        if self._kind == 32 and max(values) >= 0x1000_0000:
            return bytearray(not value & self._mask for value in values)
        return bytearray(map(not_, values))

    def place(self, first: int, count: int) -> tuple[int, int]:
        """Offset and length of these clusters' entries."""
        begin = self._offset + first * self._kind // 8
        return begin, self._offset + ((first + count) * self._kind + 7) // 8 - begin

    async def following(self, cluster: int) -> int:
        """The same for who wants to get rid of it: 0 if the chain ends here; what makes no sense is given as it is."""
        value = await self._raw(cluster) & self._mask
        return 0 if value >= self._mask - 7 else value or 1

    # ---- changing

    async def _set(self, change: Change, cluster: int, value: int) -> None:
        raw = {END: self._mask, FREE: 0}.get(value, value)
        old = await self._raw(cluster)
        if self._kind == 12:
            offset = self._offset + cluster * 3 // 2
            pair = int.from_bytes(await self._sectors.read(offset, 2), "little")
            pair = pair & 0x000F | raw << 4 if cluster & 1 else pair & 0xF000 | raw
            await change.put(offset, pair.to_bytes(2, "little"))
            return
        raw |= old & ~self._mask  # four bits of FAT32's entries are not ours
        await change.put(self._offset + cluster * self._width, raw.to_bytes(self._width, "little"))

    async def _set_run(self, change: Change, first: int, count: int, *, linked: bool) -> None:
        """Each of these leads to the next, but the last, which is not touched; or all of them are free."""
        stop = first + count - 1 if linked else first + count
        if self._kind == 12:
            for cluster in range(first, stop):
                await self._set(change, cluster, cluster + 1 if linked else FREE)
            return
        width = self._width
        while first < stop:
            offset = self._offset + first * width
            number, at = divmod(offset, PAGE)
            page = await self._sectors.page(number)
            count = min((PAGE - at) // width, stop - first)
            if self._kind == 32 and any(page[at + 3 : at + count * width : width]):
                for cluster in range(first, first + count):
                    await self._set(change, cluster, cluster + 1 if linked else FREE)
            elif linked:
                values = range(first + 1, first + 1 + count)
                await change.put(offset, struct.pack(f"<{count}{self._code}", *values))
            else:
                await change.put(offset, bytes(count * width))
            first += count

    async def link(self, change: Change, runs: list[Run], tail: int) -> None:
        """Make a chain of these runs, and let it follow the cluster *tail* (0: it is a chain of its own).

        The entry that makes the chain part of another is written last.
        """
        for n, (first, count) in enumerate(runs):
            await self._set_run(change, first, count, linked=True)
            await self._set(change, first + count - 1, runs[n + 1][0] if n + 1 < len(runs) else END)
        if tail:
            change.step(self._distances, but=change.units(*self.place(tail, 1)))
            await self._set(change, tail, runs[0][0])
        change.step(self._distances)

    async def cut(self, change: Change, tail: int, runs: list[Run]) -> None:
        """End a chain with the cluster *tail*, and free all these that were behind it. The end is written first."""
        await self._set(change, tail, END)
        await self._clear(change, runs)
        end = change.units(*self.place(tail, 1))
        change.step(self._distances, but=change.loose - end)
        change.step(self._distances)

    async def release(self, change: Change, runs: list[Run]) -> None:
        """Free all of these."""
        await self._clear(change, runs)
        change.step(self._distances)

    async def _clear(self, change: Change, runs: list[Run]) -> None:
        change.give(runs)
        for first, count in runs:
            await self._set_run(change, first, count, linked=False)

    async def second(self) -> int:
        """FAT[1], which has the volume's state."""
        return await self._raw(1)

    async def set_second(self, change: Change, value: int) -> None:
        """Write it."""
        if self._kind != 12:
            await change.put(self._offset + self._width, value.to_bytes(self._width, "little"))
            change.step(self._distances)

    async def walk(self, first: int, most: int) -> tuple[list[Run], int]:
        """The runs of a chain without an owner, up to about so many clusters, and what follows: the next one, or 0.

        It ends where it makes no sense any more.
        """
        runs: list[Run] = []
        left = most
        try:
            while 2 <= first <= self.last and left > 0 and len(runs) < _PIECES:
                if await self.get(first) in (FREE, BAD):
                    return runs, 0
                count, following = await self.run(first, left)
                runs.append((first, count))
                left -= count
                first = following
        except Damaged:
            return runs, 0
        return runs, first if first >= 2 else 0
