"""One USB device at the other end of a socket: transfers over USB/IP's URB phase.

Owns: the socket, the table of transfers under way, who reads the socket. Must never: believe the peer (whoever breaks
the protocol has lost the device), wait without an end that somebody can bring about, or guess that a device is gone
from an error: only the end of the connection says so.
Called by: backend.py (pyusb), udf/driver/usb.py (drivers), share.py. All of it may be used by many threads at once.

There is no reading thread. A thread that waits for its transfer reads the socket itself, whatever arrives, until its
own answer is there (it *leads*); then the next one that waits leads. So a transfer costs no change of threads, and
data go from the socket into the caller's buffer. One more thread, the keeper, sleeps in poll(2) all the time: it sees
the end of the connection when nobody waits for anything, and sends what must not block its caller (UNLINK).

Locks, always in this order: `_sending` (the socket's write side, for whole packets), `_state` (everything else; never
held over a system call that can block).
"""

from __future__ import annotations

import array
import errno
import logging
import math
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

import usb.core

from udf.usb import usbip
from udf.usb.errors import Failure, failure_of, usb_error

log = logging.getLogger(__name__)

Buffer: TypeAlias = "bytes | bytearray | memoryview | array.array[int]"

MAX_PENDING = 1024  # transfers under way on one connection
MAX_LATE = 256  # answers that may still come for transfers that were given up
UNLINK_TIMEOUT = 2.0  # seconds for the answer to an UNLINK; then the transfer is given up without one
STALL_TIMEOUT = 5.0  # a peer that takes nothing of a packet for so long has lost the device
_TIMEVAL = struct.Struct("ll")
_SETUP_NONE = bytes(8)
_LEFT = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN)  # sending fails so when the peer has left


class _Waiter:
    """A thread that sleeps until its transfer is done or it is its turn to lead."""

    __slots__ = ("leads", "wake", "woken")

    def __init__(self) -> None:
        self.wake = threading.Lock()
        self.wake.acquire()
        self.woken = False
        self.leads = False


class Transfer:
    """One transfer under way. After wait(): `actual` bytes were moved; `data` are those that came in."""

    __slots__ = (
        "_cancelled", "_connection", "_direction_in", "_done", "_lengths", "_seqnum", "_status", "_view", "_waiters",
        "actual", "packets", "room",
    )  # fmt: skip

    def __init__(self, connection: Connection, is_in: bool, view: memoryview, lengths: Sequence[int]) -> None:
        self._connection = connection
        self._direction_in = is_in
        self._view: memoryview | None = view
        self.room = view.nbytes
        self._lengths = lengths
        self._seqnum = 0
        self._status = 0
        self._done = False
        self._cancelled = False
        self._waiters: list[_Waiter] = []
        self.actual = 0
        self.packets: list[tuple[int, int]] = []  # of an isochronous transfer: bytes and status of each packet

    @property
    def done(self) -> bool:
        """Whether there is an answer (or never will be one)."""
        return self._done

    @property
    def data(self) -> bytes:
        """What has come in."""
        return bytes(self._view[: self.actual]) if self._view is not None and self._direction_in else b""

    def wait(self, timeout: float | None = None) -> int:
        """Sleep until it is done; the number of bytes, or a USBError. None: without end.

        When the time is over the transfer is unlinked. What had come until then is returned as if nothing had
        happened, as libusb does; a time-out is only raised for nothing at all.
        """
        connection = self._connection
        timed_out = False
        try:
            if not connection._wait(self, timeout):
                timed_out = True
                self.cancel()
                if not connection._wait(self, UNLINK_TIMEOUT):
                    connection._abandon(self)
        except BaseException:
            self.cancel()  # an interrupt from the keyboard: nobody will ask for the answer
            raise
        return self._result(timed_out)

    def cancel(self) -> None:
        """Ask for the transfer's end. Never blocks, harms nothing when it is done; wait() still tells the result."""
        self._connection._cancel(self)

    def _result(self, timed_out: bool) -> int:
        status = self._status
        if self._cancelled and not self.actual and status in (-errno.ECONNRESET, -errno.ENOENT):
            if timed_out:
                raise usb_error(Failure.TIMEOUT)
            raise usb.core.USBError("Transfer was cancelled", int(Failure.IO), errno.EIO)
        failure = failure_of(status)
        if failure is not None:
            raise usb_error(failure)
        return self.actual


class Connection:
    """A device behind a connected stream socket that is past its import. The socket is this object's from here on."""

    def __init__(self, sock: socket.socket, devid: int = 0, *, name: str = "a USB device") -> None:
        sock.settimeout(None)
        self._sock = sock
        self._devid = devid
        self._name = name
        self._state = threading.Lock()
        self._sending = threading.Lock()
        self._pending: dict[int, Transfer] = {}
        self._unlinks: dict[int, Transfer] = {}  # by the UNLINK's own number
        self._late: dict[int, Transfer] = {}  # answered by RET_UNLINK or given up; the oldest are forgotten
        self._to_cancel: list[Transfer] = []
        self._last_seqnum = 0
        self._ended = False
        self._closing = False
        self._closed = False
        self._on_end: list[Callable[[], None]] = []

        self._leading = False
        self._waiters: dict[_Waiter, None] = {}
        self._sender_waits = False
        self._baton = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # nobody leads: for a sender that waits
        self._kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # there is something for the keeper

        # What the leader is reading; it survives a time-out in the middle of a packet.
        self._header = bytearray(usbip.URB_SIZE)
        self._whole_header = memoryview(self._header)
        self._target = self._whole_header
        self._current: Transfer | None = None
        self._packets = bytearray()
        self._stage: Callable[[], None] = self._take_header
        self._patience = -1

        self._keeper = threading.Thread(target=self._keep, name="usb-keeper", daemon=True)
        self._keeper.start()

    # ---- what callers do

    @property
    def gone(self) -> bool:
        """Whether the connection has ended: every transfer fails with ENODEV."""
        return self._ended

    @property
    def devid(self) -> int:
        """Bus and device number as the URBs name them."""
        return self._devid

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call it once, from another thread, when the peer ends the connection; at once if it has. Not for close()."""
        with self._state:
            if not self._ended:
                self._on_end.append(callback)
                return
        if not self._closing:
            callback()

    def submit(
        self,
        endpoint: int,
        data_or_length: Buffer | int,
        *,
        setup: bytes = _SETUP_NONE,
        interval: int = 0,
        packets: Sequence[int] = (),
    ) -> Transfer:
        """Start a transfer; `endpoint` has the direction bit, for control transfers too (0x80 or 0x00, with `setup`).

        IN takes a number of bytes or a writable buffer, which belongs to the transfer until it is done; OUT takes the
        data. `packets` are the packet lengths of an isochronous transfer. `interval` is in (micro)frames.
        """
        is_in = bool(endpoint & 0x80)
        data = bytearray(data_or_length) if isinstance(data_or_length, int) else data_or_length
        view = memoryview(data)
        if view.format != "B" or view.ndim != 1:
            view = view.cast("B")
        if view.nbytes > usbip.MAX_TRANSFER:
            raise usb_error(Failure.NO_MEM)
        if len(packets) > usbip.MAX_ISO_PACKETS or sum(packets) > view.nbytes:
            raise usb_error(Failure.INVALID_PARAM)
        transfer = Transfer(self, is_in, view, packets)
        with self._sending:
            seqnum = self._register(transfer)
            header = usbip.SUBMIT.pack(
                usbip.CMD_SUBMIT, seqnum, self._devid, 1 if is_in else 0, endpoint & 0x0F,
                (usbip.URB_DIR_IN if is_in else 0) | (usbip.URB_ISO_ASAP if packets else 0), view.nbytes, 0,
                len(packets) or usbip.NO_PACKETS, interval, setup,
            )  # fmt: skip
            try:
                if is_in and not packets:
                    self._send([header], usbip.URB_SIZE)
                elif packets:
                    layout = b"".join(_iso_layout(packets))
                    body: list[Buffer] = [header, layout] if is_in else [header, view, layout]
                    self._send(body, usbip.URB_SIZE + len(layout) + (0 if is_in else view.nbytes))
                else:
                    self._send([header, view], usbip.URB_SIZE + view.nbytes)
            except BaseException:
                with self._state:
                    self._pending.pop(seqnum, None)
                raise
        return transfer

    def transfer(
        self,
        endpoint: int,
        data_or_length: Buffer | int,
        *,
        setup: bytes = _SETUP_NONE,
        timeout: float | None = None,
        interval: int = 0,
        packets: Sequence[int] = (),
    ) -> Transfer:
        """Submit and wait: a transfer that is done without an error."""
        transfer = self.submit(endpoint, data_or_length, setup=setup, interval=interval, packets=packets)
        transfer.wait(timeout)
        return transfer

    def control(
        self,
        request_type: int,
        request: int,
        value: int = 0,
        index: int = 0,
        data_or_length: Buffer | int = 0,
        timeout: float | None = None,
    ) -> Transfer:
        """A control transfer on endpoint 0, to its end."""
        length = data_or_length if isinstance(data_or_length, int) else memoryview(data_or_length).nbytes
        try:
            setup = struct.pack("<BBHHH", request_type, request, value, index, length)
        except struct.error:
            raise usb_error(Failure.INVALID_PARAM) from None
        # Without a data stage there is only a status stage, and that is no transfer toward the host.
        endpoint = 0x80 if request_type & 0x80 and length else 0x00
        return self.transfer(endpoint, data_or_length, setup=setup, timeout=timeout)

    def close(self) -> None:
        """End the connection: whoever waits gets ENODEV. May be called more than once, and by anyone."""
        with self._state:
            if self._closing:
                return
            self._closing = True
        self._end()
        if threading.current_thread() is not self._keeper:
            self._keeper.join()
        # Only when nobody can be about to use its number any more may the descriptor be closed.
        self._lead_when_free()
        with self._sending, self._state:
            self._closed = True
            self._sock.close()
            os.close(self._baton)
            os.close(self._kick)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the table

    def _next_seqnum(self) -> int:
        # 32 bits, never 0. A number whose answer may still come is not used again.
        while True:
            self._last_seqnum = self._last_seqnum % 0xFFFFFFFF + 1
            if self._last_seqnum not in self._pending and self._last_seqnum not in self._late:
                return self._last_seqnum

    def _register(self, transfer: Transfer) -> int:
        with self._state:
            if self._ended:
                raise usb_error(Failure.NO_DEVICE)
            if len(self._pending) >= MAX_PENDING:
                raise usb_error(Failure.NO_MEM)
            seqnum = transfer._seqnum = self._next_seqnum()
            self._pending[seqnum] = transfer
            return seqnum

    def _finish(self, transfer: Transfer) -> None:
        """There is an answer: by the leader, `_state` is not held."""
        with self._state:
            self._pending.pop(transfer._seqnum, None)
            self._complete(transfer)

    def _complete(self, transfer: Transfer) -> None:
        transfer._done = True
        if transfer._waiters:
            for waiter in transfer._waiters:
                if not waiter.woken:
                    self._wake(waiter, leads=False)
            transfer._waiters = []

    def _wake(self, waiter: _Waiter, *, leads: bool) -> None:
        self._waiters.pop(waiter, None)
        waiter.woken = True
        waiter.leads = leads
        waiter.wake.release()

    def _remember(self, transfer: Transfer) -> None:
        """Its answer may still come, however sloppy the server: it is read and dropped, up to a bound."""
        self._late[transfer._seqnum] = transfer
        if len(self._late) > MAX_LATE:
            del self._late[next(iter(self._late))]

    def _abandon(self, transfer: Transfer) -> None:
        """Not even the UNLINK was answered. The caller's buffer must be its own again."""
        with self._state:
            if transfer._done:
                return
            in_the_middle = self._current is transfer
            self._pending.pop(transfer._seqnum, None)
            self._unlinks = {number: each for number, each in self._unlinks.items() if each is not transfer}
            transfer._view, transfer._status, transfer.actual = None, -errno.ECONNRESET, 0
            self._remember(transfer)
            self._complete(transfer)
        if in_the_middle:
            self._end("it stopped in the middle of an answer")

    def _cancel(self, transfer: Transfer) -> None:
        with self._state:
            if transfer._done or transfer._cancelled or self._ended:
                return
            transfer._cancelled = True
            self._to_cancel.append(transfer)
            self._kick_keeper()

    def _kick_keeper(self) -> None:
        if not self._closed:
            os.eventfd_write(self._kick, 1)

    # ---- waiting and leading

    def _wait(self, transfer: Transfer, timeout: float | None) -> bool:
        """Until it is done; False when the time is over."""
        with self._state:
            if transfer._done:
                return True
            leads = not self._leading
            if leads:
                self._leading = True
        deadline = None if timeout is None else time.monotonic() + timeout
        if not leads and not self._follow(transfer, timeout):
            return transfer._done
        # From here on we lead.
        left = timeout
        try:
            while True:
                if left is not None and left <= 0:
                    return False
                self._advance(left)
                if transfer._done:
                    return True
                if deadline is not None:
                    left = deadline - time.monotonic()
        finally:
            self._resign()

    def _follow(self, transfer: Transfer | None, timeout: float | None) -> bool:
        """Sleep until the transfer is done, the connection has ended or the time is over (False), or we lead (True)."""
        waiter = _Waiter()
        with self._state:
            if transfer is not None and transfer._done:
                return False
            if not self._leading:
                self._leading = True
                return True
            self._waiters[waiter] = None
            if transfer is not None:
                transfer._waiters.append(waiter)
        try:
            waiter.wake.acquire(timeout=-1 if timeout is None else min(max(timeout, 0), threading.TIMEOUT_MAX))
        except BaseException:
            with self._state:
                self._waiters.pop(waiter, None)
                leads, waiter.woken = waiter.leads, True
            if leads:
                self._resign()
            raise
        with self._state:
            if waiter.woken:
                return waiter.leads
            self._waiters.pop(waiter, None)
            waiter.woken = True  # nobody is to wake it any more
            return False

    def _lead_when_free(self) -> None:
        """Lead, however long that takes, unless the connection ends first (then nobody else begins to lead)."""
        while not self._follow(None, None):
            with self._state:
                if not self._leading:
                    return

    def _resign(self) -> None:
        with self._state:
            if self._waiters:
                self._wake(next(iter(self._waiters)), leads=True)
                return
            self._leading = False
            if self._sender_waits and not self._closed:
                os.eventfd_write(self._baton, 1)

    # ---- reading; only the leader does

    def _advance(self, timeout: float | None, flags: int = socket.MSG_WAITALL) -> None:
        """Read what comes next, at most for so long. A time-out is no event: the caller looks at its clock."""
        patience = 0 if timeout is None else max(1, math.ceil(timeout * 1000))
        if patience != self._patience:
            # A blocking read with the kernel's own time-out: no poll(2) before each, and whole packets in one call.
            seconds, milliseconds = divmod(min(patience, 2**31), 1000)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(seconds, milliseconds * 1000))
            self._patience = patience
        try:
            count = self._sock.recv_into(self._target, 0, flags)
        except BlockingIOError:
            return
        except OSError:
            self._end()
            return
        if not count:
            self._end()
        elif count < self._target.nbytes:
            self._target = self._target[count:]
        else:
            self._stage()

    def _next_packet(self) -> None:
        self._current = None
        self._target = self._whole_header
        self._stage = self._take_header

    def _take_header(self) -> None:
        command, seqnum, _, _, _, status, actual, _, packets, _ = usbip.RET_SUBMIT.unpack(self._header)
        if command == usbip.RET_SUBMIT_CODE:
            transfer = self._pending.get(seqnum) or self._late.pop(seqnum, None)
            if transfer is None:
                self._end(f"it answered a transfer {seqnum} that nobody asked for")
            elif not 0 <= actual <= transfer.room:
                self._end(f"it says that {actual} bytes of {transfer.room} were moved")
            elif packets != len(transfer._lengths) and (transfer._lengths or packets > 0):
                self._end(f"it answered {packets} packets where {len(transfer._lengths)} were asked for")
            else:
                self._take_answer(transfer, status, actual)
        elif command == usbip.RET_UNLINK_CODE:
            self._take_unlinked(seqnum)
            self._next_packet()
        else:
            self._end(f"it sent a packet of the unknown kind {command:#x}")

    def _take_answer(self, transfer: Transfer, status: int, actual: int) -> None:
        with self._state:
            if transfer._done:
                # It was given up: its caller has the buffer back, and its result stands.
                transfer = Transfer(self, transfer._direction_in, memoryview(bytearray(actual)), transfer._lengths)
            transfer._status, transfer.actual = status, actual
            self._current = transfer
            if actual and transfer._direction_in and transfer._view is not None:
                self._target = transfer._view[:actual]
                self._stage = self._take_data
                return
        self._take_data()

    def _take_data(self) -> None:
        transfer = self._current
        assert transfer is not None
        if transfer._lengths:
            self._packets = bytearray(usbip.ISO_PACKET.size * len(transfer._lengths))
            self._target = memoryview(self._packets)
            self._stage = self._take_packets
            return
        self._next_packet()
        self._finish(transfer)

    def _take_packets(self) -> None:
        transfer = self._current
        assert transfer is not None
        # Offsets and lengths are ours; only how much came and how it went is the server's to say.
        transfer.packets = [(actual, status) for _, _, actual, status in usbip.ISO_PACKET.iter_unpack(self._packets)]
        fits = all(actual <= length for (actual, _), length in zip(transfer.packets, transfer._lengths, strict=True))
        if not fits or (transfer._direction_in and sum(actual for actual, _ in transfer.packets) != transfer.actual):
            self._end("its isochronous packets do not add up")
            return
        if transfer._direction_in and transfer._view is not None:
            _spread(transfer._view, transfer._lengths, [actual for actual, _ in transfer.packets])
        self._next_packet()
        self._finish(transfer)

    def _take_unlinked(self, number: int) -> None:
        with self._state:
            transfer = self._unlinks.pop(number, None)
            if transfer is None:
                known = number <= self._last_seqnum
            elif not transfer._done:
                # Its answer would have come before this one, had it been on its way.
                self._pending.pop(transfer._seqnum, None)
                transfer._status, transfer.actual = -errno.ECONNRESET, 0
                transfer._view = None
                self._remember(transfer)
                self._complete(transfer)
        if transfer is None and not known:
            self._end(f"it answered an unlink {number} that nobody asked for")

    # ---- sending; with `_sending` held

    def _send(self, parts: list[Buffer], total: int) -> None:
        try:
            sent = self._sock.sendmsg(parts, (), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            self._cannot_send(exc)
        if sent < total:
            self._send_rest(memoryview(b"".join(parts))[sent:])

    def _cannot_send(self, exc: OSError) -> None:
        # When the peer has left the keeper sees it too, and reads the answers that came before; nothing is lost here.
        if exc.errno not in _LEFT:
            self._end(f"nothing can be sent to it: {exc.strerror}")
        raise usb_error(Failure.NO_DEVICE) from None

    def _send_rest(self, rest: memoryview) -> None:
        """The peer is slow, perhaps because nobody takes its answers: whoever sends must see that someone leads."""
        leads = False
        poll = select.poll()
        poll.register(self._baton, select.POLLIN)
        progress = time.monotonic()
        try:
            while rest:
                with self._state:
                    if not leads and not self._leading:
                        self._leading = leads = True
                    self._sender_waits = not leads
                poll.register(self._sock, select.POLLOUT | (select.POLLIN if leads else 0))
                left = progress + STALL_TIMEOUT - time.monotonic()
                ready = dict(poll.poll(left * 1000)) if left > 0 else {}
                if self._ended:
                    raise usb_error(Failure.NO_DEVICE)
                if not ready and left <= 0:
                    self._end("it takes no data any more")
                if self._baton in ready:
                    os.eventfd_read(self._baton)
                events = ready.get(self._sock.fileno(), 0)
                if leads and events & ~select.POLLOUT:
                    self._advance(None, socket.MSG_DONTWAIT)
                if events & ~select.POLLIN:
                    try:
                        rest = rest[self._sock.send(rest, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
                        progress = time.monotonic()
                    except BlockingIOError:
                        pass
                    except OSError as exc:
                        self._cannot_send(exc)
        except BaseException:
            # The rest of a packet that has begun cannot be left out.
            self._end()
            raise
        finally:
            with self._state:
                self._sender_waits = False
            if leads:
                self._resign()

    # ---- the end, and the keeper

    def _end(self, reason: str | None = None) -> None:
        """Once: everything under way has failed, and so does what comes."""
        with self._state:
            if self._ended:
                return
            self._ended = True
            for transfer in self._pending.values():
                transfer._status, transfer.actual, transfer._view = -errno.ENODEV, 0, None
                self._complete(transfer)
            self._pending.clear()
            self._unlinks.clear()
            self._late.clear()
            for waiter in list(self._waiters):
                self._wake(waiter, leads=False)
            os.eventfd_write(self._baton, 1)
            self._kick_keeper()
        if reason:
            log.warning("the connection to %s is given up: %s", self._name, reason)
        try:
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes whoever is inside a read
        except OSError:
            pass

    def _keep(self) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        poll.register(self._kick, select.POLLIN)
        while not self._ended:
            ready = dict(poll.poll())
            if self._kick in ready:
                os.eventfd_read(self._kick)
                self._send_unlinks()
            if self._sock.fileno() in ready:
                self._drain()
        for callback in [] if self._closing else self._on_end:
            try:
                callback()
            except Exception:
                log.exception("what was to be told of the end of %s failed", self._name)

    def _drain(self) -> None:
        """The peer has hung up: what it said before still counts."""
        if self._follow(None, None):
            try:
                while not self._ended:
                    self._advance(None)
            finally:
                self._resign()

    def _send_unlinks(self) -> None:
        while True:
            with self._sending:
                with self._state:
                    if self._ended or not self._to_cancel:
                        return
                    transfer = self._to_cancel.pop(0)
                    if transfer._done:
                        continue
                    number = self._next_seqnum()
                    self._unlinks[number] = transfer
                try:
                    packet = usbip.pack_unlink(number, self._devid, transfer._seqnum)
                    self._send([packet], usbip.URB_SIZE)
                except usb.core.USBError:
                    return


def _iso_layout(packets: Sequence[int]) -> list[bytes]:
    layout, offset = [], 0
    for length in packets:
        layout.append(usbip.ISO_PACKET.pack(offset, length, 0, 0))
        offset += length
    return layout


def _spread(view: memoryview, lengths: Sequence[int], actual: Sequence[int]) -> None:
    """Isochronous data come without gaps; put each packet where it belongs, the last first."""
    source, offset = sum(actual), sum(lengths)
    for length, count in zip(reversed(lengths), reversed(actual), strict=True):
        offset -= length
        source -= count
        if count and source != offset:
            view[offset : offset + count] = bytes(view[source : source + count])
