"""What a block shim serves while all is well: exports, options, commands."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.t3_block.lab import MIB, Client, Driver, NbdError, serving
from udf.block import wire


def test_what_is_written_can_be_read_and_is_on_the_medium_after_a_flush(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk, "cache")) as shim, Client(shim.path) as client:
        data = os.urandom(300 * 1024)
        client.write(4096, data)
        assert client.read(4096, len(data)) == data
        assert disk.read_bytes()[4096 : 4096 + len(data)] == bytes(len(data))
        client.flush()
        assert disk.read_bytes()[4096 : 4096 + len(data)] == data
        client.zero(4096, 4096)
        assert client.read(4096, 8192) == bytes(4096) + data[4096:8192]
        client.trim(8192, 4096)


def test_it_stops_in_order_and_flushes(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk, "cache")) as shim, Client(shim.path) as client:
        client.write(0, b"x" * 512)
        assert shim.stop() == 0
        assert disk.read_bytes()[:512] == b"x" * 512


def test_nbdinfo_and_qemu_img_like_it(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk, "lun:1")) as shim:
        info = json.loads(subprocess.run(["nbdinfo", "--json", shim.uri()], check=True, capture_output=True).stdout)
        export = info["exports"][0]
        assert info["structured"] is True
        assert export["export-size"] == 4 * MIB
        assert export["can_flush"] is True
        assert export["block_size_minimum"] in (1, 512)
        listed = json.loads(
            subprocess.run(["nbdinfo", "--json", "--list", shim.uri()], check=True, capture_output=True).stdout
        )
        assert [one["export-name"] for one in listed["exports"]] == ["disk", "disk1"]
        subprocess.run(["nbdinfo", "--map", shim.uri()], check=True, capture_output=True)
        info = json.loads(
            subprocess.run(
                ["qemu-img", "info", "--output=json", shim.uri("disk1")], check=True, capture_output=True
            ).stdout
        )
        assert info["virtual-size"] == MIB


@pytest.mark.parametrize("structured", [True, False])
def test_errors_have_their_numbers(runtime_dir: Path, disk: Path, structured: bool) -> None:
    with serving(runtime_dir, Driver("disk", disk)) as shim, Client(shim.path, structured=structured) as client:
        for call, number in (
            (lambda: client.read(4 * MIB, 512), wire.EINVAL),
            (lambda: client.read(0, 0), wire.EINVAL),
            (lambda: client.write(4 * MIB - 512, bytes(1024)), wire.ENOSPC),
            (lambda: client.zero(1 << 62, 512), wire.ENOSPC),
            (lambda: client.call(77, 0, 0), wire.EINVAL),
            (lambda: client.call(wire.CMD_READ, 0, 512, flags=1 << 15), wire.EINVAL),
            (lambda: client.call(wire.CMD_BLOCK_STATUS, 0, 512), wire.EINVAL),
        ):
            with pytest.raises(NbdError) as caught:
                call()
            assert caught.value.number == number
        assert client.read(0, 512) == bytes(512)


def test_a_read_only_shim_refuses_to_write(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk), read_only=True) as shim, Client(shim.path) as client:
        assert client.flags & wire.READ_ONLY
        assert client.flags & wire.CAN_MULTI_CONN
        with pytest.raises(NbdError) as caught:
            client.write(0, bytes(512))
        assert caught.value.number == wire.EPERM
        with pytest.raises(PermissionError):
            Client(shim.path, "disk", claim=True)
