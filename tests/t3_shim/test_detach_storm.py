"""Unplugged, plugged back, killed and given up at any moment: nobody hangs, and nothing that was said is untrue.

Each program has a file and a directory of its own, and a model of them: the states in which they may be. What succeeds
is so from then on; after an error it may have been done or not, and once that has been seen it stays.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import time
from collections.abc import Callable

import pytest

from tests.t3_shim.program import Program, StillWaiting
from tests.t3_shim.raw_driver import RawDriver
from tests.t3_shim.supervising import Mount, can_mount, mounted
from tests.t3_shim.test_detached import wait_until_the_kernel_knows
from udf.fuse.opcodes import Opcode

pytestmark = can_mount
SECONDS = float(os.environ.get("UDF_STORM_SECONDS", "4"))  # longer by night
SEED = os.environ.get("UDF_STORM_SEED", "")
PROGRAMS = 4
ALLOWED = (errno.ENODEV, errno.EIO)
WHOLE_STEP = 15.0  # seconds in which every program must have its answer once a driver serves

State = tuple[bytes, frozenset[str]]  # what its file has, what is in its directory


class Worker:
    """One program and what it may find."""

    def __init__(self, mount: Mount, number: int, dice: random.Random) -> None:
        self.program: Program = mount.program()
        self._dice = dice
        self._file, self._directory = mount.path(f"file{number}"), mount.path(f"d{number}")
        self._fd = self.program.do("open", self._file, os.O_RDWR)
        self.states: set[State] = {(b"first", frozenset())}
        self._judge: Callable[[object], None] = lambda _: None
        self._counter = itertools.count()
        self.failures = 0
        self.deeds = 0
        self.is_busy = False

    def start(self) -> None:
        """Do something, if nothing is being done."""
        if self.is_busy:
            return
        self.is_busy = True
        self.deeds += 1
        getattr(self, self._dice.choice(("_write", "_write", "_make", "_remove", "_move", "_read", "_list", "_sync")))()

    def end(self, seconds: float) -> None:
        """What became of it. Fails when it cannot be so; raises StillWaiting."""
        if not self.is_busy:
            return
        try:
            result = self.program.wait(seconds)
        except OSError as error:
            result = error
            self.failures += error.errno in ALLOWED
        self.is_busy = False
        self._judge(result)
        assert self.states, f"{self._file}: that cannot be: {result}"

    def settle(self) -> None:
        """See how it is, with nothing in the way; so it has to stay."""
        content = self.program.do("pread", self._fd, 100, 0)
        size = self.program.do("fstat", self._fd)["st_size"]
        names = frozenset(self.program.do("names", self._directory))
        assert size == len(content)
        assert (content, names) in self.states, (self._file, content, names, self.states)
        self.states = {(content, names)}
        for name in ("a", "b", "c"):
            there = self.program.do("exists", f"{self._directory}/{name}")
            assert there == (name in names), f"{self._directory}/{name}: {there}, and listed are {sorted(names)}"

    def _change(self, change: Callable[[State], State], refusals: dict[int, Callable[[State], bool]]) -> None:
        """After success it is as changed; after a refusal it was one in which that is refused; else nobody knows."""

        def judge(result: object) -> None:
            if not isinstance(result, OSError):
                self.states = {change(state) for state in self.states}
            elif result.errno in refusals:
                # It may be refused because what this call began was done after all, so the change is possible too.
                assert any(refusals[result.errno](state) for state in self.states) or len(self.states) > 1
            else:
                assert result.errno in ALLOWED, result
                self.states |= {change(state) for state in self.states}

        self._judge = judge

    def _write(self) -> None:
        data = f"{next(self._counter):05}".encode()
        self._change(lambda state: (data, state[1]), {})
        self.program.start("pwrite", self._fd, data, 0)

    def _make(self) -> None:
        name = self._dice.choice("abc")
        self._change(lambda state: (state[0], state[1] | {name}), {errno.EEXIST: lambda state: name in state[1]})
        self.program.start("mkdir", f"{self._directory}/{name}")

    def _remove(self) -> None:
        name = self._dice.choice("abc")
        self._change(lambda state: (state[0], state[1] - {name}), {errno.ENOENT: lambda state: name not in state[1]})
        self.program.start("rmdir", f"{self._directory}/{name}")

    def _move(self) -> None:
        old, new = self._dice.sample("abc", 2)
        self._change(
            lambda state: (state[0], (state[1] - {old}) | {new}) if old in state[1] else state,
            {errno.ENOENT: lambda state: old not in state[1]},
        )
        self.program.start("rename", f"{self._directory}/{old}", f"{self._directory}/{new}")

    def _read(self) -> None:
        def judge(result: object) -> None:
            if isinstance(result, OSError):
                assert result.errno in ALLOWED, result
            else:
                assert any(result == content for content, _ in self.states), (result, self.states)

        self._judge = judge
        self.program.start("pread", self._fd, 100, 0)

    def _list(self) -> None:
        def judge(result: object) -> None:
            if isinstance(result, OSError):
                assert result.errno in ALLOWED, result
            else:
                assert any(frozenset(result) == names for _, names in self.states), (result, self.states)  # type: ignore[call-overload]

        self._judge = judge
        self.program.start("names", self._directory)

    def _sync(self) -> None:
        self._change(lambda state: state, {})
        self.program.start("fdatasync", self._fd)


class Storm:
    """What happens to the mount meanwhile."""

    def __init__(self, mount: Mount, dice: random.Random) -> None:
        self._mount = mount
        self._dice = dice
        self.deeds = (self.unplug, self.unplug, self.unplug, self.kill, self.give_up, self.refuse, self.flicker)

    def unplug(self) -> None:
        how = {"wait": self._dice.choice((0, 0, 0.2, 60)), "max_stale": self._dice.choice((0, 0.1, 60))}
        self._mount.shim.send({"t": "detach", "text": "unplugged", **how})

    def kill(self) -> None:
        self._mount.driver.stop()

    def give_up(self) -> None:
        self._mount.driver.stop()
        self._mount.shim.send({"t": "fail", "text": "quarantine"})

    def refuse(self) -> None:
        """A driver comes that cannot serve."""
        self.unplug()
        self._mount.driver.stop()
        self._mount.generation += 1
        self._mount.send_attach(lambda driver: None, max_write=4096)

    def flicker(self) -> None:
        """It comes back and is gone again before anybody can have noticed."""
        self.unplug()
        self._mount.driver.stop()
        self._mount.generation += 1
        self._mount.send_attach(lambda driver: None, counted=self._dice.random() < 0.5)
        self.unplug()

    def rest(self) -> None:
        time.sleep(self._dice.choice((0, 0, 0.001, 0.003, 0.15)))

    def over(self) -> None:
        """There is a driver."""
        self._mount.next_driver()


def grow(driver: RawDriver) -> None:
    for number in range(PROGRAMS):
        driver.tree.file(f"file{number}", b"first")
        driver.tree.directory(f"d{number}")


@pytest.mark.parametrize("exclusive", [True, False])
def test_at_any_moment(exclusive):
    seed = int(SEED) if SEED else random.SystemRandom().randrange(1 << 32)
    print(f"UDF_STORM_SEED={seed}")
    dice = random.Random(seed)
    steps = 0

    def slow(driver: RawDriver) -> None:
        """Some requests are not answered, done or not, until the end of this driver."""
        for op in (Opcode.WRITE, Opcode.MKDIR, Opcode.RMDIR, Opcode.RENAME, Opcode.READ):

            def answer(request, op=op):
                lot = dice.random()
                if lot < 0.1:
                    return None
                done = driver.usual(request)
                return None if lot < 0.2 else done

            driver.answers[op] = answer
        driver.tree.valid = 1000.0 if exclusive else 0.05

    with mounted(grow, recover=True, hide=False, exclusive=exclusive, deadline=60.0) as mount:
        workers = [Worker(mount, number, dice) for number in range(PROGRAMS)]
        storm = Storm(mount, dice)
        until = time.monotonic() + SECONDS / 2
        while time.monotonic() < until:
            steps += 1
            slow(mount.driver)
            for _ in range(dice.randrange(1, 6)):
                for worker in workers:
                    worker.start()
                storm.rest()
                if dice.random() < 0.6:
                    dice.choice(storm.deeds)()
                for worker in workers:
                    with contextlib.suppress(StillWaiting):
                        worker.end(0.001)
            storm.over()
            for worker in workers:
                worker.end(WHOLE_STEP)
            wait_until_the_kernel_knows(mount)
            for worker in workers:
                worker.settle()
        counts = mount.counters()
        assert counts["waiting"] == 0
        assert counts["away"] == 0
        assert not mount.shim.said("poison")
        deeds, failures = sum(worker.deeds for worker in workers), sum(worker.failures for worker in workers)
        print(f"{steps} steps, {deeds} operations, of which {failures} failed; {counts}")
