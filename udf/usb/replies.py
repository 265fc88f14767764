"""Reading a server's answers.

Owns: how far the packet that is just arriving has been read; a time-out in the middle of it loses nothing. Must never:
be used by two threads at once (whoever leads reads), or believe the server: a number that nobody has asked with, or
more data than were asked for, end the connection.
Called by: client.py.
"""

from __future__ import annotations

import math
import socket
import struct
import threading
from collections.abc import Callable

from udf.usb import usbip
from udf.usb.table import Table
from udf.usb.urb import Transfer, spread

_TIMEVAL = struct.Struct("ll")
_FOREVER = 2**31  # milliseconds


class Replies:
    """`end` ends the connection, with a reason if it is the server's fault."""

    def __init__(
        self, sock: socket.socket, table: Table, state: threading.Lock, end: Callable[[str | None], None]
    ) -> None:
        self._sock = sock
        self._table = table
        self._state = state
        self._end = end
        self.header = bytearray(usbip.URB_SIZE)
        self._whole_header = memoryview(self.header)
        self._target = self._whole_header  # what is to be filled next, and
        self._then = self._take_header  # what is to be done then
        self.current: Transfer | None = None  # whose answer is arriving
        self._packets = bytearray()
        self._packets_follow = False
        self.patience = -1  # milliseconds that a read may block; 0: for ever

    @property
    def between(self) -> bool:
        """Whether the next byte begins a packet."""
        return self._target is self._whole_header

    def be_patient(self, milliseconds: int) -> None:
        """How long a read may block; 0: for ever.

        With the kernel's own time-out there is no poll(2) before each read, and a whole packet is one call.
        """
        if milliseconds != self.patience:
            seconds, rest = divmod(min(milliseconds, _FOREVER), 1000)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(seconds, rest * 1000))
            self.patience = milliseconds

    def advance(self, timeout: float | None, flags: int = socket.MSG_WAITALL) -> None:
        """Read what comes next, at most for so long. A time-out is no event: the caller looks at its clock."""
        if not flags & socket.MSG_DONTWAIT:
            self.be_patient(0 if timeout is None else max(1, math.ceil(timeout * 1000)))
        try:
            count = self._sock.recv_into(self._target, 0, flags)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if count:
            self.took(count)
        else:
            self._end(None)

    def took(self, count: int) -> None:
        """So many bytes of what is wanted next are there."""
        if count < self._target.nbytes:
            self._target = self._target[count:]
        else:
            self._then()

    def _next_packet(self) -> None:
        self.current = None
        self._target = self._whole_header
        self._then = self._take_header

    def _take_header(self) -> None:
        command, seqnum, _, _, _, status, actual, _, packets, _ = usbip.RET_SUBMIT.unpack(self.header)
        if command == usbip.RET_SUBMIT_CODE:
            transfer = self._table.find(seqnum)
            if transfer is None:
                self._end(f"it answered a transfer {seqnum} that nobody asked for")
            elif not 0 <= actual <= transfer.room:
                self._end(f"it says that {actual} bytes of {transfer.room} were moved")
            elif packets != len(transfer.lengths) and (packets > 0 or (transfer.lengths and actual)):
                self._end(f"it answered {packets} packets where {len(transfer.lengths)} were asked for")
            else:
                self._packets_follow = packets > 0  # what failed as a whole has none
                self.take_answer(transfer, status, actual)
        elif command == usbip.RET_UNLINK_CODE:
            if self._table.unlinked(seqnum):
                self._next_packet()
            else:
                self._end(f"it answered an unlink {seqnum} that nobody asked for")
        else:
            self._end(f"it sent a packet of the unknown kind {command:#x}")

    def take_answer(self, transfer: Transfer, status: int, actual: int) -> None:
        """A header has been read and checked; data follow, perhaps."""
        with self._state:
            if transfer.done:
                # It was given up: its caller has the buffer back, and its result stands.
                transfer = Transfer(
                    transfer._connection, transfer.is_in, memoryview(bytearray(actual)), transfer.lengths
                )
            transfer.status, transfer.actual = status, actual
            self.current = transfer
            if actual and transfer.is_in and transfer.view is not None:
                self._target = transfer.view[:actual]
                self._then = self._take_data
                return
        self._take_data()

    def _take_data(self) -> None:
        transfer = self.current
        assert transfer is not None
        if transfer.lengths and self._packets_follow:
            self._packets = bytearray(usbip.ISO_PACKET.size * len(transfer.lengths))
            self._target = memoryview(self._packets)
            self._then = self._take_packets
            return
        self._next_packet()
        self._table.finish(transfer)

    def _take_packets(self) -> None:
        transfer = self.current
        assert transfer is not None
        # Offsets and lengths are ours; only how much came and how it went is the server's to say.
        transfer.packets = [(actual, status) for _, _, actual, status in usbip.ISO_PACKET.iter_unpack(self._packets)]
        counts = [actual for actual, _ in transfer.packets]
        fits = all(actual <= length for actual, length in zip(counts, transfer.lengths, strict=True))
        if not fits or (transfer.is_in and sum(counts) != transfer.actual):
            self._end("its isochronous packets do not add up")
            return
        if transfer.is_in and transfer.view is not None and transfer.view.nbytes >= sum(transfer.lengths):
            spread(transfer.view, transfer.lengths, counts)
        self._next_packet()
        self._table.finish(transfer)
