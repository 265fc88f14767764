"""An imported device's connection: URBs come in, answers go out.

Owns: the socket, its two buffers, the table of unanswered transfers. Must never: believe a length, keep more than
a bounded amount for a client that does not read, or wait. A client that breaks the protocol loses its connection.
Called by: the loop, with what epoll says; plugged.py.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections import deque
from collections.abc import Callable, Sequence

from udf.testing.devices.engine import Engine
from udf.testing.devices.loop import ENDED, READ, WRITE, Loop
from udf.testing.devices.medium import LARGE, send
from udf.testing.devices.transfers import ECONNRESET, SETUP, Setup, Transfer
from udf.usb.usbip import (
    CMD_SUBMIT,
    CMD_UNLINK,
    DIRECTION_IN,
    ISO_PACKET,
    MAX_ISO_PACKETS,
    MAX_TRANSFER,
    RET_SUBMIT,
    RET_SUBMIT_CODE,
    SUBMIT,
    URB_SIZE,
    pack_ret_unlink,
    unpack_unlink,
)

log = logging.getLogger("udf.devices")
_BUFFER = 16 * 1024  # what a connection reads into at first; it grows to what its transfers need
_KEPT = 2 << 20  # and stays so up to this size: enough for transfers of 1 MiB
_BACKLOG = 4 * 1024 * 1024  # unsent answers with which no more is read
_TURN = 16  # reads before other devices have theirs
MAX_PENDING = 4096  # unanswered transfers of one client


class ProtocolError(Exception):
    """The client sent what no client may send."""


class Session:
    """From a granted import to the end of the connection."""

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        devid: int,
        engine: Engine,
        arrived: Callable[[Transfer], None],
        ended: Callable[[Session], None],
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()
        self._devid = devid
        self._engine = engine
        self._arrived = arrived
        self._ended = ended
        self._pending: dict[int, Transfer] = {}
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._need = URB_SIZE
        self._unsent: deque[memoryview] = deque()
        self._backlog = 0
        self._events = READ
        self._parsing = False
        self.closed = False
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, 1 << 20)  # the system's limit may make it less
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A client that is gone without a word must not keep the device for ever.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, seconds in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
                sock.setsockopt(socket.IPPROTO_TCP, option, seconds)
        loop.add(self._fd, READ, self._ready)

    def close(self) -> None:
        """End the connection: for the client, the device is gone."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove(self._fd)
        for transfer in self._pending.values():
            transfer.done = True
        self._pending.clear()
        self._unsent.clear()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
            # What was not read would turn the end into a reset, which takes answers away that were sent before.
            for _ in range(64):
                if not self._sock.recv_into(self._buffer):
                    break
        self._sock.close()
        self._ended(self)

    # --- in ---

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if events & (READ | ENDED) and not self.closed:
            try:
                self._read()
            except ProtocolError as error:
                log.info("a client of %s is cut off: %s", self._engine.device, error)
                self.close()

    def _read(self) -> None:
        for _ in range(_TURN):
            if self.closed or self._backlog > _BACKLOG:
                return
            if self._end == len(self._buffer) or self._start + self._need > len(self._buffer):
                self._make_room()
            try:
                count = self._sock.recv_into(self._view[self._end :])
            except BlockingIOError:
                return
            except OSError:
                count = 0
            if not count:
                self.close()
                return
            self._end += count
            full = self._end == len(self._buffer)
            self._parse()
            if not full and self._end - self._start < URB_SIZE:
                return  # most likely everything was read; epoll tells if not

    def _make_room(self) -> None:
        """Move what is left to the front, into a buffer that takes the next packet as a whole."""
        left = self._view[self._start : self._end]
        # A device that gets big transfers reads several of its small ones at once, too.
        size = max(min(len(self._buffer), _KEPT), min(2 * self._need, _KEPT), self._need)
        if size == len(self._buffer):
            self._buffer[: len(left)] = bytes(left)
        else:
            fresh = bytearray(size)
            fresh[: len(left)] = left
            self._buffer, self._view = fresh, memoryview(fresh)
        self._start, self._end = 0, len(left)

    def _parse(self) -> None:
        """Handle every whole packet that is there."""
        if self._parsing:
            return
        self._parsing = True
        try:
            while not self.closed and self._backlog <= _BACKLOG:
                have = self._end - self._start
                if have < self._need:
                    break
                header = bytes(self._view[self._start : self._start + URB_SIZE])
                code = int.from_bytes(header[:4], "big")
                if code == CMD_SUBMIT:
                    used = self._submit(header, have)
                elif code == CMD_UNLINK:
                    used = URB_SIZE
                    self._unlink(*unpack_unlink(header))
                else:
                    raise ProtocolError(f"{code:#x} is no command")
                if used > have:
                    self._need = used
                    break
                self._start += used
                self._need = URB_SIZE
            if self._start == self._end:
                self._start = self._end = 0
        finally:
            self._parsing = False

    def _submit(self, header: bytes, have: int) -> int:
        """Take a CMD_SUBMIT if it is here as a whole; how many bytes it has."""
        _, seqnum, devid, direction, endpoint, _flags, length, _frame, packets, _interval, raw = SUBMIT.unpack(header)
        if devid != self._devid:
            raise ProtocolError(f"this is device {self._devid:#x}, not {devid:#x}")
        if not 0 <= length <= MAX_TRANSFER:
            raise ProtocolError(f"a transfer of {length} bytes")
        if direction > 1 or endpoint > 15:
            raise ProtocolError(f"direction {direction}, endpoint {endpoint}")
        if packets > MAX_ISO_PACKETS:
            raise ProtocolError(f"{packets} isochronous packets")
        is_in = direction == DIRECTION_IN
        size: int = URB_SIZE + (0 if is_in else length)
        used: int = size + max(packets, 0) * ISO_PACKET.size
        if used > have:
            return used
        if seqnum in self._pending or len(self._pending) >= MAX_PENDING:
            raise ProtocolError(f"request {seqnum} beside {len(self._pending)} unanswered ones")
        transfer = Transfer(self, seqnum, 0x80 | endpoint if is_in else endpoint, length)
        if not is_in and length:
            transfer.out = bytes(self._view[self._start + URB_SIZE : self._start + size])
        if endpoint == 0:
            setup = Setup(*SETUP.unpack(raw))
            transfer.setup = setup
            if setup.is_in != is_in and setup.length:
                raise ProtocolError("a control transfer whose setup and direction differ")
        if packets > 0:
            transfer.packets = _packets(self._view[self._start + size : self._start + used], length)
        self._pending[seqnum] = transfer
        self._arrived(transfer)
        return used

    def _unlink(self, seqnum: int, unlinked: int) -> None:
        transfer = self._pending.pop(unlinked, None)
        if transfer is None:
            self._send(pack_ret_unlink(seqnum, 0))
            return
        self._engine.cancel(transfer)
        if transfer.got:
            # It has received packets already: like usbfs, hand over those, so that a time-out loses no data.
            self._answer(transfer, ECONNRESET, b"".join(transfer.got))
            self._send(pack_ret_unlink(seqnum, 0))
        else:
            self._send(pack_ret_unlink(seqnum, ECONNRESET))

    # --- out ---

    def reply(self, transfer: Transfer, status: int, data: bytes | memoryview) -> None:
        """Answer a transfer, once."""
        if not self.closed and self._pending.pop(transfer.seqnum, None) is not None:
            self._answer(transfer, status, data)

    def _answer(self, transfer: Transfer, status: int, data: bytes | memoryview) -> None:
        packets, errors, table = 0, 0, b""
        if transfer.packets:
            packets = len(transfer.packets)
            table, errors = _results(transfer)
        header = RET_SUBMIT.pack(
            RET_SUBMIT_CODE, transfer.seqnum, 0, 0, 0, status, transfer.actual, transfer.frame, packets, errors
        )
        if table:
            self._send(header, data, table)
        elif data:
            self._send(header, data)
        else:
            self._send(header)

    def _send(self, *parts: bytes | memoryview) -> None:
        if self.closed:
            return
        sent = 0
        if not self._unsent:
            try:
                sent = self._sock.sendmsg(parts) if sum(map(len, parts)) < LARGE else self._send_each(parts)
            except BlockingIOError:
                pass
            except OSError:
                self._loop.soon(self.close)  # not now: a handler may be at work
                return
        for part in parts:
            if sent >= len(part):
                sent -= len(part)
                continue
            left = memoryview(part)[sent:]
            sent = 0
            self._unsent.append(left)
            self._backlog += len(left)
        self._watch()

    def _send_each(self, parts: Sequence[bytes | memoryview]) -> int:
        total = 0
        for part in parts:
            try:
                sent = send(self._sock, part)
            except BlockingIOError:
                break
            total += sent
            if sent < len(part):
                break
        return total

    def _flush(self) -> None:
        while self._unsent:
            try:
                sent = send(self._sock, self._unsent[0])
            except BlockingIOError:
                break
            except OSError:
                self.close()
                return
            self._backlog -= sent
            if sent == len(self._unsent[0]):
                self._unsent.popleft()
            else:
                self._unsent[0] = self._unsent[0][sent:]
        self._watch()
        if self._backlog <= _BACKLOG:
            try:
                self._parse()
            except ProtocolError as error:
                log.info("a client of %s is cut off: %s", self._engine.device, error)
                self.close()

    def _watch(self) -> None:
        events = (READ if self._backlog <= _BACKLOG else 0) | (WRITE if self._unsent else 0)
        if events != self._events and not self.closed:
            self._events = events
            self._loop.change(self._fd, events)


def _packets(data: memoryview, length: int) -> Sequence[tuple[int, int]]:
    packets = []
    for offset, size, _actual, _status in ISO_PACKET.iter_unpack(data):
        if offset + size > length:
            raise ProtocolError("an isochronous packet outside of its transfer")
        packets.append((offset, size))
    return packets


def _results(transfer: Transfer) -> tuple[bytes, int]:
    """The isochronous descriptors of an answer, and how many packets failed."""
    rows, errors = [], 0
    for (offset, length), (actual, status) in zip(transfer.packets, transfer.results, strict=True):
        rows.append(ISO_PACKET.pack(offset, length, actual, status))
        errors += status != 0
    return b"".join(rows), errors
