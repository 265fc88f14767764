"""Large volumes and large directories: what is bounded stays so. No time is asserted, only how it grows."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.t3_fat import oracle
from tests.t3_fat.driving import Medium, driven
from tests.t3_fat.rawfat import DIRECTORY, Image, long_entries, short_entry
from tests.t3_fat.zoo import MIB

TERABYTES = 2147483646  # blocks of 1 KiB: two less two sectors, as much as 32 bits of sectors can say
FILES = int(os.environ.get("FAT_LARGE_FILES", "4000"))  # the bar is 50,000
TABLE = 128 * MIB  # of the large volume: about what is too much to have in memory


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


async def test_two_terabytes_are_mounted_without_reading_the_table(tmp_path: Path) -> None:
    oracle.need()
    path = tmp_path / "large"
    oracle.call("mkfs.fat", "-C", "-F", "32", "-s", "128", path, str(TERABYTES))
    medium = Medium(path)
    before = resident()
    try:
        begun = time.perf_counter()
        async with driven(medium) as driver:
            assert await driver.listing() == {}
            mounted = time.perf_counter() - begun
            read_until_mounted = medium.reads
            await driver.create("first file", b"x" * 100_000)
            given = await driver.statfs()
            assert given.f_blocks * given.f_bsize > 2 * 10**12
            await driver.sync()
        grown = resident() - before
        print(f"mounted in {mounted:.3f} s with {read_until_mounted} reads, {grown / MIB:.1f} MiB more memory")
        assert grown < TABLE // 4
    finally:
        medium.close()
    image = Image.of(path)
    assert image.find("first file").size == 100_000


async def test_a_cluster_at_the_far_end_of_a_full_table_is_found(tmp_path: Path) -> None:
    """Nearly all is used and FSInfo says nothing: the search has to go through all of the table, piece by piece."""
    oracle.need()
    path = tmp_path / "full"
    oracle.call("mkfs.fat", "-C", "-F", "32", "-s", "1", path, str(160 * 1024))
    image = Image.of(path, in_place=True)
    last = image.clusters + 1
    for copy in range(image.fats):
        at = image.reserved + copy * image.fat_size
        image.put(at + 12, b"\xff\xff\xff\x0f" * (last - 3))
    image.put(image.fsinfo + 488, b"\xff" * 8)
    medium = Medium(path)
    try:
        async with driven(medium) as driver:
            await driver.create("tiny", b"x")
            with pytest.raises(OSError) as refused:
                await driver.create("no room", b"x" * 2000)
            assert refused.value.errno == 28
            await driver.sync()
            given = await driver.statfs()
            assert given.f_bfree <= 1
    finally:
        medium.close()
    assert Image.of(path).find("tiny").cluster == last


def name_of(number: int, *, long: bool, new: bool = False) -> str:
    if long:
        return f"a name of {'another ' if new else ''}file {number:07}"
    return f"{'N' if new else 'F'}{number:07}.TXT"


async def filled(path: Path, count: int, *, long: bool) -> dict[str, float]:
    """How long each kind of use takes in a directory of so many files, in seconds."""
    path.unlink(missing_ok=True)
    oracle.call("mkfs.fat", "-C", "-F", "32", "-s", "8", path, str(300 * 1024))
    image = Image.of(path, in_place=True)
    need = (count * (3 if long else 1) + 10) * 32
    first = image.allocate(-(-need // image.cluster))
    image.add(0, short_entry(b"MANY       ", DIRECTORY, first))
    slots = image.slots(first)
    entries = [short_entry(b".          ", DIRECTORY, first), short_entry(b"..         ", DIRECTORY, 0)]
    for number in range(count):
        short = b"F%07dTXT" % number
        entry = (long_entries(name_of(number, long=True), short) if long else b"") + short_entry(short)
        entries += [entry[at : at + 32] for at in range(0, len(entry), 32)]
    for place, entry in zip(slots, entries, strict=False):
        image.put(place, entry)
    image.count()
    del image
    medium = Medium(path)
    took: dict[str, float] = {}
    try:
        async with driven(medium) as driver:
            begun = time.perf_counter()
            listed = await driver.listing("MANY")
            took["listing"] = time.perf_counter() - begun
            assert len(listed) == count
            begun = time.perf_counter()
            async with driver.at("MANY") as directory:
                for number in range(0, count, count // 200):
                    name = name_of(number, long=long).swapcase().encode()
                    entry = await driver._call("lookup", directory, name, None)
                    assert entry.st_ino
                    await driver.operations.forget([(entry.st_ino, 1)])
                took["200 look-ups"] = time.perf_counter() - begun
                begun = time.perf_counter()
                for number in range(200):
                    await driver.create(f"MANY/{name_of(number, long=long, new=True)}")
                took["200 creates"] = time.perf_counter() - begun
                begun = time.perf_counter()
                for number in range(200):
                    await driver.unlink(f"MANY/{name_of(number * (count // 200), long=long)}")
                took["200 removals"] = time.perf_counter() - begun
            await driver.sync()
    finally:
        medium.close()
    oracle.check(path)
    return took


@pytest.mark.timeout(600)
@pytest.mark.parametrize("long", [False, True], ids=["8.3", "long names"])
async def test_a_directory_of_many_files_takes_no_more_than_its_share(tmp_path: Path, long: bool) -> None:
    """Ten times the files may take at most thirty times as long to list, and no longer than that for single names.

    A directory has at most 65,536 slots: that is room for 50,000 short names, or for 20,000 of these long ones.
    """
    oracle.need()
    count = min(FILES, 20_000) if long else FILES
    few = await filled(tmp_path / "image", count // 10, long=long)
    before = resident()
    many = await filled(tmp_path / "image", count, long=long)
    print(f"{count // 10} files: {few}\n{count} files: {many}, {(resident() - before) / MIB:.1f} MiB more memory")
    for what, seconds in many.items():
        assert seconds < 30 * few[what] + 0.2, f"{what}: {few[what]:.3f} s, then {seconds:.3f} s"
