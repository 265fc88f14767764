"""A device is pulled out and comes back: the same goes on, another one or a changed one is not written to."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.t3_block.lab import AT_ONCE, LONG, MIB, Client, Driver, NbdError, Shim, back, plug, pull, serving
from udf import BlockClient, DeviceGone
from udf.block import wire
from udf.block.shim.verification import CHANGED

WATCH = wire.FLAG_WATCH
TABLE = "label: dos\nlabel-id: 0x12345678\nstart=2048, size=2048, type=c\nstart=4096, size=2048, type=83\n"


def refused(shim: Shim, *arguments: object, generation: int = 2) -> str:
    """It is plugged in, and is not the same; why."""
    plug(shim, *arguments, generation=generation)
    message = shim.expect("refused")
    assert message["generation"] == generation
    assert message["changed"] is True
    assert shim.counters()["waiting"] == 0
    return str(message["error"])


def change(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def shut_down(call: Callable[[], object]) -> bool:
    with pytest.raises(NbdError) as caught:
        call()
    return caught.value.number == wire.ESHUTDOWN


def test_the_same_device_goes_on_with_its_connections_and_what_was_not_flushed(runtime_dir: Path, disk: Path) -> None:
    disk.write_bytes(random.Random(1).randbytes(4 * MIB))
    with serving(runtime_dir, Driver("disk", disk, "cache")) as shim, Client(shim.path, watch=True) as client:
        seen = client.read(MIB, 8192, WATCH)
        client.write(MIB, b"m" * 1024, WATCH)
        client.write(2 * MIB, b"d" * 100_000)
        pull(shim)
        assert disk.read_bytes()[MIB : MIB + 1024] == seen[:1024]  # its cache is lost
        assert shut_down(lambda: client.read(0, 512))
        back(shim, disk, "cache")
        assert client.read(MIB, 8192) == b"m" * 1024 + seen[1024:]
        client.flush()
        assert disk.read_bytes()[MIB : MIB + 1024] == b"m" * 1024
        assert disk.read_bytes()[2 * MIB : 2 * MIB + 100_000] == b"d" * 100_000
        counters = shim.counters()
        assert counters["compared"] == 8 + 16  # the head and what was read
        assert counters["kept_again"] == 2


@pytest.mark.parametrize(("offset", "where"), [(0, "head"), (4095, "head"), (MIB + 700, "read"), (3 * MIB, "written")])
def test_a_change_of_what_is_watched_is_refused_and_nothing_is_written(
    runtime_dir: Path, disk: Path, offset: int, where: str
) -> None:
    with serving(runtime_dir, Driver("disk", disk, "cache")) as shim, Client(shim.path, watch=True) as client:
        client.read(MIB, 8192, WATCH)
        client.write(3 * MIB, b"w" * 512, WATCH)
        client.flush()
        client.write(2 * MIB, b"kept" * 128)
        pull(shim)
        change(disk, offset, b"\xee")
        before = disk.read_bytes()
        assert refused(shim, disk) == CHANGED, where
        assert shut_down(lambda: client.read(0, 512))
        assert shut_down(client.flush)
        with pytest.raises(FileNotFoundError):
            Client(shim.path)
        assert disk.read_bytes() == before
        # What was pulled out may still come.
        change(disk, offset, b"w" if where == "written" else b"\0")
        back(shim, disk, generation=3)
        client.flush()
        assert disk.read_bytes()[2 * MIB : 2 * MIB + 512] == b"kept" * 128


def test_a_change_of_data_is_none_of_its_business(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk)) as shim, Client(shim.path, watch=True) as client:
        client.read(MIB, 8192)
        client.write(2 * MIB, b"d" * 512)
        pull(shim)
        change(disk, MIB, b"\xee")
        back(shim, disk)
        assert client.read(MIB, 1) == b"\xee"


def test_a_disk_of_another_kind_is_another_one(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk, "lun:1")) as shim, Client(shim.path) as client:
        client.write(0, b"x" * 512)
        pull(shim)
        for number, (words, why) in enumerate(
            (
                ([f"size:{2 * MIB}", "lun:1"], f"it is another disk: it has {2 * MIB} bytes and not {4 * MIB}"),
                (["lun:0"], "it is another disk: it has no medium"),
                (["min:4096", "lun:1"], None),
            ),
            2,
        ):
            if why is None:
                back(shim, disk, *words, generation=number)
            else:
                assert refused(shim, disk, *words, generation=number) == why
                assert shut_down(lambda: client.read(0, 512))
                pull(shim)
        client.flush()
        assert disk.read_bytes()[:512] == b"x" * 512


def test_a_card_in_a_slot_that_was_empty_is_no_reason_to_refuse(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk, "size:0", "lun:1")) as shim, Client(shim.path, "disk1") as client:
        shim.send("detach")
        back(shim, disk, "lun:1")
        assert client.read(0, 512) == bytes(512)
        assert {one["name"]: one["size"] for one in shim.serving()} == {"disk": 4 * MIB, "disk1": MIB}


def test_the_head_of_each_partition_that_was_opened_is_watched(runtime_dir: Path, disk: Path) -> None:
    subprocess.run(["sfdisk", "-q", str(disk)], input=TABLE.encode(), check=True)
    for number, opened in enumerate(("part1", "part2")):
        with serving(runtime_dir, Driver("disk", disk)) as shim, Client(shim.path, opened) as client:
            shim.until(lambda: shim.counters()["waiting"] == 0)
            pull(shim)
            change(disk, 2 * MIB + 4000, bytes([number + 1]))
            if opened == "part1":
                back(shim, disk)
                assert client.read(0, 512) == bytes(512)
            else:
                assert refused(shim, disk) == CHANGED


def test_before_a_flush_the_old_the_new_and_what_was_between_are_all_the_same_device(
    runtime_dir: Path, disk: Path
) -> None:
    with serving(runtime_dir, Driver("disk", disk)) as shim, Client(shim.path, watch=True) as client:
        client.write(MIB, b"a" * 512, WATCH)
        client.flush()
        client.write(MIB, b"b" * 512)  # watched before, so it needs no flag
        client.write(MIB - 512, b"c" * 1024, WATCH)
        for generation, (content, same) in enumerate(((b"d", False), (b"\0", False), (b"b", True), (b"a", True)), 2):
            pull(shim)
            change(disk, MIB, content * 512)
            if same:
                back(shim, disk, generation=generation)
            else:
                assert refused(shim, disk, generation=generation) == CHANGED
        client.flush()
        assert disk.read_bytes()[MIB - 512 : MIB + 512] == b"c" * 1024
        pull(shim)
        change(disk, MIB, b"b" * 512)  # the flush has covered it
        assert refused(shim, disk, generation=6) == CHANGED


def test_zeros_and_trims_and_parts_of_sectors_are_writes_too(runtime_dir: Path, disk: Path) -> None:
    disk.write_bytes(b"\xab" * 4 * MIB)
    with serving(runtime_dir, Driver("disk", disk)) as shim, Client(shim.path, watch=True) as client:
        client.read(MIB, 16384, WATCH)
        client.zero(MIB, 4096)
        client.trim(MIB + 4096, 4096)
        client.write(MIB + 8192 + 100, b"part")
        client.flush()
        pull(shim)
        change(disk, MIB + 4096, b"anything")  # a trimmed block may hold anything
        back(shim, disk)
        pull(shim)
        change(disk, MIB, b"\xab")
        assert refused(shim, disk, generation=3) == CHANGED


def test_what_was_being_written_when_it_was_pulled_out_may_be_anything(runtime_dir: Path, disk: Path) -> None:
    """Old, new or torn: its program was told that it failed, and who reads it next reads it anew."""
    with serving(runtime_dir, Driver("disk", disk, "hang:write:2")) as shim, Client(shim.path, watch=True) as client:
        client.read(0, 65536, WATCH)
        client.write(4096, b"a" * 512)
        cookie = client.ask(wire.CMD_WRITE, 8192, 4096, b"n" * 4096)
        shim.until(lambda: any(not one["parked"] for one in shim.requests()["requests"]))
        shim.send("detach")
        assert client.answer()[:2] == (cookie, wire.ESHUTDOWN)
        change(disk, 8192 + 300, b"torn")
        back(shim, disk)
        pull(shim)
        change(disk, 16384, b"x")
        assert refused(shim, disk, generation=3) == CHANGED


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_driver_that_dies_while_it_is_compared_is_followed_by_one_that_is_compared(
    runtime_dir: Path, disk: Path, at: int
) -> None:
    with serving(runtime_dir, Driver("disk", disk, "cache")) as shim, Client(shim.path, watch=True) as client:
        for place in range(1, 4):
            client.read(place * MIB, 4096, WATCH)
        client.write(2 * MIB, b"kept" * 128, WATCH)
        pull(shim)
        plug(shim, disk, f"die:read:{at}")
        message = shim.expect("refused")
        assert (message["generation"], message["changed"]) == (2, False)
        assert shut_down(lambda: client.read(0, 512))
        back(shim, disk, generation=3)
        client.flush()
        assert disk.read_bytes()[2 * MIB : 2 * MIB + 512] == b"kept" * 128
        pull(shim)
        plug(shim, disk, f"die:read:{at}", generation=4)
        assert shim.expect("refused")["generation"] == 4
        change(disk, 3 * MIB, b"x")
        assert refused(shim, disk, generation=5) == CHANGED


def test_a_device_that_cannot_be_read_where_it_must_be_is_refused(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk)) as shim, Client(shim.path, watch=True) as client:
        client.read(MIB, 4096, WATCH)
        pull(shim)
        assert "cannot be read" in refused(shim, disk, f"bad:{MIB + 512}")


def test_pulled_out_again_while_it_is_compared(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk)) as shim, Client(shim.path, watch=True) as client:
        client.read(MIB, 4096, WATCH)
        client.write(MIB, b"k" * 512)
        pull(shim)
        plug(shim, disk, "hang:read:2")
        cookie = client.ask(wire.CMD_READ, 0, 512)
        shim.until(lambda: shim.requests()["total"] == 1)
        before = time.monotonic()
        shim.send("detach")
        assert client.answer()[:2] == (cookie, wire.ESHUTDOWN)
        assert time.monotonic() - before < AT_ONCE
        # And once more, with a driver that knows it before the supervisor does.
        plug(shim, disk, "gone:read:2", generation=3)
        message = shim.expect("refused")
        assert "gone again" in message["error"]
        back(shim, disk, generation=4)
        assert client.read(MIB, 512) == b"k" * 512


def test_detached_it_ends_at_once(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk)) as shim, Client(shim.path) as client:
        client.write(0, b"x" * 512)
        for _ in range(16):
            client.ask(wire.CMD_READ, 0, MIB)  # whose answers it does not take
        shim.send("detach")
        before = time.monotonic()
        assert shim.stop() == 0
        assert time.monotonic() - before < AT_ONCE


def test_a_failed_driver_in_between_does_not_make_it_forget(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk)) as shim, Client(shim.path) as client:
        pull(shim)
        shim.attach(Driver("garbage", "none"), 2)
        shim.expect("refused")
        shim.send("fail")
        change(disk, 0, b"x")
        assert refused(shim, disk, generation=3) == CHANGED
        assert shut_down(client.flush)


def test_many_sectors_are_compared_in_few_reads_and_bounded(runtime_dir: Path) -> None:
    disk = runtime_dir / "disk.img"
    with disk.open("wb") as file:
        file.truncate(256 * MIB)
    with serving(runtime_dir, Driver("disk", disk)) as shim, Client(shim.path, watch=True) as client:
        for at in range(0, 8 * MIB, MIB):
            client.read(at, MIB, WATCH)
        asked = [client.ask(wire.CMD_READ, at, 512, flags=WATCH) for at in range(64 * MIB, 256 * MIB, 128 * 1024)]
        assert len(asked) == len({client.answer()[0] for _ in asked})
        for at in range(8 * MIB, 40 * MIB, MIB):
            client.read(at, MIB, WATCH)
        assert shim.counters()["watched_sectors"] <= 65_536
        pull(shim)
        trips = shim.counters()["driver_round_trips"]
        back(shim, disk)
        shim.until(lambda: shim.counters()["waiting"] == 0)
        assert shim.counters()["driver_round_trips"] - trips < 2100
        assert shim.counters()["compared"] > 50_000
        pull(shim)
        change(disk, 40 * MIB - 1, b"x")
        assert refused(shim, disk, generation=3) == CHANGED


def test_another_server_does_not_watch_and_nobody_is_hurt(runtime_dir: Path, disk: Path) -> None:
    async def use(uri: str, watching: bool) -> None:
        async with await BlockClient.open(uri, watch=True) as client:
            assert client.watching is watching
            await client.write(512, b"x" * 512, watch=True)
            assert await client.read(512, 512, watch=True) == b"x" * 512
        async with await BlockClient.open(uri) as client:
            assert not client.watching
            assert await client.read(512, 512, watch=True) == b"x" * 512

    with serving(runtime_dir, Driver("disk", disk)) as shim:
        trio.run(use, shim.uri(), True)
        with Client(shim.path) as client, pytest.raises(NbdError) as caught:
            client.read(0, 512, WATCH)  # not agreed on
        assert caught.value.number == wire.EINVAL
        with Client(shim.path, None) as client:
            assert client.option(wire.OPT_WATCH, b"x")[-1][0] == wire.REP_ERR_INVALID
            assert client.option(wire.OPT_WATCH)[-1][0] == wire.REP_ACK
            client.go("disk")
            with pytest.raises(NbdError):
                client.call(wire.CMD_FLUSH, 0, 0, flags=WATCH)
    path = runtime_dir / "nbdkit"
    nbdkit = subprocess.Popen(["nbdkit", "-f", "--exit-with-parent", "-U", str(path), "file", str(disk)])
    try:
        until = time.monotonic() + LONG
        while not path.exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        trio.run(use, f"nbd+unix:///?socket={path}", False)
    finally:
        nbdkit.kill()
        nbdkit.wait()
        path.unlink(missing_ok=True)


def test_a_filesystem_driver_keeps_its_connection(runtime_dir: Path, disk: Path) -> None:
    async def use(shim: Shim) -> None:
        async with await BlockClient.open(shim.uri("disk"), claim=True, watch=True) as client:
            await client.write(4096, b"a" * 512, watch=True)
            shim.send("detach")
            await trio.to_thread.run_sync(lambda: shim.until(lambda: shim.requests()["total"] == 0))
            with pytest.raises(DeviceGone):
                await client.read(0, 512)
            assert not client.ended
            await trio.to_thread.run_sync(back, shim, disk)
            await client.write(4096, b"b" * 512, watch=True)
            await client.flush()
            assert await client.read(4096, 512, watch=True) == b"b" * 512

    with serving(runtime_dir, Driver("disk", disk, "cache")) as shim:
        trio.run(use, shim)
