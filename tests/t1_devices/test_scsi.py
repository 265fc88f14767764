"""The SCSI side of a stick: every reply against the field layout of SPC-4 and SBC-3, every refusal with its sense."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.t1_devices.bot import (
    FLUSH,
    INQUIRY,
    READY,
    cbw,
    command,
    good,
    read_10,
    refused,
    sense,
    take_csw,
    write_10,
)
from tests.t1_devices.raw import Raw, connected
from udf.errors import UserError
from udf.testing.devices import Emulator, Plugged, make
from udf.testing.devices.storage import Storage

ILLEGAL, BLOCKS = 5, 2048


@contextlib.contextmanager
def plugged(**options: Any) -> Iterator[tuple[Raw, Plugged, Storage]]:
    if "file" not in options:
        options.setdefault("size", 1 << 20)
    device = Storage(serial="S1", **options)
    with Emulator() as bus, connected(bus, plug := bus.plug(device)) as raw:
        for lun in range(len(device.units)):
            assert sense(raw, lun) == (6, 0x29, 0)
        yield raw, plug, device


@pytest.fixture
def stick() -> Iterator[Raw]:
    with plugged() as (raw, _, _):
        yield raw


def vpd(page: int, allocation: int = 252) -> bytes:
    return struct.pack(">BBBHB", 0x12, 1, page, allocation, 0)


def test_power_on_is_told_once_by_each_unit() -> None:
    with Emulator() as bus, connected(bus, bus.plug(Storage(size=1 << 20, luns=["", ""]))) as raw:
        for lun in range(3):
            good(raw, INQUIRY, 36, lun=lun)  # does not take it away
            assert refused(raw, READY, lun=lun) == (6, 0x29, 0)
        good(raw, READY)
        assert refused(raw, READY, lun=1) == (2, 0x3A, 0)


def test_inquiry(stick: Raw) -> None:
    data = good(stick, INQUIRY, 36)
    assert data[:8] == bytes((0, 0x80, 6, 2, 31, 0, 0, 0))
    assert data[8:] == b"UDF     " + b"Stick           " + b"1.00"
    assert len(good(stick, bytes((0x12, 0, 0, 0, 5, 0)), 5)) == 5
    assert refused(stick, bytes((0x12, 0, 0x80, 0, 36, 0)), 36) == (ILLEGAL, 0x24, 0)
    assert refused(stick, bytes((0x12, 2, 0, 0, 36, 0)), 36) == (ILLEGAL, 0x24, 0)


def test_vital_product_data(stick: Raw) -> None:
    supported = good(stick, vpd(0), 252)
    assert supported == bytes((0, 0, 0, 6)) + bytes((0x00, 0x80, 0x83, 0xB0, 0xB1, 0xB2))
    for page in supported[4:]:
        data = good(stick, vpd(page), 252)
        assert data[1] == page
        assert int.from_bytes(data[2:4], "big") == len(data) - 4
    assert good(stick, vpd(0x80), 252)[4:] == b"S1"
    identification = good(stick, vpd(0x83), 252)[4:]
    length = identification[3]
    assert identification[:2] == bytes((2, 1))
    assert identification[4 : 4 + length] == b"UDF     S1-0"
    naa = identification[4 + length :]
    assert (naa[:4], naa[4] >> 4, len(naa)) == (bytes((1, 3, 0, 8)), 3, 12)
    assert refused(stick, vpd(0xC0), 252) == (ILLEGAL, 0x24, 0)


def test_block_limits_and_provisioning() -> None:
    with plugged(max_transfer=65536) as (raw, _, _):
        limits = good(raw, vpd(0xB0), 64)
        assert len(limits) == 64
        assert struct.unpack_from(">I", limits, 8) == (128,)
        assert struct.unpack_from(">III", limits, 20) == (1 << 22, 64, 1)
        assert struct.unpack_from(">Q", limits, 36) == (1 << 16,)
        assert good(raw, vpd(0xB1), 64)[4:6] == b"\0\x01"
        assert good(raw, vpd(0xB2), 64)[5] == 0xE4
        good(raw, read_10(0, 128), 65536)
        assert refused(raw, read_10(0, 129), 66048) == (ILLEGAL, 0x24, 0)
    with plugged(trim=False) as (raw, _, _):
        assert refused(raw, vpd(0xB2), 64) == (ILLEGAL, 0x24, 0)
        assert refused(raw, bytes((0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0)), data=bytes(24)) == (ILLEGAL, 0x20, 0)


@pytest.mark.parametrize("block_size", [512, 1024, 2048, 4096])
def test_capacity_and_blocks_of_every_size(block_size: int) -> None:
    with plugged(block_size=block_size) as (raw, _, _):
        blocks = (1 << 20) // block_size
        assert struct.unpack(">II", good(raw, bytes((0x25, *bytes(9))), 8)) == (blocks - 1, block_size)
        long = good(raw, bytes((0x9E, 0x10, *bytes(11), 32, 0, 0)), 32)
        assert struct.unpack_from(">QI", long) == (blocks - 1, block_size)
        assert long[14] & 0x80
        good(raw, write_10(blocks - 1, 1), data=b"x" * block_size)
        assert good(raw, read_10(blocks - 1, 1), block_size) == b"x" * block_size
        assert refused(raw, read_10(blocks, 1), block_size) == (ILLEGAL, 0x21, 0)
        assert refused(raw, read_10(blocks - 1, 2), 2 * block_size) == (ILLEGAL, 0x21, 0)


def test_more_than_two_tebibytes(tmp_path: Path) -> None:
    image = tmp_path / "big.img"
    image.touch()
    os.truncate(image, 3 << 40)
    with plugged(file=str(image)) as (raw, _, _):
        assert struct.unpack(">II", good(raw, bytes((0x25, *bytes(9))), 8)) == (0xFFFFFFFF, 512)
        last = (3 << 40) // 512 - 1
        assert struct.unpack_from(">Q", good(raw, bytes((0x9E, 0x10, *bytes(11), 32, 0, 0)), 32)) == (last,)
        write = struct.pack(">BBQIBB", 0x8A, 0, last, 1, 0, 0)
        good(raw, write, data=b"e" * 512)
        assert good(raw, struct.pack(">BBQIBB", 0x88, 0, last, 1, 0, 0), 512) == b"e" * 512
        for lba in (last + 1, (1 << 64) - 1):
            assert refused(raw, struct.pack(">BBQIBB", 0x88, 0, lba, 1, 0, 0), 512) == (ILLEGAL, 0x21, 0)


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (bytes((0x0A, 0, 0, 5, 1, 0)), bytes((0x08, 0, 0, 5, 1, 0))),
        (write_10(5, 1), read_10(5, 1)),
        (struct.pack(">BBIIBB", 0xAA, 0, 5, 1, 0, 0), struct.pack(">BBIIBB", 0xA8, 0, 5, 1, 0, 0)),
        (struct.pack(">BBQIBB", 0x8A, 0, 5, 1, 0, 0), struct.pack(">BBQIBB", 0x88, 0, 5, 1, 0, 0)),
        (struct.pack(">BBIBHB", 0x2E, 0, 5, 0, 1, 0), read_10(5, 1)),
    ],
    ids=["6", "10", "12", "16", "and verify"],
)
def test_reads_and_writes_of_all_lengths(stick: Raw, write: bytes, read: bytes) -> None:
    good(stick, write, data=b"y" * 512)
    assert good(stick, read, 512) == b"y" * 512
    assert good(stick, read_10(4, 3), 1536) == bytes(512) + b"y" * 512 + bytes(512)


def test_read_6_of_no_blocks_means_256_and_read_10_means_none(stick: Raw) -> None:
    assert len(good(stick, bytes((0x08, 0, 0, 0, 0, 0)), 256 * 512)) == 256 * 512
    good(stick, read_10(0, 0))


def test_format_capacities(stick: Raw) -> None:
    data = good(stick, bytes((0x23, 0, 0, 0, 0, 0, 0, 0, 252, 0)), 252)
    assert data == struct.pack(">3xBII", 8, BLOCKS, 2 << 24 | 512)


def test_mode_pages(stick: Raw) -> None:
    six = good(stick, bytes((0x1A, 0, 0x3F, 0, 192, 0)), 192)
    assert six[0] == len(six) - 1
    assert six[1:4] == bytes((0, 0x10, 8))
    assert struct.unpack_from(">II", six, 4) == (BLOCKS, 512)
    pages = six[12:]
    seen = []
    while pages:
        seen.append(pages[0])
        pages = pages[2 + pages[1] :]
    assert seen == [0x01, 0x08, 0x1C]
    ten = good(stick, bytes((0x5A, 8, 8, 0, 0, 0, 0, 0, 64, 0)), 64)
    assert int.from_bytes(ten[:2], "big") == len(ten) - 2
    assert ten[8:10] == bytes((8, 18))
    assert not ten[10] & 4  # no cache, so nothing to flush
    assert good(stick, bytes((0x1A, 0, 0x3F, 0, 4, 0)), 4) == six[:4]
    assert refused(stick, bytes((0x1A, 0, 0x2A, 0, 64, 0)), 64) == (ILLEGAL, 0x24, 0)
    assert refused(stick, bytes((0x1A, 0, 0xFF, 0, 64, 0)), 64) == (ILLEGAL, 0x39, 0)


def cache_enabled(raw: Raw) -> bool:
    return bool(good(raw, bytes((0x1A, 8, 8, 0, 64, 0)), 64)[6] & 4)


def test_write_cache_is_switched_by_mode_select() -> None:
    off, on = (bytes((0, 0, 0, 0, 8, 18, bits, *bytes(17))) for bits in (0, 4))
    with plugged(cache=1 << 20) as (raw, _, _):
        assert cache_enabled(raw)
        good(raw, bytes((0x15, 0x10, 0, 0, 24, 0)), data=off)
        assert not cache_enabled(raw)
        good(raw, bytes((0x55, 0x10, 0, 0, 0, 0, 0, 0, 28, 0)), data=bytes(4) + on)
        assert cache_enabled(raw)
        assert refused(raw, bytes((0x15, 0x10, 0, 0, 20, 0)), data=on[:20]) == (ILLEGAL, 0x1A, 0)
        assert refused(raw, bytes((0x15, 0x11, 0, 0, 24, 0)), data=on) == (ILLEGAL, 0x24, 0)
        assert refused(raw, bytes((0x15, 0x10, 0, 0, 6, 0)), data=bytes((0, 0, 0, 0, 0x2A, 0))) == (ILLEGAL, 0x26, 0)
    with plugged() as (raw, _, _):
        assert refused(raw, bytes((0x15, 0x10, 0, 0, 24, 0)), data=on) == (ILLEGAL, 0x26, 0)


def test_sense_is_given_once_in_either_format(stick: Raw) -> None:
    assert command(stick, bytes((0xC7, *bytes(9))))[2] == 1
    data = good(stick, bytes((3, 1, 0, 0, 252, 0)), 252)
    assert data == bytes((0x72, ILLEGAL, 0x20, 0, 0, 0, 0, 0))
    assert sense(stick) == (0, 0, 0)


def test_write_protection() -> None:
    with plugged(read_only=True) as (raw, _, _):
        assert good(raw, bytes((0x1A, 0, 0x3F, 0, 192, 0)), 192)[2] & 0x80
        for cdb, data in [
            (write_10(0, 1), bytes(512)),
            (bytes((0x41, 0, 0, 0, 0, 0, 0, 0, 1, 0)), bytes(512)),
            (bytes((0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0)), bytes(24)),
        ]:
            assert refused(raw, cdb, data=data) == (7, 0x27, 0)
        good(raw, read_10(0, 1), 512)


def test_medium_is_ejected_loaded_and_held(stick: Raw) -> None:
    good(stick, bytes((0x1E, 0, 0, 0, 1, 0)))
    assert refused(stick, bytes((0x1B, 0, 0, 0, 2, 0))) == (ILLEGAL, 0x53, 2)
    good(stick, bytes((0x1E, 0, 0, 0, 0, 0)))
    good(stick, bytes((0x1B, 0, 0, 0, 2, 0)))
    for cdb, length in [(READY, 0), (read_10(0, 1), 512), (bytes((0x25, *bytes(9))), 8)]:
        assert refused(stick, cdb, length) == (2, 0x3A, 0)
    assert sense(stick) == (2, 0x3A, 0)
    assert good(stick, bytes((0x23, 0, 0, 0, 0, 0, 0, 0, 12, 0)), 12)[8] == 3
    good(stick, bytes((0x1B, 0, 0, 0, 3, 0)))
    assert refused(stick, READY) == (6, 0x28, 0)
    good(stick, READY)


def test_stopped_unit_is_not_ready_until_it_is_started(stick: Raw) -> None:
    good(stick, bytes((0x1B, 0, 0, 0, 0, 0)))
    assert refused(stick, read_10(0, 1), 512) == (2, 4, 2)
    good(stick, bytes((0x1B, 0, 0, 0, 1, 0)))
    good(stick, read_10(0, 1), 512)


def test_somebody_changes_the_medium(tmp_path: Path) -> None:
    image = tmp_path / "b.img"
    image.write_bytes(b"B" * 4096)
    with plugged() as (raw, _, device):
        device.change_medium(None)
        assert refused(raw, READY) == (2, 0x3A, 0)
        device.change_medium(str(image))
        assert refused(raw, READY) == (6, 0x28, 0)
        assert good(raw, read_10(7, 1), 512) == b"B" * 512
        device.change_medium(str(image))  # the same again: its lock is no obstacle
        assert sense(raw) == (6, 0x28, 0)
        with pytest.raises(UserError, match="No such file"):
            device.change_medium(str(tmp_path / "none.img"))
        with pytest.raises(UserError, match="there is no 1"):
            device.change_medium(None, 1)


def test_verify_finds_what_differs(stick: Raw) -> None:
    good(stick, struct.pack(">BBIBHB", 0x2F, 0, 0, 0, 5, 0))
    good(stick, struct.pack(">BBIBHB", 0x2F, 2, 0, 0, 1, 0), data=bytes(512))
    assert refused(stick, struct.pack(">BBIBHB", 0x2F, 2, 0, 0, 1, 0), data=b"x" * 512) == (0xE, 0x1D, 0)
    assert refused(stick, struct.pack(">BBIBHB", 0x2F, 0, BLOCKS, 0, 1, 0)) == (ILLEGAL, 0x21, 0)


@pytest.mark.parametrize("cache", [0, 1 << 20])
def test_unmap_and_write_same_leave_what_they_say(cache: int) -> None:
    with plugged(cache=cache) as (raw, _, _):
        good(raw, write_10(0, 64), data=b"z" * 32768)
        rows = struct.pack(">QI4xQI4x", 8, 8, 40, 1)
        good(raw, bytes((0x42, *bytes(6), 0, 40, 0)), data=struct.pack(">HH4x", 38, 32) + rows)
        data = good(raw, read_10(0, 64), 32768)
        assert [i for i in range(64) if data[i * 512] == 0] == [*range(8, 16), 40]
        good(raw, struct.pack(">BBIBHB", 0x41, 0, 8, 0, 4, 0), data=b"s" * 512)
        good(raw, struct.pack(">BBQIBB", 0x93, 9, 0, 2, 0, 0))  # UNMAP and no data
        data = good(raw, read_10(0, 64), 32768)
        assert (data[0], data[1024], data[8 * 512], data[12 * 512]) == (0, ord("z"), ord("s"), 0)
        bad = struct.pack(">HH4xQI4x", 22, 16, BLOCKS, 1)
        assert refused(raw, bytes((0x42, *bytes(6), 0, 24, 0)), data=bad) == (ILLEGAL, 0x21, 0)
        assert refused(raw, struct.pack(">BBIBHB", 0x41, 0, 0, 0, 0, 0), data=bytes(512)) == (ILLEGAL, 0x24, 0)


def test_luns_and_commands_are_reported() -> None:
    with plugged(luns=["", ""]) as (raw, _, _):
        data = good(raw, bytes((0xA0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0)), 64)
        assert data == struct.pack(">I4x", 24) + b"".join(struct.pack(">BB6x", 0, lun) for lun in range(3))
        assert refused(raw, bytes((0xA0, *bytes(11)))) == (ILLEGAL, 0x24, 0)
        one = good(raw, bytes((0xA3, 0x0C, 1, 0x93, 0, 0, 0, 0, 0, 20, 0, 0)), 20)
        assert one[1] & 7 == 3
        assert one[4] == 0x93
        assert good(raw, bytes((0xA3, 0x0C, 1, 0xC7, 0, 0, 0, 0, 0, 20, 0, 0)), 20)[1] & 7 == 1
        every = good(raw, bytes((0xA3, 0x0C, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0)), 1024)
        assert int.from_bytes(every[:4], "big") == len(every) - 4
        assert {0x00, 0x12, 0x28, 0x2A, 0x35} <= set(every[4::8])


def test_bad_blocks_are_medium_errors_where_they_are() -> None:
    with plugged(bad="10,20-21") as (raw, _, _):
        good(raw, read_10(0, 10), 5120)
        raw.write(2, cbw(read_10(8, 4), 2048))
        assert raw.read(0x81, 1024) == bytes(1024)  # what was good has gone over already
        assert raw.wait(raw.submit(0x81, 1024)).status == -32
        raw.clear_halt(0x81)
        assert take_csw(raw) == (1024, 1)
        data = good(raw, bytes((3, 0, 0, 0, 18, 0)), 18)
        assert (data[0], data[2], data[12], int.from_bytes(data[3:7], "big")) == (0xF0, 3, 0x11, 10)
        assert refused(raw, write_10(21, 1), data=bytes(512)) == (3, 0x0C, 0)


def test_what_is_not_flushed_is_lost_with_the_power(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(bytes(1 << 20))
    with plugged(file=str(image), cache=1 << 20) as (raw, plug, device):
        good(raw, write_10(0, 1), data=b"1" * 512)
        good(raw, FLUSH)
        good(raw, write_10(1, 1), data=b"2" * 512)
        good(raw, write_10(2, 1, fua=True), data=b"3" * 512)
        good(raw, write_10(3, 1), data=b"4" * 512)
        assert good(raw, read_10(0, 4), 2048) == b"1" * 512 + b"2" * 512 + b"3" * 512 + b"4" * 512
        plug.replug()
        assert not device.units[0].medium or not device.units[0].medium.dirty
    assert image.read_bytes()[:2048] == b"1" * 512 + bytes(512) + b"3" * 512 + bytes(512)


def test_some_of_what_is_not_flushed_may_survive(tmp_path: Path) -> None:
    images = []
    for name in ("a", "b"):
        image = tmp_path / name
        image.write_bytes(bytes(1 << 20))
        with plugged(file=str(image), cache=1 << 20, keep=0.5, seed=3) as (raw, plug, _):
            good(raw, write_10(0, 512), data=b"k" * (512 * 512))
            plug.unplug()
        images.append(image.read_bytes())
    assert images[0] == images[1]
    kept = sum(images[0][page * 4096] != 0 for page in range(64))
    assert 16 < kept < 48


def test_full_cache_writes_its_oldest_pages(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(bytes(1 << 20))
    with plugged(file=str(image), cache=8192) as (raw, plug, _):
        for page in range(4):
            good(raw, write_10(page * 8, 8), data=b"p" * 4096)
        assert good(raw, read_10(0, 32), 16384) == b"p" * 16384
        plug.unplug()
    assert image.read_bytes()[:16384] == b"p" * 8192 + bytes(8192)


def test_image_is_locked_while_its_stick_is_there(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(bytes(4096))
    with Emulator() as bus:
        plug = bus.plug(Storage(str(image)))
        with pytest.raises(UserError, match="somebody else uses this image"):
            make("storage", {"file": str(image)})
        with image.open("rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        bus.unplug(plug)
        make("storage", {"file": str(image)}).close()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"file": "/nonexistent"}, "/nonexistent: No such file"),
        ({"file": "/tmp"}, "/tmp: Is a directory"),
        ({"file": "/dev/null"}, "/dev/null: is no image file"),
        ({"block_size": "3"}, "block_size is 512"),
        ({"size": "much"}, "size=much is wrong"),
        ({"bad": "x"}, "bad=x is not like"),
        ({"read_only": "maybe"}, "neither yes nor no"),
        ({"size": "1" + "0" * 30}, "is not from 0 to"),
        ({"vendor": "0x12345"}, "vendor is a number of 16 bits"),
        ({"colour": "red"}, "no option 'colour'"),
        ({"size": []}, "neither text nor a number"),
    ],
)
def test_wrong_option_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        make("storage", options)
    assert sentence in str(caught.value)
