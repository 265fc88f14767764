"""What follows from being able to submit a transfer: the calls that wait for one.

Owns: these calls in terms of `submit`. Must never: know how a transfer travels. Called by: client.py, whose Connection
is one of these, and the connections that the tests' buses have instead (udf/testing/hotplug).
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from udf.usb.errors import Failure, usb_error
from udf.usb.urb import Buffer

NO_SETUP = bytes(8)


class Waitable(Protocol):
    """A transfer that was submitted."""

    def wait(self, timeout: float | None = None) -> int:
        """Sleep until it is done; the number of bytes, or a USBError. None: without end."""


T = TypeVar("T", bound=Waitable)


class Calls(ABC, Generic[T]):
    """A device that takes transfers."""

    @abstractmethod
    def submit(
        self,
        endpoint: int,
        data_or_length: Buffer | int,
        *,
        setup: bytes = NO_SETUP,
        interval: int = 0,
        packets: Sequence[int] = (),
    ) -> T:
        """Start a transfer; `endpoint` has the direction bit, for control transfers too (0x80 or 0x00, with `setup`).

        IN takes a number of bytes or a writable buffer, which belongs to the transfer until it is done; OUT takes the
        data. `packets` are the packet lengths of an isochronous transfer. `interval` is in (micro)frames.
        """

    def transfer(
        self,
        endpoint: int,
        data_or_length: Buffer | int,
        *,
        setup: bytes = NO_SETUP,
        timeout: float | None = None,
        interval: int = 0,
        packets: Sequence[int] = (),
    ) -> T:
        """Submit and wait: a transfer that is done without an error."""
        transfer = self.submit(endpoint, data_or_length, setup=setup, interval=interval, packets=packets)
        transfer.wait(timeout)
        return transfer

    def control(
        self,
        request_type: int,
        request: int,
        value: int = 0,
        index: int = 0,
        data_or_length: Buffer | int = 0,
        timeout: float | None = None,
    ) -> T:
        """A control transfer on endpoint 0, to its end."""
        length = data_or_length if isinstance(data_or_length, int) else memoryview(data_or_length).nbytes
        try:
            setup = struct.pack("<BBHHH", request_type, request, value, index, length)
        except struct.error:
            raise usb_error(Failure.INVALID_PARAM) from None
        # Without a data stage there is only a status stage, and that is no transfer toward the host.
        endpoint = 0x80 if request_type & 0x80 and length else 0x00
        return self.transfer(endpoint, data_or_length, setup=setup, timeout=timeout)

    def move(self, endpoint: int, data: Buffer, milliseconds: int = 0, interval: int = 0) -> int:
        """A bulk or interrupt transfer to its end; 0 is no time-out."""
        return self.submit(endpoint, data, interval=interval).wait(milliseconds / 1000 if milliseconds else None)
