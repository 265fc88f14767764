"""What nobody should send: to our server, to our client, to the functions that take messages apart."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
from collections.abc import AsyncIterator

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.t1_block.lab import MIB, Memory, connected, serving, uri
from udf import BlockClient, DeviceGone
from udf.block import requests as server_requests
from udf.block import wire
from udf.block.server import MAX_CONNECTIONS, Server
from udf.block.uri import parse
from udf.errors import UserError

names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=100)


# ---- pure functions


@given(names, st.lists(st.integers(0, 0xFFFF), max_size=20))
def test_what_is_packed_is_unpacked_again(name: str, infos: list[int]) -> None:
    assert wire.unpack_go(wire.pack_go(name, infos)) == (name, infos)
    assert wire.unpack_contexts(wire.pack_contexts(name, ["base:", name])) == (name, ["base:", name])
    assert wire.unpack_claim(wire.pack_text(name)) == name


@given(st.binary(max_size=200))
def test_garbage_is_malformed_and_nothing_else(payload: bytes) -> None:
    for unpack in (
        wire.unpack_go, wire.unpack_contexts, wire.unpack_claim, wire.unpack_server, wire.unpack_context,
        wire.unpack_error, wire.unpack_extents,
    ):  # fmt: skip
        try:
            unpack(payload)
        except wire.WireError:
            pass


@given(st.text(max_size=200))
def test_garbage_is_no_uri(text: str) -> None:
    for uri_text in (text, "nbd://" + text, "nbd+unix:///" + text, "nbd+unix:///?socket=" + text):
        try:
            parse(uri_text)
        except UserError:
            pass


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("nbd+unix:///?socket=/run/a.sock", ("/run/a.sock", "", 0, "")),
        ("nbd+unix:///part1?socket=/run/a%20b.sock", ("/run/a b.sock", "", 0, "part1")),
        ("nbd://host", ("", "host", 10809, "")),
        ("nbd://[::1]:99/a%2Fb", ("", "::1", 99, "a/b")),
    ],
)
def test_uris(text: str, place: tuple[str, str, int, str]) -> None:
    assert parse(text) == place


# ---- hostile clients


class Raw:
    """A client that says what it wants."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.data = b""

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def take(self, size: int) -> bytes:
        while len(self.data) < size:
            more = await self.stream.receive_some()
            if not more:
                raise EOFError
            self.data += more
        piece, self.data = self.data[:size], self.data[size:]
        return piece

    async def ended(self) -> bool:
        """Whether the server closes the connection, and says nothing further of substance."""
        with trio.move_on_after(40):
            try:
                while True:
                    await self.take(1)
            except (EOFError, trio.BrokenResourceError):
                return True
        return False

    async def greet(self) -> None:
        await self.take(18)
        await self.send(wire.CLIENT_FLAGS.pack(3))

    async def option(self, option: int, payload: bytes = b"") -> tuple[int, bytes]:
        await self.send(wire.pack_option(option, payload))
        while True:
            _, _, kind, size = wire.OPTION_REPLY.unpack(await self.take(20))
            text = await self.take(size)
            if kind == wire.REP_ACK or kind & wire.REP_ERROR:
                return kind, text

    async def go(self) -> None:
        await self.greet()
        assert (await self.option(wire.OPT_GO, wire.pack_go("")))[0] == wire.REP_ACK

    async def request(self, command: int, offset: int = 0, size: int = 0, flags: int = 0, data: bytes = b"") -> int:
        """Ask, and return the error number."""
        await self.send(wire.REQUEST.pack(wire.REQUEST_MAGIC, flags, command, 77, offset, size) + data)
        magic, error, cookie = wire.SIMPLE_REPLY.unpack(await self.take(16))
        assert magic == wire.SIMPLE_REPLY_MAGIC
        assert cookie == 77
        return int(error)


@pytest.fixture
def unit() -> Memory:
    return Memory()


@pytest.fixture
async def raw(unit: Memory, nursery: trio.Nursery) -> AsyncIterator[Raw]:
    ours, theirs = socket.socketpair()
    nursery.start_soon(Server(unit.units).serve, theirs)
    async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as stream:
        yield Raw(stream)


async def test_each_option_is_answered_whatever_it_holds(raw: Raw) -> None:
    await raw.greet()
    for option in (*range(2, 30), wire.OPT_CLAIM, 0xFFFFFFFF):
        for payload in (b"", b"x", bytes(4), bytes(6), b"\xff" * 64, bytes(wire.MAX_OPTION)):
            if option in (wire.OPT_ABORT, wire.OPT_GO):
                continue
            kind, _ = await raw.option(option, payload)
            assert kind == wire.REP_ACK or kind & wire.REP_ERROR
    assert (await raw.option(wire.OPT_STARTTLS))[0] == wire.REP_ERR_UNSUP
    assert (await raw.option(wire.OPT_CLAIM, wire.pack_text("")))[0] == wire.REP_ERR_UNSUP
    assert (await raw.option(wire.OPT_GO, wire.pack_go("nothing")))[0] == wire.REP_ERR_UNKNOWN
    assert (await raw.option(wire.OPT_ABORT))[0] == wire.REP_ACK
    assert await raw.ended()


@pytest.mark.parametrize(
    "said",
    [
        wire.CLIENT_FLAGS.pack(4),
        wire.CLIENT_FLAGS.pack(3) + b"GET / HTTP/1.1\r\n\r\n",
        wire.CLIENT_FLAGS.pack(3) + wire.OPTION.pack(wire.OPTION_MAGIC, wire.OPT_GO, wire.MAX_OPTION + 1),
        wire.CLIENT_FLAGS.pack(3) + wire.pack_option(wire.OPT_EXPORT_NAME, b"nothing"),
        wire.CLIENT_FLAGS.pack(3) + wire.pack_option(wire.OPT_EXPORT_NAME, b"\xff\xff"),
        wire.CLIENT_FLAGS.pack(3) + wire.pack_option(wire.OPT_LIST) * (wire.MAX_OPTIONS + 1),
    ],
    ids=["flags", "http", "long", "unknown", "no text", "many"],
)
async def test_who_breaks_the_handshake_is_cut_off(raw: Raw, said: bytes) -> None:
    with contextlib.suppress(trio.BrokenResourceError):
        await raw.send(said)
    assert await raw.ended()


async def test_who_says_nothing_is_cut_off(raw: Raw, autojump_clock: object) -> None:
    with trio.fail_after(100):
        assert (await raw.take(18))[:8] == b"NBDMAGIC"
        try:
            while True:
                await raw.take(1)
        except EOFError:
            pass


async def test_requests_that_make_no_sense_are_refused_and_the_next_one_is_served(raw: Raw, unit: Memory) -> None:
    await raw.go()
    for command in (*range(8, 40), 0xFFFF):
        assert await raw.request(command, size=512) == wire.EINVAL
    for flags in (1 << n for n in range(5, 16)):
        assert await raw.request(wire.CMD_READ, size=512, flags=flags) == wire.EINVAL
    assert await raw.request(wire.CMD_FLUSH, flags=wire.CMD_FLAG_NO_HOLE) == wire.EINVAL
    assert await raw.request(wire.CMD_BLOCK_STATUS, size=512) == wire.EINVAL
    assert await raw.request(wire.CMD_TRIM, size=512) == wire.EINVAL  # not told of, so not there
    assert await raw.request(wire.CMD_READ, size=wire.MAX_PAYLOAD + 1) == wire.EINVAL
    assert await raw.request(wire.CMD_READ, offset=(1 << 64) - 1, size=0xFFFFFFFF) == wire.EINVAL
    size = wire.MAX_PAYLOAD + 1
    assert await raw.request(wire.CMD_WRITE, size=size, data=bytes(size)) == wire.EINVAL
    assert await raw.request(wire.CMD_WRITE, offset=MIB, size=1, data=b"x") == wire.ENOSPC
    assert await raw.request(wire.CMD_WRITE_ZEROES, size=0xFFFFFFFF) == wire.ENOSPC
    assert unit.calls == []
    assert await raw.request(wire.CMD_CACHE, size=512) == 0
    for command in (wire.CMD_READ, wire.CMD_WRITE, wire.CMD_WRITE_ZEROES):
        assert await raw.request(command, size=0) == 0
    assert unit.calls == []
    assert await raw.request(wire.CMD_WRITE, size=2, data=b"ok") == 0
    assert unit.data[:2] == b"ok"


async def test_a_request_with_the_wrong_magic_ends_the_connection(raw: Raw) -> None:
    await raw.go()
    await raw.send(wire.REQUEST.pack(1, 0, 0, 0, 0, 512))
    assert await raw.ended()


async def test_a_client_that_leaves_in_the_middle_of_a_write_writes_nothing(raw: Raw, unit: Memory) -> None:
    await raw.go()
    await raw.send(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.CMD_WRITE, 0, 0, 65536) + b"x" * 1000)
    await raw.stream.send_eof()
    assert await raw.ended()
    assert unit.calls == []


async def test_what_was_asked_before_the_goodbye_is_done(raw: Raw, unit: Memory) -> None:
    await raw.go()
    one = wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.CMD_WRITE, 0, 0, 512) + b"x" * 512
    await raw.send(one + wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.CMD_DISC, 0, 0, 0) + one)
    assert await raw.ended()
    assert unit.calls == ["write"]


async def test_a_client_that_takes_no_replies_holds_a_bounded_amount(nursery: trio.Nursery) -> None:
    class Counting(Memory):
        async def read(self, offset: int, size: int) -> bytes:
            self.calls.append("read")
            return bytes(size)

    unit = Counting(64 * MIB)
    ours, theirs = socket.socketpair()
    nursery.start_soon(Server(unit.units).serve, theirs)
    raw = Raw(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
    async with raw.stream:
        await raw.go()
        with trio.move_on_after(0.5):
            for _ in range(1000):
                await raw.send(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.CMD_READ, 0, 0, 8 * MIB))
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert 1 < len(unit.calls) <= server_requests.MAX_BYTES // (8 * MIB) + 2
        nursery.cancel_scope.cancel()


async def test_connections_are_bounded(unit: Memory) -> None:
    async with serving(unit) as path:
        clients = [await BlockClient.open(uri(path)) for _ in range(MAX_CONNECTIONS)]
        with pytest.raises(DeviceGone):
            await BlockClient.open(uri(path))
        await clients.pop().aclose(5)
        clients.append(await BlockClient.open(uri(path)))
        for client in clients:
            await client.aclose()


@settings(max_examples=60)
@given(st.integers(0, 1 << 32))
def test_noise_after_a_handshake_harms_nobody(seed: int) -> None:
    rng = random.Random(seed)

    async def main() -> None:
        unit = Memory(65536)
        ours, theirs = socket.socketpair()
        with trio.fail_after(40):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(Server(unit.units).serve, theirs)
                raw = Raw(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
                await raw.go()
                noise = b""
                for _ in range(rng.randrange(20)):
                    magic = rng.choice([wire.REQUEST_MAGIC] * 20 + [0])
                    size = rng.choice([0, 1, 512, 65536, 65537, 0xFFFFFFFF])
                    command = rng.choice([0, 0, 1, 3, 4, 5, 6, 7, 8])
                    offset = rng.choice([0, 1, 512, 65536, (1 << 64) - 1])
                    noise += wire.REQUEST.pack(magic, rng.choice([0, 0, 1, 31]), command, 0, offset, size)
                    noise += os.urandom(min(size, 70_000)) if command == 1 else b""
                async with raw.stream:
                    await raw.send(noise)
                    await raw.stream.send_eof()
                    assert await raw.ended()

    trio.run(main)


# ---- hostile servers


async def answering(data: bytes, *, structured: bool = True, claim: bool = False) -> BlockClient:
    """A client on a server that said all of this, whatever was asked, and then closed the connection."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        client = await BlockClient.on(ours, claim=claim)
        client.theirs = theirs.dup()  # type: ignore[attr-defined]
    return client


GREETING = wire.GREETING.pack(wire.NBD_MAGIC, wire.OPTION_MAGIC, 3)
HANDSHAKE = (
    GREETING
    + wire.pack_option_reply(wire.OPT_STRUCTURED_REPLY, wire.REP_ACK)
    + wire.pack_option_reply(wire.OPT_SET_META_CONTEXT, wire.REP_META_CONTEXT, b"\0\0\0\1base:allocation")
    + wire.pack_option_reply(wire.OPT_SET_META_CONTEXT, wire.REP_ACK)
    + wire.pack_option_reply(wire.OPT_GO, wire.REP_INFO, wire.EXPORT_INFO.pack(0, 65536, 0xFF))
    + wire.pack_option_reply(wire.OPT_GO, wire.REP_ACK)
)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n",
        GREETING,
        GREETING + wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, wire.OPT_STRUCTURED_REPLY, 1, 0xFFFFFFFF),
        GREETING + wire.pack_option_reply(wire.OPT_STRUCTURED_REPLY, wire.REP_INFO) * 5000,
        GREETING + wire.pack_option_reply(wire.OPT_GO, wire.REP_ACK),
        HANDSHAKE.replace(wire.EXPORT_INFO.pack(0, 65536, 0xFF), wire.EXPORT_INFO.pack(0, 1 << 63, 0xFF)),
        HANDSHAKE.replace(wire.EXPORT_INFO.pack(0, 65536, 0xFF), wire.EXPORT_INFO.pack(9, 65536, 0xFF)),
        HANDSHAKE.replace(wire.EXPORT_INFO.pack(0, 65536, 0xFF), wire.EXPORT_INFO.pack(0, 65536, 0xFF) + b"x"),
    ],
)
async def test_a_server_that_breaks_the_handshake_is_no_device(data: bytes) -> None:
    with pytest.raises(DeviceGone):
        await answering(data)


@pytest.mark.parametrize(
    "sizes", [(0, 512, 4096), (3, 512, 4096), (512, 256, 4096), (1, 512, 0), (1 << 20, 1 << 20, 1 << 21)]
)
async def test_block_sizes_that_cannot_be(sizes: tuple[int, int, int]) -> None:
    told = wire.pack_option_reply(wire.OPT_GO, wire.REP_INFO, wire.BLOCK_SIZE_INFO.pack(3, *sizes))
    ack = wire.pack_option_reply(wire.OPT_GO, wire.REP_ACK)
    with pytest.raises(DeviceGone):
        await answering(HANDSHAKE.removesuffix(ack) + told + ack)


def data_chunk(offset: int, data: bytes, *, cookie: int = 1, done: bool = True) -> bytes:
    return wire.pack_chunk(wire.CHUNK_OFFSET_DATA, cookie, struct.pack(">Q", offset) + data, done=done)


@pytest.mark.parametrize(
    "reply",
    [
        b"garbage garbage garbage",
        wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, 1) + bytes(512),
        data_chunk(0, bytes(512), cookie=2),
        data_chunk(0, bytes(511)),
        data_chunk(0, bytes(513)),
        data_chunk(1, bytes(512)),
        data_chunk((1 << 64) - 1, bytes(512)),
        data_chunk(0, bytes(256), done=False) + data_chunk(0, bytes(257)),
        wire.pack_chunk(wire.CHUNK_OFFSET_HOLE, 1, wire.OFFSET_HOLE.pack(0, 513)),
        wire.pack_chunk(wire.CHUNK_OFFSET_HOLE, 1, b"short"),
        wire.pack_chunk(wire.CHUNK_NONE, 1),
        wire.pack_chunk(wire.CHUNK_NONE, 1, b"x"),
        wire.pack_chunk(99, 1),
        wire.pack_chunk(wire.CHUNK_BLOCK_STATUS, 1, bytes(12)),
        wire.CHUNK.pack(wire.CHUNK_MAGIC, 1, wire.CHUNK_ERROR, 1, 0xFFFFFFFF),
        wire.pack_chunk(wire.CHUNK_ERROR, 1, b"\0\0\0\5\xff\xff"),
        data_chunk(0, bytes(512))[:100],
    ],
)
async def test_a_server_that_breaks_the_protocol_is_a_device_that_is_gone(reply: bytes) -> None:
    client = await answering(HANDSHAKE + reply)
    with pytest.raises(DeviceGone), client.theirs:  # type: ignore[attr-defined]
        await client.read(0, 512)
    assert client.ended


async def test_pieces_of_a_reply_may_come_in_any_order() -> None:
    reply = data_chunk(256, b"b" * 128, done=False) + data_chunk(0, b"a" * 256, done=False)
    reply += wire.pack_chunk(wire.CHUNK_OFFSET_HOLE, 1, wire.OFFSET_HOLE.pack(384, 128), done=False)
    client = await answering(HANDSHAKE + reply + wire.pack_chunk(wire.CHUNK_NONE, 1))
    with client.theirs:  # type: ignore[attr-defined]
        assert await client.read(0, 512) == b"a" * 256 + b"b" * 128 + bytes(128)
        await client.aclose()


async def test_an_error_behind_data_is_an_error() -> None:
    client = await answering(
        HANDSHAKE + data_chunk(0, bytes(512), done=False) + wire.pack_error(1, wire.EIO, "bad block")
    )
    with client.theirs:  # type: ignore[attr-defined]
        with pytest.raises(OSError, match="bad block"):
            await client.read(0, 512)
        await client.aclose()


async def test_ranges_that_cannot_be_are_refused_before_they_are_sent() -> None:
    async with connected(Memory()) as client:
        for offset, size in ((-1, 512), (1 << 64, 512), (0, 1 << 33)):
            with pytest.raises(OSError):
                await client._ask(wire.CMD_READ, 0, offset, size)
