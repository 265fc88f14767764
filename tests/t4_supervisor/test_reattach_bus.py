"""Sticks that are pulled out and plugged in with all that a daemon does about it: bus, binder, drivers, shims."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from desk import Desk, desk_at
from lab import gone, in_thread, read, write
from real import needs_fuse

from udf.fuse.mountinfo import find_mount
from udf.supervisor.instance import Reason, State

pytestmark = needs_fuse
BLOCK = b"before".ljust(512)


@pytest.fixture
async def desk(own_rundir: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    from udf.supervisor import sockets

    monkeypatch.setattr(sockets, "rundir", lambda: runtime_dir)
    async with desk_at(runtime_dir) as desk:
        yield desk


def said(desk: Desk, name: str) -> list[tuple[str, str]]:
    kinds = ("mount", "block")
    return [(str(e.state), e.reason) for e in desk.lab.told("state") if e.name == name and e.kind in kinds]


async def test_a_stick_that_is_replugged_goes_on_under_its_names(desk: Desk) -> None:
    plugged, volume = await desk.mounted(desk.image("a"))
    data = Path(volume.plan.mountpoint) / "data"
    links = list(desk.devices.by_id.iterdir())
    assert [link.readlink() for link in links] == [Path("../disk0")]
    await in_thread(write, data, BLOCK)
    file = os.open(data, os.O_RDWR)
    await desk.pull(plugged)
    await desk.is_away(volume)
    assert not list(desk.devices.by_id.iterdir())
    assert [row["state"] for row in desk.devices.rows()] == ["away"]
    await desk.put_back(plugged)
    await desk.goes_on(volume)
    disk = await desk.disk()
    assert disk is volume.below
    assert list(desk.devices.by_id.iterdir()) == links
    assert [row["state"] for row in desk.devices.rows()] == ["bound"]
    assert await in_thread(os.pwrite, file, b"after ".ljust(512), 512) == 512
    await in_thread(os.fsync, file)
    os.close(file)
    assert (await read(data))[:1024] == BLOCK + b"after ".ljust(512)
    assert said(desk, "disk0")[1:] == [("ACTIVE", "ready"), ("DETACHED", "unplugged"), ("ACTIVE", "reattached")]


async def test_a_replug_in_no_time_is_survived(desk: Desk) -> None:
    plugged, volume = await desk.mounted(desk.image("a"))
    data = Path(volume.plan.mountpoint) / "data"
    file = os.open(data, os.O_RDWR)
    for number in range(3):
        await desk.put_back(plugged)  # out and in
        await desk.until(lambda number=number: volume.is_gone or volume.generation > number + 1)
        await desk.goes_on(volume)
        assert await in_thread(os.pwrite, file, bytes([number]) * 512, 0) == 512
    os.close(file)


async def test_a_stick_that_was_changed_elsewhere_is_a_new_one(desk: Desk) -> None:
    image = desk.image("a")
    plugged, volume = await desk.mounted(image)
    before = volume.below
    await in_thread(write, Path(volume.plan.mountpoint) / "data", BLOCK)
    await desk.take_away(plugged)
    await desk.is_away(volume)
    with image.open("r+b") as file:
        file.write(b"after ".ljust(512))
    await desk.plug(image)
    await gone(volume)
    assert volume.instance.reason is Reason.CHANGED
    assert volume.instance.text == "the volume on it has changed since it was pulled out"
    assert find_mount(volume.plan.mountpoint) is None
    disk = await desk.disk(other_than=before)
    assert disk.instance.state is State.ACTIVE
    await desk.until(lambda: find_mount(str(desk.lab.place("disk0"))) is not None)
    assert (await read(desk.lab.place("disk0") / "disk"))[:6] == b"after "


async def test_another_stick_in_its_place_is_a_new_one_and_ends_the_mount(desk: Desk) -> None:
    plugged, volume = await desk.mounted(desk.image("a"))
    await desk.take_away(plugged)
    await desk.is_away(volume)
    await desk.plug(desk.image("b"), "S2")
    await gone(volume)
    assert volume.instance.reason is Reason.CHANGED
    assert volume.instance.text == "another device was plugged in in its place"
    await desk.disk("disk1")


async def test_a_copy_beside_it_is_given_nothing(desk: Desk) -> None:
    plugged, volume = await desk.mounted(desk.image("a"))
    await in_thread(write, Path(volume.plan.mountpoint) / "data", BLOCK)
    await desk.plug(desk.image("b"), "S1")
    copy = await desk.disk("disk1")
    assert copy.volumes == []
    await desk.pull(plugged)
    await desk.is_away(volume)
    await desk.put_back(plugged)
    await desk.goes_on(volume)
    assert await desk.disk("disk1") is copy


async def test_a_device_that_nobody_uses_is_gone_at_once(desk: Desk) -> None:
    plugged = await desk.plug(desk.image("a"))
    disk = await desk.disk()
    await desk.pull(plugged)
    await gone(disk)
    assert said(desk, "disk0")[1:] == [("ACTIVE", "ready"), ("DETACHED", "unplugged"), ("GONE", "unplugged")]
