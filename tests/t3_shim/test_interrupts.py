"""Signals to programs that wait for the driver, and answers that come too late."""

from __future__ import annotations

import errno
import os
import signal
import time

import pytest

from tests.t3_shim.program import PATIENCE
from tests.t3_shim.raw_driver import RawDriver
from tests.t3_shim.supervising import Mount, can_mount, mounted
from tests.t3_shim.test_lookup_counts import nothing_is_held
from udf.fuse import structs
from udf.fuse.flags import Fopen
from udf.fuse.opcodes import Opcode

pytestmark = can_mount
AT_ONCE = 8.0  # seconds: less than the deadline of 20, more than a busy machine takes


def grow(driver: RawDriver) -> None:
    driver.tree.file("file", b"data")
    driver.tree.file("other", b"other")
    below = driver.tree.directory("d").ino
    driver.tree.file("inner", b"", parent=below)
    driver.tree.file("inner2", b"more", parent=below)


def grow_direct(driver: RawDriver) -> None:
    """Reads of the page cache wait for pages: no signal but a fatal one reaches them, and no INTERRUPT comes of it."""
    grow(driver)
    driver.tree.fopen = int(Fopen.DIRECT_IO)


def killed_in(mount: Mount, op: int, call: str, name: str, *args: object) -> float:
    """Kill a program with SIGKILL while this waits for the driver; how long it took to end."""
    program = mount.program()
    mount.driver.hold(op)
    program.start(call, mount.path(name), *args)
    mount.driver.wait_for(op)
    began = time.monotonic()
    program.signal(signal.SIGKILL)
    assert program.ended()
    return time.monotonic() - began


PURE = {
    Opcode.READ: ("slurp", "file"),
    Opcode.LOOKUP: ("stat", "missing"),
    Opcode.GETATTR: ("stat", ""),
    Opcode.OPEN: ("slurp", "other"),
    Opcode.OPENDIR: ("names", "d"),
    Opcode.READDIRPLUS: ("names", "d"),
    Opcode.GETXATTR: ("getxattr", "file", "user.x"),
    Opcode.STATFS: ("statfs", ""),
}


@pytest.mark.parametrize("op", PURE, ids=lambda op: op.name)
def test_a_killed_reader_ends_at_once(op):
    with mounted(grow) as mount:
        assert killed_in(mount, op, *PURE[op]) < AT_ONCE
        mount.driver.answers.clear()
        assert mount.do("slurp", "d/inner2") == b"more"  # the page of a READ under way stays locked in the kernel


def test_a_killed_reader_ends_at_once_while_its_file_is_being_opened():
    with mounted(grow, open="lazy") as mount:
        assert killed_in(mount, Opcode.OPEN, "slurp", "file") < AT_ONCE
        mount.driver.answers.clear()
        assert mount.do("direct_read", "file") == b"data"


def test_a_killed_reader_ends_at_once_after_a_signal_that_it_handled_while_its_file_was_being_opened():
    """The kernel sends one INTERRUPT for a request: it was forgotten when the READ followed the OPEN."""
    with mounted(grow_direct) as mount:
        driver, program = mount.driver, mount.program()
        mount.do("slurp", "file")
        driver.forget_log()
        driver.hold(Opcode.OPEN, Opcode.READ)
        program.start("interruptible_read", mount.path("file"))
        request = driver.wait_for(Opcode.OPEN)
        program.signal(signal.SIGUSR1)
        until = time.monotonic() + PATIENCE
        while not mount.counters()["interrupts"]:
            assert time.monotonic() < until
        driver.reply(request, driver.usual(request))
        assert program.wait() == errno.EINTR


def test_a_handled_signal_gives_eintr_after_a_grace():
    with mounted(grow_direct) as mount:
        driver, program = mount.driver, mount.program()
        driver.hold(Opcode.READ)
        program.start("interruptible_read", mount.path("file"))
        request = driver.wait_for(Opcode.READ)
        began = time.monotonic()
        program.signal(signal.SIGUSR1)
        assert program.wait() == errno.EINTR
        assert time.monotonic() - began > 0.15
        interrupt = driver.wait_for(Opcode.INTERRUPT)
        assert interrupt.fields(structs.INTERRUPT_IN)["unique"] == request.unique
        driver.reply(request, b"late")
        driver.answers.clear()
        assert mount.do("slurp", "file") == b"data"
        assert not mount.faults()


def test_a_prompt_answer_is_better_than_eintr():
    with mounted(grow_direct) as mount:
        driver, program = mount.driver, mount.program()
        driver.hold(Opcode.READ)
        for attempt in range(1, 21):
            program.start("interruptible_read", mount.path("file"))
            request = driver.wait_for(Opcode.READ, attempt)
            program.signal(signal.SIGUSR1)
            driver.wait_for(Opcode.INTERRUPT, attempt)
            driver.reply(request, b"data")
            if program.wait() == 0:
                return
        raise AssertionError("never within the grace")  # once a busy machine may not be prompt


@pytest.mark.parametrize("answer", [errno.EAGAIN, errno.ENOSYS, b"", b"nonsense"])
def test_an_answer_to_an_interrupt_means_nothing(answer):
    with mounted(grow_direct) as mount:
        driver, program = mount.driver, mount.program()
        driver.hold(Opcode.READ)
        program.start("interruptible_read", mount.path("file"))
        driver.wait_for(Opcode.READ)
        program.signal(signal.SIGUSR1)
        driver.reply(driver.wait_for(Opcode.INTERRUPT), answer)
        assert program.wait() == errno.EINTR
        assert not mount.faults()


def test_a_driver_may_answer_eintr_itself():
    with mounted(grow_direct) as mount:
        driver, program = mount.driver, mount.program()
        driver.hold(Opcode.READ)
        program.start("interruptible_read", mount.path("file"))
        request = driver.wait_for(Opcode.READ)
        program.signal(signal.SIGUSR1)
        driver.wait_for(Opcode.INTERRUPT)
        driver.reply(request, errno.EINTR)
        assert program.wait() == errno.EINTR


CHANGES = {  # in a directory of their own, which the kernel locks meanwhile
    Opcode.MKDIR: ("mkdir", "d/new"),
    Opcode.CREATE: ("spill", "d/new", b""),
    Opcode.UNLINK: ("unlink", "d/inner"),
    Opcode.SETATTR: ("chmod", "d/inner", 0o600),
    Opcode.WRITE: ("spill", "d/inner", b"w"),
}


@pytest.mark.parametrize("op", CHANGES, ids=lambda op: op.name)
def test_a_change_waits_for_its_answer_even_when_its_program_is_killed(op):
    with mounted(grow) as mount:
        driver, program = mount.driver, mount.program()
        driver.hold(op)
        call, name, *args = CHANGES[op]
        program.start(call, mount.path(name), *args)
        request = driver.wait_for(op)
        program.signal(signal.SIGKILL)
        driver.wait_for(Opcode.INTERRUPT)
        assert not program.ended(0.6), "nobody knows whether it was done"
        assert mount.do("slurp", "file") == b"data", "others go on, in other directories"
        driver.reply(request, driver.usual(request))
        assert program.ended()
        driver.answers.clear()
        nothing_is_held(mount)


# ---- late


LATE = {
    Opcode.LOOKUP: ("stat", "file"),
    Opcode.MKDIR: ("mkdir", "new"),
    Opcode.CREATE: ("spill", "new", b""),
    Opcode.LINK: ("link_to", "file", "new"),
    Opcode.SYMLINK: ("symlinked", "new"),
    Opcode.UNLINK: ("unlink", "file"),
    Opcode.RENAME: ("rename_to", "file", "new"),
    Opcode.OPEN: ("slurp", "file"),
    Opcode.OPENDIR: ("names", "d"),
    Opcode.READDIRPLUS: ("names", ""),
    Opcode.READ: ("direct_read", "file"),
    Opcode.WRITE: ("spill", "file", b"w"),
    Opcode.SETATTR: ("chmod", "file", 0o600),
}


@pytest.mark.parametrize("op", LATE, ids=lambda op: op.name)
def test_what_a_late_answer_did_is_settled(op):
    """Look-ups that it gave go back, a handle that it opened is closed, a name that it made is there."""
    with mounted(grow, deadline=1.0) as mount:
        driver = mount.driver
        driver.hold(op)
        call, name, *args = LATE[op]
        assert mount.fails(call, name, *args) == errno.ETIMEDOUT
        driver.answer_late()
        assert [fault for fault in mount.faults() if "no answer" not in fault[1]] == []
        mount.do("walk")
        wanted = {"d", "other", *(() if op in (Opcode.UNLINK, Opcode.RENAME) else ("file",))}
        wanted |= {"new"} if op in (Opcode.MKDIR, Opcode.CREATE, Opcode.LINK, Opcode.SYMLINK, Opcode.RENAME) else set()
        assert set(mount.do("names")) == wanted
        for name in wanted:
            mount.do("stat", name)
        nothing_is_held(mount)


@pytest.mark.parametrize("op", [Opcode.LOOKUP, Opcode.CREATE, Opcode.MKDIR], ids=lambda op: op.name)
def test_a_late_answer_about_a_directory_that_is_forgotten_is_given_back(op):
    """The driver counted a look-up for ever, and a handle stayed open."""
    with mounted(grow, deadline=1.0) as mount:
        driver = mount.driver
        call, name, args = {
            Opcode.LOOKUP: ("stat", "d/inner", ()),
            Opcode.CREATE: ("spill", "d/new", (b"",)),
            Opcode.MKDIR: ("mkdir", "d/new", ()),
        }[op]
        mount.do("stat", "d")
        driver.hold(op)
        assert mount.fails(call, name, *args) == errno.ETIMEDOUT
        for _ in range(5):
            mount.usual.do("drop_caches")
        assert mount.counters()["kernel_lookups"] == 0
        driver.answer_late()
        nothing_is_held(mount)


# ---- deadlines


OPERATIONS = {
    **PURE,
    **CHANGES,
    Opcode.FSYNC: ("fsync", "file"),
    Opcode.READLINK: ("readlink", "pointer"),
    Opcode.FLUSH: ("spill", "file", b"w"),
    Opcode.SETXATTR: ("setxattr", "file", "user.x", b"x"),
}


def test_nothing_waits_longer_than_the_deadline():
    def prepare(driver: RawDriver) -> None:
        grow(driver)
        driver.tree.add(1, b"pointer", 0o120777, b"file")
        driver.tree.valid = 0.0

    with mounted(prepare, deadline=3.0) as mount:
        programs = []
        for op, (_, name, *_) in OPERATIONS.items():
            program = mount.program()
            if name not in ("missing", "d/new"):
                program.do("access_open" if op == Opcode.READ else "stat", mount.path(name))
            programs.append((op, program))
        mount.driver.hold(*(op for op in OPERATIONS if op not in (Opcode.LOOKUP, Opcode.GETATTR)))
        mount.driver.answers[Opcode.LOOKUP] = lambda q: None if q.names()[0] == b"missing" else mount.driver.usual(q)
        for op, program in programs:
            call, name, *args = OPERATIONS[op]
            if op not in (Opcode.GETATTR, Opcode.STATFS):
                program.start(call, mount.path(name), *args)
        began = time.monotonic()
        for op, program in programs:
            if op in (Opcode.GETATTR, Opcode.STATFS):
                continue
            with pytest.raises(OSError) as caught:
                program.wait()
            assert caught.value.errno == errno.ETIMEDOUT, op.name
        assert time.monotonic() - began < 20, "one after the other"
        mount.driver.answers.clear()
        assert mount.do("slurp", "file")[1:] == b"ata"
        assert mount.counters()["waiting"] == 0


def test_statfs_comes_from_the_cache_when_the_driver_does_not_answer():
    with mounted(grow, deadline=2.0) as mount:
        known = mount.do("statfs")
        mount.driver.hold(Opcode.STATFS)
        assert mount.do("statfs") == known
        assert mount.counters()["timeouts"] == 1
        assert [op for op, _ in mount.faults()] == ["STATFS"]


def test_statfs_that_was_never_answered_times_out():
    with mounted(grow, deadline=0.5) as mount:
        mount.driver.hold(Opcode.STATFS)
        assert mount.fails("statfs") == errno.ETIMEDOUT


def test_a_handle_whose_open_is_never_answered_times_out_for_each_reader():
    with mounted(grow, deadline=1.5, open="lazy") as mount:
        mount.driver.hold(Opcode.OPEN)
        fd = mount.do("open", "file", os.O_RDONLY)
        for _ in range(2):
            assert mount.usual.fails("pread", fd, 4, 0) == errno.ETIMEDOUT
        mount.driver.answer_late()
        assert mount.usual.do("pread", fd, 4, 0) == b"data"
        mount.usual.do("close", fd)
        nothing_is_held(mount)
