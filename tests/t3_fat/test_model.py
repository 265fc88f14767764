"""Random operations on fs/fat, each of which has to end as a plain Python tree says, and to leave a clean volume.

After each operation, synced: `fsck.fat -n` has nothing to say and the second opinion (rawfat) sees the same tree; every
FAT_MODEL_MTOOLS operations (40) mtools extracts the same; every 150 the driver is started anew and asked for all of it.
FAT_MODEL_OPERATIONS says how many operations there are in all (500; the bar is 10,000), FAT_MODEL_SEED where the seeds
begin. A failure prints the seed and the operations; `FAT_MODEL_SEED=N FAT_MODEL_OPERATIONS=M` repeats it.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.t3_fat import oracle
from tests.t3_fat.driving import Driven, Medium, Refused, driven
from tests.t3_fat.model import Chooser, Node, Operation, World, key
from tests.t3_fat.rawfat import READ_ONLY, Image
from tests.t3_fat.zoo import Geometry
from udf import Store

OPERATIONS = int(os.environ.get("FAT_MODEL_OPERATIONS", "500"))
SEED = int(os.environ.get("FAT_MODEL_SEED", "1"))
EVERY = int(os.environ.get("FAT_MODEL_MTOOLS", "40"))
KINDS = [
    Geometry(12, 512, clusters=900),
    Geometry(12, 4096, clusters=120),
    Geometry(16, 512),
    Geometry(16, 2048),
    Geometry(32, 512),
    Geometry(32, 4096, 4096, clusters=150, few=True),
    Geometry(16, 1024, 1024, fats=1),
]
ROUND = max(1, OPERATIONS // len(KINDS))
# Where the kernel or another reading of POSIX gives another number for the same refusal.
ALIKE = {
    errno.EISDIR: {errno.EISDIR, errno.EPERM},
    errno.EINVAL: {errno.EINVAL, errno.ENOENT, errno.EEXIST},
    errno.ENOENT: {errno.ENOENT, errno.ENAMETOOLONG, errno.EINVAL},
    errno.EEXIST: {errno.EEXIST, errno.ENOTEMPTY},
    errno.ENAMETOOLONG: {errno.ENAMETOOLONG, errno.EINVAL},
}


def recent(moment: float, seconds: float) -> bool:
    """Whether a written time may be that of something that was done just now; FAT counts in twos."""
    return -10 <= moment - seconds <= 10


@dataclasses.dataclass
class Run:
    """One seeded run on one volume."""

    path: Path
    geometry: Geometry
    medium: Medium
    world: World
    chooser: Chooser
    driver: Driven
    done: list[Operation]
    refused: int = 0

    async def step(self) -> None:
        operation = self.chooser.choose(self.world)
        self.done.append(operation)
        async with trio.open_nursery() as nursery:
            if self.chooser.dice.random() < 0.3:  # what is done of itself when nothing happens may be under way too
                nursery.start_soon(self.driver.sync)
            await getattr(self, f"do_{operation[0]}")(*operation[1:])
        await self.driver.sync()
        self.check()

    # ---- what is on the volume

    def check(self) -> None:
        oracle.check(self.path, f"after operation {len(self.done)}")
        seen = Image.of(self.path).tree()
        assert {p: None if f.is_directory else f.contents for p, f in seen.items()} == self.world.picture()
        now = time.time()
        for path, node in self.world.walk():
            found = seen[path]
            assert bool(found.attributes & READ_ONLY) == node.read_only, path
            assert found.modified is not None, path
            modified = (found.modified - oracle.moment(0)).total_seconds()
            if node.modified is not None:
                assert modified == node.modified & -2, f"{path} was modified {found.modified}"
            elif not node.directory:
                assert modified <= now + 3, path
            if node.accessed is not None:
                assert found.accessed == oracle.moment(node.accessed).date(), path

    def check_by_mtools(self, scratch: Path) -> None:
        known = {p: (None if n.directory else bytes(n.data)) for p, n in self.world.walk()}
        if not self.geometry.few and all(ord(letter) < 0x10000 for path in known for letter in path):
            seen = oracle.extracted(self.path, scratch)
            assert {path: contents for path, (contents, _) in seen.items()} == known

    async def check_by_driver(self) -> None:
        assert await self.driver.tree() == self.world.picture()

    # ---- operations: on the model and on the driver

    async def _both(self, ours: Any, theirs: Any) -> bool:
        """Whether it was done. `theirs` is awaited only after the model has spoken."""
        try:
            ours()
        except OSError as expected:
            with pytest.raises(Refused) as refusal:
                await theirs()
            wanted = ALIKE.get(expected.errno or 0, {expected.errno})
            if refusal.value.errno not in wanted:
                raise AssertionError(f"{refusal.value} instead of {expected!r}") from refusal.value
            self.refused += 1
            return False
        await theirs()
        return True

    async def _growing(self, path: str, ours: Any, theirs: Any) -> None:
        """The same for what may fill the volume: then a part of it may be there, and what was there before is."""
        before = {p: bytes(n.data) for p, n in self.world.walk()}
        try:
            await self._both(ours, theirs)
            return
        except Refused as refusal:
            if refusal.errno != errno.ENOSPC:
                raise
        await self.driver.sync()
        image = Image.of(self.path)
        seen = image.tree()
        needed = len(self.world.find(path).data)
        parent = path.rpartition("/")[0]
        assert len(image.free()) * image.cluster < needed + 3 * image.cluster or not parent, "there was room"
        found = next((f for p, f in seen.items() if key(p) == key(path)), None)
        node = self.world.find(path)
        if found is None:
            name = path.rpartition("/")[2]
            assert node.name not in before
            del self.world.find(parent).children[key(name)]
        else:
            node.data[:] = found.contents

    async def do_create(self, path: str, data: bytes) -> None:
        await self._growing(path, lambda: self.world.create(path, data), lambda: self.driver.create(path, data))

    async def do_mkdir(self, path: str) -> None:
        await self._growing(path, lambda: self.world.mkdir(path), lambda: self.driver.mkdir(path))

    async def do_write(self, path: str, at: int, data: bytes) -> None:
        if self._is_directory(path):
            return

        async def write() -> None:
            if await self.driver.write(path, at, data) < len(data):
                raise Refused(errno.ENOSPC, path)

        await self._growing(path, lambda: self.world.write(path, at, data), write)

    async def do_truncate(self, path: str, size: int) -> None:
        if self._is_directory(path):
            return
        await self._growing(path, lambda: self.world.truncate(path, size), lambda: self.driver.setattr(path, size=size))

    def _is_directory(self, path: str) -> bool:
        try:
            return self.world.find(path).directory
        except OSError:
            return False

    async def do_rename(self, old: str, new: str) -> None:
        try:
            await self._both(lambda: self.world.rename(old, new), lambda: self.driver.rename(old, new))
        except Refused as refusal:
            if refusal.errno != errno.ENOSPC:
                raise
            self.world.rename(new, old)

    async def do_rename_keep(self, old: str, new: str) -> None:
        await self._both(
            lambda: self.world.rename(old, new, replace=False), lambda: self.driver.rename(old, new, flags=1)
        )

    async def do_unlink(self, path: str) -> None:
        if path:
            await self._both(lambda: self.world.unlink(path), lambda: self.driver.unlink(path))

    async def do_rmdir(self, path: str) -> None:
        if path:
            await self._both(lambda: self.world.rmdir(path), lambda: self.driver.rmdir(path))

    async def do_utime(self, path: str, modified: int, accessed: int) -> None:
        def ours() -> None:
            node = self.world.find(path)
            node.modified, node.accessed = modified, accessed

        if await self._both(ours, lambda: self.driver.setattr(path, mtime=modified * 10**9, atime=accessed * 10**9)):
            attributes = await self.driver.stat(path)
            assert attributes.st_mtime_ns == (modified & -2) * 10**9
            assert oracle.moment(attributes.st_atime_ns / 1e9).date() == oracle.moment(accessed).date()

    async def do_chmod(self, path: str, read_only: bool) -> None:
        if self._is_directory(path):
            return
        try:
            mode = (await self.driver.stat(path)).st_mode
        except Refused:
            return
        mode = mode & ~0o222 if read_only else mode | 0o200
        await self.driver.setattr(path, mode=mode)
        self.world.find(path).read_only = read_only

    async def do_read(self, path: str, at: int, size: int) -> None:
        if self._is_directory(path):
            return
        try:
            wanted = bytes(self.world.find(path).data[at : at + size])
        except OSError:
            with pytest.raises(Refused):
                await self.driver.read(path, at, size)
        else:
            assert await self.driver.read(path, at, size) == wanted

    async def do_listing(self, path: str) -> None:
        async def check(name: str, listed: Any) -> None:
            found = await self.driver.stat(f"{path}/{name}" if path else name)
            assert (found.st_ino, found.st_mode, found.st_size) == (
                listed.st_ino, listed.st_mode, listed.st_size
            ), name  # fmt: skip

        names = set(await self.driver.listing(path, check))
        assert names == {child.name for child in self.world.find(path).children.values()}

    async def do_look(self, path: str) -> None:
        attributes: list[Any] = []

        async def look() -> None:
            attributes.append(await self.driver.stat(path))

        found: list[Node] = []
        if await self._both(lambda: found.append(self.world.find(path)), look):
            assert found[0].directory == (attributes[0].st_mode & 0o170000 == 0o040000)
            if not found[0].directory:
                assert attributes[0].st_size == len(found[0].data)

    async def do_statfs(self) -> None:
        given = await self.driver.statfs()
        image = Image.of(self.path)
        assert (given.f_bfree, given.f_bsize) == (len(image.free()), image.cluster)
        assert given.f_blocks * given.f_bsize == image.clusters * image.cluster
        assert given.f_bavail == given.f_bfree

    async def do_held(self, path: str, data: bytes) -> None:
        """A file is removed while it is open: it may be used on or not, and is gone at the end."""
        if self._is_directory(path):
            return
        try:
            self.world.unlink(path)
        except OSError:
            return
        async with self.driver.opened(path) as handle:
            await self.driver.unlink(path)
            try:
                await self.driver._call("write", handle, 0, data)
                assert bytes(await self.driver._call("read", handle, 0, len(data))) == data
            except Refused as refusal:
                if refusal.errno not in (errno.ESTALE, errno.ENOENT, errno.EIO, errno.ENOSPC, errno.EBADF):
                    raise

    async def do_together(self, writes: list[tuple[str, int, bytes]], names: list[str]) -> None:
        """Several at once, none of which concerns another."""
        room = len(Image.of(self.path).free()) * self.chooser.cluster
        if room < sum(len(data) for _, _, data in writes) + 40 * self.chooser.cluster:
            return
        try:
            async with trio.open_nursery() as nursery:
                for path, at, data in writes:
                    self.world.write(path, at, data)
                    nursery.start_soon(self.driver.write, path, at, data)
                for name in names:
                    self.world.create(name, name.encode())
                    nursery.start_soon(self.driver.create, name, name.encode())
        except* Refused as refused:
            codes = {error.errno for error in refused.exceptions if isinstance(error, OSError)}
            if codes != {errno.ENOSPC}:  # the root of a FAT12 or FAT16 is full
                raise
            seen = {key(name) for name in await self.driver.listing()}
            for name in names:
                if key(name) not in seen:
                    del self.world.root.children[key(name)]
                else:
                    self.world.find(name).data[:] = await self.driver.read(name)


@pytest.mark.timeout(max(300, OPERATIONS))
@pytest.mark.parametrize("geometry", KINDS, ids=str)
async def test_every_operation_ends_as_the_model_says_and_leaves_a_clean_volume(
    tmp_path: Path, geometry: Geometry
) -> None:
    oracle.need()
    seed = SEED
    left = ROUND
    while left > 0:
        await run(tmp_path / "image", geometry, seed, min(left, 1000), tmp_path)
        left -= 1000
        seed += 1


async def run(path: Path, geometry: Geometry, seed: int, count: int, scratch: Path) -> None:
    path.unlink(missing_ok=True)
    geometry.make(path, label="MODEL")
    image = Image.of(path)
    dice = random.Random(f"{seed} {geometry}")
    chooser = Chooser(dice, image.cluster, image.clusters * image.cluster * 6 // 10, astral=seed % 4 == 0)
    chooser.room = min(chooser.room, 400_000)
    world = World()
    done: list[Operation] = []
    medium = Medium(path)
    store = Store.temporary()
    try:
        while len(done) < count:
            async with driven(medium, store=store) as driver:
                now = Run(path, geometry, medium, world, chooser, driver, done)
                await now.check_by_driver()
                for _ in range(min(150, count - len(done))):
                    await now.step()
                    if len(done) % EVERY == 0:
                        now.check_by_mtools(scratch / "out")
            store.close()
            store = Store.temporary()
        oracle.check(path, "at the end")
    except BaseException:
        shutil.copy(path, scratch / "failed.img")
        print(f"\nseed {seed}, {geometry}, operation {len(done)}; the last ones:")
        for operation in done[-12:]:
            print("  ", [f"{len(a)} bytes" if isinstance(a, bytes) and len(a) > 40 else a for a in operation])
        raise
    finally:
        medium.close()
