"""The conformance suite on our own server: watched over a unix socket, polled over TCP as any other server is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from udf.testing.devices import Emulator
from udf.testing.devices.loopback import Loopback
from udf.testing.usb_conformance import Bench, UsbConformance
from udf.usb import operations, remote
from udf.usb.bus import Bus
from udf.usb.operations import Address
from udf.usb.remote import UsbipBus


class EmulatorBench(Bench):
    def __init__(self, emulator: Emulator, address: Address) -> None:
        self._emulator = emulator
        self._address = address
        self._plugged = emulator.plug(Loopback())

    def bus(self) -> Bus:
        return UsbipBus(self._address)

    def plug(self) -> None:
        self._plugged.replug()

    def unplug(self) -> None:
        self._plugged.unplug()


class TestWatchedOverAUnixSocket(UsbConformance):
    @contextmanager
    def bench(self) -> Iterator[Bench]:
        with Emulator() as emulator:
            yield EmulatorBench(emulator, Address(path=emulator.path))


class TestPolledOverTcp(UsbConformance):
    @pytest.fixture(autouse=True)
    def _unknown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # The server closes the connection on an operation that it does not know, as usbipd does.
        monkeypatch.setattr(operations, "REQUEST_WATCH", 0x80FE)
        monkeypatch.setattr(remote, "POLL_SECONDS", 0.1)
        monkeypatch.setattr(remote, "BACK_IN_LIST", 0.2)

    @contextmanager
    def bench(self) -> Iterator[Bench]:
        with Emulator(listen=("127.0.0.1", 0)) as emulator:
            assert emulator.address is not None
            yield EmulatorBench(emulator, Address(host="127.0.0.1", port=emulator.address[1]))
