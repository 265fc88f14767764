"""What people do with sticks without thinking: leave files open, delete them, pull while it is being ejected.

All of it at a daemon that mounts by itself, with the short way of pulling a stick and putting it back. No call hangs,
what was promised is on the image, and nothing is left behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.t6_stack.sticks import KIB, Desk, Stick, running_desk
from udf.supervisor.client import Connection, ControlError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount with all options")


@pytest.fixture(scope="module")
def shared() -> Iterator[Desk]:
    with running_desk("--automount") as desk:
        yield desk


@pytest.fixture
def desk(shared: Desk) -> Iterator[Desk]:
    with shared.left_as_found():
        yield shared


@pytest.fixture
def stick(tmp_path: Path) -> Stick:
    stick = Stick.made(tmp_path / "stick.img", "STICK")
    stick.put("one.bin", b"one" * 10 * KIB)
    stick.put("two.bin", b"two" * 10 * KIB)
    return stick


def place(desk: Desk, name: str = "STICK") -> Path:
    return desk.home / "media" / name


def pulled(desk: Desk, stick: Stick, where: Path) -> None:
    """It is out, and the emulator still has it in the hand."""
    desk.faults(stick, "unplug at=1 count=1")
    with contextlib.suppress(OSError):
        (where / "look.txt").write_bytes(b"x")  # something has to be asked of it
    desk.until_state(where, "DETACHED")
    desk.faults(stick)


def test_a_deleted_file_that_is_open_can_be_read_after_a_replug_and_leaves_nothing(desk: Desk, stick: Stick) -> None:
    desk.plug(stick)
    where = place(desk)
    held = os.open(where / "one.bin", os.O_RDWR)
    try:
        os.unlink(where / "one.bin")
        pulled(desk, stick, where)
        desk.replug(stick)
        desk.until_state(where, "ACTIVE")
        assert os.pread(held, 40 * KIB, 0) == stick.files.pop("one.bin")
        assert os.write(held, b"more") == 4
    finally:
        os.close(held)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(where / "look.txt")
    desk.eject(str(desk.rows()[0]["name"]))
    desk.unplug(stick)
    assert stick.check(clean=True) == stick.files


def test_what_was_open_and_deleted_when_a_stick_went_for_good_is_gone_after_the_next_mount(
    desk: Desk, stick: Stick
) -> None:
    desk.plug(stick)
    where = place(desk)
    with open(where / "one.bin", "rb"):
        os.unlink(where / "one.bin")
        directory = os.open(where, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        desk.unplug(stick)
        desk.until_state(where, "DETACHED")
        desk.umount(where, lazy=True)
    desk.nothing_is_left()
    del stick.files["one.bin"]
    assert "one.bin" not in stick.check(clean=False)
    desk.plug(stick)
    assert sorted(os.listdir(place(desk))) == ["two.bin"]
    desk.eject(str(desk.rows()[0]["name"]))
    desk.unplug(stick)
    assert stick.found() == stick.files, "nor has it left anything under another name"


def test_a_stick_that_is_pulled_while_it_is_ejected_ends_the_eject(desk: Desk, stick: Stick) -> None:
    for number in (1, 3, 6, 10):
        desk.plug(stick)
        where = place(desk)
        data = os.urandom(20 * KIB)
        (where / "new.bin").write_bytes(data)
        stick.files["new.bin"] = data
        (where / "not promised.bin").write_bytes(data)
        disk = next(str(row["name"]) for row in desk.rows() if row["kind"] == "block")
        desk.faults(stick, f"unplug at={number} count=1")
        said = ""
        try:
            said = desk.eject(disk)
        except ControlError as error:
            said = str(error)
        assert len(said.splitlines()) == 1, "it is told in a sentence"
        desk.unplug(stick)
        desk.until(lambda: not [row for row in desk.rows() if row["state"] == "ACTIVE"], "nothing is served")
        if desk.state(where) == "DETACHED":
            desk.umount(where, lazy=True)
        desk.nothing_is_left()
        stick.check(clean=False, why=f"unplug at={number}")


def test_an_eject_of_a_busy_stick_is_refused_and_nothing_has_happened(desk: Desk, stick: Stick) -> None:
    desk.plug(stick)
    where = place(desk)
    disk = next(str(row["name"]) for row in desk.rows() if row["kind"] == "block")
    with open(where / "one.bin", "rb") as held:
        with pytest.raises(ControlError, match="in use"):
            desk.eject(disk)
        assert desk.state(where) == "ACTIVE"
        assert held.read() == stick.files["one.bin"]
    assert "may be pulled out" in desk.eject(disk)
    desk.unplug(stick)
    stick.check(clean=True)


def test_two_sticks_with_one_label_keep_their_places_over_a_replug(desk: Desk, stick: Stick, tmp_path: Path) -> None:
    other = Stick.made(tmp_path / "other.img", "STICK", serial="S-OTHER")
    other.put("other.bin", b"other")
    desk.plug(stick)
    desk.plug(other)
    first, second = place(desk), place(desk, "STICK-2")
    assert (second / "other.bin").read_bytes() == b"other"
    pulled(desk, stick, first)
    assert (second / "other.bin").read_bytes() == b"other"
    desk.replug(stick)
    desk.until_state(first, "ACTIVE")
    assert (first / "one.bin").read_bytes() == stick.files["one.bin"]
    for each in (stick, other):
        desk.unplug(each)
        each.check(clean=False)
    for where in (first, second):
        with contextlib.suppress(ControlError):
            desk.umount(where, lazy=True)


def test_a_write_protected_stick_is_read_and_comes_back(desk: Desk, stick: Stick) -> None:
    before = stick.image.read_bytes()
    desk.plug(stick, read_only="yes")
    where = place(desk)
    with open(where / "one.bin", "rb") as held:
        with pytest.raises(OSError, match="Read-only") as refused:
            (where / "new.bin").write_bytes(b"new")
        assert refused.value.errno == errno.EROFS
        assert held.read(3) == b"one"
        desk.faults(stick, "unplug at=1 count=1")
        with contextlib.suppress(OSError):
            (where / "two.bin").read_bytes()
        desk.until_state(where, "DETACHED")
        desk.replug(stick)
        desk.until_state(where, "ACTIVE")
        assert held.read() == stick.files["one.bin"][3:]
        assert (where / "two.bin").read_bytes() == stick.files["two.bin"]
    desk.eject(next(str(row["name"]) for row in desk.rows() if row["kind"] == "block"))
    desk.unplug(stick)
    assert stick.image.read_bytes() == before


def test_programs_that_list_and_stat_while_sticks_come_and_go_see_errors_and_no_hang(desk: Desk, stick: Stick) -> None:
    over = threading.Event()
    wrong: list[str] = []

    def look() -> None:
        while not over.is_set():
            try:
                for directory, _, files in os.walk(desk.home / "media"):
                    for name in files:
                        with open(os.path.join(directory, name), "rb") as file:
                            file.read(100)
                os.statvfs(place(desk))
            except OSError as error:
                if error.errno not in (errno.ENODEV, errno.ENOENT, errno.ENOTCONN):
                    wrong.append(f"{error.errno} {error}")
            with Connection(desk.daemon.socket) as connection:
                connection.call("Status")

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(3):
            desk.plug(stick)
            desk.unplug(stick)
            desk.until_state(place(desk), "DETACHED", "GONE")
            with contextlib.suppress(ControlError):
                desk.umount(place(desk), lazy=True)
            desk.until_state(place(desk), "GONE")
    finally:
        over.set()
        watcher.join(30)
    assert not watcher.is_alive(), "a program hangs"
    assert not wrong, wrong[:5]
    stick.check(clean=True)
