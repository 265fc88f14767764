"""A driver that breaks the rules. Arguments: the link, then what it does wrong.

Everything but that is right: it is an NBD server with one unit of 1 MiB, one request after the other.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading

from udf.block import wire

SIZE = 1 << 20


class Session:
    def __init__(self, sock: socket.socket, wrong: str) -> None:
        self.sock = sock
        self.wrong = wrong

    def take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.sock.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def reply(self, option: int, kind: int, payload: bytes = b"") -> None:
        self.sock.sendall(wire.pack_option_reply(option, kind, payload))

    def serve(self) -> None:
        wrong = self.wrong
        if wrong == "greeting":
            self.sock.sendall(os.urandom(4096))
            return
        if wrong == "silent":
            self.take(1 << 20)
        self.sock.sendall(wire.GREETING.pack(wire.NBD_MAGIC, wire.OPTION_MAGIC, 3))
        self.take(4)
        while True:
            _, option, size = wire.OPTION.unpack(self.take(16))
            self.take(size)
            if option == wire.OPT_LIST:
                if wrong == "none":
                    self.reply(option, wire.REP_ERR_POLICY)
                names = [f"u{i}" for i in range(1000)] if wrong == "names" else ["", ""] if wrong == "twice" else [""]
                for name in names:
                    self.reply(option, wire.REP_SERVER, wire.pack_text(name))
                if wrong == "long":
                    self.sock.sendall(struct.pack(">QIII", wire.OPTION_REPLY_MAGIC, option, 2, 1 << 31))
                self.reply(option, wire.REP_ACK)
            elif option == wire.OPT_GO:
                size = (1 << 64) - 1 if wrong == "size" else SIZE
                self.reply(option, wire.REP_INFO, wire.EXPORT_INFO.pack(0, size, 1 | wire.SEND_FLUSH))
                self.reply(option, wire.REP_ACK)
                break
            elif option == wire.OPT_ABORT:
                return
            elif option == wire.OPT_STRUCTURED_REPLY:
                self.reply(option, wire.REP_ACK)
            else:
                self.reply(option, wire.REP_ERR_UNSUP)
        while True:
            self.request()

    def chunk(self, kind: int, cookie: int, payload: bytes, done: bool = True) -> bytes:
        return wire.pack_chunk(kind, cookie, payload, done=done)

    def request(self) -> None:
        _, _, op, cookie, offset, length = wire.REQUEST.unpack(self.take(28))
        wrong = self.wrong if offset >= 65536 or op != wire.CMD_READ else ""
        if op == wire.CMD_WRITE:
            self.take(length)
        if wrong == "cookie":
            cookie += 1
        if wrong == "noise":
            self.sock.sendall(os.urandom(1 << 20))
        if wrong == "end":
            raise EOFError
        at = struct.pack(">Q", offset + (512 if wrong == "offset" else 0))
        data = bytes(length + {"longer": 512, "shorter": -512}.get(wrong, 0))
        if op == wire.CMD_READ:
            if wrong == "simple":
                self.sock.sendall(wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, cookie) + data)
            elif wrong == "huge":
                self.sock.sendall(wire.CHUNK.pack(wire.CHUNK_MAGIC, 1, 1, cookie, (1 << 32) - 1) + bytes(1 << 20))
            elif wrong == "kind":
                self.sock.sendall(self.chunk(99, cookie, b"x"))
            elif wrong == "empty":
                self.sock.sendall(self.chunk(0, cookie, b""))
            elif wrong == "hole":
                self.sock.sendall(self.chunk(2, cookie, at + struct.pack(">I", 1 << 31)))
            else:
                self.sock.sendall(self.chunk(1, cookie, at + data))
            if wrong == "again":
                self.sock.sendall(self.chunk(1, cookie, at + data))
        else:
            self.sock.sendall(wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, cookie))


def run(session: Session) -> None:
    try:
        session.serve()
    except (EOFError, OSError):
        pass
    session.sock.close()


def main() -> None:
    link = socket.socket(fileno=int(sys.argv[1]))
    wrong = sys.argv[2]
    if wrong == "link":
        link.send(b"{{{")
    if wrong == "gone":
        return
    while True:
        data, fds, _, _ = socket.recv_fds(link, 16, 4)
        if not data:
            return
        for fd in fds:
            threading.Thread(target=run, args=(Session(socket.socket(fileno=fd), wrong),), daemon=True).start()


main()
