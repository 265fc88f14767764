"""What a block shim serves while all is well: exports, options, commands."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
import trio

from tests.t3_block.lab import MIB, Client, Driver, NbdError, serving
from udf import BlockClient
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
    """What file(1) sees in random bytes may be no UTF-8, and nbdinfo copies it into its JSON as it is."""
    with serving(runtime_dir, Driver("disk", disk, "lun:1")) as shim:
        info = json.loads(
            subprocess.run(["nbdinfo", "--no-content", "--json", shim.uri()], check=True, capture_output=True).stdout
        )
        export = info["exports"][0]
        assert info["structured"] is True
        assert export["export-size"] == 4 * MIB
        assert export["can_flush"] is True
        assert export["block_size_minimum"] in (1, 512)
        listed = json.loads(
            subprocess.run(
                ["nbdinfo", "--no-content", "--json", "--list", shim.uri()], check=True, capture_output=True
            ).stdout
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


def test_a_slot_without_a_medium_is_an_empty_export(runtime_dir: Path, disk: Path) -> None:
    """The empty slot of a card reader ended the driver, again and again."""
    with serving(runtime_dir, Driver("disk", disk, "size:0", "lun:1")) as shim:
        assert {each["name"]: each["size"] for each in shim.exports} == {"disk": 0, "disk1": MIB}
        with Client(shim.path, "disk1") as client:
            assert client.read(0, 512) == bytes(512)
        assert not shim.said("fault")
    with serving(runtime_dir, Driver("disk", disk, "size:0")) as shim:
        assert [each["size"] for each in shim.exports] == [0]


def test_what_is_allocated_is_passed_on(runtime_dir: Path, disk: Path) -> None:
    """nbdkit knows the holes of a file; a partition shows its part of them."""
    with disk.open("r+b") as file:
        file.truncate(0)
        file.truncate(100 * MIB)
        for at, data in ((0, b"x"), (MIB, b"y" * 65536), (3 * MIB, b"z" * 65536)):
            file.seek(at)
            file.write(data)
    table = "label: dos\nstart=1024, size=2048, type=83\n"
    subprocess.run(["sfdisk", "-q", "--force", str(disk)], input=table.encode(), check=True)

    def shown(uri: str) -> list[tuple[int, int, int]]:
        done = subprocess.run(["nbdinfo", "--map", "--json", uri], check=True, capture_output=True)
        return [(one["offset"], one["length"], one["type"]) for one in json.loads(done.stdout)]

    with serving(runtime_dir, Driver("nbdkit", "file", str(disk))) as shim:
        direct = runtime_dir / "direct"
        nbdkit = subprocess.Popen(["nbdkit", "-f", "--exit-with-parent", "-U", str(direct), "file", str(disk)])
        try:
            shim.until(direct.exists)
            assert shown(shim.uri()) == shown(f"nbd+unix:///?socket={direct}")
        finally:
            nbdkit.kill()
            nbdkit.wait()
        direct.unlink(missing_ok=True)
        part = shown(shim.uri("part1"))
        assert sum(length for _, length, _ in part) == MIB
        assert (MIB // 2, 65536, 0) in part


def test_old_clients_choose_an_export_without_an_answer(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk)) as shim:
        for flags in (1, 3):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(shim.path))
                sock.settimeout(10)
                assert len(sock.recv(18, socket.MSG_WAITALL)) == 18
                sock.sendall(wire.CLIENT_FLAGS.pack(flags) + wire.pack_option(wire.OPT_EXPORT_NAME, b"disk"))
                size, _ = wire.EXPORT_REPLY.unpack(sock.recv(10, socket.MSG_WAITALL))
                assert size == 4 * MIB
                if flags == 1:
                    assert sock.recv(124, socket.MSG_WAITALL) == bytes(124)
                sock.sendall(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.CMD_READ, 9, 0, 512))
                reply = sock.recv(16 + 512, socket.MSG_WAITALL)
                assert reply == wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, 9) + bytes(512)


def test_what_is_larger_than_the_driver_takes_is_split(runtime_dir: Path, disk: Path) -> None:
    arguments = (
        "file",
        str(disk),
        "--filter=blocksize-policy",
        "blocksize-maximum=64k",
        "blocksize-error-policy=error",
    )
    with serving(runtime_dir, Driver("nbdkit", *arguments)) as shim, Client(shim.path) as client:
        data = os.urandom(4 * MIB)
        client.write(0, data)
        assert client.read(0, 4 * MIB) == data
        client.zero(0, 4 * MIB)
        assert client.read(0, 4 * MIB) == bytes(4 * MIB)
        assert shim.counters()["driver_round_trips"] > 128


def test_a_claim_can_be_taken_with_our_own_client(runtime_dir: Path, disk: Path) -> None:
    async def use(uri: str) -> None:
        async with await BlockClient.open(uri, claim=True) as client:
            await client.write(512, b"x" * 512)
            await client.flush()
            with pytest.raises(PermissionError, match="writer"):
                async with await BlockClient.open(uri, claim=True):
                    pass
            assert await client.read(0, 1024) == bytes(512) + b"x" * 512

    with serving(runtime_dir, Driver("disk", disk)) as shim:
        trio.run(use, shim.uri("disk"))
