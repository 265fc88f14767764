"""The words of SCSI: sense, what a command will do, how a command block is read.

Owns: `Check`, `Plan`, sense codes, the lengths and addresses of command blocks. Must never: know a unit.
Called by: scsi.py, scsi_blocks.py, storage.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

INQUIRY, REQUEST_SENSE, REPORT_LUNS = 0x12, 0x03, 0xA0
READ_6, WRITE_6, WRITE_VERIFY = 0x08, 0x0A, 0x2E
MODE_SENSE_10, MODE_SELECT_10 = 0x5A, 0x55
SYNCHRONIZE_16, WRITE_SAME_16 = 0x91, 0x93


class Check(Exception):
    """CHECK CONDITION with this sense: key, additional code and its qualifier."""

    def __init__(self, key: int, asc: int, ascq: int = 0, information: int | None = None) -> None:
        super().__init__(f"{key:x}/{asc:02x}/{ascq:02x}")
        self.sense = (key, asc, ascq)
        self.information = information


NO_SENSE, NOT_READY, MEDIUM_ERROR, ILLEGAL, ATTENTION, PROTECT, MISCOMPARE = 0, 2, 3, 5, 6, 7, 0xE
INVALID_OPCODE = (ILLEGAL, 0x20, 0)
INVALID_FIELD = (ILLEGAL, 0x24, 0)
INVALID_PARAMETER = (ILLEGAL, 0x26, 0)
OUT_OF_RANGE = (ILLEGAL, 0x21, 0)
LUN_UNKNOWN = (ILLEGAL, 0x25, 0)
NO_MEDIUM = (NOT_READY, 0x3A, 0)
WRITE_PROTECTED = (PROTECT, 0x27, 0)
POWER_ON = (ATTENTION, 0x29, 0)
MEDIUM_CHANGED = (ATTENTION, 0x28, 0)
MODE_CHANGED = (ATTENTION, 0x2A, 1)


@dataclass
class Plan:
    """What a command will do: `to_host` bytes come out of `read`, or `from_host` bytes go into `write`, then `finish`.

    Each of the three may raise Check. `read(position, size)` and `write(position, data)` are called in order.
    """

    to_host: int = 0
    from_host: int = 0
    read: Callable[[int, int], bytes | memoryview] | None = None
    write: Callable[[int, bytes], None] | None = None
    finish: Callable[[], None] | None = None


def reply(data: bytes, allocation: int) -> Plan:
    """Data to the host, as much as it has allocated."""
    data = data[:allocation]
    return Plan(to_host=len(data), read=lambda position, size: data[position : position + size])


def cdb_length(opcode: int) -> int:
    """How many bytes a command has, by its group."""
    return (6, 10, 10, 16, 16, 12)[opcode >> 5] if opcode < 0xC0 else 16


def address(cdb: bytes) -> tuple[int, int]:
    """First block and number of blocks, of any of the four forms."""
    match cdb_length(cdb[0]):
        case 6:
            return int.from_bytes(cdb[1:4], "big") & 0x1FFFFF, cdb[4] or 256
        case 10:
            return int.from_bytes(cdb[2:6], "big"), int.from_bytes(cdb[7:9], "big")
        case 12:
            return int.from_bytes(cdb[2:6], "big"), int.from_bytes(cdb[6:10], "big")
        case _:
            return int.from_bytes(cdb[2:10], "big"), int.from_bytes(cdb[10:14], "big")


def carefully(call: Callable[[], T], asc: int) -> T:
    """What the image's file refuses is a medium error."""
    try:
        return call()
    except OSError:
        raise Check(MEDIUM_ERROR, asc, 0) from None
