"""Our client, our server and a unit: what each verb does, over a real socket."""

from __future__ import annotations

import errno
import os
import random
import socket

import pytest
import trio

from tests.t1_block.lab import MIB, Memory, Sparse, connected, serving, uri
from udf import BlockClient, BlockDriver, DeviceGone, Extent
from udf.block import wire
from udf.block.server import Server


async def test_what_was_written_is_read_again() -> None:
    unit = Memory(4 * MIB)
    async with connected(unit) as client:
        assert client.size == 4 * MIB
        assert client.block_size == 512
        data = os.urandom(MIB)
        await client.write(MIB, data)
        assert await client.read(MIB, MIB) == data
        assert await client.read(0, 512) == bytes(512)
        await client.flush()
    assert unit.flushed == 1


@pytest.mark.parametrize("block", [512, 520, 4096, 1])
async def test_parts_of_blocks_are_read_and_written_without_the_author_knowing(block: int) -> None:
    unit = Memory(block * 64, block)
    truth = bytearray(unit.size)
    rng = random.Random(block)
    async with connected(unit) as client:
        for _ in range(300):
            offset = rng.randrange(unit.size)
            size = min(unit.size - offset, rng.choice([1, 2, block, block + 1, 3 * block]))
            if rng.random() < 0.5:
                data = rng.randbytes(size)
                truth[offset : offset + size] = data
                await client.write(offset, data)
            else:
                assert await client.read(offset, size) == truth[offset : offset + size]
    assert unit.data == truth


async def test_writes_to_parts_of_one_block_at_once_do_not_undo_each_other() -> None:
    class Slow(Memory):
        async def read(self, offset: int, size: int) -> bytes:
            data = await super().read(offset, size)
            await trio.sleep(0)
            return data

        async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
            await trio.sleep(0)
            await super().write(offset, data)

    unit = Slow(4096, 4096)
    async with connected(unit) as client, trio.open_nursery() as nursery:
        for at in range(0, 4096, 64):
            nursery.start_soon(client.write, at, bytes([at // 64]) * 64)
    assert unit.data == b"".join(bytes([n]) * 64 for n in range(64))


async def test_many_requests_are_under_way_at_once_and_answered_in_any_order() -> None:
    class Gated(Memory):
        def __init__(self) -> None:
            super().__init__()
            self.waiting = 0
            self.all_here = trio.Event()

        async def read(self, offset: int, size: int) -> bytes:
            self.waiting += 1
            if self.waiting == 32:
                self.all_here.set()
            await self.all_here.wait()
            return bytes([offset // 512 % 256]) * size

    unit = Gated()
    async with connected(unit) as client, trio.open_nursery() as nursery:

        async def one(number: int) -> None:
            assert await client.read(number * 512, 512) == bytes([number]) * 512

        for number in range(64):
            nursery.start_soon(one, number)


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError(errno.EDQUOT, "full"), errno.ENOSPC),
        (PermissionError("no"), errno.EPERM),
        (OSError(errno.EROFS, "no"), errno.EPERM),
        (OSError(errno.EINVAL, "no"), errno.EINVAL),
        (OSError(errno.ENODEV, "an errno is no proof"), errno.EIO),
        (TimeoutError("slow"), errno.EIO),
        (OSError("what"), errno.EIO),
        (MemoryError(), errno.ENOMEM),
    ],
)
async def test_what_a_unit_raises_is_an_error_of_the_protocol(raised: Exception, seen: int) -> None:
    class Bad(Memory):
        async def read(self, offset: int, size: int) -> bytes:
            raise raised

    # MemoryError counts as a mistake in the driver, which is reported.
    reported: list[str] = []
    async with connected(Bad(), report=lambda *what: reported.append(what[0])) as client:
        with pytest.raises(OSError) as caught:
            await client.read(0, 512)
        assert caught.value.errno == seen
        await client.write(0, bytes(512))
    assert reported == (["read"] if isinstance(raised, MemoryError) else [])


async def test_a_device_that_is_gone_is_gone_for_the_client() -> None:
    class Gone(Memory):
        async def read(self, offset: int, size: int) -> bytes:
            raise DeviceGone("pulled out")

    async with connected(Gone()) as client:
        with pytest.raises(DeviceGone, match="pulled out"):
            await client.read(0, 512)


async def test_a_mistake_in_a_unit_is_eio_and_reported_once() -> None:
    class Wrong(Memory):
        async def read(self, offset: int, size: int) -> bytes:
            return b"short" if offset else None  # type: ignore[return-value]

    reported: list[str] = []
    async with connected(Wrong(), report=lambda *what: reported.append(what[1])) as client:
        for offset in (0, 0, 512, 512):
            with pytest.raises(OSError) as caught:
                await client.read(offset, 512)
            assert caught.value.errno == errno.EIO
    assert reported == ["ContractError: read answered a NoneType instead of bytes"]


async def test_nothing_behind_the_end_reaches_a_unit() -> None:
    unit = Sparse(1536)
    async with connected(unit) as client:
        for offset, size in [(1024, 513), (1536, 1), (1 << 62, 512), (0, 4096)]:
            with pytest.raises(OSError) as caught:
                await client.read(offset, size)
            assert caught.value.errno == errno.EINVAL
            with pytest.raises(OSError) as caught:
                await client.write(offset, bytes(size))
            assert caught.value.errno == errno.ENOSPC
            with pytest.raises(OSError) as caught:
                await client.trim(offset, size)
            assert caught.value.errno == errno.EINVAL
    assert unit.calls == []


async def test_what_is_left_behind_the_last_whole_block_is_not_served() -> None:
    async with connected(Memory(1000)) as client:
        assert client.size == 512


async def test_nothing_that_changes_a_read_only_unit_reaches_it() -> None:
    class ReadOnly(Sparse):
        read_only = True

    unit = ReadOnly()
    async with connected(unit) as client:
        assert client.read_only
        client.flags = ~0  # a client that does not care
        for verb in (client.write(0, bytes(512)), client.trim(0, 512), client.zero(0, 512)):
            with pytest.raises(PermissionError):
                await verb
    assert unit.calls == []


async def test_zeros_are_written_by_the_best_verb_there_is() -> None:
    plain, sparse = Memory(4 * MIB), Sparse()
    async with connected(plain) as client:
        plain.data[:] = b"x" * len(plain.data)
        await client.zero(100, 3 * MIB)
        assert plain.data == b"x" * 100 + bytes(3 * MIB) + b"x" * (MIB - 100)
        with pytest.raises(OSError) as caught:
            await client.zero(0, MIB, fast=True)
        assert caught.value.errno == errno.EOPNOTSUPP
    async with connected(sparse) as client:
        for hole, verb in ((True, "trim"), (False, "zero")):
            sparse.calls.clear()
            await client.zero(0, MIB, hole=hole, fast=True)
            assert sparse.calls == [verb]
        sparse.data[:1024] = b"x" * 1024
        await client.trim(1, 1022)
        assert sparse.data[:1024] == b"x" * 1024, "a part of a block is never trimmed"
        await client.zero(1, 1022)
        assert sparse.data[:1024] == b"x" + bytes(1022) + b"x"


async def test_fua_flushes_after_the_write() -> None:
    unit = Memory()
    async with connected(unit) as client:
        await client.write(0, bytes(512), fua=True)
    assert unit.calls == ["write", "flush"]


async def test_extents_tell_holes_and_are_merged() -> None:
    unit = Sparse()
    unit.data[8192:12288] = b"x" * 4096
    async with connected(unit) as client:
        found = await client.extents(0, 16384)
        assert found == [Extent(8192, True, True), Extent(4096), Extent(4096, True, True)]
        assert await client.extents(8193, 100) == [Extent(100)]
    async with connected(Memory()) as client:
        assert await client.extents(0, 1000) == [Extent(1000)]


async def test_a_request_that_was_given_up_does_not_harm_the_next_ones() -> None:
    class Slow(Memory):
        gate = trio.Event()

        async def read(self, offset: int, size: int) -> bytes:
            if offset == 0:
                await self.gate.wait()
            return await super().read(offset, size)

    unit = Slow(4 * MIB)
    unit.data[:] = os.urandom(len(unit.data))
    async with connected(unit) as client:
        with trio.move_on_after(0.05) as scope:
            await client.read(0, MIB)
        assert scope.cancelled_caught
        unit.gate.set()
        for at in range(0, 4 * MIB, MIB):
            assert await client.read(at, MIB) == unit.data[at : at + MIB]


async def test_requests_that_are_given_up_at_random_leave_the_stream_whole() -> None:
    unit = Memory(4 * MIB)
    unit.data[:] = os.urandom(len(unit.data))
    rng = random.Random(7)
    async with connected(unit) as client:

        async def one() -> None:
            for _ in range(30):
                size = rng.choice([512, 65536, MIB])
                at = rng.randrange(0, 4 * MIB - size + 1, 512)
                with trio.move_on_after(rng.choice([0.0001, 0.002, 10])):
                    if rng.random() < 0.5:
                        assert await client.read(at, size) == unit.data[at : at + size]
                    else:
                        await client.write(at, bytes(unit.data[at : at + size]))

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(one)
        assert await client.read(0, MIB) == unit.data[:MIB]


async def test_a_deadline_ends_a_call() -> None:
    class Hung(Memory):
        async def read(self, offset: int, size: int) -> bytes:
            await trio.sleep_forever()
            raise AssertionError

    with trio.move_on_after(40) as scope:
        async with connected(Hung(), timeout=0.5) as client:
            with pytest.raises(TimeoutError):
                await client.read(0, 512)
            await client.write(0, bytes(512))
            scope.cancel()  # the server would wait for the unit


async def test_a_unit_may_be_a_class_with_one_verb() -> None:
    class Zeros(BlockDriver):
        size = 1 << 40

        async def read(self, offset: int, size: int) -> bytes:
            return bytes(size)

    async with connected(Zeros()) as client:
        assert client.read_only
        assert client.size == 1 << 40
        assert await client.read((1 << 40) - 3, 3) == bytes(3)


@pytest.mark.parametrize(("size", "block"), [(-1, 512), (1 << 64, 512), (4096, 0), (4096, -1), (None, 512), (1.5, 512)])
async def test_a_unit_that_makes_no_sense_is_refused_and_reported(size: object, block: object) -> None:
    unit = Memory()
    unit.size, unit.block_size = size, block  # type: ignore[assignment]
    with pytest.raises(OSError, match="does not tell what it has"):
        await connect_to(unit, reported := [])
    assert reported == ["units"]


async def connect_to(driver: BlockDriver, reported: list[str]) -> None:
    """Connect and leave; what is reported meanwhile."""
    ours, theirs = socket.socketpair()
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        server = Server(driver.units, report=lambda *what: reported.append(what[0]))
        nursery.start_soon(server.serve, theirs)
        try:
            await (await BlockClient.on(ours)).aclose()
        except Exception as exc:
            failure = exc
    if failure is not None:
        raise failure


async def test_units_that_cannot_be_told_are_an_error_and_not_a_crash() -> None:
    class Dead(Memory):
        error: BaseException = OSError(errno.EIO, "no answer")

        async def units(self) -> dict[str, Memory]:
            raise self.error

    reported: list[str] = []
    driver = Dead()
    for error, seen in ((OSError(errno.EIO, "no"), OSError), (DeviceGone("gone"), DeviceGone), (KeyError(), OSError)):
        driver.error = error
        with pytest.raises(seen):
            await connect_to(driver, reported)
    assert reported == ["units"]


async def test_a_client_that_never_pauses_does_not_starve_others() -> None:
    unit = Memory()
    async with serving(unit) as path:
        flood = await trio.open_unix_socket(str(path))
        async with flood, trio.open_nursery() as nursery:

            async def drain() -> None:
                async for _ in flood:
                    pass

            nursery.start_soon(drain)
            await flood.send_all(wire.CLIENT_FLAGS.pack(3) + wire.pack_option(wire.OPT_GO, wire.pack_go("")))

            async def pour() -> None:
                while True:
                    await flood.send_all(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.CMD_CACHE, 0, 0, 512) * 2000)

            nursery.start_soon(pour)
            async with await BlockClient.open(uri(path)) as client:
                for _ in range(50):
                    await client.write(0, b"x")
            nursery.cancel_scope.cancel()
    assert unit.data[:1] == b"x"
