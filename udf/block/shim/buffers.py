"""Buffers for payload, used again: a fresh one of 256 KiB costs more in page faults than the copy into it.

Owns: which buffers lie idle. Must never: hand out one that somebody still reads; who takes a buffer counts its
readers in `refs`, and the last one gives it back.
"""

from __future__ import annotations

_SMALLEST = 9  # 512 bytes
_IDLE_LIMIT = 80 << 20  # bytes that lie idle at most; all of them are let go when nothing is asked for


class Buffer:
    """Memory for one request's payload; larger than that by less than half."""

    __slots__ = ("capacity", "refs", "view")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.view = memoryview(bytearray(capacity))
        self.refs = 1


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
        return Buffer(1 << order)

    def drop(self, buffer: Buffer) -> None:
        """One reader less."""
        buffer.refs -= 1
        if not buffer.refs and self.idle_bytes + buffer.capacity <= _IDLE_LIMIT:
            self._idle.setdefault(buffer.capacity.bit_length() - 1, []).append(buffer)
            self.idle_bytes += buffer.capacity

    def clear(self) -> None:
        """Let go of what lies idle."""
        self._idle.clear()
        self.idle_bytes = 0
