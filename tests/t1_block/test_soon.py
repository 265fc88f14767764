"""Units that read without a task for each request: what they begin is answered once, whatever comes of it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest
import trio

from tests.t1_block.lab import MIB, Memory, connected
from udf import BlockClient, DeviceGone
from udf.driver.window import PIECE, Window
from udf.window import create_window

Done = Callable[[Exception | None], None]
SIZE = 64 * 1024


class Soon(Memory):
    """Begins everything, and is done when it is told to be."""

    def __init__(self, size: int = 4 * MIB) -> None:
        super().__init__(size)
        self.data[:] = bytes(range(256)) * (size // 256)
        self.begun: list[tuple[int, memoryview, Done]] = []
        self.tasks = 0
        self.some = trio.Event()

    async def read_into(self, offset: int, target: memoryview) -> None:
        self.tasks += 1
        target[:] = await self.read(offset, len(target))

    def read_soon(self, offset: int, target: memoryview, done: Done) -> bool:
        if offset == SIZE:
            return False
        if offset == 2 * SIZE:
            raise ValueError("a mistake")
        self.begun.append((offset, target, done))
        self.some.set()
        return True

    def finish(self, error: Exception | None = None, *, number: int = 0) -> None:
        offset, target, done = self.begun.pop(number)
        if error is None:
            target[:] = self.data[offset : offset + len(target)]
        done(error)

    async def wait(self, count: int) -> None:
        while len(self.begun) < count:
            self.some = trio.Event()
            await self.some.wait()


@pytest.fixture
def window() -> Iterator[Window]:
    window = Window(create_window("test", 2 * PIECE))
    yield window
    window.close()


async def test_what_is_begun_is_answered_when_it_is_done_in_any_order(window: Window) -> None:
    unit = Soon()
    piece = window.take()
    assert piece is not None
    async with connected(unit, window=window) as client, trio.open_nursery() as nursery:
        for number in range(8):
            place = piece[number * SIZE : (number + 1) * SIZE]
            nursery.start_soon(client.read_into, number * SIZE + 4096, place)
        await unit.wait(8)
        assert await client.read(0, 512) == unit.data[:512]  # what is not begun goes on beside them
        for number in (7, 0, 3, 2, 1, 2, 0, 0):
            unit.finish(number=number)
    for number in range(8):
        at = number * SIZE + 4096
        assert piece[number * SIZE : (number + 1) * SIZE] == unit.data[at : at + SIZE]
    assert not unit.tasks


@pytest.mark.parametrize("offset", [SIZE, 2 * SIZE])
async def test_what_a_unit_does_not_begin_has_a_task(window: Window, offset: int) -> None:
    unit = Soon()
    piece = window.take()
    assert piece is not None
    async with connected(unit, window=window) as client:
        await client.read_into(offset, piece[:SIZE])
        assert piece[:SIZE] == unit.data[offset : offset + SIZE]
    assert unit.tasks == 1


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (OSError(errno.EIO, "worn out"), OSError),
        (DeviceGone("unplugged"), DeviceGone),
        (PermissionError(errno.EPERM, "no"), PermissionError),
    ],
)
async def test_what_goes_wrong_is_said(window: Window, error: Exception, wanted: type[Exception]) -> None:
    unit = Soon()
    piece = window.take()
    assert piece is not None
    async with connected(unit, window=window) as client, trio.open_nursery() as nursery:
        nursery.start_soon(_fails, client, piece[:SIZE], wanted)
        await unit.wait(1)
        unit.finish(error)


async def test_a_mistake_is_reported_and_an_error(window: Window) -> None:
    unit = Soon()
    said: list[str] = []
    piece = window.take()
    assert piece is not None

    def report(operation: str, line: str, text: str) -> None:
        said.append(f"{operation}: {line}")

    async with connected(unit, report, window=window) as client, trio.open_nursery() as nursery:
        nursery.start_soon(_fails, client, piece[:SIZE], OSError)
        await unit.wait(1)
        unit.finish(ZeroDivisionError("oh"))
    assert said == ["read: ZeroDivisionError: oh"]


async def test_a_client_that_leaves_is_not_waited_for_by_those_who_stay(window: Window) -> None:
    unit = Soon()
    piece = window.take()
    assert piece is not None
    async with connected(unit, window=window) as client:
        await _gives_up(client, unit, piece[:SIZE])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.read_into, 4 * SIZE, piece[SIZE : 2 * SIZE])
            await unit.wait(2)
            unit.finish(number=1)
        unit.finish()
    assert piece[SIZE : 2 * SIZE] == unit.data[4 * SIZE : 5 * SIZE]


async def test_a_connection_that_ends_waits_for_what_was_begun(window: Window) -> None:
    """The unit may still write where it was told to."""
    unit = Soon()
    piece = window.take()
    assert piece is not None
    async with connected(unit, window=window) as client:
        await _gives_up(client, unit, piece[:SIZE])
        trio.lowlevel.current_trio_token().run_sync_soon(unit.finish)
    assert not unit.begun


async def _gives_up(client: BlockClient, unit: Soon, target: memoryview) -> None:
    """Ask, and wait no more as soon as the unit has begun."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.read_into, 0, target)
        await unit.wait(1)
        nursery.cancel_scope.cancel()
    assert len(unit.begun) == 1


async def _fails(client: BlockClient, target: memoryview, wanted: type[Exception]) -> None:
    try:
        await client.read_into(0, target)
    except wanted:
        return
    raise AssertionError("it did not fail")
