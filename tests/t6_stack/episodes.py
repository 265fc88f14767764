"""What happens to sticks in a week: they are plugged in, worked on, and ejected, pulled, swapped, changed elsewhere.

Owns: the work (with what it has been promised), the ways in which an episode ends, and what must hold afterwards. All
is drawn from one seed. Must never: check a promise by our own driver. Called by: test_week.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.t6_stack.sticks import KIB, Desk, Row, Stick

GRACE = 0.3  # seconds, of the sticks that nobody waits for
IDLE = 20.0  # seconds until a stick that is left alone is clean; it takes 0.35 on a quiet machine
BOUND = 10.0  # seconds for a call that meets the unplug: 1, and what a busy machine needs; a hang takes 30
RULES = f"""
[[volume]]
label = "PATIENT*"
options = {{ grace = "60" }}
[[volume]]
options = {{ grace = "{GRACE}" }}
"""


class Work:
    """A program's doings on one mounted stick. The stick's `files` are what it has been promised so far."""

    def __init__(self, where: Path, stick: Stick, rng: random.Random) -> None:
        self.where = where
        self.stick = stick
        self.rng = rng
        self._number = 0

    def some(self) -> None:
        """A few things, in order."""
        doings = [self.write, self.write, self.write, self.append, self.replace, self.rename, self.remove, self.mkdir]
        for _ in range(self.rng.randrange(1, 7)):
            self.rng.choice(doings)()
        while sum(map(len, self.stick.files.values())) > 1024 * KIB:
            self.remove()

    def look(self) -> None:
        """Everything that was promised can be read."""
        for path, data in self.stick.files.items():
            assert (self.where / path).read_bytes() == data, path

    def fresh(self) -> str:
        """A path that is not taken; its directory may be new."""
        directory = self.rng.choice(["", "", "a directory/", "b/"])
        self.mkdir(directory.rstrip("/"))
        while True:
            self._number += 1
            path = f"{directory}{self.rng.choice(['file', 'A Longer Name', 'ÄÖÜ'])} {self._number}.bin"
            if path not in self.stick.files:
                return path

    def mkdir(self, path: str = "b") -> None:
        """Make a directory, if it is not there."""
        with contextlib.suppress(FileExistsError):
            if path:
                os.mkdir(self.where / path)

    def data(self) -> bytes:
        """Something to write; a close flushes only what was written to."""
        return self.rng.randbytes(self.rng.randrange(1, 1 << self.rng.randrange(1, 17)))

    def write(self) -> None:
        """A new file; a close promises as much as an fsync."""
        path, data = self.fresh(), self.data()
        with open(self.where / path, "xb", buffering=0) as file:
            file.write(data)
            if self.rng.random() < 0.5:
                os.fsync(file.fileno())
                self.stick.flushed()
                self.stick.files[path] = data
        self.stick.flushed()
        self.stick.files[path] = data

    def append(self) -> None:
        """More at the end of a file; what it had stays promised."""
        path, data = self.any(), self.data()
        if path:
            self.stick.growing.add(path)
            with open(self.where / path, "ab", buffering=0) as file:
                file.write(data)
            self.stick.flushed()
            self.stick.files[path] += data
            self.stick.growing.discard(path)

    def replace(self) -> None:
        """A file is written anew; in between nothing is promised of it."""
        path, data = self.any(), self.data()
        if path:
            del self.stick.files[path]
            with open(self.where / path, "wb", buffering=0) as file:
                file.write(data)
            self.stick.flushed()
            self.stick.files[path] = data

    def rename(self) -> None:
        """Another name, perhaps in another directory; under one of them it is there at any time."""
        old, new = self.any(), self.fresh()
        if old:
            self.stick.renames(old, new)
            os.rename(self.where / old, self.where / new)
            self.stick.renamed(old, new)

    def remove(self) -> None:
        """A file goes."""
        path = self.any()
        if path:
            del self.stick.files[path]
            os.unlink(self.where / path)

    def any(self) -> str:
        """One of the files, or none."""
        return self.rng.choice(sorted(self.stick.files)) if self.stick.files else ""


class Writer(threading.Thread):
    """A program that writes and syncs until its stick goes; `error` is what it was told then, `took` how late."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work
        self.error: OSError | None = None
        self.wrong: BaseException | None = None
        self.took = 0.0
        self.busy = threading.Event()  # it has written something

    def run(self) -> None:
        began = time.monotonic()
        try:
            while True:
                began = time.monotonic()
                self.work.rng.choice([self.work.write, self.work.append, self.work.rename])()
                self.busy.set()
                began = time.monotonic()
                self.work.remove()
        except OSError as error:
            self.error, self.took = error, time.monotonic() - began
        except BaseException as error:
            self.wrong = error
        finally:
            self.busy.set()


class Week:
    """A few sticks, one daemon that mounts by itself, and one episode after the other."""

    def __init__(self, desk: Desk, media: Path, sticks: list[Stick], rng: random.Random) -> None:
        self.desk = desk
        self.media = media
        self.sticks = sticks
        self.rng = rng
        self.told: dict[str, int] = {}
        self._row: Row = {}

    def episode(self) -> str:
        """One: what it was."""
        stick = self.rng.choice(self.sticks)
        patient = stick.label.startswith("PATIENT")
        endings: list[Callable[[Stick, Work], None]] = [self.ejected, self.changed_elsewhere]
        endings += [self.put_back, self.given_up] if patient else [self.pulled_idle, self.pulled_busy, self.swapped]
        ending = self.rng.choice(endings)
        word = f"{stick.label}, {ending.__name__}"
        mark = self.desk.mark()
        work = self._plugged(stick, Work)
        try:
            work.look()
            work.some()
            ending(stick, work)
            self._told(mark, *_REASONS[ending.__name__])
        except BaseException as error:
            error.add_note(
                f"{word}; told: {[(e['kind'], e['name'], e['reason'], e['text']) for e in self._since(mark)]}"
            )
            raise
        self.desk.unplug(stick)
        self.desk.nothing_is_left()
        self.desk.until(lambda: not self.directories(), "the directories of mounts are gone")
        return word

    def directories(self) -> list[str]:
        """What is in the directory of mounts, but for the daemon's own records."""
        return [path.name for path in self.media.iterdir() if not path.name.startswith(".udf-")]

    # ---- how it ends

    def ejected(self, stick: Stick, work: Work) -> None:
        """By `udf eject`: all is on the stick, before it is pulled out."""
        assert "may be pulled out" in self.desk.eject(self._row["name"])
        stick.check(clean=True, why="ejected")

    def pulled_idle(self, stick: Stick, work: Work) -> None:
        """Nobody has done anything for a moment: it is clean, although nobody said so."""
        end = time.monotonic() + IDLE
        while found := stick.complaints():
            assert time.monotonic() < end, f"it is not clean after {IDLE} s: {found}"
            time.sleep(0.02)  # that is what being idle means
        self.desk.unplug(stick)
        stick.check(clean=True, why="pulled while idle")

    def pulled_busy(self, stick: Stick, work: Work) -> None:
        """In the middle of writing: what was promised is there."""
        self._pull_from_writer(stick, work)
        self._check_pulled(stick)

    def swapped(self, stick: Stick, work: Work) -> None:
        """Another one is put in instead: it is another one, and nothing of the first is written to it."""
        if self.rng.random() < 0.5:
            self._pull_from_writer(stick, work)
        self.desk.unplug(stick)
        self._check_pulled(stick)
        other = self.rng.choice([each for each in self.sticks if each is not stick])
        theirs = self._plugged(other, Work)
        theirs.look()
        theirs.some()
        assert "may be pulled out" in self.desk.eject(self._row["name"])
        other.check(clean=True, why=f"ejected, after {stick.label} was pulled out")
        self.desk.unplug(other)

    def changed_elsewhere(self, stick: Stick, work: Work) -> None:
        """It comes back, but another computer has written to it: not a bit of what it was goes on."""
        held = self._hold(work)
        self.desk.unplug(stick)
        self._check_pulled(stick)
        stick.put(f"elsewhere {self.rng.randrange(1000)}.txt", self.rng.randbytes(5000))
        before = stick.found()
        again = self._plugged(stick, Work)
        again.look()
        with contextlib.suppress(OSError):
            os.close(held)
        assert "may be pulled out" in self.desk.eject(self._row["name"])
        stick.check(clean=True, why="changed elsewhere")
        assert stick.found() == before, "nothing but what the other computer has left"

    def put_back(self, stick: Stick, work: Work) -> None:
        """It comes back as it was: files that are open go on, also with what was not synced."""
        path, data = work.fresh(), work.data()
        held = os.open(work.where / path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            assert os.write(held, data) == len(data)
            self.desk.faults(stick, "unplug at=1 count=1")
            mark = self.desk.mark()
            if self.rng.random() < 0.5:
                with contextlib.suppress(OSError):
                    os.fsync(held)
            self.desk.until(lambda: self._has(mark, "DETACHED"), "it was pulled out")
            self.desk.replug(stick)
            self.desk.until_state(work.where, "ACTIVE")
            assert os.pread(held, len(data) + 1, 0) == data, "what was acknowledged is still there"
            assert os.write(held, b"and more") == 8
            os.fsync(held)
        finally:
            os.close(held)
        stick.files[path] = data + b"and more"
        work.look()
        work.some()
        assert "may be pulled out" in self.desk.eject(self._row["name"])
        stick.check(clean=True, why="put back")

    def given_up(self, stick: Stick, work: Work) -> None:
        """It will not come back, says the person, and unmounts it."""
        held = self._hold(work)
        try:
            self.desk.unplug(stick)
            self.desk.until_state(work.where, "DETACHED")
            self._check_pulled(stick)
            self.desk.umount(work.where, lazy=held >= 0)
        finally:
            with contextlib.suppress(OSError):
                os.close(held)

    # ---- parts of that

    def _plugged(self, stick: Stick, worker: type[Work]) -> Work:
        # Of what its cache had not flushed, a pulled stick has lost all, or some.
        row = self.desk.plug(stick, keep=self.rng.choice(["0", "0.5"]), seed=str(self.rng.randrange(1000)))
        assert row["state"] == "bound", row
        self._row = row["instances"][0]
        places = [each["mountpoint"] for each in self._row["volumes"] if each["mountpoint"]]
        assert len(places) == 1, row
        where = Path(places[0])
        assert where.parent == self.media
        return worker(where, stick, self.rng)

    def _hold(self, work: Work) -> int:
        """A file that is open while the stick goes, or none."""
        path = work.any()
        return os.open(work.where / path, os.O_RDWR) if path and self.rng.random() < 0.7 else -1

    def _pull_from_writer(self, stick: Stick, work: Work) -> None:
        writer = Writer(work)
        writer.start()
        writer.busy.wait(40)
        self.desk.faults(stick, f"unplug at={self.rng.randrange(1, 60)} count=1")
        writer.join(60)
        assert not writer.is_alive(), "a program hangs"
        assert writer.wrong is None, writer.wrong
        assert writer.error is not None
        assert writer.error.errno == errno.ENODEV, writer.error
        assert writer.took < BOUND, f"it was told after {writer.took:.2f} s"

    def _check_pulled(self, stick: Stick) -> None:
        """What was promised is on it; then it is repaired, and what is on it now is what is on it."""
        stick.check(clean=False, why="pulled")
        self.desk.unplug(stick)
        stick.repair()
        stick.restart()

    # ---- what is told

    def _since(self, mark: int) -> list[Row]:
        return [event for event in self.desk.events(mark) if event["kind"] in ("mount", "block", "device")]

    def _has(self, mark: int, state: str) -> bool:
        return any(event["kind"] == "mount" and event["state"] == state for event in self._since(mark))

    def _told(self, mark: int, *reasons: str) -> None:
        """A person who reads the events knows what has happened, in a sentence. Reasons may have alternatives."""

        def said() -> list[str]:
            return [event["reason"] for event in self._since(mark) if event["kind"] == "mount"]

        self.desk.until(
            lambda: all(set(each.split("|")) & set(said()) for each in reasons), f"people are told {reasons}"
        )
        for event in self._since(mark):
            if event["kind"] == "mount" and event["reason"] in "|".join(reasons) and event["what"] == "state":
                text = str(event["text"])
                assert text, event
                assert len(text.splitlines()) == 1, event
                assert len(text) < 300, event
                assert "Errno" not in text, event
                self.told[event["reason"]] = self.told.get(event["reason"], 0) + 1


# What a person must have been told of the mount.
_REASONS = {
    "ejected": ("operator",),
    "pulled_idle": ("unplugged", "expired"),
    "pulled_busy": ("unplugged", "expired"),
    "swapped": ("unplugged", "expired|changed"),  # it was not waited for, or another came in its place
    "changed_elsewhere": ("unplugged", "expired|changed"),
    "put_back": ("unplugged", "reattached"),
    "given_up": ("unplugged", "operator"),
}
