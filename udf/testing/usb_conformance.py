"""What every bus must do, and pyusb on top of it: one suite for all of them, so that no simulation lies.

    class TestMyBus(UsbConformance):
        @contextmanager
        def bench(self):
            with Emulator() as emulator:
                yield MyBench(emulator)

Owns: the tests. A subclass says how a bus with the loop-back device (udf/testing/devices/loopback.py, or hardware that
does the same) is made. Must never: know which bus it tests, but for what a Bench says of itself.
Called by: pytest, from a test module that subclasses it. One long file, so that a bus's author reads all that is asked.
"""

from __future__ import annotations

import array
import errno
import gc
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import trio
import usb.backend.libusb0
import usb.backend.libusb1
import usb.backend.openusb
import usb.core
import usb.util

from udf.errors import DeviceGone
from udf.testing.devices.loopback import Request
from udf.usb import backend as udf_backend
from udf.usb.bus import Bus, BusDevice
from udf.usb.client import Connection

VENDOR, PRODUCT = 0x1209, 0x7E50
OUT, IN = 0x40, 0xC0  # vendor requests to the device
LOOP_OUT, LOOP_IN = 0x01, 0x81
INTERRUPT_OUT, INTERRUPT_IN = 0x02, 0x82
ISO_OUT, ISO_IN = 0x03, 0x83
SINK, SOURCE = 0x04, 0x84
SOON = 5.0  # seconds for what takes none; only an unplug is measured
GONE_WITHIN = 1.0


class Bench(ABC):
    """One bus with one loop-back device, which is plugged in at the beginning."""

    keeps_partial = True  # what an unlinked transfer had already got arrives
    isochronous = True

    @abstractmethod
    def bus(self) -> Bus:
        """A new bus, not running yet."""

    @abstractmethod
    def plug(self) -> None:
        """Plug the device in (again)."""

    @abstractmethod
    def unplug(self) -> None:
        """Pull it."""


class Opened:
    """The device, as a driver's process has it."""

    def __init__(self, bench: Bench, connection: Connection, device: Any) -> None:
        self.bench = bench
        self.connection = connection
        self.device = device

    def push(self, endpoint: int, data: bytes, *, zlp: bool = False) -> None:
        """Make the device offer data."""
        self.device.ctrl_transfer(OUT, Request.PUSH, int(zlp), endpoint, data)


class UsbConformance:
    """The suite."""

    def bench(self) -> AbstractContextManager[Bench]:
        """A fresh bus with its device."""
        raise NotImplementedError

    @contextmanager
    def opened(self) -> Iterator[Opened]:
        """The device opened and configured, in this process."""
        with self.bench() as bench:

            async def open_first(bus: Bus, changes: Changes) -> tuple[Any, BusDevice]:
                device = await changes.one()
                sock = await bus.open(device.key)
                return sock, bus.devices()[device.key]

            sock, device = on_bus(bench, open_first)
            spec = device.spec()
            connection = Connection(sock, spec.busnum << 16 | spec.devnum)
            try:
                backend = udf_backend.install(connection, spec)
                backend.configure()
                found = usb.core.find(idVendor=VENDOR, idProduct=PRODUCT)
                assert found is not None
                try:
                    yield Opened(bench, connection, found)
                finally:
                    usb.util.dispose_resources(found)
            finally:
                udf_backend.uninstall()
                connection.close()

    # ---- what pyusb sees

    def test_every_default_look_up_finds_exactly_this_device(self) -> None:
        with self.opened() as opened:
            assert [(d.idVendor, d.idProduct) for d in usb.core.find(find_all=True)] == [(VENDOR, PRODUCT)]
            assert usb.core.find(idVendor=0xFFFF) is None
            backends = [
                module.get_backend() for module in (usb.backend.libusb1, usb.backend.libusb0, usb.backend.openusb)
            ]
            assert all(each is opened.device.backend for each in backends)
            assert usb.backend.libusb1.get_backend(find_library=lambda name: None) is opened.device.backend

    def test_descriptors_are_the_devices(self) -> None:
        with self.opened() as opened:
            device = opened.device
            assert [c.bConfigurationValue for c in device] == [1, 2]
            seen = [(i.bInterfaceNumber, i.bAlternateSetting, sorted(e.bEndpointAddress for e in i)) for i in device[0]]
            loops = [LOOP_OUT, INTERRUPT_OUT, LOOP_IN, INTERRUPT_IN]
            assert seen == [
                (0, 0, loops),
                (0, 1, sorted([*loops, ISO_OUT, ISO_IN])),
                (1, 0, [SINK, SOURCE]),
            ]
            assert (device.bus, device.address, bool(device.port_numbers)) == (device.bus, device.address, True)
            assert usb.util.get_string(device, device.iProduct) == device.product == "Loopback"
            assert device.serial_number

    def test_the_device_is_configured_when_a_driver_gets_it(self) -> None:
        with self.opened() as opened:
            assert opened.device.get_active_configuration().bConfigurationValue == 1

    # ---- control transfers

    def test_control_transfers_carry_data_both_ways(self) -> None:
        with self.opened() as opened:
            device = opened.device
            for data in (b"", b"x", bytes(range(64)), bytes(4096)):
                assert device.ctrl_transfer(OUT, Request.ECHO, 0, 0, data) == len(data)
                assert device.ctrl_transfer(IN, Request.ECHO, 0, 0, 4096).tobytes() == data
            setup = device.ctrl_transfer(IN, Request.SETUP, 0x1234, 0x5678, 8)
            assert setup.tobytes() == bytes([IN, Request.SETUP]) + bytes.fromhex("34 12 78 56 08 00")

    def test_an_unknown_request_stalls_and_the_next_one_works(self) -> None:
        with self.opened() as opened:
            fails(errno.EPIPE, -9, opened.device.ctrl_transfer, IN, 0xEE, 0, 0, 8)
            assert len(opened.device.ctrl_transfer(IN, Request.SETUP, 0, 0, 8)) == 8

    def test_a_control_transfer_that_is_never_answered_times_out(self) -> None:
        with self.opened() as opened:
            fails(errno.ETIMEDOUT, -7, opened.device.ctrl_transfer, IN, Request.NEVER, 0, 0, 8, timeout=50)
            assert len(opened.device.ctrl_transfer(IN, Request.SETUP, 0, 0, 8)) == 8

    def test_a_control_transfer_larger_than_libusb_allows_is_refused(self) -> None:
        with self.opened() as opened:
            fails(errno.EINVAL, -2, opened.device.ctrl_transfer, OUT, Request.ECHO, 0, 0, bytes(4097))

    # ---- bulk and interrupt transfers

    @pytest.mark.parametrize("size", [1, 511, 512, 513, 65536, 1 << 20])
    def test_bulk_data_come_back_as_they_went(self, size: int) -> None:
        with self.opened() as opened:
            data = bytes(n * 7 & 0xFF for n in range(size))
            assert opened.device.write(LOOP_OUT, data, 10000) == size
            assert opened.device.read(LOOP_IN, size, 10000).tobytes() == data

    def test_interrupt_data_come_back_as_they_went(self) -> None:
        with self.opened() as opened:
            assert opened.device.write(INTERRUPT_OUT, b"report") == 6
            assert opened.device.read(INTERRUPT_IN, 64).tobytes() == b"report"

    def test_a_short_packet_ends_a_read(self) -> None:
        with self.opened() as opened:
            opened.push(LOOP_IN, b"abc")
            opened.push(LOOP_IN, b"defg")
            assert opened.device.read(LOOP_IN, 4096).tobytes() == b"abc"
            buffer = array.array("B", bytes(512))
            assert opened.device.read(LOOP_IN, buffer) == 4
            assert buffer[:5].tobytes() == b"defg\0"

    def test_a_zero_length_packet_ends_a_read(self) -> None:
        with self.opened() as opened:
            opened.push(LOOP_IN, bytes(512), zlp=True)
            assert len(opened.device.read(LOOP_IN, 4096)) == 512
            opened.push(LOOP_IN, b"")
            assert len(opened.device.read(LOOP_IN, 512)) == 0

    def test_a_device_that_sends_more_than_was_asked_for_is_an_overflow(self) -> None:
        with self.opened() as opened:
            opened.push(LOOP_IN, bytes(100))
            fails(errno.EOVERFLOW, -8, opened.device.read, LOOP_IN, 10)

    def test_a_sink_takes_and_a_source_gives(self) -> None:
        with self.opened() as opened:
            assert opened.device.write(SINK, bytes(100_000), 10000) == 100_000
            assert opened.device.ctrl_transfer(IN, Request.COUNT, 0, 0, 8).tobytes() == (100_000).to_bytes(8, "little")
            assert len(opened.device.read(SOURCE, 65536, 10000)) == 65536

    def test_a_halted_endpoint_stalls_until_it_is_cleared(self) -> None:
        with self.opened() as opened:
            device = opened.device
            device.ctrl_transfer(OUT, Request.HALT, 0, LOOP_IN)
            for _ in range(2):
                fails(errno.EPIPE, -9, device.read, LOOP_IN, 64)
            device.clear_halt(LOOP_IN)
            opened.push(LOOP_IN, b"again")
            assert device.read(LOOP_IN, 64).tobytes() == b"again"

    # ---- time-outs, cancelling, threads

    def test_a_read_of_nothing_times_out_and_takes_nothing_from_the_next(self) -> None:
        with self.opened() as opened:
            for _ in range(3):
                fails(errno.ETIMEDOUT, -7, opened.device.read, LOOP_IN, 64, 20)
            opened.push(LOOP_IN, b"not lost")
            assert opened.device.read(LOOP_IN, 64).tobytes() == b"not lost"

    def test_what_came_before_the_time_was_over_is_returned(self) -> None:
        with self.opened() as opened:
            if not opened.bench.keeps_partial:
                pytest.skip("this bus loses what an unlinked transfer had got")
            opened.push(LOOP_IN, bytes(512))  # a full packet: there might be more
            assert len(opened.device.read(LOOP_IN, 4096, 100)) == 512

    def test_a_cancelled_transfer_ends_at_once(self) -> None:
        with self.opened() as opened:
            transfer = opened.connection.submit(LOOP_IN, 64)
            transfer.cancel()
            fails(errno.EIO, -1, transfer.wait, SOON)

    def test_other_transfers_go_on_while_one_waits(self) -> None:
        with self.opened() as opened, ThreadPoolExecutor() as pool:
            device = opened.device
            waiting = pool.submit(device.read, INTERRUPT_IN, 64, 10000)
            for _ in range(20):
                device.write(LOOP_OUT, b"busy")
                assert device.read(LOOP_IN, 64).tobytes() == b"busy"
            device.write(INTERRUPT_OUT, b"at last")
            assert waiting.result(SOON).tobytes() == b"at last"

    def test_transfers_queued_ahead_are_filled_in_order(self) -> None:
        with self.opened() as opened:
            queued = [opened.connection.submit(LOOP_IN, 64) for _ in range(8)]
            for number in range(8):
                opened.push(LOOP_IN, bytes([number]))
            assert [(each.wait(SOON), each.data) for each in queued] == [(1, bytes([n])) for n in range(8)]

    # ---- claims, configurations, settings

    def test_a_claim_belongs_to_a_handle(self) -> None:
        with self.opened() as opened:
            first, second = opened.device, usb.core.find()
            usb.util.claim_interface(first, 0)
            usb.util.claim_interface(first, 0)
            fails(errno.EBUSY, -6, usb.util.claim_interface, second, 0)
            fails(errno.EBUSY, -6, second.read, LOOP_IN, 64)  # pyusb claims before it transfers
            usb.util.claim_interface(second, 1)
            usb.util.release_interface(first, 0)
            usb.util.claim_interface(second, 0)
            fails(errno.EBUSY, -6, usb.util.claim_interface, first, 0)
            usb.util.dispose_resources(second)
            usb.util.claim_interface(first, 0)

    def test_what_does_not_exist_cannot_be_claimed_released_or_set(self) -> None:
        with self.opened() as opened:
            backend, handle = opened.device.backend, opened.device.backend.open_device(None)
            fails(errno.ENOENT, -5, backend.claim_interface, handle, 7)
            fails(errno.EINVAL, -2, backend.claim_interface, handle, 32)
            fails(errno.ENOENT, -5, backend.release_interface, handle, 0)
            fails(errno.ENOENT, -5, backend.set_configuration, handle, 99)
            fails(errno.ENOENT, -5, backend.set_interface_altsetting, handle, 0, 1)  # not claimed
            backend.claim_interface(handle, 0)
            fails(errno.ENOENT, -5, backend.set_interface_altsetting, handle, 0, 9)
            fails(errno.ENOENT, -5, backend.clear_halt, handle, 0x8F)
            fails(errno.EIO, -1, backend.bulk_read, handle, 0x8F, 0, array.array("B", bytes(8)), 100)
            backend.close_device(handle)

    def test_a_configuration_can_only_be_set_while_nothing_is_claimed(self) -> None:
        with self.opened() as opened:
            device = opened.device
            usb.util.claim_interface(device, 0)
            fails(errno.EBUSY, -6, device.set_configuration, 2)
            usb.util.release_interface(device, 0)
            device.set_configuration(2)
            assert device.get_active_configuration().bConfigurationValue == 2
            with pytest.raises(ValueError, match="Invalid endpoint"):
                device.read(INTERRUPT_IN, 8)
            assert device.write(LOOP_OUT, b"little") == 6
            assert device.read(LOOP_IN, 64).tobytes() == b"little"
            usb.util.dispose_resources(device)
            device.set_configuration()
            assert device.get_active_configuration().bConfigurationValue == 1

    def test_isochronous_packets_come_back(self) -> None:
        with self.opened() as opened:
            if not opened.bench.isochronous:
                pytest.skip("this bus has no isochronous transfers")
            device = opened.device
            with pytest.raises(ValueError, match="Invalid endpoint"):
                device.read(ISO_IN, 192)
            device.set_interface_altsetting(0, 1)
            assert device.write(ISO_OUT, bytes(range(192)) * 2) == 384
            assert device.read(ISO_IN, 192).tobytes() == bytes(range(192))

    def test_a_reset_device_has_its_configuration_and_its_first_settings(self) -> None:
        with self.opened() as opened:
            device = opened.device
            device.set_interface_altsetting(0, 1)
            device.ctrl_transfer(OUT, Request.HALT, 0, LOOP_IN)
            device.reset()
            assert device.get_active_configuration().bConfigurationValue == 1
            device.write(LOOP_OUT, b"fresh")
            assert device.read(LOOP_IN, 64).tobytes() == b"fresh"

    def test_there_is_no_kernel_driver(self) -> None:
        with self.opened() as opened:
            assert opened.device.is_kernel_driver_active(0) is False
            fails(errno.ENOENT, -5, opened.device.detach_kernel_driver, 0)
            fails(errno.ENOENT, -5, opened.device.attach_kernel_driver, 0)

    # ---- unplug

    def test_unplug_while_transfers_wait_is_enodev_for_all_within_a_second(self) -> None:
        with self.opened() as opened, ThreadPoolExecutor(4) as pool:
            device, told = opened.device, threading.Event()
            opened.connection.on_end(told.set)
            usb.util.claim_interface(device, 0)
            waiting = [pool.submit(device.read, endpoint, 64, 0) for endpoint in (LOOP_IN, INTERRUPT_IN)]
            waiting.append(pool.submit(device.ctrl_transfer, IN, Request.NEVER, 0, 0, 8, 0))
            queued = [opened.connection.submit(LOOP_IN, 64) for _ in range(4)]
            begun = time.monotonic()
            opened.bench.unplug()
            for each in waiting:
                fails(errno.ENODEV, -4, each.result, SOON)
            for transfer in queued:
                fails(errno.ENODEV, -4, transfer.wait, SOON)
            assert told.wait(SOON)
            assert time.monotonic() - begun < GONE_WITHIN
            for call in (
                lambda: device.read(LOOP_IN, 64),
                lambda: device.write(LOOP_OUT, b"x"),
                lambda: device.ctrl_transfer(IN, Request.SETUP, 0, 0, 8),
                lambda: device.clear_halt(LOOP_IN),
                device.reset,
                device.set_configuration,
                lambda: usb.util.claim_interface(device, 1),
            ):
                fails(errno.ENODEV, -4, call)
            assert usb.core.find() is None
            usb.util.dispose_resources(device)

    def test_a_device_that_vanishes_by_itself_is_gone_for_the_next_transfer(self) -> None:
        with self.opened() as opened:
            try:
                opened.device.ctrl_transfer(OUT, Request.UNPLUG)  # its answer may or may not still have come
            except usb.core.USBError as exc:
                assert exc.errno == errno.ENODEV  # noqa: PT017 - an error is allowed here, not wanted
            _wait_for_end(opened.connection)
            fails(errno.ENODEV, -4, opened.device.ctrl_transfer, IN, Request.SETUP, 0, 0, 8)

    def test_forgotten_devices_leave_nothing_behind(self) -> None:
        with self.opened() as opened:
            second = usb.core.find()
            usb.util.claim_interface(second, 0)
            del second
            gc.collect()
            usb.util.claim_interface(opened.device, 0)

    # ---- the bus

    def test_a_bus_tells_what_a_device_says_of_itself(self) -> None:
        async def look(bus: Bus, changes: Changes) -> None:
            device = await changes.one()
            assert (device.vendor, device.product, device.product_name) == (VENDOR, PRODUCT, "Loopback")
            assert device.device_class == (0xFF, 0, 0)
            assert device.serial
            assert len(device.device_descriptor) == 18
            assert len(device.configurations) == 2
            assert [number for number, _ in device.interfaces()] == [0, 1]
            assert device.port.startswith(f"{device.busnum}-")

        with self.bench() as bench:
            on_bus(bench, look)

    def test_what_comes_and_goes_is_told_and_each_arrival_has_a_key_of_its_own(self) -> None:
        async def look(bus: Bus, changes: Changes) -> None:
            keys = []
            for _ in range(3):
                keys.append((await changes.one()).key)
                await trio.to_thread.run_sync(bench.unplug)
                await changes.until(lambda: not bus.devices())
                await trio.to_thread.run_sync(bench.plug)
            keys.append((await changes.one()).key)
            assert len(set(keys)) == 4

        with self.bench() as bench:
            on_bus(bench, look)

    def test_a_replug_at_once_is_another_arrival(self) -> None:
        async def look(bus: Bus, changes: Changes) -> None:
            before = (await changes.one()).key
            await trio.to_thread.run_sync(bench.unplug)
            await trio.to_thread.run_sync(bench.plug)
            await changes.until(lambda: [key for key in bus.devices() if key != before] == list(bus.devices()) != [])
            with pytest.raises(DeviceGone):
                await bus.open(before)

        with self.bench() as bench:
            on_bus(bench, look)

    def test_a_device_is_opened_once_at_a_time_and_present_meanwhile(self) -> None:
        async def look(bus: Bus, changes: Changes) -> None:
            device = await changes.one()
            key = device.key
            for _ in range(3):
                sock = await bus.open(key)
                with pytest.raises(OSError, match="in use") as caught:
                    await bus.open(key)
                assert caught.value.errno == errno.EBUSY
                assert list(bus.devices()) == [key]
                with Connection(sock, device.busnum << 16 | device.devnum) as connection:
                    assert (await trio.to_thread.run_sync(connection.control, 0x80, 6, 0x100, 0, 18)).actual == 18
            assert list(bus.devices()) == [key]

        with self.bench() as bench:
            on_bus(bench, look)

    def test_unplug_of_an_open_device_ends_its_connection_and_its_presence(self) -> None:
        async def look(bus: Bus, changes: Changes) -> None:
            sock = await bus.open((await changes.one()).key)
            with Connection(sock) as connection:
                begun = time.monotonic()
                await trio.to_thread.run_sync(bench.unplug)
                await trio.to_thread.run_sync(_wait_for_end, connection)
                assert time.monotonic() - begun < GONE_WITHIN
                await changes.until(lambda: not bus.devices())

        with self.bench() as bench:
            on_bus(bench, look)

    def test_a_key_that_never_was_is_gone(self) -> None:
        async def look(bus: Bus, changes: Changes) -> None:
            await changes.one()
            with pytest.raises(DeviceGone):
                await bus.open("9-9@9")

        with self.bench() as bench:
            on_bus(bench, look)


class Changes:
    """Waiting for what a bus calls `changed` for."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._event = trio.Event()

    def changed(self) -> None:
        """What the bus calls."""
        self._event.set()
        self._event = trio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Until it is true after some change."""
        with trio.fail_after(SOON * 2):
            while not condition():
                await self._event.wait()

    async def one(self) -> BusDevice:
        """The one device, when it is there."""
        await self.until(lambda: len(self._bus.devices()) == 1)
        return next(iter(self._bus.devices().values()))


def on_bus(bench: Bench, function: Callable[[Bus, Changes], Awaitable[Any]]) -> Any:
    """Run it in a loop of its own beside a running bus."""

    async def main() -> Any:
        bus = bench.bus()
        changes = Changes(bus)
        async with trio.open_nursery() as nursery:
            with trio.fail_after(SOON * 2):
                await nursery.start(bus.run, changes.changed)
            with trio.fail_after(SOON * 6):
                result = await function(bus, changes)
            nursery.cancel_scope.cancel()
        return result

    return trio.run(main)


def _wait_for_end(connection: Connection) -> None:
    told = threading.Event()
    connection.on_end(told.set)
    assert told.wait(SOON)


def fails(number: int | None, code: int, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
    """The call raises what libusb raises."""
    with pytest.raises(usb.core.USBError) as caught:
        call(*arguments, **keywords)
    assert (caught.value.errno, caught.value.backend_error_code) == (number, code), str(caught.value)
    assert isinstance(caught.value, usb.core.USBTimeoutError) == (number == errno.ETIMEDOUT)
