"""Every fault at every transfer of a serial port's life: bounded, and the next generation works."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import trio

from udf import ContractError, DeviceGone
from udf.testing.devices import Emulator, Plugged

from .adapter import Adapter
from .test_cdc_acm import Terminal, generation, in_thread, read_exactly

FAULTS = ["stall", "stall late=yes", "eio", "eio late=yes", "short bytes=0", "babble", "delay ms=20", "unplug"]


@pytest.fixture
def bus() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


async def live(plugged: Plugged, terminal: Terminal, patience: float = 40.0) -> None:
    """Open, ask, be answered, close."""
    adapter: Any = plugged.device
    adapter.received.clear()
    async with generation(plugged, terminal):
        fd = await in_thread(terminal.open)
        try:
            os.write(fd, b"question")
            with trio.fail_after(patience):
                while b"question" not in adapter.received:
                    await trio.sleep(0.005)
                adapter.send(b"answer")
                assert await trio.to_thread.run_sync(lambda: read_exactly(fd, 6), abandon_on_cancel=True) == b"answer"
        finally:
            os.close(fd)
        with trio.fail_after(patience):
            while terminal_is_open(terminal):
                await trio.sleep(0.005)


def terminal_is_open(terminal: Terminal) -> bool:
    import select

    poll = select.poll()
    poll.register(terminal.master, 0)
    return not any(events & select.POLLHUP for _, events in poll.poll(0))


@pytest.mark.parametrize("fault", FAULTS)
async def test_every_fault_at_every_transfer(bus: Emulator, fault: str) -> None:
    counted = bus.plug(Adapter(configured=1))
    terminal = Terminal()
    await live(counted, terminal)
    total = counted.transfers
    terminal.hang_up()
    assert total > 4
    patience = 1.0 if fault.startswith(("eio", "short", "babble", "stall late")) else 40.0  # some end in silence
    for number in range(1, total + 1):
        plugged = bus.plug(Adapter(configured=1), faults=[f"{fault} at={number}"])
        terminal = Terminal()
        error: BaseException | None = None
        with trio.fail_after(100):
            try:
                await live(plugged, terminal, patience)
            except (ExceptionGroup, DeviceGone, ContractError, trio.TooSlowError) as exc:
                error = exc
        if fault == "unplug":
            # The last ones may come when everything is over already, or never.
            assert isinstance(error, ExceptionGroup | DeviceGone) or number > total - 2, number
        elif fault in ("stall", "delay ms=20"):
            assert error is None, (number, error)
        terminal.hang_up()
        plugged.set_faults([])
        plugged.replug()
        terminal = Terminal()
        await live(plugged, terminal)
        terminal.hang_up()
        bus.unplug(plugged)
