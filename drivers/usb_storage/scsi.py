"""SCSI commands as bytes, and what devices answer to them as checked values: pure.

Owns: the layout of every command that the driver sends and of every answer that it reads. Source: SPC-4, SBC-3.
Must never: believe a length inside an answer, or read behind the answer's end: what is missing is None or a default.
Called by: probe.py and unit.py.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Data = bytes | bytearray | memoryview

MODE_SENSE_LENGTH = 192  # what Windows asks for; some sticks answer other lengths with nonsense
VPD_LENGTH = 64
MAX_32 = 0xFFFFFFFF

DISK, WRITE_ONCE, CD, OPTICAL, REDUCED = 0x00, 0x04, 0x05, 0x07, 0x0E  # peripheral device types with blocks
BLOCK_TYPES = (DISK, WRITE_ONCE, CD, OPTICAL, REDUCED)

PAGE_CACHING, PAGE_ALL = 0x08, 0x3F
VPD_SUPPORTED, VPD_LIMITS, VPD_PROVISIONING = 0x00, 0xB0, 0xB2


class Command(NamedTuple):
    """One SCSI command: what it is called, its bytes, how much it reads, what it writes."""

    name: str
    cdb: bytes
    length: int = 0  # bytes that come from the device
    data: Data | None = None  # bytes that go to it


# ---- commands


def test_unit_ready() -> Command:
    """Whether there is a medium that can be used."""
    return Command("TEST UNIT READY", bytes(6))


def request_sense() -> Command:
    """Why the command before failed."""
    return Command("REQUEST SENSE", bytes((0x03, 0, 0, 0, 18, 0)), 18)


def inquiry() -> Command:
    """Who the unit is."""
    return Command("INQUIRY", bytes((0x12, 0, 0, 0, 36, 0)), 36)


def inquiry_page(page: int) -> Command:
    """Vital product data."""
    return Command(f"INQUIRY page {page:#04x}", bytes((0x12, 1, page, 0, VPD_LENGTH, 0)), VPD_LENGTH)


def mode_sense(page: int) -> Command:
    """One page of what is set, or all of them."""
    cdb = bytes((0x1A, 0, page, 0, MODE_SENSE_LENGTH, 0))
    return Command(f"MODE SENSE page {page:#04x}", cdb, MODE_SENSE_LENGTH)


def start_unit() -> Command:
    """Spin it up."""
    return Command("START STOP UNIT", bytes((0x1B, 0, 0, 0, 1, 0)))


def stop_unit(*, eject: bool) -> Command:
    """Spin it down, or put its medium out."""
    return Command("START STOP UNIT", bytes((0x1B, 0, 0, 0, 2 if eject else 0, 0)))


def read_capacity_10() -> Command:
    """How large the medium is, up to 2^32 blocks."""
    return Command("READ CAPACITY(10)", b"\x25" + bytes(9), 8)


def read_capacity_16() -> Command:
    """How large the medium is, and whether it can be trimmed."""
    return Command("READ CAPACITY(16)", struct.pack(">BBQIBB", 0x9E, 0x10, 0, 32, 0, 0), 32)


READ_CODES = {6: 0x08, 10: 0x28, 12: 0xA8, 16: 0x88}
WRITE_CODES = {6: 0x0A, 10: 0x2A, 12: 0xAA, 16: 0x8A}


def read_write_cdb(codes: dict[int, int], form: int, lba: int, blocks: int, *, fua: bool = False) -> bytes:
    """A READ or WRITE in the form of 6, 10, 12 or 16 bytes; the caller knows that the numbers fit (`fits`)."""
    flags = 0x08 if fua else 0
    if form == 10:
        return struct.pack(">BBIBHB", codes[10], flags, lba, 0, blocks, 0)
    if form == 16:
        return struct.pack(">BBQIBB", codes[16], flags, lba, blocks, 0, 0)
    if form == 12:
        return struct.pack(">BBIIBB", codes[12], flags, lba, blocks, 0, 0)
    return struct.pack(">BBHBB", codes[6], lba >> 16, lba & 0xFFFF, blocks & 0xFF, 0)  # 0 stands for 256


def fits(form: int, lba: int, blocks: int) -> bool:
    """Whether a form can name this range."""
    if form == 6:
        return lba + blocks <= 1 << 21 and 0 < blocks <= 256
    if form == 10:
        return lba <= MAX_32 and blocks <= 0xFFFF
    if form == 12:
        return lba <= MAX_32 and blocks <= MAX_32
    return lba < 1 << 64 and blocks <= MAX_32


def synchronize_cache() -> Command:
    """All of the cache: a range of 0 blocks from 0."""
    return Command("SYNCHRONIZE CACHE", b"\x35" + bytes(9))


def unmap(ranges: Sequence[tuple[int, int]]) -> Command:
    """Trim ranges of (LBA, blocks)."""
    body = b"".join(struct.pack(">QI4x", lba, blocks) for lba, blocks in ranges)
    data = struct.pack(">HH4x", len(body) + 6, len(body)) + body
    return Command("UNMAP", struct.pack(">B6xHB", 0x42, len(data), 0), data=data)


def write_same(lba: int, blocks: int, block: bytes, *, unmap: bool) -> Command:
    """Write one block's contents to many, or trim them."""
    cdb = struct.pack(">BBQIBB", 0x93, 0x08 if unmap else 0, lba, blocks, 0, 0)
    return Command("WRITE SAME(16)", cdb, data=block)


# ---- answers


@dataclass(frozen=True)
class Inquiry:
    """Who the logical unit says that it is."""

    qualifier: int
    type: int
    removable: bool
    version: int
    vendor: str
    product: str
    revision: str

    @property
    def is_present(self) -> bool:
        """Whether there is a unit with blocks behind this LUN."""
        return self.qualifier == 0 and self.type in BLOCK_TYPES


def parse_inquiry(data: bytes) -> Inquiry | None:
    """None when it is too short to say anything."""
    if len(data) < 5:
        return None
    text = [_text(data[8:16]), _text(data[16:32]), _text(data[32:36])]
    return Inquiry(data[0] >> 5, data[0] & 0x1F, bool(data[1] & 0x80), data[2], *text)


@dataclass(frozen=True)
class Capacity:
    """How large the medium is."""

    blocks: int
    block_size: int
    thin: bool = False  # LBPME: it can be told what is of no use
    zeroes: bool = False  # LBPRZ: what was trimmed reads as zeros


def parse_capacity_10(data: bytes) -> Capacity | None:
    """`blocks` is 2^32 when the device needs READ CAPACITY(16) to say more."""
    if len(data) < 8:
        return None
    last, size = struct.unpack_from(">II", data)
    return Capacity(last + 1, size)


def parse_capacity_16(data: bytes) -> Capacity | None:
    """None when it is too short."""
    if len(data) < 12:
        return None
    last, size = struct.unpack_from(">QI", data)
    flags = data[14] if len(data) > 14 else 0
    return Capacity(last + 1, size, bool(flags & 0x80), bool(flags & 0x40))


@dataclass(frozen=True)
class Mode:
    """What MODE SENSE(6) tells; None: it does not."""

    write_protected: bool = False
    fua: bool = False  # DPOFUA
    write_cache: bool | None = None


def parse_mode(data: bytes) -> Mode | None:
    """The header, and the caching page if it is among the pages that follow."""
    if len(data) < 4:
        return None
    end = min(len(data), data[0] + 1)
    cache = None
    for page, body in _pages(data[4 + data[3] : end]):
        if page == PAGE_CACHING and body:
            cache = bool(body[0] & 0x04)
    return Mode(bool(data[2] & 0x80), bool(data[2] & 0x10), cache)


def _pages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 2:
        if data[0] & 0x40:  # a subpage has a longer header
            if len(data) < 4:
                return
            size = 4 + int.from_bytes(data[2:4], "big")
            page, body = -1, b""
        else:
            size = 2 + data[1]
            page, body = data[0] & 0x3F, data[2:size]
        yield page, body
        data = data[size:]  # size is at least 2: this ends


def parse_supported_pages(data: bytes) -> frozenset[int]:
    """Which vital product data there are."""
    if len(data) < 4 or data[1] != VPD_SUPPORTED:
        return frozenset()
    return frozenset(data[4 : 4 + int.from_bytes(data[2:4], "big")])


@dataclass(frozen=True)
class Limits:
    """Block limits (VPD page B0), in blocks; 0: not said."""

    max_transfer: int = 0
    max_unmap: int = 0
    max_unmap_ranges: int = 0
    unmap_granularity: int = 0
    max_write_same: int = 0


def parse_limits(data: bytes) -> Limits:
    """Nothing is said by an answer to something else, or by one that is too short."""
    if len(data) < 4 or data[1] != VPD_LIMITS:
        return Limits()
    data = data[: 4 + int.from_bytes(data[2:4], "big")].ljust(44, b"\0")
    (transfer,) = struct.unpack_from(">I", data, 8)
    unmap_blocks, ranges, granularity = struct.unpack_from(">III", data, 20)
    (same,) = struct.unpack_from(">Q", data, 36)
    return Limits(transfer, unmap_blocks, ranges, granularity, same)


@dataclass(frozen=True)
class Provisioning:
    """Logical block provisioning (VPD page B2): by which commands blocks are trimmed."""

    unmap: bool = False
    write_same: bool = False


def parse_provisioning(data: bytes) -> Provisioning:
    """Nothing is said by an answer to something else."""
    if len(data) < 6 or data[1] != VPD_PROVISIONING:
        return Provisioning()
    return Provisioning(bool(data[5] & 0x80), bool(data[5] & 0x40))


def _text(raw: bytes) -> str:
    """A device's text is shown to people: printable ASCII and nothing else of it."""
    return "".join(chr(byte) if 0x20 <= byte < 0x7F else " " for byte in raw).strip()
