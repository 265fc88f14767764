"""The SCSI commands that move blocks or make them disappear (SBC-3): read, write, verify, write same, unmap.

Owns: their ranges and limits; only whole blocks are ever written. Must never: move data outside of the medium.
Called by: scsi.py's table.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from udf.testing.devices.scsi_pages import MAX_SAME, MAX_UNMAP
from udf.testing.devices.scsi_words import (
    ILLEGAL,
    INVALID_FIELD,
    INVALID_OPCODE,
    INVALID_PARAMETER,
    MEDIUM_ERROR,
    MISCOMPARE,
    OUT_OF_RANGE,
    READ_6,
    WRITE_6,
    WRITE_SAME_16,
    WRITE_VERIFY,
    Check,
    Plan,
    address,
    carefully,
)

if TYPE_CHECKING:
    from udf.testing.devices.scsi import Unit


def _range(unit: Unit, lba: int, count: int) -> None:
    if lba + count > unit.blocks:
        raise Check(*OUT_OF_RANGE)


def _broken(unit: Unit, lba: int, count: int, asc: int) -> None:
    """Check if one of these blocks is bad; the first bad one is the sense's information."""
    for first, last in unit.bad:
        if lba <= last and first < lba + count:
            raise Check(MEDIUM_ERROR, asc, 0, max(first, lba))


def read_blocks(unit: Unit, cdb: bytes) -> Plan:
    """08, 28, A8, 88."""
    medium = unit.ready()
    lba, count = address(cdb)
    _limit(unit, cdb, lba, count)
    size = unit.block_size
    base = lba * size

    def read(position: int, length: int) -> bytes | memoryview:
        if unit.bad:
            _broken(unit, (base + position) // size, -(-length // size), 0x11)
        return carefully(lambda: medium.read(base + position, length), 0x11)

    return Plan(to_host=count * size, read=read)


def write_blocks(unit: Unit, cdb: bytes) -> Plan:
    """0A, 2A, AA, 8A, 2E: whole blocks only, so that no unplug tears one."""
    medium = unit.writable()
    lba, count = address(cdb)
    _limit(unit, cdb, lba, count)
    through = not unit.caching or (cdb[0] not in (WRITE_6, WRITE_VERIFY) and bool(cdb[1] & 8))
    size = unit.block_size
    carry = b""

    def write(position: int, data: bytes) -> None:
        nonlocal carry
        begin = lba * size + position - len(carry)
        whole = carry + data if carry else data
        used = len(whole) // size * size
        carry = whole[used:]
        if unit.bad:
            _broken(unit, begin // size, used // size, 0x0C)
        part = whole if used == len(whole) else whole[:used]
        carefully(lambda: medium.write(begin, part, through=through), 0x0C)

    return Plan(from_host=count * size, write=write)


def verify(unit: Unit, cdb: bytes) -> Plan:
    """2F, AF, 8F: that it can be read, or (BYTCHK) that it is the same."""
    medium = unit.ready()
    lba, count = address(cdb)
    _limit(unit, cdb, lba, count)
    _broken(unit, lba, count, 0x11)
    check = cdb[1] >> 1 & 3
    if check > 1:
        raise Check(*INVALID_FIELD)
    if not check:
        return Plan()
    base = lba * unit.block_size

    def compare(position: int, data: bytes) -> None:
        if carefully(lambda: medium.read(base + position, len(data)), 0x11) != data:
            raise Check(MISCOMPARE, 0x1D, 0)

    return Plan(from_host=count * unit.block_size, write=compare)


def write_same(unit: Unit, cdb: bytes) -> Plan:
    """41 and 93: one block again and again, or (UNMAP) nothing."""
    medium = unit.writable()
    lba, count = address(cdb)
    unmap = bool(cdb[1] & 8)
    no_data = cdb[0] == WRITE_SAME_16 and bool(cdb[1] & 1)
    if not count or count > MAX_SAME or (unmap and not unit.trims):
        raise Check(*INVALID_FIELD)
    _range(unit, lba, count)
    block = bytearray()

    def finish() -> None:
        _broken(unit, lba, count, 0x0C)
        pattern = bytes(block) or b"\0"
        if len(pattern) not in (1, unit.block_size):
            raise Check(*INVALID_PARAMETER)
        where = (lba * unit.block_size, count * unit.block_size)
        if unmap and not any(pattern):
            carefully(lambda: medium.trim(*where), 0x0C)
        else:
            carefully(lambda: medium.fill(*where, pattern), 0x0C)

    return Plan(
        from_host=0 if no_data else unit.block_size,
        write=lambda _position, data: block.extend(data),
        finish=finish,
    )


def unmap(unit: Unit, cdb: bytes) -> Plan:
    """42."""
    medium = unit.writable()
    if not unit.trims:
        raise Check(*INVALID_OPCODE)
    length = int.from_bytes(cdb[7:9], "big")
    received = bytearray()

    def finish() -> None:
        if len(received) < 8:
            if received:
                raise Check(ILLEGAL, 0x1A, 0)
            return
        rows = int.from_bytes(received[2:4], "big")
        ranges = [struct.unpack_from(">QI", received, at) for at in range(8, min(8 + rows, len(received)) - 15, 16)]
        if sum(count for _, count in ranges) > MAX_UNMAP:
            raise Check(*INVALID_PARAMETER)
        for lba, count in ranges:
            _range(unit, lba, count)
        for lba, count in ranges:
            if count:
                where = (lba * unit.block_size, count * unit.block_size)
                carefully(lambda where=where: medium.trim(*where), 0x0C)  # type: ignore[misc]

    return Plan(from_host=length, write=lambda _position, data: received.extend(data), finish=finish)


def _limit(unit: Unit, cdb: bytes, lba: int, count: int) -> None:
    if cdb[0] not in (READ_6, WRITE_6) and cdb[1] & 0xE0:
        raise Check(*INVALID_FIELD)  # no protection information here
    if unit.max_transfer and count > unit.max_transfer:
        raise Check(*INVALID_FIELD)
    _range(unit, lba, count)
