"""Reading ahead: what a program that reads a file from one end to the other will want next is on its way already.

Owns: when reading looks sequential, how far ahead is read, and the pieces that were read and not asked for yet.
Must never: hold more than its bounds, answer with bytes from before a write, or keep a piece that was read past.
Called by: contents.py.

A few large commands are under way or done at any time: the device works while the program, the shim and the kernel do
what they do with the piece before. What is in memory is answered without waiting for anything.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from udf import Window

    from .volume import Volume

_FIRST = 256 * 1024  # bytes of the first piece; each further one is twice as long, up to
LARGEST = 2 * 1024 * 1024
_PIECES = 2  # of one file that are under way or untouched
_SLACK = 1024 * 1024  # the kernel asks for many pieces at once, and the later ones may come first
TOTAL = 16 * 1024 * 1024  # of all files
_SPARE = 4  # buffers that are kept for the next pieces: new memory costs as much as to fill it

Fetch = Callable[[int, memoryview], Awaitable[None]]
"""Reads what is at an offset of the file, and fills the buffer with it."""

Later = Callable[[list[memoryview] | None], None]
"""Takes bytes, which are valid until anything is awaited; None: they have to be read anew."""


class Buffers:
    """Memory of `LARGEST` bytes each, if possible such as the mount's shim has too."""

    def __init__(self, window: Window | None) -> None:
        self._window = window
        self._spare: list[memoryview] = []

    def take(self) -> memoryview:
        """One that is free."""
        taken = None if self._window is None else self._window.take()
        if taken is not None:
            return taken
        return self._spare.pop() if self._spare else memoryview(bytearray(LARGEST))

    def give_back(self, buffer: memoryview) -> None:
        """It is of no use any more."""
        if self._window is not None and self._window.span(buffer) is not None:
            self._window.give_back(buffer)
        elif len(self._spare) < _SPARE:
            self._spare.append(buffer)


class Piece:
    """A range of the file that was asked for ahead."""

    __slots__ = ("begin", "buffer", "data", "done", "end", "lost", "waiting")

    def __init__(self, begin: int, end: int) -> None:
        self.begin = begin
        self.end = end
        self.buffer: memoryview | None = None
        self.data: memoryview | None = None  # of the buffer, when it has come
        self.waiting: list[tuple[list[Part], Later]] = []  # who wants something of it
        self.done: trio.Event | None = trio.Event()
        self.lost = False  # its bytes are not those of the file any more, or never came


Part = tuple[Piece, int, int]  # where in it something begins and ends


class Ahead:
    """The pieces of one file."""

    __slots__ = ("_fetch", "_length", "_next", "_pieces", "_volume", "_window")

    def __init__(self, volume: Volume, fetch: Fetch) -> None:
        self._volume = volume
        self._fetch = fetch
        self._pieces: list[Piece] = []  # neighbours, in order
        self._next = 0  # where reading goes on if it is sequential
        self._window = _FIRST
        self._length = 0

    def drop(self) -> None:
        """The file has changed, or nobody reads it any more."""
        for piece in self._pieces:
            self._forget(piece)
        self._pieces = []
        self._window = _FIRST

    def _forget(self, piece: Piece) -> None:
        piece.lost = True
        if piece.buffer is not None:
            self._volume.buffers.give_back(piece.buffer)
        piece.buffer = piece.data = None
        self._volume.read_ahead -= piece.end - piece.begin

    async def read(self, offset: int, size: int, length: int) -> bytes | bytearray:
        """These bytes, of a file that is *length* bytes long; the range is within it."""
        self._length = length
        expected = self._next
        end = self._next = offset + size
        if offset == expected:
            self._reach(end)
        parts: list[bytes | bytearray] = []
        for piece in self._pieces:
            if piece.begin <= offset < piece.end:
                if piece.done is not None:
                    self._go_on(offset)
                    await piece.done.wait()
                data = piece.data
                if data is None:
                    break
                part = bytes(data[offset - piece.begin : end - piece.begin])
                parts.append(part)
                offset += len(part)
                if offset == end:
                    break
        if parts:
            self._go_on(offset)
        elif offset in (expected, 0):
            self._start(end)
        elif self._pieces and not self._pieces[0].begin - _SLACK <= offset <= self._pieces[-1].end:
            self.drop()
        if offset < end:
            rest = bytearray(end - offset)
            await self._fetch(offset, memoryview(rest))
            parts.append(rest)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_now(self, offset: int, size: int, length: int, later: Later) -> list[memoryview] | bool:
        """These bytes, if they lie in pieces; True: when they have come. False: they are to be read as ever."""
        end = offset + size
        if offset == self._next:
            self._length = length
            self._reach(end)
        parts: list[Part] = []
        at = offset
        for piece in self._pieces:
            if piece.begin <= at < piece.end:
                upto = min(end, piece.end)
                parts.append((piece, at - piece.begin, upto - piece.begin))
                at = upto
                if at == end:
                    break
        if at < end or not parts:
            return False
        self._length = length
        self._next = end
        for piece, _, _ in parts:
            if piece.data is None:
                piece.waiting.append((parts, later))
                self._go_on(offset)
                return True
        data = [piece.data[begin:end] for piece, begin, end in parts if piece.data is not None]
        self._go_on(offset + size)
        return data

    @staticmethod
    def _has_come(parts: list[Part], later: Later) -> None:
        """A piece that was waited for is there, or will not be."""
        data = []
        for piece, begin, end in parts:
            if piece.lost:
                later(None)
                return
            if piece.data is None:
                piece.waiting.append((parts, later))
                return
            data.append(piece.data[begin:end])
        later(data)

    def _start(self, offset: int) -> None:
        """Read on from here, a little at first."""
        self.drop()
        if offset < self._length:
            self._ask(offset)

    def _reach(self, end: int) -> None:
        """The program wants all up to here: the kernel asks for many pieces at once."""
        pieces = self._pieces
        while pieces and pieces[-1].end < end and self._ask(pieces[-1].end):
            pass

    def _go_on(self, offset: int) -> None:
        """The program has come this far: let go what is behind it, and keep enough before it.

        What is being answered is not behind it: the slack is larger than any request.
        """
        pieces = self._pieces
        while pieces and pieces[0].end + _SLACK <= offset:
            self._forget(pieces.pop(0))
        if not pieces:
            return
        untouched = sum(piece.begin > offset or piece.done is not None for piece in pieces)
        while untouched < _PIECES and pieces[-1].end < self._length:
            if not self._ask(pieces[-1].end):
                return
            untouched += 1

    def _ask(self, begin: int) -> bool:
        size = min(self._window, self._length - begin)
        if self._volume.read_ahead + size > TOTAL:
            return False
        self._window = min(2 * self._window, LARGEST)
        piece = Piece(begin, begin + size)
        self._volume.read_ahead += size
        self._pieces.append(piece)
        self._volume.spawn(self._load, piece)
        return True

    async def _fill(self, piece: Piece, buffer: memoryview) -> None:
        data = buffer[: piece.end - piece.begin]
        try:
            await self._fetch(piece.begin, data)
        except Exception:  # not if it was cancelled: then what comes yet may still be put there
            self._volume.buffers.give_back(buffer)
            raise
        if piece.lost:
            self._volume.buffers.give_back(buffer)
        else:
            piece.buffer, piece.data = buffer, data

    async def _load(self, piece: Piece) -> None:
        try:
            if not piece.lost:
                await self._fill(piece, self._volume.buffers.take())
        finally:
            done, piece.done = piece.done, None
            if piece.data is None and piece in self._pieces:
                self._pieces.remove(piece)
                self._forget(piece)
            piece.lost = piece.data is None
            if done is not None:
                done.set()
            waiting, piece.waiting = piece.waiting, []
            for parts, later in waiting:
                self._has_come(parts, later)
