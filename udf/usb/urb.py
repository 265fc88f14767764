"""One transfer under way.

Owns: its result, and what its isochronous packets look like on the wire. Must never: touch the socket; what it asks for
is done by its connection. Called by: client.py, table.py, replies.py; callers get Transfer objects from submit().
"""

from __future__ import annotations

import array
import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import usb.core

from udf.usb import usbip
from udf.usb.errors import Failure, failure_of, usb_error

if TYPE_CHECKING:
    from udf.usb.client import Connection
    from udf.usb.turns import Waiter

Buffer: TypeAlias = "bytes | bytearray | memoryview | array.array[int]"


class Transfer:
    """After wait(): `actual` bytes were moved; `data` are those that came in."""

    __slots__ = (
        "_connection", "actual", "cancelled", "done", "is_in", "lengths", "packets", "room", "seqnum", "status", "view",
        "waiters",
    )  # fmt: skip

    def __init__(self, connection: Connection, is_in: bool, view: memoryview, lengths: Sequence[int] = ()) -> None:
        self._connection = connection
        self.is_in = is_in
        self.view: memoryview | None = view  # None: the caller has its buffer back, nothing may be written to it
        self.room = view.nbytes
        self.lengths = lengths  # of its isochronous packets
        self.seqnum = 0
        self.status = 0  # the URB's: 0 or minus an errno
        self.actual = 0
        self.packets: list[tuple[int, int]] = []  # of an isochronous transfer: bytes and status of each packet
        self.done = False  # there is an answer, or never will be one
        self.cancelled = False
        self.waiters: list[Waiter] = []

    @property
    def data(self) -> bytes:
        """What has come in."""
        return bytes(self.view[: self.actual]) if self.view is not None and self.is_in else b""

    def wait(self, timeout: float | None = None) -> int:
        """Sleep until it is done; the number of bytes, or a USBError. None: without end.

        When the time is over the transfer is unlinked. What had come until then is returned as if nothing had
        happened, as libusb does; a time-out is only raised for nothing at all.
        """
        timed_out = not self._connection.wait_for(self, timeout)
        if self.cancelled and not self.actual and self.status in (-errno.ECONNRESET, -errno.ENOENT):
            if timed_out:
                raise usb_error(Failure.TIMEOUT)
            raise usb.core.USBError("Transfer was cancelled", int(Failure.IO), errno.EIO)
        failure = failure_of(self.status)
        if failure is not None:
            raise usb_error(failure)
        return self.actual

    def cancel(self) -> None:
        """Ask for the transfer's end. Never blocks, harms nothing when it is done; wait() still tells the result."""
        self._connection.cancel(self)


def bytes_of(data_or_length: Buffer | int) -> memoryview:
    """The bytes of a transfer: a new buffer for a number of them, else what was given."""
    view = memoryview(bytearray(data_or_length) if isinstance(data_or_length, int) else data_or_length)
    if view.format == "B" and view.ndim == 1:
        return view
    return view.cast("B") if view.nbytes else memoryview(bytearray())  # nothing cannot be cast


def iso_layout(lengths: Sequence[int]) -> bytes:
    """The packet descriptors that end the submission of an isochronous transfer."""
    layout, offset = bytearray(), 0
    for length in lengths:
        layout += usbip.ISO_PACKET.pack(offset, length, 0, 0)
        offset += length
    return bytes(layout)


def spread(view: memoryview, lengths: Sequence[int], actual: Sequence[int]) -> None:
    """Isochronous data come without gaps; put each packet where it belongs, the last first."""
    source, offset = sum(actual), sum(lengths)
    for length, count in zip(reversed(lengths), reversed(actual), strict=True):
        offset -= length
        source -= count
        if count and source != offset:
            view[offset : offset + count] = bytes(view[source : source + count])
