from __future__ import annotations

from pathlib import Path

import pytest

from tests.t3_fat.lab import MIB, Disk, fsck, make, opened

pytestmark = pytest.mark.parametrize("kind", [12, 16, 32])
SIZES = {12: 2 * MIB, 16: 16 * MIB, 32: 64 * MIB}


async def test_what_is_written_is_there_for_the_next_one(tmp_path: Path, kind: int) -> None:
    image = make(tmp_path / "image", SIZES[kind], kind=kind)
    data = bytes(range(256)) * 2000
    async with opened(image) as operations:
        disk = Disk(operations)
        await disk.mkdir("/A directory")
        await disk.write_file("/A directory/a long file name.text", data)
        await disk.write_file("/short.txt", b"x")
        await disk.write_file("/gone", data)
        await disk.unlink("/gone")
        await disk.rename("/short.txt", "/A directory/moved")
        await disk.truncate("/A directory/moved", 100_000)
        before = await disk.free()
    fsck(image)
    async with opened(image) as operations:
        disk = Disk(operations)
        assert await disk.walk() == {
            "/A directory": None,
            "/A directory/a long file name.text": data,
            "/A directory/moved": b"x".ljust(100_000, b"\0"),
        }
        assert await disk.free() == before
