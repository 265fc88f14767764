"""The host's side of a block driver's link: connections come as descriptors, and word of changes goes."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator

import pytest
import trio

from tests.t1_block.lab import Memory
from udf import BlockClient
from udf.block.server import serve_link


class Shim:
    """The other end of a link."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link

    async def connect(self, export: str = "") -> BlockClient:
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self.link, [b"n"], [theirs.fileno()])
        return await BlockClient.on(ours, export)


@pytest.fixture
async def unit() -> Memory:
    return Memory()


@pytest.fixture
async def shim(unit: Memory, nursery: trio.Nursery) -> AsyncIterator[Shim]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        await nursery.start(serve_link, theirs, unit)
        yield Shim(ours)
        ours.close()
        nursery.cancel_scope.cancel()


async def test_each_descriptor_becomes_a_connection(shim: Shim, unit: Memory) -> None:
    async with await shim.connect() as one, await shim.connect() as two:
        await one.write(512, b"x" * 512)
        assert await two.read(512, 512) == b"x" * 512


async def test_an_export_that_is_not_there_is_refused(shim: Shim) -> None:
    with pytest.raises(FileNotFoundError):
        await shim.connect("lun1")


async def test_what_is_no_connection_is_ignored(shim: Shim) -> None:
    shim.link.send(b"hello")
    shim.link.send(b"n")
    read, write = os.pipe()
    socket.send_fds(shim.link, [b"n"], [read])
    socket.send_fds(shim.link, [b"?"], [shim.link.fileno()])
    os.close(read)
    async with await shim.connect() as client:
        assert await client.read(0, 512) == bytes(512)
    with pytest.raises(BrokenPipeError):
        os.write(write, b"x")  # the driver's end of it was closed
    os.close(write)


async def test_the_driver_tells_that_its_units_changed(shim: Shim, unit: Memory) -> None:
    unit.size *= 2
    unit.units_changed()
    with trio.fail_after(40):
        await trio.lowlevel.wait_readable(shim.link)
    assert json.loads(shim.link.recv(4096)) == {"t": "changed"}
    async with await shim.connect() as client:
        assert client.size == unit.size


async def test_changes_that_nobody_reads_do_not_pile_up(shim: Shim, unit: Memory) -> None:
    for _ in range(5000):
        unit.units_changed()
        await trio.lowlevel.checkpoint()
    async with await shim.connect() as client:
        assert client.size == unit.size


async def test_the_end_of_the_link_ends_the_connections(unit: Memory, nursery: trio.Nursery) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ended = trio.Event()

    async def serve() -> None:
        await serve_link(theirs, unit)
        ended.set()

    nursery.start_soon(serve)
    with theirs:
        client = await Shim(ours).connect()
        ours.close()
        with trio.fail_after(40):
            await ended.wait()
        await client.aclose()
