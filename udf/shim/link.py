"""The link to the driver: whole FUSE messages over a SOCK_SEQPACKET socket.

Owns: sending without blocking (what does not fit waits in a queue), receiving one message at a time into one buffer,
and putting together a reply that a splicing driver sent in several packets. It does not look into messages
beyond the header's length and id.
"""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Callable, Container
from time import monotonic

from udf.fuse.opcodes import Opcode
from udf.fuse.structs import BATCH_FORGET_IN, FORGET_IN, FORGET_ONE, IN_HEADER, OUT_HEADER
from udf.shim.window import Window
from udf.window import NoWindow

BUFFER_SIZE = 192 * 1024  # more than the largest reply; a message that fills it was cut and is refused
_FORGETS_AT_ONCE = 4096
QUEUE_LIMIT = 64 << 20  # bytes; past it the driver does not read any more and is as good as dead


def _ignore(wanted: bool) -> None:
    """Before the loop runs, only INIT is sent."""


class LinkClosed(Exception):
    """The driver's end is closed."""


class Link:
    """Our end of one driver generation's link."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self.window: Window | None = None
        self.buffer = bytearray(BUFFER_SIZE)
        self.view = memoryview(self.buffer)
        self._buffers = [self.buffer]
        self._queue: deque[bytes] = deque()
        self._queued = 0
        self.wants_writable: Callable[[bool], None] = _ignore  # told when there is a queue to flush, or none any more
        self._partial: bytearray | None = None
        self.partial_since = 0.0  # when the reply that is incomplete began
        self.mixed = False  # packets of two replies have come in turn
        self._given_up = False

    def take_window(self, fds: list[int]) -> str:
        """Map the window that came with the link, if one did. Returns why that cannot be done; "" if nothing is wrong.

        Without it the driver's answers would mean nothing.
        """
        if not fds:
            return ""
        fd = fds.pop(0)
        try:
            self.window = Window(fd)
        except (NoWindow, OSError) as error:
            return f"the driver's window cannot be mapped: {error}"
        finally:
            os.close(fd)
        return ""

    def send(self, message: memoryview | bytes | bytearray) -> None:
        """Send one message, or queue it. A closed link swallows it: the end of file tells, once."""
        if self._given_up:
            return
        if self._queue:
            self._enqueue(message)
            return
        try:
            os.write(self.fd, message)
        except BlockingIOError:
            self._enqueue(message)
            self.wants_writable(True)
        except OSError:
            pass

    def _enqueue(self, message: memoryview | bytes | bytearray) -> None:
        self._queued += len(message)
        if self._queued > QUEUE_LIMIT:
            raise LinkClosed("the driver has stopped reading its link")
        self._queue.append(bytes(message))

    def flush(self) -> None:
        """Send what is queued, as far as the socket takes it."""
        queue = self._queue
        while queue:
            try:
                os.write(self.fd, queue[0])
            except BlockingIOError:
                return
            except OSError:
                queue.clear()
                break
            self._queued -= len(queue.popleft())
        self._queued = 0
        self.wants_writable(False)

    def send_forgets(self, forgets: list[tuple[int, int]]) -> None:
        """Tell the driver of *forgets* (its node id, count) and empty the list."""
        while forgets:
            if len(forgets) == 1:
                node, count = forgets.pop()
                self.send(
                    IN_HEADER.pack(IN_HEADER.size + FORGET_IN.size, Opcode.FORGET, 0, node, 0, 0, 0, 0)
                    + FORGET_IN.pack(count)
                )
                return
            batch = forgets[:_FORGETS_AT_ONCE]
            del forgets[:_FORGETS_AT_ONCE]
            body = BATCH_FORGET_IN.pack(len(batch)) + b"".join(FORGET_ONE.pack(*one) for one in batch)
            self.send(IN_HEADER.pack(IN_HEADER.size + len(body), Opcode.BATCH_FORGET, 0, 0, 0, 0, 0, 0) + body)

    def receive(self, known: Container[int]) -> int:
        """Receive one message into `buffer` and return its length; 0 if there is none (yet), -1 for an empty packet.

        A packet shorter than its header says is the beginning of a reply in several packets. It is waited for only
        as long as no packet comes that is the beginning of another reply to a request in *known*: then what follows
        cannot be told apart any more, here and whenever the driver's threads meet again. The link is `mixed` from
        then on, and takes nothing but whole replies. Raises LinkClosed.
        """
        try:
            size = os.readv(self.fd, self._buffers)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise LinkClosed(str(error)) from error
        if size == 0:
            if not self._hung_up():
                return -1
            raise LinkClosed("the driver closed its link")
        if self._partial is None:
            if size >= OUT_HEADER.size:
                length = int.from_bytes(self.buffer[:4], "little")
                if size < length < BUFFER_SIZE and not self.mixed:
                    self._partial = self.buffer[:size]
                    self.partial_since = monotonic()
                    return 0
            return size
        return self._continue(size, known)

    def _continue(self, size: int, known: Container[int]) -> int:
        assert self._partial is not None
        partial = self._partial
        wanted = int.from_bytes(partial[:4], "little")
        if size >= OUT_HEADER.size:
            length, _, unique = OUT_HEADER.unpack_from(self.buffer)
            if length == size and (not unique or unique in known):
                return size  # a whole message of another thread's, in between
            if size < length < BUFFER_SIZE and unique in known:
                self.mixed = True
                return size  # the caller gives up both
        if len(partial) + size > wanted:
            return size
        partial += self.view[:size]
        if len(partial) < wanted:
            return 0
        self.buffer[:wanted] = partial
        self._partial = None
        return wanted

    def _hung_up(self) -> bool:
        """Whether the other end is closed; the end of file looks like an empty packet."""
        poll = select.poll()
        poll.register(self.fd, select.POLLRDHUP)
        return bool(poll.poll(0))

    def take_broken(self) -> int | None:
        """Give up a reply that never became whole; returns the id it was for."""
        if self._partial is None:
            return None
        unique: int = OUT_HEADER.unpack_from(self._partial)[2]
        self._partial = None
        return unique

    @property
    def incomplete(self) -> bool:
        """Whether a reply in several packets is being waited for."""
        return self._partial is not None

    def give_up(self) -> None:
        """Send nothing any more: the driver is gone, or does not read."""
        self._given_up = True
        self._queue.clear()
        self._queued = 0
        self._partial = None

    def close(self) -> None:
        """Close our end."""
        os.close(self.fd)
        if self.window is not None:
            self.window.close()
