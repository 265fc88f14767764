"""The calls that a driver makes to its device, numbered, and what can go wrong in each.

Owns: `Step`, `Fault`, and the table of faults. Must never: do I/O. Called by: backend.py, explore.py, tests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from os.path import basename

from udf.errors import UserError

# What a call is; a transfer can fail in more ways than the others.
READ, WRITE, CONTROL = "read", "write", "control"
OPEN, CLAIM, RELEASE, CONFIGURE, CONFIGURATION = "open", "claim", "release", "set configuration", "get configuration"
ALTERNATE, CLEAR, RESET, KERNEL = "set alternate", "clear halt", "reset", "kernel driver"

GET_DESCRIPTOR = 6
_STANDARD = 0x60  # bits of bmRequestType that are 0 in a standard request


@dataclass(repr=False)
class Step:
    """One call of a driver that reaches the device or the kernel."""

    number: int
    call: str
    device: str  # which of the plugged devices
    endpoint: int = 0  # with its direction; a control transfer has 0x00 or 0x80
    length: int = 0  # asked for, or to be written
    setup: bytes = b""
    where: str = ""  # the driver's line
    thread: str = ""
    data: bytes = b""  # what was moved
    result: str = ""  # empty: done; else what it failed with
    packet: int = 0  # wMaxPacketSize of the endpoint
    kind: str = ""  # bulk, intr, iso

    @property
    def is_in(self) -> bool:
        """From the device."""
        return bool(self.endpoint & 0x80)

    @property
    def is_harmless(self) -> bool:
        """Looking at a device: opening it, reading its descriptors, letting it go."""
        return self.call in (OPEN, CONFIGURATION, RELEASE) or (self.is_standard and self.setup[1] == GET_DESCRIPTOR)

    @property
    def is_standard(self) -> bool:
        """A control request that chapter 9 defines, and that pyusb may have made for itself."""
        return self.call == CONTROL and not self.setup[0] & _STANDARD

    def __str__(self) -> str:
        if self.call == CONTROL:
            kind, request = self.setup[0], self.setup[1]
            what = f"control {kind:#04x} request {request:#04x}, {self.length} bytes"
        elif self.call in (READ, WRITE):
            what = f"{self.kind} {self.call} {self.endpoint:#04x}, {self.length} bytes"
        else:
            what = self.call
        return f"{what}; {self.where}" if self.where else what

    def __repr__(self) -> str:
        return f"<{self.number}: {self}{' failed: ' + self.result if self.result else ''}>"


def _any(_step: Step) -> bool:
    return True


def _transfer(step: Step) -> bool:
    return step.call in (READ, WRITE, CONTROL)


def _stream_in(step: Step) -> bool:
    return step.call == READ and step.kind != "iso" and len(step.data) > 0


def _stalls(step: Step) -> bool:
    return step.kind != "iso" and _transfer(step) and not step.is_standard


def _short(step: Step) -> bool:
    if step.call == WRITE:
        return step.kind != "iso" and step.length > step.packet
    return _stream_in(step) or (step.call == CONTROL and step.is_in and not step.is_standard and bool(step.data))


def _babbles(step: Step) -> bool:
    return _stream_in(step) or (step.call == CONTROL and step.is_in and bool(step.data))


def _split(step: Step) -> bool:
    return _stream_in(step) and step.kind == "bulk" and len(step.data) > 1


def _empty(step: Step) -> bool:
    return _stream_in(step) and step.kind == "bulk"


def _claims(step: Step) -> bool:
    return step.call == CLAIM


# Name -> (to which steps of a healthy run it can happen, what happens).
FAULTS = {
    "unplug": (_any, "the device is pulled out before this call"),
    "replug": (_any, "the device is pulled out before this call and plugged in again at once, with a new address"),
    "stall": (_stalls, "the device refuses; a bulk or interrupt endpoint stays halted until the driver clears it"),
    "short": (_short, "half of the data is moved; the other half is lost (IN) or not taken (OUT)"),
    "split": (_split, "half of the data comes now, and the other half with the next read"),
    "empty": (_empty, "a packet of length zero comes first, and the data with the next read"),
    "timeout": (_transfer, "the device does not answer in time; nothing is moved, what it has to say it says later"),
    "eio": (_transfer, "an input/output error; what was on its way in is lost"),
    "babble": (_babbles, "the device sends more than there is room for; it is lost"),
    "corrupt": (_babbles, "one byte is another one"),
    "busy": (_claims, "another program has the interface"),
}
# Name -> what is so from the start.
CONDITIONS = {
    "absent": "without the device",
    "unconfigured": "when no configuration is set",
    "kernel_driver": "when a kernel driver has its interface",
    "in_use": "when another program has another interface of the device",
    "twin": "beside another device of the same kind",
    "twin_alone": "with only another device of the same kind",
}
# Not by itself: where the kernel configures each device, nobody need do it; who has no checksum notices no wrong byte.
EXTRA = ("unconfigured", "corrupt")
DEFAULT = tuple(name for name in (*CONDITIONS, *FAULTS) if name not in EXTRA)
# Interface classes that Linux has drivers for: audio, CDC, HID, printer, storage, CDC data, video, wireless.
KERNEL_CLASSES = (1, 2, 3, 7, 8, 10, 14, 0xE0)
# Requests that a device may refuse: bmRequestType, bRequest.
OPTIONAL = {
    (0xA1, 0xFE): "GET MAX LUN (Bulk-Only Transport 3.2)",
    (0x21, 0x0A): "SET IDLE (HID 7.2.4)",
    (0x21, 0x0B): "SET PROTOCOL (HID 7.2.6)",
    (0x21, 0x22): "SET CONTROL LINE STATE (CDC PSTN 6.3.12)",
    (0x21, 0x23): "SEND BREAK (CDC PSTN 6.3.13)",
}
LOST = ("unplug", "replug")  # the device that the driver has opened is gone
ALIASES = {"drop": "timeout"}

_NAME = re.compile(r"([a-z_]+)(?:@(\d+))?")


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and when: `unplug@7`. Conditions, which are so from the start, have no number."""

    kind: str
    number: int = 0

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read back what `str` has written."""
        match = _NAME.fullmatch(text.strip())
        if match is None:
            raise UserError(f"{text!r} names no fault: it looks like unplug@7")
        return cls(ALIASES.get(match[1], match[1]), int(match[2] or 0))

    def __str__(self) -> str:
        return f"{self.kind}@{self.number}" if self.number else self.kind


@dataclass
class Rule:
    """A fault that waits for its step: the `at`-th call from now on that can have it; 1 is the next."""

    kind: str
    at: int = 1
    endpoint: int | None = None
    count: int = 1  # so many times, one call after the other
    seed: int = 0
    matched: int = 0
    fired: list[int] = field(default_factory=list)  # the numbers of the steps that it was done to

    def wants(self, step: Step) -> bool:
        """Whether this is its step."""
        if self.endpoint is not None:
            control = not self.endpoint & 0x0F
            if step.call not in ((CONTROL,) if control else (READ, WRITE)):
                return False
            if not control and step.endpoint != self.endpoint:
                return False
        if not self.may_fit(step):
            return False
        self.matched += 1
        return self.at <= self.matched < self.at + self.count

    def may_fit(self, step: Step) -> bool:
        """Whether such a call could have this fault, as far as is known before its end."""
        if self.kind in LOST:
            return True
        if self.kind in ("stall", "timeout", "eio"):
            return FAULTS[self.kind][0](step)
        if self.kind == "busy":
            return _claims(step)
        if step.call == WRITE:
            return self.kind == "short" and _short(step)
        if step.call == CONTROL:
            return self.kind in ("babble", "corrupt") or (self.kind == "short" and not step.is_standard)
        return step.call == READ and step.kind != "iso"

    def __str__(self) -> str:
        where = "" if self.endpoint is None else f" endpoint {self.endpoint:#04x}"
        return f"{self.kind} at {self.at}{where}"


def known(kind: str) -> str:
    """A fault's name as it is in the table; UserError if it is none."""
    kind = ALIASES.get(kind, kind)
    if kind not in FAULTS:
        raise UserError(f"there is no fault {kind!r}: choose from {', '.join(FAULTS)}")
    return kind


def short_name(path: str) -> str:
    """A file's name for a report."""
    return basename(path)
