"""The device is pulled out, and perhaps comes back: who is told what, what is still answered, and for how long."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.t3_shim.program import PATIENCE, Program, StillWaiting
from tests.t3_shim.raw_driver import RawDriver
from tests.t3_shim.supervising import Mount, can_mount, mounted
from tests.t3_shim.test_recovery import CHANGES, FAILURES, grow, what_waits
from udf.fuse.flags import Fopen
from udf.fuse.opcodes import Opcode
from udf.shim.replay import REPLAY, Replay

pytestmark = can_mount
EXAMPLES = int(os.environ.get("UDF_FUZZ_EXAMPLES", "10"))  # more of them by night
AT_ONCE = 8.0  # seconds: less than any deadline here, more than a busy machine takes
LONG = 60.0
DATA = b"0123456789" * 1000


def detachable(prepare=grow, **config):
    """A mount as a stick has one: nothing else changes it, so what is cached is true as long as the mount."""
    return mounted(prepare, **{"recover": True, "hide": False, "exclusive": True, **config})


def unplug(mount: Mount, **how: float) -> None:
    """Have the device gone for the shim; what it says of a driver that was there has been heard."""
    mount.shim.send({"t": "detach", "text": "unplugged", **how})
    assert mount.counters()["away"] == 1


def warm(mount: Mount) -> int:
    """Use this and that, so that it is cached; a descriptor that stays open."""
    assert mount.do("slurp", "file") == DATA
    mount.do("walk")
    mount.do("scan", "d")
    mount.do("names", "d")
    assert mount.do("readlink", "pointer") == "file"
    assert mount.do("getxattr", "file", "user.x") == b"value"
    mount.do("statfs")
    fd: int = mount.do("open", "file", os.O_RDWR)
    return fd


def wait_until_over(mount: Mount, seconds: float = PATIENCE) -> None:
    """Until what was cached is not answered any more, and the kernel has been told of every node."""
    until = time.monotonic() + seconds
    while (counts := mount.counters())["stale_for"] or counts["invalidated"] < counts["nodes"] or counts["notifying"]:
        assert time.monotonic() < until, counts


def wait_until_the_kernel_knows(mount: Mount, seconds: float = PATIENCE) -> None:
    """Until it has been told what to forget."""
    until = time.monotonic() + seconds
    while mount.counters()["notifying"]:
        assert time.monotonic() < until


def ends_with(program: Program, number: int, seconds: float = AT_ONCE) -> None:
    with pytest.raises(OSError) as failure:
        program.wait(seconds)
    assert failure.value.errno == number


# ---- what is cached


def test_what_is_cached_is_answered_as_long_as_it_may_be_and_then_nothing_is():
    with detachable() as mount:
        fd = warm(mount)
        mapping = mount.program()
        mapping.do("map_open", mount.path("file"))
        space = mount.do("statfs")
        unplug(mount, max_stale=LONG)
        trips = mount.counters()["driver_round_trips"]
        for _ in range(2):
            assert mount.do("slurp", "file") == DATA
            assert mount.do("stat", "d/inner")["st_size"] == 5
            assert mount.do("scan", "d")["inner"] == 5
            assert mount.do("readlink", "pointer") == "file"
            assert mount.do("statfs") == space
            assert mount.usual.do("fstat", fd)["st_size"] == len(DATA)
            assert mount.usual.do("pread", fd, 10, 4096) == DATA[4096:4106]
            assert mapping.do("map_read", 4096, 10) == DATA[4096:4106]
        assert mount.counters()["driver_round_trips"] == trips
        unplug(mount, max_stale=0)
        wait_until_over(mount)
        for call, name, *args in (
            ("slurp", "file"),
            ("stat", "d/inner"),
            ("stat", "d"),
            ("names", ""),
            ("names", "d"),
            ("readlink", "pointer"),
            ("getxattr", "file", "user.x"),
            ("statfs", ""),
            ("access_open", "other"),
        ):
            assert mount.fails(call, name, *args, seconds=AT_ONCE) == errno.ENODEV, call
        assert mount.usual.fails("fstat", fd, seconds=AT_ONCE) == errno.ENODEV
        assert mount.usual.fails("pread", fd, 10, 0, seconds=AT_ONCE) == errno.ENODEV
        assert mapping.do("map_fault", 4096), "what is mapped is gone too: SIGBUS"
        assert mount.do("stat", "")["st_nlink"] >= 2, "ls of the directory above asks for the root"
        mount.next_driver()
        assert mount.usual.do("fstat", fd)["st_size"] == len(DATA)
        assert mount.usual.do("pread", fd, 10, 4096) == DATA[4096:4106]
        assert mapping.do("map_read", 0, 10) == DATA[:10]
        assert mount.do("slurp", "file") == DATA
        assert mount.do("scan", "d")["inner"] == 5
        assert mount.do("statfs") == space
        assert mount.usual.do("pwrite", fd, b"NEW", 0) == 3
        assert mount.do("slurp", "file")[:10] == b"NEW3456789"
        mount.usual.do("close", fd)


def test_what_is_cached_ends_by_itself_when_its_time_is_over():
    with detachable() as mount:
        fd = warm(mount)
        unplug(mount, max_stale=3)
        assert 0 < mount.counters()["stale_for"] <= 3
        assert mount.usual.do("pread", fd, 10, 0) == DATA[:10]
        wait_until_over(mount)
        assert mount.usual.fails("pread", fd, 10, 0) == errno.ENODEV
        mount.next_driver()
        assert mount.usual.do("pread", fd, 10, 0) == DATA[:10]


def test_what_is_known_of_names_that_are_not_there_ends_too():
    with detachable() as mount:
        assert mount.fails("stat", "none") == errno.ENOENT
        unplug(mount, max_stale=LONG)
        assert mount.fails("stat", "none") == errno.ENOENT
        unplug(mount, max_stale=0)
        wait_until_over(mount)
        assert mount.fails("stat", "none") == errno.ENODEV
        mount.next_driver()
        assert mount.fails("stat", "none") == errno.ENOENT


def test_a_change_that_cannot_be_made_leaves_what_is_cached_as_it_is():
    """The attributes used to be forgotten for a write that no driver heard of, and the file unreadable."""

    def prepare(driver: RawDriver) -> None:
        grow(driver)
        driver.tree.valid = 0.05  # the kernel asks again

    with detachable(prepare, exclusive=False) as mount:
        fd = warm(mount)
        mount.do("overwrite", "other", b"other")
        mount.do("stat", "other")
        mount.do("slurp", "file")  # an open drops the pages that were there
        unplug(mount, max_stale=LONG)
        for call, name, *args in (
            ("overwrite", "other", b"x"),  # the kernel itself drops the page of a write that failed
            ("chmod", "file", 0o600),
            ("truncate", "file", 5),
            ("fallocate", "file", 20_000),
            ("setxattr", "file", "user.y", b"1"),
            ("removexattr", "file", "user.x"),
            ("unlink", "file"),
            ("rename_to", "file", "moved"),
            ("spill", "new", b"x"),
            ("mkdir", "new"),
        ):
            assert mount.fails(call, name, *args, seconds=AT_ONCE) == errno.ENODEV, call
        assert mount.do("stat", "other")["st_size"] == 5
        assert mount.do("stat", "file")["st_size"] == len(DATA)
        assert mount.usual.do("fstat", fd)["st_size"] == len(DATA)
        assert mount.do("slurp", "file") == DATA
        mount.next_driver()


def test_many_nodes_are_forgotten_a_few_at_a_time():
    def many(driver: RawDriver) -> None:
        for name in ("a", "b"):
            directory = driver.tree.directory(name)
            for number in range(3000):
                driver.tree.file(f"a_file_of_some_length_{number:06}", b"x", parent=directory.ino)

    with detachable(many) as mount:
        mount.do("scan", "a")
        mount.do("scan", "b")
        fd = mount.do("open", "a/a_file_of_some_length_000007", os.O_RDONLY)
        began = time.monotonic()
        unplug(mount, max_stale=0)
        assert mount.fails("names", "a") == errno.ENODEV
        assert time.monotonic() - began < AT_ONCE
        wait_until_over(mount)
        assert mount.usual.fails("fstat", fd) == errno.ENODEV
        mount.next_driver()
        assert len(mount.do("scan", "a")) == 3000


def test_what_a_request_holds_while_it_waits_holds_up_nothing_else():
    """The kernel takes a page away only when nobody waits for it, and its notifier would have waited too."""

    def big(driver: RawDriver) -> None:
        grow(driver)
        driver.tree.file("big", bytes(1 << 20))

    with detachable(big) as mount:
        fd = warm(mount)
        other = mount.program()
        big_fd = other.do("open", mount.path("big"), os.O_RDONLY)
        other.do("pread", big_fd, 10, 0)
        unplug(mount, wait=LONG, max_stale=0.3)
        other.start("pread", big_fd, 10, 900_000)
        what_waits(mount)
        until = time.monotonic() + PATIENCE
        while (counts := mount.counters())["invalidated"] < counts["nodes"] or counts["notifying"] > 1:
            assert time.monotonic() < until, counts
        mount.usual.start("pread", fd, 10, 0)
        with pytest.raises(StillWaiting):
            mount.usual.wait(0.1)  # its page is gone as well
        mount.next_driver()
        assert mount.usual.wait() == DATA[:10]
        assert other.wait() == bytes(10)


def test_a_mount_in_which_somebody_stands_is_where_it_was():
    with detachable() as mount:
        other = mount.program()
        other.do("chdir", mount.path("d"))
        assert other.do("stat", "inner")["st_size"] == 5
        unplug(mount)
        wait_until_over(mount)
        assert other.fails("stat", "inner") == errno.ENODEV
        assert mount.fails("names", "d") == errno.ENODEV
        mount.next_driver()
        assert mount.do("names", "d") == ["inner"]
        assert other.do("stat", "inner")["st_size"] == 5
        assert other.do("getcwd") == mount.path("d")


# ---- what waits, and what comes


@pytest.mark.parametrize("where", ["at the driver", "parked"])
def test_a_device_that_is_gone_is_enodev_for_what_waits_and_what_comes_until_the_next_driver(where):
    with detachable() as mount:
        fd = mount.do("open", "file", os.O_RDWR)
        cached = mount.usual.do("pread", fd, 10, 0)
        if where == "parked":
            mount.lose_driver()
        mount.driver.hold(Opcode.LOOKUP)
        other = mount.program()
        other.start("stat", mount.path("d/inner"))
        if where == "at the driver":
            mount.driver.wait_for(Opcode.LOOKUP)
        mount.shim.send({"t": "detach", "text": "unplugged", "max_stale": LONG})
        ends_with(other, errno.ENODEV)
        mount.wait_lost()
        assert mount.fails("stat", "d/inner") == errno.ENODEV
        assert mount.usual.do("pread", fd, 10, 0) == cached
        assert mount.usual.fails("pwrite", fd, b"NEW", 0) == errno.ENODEV
        mount.next_driver()
        assert mount.do("stat", "d/inner")["st_size"] == 5
        assert mount.usual.do("pwrite", fd, b"NEW", 0) == 3


@pytest.mark.parametrize("what", [*CHANGES, *FAILURES])
def test_a_change_under_way_fails_at_once_and_is_looked_for_when_the_device_is_back(what):
    """Whether it was made nobody knows; so nothing that it may have changed is answered from a cache any more."""
    (call, name, *args), op, _ = {**CHANGES, **FAILURES}[what]
    with detachable() as mount:
        warm(mount)
        mount.fails("stat", "new")

        def done_and_lost(request):
            mount.driver.usual(request)  # and nobody hears of it

        mount.driver.answers[op] = done_and_lost
        mount.usual.start(call, mount.path(name), *args)
        mount.driver.wait_for(op)
        unplug(mount, max_stale=LONG)
        ends_with(mount.usual, errno.ENODEV)
        assert mount.shim.wait_for("link_lost")["pending"] == 1
        tree = mount.tree
        mount.next_driver()
        wait_until_the_kernel_knows(mount)
        there = sorted(name.decode() for name in tree.nodes[1].children)
        assert mount.do("names", "") == there
        for each in ("new", "other", "file", "empty"):
            if each not in there:
                assert mount.fails("stat", each) == errno.ENOENT
        node = mount.tree.nodes[mount.tree.nodes[1].children[b"file"]]
        assert mount.do("stat", "file")["st_size"] == len(node.data)
        assert mount.do("stat", "file")["st_nlink"] == node.nlink
        if what != "exchange" and what != "rename over":
            assert mount.do("slurp", "file") == node.data


@pytest.mark.parametrize("where", ["at the driver", "parked"])
@pytest.mark.parametrize("what", ["mkdir", "write", "rename", "unlink", "fsync"])
def test_what_may_wait_goes_on_when_the_device_is_back(what, where):
    (call, name, *args), op, holds = CHANGES[what]
    with detachable() as mount:
        mount.do("walk")
        other = mount.program()
        if where == "at the driver":
            mount.driver.answers[op] = lambda request: (mount.driver.usual(request), None)[1]
            other.start(call, mount.path(name), *args)
            mount.driver.wait_for(op)
            unplug(mount, wait=LONG, max_stale=LONG)
        else:
            unplug(mount, wait=LONG, max_stale=LONG)
            other.start(call, mount.path(name), *args)
            what_waits(mount)
        with pytest.raises(StillWaiting):
            other.wait(0.1)
        mount.next_driver(counted=True)
        other.wait()
        assert holds(mount)
        rebuilt = where == "at the driver" and REPLAY[op] is Replay.ONCE
        assert mount.counters()["rebuilt"] == rebuilt


def test_what_has_waited_long_enough_fails_and_what_came_later_waits_on():
    with detachable() as mount:
        mount.do("stat")
        unplug(mount, wait=4)
        mount.usual.start("stat", mount.path("d/inner"))
        what_waits(mount)
        with pytest.raises(StillWaiting):
            mount.usual.wait(2)
        other = mount.program()
        other.start("stat", mount.path("d"))
        ends_with(mount.usual, errno.ENODEV)
        assert what_waits(mount)
        mount.next_driver()
        assert other.wait()["st_nlink"] == 2


def test_the_time_to_wait_begins_with_the_unplug_for_what_had_waited_for_a_driver():
    with detachable(patience=30.0) as mount:
        mount.do("stat")
        mount.lose_driver()
        mount.usual.start("stat", mount.path("d/inner"))
        what_waits(mount)
        unplug(mount, wait=2.5)
        with pytest.raises(StillWaiting):
            mount.usual.wait(0.5)
        ends_with(mount.usual, errno.ENODEV)
        mount.next_driver()


@pytest.mark.parametrize("call", ["interruptible_read", "interruptible_mkdir", "interruptible_write"])
def test_who_waits_can_be_interrupted(call):
    def prepare(driver: RawDriver) -> None:
        grow(driver)
        driver.tree.fopen = int(Fopen.DIRECT_IO)  # else the kernel lets nobody off who waits for a page

    with detachable(prepare) as mount:
        warm(mount)
        unplug(mount, wait=LONG, max_stale=LONG)
        other = mount.program()
        other.start(call, mount.path("new" if call.endswith("mkdir") else "file"))
        what_waits(mount)
        other.signal(10)  # SIGUSR1, which it handles
        assert other.wait() == errno.EINTR
        mount.next_driver()
        assert mount.fails("stat", "new") == errno.ENOENT


def test_who_exits_while_the_device_is_away_waits_for_nothing():
    """Its files are closed for it, and what their FLUSH says is nobody's concern. It used to take as long as waits may.

    (What it has changed through a mapping is written first, and the kernel does not say for whom: that waits.)
    """
    with detachable() as mount:
        program = mount.program()
        program.do("open_and_write", mount.path("other"))
        unplug(mount, wait=LONG, max_stale=LONG)
        program.signal(15)
        assert program.ended()
        mount.next_driver()
        assert mount.do("slurp", "other") == b"xther"


@pytest.mark.parametrize(("op", "call", "name"), [(Opcode.WRITE, "overwrite", "file"), (Opcode.MKDIR, "mkdir", "new")])
def test_who_waits_for_what_the_driver_had_been_told_can_be_killed(op, call, name):
    """It used to wait for the driver's answer, whatever came: for as long as the device stays away nobody gives one."""
    with detachable() as mount:
        mount.do("walk")
        mount.driver.answers[op] = lambda request: (mount.driver.usual(request), None)[1]
        other = mount.program()
        other.start(call, mount.path(name), *([b"NEW"] if call == "overwrite" else []))
        mount.driver.wait_for(op)
        unplug(mount, wait=LONG, max_stale=LONG)
        other.signal(9)
        assert other.ended()
        mount.next_driver()
        assert mount.do("stat", "file")["st_size"] == len(DATA)
        if op == Opcode.MKDIR:
            assert mount.do("names", "new") == []


def test_a_driver_that_has_answered_is_heard():
    """Its last answers lie in the socket when the word of the unplug comes: what was done has not failed."""
    with detachable() as mount:
        fd = mount.do("open", "file", os.O_WRONLY)
        mount.usual.do("pwrite", fd, b"x", 0)
        mount.driver.hold(Opcode.WRITE)
        mount.usual.start("pwrite", fd, b"NEW", 0)
        mount.driver.wait_for(Opcode.WRITE, 2)
        mount.shim.process.send_signal(19)  # SIGSTOP: both are there when it looks
        mount.driver.answer_late()
        mount.shim.send({"t": "detach"})
        mount.shim.process.send_signal(18)
        assert mount.usual.wait() == 3
        assert mount.usual.fails("pwrite", fd, b"NEW", 0) == errno.ENODEV
        mount.next_driver()


NOISE = st.lists(
    st.one_of(
        st.binary(max_size=60),
        st.builds(
            lambda error, unique, body: struct.pack("=IiQ", 16 + len(body), error, unique) + body,
            st.integers(-40, 10),
            st.sampled_from((0, 1 << 62, (1 << 62) + 1, (1 << 62) + 3)) | st.integers(2, 200),
            st.binary(max_size=200),
        ),
    ),
    max_size=20,
)


def test_what_a_driver_says_last_is_checked_like_everything_that_it_says():
    with detachable() as mount:

        @given(NOISE, st.booleans())
        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
        def example(noise: list[bytes], waits: bool) -> None:
            mount.driver.hold(Opcode.MKDIR)
            mount.usual.start("mkdir", mount.path("new"))
            mount.driver.wait_for(Opcode.MKDIR)
            mount.shim.process.send_signal(19)  # SIGSTOP: all of it is there when it looks
            mount.driver.send(*noise)
            mount.shim.send({"t": "detach", "wait": LONG * waits, "max_stale": 0})
            mount.shim.process.send_signal(18)
            if not waits:
                with contextlib.suppress(OSError):
                    mount.usual.wait()
            mount.next_driver()
            if waits:
                with contextlib.suppress(OSError):
                    mount.usual.wait()
            with contextlib.suppress(FileNotFoundError):
                mount.do("rmdir", "new")
            assert mount.do("stat", "d/inner")["st_size"] == 5

        example()


# ---- what is open for writing


def test_what_was_acknowledged_is_synced_by_the_next_driver_and_nobody_else():
    with detachable() as mount:
        fd = mount.do("open", "file", os.O_RDWR)
        directory = mount.do("open", "d", os.O_RDONLY | os.O_DIRECTORY)
        assert mount.usual.do("pwrite", fd, b"NEW", 0) == 3
        mount.usual.do("fdatasync", directory)
        unplug(mount, max_stale=LONG)
        for _ in range(2):
            assert mount.fails("fsync", "file", seconds=AT_ONCE) == errno.ENODEV
            assert mount.usual.fails("fdatasync", fd, seconds=AT_ONCE) == errno.ENODEV
            assert mount.usual.fails("fdatasync", directory, seconds=AT_ONCE) == errno.ENODEV
        mount.next_driver()
        mount.usual.do("fdatasync", fd)
        mount.usual.do("fdatasync", directory)
        assert mount.driver.count(Opcode.FSYNC) == 1
        assert mount.driver.count(Opcode.FSYNCDIR) == 1
        assert mount.usual.do("pwrite", fd, b"MORE", 3) == 4
        mount.usual.do("close", fd)
        assert mount.driver.count(Opcode.FLUSH) == 1
        mount.usual.do("close", directory)


def test_a_driver_without_fsync_makes_no_fsync_of_what_is_away():
    """The kernel was told that there is no such request, and said itself that all is well from then on."""

    def prepare(driver: RawDriver) -> None:
        grow(driver)
        driver.answers[Opcode.FSYNC] = driver.answers[Opcode.FSYNCDIR] = lambda request: errno.ENOSYS

    with detachable(prepare) as mount:
        fd = mount.do("open", "file", os.O_RDWR)
        directory = mount.do("open", "d", os.O_RDONLY | os.O_DIRECTORY)
        for _ in range(2):
            mount.usual.do("fdatasync", fd)
            mount.usual.do("fdatasync", directory)
        assert mount.driver.count(Opcode.FSYNC) == 1
        unplug(mount)
        assert mount.usual.fails("fdatasync", fd) == errno.ENODEV
        assert mount.usual.fails("fdatasync", directory) == errno.ENODEV
        mount.next_driver()
        mount.usual.do("fdatasync", fd)


def test_a_close_is_told_to_the_driver_of_what_could_be_written_to_and_of_nothing_else():
    with detachable(open="driver") as mount:
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
            mount.usual.do("close", mount.do("open", "file", flags))
        mount.usual.do("close", mount.do("open", "d", os.O_RDONLY))
        assert mount.driver.count(Opcode.FLUSH) == 0
        written, cut, new, read = (
            mount.do("open", "file", os.O_WRONLY),
            mount.do("open", "other", os.O_RDWR),
            mount.do("open", "new", os.O_RDWR | os.O_CREAT),
            mount.do("open", "file", os.O_RDWR),
        )
        mount.usual.do("pwrite", written, b"NEW", 0)
        mount.usual.do("ftruncate", cut, 1)
        mount.usual.do("pread", read, 10, 0)
        for count, fd in ((1, written), (2, cut), (3, new), (3, read)):
            mount.usual.do("close", fd)
            assert mount.driver.count(Opcode.FLUSH) == count
        written, read = mount.do("open", "file", os.O_RDWR), mount.do("open", "file", os.O_RDWR)
        mount.usual.do("pwrite", written, b"NEW", 0)
        unplug(mount)
        assert mount.usual.fails("close", written) == errno.ENODEV
        mount.usual.do("close", read)
        mount.next_driver()


@pytest.mark.parametrize("wait", [0.0, LONG])
def test_what_was_changed_through_a_mapping_is_told_to_be_lost_or_written_later(wait):
    """msync(2) says so once, as of any filesystem; what was not written is read anew when the device is back."""
    with detachable() as mount:
        program = mount.program()
        program.do("map_open", mount.path("file"))
        program.do("map_read", 0, 10)
        unplug(mount, wait=wait, max_stale=LONG)
        program.do("map_write", 0, b"MAPPED")
        program.start("map_sync")
        if wait:
            what_waits(mount)
            mount.next_driver()
            program.wait()
            assert mount.tree.nodes[1002].data[:10] == b"MAPPED6789"
        else:
            ends_with(program, errno.ENODEV)
            assert program.do("map_read", 0, 10) == b"MAPPED6789"
            assert mount.fails("fsync", "file") == errno.ENODEV
            mount.next_driver()
            until = time.monotonic() + PATIENCE
            while program.do("map_read", 0, 10) != DATA[:10]:  # which the kernel is told in its own time
                assert time.monotonic() < until
            program.do("map_sync")
            assert mount.tree.nodes[1002].data[:10] == DATA[:10]
        assert program.do("map_close") is None


# ---- removed but open


@pytest.mark.parametrize("links", [True, False], ids=["by link", "by rename"])
def test_a_removed_file_that_is_open_is_there_when_the_device_is_back(links):
    def prepare(driver: RawDriver) -> None:
        grow(driver)
        if not links:
            driver.answers[Opcode.LINK] = lambda request: errno.EPERM

    with detachable(prepare, hide=True) as mount:
        first, second = mount.do("open", "other", os.O_RDWR), mount.do("open", "file", os.O_RDWR)
        mount.do("unlink", "other")
        mount.do("unlink", "file")
        unplug(mount, max_stale=0)
        assert mount.usual.fails("pread", first, 10, 0) == errno.ENODEV
        mount.usual.do("close", second)
        mount.next_driver()
        assert mount.usual.do("pread", first, 10, 0) == b"other"
        assert mount.usual.do("fstat", first)["st_nlink"] == 0
        mount.driver.wait_for(Opcode.UNLINK)  # of the one that was closed while the device was away
        assert len([name for name in mount.tree.nodes[1].children if name.startswith(b".udf")]) == 1
        mount.usual.do("close", first)
        mount.driver.wait_for(Opcode.UNLINK, 2)
        assert not [name for name in mount.tree.nodes[1].children if name.startswith(b".udf")]


# ---- one after the other, in any order


def test_an_unplug_while_a_driver_is_lost_ends_what_waits_for_one():
    with detachable() as mount:
        mount.do("stat")
        mount.lose_driver()
        mount.usual.start("stat", mount.path("d/inner"))
        what_waits(mount)
        unplug(mount)
        ends_with(mount.usual, errno.ENODEV)
        mount.next_driver()
        assert mount.do("stat", "d/inner")["st_size"] == 5


def test_an_unplug_while_a_driver_is_greeted_refuses_it():
    with detachable() as mount:
        mount.lose_driver()
        mount.generation = 2
        asked = threading.Event()
        mount.send_attach(lambda driver: driver.answers.update({Opcode.INIT: lambda request: asked.set()}))
        assert asked.wait(PATIENCE)
        unplug(mount, max_stale=LONG)
        assert "the device is gone" in mount.shim.wait_for("refused", generation=2)["error"]
        assert mount.fails("stat", "d/inner") == errno.ENODEV
        mount.driver.stop()
        mount.next_driver()
        assert mount.do("stat", "d/inner")["st_size"] == 5


def test_a_driver_that_cannot_serve_the_mount_is_refused_and_the_device_is_still_away():
    with detachable() as mount:
        mount.do("walk")
        unplug(mount, max_stale=LONG)
        mount.generation = 2
        mount.send_attach(lambda driver: None, max_write=4096)
        assert "writes of" in mount.shim.wait_for("refused", generation=2)["error"]
        assert mount.counters()["away"] == 1
        assert mount.do("stat", "d/inner")["st_size"] == 5
        assert mount.fails("mkdir", "new") == errno.ENODEV
        mount.next_driver()
        mount.do("mkdir", "new")


def test_another_unplug_changes_how_long_but_not_since_when():
    with detachable() as mount:
        mount.do("walk")
        unplug(mount, max_stale=1.0, wait=LONG)
        mount.usual.start("mkdir", mount.path("new"))
        what_waits(mount)
        unplug(mount, max_stale=1.5)
        ends_with(mount.usual, errno.ENODEV)
        assert mount.counters()["stale_for"] < 1.5
        assert mount.counters()["detaches"] == 1
        unplug(mount, max_stale=0)
        unplug(mount, max_stale=LONG)
        wait_until_over(mount)
        assert mount.fails("stat", "d/inner") == errno.ENODEV, "what is over does not come back"
        mount.next_driver()
        assert mount.do("stat", "d/inner")["st_size"] == 5
        unplug(mount, max_stale=LONG)
        assert mount.counters()["detaches"] == 2
        assert mount.do("stat", "d/inner")["st_size"] == 5
        mount.next_driver()


def test_an_unplug_and_then_no_hope_is_an_error_like_any_other():
    with detachable() as mount:
        mount.do("walk")
        unplug(mount, max_stale=LONG, wait=LONG)
        mount.usual.start("mkdir", mount.path("new"))
        what_waits(mount)
        mount.shim.send({"t": "fail", "text": "quarantine"})
        ends_with(mount.usual, errno.EIO)
        assert mount.fails("mkdir", "new") == errno.EIO
        assert mount.do("stat", "d/inner")["st_size"] == 5
        unplug(mount)
        wait_until_over(mount)
        assert mount.fails("stat", "d/inner") == errno.ENODEV
        mount.next_driver()
        mount.do("mkdir", "new")


def test_a_loss_after_the_device_is_back_is_one_like_any_other():
    with detachable(patience=30.0) as mount:
        unplug(mount, wait=0.3)
        mount.next_driver()
        mount.lose_driver()
        mount.usual.start("stat", mount.path("d/inner"))
        with pytest.raises(StillWaiting):
            mount.usual.wait(0.8)
        mount.next_driver()
        assert mount.usual.wait()["st_size"] == 5


def test_a_mount_that_goes_on_without_drivers_only_knows_of_unplugs_too():
    """A mount without recovery fails for good when its driver ends, but not by an unplug."""
    with mounted(grow) as mount:
        mount.do("walk")
        mount.driver.hold(Opcode.MKDIR)
        mount.usual.start("mkdir", mount.path("new"))
        mount.driver.wait_for(Opcode.MKDIR)
        unplug(mount, max_stale=LONG)
        ends_with(mount.usual, errno.ENODEV)
        assert mount.do("stat", "d/inner")["st_size"] == 5
        assert not mount.shim.said("state")


# ---- unmounting


@pytest.mark.parametrize("wait", [0.0, LONG])
@pytest.mark.parametrize("dirty", [False, True], ids=["clean", "dirty"])
def test_a_mount_whose_device_is_away_is_unmounted_at_once(wait, dirty):
    with detachable() as mount:
        program = mount.program()
        program.do("map_open", mount.path("file"))
        program.do("map_read", 0, 10)
        unplug(mount, wait=wait, max_stale=LONG)
        if dirty:
            program.do("map_write", 0, b"MAPPED")
        program.signal(9)  # whose end waits for what it has changed
        began = time.monotonic()
        mount.unmount()
        assert time.monotonic() - began < AT_ONCE
        assert mount.shim.said("unmounted")[0]["unsaved"] == ""


def test_who_waits_for_a_device_does_not_when_the_mount_is_taken_away():
    with detachable() as mount:
        mount.do("walk")
        unplug(mount, wait=LONG, max_stale=LONG)
        fd = mount.program()
        fd.do("chdir", mount.path("d"))
        mount.usual.start("mkdir", mount.path("new"))
        what_waits(mount)
        mount.shim.send({"t": "unmount", "lazy": True})
        ends_with(mount.usual, errno.ENODEV)
        assert fd.fails("mkdir", "new", seconds=AT_ONCE) == errno.ENODEV
        mount.shim.wait_for("detached")


def test_a_lazy_unmount_of_what_is_away_goes_on_saying_so_until_it_is_closed():
    with detachable() as mount:
        fd = warm(mount)
        unplug(mount, max_stale=LONG)
        mount.shim.send({"t": "unmount", "lazy": True})
        mount.shim.wait_for("detached")
        assert mount.usual.do("pread", fd, 10, 0) == DATA[:10]
        assert mount.usual.fails("pwrite", fd, b"x", 0) == errno.ENODEV
        unplug(mount)
        wait_until_over(mount)
        assert mount.usual.fails("pread", fd, 10, 0) == errno.ENODEV
        assert mount.usual.fails("close", fd) == errno.ENODEV, "something was to be written"
        mount.shim.wait_for("unmounted")
        assert mount.shim.process.wait(PATIENCE) == 0
