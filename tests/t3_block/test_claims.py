"""Who may write: one at a time, for regions that overlap."""

from __future__ import annotations

import struct
import subprocess
import time
from pathlib import Path

import pytest

from tests.t3_block.lab import MIB, Client, Driver, NbdError, serving
from udf.block import wire

TABLE = """label: dos
label-id: 0x12345678
start=2048, size=2048, type=c
start=4096, size=2048, type=83
"""


@pytest.fixture
def parted(disk: Path) -> Path:
    subprocess.run(["sfdisk", "-q", str(disk)], input=TABLE.encode(), check=True)
    return disk


def test_partitions_are_exports(runtime_dir: Path, parted: Path) -> None:
    with serving(runtime_dir, Driver("disk", parted, "lun:1")) as shim:
        assert [(one["name"], one["offset"], one["size"], one["type"]) for one in shim.exports] == [
            ("disk", 0, 4 * MIB, ""),
            ("part1", MIB, MIB, "0x0c"),
            ("part2", 2 * MIB, MIB, "0x83"),
            ("disk1", 0, MIB, ""),
        ]
        with Client(shim.path, "part2") as part, Client(shim.path) as disk:
            assert part.size == MIB
            part.write(512, b"x" * 512)
            assert disk.read(2 * MIB, 1024) == bytes(512) + b"x" * 512
            with pytest.raises(NbdError) as caught:
                part.read(MIB, 512)
            assert caught.value.number == wire.EINVAL


def test_the_second_writer_of_an_overlapping_region_is_refused(runtime_dir: Path, parted: Path) -> None:
    with (
        serving(runtime_dir, Driver("disk", parted)) as shim,
        Client(shim.path, "part1", claim=True) as first,
        Client(shim.path, "disk") as whole,
        Client(shim.path, "part1") as again,
        Client(shim.path, "part2") as second,
    ):
        first.write(0, b"1" * 512)
        second.write(0, b"2" * 512)
        for client, call in (
            (whole, lambda: whole.write(3 * MIB, bytes(512))),
            (again, lambda: again.write(0, bytes(512))),
            (again, lambda: again.zero(0, 512)),
            (again, lambda: again.trim(0, 512)),
        ):
            with pytest.raises(NbdError) as caught:
                call()
            assert caught.value.number == wire.EPERM
            client.flush()
        assert whole.read(MIB, 512) == again.read(0, 512) == b"1" * 512
        with pytest.raises(PermissionError, match="has a writer, or overlaps what has one"):
            Client(shim.path, "disk", claim=True)
        assert shim.counters()["claims_refused"] == 5


def test_a_claim_ends_with_its_connection(runtime_dir: Path, parted: Path) -> None:
    with serving(runtime_dir, Driver("disk", parted)) as shim:
        for end in (Client.disconnect, Client.__exit__):
            client = Client(shim.path, "disk", claim=True)
            client.write(MIB, b"a" * 512)
            with Client(shim.path, "part1") as other:
                with pytest.raises(NbdError):
                    other.write(0, bytes(512))
                end(client)
                shim.until(lambda: shim.counters()["claims"] == 0)
                other.write(0, bytes(512))
            shim.until(lambda: shim.counters()["claims"] == 0)


def test_the_next_writer_waits_for_what_the_one_before_has_under_way(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk, "slow:0.5")) as shim:
        first = Client(shim.path, "disk", claim=True)
        first.ask(wire.CMD_WRITE, 0, 512, b"1" * 512)
        shim.until(lambda: any(not one["parked"] for one in shim.requests()["requests"]))
        first.sock.close()
        before = time.monotonic()
        with Client(shim.path, "disk", claim=True) as second:
            second.write(0, b"2" * 512)
            assert time.monotonic() - before > 0.5
        assert disk.read_bytes()[:512] == b"2" * 512


def test_a_new_partition_table_is_read_when_its_writer_has_gone(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk)) as shim:
        assert [one["name"] for one in shim.exports] == ["disk"]
        scratch = runtime_dir / "scratch"
        scratch.write_bytes(bytes(4 * MIB))
        subprocess.run(["sfdisk", "-q", str(scratch)], input=TABLE.encode(), check=True)
        with Client(shim.path) as client:
            client.write(0, scratch.read_bytes()[:512])
        assert [one["name"] for one in shim.serving()] == ["disk", "part1", "part2"]
        with Client(shim.path, "part1") as part, Client(shim.path, "disk", claim=True) as client:
            client.write(0, bytes(512))
            client.disconnect()
            assert [one["name"] for one in shim.serving()] == ["disk"]
            part.write(0, b"x" * 512)  # who has it open keeps it
        with pytest.raises(FileNotFoundError):
            Client(shim.path, "part1")
        assert disk.read_bytes()[MIB : MIB + 512] == b"x" * 512


def test_a_table_counts_in_the_blocks_of_its_device(runtime_dir: Path, disk: Path) -> None:
    sector = bytearray(4096)
    struct.pack_into("<B3xB3xII", sector, 446, 0, 0x83, 256, 256)
    sector[510:512] = b"\x55\xaa"
    disk.write_bytes(sector + bytes(4 * MIB - 4096))
    with serving(runtime_dir, Driver("disk", disk, "min:4096")) as shim:
        assert [(one["name"], one["offset"], one["size"], one["block_size"]) for one in shim.exports] == [
            ("disk", 0, 4 * MIB, 4096),
            ("part1", MIB, MIB, 4096),
        ]
        with Client(shim.path) as client:
            client.write(5, b"hello")  # the driver's side takes any byte
            assert client.read(4, 7) == b"\0hello\0"
