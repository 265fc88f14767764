"""Volumes that mkfs.fat made and mtools filled are read by fs/fat as mtools reads them, and odd ones too."""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

import pytest

from tests.t3_fat import oracle, zoo
from tests.t3_fat.driving import Driven, Medium, driven
from tests.t3_fat.rawfat import READ_ONLY, Image

EVERY = 1 if os.environ.get("FAT_ZOO") == "all" else 6  # of the geometries, one of so many is in a usual run
CHOSEN = zoo.GEOMETRIES[::EVERY]


async def attributes_of(driver: Driven, path: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, attributes in (await driver.listing(path)).items():
        here = f"{path}/{name}" if path else name
        found[here] = attributes
        if stat.S_ISDIR(attributes.st_mode):
            found |= await attributes_of(driver, here)
    return found


@pytest.mark.parametrize("geometry", [*CHOSEN, *zoo.GEOMETRIES[33:42:2]], ids=str)
async def test_what_mtools_wrote_is_read_identically(tmp_path: Path, geometry: zoo.Geometry) -> None:
    oracle.need()
    path = geometry.make(tmp_path / "image", label="ZOO")
    top = zoo.tree(tmp_path / "tree", geometry.cluster)
    if geometry.kind == 12 and geometry.more == ("-r", "16"):
        for file in sorted(top.iterdir())[1:]:
            if file.is_file():
                file.unlink()  # what fits into a root of 16 entries
        for directory in sorted(top.iterdir())[3:]:
            oracle.call("rm", "-r", directory)
    oracle.filled(path, top, offset=geometry.offset)
    known = oracle.pictured(top)
    medium = Medium(path, offset=geometry.offset)
    try:
        async with driven(medium, ro=True) as driver:
            assert await driver.tree() == {name: contents for name, (contents, _) in known.items()}
            for name, attributes in (await attributes_of(driver)).items():
                contents, seconds = known[name]
                if contents is not None:
                    assert attributes.st_mtime_ns == seconds * 10**9, name
                    assert attributes.st_size == len(contents), name
        assert not medium.writes
    finally:
        medium.close()


@pytest.mark.parametrize("geometry", CHOSEN[:: 2 if EVERY > 1 else 1], ids=str)
async def test_what_we_write_is_read_identically_by_mtools(tmp_path: Path, geometry: zoo.Geometry) -> None:
    oracle.need()
    path = geometry.make(tmp_path / "image")
    top = zoo.tree(tmp_path / "tree", geometry.cluster, seed=2)
    medium = Medium(path, offset=geometry.offset)
    small_root = geometry.more == ("-r", "16")
    try:
        async with driven(medium) as driver:
            if small_root:
                await driver.mkdir("all")
            for file in sorted(top.rglob("*")):
                name = ("all/" if small_root else "") + str(file.relative_to(top))
                if file.is_dir():
                    await driver.mkdir(name)
                    continue
                when = int(file.stat().st_mtime) * 10**9
                await driver.create(name, file.read_bytes())
                await driver.setattr(name, mtime=when, atime=when)
            await driver.sync()
    finally:
        medium.close()
    if not geometry.offset and geometry.fats < 3:  # which is all that fsck.fat can do
        oracle.check(path)
    known = oracle.pictured(top)
    if small_root:
        known = {f"all/{name}": what for name, what in known.items()} | {"all": (None, 0)}
    assert oracle.extracted(path, tmp_path / "out", offset=geometry.offset) == known


@pytest.mark.parametrize("name", sorted(zoo.ODDITIES))
async def test_odd_volumes_are_read_as_they_are_and_written_on(tmp_path: Path, name: str) -> None:
    oracle.need()
    for kind in (12, 16, 32):
        path = tmp_path / f"image{kind}"
        expected = zoo.odd(path, name, kind)
        before = Image.of(path).tree()
        medium = Medium(path)
        try:
            async with driven(medium) as driver:
                assert await driver.tree() == expected
                for entry, found in before.items():
                    mode = (await driver.stat(entry)).st_mode
                    if not found.is_directory:
                        assert bool(mode & 0o222) != bool(found.attributes & READ_ONLY), entry
                directories = ["", *(entry for entry, contents in expected.items() if contents is None)]
                for directory in directories:
                    for number in range(3):
                        new = f"{directory}/written afterwards {number}".lstrip("/")
                        await driver.create(new, new.encode() * 30)
                        expected[new] = new.encode() * 30
                for entry in list(expected)[:2]:
                    if expected[entry] is not None:
                        await driver.unlink(entry)
                        del expected[entry]
                assert await driver.tree() == expected
                await driver.sync()
        finally:
            medium.close()
        seen = Image.of(path).tree()
        assert {entry: None if f.is_directory else f.contents for entry, f in seen.items()} == expected
        if name not in zoo.COMPLAINED_OF:
            oracle.check(path)


async def test_a_name_that_is_too_long_is_told_so_also_when_it_is_looked_for(tmp_path: Path) -> None:
    """It used to be ENOENT, which pjdfstest's truncate and rmdir do not take."""
    oracle.need()
    medium = Medium(zoo.Geometry(16, 1024).make(tmp_path / "image"))
    try:
        async with driven(medium) as driver:
            for name in ("n" * 256, "ö" * 256, "😀" * 128):
                with pytest.raises(OSError) as refused:
                    await driver.stat(name)
                assert refused.value.errno == errno.ENAMETOOLONG
            for name in ("ö" * 255, "n" * 255, "😀" * 127):
                await driver.create(name)
                await driver.stat(name + ".")
    finally:
        medium.close()


async def test_local_time_is_that_of_the_zone_on_both_sides_of_summer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle.need()
    zone = "Europe/Berlin"
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        path = zoo.Geometry(16, 1024).make(tmp_path / "image")
        top = tmp_path / "tree"
        top.mkdir()
        for number, when in enumerate((1736899200, 1752537600, 1700000000, 1720000000)):  # winters and summers
            (top / f"file {number}").write_bytes(b"x")
            os.utime(top / f"file {number}", (when, when))
        oracle.filled(path, top, zone=zone)
        medium = Medium(path)
        try:
            async with driven(medium, utc=False) as driver:
                for file in top.iterdir():
                    assert (await driver.stat(file.name)).st_mtime_ns == int(file.stat().st_mtime) * 10**9
                    await driver.create(f"{file.name} again", b"x")
                    await driver.setattr(f"{file.name} again", mtime=int(file.stat().st_mtime) * 10**9)
                await driver.sync()
        finally:
            medium.close()
        seen = oracle.extracted(path, tmp_path / "out", zone=zone)
        for file in top.iterdir():
            assert seen[f"{file.name} again"][1] == int(file.stat().st_mtime)
    finally:
        monkeypatch.undo()
        time.tzset()
