"""usb_storage on devices that no specification allows: one clear failure or success, in bounded time."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from typing import Any

import pytest
import trio

from udf.testing.devices import Emulator

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


async def test_a_stick_is_read_and_written(bus: Emulator) -> None:
    stick = Stick()
    stick.disk[:] = os.urandom(len(stick.disk))
    plugged = bus.plug(stick)
    async with lab.started(lab.UsbStorage, plugged) as driver:
        (unit,) = (await driver.units()).values()
        assert (unit.size, unit.block_size, unit.read_only) == (64 * 512, 512, False)
        assert await unit.read(0, unit.size) == stick.disk
        data = os.urandom(4096)
        await unit.write(1024, data)
        await unit.flush()
        assert stick.disk[1024 : 1024 + 4096] == data
        assert stick.resets == 1  # the generation's first act


async def test_a_stick_without_synchronize_cache_has_no_cache_and_is_asked_once(bus: Emulator) -> None:
    class Old(Stick):
        def read_command(self, cdb: bytes) -> bytes | None:
            if cdb[0] == 0x35:
                self.refuse(5, 0x20)
                return None
            return super().read_command(cdb)

    stick = Old()
    async with lab.started(lab.UsbStorage, bus.plug(stick)) as driver:
        unit = (await driver.units())[""]
        for _ in range(3):
            await unit.write(0, bytes(512))
            await unit.flush()
    assert stick.log.count(0x35) == 1


async def test_a_flush_that_fails_is_not_acknowledged(bus: Emulator) -> None:
    class Bad(Stick):
        def read_command(self, cdb: bytes) -> bytes | None:
            if cdb[0] == 0x35:
                self.refuse(3, 0x0C)  # write error
                return None
            return super().read_command(cdb)

    async with lab.started(lab.UsbStorage, bus.plug(Bad())) as driver:
        unit = (await driver.units())[""]
        await unit.write(0, bytes(512))
        for _ in range(2):
            with pytest.raises(OSError, match="medium error") as caught:
                await unit.flush()
            assert caught.value.errno == errno.EIO


async def test_a_device_that_was_reset_with_unflushed_writes_never_acknowledges_a_flush(
    bus: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[str] = []
    monkeypatch.setattr(lab.UsbStorage, "_give_up", lambda self, reason: reasons.append(reason))
    stick = Stick()
    async with lab.started(lab.UsbStorage, bus.plug(stick)) as driver:
        unit = (await driver.units())[""]
        await unit.write(0, bytes(512))
        stick.pending = [(6, 0x29, 0)]
        await unit.read(0, 512)  # here the driver hears of it
        for _ in range(2):
            with pytest.raises(OSError, match="may be lost"):
                await unit.flush()
    assert len(reasons) == 1
    assert "29/00" in reasons[0]


async def test_a_reset_that_the_flush_itself_hears_of_makes_it_fail(
    bus: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab.UsbStorage, "_give_up", lambda self, reason: None)
    stick = Stick()
    async with lab.started(lab.UsbStorage, bus.plug(stick)) as driver:
        unit = (await driver.units())[""]
        await unit.write(0, bytes(512))
        stick.pending = [(6, 0x29, 0)]
        with pytest.raises(OSError, match="may be lost"):
            await unit.flush()


async def test_a_reset_without_unflushed_writes_is_of_no_interest(bus: Emulator) -> None:
    stick = Stick()
    async with lab.started(lab.UsbStorage, bus.plug(stick)) as driver:
        unit = (await driver.units())[""]
        await unit.write(0, b"x" * 512)
        await unit.flush()
        stick.pending = [(6, 0x29, 0)]
        assert await unit.read(0, 512) == b"x" * 512
        await unit.flush()


async def test_a_write_is_never_repeated_for_another_medium(bus: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab.module("usb_storage", "driver"), "GAP", 0.2)
    stick = Stick()
    stick.removable = True
    async with lab.started(lab.UsbStorage, bus.plug(stick)) as driver:
        unit = (await driver.units())[""]
        changes: list[None] = []
        driver._units_listener = lambda: changes.append(None)
        await unit.write(0, b"a" * 512)
        stick.disk[:512] = b"b" * 512
        stick.pending = [(6, 0x28, 0)]
        for attempt in (unit.write(0, b"c" * 512), unit.read(0, 512), unit.flush()):
            with pytest.raises(OSError) as caught:
                await attempt
            assert caught.value.errno == errno.ENOMEDIUM
        assert stick.disk[:512] == b"b" * 512
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert changes
        assert (await driver.units())[""].size == 0  # seen to go, before the next one is seen
        await trio.sleep(0.25)
        other = (await driver.units())[""]
        assert other is not unit
        assert await other.read(0, 512) == b"b" * 512
        with pytest.raises(OSError):
            await unit.read(0, 512)


@pytest.mark.parametrize("attentions", [1, 5, 8])
async def test_unit_attentions_are_heard_and_the_command_repeated(bus: Emulator, attentions: int) -> None:
    stick = Stick()
    async with lab.started(lab.UsbStorage, bus.plug(stick)) as driver:
        unit = (await driver.units())[""]
        stick.pending = [(6, 0x5A, 1)] * attentions
        assert await unit.read(0, 512) == bytes(512)


async def test_a_device_with_nothing_but_unit_attentions_fails_with_a_sentence(bus: Emulator) -> None:
    stick = Stick()
    async with lab.started(lab.UsbStorage, bus.plug(stick)) as driver:
        unit = (await driver.units())[""]
        stick.pending = [(6, 0x5A, 1)] * 1000
        with pytest.raises(OSError, match="one unit attention after another"):
            await unit.read(0, 512)
        assert len(stick.pending) > 980


async def test_a_unit_that_is_becoming_ready_is_waited_for(bus: Emulator) -> None:
    stick = Stick()
    stick.pending = [(6, 0x29, 0), *[(2, 4, 1)] * 5]
    async with lab.started(lab.UsbStorage, bus.plug(stick)) as driver:
        assert (await driver.units())[""].size == 64 * 512


async def test_a_unit_that_never_becomes_ready_has_no_medium(bus: Emulator) -> None:
    stick = Stick()
    stick.pending = [(2, 4, 1)] * 1000
    async with lab.started(lab.UsbStorage, bus.plug(stick)) as driver:
        assert (await driver.units())[""].size == 0


@pytest.mark.parametrize(
    ("sense", "number"),
    [
        ((3, 0x11, 0), errno.EIO),
        ((4, 0x44, 0), errno.EIO),
        ((5, 0x24, 0), errno.EINVAL),
        ((5, 0x21, 0), errno.EIO),
        ((2, 0x3A, 0), errno.ENOMEDIUM),
        ((0, 0, 0), errno.EIO),
        ((15, 0x99, 0x99), errno.EIO),
    ],
)
async def test_a_read_that_fails_has_the_errno_of_its_reason(
    bus: Emulator, sense: tuple[int, int, int], number: int
) -> None:
    stick = Stick()
    async with lab.started(lab.UsbStorage, bus.plug(stick)) as driver:
        unit = (await driver.units())[""]
        stick.pending = [sense] * 20
        with pytest.raises(OSError) as caught:
            await unit.read(0, 512)
        assert caught.value.errno == number


@pytest.mark.parametrize(("sense", "number"), [((7, 0x27, 0), errno.EROFS), ((5, 0x21, 0), errno.ENOSPC)])
async def test_a_write_that_fails_has_the_errno_of_its_reason(
    bus: Emulator, sense: tuple[int, int, int], number: int
) -> None:
    stick = Stick()
    async with lab.started(lab.UsbStorage, bus.plug(stick)) as driver:
        unit = (await driver.units())[""]
        stick.pending = [sense] * 20
        with pytest.raises(OSError) as caught:
            await unit.write(0, bytes(512))
        assert caught.value.errno == number


@pytest.mark.parametrize(
    ("blocks", "block_size"),
    [(1 << 64, 512), (1 << 55, 512), (64, 0), (64, 3), (64, 1 << 31), (64, 520), ((1 << 64), 0xFFFFFFFF)],
)
async def test_an_impossible_capacity_is_no_medium(bus: Emulator, blocks: int, block_size: int) -> None:
    stick = Stick()
    stick.blocks, stick.block_size = blocks, block_size
    async with lab.started(lab.UsbStorage, bus.plug(stick)) as driver:
        assert (await driver.units())[""].size == 0


@pytest.mark.parametrize(("blocks", "block_size"), [(64, 1024), (64, 2048), (16, 4096), (1 << 33, 512), (1 << 54, 256)])
async def test_capacities_that_disks_have_are_served(bus: Emulator, blocks: int, block_size: int) -> None:
    class Large(Stick):
        def read_command(self, cdb: bytes) -> bytes | None:
            if cdb[0] == 0x88:
                lba, count = struct.unpack(">xxQIxx", cdb)
                return bytes(count * self.block_size)[:-8] + lba.to_bytes(8, "big")
            return super().read_command(cdb)

    stick = Large()
    stick.blocks, stick.block_size = blocks, block_size
    stick.disk = bytearray(64 * block_size)
    async with lab.started(lab.UsbStorage, bus.plug(stick)) as driver:
        unit = (await driver.units())[""]
        assert unit.size == blocks * block_size
        last = await unit.read(unit.size - block_size, block_size)
        assert len(last) == block_size
        if blocks > 1 << 32:
            assert int.from_bytes(last[-8:], "big") == blocks - 1
