"""What the tests of the drivers share: drivers found by path, as the host finds them, on devices of an emulator."""

from __future__ import annotations

import base64
import contextlib
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio

from udf.driver.usb import open_device
from udf.host.load import load_class
from udf.messages import DeviceSpec
from udf.testing.devices import Plugged
from udf.usb.backend import uninstall

DRIVERS = Path(__file__).resolve().parents[2] / "drivers"


def driver_class(name: str, class_name: str) -> type:
    """The class of a driver."""
    path = DRIVERS / name / "__init__.py"
    return load_class(str(path if path.exists() else DRIVERS / f"{name}.py"), class_name)


def module(driver: str, name: str) -> ModuleType:
    """A module of a driver's package that is loaded."""
    return sys.modules[f"udf_driver_{driver}.{name}"]


UsbStorage = driver_class("usb_storage", "UsbStorage")
CdcAcm = driver_class("cdc_acm", "CdcAcm")
Thermometer = driver_class("thermometer", "Thermometer")


def shorten_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """For devices that do not answer: nobody waits for them as long as for a real one."""
    unit = module("usb_storage", "unit")
    for name, seconds in (("QUICK", 0.5), ("SLOW", 0.5), ("OPTIONAL", 0.3), ("PATIENCE", 0.5), ("BUDGET", 8.0)):
        monkeypatch.setattr(unit, name, seconds)


def spec_of(plugged: Plugged, interface: int | None = None) -> DeviceSpec:
    """What the supervisor would tell a driver host of a plugged device."""
    device = plugged.device
    configurations = (device.configuration_descriptor(index) for index in range(len(device.configurations)))
    return DeviceSpec(
        bus="usbip",
        key=f"{plugged.busid}#{plugged.arrival}",
        busnum=plugged.busnum,
        devnum=plugged.devnum,
        port=plugged.busid,
        speed=device.speed,
        device_descriptor=base64.b64encode(device.device_descriptor()).decode(),
        configurations=[base64.b64encode(each).decode() for each in configurations if each is not None],
        configuration=device.configuration,
        serial=device.serial or "",
        interface=interface,
    )


@contextlib.contextmanager
def opened(cls: type, plugged: Plugged, *, interface: int | None = None, **options: Any) -> Iterator[Any]:
    """A driver on an imported device, as a host makes it; not started."""
    device, transfers = open_device(plugged.connect(), spec_of(plugged, interface))
    try:
        driver = cls.__new__(cls)
        driver.device, driver.usb = device, transfers
        driver.__init__(**options)
        yield driver
    finally:
        device.backend.connection.close()
        uninstall()


@contextlib.asynccontextmanager
async def started(cls: type, plugged: Plugged, **options: Any) -> AsyncIterator[Any]:
    """The same, started; stopped in the end."""
    with opened(cls, plugged, **options) as driver:
        try:
            await driver.start()
            yield driver
        finally:
            with trio.CancelScope(shield=True):
                await driver.stop()
