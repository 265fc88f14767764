"""BlockClient: one connection to an export of any NBD server.

Owns: the connection, the requests under way on it, and the table from NBD errors to exceptions. Must never: believe a
reply's length, offset or cookie, or start a task of its own: one of the tasks that wait for replies reads them for all.
Called by: the block shim, filesystem drivers (as `udf.BlockClient`), tests.

Any task may call any verb at any time, and may be cancelled; what the server still says to a request that was given up
is dropped. Errors are OSError with the server's errno; DeviceGone when the server says that it shuts down (which is how
an unplugged device shows) or when the connection has ended.

A little over 400 lines: a request, its verb and the replies that end it are read beside each other.
"""

from __future__ import annotations

import errno
import math
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import trio
from trio.lowlevel import Abort, current_task, reschedule, wait_task_rescheduled

from udf.block import wire
from udf.block.greeting import Greeting, Offer
from udf.block.stream import Buffer, Ended, Stream
from udf.block.uri import connect, parse
from udf.driver.block import Extent
from udf.driver.window import Window
from udf.errors import DeviceGone

MAX_SMALL = 32 * 1024  # bytes of a reply that has neither data nor extents
LANDS = 64 * 1024  # bytes from which on it is worth while not to have them sent
MAX_STATUS = 8 * 1024 * 1024  # bytes of a block status: 2^20 extents, as the protocol says


class _Request:
    """One request that was sent, until its last reply has come."""

    __slots__ = ("command", "cookie", "done", "error", "extents", "filled", "lands", "offset", "size", "target", "task")

    def __init__(self, cookie: int, command: int, offset: int, size: int, target: memoryview | None) -> None:
        self.cookie = cookie
        self.command = command
        self.offset = offset
        self.size = size
        self.target = target
        self.filled = 0  # bytes of the target that have come
        self.lands = False  # the server puts it there, and says when it has
        self.extents: list[tuple[int, int]] = []
        self.error: Exception | None = None
        self.done = False
        self.task: trio.lowlevel.Task | None = None  # sleeps until the request is done, or it is to read replies


class _Payload(NamedTuple):
    """What is being received for a request: it goes on where it stopped, whoever reads on."""

    request: _Request
    target: memoryview
    last: bool


class BlockClient:
    """An export, by byte ranges. Made by `open` or `on`; use it as an async context manager, or `aclose` it."""

    def __init__(self, stream: Stream, offer: Offer, timeout: float | None, window: Window | None = None) -> None:
        self._stream = stream
        self._window = window if offer.window else None
        self._timeout = timeout
        self._structured = offer.structured
        self._context = offer.context
        self._requests: dict[int, _Request] = {}
        self._cookie = 0
        self._reading = False
        self._payload: _Payload | None = None
        self._filled = 0  # bytes of its target that have come
        self._failure: str | None = None
        self.size: int = offer.size
        self.flags: int = offer.flags
        self.sizes: wire.BlockSizes = offer.sizes
        self.claimed: bool = offer.claimed
        self.watching: bool = offer.watching

    @classmethod
    async def open(
        cls,
        uri: str,
        export: str | None = None,
        *,
        claim: bool = False,
        watch: bool = False,
        window: Window | None = None,
        timeout: float | None = None,
    ) -> BlockClient:
        """Connect by a URI: nbd+unix:///EXPORT?socket=PATH or nbd://HOST[:PORT]/EXPORT. See `on`."""
        place = parse(uri)
        sock = await connect(place)
        name = place.export if export is None else export
        return await cls.on(sock, name, claim=claim, watch=watch, window=window, timeout=timeout)

    @classmethod
    async def on(
        cls,
        sock: socket.socket,
        export: str = "",
        *,
        claim: bool = False,
        watch: bool = False,
        window: Window | None = None,
        timeout: float | None = None,
    ) -> BlockClient:
        """Use a connected socket, which is ours from here on.

        `claim`: be the export's only writer. PermissionError if somebody else is; a server that does not know claims
        lets everybody write (`claimed` says which). `watch`: what is read and written with that word must be the same
        when the device comes back after it was pulled out, else it stays away; other servers than our own know nothing
        of that (`watching` says which). `window`: what is read to a place in it is put there by our own servers, not
        sent. `timeout`: seconds for each call from here on, else TimeoutError.
        """
        stream = Stream(sock)
        try:
            with _bounded(timeout):
                fd = -1 if window is None else window.fd
                offer = await Greeting(stream).choose(export, claim=claim, watch=watch, window=fd)
        except BaseException as exc:
            stream.close()
            if isinstance(exc, Ended | wire.WireError):
                raise DeviceGone(f"no block device: {exc}") from exc
            raise
        return cls(stream, offer, timeout, window)

    @staticmethod
    async def exports(uri: str, *, timeout: float | None = None) -> dict[str, Offer]:
        """What a server exports, by name: each with its size, flags and block sizes. "" is the default one."""
        stream = Stream(await connect(parse(uri)))
        try:
            with _bounded(timeout):
                return await Greeting(stream).exports()
        except (Ended, wire.WireError) as exc:
            raise DeviceGone(f"no block device: {exc}") from exc
        finally:
            stream.close()

    async def __aenter__(self) -> BlockClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self, wait: float = 0) -> None:
        """End the connection; requests that wait fail with DeviceGone.

        `wait`: seconds to wait until the server is done with it too. Our own has given up the claim by then.
        """
        try:
            # To say goodbye is a courtesy, unless somebody waits for what comes of it.
            with trio.move_on_after(wait):
                await self._stream.send(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.CMD_DISC, 0, 0, 0))
                while not self._reading:
                    await self._stream.skip(1)
        except Ended:
            pass
        finally:
            self._fail("the connection is closed")

    # ---- what the export is

    @property
    def ended(self) -> bool:
        """The connection has ended, as far as is known: only a new one is of use."""
        return self._failure is not None

    @property
    def read_only(self) -> bool:
        """Nothing can be changed."""
        return bool(self.flags & wire.READ_ONLY)

    @property
    def can_trim(self) -> bool:
        """`trim` is of use."""
        return bool(self.flags & wire.SEND_TRIM)

    @property
    def can_zero(self) -> bool:
        """`zero` is of use."""
        return bool(self.flags & wire.SEND_WRITE_ZEROES)

    @property
    def block_size(self) -> int:
        """What the server prefers requests to be a multiple of: of our servers, the device's block size."""
        return self.sizes.preferred

    @property
    def maximum(self) -> int:
        """The most bytes that one request may carry."""
        return min(self.sizes.maximum, wire.MAX_PAYLOAD)

    # ---- verbs

    async def read(self, offset: int, size: int, *, watch: bool = False) -> bytearray:
        """Exactly `size` bytes, at most `maximum`. `watch`: it is metadata."""
        data = bytearray(size)
        await self.read_into(offset, memoryview(data), watch=watch)
        return data

    async def read_into(self, offset: int, target: memoryview, *, watch: bool = False) -> None:
        """The same into a buffer, which is the client's for ever if this is cancelled."""
        if target:
            flags = wire.FLAG_WATCH if watch and self.watching else 0
            place = None
            if self._window is not None and len(target) >= LANDS and not flags:
                place = self._window.span(target)
            if place is not None:
                flags |= wire.FLAG_WINDOW
            await self._ask(wire.CMD_READ, flags, offset, len(target), target=target, place=place)

    async def write(self, offset: int, data: Buffer, *, fua: bool = False, watch: bool = False) -> None:
        """Write at most `maximum` bytes, which must not change any more.

        `fua`: and return when they are durable. `watch`: it is metadata.
        """
        if len(data):
            flags = (wire.CMD_FLAG_FUA if fua else 0) | (wire.FLAG_WATCH if watch and self.watching else 0)
            await self._ask(wire.CMD_WRITE, flags, offset, len(data), data)

    async def flush(self) -> None:
        """Until every write that had returned before is durable."""
        if self.flags & wire.SEND_FLUSH:
            await self._ask(wire.CMD_FLUSH, 0, 0, 0)

    async def trim(self, offset: int, size: int) -> None:
        """What is there is of no use any more."""
        self._need(wire.SEND_TRIM, "trim")
        await self._in_pieces(wire.CMD_TRIM, 0, offset, size)

    async def zero(self, offset: int, size: int, *, hole: bool = True, fast: bool = False) -> None:
        """Write zeros; `hole`: space may be given up; `fast`: EOPNOTSUPP unless that is faster than writing them."""
        self._need(wire.SEND_WRITE_ZEROES, "zero")
        if fast:
            self._need(wire.SEND_FAST_ZERO, "fast zero")
        flags = (0 if hole else wire.CMD_FLAG_NO_HOLE) | (wire.CMD_FLAG_FAST_ZERO if fast else 0)
        await self._in_pieces(wire.CMD_WRITE_ZEROES, flags, offset, size)

    async def extents(self, offset: int, size: int) -> list[Extent]:
        """What is stored from `offset` on; perhaps for less than `size` bytes, perhaps for more."""
        if self._context is None or not size:
            return [Extent(size)] if size else []
        request = await self._ask(wire.CMD_BLOCK_STATUS, 0, offset, min(size, 0xFFFFFFFF & -4096))
        return [
            Extent(length, bool(status & wire.STATE_HOLE), bool(status & wire.STATE_ZERO))
            for length, status in request.extents
        ]

    def _need(self, flag: int, what: str) -> None:
        if not self.flags & flag:
            raise OSError(errno.EOPNOTSUPP, f"the server has no {what}")

    async def _in_pieces(self, command: int, flags: int, offset: int, size: int) -> None:
        while size > 0:
            piece = min(size, 1 << 30)
            await self._ask(command, flags, offset, piece)
            offset, size = offset + piece, size - piece

    # ---- requests

    async def _ask(
        self, command: int, flags: int, offset: int, size: int, data: Buffer | None = None,
        target: memoryview | None = None, place: tuple[int, int] | None = None,
    ) -> _Request:  # fmt: skip
        if self._failure is not None:
            raise DeviceGone(self._failure)
        if not 0 <= offset <= wire.MAX_SIZE or not 0 <= size <= 0xFFFFFFFF:
            raise OSError(errno.EINVAL, "no such range")
        if command <= wire.CMD_WRITE and size > self.maximum:
            raise OSError(errno.EINVAL, f"{size} bytes at once are more than {self.maximum}")
        self._cookie += 1
        cookie = self._cookie
        request = self._requests[cookie] = _Request(cookie, command, offset, size, target)
        head = wire.REQUEST.pack(wire.REQUEST_MAGIC, flags, command, cookie, offset, size)
        if place is not None:
            request.lands = True
            head += wire.OFFSET.pack(place[0])
        if self._timeout is None:
            await self._exchange(request, head, data)
        else:
            with _bounded(self._timeout):
                await self._exchange(request, head, data)
        if request.error is not None:
            raise request.error
        return request

    async def _exchange(self, request: _Request, head: bytes, data: Buffer | None) -> None:
        try:
            if data is None:
                await self._stream.send(head)
            else:
                await self._stream.send(head, data)
            while not request.done:
                if not self._reading:
                    await self._read_replies(request)
                else:
                    await self._sleep(request)
        except Ended as exc:
            self._fail(f"the connection to the block device ended: {exc}")
            raise DeviceGone(self._failure) from None
        except wire.WireError as exc:
            self._fail(f"the block device's server breaks the protocol: {exc}")
            raise DeviceGone(self._failure) from None

    async def _sleep(self, request: _Request) -> None:
        def abort(_: Callable[[], object]) -> Abort:
            request.task = None
            return Abort.SUCCEEDED

        request.task = current_task()
        await wait_task_rescheduled(abort)

    def _wake(self, request: _Request) -> None:
        task, request.task = request.task, None
        if task is not None:
            reschedule(task)

    async def _read_replies(self, own: _Request) -> None:
        """Receive for all, until our own request is done; then somebody else who waits does it."""
        self._reading = True
        try:
            while not own.done:
                await self._reply()
        finally:
            self._reading = False
            if self._failure is None:
                for request in self._requests.values():
                    if request.task is not None:
                        self._wake(request)
                        break

    def _fail(self, why: str) -> None:
        if self._failure is not None:
            return
        self._failure = why
        requests, self._requests = self._requests, {}
        for request in requests.values():
            if not request.done:
                request.error = DeviceGone(why)
                self._finish(request)
        self._stream.close()

    def _finish(self, request: _Request) -> None:
        self._requests.pop(request.cookie, None)
        request.done = True
        self._wake(request)

    # ---- replies. Each step may be cancelled before it takes anything, and never in the middle.

    async def _reply(self) -> None:
        if self._payload is not None:
            await self._receive(self._payload)
            return
        stream = self._stream
        if stream.ready < 16:
            await stream.need(16)
        magic = int.from_bytes(stream.peek(4), "big")
        if magic == wire.SIMPLE_REPLY_MAGIC:
            _, error, cookie = wire.SIMPLE_REPLY.unpack(stream.take(16))
            self._simple(error, cookie)
        elif magic == wire.CHUNK_MAGIC and self._structured:
            await self._chunk()
        else:
            raise wire.WireError(f"a reply begins with {magic:#x}")

    def _known(self, cookie: int) -> _Request:
        request = self._requests.get(cookie)
        if request is None:
            raise wire.WireError("a reply answers nothing that was asked")
        return request

    def _simple(self, error: int, cookie: int) -> None:
        request = self._known(cookie)
        if request.command in (wire.CMD_READ, wire.CMD_BLOCK_STATUS) and self._structured:
            raise wire.WireError("a simple reply answers what needs a structured one")
        if error:
            request.error = _exception(error, "")
        elif request.target is not None:
            self._expect(request, 0, request.size, last=True)
            return
        self._finish(request)

    async def _chunk(self) -> None:
        stream = self._stream
        await stream.need(wire.CHUNK.size)
        _, flags, kind, cookie, size = wire.CHUNK.unpack(stream.peek(wire.CHUNK.size))
        request = self._known(cookie)
        last = bool(flags & wire.CHUNK_DONE)
        if kind == wire.CHUNK_OFFSET_DATA and size > 8:
            await stream.need(wire.OFFSET_DATA.size)
            offset = wire.OFFSET_DATA.unpack(stream.take(wire.OFFSET_DATA.size))[-1]
            self._expect(request, offset - request.offset, size - 8, last=last)
        elif kind == wire.CHUNK_BLOCK_STATUS and size <= MAX_STATUS and request.command == wire.CMD_BLOCK_STATUS:
            stream.take(wire.CHUNK.size)
            self._filled = 0
            self._payload = _Payload(request, memoryview(bytearray(size)), last)
        else:
            if wire.CHUNK.size + size > MAX_SMALL:
                raise wire.WireError(f"a reply of kind {kind} has {size} bytes")
            await stream.need(wire.CHUNK.size + size)
            payload = bytes(stream.take(wire.CHUNK.size + size)[wire.CHUNK.size :])
            self._small(request, kind, payload)
            if last:
                self._last(request)

    def _small(self, request: _Request, kind: int, payload: bytes) -> None:
        if kind & wire.CHUNK_ERROR_BIT:
            request.error = request.error or _exception(*wire.unpack_error(payload))
        elif kind == wire.CHUNK_OFFSET_HOLE and len(payload) == wire.OFFSET_HOLE.size and request.target is not None:
            offset, size = wire.OFFSET_HOLE.unpack(payload)
            begin = offset - request.offset
            self._room(request, begin, size)
            request.target[begin : begin + size] = bytes(size)
            request.filled += size
        elif kind == wire.CHUNK_NONE and request.lands and not payload:
            request.filled = request.size
        elif kind != wire.CHUNK_NONE or payload:
            raise wire.WireError(f"a reply of kind {kind} with {len(payload)} bytes makes no sense here")

    def _last(self, request: _Request) -> None:
        if request.error is None and request.target is not None and request.filled != request.size:
            raise wire.WireError(f"{request.filled} bytes came when {request.size} were asked for")
        if request.error is None and request.command == wire.CMD_BLOCK_STATUS and not request.extents:
            request.error = OSError(errno.EIO, "the server did not tell the status")
        self._finish(request)

    def _room(self, request: _Request, begin: int, size: int) -> None:
        if request.target is None or begin < 0 or begin + size > request.size or request.filled + size > request.size:
            raise wire.WireError("more comes, or at another place, than was asked for")

    def _expect(self, request: _Request, begin: int, size: int, *, last: bool) -> None:
        self._room(request, begin, size)
        assert request.target is not None
        request.filled += size
        self._filled = 0
        self._payload = _Payload(request, request.target[begin : begin + size], last)

    async def _receive(self, payload: _Payload) -> None:
        request, target, last = payload
        while self._filled < len(target):
            self._filled += await self._stream.some(target[self._filled :])
        self._payload = None
        if request.command == wire.CMD_BLOCK_STATUS:
            context, extents = wire.unpack_extents(bytes(target))
            if context == self._context:
                request.extents = extents
        if last:
            self._last(request)


@contextmanager
def _bounded(timeout: float | None) -> Iterator[None]:
    with trio.move_on_after(math.inf if timeout is None else timeout) as scope:
        yield
    if scope.cancelled_caught:
        raise TimeoutError(errno.ETIMEDOUT, "the block device does not answer")


def _exception(error: int, text: str) -> Exception:
    if error == wire.ESHUTDOWN:
        return DeviceGone(text or "the server shuts down, or its device is gone")
    number = error if error in wire.ERRORS else errno.EINVAL
    return OSError(number, text or os.strerror(number))
