"""Directory entries: 32 bytes each, a short one preceded by those of its long name.

Owns: the layout of a slot, the checksum that ties a long name to its short entry, and which slots belong together.
Must never: do I/O, or trust a slot: whatever the bytes, they are an entry, nothing, or an orphan.
Called by: directory.py and index.py; fatcore reads `Entry` and the attribute bits.

What is an entry: a run of long-name slots, numbered downwards from one with 0x40, all with the checksum of the short
entry that follows at once, and that short entry. Long-name slots of any other kind are orphans: nobody sees them, and
their room may be used. A slot that begins with 0xE5 is free; one that begins with 0x00 ends the directory.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from . import times

SLOT = 32
SECTOR = 512  # what a device writes as one, whatever the volume calls a sector
PER_SECTOR = SECTOR // SLOT
MAX_SLOTS = 65536  # of a directory: 2 MiB
MAX_LONG = 20  # slots of a long name
LONG_BYTES = 26  # of a long name in one slot
FREE = 0xE5
END = 0x00

READ_ONLY, HIDDEN, SYSTEM, VOLUME, DIRECTORY, ARCHIVE = 1, 2, 4, 8, 16, 32
LONG = READ_ONLY | HIDDEN | SYSTEM | VOLUME  # all of these: a slot of a long name
_LONG_MASK = 0x3F

DOT = b".          "
DOTDOT = b"..         "
_CASE = 0x18  # of byte 12: base and extension in lower case

# name, attributes, case, hundredths, created time and date, accessed date, high cluster, modified time and date,
# low cluster, size
_SHORT = struct.Struct("<11sBBBHHHHHHHI")
assert _SHORT.size == SLOT
_FIELDS = frozenset({"attributes", "cluster", "size", "created_ns", "modified_ns", "accessed_ns"})


@dataclass(frozen=True)
class Settings:
    """How a volume's entries are to be read."""

    wide: bool  # FAT32: a cluster's number has 28 bits, not 16
    codepage: str = "cp437"  # of short names; a name of a Python codec
    utc: bool = False  # time stamps are in UTC, not in local time


@dataclass(frozen=True, slots=True)
class Entry:
    """One file or directory, as its directory has it."""

    name: str  # long, or short in its case; fit for the kernel
    short: bytes  # 11 bytes
    attributes: int
    cluster: int  # 0: none. As on the volume: unchecked
    size: int
    created_ns: int
    modified_ns: int
    accessed_ns: int
    slot: int  # the first
    slots: int

    @property
    def is_directory(self) -> bool:
        return bool(self.attributes & DIRECTORY)

    @property
    def is_read_only(self) -> bool:
        return bool(self.attributes & READ_ONLY)


class Found(NamedTuple):
    """An entry as it lies in its directory."""

    raw: bytes  # the short entry
    units: bytes  # the long name in UTF-16, as far as it goes; empty: there is none
    slot: int
    slots: int


@functools.lru_cache(maxsize=256)
def checksum(short: bytes) -> int:
    """Of a short name, in each slot of its long name."""
    value = 0
    for byte in short:
        value = ((value & 1) << 7 | value >> 1) + byte & 0xFF
    return value


class Reader:
    """Slots in, entries out. The slots of one directory are fed in order, in pieces of any whole number of slots."""

    def __init__(self, slot: int = 0) -> None:
        """Begin with this slot."""
        self.slot = slot  # of the next piece
        self.ended = False  # the end mark was seen; `slot` is where it is
        self._parts: list[bytes] = []  # of a long name under way, last part first
        self._left = 0  # parts that are to come; 0 with parts: the short entry is
        self._sum = 0

    def feed(self, piece: bytes) -> Iterator[Found]:
        """Every entry that ends in this piece, volume labels included, '.' and '..' too."""
        for at in range(0, len(piece) - SLOT + 1, SLOT):
            first = piece[at]
            if first == END:
                self.ended = True
                return
            slot = self.slot
            self.slot = slot + 1
            if first == FREE:
                self._parts.clear()
            elif piece[at + 11] & _LONG_MASK == LONG:
                self._part(piece, at, first)
            else:
                raw = piece[at : at + SLOT]
                parts = self._parts
                if parts:
                    if self._left == 0 and checksum(raw[:11]) == self._sum and not raw[11] & VOLUME:
                        units = b"".join(reversed(parts))
                        yield Found(raw, _until_zero(units), slot - len(parts), len(parts) + 1)
                    else:
                        yield Found(raw, b"", slot, 1)
                    parts.clear()
                else:
                    yield Found(raw, b"", slot, 1)

    def _part(self, piece: bytes, at: int, number: int) -> None:
        if number & 0x40:
            self._parts.clear()
            self._left = number & 0xBF
            self._sum = piece[at + 13]
            if not 1 <= self._left <= MAX_LONG:
                return
        elif not self._parts or number != self._left or piece[at + 13] != self._sum:
            self._parts.clear()
            return
        self._left -= 1
        self._parts.append(piece[at + 1 : at + 11] + piece[at + 14 : at + 26] + piece[at + 28 : at + 32])


def _until_zero(units: bytes) -> bytes:
    for at in range(0, len(units), 2):
        if not units[at] and not units[at + 1]:
            return units[:at]
    return units


def entry(found: Found, name: str, settings: Settings) -> Entry:
    """The entry under the name that it was given."""
    short, attributes, _, hundredths, ctime, cdate, adate, high, mtime, mdate, low, size = _SHORT.unpack(found.raw)
    utc = settings.utc
    return Entry(
        name,
        short,
        attributes,
        high << 16 | low if settings.wide else low,
        size,
        times.decode(cdate, ctime, hundredths, utc=utc),
        times.decode(mdate, mtime, utc=utc),
        times.decode(adate, utc=utc),
        found.slot,
        found.slots,
    )


def pack(
    short: bytes,
    settings: Settings,
    *,
    case: int = 0,
    attributes: int,
    cluster: int = 0,
    size: int = 0,
    created_ns: int,
    modified_ns: int,
    accessed_ns: int,
) -> bytes:
    """A short entry."""
    cdate, ctime, hundredths = times.encode(created_ns, utc=settings.utc)
    mdate, mtime, _ = times.encode(modified_ns, utc=settings.utc)
    adate, _, _ = times.encode(accessed_ns, utc=settings.utc)
    high = cluster >> 16 if settings.wide else 0
    return _SHORT.pack(
        *(short, attributes, case, hundredths, ctime, cdate, adate, high, mtime, mdate, cluster & 0xFFFF, size)
    )


def cluster_of(raw: bytes, settings: Settings) -> int:
    """The cluster that a short entry names."""
    low = int.from_bytes(raw[26:28], "little")
    return int.from_bytes(raw[20:22], "little") << 16 | low if settings.wide else low


def patch(raw: bytes, settings: Settings, changes: dict[str, int]) -> bytes:
    """The short entry with these fields of `Entry` changed and nothing else."""
    if not _FIELDS.issuperset(changes):
        raise TypeError(f"an entry's {', '.join(sorted(set(changes) - _FIELDS))} cannot be changed in place")
    short, attributes, case, hundredths, ctime, cdate, adate, high, mtime, mdate, low, size = _SHORT.unpack(raw)
    attributes = changes.get("attributes", attributes)
    size = changes.get("size", size)
    if "cluster" in changes:
        low = changes["cluster"] & 0xFFFF
        high = changes["cluster"] >> 16 if settings.wide else high
    if "created_ns" in changes:
        cdate, ctime, hundredths = times.encode(changes["created_ns"], utc=settings.utc)
    if "modified_ns" in changes:
        mdate, mtime, _ = times.encode(changes["modified_ns"], utc=settings.utc)
    if "accessed_ns" in changes:
        adate, _, _ = times.encode(changes["accessed_ns"], utc=settings.utc)
    return _SHORT.pack(short, attributes, case, hundredths, ctime, cdate, adate, high, mtime, mdate, low, size)


def renamed(raw: bytes, short: bytes, case: int) -> bytes:
    """The short entry under another short name."""
    return short + raw[11:12] + bytes((raw[12] & ~_CASE | case,)) + raw[13:]


def long_slots(units: bytes, short: bytes) -> bytes:
    """The slots of a long name of 1 to 255 UTF-16 units, in their order in the directory."""
    count = -(-len(units) // LONG_BYTES)
    padded = units if len(units) == count * LONG_BYTES else (units + b"\0\0").ljust(count * LONG_BYTES, b"\xff")
    value = checksum(short)
    out = []
    for number in range(count, 0, -1):
        part = padded[(number - 1) * LONG_BYTES : number * LONG_BYTES]
        first = number | 0x40 if number == count else number
        out.append(bytes((first,)) + part[:10] + bytes((LONG, 0, value)) + part[10:22] + b"\0\0" + part[22:])
    return b"".join(out)


def dots(cluster: int, parent: int, settings: Settings, now_ns: int) -> bytes:
    """The first two slots of a new directory. *parent* is 0 where that is the root, also on FAT32."""
    stamps = {"created_ns": now_ns, "modified_ns": now_ns, "accessed_ns": now_ns}
    return pack(DOT, settings, attributes=DIRECTORY, cluster=cluster, **stamps) + pack(
        DOTDOT, settings, attributes=DIRECTORY, cluster=parent, **stamps
    )
