"""One NBD connection to the driver, which is as untrusted as any server on a network.

Owns: the handshake as a client, and taking replies apart: each is checked against the piece of a request that it is
for, and a read's data goes right into the request's buffer. Must never: believe an offset or a length, or answer
anybody; what is settled is told to the unit.
Called by: generation.py opens it, units.py sends over it, the loop says when there is something to read.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Generator, Sequence
from struct import Struct
from typing import TYPE_CHECKING

from udf.block import wire
from udf.block.shim.buffers import Arena
from udf.block.shim.request import Piece
from udf.block.shim.streams import EAGER, Ended, Inbox, Outbox
from udf.block.shim.terms import BrokenDriver, Terms, terms_of
from udf.window import NoWindow

if TYPE_CHECKING:
    from udf.block.shim.units import Unit

INBOX = 32 * 1024
MOST_UNITS = 16
_MOST_NAME = 32  # characters of a unit's name
_MOST_REPLY = 256 * 1024  # bytes of a reply that is not data
_MOST_SKIPPED = 64  # replies to LIST and the like that mean nothing to us
_MOST_FILLS = 4096  # to drain it
_FILLS = 16  # receives in one turn of the loop
_U32 = Struct(">I")
_READ, _STATUS = wire.CMD_READ, wire.CMD_BLOCK_STATUS
_SIMPLE, _CHUNKED = wire.SIMPLE_REPLY_MAGIC, wire.CHUNK_MAGIC

Steps = Generator[int, bytes, None]


class DriverConnection:
    """A connection: the handshake first, then one unit's requests."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.fd = sock.fileno()
        self.inbox = Inbox(sock, INBOX)
        self.out = Outbox(sock, lambda _: None)
        self.unit: Unit | None = None
        self.pieces: dict[int, Piece] = {}
        self.terms: Terms | None = None
        self.arena: Arena | None = None  # where it puts what is read, if it does
        self.over = False  # its end means nothing: it has said all that was wanted
        self._steps: Steps | None = None
        self._need = 0
        self._structured = False
        self._target: tuple[int, Piece, int, bool] | None = None  # cookie, piece, kind of the body, it is the last
        self._body: bytearray | None = None  # of a reply that is not data

    # ---- the handshake

    def open(self, name: str, opened: Callable[[DriverConnection], None]) -> None:
        """Open a unit; *opened* is told when its terms are known."""
        self._begin(self._open_steps(name, opened))

    def ask_names(self, listed: Callable[[list[str]], None]) -> None:
        """Ask for the units' names and tell *listed*; then the connection is of no use any more."""
        self._begin(self._list_steps(listed))

    def _begin(self, steps: Steps) -> None:
        self._steps = steps
        self._need = next(steps)

    def _greet(self) -> Generator[int, bytes, None]:
        magic, option_magic, flags = wire.GREETING.unpack((yield wire.GREETING.size))
        if magic != wire.NBD_MAGIC or option_magic != wire.OPTION_MAGIC or not flags & wire.FLAG_FIXED_NEWSTYLE:
            raise BrokenDriver("open", "its greeting is not that of an NBD server")
        self.out.push(wire.CLIENT_FLAGS.pack(flags & (wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES)))

    def _replies(self, option: int, payload: bytes = b"") -> Generator[int, bytes, list[tuple[int, bytes]]]:
        """Ask one option; returns the replies up to and with the one that ends it."""
        self.out.push(wire.pack_option(option, payload))
        return (yield from self._collect(option))

    def _collect(self, option: int) -> Generator[int, bytes, list[tuple[int, bytes]]]:
        replies: list[tuple[int, bytes]] = []
        while True:
            magic, answered, kind, size = wire.OPTION_REPLY.unpack((yield wire.OPTION_REPLY.size))
            if magic != wire.OPTION_REPLY_MAGIC or answered != option or size > wire.MAX_OPTION:
                raise BrokenDriver("open", "its reply to an option is none")
            replies.append((kind, (yield size) if size else b""))
            if kind == wire.REP_ACK or kind & wire.REP_ERROR:
                return replies
            if len(replies) > _MOST_SKIPPED:
                raise BrokenDriver("open", "its reply to an option does not end")

    def _list_steps(self, listed: Callable[[list[str]], None]) -> Steps:
        yield from self._greet()
        replies = yield from self._replies(wire.OPT_LIST)
        if replies[-1][0] != wire.REP_ACK:
            raise BrokenDriver("open", "it does not list its units")
        names = [wire.unpack_server(payload) for kind, payload in replies if kind == wire.REP_SERVER]
        if len(set(names)) != len(names) or len(names) > MOST_UNITS:
            raise BrokenDriver("open", f"its {len(names)} units are too many, or two have the same name")
        if not all(len(name) <= _MOST_NAME and name.isascii() and (name.isprintable() or not name) for name in names):
            raise BrokenDriver("open", "the name of a unit is too long, or not a plain one")
        self.out.push(wire.pack_option(wire.OPT_ABORT))
        self.over = True
        listed(names)
        yield 1 << 62  # whatever follows

    def _open_steps(self, name: str, opened: Callable[[DriverConnection], None]) -> Steps:
        yield from self._greet()
        structured = (yield from self._replies(wire.OPT_STRUCTURED_REPLY))[-1][0] == wire.REP_ACK
        context = None
        if structured:
            asked = wire.pack_contexts(name)
            for kind, payload in (yield from self._replies(wire.OPT_SET_META_CONTEXT, asked)):
                if kind == wire.REP_META_CONTEXT:
                    number, context_name = wire.unpack_context(payload)
                    if context_name == wire.BASE_ALLOCATION:
                        context = number
            yield from self._share(name)
        replies = yield from self._replies(wire.OPT_GO, wire.pack_go(name))
        if replies[-1][0] != wire.REP_ACK:
            text = replies[-1][1][:200].decode(errors="replace")
            raise BrokenDriver("open", f"it does not open its unit {name[:40]!r}: {text}")
        self.terms = terms_of(
            [payload for kind, payload in replies if kind == wire.REP_INFO], structured=structured, context=context
        )
        self._structured = structured
        self._steps = None
        opened(self)

    def _share(self, name: str) -> Generator[int, bytes, None]:
        """Have what is read put into memory that we share, if the driver's host knows how."""
        try:
            arena = Arena(name)
        except (OSError, NoWindow):
            return  # no memory: what is read is sent
        try:
            message = wire.pack_option(wire.OPT_WINDOW)
            # Nothing else is on its way, so it goes at once.
            if self.out.queued or socket.send_fds(self.sock, [message], [arena.fd]) != len(message):
                raise Ended("a handshake does not fit into its socket")
        except OSError as error:
            raise Ended(str(error)) from None
        finally:
            arena.sent()
        if (yield from self._collect(wire.OPT_WINDOW))[-1][0] == wire.REP_ACK:
            self.arena = arena

    # ---- replies

    def on_readable(self, *, drain: bool = False) -> None:
        """Take what has come; `drain`: all of it. Raises Ended, BrokenDriver."""
        inbox = self.inbox
        for turn in range(_MOST_FILLS):
            if not inbox.fill():
                return
            self._parse()
            if not drain and (inbox.drained or turn >= _FILLS):
                return

    def _parse(self) -> None:
        try:
            while self._steps is not None:
                if self.inbox.end - self.inbox.start < self._need:
                    if self._need > INBOX and not self._need >> 40:
                        # Only a reply to an option can be that long: it is collected beside the inbox.
                        self._grow()
                    return
                try:
                    self._need = self._steps.send(self.inbox.take(self._need))
                except StopIteration:
                    break
        except wire.WireError as error:
            raise BrokenDriver("open", str(error)) from None
        finally:
            if self._steps is not None or self.out.queued:
                self.out.flush()
        if self._steps is None:
            self._parse_replies()

    def _grow(self) -> None:
        old = self.inbox
        self.inbox = Inbox(self.sock, wire.MAX_OPTION)
        self.inbox.buffer[: old.end - old.start] = old.buffer[old.start : old.end]
        self.inbox.end = old.end - old.start

    def _parse_replies(self) -> None:
        inbox = self.inbox
        while True:
            if self._target is not None:
                if not inbox.whole:
                    return
                self._body_whole()
            have = inbox.end - inbox.start
            if have < 16:
                return
            magic = _U32.unpack_from(inbox.buffer, inbox.start)[0]
            if magic == _SIMPLE:
                _, error, cookie = wire.SIMPLE_REPLY.unpack_from(inbox.buffer, inbox.start)
                inbox.start += 16
                self._simple(cookie, error)
            elif magic == _CHUNKED and self._structured:
                if have < 20:
                    return
                _, flags, kind, cookie, size = wire.CHUNK.unpack_from(inbox.buffer, inbox.start)
                if kind == wire.CHUNK_OFFSET_DATA:
                    if have < 28:
                        return
                    self._data(cookie, size, bool(flags & wire.CHUNK_DONE))
                else:
                    inbox.start += 20
                    self._chunk(cookie, kind, size, bool(flags & wire.CHUNK_DONE))
            else:
                raise BrokenDriver("reply", "what it sent is not a reply")

    def _piece(self, cookie: int) -> Piece:
        piece = self.pieces.get(cookie)
        if piece is None:
            raise BrokenDriver("reply", "it answered a request that nobody has asked")
        return piece

    def _simple(self, cookie: int, error: int) -> None:
        piece = self._piece(cookie)
        if piece.op in (_READ, _STATUS) and self._structured:
            raise BrokenDriver("reply", "it answered without chunks what must have chunks")
        if piece.op == _STATUS and not error:
            raise BrokenDriver("status", "its reply has no status")
        if piece.op == _READ and not error:
            self._receive(cookie, piece, piece.length, last=True)
        else:
            self._settle(cookie, piece, error)

    def _data(self, cookie: int, size: int, last: bool) -> None:
        inbox = self.inbox
        piece = self._piece(cookie)
        offset: int = wire.OFFSET.unpack_from(inbox.buffer, inbox.start + 20)[0]
        inbox.start += 28
        size -= 8
        if piece.op != _READ or piece.whole or offset != piece.at + piece.filled:
            raise BrokenDriver("read", f"it sent {size} bytes at {offset} that were not asked for there")
        if not 0 < size <= piece.length - piece.filled:
            raise BrokenDriver("read", f"it sent {size} bytes more than were asked for")
        self._receive(cookie, piece, size, last=last)

    def _receive(self, cookie: int, piece: Piece, size: int, *, last: bool) -> None:
        assert self.unit is not None
        target = self.unit.room_for(piece, size)
        self._target = (cookie, piece, size, last)
        if self.inbox.receive(target):
            self._body_whole()

    def _body_whole(self) -> None:
        assert self._target is not None
        cookie, piece, size, last = self._target
        self._target = None
        if self._body is not None:
            body, self._body = self._body, None
            self._chunk_whole(cookie, piece, size, bytes(body), last=last)  # for these `size` is the chunk's kind
            return
        piece.filled += size
        if last:
            self._end(cookie, piece)

    def _chunk(self, cookie: int, kind: int, size: int, last: bool) -> None:
        piece = self._piece(cookie)
        if size > _MOST_REPLY:
            raise BrokenDriver("reply", f"a chunk of {size} bytes is too long")
        self._body = bytearray(size)
        self._target = (cookie, piece, kind, last)
        if self.inbox.receive(memoryview(self._body)):
            self._body_whole()

    def _chunk_whole(self, cookie: int, piece: Piece, kind: int, body: bytes, *, last: bool) -> None:
        request = piece.request
        if kind & wire.CHUNK_ERROR_BIT:
            if piece.whole:
                raise BrokenDriver("reply", "it sent two errors for one request")
            try:
                error = wire.unpack_error(body)[0]
            except wire.WireError as wrong:
                raise BrokenDriver("reply", str(wrong)) from None
            if request is not None:
                request.error = request.error or error or wire.EIO
            piece.whole = True
        elif kind == wire.CHUNK_NONE:
            if body or not last:
                raise BrokenDriver("reply", "an empty chunk is not empty, or not the last one")
            if piece.landing is not None:
                piece.filled = piece.length
        elif kind == wire.CHUNK_OFFSET_HOLE and piece.op == _READ:
            if len(body) != wire.OFFSET_HOLE.size:
                raise BrokenDriver("read", "a hole without an offset and a length")
            offset, size = wire.OFFSET_HOLE.unpack(body)
            if piece.whole or offset != piece.at + piece.filled or not 0 < size <= piece.length - piece.filled:
                raise BrokenDriver("read", f"it sent a hole of {size} bytes at {offset} that was not asked for there")
            assert self.unit is not None
            self.unit.room_for(piece, size)[:] = bytes(size)
            piece.filled += size
        elif kind == wire.CHUNK_BLOCK_STATUS and piece.op == _STATUS:
            self._status(piece, body)
        else:
            raise BrokenDriver("reply", f"a chunk of the kind {kind} is no answer to what was asked")
        if last:
            self._end(cookie, piece)

    def _status(self, piece: Piece, body: bytes) -> None:
        try:
            context, extents = wire.unpack_extents(body)
        except wire.WireError as wrong:
            raise BrokenDriver("status", str(wrong)) from None
        if self.terms is None or context != self.terms.context or piece.whole:
            raise BrokenDriver("status", "a status of another kind than was asked for")
        if sum(length for length, _ in extents[:-1]) >= piece.length:
            raise BrokenDriver("status", "it sent the status of more than was asked for")
        piece.whole = True
        if piece.request is not None:
            piece.request.reply = body[wire.CONTEXT.size :]

    def _end(self, cookie: int, piece: Piece) -> None:
        request = piece.request
        failed = request is None or request.error
        if piece.op == _READ and piece.filled != piece.length and not (failed and piece.whole) and request is not None:
            raise BrokenDriver("read", f"it sent {piece.filled} bytes instead of {piece.length}")
        if piece.op == _STATUS and not piece.whole:
            raise BrokenDriver("status", "its reply has no status")
        self._settle(cookie, piece, 0)

    def _settle(self, cookie: int, piece: Piece, error: int) -> None:
        del self.pieces[cookie]
        assert self.unit is not None
        self.unit.settled(piece, error if not error or error in wire.ERRORS else wire.EINVAL)

    # ---- sending

    def send(self, cookie: int, piece: Piece, flags: int, data: Sequence[memoryview] = ()) -> None:
        """Ask for one piece; it is on its way at the end of the loop's turn at the latest. Raises Ended."""
        self.pieces[cookie] = piece
        place = b""
        if piece.landing is not None:
            flags |= wire.FLAG_WINDOW
            place = wire.OFFSET.pack(piece.landing.place)
        self.out.push(wire.REQUEST.pack(wire.REQUEST_MAGIC, flags, piece.op, cookie, piece.at, piece.length) + place)
        for part in data:
            self.out.push(part)
        if self.out.queued >= EAGER and not self.out.blocked:
            self.out.flush()

    def goodbye(self) -> None:
        """Say that nothing more is wanted."""
        try:
            self.out.push(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.CMD_DISC, 0, 0, 0))
            self.out.flush()
        except Ended:
            pass
