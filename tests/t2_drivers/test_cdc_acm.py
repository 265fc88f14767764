"""A serial port as a pseudo-terminal: settings, bytes, hang-ups, generations."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import termios
import time
import tty
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import serial
import trio
import trio.testing

from udf import DeviceGone
from udf.testing.devices import Emulator

from . import lab
from .adapter import Adapter

functional: Any = lab.module("cdc_acm", "functional")
TIOCGPTN, TIOCSPTLCK = 0x80045430, 0x40045431
driver_module: Any = lab.module("cdc_acm", "driver")


@pytest.fixture
def bus() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


class Terminal:
    """What the supervisor keeps of a terminal."""

    def __init__(self) -> None:
        self.master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        number = fcntl.ioctl(self.master, TIOCGPTN, bytes(4))
        self.name = f"/dev/pts/{int.from_bytes(number, sys.byteorder)}"
        fcntl.ioctl(self.master, TIOCSPTLCK, bytes(4))

    def open(self) -> int:
        fd = os.open(self.name, os.O_RDWR | os.O_NOCTTY)
        tty.setraw(fd)
        return fd

    def hang_up(self) -> None:
        if self.master >= 0:
            os.close(self.master)
            self.master = -1


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal()
    yield made
    made.hang_up()


@contextlib.asynccontextmanager
async def serving(
    bus: Emulator, terminal: Terminal, adapter: Adapter | None = None, **options: Any
) -> AsyncIterator[Any]:
    """The driver at work, as a host does it: with a master of its own."""
    adapter = adapter or Adapter()
    plugged = bus.plug(adapter)
    async with generation(plugged, terminal, **options):
        yield adapter


@contextlib.asynccontextmanager
async def generation(plugged: Any, terminal: Terminal, **options: Any) -> AsyncIterator[Any]:
    master = os.dup(terminal.master)
    try:
        async with lab.started(lab.CdcAcm, plugged, **options) as driver, trio.open_nursery() as nursery:
            nursery.start_soon(driver.serve, master)
            await trio.testing.wait_all_tasks_blocked()
            yield driver
            nursery.cancel_scope.cancel()
    finally:
        os.close(master)


async def in_thread(work: Callable[[], Any]) -> Any:
    with trio.fail_after(60):
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True)


def read_exactly(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += os.read(fd, size - len(data))
    return data


async def test_opening_raises_the_lines_and_closing_drops_them(bus: Emulator, terminal: Terminal) -> None:
    async with serving(bus, terminal) as adapter:
        fd = await in_thread(terminal.open)
        await in_thread(lambda: adapter.wait(lambda: adapter.lines == 3))
        assert adapter.coding == (9600, 0, 0, 8)
        os.close(fd)
        await in_thread(lambda: adapter.wait(lambda: adapter.lines == 0))


async def test_bytes_go_both_ways(bus: Emulator, terminal: Terminal) -> None:
    async with serving(bus, terminal) as adapter:
        fd = await in_thread(terminal.open)
        os.write(fd, bytes(range(256)))
        await in_thread(lambda: adapter.wait(lambda: len(adapter.received) == 256))
        assert adapter.received == bytes(range(256))
        adapter.send(bytes(range(256)) * 3)
        assert await in_thread(lambda: read_exactly(fd, 768)) == bytes(range(256)) * 3
        os.close(fd)


async def test_what_came_while_nobody_listened_is_not_for_who_comes_later(bus: Emulator, terminal: Terminal) -> None:
    async with serving(bus, terminal) as adapter:
        first = await in_thread(terminal.open)
        adapter.send(b"for the first")
        while adapter.queued(0x82):
            await trio.sleep(0.01)
        await trio.sleep(0.05)
        os.close(first)
        await in_thread(lambda: adapter.wait(lambda: adapter.lines == 0))
        second = await in_thread(terminal.open)
        adapter.send(b"second")
        assert await in_thread(lambda: os.read(second, 100)) == b"second"
        os.close(second)


async def test_a_program_that_reads_slowly_loses_nothing(bus: Emulator, terminal: Terminal) -> None:
    data = os.urandom(300_000)
    async with serving(bus, terminal) as adapter:
        fd = await in_thread(terminal.open)
        adapter.send(data)

        def read() -> bytes:
            got = read_exactly(fd, 1000)
            time.sleep(0.2)  # slow: everything on the way is full now
            assert adapter.queued(0x82) > 200_000
            return got + read_exactly(fd, len(data) - 1000)

        assert await in_thread(read) == data
        os.close(fd)


async def test_a_device_that_takes_slowly_makes_the_program_wait_and_gets_everything(
    bus: Emulator, terminal: Terminal
) -> None:
    data = os.urandom(100_000)
    adapter = Adapter()
    adapter.takes = False
    async with serving(bus, terminal, adapter):
        fd = await in_thread(terminal.open)
        written = []

        def write() -> None:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
                written.append(len(data) - len(view))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, write)
            await trio.sleep(0.3)
            assert written[-1:] < [50_000]
            adapter.take(True)
        await in_thread(lambda: adapter.wait(lambda: len(adapter.received) == len(data)))
        assert adapter.received == data
        os.close(fd)


async def test_what_was_written_before_the_close_still_goes_out(bus: Emulator, terminal: Terminal) -> None:
    adapter = Adapter()
    adapter.takes = False
    async with serving(bus, terminal, adapter):
        fd = await in_thread(terminal.open)
        os.write(fd, b"last words")
        os.close(fd)
        await trio.sleep(0.2)
        adapter.take(True)
        await in_thread(lambda: adapter.wait(lambda: adapter.received == b"last words"))
        await in_thread(lambda: adapter.wait(lambda: adapter.lines == 0))


async def test_a_device_that_never_takes_the_last_words_is_given_up_after_a_while(
    bus: Emulator, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_module, "DRAIN", 0.3)
    adapter = Adapter()
    adapter.takes = False
    async with serving(bus, terminal, adapter):
        fd = await in_thread(terminal.open)
        os.write(fd, b"last words")
        await in_thread(lambda: adapter.wait(lambda: adapter.lines == 3))
        os.close(fd)
        await in_thread(lambda: adapter.wait(lambda: adapter.lines == 0))
        adapter.take(True)
        fd = await in_thread(terminal.open)
        os.write(fd, b"hello")
        await in_thread(lambda: adapter.wait(lambda: b"hello" in adapter.received))
        os.close(fd)


# ---- what programs set


async def test_pyserial_uses_it(bus: Emulator, terminal: Terminal) -> None:
    async with serving(bus, terminal) as adapter:

        def use() -> None:
            with serial.Serial(terminal.name, 115200, stopbits=2, timeout=5) as port:
                port.write(b"question")
                adapter.wait(lambda: adapter.received == b"question")
                assert adapter.coding == (115200, 2, 0, 8)
                adapter.send(b"answer\n")
                assert port.readline() == b"answer\n"
                port.baudrate = 250_000  # no constant of termios
                port.write(b"!")
                adapter.wait(lambda: adapter.received == b"question!")
                assert adapter.coding[0] == 250_000

        await in_thread(use)
        await in_thread(lambda: adapter.wait(lambda: adapter.lines == 0))


async def test_a_program_that_only_reads_sets_the_speed_too(bus: Emulator, terminal: Terminal) -> None:
    async with serving(bus, terminal) as adapter:
        fd = await in_thread(terminal.open)
        await in_thread(lambda: adapter.wait(lambda: adapter.lines == 3))
        settings = termios.tcgetattr(fd)
        settings[4] = settings[5] = termios.B4800
        termios.tcsetattr(fd, termios.TCSANOW, settings)
        await in_thread(lambda: adapter.wait(lambda: adapter.coding[0] == 4800))
        os.close(fd)


async def test_b0_hangs_up_and_another_speed_ends_that(bus: Emulator, terminal: Terminal) -> None:
    async with serving(bus, terminal) as adapter:
        fd = await in_thread(terminal.open)
        await in_thread(lambda: adapter.wait(lambda: adapter.lines == 3))
        for speed, lines in ((termios.B0, 0), (termios.B19200, 3)):
            settings = termios.tcgetattr(fd)
            settings[4] = settings[5] = speed
            termios.tcsetattr(fd, termios.TCSANOW, settings)
            await in_thread(lambda lines=lines: adapter.wait(lambda: adapter.lines == lines))
        assert adapter.coding[0] == 19200
        assert all(int.from_bytes(data[:4], "little") for request, _, data in adapter.requests if request == 0x20)
        os.close(fd)


async def test_without_hupcl_the_lines_stay_up(bus: Emulator, terminal: Terminal) -> None:
    async with serving(bus, terminal) as adapter:
        fd = await in_thread(terminal.open)
        settings = termios.tcgetattr(fd)
        settings[2] &= ~termios.HUPCL
        termios.tcsetattr(fd, termios.TCSANOW, settings)
        os.write(fd, b"x")
        await in_thread(lambda: adapter.wait(lambda: adapter.received == b"x"))
        os.close(fd)
        await trio.sleep(0.3)
        assert adapter.lines == 3


async def test_the_option_says_what_a_pseudo_terminal_cannot(bus: Emulator, terminal: Terminal) -> None:
    async with serving(bus, terminal, format="7E1") as adapter:
        fd = await in_thread(terminal.open)
        await in_thread(lambda: adapter.wait(lambda: adapter.lines == 3))
        assert adapter.coding == (9600, 0, 2, 7)
        os.close(fd)


async def test_a_device_without_line_coding_works(bus: Emulator, terminal: Terminal) -> None:
    adapter = Adapter()
    adapter.knows_line_coding = False
    async with serving(bus, terminal, adapter):
        fd = await in_thread(terminal.open)
        os.write(fd, b"x")
        await in_thread(lambda: adapter.wait(lambda: adapter.received == b"x"))
        os.close(fd)


# ---- carrier, unplug, generations


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may hang up on others")
@pytest.mark.parametrize("pieces", [100, 3])
async def test_a_lost_carrier_hangs_up_on_who_asked_for_it(bus: Emulator, terminal: Terminal, pieces: int) -> None:
    async with serving(bus, terminal) as adapter:
        fd = await in_thread(terminal.open)
        adapter.state(0b11, pieces=pieces)
        settings = termios.tcgetattr(fd)
        settings[2] &= ~termios.CLOCAL
        termios.tcsetattr(fd, termios.TCSANOW, settings)
        adapter.state(0b10, pieces=pieces)
        assert await in_thread(lambda: os.read(fd, 10)) == b""  # the end
        os.close(fd)
        await in_thread(lambda: adapter.wait(lambda: adapter.lines == 0))
        fd = await in_thread(terminal.open)
        os.write(fd, b"again")
        await in_thread(lambda: adapter.wait(lambda: adapter.received == b"again"))
        os.close(fd)


async def test_a_lost_carrier_is_of_no_interest_to_who_set_clocal(bus: Emulator, terminal: Terminal) -> None:
    async with serving(bus, terminal) as adapter:
        fd = await in_thread(terminal.open)
        adapter.state(1)
        adapter.state(0)
        adapter.send(b"still here")
        assert await in_thread(lambda: read_exactly(fd, 10)) == b"still here"
        os.close(fd)


async def test_an_unplug_ends_the_driver_and_the_closed_master_the_program(bus: Emulator, terminal: Terminal) -> None:
    plugged = bus.plug(Adapter())
    adapter: Any = plugged.device
    fd = -1
    began = 0.0

    async def use_and_unplug() -> None:
        nonlocal fd, began
        async with generation(plugged, terminal):
            fd = await in_thread(terminal.open)
            await in_thread(lambda: adapter.wait(lambda: adapter.lines == 3))
            began = time.monotonic()
            plugged.unplug()
            await trio.sleep_forever()

    with pytest.raises(ExceptionGroup) as caught:
        await use_and_unplug()
    assert caught.group_contains(DeviceGone)
    assert time.monotonic() - began < 10
    terminal.hang_up()
    try:
        with contextlib.suppress(OSError):
            assert await in_thread(lambda: os.read(fd, 10)) == b""
    finally:
        os.close(fd)


async def test_a_program_does_not_notice_a_new_generation(bus: Emulator, terminal: Terminal) -> None:
    plugged = bus.plug(Adapter())
    adapter: Any = plugged.device
    async with generation(plugged, terminal):
        fd = await in_thread(terminal.open)
        settings = termios.tcgetattr(fd)
        settings[4] = settings[5] = termios.B57600
        termios.tcsetattr(fd, termios.TCSANOW, settings)
        os.write(fd, b"one")
        await in_thread(lambda: adapter.wait(lambda: adapter.received == b"one"))
    os.write(fd, b"two")  # nobody is there
    adapter.requests.clear()
    async with generation(plugged, terminal):
        await in_thread(lambda: adapter.wait(lambda: adapter.received == b"onetwo"))
        assert adapter.coding[0] == 57600
        adapter.send(b"three")
        assert await in_thread(lambda: read_exactly(fd, 5)) == b"three"
        assert termios.tcgetattr(fd)[4] == termios.B57600
        os.close(fd)
        await in_thread(lambda: adapter.wait(lambda: adapter.lines == 0))
