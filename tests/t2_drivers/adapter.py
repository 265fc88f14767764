"""A serial adapter whose far end is the test itself."""

from __future__ import annotations

import struct
import threading
from typing import Any

from udf.testing.devices import BulkIn, BulkOut, Configuration, Device, Interface, InterruptIn, Nak, Setup, Stall

HEADER = bytes((5, 0x24, 0, 0x10, 1))
CALL_MANAGEMENT = bytes((5, 0x24, 1, 0, 1))
ACM = bytes((4, 0x24, 2, 2))
UNION = bytes((5, 0x24, 6, 0, 1))
DATA = Interface(0x0A, endpoints=[BulkIn(2), BulkOut(2)])


def communication(extra: bytes, *, endpoints: Any = None) -> Interface:
    return Interface(0x02, 0x02, 0x01, endpoints=[InterruptIn(1)] if endpoints is None else endpoints, extra=extra)


class Adapter(Device):
    """Keeps what it is sent and told."""

    vendor, product = 0x1209, 0x5E41
    configurations = [Configuration([communication(HEADER + CALL_MANAGEMENT + ACM + UNION), DATA])]

    def __init__(self, **identity: Any) -> None:
        super().__init__(**identity)
        self.received = bytearray()
        self.told = threading.Condition()
        self.requests: list[tuple[int, int, bytes]] = []
        self.takes = True
        self.knows_line_coding = True

    def on_control(self, setup: Setup, data: bytes) -> bytes | None:
        if setup.request_type != 0x21 or (setup.request == 0x20 and not self.knows_line_coding):
            raise Stall
        with self.told:
            self.requests.append((setup.request, setup.value, data))
            self.told.notify_all()
        return None

    def on_out(self, endpoint: int, data: bytes) -> None:
        if not self.takes:
            raise Nak
        with self.told:
            self.received += data
            self.told.notify_all()

    # --- for tests ---

    def send(self, data: bytes) -> None:
        self.push(2, data)

    def state(self, bits: int, *, pieces: int = 100) -> None:
        """SERIAL_STATE, in packets of so many bytes."""
        packet = struct.pack("<BBHHHH", 0xA1, 0x20, 0, 0, 2, bits)
        for at in range(0, len(packet), pieces):
            self.push(1, packet[at : at + pieces])

    def take(self, takes: bool) -> None:
        self.takes = takes
        if takes:
            self.ready(2)

    def wait(self, what: Any, seconds: float = 40.0) -> None:
        """Until something is true of what it was told."""
        with self.told:
            assert self.told.wait_for(what, seconds), (self.requests, bytes(self.received[-100:]))

    @property
    def coding(self) -> tuple[int, ...]:
        """The last line coding: baud, stop, parity, bits."""
        return struct.unpack("<IBBB", [data for request, _, data in self.requests if request == 0x20][-1])

    @property
    def lines(self) -> int | None:
        """DTR and RTS; None: it was never told."""
        return next((value for request, value, _ in reversed(self.requests) if request == 0x22), None)
