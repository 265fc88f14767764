"""Requests that come out right in spite of what happens around them: no room, no device, a death in the middle."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pyfuse3
import pytest

from tests.t3_fat.lab import CONTEXT, MIB, Disk, Image, Stores, fsck, make, opened

SEED = int(os.environ.get("FAT_IO_SEED", "1"))
STEPS = int(os.environ.get("FAT_IO_STEPS", "400"))


async def test_a_full_volume_takes_what_fits_and_can_be_emptied_at_once(tmp_path: Path) -> None:
    image = make(tmp_path / "image", 36 * MIB, "-s", "1", kind=32)
    async with opened(image) as operations:
        disk = Disk(operations)
        empty = await disk.free()
        for round_ in range(2):
            handle = await disk.create(f"/all{round_}")
            written = 0
            while written < empty * 512:
                written += await operations.write(handle, written, bytes(131072))
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await operations.write(handle, written, b"x")
            assert caught.value.errno == errno.ENOSPC
            assert written == empty * 512  # the last write was cut to what there was
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await disk.mkdir("/directory")
            assert caught.value.errno == errno.ENOSPC
            await disk.close(handle)
            await disk.unlink(f"/all{round_}")
            await disk.mkdir(f"/directory{round_}")
            await disk.rmdir(f"/directory{round_}")
        await disk.truncate_file("/sparse", empty * 512)
        await disk.unlink("/sparse")
        assert await disk.free() == empty
    fsck(image)


@pytest.mark.parametrize("sectors", ["1", "64"])
async def test_random_reads_and_writes_are_what_a_plain_file_says(tmp_path: Path, sectors: str) -> None:
    image = make(tmp_path / "image", 160 * MIB, "-s", sectors, kind=32 if sectors == "1" else 16)
    dice = random.Random(f"{SEED} {sectors}")
    models = [bytearray() for _ in range(3)]
    stores = Stores()
    print(f"seed {SEED}")
    try:
        for generation in range(4):
            async with opened(image, store=stores.store(), orderly=generation == 3) as operations:
                disk = Disk(operations)
                handles = [
                    await (disk.open(f"/{n}") if generation else disk.create(f"/{n}")) for n in range(len(models))
                ]
                for _ in range(STEPS // 4):
                    number = dice.randrange(len(models))
                    model, handle = models[number], handles[number]
                    at = len(model) if dice.random() < 0.4 else dice.randrange(2_000_000)
                    size = dice.choice((1, 511, 4096, 50_000, 131_072))
                    match dice.choice(("read", "read", "write", "write", "truncate", "fsync")):
                        case "read":
                            at = min(at, max(0, len(model) - size // 2))
                            for offset in range(at, at + 4 * size, size):
                                found = await operations.read(handle, offset, size)
                                assert found == model[offset : offset + size], (number, offset, size)
                        case "write":
                            for offset in range(at, at + 4 * size, size):
                                data = dice.randbytes(size)
                                model.extend(bytes(max(0, offset - len(model))))
                                model[offset : offset + size] = data
                                assert await operations.write(handle, offset, data) == size
                        case "truncate" if dice.random() < 0.3:
                            del model[at:]
                            model.extend(bytes(at - len(model)))
                            await disk.truncate(f"/{number}", at)
                        case "fsync":
                            await operations.fsync(handle, False)
        fsck(image)
        async with opened(image) as operations:
            found = await Disk(operations).walk()
            assert found == {f"/{n}": bytes(model) for n, model in enumerate(models)}
    finally:
        stores.close()


async def test_an_exchange_that_was_done_and_not_answered_is_not_done_twice(tmp_path: Path) -> None:
    image = make(tmp_path / "image", 40 * MIB, kind=32)
    stores = Stores()
    try:
        async with opened(image, store=stores.store(), orderly=False) as operations:
            disk = Disk(operations)
            await disk.write_file("/a", b"a")
            await disk.mkdir("/d")
            await disk.write_file("/d/b", b"b")
            parents = pyfuse3.ROOT_INODE, await disk.node("/d")
            # Killed in the moment between the work and the answer: what is noted behind the answer never is.
            operations.volume.intents.settled = lambda: None
            await operations.rename(parents[0], b"a", parents[1], b"b", 2, CONTEXT)
        async with opened(image, store=stores.store(), orderly=False) as operations:
            disk = Disk(operations)
            await disk.rename("/a", "/d/b", 2)
            assert await disk.walk() == {"/a": b"b", "/d": None, "/d/b": b"a"}
            await disk.rename("/a", "/d/b", 2)  # this one is another
            assert await disk.walk() == {"/a": b"a", "/d": None, "/d/b": b"b"}
        async with opened(image, store=stores.store()) as operations:
            assert await Disk(operations).read_file("/a") == b"a"
        fsck(image)
    finally:
        stores.close()


async def test_without_its_device_every_request_is_enodev_and_a_successor_goes_on(tmp_path: Path) -> None:
    image = make(tmp_path / "image", 40 * MIB, kind=32)
    stores = Stores()
    unit = Image(image)
    try:
        async with opened(image, store=stores.store(), unit=unit, orderly=False) as operations:
            disk = Disk(operations)
            handle = await disk.create("/file")
            await disk.write(handle, 0, b"kept" * 100_000)
            unit.pulled = True
            for request in (operations.write(handle, 0, b"lost"), operations.fsync(handle, False), disk.mkdir("/d")):
                with pytest.raises(pyfuse3.FUSEError) as caught:
                    await request
                assert caught.value.errno == errno.ENODEV
        unit.pulled = False
        async with opened(image, store=stores.store(), unit=unit) as operations:
            assert await Disk(operations).walk() == {"/file": b"kept" * 100_000}
        fsck(image)
    finally:
        unit.close()
        stores.close()


async def test_what_was_freed_is_not_written_over_before_a_flush(tmp_path: Path) -> None:
    image = make(tmp_path / "image", 40 * MIB, kind=32)
    unit = Image(image)
    try:
        async with opened(image, unit=unit) as operations:
            disk = Disk(operations)
            await disk.write_file("/old", b"precious" * 1000)
            await operations.sync()
            place = image.read_bytes().index(b"precious" * 64)
            await disk.unlink("/old")
            flushes = unit.count["flush"]
            handle = await disk.create("/new")
            operations.volume.free.next = 2  # it would look there first
            await disk.write(handle, 0, bytes(64_000))
            assert unit.count["flush"] == flushes
            assert image.read_bytes()[place : place + 512] == b"precious" * 64
            await disk.close(handle)
        fsck(image)
    finally:
        unit.close()


async def test_a_write_protected_device_is_served_read_only(tmp_path: Path) -> None:
    image = make(tmp_path / "image", 40 * MIB, kind=32)
    async with opened(image) as operations:
        await Disk(operations).write_file("/file", b"x")
    unit = Image(image)
    unit.read_only = True
    try:
        async with opened(image, unit=unit) as operations:
            disk = Disk(operations)
            assert await disk.read_file("/file") == b"x"
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await disk.unlink("/file")
            assert caught.value.errno == errno.EROFS
        assert not unit.count["write"]
    finally:
        unit.close()
