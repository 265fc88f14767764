"""A second opinion on a FAT image: reads it, and pokes at it, byte by byte, by nothing but Microsoft's specification.

Owns: its own idea of the format, which shares no line with fs/fat. Must never: import the driver. Called by: the zoo
(hand-made oddities, which no tool writes), the fuzzer (loops, cross-links), the power cuts (what is left of a file).
It is itself checked against mtools by the zoo's tests. It reads sound images; of damaged ones it raises `Unsound`.
"""

from __future__ import annotations

import dataclasses
import datetime
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

READ_ONLY, HIDDEN, SYSTEM, LABEL, DIRECTORY, ARCHIVE, LONG = 1, 2, 4, 8, 16, 32, 15
END = 0x0FFFFFFF


class Unsound(Exception):
    """The image is not what the specification allows."""


@dataclasses.dataclass(frozen=True)
class Found:
    """One file or directory. Times are naive: what is written in the entry, whoever's zone that is."""

    name: str
    short: bytes
    attributes: int
    cluster: int
    size: int
    created: datetime.datetime | None
    modified: datetime.datetime | None
    accessed: datetime.date | None
    place: int  # where in the image the short entry is
    contents: bytes = b""

    @property
    def is_directory(self) -> bool:
        return bool(self.attributes & DIRECTORY)


def checksum(short: bytes) -> int:
    total = 0
    for byte in short:
        total = ((total & 1) << 7) + (total >> 1) + byte & 0xFF
    return total


def stamp(date: int, time: int, hundredths: int = 0) -> datetime.datetime | None:
    """A time as it is written; None where there is none."""
    if not date:
        return None
    try:
        moment = datetime.datetime(
            1980 + (date >> 9), date >> 5 & 15, date & 31, time >> 11, time >> 5 & 63, (time & 31) * 2
        )
    except ValueError:
        return None
    return moment + datetime.timedelta(milliseconds=10 * hundredths)


def packed(moment: datetime.datetime) -> tuple[int, int]:
    """Date and time as they are written."""
    return (
        moment.year - 1980 << 9 | moment.month << 5 | moment.day,
        moment.hour << 11 | moment.minute << 5 | moment.second // 2,
    )


def short_entry(
    short: bytes, attributes: int = ARCHIVE, cluster: int = 0, size: int = 0, *, case: int = 0, tenth: int = 0,
    created: tuple[int, int] = (0, 0), accessed: int = 0, modified: tuple[int, int] = (0x5A21, 0x6000),
) -> bytes:  # fmt: skip
    """The 32 bytes of an entry; dates and times as they are written."""
    assert len(short) == 11
    return short + struct.pack(
        "<BBBHHHHHHHI", attributes, case, tenth, created[1], created[0], accessed, cluster >> 16,
        modified[1], modified[0], cluster & 0xFFFF, size,
    )  # fmt: skip


def long_entries(name: str, short: bytes, *, sum_: int | None = None) -> bytes:
    """The slots of a long name, in the order in which they stand before their entry."""
    units = name.encode("utf-16-le", "surrogatepass")
    count = -(-len(units) // 26)
    if len(units) < count * 26:
        units += b"\0\0"
    units = units.ljust(count * 26, b"\xff")
    slots = []
    for number in range(count):
        part = units[number * 26 : number * 26 + 26]
        order = number + 1 | (0x40 if number + 1 == count else 0)
        sum_now = checksum(short) if sum_ is None else sum_
        slots.append(bytes([order]) + part[:10] + bytes([LONG, 0, sum_now]) + part[10:22] + b"\0\0" + part[22:])
    return b"".join(reversed(slots))


class Image:
    """An image as bytes in memory, or a piece of one; `offset` is where the volume begins."""

    def __init__(self, data: bytearray | mmap.mmap, offset: int = 0, codepage: str = "cp437") -> None:
        self.data = data
        self.offset = offset
        self.codepage = codepage
        get = self._get
        self.sector = get(11, 2)
        self.cluster = get(13, 1) * self.sector
        self.reserved = get(14, 2) * self.sector
        self.fats = get(16, 1)
        self.root_entries = get(17, 2)
        self.size = (get(19, 2) or get(32, 4)) * self.sector
        self.fat_size = (get(22, 2) or get(36, 4)) * self.sector
        if not self.sector or not self.cluster or not self.fat_size or not self.fats:
            raise Unsound("not a FAT boot sector")
        self.root = self.reserved + self.fats * self.fat_size
        self.start = self.root + -(-self.root_entries * 32 // self.sector) * self.sector
        self.clusters = (self.size - self.start) // self.cluster
        self.kind = 32 if not get(22, 2) else 12 if self.clusters < 4085 else 16
        self.root_cluster = get(44, 4) if self.kind == 32 else 0
        self.end = {12: 0xFF8, 16: 0xFFF8, 32: 0x0FFFFFF8}[self.kind]
        self.fsinfo = get(48, 2) * self.sector if self.kind == 32 else 0
        flags = get(40, 2) if self.kind == 32 else 0
        self.active = flags & 15 if flags & 0x80 else 0  # the copy of the table that counts

    @classmethod
    def of(cls, path: Path, offset: int = 0, *, in_place: bool = False) -> Image:
        """The image in a file, to be read or to be changed in place."""
        with open(path, "r+b" if in_place else "rb") as file:
            how = mmap.ACCESS_WRITE if in_place else mmap.ACCESS_READ
            return cls(mmap.mmap(file.fileno(), 0, access=how), offset)

    def close(self) -> None:
        """Let go of the file."""
        if isinstance(self.data, mmap.mmap):
            self.data.close()

    def _get(self, at: int, size: int) -> int:
        at += self.offset
        return int.from_bytes(self.data[at : at + size], "little")

    def put(self, at: int, data: bytes) -> None:
        at += self.offset
        self.data[at : at + len(data)] = data

    def get(self, at: int, size: int) -> bytes:
        at += self.offset
        return bytes(self.data[at : at + size])

    # ---- the table

    def next(self, cluster: int, copy: int | None = None) -> int:
        at = self.reserved + (self.active if copy is None else copy) * self.fat_size
        if self.kind == 12:
            pair = self._get(at + cluster * 3 // 2, 2)
            return pair >> 4 if cluster & 1 else pair & 0xFFF
        if self.kind == 16:
            return self._get(at + cluster * 2, 2)
        return self._get(at + cluster * 4, 4) & END

    def link(self, cluster: int, value: int) -> None:
        """Write one entry, in every copy."""
        for copy in range(self.fats):
            at = self.reserved + copy * self.fat_size
            if self.kind == 12:
                place = at + cluster * 3 // 2
                old = self._get(place, 2)
                new = (old & 0x000F) | (value & 0xFFF) << 4 if cluster & 1 else (old & 0xF000) | value & 0xFFF
                self.put(place, new.to_bytes(2, "little"))
            elif self.kind == 16:
                self.put(at + cluster * 2, (value & 0xFFFF).to_bytes(2, "little"))
            else:
                old = self._get(at + cluster * 4, 4)
                self.put(at + cluster * 4, (old & 0xF0000000 | value & END).to_bytes(4, "little"))

    def chain(self, cluster: int) -> list[int]:
        found: list[int] = []
        seen = set()
        while cluster < self.end:
            if not 2 <= cluster < self.clusters + 2 or cluster in seen:
                raise Unsound(f"a chain goes to {cluster} after {len(found)} clusters")
            seen.add(cluster)
            found.append(cluster)
            cluster = self.next(cluster)
        return found

    def free(self) -> list[int]:
        return [cluster for cluster in range(2, self.clusters + 2) if self.next(cluster) == 0]

    def place(self, cluster: int) -> int:
        """Where a cluster is in the volume."""
        return self.start + (cluster - 2) * self.cluster

    def allocate(self, count: int, clusters: list[int] | None = None) -> int:
        """Link so many free clusters (or these) to a chain; its first, 0 for none."""
        chosen = clusters or self.free()[:count]
        if not chosen:
            return 0
        for cluster, following in zip(chosen, [*chosen[1:], END], strict=True):
            self.link(cluster, following)
            self.put(self.place(cluster), bytes(self.cluster))
        return chosen[0]

    def count(self) -> None:
        """Write into FSInfo how many clusters are free."""
        if self.fsinfo:
            self.put(self.fsinfo + 488, len(self.free()).to_bytes(4, "little"))

    # ---- directories

    def slots(self, directory: int) -> list[int]:
        """Where each slot of a directory is; 0 is the root."""
        if directory == 0 and self.kind != 32:
            return [self.root + 32 * number for number in range(self.root_entries)]
        return [
            self.place(cluster) + at
            for cluster in self.chain(directory or self.root_cluster)
            for at in range(0, self.cluster, 32)
        ]

    def add(self, directory: int, entries: bytes) -> int:
        """Put raw entries where the directory ends; the place of the last one."""
        slots = self.slots(directory)
        end = next((n for n, place in enumerate(slots) if self.get(place, 1) == b"\0"), len(slots))
        if end + len(entries) // 32 > len(slots):
            tail = self.chain(directory or self.root_cluster)[-1]
            self.link(tail, self.allocate(1))
            return self.add(directory, entries)
        for number in range(len(entries) // 32):
            self.put(slots[end + number], entries[32 * number : 32 * number + 32])
        return slots[end + len(entries) // 32 - 1]

    def store(self, data: bytes) -> int:
        """Put contents into free clusters; the first of them."""
        first = self.allocate(-(-len(data) // self.cluster))
        for number, cluster in enumerate(self.chain(first) if first else []):
            self.put(self.place(cluster), data[number * self.cluster :][: self.cluster])
        return first

    def file(self, directory: int, name: str, short: bytes, data: bytes) -> None:
        """Put a file into a directory."""
        cluster = self.store(data)
        slots = long_entries(name, short) if name else b""
        self.add(directory, slots + short_entry(short, cluster=cluster, size=len(data)))

    def directory(self, parent: int, name: str, short: bytes) -> int:
        """Put a directory into another; its cluster."""
        cluster = self.allocate(1)
        slots = long_entries(name, short) if name else b""
        self.add(parent, slots + short_entry(short, DIRECTORY, cluster))
        self.add(cluster, short_entry(b".          ", DIRECTORY, cluster))
        self.add(cluster, short_entry(b"..         ", DIRECTORY, parent))
        return cluster

    def entries(self, directory: int) -> Iterator[Found]:
        """Everything that is in a directory, without labels and the dots."""
        pieces: list[bytes] = []
        for place in self.slots(directory):
            raw = self.get(place, 32)
            if raw[0] == 0:
                return
            if raw[0] == 0xE5:
                pieces = []
                continue
            if raw[11] & 0x3F == LONG:
                if raw[0] & 0x40:
                    pieces = []
                pieces.append(raw)
                continue
            name = self._long(pieces, raw[:11])
            pieces = []
            if raw[11] & LABEL or raw[:11] in (b".          ", b"..         "):
                continue
            yield self._found(raw, name, place)

    def _long(self, pieces: list[bytes], short: bytes) -> str | None:
        if not pieces or not pieces[0][0] & 0x40 or len(pieces) != pieces[0][0] & 0x1F:
            return None
        units = b""
        for number, raw in enumerate(reversed(pieces)):
            if raw[0] & 0x1F != number + 1 or raw[13] != checksum(short):
                return None
            units += raw[1:11] + raw[14:26] + raw[28:32]
        name = units.decode("utf-16-le", "surrogatepass")
        return name.partition("\0")[0]

    def _found(self, raw: bytes, name: str | None, place: int) -> Found:
        (_, case, tenth, ctime, cdate, adate, high, mtime, mdate, low, size) = struct.unpack("<BBBHHHHHHHI", raw[11:])
        if name is None:
            text = (b"\xe5" + raw[1:11] if raw[0] == 5 else raw[:11]).decode(self.codepage)
            stem, suffix = text[:8].rstrip(" "), text[8:].rstrip(" ")
            stem = stem.lower() if case & 0x08 else stem
            suffix = suffix.lower() if case & 0x10 else suffix
            name = f"{stem}.{suffix}" if suffix else stem
        cluster = low | (high << 16 if self.kind == 32 else 0)
        date = stamp(adate, 0)
        return Found(
            name, raw[:11], raw[11], cluster, size, stamp(cdate, ctime, tenth), stamp(mdate, mtime),
            date.date() if date else None, place,
        )  # fmt: skip

    def contents(self, found: Found) -> bytes:
        chain = self.chain(found.cluster) if found.cluster else []
        if len(chain) * self.cluster < found.size:
            raise Unsound(f"{found.name} is larger than its chain")
        return b"".join(self.get(self.place(cluster), self.cluster) for cluster in chain)[: found.size]

    def tree(self, directory: int = 0, path: str = "") -> dict[str, Found]:
        """Every path with what is there, contents included."""
        found: dict[str, Found] = {}
        for entry in self.entries(directory):
            here = f"{path}/{entry.name}" if path else entry.name
            if here in found or here.count("/") > 60:
                raise Unsound(f"{here} is there twice")
            if entry.is_directory:
                found[here] = entry
                found |= self.tree(entry.cluster, here)
            else:
                found[here] = dataclasses.replace(entry, contents=self.contents(entry))
        return found

    def find(self, path: str) -> Found:
        directory, entry = 0, None
        for part in path.split("/"):
            entry = next(e for e in self.entries(directory) if e.name.casefold() == part.casefold())
            directory = entry.cluster
        assert entry is not None
        return entry

    @property
    def dirty(self) -> bool:
        """Either of the two marks of a volume that was not unmounted."""
        flag = self.get(0x41 if self.kind == 32 else 0x25, 1)[0] & 1
        second = self.next(1)
        clean = {12: 0, 16: 0x8000, 32: 0x08000000}[self.kind]
        return bool(flag) or second & clean != clean

    def counts(self) -> dict[str, Any]:
        """What FSInfo says and what the table says."""
        said = int.from_bytes(self.get(self.fsinfo + 488, 4), "little") if self.kind == 32 else None
        return {"said": said, "free": len(self.free())}
