"""A device is pulled out at each of its transfers, with a program at work on it, through everything that there is.

Bounded: who waits is told ENODEV within a second. True: what fsync has said is on the stick. Clean: nothing is left,
and the next device of the same kind is served. `UDF_UNPLUG_FULL=1` takes every transfer, otherwise some of the first
and every one of the last, in which the program is at work.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.t5_cli.conftest import Daemon, running_daemon
from udf.supervisor.client import Connection, ControlError

FULL = bool(os.environ.get("UDF_UNPLUG_FULL"))
SIZE = 1 << 20
BOUND = 1.0  # seconds, from the unplug to the end of a call
SLACK = 9.0  # of a machine that does other things too; a hang is a matter of 30 seconds
GONE = (errno.ENODEV, errno.ENXIO, errno.ENOENT, errno.EIO, errno.ENOTCONN)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount with all options")


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    from tests.conftest import make_runtime_dir

    with make_runtime_dir() as directory, running_daemon(directory) as running:
        running.udf.done("plug", "thermometer", "--name", "first")  # the emulator is there before any of the tests
        running.udf.done("unplug", "first")
        yield running


class Bench:
    """One daemon, one device at a time."""

    def __init__(self, daemon: Daemon, connection: Connection) -> None:
        self._connection = connection
        self.home = daemon.socket.parent

    def plug(self, model: str, fault: str, **options: str) -> Path | None:
        """Where it is served; None if it was pulled out before that."""
        faults = [fault] if fault else None
        try:
            device = self._connection.call("Plug", model=model, name="it", options=options, faults=faults)["device"]
        except ControlError as error:
            if not fault or "unplugged" not in str(error):
                raise
            return None
        if device["state"] != "bound" or not device["instances"]:
            return None
        path = Path(device["instances"][0]["path"])
        return path.parent if path.name in ("disk", "tty") else path

    def away(self) -> None:
        with contextlib.suppress(ControlError):
            self._connection.call("Unplug", name="it")
        until = time.monotonic() + 40
        while self.left() and time.monotonic() < until:
            time.sleep(0.01)
        assert not self.left(), "the instance is still there"

    def left(self) -> list[str]:
        rows = self._connection.call("Status")["mounts"]
        return [row["name"] for row in rows] + [str(path) for path in (self.home / "dev").glob("*[0-9]")]

    def explore(self, model: str, use: Callable[[Path], bool], **options: str) -> tuple[int, list[int]]:
        """Pull it out at transfer after transfer; how many there were, and at which of them the program was at work."""
        last = self._count(model, use, **options)
        chosen = range(1, last + 1) if FULL else sorted({*range(1, last + 1, 7), *range(max(1, last - 12), last + 1)})
        worked = []
        for number in chosen:
            where = self.plug(model, f"unplug at={number}", **options)
            try:
                if where is not None:
                    began = time.monotonic()
                    if not use(where):
                        worked.append(number)
                    assert time.monotonic() - began < BOUND + SLACK, f"unplug at={number}: too slow"
            finally:
                self.away()
        where = self.plug(model, "", **options)
        assert where is not None
        assert use(where), "the next one is served as if nothing had been"
        self.away()
        return last, worked

    def _count(self, model: str, use: Callable[[Path], bool], **options: str) -> int:
        low, high = 0, 16
        while not self._survives(model, use, high, options):
            low, high = high, high * 2
            assert high < 10_000, "it never ends"
        while high - low > 1:
            middle = (low + high) // 2
            if self._survives(model, use, middle, options):
                high = middle
            else:
                low = middle
        return low

    def _survives(self, model: str, use: Callable[[Path], bool], number: int, options: dict[str, str]) -> bool:
        where = self.plug(model, f"unplug at={number}", **options)
        try:
            return where is not None and use(where)
        finally:
            self.away()


def told(error: OSError) -> bool:
    """False, for a device that went; any other reason is none."""
    if error.errno not in GONE:
        raise error
    return False


@pytest.fixture
def bench(shared: Daemon) -> Iterator[Bench]:
    with Connection(shared.socket) as connection:
        yield Bench(shared, connection)


@pytest.mark.timeout(600 if FULL else 180)
def test_a_stick_that_is_pulled_out_at_any_transfer_loses_nothing_that_was_promised(
    bench: Bench, tmp_path: Path
) -> None:
    image = tmp_path / "stick.img"
    rounds = 0

    def use(where: Path) -> bool:
        """Write, fsync, read back; False if the device went meanwhile."""
        nonlocal rounds
        rounds += 1
        data = bytes([rounds % 255 + 1]) * 4096
        promised = False
        try:
            with open(where / "disk", "r+b", buffering=0) as file:
                file.seek(8192)
                file.write(data)
                os.fsync(file.fileno())
                promised = True
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                file.seek(65536)
                file.read(4096)
            return True
        except OSError as error:
            return told(error)
        finally:
            if promised:
                bench.away()
                assert image.read_bytes()[8192:12288] == data, "fsync has promised it"

    image.write_bytes(bytes(SIZE))
    last, worked = bench.explore("storage", use, file=str(image), serial="U1", cache="1M")
    print(f"{last} transfers; the program was at work at {worked}")
    assert worked, "no unplug met the program"


@pytest.mark.timeout(300)
def test_a_thermometer_that_is_pulled_out_at_any_transfer_is_enodev(bench: Bench) -> None:
    def use(where: Path) -> bool:
        try:
            assert (where / "celsius").read_text() == "21.50\n"
            return True
        except OSError as error:
            return told(error)

    last, worked = bench.explore("thermometer", use, celsius="21.5")
    print(f"{last} transfers; the program was at work at {worked}")
    assert worked, "no unplug met the program"


@pytest.mark.timeout(300)
def test_a_serial_port_that_is_pulled_out_at_any_transfer_hangs_up(bench: Bench) -> None:
    def use(where: Path) -> bool:
        try:
            line = os.open(where / "tty", os.O_RDWR | os.O_NOCTTY)
        except OSError:
            return False
        try:
            tty.setraw(line)
            os.write(line, b"ping\n")
            heard = b""
            while len(heard) < 5:
                data = os.read(line, 100)
                if not data:
                    return False
                heard += data
            assert heard == b"ping\n"
            return True
        except (OSError, tty.error):
            return False
        finally:
            os.close(line)

    last, worked = bench.explore("serial", use)
    print(f"{last} transfers; the program was at work at {worked}")
    assert worked, "no unplug met the program"
