"""The bus as the transport needs it: transfers that are begun and then waited for.

Owns: the two ways to a device: transfers that are queued at the host, and pyusb's calls one after another.
Must never: know what is transferred. Called by: transport.py, in one thread.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any, Protocol

import usb.core
import usb.util

from .wire import Outcome

CONTROL_TIMEOUT = 5.0


class Pending(Protocol):
    """A transfer that was begun."""

    def wait(self, timeout: float | None = None) -> int:
        """How many bytes were moved; or an USBError."""

    def cancel(self) -> None:
        """Give it up; wait() still says when it is over."""


class Pipes(Protocol):
    """The device's endpoints."""

    queues: bool  # transfers are under way as soon as they are submitted

    def submit(self, endpoint: int, data: Any) -> Pending:
        """Begin a transfer of a buffer; one to read into belongs to the transfer until it is over."""

    def submit_all(self, transfers: Sequence[tuple[int, Any]]) -> list[Pending]:
        """Begin several, in this order."""

    def control_out(self, request_type: int, request: int, value: int, index: int) -> None:
        """A control transfer without data."""

    def control_in(self, request_type: int, request: int, value: int, index: int, length: int) -> bytes:
        """A control transfer that reads."""

    def clear_halt(self, endpoint: int) -> None:
        """End an endpoint's halt, on both sides of the bus."""

    def reset(self) -> None:
        """Reset the device's port."""


class OneByOne:
    """pyusb and nothing else, on any bus: a transfer takes place when it is waited for."""

    queues = False

    def __init__(self, device: Any) -> None:
        self._device = device

    def submit(self, endpoint: int, data: Any) -> Pending:
        return _Later(self._device, endpoint, data)

    def submit_all(self, transfers: Sequence[tuple[int, Any]]) -> list[Pending]:
        return [self.submit(endpoint, data) for endpoint, data in transfers]

    def control_out(self, request_type: int, request: int, value: int, index: int) -> None:
        self._device.ctrl_transfer(request_type, request, value, index, None, int(CONTROL_TIMEOUT * 1000))

    def control_in(self, request_type: int, request: int, value: int, index: int, length: int) -> bytes:
        return bytes(
            self._device.ctrl_transfer(request_type, request, value, index, length, int(CONTROL_TIMEOUT * 1000))
        )

    def clear_halt(self, endpoint: int) -> None:
        self._device.clear_halt(endpoint)

    def reset(self) -> None:
        self._device.reset()


class _Later:
    def __init__(self, device: Any, endpoint: int, data: Any) -> None:
        self._device, self._endpoint, self._data = device, endpoint, data

    def wait(self, timeout: float | None = None) -> int:
        milliseconds = max(1, int((timeout or 0) * 1000)) if timeout is not None else 0
        if self._endpoint & usb.util.ENDPOINT_IN:
            got = self._device.read(self._endpoint, len(self._data), milliseconds)
            self._data[: len(got)] = got
            return len(got)
        return int(self._device.write(self._endpoint, self._data, milliseconds))

    def cancel(self) -> None:
        """It has not begun."""


class Queued(OneByOne):
    """A connection that has many transfers under way at once (`submit`, `submit_all`); the rest is pyusb's."""

    queues = True

    def __init__(self, device: Any, connection: Any) -> None:
        super().__init__(device)
        self._connection = connection

    def submit(self, endpoint: int, data: Any) -> Pending:
        pending: Pending = self._connection.submit(endpoint, data)
        return pending

    def submit_all(self, transfers: Sequence[tuple[int, Any]]) -> list[Pending]:
        pending: list[Pending] = self._connection.submit_all(transfers)
        return pending


def outcome_of(exc: usb.core.USBError) -> Outcome:
    """How the transfer that raised this ended."""
    return _OUTCOMES.get(exc.errno, Outcome.ERROR)


_OUTCOMES = {
    errno.EPIPE: Outcome.STALL,
    errno.ETIMEDOUT: Outcome.TIMEOUT,
    errno.EOVERFLOW: Outcome.BABBLE,
    errno.ENODEV: Outcome.GONE,
}
