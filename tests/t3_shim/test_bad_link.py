"""A driver whose use of the link is wrong: twice, to nothing, in pieces, never, in floods, or not any more."""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from statistics import median

import pytest

from tests.t3_shim.program import PATIENCE
from tests.t3_shim.raw_driver import RawDriver
from tests.t3_shim.supervising import Mount, can_mount, mounted
from tests.t3_shim.tree import Packets, whole
from udf.fuse import structs
from udf.fuse.flags import Init
from udf.fuse.opcodes import Notify, Opcode
from udf.shim.link import QUEUE_LIMIT

pytestmark = can_mount

DATA = bytes(range(256)) * 512  # 128 KiB


def grow(driver: RawDriver) -> None:
    driver.tree.file("file", DATA)
    driver.tree.file("other", b"other")
    directory = driver.tree.directory("d")
    driver.tree.file("f", b"x", parent=directory.ino)


def works(mount: Mount) -> None:
    assert mount.do("direct_read", "other") == b"other"
    assert mount.do("names", "d") == ["f"]
    mount.do("spill", "new", b"new")
    mount.do("unlink", "new")


def test_a_second_reply_is_dropped_and_named_once():
    def twice(q, answer):
        if not isinstance(answer, bytes):
            return answer
        return Packets([whole(q.unique, answer)] * 2)

    with mounted(grow) as mount:
        mount.driver.mangle = twice
        for _ in range(3):
            works(mount)
        (fault,) = mount.faults()
        assert "second reply" in fault[1]
        assert mount.counters()["driver_faults"] > 10


@pytest.mark.parametrize(
    "unique", [3, 1 << 20, (1 << 62) - 2, 1 << 62, (1 << 62) + 1, (1 << 62) + 999, 1 << 63, (1 << 63) + 2, 2**64 - 1]
)
def test_a_reply_to_a_request_that_was_not_made_is_dropped(unique):
    with mounted(grow) as mount:
        for error in (0, -errno.EIO):
            mount.driver.send(whole(unique, b"x" * 24, error))
        works(mount)
        assert len(mount.faults()) == 1


@pytest.mark.parametrize("packet", [b"", b"\0", b"x" * 15, b"\xff" * 16, bytes(16), b"\xff" * 3000, bytes(190_000)])
def test_garbage_is_dropped(packet):
    with mounted(grow) as mount:
        for _ in range(50):
            mount.driver.send(packet)
        works(mount)
        assert len(mount.faults()) >= 1
        assert len(mount.faults()) <= 2


def cut(message: bytes, *sizes: int) -> Packets:
    packets, at = [], 0
    for size in sizes:
        packets.append(message[at : at + size])
        at += size
    return Packets([*packets, message[at:]])


@pytest.mark.parametrize("first", [16, 17, 4096, 100_000])
def test_a_reply_in_several_packets_is_whole(first):
    """A driver that splices sends its header and each piece of its pipe as packets of their own."""
    with mounted(grow) as mount:
        mount.driver.mangle = lambda q, answer: (
            cut(whole(q.unique, answer), first, 4096, 4096, 1)
            if isinstance(answer, bytes) and len(answer) > first + 9000
            else answer
        )
        for _ in range(3):
            assert mount.do("direct_read", "file", len(DATA)) == DATA
        assert not mount.faults()


def test_a_listing_and_an_open_in_several_packets_are_whole():
    def prepare(driver: RawDriver) -> None:
        for number in range(500):
            driver.tree.file(f"some-name-{number}")
        driver.mangle = lambda q, answer: (
            cut(whole(q.unique, answer), 20) if isinstance(answer, bytes) and len(answer) > 8 else answer
        )

    with mounted(prepare, open="lazy") as mount:
        assert mount.do("count_names") == 500
        assert mount.do("slurp", "some-name-7") == b""
        assert not mount.faults()


def test_a_piece_that_stays_alone_is_eio_and_others_are_answered():
    with mounted(grow) as mount:
        driver, other = mount.driver, mount.program()
        driver.answers[Opcode.READ] = lambda q: Packets([whole(q.unique, DATA)[:5000]])
        mount.usual.start("direct_read", mount.path("file"))
        driver.wait_for(Opcode.READ)
        assert other.do("names", mount.path("d")) == ["f"]
        with pytest.raises(OSError, match="Input/output error"):
            mount.usual.wait()
        del driver.answers[Opcode.READ]
        works(mount)
        assert [op for op, _ in mount.faults()] == ["READ"]


def test_an_answer_to_the_shims_own_question_may_come_between_pieces():
    """It was taken for a piece: the opener waited for its deadline."""
    with mounted(grow, open="lazy") as mount:
        driver, other = mount.driver, mount.program()
        driver.answers[Opcode.READ] = lambda q: Packets([whole(q.unique, bytes(4096))[:100]])
        mount.usual.start("direct_read", mount.path("file"))
        driver.wait_for(Opcode.READ)
        assert other.do("names", mount.path("d")) == ["f"]  # OPENDIR and READDIR are the shim's own
        with pytest.raises(OSError, match="Input/output error"):
            mount.usual.wait()


def test_pieces_of_two_replies_at_once_never_give_one_files_bytes_for_the_other():
    with mounted(lambda driver: (driver.tree.file("a", b"a" * 4096), driver.tree.file("b", b"b" * 4096))) as mount:
        driver, other = mount.driver, mount.program()
        driver.answers[Opcode.READ] = lambda q: driver.usual(q) if q.unique > 1 << 62 else None  # asked again
        mount.usual.start("direct_read", mount.path("a"))
        first = driver.wait_for(Opcode.READ)
        other.start("direct_read", mount.path("b"))
        second = driver.wait_for(Opcode.READ, 2)
        one, two = whole(first.unique, b"a" * 4096), whole(second.unique, b"b" * 4096)
        driver.send(one[:2000], two[:2000], one[2000:], two[2000:])
        for program, good in ((mount.usual, b"a" * 4096), (other, b"b" * 4096)):
            try:
                got = program.wait()
            except OSError as error:
                got = error.errno
            assert got in (good, errno.EIO)
        del driver.answers[Opcode.READ]
        assert mount.do("direct_read", "a") == b"a" * 4096
        assert mount.do("direct_read", "b") == b"b" * 4096


def test_one_request_that_is_never_answered_holds_up_nobody_else():
    with mounted(grow, deadline=3.0) as mount:
        driver, other = mount.driver, mount.program()
        driver.hold(Opcode.READ)
        mount.usual.start("direct_read", mount.path("file"))
        driver.wait_for(Opcode.READ)
        del driver.answers[Opcode.READ]
        times = []
        for _ in range(20):
            began = time.monotonic()
            assert other.do("direct_read", mount.path("other")) == b"other"
            times.append(time.monotonic() - began)
        assert median(times) < 1
        with pytest.raises(OSError, match="timed out"):
            mount.usual.wait()
        assert [op for op, _ in mount.faults()] == ["READ"]


def test_questions_of_the_shims_own_that_are_never_answered_do_not_pile_up():
    """A RELEASE has no deadline that anybody waits for: its table only ever grew."""
    with mounted(grow, open="driver") as mount:
        mount.driver.hold(Opcode.RELEASE, Opcode.RELEASEDIR)
        for _ in range(3):
            mount.usual.do("times", 2000, "access_open", mount.path("other"), seconds=100)
        until = time.monotonic() + PATIENCE
        while (unanswered := mount.counters()["unanswered"]) > 4096:  # a heartbeat looks at it
            assert time.monotonic() < until, unanswered
            time.sleep(0.1)
        works(mount)


def test_a_link_that_is_closed_ends_what_waits_at_once():
    with mounted(grow) as mount:
        mount.driver.hold(Opcode.READ)
        mount.usual.start("direct_read", mount.path("file"))
        mount.driver.wait_for(Opcode.READ)
        mount.driver.stop()
        with pytest.raises(OSError, match="Input/output error"):
            mount.usual.wait()
        assert mount.shim.wait_for("link_lost")["pending"] == 1
        assert mount.shim.wait_for("state")["state"] == "FAILED"
        assert mount.fails("names") == errno.EIO


def test_a_driver_that_stops_reading_is_given_up_with_its_queue():
    """The queue stayed for ever, and the next FORGET ended the shim."""
    files = 600

    def prepare(driver: RawDriver) -> None:
        for number in range(files):
            driver.tree.file(f"f{number}")
        driver.answers[Opcode.GETXATTR] = lambda q: errno.ENOSYS  # else each write asks for capabilities first

    with mounted(prepare, open="lazy", link_size=256 * 1024) as mount:
        driver = mount.driver
        fds = [mount.do("open_and_write", f"f{number}") for number in range(files)]
        driver.reading.clear()
        results = mount.usual.do("many_writers", fds, 128 * 1024, seconds=60)
        assert set(results) == {errno.EIO}
        mount.shim.wait_for("link_lost")
        mount.usual.do("drop_caches")
        assert mount.fails("names") == errno.EIO
        assert mount.counters()["waiting"] == 0
        assert mount.shim.memory() < 3 * QUEUE_LIMIT
        driver.reading.set()


def test_a_driver_that_stops_reading_for_a_while_gets_everything_in_order():
    with mounted(grow, link_size=64 * 1024) as mount:
        driver = mount.driver
        fd = mount.do("open", "file", os.O_RDWR)
        mount.usual.do("pread", fd, 1, 0)
        driver.reading.clear()
        programs = [mount.program() for _ in range(4)]
        for number, program in enumerate(programs):
            program.start("spill", mount.path(f"new{number}"), bytes([number]) * 100_000)
        time.sleep(0.2)
        driver.reading.set()
        for number, program in enumerate(programs):
            assert program.wait() == 100_000
            assert mount.do("slurp", f"new{number}") == bytes([number]) * 100_000
        mount.usual.do("close", fd)


def flood(mount: Mount, packets: list[bytes], seconds: float) -> float:
    """Send these over and over from another thread; how long an operation takes meanwhile."""
    stop = threading.Event()

    def send() -> None:
        while not stop.is_set():
            mount.driver.send(*packets)

    thread = threading.Thread(target=send)
    thread.start()
    times, until = [], time.monotonic() + seconds
    try:
        while time.monotonic() < until or len(times) < 5:
            began = time.monotonic()
            assert mount.do("direct_read", "other") == b"other"
            times.append(time.monotonic() - began)
    finally:
        stop.set()
        thread.join(PATIENCE)
    return median(times)


def notification(code: int, body: bytes) -> bytes:
    return structs.OUT_HEADER.pack(structs.OUT_HEADER.size + len(body), code, 0) + body


def inval_entries(count: int) -> list[bytes]:
    return [
        notification(Notify.INVAL_ENTRY, structs.NOTIFY_INVAL_ENTRY_OUT.pack(1, 8, 0) + b"%08d\0" % number)
        for number in range(count)
    ]


FLOODS = {
    "replies to nothing": [whole(5, b"x" * 100)] * 100,
    "garbage": [b"\xff" * 100] * 100,
    "bad notifications": [notification(3, b"x" * 5), notification(99, b""), notification(2, b"x" * 100)] * 30,
    "node invalidations": [notification(2, structs.NOTIFY_INVAL_INODE_OUT.pack(2, 0, 0))] * 100,
    "name invalidations": inval_entries(20_000),
    "stores": [
        notification(Notify.STORE, structs.NOTIFY_STORE_OUT.pack(2, at * 65536, 65536) + bytes(65536))
        for at in range(200)
    ],
}


@pytest.mark.parametrize("what", FLOODS)
def test_a_flood_hurts_nobody(what):
    with mounted(grow) as mount:
        mount.do("stat", "file")
        assert flood(mount, FLOODS[what], 1.0) < 2.0
        assert mount.shim.memory() < (45 << 20)
        assert len(mount.faults()) <= 3
        works(mount)


def test_a_store_with_a_length_that_lies_is_dropped():
    with mounted(grow) as mount:
        mount.do("stat", "file")
        for size in (0, 5, 2**32 - 1):
            mount.driver.notify(Notify.STORE, structs.NOTIFY_STORE_OUT.pack(2, 0, size) + b"abcd")
        mount.driver.notify(Notify.STORE, struct.pack("=Q", 2))
        assert mount.do("slurp", "file") == DATA
        assert len(mount.faults()) == 1


@pytest.mark.parametrize("code", [0, 6, 7, 8, 9, 10, -1, 2**31 - 1])
def test_notifications_that_are_not_a_drivers_to_send_are_dropped(code):
    """RESEND, INC_EPOCH and PRUNE are the shim's own; a bad DELETE is no DELETE."""
    with mounted(grow) as mount:
        works(mount)
        mount.driver.send(notification(code, b""))
        works(mount)
        assert len(mount.faults()) == 1


def test_a_driver_that_never_answers_init_is_given_up():
    def prepare(driver: RawDriver) -> None:
        driver.answers[Opcode.INIT] = lambda q: None

    with pytest.raises(AssertionError, match="did not answer INIT"), mounted(prepare, start_timeout=0.5):
        pass


@pytest.mark.parametrize(
    "answer",
    [errno.EIO, b"", b"x" * 10, struct.pack("=IIII", 8, 0, 0, 0) + bytes(48), struct.pack("=II", 7, 5) + bytes(56)],
    ids=["an errno", "empty", "too short", "version 8", "version 7.5"],
)
def test_a_bad_answer_to_init_is_one_sentence(answer):
    def prepare(driver: RawDriver) -> None:
        driver.answers[Opcode.INIT] = lambda q: answer

    with pytest.raises(AssertionError, match="'failed'"), mounted(prepare):
        pass


def test_rubbish_before_init_is_passed_over():
    def prepare(driver: RawDriver) -> None:
        grow(driver)
        driver.answers[Opcode.INIT] = lambda q: Packets(
            [b"", b"x", b"\xff" * 20, whole(0, b"x", 2), whole(77, b"y"), whole(q.unique, driver.init)]
        )

    with mounted(prepare) as mount:
        works(mount)


@pytest.mark.parametrize("flags", [0, 0xFFFFFFFF], ids=["nothing", "everything"])
def test_whatever_a_driver_accepts_it_is_served(flags):
    with mounted(grow, driver_flags=flags & ~int(Init.INIT_EXT), driver_minor=12) as mount:
        works(mount)
