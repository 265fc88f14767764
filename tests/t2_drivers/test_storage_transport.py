"""usb_storage over a transport that breaks, lies or is not there: bounded, and recovered where that can be."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Any

import pytest
import trio

from udf import ContractError, DeviceGone
from udf.testing.devices import BulkIn, Configuration, Emulator, Interface, Setup, Stall

from . import lab
from .sticks import Stick

unit_module: Any = lab.module("usb_storage", "unit")
transport_module: Any = lab.module("usb_storage", "transport")


@pytest.fixture
def bus() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    lab.shorten_patience(monkeypatch)


class Wrong(Stick):
    """Breaks the status of the READs that `bad` counts down."""

    bad = 0
    how = "tag"

    def push_csw(self, tag: int, residue: int, status: int) -> None:
        if self.bad and self.log and self.log[-1] == 0x28:
            self.bad -= 1
            match self.how:
                case "tag":
                    tag ^= 1
                case "phase":
                    status = 2
                case "residue":
                    residue = 0xFFFFFFFF
                case "short":
                    self.push(1, b"USBS")
                    return
                case "long":
                    self.push(1, bytes(512))
                    return
                case "babble":
                    self.push(1, bytes(100_000))
                    return
                case "signature":
                    self.push(1, bytes(13))
                    return
                case "silence":
                    return
        super().push_csw(tag, residue, status)


HOWS = ["tag", "phase", "residue", "short", "long", "babble", "signature", "silence"]


@pytest.mark.parametrize("queue", [True, False])
@pytest.mark.parametrize("how", HOWS)
async def test_one_broken_status_costs_a_reset_recovery_and_nothing_else(bus: Emulator, how: str, queue: bool) -> None:
    stick = Wrong()
    stick.how = how
    stick.disk[:] = os.urandom(len(stick.disk))
    async with lab.started(lab.UsbStorage, bus.plug(stick), queue=queue) as driver:
        unit = (await driver.units())[""]
        stick.bad, stick.resets = 1, 0
        assert await unit.read(0, 2048) == stick.disk[:2048]
        assert stick.resets == 1
        assert await unit.read(2048, 2048) == stick.disk[2048:4096]
        assert stick.resets == 1


@pytest.mark.parametrize("how", HOWS)
async def test_a_status_that_is_always_broken_fails_in_bounded_time(bus: Emulator, how: str) -> None:
    stick = Wrong()
    stick.how = how
    async with lab.started(lab.UsbStorage, bus.plug(stick)) as driver:
        unit = (await driver.units())[""]
        stick.bad = 10_000
        with trio.fail_after(40), pytest.raises(OSError) as caught:
            await unit.read(0, 2048)
        assert caught.value.errno == errno.EIO
        stick.bad = 0
        assert await unit.read(0, 2048) == stick.disk[:2048]


async def test_a_status_in_the_place_of_the_data_is_understood(bus: Emulator) -> None:
    """Some devices skip the data stage of a command that they refuse, without a stall."""

    class Skips(Stick):
        def on_out(self, endpoint: int, data: bytes) -> None:
            if data[15:16] == b"\x1a":
                self.log.append(0x1A)
                self.push_csw(int.from_bytes(data[4:8], "little"), int.from_bytes(data[8:12], "little"), 1)
                self.refuse(5, 0x20)
                return
            super().on_out(endpoint, data)

    stick = Skips()
    async with lab.started(lab.UsbStorage, bus.plug(stick)) as driver:
        assert (await driver.units())[""].size == 64 * 512
    assert stick.log.count(0x1A) == 2
    assert stick.resets == 1


async def test_a_device_that_lies_about_residues_is_found_out(bus: Emulator) -> None:
    class Liar(Stick):
        def push_csw(self, tag: int, residue: int, status: int) -> None:
            super().push_csw(tag, residue or 1, status)

    stick = Liar()
    stick.disk[:512] = b"y" * 512
    async with lab.started(lab.UsbStorage, bus.plug(stick)) as driver:
        assert await (await driver.units())[""].read(0, 512) == b"y" * 512


async def test_a_read_that_always_brings_too_little_is_an_error_and_not_zeros(bus: Emulator) -> None:
    class Short(Stick):
        def read_blocks(self, lba: int, count: int) -> bytes | None:
            return bytes((count - 1) * self.block_size)

    async with lab.started(lab.UsbStorage, bus.plug(Short())) as driver:
        with pytest.raises(OSError, match="never moves all"):
            await (await driver.units())[""].read(0, 2048)


async def test_a_device_that_chokes_on_large_transfers_gets_smaller_ones(bus: Emulator) -> None:
    class Chokes(Stick):
        blocks = 2048

        def read_blocks(self, lba: int, count: int) -> bytes | None:
            if count > 100:
                self.halt(0x81, wedge=True)
                return b""
            return super().read_blocks(lba, count)

        def on_control(self, setup: Setup, data: bytes) -> bytes | None:
            self.unhalt(0x81)
            return super().on_control(setup, data)

    stick = Chokes()
    stick.disk[:] = os.urandom(len(stick.disk))
    async with lab.started(lab.UsbStorage, bus.plug(stick)) as driver:
        assert await (await driver.units())[""].read(0, 1 << 20) == stick.disk


async def test_a_device_that_stalls_an_early_read_is_served_one_transfer_at_a_time(bus: Emulator) -> None:
    """QEMU's usb-storage does: an IN token without a command is an error to it."""

    class Strict(Stick):
        def on_in(self, endpoint: int, length: int) -> bytes | memoryview | None:
            data = super().on_in(endpoint, length)
            if data is None:
                self.strict += 1
                raise Stall
            return data

        strict = 0

    stick = Strict()
    stick.disk[:] = os.urandom(len(stick.disk))
    async with lab.started(lab.UsbStorage, bus.plug(stick)) as driver:
        unit = (await driver.units())[""]
        assert await unit.read(0, 4096) == stick.disk[:4096]
        await unit.write(0, bytes(512))
        assert stick.disk[:512] == bytes(512)


@pytest.mark.parametrize("endpoints", [[], [BulkIn(1)]])
async def test_a_device_without_its_endpoints_is_refused_with_a_sentence(bus: Emulator, endpoints: list[Any]) -> None:
    class Bare(Stick):
        configurations = [Configuration([Interface(0x08, 0x06, 0x50, endpoints=endpoints)])]

    with pytest.raises(ContractError, match="lacks a bulk endpoint"):
        async with lab.started(lab.UsbStorage, bus.plug(Bare())):
            pass


async def test_a_device_that_answers_nothing_is_refused_in_bounded_time(bus: Emulator) -> None:
    class Dead(Stick):
        def on_out(self, endpoint: int, data: bytes) -> None:
            return

    with trio.fail_after(30), pytest.raises(ContractError):
        async with lab.started(lab.UsbStorage, bus.plug(Dead())):
            pass


async def test_a_device_that_stalls_everything_is_refused(bus: Emulator) -> None:
    class Wall(Stick):
        def on_out(self, endpoint: int, data: bytes) -> None:
            raise Stall

        def on_control(self, setup: Setup, data: bytes) -> bytes | None:
            raise Stall

    with trio.fail_after(30), pytest.raises(ContractError):
        async with lab.started(lab.UsbStorage, bus.plug(Wall())):
            pass


async def test_every_lun_is_a_unit(bus: Emulator) -> None:
    stick = Stick()
    stick.luns = 3
    async with lab.started(lab.UsbStorage, bus.plug(stick)) as driver:
        assert list(await driver.units()) == ["", "lun1", "lun2"]


async def test_what_waits_at_an_unplug_ends_with_device_gone(bus: Emulator) -> None:
    class Deaf(Stick):
        is_deaf = False

        def on_out(self, endpoint: int, data: bytes) -> None:
            if not self.is_deaf:
                super().on_out(endpoint, data)

    stick = Deaf()
    plugged = bus.plug(stick)
    async with lab.started(lab.UsbStorage, plugged) as driver:
        unit = (await driver.units())[""]
        stick.is_deaf = True
        ended: list[type] = []

        async def read() -> None:
            try:
                await unit.read(0, 512)
            except Exception as exc:
                ended.append(type(exc))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked(0.05)
            started = trio.current_time()
            plugged.unplug()
        assert trio.current_time() - started < 1
        assert ended == [DeviceGone] * 5
