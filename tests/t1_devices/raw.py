"""A USB/IP client that hides nothing: it sends what it is told and shows what comes back."""

from __future__ import annotations

import itertools
import os
import socket
import struct
from typing import NamedTuple

from udf.testing.devices import Emulator, Plugged
from udf.usb import usbip


class Answer(NamedTuple):
    status: int
    data: bytes
    actual: int
    packets: list[tuple[int, int, int, int]]


class Failed(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(os.strerror(-status))
        self.status = status


class Raw:
    """Over a connection in the URB phase."""

    def __init__(self, sock: socket.socket, devid: int) -> None:
        self.sock = sock
        self.devid = devid
        self.numbers = itertools.count(1)
        self.wanted: dict[int, bool] = {}
        self.answers: dict[int, Answer] = {}
        sock.settimeout(10)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def submit(
        self, endpoint: int, data: bytes | int = b"", setup: bytes = bytes(8), packets: list[int] | None = None
    ) -> int:
        seqnum = next(self.numbers)
        is_in = bool(endpoint & 0x80)
        length = data if isinstance(data, int) else len(data)
        header = usbip.Submit(
            seqnum, self.devid, int(is_in), endpoint & 0x7F, 0, length, 0, len(packets or []), 0, setup
        ).pack()
        table, offset = b"", 0
        for each in packets or []:
            table += usbip.ISO_PACKET.pack(offset, each, 0, 0)
            offset += each
        self.wanted[seqnum] = is_in
        self.sock.sendall(header + (b"" if isinstance(data, int) else data) + table)
        return seqnum

    def unlink(self, seqnum: int) -> int:
        mine = next(self.numbers)
        self.sock.sendall(usbip.pack_unlink(mine, self.devid, seqnum))
        return mine

    def receive(self) -> tuple[int, Answer]:
        header = self.exactly(usbip.URB_SIZE)
        if usbip.code_of(header) == usbip.RET_UNLINK_CODE:
            seqnum, status = usbip.unpack_ret_unlink(header)
            return seqnum, Answer(status, b"", 0, [])
        assert usbip.code_of(header) == usbip.RET_SUBMIT_CODE
        reply = usbip.unpack_ret_submit(header)
        data = self.exactly(reply.actual) if self.wanted.pop(reply.seqnum) else b""
        packets = [usbip.ISO_PACKET.unpack(self.exactly(16)) for _ in range(reply.packets)]
        return reply.seqnum, Answer(reply.status, data, reply.actual, packets)

    def wait(self, seqnum: int) -> Answer:
        while seqnum not in self.answers:
            number, answer = self.receive()
            self.answers[number] = answer
        return self.answers.pop(seqnum)

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.sock.recv(count - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def read(self, endpoint: int, length: int) -> bytes:
        answer = self.wait(self.submit(endpoint, length))
        if answer.status:
            raise Failed(answer.status)
        return answer.data

    def write(self, endpoint: int, data: bytes) -> int:
        answer = self.wait(self.submit(endpoint, data))
        if answer.status:
            raise Failed(answer.status)
        return answer.actual

    def control(self, kind: int, request: int, value: int = 0, index: int = 0, data: bytes | int = b"") -> bytes:
        length = data if isinstance(data, int) else len(data)
        setup = struct.pack("<BBHHH", kind, request, value, index, length)
        answer = self.wait(self.submit(kind & 0x80 if length else 0, data, setup))
        if answer.status:
            raise Failed(answer.status)
        return answer.data

    def configure(self, value: int = 1) -> None:
        self.control(0x00, 9, value)

    def clear_halt(self, endpoint: int) -> None:
        self.control(0x02, 1, 0, endpoint)


def connected(bus: Emulator, plugged: Plugged, configuration: int = 1) -> Raw:
    raw = Raw(bus.connect(plugged), plugged.devid)
    try:
        if configuration:
            raw.configure(configuration)
    except BaseException:
        raw.sock.close()
        raise
    return raw
