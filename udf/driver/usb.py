"""UsbDriver: a driver for a USB device.

Owns: what an author subclasses, and how a device's connection becomes `self.device` and `self.usb`. Must never: know
where the device is, or how it is reached. Called by: the driver host, before the driver's own `__init__`.

A driver that provides files also implements the verbs of FsDriver, one that provides block devices `units`; one that
provides something else needs neither.
"""

from __future__ import annotations

import socket
from typing import Any

import usb.core

from udf.driver.block import BlockSource
from udf.driver.fs import FsDriver
from udf.errors import DeviceGone
from udf.messages import DeviceSpec
from udf.usb.backend import Backend, install
from udf.usb.client import Connection
from udf.usb.transfers import Transfers


class UsbDriver(FsDriver, BlockSource):
    """A driver of the one device that it was bound to. Both ways to it may be used together, from any thread.

    The device is configured when the driver is made. Unplug ends every transfer that waits: with DeviceGone in
    `self.usb`, with USBError(ENODEV) in pyusb. There is nothing to clean up.
    """

    device: Any  # usb.core.Device: pyusb, as ever; its calls block, so keep them in threads or short
    usb: Transfers  # the same transfers to be awaited

    async def start(self) -> None:
        """Make the device ready; the driver counts as ready when this returns. Optional."""

    async def eject(self) -> None:
        """An operator takes the device out; `stop` follows. What was written has been flushed. Optional."""

    async def stop(self) -> None:
        """The driver is being stopped in an orderly way; the device may be gone already. Optional."""


def open_device(sock: socket.socket, spec: DeviceSpec) -> tuple[Any, Transfers]:
    """Make the device behind an imported connection the one of this process: its `device` and `usb`.

    The socket is taken over. pyusb finds this device and no other from here on.
    """
    connection = Connection(sock, (spec.busnum << 16 | spec.devnum) & 0xFFFFFFFF, name=spec.port or "a USB device")
    try:
        backend: Backend = install(connection, spec)
        backend.configure()
        device = usb.core.find()
    except usb.core.USBError as exc:
        connection.close()
        raise DeviceGone(f"the device could not be opened: {exc}") from exc
    except BaseException:
        connection.close()
        raise
    if device is None:
        connection.close()
        raise DeviceGone("the device has been unplugged")
    return device, Transfers(backend)
