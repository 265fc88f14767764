"""Volumes that the kernel's own vfat wrote are read by fs/fat as the kernel read them.

The images in kernel/ were written by Linux 6.1 (options utf8, tz=UTC, codepage=437, shortname=mixed) in a VM: a tree
like that of the zoo was copied there, then files were removed, renamed, appended to with fsyncs, cut and made
read-only, and a directory was emptied. seen.json is what the same kernel then listed: size, time of modification,
bits of write permission and the beginning of the SHA-256 of each file, null for a directory.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import stat
from pathlib import Path

import pytest

from tests.t3_fat import oracle
from tests.t3_fat.driving import Driven, Medium, driven
from tests.t3_fat.rawfat import Image

HERE = Path(__file__).parent / "kernel"
Seen = dict[str, list[object] | None]


@pytest.fixture(params=[12, 16, 32])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(lzma.decompress((HERE / f"fat{request.param}.img.xz").read_bytes()))
    return path


async def listed(driver: Driven, path: str = "") -> Seen:
    found: Seen = {}
    for name, attributes in (await driver.listing(path)).items():
        here = f"{path}/{name}" if path else name
        if stat.S_ISDIR(attributes.st_mode):
            found[here] = None
            found |= await listed(driver, here)
        else:
            contents = await driver.read(here)
            digest = hashlib.sha256(contents).hexdigest()[:16]
            found[here] = [
                attributes.st_size, attributes.st_mtime_ns // 10**9, oct(attributes.st_mode & 0o222), digest
            ]  # fmt: skip
    return found


async def test_what_the_kernel_wrote_is_read_identically(image: Path) -> None:
    oracle.need()
    oracle.check(image)
    medium = Medium(image)
    try:
        async with driven(medium) as driver:
            assert await listed(driver) == json.loads((HERE / "seen.json").read_text())
    finally:
        medium.close()


async def test_what_the_kernel_wrote_is_written_on(image: Path) -> None:
    """Into its directories with holes, until they grow."""
    oracle.need()
    medium = Medium(image)
    try:
        async with driven(medium) as driver:
            expected = await driver.tree()
            for directory in ("", "same beginnings/", "emptied/", "moved directory/"):
                for number in range(30):
                    name = f"{directory}a long name, number {number + 100:03}.txt"
                    expected[name] = name.encode()
                    await driver.create(name, name.encode())
            for name in ("appended.bin", "deep/Read me later, please.txt"):
                await driver.unlink(name)
                del expected[name]
            await driver.sync()
    finally:
        medium.close()
    oracle.check(image)
    seen = Image.of(image).tree()
    assert {path: None if found.is_directory else found.contents for path, found in seen.items()} == expected
