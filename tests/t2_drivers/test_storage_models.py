"""usb_storage with the emulated stick in all that it can be."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from udf.testing.devices import Emulator
from udf.testing.devices.storage import Storage

from . import lab

driver_module: Any = lab.module("usb_storage", "driver")
MIB = 1 << 20


@pytest.fixture
def bus() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


def image(tmp_path: Path, name: str, size: int) -> str:
    path = tmp_path / name
    with open(path, "wb") as file:
        file.truncate(size)
    return str(path)


@pytest.mark.parametrize("block_size", [512, 1024, 2048, 4096])
async def test_every_block_size(bus: Emulator, block_size: int) -> None:
    data = os.urandom(MIB)
    async with lab.started(lab.UsbStorage, bus.plug(Storage(size=2 * MIB, block_size=block_size))) as driver:
        unit = (await driver.units())[""]
        assert (unit.size, unit.block_size) == (2 * MIB, block_size)
        await unit.write(block_size, data)
        assert await unit.read(block_size, MIB) == data


async def test_more_than_two_tebibytes(bus: Emulator, tmp_path: Path) -> None:
    size = 5 << 40
    data = os.urandom(65536)
    async with lab.started(lab.UsbStorage, bus.plug(Storage(image(tmp_path, "large", size)))) as driver:
        unit = (await driver.units())[""]
        assert unit.size == size
        await unit.write(size - 65536, data)
        await unit.write((2 << 40) - 32768, data)  # across the end of what 32 bits can name
        assert await unit.read(size - 65536, 65536) == data
        assert await unit.read((2 << 40) - 32768, 65536) == data


async def test_a_write_protected_stick_is_read_only(bus: Emulator) -> None:
    async with lab.started(lab.UsbStorage, bus.plug(Storage(size=MIB, read_only=True))) as driver:
        unit = (await driver.units())[""]
        assert unit.read_only
        assert not unit.can_trim
        assert await unit.read(0, 512) == bytes(512)
        with pytest.raises(OSError) as caught:
            await unit.write(0, bytes(512))
        assert caught.value.errno == errno.EROFS


async def test_bad_blocks_are_errors_and_their_neighbours_are_read(bus: Emulator) -> None:
    async with lab.started(lab.UsbStorage, bus.plug(Storage(size=MIB, bad="100-101"))) as driver:
        unit = (await driver.units())[""]
        for work in (unit.read(50 * 512, 65536), unit.write(100 * 512, bytes(512))):
            with pytest.raises(OSError) as caught:
                await work
            assert caught.value.errno == errno.EIO
        assert await unit.read(0, 100 * 512) == bytes(100 * 512)
        assert await unit.read(102 * 512, 512) == bytes(512)


async def test_what_is_trimmed_reads_as_zeros_if_the_device_says_so(bus: Emulator) -> None:
    async with lab.started(lab.UsbStorage, bus.plug(Storage(size=4 * MIB))) as driver:
        unit = (await driver.units())[""]
        assert unit.can_trim
        await unit.write(0, b"x" * MIB)
        await unit.trim(4096, 8192)
        await unit.flush()
        if unit.trim_zeroes:
            assert await unit.read(4096, 8192) == bytes(8192)
        assert await unit.read(0, 4096) == b"x" * 4096


async def test_a_stick_without_trim_says_so(bus: Emulator) -> None:
    async with lab.started(lab.UsbStorage, bus.plug(Storage(size=MIB, trim=False))) as driver:
        unit = (await driver.units())[""]
        assert not unit.can_trim
        with pytest.raises(OSError):
            await unit.trim(0, 4096)


async def test_a_stick_with_a_limit_gets_no_larger_transfers(bus: Emulator) -> None:
    data = os.urandom(MIB)
    async with lab.started(lab.UsbStorage, bus.plug(Storage(size=MIB, max_transfer=16384))) as driver:
        unit = (await driver.units())[""]
        await unit.write(0, data)
        assert await unit.read(0, MIB) == data


async def test_a_stick_that_stalls_whatever_it_can(bus: Emulator) -> None:
    data = os.urandom(MIB)
    plugged = bus.plug(Storage(size=MIB, stall_short=True, stall_max_lun=True))
    async with lab.started(lab.UsbStorage, plugged) as driver:
        unit = (await driver.units())[""]
        await unit.write(0, data)
        assert await unit.read(0, MIB) == data


async def test_several_units_with_media_of_their_own(bus: Emulator, tmp_path: Path) -> None:
    luns = ["", image(tmp_path, "two", 2 * MIB), image(tmp_path, "three", 3 * MIB)]
    async with lab.started(lab.UsbStorage, bus.plug(Storage(size=MIB, luns=luns))) as driver:
        units = await driver.units()
        assert {name: unit.size for name, unit in units.items()} == {
            "": MIB,
            "lun1": 0,
            "lun2": 2 * MIB,
            "lun3": 3 * MIB,
        }
        for index, name in enumerate(("", "lun2", "lun3")):
            await units[name].write(0, bytes([index]) * 512)
        for index, name in enumerate(("", "lun2", "lun3")):
            assert await units[name].read(0, 512) == bytes([index]) * 512


async def test_media_come_and_go_while_nobody_asks(
    bus: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_module, "POLL", 0.05)
    monkeypatch.setattr(driver_module, "GAP", 0.3)
    stick = Storage(image(tmp_path, "one", MIB))
    async with lab.started(lab.UsbStorage, bus.plug(stick)) as driver:
        changed = trio.Event()

        def listen() -> None:
            changed.set()

        async def sizes_until(size: int) -> list[int]:
            """What whoever looks again at each change sees."""
            nonlocal changed
            seen = []
            with trio.fail_after(40):
                while seen[-1:] != [size]:
                    await changed.wait()
                    changed = trio.Event()
                    seen.append((await driver.units())[""].size)
            return seen

        driver._units_listener = listen
        first = (await driver.units())[""]
        assert first.size == MIB
        stick.change_medium(None)
        assert await sizes_until(0) == [0]
        stick.change_medium(image(tmp_path, "two", MIB))
        await sizes_until(MIB)
        second = (await driver.units())[""]
        stick.change_medium(image(tmp_path, "three", MIB))
        assert set((await sizes_until(0)) + (await sizes_until(MIB))) == {0, MIB}
        assert (await driver.units())[""] is not second
        with pytest.raises(OSError) as caught:
            await first.read(0, 512)  # the same size, but another medium
        assert caught.value.errno == errno.ENOMEDIUM


async def test_a_flush_is_what_the_medium_has_after_the_power_is_gone(bus: Emulator) -> None:
    stick = Storage(size=MIB, cache=MIB)
    plugged = bus.plug(stick)
    async with lab.started(lab.UsbStorage, plugged) as driver:
        unit = (await driver.units())[""]
        await unit.write(0, b"a" * 4096)
        await unit.flush()
        await unit.write(4096, b"b" * 4096)
        plugged.unplug()
    medium: Any = stick.units[0].medium
    assert medium.read(0, 8192) == b"a" * 4096 + bytes(4096)


@pytest.mark.parametrize("removable", [True, False])
async def test_an_ejected_device_is_stopped_and_serves_again_after_a_replug(bus: Emulator, removable: bool) -> None:
    plugged = bus.plug(Storage(size=MIB, removable=removable))
    unit = plugged.device.units[0]
    async with lab.started(lab.UsbStorage, plugged) as driver:
        await (await driver.units())[""].write(0, b"kept" * 128)
        await driver.eject()
        assert (unit.medium is None, unit.stopped) == (removable, not removable)
    plugged.replug()
    async with lab.started(lab.UsbStorage, plugged) as driver:
        assert await (await driver.units())[""].read(0, 512) == b"kept" * 128


async def test_a_device_that_knows_no_eject_is_ended_all_the_same(bus: Emulator) -> None:
    plugged = bus.plug(Storage(size=MIB), faults=["stall ep=0x81 after=8"])
    async with lab.started(lab.UsbStorage, plugged) as driver:
        with trio.fail_after(40):
            await driver.eject()
