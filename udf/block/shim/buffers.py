"""Buffers for payload, used again: a fresh one of 256 KiB costs more in page faults than the copy into it.

Owns: which buffers lie idle. Must never: hand out one that somebody still reads; who takes a buffer counts its
readers in `refs`, and the last one gives it back.
"""

from __future__ import annotations

import os

from udf.window import HEAD, Mapped, create_window

ARENA_PIECE = 2 << 20  # bytes of a driver's answer that lands in its arena at most
_ARENA = 4 * ARENA_PIECE
_SMALLEST = 9  # 512 bytes
_IDLE_LIMIT = 80 << 20  # bytes that lie idle at most; all of them are let go when nothing is asked for


class Buffer:
    """Memory for one request's payload; larger than that by less than half."""

    __slots__ = ("arena", "capacity", "place", "refs", "view")

    def __init__(self, view: memoryview, arena: Arena | None = None, place: int = 0) -> None:
        self.capacity = len(view)
        self.view = view
        self.refs = 1
        self.arena = arena  # whose it is, if it is not the pool's
        self.place = place  # in the arena's window


class Arena:
    """Memory that the driver has too, for one connection (udf/window.py): it puts there what is read."""

    def __init__(self, name: str) -> None:
        """Raises OSError, NoWindow."""
        self.fd = create_window(name, _ARENA)
        try:
            mapped = Mapped(self.fd)
        except BaseException:
            os.close(self.fd)
            raise
        places = range(HEAD, HEAD + _ARENA, ARENA_PIECE)
        self._idle = [Buffer(mapped.piece(place, ARENA_PIECE), self, place) for place in places]
        self._is_over = False

    def sent(self) -> None:
        """The other side has the descriptor."""
        os.close(self.fd)

    def take(self) -> Buffer | None:
        """Return a buffer of `ARENA_PIECE` bytes, with one reader; None: all are in use."""
        if not self._idle:
            return None
        buffer = self._idle.pop()
        buffer.refs = 1
        return buffer

    def drop(self, buffer: Buffer) -> None:
        """It has no reader any more."""
        if not self._is_over:
            self._idle.append(buffer)

    def end(self) -> None:
        """The connection has ended: what nobody reads can go, and the rest goes when it is read."""
        self._is_over = True
        self._idle.clear()


class Pool:
    """Buffers by the power of two of their capacity."""

    def __init__(self) -> None:
        self._idle: dict[int, list[Buffer]] = {}
        self.idle_bytes = 0

    def take(self, size: int) -> Buffer:
        """Return a buffer of at least *size* bytes, with one reader."""
        order = max(_SMALLEST, (size - 1).bit_length())
        idle = self._idle.get(order)
        if idle:
            buffer = idle.pop()
            self.idle_bytes -= buffer.capacity
            buffer.refs = 1
            return buffer
        return Buffer(memoryview(bytearray(1 << order)))

    def drop(self, buffer: Buffer) -> None:
        """One reader less."""
        buffer.refs -= 1
        if buffer.arena is not None:
            if not buffer.refs:
                buffer.arena.drop(buffer)
        elif not buffer.refs and self.idle_bytes + buffer.capacity <= _IDLE_LIMIT:
            self._idle.setdefault(buffer.capacity.bit_length() - 1, []).append(buffer)
            self.idle_bytes += buffer.capacity

    def clear(self) -> None:
        """Let go of what lies idle."""
        self._idle.clear()
        self.idle_bytes = 0
