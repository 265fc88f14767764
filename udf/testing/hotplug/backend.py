"""The pyusb backend of an emulated bus: several devices, every call numbered, and faults done to them.

Owns: handles, claims, kernel drivers and other programs as a driver meets them, and what a fault does to a call.
Must never: say how libusb behaves on a healthy device (`udf.usb.backend.Backend` does), or choose a fault (the bus
does). Called by: pyusb, through `usb.core.find()`, while a bus is the current one.

There is one for the whole process, because drivers keep what `libusb1.get_backend()` has given them.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import usb.backend
import usb.backend.libusb0
import usb.backend.libusb1
import usb.backend.openusb
import usb.core

import udf.usb
from udf.testing.hotplug import steps
from udf.testing.hotplug.faulty import faulty
from udf.testing.hotplug.running import GivenUpError
from udf.testing.hotplug.steps import Step
from udf.usb.errors import Failure, usb_error

if TYPE_CHECKING:
    from udf.testing.hotplug.bus import Plugged, UsbBus

_PYUSB = os.path.dirname(usb.__file__) + os.sep
_OURS = os.path.dirname(__file__) + os.sep
_TRANSFERS = os.path.dirname(udf.usb.__file__) + os.sep
_WORKERS = ("/threading.py", "/concurrent/futures/thread.py", "/trio/_threads.py")
_LONG = 100  # ms: who waits so long on an event loop's thread stops everything else there


class Handle:
    """An opened device."""

    def __init__(self, plugged: Plugged, inner: Any, where: str) -> None:
        self.plugged = plugged
        self.inner = inner
        self.where = where  # the driver's line that opened it
        self.claims: set[int] = set()
        self.busy = 0  # calls under way
        self.closed = False

    def __str__(self) -> str:
        claims = "".join(f", interface {each} claimed" for each in sorted(self.claims))
        gone = "" if self.plugged.present else ", which is gone"
        return f"a handle of {self.plugged.name}{gone} (opened at {self.where}{claims})"


class BusBackend(usb.backend.IBackend):  # type: ignore[misc]  # pyusb has no types
    """What pyusb talks to."""

    def __init__(self) -> None:
        self.current: UsbBus | None = None
        # Threads that nobody waits for any more: by object, because a number is used again.
        self.abandoned: weakref.WeakSet[threading.Thread] = weakref.WeakSet()

    # ---- what is there

    def enumerate_devices(self) -> list[Plugged]:
        """Every device of the current bus, in the order of its arrival."""
        self._gate()
        return self.current.devices if self.current is not None else []

    def get_parent(self, dev: Plugged) -> None:
        """Nothing: the devices hang on root ports."""
        return

    def get_device_descriptor(self, dev: Plugged) -> Any:
        """Known since the plug, and also after the unplug: no transfer."""
        return dev.backend.get_device_descriptor(dev.inner)

    def get_configuration_descriptor(self, dev: Plugged, config: int) -> Any:
        """Likewise."""
        return dev.backend.get_configuration_descriptor(dev.inner, config)

    def get_interface_descriptor(self, dev: Plugged, intf: int, alt: int, config: int) -> Any:
        """Likewise."""
        return dev.backend.get_interface_descriptor(dev.inner, intf, alt, config)

    def get_endpoint_descriptor(self, dev: Plugged, ep: int, intf: int, alt: int, config: int) -> Any:
        """Likewise."""
        return dev.backend.get_endpoint_descriptor(dev.inner, ep, intf, alt, config)

    # ---- handles

    def open_device(self, dev: Plugged) -> Handle:
        """A handle; ENODEV if the device is gone."""
        opened: list[Handle] = []

        def perform() -> int:
            self._need(dev)
            opened.append(Handle(dev, dev.backend.open_device(dev.inner), _where()))
            return 0

        self.call(dev, Step(0, steps.OPEN, dev.name), perform)
        dev.bus.opened(opened[0])
        return opened[0]

    def close_device(self, handle: Handle) -> None:
        """Never fails, but tells the bus what would crash libusb."""
        bus = handle.plugged.bus
        if handle.closed:
            bus.problem("misuse", f"{handle} is closed twice")
            return
        if handle.busy:
            bus.problem("misuse", f"{handle} is closed while a call on it is under way: libusb crashes there")
        handle.closed = True
        for interface in list(handle.claims):
            self._release(handle, interface)
        bus.closed(handle)
        if handle.plugged.present:
            handle.plugged.backend.close_device(handle.inner)

    def claim_interface(self, handle: Handle, intf: int) -> None:
        """EBUSY if a kernel driver, another program or another handle has it."""

        def perform() -> int:
            dev = handle.plugged
            self._need(dev)
            if intf in dev.kernel or intf in dev.others:
                raise usb_error(Failure.BUSY)
            dev.backend.claim_interface(handle.inner, intf)
            handle.claims.add(intf)
            return 0

        self.call(handle, Step(0, steps.CLAIM, handle.plugged.name, length=intf), perform)

    def release_interface(self, handle: Handle, intf: int) -> None:
        """ENOENT if it is not claimed, ENODEV if the device is gone; it is released all the same."""
        if handle.plugged.bus.given_up:  # finalizers come here at any time, also at the end of the process
            self._release(handle, intf)
            return

        def perform() -> int:
            was = intf in handle.claims
            self._release(handle, intf)
            self._need(handle.plugged)
            if not was:
                raise usb_error(Failure.NOT_FOUND)
            return 0

        self.call(handle, Step(0, steps.RELEASE, handle.plugged.name), perform)

    def _release(self, handle: Handle, intf: int) -> None:
        if intf in handle.claims:
            handle.claims.discard(intf)
            if handle.plugged.present:
                handle.plugged.backend.release_interface(handle.inner, intf)

    # ---- configuration

    def set_configuration(self, handle: Handle, config_value: int) -> None:
        """EBUSY if anybody has an interface, as the kernel says."""

        def perform() -> int:
            dev = handle.plugged
            self._need(dev)
            if dev.kernel or dev.others or any(each.claims for each in dev.bus.handles_of(dev)):
                raise usb_error(Failure.BUSY)
            dev.backend.set_configuration(handle.inner, config_value)
            return 0

        self.call(handle, Step(0, steps.CONFIGURE, handle.plugged.name), perform)

    def get_configuration(self, handle: Handle) -> int:
        """The active one's value; 0: none."""
        return self._simple(handle, steps.CONFIGURATION, lambda: handle.plugged.backend.get_configuration(handle.inner))

    def set_interface_altsetting(self, handle: Handle, intf: int, altsetting: int) -> None:
        """As libusb does."""
        self._simple(
            handle,
            steps.ALTERNATE,
            lambda: handle.plugged.backend.set_interface_altsetting(handle.inner, intf, altsetting),
        )

    def clear_halt(self, handle: Handle, ep: int) -> None:
        """As libusb does."""
        self._simple(handle, steps.CLEAR, lambda: handle.plugged.backend.clear_halt(handle.inner, ep))

    def reset_device(self, handle: Handle) -> None:
        """As libusb does. What the device was about to send is gone."""
        handle.plugged.rest.clear()
        self._simple(handle, steps.RESET, lambda: handle.plugged.backend.reset_device(handle.inner))

    def is_kernel_driver_active(self, handle: Handle, intf: int) -> bool:
        """Whether a kernel driver has the interface."""
        return bool(self._simple(handle, steps.KERNEL, lambda: intf in handle.plugged.kernel))

    def detach_kernel_driver(self, handle: Handle, intf: int) -> None:
        """ENOENT if there is none."""

        def perform() -> None:
            if intf not in handle.plugged.kernel:
                raise usb_error(Failure.NOT_FOUND)
            handle.plugged.kernel.discard(intf)
            handle.plugged.detached.add(intf)

        self._simple(handle, steps.KERNEL, perform)

    def attach_kernel_driver(self, handle: Handle, intf: int) -> None:
        """ENOENT if there is none to attach, EBUSY if the interface is claimed."""

        def perform() -> None:
            if intf in handle.claims:
                raise usb_error(Failure.BUSY)
            if intf not in handle.plugged.detached:
                raise usb_error(Failure.NOT_FOUND)
            handle.plugged.detached.discard(intf)
            handle.plugged.kernel.add(intf)

        self._simple(handle, steps.KERNEL, perform)

    # ---- transfers

    def bulk_read(self, handle: Handle, ep: int, intf: int, buff: Any, timeout: int) -> int:
        """As libusb does."""
        return self._read(handle, "bulk", ep, intf, buff, timeout)

    def intr_read(self, handle: Handle, ep: int, intf: int, buff: Any, timeout: int) -> int:
        """As libusb does."""
        return self._read(handle, "intr", ep, intf, buff, timeout)

    def iso_read(self, handle: Handle, ep: int, intf: int, buff: Any, timeout: int) -> int:
        """As libusb does."""
        return self._read(handle, "iso", ep, intf, buff, timeout)

    def bulk_write(self, handle: Handle, ep: int, intf: int, data: Any, timeout: int) -> int:
        """As libusb does."""
        return self._write(handle, "bulk", ep, intf, data, timeout)

    def intr_write(self, handle: Handle, ep: int, intf: int, data: Any, timeout: int) -> int:
        """As libusb does."""
        return self._write(handle, "intr", ep, intf, data, timeout)

    def iso_write(self, handle: Handle, ep: int, intf: int, data: Any, timeout: int) -> int:
        """As libusb does."""
        return self._write(handle, "iso", ep, intf, data, timeout)

    def ctrl_transfer(
        self, handle: Handle, request_type: int, request: int, value: int, index: int, data: Any, timeout: int
    ) -> int:
        """As libusb does."""
        size = len(data) * data.itemsize
        endpoint = 0x80 if request_type & 0x80 else 0
        setup = bytes((request_type & 0xFF, request & 0xFF)) + b"".join(
            (each & 0xFFFF).to_bytes(2, "little") for each in (value, index, size)
        )
        step = Step(0, steps.CONTROL, handle.plugged.name, endpoint, size, setup)
        dev = handle.plugged

        def perform() -> int:
            return int(dev.backend.ctrl_transfer(handle.inner, request_type, request, value, index, data, timeout))

        return self.call(handle, step, perform, memoryview(data).cast("B") if size else None, timeout)

    def _read(self, handle: Handle, kind: str, ep: int, intf: int, buff: Any, timeout: int) -> int:
        dev = handle.plugged
        view = memoryview(buff).cast("B") if len(buff) else memoryview(bytearray())
        step = Step(0, steps.READ, dev.name, ep, len(view), kind=kind, packet=dev.packet_size(ep))
        inner = getattr(dev.backend, f"{kind}_read")

        def perform() -> int:
            kept = dev.take_rest(ep, view)
            if kept:
                return kept
            return int(inner(handle.inner, ep, intf, buff, timeout))

        return self.call(handle, step, perform, view, timeout)

    def _write(self, handle: Handle, kind: str, ep: int, intf: int, data: Any, timeout: int) -> int:
        dev = handle.plugged
        size = len(data) * data.itemsize
        step = Step(0, steps.WRITE, dev.name, ep, size, kind=kind, packet=dev.packet_size(ep))
        step.data = data.tobytes()
        inner = getattr(dev.backend, f"{kind}_write")

        def perform() -> int:
            if len(step.data) == size:
                return int(inner(handle.inner, ep, intf, data, timeout))
            return int(inner(handle.inner, ep, intf, type(data)("B", step.data), timeout))

        return self.call(handle, step, perform, None, timeout)

    # ---- every call

    def _gate(self) -> None:
        if threading.current_thread() in self.abandoned:
            raise GivenUpError

    @staticmethod
    def _need(dev: Plugged) -> None:
        if not dev.present:
            raise usb_error(Failure.NO_DEVICE)

    def _simple(self, handle: Handle, call: str, perform: Callable[[], Any]) -> int:
        def checked() -> int:
            self._need(handle.plugged)
            return int(perform() or 0)

        return self.call(handle, Step(0, call, handle.plugged.name), checked)

    def call(
        self,
        target: Handle | Plugged,
        step: Step,
        perform: Callable[[], int],
        view: memoryview | None = None,
        timeout: int | None = None,
    ) -> int:
        """Number a call, do it, with a fault if it is its turn, and record what came of it.

        `view`: where data from the device go. `timeout`: milliseconds, 0 is none, None where there can be none.
        """
        self._gate()
        handle = target if isinstance(target, Handle) else None
        dev = target.plugged if isinstance(target, Handle) else target
        step.where, step.thread = _where(), threading.current_thread().name
        if handle is not None:
            if handle.closed:
                dev.bus.problem("misuse", f"{handle} is used after it was closed: libusb crashes there", step)
                raise usb_error(Failure.INVALID_PARAM)
            handle.busy += 1
        try:
            kind = dev.bus.begin(step, dev)
            moved = faulty(kind, dev, step, perform, view, timeout) if kind else perform()
            if view is not None and step.is_in:
                step.data = bytes(view[:moved])
            return moved
        except usb.core.USBTimeoutError:
            step.result = "timeout"
            if timeout is not None and (timeout == 0 or timeout >= _LONG) and _on_event_loop():
                dev.bus.problem("blocks", f"a call of up to {timeout or 'unlimited'} ms blocks the event loop", step)
            raise
        except usb.core.USBError as error:
            step.result = f"errno {error.errno}"
            raise
        finally:
            if handle is not None:
                handle.busy -= 1
            dev.bus.over()  # may raise, so that what a run got while it was given up is not taken for an answer


def _where() -> str:
    """The driver's line that has called: the first one outside pyusb and this package."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_PYUSB, _OURS)):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None or frame.f_code.co_filename.startswith(_TRANSFERS) or frame.f_code.co_filename.endswith(_WORKERS):
        return ""  # made by a worker thread, which does not know for whom
    return f"{steps.short_name(frame.f_code.co_filename)}:{frame.f_lineno}"


def _on_event_loop() -> bool:
    if asyncio._get_running_loop() is not None:
        return True
    trio = sys.modules.get("trio")
    return trio is not None and bool(trio.lowlevel.in_trio_run())


# Programs look here for which of pyusb's backends they have (python-escpos does), and this one does all of libusb1's.
BusBackend.__module__ = usb.backend.libusb1.__name__
BACKEND = BusBackend()


@contextmanager
def current(bus: UsbBus) -> Iterator[None]:
    """Let `usb.core.find()` see this bus, and nothing else."""
    modules = (usb.backend.libusb1, usb.backend.libusb0, usb.backend.openusb)
    before = BACKEND.current
    saved = [(module, module.get_backend) for module in modules]
    kept = usb.backend.libusb1._lib_object
    BACKEND.current = bus
    for module in modules:
        module.get_backend = lambda find_library=None: BACKEND
    usb.backend.libusb1._lib_object = BACKEND  # for those who have imported get_backend by its name
    try:
        yield
    finally:
        BACKEND.current = before
        usb.backend.libusb1._lib_object = kept
        for module, get_backend in saved:
            module.get_backend = get_backend
