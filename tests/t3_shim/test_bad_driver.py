"""A driver whose answers have a wrong form, or contents that cannot be.

For each: the program gets an errno in bounded time, the log one line, and the mount goes on as if nothing had been.
"""

from __future__ import annotations

import errno
import stat
import struct
import time
from collections.abc import Callable
from statistics import median

import pytest

from tests.t3_shim.raw_driver import RawDriver
from tests.t3_shim.supervising import Mount, can_mount, mounted
from tests.t3_shim.test_lookup_counts import settled
from tests.t3_shim.tree import Answer, Packets, Request, dirent, whole
from udf.fuse import structs
from udf.fuse.flags import Init
from udf.fuse.opcodes import Opcode
from udf.shim.handles import LISTING_LIMIT

pytestmark = can_mount

DATA = bytes(range(256)) * 40
Wrong = Callable[[Request, bytes], Answer]
FILE, DIRECTORY = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755
MEMORY = 40 << 20  # bytes that a shim may have with a bad driver; it begins with 16 MB


def grow(driver: RawDriver) -> None:
    tree = driver.tree
    tree.file("victim", DATA)
    tree.file("other", b"other")
    directory = tree.directory("d")
    for number in range(5):
        tree.file(f"f{number}", b"x", parent=directory.ino)
    tree.add(1, b"pointer", stat.S_IFLNK | 0o777, b"victim")
    tree.nodes[2].xattrs[b"user.x"] = b"value"
    tree.valid = 0.0


def others_go_on(mount: Mount) -> None:
    """What the mount still does, with a driver that is right again."""
    mount.driver.answers.clear()
    mount.driver.mangle = None
    assert mount.do("slurp", "other") == b"other"
    assert mount.do("names", "d") == [f"f{number}" for number in range(5)]
    mount.do("spill", "new", b"new")
    assert mount.do("slurp", "new") == b"new"
    mount.do("unlink", "new")
    assert mount.do("slurp", "victim") == DATA
    assert mount.shim.memory() < MEMORY


# ---- replies with a wrong form, to every kind of request

OPERATIONS = {
    Opcode.LOOKUP: ("stat", "victim"),
    Opcode.GETATTR: ("stat", ""),
    Opcode.SETATTR: ("chmod", "victim", 0o600),
    Opcode.READLINK: ("readlink", "pointer"),
    Opcode.SYMLINK: ("symlinked", "new"),
    Opcode.MKNOD: ("mkfifo", "new"),
    Opcode.MKDIR: ("mkdir", "new"),
    Opcode.UNLINK: ("unlink", "other"),
    Opcode.RMDIR: ("rmdir", "d"),
    Opcode.RENAME: ("rename_to", "other", "new"),
    Opcode.LINK: ("link_to", "other", "new"),
    Opcode.OPEN: ("slurp", "victim"),
    Opcode.READ: ("direct_read", "victim"),
    Opcode.WRITE: ("spill", "victim", b"w"),
    Opcode.STATFS: ("statfs", ""),
    Opcode.FSYNC: ("fsync", "victim"),
    Opcode.SETXATTR: ("setxattr", "victim", "user.y", b"y"),
    Opcode.GETXATTR: ("getxattr", "victim", "user.x"),
    Opcode.LISTXATTR: ("listxattr", "victim"),
    Opcode.REMOVEXATTR: ("removexattr", "victim", "user.x"),
    Opcode.OPENDIR: ("names", "d"),
    Opcode.READDIRPLUS: ("scan", "d"),
    Opcode.CREATE: ("spill", "new", b"new"),
    Opcode.RENAME2: ("renamed_2", "other", "d/f1"),
    Opcode.FLUSH: ("spill", "victim", b"w"),
}
VARIABLE = {Opcode.READLINK, Opcode.READ, Opcode.GETXATTR, Opcode.LISTXATTR, Opcode.READDIRPLUS}  # their own tests
EMPTY = {
    *(Opcode.UNLINK, Opcode.RMDIR, Opcode.RENAME, Opcode.RENAME2, Opcode.FSYNC, Opcode.SETXATTR, Opcode.REMOVEXATTR),
    Opcode.FLUSH,
}
FEW = {Opcode.READ, Opcode.READDIRPLUS}


def garbage(q: Request, body: bytes) -> Answer:
    return Packets([struct.pack("=IiQ", 0xDEADBEEF, 0, q.unique) + b"\xa5" * 50])


def one_too_long(q: Request, body: bytes) -> Answer:
    return body + b"\0"


def too_long(q: Request, body: bytes) -> Answer:
    return body + bytes(100_000)


def much_too_long(q: Request, body: bytes) -> Answer:
    return Packets([whole(q.unique, bytes(200_000))])


def one_too_short(q: Request, body: bytes) -> Answer:
    return body[:-1] if body else Packets([struct.pack("=IiQ", 15, 0, q.unique)])


def nothing_in_it(q: Request, body: bytes) -> Answer:
    return b"" if body else Packets([struct.pack("=IiQ", 0, 0, q.unique)])


def says_more_than_it_is(q: Request, body: bytes) -> Answer:
    return Packets([struct.pack("=IiQ", 16 + len(body) + 8, 0, q.unique) + body])


def says_less_than_it_is(q: Request, body: bytes) -> Answer:
    return Packets([struct.pack("=IiQ", 16 + len(body) - 1, 0, q.unique) + body])


def an_error_and_a_body(q: Request, body: bytes) -> Answer:
    return Packets([whole(q.unique, body or b"body", -errno.ENOENT)])


def wrong_errno(number: int) -> Wrong:
    return lambda q, body: Packets([whole(q.unique, b"", number)])


FORMS: dict[str, Wrong] = {
    "garbage": garbage,
    "one byte too long": one_too_long,
    "too long": too_long,
    "longer than the buffer": much_too_long,
    "one byte too short": one_too_short,
    "nothing in it": nothing_in_it,
    "says more than it is": says_more_than_it_is,
    "says less than it is": says_less_than_it_is,
    "an error and a body": an_error_and_a_body,
    **{f"errno {number}": wrong_errno(number) for number in (2, 5, -512, -516, -4000, -9999, 2**31 - 1, -(2**31))},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_reply_of_a_wrong_form_to_every_operation_is_eio(form):
    wrong = FORMS[form]
    with mounted(grow, open="driver") as mount:
        driver = mount.driver
        for op, (call, name, *args) in OPERATIONS.items():
            if op in VARIABLE and form in ("one byte too long", "too long", "one byte too short", "nothing in it"):
                continue
            if form == "says more than it is" and op not in FEW:
                continue  # each waits a second for the rest
            driver.answers = {op: lambda q: wrong(q, answer if isinstance(answer := driver.usual(q), bytes) else b"")}
            for _ in range(2):
                got = mount.fails(call, name, *args, seconds=15)
                assert got == errno.EIO, (op.name, got)
                driver.plant(grow)
            named = [fault for fault in mount.faults() if fault[0] == op.name]
            assert len(named) == 1, (op.name, mount.faults())
        others_go_on(mount)


# ---- contents that cannot be


def entry_with(change: Callable[[bytes], bytes]) -> Wrong:
    return lambda q, body: change(body)


def put(at: int, code: str, *values: int) -> Wrong:
    """Change one field of the right answer."""

    def wrong(q: Request, body: bytes) -> Answer:
        field = struct.pack("=" + code, *values)
        return body[:at] + field + body[at + len(field) :]

    return wrong


ENTRY_MODE, ENTRY_SIZE, ATTR_MODE, ATTR_SIZE = 40 + 60, 40 + 8, 16 + 60, 16 + 8
STAT, CREATE, MKDIR = ("stat", "victim"), ("spill", "new", b"x"), ("mkdir", "new")
CONTENTS = {
    "a looked-up node 1": (Opcode.LOOKUP, put(0, "Q", 1), STAT),
    "a created node 0": (Opcode.CREATE, put(0, "Q", 0), CREATE),
    "a created node 1": (Opcode.CREATE, put(0, "Q", 1), CREATE),
    "a made node 0": (Opcode.MKDIR, put(0, "Q", 0), MKDIR),
    "a made node 1": (Opcode.MKDIR, put(0, "Q", 1), MKDIR),
    "a linked node 0": (Opcode.LINK, put(0, "Q", 0), ("link_to", "other", "new")),
    "an entry without a type": (Opcode.LOOKUP, put(ENTRY_MODE, "I", 0o644), STAT),
    "an entry of an unknown type": (Opcode.LOOKUP, put(ENTRY_MODE, "I", 0o170644), STAT),
    "a mode of more than 16 bits": (Opcode.LOOKUP, put(ENTRY_MODE, "I", 0xFFFF0000 | FILE), STAT),
    "a negative size": (Opcode.LOOKUP, put(ENTRY_SIZE, "Q", 1 << 63), STAT),
    "a created directory where a file was wanted": (Opcode.CREATE, put(ENTRY_MODE, "I", DIRECTORY), CREATE),
    "a made file where a directory was wanted": (Opcode.MKDIR, put(ENTRY_MODE, "I", FILE), MKDIR),
    "a file where a link was wanted": (Opcode.SYMLINK, put(ENTRY_MODE, "I", FILE), ("symlinked", "new")),
    "a file where a pipe was wanted": (Opcode.MKNOD, put(ENTRY_MODE, "I", FILE), ("mkfifo", "new")),
    "a linked directory": (Opcode.LINK, put(ENTRY_MODE, "I", DIRECTORY), ("link_to", "other", "new")),
    "an entry time-out of 2 s in ns": (Opcode.LOOKUP, put(32, "I", 2_000_000_000), STAT),
    "an attribute time-out of 1 s in ns": (Opcode.LOOKUP, put(36, "I", 1_000_000_000), STAT),
    "attributes without a type": (Opcode.GETATTR, put(ATTR_MODE, "I", 0), ("stat", "")),
    "a root that is a file": (Opcode.GETATTR, put(ATTR_MODE, "I", FILE), ("stat", "")),
    "attributes with a negative size": (Opcode.GETATTR, put(ATTR_SIZE, "Q", 2**64 - 1), ("stat", "")),
    "attributes valid for 1 s in ns": (Opcode.GETATTR, put(8, "I", 1_000_000_000), ("stat", "")),
    "a changed type": (Opcode.SETATTR, put(ATTR_MODE, "I", DIRECTORY), ("chmod", "victim", 0o600)),
    "more written than asked": (Opcode.WRITE, put(0, "I", 1 << 30), ("spill", "victim", b"w")),
    "an empty link": (Opcode.READLINK, lambda q, body: b"", ("readlink", "pointer")),
    "a link with NUL": (Opcode.READLINK, lambda q, body: b"a\0b", ("readlink", "pointer")),
    "a link that is too long": (Opcode.READLINK, lambda q, body: b"a" * 4096, ("readlink", "pointer")),
    "an xattr longer than asked": (Opcode.GETXATTR, lambda q, body: bytes(70_000), ("getxattr", "victim", "user.x")),
    "more xattrs than asked": (Opcode.LISTXATTR, lambda q, body: bytes(70_000), ("listxattr", "victim")),
    "more read than asked": (Opcode.READ, lambda q, body: bytes(8192), ("direct_read", "victim")),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_contents_that_cannot_be_are_eio(what):
    op, wrong, (call, name, *args) = CONTENTS[what]
    with mounted(grow) as mount:
        driver = mount.driver
        driver.answers[op] = lambda q: wrong(q, answer if isinstance(answer := driver.usual(q), bytes) else b"")
        for _ in range(2):
            assert mount.fails(call, name, *args) == errno.EIO
            driver.plant(grow)
        assert [fault[0] for fault in mount.faults()] == [op.name]
        others_go_on(mount)
        counts = settled(mount)
        assert counts["handles"] == 0
        assert counts["kernel_lookups"] == 0, "look-ups that the kernel does not know of"


def test_a_linked_file_that_becomes_a_directory_does_not_spoil_its_node():
    """A GETATTR with another type makes the kernel's inode bad for ever: it must not get there."""
    with mounted(grow) as mount:
        fd = mount.do("open", "victim", 0)
        for field in (put(ATTR_MODE, "I", DIRECTORY), put(ATTR_SIZE, "Q", 1 << 63)):
            mount.driver.answers[Opcode.GETATTR] = lambda q, field=field: field(q, mount.driver.usual(q))
            assert mount.usual.fails("fstat", fd) == errno.EIO
            mount.driver.answers.clear()
            assert mount.usual.do("fstat", fd)["st_size"] == len(DATA)
            assert mount.usual.do("pread", fd, 100, 0) == DATA[:100]
        mount.usual.do("close", fd)


@pytest.mark.parametrize("seconds", [1 << 40, 1 << 63, 2**64 - 1])
def test_a_huge_time_out_is_long(seconds):
    with mounted(grow) as mount:
        field = put(16, "QQ", seconds, seconds)
        mount.driver.answers[Opcode.LOOKUP] = lambda q: field(q, mount.driver.usual(q))
        for _ in range(3):
            mount.do("stat", "victim")
        assert mount.driver.count(Opcode.LOOKUP) == 1
        assert not mount.faults()


def test_flags_that_a_driver_left_uninitialised_mean_nothing():
    with mounted(grow) as mount:
        field = put(40 + 84, "I", 0xFFFFFFFF)
        mount.driver.answers[Opcode.LOOKUP] = lambda q: field(q, mount.driver.usual(q))
        fd = mount.do("open", "d", 0o200000)
        for _ in range(3):
            assert mount.do("stat", "d/f1")["st_size"] == 1
            assert mount.usual.do("names", f"/proc/self/fd/{fd}") == [f"f{number}" for number in range(5)]
        mount.usual.do("close", fd)


def test_open_flags_that_drivers_may_not_choose_are_dropped():
    """FOPEN_PASSTHROUGH with a made-up backing id would be refused by the kernel for ever."""
    with mounted(grow, open="driver") as mount:
        wild = put(8, "Ii", 0xFFFFFF80, 12345)
        mount.driver.answers[Opcode.OPEN] = lambda q: wild(q, mount.driver.usual(q))
        assert mount.do("slurp", "victim") == DATA
        assert mount.do("slurp", "other") == b"other"


# ---- listings


def listing(*names: bytes, plus: bytes = b"") -> Wrong:
    def wrong(q: Request, body: bytes) -> Answer:
        offset = q.fields(structs.READ_IN)["offset"]
        if offset:
            return b""
        return b"".join(plus + dirent(name, 77, at) for at, name in enumerate(names, 1))

    return wrong


def plus_entry(node: int, mode: int) -> bytes:
    attributes = structs.ATTR.pack(node, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
    return struct.pack("=QQQQII", node, 0, 5, 5, 0, 0) + attributes


LISTINGS = {
    "a name with a slash": listing(b"good", b"../../etc/passwd"),
    "a name with NUL": listing(b"good", b"a\0b"),
    "a name of no length": listing(b"good", b""),
    "a name that is too long": listing(b"n" * 4096),
    "a name that is not all there": lambda q, body: dirent(b"good", 5, 1)[:-8] + structs.DIRENT.pack(5, 2, 999, 8),
    "shorter than its first entry": lambda q, body: dirent(b"a-name-of-some-length", 5, 1)[:20],
    "one byte": lambda q, body: b"\0",
}
PLUS = {
    "an entry for the root": listing(b"x", plus=plus_entry(1, FILE)),
    "an entry without a type": listing(b"x", plus=plus_entry(50, 0o644)),
    "the directory itself": listing(b"x", plus=plus_entry(4, DIRECTORY)),
    "shorter than its first entry": lambda q, body: (plus_entry(50, FILE) + dirent(b"name", 5, 1))[:140],
}


@pytest.mark.parametrize("what", LISTINGS)
def test_a_bad_listing_is_eio(what):
    wrong = LISTINGS[what]
    with mounted(grow, driver_flags=0) as mount:
        driver = mount.driver
        driver.answers[Opcode.READDIR] = lambda q: wrong(q, b"")
        for _ in range(2):
            assert mount.fails("names", "d") == errno.EIO
        assert [fault[0] for fault in mount.faults()] == ["READDIR"]
        others_go_on(mount)


@pytest.mark.parametrize("what", PLUS)
def test_a_bad_listing_with_attributes_is_eio(what):
    wrong = PLUS[what]
    with mounted(grow) as mount:
        driver = mount.driver
        driver.answers[Opcode.READDIRPLUS] = lambda q: wrong(q, b"")
        for _ in range(2):
            assert mount.fails("scan", "d") == errno.EIO
        assert [fault[0] for fault in mount.faults()] == ["READDIRPLUS"]
        others_go_on(mount)


def test_a_listing_that_gives_the_same_again_and_again_ends():
    """A driver that does not look at the offset."""
    with mounted(grow, driver_flags=0) as mount:
        chunk = b"".join(dirent(b"name%d" % number, 5 + number, number + 1) for number in range(100))
        mount.driver.answers[Opcode.READDIR] = lambda q: chunk
        assert mount.fails("count_names", "d") == errno.EIO
        assert [fault[0] for fault in mount.faults()] == ["READDIR"]
        others_go_on(mount)


def endless(q: Request) -> bytes:
    """Always more, and always another name."""
    values = q.fields(structs.READ_IN)
    at, chunk = values["offset"], b""
    size = 2040 + (128 if q.op == Opcode.READDIRPLUS else 0)
    for number in range(at, at + values["size"] // size):
        plus = plus_entry(1000 + number, FILE) if q.op == Opcode.READDIRPLUS else b""
        chunk += plus + dirent(b"%02000d" % number, 1000 + number, number + 1)
    return chunk


def test_a_listing_that_never_ends_ends():
    with mounted(grow, driver_flags=0) as mount:
        driver, other = mount.driver, mount.program()
        driver.answers[Opcode.READDIR] = endless
        mount.usual.start("count_names", mount.path("d"))
        times = []
        for _ in range(20):
            began = time.monotonic()
            assert other.do("statfs", mount.root)
            times.append(time.monotonic() - began)
        assert median(times) < 1.0, "others wait for the listing"
        with pytest.raises(OSError, match="Input/output error"):
            mount.usual.wait(60)
        assert [fault[0] for fault in mount.faults()] == ["READDIR"]
        assert mount.shim.memory() < MEMORY + (2 * LISTING_LIMIT)
        driver.answers.clear()
        assert other.do("slurp", mount.path("other")) == b"other"


def test_the_reader_of_a_listing_that_never_ends_can_be_killed():
    with mounted(grow, driver_flags=int(Init.DO_READDIRPLUS)) as mount:
        mount.driver.answers[Opcode.READDIRPLUS] = endless
        reader = mount.program()
        reader.start("count_names", mount.path("d"))
        mount.driver.wait_for(Opcode.READDIRPLUS, 20)
        reader.signal(9)
        assert reader.ended()
        mount.driver.wait_for(Opcode.RELEASEDIR)
        others_go_on(mount)
