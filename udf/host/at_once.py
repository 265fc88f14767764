"""Reads that are answered before libfuse sees them: of what the driver has in memory.

Owns: looking at the next request of the link without taking it; taking and answering it if it is a READ and the
driver's `read_now` knows the bytes. pyfuse3 makes a coroutine, a task's turn and a call into C of every request, which
costs more than to carry 128 KiB from one process to the next: a driver that reads ahead is twice as fast without.
Must never: take what it does not answer, wait for anything but room on the link, or let a driver's mistake through:
whatever `read_now` does wrong, the request is left to `read`, where the guard reports it.
Called by: pump.py, when it waits for the next request.
"""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Callable
from enum import Enum
from functools import partial

from udf.fuse.opcodes import Opcode
from udf.fuse.structs import IN_HEADER, OUT_HEADER, READ_IN

Buffer = bytes | bytearray | memoryview
Answer = Callable[[Buffer | OSError], None]
ReadNow = Callable[[int, int, int, Answer], Buffer | bool]
"""Takes handle, offset and size, and how to answer later. Answers with the bytes, fewer only at the end of the file,
which may change as soon as anything is awaited; with True: they are on their way, and the driver will answer (it must);
or with False: to be read by `read`."""

_HEAD = IN_HEADER.size + READ_IN.size
_READ = int(Opcode.READ)
_LOOK = int(socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_TRUNC)  # plain numbers: flags of an enum are slow
_TAKE = int(socket.MSG_DONTWAIT)
_SEND = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


class Found(Enum):
    """What was on the link."""

    NOTHING = 0
    ANSWERED = 1
    OTHER = 2  # it is still there, for libfuse


class AtOnce:
    """The answers of one session."""

    def __init__(self, link: int, read_now: ReadNow) -> None:
        self._link = socket.socket(fileno=link)
        self._read_now = read_now
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
        try:
            data = self._read_now(handle, offset, wanted, answer)
            if data is True:
                self.waiting += 1
            elif data is False or len(data) > wanted:
                return Found.OTHER
        except Exception:
            return Found.OTHER
        link.recv_into(head, _HEAD, _TAKE)
        if data is not True:
            self._send(unique, 0, data)
        return Found.ANSWERED

    def _answer(self, unique: int, wanted: int, data: Buffer | OSError) -> None:
        """What the driver has said later."""
        self.waiting -= 1
        if isinstance(data, OSError):
            self._send(unique, -(data.errno or errno.EIO), b"")
        elif len(data) > wanted:
            self._send(unique, -errno.EIO, b"")
        else:
            self._send(unique, 0, data)

    def _send(self, unique: int, error: int, data: Buffer) -> None:
        OUT_HEADER.pack_into(self._reply, 0, OUT_HEADER.size + len(data), error, unique)
        while True:
            try:
                self._link.sendmsg((self._reply, data), (), _SEND)
                return
            except BlockingIOError:  # the shim takes what there is, whatever it does: it never waits for a driver
                poll = select.poll()
                poll.register(self._link, select.POLLOUT)
                poll.poll()
            except OSError as exc:
                if exc.errno in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
                    return  # the link has ended, which libfuse will see
                raise
