"""Transfers and pipes: what waits on which endpoint of an emulated device.

Owns: `Transfer` (one URB from its arrival to its answer), `Pipe` (an endpoint's state while it is configured) and the
two handshakes that a handler can raise. Must never: know the wire. Called by: engine.py, session.py, faults.py.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from udf.testing.devices.layout import Endpoint, Kind
from udf.usb.usbip import Speed

# What ends a transfer, as Linux says it in a URB.
OK = 0
EPIPE = -32  # stalled
EPROTO = -71  # no answer from the device, or a broken one
EOVERFLOW = -75  # more data than there is room for
ECONNRESET = -104  # given up by who asked
ESHUTDOWN = -108  # the endpoint went away


class Stall(Exception):
    """The device refuses: a control transfer ends, any other endpoint is halted until CLEAR_FEATURE."""


class Nak(Exception):
    """Not now: the transfer waits and is tried again after `Device.ready(endpoint)`."""


class Setup(NamedTuple):
    """The eight bytes that begin a control transfer."""

    request_type: int
    request: int
    value: int
    index: int  # type: ignore[assignment]  # wIndex hides tuple.index, which nobody needs here
    length: int

    @property
    def is_in(self) -> bool:
        """Whether data go to the host."""
        return bool(self.request_type & 0x80)

    @property
    def type(self) -> int:
        """0 standard, 1 class, 2 vendor."""
        return self.request_type >> 5 & 3

    @property
    def recipient(self) -> int:
        """0 device, 1 interface, 2 endpoint."""
        return self.request_type & 0x1F

    @property
    def is_standard(self) -> bool:
        """Whether chapter 9 defines it."""
        return not self.request_type & 0x60


SETUP = struct.Struct("<BBHHH")


class Action(NamedTuple):
    """What a fault rule does to one transfer. `late`: the device does its part first."""

    kind: str
    late: bool = False
    seconds: float = 0.0  # delay: how long; unplug: when it comes back, 0 never
    size: int | None = None  # short: bytes that are left; corrupt: bytes that are changed
    seed: int = 0


class Owner(Protocol):
    """Where a transfer came from and its answer goes to."""

    def reply(self, transfer: Transfer, status: int, data: bytes | memoryview) -> None:
        """Answer."""


class Transfer:
    """One URB. `address` has the direction bit, for control transfers too (0x80: data go to the host)."""

    __slots__ = (
        "action", "actual", "address", "done", "frame", "got", "held", "import_number", "length", "number", "out",
        "owner", "packets", "results", "seqnum", "setup",
    )  # fmt: skip

    def __init__(self, owner: Owner, seqnum: int, address: int, length: int) -> None:
        self.owner = owner
        self.seqnum = seqnum
        self.address = address
        self.length = length
        self.out: bytes = b""
        self.setup: Setup | None = None
        self.packets: Sequence[tuple[int, int]] = ()  # isochronous: offset and length of each
        self.results: Sequence[tuple[int, int]] = ()  # isochronous: actual length and status of each
        self.got: list[bytes | memoryview] = []  # what an IN transfer has received so far
        self.actual = 0
        self.number = 0  # since the plug, from 1
        self.import_number = 0  # since the import, from 1
        self.action: Action | None = None
        self.held = False  # a fault holds it back
        self.done = False
        self.frame = 0

    @property
    def is_in(self) -> bool:
        """Whether data go to the host."""
        return bool(self.address & 0x80)


class Pipe:
    """An endpoint as it is configured now. The control endpoint is one too."""

    __slots__ = (
        "again",
        "blocked",
        "busy",
        "due",
        "endpoint",
        "halted",
        "is_in",
        "kind",
        "queue",
        "size",
        "toggle",
        "waiting",
        "wedged",
    )

    def __init__(self, endpoint: Endpoint, speed: Speed) -> None:
        self.endpoint = endpoint
        self.kind = endpoint.kind
        self.is_in = bool(endpoint.address & 0x80)
        self.size = endpoint.packet_size(speed) & 0x7FF or 1
        self.toggle = 0  # what the next packet carries: 0 DATA0, 1 DATA1
        self.waiting: deque[Transfer] = deque()
        self.queue: deque[bytes | memoryview] = deque()  # pushed by the model, each ends with its last packet
        self.halted = False
        self.wedged = False  # halted, and CLEAR_FEATURE does not help
        self.busy = False  # a handler for it runs
        self.again = False  # something changed while it ran
        self.blocked = False  # an answer that a fault delays keeps the next ones behind it
        self.due = 0.0  # isochronous: when the last accepted transfer will be over

    def passed(self, length: int) -> None:
        """A transfer of so many bytes went over the bus, a packet of length zero if of none."""
        self.toggle ^= (-(-length // self.size) or 1) & 1

    def take(self, room: int) -> bytes | memoryview | None:
        """The next data of the queue for a transfer with so much room; whole packets, so it may be more than that."""
        if not self.queue:
            return None
        data = self.queue.popleft()
        most = -(-room // self.size) * self.size if self.kind is not Kind.ISO else room
        if len(data) > most:
            view = memoryview(data)
            self.queue.appendleft(view[most:])
            return view[:most]
        return data
