"""A serial port: CDC-ACM (CDC 1.2, PSTN 1.2) with something at the other end of the line.

Owns: the line: its coding, its modem lines, breaks, and where the bytes go: an echo, a pseudo-terminal, a socket, or
the test itself. Must never: buffer without a bound: a far end that does not read makes the device say NAK.
Called by: models.py, tests; `send` and `set_state` from any thread.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import tty
from typing import Any, NamedTuple

from udf.testing.devices.device import Device, Option
from udf.testing.devices.layout import BulkIn, BulkOut, Configuration, Interface, InterruptIn
from udf.testing.devices.loop import ENDED, READ, WRITE
from udf.testing.devices.transfers import Nak, Setup, Stall

SET_LINE_CODING, GET_LINE_CODING, SET_CONTROL_LINE_STATE, SEND_BREAK = 0x20, 0x21, 0x22, 0x23
_CODING = struct.Struct("<IBBB")
_DATA_IN, _DATA_OUT, _NOTIFY = 0x81, 0x02, 0x83
_MOST = 64 * 1024  # bytes that wait in either direction

# Header 1.10; call management: none; ACM: line coding, serial state, break; union of interfaces 0 and 1.
_FUNCTIONAL = bytes.fromhex("0524001001 0524010001 04240206 0524060001")


class LineCoding(NamedTuple):
    """As SET_LINE_CODING carries it."""

    rate: int = 9600
    stop_bits: int = 0  # 0: 1, 1: 1.5, 2: 2
    parity: int = 0  # none, odd, even, mark, space
    data_bits: int = 8


class Serial(Device):
    """An adapter with an echo at its other end, if nothing else is said."""

    vendor, product = 0x1209, 0x7E5C
    product_name = "Serial adapter"
    device_class = (2, 0, 0)
    speed = Device.speed.FULL
    configurations = [
        Configuration(
            [
                Interface(2, 2, 1, [InterruptIn(3, 16, interval=10)], extra=_FUNCTIONAL),
                Interface(0x0A, 0, 0, [BulkIn(1), BulkOut(2)]),
            ]
        )
    ]
    options = {"end": Option(str, "what is at the other end: echo, pty, or none (it swallows)")}

    def __init__(self, end: str | socket.socket = "echo", **identity: Any) -> None:
        """*end*: "echo", "pty" (see `path`), "none" (see `received`) or a stream socket, which is ours from now on."""
        super().__init__(**identity)
        if isinstance(end, str) and end not in ("echo", "pty", "none"):
            raise ValueError(f"end={end} is none of echo, pty, none")
        self.end = end
        self.path: str | None = None  # of the pseudo-terminal's far side
        self.coding = LineCoding()
        self.dtr = self.rts = False
        self.breaks: list[int] = []  # milliseconds of each, 0xFFFF: until further notice; the last 100
        self.received = bytearray()  # with "none": what the host has sent, the last 64 KiB
        self._fds: list[int] = []
        self._unsent = bytearray()  # to the far end
        self._reading = False
        if end == "pty":
            # The far side is kept open by us too: without anybody a pseudo-terminal is hung up for ever.
            self._fds = list(os.openpty())
            tty.setraw(self._fds[1])
            self.path = os.ttyname(self._fds[1])
        elif isinstance(end, socket.socket):
            self._fds = [end.detach()]
        if self._fds:
            os.set_blocking(self._fds[0], False)

    def close(self) -> None:
        """Hang up at the other end."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    # --- for tests ---

    def send(self, data: bytes) -> None:
        """Bytes arrive on the line."""
        self.push(_DATA_IN, data)

    def set_state(
        self,
        *,
        carrier: bool = True,
        ready: bool = True,
        ring: bool = False,
        broken: bool = False,
        framing: bool = False,
        parity: bool = False,
        overrun: bool = False,
    ) -> None:
        """Notify the host of the line's state (SERIAL_STATE): DCD, DSR, RI, a break, errors."""
        bits = carrier | ready << 1 | broken << 2 | ring << 3 | framing << 4 | parity << 5 | overrun << 6
        self.push(_NOTIFY, struct.pack("<BBHHHH", 0xA1, 0x20, 0, 0, 2, bits))

    # --- the bus ---

    def on_plugged(self) -> None:
        """A line as it comes out of the box."""
        self.coding = LineCoding()
        self.dtr = self.rts = False
        self._unsent.clear()
        self._reading = False

    def on_configured(self, value: int) -> None:
        """The far end is listened to from now on."""
        if value and self._fds and not self._reading:
            self._reading = True
            self.watch(self._fds[0], self._line)

    def on_control(self, setup: Setup, data: bytes) -> bytes | None:
        """The requests of the class."""
        if setup.type != 1 or setup.index != 0:
            raise Stall
        match setup.request, setup.is_in:
            case 0x20, False:
                if len(data) != _CODING.size:
                    raise Stall
                coding = LineCoding(*_CODING.unpack(data))
                if coding.stop_bits > 2 or coding.parity > 4 or coding.data_bits not in (5, 6, 7, 8, 16):
                    raise Stall
                self.coding = coding
            case 0x21, True:
                return _CODING.pack(*self.coding)
            case 0x22, False:
                self.dtr, self.rts = bool(setup.value & 1), bool(setup.value & 2)
            case 0x23, False:
                self.breaks = [*self.breaks[-99:], setup.value]
            case _:
                raise Stall
        return None

    def on_out(self, endpoint: int, data: bytes) -> None:
        """Bytes for the line."""
        if self.end == "echo":
            if self.queued(_DATA_IN) > _MOST:
                raise Nak
            self.push(_DATA_IN, data)
        elif self._fds:
            if len(self._unsent) > _MOST:
                raise Nak
            self._unsent += data
            self._flush()
        else:
            self.received += data
            del self.received[:-_MOST]

    def on_in(self, endpoint: int, length: int) -> bytes | memoryview | None:
        """Bytes from the line."""
        data = super().on_in(endpoint, length)
        if data is not None and endpoint == _DATA_IN:
            if self.end == "echo":
                self.ready(_DATA_OUT)
            elif self._fds and not self._reading:
                self._reading = True
                self._listen()
        return data

    # --- the far end ---

    def _line(self, events: int) -> None:
        if events & WRITE:
            self._flush()
            self.ready(_DATA_OUT)
        if not events & (READ | ENDED):
            return
        try:
            data = os.read(self._fds[0], 4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:  # the socket's other end is closed: the line is dead, the adapter is not
            self.unwatch(self._fds[0])
            self.set_state(carrier=False, ready=False)
            return
        self.push(_DATA_IN, data)
        if self.queued(_DATA_IN) > _MOST:
            self._reading = False
            self._listen()

    def _flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                while self._unsent:
                    del self._unsent[: os.write(self._fds[0], self._unsent)]
            except BlockingIOError:
                raise
            except OSError:
                self._unsent.clear()  # nobody is there any more
                return
        self._listen()

    def _listen(self) -> None:
        if self._fds[0] in self._watched:
            self.watch(self._fds[0], self._line, read=self._reading, write=bool(self._unsent))
