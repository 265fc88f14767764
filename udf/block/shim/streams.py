"""Both directions of a stream socket without blocking, with as few system calls and copies as possible.

Owns: what has come and is not taken yet, what is to be sent and has not been taken by the kernel. Must never: know what
the bytes mean.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable

from udf.block.landing import Descriptors

_AT_ONCE = 64  # pieces in one sendmsg
EAGER = 64 * 1024  # bytes that are not left for the end of the loop's turn


class Ended(Exception):
    """The other end is closed, or as good as closed."""


class Inbox:
    """What has come. Headers are looked at in `buffer` from `start` to `end`; bodies go right to where they belong."""

    __slots__ = ("_at", "_sock", "_target", "_view", "buffer", "descriptors", "drained", "end", "start")

    def __init__(self, sock: socket.socket, size: int) -> None:
        self._sock = sock
        self.buffer = bytearray(size)
        self._view = memoryview(self.buffer)
        self.start = self.end = 0
        self._target: memoryview | None = None
        self._at = 0
        self.descriptors: Descriptors | None = None  # that have come; None: none are taken
        self.drained = False  # the last call got less than it had room for: there is no more for now

    @property
    def whole(self) -> bool:
        """Whether no body is being received."""
        return self._target is None

    def fill(self) -> bool:
        """Receive what is there, as far as there is room. False: there was nothing. Raises Ended."""
        target = self._target
        try:
            if target is None:
                if self.start:
                    left = self.end - self.start
                    self.buffer[:left] = self.buffer[self.start : self.end]
                    self.start, self.end = 0, left
                room = len(self.buffer) - self.end
                room_left, came = self._view[self.end :], self.descriptors
                size = self._sock.recv_into(room_left) if came is None else came.receive(self._sock, room_left)
                self.end += size
            else:
                # What follows the body comes with it: mostly the next header, which saves a call.
                rest = target[self._at :]
                room = len(rest) + len(self.buffer)
                size = self._sock.recvmsg_into((rest, self._view))[0]
                if size >= len(rest):
                    self.end = size - len(rest)
                    self._target = None
                else:
                    self._at += size
        except (BlockingIOError, InterruptedError):
            self.drained = True
            return False
        except OSError as error:
            raise Ended(str(error)) from None
        if not size:
            raise Ended("end of file")
        self.drained = size < room
        return True

    def drop_descriptors(self) -> None:
        """Take no descriptors any more, and close those that have come."""
        if self.descriptors is not None:
            self.descriptors.drop()
            self.descriptors = None

    def receive(self, target: memoryview) -> bool:
        """Receive a body into *target*; whether it is there already. If not it is when `whole` is true again."""
        have = self.end - self.start
        size = len(target)
        if have >= size:
            target[:] = self._view[self.start : self.start + size]
            self.start += size
            return True
        target[:have] = self._view[self.start : self.end]
        self.start = self.end = 0
        self._target, self._at = target, have
        return False

    def take(self, size: int) -> bytes:
        """Take so many bytes, which must be there."""
        piece = bytes(self._view[self.start : self.start + size])
        self.start += size
        return piece


class Outbox:
    """What is to be sent, in order. `sent` is told each token when all that was pushed before it has been sent."""

    __slots__ = ("_queue", "_sock", "blocked", "queued", "sent")

    def __init__(self, sock: socket.socket, sent: Callable[[object], None]) -> None:
        self._sock = sock
        self._queue: deque[tuple[bytes | memoryview, object]] = deque()
        self.queued = 0
        self.blocked = False  # the kernel takes no more for now
        self.sent = sent

    def push(self, piece: bytes | memoryview, token: object = None) -> None:
        """Add one piece; *token* is told of once it is sent."""
        self._queue.append((piece, token))
        self.queued += len(piece)

    def flush(self) -> None:
        """Send as much as the kernel takes. Raises Ended."""
        queue = self._queue
        self.blocked = False
        while queue:
            pieces = [queue[i][0] for i in range(min(len(queue), _AT_ONCE))]
            try:
                size = self._sock.sendmsg(pieces)
            except (BlockingIOError, InterruptedError):
                self.blocked = True
                return
            except OSError as error:
                raise Ended(str(error)) from None
            self.queued -= size
            for piece in pieces:
                if size < len(piece):
                    queue[0] = (memoryview(piece)[size:], queue[0][1])
                    self.blocked = True
                    return
                size -= len(piece)
                token = queue.popleft()[1]
                if token is not None:
                    self.sent(token)

    def drop(self) -> list[object]:
        """Send nothing any more; returns the tokens that will not be told."""
        tokens = [token for _, token in self._queue if token is not None]
        self._queue.clear()
        self.queued = 0
        return tokens
