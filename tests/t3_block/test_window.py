"""What is read lands in memory that client, shim and driver share two by two; nobody can point where he may not."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.t3_block.lab import MIB, Client, Driver, NbdError, Shim, serving
from udf import BlockClient
from udf.block import wire
from udf.driver.window import PIECE, Window
from udf.window import HEAD, STAGE, Mapped, create_window

DATA = random.Random(5).randbytes(8 * MIB)


@pytest.fixture
def medium(tmp_path: Path) -> Path:
    path = tmp_path / "medium"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def shared() -> Iterator[int]:
    fd = create_window("test", 4 * MIB)
    yield fd
    os.close(fd)


@pytest.fixture
def shim(runtime_dir: Path, medium: Path) -> Iterator[Shim]:
    with serving(runtime_dir, Driver("disk", medium)) as shim:
        yield shim
        assert shim.stop() == 0


def land(client: Client, offset: int, size: int, place: int, op: int = wire.CMD_READ) -> int:
    return client.ask(op, offset, size, wire.OFFSET.pack(place), flags=wire.FLAG_WINDOW)


def test_what_is_read_lands_where_the_client_wants_it(shim: Shim, shared: int) -> None:
    mapped = Mapped(shared)
    with Client(shim.path, window=shared) as client:
        for offset, size in ((0, MIB), (512, 65536), (MIB + 1024, 3 * MIB), (7 * MIB, 512)):
            cookie = land(client, offset, size, HEAD + 4096)
            assert client.answer() == (cookie, 0, b"")
            assert mapped.view[HEAD + 4096 : HEAD + 4096 + size] == DATA[offset : offset + size]
        assert client.read(0, MIB) == DATA[:MIB]  # and can be sent as ever


def test_many_at_once_land_each_in_its_place(shim: Shim, shared: int) -> None:
    mapped = Mapped(shared)
    piece = 128 * 1024
    with Client(shim.path, window=shared) as client:
        order = random.Random(1).sample(range(32), 32)
        cookies = {land(client, number * piece, piece, HEAD + number * piece) for number in order}
        assert {client.answer()[0] for _ in order} == cookies
        assert mapped.view[HEAD : HEAD + 32 * piece] == DATA[: 32 * piece]


@pytest.mark.parametrize("place", [0, HEAD - 1, HEAD + 4 * MIB + STAGE - 65535, 1 << 63, (1 << 64) - 1])
def test_a_place_outside_the_window_is_refused_and_the_stream_goes_on(shim: Shim, shared: int, place: int) -> None:
    with Client(shim.path, window=shared) as client:
        cookie = land(client, 0, 65536, place)
        assert client.answer()[:2] == (cookie, wire.EINVAL)
        assert client.read(512, 512) == DATA[512:1024]


def test_an_error_says_so_and_what_follows_is_followed(shim: Shim, shared: int) -> None:
    with Client(shim.path, window=shared) as client:
        cookie = land(client, 8 * MIB, 65536, HEAD)
        assert client.answer()[:2] == (cookie, wire.EINVAL)
        assert client.read(512, 512) == DATA[512:1024]


def test_only_a_read_and_only_after_the_option(shim: Shim, shared: int) -> None:
    with Client(shim.path) as client, pytest.raises(NbdError) as caught:
        client.read(0, 65536, flags=wire.FLAG_WINDOW)
    assert caught.value.number == wire.EINVAL
    with Client(shim.path, window=shared) as client, pytest.raises(NbdError) as caught:
        client.call(wire.CMD_FLUSH, 0, 0, flags=wire.FLAG_WINDOW)
    assert caught.value.number == wire.EINVAL


def test_what_is_no_window_is_refused(shim: Shim, shared: int, medium: Path) -> None:
    with medium.open("rb") as file, Client(shim.path, None) as client:
        assert client.option(wire.OPT_WINDOW)[-1][0] == wire.REP_ERR_INVALID
        assert client.option(wire.OPT_WINDOW, fds=(file.fileno(),))[-1][0] == wire.REP_ERR_INVALID
        assert client.option(wire.OPT_WINDOW, b"x", fds=(shared,))[-1][0] == wire.REP_ERR_INVALID
        unsealed = os.memfd_create("x")
        try:
            os.ftruncate(unsealed, HEAD + 4 * MIB)
            assert client.option(wire.OPT_WINDOW, fds=(unsealed,))[-1][0] == wire.REP_ERR_INVALID
        finally:
            os.close(unsealed)
        client.go("")
        assert client.read(0, 512) == DATA[:512]
    with Client(shim.path, None, structured=False) as client:
        assert client.option(wire.OPT_WINDOW, fds=(shared,))[-1][0] == wire.REP_ERR_INVALID


def test_descriptors_that_nobody_asked_for_are_closed(shim: Shim, shared: int) -> None:
    def open_files() -> int:
        return len(os.listdir(f"/proc/{shim.process.pid}/fd"))

    before = open_files()
    with Client(shim.path, None) as client:
        for _ in range(20):
            client.option(wire.OPT_STRUCTURED_REPLY, fds=(shared,) * 4)
        assert open_files() <= before + 8
        client.go("")
        client.read(0, 512)
        assert open_files() <= before + 1
    shim.until(lambda: open_files() == before)


@pytest.mark.parametrize("word", ["die:read:3", "die:read:3:done"])
def test_a_driver_that_dies_in_the_middle_is_not_noticed(
    runtime_dir: Path, medium: Path, shared: int, word: str
) -> None:
    mapped = Mapped(shared)
    with (
        serving(runtime_dir, Driver("disk", medium, word)) as shim,
        Client(shim.path, window=shared) as client,
        Client(shim.path) as other,
    ):
        cookies = {land(client, number * MIB, MIB, HEAD + number * MIB) for number in range(4)}
        shim.expect("link_lost")
        shim.attach(Driver("disk", medium))
        assert {client.answer() for _ in cookies} == {(cookie, 0, b"") for cookie in cookies}
        assert mapped.view[HEAD : HEAD + 4 * MIB] == DATA[: 4 * MIB]
        for _ in range(20):  # there is room again for what the dead one had
            assert other.read(MIB, MIB) == DATA[MIB : 2 * MIB]
        assert shim.stop() == 0


def test_a_request_that_is_given_up_does_not_cost_its_room(runtime_dir: Path, medium: Path) -> None:
    with serving(runtime_dir, Driver("disk", medium, "late:read:2")) as shim, Client(shim.path) as client:
        cookie = client.ask(wire.CMD_READ, 0, MIB)
        shim.until(lambda: bool(shim.requests()["requests"]))
        shim.send("abort", request=shim.requests()["requests"][0]["id"])
        assert client.answer()[:2] == (cookie, wire.EIO)
        for number in range(24):
            at = number % 8 * MIB
            assert client.read(at, MIB) == DATA[at : at + MIB]
        assert shim.stop() == 0


def test_a_block_client_reads_into_its_window(shim: Shim) -> None:
    window = Window(create_window("test", 4 * PIECE))

    async def read() -> None:
        async with await BlockClient.open(shim.uri(), window=window) as client:
            pieces = []
            async with trio.open_nursery() as nursery:
                for number in range(4):
                    piece = window.take()
                    assert piece is not None
                    pieces.append(piece)
                    nursery.start_soon(client.read_into, number * PIECE, piece)
            assert b"".join(pieces) == DATA[: 4 * PIECE]
            elsewhere = bytearray(MIB)
            await client.read_into(4 * MIB, memoryview(elsewhere))
            assert elsewhere == DATA[4 * MIB : 5 * MIB]

    try:
        trio.run(read)
    finally:
        window.close()
