"""Bulk-Only Transport on the wire, and what to do at each turn of a command: pure, without a device.

Owns: the layout of CBW and CSW, what makes a CSW valid, and the decisions at the turns of a command. Source: USB Mass
Storage Class, Bulk-Only Transport 1.0, chapters 5 and 6. Must never: do I/O, or believe a field that it did not check.
Called by: transport.py.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

CBW = struct.Struct("<4sIIBBB16s")
CSW = struct.Struct("<4sIIB")
CBW_SIGNATURE, CSW_SIGNATURE = b"USBC", b"USBS"
MAX_LUN = 15

GET_MAX_LUN, RESET = 0xFE, 0xFF  # class requests
CLASS_IN, CLASS_OUT = 0xA1, 0x21  # bmRequestType: class, interface


class Outcome(enum.Enum):
    """How one transfer of a command ended."""

    OK = "ok"
    STALL = "stall"
    TIMEOUT = "timeout"
    BABBLE = "babble"  # the device sent more than was asked for
    ERROR = "error"
    GONE = "gone"


class Turn(enum.Enum):
    """What is to be done next."""

    GO_ON = "go on"
    CLEAR_AND_GO_ON = "clear the halt and go on"
    READ_STATUS_AGAIN = "read the status again"
    CLEAR_AND_READ_STATUS_AGAIN = "clear the halt and read the status again"
    RECOVER = "reset recovery"
    GIVE_UP = "the device is gone"


class Status(enum.IntEnum):
    """bCSWStatus."""

    PASSED = 0
    FAILED = 1
    PHASE_ERROR = 2


class Csw(NamedTuple):
    """A valid and meaningful command status."""

    status: Status
    residue: int


def pack_cbw(tag: int, length: int, is_in: bool, lun: int, cdb: bytes) -> bytes:
    """The 31 bytes that begin a command; `length` is what is to be moved, in the direction of `is_in`."""
    return CBW.pack(CBW_SIGNATURE, tag, length, 0x80 if is_in else 0, lun, len(cdb), cdb)


def read_csw(data: bytes, tag: int, length: int) -> Csw | str:
    """The status of the command `tag` of `length` bytes, or what is wrong with it (a reason for Reset Recovery)."""
    if len(data) != CSW.size:
        return f"its status has {len(data)} bytes, not {CSW.size}"
    signature, answered, residue, status = CSW.unpack(data)
    if signature != CSW_SIGNATURE:
        return "its status has a wrong signature"
    if answered != tag:
        return f"its status is for the command {answered:#x}, not {tag:#x}"
    if status == Status.PHASE_ERROR:
        return "it reports a phase error"
    if status not in (Status.PASSED, Status.FAILED):
        return f"its status {status} has no meaning"
    if residue > length and length:  # where nothing can be left, devices are careless
        return f"it left {residue} bytes of {length}"
    return Csw(Status(status), min(residue, length))


def after_command(outcome: Outcome) -> Turn:
    """The CBW was sent. A device that stalls it did not take it for a command (6.6.1)."""
    return _TURNS_AFTER_COMMAND.get(outcome, Turn.RECOVER)


def after_data(outcome: Outcome) -> Turn:
    """The data stage is over. A stall is how a device ends it early (6.7.2, 6.7.3)."""
    return _TURNS_AFTER_DATA.get(outcome, Turn.RECOVER)


def after_status(outcome: Outcome, received: int, attempt: int) -> Turn:
    """The CSW was read for the `attempt`-th time, from 0: one stall, or one empty packet, is forgiven (figure 2)."""
    if outcome is Outcome.OK:
        return Turn.READ_STATUS_AGAIN if received == 0 and attempt == 0 else Turn.GO_ON
    if outcome is Outcome.STALL and attempt == 0:
        return Turn.CLEAR_AND_READ_STATUS_AGAIN
    return Turn.GIVE_UP if outcome is Outcome.GONE else Turn.RECOVER


_TURNS_AFTER_COMMAND = {Outcome.OK: Turn.GO_ON, Outcome.GONE: Turn.GIVE_UP}
_TURNS_AFTER_DATA = {Outcome.OK: Turn.GO_ON, Outcome.STALL: Turn.CLEAR_AND_GO_ON, Outcome.GONE: Turn.GIVE_UP}
