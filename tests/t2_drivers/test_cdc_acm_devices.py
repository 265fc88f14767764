"""cdc_acm on every kind of serial adapter, usable or not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from udf import ContractError, UserError
from udf.testing.devices import BulkIn, BulkOut, Configuration, Emulator, Interface, InterruptIn

from . import lab
from .adapter import ACM, CALL_MANAGEMENT, DATA, HEADER, UNION, Adapter, communication
from .test_cdc_acm import Terminal, in_thread, serving

functional: Any = lab.module("cdc_acm", "functional")
driver_module: Any = lab.module("cdc_acm", "driver")


@pytest.fixture
def bus() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal()
    yield made
    made.hang_up()


@pytest.mark.parametrize(
    "interfaces",
    [
        [communication(HEADER + ACM + UNION), DATA],
        [communication(HEADER + CALL_MANAGEMENT + ACM), DATA],
        [communication(b""), DATA],
        [communication(UNION, endpoints=[]), DATA],
        [Interface(0x02, 0x02, 1, endpoints=[InterruptIn(1), BulkIn(2), BulkOut(2)])],
    ],
    ids=["union", "call management", "nothing", "no notifications", "combined"],
)
async def test_every_way_to_name_the_data_interface_is_understood(
    bus: Emulator, terminal: Terminal, interfaces: list[Interface]
) -> None:
    class Other(Adapter):
        configurations = [Configuration(interfaces)]

    async with serving(bus, terminal, Other()) as adapter:
        fd = await in_thread(terminal.open)
        os.write(fd, b"x")
        await in_thread(lambda: adapter.wait(lambda: adapter.received == b"x"))
        adapter.send(b"y")
        assert await in_thread(lambda: os.read(fd, 1)) == b"y"
        os.close(fd)


@pytest.mark.parametrize(
    "interfaces",
    [[communication(UNION)], [communication(UNION), Interface(0x0A, endpoints=[BulkIn(2)])], [DATA]],
)
async def test_a_device_without_a_port_is_refused_with_a_sentence(bus: Emulator, interfaces: list[Interface]) -> None:
    class Other(Adapter):
        configurations = [Configuration(interfaces)]

    with pytest.raises(ContractError, match="no serial port"):
        async with lab.started(lab.CdcAcm, bus.plug(Other())):
            pass


async def test_a_device_that_fails_for_ever_is_given_up(
    bus: Emulator, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_module, "ERROR_PAUSE", 0.005)

    async def use() -> None:
        async with serving(bus, terminal) as adapter:
            fd = await in_thread(terminal.open)
            try:
                adapter.halt(0x82, wedge=True)
                with trio.fail_after(30):
                    await trio.sleep_forever()
            finally:
                os.close(fd)

    with pytest.raises(ExceptionGroup) as caught:
        await use()
    assert caught.group_contains(ContractError, match="in a row")


@pytest.mark.parametrize("text", ["", "8", "8N", "9N1", "8X1", "8N3", "8N11"])
def test_a_wrong_format_is_refused_with_a_sentence(bus: Emulator, text: str) -> None:
    with pytest.raises(UserError, match="8N1"), lab.opened(lab.CdcAcm, bus.plug(Adapter()), format=text):
        pass


@given(st.binary(max_size=200))
def test_no_descriptor_or_notification_breaks_a_parser(data: bytes) -> None:
    functional.parse_functions(data)
    list(functional.Notifications().feed(data))


@given(st.lists(st.integers(0, 127), min_size=1, max_size=5), st.integers(1, 9))
def test_notifications_are_put_together(states: list[int], size: int) -> None:
    data = b"".join(bytes((0xA1, 0x20, 0, 0, 0, 0, 2, 0, state, 0)) for state in states)
    notifications = functional.Notifications()
    found = [state for at in range(0, len(data), size) for state in notifications.feed(data[at : at + size])]
    assert found == states
