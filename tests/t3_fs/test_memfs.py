"""memfs mounted directly on /dev/fuse: what programs see."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from directmount import Direct, direct_mount, fuse_works

pytestmark = pytest.mark.skipif(not fuse_works() or os.geteuid() != 0, reason="needs /dev/fuse and root")

SIZE = 64 << 20
NS = 10**9


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Direct]:
    with direct_mount("memfs", tmp_path / "mnt", options={"size": SIZE, "inodes": 60000}) as direct:
        assert os.path.ismount(direct.path)
        yield direct


@pytest.fixture
def at(mount: Direct) -> Iterator[Path]:
    """A directory in a mount; when all in it is removed, all space and inodes are to be free again."""

    def free() -> tuple[int, int]:
        answer = os.statvfs(mount.path)
        return answer.f_bfree, answer.f_ffree

    before = free()
    path = mount.path / "at"
    path.mkdir()
    yield path
    subprocess.run(["rm", "-rf", str(path)], check=True)
    until = time.monotonic() + 20
    while free() != before and time.monotonic() < until:
        time.sleep(0.01)  # the kernel sends RELEASE and FORGET when it likes, and tells nobody
    assert free() == before


def test_an_unlinked_open_file_is_a_file_like_any_other(at: Path) -> None:
    path = at / "file"
    with path.open("w+b") as file:
        file.write(b"before")
        file.flush()
        path.unlink()
        assert os.fstat(file.fileno()).st_nlink == 0
        file.write(b" and after")
        file.flush()
        os.fchmod(file.fileno(), 0o600)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(file.fileno(), 100, 0) == b"before and after"
        path.write_bytes(b"another")
        assert os.pread(file.fileno(), 100, 0) == b"before and after"


def test_a_shared_mapping_reaches_the_file(at: Path) -> None:
    path = at / "file"
    path.write_bytes(bytes(20000))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 20000) as memory:
        memory[4090:4100] = b"0123456789"
        memory.flush()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(file.fileno(), 12, 4089) == b"\x000123456789\x00"


def test_a_sparse_file_costs_what_was_written(at: Path, mount: Direct) -> None:
    before = os.statvfs(mount.path).f_bfree
    with (at / "file").open("w+b") as file:
        assert os.pwrite(file.fileno(), b"end", 1 << 40) == 3
        os.ftruncate(file.fileno(), 1 << 41)
        st = os.fstat(file.fileno())
        assert (st.st_size, st.st_blocks) == (1 << 41, 8)
        assert os.statvfs(mount.path).f_bfree == before - 1
        assert os.pread(file.fileno(), 8, (1 << 40) - 2) == b"\0\0end\0\0\0"
        os.ftruncate(file.fileno(), 0)
        assert os.statvfs(mount.path).f_bfree == before


def test_space_ends_exactly_where_it_was_said(at: Path, mount: Direct) -> None:
    left = os.statvfs(mount.path).f_bfree * 4096
    with (at / "file").open("wb", buffering=0) as file:
        for start in range(0, left, 1 << 20):
            assert file.write(bytes(1 << 20)) == min(1 << 20, left - start)
        with pytest.raises(OSError) as caught:
            file.write(b"x")
        assert caught.value.errno == errno.ENOSPC
        assert os.statvfs(mount.path).f_bfree == 0
        assert os.fstat(file.fileno()).st_size == left
        assert os.pwrite(file.fileno(), b"again", 100) == 5
        os.ftruncate(file.fileno(), left - 1)
        os.pwrite(file.fileno(), b"xy", left - 1)
    (at / "empty").touch()


def test_times_are_kept_to_the_nanosecond_and_move_with_each_operation(at: Path) -> None:
    def times(path: Path) -> tuple[int, int, int]:
        st = path.lstat()
        return st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns

    path = at / "file"
    path.write_bytes(b"x")
    os.utime(path, ns=(5 * NS + 1, 6 * NS + 999_999_999))
    assert times(path)[:2] == (5 * NS + 1, 6 * NS + 999_999_999)
    os.utime(path, ns=(-1, -NS - 1))
    assert times(path)[:2] == (-1, -NS - 1)
    os.utime(path, ns=(7 * NS, 6 * NS))
    before = times(path)
    path.chmod(0o600)
    assert times(path)[:2] == before[:2]
    assert times(path)[2] > before[2]
    with path.open("r+b") as file:
        file.write(b"y")
    assert times(path)[1] > 1000 * NS
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.read()
    assert times(path)[0] >= times(path)[1], "a read after a write moves the access time"
    parent = times(at)
    for change in (
        lambda: (at / "link").symlink_to("x"),
        lambda: (at / "link").rename(at / "moved"),
        lambda: os.link(path, at / "hard"),
        (at / "moved").unlink,
        (at / "sub").mkdir,
        (at / "sub").rmdir,
        lambda: os.mkfifo(at / "fifo"),
    ):
        change()
        assert times(at)[1] > parent[1]
        assert times(at)[2] > parent[2]
        assert times(at)[0] == parent[0]
        parent = times(at)


def test_device_numbers_of_special_files(at: Path) -> None:
    for kind, number in ((stat.S_IFCHR, os.makedev(1, 3)), (stat.S_IFBLK, os.makedev(4000, 1000000))):
        os.mknod(at / "node", kind | 0o640, number)
        st = (at / "node").stat()
        assert (st.st_mode, st.st_rdev) == (kind | 0o640, number)
        (at / "node").unlink()
    os.mknod(at / "socket", stat.S_IFSOCK | 0o600)
    assert stat.S_ISSOCK((at / "socket").stat().st_mode)


def test_a_directory_being_emptied_while_it_is_listed_loses_nothing(at: Path) -> None:
    names = {f"file{i:05}" for i in range(5000)}
    for name in names:
        os.close(os.open(at / name, os.O_CREAT))
    seen = []
    with os.scandir(at) as listing:
        for entry in listing:
            seen.append(entry.name)
            os.unlink(entry)
    assert len(seen) == len(names)
    assert set(seen) == names
    assert os.listdir(at) == []


def test_renaming_everything_that_a_listing_shows_comes_to_an_end(at: Path) -> None:
    for i in range(1000):
        (at / f"{i}").touch()
    with os.scandir(at) as listing:
        for count, entry in enumerate(listing):
            os.rename(entry, at / f"renamed{count}")
            assert count < 3000, "the listing follows its own changes"
    assert len(os.listdir(at)) == 1000


def test_an_open_directory_that_is_rewound_shows_what_is_new(at: Path) -> None:
    fd = os.open(at, os.O_RDONLY)
    try:
        assert os.listdir(fd) == []
        for i in range(2000):
            os.close(os.open(at / f"new{i:0100}", os.O_CREAT))
        assert len(os.listdir(fd)) == 2000
    finally:
        os.close(fd)


def test_dot_and_dotdot_are_listed_with_their_inodes(at: Path) -> None:
    shown = subprocess.run(["ls", "-ai", at], check=True, capture_output=True, text=True).stdout.split()
    assert shown == [str(at.stat().st_ino), ".", str(at.parent.stat().st_ino), ".."]


def test_the_flags_of_setxattr(at: Path) -> None:
    os.setxattr(at, "user.a", b"1", os.XATTR_CREATE)
    with pytest.raises(FileExistsError):
        os.setxattr(at, "user.a", b"2", os.XATTR_CREATE)
    with pytest.raises(OSError) as caught:
        os.setxattr(at, "user.b", b"2", os.XATTR_REPLACE)
    assert caught.value.errno == errno.ENODATA
    os.setxattr(at, "user.a", b"v" * 65536, os.XATTR_REPLACE)
    assert os.getxattr(at, "user.a") == b"v" * 65536


def test_access_lists_are_obeyed(at: Path) -> None:
    mounted = at / "file"
    mounted.write_bytes(b"secret")
    mounted.chmod(0o600)
    at.chmod(0o755)

    def readable() -> bool:
        # By a relative name: the directories above the mount may be closed to others.
        done = subprocess.run(["cat", "file"], cwd=at, user=4242, extra_groups=[], check=False, capture_output=True)
        return done.stdout == b"secret"

    assert not readable()
    entries = [(1, 6, -1), (2, 4, 4242), (4, 0, -1), (16, 4, -1), (32, 0, -1)]
    value = b"\2\0\0\0" + b"".join(
        tag.to_bytes(2, "little") + perm.to_bytes(2, "little") + (who & 0xFFFFFFFF).to_bytes(4, "little")
        for tag, perm, who in entries
    )
    os.setxattr(mounted, "system.posix_acl_access", value)
    assert stat.S_IMODE(mounted.stat().st_mode) == 0o640
    assert readable()
    mounted.chmod(0o600)
    assert not readable()


def test_capabilities_are_dropped_by_a_write(at: Path) -> None:
    path = at / "file"
    path.write_bytes(b"x")
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    os.setxattr(path, "security.capability", capability)
    assert os.getxattr(path, "security.capability") == capability
    with path.open("r+b") as file:
        file.write(b"y")
    assert os.listxattr(path) == []


def test_a_large_tree_comes_and_goes(at: Path) -> None:
    script = (
        "for d in a b c d; do mkdir -p $d/$d; (cd $d/$d; seq 1 500 | xargs touch; for i in 1 2 3; do"
        " head -c 300000 /dev/urandom > r$i; ln r$i l$i; ln -s r$i s$i; done); done;"
        " tar cf all.tar a b c d; mkdir copy; tar xf all.tar -C copy;"
        " for d in a b c d; do diff -r --no-dereference $d copy/$d || exit 1; done"
    )
    subprocess.run(["sh", "-c", script], cwd=at, check=True, timeout=60)
