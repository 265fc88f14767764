"""One connected stream socket, for messages that are taken and given in pieces.

Owns: the bytes that were received and not used yet, and those that were to be sent and are not yet. Both survive a
cancellation: whoever comes next goes on where the last one stopped, so no message is ever cut short.
Must never: know what the bytes mean, or hold more than one message of each task that waits to send.
Called by: server.py and client.py. One task receives at a time; many may send.

The sockets are asked first and waited for after, without a pass through the scheduler for each message.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Awaitable, Callable

import trio
from trio.lowlevel import ParkingLot

from udf.block.landing import Descriptors

BUFFER = 64 * 1024  # bytes asked for at once while it is not known what comes
SOCKET_BUFFER = 4 * 1024 * 1024  # what the kernel is asked to hold; it gives what it may
_MAX_PIECES = 256  # buffers in one sendmsg, far below IOV_MAX

Buffer = bytes | bytearray | memoryview


class Ended(Exception):
    """The other side has closed the connection, or it is broken."""


class Stream:
    """A stream socket, not blocking; closed by `close`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family == socket.AF_UNIX:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.broken: Exception | None = None
        self._buffer = memoryview(bytearray(BUFFER))
        self._begin = 0
        self._end = 0
        self._unsent: deque[memoryview] = deque()
        self._accepted = 0  # bytes that were ever given to send, and that ever went out
        self._sent = 0
        self._sending = False
        self._lot = ParkingLot()
        self.descriptors: Descriptors | None = None  # that have come; None: none are taken

    @property
    def is_local(self) -> bool:
        """Whether descriptors can travel."""
        return self.sock.family == socket.AF_UNIX

    def close(self) -> None:
        """Close the socket; who waits on it fails with Ended."""
        self._break(Ended("closed"))
        self.drop_descriptors()
        if self.sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self.sock)
            self.sock.close()

    def _break(self, why: Exception) -> None:
        if self.broken is None:
            self.broken = why
        self._unsent.clear()
        self._lot.unpark_all()

    # ---- receiving

    @property
    def ready(self) -> int:
        """How many bytes are here already."""
        return self._end - self._begin

    async def need(self, size: int) -> None:
        """Wait until `size` bytes (at most BUFFER) are here; they stay here."""
        if self._begin and BUFFER - self._begin < size:
            rest = self._end - self._begin
            self._buffer[:rest] = bytes(self._buffer[self._begin : self._end])
            self._begin, self._end = 0, rest
        while self._end - self._begin < size:
            self._end += await self._receive(self._buffer[self._end :])

    def peek(self, size: int) -> memoryview:
        """Look at `size` of the bytes that are here, without using them."""
        return self._buffer[self._begin : self._begin + size]

    def take(self, size: int) -> memoryview:
        """Use `size` of the bytes that are here. Valid until the next `need`."""
        begin = self._begin
        end = begin + size
        if end == self._end:
            self._begin = self._end = 0
        else:
            self._begin = end
        return self._buffer[begin:end]

    async def exactly(self, size: int) -> bytes:
        """The next `size` bytes. Not to be cancelled unless the connection ends with it."""
        if size <= BUFFER:
            await self.need(size)
            return bytes(self.take(size))
        data = bytearray(size)
        await self.fill(memoryview(data))
        return bytes(data)

    async def fill(self, target: memoryview) -> None:
        """The next bytes, as many as go into `target`. Not to be cancelled unless the connection ends with it."""
        filled = 0
        while filled < len(target):
            filled += await self.some(target[filled:])

    async def some(self, target: memoryview) -> int:
        """At least one of the next bytes and at most as many as go into `target`: how many. May be cancelled."""
        ready = self._end - self._begin
        if ready:
            count = min(ready, len(target))
            target[:count] = self.take(count)
            return count
        return await self._receive(target)

    async def skip(self, size: int) -> None:
        """Drop the next `size` bytes."""
        while size:
            await self.need(1)
            count = min(size, self._end - self._begin)
            self.take(count)
            size -= count

    async def _receive(self, target: memoryview) -> int:
        while True:
            if self.broken is not None:
                raise Ended(str(self.broken))
            try:
                descriptors = self.descriptors
                count = self.sock.recv_into(target) if descriptors is None else descriptors.receive(self.sock, target)
            except BlockingIOError:
                await self._wait(trio.lowlevel.wait_readable)
                continue
            except OSError as exc:
                self._break(exc)
                raise Ended(str(exc)) from exc
            if not count:
                self._break(Ended("the other side has closed the connection"))
                raise Ended("the other side has closed the connection")
            return count

    def drop_descriptors(self) -> None:
        """Take no descriptors any more, and close those that have come."""
        if self.descriptors is not None:
            self.descriptors.drop()
            self.descriptors = None

    # ---- sending

    def send_with(self, fd: int, message: bytes) -> bytes:
        """Have a descriptor travel with the beginning of a message, if it goes at once; what is left of that."""
        if self._unsent or self.broken is not None:
            return message
        try:
            return message[socket.send_fds(self.sock, [message], [fd]) :]
        except OSError:
            return message  # what is wrong shows when it is sent

    async def send(self, *pieces: Buffer) -> None:
        """Send the pieces, one behind the other, and return when the kernel has them all.

        Cancelled, it leaves what is left to the next one who sends: the pieces must not change any more.
        """
        if self.broken is not None:
            raise Ended(str(self.broken))
        if not self._unsent:
            try:
                count = self.sock.sendmsg(pieces)
            except BlockingIOError:
                count = 0
            except OSError as exc:
                self._break(exc)
                raise Ended(str(exc)) from exc
            total = sum(map(len, pieces))
            self._accepted += total
            self._sent += count
            if count == total:
                return
            self._queue(pieces, count)
        else:
            self._accepted += sum(map(len, pieces))
            self._queue(pieces, 0)
        await self._drain(self._accepted)

    def send_soon(self, message: bytes) -> bool:
        """Send a short message, or what of it goes; False: `flush` is needed for the rest."""
        if self.broken is not None:
            return True
        count = 0
        if not self._unsent:
            try:
                count = self.sock.send(message)
            except BlockingIOError:
                pass
            except OSError as exc:
                self._break(exc)
                return True
        self._accepted += len(message)
        self._sent += count
        if count < len(message):
            self._queue((message,), count)
        return not self._unsent

    async def flush(self) -> None:
        """Return when all that was given before has gone out. Raises Ended."""
        await self._drain(self._accepted)

    def _queue(self, pieces: tuple[Buffer, ...], skip: int) -> None:
        for piece in pieces:
            if skip >= len(piece):
                skip -= len(piece)
                continue
            self._unsent.append(memoryview(piece)[skip:])
            skip = 0

    async def _drain(self, goal: int) -> None:
        """Until all that was given before `goal` has gone out: by our own hand, or by that of another task."""
        while self._sent < goal:
            if self.broken is not None:
                raise Ended(str(self.broken))
            if self._sending:
                await self._lot.park()
                continue
            self._sending = True
            try:
                while self._sent < goal and self.broken is None:
                    await self._send_some()
            finally:
                self._sending = False
                self._lot.unpark_all()

    async def _send_some(self) -> None:
        unsent = self._unsent
        pieces = list(unsent) if len(unsent) <= _MAX_PIECES else [unsent[i] for i in range(_MAX_PIECES)]
        try:
            count = self.sock.sendmsg(pieces)
        except BlockingIOError:
            await self._wait(trio.lowlevel.wait_writable)
            return
        except OSError as exc:
            self._break(exc)
            return
        self._sent += count
        while count:
            first = unsent[0]
            if count < len(first):
                unsent[0] = first[count:]
                return
            count -= len(first)
            unsent.popleft()

    async def _wait(self, wait: Callable[[socket.socket], Awaitable[None]]) -> None:
        try:
            await wait(self.sock)
        except (trio.ClosedResourceError, OSError, ValueError):  # closed meanwhile, or before
            self._break(Ended("closed"))
