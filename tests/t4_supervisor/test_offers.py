"""What is on offer for devices: files that appear, change and go, names of instances, and being told in time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from real import PATIENCE

from udf.supervisor import catalog, offers
from udf.supervisor.filewatch import FileWatch
from udf.supervisor.naming import MAX_REMEMBERED, Identity, Numbers, by_id, safe
from udf.supervisor.offers import Offers
from udf.usb.rules import NO_RULES

DRIVER = """# /// udf
# kind = "usb"
# interface = 1
# class = "X"
# match = [{{ vendor = {vendor} }}]
# requires = [{requires}]
# ///
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


class Watched:
    """Offers that run, with an event for each change."""

    def __init__(self, rules: Path | None) -> None:
        self._change = trio.Event()
        self.offers = Offers(None if rules is None else str(rules), self._changed)

    def _changed(self) -> None:
        self._change.set()
        self._change = trio.Event()

    async def until(self, driver: str, present: bool = True) -> None:
        with trio.fail_after(PATIENCE):
            while (driver in [each.name for each in self.offers.now.drivers]) is not present:
                await self._change.wait()

    async def next(self) -> None:
        with trio.fail_after(PATIENCE):
            await self._change.wait()


async def test_drivers_are_offered_when_their_files_appear_wherever_that_is(home: Path) -> None:
    tree = home / ".local/share/udf/drivers"
    async with trio.open_nursery() as nursery:
        watched = Watched(None)
        await nursery.start(watched.offers.run)
        assert "mine" not in [each.name for each in watched.offers.now.drivers]
        tree.mkdir(parents=True)
        (tree / "mine.py").write_text(DRIVER.format(vendor=1, requires=""))
        await watched.until("mine")
        (tree / "package").mkdir()
        await trio.sleep(0.1)
        (tree / "package/__init__.py").write_text(DRIVER.format(vendor=2, requires=""))
        await watched.until("package")
        (tree / "mine.py").write_text("no driver any more")
        await watched.until("mine", present=False)
        (tree / "mine.new").write_text(DRIVER.format(vendor=3, requires=""))
        (tree / "mine.new").rename(tree / "mine.py")
        await watched.until("mine")
        nursery.cancel_scope.cancel()


async def test_a_program_that_appears_on_the_path_is_seen(home: Path) -> None:
    tree = home / ".local/share/udf/drivers"
    tree.mkdir(parents=True)
    (home / "bin").mkdir()
    (tree / "mine.py").write_text(DRIVER.format(vendor=1, requires='"frob"'))
    async with trio.open_nursery() as nursery:
        watched = Watched(None)
        await nursery.start(watched.offers.run)
        assert watched.offers.now.missing["mine"] == "the program frob is not installed"
        (home / "bin/frob").write_text("#!/bin/sh\n")
        (home / "bin/frob").chmod(0o755)
        with trio.fail_after(PATIENCE):
            while "mine" in watched.offers.now.missing:
                await watched.next()
        nursery.cancel_scope.cancel()


async def test_the_last_good_rules_stay(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    rules = home / "rules.toml"
    rules.write_text("[[deny]]\nvendor = 1\n")
    async with trio.open_nursery() as nursery:
        watched = Watched(rules)
        await nursery.start(watched.offers.run)
        good = watched.offers.now.rules
        assert len(good.deny) == 1
        rules.write_text("[[deny")
        await watched.next()
        assert watched.offers.now.rules == good
        (problem,) = watched.offers.now.problems
        assert problem.startswith(f"{rules}: the rules file is not valid TOML")
        rules.unlink()
        with trio.fail_after(PATIENCE):
            while "cannot be examined" not in watched.offers.now.problems[0]:
                await watched.next()
        rules.write_text("")
        await watched.next()
        assert (watched.offers.now.rules, watched.offers.now.problems) == (NO_RULES, ())
        nursery.cancel_scope.cancel()
    assert sum("the last good rules of it stay" in record.message for record in caplog.records) == 2


async def test_a_search_path_that_hangs_keeps_neither_the_loop_nor_the_start(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    monkeypatch.setattr(offers, "search_path", lambda _: released.wait() or [])
    monkeypatch.setattr(catalog, "LOOKUP_TIMEOUT", 0.1)
    try:
        async with trio.open_nursery() as nursery:
            watched = Watched(None)
            with trio.fail_after(PATIENCE):
                await nursery.start(watched.offers.run)
            assert watched.offers.now == offers.Offer()
            nursery.cancel_scope.cancel()
    finally:
        released.set()
    assert "the search path could not be read within 0.1 s" in caplog.text


async def test_a_watch_says_nothing_of_what_it_was_not_asked_about(tmp_path: Path) -> None:
    with FileWatch() as watch:
        watch.watch([tmp_path / "a/b/c"])
        with trio.move_on_after(0.2) as limit:
            (tmp_path / "other").write_text("")
            await watch.changed()
        assert limit.cancelled_caught
        with trio.fail_after(PATIENCE):
            (tmp_path / "a").mkdir()
            await watch.changed()
        watch.watch([tmp_path / "a"])
        with trio.fail_after(PATIENCE):
            (tmp_path / "a/x").write_text("")
            await watch.changed()
        watch.watch([])
        with trio.move_on_after(0.2) as limit:
            (tmp_path / "a/y").write_text("")
            await watch.changed()
        assert limit.cancelled_caught


def identity(serial: str = "", port: str = "1-1", bus: str = "b") -> Identity:
    return Identity(bus, 1, 2, serial, port, None)


def test_numbers_come_back_and_are_never_had_twice() -> None:
    numbers = Numbers()
    assert numbers.name("disk", identity("A"), set()) == "disk0"
    assert numbers.name("disk", identity("B"), {"disk0"}) == "disk1"
    assert numbers.name("disk", identity("C"), set()) == "disk2"  # 0 and 1 are A's and B's
    assert numbers.name("disk", identity("A", "1-7"), {"disk2"}) == "disk0"  # known by its serial number
    assert numbers.name("disk", identity("", "1-3"), set()) == "disk3"
    assert numbers.name("disk", identity("", "1-4"), set()) == "disk4"
    assert numbers.name("disk", identity("", "1-3"), set()) == "disk3"  # known by its port
    assert numbers.name("other", identity("A"), set()) == "other0"
    assert numbers.name("disk", identity("A"), {"disk0"}) == "disk5"  # somebody else has it just now
    for number in range(3 * MAX_REMEMBERED):
        numbers.name("disk", identity(f"S{number}"), set())
    assert len(numbers._known) == MAX_REMEMBERED
    assert int(numbers.name("disk", identity("new"), set())[4:]) <= 3 * MAX_REMEMBERED


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SanDisk", "SanDisk"),
        ("Ultra Fit (2)", "Ultra_Fit_2"),
        ("../../etc/passwd", "etc_passwd"),
        ("..", "instead"),
        ("", "instead"),
        ("\0\n\x1b[31m", "31m"),
        ("-rf", "rf"),
        ("ümläut", "ml_ut"),
        ("x" * 300, "x" * 40),
    ],
)
def test_texts_of_devices_are_made_safe(text: str, expected: str) -> None:
    assert safe(text, "instead") == expected


@given(st.text(), st.text(), st.text(), st.text())
def test_names_by_id_are_plain_file_names_whatever_the_device_says(a: str, b: str, serial: str, port: str) -> None:
    taken: set[str] = set()
    for _ in range(4):
        name = by_id(identity(serial, port), a, b, taken)
        assert name not in taken
        taken.add(name)
        assert os.path.basename(name) == name
        assert name.isascii()
        assert name.isprintable()
        assert not name.startswith((".", "-"))
        assert len(name) < 200
