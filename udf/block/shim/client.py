"""One connection of a program: its handshake, its requests, its replies. The program is untrusted.

Owns: taking requests apart and checking them, and how much of one client is under way: what is more stays in its
socket, unread. Must never: look into payload, or answer a request twice.
Called by: the loop with events, service.py with answers.
"""

from __future__ import annotations

import socket
import struct
from time import monotonic
from typing import TYPE_CHECKING

from udf.block import wire
from udf.block.shim.exports import Region
from udf.block.shim.options import CONTEXT_ID, Handshake
from udf.block.shim.request import WITH_DATA, WRITING, Request
from udf.block.shim.streams import EAGER, Ended, Inbox, Outbox
from udf.window import NoWindow

if TYPE_CHECKING:
    from udf.block.shim.service import Service
    from udf.window import Mapped

INBOX = 16 * 1024
CLIENT_LIMIT = 16 << 20  # bytes of one client that are under way before no more is read of it
CLIENT_REQUESTS = 256
SMALL = 64 * 1024  # a first request up to this size is always taken
_COST = 1024  # bytes that a request is charged besides its payload
_HANDSHAKE = 30.0  # seconds that a client has until it has chosen an export
_FILLS = 16  # receives in one turn of the loop

_READ, _WRITE, _DISC, _FLUSH = wire.CMD_READ, wire.CMD_WRITE, wire.CMD_DISC, wire.CMD_FLUSH
_STATUS, _ZERO, _CACHE = wire.CMD_BLOCK_STATUS, wire.CMD_WRITE_ZEROES, wire.CMD_CACHE
_NEEDS = {
    _FLUSH: wire.SEND_FLUSH,
    wire.CMD_TRIM: wire.SEND_TRIM,
    _CACHE: wire.SEND_CACHE,
    _ZERO: wire.SEND_WRITE_ZEROES,
}
_FLAGS = {
    _READ: wire.CMD_FLAG_DF | wire.FLAG_WINDOW,
    _WRITE: wire.CMD_FLAG_FUA,
    _FLUSH: 0,
    wire.CMD_TRIM: wire.CMD_FLAG_FUA,
    _CACHE: 0,
    _ZERO: wire.CMD_FLAG_FUA | wire.CMD_FLAG_NO_HOLE | wire.CMD_FLAG_FAST_ZERO,
    _STATUS: wire.CMD_FLAG_REQ_ONE,
}
_OURS = wire.CMD_FLAG_DF | wire.FLAG_WATCH | wire.FLAG_WINDOW  # what the driver is not asked for


class Client:
    """One connection."""

    def __init__(self, service: Service, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.service = service
        self.sock = sock
        self.fd = sock.fileno()
        self.pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        self.inbox = Inbox(sock, INBOX)
        self.out = Outbox(sock, self._sent)
        self.region: Region | None = None
        self.structured = False
        self.context = False
        self.watching = False
        self.window: Mapped | None = None  # where it wants what it reads, if it says so
        self.closed = False
        self.mute = False  # it has closed its end after its goodbye: nobody takes replies any more
        self.leaving = False  # it has said goodbye: what is under way is finished, nothing more is read
        self.paused = ""  # why nothing is read of it: "memory", "claim"
        self.under_way: dict[int, Request] = {}  # by id
        self.charged = 0  # bytes, also of replies that it has not taken
        self.requests = 0  # that it has not taken the reply of
        self.since = monotonic()
        self.moved = self.since  # when it last gave or took something
        self.lost_seen = 0  # what its unit had lost before it came
        self.unsafe_seen = 0  # and what of it the client has been told, or came after
        self._handshake: Handshake | None = Handshake(self, self.inbox, self.out)
        self._incoming: Request | None = None  # whose data is being received
        self._skip = 0  # bytes of a refused write's data

    # ---- reading

    def on_readable(self) -> None:
        """Take what has come. Raises Ended, wire.WireError."""
        for _ in range(_FILLS):
            if self.paused or self.leaving:
                return
            if not self.inbox.fill():
                return
            self.moved = monotonic()
            self.parse()
            if self.inbox.drained:
                return

    def go_on(self) -> None:
        """What made it pause may be over: look at what has been received already. Raises Ended, wire.WireError."""
        self.paused = ""
        self.parse()

    def parse(self) -> None:
        """Handle everything that is complete. Raises Ended, wire.WireError."""
        if self._handshake is not None:
            region = self._handshake.parse()
            if region is None:
                return
            self.region = region
            self.structured = self._handshake.structured
            self.context = self._handshake.has_context
            self.watching = self._handshake.watching
            self.window = self._handshake.window
            self.inbox.drop_descriptors()
            self.lost_seen = region.unit.lost
            self.unsafe_seen = region.unit.unsafe
            self._handshake = None
            region.unit.watch_head(region.offset, region.size)
        inbox = self.inbox
        while not self.leaving:
            if self._skip:
                size = min(self._skip, inbox.end - inbox.start)
                inbox.start += size
                self._skip -= size
                if self._skip:
                    return
            if self._incoming is not None:
                if not inbox.whole:
                    return
                request, self._incoming = self._incoming, None
                self.service.submit(request)
            if inbox.end - inbox.start < 28:
                return
            if not self._request(inbox):
                return

    def _request(self, inbox: Inbox) -> bool:
        """Take one request; False if it must wait, or its data has not come yet."""
        magic, flags, op, cookie, offset, length = wire.REQUEST.unpack_from(inbox.buffer, inbox.start)
        region = self.region
        assert region is not None
        if magic != wire.REQUEST_MAGIC:
            raise wire.WireError("not a request")
        if op == _DISC:
            self.leaving = True
            return False
        lands = flags & wire.FLAG_WINDOW and op == _READ and self.window is not None
        size = 36 if lands else 28
        if inbox.end - inbox.start < size:
            return False
        error = self._refusal(op, flags, offset, length, region)
        target = None
        if lands and not error:
            target = self._target(wire.OFFSET.unpack_from(inbox.buffer, inbox.start + 28)[0], length)
            error = 0 if target is not None else wire.EINVAL
        if not error and op in WRITING and not self.service.claims.holds(self, region):
            if self.must_wait_for(region):
                return False
            if self.claim(region) is not None:
                error = wire.EPERM
        charge = _COST + (length if op in WITH_DATA and not error else 0)
        if not self._has_room(charge):
            self.paused = "memory"
            return False
        inbox.start += size
        service = self.service
        service.counters.requests += 1
        now = monotonic()
        request = Request(region.unit, op, flags & ~_OURS, region.offset + offset, length, now)
        request.watch = bool(flags & wire.FLAG_WATCH) and not error
        request.target = target
        request.client, request.region, request.cookie, request.charge = self, region, cookie, charge
        self.charged += charge
        self.requests += 1
        service.charged += charge
        service.register(request)
        self.under_way[request.id] = request
        if error:
            if op == _WRITE:
                self._skip = length
            service.counters.refused += 1
            service.answer(request, error)
            return True
        if op == _WRITE:
            request.buffer = service.pool.take(length)
            if not inbox.receive(request.buffer.view[:length]):
                self._incoming = request
                return False
        service.submit(request)
        return True

    def _target(self, place: int, length: int) -> memoryview | None:
        assert self.window is not None
        try:
            return self.window.piece(place, length)
        except NoWindow:
            return None

    def _refusal(self, op: int, flags: int, offset: int, length: int, region: Region) -> int:
        """Check a request; 0 or the error for it. Raises WireError where the stream could not be followed any more."""
        if op == _WRITE and length > wire.MAX_PAYLOAD:
            raise wire.WireError(f"a write of {length} bytes")
        if op not in _FLAGS:
            return wire.EINVAL
        unit = region.unit
        can = unit.terms.flags
        if op in WRITING and region.read_only:
            return wire.EPERM
        needs = _NEEDS.get(op)
        if needs is not None and not can & needs:
            return wire.EINVAL
        if flags & wire.FLAG_WATCH and self.watching and op in WITH_DATA:
            flags ^= wire.FLAG_WATCH
        if flags & wire.FLAG_WINDOW and self.window is None:
            return wire.EINVAL
        if flags & ~_FLAGS[op] or (flags & wire.CMD_FLAG_FUA and not can & wire.SEND_FUA):
            return wire.EINVAL
        if flags & wire.CMD_FLAG_FAST_ZERO and not can & wire.SEND_FAST_ZERO:
            return wire.EINVAL
        if op == _FLUSH:
            return wire.EINVAL if offset or length else 0
        if op == _STATUS and not self.context:
            return wire.EINVAL
        if not length or (op == _READ and length > wire.MAX_PAYLOAD):
            return wire.EINVAL
        if offset + length > region.size:
            return wire.ENOSPC if op in WRITING else wire.EINVAL
        if (offset | length) & (unit.terms.minimum - 1):
            return wire.EINVAL
        return 0

    def _has_room(self, charge: int) -> bool:
        if not self.requests and charge <= SMALL + _COST:
            self.service.hungry.pop(self, None)
            return True  # so nobody starves because of others
        if self.requests >= CLIENT_REQUESTS or (self.requests and self.charged + charge > CLIENT_LIMIT):
            return False
        return self.service.has_room(self, charge)

    # ---- claims

    def must_wait_for(self, region: Region) -> bool:
        """Whether a connection that is ending still has writes under way there; then this one pauses."""
        other = self.service.claims.in_the_way(self, region)
        if other is not None and other.closed:
            self.paused = "claim"
            return True
        return False

    def claim(self, region: Region) -> str | None:
        """Become the writer of an export; a sentence if somebody else is."""
        claims = self.service.claims
        if claims.holds(self, region):
            return None
        other = claims.in_the_way(self, region)
        if other is None:
            claims.take(self, region)
            return None
        self.service.counters.claims_refused += 1
        return f"{region.name} has a writer, or overlaps what has one: the process {other.pid}"

    # ---- answering

    def reply(self, request: Request, error: int) -> None:
        """Send the one answer to a request. *error* is one of the protocol's."""
        self.under_way.pop(request.id, None)
        if self.closed or self.mute:
            self._release(request)
            self.service.client_settled(self)
            self.service.touched.add(self)
            return
        region = request.region
        assert region is not None
        op, cookie, out = request.op, request.cookie, self.out
        if self.structured and op in (_READ, _STATUS):
            if error:
                out.push(wire.pack_error(cookie, error), request)
            elif op == _READ and request.target is not None:
                assert request.buffer is not None
                request.target[:] = request.buffer.view[request.at : request.at + request.length]
                out.push(wire.pack_chunk(wire.CHUNK_NONE, cookie), request)
            elif op == _READ:
                assert request.buffer is not None
                size = request.length
                out.push(
                    wire.OFFSET_DATA.pack(
                        *(wire.CHUNK_MAGIC, wire.CHUNK_DONE, wire.CHUNK_OFFSET_DATA, cookie, size + 8),
                        request.offset - region.offset,
                    )
                )
                out.push(request.buffer.view[request.at : request.at + size], request)
            else:
                payload = wire.CONTEXT.pack(CONTEXT_ID) + self._extents(request)
                out.push(wire.pack_chunk(wire.CHUNK_BLOCK_STATUS, cookie, payload), request)
        elif op == _READ and not error:
            assert request.buffer is not None
            out.push(wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, cookie))
            out.push(request.buffer.view[request.at : request.at + request.length], request)
        else:
            out.push(wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, error, cookie), request)
        if out.queued >= EAGER and not out.blocked:
            self.flush()
        else:
            self.service.touched.add(self)

    def _extents(self, request: Request) -> bytes:
        """A block status's extents, none longer than the export; without any: all of it is data."""
        if not request.reply:
            return wire.EXTENT.pack(request.length, 0)
        assert request.region is not None
        left = request.region.offset + request.region.size - request.offset
        extents = []
        for length, status in wire.EXTENT.iter_unpack(request.reply):
            extents.append(wire.EXTENT.pack(min(length, left), status))
            left -= min(length, left)
            if not left or request.flags & wire.CMD_FLAG_REQ_ONE:
                break
        return b"".join(extents)

    def flush(self) -> None:
        """Send what it takes. A client that is gone is noticed by the loop."""
        try:
            self.out.flush()
        except Ended:
            self.hang_up()
        self.service.touched.add(self)

    def hang_up(self) -> None:
        """Its end is closed. What it asked for before it said goodbye is done all the same."""
        if not self.leaving:
            self.service.broken.add(self)
            return
        self.mute = True
        self._drop_replies()

    def _drop_replies(self) -> None:
        for token in self.out.drop():
            assert isinstance(token, Request)
            self._release(token)

    def _sent(self, token: object) -> None:
        assert isinstance(token, Request)
        self.moved = monotonic()
        self._release(token)

    def _release(self, request: Request) -> None:
        """It is answered and off the account."""
        self.charged -= request.charge
        self.requests -= 1
        self.service.charged -= request.charge
        self.service.freed = True
        if request.op == _READ:
            self.service.counters.bytes_read += request.length
        elif request.op == _WRITE:
            self.service.counters.bytes_written += request.length
        buffer = request.buffer
        if buffer is not None:
            request.buffer = None
            if not request.open or buffer.arena is not None:  # else the driver's answer may still be on its way into it
                self.service.pool.drop(buffer)

    def is_receiving(self, request: Request) -> bool:
        """Whether the request's data has not come yet: it cannot be answered before."""
        return request is self._incoming

    def is_stuck(self, before: float) -> bool:
        """Whether it holds memory and has not moved since *before*, by its own fault."""
        return self.moved < before and (self._incoming is not None or self.out.queued > 0)

    # ---- the end

    @property
    def finished(self) -> bool:
        """Whether it said goodbye and has got all it asked for."""
        return self.leaving and not self.under_way and not self.out.queued

    def is_late(self, now: float) -> bool:
        """Whether it has not come to choosing an export in time."""
        return self._handshake is not None and now - self.since > _HANDSHAKE

    def close(self) -> None:
        """The connection has ended: what the driver was not asked for is not needed any more."""
        if self.closed:
            return
        self.closed = True
        self.inbox.drop_descriptors()
        if self.window is not None:
            self.window.close()
        self.service.hungry.pop(self, None)
        self._drop_replies()
        incoming, self._incoming = self._incoming, None
        for request in list(self.under_way.values()):
            if request is incoming or not request.sent:
                self.service.answer(request, wire.ESHUTDOWN)
        self.service.client_settled(self)
