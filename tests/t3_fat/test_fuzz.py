"""fs/fat on damaged images: errors of the right kind, in bounded time and memory, and never a write where none belongs.

FAT_FUZZ_CASES is the number of damaged images for each kind of volume (39), FAT_FUZZ_SEED the first seed. A failure
names the seed and the damage; FAT_FUZZ_SEED=N FAT_FUZZ_CASES=1 repeats it.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
import trio

from tests.t3_fat import oracle
from tests.t3_fat.damaging import WAYS
from tests.t3_fat.driving import DAMAGE, Driven, Medium, Refused, driven
from tests.t3_fat.rawfat import Image
from tests.t3_fat.zoo import KIB, Geometry
from udf import UserError

CASES = int(os.environ.get("FAT_FUZZ_CASES", "39"))
SEED = int(os.environ.get("FAT_FUZZ_SEED", "1"))
KINDS = [Geometry(12, 512, clusters=300), Geometry(16, 1024), Geometry(32, 512, clusters=300, few=True)]
BEHIND = 64 * KIB  # of the device, behind the volume
SECONDS = 60
MEMORY = 150 << 20


@pytest.fixture(params=KINDS, ids=str)
def sound(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small volume with files and directories on it, and room behind it on the device."""
    oracle.need()
    geometry: Geometry = request.param
    path = geometry.make(tmp_path / "sound")
    image = Image.of(path, in_place=True)
    dice = random.Random(3)
    parents = [0]
    for number, name in enumerate(("one", "two", "three below two", "four below three", "five with a long name")):
        parents.append(image.directory(parents[-1] if number > 1 else 0, name, b"DIR%d~1     " % number))
        for size in (0, 700, 3000 + 1000 * number):
            image.file(parents[-1], f"file of {size} bytes", b"F%07d~1 " % size, dice.randbytes(size))
    image.file(0, "", b"SHORT   TXT", b"short")
    image.count()
    image.close()
    oracle.check(path)
    with open(path, "ab") as file:
        file.write(b"behind" * (BEHIND // 6))
    return path


async def test_damaged_images_give_errors_and_nothing_worse(sound: Path, tmp_path: Path) -> None:
    used = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(SEED, SEED + CASES):
        dice = random.Random(seed)
        path = tmp_path / "damaged"
        shutil.copy(sound, path)
        way = list(WAYS)[seed % len(WAYS)]
        image = Image.of(path, in_place=True)
        end, start, fsinfo = image.size, image.reserved, image.fsinfo
        said = WAYS[way](image, dice)
        if dice.random() < 0.15:
            size = dice.choice((0, 512, start, image.start, dice.randrange(end)))
            os.truncate(path, size)
            said += f", cut off at {size}"
        print(f"seed {seed}: {way}: {said}")
        geometry_known = not way.startswith("boot") and way != "bit_flips"
        image.close()
        used += await survive(path, dice, (start, end, fsinfo) if geometry_known else None)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert used > CASES // 2, "most of these volumes can be used in some way"
    assert grown < MEMORY // 1024, f"{grown} KiB more memory"


async def survive(path: Path, dice: random.Random, bounds: tuple[int, int, int] | None) -> bool:
    """Use a damaged volume in all ways; whatever is refused has to be so in the right words. Whether it was mounted."""
    was = path.read_bytes()
    medium = Medium(path)
    if not medium.size:
        medium.close()
        return False
    mounted = False
    try:
        with trio.fail_after(SECONDS):
            try:
                async with driven(medium) as driver:
                    mounted = True
                    await use(driver, dice)
            except* (UserError, OSError) as refused:
                for error in _leaves(refused):
                    number = errno.EIO if isinstance(error, UserError) else error.errno
                    assert number in DAMAGE, repr(error)
    finally:
        medium.close()
    if bounds is not None:
        start, end, fsinfo = bounds
        now = path.read_bytes()
        assert now[end:] == was[end:], "something was written behind the volume"
        changed = {at for at in range(min(start, len(was))) if now[at] != was[at]}
        allowed = {0x25, 0x41, *range(fsinfo + 488, fsinfo + 496)} if fsinfo else {0x25}
        assert changed <= allowed, f"reserved sectors were changed at {sorted(changed - allowed)}"
    return mounted


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]


class Using:
    """A driver that may refuse anything, if it says so properly."""

    def __init__(self, driver: Driven) -> None:
        self.driver = driver

    async def may(self, verb: str, *arguments: object, **named: object) -> object:
        try:
            return await getattr(self.driver, verb)(*arguments, **named)
        except Refused as refusal:
            if refusal.errno not in DAMAGE:
                raise
            return None


async def use(driver: Driven, dice: random.Random) -> None:
    using = Using(driver)
    paths: list[tuple[str, bool]] = []
    queue = [""]
    while queue and len(paths) < 150:
        path = queue.pop(0)
        for name, attributes in list((await using.may("listing", path) or {}).items())[:40]:
            assert name
            assert "/" not in name
            assert "\0" not in name
            here = f"{path}/{name}" if path else name
            directory = attributes.st_mode & 0o170000 == 0o040000
            paths.append((here, directory))
            if directory and here.count("/") < 4:
                queue.append(here)
    dice.shuffle(paths)
    for path, directory in paths[:40]:
        if not directory:
            await using.may("read", path, 0, 200_000)
            await using.may("read", path, dice.randrange(1 << 32), 5000)
        else:
            await using.may("stat", path)
    await using.may("statfs")
    for number, (path, directory) in enumerate(paths[:24]):
        parent = path if directory else path.rpartition("/")[0]
        what = number % 8
        if what == 0:
            await using.may("create", f"{parent}/new {number}".lstrip("/"), dice.randbytes(3000))
        elif what == 1:
            await using.may("mkdir", f"{parent}/directory {number}".lstrip("/"))
        elif what == 2:
            await using.may("rename", path, f"renamed {number}")
        elif what == 3 and not directory:
            await using.may("write", path, dice.choice((0, 100, 5000)), dice.randbytes(2000))
        elif what == 4 and not directory:
            await using.may("setattr", path, size=dice.choice((0, 1, 1000, 20_000)))
        elif what == 5:
            await using.may("rmdir" if directory else "unlink", path)
        elif what == 6:
            await using.may("setattr", path, mtime=10**18)
        elif not directory:
            await using.may("write", path, 0, b"x")
    await using.may("create", "at the end", b"end")
    await using.may("sync")
