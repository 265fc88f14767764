"""Foreign programs against our server, and our client against foreign servers."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import pytest
import trio

from tests.t1_block.lab import MIB, Memory, OneWriter, Sparse, nbdkit, need, qemu_nbd, run, serving, uri
from udf import BlockClient, BlockUnit, DeviceGone
from udf.block import wire


class Rom(Memory):
    read_only = True


# ---- our server


async def test_nbdinfo_understands_all_that_we_tell() -> None:
    need("nbdinfo")
    units: dict[str, BlockUnit] = {"": Sparse(4 * MIB, 4096), "rom": Rom(MIB), "Größe": Memory(3 * MIB)}
    async with serving(units) as path:
        told = json.loads((await run("nbdinfo", "--list", "--json", uri(path))).stdout)
        exports = {each["export-name"]: each for each in told["exports"]}
        assert {name: each["export-size"] for name, each in exports.items()} == {
            "": 4 * MIB, "rom": MIB, "Größe": 3 * MIB,
        }  # fmt: skip
        first, rom = exports[""], exports["rom"]
        assert first["block_size_preferred"] == 4096
        assert first["block_size_minimum"] == 1
        for word in ("can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero", "can_df", "can_cache"):
            assert first[word], word
        assert not exports["Größe"]["can_trim"]
        assert rom["is_read_only"]
        assert not rom["can_zero"]
        assert told["structured"]
        assert not told["TLS"]
        done = await run("nbdinfo", "--size", uri(path, "nothing"), check=False)
        assert done.returncode != 0
        assert b"no export named 'nothing'" in done.stderr


async def test_nbdinfo_maps_the_holes() -> None:
    need("nbdinfo")
    unit = Sparse(MIB)
    unit.data[65536:131072] = b"x" * 65536
    async with serving(unit) as path:
        told = json.loads((await run("nbdinfo", "--map", "--json", uri(path))).stdout)
    assert [(each["offset"], each["length"], each["type"]) for each in told] == [
        (0, 65536, 3), (65536, 65536, 0), (131072, MIB - 131072, 3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "options", [[], ["--request-size=262144"], ["--connections=1", "--requests=1"], ["--no-extents"]]
)
async def test_nbdcopy_reads_and_writes(options: list[str], tmp_path: Path) -> None:
    need("nbdcopy")
    data = os.urandom(5 * MIB) + bytes(6 * MIB) + os.urandom(MIB + 512)
    (tmp_path / "in").write_bytes(data)
    unit = Sparse(len(data))
    unit.data[:] = b"x" * len(data)
    async with serving(unit) as path:
        await run("nbdcopy", *options, "--flush", str(tmp_path / "in"), uri(path))
        assert unit.data == data
        assert unit.flushed
        await run("nbdcopy", *options, uri(path), str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == data


async def test_qemu_img_converts_and_compares(tmp_path: Path) -> None:
    need("qemu-img")
    source = tmp_path / "in"
    source.write_bytes(os.urandom(2 * MIB) + bytes(4 * MIB) + os.urandom(2 * MIB))
    for unit in (Sparse(8 * MIB), Memory(8 * MIB), Sparse(8 * MIB, 4096)):
        unit.data[:] = b"x" * len(unit.data)
        async with serving(unit) as path:
            await run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), uri(path))
            assert unit.data == source.read_bytes()
            done = await run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), uri(path))
            assert b"identical" in done.stdout
            await run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri(path), str(tmp_path / "out"))
        done = await run("qemu-img", "compare", "-F", "raw", str(tmp_path / "out"), str(source))
        assert b"identical" in done.stdout


async def test_qemu_io_flushes_trims_and_zeroes() -> None:
    need("qemu-io")
    unit = Sparse(MIB)
    async with serving(unit) as path:
        commands = [
            "write -P 7 0 64k",
            "write -f -P 8 64k 64k",
            "write -z 4k 4k",
            "write -z -u 8k 4k",
            "discard 16k 4k",
        ]
        words = [word for command in (*commands, "flush", "read -P 7 12k 4k") for word in ("-c", command)]
        done = await run("qemu-io", "-f", "raw", *words, uri(path))
    assert b"failed" not in done.stdout
    truth = bytearray(b"\7" * 65536 + b"\10" * 65536)
    for at in (4096, 8192, 16384):
        truth[at : at + 4096] = bytes(4096)
    assert unit.data[:131072] == truth
    assert {"write", "zero", "trim", "flush"} <= set(unit.calls)


async def test_an_old_client_enters_an_export_by_its_name() -> None:
    unit = Memory()
    unit.data[:5] = b"hello"
    async with serving({"disk": unit}) as path:
        stream = await trio.open_unix_socket(str(path))
        async with stream:
            await stream.receive_some(18)
            await stream.send_all(wire.CLIENT_FLAGS.pack(0) + wire.pack_option(wire.OPT_EXPORT_NAME, b"disk"))
            reply = b""
            while len(reply) < wire.EXPORT_REPLY.size + wire.ZEROES:
                reply += await stream.receive_some()
            size, flags = wire.EXPORT_REPLY.unpack(reply[:10])
            assert size == MIB
            assert not flags & wire.SEND_DF
            await stream.send_all(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.CMD_READ, 1, 0, 5))
            reply = b""
            while len(reply) < 21:
                reply += await stream.receive_some()
            assert reply == wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, 1) + b"hello"


async def test_claims_make_one_writer() -> None:
    need("nbdcopy")
    unit, claims = Memory(), OneWriter()
    async with serving(unit, claims) as path:
        async with await BlockClient.open(uri(path), claim=True) as one:
            assert one.claimed
            with pytest.raises(PermissionError, match="somebody else writes"):
                await BlockClient.open(uri(path), claim=True)
            async with await BlockClient.open(uri(path)) as two:
                assert await two.read(0, 4) == bytes(4)
                for _ in range(2):
                    with pytest.raises(PermissionError):
                        await two.write(0, b"two")
                await one.write(0, b"one")
                await one.aclose(5)
                await two.write(0, b"two")  # the claim is taken by the first write
                with pytest.raises(PermissionError):
                    await BlockClient.open(uri(path), claim=True)
                await two.aclose(5)
        done = await run("nbdcopy", "--connections=1", "--", "/dev/null", uri(path), check=False)
        assert done.returncode == 0
    assert unit.data[:3] == b"two"
    assert claims.holders == {}


# ---- our client


async def test_nbdkit_memory() -> None:
    rng = random.Random(5)
    with nbdkit("memory", "16M") as path:
        truth = bytearray(16 * MIB)
        async with await BlockClient.open(uri(path)) as client:
            assert client.size == 16 * MIB
            assert not client.claimed
            for _ in range(100):
                at, size = rng.randrange(15 * MIB), rng.choice([1, 513, 65536, MIB])
                data = rng.randbytes(size)
                truth[at : at + size] = data
                await client.write(at, data, fua=rng.random() < 0.2)
            await client.flush()
            for at in range(0, 16 * MIB, 4 * MIB):
                assert await client.read(at, 4 * MIB) == truth[at : at + 4 * MIB]
            await client.zero(MIB, MIB)
            await client.trim(2 * MIB, MIB)
            assert not any(await client.read(MIB, 2 * MIB))
            assert (await client.extents(0, 16 * MIB))[-1].length > 0
        async with await BlockClient.open(uri(path), claim=True) as client:
            assert not client.claimed, "nbdkit does not know claims, and that is no error"


async def test_sparse_replies_and_status() -> None:
    with nbdkit("data", "0x1 @0x100000 0x2", "size=2M") as path:
        async with await BlockClient.open(uri(path)) as client:
            extents = await client.extents(0, 2 * MIB)
            assert any(each.hole for each in extents)
            assert sum(each.length for each in extents) == 2 * MIB
            data = await client.read(0, 2 * MIB)
            assert data == b"\1" + bytes(MIB - 1) + b"\2" + bytes(MIB - 1)


async def test_many_requests_over_a_server_that_answers_late_and_in_disorder() -> None:
    with nbdkit("--filter=delay", "pattern", "16M", "delay-read=10ms") as path:
        async with await BlockClient.open(uri(path)) as client:

            async def one(at: int) -> None:
                data = await client.read(at, 65536)
                assert data[:8] == at.to_bytes(8, "big")
                assert data[-8:] == (at + 65528).to_bytes(8, "big")

            async with trio.open_nursery() as nursery:
                for at in range(0, 16 * MIB, 65536):
                    nursery.start_soon(one, at)


@pytest.mark.parametrize(("name", "number"), [("EIO", errno.EIO), ("ENOSPC", errno.ENOSPC), ("EPERM", errno.EPERM)])
async def test_errors_of_a_server(name: str, number: int) -> None:
    with nbdkit("--filter=error", "memory", "1M", f"error={name}", "error-rate=50%") as path:
        async with await BlockClient.open(uri(path)) as client:
            outcomes = {0: 0, number: 0}

            async def one(at: int) -> None:
                try:
                    assert await client.read(at, 4096) == bytes(4096)
                    outcomes[0] += 1
                except OSError as exc:
                    outcomes[exc.errno or -1] += 1

            async with trio.open_nursery() as nursery:
                for _ in range(200):
                    nursery.start_soon(one, 8192)
    assert set(outcomes) == {0, number}
    assert min(outcomes.values()) > 30


async def test_a_server_that_shuts_down_is_a_device_that_is_gone() -> None:
    with nbdkit("--filter=error", "memory", "1M", "error=ESHUTDOWN", "error-rate=100%") as path:
        async with await BlockClient.open(uri(path)) as client:
            with pytest.raises(DeviceGone):
                await client.read(0, 512)


async def test_a_server_that_dies_ends_what_waits() -> None:
    with nbdkit("--filter=delay", "memory", "1M", "delay-read=60") as path:
        client = await BlockClient.open(uri(path))
        gone = 0

        async def one() -> None:
            nonlocal gone
            with pytest.raises(DeviceGone):
                await client.read(0, 512)
            gone += 1

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one)
            await trio.testing.wait_all_tasks_blocked(0.05)
            await run("sh", "-c", f"kill -9 $(cat {path.parent}/number)")
        assert gone == 5
        assert client.ended
        with pytest.raises(DeviceGone):
            await client.read(0, 512)
        await client.aclose()


async def test_old_servers_without_structured_replies() -> None:
    with nbdkit("--no-sr", "pattern", "1M") as path:
        async with await BlockClient.open(uri(path)) as client:
            assert (await client.read(8, 8)) == (8).to_bytes(8, "big")
            assert [each.length for each in await client.extents(0, 4096)] == [4096]
    with nbdkit("--mask-handshake=0", "pattern", "1M") as path:
        async with await BlockClient.open(uri(path)) as client:
            assert (await client.read(8, 8)) == (8).to_bytes(8, "big")
        with pytest.raises(OSError):
            await BlockClient.exports(uri(path))


async def test_qemu_nbd(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(MIB) + bytes(3 * MIB))
    with qemu_nbd(image, "-x", "disk") as path:
        assert set(await BlockClient.exports(uri(path))) == {"disk"}
        with pytest.raises(FileNotFoundError):
            await BlockClient.open(uri(path, "nothing"))
        async with await BlockClient.open(uri(path, "disk"), claim=True) as client:
            assert not client.claimed
            assert await client.read(0, 4 * MIB) == image.read_bytes()
            await client.write(2 * MIB, b"hello", fua=True)
            await client.zero(0, 65536)
            await client.flush()
        assert image.read_bytes()[2 * MIB : 2 * MIB + 5] == b"hello"
        assert not any(image.read_bytes()[:65536])
    with qemu_nbd(image, "-r", "--allocation-depth") as path:
        async with await BlockClient.open(uri(path)) as client:
            assert client.read_only


async def test_nobody_there() -> None:
    for place in ("/nowhere/nbd.sock", "/tmp/" + "x" * 200):
        with pytest.raises(OSError):
            await BlockClient.open(uri(place))
