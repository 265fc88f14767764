"""What is known is answered without the driver: a hit is an operation with no round trip. And it is never stale."""

from __future__ import annotations

import errno
import os
import stat
import time

import pytest

from tests.t3_shim.raw_driver import RawDriver
from tests.t3_shim.supervising import Mount, can_mount, mounted
from udf.fuse import structs
from udf.fuse.flags import EntryExpire
from udf.fuse.opcodes import Notify, Opcode

pytestmark = can_mount


def grow(driver: RawDriver) -> None:
    tree = driver.tree
    tree.file("file", b"contents")
    directory = tree.directory("d")
    for number in range(30):
        tree.file(f"f{number}", b"x" * number, parent=directory.ino)
    tree.nodes[2].xattrs[b"user.x"] = b"value"
    tree.negative = 1000.0


EXCLUSIVE = pytest.mark.parametrize("exclusive", [False, True], ids=["valid", "exclusive"])


def prepared(valid: float = 1000.0):
    def prepare(driver: RawDriver) -> None:
        grow(driver)
        driver.tree.valid = valid
        driver.tree.negative = valid

    return prepare


WARM = {
    "stat": ("stat", "d/f3"),
    "a name": ("stat", "file"),
    "a missing name": ("fails_stat", "d/missing"),
    "a listing": ("names", "d"),
    "a listing with attributes": ("scan", "d"),
    "opening": ("access_open", "file"),
    "reading": ("slurp", "file"),
    "walking": ("walk", ""),
}


def hit(mount: Mount, call: str, name: str) -> None:
    if call == "fails_stat":
        assert mount.fails("stat", name) == errno.ENOENT
    else:
        mount.do(call, name)


@EXCLUSIVE
@pytest.mark.parametrize("what", WARM)
def test_what_is_warm_makes_no_round_trip(what, exclusive):
    # Within time-outs the kernel asks the shim again for what it drops by itself, and for data when a file is opened.
    with mounted(prepared(), exclusive=exclusive, **({} if exclusive else {"open": "lazy"})) as mount:
        for _ in range(2):
            hit(mount, *WARM[what])
        mount.counters()  # RELEASEs go by themselves
        trips = mount.round_trips(lambda: [hit(mount, *WARM[what]) for _ in range(5)])
        assert trips == 0, mount.driver.counts()


@EXCLUSIVE
def test_the_shim_answers_what_the_kernel_has_forgotten(exclusive):
    """While a file is open its node stays with all its names, and the counters say whose cache it was."""

    def prepare(driver: RawDriver) -> None:
        prepared()(driver)
        driver.tree.nodes[2].nlink = 2
        driver.tree.nodes[3].children[b"second"] = 2

    with mounted(prepare, exclusive=exclusive) as mount:
        fds = [mount.do("open", name, os.O_RDONLY) for name in ("file", "d")]
        mount.do("stat", "d/second")
        mount.do("names", "d")
        before = mount.counters()
        mount.driver.forget_log()
        mount.usual.do("drop_caches")
        assert mount.do("stat", "d/second")["st_nlink"] == 2
        assert len(mount.do("names", "d")) == 31
        after = mount.counters()
        assert after["name_hits"] > before["name_hits"]
        assert exclusive or after["listing_hits"] > before["listing_hits"], "the kernel keeps exclusive ones itself"
        assert mount.driver.count(Opcode.LOOKUP, Opcode.GETATTR, Opcode.READDIR, Opcode.READDIRPLUS) == 0
        for fd in fds:
            mount.usual.do("close", fd)


def test_time_outs_of_names_and_attributes_end():
    with mounted(prepared(0.3)) as mount:
        mount.do("stat", "file")
        assert mount.fails("stat", "missing") == errno.ENOENT
        time.sleep(0.35)
        mount.tree.nodes[2].data += b" and more"
        mount.tree.file("missing", b"here")
        assert mount.do("stat", "file")["st_size"] == len(b"contents and more")
        assert mount.do("slurp", "missing") == b"here"


def test_exclusive_is_for_ever_whatever_the_driver_says():
    with mounted(prepared(0.0), exclusive=True) as mount:
        mount.do("walk")
        assert mount.fails("stat", "missing") == errno.ENOENT
        time.sleep(0.3)

        def again() -> None:
            mount.do("walk")
            mount.do("stat", "file")
            assert mount.fails("stat", "missing") == errno.ENOENT

        assert mount.round_trips(again) == 0


def test_a_name_that_is_good_for_this_once_is_asked_for_again_even_on_an_exclusive_mount():
    with mounted(prepared(1e-6), exclusive=True) as mount:
        assert mount.fails("stat", "missing") == errno.ENOENT
        mount.tree.file("missing", b"here")
        assert mount.do("slurp", "missing") == b"here"
        del mount.tree.nodes[1].children[b"missing"]
        assert mount.fails("stat", "missing") == errno.ENOENT


def test_zero_time_outs_are_never_answered_from_a_cache():
    with mounted(prepared(0.0)) as mount:
        for size in range(1, 6):
            mount.tree.nodes[2].data[:] = b"y" * size
            assert mount.do("stat", "file")["st_size"] == size
            mount.tree.file(f"new{size}")
            assert f"new{size}" in mount.do("names")
            assert mount.fails("stat", f"soon{size}") == errno.ENOENT
            mount.tree.file(f"soon{size}", b"s")
            assert mount.do("slurp", f"soon{size}") == b"s"


# ---- one's own changes


@EXCLUSIVE
def test_own_changes_are_seen_at_once(exclusive):
    with mounted(prepared(), exclusive=exclusive) as mount:
        do, fails = mount.do, mount.fails
        do("walk")
        assert fails("stat", "new") == errno.ENOENT
        do("spill", "new", b"12345")
        assert do("stat", "new")["st_size"] == 5
        assert "new" in do("names")
        do("spill", "new", b"abcdefgh")
        assert do("stat", "new")["st_size"] == 8
        assert do("slurp", "new") == b"abcdefgh"
        do("truncate", "new", 3)
        assert do("stat", "new")["st_size"] == 3
        do("chmod", "new", 0o600)
        assert stat.S_IMODE(do("stat", "new")["st_mode"]) == 0o600
        do("chown", "new", 7, 8)
        assert (do("stat", "new")["st_uid"], do("stat", "new")["st_gid"]) == (7, 8)
        assert fails("stat", "second") == errno.ENOENT
        do("link", "new", mount.path("second"))
        assert do("stat", "new")["st_nlink"] == do("stat", "second")["st_nlink"] == 2
        assert do("stat", "new")["st_ino"] == do("stat", "second")["st_ino"]
        do("unlink", "second")
        assert fails("stat", "second") == errno.ENOENT
        assert do("stat", "new")["st_nlink"] == 1
        assert fails("stat", "d/moved") == errno.ENOENT
        do("rename", "new", mount.path("d/moved"))
        assert fails("stat", "new") == errno.ENOENT
        assert do("slurp", "d/moved") == b"abc"
        assert "moved" in do("names", "d")
        assert "new" not in do("names")
        do("renameat2", "d/moved", mount.path("file"), 2)
        assert (do("slurp", "file"), do("slurp", "d/moved")) == (b"abc", b"contents")
        do("setxattr", "file", "user.y", b"why")
        assert do("getxattr", "file", "user.y") == b"why"
        do("removexattr", "file", "user.y")
        assert fails("getxattr", "file", "user.y") == errno.ENODATA
        do("mkdir", "e")
        assert do("names", "e") == []
        mount.usual.do("symlink", "target", mount.path("e/p"))
        assert do("readlink", "e/p") == "target"
        assert do("names", "e") == ["p"]
        do("unlink", "e/p")
        do("rmdir", "e")
        assert fails("stat", "e") == errno.ENOENT
        assert do("names") == ["d", "file"]


@EXCLUSIVE
def test_a_change_that_fails_changes_nothing_that_is_known(exclusive):
    with mounted(prepared(), exclusive=exclusive) as mount:
        mount.do("walk")
        for op, call, name, *args in (
            (Opcode.UNLINK, "unlink", "file"),
            (Opcode.RENAME, "rename_to", "file", "moved"),
            (Opcode.SETATTR, "chmod", "file", 0o600),
            (Opcode.WRITE, "spill", "file", b"overwritten"),
            (Opcode.LINK, "link_to", "file", "moved"),
        ):
            mount.driver.answers[op] = lambda q: errno.EROFS
            assert mount.fails(call, name, *args) == errno.EROFS
            mount.driver.answers.clear()
            assert mount.do("slurp", "file") == b"contents"
            assert stat.S_IMODE(mount.do("stat", "file")["st_mode"]) == 0o644
            assert mount.fails("stat", "moved") == errno.ENOENT
            assert mount.do("names") == ["d", "file"]


def test_attributes_that_were_asked_for_before_a_change_are_not_kept_after_it():
    """A GETATTR that was under way while a WRITE was answered carries the old size."""
    with mounted(prepared(0.0), exclusive=True) as mount:
        driver, writer, looker = mount.driver, mount.program(), mount.program()
        fd = looker.do("open", mount.path("file"), os.O_RDONLY)
        writer.do("spill", mount.path("file"), b"C")
        driver.hold(Opcode.GETATTR)
        looker.start("fstat", fd)
        request = driver.wait_for(Opcode.GETATTR, driver.count(Opcode.GETATTR) + 1)
        old = driver.usual(request)
        writer.do("spill", mount.path("file"), b"something longer than before")
        driver.answers.clear()
        driver.reply(request, old)
        looker.wait()
        assert mount.do("stat", "file")["st_size"] == 28


# ---- what the driver says has changed


def inval_inode(mount: Mount, node: int, offset: int = 0) -> None:
    mount.driver.notify(Notify.INVAL_INODE, structs.NOTIFY_INVAL_INODE_OUT.pack(node, offset, 0))


def inval_entry(mount: Mount, parent: int, name: bytes, flags: int = 0) -> None:
    body = structs.NOTIFY_INVAL_ENTRY_OUT.pack(parent, len(name), flags) + name + b"\0"
    mount.driver.notify(Notify.INVAL_ENTRY, body)


def delete(mount: Mount, parent: int, child: int, name: bytes) -> None:
    body = structs.NOTIFY_DELETE_OUT.pack(parent, child, len(name)) + name + b"\0"
    mount.driver.notify(Notify.DELETE, body)


def store(mount: Mount, node: int, offset: int, data: bytes) -> None:
    mount.driver.notify(Notify.STORE, structs.NOTIFY_STORE_OUT.pack(node, offset, len(data)) + data)


def eventually(mount: Mount, wanted: object, call: str, name: str, seconds: float = 20.0) -> None:
    """A notification has no answer: what it changes is seen soon."""
    until = time.monotonic() + seconds
    while True:
        try:
            got = mount.do(call, name)
        except OSError as error:
            got = error.errno
        if got == wanted or (callable(wanted) and wanted(got)):
            return
        assert time.monotonic() < until, f"{call} {name} still gives {got!r}"


@EXCLUSIVE
def test_invalidated_data_is_read_again(exclusive):
    with mounted(prepared(), exclusive=exclusive) as mount:
        assert mount.do("slurp", "file") == b"contents"
        mount.tree.nodes[2].data[:] = b"CONTENTS, longer"
        inval_inode(mount, 2)
        eventually(mount, b"CONTENTS, longer", "slurp", "file")
        assert mount.counters()["notifications"] == 1


@EXCLUSIVE
def test_invalidated_attributes_are_asked_for_again(exclusive):
    with mounted(prepared(), exclusive=exclusive) as mount:
        mount.do("stat", "file")
        mount.tree.nodes[2].mode = stat.S_IFREG | 0o600
        inval_inode(mount, 2, -1)
        eventually(mount, lambda got: stat.S_IMODE(got["st_mode"]) == 0o600, "stat", "file")


@EXCLUSIVE
@pytest.mark.parametrize("flags", [0, int(EntryExpire.EXPIRE_ONLY)], ids=["invalidate", "expire"])
def test_an_invalidated_name_is_looked_up_again(exclusive, flags):
    with mounted(prepared(), exclusive=exclusive) as mount:
        mount.do("stat", "file")
        assert mount.fails("stat", "new") == errno.ENOENT
        mount.do("names")
        tree = mount.tree
        del tree.nodes[1].children[b"file"]
        tree.file("new", b"new")
        inval_entry(mount, 1, b"file", flags)
        inval_entry(mount, 1, b"new", flags)
        inval_inode(mount, 1, 0)  # the listing that the kernel may have
        eventually(mount, errno.ENOENT, "stat", "file")
        eventually(mount, b"new", "slurp", "new")
        eventually(mount, ["d", "new"], "names", "")


def test_a_deleted_name_is_gone():
    with mounted(prepared(), exclusive=True) as mount:
        mount.do("stat", "file")
        del mount.tree.nodes[1].children[b"file"]
        delete(mount, 1, 2, b"file")
        eventually(mount, errno.ENOENT, "stat", "file")


def test_stored_data_is_read_without_a_read():
    with mounted(prepared(), exclusive=True) as mount:
        mount.do("slurp", "file")
        mount.tree.nodes[2].data[:] = b"stored, "
        mount.driver.forget_log()
        store(mount, 2, 0, b"stored, ")
        eventually(mount, b"stored, ", "slurp", "file")
        assert mount.driver.count(Opcode.READ) == 0


@pytest.mark.parametrize("call", ["slurp", "direct_read"])
def test_an_invalidation_during_a_read_of_that_file_waits_for_nobody(call):
    """INVAL_INODE waits in the kernel for the page that the READ holds: in the loop it would be a deadlock."""
    with mounted(prepared()) as mount:
        driver, other = mount.driver, mount.program()
        driver.hold(Opcode.READ)
        mount.usual.start(call, mount.path("file"))
        request = driver.wait_for(Opcode.READ)
        for _ in range(3):
            inval_inode(mount, 2)
        driver.answers.clear()
        assert other.do("slurp", mount.path("d/f5")) == b"x" * 5
        driver.reply(request, driver.usual(request))
        assert mount.usual.wait() == b"contents"
        mount.tree.nodes[2].data[:] = b"changed!"
        inval_inode(mount, 2)
        eventually(mount, b"changed!", "slurp", "file")


def test_an_invalidation_during_a_create_in_that_directory_waits_for_nobody():
    with mounted(prepared()) as mount:
        driver, other = mount.driver, mount.program()
        driver.hold(Opcode.CREATE)
        mount.usual.start("spill", mount.path("new"), b"new")
        request = driver.wait_for(Opcode.CREATE)
        inval_entry(mount, 1, b"file")
        delete(mount, 1, 2, b"file")
        driver.answers.clear()
        assert other.do("statfs", mount.root)
        driver.reply(request, driver.usual(request))
        assert mount.usual.wait() == 3
        assert mount.do("slurp", "file") == b"contents"


def test_a_notification_about_what_nobody_knows_is_nothing():
    with mounted(prepared()) as mount:
        inval_inode(mount, 999)
        inval_entry(mount, 999, b"x")
        inval_entry(mount, 1, b"unknown")
        delete(mount, 1, 999, b"unknown")
        store(mount, 999, 0, b"x")
        assert mount.do("slurp", "file") == b"contents"
        assert not mount.faults()


def test_what_a_driver_retrieves_from_the_page_cache_reaches_it():
    with mounted(prepared(), exclusive=True) as mount:
        mount.do("slurp", "file")
        mount.driver.notify(Notify.RETRIEVE, structs.NOTIFY_RETRIEVE_OUT.pack(4711, 2, 0, 4096))
        reply = mount.driver.wait_for(Opcode.NOTIFY_REPLY)
        assert (reply.unique, reply.node) == (4711, 2)
        assert reply.body[structs.NOTIFY_RETRIEVE_IN.size :].startswith(b"contents")
