"""The boot sector: what mkfs.fat makes is understood, and what makes no sense is refused in one sentence."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udf import UserError

from .formats import boot

KINDS = [
    *((12, 512, per, fats, 2048) for per in (1, 2, 8) for fats in (1, 2)),
    *((16, 512, per, 2, 4085 * per + 600 * per) for per in (1, 4, 128)),
    *((32, 512, per, fats, 66000 * per + 2000) for per, fats in ((1, 2), (8, 1), (128, 2))),
    (12, 4096, 1, 2, 800),
    (32, 4096, 8, 2, 70000 * 8),
    (16, 1024, 64, 3, 5000 * 64),
]


def made(path: Path, kind: int, sector: int, per: int, fats: int, sectors: int, *more: str) -> bytes:
    """The first 64 KiB of a volume that mkfs.fat made."""
    path.touch()
    with path.open("r+b") as file:
        file.truncate(sectors * sector)
    command = ["mkfs.fat", "-F", str(kind), "-S", str(sector), "-s", str(per), "-f", str(fats), *more, str(path)]
    subprocess.run(command, check=True, capture_output=True, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"})
    with path.open("rb") as file:
        return file.read(65536)


@pytest.mark.parametrize(("kind", "sector", "per", "fats", "sectors"), KINDS)
def test_what_mkfs_makes_is_understood(
    tmp_path: Path, kind: int, sector: int, per: int, fats: int, sectors: int
) -> None:
    head = made(tmp_path / "image", kind, sector, per, fats, sectors, "-n", "STICK", "-i", "cafe1234")
    size = sectors * sector
    geometry = boot.parse(head, size)
    assert (geometry.kind, geometry.sector, geometry.cluster, geometry.fats) == (kind, sector, per * sector, fats)
    assert geometry.volume_id == 0xCAFE1234
    assert geometry.label_bytes == b"STICK      "
    assert not geometry.is_dirty
    assert not geometry.is_cut
    assert geometry.mirrored
    assert geometry.size <= size
    with (tmp_path / "image").open("rb") as file:  # each table begins with the medium
        for copy in geometry.fat_copies():
            file.seek(copy)
            assert file.read(2) == bytes((geometry.media, 0xFF))
    if kind == 32:
        info = boot.parse_fsinfo(head[geometry.fsinfo_offset : geometry.fsinfo_offset + 512], geometry)
        assert info == boot.FsInfo(free=geometry.clusters - 1, next=2)
        assert head[geometry.backup_offset : geometry.backup_offset + 512] == head[:512]
        assert geometry.data_offset == geometry.fat_offset + fats * geometry.fat_bytes
    else:
        assert geometry.fsinfo_offset == geometry.backup_offset == geometry.root_cluster == 0
        assert geometry.data_offset >= geometry.root_offset + geometry.root_entries * 32


def parse(sector: bytearray, size: int) -> Any:
    return boot.parse(bytes(sector), size)


def sample(kind: int) -> tuple[bytearray, int]:
    """A small sound boot sector, by hand."""
    sector = bytearray(512)
    sector[0:3] = b"\xeb\x3c\x90"
    sector[510:512] = b"\x55\xaa"
    total = {12: 2880, 16: 40000, 32: 140000}[kind]
    length = {12: 9, 16: 160, 32: 1100}[kind]
    entries = 0 if kind == 32 else 224
    wide = kind == 32
    struct.pack_into(
        "<HBHBHHBHHHII",
        sector,
        11,
        *(512, 1, 32 if wide else 1, 2, entries, 0, 0xF8, 0 if wide else length, 32, 64, 0, total),
    )
    if wide:
        struct.pack_into("<IHHIHH", sector, 36, length, 0, 0, 2, 1, 6)
    sector[66 if wide else 38] = 0x29
    return sector, total * 512


@pytest.mark.parametrize("kind", [12, 16, 32])
def test_a_sound_sector_is_taken_and_each_senseless_field_refused(kind: int) -> None:
    sector, size = sample(kind)
    assert parse(sector, size).kind == kind
    wrong: list[tuple[int, str, Any]] = [
        *((11, "<H", value) for value in (0, 256, 513, 8192)),
        *((13, "<B", value) for value in (0, 3, 0xC0)),
        (14, "<H", 0),
        *((16, "<B", value) for value in (0, 5, 255)),
        (21, "<B", 0x12),
        (32, "<I", 0),
        (32, "<I", 30),
        (36, "<I", 0xFFFFFFFF) if kind == 32 else (22, "<H", 0xFFFF),
    ]
    if kind == 32:
        wrong += [(36, "<I", 0), (42, "<H", 1), (44, "<I", 0), (44, "<I", 1), (44, "<I", 0xFFFFFFF), (40, "<H", 0x82)]
    else:
        wrong += [(17, "<H", 0)]
    if kind == 16:
        wrong += [(32, "<I", 0x00FFFFFF)]
    for offset, form, value in wrong:
        broken = bytearray(sector)
        struct.pack_into(form, broken, offset, value)
        with pytest.raises(UserError) as refused:
            parse(broken, size * 100)
        assert "\n" not in str(refused.value)


def test_other_filesystems_are_called_by_their_names() -> None:
    for mark, name in ((b"EXFAT   ", "exFAT"), (b"NTFS    ", "NTFS"), (b"-FVE-FS-", "BitLocker")):
        sector = bytearray(512)
        sector[3:11] = mark
        sector[510:] = b"\x55\xaa"
        with pytest.raises(UserError, match=name):
            parse(sector, 1 << 20)
    with pytest.raises(UserError, match="empty"):
        boot.parse(bytes(512), 1 << 20)
    with pytest.raises(UserError, match="not a boot sector"):
        boot.parse(b"tar archive " * 50, 1 << 20)
    with pytest.raises(UserError):
        boot.parse(b"", 0)


def test_a_volume_that_is_larger_than_its_device_is_cut() -> None:
    sector, size = sample(16)
    assert not parse(sector, size).is_cut
    assert parse(sector, size - 4096).is_cut
    with pytest.raises(UserError, match="cut off"):
        parse(sector, 100 * 512)


def test_a_table_that_is_too_short_bounds_the_clusters() -> None:
    sector, size = sample(16)
    struct.pack_into("<H", sector, 22, 100)
    geometry = parse(sector, size)
    assert geometry.kind == 16
    assert geometry.clusters == 100 * 256 - 2


def test_without_mirroring_only_the_active_table_is_written() -> None:
    sector, size = sample(32)
    struct.pack_into("<H", sector, 40, 0x81)
    geometry = parse(sector, size)
    assert not geometry.mirrored
    assert geometry.fat_copies() == [32 * 512 + 1100 * 512]
    struct.pack_into("<H", sector, 40, 0x01)  # mirrored: the number does not count
    assert parse(sector, size).fat_copies() == [32 * 512 + 1100 * 512, 32 * 512]


def test_hints_that_cannot_be_true_are_none() -> None:
    sector, size = sample(32)
    geometry = parse(sector, size)

    def info(free: int, first: int) -> bytes:
        return b"RRaA" + bytes(480) + b"rrAa" + struct.pack("<II", free, first) + bytes(12) + b"\0\0\x55\xaa"

    assert boot.parse_fsinfo(info(5, 7), geometry) == boot.FsInfo(5, 7)
    assert boot.parse_fsinfo(info(0xFFFFFFFF, 0xFFFFFFFF), geometry) == boot.FsInfo(None, None)
    assert boot.parse_fsinfo(info(geometry.clusters + 1, 1), geometry) == boot.FsInfo(None, None)
    assert boot.parse_fsinfo(b"x" + info(5, 7)[1:], geometry) is None
    assert boot.parse_fsinfo(b"", geometry) is None
    patched = bytearray(info(5, 7))
    patched[boot.COUNTS_OFFSET : boot.COUNTS_OFFSET + 8] = boot.pack_counts(None, 9)
    assert boot.parse_fsinfo(bytes(patched), geometry) == boot.FsInfo(None, 9)


def test_dirty_bits_leave_the_others_alone() -> None:
    assert boot.with_dirty(0x02, True) == 0x03
    assert boot.with_dirty(0xFF, False) == 0xFE
    for kind, second in ((16, 0xFFFF), (32, 0x0FFFFFFF)):
        assert boot.says_clean(kind, second)
        assert boot.says_unhurt(kind, second)
        dirty = boot.with_clean(kind, second, False)
        assert not boot.says_clean(kind, dirty)
        assert boot.says_unhurt(kind, dirty)
        assert boot.with_clean(kind, dirty, True) == second
    assert boot.with_clean(12, 0xFFF, False) == 0xFFF
    assert boot.says_clean(12, 0)


@given(
    kind=st.sampled_from([12, 16, 32]),
    changes=st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), max_size=6),
    size=st.integers(0, 1 << 33),
)
def test_whatever_is_taken_lies_within_volume_and_device(kind: int, changes: list[tuple[int, int]], size: int) -> None:
    sector, sound = sample(kind)
    for offset, value in changes:
        sector[offset] = value
    size = size if size & 1 else sound
    try:
        geometry = parse(sector, size)
    except UserError:
        return
    assert geometry.clusters >= 1
    assert geometry.data_offset + geometry.cluster <= min(geometry.size, size)
    assert geometry.is_cut or geometry.cluster_offset(geometry.last_cluster) + geometry.cluster <= size
    assert (geometry.clusters + 2) * geometry.kind <= geometry.fat_bytes * 8
    tables = [geometry.fat_offset + n * geometry.fat_bytes for n in range(geometry.fats)]
    assert set(geometry.fat_copies()) <= set(tables)
    assert 512 <= tables[0] <= tables[-1] + geometry.fat_bytes <= geometry.data_offset
    if geometry.wide:
        assert geometry.has_cluster(geometry.root_cluster)
        assert 0 <= geometry.fsinfo_offset < geometry.fat_offset
        assert 0 <= geometry.backup_offset < geometry.fat_offset
    else:
        assert tables[-1] + geometry.fat_bytes == geometry.root_offset
        assert geometry.root_offset + geometry.root_entries * 32 <= geometry.data_offset
