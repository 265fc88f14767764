"""What the kernel holds, what the shim holds and what the driver gave: after everything is dropped, all of it is zero.

Before unmount, because the kernel sends no last FORGETs.
"""

from __future__ import annotations

import errno
import stat

import pytest

from tests.t3_shim.raw_driver import RawDriver
from tests.t3_shim.supervising import Mount, can_mount, mounted
from tests.t3_shim.tree import ROOT
from udf.fuse.flags import Init
from udf.fuse.opcodes import Opcode

pytestmark = can_mount


def grow(driver: RawDriver) -> None:
    """Directories, files, a file with two names, a symbolic link."""
    tree = driver.tree
    for top in range(4):
        directory = tree.directory(f"d{top}")
        for name in range(20):
            tree.file(f"f{name}", b"x" * name, parent=directory.ino)
        below = tree.directory("below", directory.ino)
        node = tree.file("deep", b"deep", parent=below.ino)
        tree.nodes[ROOT].children[f"link{top}".encode()] = node.ino
        node.nlink = 2
        tree.add(below.ino, b"pointer", stat.S_IFLNK | 0o777, b"deep")


def settled(mount: Mount) -> dict[str, int]:
    """Drop what the kernel holds, and return the counters once the FORGETs have gone through."""
    counts: dict[str, int] = {}
    for _ in range(20):
        mount.usual.do("drop_caches")
        counts = mount.counters()
        if not counts["kernel_lookups"] and counts["nodes"] == 1:
            break
    return counts


def nothing_is_held(mount: Mount) -> None:
    counts = settled(mount)
    mount.driver.wait_until(lambda: not mount.tree.lookups() and not mount.tree.handles)
    held = {node.ino: node.lookups for node in mount.tree.nodes.values() if node.lookups}
    assert (counts["kernel_lookups"], counts["nodes"], counts["driver_lookups"], held) == (0, 1, 0, {}), counts
    assert counts["handles"] == counts["waiting"] == counts["late"] == 0
    assert not mount.tree.unknown_forgets
    assert not mount.tree.handles, "a handle of the driver's was never released"


ALL_THREE = pytest.mark.parametrize(
    "config", [{"exclusive": True}, {}, {"valid": 0.0}], ids=["exclusive", "valid", "0 s"]
)


def start(config: dict[str, object], **more: object):
    valid = config.get("valid", 1000.0)

    def prepare(driver: RawDriver) -> None:
        grow(driver)
        driver.tree.valid = valid

    return mounted(prepare, exclusive=bool(config.get("exclusive")), **more)


@ALL_THREE
def test_after_a_walk(config):
    with start(config) as mount:
        assert mount.do("walk") == 4 * 23 + 4 + 4
        assert mount.counters()["kernel_lookups"] > 50
        nothing_is_held(mount)
        assert mount.do("walk") == 4 * 23 + 4 + 4
        nothing_is_held(mount)


@pytest.mark.parametrize("flags", [Init.DO_READDIRPLUS, Init(0)], ids=["READDIRPLUS only", "READDIR only"])
def test_after_a_walk_over_a_driver_with_one_kind_of_listing(flags):
    with start({}, driver_flags=int(flags)) as mount:
        mount.do("walk")
        nothing_is_held(mount)


@ALL_THREE
def test_after_stats_of_everything_again_and_again(config):
    with start(config) as mount:
        for _ in range(3):
            for name in ("d0", "d0/f1", "d1/below/deep", "link1", "d2/below/pointer"):
                mount.do("stat", name)
            assert mount.fails("stat", "d0/missing") == errno.ENOENT
        nothing_is_held(mount)


@ALL_THREE
def test_after_making_and_removing(config):
    with start(config) as mount:
        for _ in range(3):
            mount.do("mkdir", "new")
            mount.do("spill", "new/file", b"data")
            mount.do("link", "new/file", mount.path("new/second"))
            mount.do("symlink", "new/file", mount.path("new/pointer"))
            mount.usual.do("mkfifo", mount.path("new/fifo"))
            mount.do("names", "new")
            for name in ("file", "second", "pointer", "fifo"):
                mount.do("unlink", f"new/{name}")
            mount.do("rmdir", "new")
        assert mount.fails("stat", "new") == errno.ENOENT
        nothing_is_held(mount)


@ALL_THREE
def test_after_renames_of_every_kind(config):
    with start(config) as mount:
        mount.do("rename", "d0/f1", mount.path("d1/moved"))
        mount.do("rename", "d0/f2", mount.path("d1/f2"))  # over another
        mount.do("rename", "d2/below", mount.path("d3/from d2"))
        mount.do("renameat2", "d0/f3", mount.path("d3/f4"), 2)
        mount.do("renameat2", "d0", mount.path("d1/f5"), 2)
        assert mount.fails("renameat2", "d2/f6", mount.path("d2/f7"), 1) == errno.EEXIST
        mount.do("rename", "link1", mount.path("d1/below/deep"))  # two names of one file: nothing happens
        assert mount.do("slurp", "d3/from d2/deep") == b"deep"
        assert mount.do("stat", "d3/f4")["st_size"] == 3
        mount.do("walk")
        nothing_is_held(mount)


@ALL_THREE
def test_after_unlinking_what_is_open(config):
    with start(config) as mount:
        fd = mount.do("open", "d0/f5", 2)
        mount.do("unlink", "d0/f5")
        assert mount.usual.do("pread", fd, 10, 0) == b"xxxxx"
        mount.do("spill", "d0/f5", b"another")
        assert mount.usual.do("pread", fd, 10, 0) == b"xxxxx"
        assert settled(mount)["nodes"] > 1
        mount.usual.do("close", fd)
        nothing_is_held(mount)


def test_after_a_temporary_file_that_gets_a_name():
    """O_TMPFILE and linkat: its data was in one node and its name another."""
    with mounted(lambda driver: driver.tree.directory("d"), exclusive=True) as mount:
        driver, tree = mount.driver, mount.tree

        def tmpfile(request):
            node = tree.add(request.node, b"#tmp", stat.S_IFREG | 0o644)
            del tree.nodes[request.node].children[b"#tmp"]
            node.nlink = 0
            return tree.entry(node) + tree.opened(node.ino)

        driver.answers[Opcode.TMPFILE] = tmpfile
        fd = mount.do("open", "d", 0o20200000 | 2, 0o644)  # O_TMPFILE | O_RDWR
        mount.usual.do("write", fd, b"before")
        mount.usual.do("linkat", fd, mount.path("d/named"))
        assert mount.do("stat", "d/named")["st_ino"] == mount.usual.do("fstat", fd)["st_ino"]
        mount.usual.do("write", fd, b" and after")
        assert mount.do("slurp", "d/named") == b"before and after"
        mount.usual.do("close", fd)
        nothing_is_held(mount)


def test_after_listings_that_were_left_in_the_middle():
    def prepare(driver: RawDriver) -> None:
        for number in range(3000):
            driver.tree.file(f"a-file-with-some-name-{number}")

    with mounted(prepare, exclusive=True) as mount:
        for _ in range(3):
            fd = mount.do("open", "", 0o200000)
            assert mount.usual.do("entries", fd)
            mount.usual.do("close", fd)
        assert mount.do("count_names") == 3000
        assert mount.do("count_names") == 3000
        nothing_is_held(mount)


def test_a_negative_name_belongs_to_its_directory_and_not_to_the_next_in_its_place():
    """Directories that took a forgotten one's slot inherited what was not in it."""

    def prepare(driver: RawDriver) -> None:
        for number in range(8):
            directory = driver.tree.directory(f"d{number}")
            if number:
                driver.tree.file("x", b"here", parent=directory.ino)

    with mounted(prepare, exclusive=True) as mount:
        assert mount.fails("stat", "d0/x") == errno.ENOENT
        assert settled(mount)["nodes"] == 1
        for number in range(1, 8):
            assert mount.do("slurp", f"d{number}/x") == b"here"
            mount.usual.do("drop_caches")


def test_a_bad_entry_is_given_back_to_the_driver():
    """EIO to the program, and the look-up that the driver counted is forgotten."""

    def prepare(driver: RawDriver) -> None:
        driver.tree.file("x")
        driver.answers[Opcode.LOOKUP] = lambda q: with_bad_type(driver.usual(q))

    def with_bad_type(answer):
        return answer[:100] + bytes(4) + answer[104:] if isinstance(answer, bytes) else answer

    with mounted(prepare) as mount:
        assert mount.fails("stat", "x") == errno.EIO
        nothing_is_held(mount)
