"""A stick is pulled out at each of its transfers while a program copies from it and to it, and put back again.

Bounded: whatever waits is told ENODEV within a second. True: what fsync has said is on the stick as it was pulled out,
after `fsck.fat -a`. And not in vain: put back, the program goes on with the files that it has open, and all is there.
`UDF_UNPLUG_FULL=1` takes every transfer, otherwise a few of them, others for each `UDF_UNPLUG_SEED`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import make_runtime_dir
from tests.t5_cli.conftest import running_daemon
from tests.t6_stack.sticks import KIB, Desk, Stick

FULL = bool(os.environ.get("UDF_UNPLUG_FULL"))
SEED = int(os.environ.get("UDF_UNPLUG_SEED", "1"))
SAMPLE = 6
CHUNK = 16 * KIB
BOUND = 1.0  # seconds, from the unplug to the end of a call
SLACK = 9.0  # of a machine that does other things too; a hang is a matter of 30 seconds
AWAY = 0.2  # seconds, in which nobody notices anything who waits
MOST = 2000  # transfers of the whole copy; more of them are a mistake

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount with all options")


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    with make_runtime_dir() as directory, running_daemon(directory) as running:
        desk = Desk(running)
        running.udf.done("plug", "thermometer", "--name", "first")  # the emulator is there before any of the tests
        running.udf.done("unplug", "first")
        try:
            yield desk
        finally:
            desk.close()


@pytest.fixture
def pristine(tmp_path: Path) -> Stick:
    """A stick with something to read on it."""
    stick = Stick.made(tmp_path / "pristine.img", "TRAVEL")
    stick.put("from.bin", random.Random(SEED).randbytes(10 * CHUNK - 100))
    stick.put("album/small.txt", b"small\n")
    return stick


class Copying:
    """A program that copies, one system call a step. After an error it can go on with the step that failed."""

    def __init__(self, root: Path, stick: Stick, rng: random.Random) -> None:
        self.root = root
        self.stick = stick
        self.slowest = 0.0  # of the calls that failed
        self._done = 0
        self._open: dict[str, int] = {}
        big, second = rng.randbytes(8 * CHUNK + 1000), rng.randbytes(2 * CHUNK)
        self._steps: list[Callable[[], object]] = [
            lambda: self._begin("from.bin", os.O_RDONLY),
            *self._reads("from.bin", stick.files["from.bin"]),
            lambda: self._begin("to.bin", os.O_RDWR | os.O_CREAT),
            *self._writes("to.bin", big),
            lambda: self._sync("to.bin", big),
            lambda: self._mkdir("sub"),
            lambda: self._begin("sub/a second one.bin", os.O_RDWR | os.O_CREAT),
            *self._writes("sub/a second one.bin", second),
            lambda: self._sync("sub/a second one.bin", second),
            lambda: self._rename("sub/a second one.bin", "sub/third.bin"),
            lambda: self._begin("album/small.txt", os.O_RDONLY),
            *self._reads("album/small.txt", b"small\n"),
        ]

    def run(self) -> OSError | None:
        """Go on until all is done (None) or a call fails."""
        while self._done < len(self._steps):
            began = time.monotonic()
            try:
                self._steps[self._done]()
            except OSError as error:
                self.slowest = max(self.slowest, time.monotonic() - began)
                return error
            self._done += 1
        return None

    def close(self) -> None:
        """Close what it has open; an error of that is of no interest."""
        for fd in self._open.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        self._open.clear()

    @property
    def progress(self) -> str:
        """For messages."""
        return f"step {self._done} of {len(self._steps)}"

    def _begin(self, name: str, flags: int) -> None:
        self._open[name] = os.open(self.root / name, flags, 0o644)

    def _reads(self, name: str, data: bytes) -> list[Callable[[], object]]:
        return [lambda at=at: self._read(name, at, data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)]  # type: ignore[misc]

    def _writes(self, name: str, data: bytes) -> list[Callable[[], object]]:
        return [lambda at=at: self._write(name, at, data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)]  # type: ignore[misc]

    def _read(self, name: str, at: int, data: bytes) -> None:
        assert os.pread(self._open[name], len(data), at) == data, (name, at)

    def _write(self, name: str, at: int, data: bytes) -> None:
        assert os.pwrite(self._open[name], data, at) == len(data), (name, at)

    def _sync(self, name: str, data: bytes) -> None:
        os.fsync(self._open[name])
        self.stick.flushed()
        self.stick.files[name] = data

    def _mkdir(self, name: str) -> None:
        with contextlib.suppress(FileExistsError):  # it was there before the error
            os.mkdir(self.root / name)

    def _rename(self, old: str, new: str) -> None:
        self.stick.renames(old, new)
        try:
            os.rename(self.root / old, self.root / new)
        except FileNotFoundError:
            os.stat(self.root / new)
        self.stick.renamed(old, new)


def numbers(finished: Callable[[], int]) -> Iterator[int]:
    """The transfers to try. `finished()` says how often in a row the copy was over before it was pulled out."""
    if FULL:
        for number in range(1, MOST):
            if finished() > 2:
                return
            yield number
        pytest.fail("it never ends")
    rng = random.Random(SEED)
    yield from sorted({rng.randrange(1, 160) for _ in range(SAMPLE)})


class Trial:
    """The copy on a fresh copy of a stick, which is pulled out at one transfer after another."""

    def __init__(self, desk: Desk, pristine: Stick, tmp_path: Path, **options: str) -> None:
        self.desk = desk
        self.pristine = pristine
        self.root = tmp_path / "mnt"
        self.options = options
        self.met: list[int] = []
        self.slowest = 0.0
        self.finished = 0
        self._image = tmp_path / "stick.img"

    @contextlib.contextmanager
    def with_fault(self, fault: str) -> Iterator[Copying]:
        """The stick is in and mounted, and the fault waits for the next transfers; all is away afterwards."""
        stick = self.pristine.copy(self._image)
        stick.name = "travel"
        disk = self.desk.disk(self.desk.plug(stick))
        self.desk.mount(f"{disk}/{stick.export}", self.root, **self.options)
        program = Copying(self.root, stick, random.Random(SEED))
        try:
            self.desk.faults(stick, fault)
            yield program
        finally:
            program.close()
            with contextlib.suppress(Exception):
                self.desk.umount(self.root, lazy=True)
            self.desk.unplug(stick)
        self.desk.until_state(self.root, "GONE")
        self.root.rmdir()

    def finish(self, program: Copying, why: str) -> None:
        """The rest of the copy, in order to its end, and what is then on the stick."""
        error = program.run()
        assert error is None, (why, program.progress, error)
        program.close()
        self.desk.umount(self.root)
        self.desk.unplug(program.stick)
        program.stick.check(clean=True, why=why)


@pytest.mark.timeout(4 * MOST if FULL else 120)
def test_a_copy_that_a_pulled_stick_interrupts_is_finished_when_it_is_back(
    desk: Desk, pristine: Stick, tmp_path: Path
) -> None:
    trial = Trial(desk, pristine, tmp_path, grace="30")
    for number in numbers(lambda: trial.finished):
        why = f"unplug at={number}"
        with trial.with_fault(f"{why} count=1") as program:
            error = program.run()
            trial.finished = 0 if error else trial.finished + 1
            if error is not None:
                assert error.errno == errno.ENODEV, (why, program.progress, error)
                trial.met.append(number)
                program.stick.check(clean=False, why=why)
                desk.until_state(trial.root, "DETACHED")
                desk.replug(program.stick)
                desk.until_state(trial.root, "ACTIVE")
            else:
                desk.faults(program.stick)
            trial.finish(program, why)
            trial.slowest = max(trial.slowest, program.slowest)
    print(f"met at {trial.met}; the slowest call that failed took {trial.slowest:.2f} s")
    assert trial.met, "no unplug met the program"
    assert trial.slowest < BOUND + SLACK
    desk.nothing_is_left()


@pytest.mark.timeout(4 * MOST if FULL else 120)
def test_a_copy_that_waits_for_its_stick_never_notices(desk: Desk, pristine: Stick, tmp_path: Path) -> None:
    trial = Trial(desk, pristine, tmp_path, grace="30", on_unplug="wait:20s")
    for number in numbers(lambda: trial.finished):
        why = f"unplug at={number}"
        with trial.with_fault(f"{why} count=1 back={AWAY * 1000:.0f}") as program:
            began = desk.mark()
            error = program.run()
            assert error is None, (why, program.progress, error)
            if any(event["state"] == "DETACHED" for event in desk.events(began)):
                trial.met.append(number)
                trial.finished = 0
            else:
                trial.finished += 1
                desk.faults(program.stick)
            trial.finish(program, why)
    print(f"met at {trial.met}")
    assert trial.met, "no unplug met the program"
    desk.nothing_is_left()
