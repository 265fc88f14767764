"""UsbDriver and its awaited transfers, on the emulator's loop-back device."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import trio
import usb.core

import udf
from udf.driver.usb import UsbDriver, open_device
from udf.errors import DeviceGone
from udf.testing.devices import Device, Emulator, Plugged
from udf.testing.devices.loopback import Loopback, Request
from udf.testing.devices.server import describe
from udf.testing.devices.thermometer import Thermometer
from udf.usb import backend as udf_backend
from udf.usb.operations import Watched
from udf.usb.present import watched
from udf.usb.transfers import Blocking, Transfers

OUT, IN = 0x40, 0xC0


@contextmanager
def driver_of(device: Device | None = None, cls: type[UsbDriver] = UsbDriver) -> Iterator[tuple[UsbDriver, Plugged]]:
    """A driver as its host makes it: the device is there before `__init__` runs."""
    with Emulator() as emulator:
        plugged = emulator.plug(device or Loopback())
        spec = watched(msgspec.convert(describe(plugged), Watched)).spec()
        driver = cls.__new__(cls)
        driver.device, driver.usb = open_device(emulator.connect(plugged), spec)
        driver.__init__()  # type: ignore[misc]
        try:
            yield driver, plugged
        finally:
            driver.usb.connection.close()
            udf_backend.uninstall()


def run(function: Any) -> None:
    with driver_of() as (driver, plugged):
        trio.run(function, driver.usb, plugged)


def test_the_author_interface_has_it() -> None:
    assert udf.UsbDriver is UsbDriver


def test_a_driver_finds_its_device_configured_and_by_pyusb() -> None:
    with driver_of() as (driver, _):
        assert usb.core.find(idVendor=0x1209, idProduct=0x7E50) == driver.device
        assert driver.device.get_active_configuration().bConfigurationValue == 1


def test_transfers_are_awaited() -> None:
    async def main(transfers: Transfers, _: Plugged) -> None:
        assert await transfers.control_out(OUT, Request.ECHO, data=b"kept") == 4
        assert await transfers.control_in(IN, Request.ECHO, length=64) == b"kept"
        assert await transfers.write(0x01, bytearray(b"loop")) == 4
        assert await transfers.read(0x81, 512) == b"loop"

    run(main)


def test_transfers_run_side_by_side() -> None:
    async def main(transfers: Transfers, _: Plugged) -> None:
        got = []

        async def read() -> None:
            got.append(await transfers.read(0x82, 64))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await transfers.write(0x01, b"meanwhile")
            assert await transfers.read(0x81, 512) == b"meanwhile"
            await transfers.write(0x02, b"then")
        assert got == [b"then"]

    run(main)


def test_a_time_out_is_pyusbs_own() -> None:
    async def main(transfers: Transfers, _: Plugged) -> None:
        with pytest.raises(usb.core.USBTimeoutError) as caught:
            await transfers.read(0x81, 64, 0.02)
        assert caught.value.errno == errno.ETIMEDOUT

    run(main)


def test_a_stall_is_an_error_and_clear_halt_ends_it() -> None:
    async def main(transfers: Transfers, _: Plugged) -> None:
        await transfers.control_out(OUT, Request.HALT, 0, 0x81)
        with pytest.raises(usb.core.USBError) as caught:
            await transfers.read(0x81, 64)
        assert caught.value.errno == errno.EPIPE
        await transfers.clear_halt(0x81)
        await transfers.control_out(OUT, Request.HALT, 0, 0x81)
        await transfers.reset()
        await transfers.write(0x01, b"works")
        assert await transfers.read(0x81, 64) == b"works"

    run(main)


def test_a_cancelled_read_is_unlinked_and_takes_nothing() -> None:
    async def main(transfers: Transfers, _: Plugged) -> None:
        for _ in range(5):
            begun = time.monotonic()
            with trio.move_on_after(0.02) as scope:
                await transfers.read(0x81, 64, None)
            assert scope.cancelled_caught
            assert time.monotonic() - begun < 10
        await transfers.write(0x01, b"for the next one")
        assert await transfers.read(0x81, 64) == b"for the next one"

    run(main)


def test_unplug_is_device_gone_for_every_transfer_and_an_event() -> None:
    async def main(transfers: Transfers, plugged: Plugged) -> None:
        async def read(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            task_status.started()
            with pytest.raises(DeviceGone):
                await transfers.read(0x81, 64, None)

        async with trio.open_nursery() as nursery:
            for _ in range(40):  # more than there are workers
                await nursery.start(read)
            assert not transfers.gone.is_set()
            await trio.to_thread.run_sync(plugged.unplug)
            with trio.fail_after(10):
                await transfers.gone.wait()
        assert transfers.gone.is_set()
        with pytest.raises(DeviceGone):
            await transfers.control_in(IN, Request.SETUP, length=8)
        with trio.fail_after(10):
            await transfers.gone.wait()

    run(main)


def test_a_device_that_is_gone_before_it_is_opened_is_device_gone() -> None:
    with Emulator() as emulator:
        plugged = emulator.plug(Loopback())
        spec = watched(msgspec.convert(describe(plugged), Watched)).spec()
        sock = emulator.connect(plugged)
        plugged.unplug()
        try:
            with pytest.raises(DeviceGone):
                open_device(sock, spec)
        finally:
            udf_backend.uninstall()


def test_a_request_that_does_not_fit_into_a_setup_packet_is_refused() -> None:
    async def main(transfers: Transfers, _: Plugged) -> None:
        with pytest.raises(usb.core.USBError) as caught:
            await transfers.control_in(IN, 1, 0x10000, length=4)
        assert caught.value.errno == errno.EINVAL

    run(main)


def test_a_function_in_a_thread_may_queue_transfers_and_is_cancelled_with_them() -> None:
    async def main(transfers: Transfers, plugged: Plugged) -> None:
        def loop(blocking: Blocking) -> bytes:
            waiting = blocking.submit(0x81, 512)
            blocking.write(0x01, b"through the loop")
            blocking.wait(waiting)
            assert blocking.control_in(IN, Request.SETUP, length=8)[1] == Request.SETUP
            return waiting.data

        assert await transfers.in_thread(loop) == b"through the loop"

        def forever(blocking: Blocking) -> None:
            while True:
                blocking.read(0x81, 64, None)

        with trio.move_on_after(0.05) as scope:
            await transfers.in_thread(forever)
        assert scope.cancelled_caught

        def forgets(blocking: Blocking) -> None:
            blocking.submit(0x81, 64)
            blocking.submit(0x81, 64)

        await transfers.in_thread(forgets)
        buffer = bytearray(64)
        await transfers.write(0x01, b"after it")
        assert await transfers.in_thread(lambda blocking: blocking.read_into(0x81, buffer)) == 8
        with pytest.raises(ZeroDivisionError):
            await transfers.in_thread(lambda blocking: 1 // 0)
        await trio.to_thread.run_sync(plugged.unplug)
        with pytest.raises(DeviceGone):
            await transfers.in_thread(loop)

    run(main)


def test_the_smallest_driver_reads_its_device() -> None:
    class Celsius(UsbDriver):
        async def read(self, path: str, offset: int, size: int) -> bytes:
            raw = await self.usb.control_in(0xC0, 1, length=2)
            return b"%.2f\n" % (int.from_bytes(raw, "little", signed=True) / 100)

    thermometer = Thermometer()
    with driver_of(thermometer, Celsius) as (driver, _):
        text = trio.run(driver.read, "/celsius", 0, 100)
        assert text.endswith(b"\n")
        float(text)
