"""Partition tables: as sfdisk makes and reads them, and as nobody should make them."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import uuid
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.t1_block.lab import MIB, need, tool
from udf.block.partitions import MAX_LOGICAL, Table, read_table

SIZE = 64 * MIB


async def table_of(image: bytes | bytearray, block_size: int = 512) -> Table:
    """What is in an image; every read must be inside of it."""

    async def read(offset: int, size: int) -> bytes:
        assert 0 <= offset < offset + size <= len(image)
        return bytes(image[offset : offset + size])

    table = await read_table(read, len(image), block_size)
    for each in (*table.partitions, *table.extended):
        assert 0 < each.offset < each.end <= len(image)
    return table


def sfdisk(path: Path, script: str) -> bytearray:
    need("sfdisk")
    with open(path, "wb") as file:
        file.truncate(SIZE)
    subprocess.run([str(tool("sfdisk")), "-q", str(path)], input=script, text=True, check=True)
    return bytearray(path.read_bytes())


def listed(path: Path) -> list[tuple[int, int, int, str]]:
    """What sfdisk reads: number, offset, size, type."""
    done = subprocess.run([str(tool("sfdisk")), "--json", str(path)], capture_output=True, text=True, check=True)
    table = json.loads(done.stdout)["partitiontable"]
    block = table.get("sectorsize", 512)
    found = []
    for each in table.get("partitions", []):
        number = int(each["node"].removeprefix(str(path)).removeprefix("p"))
        kind = each["type"] if table["label"] == "gpt" else f"0x{int(each['type'], 16):02x}"
        found.append((number, each["start"] * block, each["size"] * block, kind))
    return found


def ours(table: Table) -> list[tuple[int, int, int, str]]:
    return [(p.number, p.offset, p.size, p.type) for p in sorted((*table.partitions, *table.extended), key=_number)]


def _number(partition: object) -> int:
    return partition.number  # type: ignore[attr-defined, no-any-return]


SCRIPTS = {
    "one": "label: dos\n,,c\n",
    "four": "label: dos\n,4M,c\n,5M,83,*\n,6M,7\n,,82\n",
    "logical": "label: dos\n,4M,c\n,,f\n,8M,83\n,9M,82\n,10M,c\n,,83\n",
    "logical first": "label: dos\n,20M,5\n,,83\n,3M\n,4M\n",
    "gpt": 'label: gpt\nsize=4M,type=U,name="EFI system"\nsize=8M,type=L,name="Größe"\ntype=S\n',
    "gpt with gaps": "label: gpt\n3: size=4M\n7: size=5M\n",
    "gpt of many": "label: gpt\n" + "size=512K\n" * 60,
    "empty gpt": "label: gpt\n",
}


@pytest.mark.parametrize("name", SCRIPTS)
async def test_what_sfdisk_made_is_read_as_sfdisk_reads_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    image = sfdisk(path, SCRIPTS[name])
    table = await table_of(image)
    assert table.problems == ()
    assert ours(table) == listed(path)
    assert table.kind == ("gpt" if "gpt" in name else "mbr")
    if name == "gpt":
        assert [p.name for p in table.partitions] == ["EFI system", "Größe", ""]
    if name == "four":
        assert [p.active for p in table.partitions] == [False, True, False, False]


def gpt(block: int, *ranges: tuple[int, int], size: int = SIZE) -> bytearray:
    """A disk with a GPT for blocks of any size (this sfdisk makes them for 512 only); ranges are first and last."""
    kind, disk = uuid.UUID("0FC63DAF-8483-4772-8E79-3D69D8477DE4"), uuid.UUID(int=1)
    image, last = bytearray(size), size // block - 1
    entries = b"".join(
        struct.pack("<16s16sQQQ72s", kind.bytes_le, uuid.UUID(int=100 + i).bytes_le, *each, 0, b"")
        for i, each in enumerate(ranges)
    ).ljust(128 * 128, b"\0")
    table = 128 * 128 // block
    for here, other, at in ((1, last, 2), (last, 1, last - table)):
        image[at * block : at * block + len(entries)] = entries
        struct.pack_into(
            "<8sIIIIQQQQ16sQIII", image, here * block, b"EFI PART", 0x10000, 92, 0, 0, here, other, 2 + table,
            last - table - 1, disk.bytes_le, at, 128, 128, zlib.crc32(entries),
        )  # fmt: skip
        struct.pack_into("<I", image, here * block + 16, zlib.crc32(image[here * block : here * block + 92]))
    put_entries(image, 0, (0xEE, 1, last))
    return image


async def test_a_gpt_counts_in_the_blocks_of_its_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    image = gpt(512, (2048, 4095), (4096, 9999))
    path.write_bytes(image)
    need("sfdisk")
    assert ours(await table_of(image)) == listed(path)
    image = gpt(4096, (256, 511), (512, 9999))
    table = await table_of(image, 4096)
    assert [(p.offset, p.size) for p in table.partitions] == [(MIB, MIB), (2 * MIB, 4096 * 9488)]
    assert table.problems == ()
    assert (await table_of(image, 512)).partitions == table.partitions
    assert (await table_of(image, 512)).problems == ("the GPT counts blocks of 4096 bytes, the disk has 512",)


async def test_an_mbr_counts_in_the_blocks_of_its_disk() -> None:
    image = mbr((0x05, 2, 200))
    put_entries(image, 16, (0x83, 1, 10))
    table = await table_of(image, 4096)
    assert ours(table) == [(1, 8192, 200 * 4096, "0x05"), (5, 3 * 4096, 40960, "0x83")]


@pytest.mark.parametrize("damage", ["header", "entries", "size"])
async def test_the_copy_is_used_when_the_first_gpt_is_damaged(damage: str, tmp_path: Path) -> None:
    image = sfdisk(tmp_path / "disk", SCRIPTS["gpt"])
    whole = ours(await table_of(image))
    image[{"header": 512 + 60, "entries": 1024 + 56, "size": 512 + 12}[damage]] ^= 1
    table = await table_of(image)
    assert ours(table) == whole
    assert table.problems == ("the GPT at the beginning of the disk is damaged; its copy at the end is used",)
    image[-512 + 60] ^= 1
    table = await table_of(image)
    assert ours(table) == []
    assert table.problems == ("the disk says that it has a GPT, but neither of its headers is valid",)


async def test_a_damaged_copy_is_told(tmp_path: Path) -> None:
    image = sfdisk(tmp_path / "disk", SCRIPTS["gpt"])
    whole = ours(await table_of(image))
    image[-512 + 60] ^= 1
    table = await table_of(image)
    assert ours(table) == whole
    assert table.problems == ("the copy of the GPT at the end of the disk is damaged or missing",)


async def test_a_disk_that_has_grown_keeps_its_gpt(tmp_path: Path) -> None:
    image = sfdisk(tmp_path / "disk", SCRIPTS["gpt"])
    whole = ours(await table_of(image))
    table = await table_of(image + bytes(MIB))
    assert ours(table) == whole
    assert table.problems == ("the copy of the GPT is not at the end of the disk",)


async def test_a_hybrid_mbr_counts_as_gpt(tmp_path: Path) -> None:
    image = sfdisk(tmp_path / "disk", SCRIPTS["gpt"])
    image[446 + 16 : 446 + 32] = struct.pack("<B3xB3xII", 0x80, 0x0C, 2048, 8192)
    table = await table_of(image)
    assert table.kind == "gpt"
    assert len(table.partitions) == 3


def mbr(*entries: tuple[int, int, int], size: int = MIB) -> bytearray:
    image = bytearray(size)
    put_entries(image, 0, *entries)
    return image


def put_entries(image: bytearray, block: int, *entries: tuple[int, int, int]) -> None:
    for i, (kind, first, count) in enumerate(entries):
        struct.pack_into("<B3xB3xII", image, block * 512 + 446 + 16 * i, 0, kind, first, count)
    image[block * 512 + 510 : block * 512 + 512] = b"\x55\xaa"


async def test_nothing_is_believed_that_is_outside_of_the_disk() -> None:
    table = await table_of(mbr((0x83, 1, 0xFFFFFFFF), (0x83, 2048, 1), (0x83, 0xFFFFFFFF, 0xFFFFFFFF), (0x83, 0, 9)))
    assert ours(table) == [(1, 512, MIB - 512, "0x83")]
    assert table.problems == (
        "partition 1 reaches behind the end of the disk",
        "partition 2 lies outside of the disk",
        "partition 3 lies outside of the disk",
        "partition 4 lies outside of the disk",
    )


async def test_overlaps_are_told() -> None:
    table = await table_of(mbr((0x83, 10, 100), (0x83, 50, 10), (0x83, 70, 100), (0x83, 170, 10)))
    assert len(table.partitions) == 4
    assert table.problems == ("partitions 1 and 2 overlap", "partitions 1 and 3 overlap")


async def test_chains_that_loop_or_leave_end() -> None:
    image = mbr((0x05, 100, 1000))
    put_entries(image, 100, (0x83, 1, 10), (0x05, 50, 100))
    put_entries(image, 150, (0x83, 1, 10), (0x05, 50, 100))
    table = await table_of(image)
    assert [p.number for p in table.partitions] == [5, 6]
    assert table.problems == ("the chain of logical partitions is a loop",)
    put_entries(image, 150, (0x83, 1, 10), (0x05, 5000, 100))
    assert (await table_of(image)).problems == ("the chain of logical partitions leaves the extended partition",)
    put_entries(image, 150, (0x83, 1, 10), (0x05, 60, 100))
    assert (await table_of(image)).problems == ("the chain of logical partitions is broken",)


async def test_long_chains_are_cut() -> None:
    image = mbr((0x05, 100, 1900))
    for i in range(400):
        put_entries(image, 100 + 2 * i, (0x83, 1, 1), (0x05, 2 * i + 2, 2))
    table = await table_of(image)
    assert len(table.partitions) == MAX_LOGICAL
    assert table.problems == (f"there are more than {MAX_LOGICAL} logical partitions",)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1024])
async def test_tiny_disks_have_no_table(size: int) -> None:
    assert (await table_of(bytes(size))).kind == ""
    image = mbr((0xEE, 1, 100))[:size].ljust(size, b"\0")
    assert (await table_of(image)).kind == ""


def signed(image: bytearray, block: int) -> None:
    """Make a GPT header's checksums right, whatever else it says."""
    header = 512 * block
    size, table, count, entry = struct.unpack_from("<I56xQII", image, header + 12)
    if table * 512 + count * entry <= len(image) and count * entry < MIB:
        struct.pack_into("<I", image, header + 88, zlib.crc32(image[table * 512 : table * 512 + count * entry]))
    struct.pack_into("<I", image, header + 16, 0)
    struct.pack_into("<I", image, header + 16, zlib.crc32(image[header : header + min(size, 512)]))


@settings(max_examples=300)
@given(st.integers(0, 1 << 32))
def test_hostile_tables_with_right_checksums_do_no_harm(seed: int) -> None:
    import trio

    rng = random.Random(seed)
    image = mbr((0xEE, 1, 2047), size=128 * 1024)
    numbers = [0, 1, 2, 34, 127, 128, 255, 256, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1]
    struct.pack_into(
        "<8sIIIIQQQQ16sQIII", image, 512, b"EFI PART", 0x10000, rng.choice([92, 92, 92, 512, 0, 513]), 0, 0,
        rng.choice([1, 1, 1, 2]), rng.choice(numbers), rng.choice(numbers), rng.choice(numbers), rng.randbytes(16),
        rng.choice([2, 2, 2, *numbers]), rng.choice([1, 4, 128, 1 << 31]), rng.choice([128, 128, 256, 0, 7, 1 << 31]),
        0,
    )  # fmt: skip
    for i in range(8):
        struct.pack_into(
            "<16s16sQQQ72s", image, 1024 + 128 * i, rng.randbytes(16), rng.randbytes(16), rng.choice(numbers),
            rng.choice(numbers), rng.getrandbits(64), rng.randbytes(72),
        )  # fmt: skip
    signed(image, 1)
    trio.run(table_of, image)


@settings(max_examples=300)
@given(st.binary(min_size=0, max_size=2048), st.integers(0, 1 << 32))
def test_garbage_with_a_signature_does_no_harm(garbage: bytes, seed: int) -> None:
    import trio

    image = bytearray(64 * 1024)
    rng = random.Random(seed)
    for block in range(0, 128, 3):
        image[block * 512 : block * 512 + 512] = rng.randbytes(512)
        put_entries(image, block, *[(rng.choice([5, 15, 0x83]), rng.randrange(140), rng.randrange(140))] * 2)
        image[block * 512 + 478 : block * 512 + 510] = bytes(32)
    image[: min(446, len(garbage))] = garbage[:446]
    trio.run(table_of, image)
    trio.run(table_of, image, 4096)
