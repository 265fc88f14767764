"""Sense data, and the one table that says what each means for a request: pure.

Owns: reading sense data (fixed and descriptor format), and sense → verdict. Source: SPC-4, clause 4.5.
Must never: count attempts or wait: the caller does, with bounds. Called by: unit.py.
"""

from __future__ import annotations

import enum
import errno
from typing import NamedTuple

NO_SENSE, RECOVERED, NOT_READY, MEDIUM, HARDWARE, ILLEGAL, ATTENTION, PROTECTED, BLANK = range(9)
COPY_ABORTED, ABORTED, OVERFLOW, MISCOMPARE = 0x0A, 0x0B, 0x0D, 0x0E

KEYS = {
    NO_SENSE: "no sense",
    RECOVERED: "recovered error",
    NOT_READY: "not ready",
    MEDIUM: "medium error",
    HARDWARE: "hardware error",
    ILLEGAL: "illegal request",
    ATTENTION: "unit attention",
    PROTECTED: "write protected",
    BLANK: "blank check",
    COPY_ABORTED: "copy aborted",
    ABORTED: "aborted command",
    OVERFLOW: "volume overflow",
    MISCOMPARE: "miscompare",
}


class Sense(NamedTuple):
    """What a device gives as the reason why a command failed."""

    key: int
    asc: int = 0
    ascq: int = 0

    def __str__(self) -> str:
        return f"{KEYS.get(self.key, f'sense key {self.key:#x}')}, {self.asc:02x}/{self.ascq:02x}"


class Action(enum.Enum):
    """What is to be done about it."""

    DONE = "it was done all the same"
    RETRY = "ask again"
    WAIT = "ask again in a while"
    START = "start the unit, then ask again in a while"
    RESET = "the device was reset: ask again, and mistrust what its cache had"
    LOOK = "ask again, and look at the unit again"
    CHANGED = "another medium: what is asked for is not for it"
    EMPTY = "there is no medium"
    UNSUPPORTED = "it does not know the command"
    PROTECTED = "it cannot be written"
    FAIL = "it failed"


class Verdict(NamedTuple):
    """The meaning of one sense for a request; `errno` is for when asking again does not help either."""

    action: Action
    errno: int = errno.EIO


def parse_sense(data: bytes) -> Sense | None:
    """None when it is no sense data."""
    if len(data) < 3:
        return None
    code = data[0] & 0x7F
    if code in (0x70, 0x71):  # fixed format; shorter answers leave the rest out
        whole = data[: 8 + data[7]] if len(data) > 7 else data
        return Sense(data[2] & 0x0F, *(whole[at] if len(whole) > at else 0 for at in (12, 13)))
    if code in (0x72, 0x73):
        return Sense(data[1] & 0x0F, data[2], data[3] if len(data) > 3 else 0)
    return None


# (key, ASC, ASCQ), None for any. The first row that fits counts.
TABLE: tuple[tuple[tuple[int, int | None, int | None], Verdict], ...] = (
    ((NO_SENSE, None, None), Verdict(Action.RETRY)),  # it failed without a reason: never taken for success
    ((RECOVERED, None, None), Verdict(Action.DONE)),
    ((NOT_READY, 0x3A, None), Verdict(Action.EMPTY, errno.ENOMEDIUM)),
    ((NOT_READY, 0x04, 0x02), Verdict(Action.START)),
    ((NOT_READY, 0x04, 0x03), Verdict(Action.FAIL)),  # somebody has to do something first
    ((NOT_READY, None, None), Verdict(Action.WAIT)),
    ((MEDIUM, 0x11, None), Verdict(Action.FAIL)),  # unrecovered read error: the device has tried for long
    ((MEDIUM, 0x13, None), Verdict(Action.FAIL)),
    ((MEDIUM, 0x14, None), Verdict(Action.FAIL)),
    ((MEDIUM, None, None), Verdict(Action.RETRY)),
    ((HARDWARE, None, None), Verdict(Action.RETRY)),
    ((ILLEGAL, 0x20, None), Verdict(Action.UNSUPPORTED, errno.EOPNOTSUPP)),
    ((ILLEGAL, 0x21, None), Verdict(Action.LOOK)),  # fewer blocks than it said
    ((ILLEGAL, 0x24, None), Verdict(Action.UNSUPPORTED, errno.EINVAL)),
    ((ILLEGAL, 0x25, None), Verdict(Action.LOOK, errno.ENXIO)),
    ((ILLEGAL, None, None), Verdict(Action.FAIL, errno.EINVAL)),
    ((ATTENTION, 0x28, None), Verdict(Action.CHANGED, errno.ENOMEDIUM)),
    ((ATTENTION, 0x29, None), Verdict(Action.RESET)),
    ((ATTENTION, 0x2A, None), Verdict(Action.LOOK)),  # parameters or capacity have changed
    ((ATTENTION, 0x3A, None), Verdict(Action.EMPTY, errno.ENOMEDIUM)),
    ((ATTENTION, 0x3F, None), Verdict(Action.LOOK)),  # other LUNs, another INQUIRY
    ((ATTENTION, None, None), Verdict(Action.RETRY)),
    ((PROTECTED, None, None), Verdict(Action.PROTECTED, errno.EROFS)),
    ((ABORTED, None, None), Verdict(Action.RETRY)),
    ((OVERFLOW, None, None), Verdict(Action.FAIL, errno.ENOSPC)),
)


def decide(sense: Sense) -> Verdict:
    """What a sense means."""
    for (key, asc, ascq), verdict in TABLE:
        if sense.key == key and asc in (None, sense.asc) and ascq in (None, sense.ascq):
            return verdict
    return Verdict(Action.FAIL)
