"""Transfers for drivers that are written with async and await.

Owns: the worker threads of one device's transfers, and what cancelling one means. Must never: leave a transfer under
way behind a task that has gone on, or let an unplug look like anything but DeviceGone.
Called by: drivers, as `self.usb`.

Each transfer occupies a thread, because the client (client.py) is for threads. Cancelling its task unlinks the
transfer, and the task goes on when the device has let go of it, so that the next transfer on the endpoint is the next.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import trio
import usb.core

from udf.errors import DeviceGone
from udf.usb.backend import Backend
from udf.usb.errors import Failure, usb_error
from udf.usb.urb import Transfer

if TYPE_CHECKING:
    import outcome

DEFAULT_TIMEOUT = 5.0  # seconds; None is "as long as it takes", until cancelled or unplugged
MAX_WORKERS = 32  # transfers of one driver that wait at the same time; more wait for their turn

T = TypeVar("T")


class Gone:
    """The device's end as an event."""

    def __init__(self, backend: Backend) -> None:
        self._connection = backend.connection

    def is_set(self) -> bool:
        """Whether the device is gone."""
        return self._connection.gone

    async def wait(self) -> None:
        """Until it is."""
        event, token = trio.Event(), trio.lowlevel.current_trio_token()
        self._connection.on_end(lambda: _soon(token, event.set))
        await event.wait()


class Transfers:
    """One device. Every call raises DeviceGone when the device is unplugged, USBError for what else goes wrong.

    A call's time-out is USBTimeoutError; what had come until then is returned instead, if there is any.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._connection = backend.connection
        self._limiter = trio.CapacityLimiter(MAX_WORKERS)
        self.gone = Gone(backend)

    async def control_in(
        self,
        request_type: int,
        request: int,
        value: int = 0,
        index: int = 0,
        *,
        length: int,
        timeout: float | None = DEFAULT_TIMEOUT,
    ) -> bytes:
        """Ask on endpoint 0; at most `length` bytes."""
        setup = _setup(request_type | 0x80, request, value, index, length)
        return (await self._transfer(0x80 if length else 0x00, length, timeout, setup)).data

    async def control_out(
        self,
        request_type: int,
        request: int,
        value: int = 0,
        index: int = 0,
        data: bytes = b"",
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
    ) -> int:
        """Tell on endpoint 0; the number of bytes that were taken."""
        setup = _setup(request_type & 0x7F, request, value, index, len(data))
        return (await self._transfer(0x00, bytes(data), timeout, setup)).actual

    async def read(self, endpoint: int, size: int, timeout: float | None = DEFAULT_TIMEOUT) -> bytes:
        """From a bulk or interrupt endpoint, until `size` bytes or a short packet; `size` a multiple of its packets."""
        return (await self._transfer(endpoint | 0x80, size, timeout)).data

    async def write(self, endpoint: int, data: bytes, timeout: float | None = DEFAULT_TIMEOUT) -> int:
        """To a bulk or interrupt endpoint; the number of bytes that were taken."""
        return (await self._transfer(endpoint & 0x7F, bytes(data), timeout)).actual

    async def clear_halt(self, endpoint: int, *, timeout: float | None = DEFAULT_TIMEOUT) -> None:
        """End an endpoint's stall and set its toggle to 0."""
        await self.control_out(0x02, 1, 0, endpoint, timeout=timeout)

    async def reset(self) -> None:
        """Reset the device; it has its configuration again, every interface its first setting."""

        def work() -> None:
            self._backend.reset()

        await self._in_thread(work, lambda: None)

    async def _transfer(
        self, endpoint: int, data_or_length: bytes | int, timeout: float | None, setup: bytes = bytes(8)
    ) -> Transfer:
        interval = 0 if endpoint in (0x00, 0x80) else self._backend.interval(endpoint)
        slot = _Slot()

        def work() -> Transfer:
            transfer = self._connection.submit(endpoint, data_or_length, setup=setup, interval=interval)
            slot.begun(transfer)
            transfer.wait(timeout)
            return transfer

        return await self._in_thread(work, slot.cancel)

    async def _in_thread(self, work: Callable[[], T], cancel: Callable[[], None]) -> T:
        try:
            async with self._limiter:
                return await _uninterrupted(work, cancel)
        except usb.core.USBError as exc:
            if exc.errno == errno.ENODEV:
                raise DeviceGone("the device has been unplugged") from exc
            # If it ended because we were cancelled, that is what there is to say.
            await trio.lowlevel.checkpoint_if_cancelled()
            raise


class _Slot:
    """A transfer that may be cancelled before its thread has begun it."""

    def __init__(self) -> None:
        self._cancelled = False
        self._transfer: Transfer | None = None

    def begun(self, transfer: Transfer) -> None:
        self._transfer = transfer
        if self._cancelled:
            transfer.cancel()

    def cancel(self) -> None:
        self._cancelled = True
        if self._transfer is not None:
            self._transfer.cancel()


async def _uninterrupted(work: Callable[[], T], cancel: Callable[[], None]) -> T:
    """Run it in a thread and wait for its end, whatever happens; a cancellation calls `cancel` and waits on."""
    task, token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()

    def deliver(result: outcome.Outcome[T]) -> None:
        _soon(token, lambda: trio.lowlevel.reschedule(task, result))

    def abort(_: Any) -> trio.lowlevel.Abort:
        cancel()
        return trio.lowlevel.Abort.FAILED

    trio.lowlevel.start_thread_soon(work, deliver, "usb-transfer")
    result: T = await trio.lowlevel.wait_task_rescheduled(abort)
    return result


def _soon(token: trio.lowlevel.TrioToken, function: Callable[[], object]) -> None:
    try:
        token.run_sync_soon(function)
    except trio.RunFinishedError:
        pass  # the driver has ended: nobody is left to be told


def _setup(request_type: int, request: int, value: int, index: int, length: int) -> bytes:
    try:
        return struct.pack("<BBHHH", request_type, request, value, index, length)
    except struct.error:
        raise usb_error(Failure.INVALID_PARAM) from None
