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
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import trio
import usb.core

from udf.errors import DeviceGone
from udf.usb.backend import Backend
from udf.usb.client import Connection
from udf.usb.errors import Failure, usb_error
from udf.usb.urb import Buffer, Transfer

if TYPE_CHECKING:
    import outcome

DEFAULT_TIMEOUT = 5.0  # seconds; None is "as long as it takes", until cancelled or unplugged
MAX_WORKERS = 32  # transfers of one driver that wait at the same time; more wait for their turn

T = TypeVar("T")


class Gone:
    """The device's end as an event."""

    def __init__(self, backend: Backend) -> None:
        self._connection = backend.connection
        self._waiting: set[trio.Event] = set()
        self._watched = False
        self._told = False

    def is_set(self) -> bool:
        """Whether the device is gone."""
        return self._connection.gone

    async def wait(self) -> None:
        """Until it is."""
        if self._told:
            await trio.lowlevel.checkpoint()
            return
        event = trio.Event()
        self._waiting.add(event)
        try:
            if not self._watched:
                self._watched = True
                token = trio.lowlevel.current_trio_token()
                self._connection.on_end(lambda: _soon(token, self._tell))
            await event.wait()
        finally:
            self._waiting.discard(event)

    def _tell(self) -> None:
        self._told = True
        for event in self._waiting:
            event.set()


class Transfers:
    """One device. Every call raises DeviceGone when the device is unplugged, USBError for what else goes wrong.

    A call's time-out is USBTimeoutError; what had come until then is returned instead, if there is any.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._connection = backend.connection
        self._limiter = trio.CapacityLimiter(MAX_WORKERS)
        self.gone = Gone(backend)

    @property
    def connection(self) -> Connection:
        """What is below: for a driver with a thread of its own that has several transfers under way at once."""
        return self._connection

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
        return await self.in_thread(
            lambda blocking: blocking.control_in(request_type, request, value, index, length=length, timeout=timeout)
        )

    async def control_out(
        self,
        request_type: int,
        request: int,
        value: int = 0,
        index: int = 0,
        data: Buffer = b"",
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
    ) -> int:
        """Tell on endpoint 0; the number of bytes that were taken."""
        data = bytes(data)
        return await self.in_thread(
            lambda blocking: blocking.control_out(request_type, request, value, index, data, timeout=timeout)
        )

    async def read(self, endpoint: int, size: int, timeout: float | None = DEFAULT_TIMEOUT) -> bytes:
        """From a bulk or interrupt endpoint, until `size` bytes or a short packet; `size` a multiple of its packets."""
        return await self.in_thread(lambda blocking: blocking.read(endpoint, size, timeout))

    async def write(self, endpoint: int, data: Buffer, timeout: float | None = DEFAULT_TIMEOUT) -> int:
        """To a bulk or interrupt endpoint; the number of bytes that were taken."""
        data = bytes(data)
        return await self.in_thread(lambda blocking: blocking.write(endpoint, data, timeout))

    async def clear_halt(self, endpoint: int, *, timeout: float | None = DEFAULT_TIMEOUT) -> None:
        """End an endpoint's stall and set its toggle to 0."""
        await self.in_thread(lambda blocking: blocking.clear_halt(endpoint, timeout=timeout))

    async def reset(self) -> None:
        """Reset the device; it has its configuration again, every interface its first setting."""
        await self.in_thread(lambda blocking: self._backend.reset())

    async def in_thread(self, function: Callable[[Blocking], T]) -> T:
        """Run a function that does several transfers, one after the other or at once: only one change of threads.

        Cancelling ends the transfers that it has under way, and it with them. Whatever it raises is raised here.
        """
        blocking = Blocking(self._backend)
        try:
            async with self._limiter:
                return await _uninterrupted(partial(_to_its_end, function, blocking), blocking.cancel)
        except usb.core.USBError as exc:
            if exc.errno == errno.ENODEV:
                raise DeviceGone("the device has been unplugged") from exc
            # If it ended because we were cancelled, that is what there is to say.
            await trio.lowlevel.checkpoint_if_cancelled()
            raise


class Blocking:
    """The same transfers for a function in a thread. Its calls raise USBError, for an unplug too (ENODEV)."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._connection = backend.connection
        self._cancelled = False
        self._under_way: set[Transfer] = set()

    def submit(self, endpoint: int, data_or_length: Buffer | int, *, setup: bytes = bytes(8)) -> Transfer:
        """Begin a transfer; wait() tells its end. So the next one is queued while this one is under way."""
        interval = self._backend.interval(endpoint) if endpoint & 0x0F else 0
        transfer = self._connection.submit(endpoint, data_or_length, setup=setup, interval=interval)
        self._under_way.add(transfer)
        if self._cancelled:
            transfer.cancel()
        return transfer

    def wait(self, transfer: Transfer, timeout: float | None = DEFAULT_TIMEOUT) -> int:
        """The number of bytes."""
        try:
            return transfer.wait(timeout)
        finally:
            self._under_way.discard(transfer)

    def control_in(
        self, request_type: int, request: int, value: int = 0, index: int = 0, *, length: int,
        timeout: float | None = DEFAULT_TIMEOUT,
    ) -> bytes:  # fmt: skip
        """See Transfers."""
        setup = _setup(request_type | 0x80, request, value, index, length)
        transfer = self.submit(0x80 if length else 0x00, length, setup=setup)
        self.wait(transfer, timeout)
        return transfer.data

    def control_out(
        self, request_type: int, request: int, value: int = 0, index: int = 0, data: Buffer = b"", *,
        timeout: float | None = DEFAULT_TIMEOUT,
    ) -> int:  # fmt: skip
        """See Transfers."""
        setup = _setup(request_type & 0x7F, request, value, index, memoryview(data).nbytes)
        return self.wait(self.submit(0x00, data, setup=setup), timeout)

    def read(self, endpoint: int, size: int, timeout: float | None = DEFAULT_TIMEOUT) -> bytes:
        """See Transfers."""
        transfer = self.submit(endpoint | 0x80, size)
        self.wait(transfer, timeout)
        return transfer.data

    def read_into(self, endpoint: int, buffer: Buffer, timeout: float | None = DEFAULT_TIMEOUT) -> int:
        """Into a writable buffer; the number of bytes."""
        return self.wait(self.submit(endpoint | 0x80, buffer), timeout)

    def write(self, endpoint: int, data: Buffer, timeout: float | None = DEFAULT_TIMEOUT) -> int:
        """See Transfers."""
        return self.wait(self.submit(endpoint & 0x7F, data), timeout)

    def clear_halt(self, endpoint: int, *, timeout: float | None = DEFAULT_TIMEOUT) -> None:
        """See Transfers."""
        self.control_out(0x02, 1, 0, endpoint, timeout=timeout)

    def cancel(self) -> None:
        """From the loop's thread: end what is under way and what will be begun."""
        self._cancelled = True
        for transfer in tuple(self._under_way):
            transfer.cancel()

    def finish(self) -> None:
        """The function has ended: what it began and did not wait for ends too."""
        if self._under_way:
            self.cancel()
            for transfer in tuple(self._under_way):
                try:
                    self.wait(transfer, 0)
                except usb.core.USBError:
                    pass


def _to_its_end(function: Callable[[Blocking], T], blocking: Blocking) -> T:
    try:
        return function(blocking)
    finally:
        blocking.finish()


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
