"""A scripted device at the other end of a socket: says exactly what a test wants said, right or wrong."""

from __future__ import annotations

import contextlib
import errno
import queue
import socket
import threading
from collections.abc import Callable, Iterator

from udf.usb import usbip
from udf.usb.client import Connection

Answer = tuple[int, bytes | int]  # a status, and the data of an IN or the count of an OUT
Handler = Callable[[usbip.Submit, bytes], Answer | None]


class Peer:
    """Answers URBs by a handler; what the handler leaves open (None) is answered later or unlinked."""

    def __init__(self, sock: socket.socket, handler: Handler) -> None:
        self.sock = sock
        self.handler = handler
        self.submits: queue.Queue[usbip.Submit] = queue.Queue()
        self.unlinks: queue.Queue[int] = queue.Queue()
        self.open: dict[int, usbip.Submit] = {}
        self.answers_unlinks = True
        self.partial = b""  # what an unlinked IN has already got
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                header = self._receive(usbip.URB_SIZE)
                if usbip.code_of(header) == usbip.CMD_UNLINK:
                    self._unlink(*usbip.unpack_unlink(header))
                    continue
                submit = usbip.unpack_submit(header)
                data = self._receive(submit.length) if submit.direction == usbip.DIRECTION_OUT else b""
                data += self._receive(usbip.ISO_PACKET.size * submit.packets) if submit.packets > 0 else b""
                self.open[submit.seqnum] = submit
                self.submits.put(submit)
                answer = self.handler(submit, data)
                if answer is not None:
                    self.answer(submit, *answer)

    def _unlink(self, seqnum: int, unlinked: int) -> None:
        self.unlinks.put(unlinked)
        if not self.answers_unlinks:
            return
        submit = self.open.get(unlinked)
        if submit is not None and self.partial:
            self.answer(submit, -errno.ECONNRESET, self.partial)
            submit = None
        self.open.pop(unlinked, None)
        self.say(usbip.pack_ret_unlink(seqnum, -errno.ECONNRESET if submit else 0))

    def answer(self, submit: usbip.Submit, status: int, data: bytes | int = b"") -> None:
        self.open.pop(submit.seqnum, None)
        actual, body = (data, b"") if isinstance(data, int) else (len(data), data)
        self.say(usbip.RetSubmit(submit.seqnum, status, actual).pack() + body)

    def say(self, data: bytes) -> None:
        with self.lock:
            self.sock.sendall(data)

    def _receive(self, size: int) -> bytes:
        data = self.sock.recv(size, socket.MSG_WAITALL) if size else b""
        if len(data) < size:
            raise EOFError
        return data

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def scripted(handler: Handler) -> Iterator[tuple[Connection, Peer]]:
    """A connection and the device at its other end."""
    ours, theirs = socket.socketpair()
    peer = Peer(theirs, handler)
    connection = Connection(ours, devid=0x10002)
    try:
        yield connection, peer
    finally:
        connection.close()
        peer.hang_up()
        peer.thread.join(10)
        theirs.close()
        assert not peer.thread.is_alive()


def echo(submit: usbip.Submit, data: bytes) -> Answer:
    """OUT is taken whole, IN is filled with the low byte of its number."""
    if submit.direction == usbip.DIRECTION_OUT:
        return 0, submit.length
    return 0, bytes([submit.seqnum & 0xFF]) * submit.length


def silent(submit: usbip.Submit, data: bytes) -> None:
    """Never answers."""
