"""Two drivers on one device, each with its interface."""

from __future__ import annotations

import array
import errno
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import msgspec
import pytest
import usb.core

from tests.t1_usb.peer import Peer, echo
from udf.messages import DeviceSpec
from udf.testing.devices import BulkIn, BulkOut, Configuration, Device, Emulator, Interface, InterruptIn, Plugged
from udf.testing.devices.loopback import Loopback, Request
from udf.testing.devices.server import describe
from udf.testing.usb_conformance import IN, LOOP_IN, LOOP_OUT, SINK, SOURCE, fails
from udf.usb import usbip
from udf.usb.backend import Backend
from udf.usb.client import Connection
from udf.usb.operations import Watched
from udf.usb.present import watched
from udf.usb.share import Share


@contextmanager
def shared(device: Device | None = None) -> Iterator[tuple[Share, Plugged, DeviceSpec]]:
    with Emulator() as emulator:
        plugged = emulator.plug(device or Loopback())
        spec = watched(msgspec.convert(describe(plugged), Watched)).spec()
        share = Share(emulator.connect(plugged), spec)
        try:
            yield share, plugged, spec
        finally:
            share.close()


@contextmanager
def driver(share: Share, spec: DeviceSpec, interface: int) -> Iterator[tuple[Connection, usb.core.Device]]:
    bound = msgspec.structs.replace(spec, interface=interface)
    with Connection(share.connect(interface), 0x77) as connection:
        backend = Backend(connection, bound)
        backend.configure()
        yield connection, usb.core.find(backend=backend)


def test_each_driver_has_its_interface_and_no_other() -> None:
    with shared() as (share, _, spec), driver(share, spec, 0) as (loop, first), driver(share, spec, 1) as (_, second):
        assert first.write(LOOP_OUT, b"mine") == 4
        assert first.read(LOOP_IN, 64).tobytes() == b"mine"
        assert second.write(SINK, bytes(5000)) == 5000
        assert len(second.read(SOURCE, 65536)) == 65536
        fails(errno.EBUSY, -6, first.read, SOURCE, 64)
        # Not even a driver that goes around pyusb and its claims.
        fails(errno.EPIPE, -9, loop.transfer, SOURCE, 64, timeout=5)
        fails(errno.EPIPE, -9, loop.transfer, 0x8E, 64, timeout=5)


def test_numbers_of_two_drivers_do_not_mix() -> None:
    def work(device: usb.core.Device, out: int, into: int, letter: int) -> None:
        for size in range(1, 4000, 38):  # never whole packets only
            if out == LOOP_OUT:
                data = bytes([letter]) * size
                assert device.write(out, data, 5000) == size
                assert device.read(into, 4096, 5000).tobytes() == data
            else:
                assert device.read(into, size, 5000).tobytes() == bytes(size)
            assert device.ctrl_transfer(IN, Request.SETUP, letter, 0, 8)[2] == letter

    with (
        shared() as (share, _, spec),
        driver(share, spec, 0) as (_, first),
        driver(share, spec, 1) as (_, second),
        ThreadPoolExecutor() as pool,
    ):
        works = [pool.submit(work, first, LOOP_OUT, LOOP_IN, 1), pool.submit(work, second, SINK, SOURCE, 2)]
        for each in works:
            each.result(60)


def test_what_all_share_cannot_be_changed_by_one() -> None:
    with shared() as (share, _, spec), driver(share, spec, 0) as (connection, device):
        device.set_configuration(1)  # it is set already
        fails(errno.EBUSY, -6, device.set_configuration, 2)
        fails(None, -99, device.reset)
        refused = [
            (0x00, 9, 2, 0, 0),  # SET_CONFIGURATION
            (0x00, 5, 9, 0, 0),  # SET_ADDRESS
            (0x00, 3, 1, 0, 0),  # SET_FEATURE of the device
            (0x23, 3, 4, 1, 0),  # the port's reset
            (0x01, 11, 0, 1, 0),  # SET_INTERFACE of another's
            (0xA1, 1, 0, 1, 8),  # a class request to another's
            (0x02, 1, 0, SOURCE, 0),  # CLEAR_FEATURE of another's endpoint
            (0x02, 3, 0, 0, 0),  # SET_FEATURE of endpoint 0
        ]
        for request_type, request, value, index, length in refused:
            fails(errno.EPIPE, -9, connection.control, request_type, request, value, index, length, 5)
        assert connection.control(0x80, 6, 0x100, 0, 18, 5).actual == 18
        assert connection.control(0x00, 9, 1, 0, 0, 5).actual == 0
        assert connection.control(0x82, 0, 0, 0, 2, 5).actual == 2
        device.set_interface_altsetting(0, 1)
        device.clear_halt(LOOP_IN)


def test_time_outs_and_cancelling_work_through_it() -> None:
    with shared() as (share, _, spec), driver(share, spec, 0) as (connection, device):
        for _ in range(3):
            fails(errno.ETIMEDOUT, -7, device.read, LOOP_IN, 64, 20)
        transfer = connection.submit(LOOP_IN, 64)
        transfer.cancel()
        fails(errno.EIO, -1, transfer.wait, 5)
        device.write(LOOP_OUT, b"kept for me")
        assert device.read(LOOP_IN, 64).tobytes() == b"kept for me"


def test_unplug_is_the_end_for_every_driver() -> None:
    with (
        shared() as (share, plugged, spec),
        driver(share, spec, 0) as (_, first),
        driver(share, spec, 1) as (second, _),
    ):
        told = threading.Event()
        second.on_end(told.set)
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(first.read, LOOP_IN, 64, 0)
            plugged.unplug()
            fails(errno.ENODEV, -4, waiting.result, 5)
        assert told.wait(1)
        share._thread.join(5)
        with pytest.raises(OSError, match="gone"):
            share.connect(0)


def test_a_drivers_death_frees_its_interface_and_takes_back_what_it_had_asked() -> None:
    with shared() as (share, _, spec), driver(share, spec, 1) as (_, other):
        for _ in range(3):
            with driver(share, spec, 0) as (connection, _):
                with pytest.raises(OSError, match="in use") as caught:
                    share.connect(0)
                assert caught.value.errno == errno.EBUSY
                for _ in range(5):
                    connection.submit(LOOP_IN, 64)
        with driver(share, spec, 0) as (_, device):
            device.write(LOOP_OUT, b"to the living")
            assert device.read(LOOP_IN, 64).tobytes() == b"to the living"
        assert len(other.read(SOURCE, 512)) == 512


class Modem(Device):
    """Two interfaces that are one function, and a third that is not."""

    vendor, product = 0x1209, 0x7E52
    configured = 1
    configurations = [
        Configuration(
            [
                Interface(2, 2, 1, [InterruptIn(3)], extra=bytes([5, 0x24, 6, 0, 1])),
                Interface(10, 0, 0, [BulkIn(1), BulkOut(1)]),
                Interface(0xFF, 0, 0, [BulkIn(2), BulkOut(2)]),
            ]
        )
    ]

    def on_out(self, endpoint: int, data: bytes) -> None:
        self.push(endpoint, data)


def test_a_driver_has_the_interfaces_that_belong_to_its_own() -> None:
    with shared(Modem()) as (share, _, spec), driver(share, spec, 0) as (_, modem):
        modem.write(0x01, b"AT")
        assert modem.read(0x81, 64).tobytes() == b"AT"
        with pytest.raises(OSError, match="in use"):
            share.connect(1)
        fails(errno.EBUSY, -6, modem.write, 0x02, b"no")
        with driver(share, spec, 2) as (_, other):
            assert other.write(0x02, b"yes") == 3


def test_an_interface_that_does_not_exist_cannot_be_had() -> None:
    with shared() as (share, _, _spec):
        with pytest.raises(OSError, match="no interface 5") as caught:
            share.connect(5)
        assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(
    "noise",
    [
        b"\xff" * 48,
        usbip.Submit(1, 1, 1, 1, 0, 2**31 - 1, 0, 0, 0, bytes(8)).pack(),
        usbip.Submit(1, 1, 1, 1, 0, -5, 0, 0, 0, bytes(8)).pack(),
        usbip.Submit(1, 1, 1, 99, 0, 5, 0, 0, 0, bytes(8)).pack(),
        usbip.Submit(1, 1, 1, 1, 0, 5, 0, 100_000, 0, bytes(8)).pack(),
        usbip.Submit(1, 1, 1, 1, 0, 64, 0, 0, 0, bytes(8)).pack() * 2,
    ],
    ids=["noise", "huge", "negative", "endpoint", "packets", "twice"],
)
def test_a_driver_that_breaks_the_protocol_ends_alone(noise: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with shared() as (share, _, spec), driver(share, spec, 1) as (_, other):
        sock = share.connect(0)
        sock.sendall(noise)
        assert sock.recv(1) == b""
        sock.close()
        assert len(other.read(SOURCE, 512)) == 512
    assert "is cut off" in caplog.text


def test_a_server_that_lies_to_a_share_ends_all_of_it(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = socket.socketpair()
    peer = Peer(theirs, echo)
    with Emulator() as emulator:
        plugged = emulator.plug(Loopback())
        spec = watched(msgspec.convert(describe(plugged), Watched)).spec()
    spec = msgspec.structs.replace(spec, configuration=1)
    share = Share(ours, spec)
    with Connection(share.connect(0)) as connection:
        buffer = array.array("B", bytes(64))
        assert connection.transfer(LOOP_IN, buffer, timeout=5).actual == 64
        peer.say(usbip.RetSubmit(4711, 0, 0).pack())
        told = threading.Event()
        connection.on_end(told.set)
        assert told.wait(5)
    share.close()
    peer.hang_up()
    peer.thread.join(5)
    theirs.close()
    assert "given up" in caplog.text
