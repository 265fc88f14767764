"""The requests of one connection to an NBD server.

Owns: reading, checking and answering them, and the one table from an exception to an NBD error. Must never: ask a unit
for something outside its size, let a client hold more than the bounds here, or answer a request twice or not at all.
Called by: server.py, once for each connection whose handshake is over.

A request runs in the task that has read it. Only if that task has to wait, whether for the unit or for the client to
take a reply, the next request is read by another one, so many requests are under way at once, and a unit that answers
at once costs no pass through the scheduler.
"""

from __future__ import annotations

import errno
import logging
import types
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import trio
from trio.lowlevel import ParkingLot

from udf.block import wire
from udf.block.handshake import ALLOCATION_ID, Claims, Session
from udf.block.stream import Ended, Stream
from udf.errors import DeviceGone, errno_of, is_fault
from udf.window import NoWindow

MAX_REQUESTS = 32  # of one connection at once
MAX_BYTES = wire.MAX_PAYLOAD  # of one connection's requests at once; a single request may be as large
_FAIR = 0.005  # seconds after which other tasks run, even if requests come without a pause

_log = logging.getLogger("udf.block.server")

_FLAGS = {
    wire.CMD_READ: wire.CMD_FLAG_FUA | wire.CMD_FLAG_DF,
    wire.CMD_WRITE: wire.CMD_FLAG_FUA,
    wire.CMD_FLUSH: wire.CMD_FLAG_FUA,
    wire.CMD_TRIM: wire.CMD_FLAG_FUA,
    wire.CMD_CACHE: wire.CMD_FLAG_FUA,
    wire.CMD_WRITE_ZEROES: wire.CMD_FLAG_FUA | wire.CMD_FLAG_NO_HOLE | wire.CMD_FLAG_FAST_ZERO,
    wire.CMD_BLOCK_STATUS: wire.CMD_FLAG_FUA | wire.CMD_FLAG_REQ_ONE,
}
_CHANGES = frozenset((wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES))

_NAMES = {
    wire.CMD_READ: "read",
    wire.CMD_WRITE: "write",
    wire.CMD_FLUSH: "flush",
    wire.CMD_TRIM: "trim",
    wire.CMD_WRITE_ZEROES: "zero",
    wire.CMD_BLOCK_STATUS: "extents",
}

# What is not here is EIO: a client can only try again or give up.
_ERRORS = {
    errno.EPERM: wire.EPERM,
    errno.EACCES: wire.EPERM,
    errno.EROFS: wire.EPERM,
    errno.ENOMEM: wire.ENOMEM,
    errno.EINVAL: wire.EINVAL,
    errno.EOPNOTSUPP: wire.EINVAL,
    errno.ENOSPC: wire.ENOSPC,
    errno.EDQUOT: wire.ENOSPC,
    errno.EFBIG: wire.ENOSPC,
    errno.ESHUTDOWN: wire.ESHUTDOWN,
}


def nbd_error(exc: BaseException) -> int:
    """The NBD error of what a unit raised."""
    return wire.ESHUTDOWN if isinstance(exc, DeviceGone) else _ERRORS.get(errno_of(exc), wire.EIO)


class Connection:
    """The requests of one connection."""

    def __init__(self, stream: Stream, claims: Claims | None, fault: Callable[[str, BaseException], None]) -> None:
        self._stream = stream
        self._claims = claims
        self._fault = fault
        self._may_write = claims is None
        self._taken = False  # a task reads requests, or serves one and has not had to wait yet
        self._ended = False  # no further request will be read
        self._requests = 0
        self._bytes = 0
        self._tasks = 1
        self._idle = ParkingLot()
        self._soon = 0  # requests without a task, under way
        self._none_soon = ParkingLot()

    async def run(self, session: Session) -> None:
        """Until the client says that it is done or the connection ends, and all that it asked for is done."""
        assert session.access is not None
        self._access = session.access
        self._session = session
        self._window = session.window
        self._may_write = self._may_write or session.name in session.claimed
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await self._work()
            while self._soon:
                await self._none_soon.park()
        finally:
            if self._window is not None:
                self._window.close()  # what is still read into it keeps that mapped

    async def _work(self) -> None:
        """Read a request and serve it, again and again; wait while another task reads."""
        reading = False
        passed = perf_counter()

        def step_aside() -> None:
            nonlocal reading
            reading = self._taken = False
            self._call_another()

        while True:
            while self._taken and not reading and not self._ended:
                await self._idle.park()
            if self._ended:
                break
            now = perf_counter()
            if not reading:
                passed = now  # others ran while this task waited
            reading = self._taken = True
            if now - passed > _FAIR:
                await trio.lowlevel.checkpoint()
                passed = now
            try:
                request = await self._next()
                if request is None:
                    break
                if isinstance(request[5], int) and self._begin(request[0], *request[2:5], request[5]):
                    continue
                held = request[4] if request[1] in (wire.CMD_READ, wire.CMD_WRITE) else 0
                self._requests += 1
                self._bytes += held
                try:
                    await _noticing(self._serve(*request), step_aside)
                finally:
                    self._requests -= 1
                    self._bytes -= held
            except (Ended, wire.WireError) as exc:
                _log.debug("no further requests: %s", exc)
                break
        self._ended = True
        self._idle.unpark_all()

    def _call_another(self) -> None:
        """Who has read a request has to wait: let another task read, unless enough is under way.

        Then nobody reads, until one of the tasks is done with its request and does it itself.
        """
        if self._requests >= MAX_REQUESTS or self._bytes >= MAX_BYTES or self._ended:
            return
        if self._idle:
            self._idle.unpark()
        elif self._tasks < MAX_REQUESTS:
            self._tasks += 1
            self._nursery.start_soon(self._work)

    async def _next(self) -> tuple[int, int, int, int, int, bytearray | int | None] | None:
        """Flags, command, cookie, offset, size, and what is written or the place in the window for what is read."""
        stream = self._stream
        if stream.ready < 28:
            await stream.need(28)
        magic, flags, command, cookie, offset, size = wire.REQUEST.unpack(stream.take(28))
        if magic != wire.REQUEST_MAGIC:
            raise wire.WireError(f"a request begins with {magic:#x}")
        if command == wire.CMD_DISC:
            return None
        data: bytearray | int | None = None
        if flags & wire.FLAG_WINDOW and self._window is not None and command == wire.CMD_READ:
            await stream.need(8)
            (data,) = wire.OFFSET.unpack(stream.take(8))
        elif command == wire.CMD_WRITE:
            if size > wire.MAX_PAYLOAD:
                await stream.skip(size)
            else:
                data = bytearray(size)
                await stream.fill(memoryview(data))
        return flags, command, cookie, offset, size, data

    async def _serve(
        self, flags: int, command: int, cookie: int, offset: int, size: int, data: bytearray | int | None
    ) -> None:
        """Perform one request and answer it."""
        send = self._stream.send
        structured = self._session.structured
        try:
            result: Any = b""
            if isinstance(data, int):
                flags &= ~wire.FLAG_WINDOW
            self._check(flags, command, offset, size)
            if isinstance(data, int):
                if size:
                    await self._land(offset, size, data)
                    size = 0
            elif size or command == wire.CMD_FLUSH:
                result = await self._perform(flags, command, offset, size, data)
        except BaseException as exc:
            error, text = self._error(command, flags, exc)
            if structured:
                await send(wire.pack_error(cookie, error, text))
            else:
                await send(wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, error, cookie))
            return
        if command == wire.CMD_READ:
            if not structured:
                await send(wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, cookie), result)
            elif size:
                head = wire.OFFSET_DATA.pack(
                    wire.CHUNK_MAGIC, wire.CHUNK_DONE, wire.CHUNK_OFFSET_DATA, cookie, 8 + size, offset
                )
                await send(head, result)
            else:
                await send(wire.pack_chunk(wire.CHUNK_NONE, cookie))
        elif command == wire.CMD_BLOCK_STATUS:
            await send(wire.pack_extents(cookie, ALLOCATION_ID, result))
        else:
            await send(wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, cookie))

    def _check(self, flags: int, command: int, offset: int, size: int) -> None:
        """Refuse what the protocol forbids; raises what `_error` turns into its number."""
        allowed = _FLAGS.get(command)
        if allowed is None or flags & ~allowed:
            raise OSError(errno.EINVAL, f"there is no command {command} with flags {flags:#x} here")
        if command == wire.CMD_FLUSH:
            return
        changes = command in _CHANGES
        if changes and not self._access.writable:
            raise PermissionError(errno.EPERM, "the export is read-only")
        if command in (wire.CMD_READ, wire.CMD_WRITE) and size > wire.MAX_PAYLOAD:
            raise OSError(errno.EINVAL, f"{size} bytes at once are more than {wire.MAX_PAYLOAD}")
        if offset + size > self._access.size:
            past = command in (wire.CMD_WRITE, wire.CMD_WRITE_ZEROES)
            raise OSError(errno.ENOSPC if past else errno.EINVAL, "this is behind the end of the export")
        if command == wire.CMD_TRIM and not self._access.can_trim:
            raise OSError(errno.EINVAL, "the export cannot be trimmed")
        if command == wire.CMD_BLOCK_STATUS and (self._session.allocation != self._session.name or not size):
            raise OSError(errno.EINVAL, "base:allocation was not asked for, or no bytes were")
        if changes and not self._may_write:
            assert self._claims is not None
            self._claims.take(self, self._session.name)
            self._may_write = True

    def _begin(self, flags: int, cookie: int, offset: int, size: int, place: int) -> bool:
        """Have a unit read without a task; whether it does, and the request will be answered when it has."""
        if self._requests >= MAX_REQUESTS or self._bytes + size > MAX_BYTES or not size:
            return False
        assert self._window is not None
        try:
            self._check(flags & ~wire.FLAG_WINDOW, wire.CMD_READ, offset, size)
            target = self._window.piece(place, size)
            if not self._access.read_soon(offset, target, partial(self._landed, cookie, size)):
                return False
        except Exception:
            return False  # what is wrong is said when it is tried with a task
        self._requests += 1
        self._soon += 1
        self._bytes += size
        return True

    def _landed(self, cookie: int, size: int, exc: Exception | None) -> None:
        self._requests -= 1
        self._soon -= 1
        self._bytes -= size
        if exc is None:
            reply = wire.pack_chunk(wire.CHUNK_NONE, cookie)
        else:
            reply = wire.pack_error(cookie, *self._error(wire.CMD_READ, 0, exc))
        if not self._stream.send_soon(reply) and not self._ended:
            self._nursery.start_soon(self._flush)
        if not self._soon:
            self._none_soon.unpark_all()

    async def _flush(self) -> None:
        try:
            await self._stream.flush()
        except Ended:
            pass  # who reads sees it too

    async def _land(self, offset: int, size: int, place: int) -> None:
        """Read to where the client wants it."""
        assert self._window is not None
        try:
            target = self._window.piece(place, size)
        except NoWindow as exc:
            raise OSError(errno.EINVAL, str(exc)) from None
        await self._access.read_into(offset, target)

    async def _perform(self, flags: int, command: int, offset: int, size: int, data: bytearray | None) -> Any:
        access = self._access
        if command == wire.CMD_READ:
            return await access.read(offset, size)
        if command == wire.CMD_WRITE:
            assert data is not None
            await access.write(offset, data)
        elif command == wire.CMD_FLUSH:
            await access.flush()
        elif command == wire.CMD_TRIM:
            await access.trim(offset, size)
        elif command == wire.CMD_WRITE_ZEROES:
            hole, fast = not flags & wire.CMD_FLAG_NO_HOLE, bool(flags & wire.CMD_FLAG_FAST_ZERO)
            await access.zero(offset, size, hole=hole, fast=fast)
        elif command == wire.CMD_BLOCK_STATUS:
            extents = await access.extents(offset, size)
            return extents[:1] if flags & wire.CMD_FLAG_REQ_ONE else extents
        if flags & wire.CMD_FLAG_FUA and command in _CHANGES:
            await access.flush()
        return None

    def _error(self, command: int, flags: int, exc: BaseException) -> tuple[int, str]:
        """The error number and a text for what went wrong; a cancellation goes on."""
        while isinstance(exc, BaseExceptionGroup):
            if exc.subgroup(trio.Cancelled) is not None or len(exc.exceptions) != 1:
                break
            exc = exc.exceptions[0]  # a nursery wraps what its tasks raise; one error stays that error
        if isinstance(exc, trio.Cancelled | GeneratorExit | KeyboardInterrupt) or (
            isinstance(exc, BaseExceptionGroup) and exc.subgroup(trio.Cancelled) is not None
        ):
            raise exc
        if is_fault(exc):
            self._fault(_NAMES.get(command, "request"), exc)
        if flags & wire.CMD_FLAG_FAST_ZERO and command == wire.CMD_WRITE_ZEROES and errno_of(exc) == errno.EOPNOTSUPP:
            return wire.ENOTSUP, ""
        text = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        return nbd_error(exc), text[:200]


_T = TypeVar("_T")


@types.coroutine
def _noticing(coroutine: Coroutine[Any, Any, _T], waits: Callable[[], None]) -> Generator[Any, Any, _T]:
    """Run a coroutine, and call `waits` when it has to wait for the first time, if it ever has to."""
    try:
        trap = coroutine.send(None)
    except StopIteration as stop:
        result: _T = stop.value
        return result
    waits()
    while True:
        failure = outcome = None
        try:
            outcome = yield trap
        except BaseException as exc:
            failure = exc
        try:
            trap = coroutine.send(outcome) if failure is None else coroutine.throw(failure)
        except StopIteration as stop:
            result = stop.value
            return result
