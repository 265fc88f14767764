"""What CDC-ACM devices say of themselves, and the packets that set a line: pure. Source: CDC 1.2 and PSTN 1.2.

Must never: read behind a descriptor's end, or believe a number that it does not check. Called by: driver.py, port.py.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

CS_INTERFACE = 0x24
CALL_MANAGEMENT, ACM, UNION = 0x01, 0x02, 0x06

SET_LINE_CODING, SET_CONTROL_LINE_STATE = 0x20, 0x22
CLASS_OUT = 0x21
SERIAL_STATE = 0x20
NOTIFICATION = struct.Struct("<BBHHH")
MAX_NOTIFICATION = 64

DTR, RTS = 0x01, 0x02
CARRIER, READY, BREAK, RING, FRAMING, PARITY, OVERRUN = (1 << bit for bit in range(7))

PARITIES = "NOEMS"
STOPS = {"1": 0, "1.5": 1, "2": 2}


class Functions(NamedTuple):
    """What the functional descriptors of a communication interface say; None: they do not."""

    union: tuple[int, int] | None = None  # the controlling interface and the first subordinate one
    call_management: int | None = None  # the data interface
    capabilities: int | None = None  # of ACM: bit 1 line coding and line state, bit 2 break


class Coding(NamedTuple):
    """How a line is used."""

    baud: int = 9600
    stop: int = 0  # an index: 1, 1.5, 2
    parity: int = 0  # an index into PARITIES
    bits: int = 8

    def pack(self) -> bytes:
        """The 7 bytes of SET_LINE_CODING."""
        return struct.pack("<IBBB", self.baud & 0xFFFFFFFF, self.stop, self.parity, self.bits)


def parse_functions(extra: bytes) -> Functions:
    """Read the class-specific descriptors behind an interface; broken ones end the reading."""
    found = Functions()
    for kind, body in _descriptors(extra):
        if kind == UNION and len(body) >= 2 and found.union is None:
            found = found._replace(union=(body[0], body[1]))
        elif kind == CALL_MANAGEMENT and len(body) >= 2 and found.call_management is None:
            found = found._replace(call_management=body[1])
        elif kind == ACM and body and found.capabilities is None:
            found = found._replace(capabilities=body[0])
    return found


def _descriptors(extra: bytes) -> Iterator[tuple[int, bytes]]:
    while len(extra) >= 3 and 3 <= extra[0] <= len(extra):
        if extra[1] == CS_INTERFACE:
            yield extra[2], extra[3 : extra[0]]
        extra = extra[extra[0] :]


def parse_format(text: str) -> Coding | None:
    """8N1, 7E2, 8N1.5; None if it is no such thing."""
    bits, parity, stop = text[:1], text[1:2].upper(), text[2:]
    if bits not in ("5", "6", "7", "8") or not parity or parity not in PARITIES or stop not in STOPS:
        return None
    return Coding(stop=STOPS[stop], parity=PARITIES.index(parity), bits=int(bits))


class Notifications:
    """Puts the packets of the interrupt endpoint together: a notification may come in several."""

    def __init__(self) -> None:
        self._data = b""

    def feed(self, packet: bytes) -> Iterator[int]:
        """The serial states that are complete now; everything else is left out."""
        self._data += packet
        while len(self._data) >= NOTIFICATION.size:
            _, code, _, _, length = NOTIFICATION.unpack_from(self._data)
            end = NOTIFICATION.size + length
            if end > MAX_NOTIFICATION:
                self._data = b""  # no notification is so long: it is out of step
                return
            if len(self._data) < end:
                return
            body, self._data = self._data[NOTIFICATION.size : end], self._data[end:]
            if code == SERIAL_STATE and length >= 2:
                yield int.from_bytes(body[:2], "little")
