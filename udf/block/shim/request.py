"""A request under way, and the pieces in which the driver is asked for it.

A request leaves the table of requests only by its one answer. Until then all of it stays here, a write's data too, so
that another generation of the driver can be asked again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from udf.block.shim.buffers import Buffer
from udf.block.wire import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
)

if TYPE_CHECKING:
    from udf.block.shim.client import Client
    from udf.block.shim.exports import Region
    from udf.block.shim.units import Unit

COMMANDS = {
    CMD_READ: "read",
    CMD_WRITE: "write",
    CMD_FLUSH: "flush",
    CMD_TRIM: "trim",
    CMD_CACHE: "cache",
    CMD_WRITE_ZEROES: "zero",
    CMD_BLOCK_STATUS: "status",
}
WRITING = frozenset((CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES))
WITH_DATA = frozenset((CMD_READ, CMD_WRITE))


class Request:
    """One command, of a client's or (client is None) of our own."""

    __slots__ = (
        "alone",
        "answered",
        "asked",
        "at",
        "buffer",
        "carrier",
        "charge",
        "client",
        "cookie",
        "deaths",
        "error",
        "flags",
        "held",
        "id",
        "length",
        "mark",
        "offset",
        "op",
        "open",
        "region",
        "reply",
        "riders",
        "sent",
        "since",
        "target",
        "then",
        "todo",
        "unit",
        "watch",
    )

    def __init__(self, unit: Unit, op: int, flags: int, offset: int, length: int, since: float) -> None:
        self.id = 0
        self.unit = unit
        self.op = op
        self.flags = flags
        self.offset = offset  # in the unit
        self.length = length
        self.since = since
        self.client: Client | None = None
        self.region: Region | None = None  # of the client's export
        self.cookie = 0  # the client's
        self.charge = 0  # bytes that are on its account
        self.buffer: Buffer | None = None  # what is written, or has been read so far
        self.at = 0  # where its data begins in the buffer
        self.target: memoryview | None = None  # where its client wants what is read
        self.then: Callable[[Request], None] | None = None  # who is told of the answer to one of our own
        self.sent = 0.0  # when the driver was first asked, by this generation; 0.0: not yet
        self.todo = 0  # bytes of it that the driver has been asked for
        self.open = 0  # pieces that it has not answered
        self.error = 0
        self.reply = b""  # a block status's payload
        self.deaths = 0  # of the driver's own making at which it was under way
        self.mark = 0  # a flush: what is kept up to here is covered by it; a watched read: see Watched.expect
        self.answered = False
        self.riders: list[Request] = []  # the clients' requests that this one stands for
        self.carrier: Request | None = None  # under way: what it is asked for as a part of
        self.alone = False  # what it was a part of has failed
        self.watch = False  # its sectors have to be the same when the device comes back
        self.asked = False  # a driver was asked for it, this one or one before
        self.held = False  # the driver says that the device is gone, and nobody else has said so yet

    def begin_again(self) -> None:
        """As if the driver had not been asked."""
        self.sent = 0.0
        self.todo = self.open = self.error = 0
        self.held = False
        self.carrier = None
        self.reply = b""

    def describe(self) -> str:
        """Where it reads or writes, for people."""
        name = self.region.name if self.region is not None else self.unit.label
        return f"{name} {self.offset - (self.region.offset if self.region is not None else 0)}+{self.length}"


class Piece:
    """One command to the driver."""

    __slots__ = ("at", "filled", "landing", "length", "op", "request", "sent", "whole")

    def __init__(self, request: Request, op: int, at: int, length: int, sent: float) -> None:
        self.request: Request | None = request  # None: it was answered without waiting for this
        self.op = op
        self.at = at  # in the unit
        self.length = length
        self.sent = sent
        self.filled = 0  # bytes of a read that have come
        self.landing: Buffer | None = None  # where the driver puts it, until it says that it has, or dies
        self.whole = False  # an answer that ends it has come, but its last chunk has not
