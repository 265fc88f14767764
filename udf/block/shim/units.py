"""One unit of the driver: what waits for it, what is under way, and what it has acknowledged but not flushed.

Owns: the order in which the driver is asked (that of arrival, within a bounded window), splitting what is larger than
it takes and merging what is smaller, the writes that are kept until a FLUSH, and when the device is told to flush
though nobody asks for it. Must never: answer a client itself
(service.py does), or forget a request because of something that the driver says.
Called by: service.py and recovery.py with requests, driver.py with what was settled.

Over 400 lines: each way by which a request gets its answer is to be seen beside the others.
"""

from __future__ import annotations

import math
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING

from udf.block import wire
from udf.block.partitions import Table
from udf.block.shim.away import Away
from udf.block.shim.buffers import ARENA_PIECE
from udf.block.shim.driver import DriverConnection
from udf.block.shim.kept import Kept
from udf.block.shim.request import WITH_DATA, WRITING, Piece, Request
from udf.block.shim.streams import Ended
from udf.block.shim.terms import Terms
from udf.block.shim.watched import Seen, Watched

if TYPE_CHECKING:
    from udf.block.shim.service import Service

WINDOW = 4 << 20  # bytes of which the driver is asked at once
MERGED = 1 << 20  # bytes of requests, one behind the other, for which the driver is asked in one command
LANDS = 64 << 10  # bytes of a read from which on it is worth while not to have them sent
_HOLD = 0.2  # seconds without an answer after which what could be merged with more waits no longer for that
MOST_PIECES = 128  # and commands
_WITHOUT_DATA = 32 << 20  # the largest piece of a command that carries no data: a slow device must get somewhere
_CHANGING = WRITING | {wire.CMD_FLUSH}
KEPT_LIMIT = 64 << 20  # bytes of writes that no FLUSH has covered
_EXTENSIONS = 8  # deadlines that one piece may take while others are answered

_READ, _WRITE, _FLUSH, _STATUS = wire.CMD_READ, wire.CMD_WRITE, wire.CMD_FLUSH, wire.CMD_BLOCK_STATUS
_FUA = wire.CMD_FLAG_FUA


class Unit:
    """A unit as it was when it was found; one that comes back otherwise is another unit."""

    def __init__(self, service: Service, name: str, index: int, terms: Terms) -> None:
        self.service = service
        self.name = name
        self.index = index
        self.label = "disk" if index == 0 else f"disk{index}"
        self.terms = terms
        self.size = terms.size
        self.maximum = terms.maximum
        self.read_only = bool(terms.flags & wire.READ_ONLY)
        self.can_flush = bool(terms.flags & wire.SEND_FLUSH)
        self.block_size = terms.block
        self.table = Table()
        self.table_touched = False  # somebody has written where its partition table may be
        self.scan_again = False  # a look at its partition table did not come to its end
        self.gone = 0  # the errno for everything, once it is not there any more
        self.lost = 0  # how often something that was acknowledged was lost
        self.unsafe = 0  # how often a flush of our own has failed; each client is told once
        self.connection: DriverConnection | None = None
        self.queue: deque[Request] = deque()
        self.kept = Kept(service.pool)
        self.watched = Watched(service.pool)
        self.watched.pin(0, self.size)
        self.away = Away(self)
        self.under_way = 0  # bytes
        self._ghosts: set[Piece] = set()  # writes that nobody waits for any more
        self._own_flush: Request | None = None
        self._last_answer = 0.0
        self._idle = service.config.idle_flush if self.can_flush else 0.0
        self._flush_at = math.inf  # when the device is told to flush, if nobody writes until then
        self._heads: set[int] = set()  # offsets of heads that are being read

    def connect(self, connection: DriverConnection) -> None:
        """Use this generation's connection."""
        assert connection.terms is not None
        connection.unit = self
        self.connection = connection
        self.maximum = connection.terms.maximum
        self._last_answer = monotonic()

    def drop_connection(self) -> None:
        """The driver is gone: nothing is under way."""
        if self.connection is not None:
            self.connection.pieces.clear()
            self.connection = None
        self._ghosts.clear()
        self._heads.clear()
        self.under_way = 0
        self._own_flush = None
        self._flush_at = math.inf

    # ---- asking

    def pump(self) -> None:
        """Ask the driver for what waits, as far as the window allows."""
        connection, queue = self.connection, self.queue
        if connection is None or self.away.holds:
            return
        pieces = connection.pieces
        now = monotonic()
        # Not as soon as a little can be asked for: then less would be merged.
        while queue and self.under_way <= WINDOW - MERGED and len(pieces) < MOST_PIECES:
            request = queue[0]
            if request.answered:
                queue.popleft()
                continue
            if not request.sent:
                if self._ghosts and request.op in WRITING and self._meets_ghost(request):
                    return
                if request.op in WRITING and self.kept.bytes + self.under_way >= KEPT_LIMIT:
                    self.flush_kept()
                    if self._own_flush is not None:
                        return
                riders, grows = self._riders(request)
                if grows and self.under_way >= MERGED and now - self._last_answer < _HOLD:
                    return  # the driver has enough to do until it answers something; then this goes on its way
                self.begin(request, now)
                if len(riders) > 1:
                    self._ask(connection, self._merge(riders, now), now)
                    continue
            self._ask(connection, request, now)
            if request.todo >= request.length:
                queue.popleft()

    def _riders(self, first: Request) -> tuple[list[Request], bool]:
        """What waits first and those that go on where it ends; and whether more may still come to join them.

        Only one client's, so that nobody has to wait for, or holds memory of, another one.
        """
        op, client = first.op, first.client
        if op not in WITH_DATA or first.flags or first.alone or client is None:
            return [], False
        most = min(MERGED, self.maximum)
        riders: list[Request] = []
        end = first.offset
        for request in self.queue:
            if request.op != op or request.offset != end or request.client is not client or request.flags:
                return riders, False
            if request.answered or request.alone or end + request.length - first.offset > most:
                return riders, False
            if self._ghosts and op == _WRITE and self._meets_ghost(request):
                return riders, False
            end += request.length
            riders.append(request)
        return riders, end - first.offset < most

    def _merge(self, riders: list[Request], now: float) -> Request:
        """One request for all of them, which leave the queue."""
        first, last = riders[0], riders[-1]
        merged = Request(self, first.op, 0, first.offset, last.offset + last.length - first.offset, first.since)
        merged.riders, merged.region, merged.sent = riders, first.region, now
        for request in riders:
            request.sent, request.todo, request.open, request.carrier = now, request.length, 1, merged
            request.asked = True
            self.queue.popleft()
        return merged

    def _unmerge(self, merged: Request) -> None:
        """It is answered, and so is each that was in it; after an error each is asked for again, for itself."""
        riders, merged.riders = merged.riders, []
        buffer, merged.buffer = merged.buffer, None
        again = []
        for request in riders:
            request.open, request.carrier = 0, None
            if request.answered:
                continue
            if merged.error == wire.ESHUTDOWN:
                request.error = merged.error
                self._finish(request)
                continue
            if merged.error:
                request.begin_again()
                request.alone = True
                again.append(request)
                continue
            if merged.op == _READ:
                assert buffer is not None
                buffer.refs += 1
                request.buffer, request.at = buffer, request.offset - merged.offset
            self._finish(request)
        if buffer is not None:
            self.service.pool.drop(buffer)
        self.queue.extendleft(reversed(again))

    def _meets_ghost(self, request: Request) -> bool:
        end = request.offset + request.length
        return any(request.offset < ghost.at + ghost.length and ghost.at < end for ghost in self._ghosts)

    def abandon(self, request: Request) -> None:
        """It is being answered without the driver, whose answer will mean nothing.

        A write may still be carried out at any moment: until it is settled nobody else may write there, and what is
        there then may be the old, the new, or some of each.
        """
        if request.asked and request.op in WRITING:
            self.watched.unsure(request.offset, request.length)
        if request.open and self.connection is not None:
            for piece in self.connection.pieces.values():
                if piece.request is request or (request.carrier is not None and piece.request is request.carrier):
                    if request.carrier is None:
                        piece.request = None
                    if piece.op in WRITING:
                        self._ghosts.add(piece)

    def begin(self, request: Request, now: float) -> None:
        """The driver is about to be asked for it."""
        request.sent = now
        request.asked = True
        if request.op == _FLUSH:
            request.mark = self.kept.version

    def _ask(self, connection: DriverConnection, request: Request, now: float) -> None:
        op = request.op
        # A status may be answered for less than was asked for, so it is never put together from several.
        most = self.maximum if op in WITH_DATA else request.length if op == _STATUS else _WITHOUT_DATA
        at = request.todo
        size = min(most, request.length - at)
        piece = Piece(request, op, request.offset + at, size, now)
        if op == _READ and LANDS <= size <= ARENA_PIECE and size == request.length:
            self._land(connection, request, piece)
        request.todo = at + size
        request.open += 1
        data: list[memoryview] = []
        if op == _WRITE:
            data = _data(request, at, size)
        if op in WITH_DATA:
            self.under_way += size
        service = self.service
        service.counters.driver_round_trips += 1
        service.recent.append(request)
        service.touched.add(connection)
        try:
            connection.send(service.next_cookie(), piece, request.flags, data)
        except Ended:
            pass  # the loop will see the same, and take what was answered first

    def _land(self, connection: DriverConnection, request: Request, piece: Piece) -> None:
        """Have what is read put where we see it, if there is room."""
        buffer = None if connection.arena is None else connection.arena.take()
        if buffer is None:
            return
        if request.buffer is not None:
            self.service.pool.drop(request.buffer)
        buffer.refs += 1  # the driver's: it may write there until it has answered
        request.buffer = piece.landing = buffer

    def send_own(self, request: Request) -> None:
        """Ask for all of one of our own requests at once, whatever else waits."""
        if self.connection is None:
            request.error = wire.EIO
            self._finish(request)
            return
        if request.watch:
            request.mark = self.watched.expect(request.offset, request.length)
        self.service.register(request)
        self.ask_whole(request)

    def ask_whole(self, request: Request) -> None:
        """Ask for all of a request at once."""
        connection, now = self.connection, monotonic()
        assert connection is not None
        self.begin(request, now)
        while True:
            self._ask(connection, request, now)
            if request.todo >= request.length:
                return

    def flush_kept(self) -> None:
        """Have the driver flush so that less must be kept."""
        if self._own_flush is not None or not len(self.kept):
            return
        request = Request(self, _FLUSH, 0, 0, 0, monotonic())
        request.then = self._own_flushed
        self._own_flush = request
        self._flush_at = math.inf
        self.service.counters.flushes_own += 1
        self.send_own(request)

    @property
    def flushing(self) -> bool:
        """Whether a flush of our own is under way."""
        return self._own_flush is not None

    def _own_flushed(self, request: Request) -> None:
        if self._own_flush is not request:
            return
        self._own_flush = None
        if request.error == wire.ESHUTDOWN:
            if self.away.is_over:  # what waits for this flush would wait for ever
                self.service.give_up_all(wire.ESHUTDOWN, self)
        elif request.error and self.kept.bytes >= KEPT_LIMIT // 2:
            # The device cannot say that it is safe, and we cannot keep more: whoever flushes next is told.
            self.lose(len(self.kept))
            self.kept.covered(request.mark)
        elif request.error:
            self.unsafe += 1  # all of it is kept, and another flush may succeed; but whoever waits for one shall know
        if self.service.pumping:
            self.pump()

    def lose(self, count: int) -> None:
        """Something acknowledged is lost: no FLUSH of those who may have written it succeeds any more."""
        self.lost += 1
        self.watched.doubt_unflushed()
        self.service.counters.kept_lost += count

    # ---- without being asked

    def rest(self) -> None:
        """It is served again: what is kept is flushed when nobody writes any more, and heads are read."""
        self._arm(monotonic())
        self.read_heads()

    def _arm(self, now: float) -> None:
        if self._idle:
            self._flush_at = now + self._idle
            self.service.wake_at(self._flush_at)

    def check(self, now: float) -> None:
        """Do what its time has come for."""
        self.away.check(now)
        if now < self._flush_at < math.inf:
            self.service.wake_at(self._flush_at)
        elif now >= self._flush_at:
            self._flush_at = math.inf
            if not len(self.kept) or not self.service.pumping or self.away.holds or self.connection is None:
                return
            pieces = self.connection.pieces.values()
            if any(piece.op in _CHANGING for piece in pieces) or any(one.op in _CHANGING for one in self.queue):
                self._arm(now)
                return
            self.service.counters.flushes_idle += 1
            self.flush_kept()

    def watch_head(self, offset: int, size: int) -> None:
        """Somebody uses what begins there."""
        self.watched.pin(offset, size)
        if self.service.pumping:
            self.read_heads()

    def read_heads(self) -> None:
        """Read what has not been seen yet of the beginnings by which it is known again."""
        if self.connection is None or self.away.holds:
            return
        block = self.terms.minimum
        for offset, size in self.watched.unseen_heads():
            start, end = offset - offset % block, min(self.size, -(-(offset + size) // block) * block)
            if offset not in self._heads and start < end:
                self._heads.add(offset)
                request = Request(self, _READ, 0, start, end - start, monotonic())
                request.watch = True
                request.then = lambda _, offset=offset: self._heads.discard(offset)
                self.send_own(request)

    # ---- answers

    def room_for(self, piece: Piece, size: int) -> memoryview:
        """Where the next bytes of a read belong."""
        request = piece.request
        if request is None:
            return memoryview(bytearray(size))  # nobody wants it any more
        if request.buffer is None:
            request.buffer = self.service.pool.take(request.length)
        at = piece.at - request.offset + piece.filled
        return request.buffer.view[at : at + size]

    def settled(self, piece: Piece, error: int) -> None:
        """The driver has answered a piece, all of it."""
        self._last_answer = monotonic()
        if piece.op in WITH_DATA:
            self.under_way -= piece.length
        request = piece.request
        if piece.landing is not None:
            self.service.pool.drop(piece.landing)
        if piece in self._ghosts:
            self._ghosts.discard(piece)
            self.watched.unsure(piece.at, piece.length)
        if request is not None:
            request.open -= 1
            request.error = request.error or error
            if not request.error:
                self.away.answered()
            if not request.open and (request.todo >= request.length or request.error):
                self._finish(request)
        if self.queue and self.service.pumping:
            self.pump()

    def _finish(self, request: Request) -> None:
        op = request.op
        if request.riders:
            self._unmerge(request)
            return
        if op == _READ:
            if request.watch and not request.error:
                self._learn(request)
        elif op in WRITING:
            if request.client is not None:
                self._wrote(request)
        elif op == _FLUSH and not request.error:
            self.kept.covered(request.mark)
            self.watched.flushed(request.mark)
        if request.error == wire.ESHUTDOWN:
            if request.client is None:
                self.away.begins(self._last_answer)
            elif self.away.hold(request, self._last_answer):
                return
        self.service.answer(request, request.error)

    def _learn(self, request: Request) -> None:
        """What has been read is metadata, and is to be the same later; unless it was read in the middle of a write."""
        assert request.buffer is not None
        start, end = request.offset, request.offset + request.length
        pieces = self.connection.pieces.values() if self.connection is not None else ()
        for piece in pieces:
            if piece.op in WRITING and piece.at < end and start < piece.at + piece.length:
                # Whether this is from before or after it is nobody's guess, and it may still fail.
                self.watched.unsure(max(start, piece.at), min(end, piece.at + piece.length) - max(start, piece.at))
                return
        seen = Seen(start, request.length, request.buffer, request.at, request.mark, self.kept.within(start, end))
        self.watched.learn_later(seen)
        self.service.readers.add(self)

    def _wrote(self, request: Request) -> None:
        """A client's write is done, or has failed: what must be kept of it, and what is there now."""
        offset, length, buffer = request.offset, request.length, request.buffer
        if request.error:
            self.watched.unsure(offset, length)
            return
        fua = bool(request.flags & _FUA)
        # A FUA write is safe, but it must not be undone by an older one that is written again.
        if self.can_flush and (not fua or len(self.kept)):
            self.kept.add(offset, length, request.op, request.flags & wire.CMD_FLAG_NO_HOLE, buffer)
            self._arm(self._last_answer)
            if self.kept.bytes >= KEPT_LIMIT // 2 and self.connection is not None:
                self.flush_kept()
        if request.op == wire.CMD_TRIM:
            self.watched.unsure(offset, length)
            return
        data = buffer.view[request.at : request.at + length] if buffer is not None else None
        version = self.kept.version if self.can_flush and not fua else None
        self.watched.written(offset, length, data, version=version, flagged=request.watch)

    # ---- time

    def overdue(self, now: float, seconds: float) -> list[Piece]:
        """Pieces that have had no answer for so long, although the driver was not busy with others."""
        if self.connection is None:
            return []
        quiet = now - self._last_answer > seconds
        return [
            piece
            for piece in self.connection.pieces.values()
            if (quiet and now - piece.sent > seconds) or now - piece.sent > _EXTENSIONS * seconds
        ]


def _data(request: Request, at: int, size: int) -> list[memoryview]:
    """What a piece of it writes; what is merged is never cut into pieces."""
    if request.riders:
        return [part for rider in request.riders for part in _data(rider, 0, rider.length)]
    assert request.buffer is not None
    return [request.buffer.view[request.at + at : request.at + at + size]]
