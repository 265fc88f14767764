"""Drivers are killed and a stick is pulled at random moments, while a program writes, syncs and reads.

What must hold is in `Expected`. How many episodes: UDF_STORM_REPLUGS (default 6); which: UDF_STORM_SEED.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from desk import Desk, desk_at
from lab import gone
from real import needs_fuse

from udf.errors import UserError
from udf.fuse.mountinfo import find_mount
from udf.supervisor.instance import Reason, State
from udf.supervisor.mounts import Mount
from udf.testing.devices import Plugged

pytestmark = needs_fuse
EPISODES = int(os.environ.get("UDF_STORM_REPLUGS", "6"))
SEED = int(os.environ.get("UDF_STORM_SEED", "0")) or random.randrange(1 << 32)
SLOT = 4096
SLOTS = 64
LONGEST = 1.0  # seconds in which a program is told; the machine that runs the tests may be busy
SLACK = 4.0


@pytest.fixture
async def desk(own_rundir: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    from udf.supervisor import sockets

    monkeypatch.setattr(sockets, "rundir", lambda: runtime_dir)
    async with desk_at(runtime_dir) as desk:
        yield desk


class Expected:
    """What each slot of the file may hold: what was written last, or what a write that failed has tried since."""

    def __init__(self) -> None:
        self.last = [0] * SLOTS
        self.perhaps: list[set[int]] = [set() for _ in range(SLOTS)]
        self.synced = [0] * SLOTS  # what an fsync has covered

    def wrote(self, slot: int, number: int) -> None:
        self.last[slot] = number
        self.perhaps[slot].clear()

    def check(self, slot: int, data: bytes) -> None:
        number = int.from_bytes(data[:8], "little")
        assert data == pattern(number), f"slot {slot} is torn"
        may = {self.last[slot], *self.perhaps[slot]}
        assert number in may, f"slot {slot} holds {number}, and only {sorted(may)} is possible"


def pattern(number: int) -> bytes:
    return number.to_bytes(8, "little") * (SLOT // 8)


class Program:
    """Writes, syncs and reads without a pause, in a thread; it knows when it may be told that there is no device."""

    def __init__(self, path: Path, chance: random.Random) -> None:
        self.expected = Expected()
        self.is_away = False  # from before the pull until all goes on
        self.stop = False
        self.done = 0
        self.failed = 0
        self.slowest = 0.0
        self._path = path
        self._chance = chance
        self._number = 0

    def run(self) -> None:
        file = os.open(self._path, os.O_RDWR)
        try:
            while not self.stop:
                self._step(file)
            os.fsync(file)
        finally:
            with contextlib.suppress(OSError):  # what could not be written was told before
                os.close(file)

    def _step(self, file: int) -> None:
        slot, kind = self._chance.randrange(SLOTS), self._chance.random()
        was_away, began = self.is_away, time.monotonic()
        self._number += 1
        try:
            if kind < 0.5:
                self.expected.perhaps[slot].add(self._number)
                assert os.pwrite(file, pattern(self._number), slot * SLOT) == SLOT
                self.expected.wrote(slot, self._number)
            elif kind < 0.6:
                os.fsync(file)
                self.expected.synced = [*self.expected.last]
            else:
                if kind < 0.8:  # not from the kernel's cache
                    os.posix_fadvise(file, slot * SLOT, SLOT, os.POSIX_FADV_DONTNEED)
                self.expected.check(slot, os.pread(file, SLOT, slot * SLOT))
            self.done += 1
        except OSError as exc:
            if exc.errno != errno.ENODEV or not (was_away or self.is_away):
                raise
            self.failed += 1
            time.sleep(0.01)  # the rest needs the CPU
        if not was_away:
            self.slowest = max(self.slowest, time.monotonic() - began)


async def kill(endpoint) -> None:  # type: ignore[no-untyped-def]
    if endpoint.driver.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(endpoint.driver.pid, signal.SIGKILL)
    await trio.lowlevel.checkpoint()


async def restart(endpoint) -> None:  # type: ignore[no-untyped-def]
    with contextlib.suppress(UserError), trio.move_on_after(1):
        await endpoint.restart()


@pytest.mark.timeout(300 + 20 * EPISODES)
async def test_whatever_is_killed_and_pulled_a_program_goes_on_with_what_it_has_written(desk: Desk) -> None:
    print(f"UDF_STORM_SEED={SEED}")
    chance = random.Random(SEED)
    image = desk.image("a")
    plugged = await desk.plug(image, "S1", cache=1 << 20, seed=SEED)
    disk = await desk.disk()
    volume = await desk.lab.mount(disk, desk.home / "mnt")
    program = Program(Path(volume.plan.mountpoint) / "data", random.Random(SEED + 1))

    async def wait() -> None:
        await trio.sleep(chance.choice((0, 0.02, 0.1, 0.3)) * chance.random())

    async def trouble() -> None:
        for _ in range(chance.randrange(3)):
            await chance.choice((kill, kill, restart))(chance.choice((disk, volume)))
            await wait()

    async def episode() -> None:
        await trouble()
        program.is_away = True
        for _ in range(chance.choice((1, 1, 2, 3))):
            await (desk.put_back if chance.random() < 0.3 else desk.pull)(plugged)
            await wait()
            await trouble()
            await desk.put_back(plugged)
            await wait()
            await trouble()
        before = desk.lab.bus.find(plugged.name).arrival

        def goes_on() -> bool:
            assert not volume.is_gone, volume.instance.text
            tenant = desk.tenant("disk0")
            return (
                tenant is not None
                and tenant.serves
                and tenant.lease.spec.key.endswith(f"@{before}")
                and disk.instance.state is volume.instance.state is State.ACTIVE
                and not volume.recovery.is_unplugged
            )

        await desk.until(goes_on, 30)
        program.is_away = False
        done = program.done
        await desk.until(lambda: program.done > done + 20, 30)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, program.run)
        try:
            await desk.until(lambda: program.done)
            for _ in range(EPISODES):
                await episode()
        finally:
            program.stop = True
    print(f"{program.done} operations, {program.failed} without a device, the slowest {program.slowest:.2f} s")
    assert program.slowest < LONGEST + SLACK
    assert volume.recovery.restarts_left == disk.recovery.restarts_left == 4  # nothing of it was a driver's own making
    await desk.lab.registry.unmount(volume, lazy=False)
    await desk.take_away(plugged)
    await gone(disk)
    content = image.read_bytes()
    for slot in range(SLOTS):
        program.expected.check(slot, content[slot * SLOT : (slot + 1) * SLOT])


async def end_by_grace(desk: Desk, plugged: Plugged, volume: Mount) -> None:
    await desk.take_away(plugged)


async def end_by_unmount(desk: Desk, plugged: Plugged, volume: Mount) -> None:
    await desk.take_away(plugged)
    await trio.sleep(0.02)
    await desk.lab.registry.unmount(volume, lazy=False)


async def end_by_another(desk: Desk, plugged: Plugged, volume: Mount) -> None:
    await desk.take_away(plugged)
    other = await desk.plug(desk.image("other"), "other")
    await gone(volume)
    await desk.take_away(other)


async def end_by_change(desk: Desk, plugged: Plugged, volume: Mount) -> None:
    await desk.take_away(plugged)
    changed = await desk.plug(desk.image("changed", 3 << 20), plugged.device.serial or "")
    await gone(volume)
    await desk.take_away(changed)


async def end_by_shim(desk: Desk, plugged: Plugged, volume: Mount) -> None:
    await desk.take_away(plugged)
    assert volume.below is not None
    if volume.below.shim.pid is not None:
        os.kill(volume.below.shim.pid, signal.SIGKILL)


ENDS = (end_by_grace, end_by_unmount, end_by_another, end_by_change, end_by_shim)


@pytest.mark.timeout(300 + 20 * EPISODES)
async def test_however_a_volume_ends_while_its_device_is_away_nothing_is_left(desk: Desk) -> None:
    print(f"UDF_STORM_SEED={SEED}")
    chance = random.Random(SEED)
    reasons = {Reason.EXPIRED, Reason.OPERATOR, Reason.CHANGED, Reason.UNPLUGGED, Reason.CRASHED}
    for number in range(max(len(ENDS), EPISODES)):
        plugged = await desk.plug(desk.image("a"), f"S{number}")
        await desk.until(lambda: any(tenant.serves for tenant in desk.devices.binder.tenants))
        (tenant,) = desk.devices.binder.tenants
        disk = await desk.disk(tenant.name)
        volume = await desk.lab.mount(disk, desk.home / "mnt", grace="0.5")
        file = os.open(Path(volume.plan.mountpoint) / "data", os.O_RDWR)
        os.pwrite(file, b"x" * 512, 0)
        await ENDS[number % len(ENDS)](desk, plugged, volume)
        if chance.random() < 0.5:
            await kill(volume)
        await gone(volume)
        await gone(disk)
        assert volume.instance.reason in reasons, volume.instance.text
        assert find_mount(volume.plan.mountpoint) is None
        with pytest.raises(OSError) as failure:
            os.pwrite(file, b"y" * 512, 0)
        assert failure.value.errno in (errno.ENODEV, errno.ENOTCONN, errno.ECONNABORTED)
        with contextlib.suppress(OSError):
            os.close(file)
        await desk.until(lambda: not desk.devices.binder.tenants)
        assert not list(desk.devices.by_id.iterdir())
        assert not desk.lab.place(disk.plan.name).exists()
        assert not disk.plan.socket.exists()
