"""Opens that the shim answers by itself: the driver's own follows when it is needed, once, and in time."""

from __future__ import annotations

import errno
import os

import pytest

from tests.t3_shim.raw_driver import RawDriver
from tests.t3_shim.supervising import can_mount, mounted
from tests.t3_shim.test_lookup_counts import nothing_is_held
from udf.fuse import structs
from udf.fuse.opcodes import Opcode

pytestmark = can_mount


def grow(driver: RawDriver) -> None:
    driver.tree.file("file", b"first")
    driver.tree.file("other", b"second")
    directory = driver.tree.directory("d")
    driver.tree.file("f", b"x", parent=directory.ino)


def test_an_open_that_nothing_follows_never_reaches_the_driver():
    with mounted(grow, open="lazy") as mount:
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
            fd = mount.do("open", "file", flags)
            mount.usual.do("fstat", fd)
            mount.usual.do("close", fd)
        assert mount.driver.count(Opcode.OPEN, Opcode.RELEASE, Opcode.FLUSH) == 0
        assert mount.counters()["open_hits"] == 3


def test_known_means_that_the_driver_has_accepted_this_kind_of_open():
    with mounted(grow, open="known") as mount:
        for flags, opens in ((os.O_RDONLY, 1), (os.O_RDONLY, 1), (os.O_WRONLY, 2), (os.O_RDWR, 2), (os.O_WRONLY, 2)):
            mount.usual.do("close", mount.do("open", "file", flags))
            assert mount.driver.count(Opcode.OPEN) == opens
        mount.usual.do("close", mount.do("open", "other", os.O_RDWR))
        assert mount.driver.count(Opcode.OPEN) == 3, "another file is not known"


def test_a_refused_open_stays_refused():
    with mounted(grow, open="known") as mount:
        mount.driver.answers[Opcode.OPEN] = lambda q: errno.EACCES
        for _ in range(2):
            assert mount.fails("open", "file", os.O_RDONLY) == errno.EACCES
        assert mount.driver.count(Opcode.OPEN) == 2


def test_a_manifest_can_opt_out():
    with mounted(grow, open="driver") as mount:
        for _ in range(3):
            mount.usual.do("close", mount.do("open", "file", os.O_RDONLY))
        assert mount.driver.count(Opcode.OPEN) == 3


def test_the_drivers_open_has_no_flags_that_would_do_something_twice():
    with mounted(grow, open="lazy") as mount:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
        fd = mount.do("open", "file", flags)
        mount.usual.do("write", fd, b"appended")
        mount.usual.do("close", fd)
        (request,) = [request for request in mount.driver.log if request.op == Opcode.OPEN]
        sent = request.fields(structs.OPEN_IN)["flags"]
        assert sent & os.O_ACCMODE == os.O_RDWR
        assert not sent & (os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_APPEND | os.O_DIRECT)
        assert mount.do("slurp", "file") == b"appended"


REMOVALS = {
    "unlink": (("unlink", "file"), Opcode.UNLINK),
    "rename over": (("rename_to", "other", "file"), Opcode.RENAME),
    "exchange": (("renamed_2", "other", "file"), Opcode.RENAME2),
}


@pytest.mark.parametrize("what", REMOVALS)
def test_a_name_that_goes_is_opened_first_for_those_who_have_it_open(what):
    (call, name, *args), op = REMOVALS[what]
    with mounted(grow, open="lazy") as mount:
        fds = [mount.do("open", "file", os.O_RDONLY) for _ in range(3)]
        mount.do(call, name, *args)
        order = [request.op for request in mount.driver.log if request.op in (Opcode.OPEN, op)]
        assert order == [Opcode.OPEN] * 3 + [op]
        for fd in fds:
            assert mount.usual.do("pread", fd, 10, 0) == b"first"
            assert mount.usual.do("fstat", fd)["st_size"] == 5
            mount.usual.do("close", fd)
        nothing_is_held(mount)


def test_a_name_goes_even_when_the_driver_does_not_open_it():
    with mounted(grow, open="lazy") as mount:
        mount.driver.answers[Opcode.OPEN] = lambda q: errno.EMFILE
        fd = mount.do("open", "file", os.O_RDONLY)
        mount.do("unlink", "file")
        assert mount.fails("stat", "file") == errno.ENOENT
        assert mount.usual.fails("pread", fd, 10, 0) == errno.EMFILE
        mount.usual.do("close", fd)
        nothing_is_held(mount)


def test_another_name_that_goes_opens_nothing_of_others():
    with mounted(grow, open="lazy") as mount:
        fd = mount.do("open", "file", os.O_RDONLY)
        mount.do("unlink", "other")
        mount.do("rename_to", "d", "e")
        assert mount.driver.count(Opcode.OPEN) == 0
        mount.usual.do("close", fd)


def test_many_readers_of_one_handle_open_it_once():
    with mounted(grow, open="lazy") as mount:
        driver = mount.driver
        driver.hold(Opcode.OPEN)
        mount.usual.start("direct_readers", mount.path("file"), 6)
        request = driver.wait_for(Opcode.OPEN)
        for _ in range(200):
            if mount.counters()["waiting"] == 6:
                break
        driver.reply(request, driver.usual(request))
        assert mount.usual.wait() == [b"first"] * 6
        assert driver.count(Opcode.OPEN) == 1
        driver.wait_for(Opcode.RELEASE)
        nothing_is_held(mount)


def test_many_readers_of_one_handle_get_its_errno_each():
    with mounted(grow, open="lazy") as mount:
        mount.driver.answers[Opcode.OPEN] = lambda q: errno.EACCES
        fd = mount.do("open", "file", os.O_RDONLY)
        for _ in range(3):
            assert mount.usual.fails("pread", fd, 10, 0) == errno.EACCES
        mount.driver.answers.clear()
        assert mount.usual.do("pread", fd, 10, 0) == b"first"
        mount.usual.do("close", fd)


@pytest.mark.parametrize("answer", [errno.EIO, b"", b"x" * 15, b"x" * 17, bytes(100_000)])
def test_a_bad_answer_to_the_open_is_the_readers_errno(answer):
    with mounted(grow, open="lazy") as mount:
        mount.driver.answers[Opcode.OPEN] = lambda q: answer
        fd = mount.do("open", "file", os.O_RDONLY)
        assert mount.usual.fails("pread", fd, 10, 0) == errno.EIO
        mount.driver.answers.clear()
        assert mount.usual.do("pread", fd, 10, 0) == b"first"
        mount.usual.do("close", fd)
        assert len(mount.faults()) == (0 if isinstance(answer, int) else 1)


def test_a_handle_that_is_closed_while_it_is_being_opened_is_released():
    with mounted(grow, open="lazy") as mount:
        driver, reader = mount.driver, mount.program()
        driver.hold(Opcode.OPEN)
        reader.start("slurp", mount.path("file"))
        request = driver.wait_for(Opcode.OPEN)
        reader.signal(9)
        assert reader.ended()
        driver.answers.clear()
        driver.reply(request, driver.usual(request))
        driver.wait_for(Opcode.RELEASE)
        nothing_is_held(mount)


WITH_HANDLES = {
    "fsync": ("fsync", "file"),
    "lseek": ("lseek", "file", 0, os.SEEK_DATA),
    "fallocate": ("punch", "file", 0),
    "ioctl": ("ioctl", "file", 0x80086601),
    "a copy": ("copy_range", "file", "COPY", 5),
    "a listing": ("names", "d"),
    "fsync of a directory": ("fsync_directory", "d"),
    "mmap": ("mapped", "file"),
}


@pytest.mark.parametrize("what", WITH_HANDLES)
def test_everything_that_needs_a_handle_opens_it(what):
    def check(request):
        handle = int.from_bytes(request.body[:8], "little")
        assert handle in mount.tree.handles, (Opcode(request.op).name, handle)
        return {Opcode.LSEEK: bytes(8), Opcode.FALLOCATE: b"", Opcode.IOCTL: bytes(16 + 4)}.get(
            request.op, mount.driver.usual(request)
        )

    call, name, *args = WITH_HANDLES[what]
    with mounted(grow, open="lazy") as mount:
        ops = (Opcode.FSYNC, Opcode.LSEEK, Opcode.FALLOCATE, Opcode.IOCTL, Opcode.READDIR, Opcode.READDIRPLUS)
        for op in (*ops, Opcode.FSYNCDIR, Opcode.READ, Opcode.WRITE, Opcode.FLUSH):
            mount.driver.answers[op] = check
        mount.do(call, name, *(mount.path("copy") if arg == "COPY" else arg for arg in args))
        assert mount.driver.count(Opcode.OPEN, Opcode.OPENDIR) >= 1
        assert not mount.driver.errors
