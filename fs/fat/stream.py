"""The bytes of a directory: a chain of clusters, or the fixed root of FAT12 and FAT16.

Owns: where on the volume a byte of a directory is, and how a directory gets another cluster.
Must never: know what an entry is. Called by: directory.py and dots.py (they know the protocol), nodes.py.

What is written here is part of the change that is under way on the volume, in the order of the calls; it is on the
device when that change is.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from .chain import Chain
from .damage import Damaged
from .entries import FREE

if TYPE_CHECKING:
    from .change import Change
    from .volume import Volume


class RootStream:
    """A root directory that cannot grow."""

    def __init__(self, volume: Volume, offset: int, size: int) -> None:
        self._sectors = volume.sectors
        self._offset = offset
        self.size = size
        self.change: Change | None = None
        self.deletes_last = False

    async def read(self, offset: int, size: int) -> bytes:
        if offset + size > self.size:
            raise Damaged("the root directory ends before that")
        return await self._sectors.read(self._offset + offset, size)

    async def write(self, offset: int, data: bytes) -> None:
        await _write(self, self._offset + offset, data)

    async def grow(self) -> None:
        raise OSError(errno.ENOSPC, "the root directory of this volume cannot grow")


class ChainStream:
    """A directory that is a chain of clusters."""

    def __init__(self, volume: Volume, chain: Chain) -> None:
        self._volume = volume
        self._sectors = volume.sectors
        self.chain = chain
        self.change: Change | None = None
        self.deletes_last = False

    async def open(self) -> None:
        """Look the whole chain up: its size is known from here on. Damaged."""
        if not await self.chain.all():
            raise Damaged("a directory has no cluster")

    @property
    def size(self) -> int:
        return self.chain.known * self._volume.cluster

    async def read(self, offset: int, size: int) -> bytes:
        parts = []
        for place, length in self._places(offset, size):
            parts.append(await self._sectors.read(place, length))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def write(self, offset: int, data: bytes) -> None:
        at = 0
        for place, length in self._places(offset, len(data)):
            await _write(self, place, data[at : at + length])
            at += length

    def _places(self, offset: int, size: int) -> list[tuple[int, int]]:
        cluster = self._volume.cluster
        if offset + size > self.size:
            raise Damaged("the directory ends before that")
        places = []
        while size > 0:
            index, within = divmod(offset, cluster)
            first, count = self.chain.place(index)
            length = min(size, count * cluster - within)
            places.append((self._volume.geometry.cluster_offset(first) + within, length))
            offset, size = offset + length, size - length
        return places

    async def grow(self) -> None:
        volume, change, chain = self._volume, self.change, self.chain
        assert change is not None
        runs = await volume.take(1, chain.last + 1)
        change.take(runs)
        offset = volume.geometry.cluster_offset(runs[0][0])
        # Nobody can see this cluster yet; when the table leads to it, its zeros are there.
        zeros = bytes(volume.cluster)
        await volume.device.write(offset, zeros, watch=True)
        volume.sectors.fill(offset, zeros)
        await volume.table.link(change, runs, chain.last)
        chain.append(runs)


async def _write(stream: RootStream | ChainStream, offset: int, data: bytes) -> None:
    change = stream.change
    assert change is not None  # whoever changes a directory says in which change
    if stream.deletes_last and data[0] == FREE:
        change.barrier()
    await change.write(offset, data)
