"""A vendor device that gives back what it gets: the partner of the bus conformance suite.

Interface 0 loops: bulk 1 -> 0x81, interrupt 2 -> 0x82, and in its alternate setting 1 isochronous 3 -> 0x83.
Interface 1 is a sink (bulk 4) and a source (bulk 0x84). The vendor requests below do everything else.
Called by: models.py, tests.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any

from udf.testing.devices.device import Device
from udf.testing.devices.layout import (
    BulkIn,
    BulkOut,
    Configuration,
    Interface,
    InterruptIn,
    InterruptOut,
    IsoIn,
    IsoOut,
)
from udf.testing.devices.transfers import SETUP, Nak, Setup, Stall

_ZEROS = memoryview(bytes(1 << 20))
_MOST = 16 << 20  # bytes that wait for the host; then the device says NAK


class Request(IntEnum):
    """Vendor requests to the device."""

    ECHO = 1  # OUT keeps the data, IN gives them back
    SETUP = 2  # IN: the eight bytes of this very request
    HALT = 3  # OUT: halt endpoint wIndex
    NEVER = 4  # is never answered
    PUSH = 5  # OUT: queue the data on endpoint wIndex; wValue 1: with a zero-length packet if the last one is full
    CLEAR = 6  # OUT: forget what is queued on endpoint wIndex
    COUNT = 7  # IN: bytes that the sink has taken, 64 bits, little-endian
    FAIL = 8  # a handler that fails
    UNPLUG = 9  # OUT: vanish; wValue: milliseconds until it is back, 0 never


_LOOPS = [BulkIn(1), BulkOut(1), InterruptIn(2, interval=4), InterruptOut(2, interval=4)]


class Loopback(Device):
    """Gives back what it gets."""

    vendor, product = 0x1209, 0x7E50
    product_name = "Loopback"
    serial = "LOOP0001"
    device_class = (0xFF, 0, 0)
    configurations = [
        Configuration(
            [
                Interface(
                    0xFF, 0, 0, _LOOPS, [Interface(0xFF, 0, 1, [*_LOOPS, IsoIn(3, 192), IsoOut(3, 192)])], name="loop"
                ),
                Interface(0xFF, 1, 0, [BulkIn(4), BulkOut(4)], name="source and sink"),
            ]
        ),
        Configuration([Interface(0xFF, 0, 0, [BulkIn(1), BulkOut(1)])], value=2, name="little"),
    ]

    def __init__(self, **identity: Any) -> None:
        super().__init__(**identity)
        self._kept = b""
        self.sunk = 0

    def on_plugged(self) -> None:
        """Forget everything."""
        self._kept = b""
        self.sunk = 0

    def on_control(self, setup: Setup, data: bytes) -> bytes | None:
        """One of Request."""
        if setup.type != 2:
            raise Stall
        match setup.request, setup.is_in:
            case Request.ECHO, True:
                return self._kept
            case Request.ECHO, False:
                self._kept = data
            case Request.SETUP, True:
                return SETUP.pack(*setup)
            case Request.HALT, False:
                self.halt(setup.index)
            case Request.NEVER, _:
                raise Nak
            case Request.PUSH, False:
                self.push(setup.index, data, zlp=setup.value == 1)
            case Request.CLEAR, False:
                self.clear(setup.index)
            case Request.COUNT, True:
                return struct.pack("<Q", self.sunk)
            case Request.FAIL, _:
                raise ZeroDivisionError("this request is there to fail")
            case Request.UNPLUG, False:
                self.unplug(setup.value / 1000)
            case _:
                raise Stall
        return None

    def on_out(self, endpoint: int, data: bytes) -> None:
        """Loop or sink."""
        if endpoint == 4:
            self.sunk += len(data)
            return
        if self.queued(endpoint | 0x80) > _MOST:
            raise Nak
        self.push(endpoint, data)

    def on_in(self, endpoint: int, length: int) -> bytes | memoryview | None:
        """What was looped, or zeros."""
        if endpoint == 0x84:
            return _ZEROS[:length] if length <= len(_ZEROS) else bytes(length)
        data = super().on_in(endpoint, length)
        if data is not None:
            self.ready(endpoint & 0x7F)
        return data
