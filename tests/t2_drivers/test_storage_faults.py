"""Every fault at every transfer of a stick's life from its plug to a flush.

Whatever happens: an end in bounded time, right data or an error, no flush that is not true, and a device that works
again with the next generation or the next plug.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import trio
import usb.core

from udf import ContractError, DeviceGone
from udf.testing.devices import Emulator, Plugged
from udf.testing.devices.storage import Storage
from udf.usb import backend

from . import lab

wire: Any = lab.module("usb_storage", "wire")
unit_module: Any = lab.module("usb_storage", "unit")
pipes_module: Any = lab.module("usb_storage", "pipes")
transport_module: Any = lab.module("usb_storage", "transport")
SIZE = 1 << 20
FAULTS = [
    *("stall", "stall late=yes", "eio", "eio late=yes", "short bytes=0", "short", "babble", "delay ms=20", "corrupt"),
    *("drop", "drop late=yes", "unplug", "unplug late=yes"),
]


@pytest.fixture
def bus() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


@pytest.fixture(autouse=True)
def _short_patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short where a fault is only noticed by its time-out; else a busy machine must not be taken for one."""
    fault = getattr(getattr(request.node, "callspec", None), "params", {}).get("fault", "")
    seconds = 0.2 if fault.startswith(("drop", "short", "stall late")) else 2.0
    for name, value in (("QUICK", seconds), ("SLOW", seconds), ("OPTIONAL", seconds), ("PATIENCE", 0.5)):
        monkeypatch.setattr(unit_module, name, value)
    monkeypatch.setattr(pipes_module, "CONTROL_TIMEOUT", seconds)
    monkeypatch.setattr(transport_module, "DEAD_PAUSE", 0.0)
    monkeypatch.setattr(backend, "STANDARD_TIMEOUT", int(seconds * 1000))


class Life:
    """What a stick was asked for, and what became of it."""

    def __init__(self, plugged: Plugged) -> None:
        self.plugged = plugged
        self.before, self.data = os.urandom(65536), os.urandom(65536)
        self.given_up: list[str] = []
        self.acknowledged = self.flushed = False
        medium = plugged.device.units[0].medium  # type: ignore[attr-defined]
        medium.write(0, self.before, through=True)

    async def live(self, **options: Any) -> None:
        async with lab.started(lab.UsbStorage, self.plugged, **options) as driver:
            driver._give_up = self.given_up.append  # what ends a driver host would end the test
            for unit in driver._units.values():
                unit._lost = self.given_up.append
            unit = (await driver.units())[""]
            if not unit.size:
                raise OSError("no medium")
            got = await unit.read(0, 65536)
            assert self.is_corrupt or got == self.before
            await unit.write(4096, self.data[4096:])
            self.acknowledged = True
            got = await unit.read(0, 65536)
            assert self.is_corrupt or got == self.before[:4096] + self.data[4096:]
            await unit.flush()
            self.flushed = True

    @property
    def is_corrupt(self) -> bool:
        return any(getattr(rule, "kind", "") == "corrupt" for rule in self.plugged.rules)

    def on_the_medium(self) -> bytes:
        medium: Any = self.plugged.device.units[0].medium  # type: ignore[attr-defined]
        return bytes(medium.read(0, 65536))


def stick(bus: Emulator) -> Plugged:
    return bus.plug(Storage(size=SIZE, cache=SIZE, removable=False, configured=1))


async def transfers_of_a_life(bus: Emulator, **options: Any) -> int:
    plugged = stick(bus)
    life = Life(plugged)
    await life.live(**options)
    assert life.flushed
    count = plugged.transfers
    bus.unplug(plugged)
    assert 20 < count < 100
    return count


@pytest.mark.parametrize("queue", [True, False], ids=["queued", "one by one"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_every_fault_at_every_transfer(bus: Emulator, fault: str, queue: bool) -> None:
    done = 0
    failed: list[tuple[int, Exception]] = []
    for number in range(1, await transfers_of_a_life(bus, queue=queue) + 1):
        plugged = stick(bus)
        life = Life(plugged)
        plugged.set_faults([f"{fault} at={number}"])
        where = f"{fault} at={number}"
        try:
            with trio.fail_after(40):
                await life.live(queue=queue)
            done += 1
        except (OSError, ContractError, DeviceGone) as exc:
            failed.append((number, exc))
        plugged.set_faults([])
        plugged.replug()  # its cache has lost its power
        if life.flushed and "corrupt" not in fault:
            assert life.on_the_medium()[4096:] == life.data[4096:], f"{where}: a flush was not true"
        life.before = life.on_the_medium()
        life.flushed = False
        await life.live()
        assert life.flushed, where
        bus.unplug(plugged)
    if "unplug" in fault:
        assert not done
        assert all(isinstance(exc, DeviceGone) for _, exc in failed), failed
    if "unplug" not in fault and fault != "corrupt":
        assert not failed


@pytest.mark.parametrize("at", range(1, 60, 3))
async def test_an_unplug_while_much_is_under_way_ends_all_of_it_at_once(bus: Emulator, at: int) -> None:
    plugged = stick(bus)
    ends: list[type] = []
    async with lab.started(lab.UsbStorage, plugged) as driver:
        unit = (await driver.units())[""]
        plugged.set_faults([f"unplug at={at}"])

        async def work(index: int) -> None:
            try:
                for _ in range(10):
                    await unit.write(index * 4096, bytes(4096))
                    await unit.read(index * 4096, 4096)
                    await unit.flush()
            except DeviceGone as exc:
                ends.append(type(exc))

        with trio.fail_after(40):
            async with trio.open_nursery() as nursery:
                for index in range(4):
                    nursery.start_soon(work, index)
    assert len(ends) == 4


@pytest.mark.parametrize("lengths", [(31,), (31, 100), (5,), (0,), (31, 512, 512)])
async def test_a_generation_that_died_in_the_middle_of_a_command_is_followed_by_a_good_one(
    bus: Emulator, lengths: tuple[int, ...]
) -> None:
    """It had sent so much of a WRITE of 4096 bytes; the next generation begins with Reset Recovery."""
    plugged = stick(bus)
    data = os.urandom(SIZE)
    plugged.device.units[0].medium.write(0, data, through=True)  # type: ignore[attr-defined]
    for cdb in (b"\x2a" + bytes(7) + b"\x08\0", b"\x28" + bytes(7) + b"\x08\0"):
        with lab.opened(lab.UsbStorage, plugged) as driver:
            cbw = wire.pack_cbw(1, 4096, cdb[0] == 0x28, 0, cdb)
            for index, length in enumerate(lengths):
                pending = driver.device.backend.connection.submit(2, cbw[:length] if not index else bytes(length))
                await trio.to_thread.run_sync(ended, pending)
        async with lab.started(lab.UsbStorage, plugged) as driver:
            unit = (await driver.units())[""]
            assert (await unit.read(0, SIZE))[4096:] == data[4096:]


def ended(pending: Any) -> None:
    with contextlib.suppress(usb.core.USBError):
        pending.wait(0.1)
