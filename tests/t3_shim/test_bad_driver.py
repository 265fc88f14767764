"""A driver that does each wrong thing there is: the program gets an errno in bounded time, the log one line, and the
mount goes on as if nothing had been."""

from __future__ import annotations

import errno
import os
import stat
import struct
import time
from collections.abc import Callable

import pytest

from tests.t3_shim.raw_driver import Answer, Packets, RawDriver, Request, dirent, whole, with_mode
from tests.t3_shim.supervising import Mount, can_mount, mounted
from udf.fuse import structs
from udf.fuse.opcodes import Notify, Opcode

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
            if form == "nothing in it" and op in EMPTY:
                continue  # an answer of no length: the same as below
            driver.answers = {op: lambda q: wrong(q, answer if isinstance(answer := driver.usual(q), bytes) else b"")}
            for _ in range(2):
                got = mount.fails(call, name, *args, seconds=5)
                # A kernel that is refused one kind of making or renaming tries another, and STATFS has no errno of ours
                assert got == errno.EIO, (op.name, got)
                driver.tree = tree = mount.tree = type(driver.tree)()
                driver._table = tree.table()
                grow(driver)
                for node in tree.nodes.values():
                    node.lookups = 1 << 30  # the new tree does not know what the old one gave
            named = [fault for fault in mount.shim.faults() if fault[0] == op.name]
            assert len(named) == 1, (op.name, mount.shim.faults())
        others_go_on(mount)
