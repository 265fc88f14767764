"""A host's side of Bulk-Only Transport, by hand, for tests."""

from __future__ import annotations

import struct

from tests.t1_devices.raw import Raw

EPIPE = -32


def cbw(cdb: bytes, length: int = 0, *, reads: bool = True, tag: int = 7, lun: int = 0) -> bytes:
    return struct.pack("<4sIIBBB16s", b"USBC", tag, length, 0x80 if reads else 0, lun, len(cdb), cdb.ljust(16, b"\0"))


def take_csw(raw: Raw, tag: int = 7) -> tuple[int, int]:
    """Residue and status; a stall is cleared once, as the specification says."""
    answer = raw.wait(raw.submit(0x81, 13))
    if answer.status == EPIPE:
        raw.clear_halt(0x81)
        answer = raw.wait(raw.submit(0x81, 13))
    assert answer.status == 0
    data = answer.data
    signature, seen, residue, status = struct.unpack("<4sIIB", data)
    assert (signature, seen) == (b"USBS", tag)
    return residue, status


def command(raw: Raw, cdb: bytes, length: int = 0, data: bytes | None = None, lun: int = 0) -> tuple[bytes, int, int]:
    """Data, residue, status of a whole command."""
    wanted = len(data) if data is not None else length
    raw.write(2, cbw(cdb, wanted, reads=data is None, lun=lun))
    got = b""
    if data:
        answer = raw.wait(raw.submit(2, data))
        if answer.status == EPIPE:
            raw.clear_halt(2)
    elif length:
        answer = raw.wait(raw.submit(0x81, length))
        got = answer.data
        if answer.status == EPIPE:
            raw.clear_halt(0x81)
    residue, status = take_csw(raw)
    return got, residue, status


def good(raw: Raw, cdb: bytes, length: int = 0, data: bytes | None = None, lun: int = 0) -> bytes:
    got, _, status = command(raw, cdb, length, data, lun)
    assert status == 0, sense(raw, lun)
    return got


def sense(raw: Raw, lun: int = 0) -> tuple[int, int, int]:
    data, _, status = command(raw, bytes((3, 0, 0, 0, 18, 0)), 18, lun=lun)
    assert status == 0
    assert data[0] & 0x7F == 0x70
    return data[2] & 0xF, data[12], data[13]


def refused(raw: Raw, cdb: bytes, length: int = 0, data: bytes | None = None, lun: int = 0) -> tuple[int, int, int]:
    _, _, status = command(raw, cdb, length, data, lun)
    assert status == 1
    return sense(raw, lun)


def read_10(lba: int, count: int) -> bytes:
    return struct.pack(">BBIBHB", 0x28, 0, lba, 0, count, 0)


def write_10(lba: int, count: int, *, fua: bool = False) -> bytes:
    return struct.pack(">BBIBHB", 0x2A, 8 if fua else 0, lba, 0, count, 0)


INQUIRY = bytes((0x12, 0, 0, 0, 36, 0))
READY = bytes(6)
FLUSH = bytes((0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0))


def reset_recovery(raw: Raw) -> None:
    raw.control(0x21, 0xFF)
    raw.clear_halt(0x81)
    raw.clear_halt(2)
