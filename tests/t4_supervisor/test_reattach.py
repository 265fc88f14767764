"""Volumes of a device that is pulled out and comes back: real mounts, real shims, the real driver of sticks."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import weakref
from pathlib import Path

import pytest
import trio
from lab import ROOT, EmulatedLease, Lab, gone, in_thread, read, warm_spare, write
from real import AT_ONCE, PATIENCE, needs_fuse

from udf.errors import UserError
from udf.fuse.mountinfo import find_mount
from udf.supervisor import restart
from udf.supervisor.blocks import BlockEndpoint
from udf.supervisor.instance import Reason, State
from udf.supervisor.mounts import Mount
from udf.testing.devices.storage import Storage

pytestmark = needs_fuse
STORAGE = ROOT / "drivers" / "usb_storage"
SIZE = 4 << 20


class Stick:
    """A stick with a volume that is mounted."""

    def __init__(self, lab: Lab, lease: EmulatedLease, disk: BlockEndpoint, volume: Mount) -> None:
        self.lab = lab
        self.lease = lease
        self.disk = disk
        self.volume = volume
        self.path = Path(volume.plan.mountpoint)

    @property
    def data(self) -> Path:
        return self.path / "data"

    async def pull(self) -> None:
        await self.lab.unplug(self.lease)

    async def is_away(self) -> None:
        with trio.fail_after(PATIENCE):
            while not self.disk.is_waiting:
                await trio.sleep(0.005)

    async def plug(self) -> bool:
        """As the binder does it."""
        self.lease = await self.lab.replug(self.lease)
        with trio.fail_after(PATIENCE):
            return await self.disk.take_back(self.lease)

    async def goes_on(self) -> None:
        with trio.fail_after(PATIENCE):
            while self.volume.instance.state is not State.ACTIVE:
                assert not self.volume.is_gone, self.volume.instance.text
                await trio.sleep(0.005)

    async def is_gone(self, seconds: float = PATIENCE) -> None:
        await gone(self.volume, seconds)
        await gone(self.disk, seconds)
        assert find_mount(str(self.path)) is None
        assert not self.lab.place(self.disk.plan.name).exists()


async def stick_in(lab: Lab, tmp_path: Path, name: str = "disk0", **options: str) -> Stick:
    lease = await lab.plug(Storage(size=SIZE, serial="S1"), name)
    disk = await lab.start(name, STORAGE / "__init__.py", lease)
    assert isinstance(disk, BlockEndpoint)
    return Stick(lab, lease, disk, await lab.mount(disk, tmp_path / f"mnt-{name}", **options))


@pytest.fixture
async def stick(lab: Lab, tmp_path: Path) -> Stick:
    return await stick_in(lab, tmp_path)


async def test_a_volume_is_a_mount_of_an_export_and_ends_before_it(lab: Lab, stick: Stick) -> None:
    assert stick.disk.volumes == [stick.volume]
    assert stick.volume.below is stick.disk
    assert stick.volume.plan.source == f"nbd+unix:///disk?socket={stick.disk.plan.socket}"
    await in_thread(write, stick.data, b"x" * 5000)
    assert (await read(lab.place("disk0") / "disk"))[:5001] == b"x" * 5000 + b"\0"
    await lab.registry.end(stick.disk, Reason.OPERATOR)
    await stick.is_gone()
    ends = [(e.name, e.reason) for e in lab.told("state") if e.state == "GONE" and e.kind in ("mount", "block")]
    assert ends == [("mnt-disk0", "operator"), ("disk0-files", "operator"), ("disk0", "operator")]


async def test_an_export_that_is_not_there_is_a_sentence(lab: Lab, stick: Stick, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="disk0 has no part1: it has disk"):
        await lab.mount(stick.disk, tmp_path / "other", "part1")
    assert stick.disk.volumes == [stick.volume]


async def test_a_device_that_comes_back_is_gone_on_with_in_open_files(lab: Lab, stick: Stick) -> None:
    await in_thread(write, stick.data, b"before")
    file = os.open(stick.data, os.O_RDWR)
    assert os.pread(file, 6, 0) == b"before"
    before = stick.volume.driver.pid
    with trio.fail_after(AT_ONCE):
        await stick.pull()
        await stick.is_away()
    assert stick.volume.instance.state is stick.disk.instance.state is State.DETACHED
    assert stick.volume.driver.pid != before or stick.volume.driver.pid is None
    assert find_mount(str(stick.path)) is not None
    assert find_mount(str(lab.place("disk0"))) is None
    assert await stick.plug()
    await stick.goes_on()
    assert await in_thread(os.pread, file, 6, 1 << 19) == bytes(6)
    assert await in_thread(os.pwrite, file, b"after ", 0) == 6
    await in_thread(os.fsync, file)
    os.close(file)
    assert await read(stick.data) == b"after " + bytes((1 << 20) - 6)
    with trio.fail_after(PATIENCE):
        while not stick.disk.dependants:
            await trio.sleep(0.01)
        while stick.disk.dependants[0].instance.state is not State.ACTIVE:
            await trio.sleep(0.01)
    assert (await read(lab.place("disk0") / "disk"))[:6] == b"after "
    for kind, name in (("block", "disk0"), ("mount", "mnt-disk0")):
        assert lab.life(name, kind)[1:] == [("ACTIVE", "ready"), ("DETACHED", "unplugged"), ("ACTIVE", "reattached")]
    assert stick.volume.generation == stick.disk.generation == 2


async def test_programs_are_told_at_once_and_cached_data_go_on(lab: Lab, stick: Stick) -> None:
    await in_thread(write, stick.data, b"before")
    assert (await read(stick.data))[:6] == b"before"
    file = os.open(stick.data, os.O_RDWR)
    assert os.pread(file, 6, 0) == b"before"
    with trio.fail_after(AT_ONCE):
        await stick.pull()
        await stick.is_away()
    assert await in_thread(os.pread, file, 6, 0) == b"before"
    with trio.fail_after(AT_ONCE), pytest.raises(OSError) as failure:
        await in_thread(os.pwrite, file, b"lost", 0)
    assert failure.value.errno == errno.ENODEV
    assert await stick.plug()
    await stick.goes_on()
    os.close(file)
    assert (await read(stick.data))[:6] == b"before"


async def test_a_program_may_wait_for_the_device(lab: Lab, tmp_path: Path) -> None:
    stick = await stick_in(lab, tmp_path, on_unplug="wait:20s")
    file = os.open(stick.data, os.O_RDWR)
    await stick.pull()
    await stick.is_away()
    assert "requests wait for it, 20 s at most; plug it back within 30 s to go on" in stick.volume.text
    written: list[int] = []

    async def write_on() -> None:
        written.append(await in_thread(os.pwrite, file, b"x" * 512, 0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_on)
        with trio.fail_after(PATIENCE):
            while not (await stick.volume.requests()).total:  # type: ignore[union-attr]
                await trio.sleep(0.01)
        assert written == []
        assert await stick.plug()
    assert written == [512]
    os.close(file)


async def test_each_volume_of_a_device_waits_for_its_own_time(lab: Lab, stick: Stick, tmp_path: Path) -> None:
    short = await lab.mount(stick.disk, tmp_path / "short", grace="0.3")
    none = await lab.mount(stick.disk, tmp_path / "none", grace="0")
    await stick.pull()
    await gone(none)
    await gone(short)
    assert (none.instance.reason, short.instance.reason) == (Reason.UNPLUGGED, Reason.EXPIRED)
    await stick.is_away()
    assert await stick.plug()
    await stick.goes_on()
    assert stick.disk.volumes == [stick.volume]


async def test_the_time_of_grace_does_not_end_while_what_came_back_is_looked_at(lab: Lab, tmp_path: Path) -> None:
    stick = await stick_in(lab, tmp_path, grace="1.5")
    await stick.pull()
    await stick.is_away()
    lease = await lab.replug(stick.lease)
    lease.refuse = [OSError(errno.EBUSY, "busy")] * 14  # for almost two seconds
    begun = trio.current_time()
    with trio.fail_after(PATIENCE):
        assert await stick.disk.take_back(lease)
    assert trio.current_time() - begun > 1.5
    await stick.goes_on()


async def test_a_spare_of_a_volume_is_its_next_generation(lab: Lab, tmp_path: Path) -> None:
    stick = await stick_in(lab, tmp_path, spare="")
    spare = await warm_spare(stick.volume)
    await stick.pull()
    await stick.is_away()
    assert await stick.plug()
    await stick.goes_on()
    assert stick.volume.driver.pid == spare
    await warm_spare(stick.volume, other_than=spare)


@pytest.mark.parametrize("which", ["volume", "disk"])
async def test_a_driver_that_stands_still_keeps_no_unplug_from_being_told(stick: Stick, which: str) -> None:
    file = os.open(stick.data, os.O_RDWR)
    pid = getattr(stick, which).driver.pid
    os.kill(pid, signal.SIGSTOP)
    with trio.fail_after(AT_ONCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stick.pull)
            with pytest.raises(OSError) as failure:
                await in_thread(os.pwrite, file, b"x" * 512, 1 << 18)
    assert failure.value.errno == errno.ENODEV
    await stick.is_away()
    assert await stick.plug()
    await stick.goes_on()
    os.close(file)


async def test_a_driver_that_was_given_up_gets_another_chance_with_the_next_plug(
    stick: Stick, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restart, "FIRST_DELAY", 0.01)
    with trio.fail_after(PATIENCE):
        while stick.volume.instance.state is not State.FAILED:
            pid = stick.volume.driver.pid
            if pid is not None and stick.volume.instance.state is State.ACTIVE:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSEGV)
            await trio.sleep(0.02)
    await stick.pull()
    await stick.is_away()
    assert stick.volume.instance.state is State.DETACHED
    assert await stick.plug()
    await stick.goes_on()
    assert stick.volume.recovery.restarts_left == 4


async def test_after_the_grace_time_everything_is_gone(lab: Lab, tmp_path: Path) -> None:
    stick = await stick_in(lab, tmp_path, grace="0.3")
    await stick.pull()
    await stick.is_gone()
    assert stick.volume.instance.reason is stick.disk.instance.reason is Reason.EXPIRED
    assert stick.volume.instance.text == "the device was not plugged in again within 0.3 s"


async def test_without_grace_a_mount_ends_at_the_unplug(lab: Lab, tmp_path: Path) -> None:
    stick = await stick_in(lab, tmp_path, grace="0")
    file = os.open(stick.data, os.O_RDONLY)
    with trio.fail_after(AT_ONCE):
        await stick.pull()
        await stick.is_gone()
    assert stick.volume.instance.reason is Reason.UNPLUGGED
    with pytest.raises(OSError) as failure:
        os.pread(file, 1, 0)
    assert failure.value.errno == errno.ENODEV
    os.close(file)


async def test_a_device_without_a_serial_number_is_not_waited_for(lab: Lab, tmp_path: Path) -> None:
    lease = await lab.plug(Storage(size=SIZE, serial=""))
    disk = await lab.start("disk0", STORAGE / "__init__.py", lease)
    volume = await lab.mount(disk, tmp_path / "mnt")
    with trio.fail_after(AT_ONCE):
        await lab.unplug(lease)
        await disk.ended.wait()
    assert volume.instance.reason is disk.instance.reason is Reason.UNPLUGGED


async def test_who_unmounts_a_volume_whose_device_is_away_need_not_wait(lab: Lab, stick: Stick) -> None:
    file = os.open(stick.data, os.O_RDONLY)
    await stick.pull()
    await stick.is_away()
    with trio.fail_after(AT_ONCE):
        await lab.registry.unmount(stick.volume, lazy=False)
        await stick.is_gone()
    assert stick.volume.instance.reason is Reason.OPERATOR
    assert stick.disk.instance.reason is Reason.UNPLUGGED
    with pytest.raises(OSError) as failure:
        os.pread(file, 1, 0)
    assert failure.value.errno == errno.ENODEV
    os.close(file)
    stick.lease = await lab.replug(stick.lease)
    assert not await stick.disk.take_back(stick.lease)
    assert stick.lease.closed


async def test_everything_is_ended_while_a_device_is_away(lab: Lab, stick: Stick) -> None:
    await stick.pull()
    await stick.is_away()
    with trio.fail_after(AT_ONCE):
        await lab.registry.stop_all(trio.Event())
    await stick.is_gone()
    assert stick.volume.instance.reason is Reason.SHUTDOWN


async def test_a_driver_cannot_be_restarted_while_its_device_is_away(stick: Stick) -> None:
    await stick.pull()
    await stick.is_away()
    for endpoint in (stick.volume, stick.disk):
        with pytest.raises(UserError, match="is unplugged: plug it in again, and it goes on by itself"):
            await endpoint.restart()
    assert await stick.plug()
    await stick.goes_on()
    assert await stick.volume.restart() == 3


@pytest.mark.parametrize("which", ["volume", "disk"])
async def test_a_driver_may_die_while_its_device_comes_back(stick: Stick, which: str) -> None:
    await in_thread(write, stick.data, b"before")
    await stick.pull()
    await stick.is_away()
    stick.lease = await stick.lab.replug(stick.lease)
    endpoint = getattr(stick, which)
    killed = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stick.disk.take_back, stick.lease)
        with trio.fail_after(PATIENCE):
            while killed < 2 and endpoint.instance.state is not State.ACTIVE:
                if endpoint.instance.state is State.DETACHED and endpoint.driver.pid:
                    try:
                        os.kill(endpoint.driver.pid, signal.SIGKILL)
                    except ProcessLookupError:
                        pass
                    killed += 1
                    await trio.sleep(0.02)
                await trio.sleep(0.002)
    await stick.goes_on()
    assert killed
    assert (await read(stick.data))[:6] == b"before"
    assert stick.volume.recovery.restarts_left == stick.disk.recovery.restarts_left == 4


async def test_it_may_be_pulled_out_again_and_again(stick: Stick) -> None:
    file = os.open(stick.data, os.O_RDWR)
    leases = [stick.lease]
    for number in range(6):
        await stick.pull()
        if number % 2:
            await stick.is_away()
        stick.lease = await stick.lab.replug(stick.lease)
        lease = stick.lease
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stick.disk.take_back, lease)
            await trio.sleep(0.06 * number)
            await stick.pull()
        await stick.is_away()
        leases.append(lease)
    assert await stick.plug()
    await stick.goes_on()
    assert await in_thread(os.pwrite, file, b"written", 0) == 7
    os.close(file)
    assert all(lease.closed for lease in leases)
    assert not stick.lease.closed


async def test_another_device_with_the_same_serial_number_is_not_taken_for_it(lab: Lab, stick: Stick) -> None:
    await in_thread(write, stick.data, b"before".ljust(512))  # a whole sector: what is in a part of one is not known
    await stick.pull()
    await stick.is_away()
    other = Storage(size=SIZE, serial="S1")
    lease = await lab.plug(other)
    with trio.fail_after(PATIENCE):
        assert not await stick.disk.take_back(lease)
    assert stick.disk.is_waiting
    assert "has changed" in stick.disk.instance.text
    assert await stick.plug()  # and the right one is, after that
    await stick.goes_on()
    assert (await read(stick.data))[:6] == b"before"
    assert stick.disk.recovery.restarts_left == 4
    assert lease.closed


async def test_a_device_of_another_size_ends_what_waits_when_the_binder_says_so(lab: Lab, stick: Stick) -> None:
    await stick.pull()
    await stick.is_away()
    lease = await lab.plug(Storage(size=2 * SIZE, serial="S1"))
    with trio.fail_after(PATIENCE):
        assert not await stick.disk.take_back(lease)
    stick.disk.lose(Reason.CHANGED, "what was plugged in again is not what was pulled out")
    await stick.is_gone()
    for endpoint in (stick.volume, stick.disk):
        assert endpoint.instance.reason is Reason.CHANGED
        assert "another" in endpoint.instance.text


async def test_what_was_written_and_not_synced_is_written_again(lab: Lab, tmp_path: Path) -> None:
    lease = await lab.plug(Storage(size=SIZE, serial="S1", cache=1 << 20))
    disk = await lab.start("disk0", STORAGE / "__init__.py", lease)
    assert isinstance(disk, BlockEndpoint)
    stick = Stick(lab, lease, disk, await lab.mount(disk, tmp_path / "mnt"))
    file = os.open(stick.data, os.O_RDWR)
    assert await in_thread(os.pwrite, file, b"acknowledged", 8192) == 12
    await stick.pull()
    await stick.is_away()
    assert await stick.plug()
    await stick.goes_on()
    await in_thread(os.fsync, file)
    os.close(file)
    assert (await read(stick.data))[8192:8204] == b"acknowledged"


async def test_what_has_come_back_and_ended_is_freed_at_once(lab: Lab, tmp_path: Path) -> None:
    freed = []

    async def live() -> None:
        stick = await stick_in(lab, tmp_path)
        for each in (stick.disk, stick.volume, stick.disk.recovery, stick.volume.recovery):
            weakref.finalize(each, freed.append, type(each).__name__)
        await stick.pull()
        await stick.is_away()
        assert await stick.plug()
        await stick.goes_on()
        await lab.registry.end(stick.disk, Reason.OPERATOR)
        await stick.is_gone()

    gc.collect()
    gc.disable()
    try:
        await live()
        with trio.move_on_after(PATIENCE):
            while len(freed) < 4:
                await trio.sleep(0.02)
    finally:
        gc.enable()
    assert sorted(freed) == ["BlockEndpoint", "Mount", "Recovery", "Recovery"]


async def test_a_block_shim_that_dies_takes_its_volumes_with_it(stick: Stick) -> None:
    assert stick.disk.shim.pid is not None
    os.kill(stick.disk.shim.pid, signal.SIGKILL)
    await stick.is_gone()
    assert stick.volume.instance.reason is stick.disk.instance.reason is Reason.CRASHED
    assert stick.volume.instance.text == "the disk that it was on has ended"


async def test_a_medium_that_is_taken_out_ends_its_volumes_and_not_the_device(lab: Lab, stick: Stick) -> None:
    device = stick.lease.plugged.device
    assert isinstance(device, Storage)
    await trio.to_thread.run_sync(stick.lease.plugged._emulator.loop.call, lambda: device.change_medium(None))
    await gone(stick.volume)
    assert stick.volume.instance.text == "its medium was taken out, or has other partitions now"
    assert find_mount(str(stick.path)) is None
    assert stick.disk.instance.state is State.ACTIVE
    assert stick.disk.volumes == []
