"""Filesystems by their magic numbers, as blkid sees them."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.t1_block.lab import MIB, need, tool
from udf.block.probe import Volume, probe


async def volume_of(image: bytes | bytearray) -> Volume | None:
    async def read(offset: int, size: int) -> bytes:
        assert 0 <= offset < offset + size <= len(image)
        return bytes(image[offset : offset + size])

    return await probe(read, len(image))


UUID = "01234567-89ab-cdef-0123-456789abcdef"
MAKERS: dict[str, tuple[int, list[str]]] = {
    "ext2": (8, ["mkfs.ext2", "-q", "-F", "-L", "two", "-U", UUID]),
    "ext3": (8, ["mkfs.ext3", "-q", "-F", "-L", "three"]),
    "ext4": (8, ["mkfs.ext4", "-q", "-F", "-L", "Vier"]),
    "fat12": (2, ["mkfs.vfat", "-F", "12", "-n", "TWELVE", "-i", "deadbeef"]),
    "fat16": (16, ["mkfs.vfat", "-F", "16", "-n", "SIXTEEN"]),
    "fat32": (40, ["mkfs.vfat", "-F", "32", "-n", "THIRTYTWO"]),
    "fat without a label": (40, ["mkfs.vfat", "-F", "32"]),
    "fat of 4096": (64, ["mkfs.vfat", "-S", "4096", "-n", "BIG"]),
    "xfs": (320, ["mkfs.xfs", "-q", "-L", "ex"]),
    "swap": (1, ["mkswap", "-L", "out"]),
}


def blkid(path: Path) -> dict[str, str]:
    need("blkid")
    command = [str(tool("blkid")), "-p", "-o", "export", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


@pytest.mark.parametrize("name", MAKERS)
async def test_what_mkfs_made_is_seen_as_blkid_sees_it(name: str, tmp_path: Path) -> None:
    size, command = MAKERS[name]
    need(command[0])
    path = tmp_path / "volume"
    with open(path, "wb") as file:
        file.truncate(size * MIB)
    subprocess.run([str(tool(command[0])), *command[1:], str(path)], check=True, capture_output=True)
    await compare(path)


async def compare(path: Path) -> None:
    found, truth = await volume_of(path.read_bytes()), blkid(path)
    assert found is not None
    assert found.type == truth["TYPE"]
    assert found.label == truth.get("LABEL", "").replace("\\ ", " ")
    if "UUID" in truth:
        assert found.uuid == truth["UUID"]
    if found.type == "vfat":
        assert found.version == truth["VERSION"]


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("mksquashfs", lambda tree, path: ["mksquashfs", tree, path, "-quiet", "-no-progress"]),
        ("genisoimage", lambda tree, path: ["genisoimage", "-quiet", "-V", "DISC 1", "-o", path, tree]),
        ("mkfs.erofs", lambda tree, path: ["mkfs.erofs", "--quiet", path, tree]),
    ],
)
async def test_images_of_trees(program: str, command: Callable[[Path, Path], list[object]], tmp_path: Path) -> None:
    need(program)
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_text("text")
    path = tmp_path / "image"
    words = [str(word) for word in command(tree, path)]
    subprocess.run([str(tool(words[0])), *words[1:]], check=True, capture_output=True)
    await compare(path)


async def test_what_is_made_by_hand_because_its_program_is_rare() -> None:
    image = bytearray(MIB)
    image[3:11] = b"NTFS    "
    image[0x48:0x50] = bytes.fromhex("f0debc9a78563412")
    assert await volume_of(image) == Volume("ntfs", uuid="123456789ABCDEF0")
    image[3:11] = b"EXFAT   "
    image[100:104] = bytes.fromhex("78563412")
    assert await volume_of(image) == Volume("exfat", uuid="1234-5678")
    image = bytearray(MIB)
    image[65536 + 64 : 65536 + 72] = b"_BHRfS_M"
    image[65536 + 32 : 65536 + 48] = bytes(range(16))
    image[65536 + 0x12B : 65536 + 0x12B + 4] = b"tree"
    assert await volume_of(image) == Volume("btrfs", "tree", "00010203-0405-0607-0809-0a0b0c0d0e0f")


@pytest.mark.parametrize("size", [0, 1, 512, 4096, MIB])
async def test_nothing_is_nothing(size: int) -> None:
    assert await volume_of(bytes(size)) is None


@settings(max_examples=300)
@given(st.integers(0, 1 << 32), st.sampled_from([512, 5000, 70_000, 200_000]))
def test_garbage_does_no_harm(seed: int, size: int) -> None:
    import trio

    rng = random.Random(seed)
    image = bytearray(rng.randbytes(size))
    for at, magic in ((510, b"\x55\xaa"), (0, b"\xeb\x3c\x90"), (1080, b"\x53\xef"), (32769, b"CD001")):
        if rng.random() < 0.5:
            image[at : at + len(magic)] = magic
    if rng.random() < 0.7:  # a FAT whose numbers nearly fit
        image[11:13] = (512).to_bytes(2, "little")
        image[13] = rng.choice([1, 2, 128])
        image[16], image[21] = 2, 0xF8
        if rng.random() < 0.5:
            image[22:24] = b"\0\0"
            image[1080:1082] = b"\0\0"
    trio.run(volume_of, bytes(image[:size]))
