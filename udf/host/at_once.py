"""Reads that are answered before libfuse sees them: of what the driver has in memory, and all large ones.

Owns: looking at the next request of the link without taking it; taking and answering it if it is a READ and the
driver's `read_now` knows the bytes. pyfuse3 makes a coroutine, a task's turn and a call into C of every request, which
costs more than to carry 128 KiB from one process to the next: a driver that reads ahead is twice as fast without.
Through a window reads are larger than a message may be: of these libfuse sees none, and `read` is called from here.
Must never: take what it does not answer, wait for anything but the shim, or let a driver's mistake through:
whatever `read_now` does wrong, the request is left to `read`, where the guard reports it.
Called by: pump.py, when it waits for the next request.
"""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Awaitable, Callable
from enum import Enum
from functools import partial
from time import sleep

import pyfuse3

from udf.driver.window import Window
from udf.fuse.opcodes import Opcode
from udf.fuse.structs import IN_HEADER, OUT_HEADER, READ_IN
from udf.window import IN_WINDOW, MAX_SPANS, SPAN

Buffer = bytes | bytearray | memoryview
Data = Buffer | list[memoryview]
Answer = Callable[[Data | OSError], None]
ReadNow = Callable[[int, int, int, Answer], Data | bool]
"""Takes handle, offset and size, and how to answer later. Answers with the bytes, in one piece or several, fewer only
at the end of the file, which may change as soon as anything is awaited; with True: they are on their way, and the
driver will answer (it must); or with False: to be read by `read`."""
Read = Callable[[int, int, int], Awaitable[bytes]]

_HEAD = IN_HEADER.size + READ_IN.size
_READ = int(Opcode.READ)
_LOOK = int(socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_TRUNC)  # plain numbers: flags of an enum are slow
_TAKE = int(socket.MSG_DONTWAIT)
_SEND = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_MESSAGE = 128 * 1024  # bytes that a message carries
_POINTED_AT = 16 * 1024  # bytes from which on it is cheaper to point at them
_MOMENT = 0.0002  # seconds in which the shim deals with an answer


class Found(Enum):
    """What was on the link."""

    NOTHING = 0
    ANSWERED = 1
    OTHER = 2  # it is still there, for libfuse


class AtOnce:
    """The answers of one session."""

    def __init__(self, link: int, read_now: ReadNow, read: Read, window: Window | None) -> None:
        """`read` is what pyfuse3 would call."""
        self._link = socket.socket(fileno=link)
        self._read_now = read_now
        self._read = read
        self._window = window
        self.spawn: Callable[[Callable[[], Awaitable[None]]], None]  # runs a handler beside pyfuse3's
        self._head = bytearray(_HEAD)
        self._reply = bytearray(OUT_HEADER.size)
        self.waiting = 0  # answers that the driver owes

    def close(self) -> None:
        """Let the link be: it is libfuse's."""
        self._link.detach()

    def look(self) -> Found:
        """Answer the next request, if it is there and can be answered."""
        link, head = self._link, self._head
        try:
            size = link.recv_into(head, _HEAD, _LOOK)
        except BlockingIOError:
            return Found.NOTHING
        except OSError:
            return Found.OTHER  # libfuse will see what it is
        if size != _HEAD:
            return Found.OTHER
        _, op, unique, *_ = IN_HEADER.unpack_from(head)
        if op != _READ:
            return Found.OTHER
        handle, offset, wanted, *_ = READ_IN.unpack_from(head, IN_HEADER.size)
        answer = partial(self._answer, unique, wanted)
        data: Data | bool
        try:
            data = self._read_now(handle, offset, wanted, answer)
            if not isinstance(data, bool) and _size(data) > wanted:
                data = False
        except Exception:
            data = False
        if data is False:
            if wanted <= _MESSAGE or self._window is None:
                return Found.OTHER
            self.spawn(partial(self._as_ever, handle, offset, wanted, answer))
        link.recv_into(head, _HEAD, _TAKE)
        if isinstance(data, bool):
            self.waiting += 1
        else:
            self._send(unique, data)
        return Found.ANSWERED

    async def _as_ever(self, handle: int, offset: int, size: int, answer: Answer) -> None:
        """What is too large for libfuse."""
        try:
            data = await self._read(handle, offset, size)
        except pyfuse3.FUSEError as exc:
            answer(OSError(exc.errno, ""))
        except BaseException:
            answer(OSError(errno.EIO, ""))
            raise
        else:
            answer(data)

    def _answer(self, unique: int, wanted: int, data: Data | OSError) -> None:
        """What the driver has said later."""
        self.waiting -= 1
        if isinstance(data, OSError):
            self._refuse(unique, data.errno or errno.EIO)
        elif _size(data) > wanted:
            self._refuse(unique, errno.EIO)
        else:
            self._send(unique, data)

    def _refuse(self, unique: int, error: int) -> None:
        OUT_HEADER.pack_into(self._reply, 0, OUT_HEADER.size, -error, unique)
        self._put((self._reply,))

    def _send(self, unique: int, data: Data) -> None:
        parts = data if isinstance(data, list) else [data]
        size = _size(data)
        window = self._window
        spans = None
        if window is not None and size >= _POINTED_AT:
            spans = _spans(window, parts)
            if spans is None and size > _MESSAGE:
                parts = self._stage(window, parts, size)
                spans = _spans(window, parts)
        if spans is None:
            OUT_HEADER.pack_into(self._reply, 0, OUT_HEADER.size + size, 0, unique)
            self._put((self._reply, *parts))
        else:
            assert window is not None
            OUT_HEADER.pack_into(self._reply, 0, OUT_HEADER.size + len(spans), IN_WINDOW, unique)
            self._put((self._reply, spans))
            window.answered()

    def _stage(self, window: Window, parts: list[Buffer] | list[memoryview], size: int) -> list[memoryview]:
        """Copy an answer into the window; there is room as soon as the shim has dealt with one before."""
        while (stage := window.stage()) is None:
            if self._has_ended():
                return []
            sleep(_MOMENT)  # the shim never waits for a driver, and nothing tells
        at = 0
        for part in parts:
            stage[at : at + len(part)] = part
            at += len(part)
        return [stage[:size]]

    def _has_ended(self) -> bool:
        poll = select.poll()
        poll.register(self._link, 0)
        return bool(poll.poll(0))

    def _put(self, message: tuple[Buffer, ...]) -> None:
        while True:
            try:
                self._link.sendmsg(message, (), _SEND)
                return
            except BlockingIOError:  # the shim takes what there is, whatever it does: it never waits for a driver
                poll = select.poll()
                poll.register(self._link, select.POLLOUT)
                poll.poll()
            except OSError as exc:
                if exc.errno in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
                    return  # the link has ended, which libfuse will see
                raise


def _size(data: Data) -> int:
    return sum(map(len, data)) if isinstance(data, list) else len(data)


def _spans(window: Window, parts: list[Buffer] | list[memoryview]) -> bytes | None:
    """Where an answer lies; None if it does not lie in the window."""
    if len(parts) > MAX_SPANS:
        return None
    spans = [window.span(part) if isinstance(part, memoryview) else None for part in parts]
    if not all(spans):
        return None
    return b"".join([SPAN.pack(*span) for span in spans if span is not None])
