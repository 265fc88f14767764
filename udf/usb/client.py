"""One USB device at the other end of a socket: transfers over USB/IP's URB phase.

Owns: the socket, who sends, and the end. Must never: believe the peer (whoever breaks the protocol has lost the
device), wait without an end that somebody can bring about, or guess that a device is gone from an error: only the end
of the connection says so.
Called by: backend.py (pyusb), transfers.py (drivers), share.py. All of it may be used by many threads at once.

There is no reading thread. A thread that waits for its transfer reads the socket itself, whatever arrives, until its
own answer is there (it *leads*, turns.py); then the next one that waits leads. So a transfer costs no change of
threads, and data go from the socket into the caller's buffer. One more thread, the keeper, sleeps in poll(2) all the
time: it sees the end of the connection when nobody waits for anything, and sends what must not block its caller.

Longer than other files: sending, waiting and ending share the two locks, and are understood together or not at all.
Locks, always in this order: `_sending` (the socket's write side, for whole packets), `_state` (everything else; never
held over a system call that can block).
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence

import usb.core

from udf.usb import usbip
from udf.usb.calls import NO_SETUP, Calls
from udf.usb.errors import Failure, usb_error
from udf.usb.replies import Replies
from udf.usb.table import Table
from udf.usb.turns import Turns
from udf.usb.urb import Buffer, Transfer, bytes_of, iso_layout

log = logging.getLogger(__name__)

UNLINK_TIMEOUT = 2.0  # seconds for the answer to an UNLINK; then the transfer is given up without one
SEND_BUFFER = 2 << 20  # bytes that the kernel is asked to hold: a large transfer should go in one call
STALL_TIMEOUT = 5.0  # a peer that takes nothing of a packet for so long has lost the device
_unpack = usbip.RET_SUBMIT.unpack
_NOW = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_WHOLE = int(socket.MSG_WAITALL)
_LEFT = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN)  # sending fails so when the peer has left


class Connection(Calls[Transfer]):
    """A device behind a connected stream socket that is past its import. The socket is this object's from here on."""

    def __init__(self, sock: socket.socket, devid: int = 0, *, name: str = "a USB device") -> None:
        sock.settimeout(None)
        if sock.family == socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._sock = sock
        self._devid = devid
        self._name = name
        self._state = threading.Lock()
        self._sending = threading.Lock()
        self._turns = Turns(self._state, self._nobody_leads)
        self._table = Table(self._state, self._turns)
        self._replies = Replies(sock, self._table, self._state, self._end)
        self._to_cancel: list[Transfer] = []
        self._closing = False
        self._closed = False
        self._on_end: list[Callable[[], None]] = []
        self._sender_waits = False
        self._baton = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # nobody leads: for a sender that waits
        self._kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # there is something for the keeper
        self._keeper = threading.Thread(target=self._keep, name="usb-keeper", daemon=True)
        self._keeper.start()

    # ---- what callers do

    @property
    def gone(self) -> bool:
        """Whether the connection has ended: every transfer fails with ENODEV."""
        return self._table.ended

    @property
    def devid(self) -> int:
        """Bus and device number as the URBs name them."""
        return self._devid

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call it once, from another thread, when the peer ends the connection; at once if it has. Not for close()."""
        with self._state:
            if not self._table.ended:
                self._on_end.append(callback)
                return
        if not self._closing:
            callback()

    def submit(
        self,
        endpoint: int,
        data_or_length: Buffer | int,
        *,
        setup: bytes = NO_SETUP,
        interval: int = 0,
        packets: Sequence[int] = (),
    ) -> Transfer:
        """See Calls.submit."""
        is_in = bool(endpoint & 0x80)
        view = bytes_of(data_or_length)
        if view.nbytes > usbip.MAX_TRANSFER:
            raise usb_error(Failure.NO_MEM)
        if len(packets) > usbip.MAX_ISO_PACKETS or sum(packets) > view.nbytes:
            raise usb_error(Failure.INVALID_PARAM)
        transfer = Transfer(self, is_in, view, packets)
        with self._sending:
            seqnum = self._table.add(transfer)
            flags = (usbip.URB_DIR_IN if is_in else 0) | (usbip.URB_ISO_ASAP if packets else 0)
            header = usbip.SUBMIT.pack(
                usbip.CMD_SUBMIT, seqnum, self._devid, is_in, endpoint & 0x0F, flags, view.nbytes, 0,
                len(packets) or usbip.NO_PACKETS, interval, setup,
            )  # fmt: skip
            parts: list[bytes | memoryview] = [header] if is_in or not view.nbytes else [header, view]
            if packets:
                parts.append(iso_layout(packets))
            try:
                self._push_slowly(self._push(parts))
            except BaseException:
                self._table.drop(transfer)
                raise
        return transfer

    def submit_all(self, requests: Sequence[tuple[int, Buffer]]) -> list[Transfer]:
        """Start several bulk transfers in this order, in one step: who queues them costs the peer one waking."""
        parts: list[bytes | memoryview] = []
        transfers: list[Transfer] = []
        with self._sending:
            try:
                for endpoint, data in requests:
                    is_in, view = bool(endpoint & 0x80), bytes_of(data)
                    if view.nbytes > usbip.MAX_TRANSFER:
                        raise usb_error(Failure.NO_MEM)
                    transfer = Transfer(self, is_in, view)
                    seqnum = self._table.add(transfer)
                    transfers.append(transfer)
                    flags = usbip.URB_DIR_IN if is_in else 0
                    header = usbip.SUBMIT.pack(
                        usbip.CMD_SUBMIT, seqnum, self._devid, is_in, endpoint & 0x0F, flags, view.nbytes, 0,
                        usbip.NO_PACKETS, 0, NO_SETUP,
                    )  # fmt: skip
                    parts += [header] if is_in or not view.nbytes else [header, view]
                self._push_slowly(self._push(parts))
            except BaseException:
                for transfer in transfers:
                    self._table.drop(transfer)
                raise
        return transfers

    def move(self, endpoint: int, data: Buffer, milliseconds: int = 0, interval: int = 0) -> int:
        """submit() and wait() of a bulk or interrupt transfer, in as few steps as there can be; 0 is no time-out.

        While nobody else waits we lead from the beginning, and nobody needs to know of the transfer. Whatever is not
        as it nearly always is makes it an ordinary transfer, from where it stands.
        """
        view = bytes_of(data)
        size = view.nbytes
        seconds = milliseconds / 1000 if milliseconds else None
        with self._state:
            # The write side is only tried: whoever has it may be waiting for the lead.
            leads = not (self._turns.leading or self._table.ended) and self._sending.acquire(False)
            if leads:
                self._turns.leading = True
                seqnum = self._table.next_seqnum()
        if not leads:
            return self.submit(endpoint, view, interval=interval).wait(seconds)
        begun = time.monotonic()
        is_in = endpoint & 0x80
        transfer = None
        try:
            if size > usbip.MAX_TRANSFER:
                raise usb_error(Failure.NO_MEM)
            header = usbip.SUBMIT.pack(
                usbip.CMD_SUBMIT, seqnum, self._devid, is_in >> 7, endpoint & 0x0F,
                usbip.URB_DIR_IN if is_in else 0, size, 0, usbip.NO_PACKETS, interval, NO_SETUP,
            )  # fmt: skip
            parts: list[bytes | memoryview] = [header] if is_in or not size else [header, view]
            rest = self._push(parts)
            if rest or not self._replies.between:
                transfer = self._make_known(view, is_in, seqnum)
                leads = False
                self._turns.resign()
                self._push_slowly(rest)
        except BaseException:
            if leads:
                self._turns.resign()
            raise
        finally:
            self._sending.release()
        if transfer is None:
            try:
                answer = self._take_own(view, is_in, seqnum, milliseconds)
            finally:
                self._turns.resign()
            if isinstance(answer, int):
                return answer
            transfer = answer
        return transfer.wait(None if seconds is None else max(0.0, begun + seconds - time.monotonic()))

    def close(self) -> None:
        """End the connection: whoever waits gets ENODEV. May be called more than once, and by anyone."""
        with self._state:
            if self._closing:
                return
            self._closing = True
        self._end()
        if threading.current_thread() is not self._keeper:
            self._keeper.join()
        # Only when nobody can be about to use its number any more may the descriptor be closed. After the end nobody
        # begins to lead, so that we get the lead when the last one who has it lets go.
        self._turns.follow(None, None)
        with self._sending, self._state:
            self._closed = True
            self._sock.close()
            os.close(self._baton)
            os.close(self._kick)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- waiting; for Transfer

    def wait_for(self, transfer: Transfer, timeout: float | None) -> bool:
        """Until it is done; False if it had to be unlinked because the time was over."""
        try:
            if self._wait(transfer, timeout):
                return True
            self.cancel(transfer)
            if not self._wait(transfer, UNLINK_TIMEOUT):
                in_the_middle = self._replies.current is transfer
                if self._table.give_up(transfer) and in_the_middle:
                    self._end("it stopped in the middle of an answer")
            return False
        except BaseException:
            self.cancel(transfer)  # an interrupt from the keyboard: nobody will ask for the answer
            raise

    def cancel(self, transfer: Transfer) -> None:
        """Have it unlinked; never blocks."""
        with self._state:
            if not (transfer.done or transfer.cancelled or self._table.ended):
                transfer.cancelled = True
                self._to_cancel.append(transfer)
                self._kick_keeper()

    def _wait(self, transfer: Transfer, timeout: float | None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._turns.follow(transfer, timeout):
            return transfer.done
        try:
            while not transfer.done:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._replies.advance(left)
            return True
        except BaseException:
            self._end()  # an interrupt: what was read may not have been accounted for
            raise
        finally:
            self._turns.resign()

    def _take_own(self, view: memoryview, is_in: int, seqnum: int, milliseconds: int) -> int | Transfer:
        """Read the answer to what was just sent; if that is not what comes, the transfer that waits for it."""
        replies, sock = self._replies, self._sock
        size = 0  # of the data that follow, once the header is ours
        count = -1  # bytes of what is being read
        try:
            if milliseconds != replies.patience:
                replies.be_patient(milliseconds)
            count = sock.recv_into(replies.header, usbip.URB_SIZE, _WHOLE)
            if count == usbip.URB_SIZE:
                command, number, _, _, _, status, actual, _, packets, _ = _unpack(replies.header)
                if number == seqnum and command == 3 and not status and packets <= 0 and 0 <= actual <= view.nbytes:
                    if not is_in or not actual:
                        return int(actual)
                    size, count = actual, -1
                    count = sock.recv_into(view, size, _WHOLE)
                    if count == size:
                        return count
        except BlockingIOError:
            pass
        except OSError:
            count = 0
        except BaseException:
            self._end()  # an interrupt: what was read may not have been accounted for
            raise
        if not count:
            self._end()
        transfer = self._make_known(view, is_in, seqnum)
        if size:
            replies.take_answer(transfer, 0, size)
        if count > 0:
            replies.took(count)
        return transfer

    def _make_known(self, view: memoryview, is_in: int, seqnum: int) -> Transfer:
        transfer = Transfer(self, bool(is_in), view)
        self._table.add(transfer, seqnum)
        return transfer

    # ---- sending; `_sending` is held

    def _push(self, parts: list[bytes | memoryview]) -> list[bytes | memoryview]:
        """As much as goes without waiting; what is left."""
        try:
            sent = self._sock.sendmsg(parts, (), _NOW) if len(parts) > 1 else self._sock.send(parts[0], _NOW)
        except BlockingIOError:
            return parts
        except OSError as exc:
            # When the peer has left the keeper sees it too, and reads the answers that came before.
            if exc.errno not in _LEFT:
                self._end(f"nothing can be sent to it: {exc.strerror}")
            raise usb_error(Failure.NO_DEVICE) from None
        for number, part in enumerate(parts):
            if sent < len(part):
                return [memoryview(part)[sent:], *parts[number + 1 :]]
            sent -= len(part)
        return []

    def _push_slowly(self, parts: list[bytes | memoryview]) -> None:
        """The peer is slow, perhaps because nobody takes its answers: whoever sends must see that someone leads."""
        if not parts:
            return
        leads = False
        poll = select.poll()
        poll.register(self._baton, select.POLLIN)
        progress = time.monotonic()
        try:
            while parts:
                with self._state:
                    leads = leads or self._turns.take_if_free()
                    self._sender_waits = not leads
                poll.register(self._sock, select.POLLOUT | (select.POLLIN if leads else 0))
                left = progress + STALL_TIMEOUT - time.monotonic()
                ready = dict(poll.poll(left * 1000)) if left > 0 else {}
                if not ready and left <= 0:
                    self._end("it takes no data any more")
                if self._table.ended:
                    raise usb_error(Failure.NO_DEVICE)
                if self._baton in ready:
                    os.eventfd_read(self._baton)
                events = ready.get(self._sock.fileno(), 0)
                if leads and events & ~select.POLLOUT:
                    self._replies.advance(None, _NOW)
                if events & ~select.POLLIN:
                    before, parts = parts, self._push(parts)
                    progress = progress if parts is before else time.monotonic()
        except BaseException:
            self._end()  # the rest of a packet that has begun cannot be left out
            raise
        finally:
            with self._state:
                self._sender_waits = False
            if leads:
                self._turns.resign()

    def _nobody_leads(self) -> None:
        # `_state` is held.
        if self._sender_waits and not self._closed:
            os.eventfd_write(self._baton, 1)

    # ---- the end, and the keeper

    def _end(self, reason: str | None = None) -> None:
        """Once: everything under way has failed, and so does what comes."""
        with self._state:
            if self._table.ended:
                return
            self._table.end()
            os.eventfd_write(self._baton, 1)
            self._kick_keeper()
        if reason:
            log.warning("the connection to %s is given up: %s", self._name, reason)
        try:
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes whoever is inside a read
        except OSError:
            pass

    def _kick_keeper(self) -> None:
        if not self._closed:
            os.eventfd_write(self._kick, 1)

    def _keep(self) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        poll.register(self._kick, select.POLLIN)
        while not self._table.ended:
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
        if self._turns.follow(None, None):
            try:
                while not self._table.ended:
                    self._replies.advance(None)
            finally:
                self._turns.resign()

    def _send_unlinks(self) -> None:
        while True:
            with self._sending:
                with self._state:
                    if not self._to_cancel:
                        return
                    transfer = self._to_cancel.pop(0)
                number = self._table.begin_unlink(transfer)
                if number is None:
                    continue
                try:
                    self._push_slowly(self._push([usbip.pack_unlink(number, self._devid, transfer.seqnum)]))
                except usb.core.USBError:
                    return
