"""A UsbDriver in the test's own process: made and given its device as a driver host does it, on an emulated bus.

Owns: `Line`, on which the driver's own transfers (`self.usb`) are numbered and have their faults. Must never: be kinder
than a driver host. Called by: UsbBus.explore_driver.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import trio
import usb.core
import usb.util

from udf.errors import DeviceGone
from udf.testing.hotplug import direct, steps
from udf.testing.hotplug.backend import BACKEND
from udf.testing.hotplug.bus import Plugged
from udf.testing.hotplug.steps import Step
from udf.usb.backend import Backend
from udf.usb.calls import NO_SETUP, Calls
from udf.usb.transfers import Transfers
from udf.usb.urb import Buffer, bytes_of

# What a driver host's bus settles before it, and what a process leaves to its end.
SETTLED = ("kernel_driver", "in_use", "busy", "twin", "twin_alone")
_KINDS = ("", "iso", "bulk", "intr")  # by an endpoint descriptor's transfer type


class Request:
    """A transfer of the driver, which begins when it is waited for."""

    def __init__(self, line: Line, step: Step, begin: Callable[[], direct.Transfer], view: memoryview) -> None:
        self._line = line
        self._step = step
        self._begin = begin
        self._view = view
        self._inner: direct.Transfer | None = None
        self._cancelled = False
        self.actual = 0

    @property
    def done(self) -> bool:
        """Whether there is an answer."""
        return self._inner is not None and self._inner.done

    @property
    def packets(self) -> list[tuple[int, int]]:
        """Of an isochronous transfer."""
        return self._inner.packets if self._inner is not None else []

    @property
    def data(self) -> bytes:
        """What has come in."""
        return bytes(self._view[: self.actual])

    def wait(self, timeout: float | None = None) -> int:
        """Do it: the number of bytes, or a USBError."""
        plugged, step = self._line.plugged, self._step

        def perform() -> int:
            kept = plugged.take_rest(step.endpoint, self._view) if step.call == steps.READ else 0
            if kept:
                return kept
            if step.call == steps.WRITE and len(step.data) < step.length:  # a fault has shortened it
                self._inner = plugged.link.submit(step.endpoint, step.data)
            else:
                self._inner = self._begin()
            if self._cancelled:
                self._inner.cancel()
            return self._inner.wait(timeout)

        milliseconds = 0 if timeout is None else max(1, int(timeout * 1000))
        view = self._view if step.is_in else None
        self.actual = BACKEND.call(plugged, step, perform, view, milliseconds)
        return self.actual

    def cancel(self) -> None:
        """Give it up."""
        self._cancelled = True
        if self._inner is not None:
            self._inner.cancel()


class Line(Calls[Request]):
    """A plugged device's connection, as a driver host has it, with every transfer numbered."""

    def __init__(self, plugged: Plugged) -> None:
        self.plugged = plugged
        self.devid = plugged.link.devid

    @property
    def gone(self) -> bool:
        """Whether the device is."""
        return self.plugged.link.gone

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call it when it is."""
        self.plugged.link.on_end(callback)

    def submit(
        self,
        endpoint: int,
        data_or_length: Buffer | int,
        *,
        setup: bytes = NO_SETUP,
        interval: int = 0,
        packets: Sequence[int] = (),
    ) -> Request:
        """As Connection.submit."""
        view = bytes_of(data_or_length)
        link, name = self.plugged.link, self.plugged.name
        if endpoint & 0x0F:
            call = steps.READ if endpoint & 0x80 else steps.WRITE
            pipe = link.engine.pipes.get(endpoint)
            kind = _KINDS[int(pipe.kind)] if pipe is not None else ""
            step = Step(0, call, name, endpoint, len(view), kind=kind, packet=self.plugged.packet_size(endpoint))
            step.data = b"" if endpoint & 0x80 else bytes(view)
        else:
            step = Step(0, steps.CONTROL, name, endpoint, len(view), setup)

        def begin() -> direct.Transfer:
            return link.submit(endpoint, view, setup=setup, interval=interval, packets=packets)

        return Request(self, step, begin, view)


def hosted(
    driver: type[Any], use: Callable[[Any], Awaitable[object]], options: Mapping[str, object]
) -> Callable[[], object]:
    """A scenario: one life of a driver."""

    async def life() -> object:
        present = BACKEND.enumerate_devices()
        if not present:
            raise DeviceGone("there is no device")
        plugged = present[0]
        backend = Backend(Line(plugged), plugged.spec)  # type: ignore[arg-type]  # Line is what a Connection is
        backend.configure()
        made: Any = object.__new__(driver)
        made.device = usb.core.find(backend=BACKEND)
        made.usb = Transfers(backend)
        try:
            made.__init__(**options)
            await made.start()
            return await use(made)
        finally:  # a host need not do all this when something has failed: it ends
            with trio.CancelScope(shield=True), suppress(Exception):
                await made.stop()
            usb.util.dispose_resources(made.device)

    def scenario() -> object:
        return trio.run(life)

    scenario.__qualname__ = driver.__qualname__
    return scenario
