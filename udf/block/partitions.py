"""Partition tables: MBR with its extended partitions, and GPT.

Owns: what a table says, and what of it can be believed. Nothing in it is trusted: every number is checked, chains and
lists are bounded, and every partition that is returned lies inside the disk. What is odd becomes a sentence in
`problems`. Must never: write, or raise for anything that is on the disk. Called by: the block shim, tests.

Sources: the UEFI specification, chapter 5; for MBR what Linux does (block/partitions/msdos.c) where nothing is written.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

Read = Callable[[int, int], Awaitable[bytes | bytearray | memoryview]]
"""Reads (offset, size); both inside the disk. What it raises goes through to the caller."""

MAX_PARTITIONS = 256  # no more are returned
MAX_LOGICAL = 128  # extended boot records that are followed
MAX_ENTRIES = 1024 * 1024  # bytes of a GPT's entries
MAX_PROBLEMS = 32

_MBR_ENTRY = struct.Struct("<B3xB3xII")  # flag, type, first block, blocks
_MBR_TABLE = 446
_EXTENDED = frozenset((0x05, 0x0F, 0x85))
_PROTECTIVE = 0xEE
_GPT = struct.Struct("<8s4sII4xQQQQ16sQIII")
_GPT_ENTRY = struct.Struct("<16s16sQQQ72s")


@dataclass(frozen=True)
class Partition:
    """One partition, in bytes."""

    number: int  # as Linux counts: 1 to 4, logical ones from 5; of a GPT its place in the table
    offset: int
    size: int
    type: str  # "0x0c", or a GUID in capitals
    name: str = ""  # of a GPT; whatever the disk says
    uuid: str = ""  # "1234abcd-01", or a GUID in capitals
    active: bool = False

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.size


@dataclass(frozen=True)
class Table:
    """What is on a disk."""

    kind: str = ""  # mbr, gpt, or "" if there is none
    partitions: tuple[Partition, ...] = ()  # by number
    extended: tuple[Partition, ...] = ()  # what logical partitions lie in: no partitions that anybody uses
    problems: tuple[str, ...] = ()
    uuid: str = ""
    block_size: int = 512  # what the table counts in


async def read_table(read: Read, size: int, block_size: int = 512) -> Table:
    """The partition table of a disk of `size` bytes."""
    if block_size < 512 or block_size & (block_size - 1):
        return Table()  # nobody has made a table for such blocks
    reader = _Reader(read, size, block_size)
    sector = await reader.at(0, 512)
    if sector[510:512] != b"\x55\xaa":
        return Table()
    entries = [_MBR_ENTRY.unpack_from(sector, _MBR_TABLE + 16 * i) for i in range(4)]
    if any(flag not in (0x00, 0x80) for flag, *_ in entries) or _is_boot_sector(sector, entries, reader):
        return Table()  # boot code where the table would be
    if any(kind == _PROTECTIVE for _, kind, _, _ in entries):
        table = await _gpt(reader)
        if table is not None:
            return table
        reader.problem("the disk says that it has a GPT, but neither of its headers is valid")
        entries = [(0, 0, 0, 0) if entry[1] == _PROTECTIVE else entry for entry in entries]
    return await _mbr(reader, sector, entries)


class _Reader:
    """The disk, by blocks, and what is odd about it."""

    def __init__(self, read: Read, size: int, block_size: int) -> None:
        self._read = read
        self.size = size
        self.block_size = block_size
        self.problems: list[str] = []

    @property
    def blocks(self) -> int:
        return self.size // self.block_size

    def problem(self, text: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(text)

    async def at(self, block: int, size: int) -> bytes:
        """`size` bytes from a block on, or zeros where the disk has none."""
        offset = block * self.block_size
        there = max(0, min(size, self.size - offset))
        data = bytes(await self._read(offset, there)) if there else b""
        return data.ljust(size, b"\0")

    def partition(self, number: int, first: int, count: int, kind: str, **more: object) -> Partition | None:
        """A partition from its blocks, cut at the end of the disk; None if nothing is left of it."""
        if first <= 0 or count <= 0 or first >= self.blocks:
            self.problem(f"partition {number} lies outside of the disk")
            return None
        if first + count > self.blocks:
            self.problem(f"partition {number} reaches behind the end of the disk")
            count = self.blocks - first
        block = self.block_size
        return Partition(number, first * block, count * block, kind, **more)  # type: ignore[arg-type]

    def check_overlaps(self, partitions: list[Partition]) -> None:
        widest: Partition | None = None
        for each in sorted(partitions, key=lambda p: (p.offset, p.number)):
            if widest is not None and each.offset < widest.end:
                self.problem(f"partitions {widest.number} and {each.number} overlap")
            if widest is None or each.end > widest.end:
                widest = each


def _is_boot_sector(sector: bytes, entries: list[tuple[int, int, int, int]], reader: _Reader) -> bool:
    """Whether this is a filesystem's first sector and no table: it has the signature too."""
    named = sector[3:11] in (b"NTFS    ", b"EXFAT   ") or b"FAT" in (sector[54:57], sector[82:85])
    real = any(kind and 0 < first < reader.blocks and count for _, kind, first, count in entries)
    return named and not real


# ---- MBR


async def _mbr(reader: _Reader, sector: bytes, entries: list[tuple[int, int, int, int]]) -> Table:
    disk = int.from_bytes(sector[440:444], "little")
    found: list[Partition] = []
    extended: list[Partition] = []
    for number, (flag, kind, first, count) in enumerate(entries, 1):
        if not kind or not count:
            continue
        partition = reader.partition(number, first, count, f"0x{kind:02x}", uuid=_id(disk, number), active=flag == 0x80)
        if partition is not None:
            (extended if kind in _EXTENDED else found).append(partition)
    for container in extended:
        await _logical(reader, container, disk, found)
    reader.check_overlaps(found)
    for each in found:
        for container in extended:
            if each.number <= 4 and each.offset < container.end and container.offset < each.end:
                reader.problem(f"partitions {each.number} and {container.number} overlap")
    if not found and not extended:
        return Table(problems=tuple(reader.problems))
    return Table("mbr", tuple(found), tuple(extended), tuple(reader.problems), f"{disk:08x}", reader.block_size)


async def _logical(reader: _Reader, container: Partition, disk: int, found: list[Partition]) -> None:
    """Follow the chain of extended boot records: each describes one partition and says where the next one is."""
    begin = container.offset // reader.block_size
    end = container.end // reader.block_size
    at = begin
    seen: set[int] = set()
    while True:
        if at in seen:
            reader.problem("the chain of logical partitions is a loop")
            return
        if len(seen) >= MAX_LOGICAL:
            reader.problem(f"there are more than {MAX_LOGICAL} logical partitions")
            return
        seen.add(at)
        sector = await reader.at(at, 512)
        if sector[510:512] != b"\x55\xaa":
            if at != begin:
                reader.problem("the chain of logical partitions is broken")
            return
        following = 0
        for i in range(2):
            _, kind, first, count = _MBR_ENTRY.unpack_from(sector, _MBR_TABLE + 16 * i)
            if not kind or not count:
                continue
            if kind in _EXTENDED:
                following = following or begin + first
                continue
            number = 5 + sum(1 for each in found if each.number >= 5)
            partition = reader.partition(number, at + first, count, f"0x{kind:02x}", uuid=_id(disk, number))
            if partition is None:
                continue
            if partition.end > container.end:
                reader.problem(f"partition {number} reaches out of the extended partition")
            found.append(partition)
        if not following:
            return
        if not begin < following < end:
            reader.problem("the chain of logical partitions leaves the extended partition")
            return
        at = following


def _id(disk: int, number: int) -> str:
    return f"{disk:08x}-{number:02x}"


# ---- GPT


@dataclass(frozen=True)
class _Header:
    block_size: int
    here: int
    other: int
    first: int
    last: int
    disk: str
    entries: bytes
    entry_size: int


async def _gpt(reader: _Reader) -> Table | None:
    """The table of whichever header is valid, the first one before its copy at the end of the disk."""
    own = reader.block_size
    for block_size in dict.fromkeys((own, 512, 4096)):  # an image may have been made on another disk
        reader.block_size = block_size
        last = reader.blocks - 1
        first = await _header(reader, 1)
        copy = await _header(reader, last)
        if first is not None and copy is None and first.other != last:
            copy = await _header(reader, first.other)
            if copy is not None:
                reader.problem("the copy of the GPT is not at the end of the disk")
        header = first or copy
        if header is None:
            continue
        if block_size != own:
            reader.problem(f"the GPT counts blocks of {block_size} bytes, the disk has {own}")
        if first is None:
            reader.problem("the GPT at the beginning of the disk is damaged; its copy at the end is used")
        elif copy is None:
            reader.problem("the copy of the GPT at the end of the disk is damaged or missing")
        elif copy.entries != first.entries:
            reader.problem("the GPT and its copy differ; the first one is used")
        return _entries(reader, header)
    reader.block_size = own
    return None


async def _header(reader: _Reader, block: int) -> _Header | None:
    """The header in a block and its entries, if all of its checksums are right."""
    if not 1 <= block < reader.blocks:
        return None
    raw = await reader.at(block, reader.block_size)
    magic, _, size, crc, here, other, first, last, disk, table, count, entry_size, entries_crc = _GPT.unpack_from(raw)
    if magic != b"EFI PART" or not _GPT.size <= size <= reader.block_size:
        return None
    if zlib.crc32(raw[:16] + bytes(4) + raw[20:size]) != crc or here != block:
        return None
    total = count * entry_size
    if entry_size < _GPT_ENTRY.size or entry_size % 8 or not 0 < total <= MAX_ENTRIES:
        return None
    if not 1 < table < reader.blocks or table * reader.block_size + total > reader.size:
        return None
    entries = await reader.at(table, total)
    if zlib.crc32(entries) != entries_crc:
        return None
    return _Header(reader.block_size, here, other, first, last, _guid(disk), entries, entry_size)


def _entries(reader: _Reader, header: _Header) -> Table:
    found: list[Partition] = []
    for at in range(0, len(header.entries), header.entry_size):
        kind, own, first, last, flags, name = _GPT_ENTRY.unpack_from(header.entries, at)
        if not any(kind):
            continue
        number = at // header.entry_size + 1
        if len(found) >= MAX_PARTITIONS:
            reader.problem(f"there are more than {MAX_PARTITIONS} partitions")
            break
        partition = reader.partition(
            number, first, last - first + 1, _guid(kind), name=_name(name), uuid=_guid(own), active=bool(flags & 4)
        )
        if partition is None:
            continue
        if first < header.first or last > header.last:
            reader.problem(f"partition {number} lies where the GPT itself may be")
        found.append(partition)
    reader.check_overlaps(found)
    return Table("gpt", tuple(found), (), tuple(reader.problems), header.disk, header.block_size)


def _guid(raw: bytes) -> str:
    return str(uuid.UUID(bytes_le=raw)).upper()


def _name(raw: bytes) -> str:
    return raw.decode("utf-16-le", errors="replace").partition("\0")[0]
