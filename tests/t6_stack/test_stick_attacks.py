"""Sticks on their bad days: many at once, pulled at every wrong moment, with look-alikes beside them.

Whatever happens: no call hangs, nothing that was promised is lost, nothing is left behind. `UDF_STICKS` says how many
are plugged in at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.t5_cli.conftest import running_daemon
from tests.t6_stack.sticks import KIB, Desk, Stick, running_desk
from udf.supervisor.client import Connection, ControlError

STICKS = int(os.environ.get("UDF_STICKS", "5"))
BOUND = 10.0  # seconds for a call that meets an unplug: 1, and what a busy machine needs; a hang takes 30

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount with all options")


@pytest.fixture(scope="module")
def shared() -> Iterator[Desk]:
    with running_desk() as desk:
        yield desk


@pytest.fixture
def desk(shared: Desk) -> Iterator[Desk]:
    with shared.left_as_found():
        yield shared


@pytest.fixture
def stick(tmp_path: Path) -> Stick:
    stick = Stick.made(tmp_path / "stick.img", "STICK")
    stick.put("big.bin", random.Random(1).randbytes(600 * KIB))
    return stick


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "mnt"


def mounted(desk: Desk, stick: Stick, root: Path, **options: str) -> dict[str, object]:
    """Plug it in and mount it; its device."""
    row = desk.plug(stick)
    desk.mount(f"{desk.disk(row)}/{stick.export}", root, **{"grace": "30", **options})
    return row


def finished(desk: Desk, stick: Stick, root: Path) -> None:
    """Unmount, pull out, and look at what is on it."""
    desk.umount(root)
    desk.unplug(stick)
    stick.check(clean=True)


def pid_of(desk: Desk, what: Path | str) -> int:
    row = desk.row(what)
    assert row is not None
    return int(row["driver_pid"])


def timed(call: Callable[[], object]) -> tuple[float, OSError | None]:
    """How long a call took, and how it failed."""
    began = time.monotonic()
    try:
        call()
    except OSError as error:
        return time.monotonic() - began, error
    return time.monotonic() - began, None


@pytest.mark.parametrize("who", ["fat", "usb_storage"])
def test_a_driver_that_stands_still_does_not_delay_an_unplug(desk: Desk, stick: Stick, root: Path, who: str) -> None:
    row = mounted(desk, stick, root)
    pid = pid_of(desk, root if who == "fat" else desk.disk(row))
    held = os.open(root / "big.bin", os.O_RDONLY)
    try:
        os.kill(pid, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(timed, lambda: os.pread(held, 64 * KIB, 300 * KIB))
            desk.until(lambda: bool(desk.call("Hung")["requests"]), "somebody waits for it")
            began = time.monotonic()
            desk.unplug(stick)
            _, error = reading.result(60)
            assert time.monotonic() - began < BOUND
        assert error is not None
        assert error.errno == errno.ENODEV
        desk.plug(stick)
        desk.until_state(root, "ACTIVE")
        assert os.pread(held, 64 * KIB, 300 * KIB) == stick.files["big.bin"][300 * KIB : 364 * KIB]
    finally:
        os.close(held)
    finished(desk, stick, root)


def test_put_back_into_another_port_it_is_the_same_stick(desk: Desk, stick: Stick, root: Path) -> None:
    desk.call("Plug", model="thermometer", name="neighbour")
    mounted(desk, stick, root)
    port = desk.port(stick)
    held = os.open(root / "new.bin", os.O_RDWR | os.O_CREAT)
    try:
        assert os.write(held, b"written before") == 14
        desk.unplug(stick)
        desk.until_state(root, "DETACHED")
        desk.call("Unplug", name="neighbour")
        desk.plug(stick)
        assert desk.port(stick) != port
        desk.until_state(root, "ACTIVE")
        assert os.write(held, b", and after") == 11
        assert os.pread(held, 100, 0) == b"written before, and after"
    finally:
        os.close(held)
    stick.files["new.bin"] = b"written before, and after"
    finished(desk, stick, root)


def test_another_device_in_its_place_ends_the_wait_for_a_stick(desk: Desk, stick: Stick, root: Path) -> None:
    mounted(desk, stick, root)
    mark = desk.mark()
    desk.unplug(stick)
    desk.until_state(root, "DETACHED")
    desk.call("Plug", model="thermometer", name="another")
    desk.until_state(root, "GONE")
    assert ("GONE", "changed") in {(e["state"], e["reason"]) for e in desk.events(mark) if e["name"] == root.name}
    desk.call("Unplug", name="another")
    stick.check(clean=True)


def test_a_stick_that_flaps_is_waited_for(desk: Desk, stick: Stick, root: Path) -> None:
    mounted(desk, stick, root, on_unplug="wait:30")
    data = random.Random(2).randbytes(200 * KIB)
    desk.faults(stick, "unplug at=9,25,60 count=6 back=60")  # also in the middle of the re-attaches
    with open(root / "new.bin", "wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    assert (root / "big.bin").read_bytes() == stick.files["big.bin"]
    desk.faults(stick)
    stick.files["new.bin"] = data
    finished(desk, stick, root)


def test_drivers_that_are_killed_while_their_stick_is_away_or_comes_back_are_replaced(
    desk: Desk, stick: Stick, root: Path
) -> None:
    mounted(desk, stick, root)
    held = os.open(root / "new.bin", os.O_RDWR | os.O_CREAT)
    rng = random.Random(3)
    content = b""
    try:
        for _ in range(3):
            more = rng.randbytes(5000)
            assert os.write(held, more) == len(more)
            content += more
            with ThreadPoolExecutor(1) as pool, Connection(desk.daemon.socket) as second:
                back = pool.submit(lambda: desk.call("Replug", name=stick.name))
                killed: set[int] = set()
                while not back.done():
                    for each in second.call("Status")["mounts"]:
                        pid = each["driver_pid"]
                        if pid and pid not in killed and len(killed) < 4 and rng.random() < 0.3:
                            killed.add(pid)
                            with contextlib.suppress(ProcessLookupError):
                                os.kill(pid, signal.SIGKILL)
                back.result(60)
            desk.until_state(root, "ACTIVE")
            assert os.pread(held, len(content) + 1, 0) == content
    finally:
        os.close(held)
    stick.files["new.bin"] = content
    finished(desk, stick, root)


def test_two_sticks_with_the_same_label_and_serial_number_are_two_sticks(
    desk: Desk, stick: Stick, root: Path, tmp_path: Path
) -> None:
    twin = stick.copy(tmp_path / "twin.img")
    twin.name = "twin"
    twin.put("twin.txt", b"I am the other one")
    mounted(desk, stick, root)
    other = tmp_path / "other"
    mounted(desk, twin, other)
    (root / "first.txt").write_bytes(b"first")
    (other / "second.txt").write_bytes(b"second")
    stick.files["first.txt"], twin.files["second.txt"] = b"first", b"second"
    desk.unplug(stick)
    desk.until_state(root, "DETACHED")
    desk.replug(twin)
    desk.until_state(other, "ACTIVE")
    assert desk.state(root) in ("DETACHED", "GONE"), "it was the other one that came back"
    assert (other / "twin.txt").read_bytes() == b"I am the other one"
    if desk.state(root) == "DETACHED":
        desk.plug(stick)
        desk.until_state(root, "ACTIVE")
        assert (root / "first.txt").read_bytes() == b"first"
        desk.umount(root)
    desk.umount(other)
    desk.unplug(stick)
    desk.unplug(twin)
    stick.check(clean=True)
    twin.check(clean=True)


def test_a_stick_that_is_pulled_while_it_is_mounted_leaves_nothing(desk: Desk, stick: Stick, root: Path) -> None:
    outcomes = []
    for number in (1, 4, 9, 15, 22, 30, 50):
        row = desk.plug(stick)
        desk.faults(stick, f"unplug at={number} count=1")
        began = time.monotonic()
        try:
            desk.mount(f"{desk.disk(row)}/{stick.export}", root, grace="0")
            outcomes.append("mounted")
        except ControlError as error:
            outcomes.append(str(error))
        assert time.monotonic() - began < 2 * BOUND
        with contextlib.suppress(OSError):
            (root / "big.bin").read_bytes()
        if desk.state(root) == "ACTIVE":
            desk.umount(root)
        desk.unplug(stick)
        desk.nothing_is_left()
    stick.check(clean=False)
    said = [each for each in outcomes if each != "mounted"]
    assert said, "no unplug met the mount"
    assert all(len(each.splitlines()) == 1 for each in said), said


def test_a_full_stick_says_so_and_stays_sound(desk: Desk, stick: Stick, root: Path) -> None:
    mounted(desk, stick, root)
    block = random.Random(4).randbytes(1024 * KIB)
    written = 0
    with open(root / "fill.bin", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while written < 64 * len(block):
            written += file.write(block)
    assert written == (root / "fill.bin").stat().st_size
    assert os.statvfs(root).f_bavail * os.statvfs(root).f_frsize < 128 * KIB, "less than one write's worth is left"
    with open(root / "fill.bin", "ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(KIB)):
            pass
    assert os.statvfs(root).f_bavail == 0
    with pytest.raises(OSError, match="No space left"):
        (root / "one more.bin").write_bytes(bytes(2 * KIB))
    os.unlink(root / "fill.bin")
    (root / "fits again.bin").write_bytes(block)
    stick.files["fits again.bin"] = block
    finished(desk, stick, root)


def test_many_sticks_at_once_are_all_served_and_all_pulled(desk: Desk, tmp_path: Path) -> None:
    sticks = [Stick.made(tmp_path / f"s{number}.img", f"S{number}", kind=12) for number in range(STICKS)]
    barrier = threading.Barrier(STICKS)

    def one(stick: Stick) -> float:
        root = tmp_path / f"mnt-{stick.name}"
        data = stick.label.encode() * 5000
        with Connection(desk.daemon.socket) as connection:
            options = {"file": str(stick.image), "serial": stick.serial, "cache": "1M"}
            row = connection.call("Plug", model="storage", name=stick.name, options=options)["device"]
            root.mkdir()
            source = f"{row['instances'][0]['name']}/{stick.export}"
            connection.call("Mount", source=source, mountpoint=str(root), options={"grace": "0"})
            with open(root / "file.bin", "wb", buffering=0) as file:
                file.write(data)
                os.fsync(file.fileno())
                stick.files["file.bin"] = data
                barrier.wait(120)
                file.write(data)
                stick.growing.add("file.bin")
                connection.call("Unplug", name=stick.name)
                took, error = timed(lambda: file.write(data))
                assert error is not None
                assert error.errno == errno.ENODEV
                with contextlib.suppress(OSError):
                    file.close()
        return took

    with ThreadPoolExecutor(STICKS) as pool:
        took = list(pool.map(one, sticks))
    assert max(took) < BOUND + STICKS / 4
    for stick in sticks:
        stick.check(clean=False)


def test_a_daemon_that_is_ended_while_a_stick_is_away_ends(runtime_dir: Path, stick: Stick, root: Path) -> None:
    with running_daemon(runtime_dir) as running:
        desk = Desk(running)
        mounted(desk, stick, root)
        held = os.open(root / "big.bin", os.O_RDONLY)
        try:
            desk.unplug(stick)
            desk.until_state(root, "DETACHED")
            desk.close()
            began = time.monotonic()
            assert running.stop() == 0, running.text()
            assert time.monotonic() - began < 2 * BOUND
        finally:
            os.close(held)
    stick.check(clean=False)
