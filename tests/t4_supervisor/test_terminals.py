"""Terminals: a stable name, one driver after the other behind it, and a hang-up when the device goes."""

from __future__ import annotations

import os
import select
import signal
import termios
from pathlib import Path

import pytest
import trio
from lab import Lab, gone, serves
from real import PATIENCE, needs_fuse

from udf.errors import UserError
from udf.supervisor.instance import Reason, State
from udf.testing.devices.thermometer import Thermometer

pytestmark = needs_fuse


class Line:
    """A program with the terminal open."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)

    def say(self, text: bytes) -> None:
        os.write(self.fd, text)

    async def hear(self, seconds: float = PATIENCE) -> bytes:
        """What comes next; nothing at a hang-up."""
        with trio.fail_after(seconds):
            await trio.lowlevel.wait_readable(self.fd)
        try:
            return os.read(self.fd, 1000)
        except OSError:
            return b""

    @property
    def is_hung_up(self) -> bool:
        poll = select.poll()
        poll.register(self.fd, 0)
        return any(events & select.POLLHUP for _, events in poll.poll(0))

    def close(self) -> None:
        os.close(self.fd)


async def test_a_terminal_talks_to_its_driver_without_an_echo(lab: Lab) -> None:
    lease = await lab.plug(Thermometer(celsius=3.25))
    endpoint = await lab.start("serial0", "sensor_line", lease)
    tty = lab.place("serial0") / "tty"
    assert tty.is_symlink()
    line = Line(tty)
    assert not termios.tcgetattr(line.fd)[3] & (termios.ECHO | termios.ICANON)
    line.say(b"?\n")
    assert await line.hear() == b"3.25\n"
    line.close()
    await lab.unplug(lease)
    await gone(endpoint)
    assert not lab.place("serial0").exists()


@pytest.mark.parametrize("how", ["killed", "crashed"])
async def test_a_terminal_stays_open_over_the_death_of_its_driver(lab: Lab, how: str) -> None:
    lease = await lab.plug(Thermometer(celsius=3.25))
    endpoint = await lab.start("serial0", "sensor_line", lease)
    line = Line(lab.place("serial0") / "tty")
    if how == "killed":
        assert endpoint.driver.pid is not None
        os.kill(endpoint.driver.pid, signal.SIGKILL)
    else:
        line.say(b"die\n")
        while endpoint.generation == 1:
            await trio.sleep(0.005)
    line.say(b"?\n")
    assert await line.hear() == b"3.25\n"
    await serves(endpoint, 2)
    assert not line.is_hung_up
    assert lab.told("death")[0].reason == ("external" if how == "killed" else "counted")
    line.close()
    await lab.registry.end(endpoint, Reason.OPERATOR)


@pytest.mark.parametrize("told", [True, False])
async def test_unplug_is_a_hang_up_and_no_fault_of_the_drivers(lab: Lab, told: bool) -> None:
    lease = await lab.plug(Thermometer())
    endpoint = await lab.start("serial0", "sensor_line", lease)
    line = Line(lab.place("serial0") / "tty")
    await lab.unplug(lease, told=told)
    assert await line.hear() == b""
    assert line.is_hung_up
    await gone(endpoint)
    assert endpoint.instance.reason is Reason.UNPLUGGED
    assert lab.told("death") == []
    line.close()


async def test_a_driver_that_dies_for_ever_is_a_hang_up_and_a_restart_another_terminal(lab: Lab) -> None:
    lease = await lab.plug(Thermometer(celsius=3.25))
    endpoint = await lab.start("serial0", "sensor_line", lease)
    line = Line(lab.place("serial0") / "tty")
    with trio.fail_after(60):
        while endpoint.instance.state is not State.FAILED:
            if endpoint.instance.state is State.ACTIVE:
                line.say(b"die\n")
            await trio.sleep(0.05)
    assert await line.hear() == b""
    line.close()
    assert not (lab.place("serial0") / "tty").exists()
    await endpoint.restart()
    line = Line(lab.place("serial0") / "tty")
    line.say(b"?\n")
    assert await line.hear() == b"3.25\n"
    line.close()
    with pytest.raises(UserError, match="can be traced"):
        endpoint.traced()
    assert await endpoint.counters() == {}
    await lab.registry.end(endpoint, Reason.OPERATOR)
