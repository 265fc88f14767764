"""The power goes at any moment: fsck.fat repairs what is left, and every file that had been fsynced is intact.

One workload is recorded, write by write and flush by flush. Then, for moments of it: the image of what arrived in
order; the same with the last write torn; and some that a cache allows which writes in any order between flushes. Each
is repaired by fsck.fat (-a), which must be content after that, and each is also mounted as it is, gone on with, and
repaired then. FAT_CUTS is how many moments are tried per volume (12; 0: all of them), FAT_CUTS_SEED the seed of all.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path

import pytest
import trio

from tests.t3_fat import oracle
from tests.t3_fat.cutting import Promises, applied, reordered, torn
from tests.t3_fat.driving import Driven, Log, Medium, Refused, driven
from tests.t3_fat.model import Chooser, World, key
from tests.t3_fat.rawfat import Image
from tests.t3_fat.zoo import Geometry

CUTS = int(os.environ.get("FAT_CUTS", "12"))
SEED = int(os.environ.get("FAT_CUTS_SEED", "1"))
KINDS = [
    Geometry(12, 1024, clusters=400),
    Geometry(16, 512),
    Geometry(32, 512, clusters=900, few=True),
    Geometry(32, 4096, clusters=300, few=True),
]


async def workload(driver: Driven, promises: Promises, dice: random.Random, cluster: int, count: int) -> None:
    """Random work, with an fsync now and then; what is promised is noted as it goes."""
    world = World()
    chooser = Chooser(dice, cluster, 150_000)
    moved: list[str] = []

    def settle() -> None:
        for old in moved:
            promises.settled(old)
        moved.clear()

    for _ in range(count):
        operation = chooser.choose(world)
        verb, arguments = operation[0], operation[1:]
        if verb == "create":
            path, data = arguments
            if _fails(world, "create", path, data):
                continue
            await driver.create(path, data)
        elif verb == "mkdir":
            if not _fails(world, "mkdir", *arguments):
                await driver.mkdir(arguments[0])
        elif verb in ("write", "truncate"):
            path = arguments[0]
            if _is_directory(world, path) or _fails(world, verb, *arguments):
                continue
            promises.changing(_known(world, path))
            await (driver.write(*arguments) if verb == "write" else driver.setattr(path, size=arguments[1]))
        elif verb in ("rename", "rename_keep"):
            old, new = arguments
            before = dict(world.walk())
            target = next((node for path, node in before.items() if key(path) == key(new)), None)
            source = next((path for path in before if key(path) == key(old)), "")
            replaced = next((path for path, node in before.items() if node is target), None)
            if _fails(world, "rename", old, new):
                continue
            if replaced is not None and replaced != source:
                promises.changing(replaced)
            now = next(path for path, node in world.walk() if node is before[source])
            promises.moving(source, now)
            if now != source:
                moved.append(source)
            await driver.rename(old, new)
        elif verb in ("unlink", "rmdir"):
            path = arguments[0]
            if path and not _fails(world, verb, path, before=lambda: promises.changing(_known(world, path))):  # noqa: B023 - at once
                await getattr(driver, verb)(path)
        files = [(path, node) for path, node in world.walk() if not node.directory]
        if files and dice.random() < 0.25:
            path, node = dice.choice(files)
            await driver.fsync(path)
            settle()
            promises.fsynced(path, bytes(node.data))
        elif dice.random() < 0.05:
            await driver.sync()
            settle()


def _known(world: World, path: str) -> str:
    """The path in the letters in which it is."""
    return next((known for known, _ in world.walk() if key(known) == key(path)), path)


def _is_directory(world: World, path: str) -> bool:
    try:
        return world.find(path).directory
    except OSError:
        return True


def _fails(world: World, verb: str, *arguments: object, before: object = None) -> bool:
    try:
        if verb in ("unlink", "rmdir"):
            node = world.find(str(arguments[0]))
            if node.directory != (verb == "rmdir") or node.children:
                return True
        if callable(before):
            before()
        getattr(world, verb)(*arguments)
    except OSError:
        return True
    return False


@pytest.mark.timeout(max(300, CUTS * 4 or 3000))
@pytest.mark.parametrize("geometry", KINDS, ids=str)
async def test_what_was_fsynced_survives_a_power_cut_at_any_moment(tmp_path: Path, geometry: Geometry) -> None:
    oracle.need()
    path = geometry.make(tmp_path / "image")
    base = path.read_bytes()
    dice = random.Random(f"{SEED} {geometry}")
    medium = Medium(path)
    log: Log = []
    medium.log = log
    promises = Promises(log)
    try:
        async with driven(medium) as driver:
            await workload(driver, promises, dice, Image.of(path).cluster, 80)
            await driver.sync()
    finally:
        medium.close()
    oracle.check(path)
    assert len(promises.all) > 8
    moments = range(1, len(log) + 1)
    chosen = moments if not CUTS else sorted(dice.sample(moments, min(CUTS, len(moments))))
    cut = tmp_path / "cut"
    for moment in chosen:
        kinds = {
            "in order": applied(base, log, moment),
            "torn": torn(base, log, moment, dice),
            "reordered": reordered(base, log, moment, dice),
        }
        for how, left in kinds.items():
            where = f"seed {SEED}, {geometry}, {how}, after {moment} of {len(log)}"
            cut.write_bytes(left)
            try:
                done = oracle.repaired(cut)
                broken = promises.broken(cut, moment)
                assert not broken, f"{where}: {broken}\n{done}"
                cut.write_bytes(left)
                await _go_on(cut, promises, moment, sound=how == "in order")
            except BaseException:
                cut.write_bytes(left)
                shutil.copy(cut, tmp_path / "failed.img")
                print(where)
                raise


async def _go_on(cut: Path, promises: Promises, moment: int, *, sound: bool) -> None:
    """A driver that knows nothing mounts what is left: what was promised is there, and more can be written.

    Where the device wrote in another order (not `sound`), a name may be there without its entry in the table: its
    cluster looks free, and what is new may share it until fsck.fat decides. What was promised never does.
    """
    medium = Medium(cut)
    try:
        async with driven(medium) as driver:
            for promise in promises.at(moment):
                seen = [await _read(driver, name) for name in promise.names]
                assert promise.contents in seen, f"{promise.names} before repair"
            names = [f"after the cut {number}" for number in range(3)]
            try:
                for name in names:
                    await driver.create(name, name.encode() * 200)
            except Refused as refusal:  # a table or directory that is visibly wrong is not written to
                names = []
                if refusal.errno not in (errno.ENOSPC, errno.EROFS):
                    raise
            await driver.sync()
    finally:
        medium.close()
    done = oracle.repaired(cut)
    broken = promises.broken(cut, moment)
    assert not broken, f"after going on: {broken}\n{done}"
    there = Image.of(cut).tree()
    for name in names if sound else []:
        assert there[name].contents == name.encode() * 200, done


@pytest.mark.parametrize("geometry", KINDS[:3], ids=str)
async def test_a_device_that_goes_away_at_any_transfer_is_enodev_and_takes_nothing_with_it(
    tmp_path: Path, geometry: Geometry
) -> None:
    """No call hangs, none succeeds that needs the device, no fsync is acknowledged falsely; then fsck.fat, and on."""
    oracle.need()
    path = tmp_path / "image"
    dice = random.Random(SEED)
    whole = await _gone(path, geometry, None)
    numbers = range(4, whole)
    for number in numbers if not CUTS else sorted(dice.sample(numbers, CUTS)):
        await _gone(path, geometry, number)


async def _gone(path: Path, geometry: Geometry, number: int | None) -> int:
    """A copy to the volume, fsynced file by file, from which the device goes; how many transfers a whole one takes."""
    path.unlink(missing_ok=True)
    geometry.make(path)
    medium = Medium(path)
    medium.gone_at = number
    safe: dict[str, bytes] = {}
    gone = False
    transfers = 0
    try:
        with trio.fail_after(30):
            async with driven(medium) as driver:
                for count in range(8):
                    name, data = f"Directory/file number {count}", bytes([count]) * 5000
                    try:
                        if not count:
                            await driver.mkdir("Directory")
                        await driver.create(name, data[:3000])
                        await driver.write(name, 3000, data[3000:])
                        await driver.fsync(name)
                        assert not gone, "an fsync was acknowledged when the device was gone"
                        safe[name] = data
                    except Refused as refusal:
                        # What is known needs no device: that the directory was not made, for one.
                        if refusal.errno != errno.ENODEV and not (gone and refusal.errno == errno.ENOENT):
                            raise
                        gone = True
                    if gone:
                        with pytest.raises(Refused) as refused:
                            await driver.create(f"after {count}", b"x")
                        assert refused.value.errno == errno.ENODEV
                transfers = medium.transfers
    finally:
        medium.close()
    oracle.repaired(path)
    seen = Image.of(path).tree()
    assert all(seen[name].contents == data for name, data in safe.items()), f"gone at {number}"
    medium = Medium(path)
    try:
        async with driven(medium) as driver:
            for name, data in safe.items():
                assert await driver.read(name) == data
    finally:
        medium.close()
    return transfers


async def _read(driver: Driven, path: str) -> bytes | None:
    try:
        return await driver.read(path)
    except Refused:
        return None
