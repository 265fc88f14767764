"""A whole volume in memory, only good enough to have directories on it that mtools and fsck.fat look at."""

from __future__ import annotations

import errno
import struct
from pathlib import Path
from typing import Any

from .formats import boot, directory, entries


class Volume:
    """One image, its tables, and streams on its chains. Clusters are given out in order and never freed."""

    def __init__(self, path: Path, *, utc: bool = False) -> None:
        self.path = path
        self.data = bytearray(path.read_bytes())
        self.geometry = boot.parse(bytes(self.data[:4096]), len(self.data))
        self.settings = entries.Settings(wide=self.geometry.wide, utc=utc)

    def save(self) -> None:
        if self.geometry.fsinfo_offset:
            at = self.geometry.fsinfo_offset + boot.COUNTS_OFFSET
            self.data[at : at + 8] = boot.pack_counts(None, None)
        self.path.write_bytes(self.data)

    def next(self, cluster: int) -> int:
        """What the table has for a cluster."""
        kind, at = self.geometry.kind, self.geometry.fat_copies()[-1] + cluster * self.geometry.kind // 8
        if kind == 12:
            value = int.from_bytes(self.data[at : at + 2], "little")
            return value >> 4 if cluster & 1 else value & 0xFFF
        return int.from_bytes(self.data[at : at + kind // 8], "little") & 0x0FFFFFFF

    def link(self, cluster: int, value: int) -> None:
        kind = self.geometry.kind
        for copy in self.geometry.fat_copies():
            at = copy + cluster * kind // 8
            if kind == 12:
                old = int.from_bytes(self.data[at : at + 2], "little")
                value12 = value & 0xFFF
                new = old & 0x000F | value12 << 4 if cluster & 1 else old & 0xF000 | value12
                struct.pack_into("<H", self.data, at, new)
            else:
                struct.pack_into("<H" if kind == 16 else "<I", self.data, at, value & (1 << min(kind, 28)) - 1)

    def allocate(self, contents: bytes = b"") -> int:
        """A cluster with this in it and zeros behind."""
        for cluster in range(2, self.geometry.last_cluster + 1):
            if self.next(cluster) == 0:
                self.link(cluster, 0x0FFFFFFF)
                at = self.geometry.cluster_offset(cluster)
                self.data[at : at + self.geometry.cluster] = contents.ljust(self.geometry.cluster, b"\0")
                return cluster
        raise OSError(errno.ENOSPC, "full")

    def chain(self, cluster: int) -> list[int]:
        out = []
        while 2 <= cluster <= self.geometry.last_cluster and len(out) <= self.geometry.clusters:
            out.append(cluster)
            cluster = self.next(cluster)
        return out

    def contents(self, entry: Any) -> bytes:
        whole = b"".join(
            self.data[(at := self.geometry.cluster_offset(n)) : at + self.geometry.cluster]
            for n in self.chain(entry.cluster)
        )
        return whole[: entry.size]

    def root(self) -> Any:
        if self.geometry.wide:
            return self.below(self.geometry.root_cluster)
        return directory.Directory(Fixed(self), self.settings, is_fixed=True)

    def below(self, cluster: int) -> Any:
        return directory.Directory(Chain(self, cluster), self.settings)

    async def mkdir(self, where: Any, name: str, parent: int, stamp: int) -> tuple[Any, int]:
        cluster = self.allocate()
        data = entries.dots(cluster, parent, self.settings, stamp)
        at = self.geometry.cluster_offset(cluster)
        self.data[at : at + len(data)] = data
        stamps = {"created_ns": stamp, "modified_ns": stamp, "accessed_ns": stamp}
        await where.insert(name, attributes=entries.DIRECTORY, cluster=cluster, **stamps)
        return self.below(cluster), cluster


class Fixed:
    """The root of FAT12 and FAT16."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.size = volume.geometry.root_entries * 32

    def _at(self, offset: int, size: int) -> int:
        assert 0 <= offset <= offset + size <= self.size
        return int(self.volume.geometry.root_offset) + offset

    async def read(self, offset: int, size: int) -> bytes:
        at = self._at(offset, size)
        return bytes(self.volume.data[at : at + size])

    async def write(self, offset: int, data: bytes) -> None:
        at = self._at(offset, len(data))
        self.volume.data[at : at + len(data)] = data

    async def grow(self) -> None:
        raise OSError(errno.ENOSPC, "the root is fixed")


class Chain:
    """A directory in clusters."""

    def __init__(self, volume: Volume, cluster: int) -> None:
        self.volume = volume
        self.clusters = volume.chain(cluster)

    @property
    def size(self) -> int:
        return len(self.clusters) * int(self.volume.geometry.cluster)

    async def read(self, offset: int, size: int) -> bytes:
        out = b""
        while size:
            number, within = divmod(offset, self.volume.geometry.cluster)
            piece = min(size, self.volume.geometry.cluster - within)
            at = self.volume.geometry.cluster_offset(self.clusters[number]) + within
            out += bytes(self.volume.data[at : at + piece])
            offset, size = offset + piece, size - piece
        return out

    async def write(self, offset: int, data: bytes) -> None:
        number, within = divmod(offset, self.volume.geometry.cluster)
        assert within + len(data) <= self.volume.geometry.cluster
        at = self.volume.geometry.cluster_offset(self.clusters[number]) + within
        self.volume.data[at : at + len(data)] = data

    async def grow(self) -> None:
        cluster = self.volume.allocate()
        self.volume.link(self.clusters[-1], cluster)
        self.clusters.append(cluster)
