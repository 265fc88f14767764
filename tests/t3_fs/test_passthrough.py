"""fs/passthrough on a real mount, served directly on /dev/fuse: POSIX as programs see it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from directmount import Direct, direct_mount, fuse_works

pytestmark = pytest.mark.skipif(not fuse_works(), reason="needs /dev/fuse")
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

CAP_DAC_READ_SEARCH = 2
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
BY_NAME: dict[str, tuple[int, ...]] = {"by handle": (), "by name": (CAP_DAC_READ_SEARCH,)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    where = tmp_path / "source"
    where.mkdir()
    return where


@pytest.fixture(params=BY_NAME)
def mnt(request: pytest.FixtureRequest, source: Path, tmp_path: Path) -> Iterator[Path]:
    with direct_mount("passthrough", tmp_path / "mnt", source, without=BY_NAME[request.param]) as direct:
        yield direct.path


@pytest.fixture
def quick(source: Path, tmp_path: Path) -> Iterator[Direct]:
    with direct_mount("passthrough", tmp_path / "mnt", source, options={"timeout": 0.05}) as direct:
        yield direct


def refused(number: int, call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[number]


def rename(old: Path, new: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags):
        raise OSError(ctypes.get_errno(), "renameat2")


def run_as(uid: int, gid: int, code: str, cwd: Path, umask: int = 0o022) -> None:
    """Run code in another process as that user, who need not be able to read the interpreter's files."""
    change = f"import os\nos.setgroups([])\nos.setgid({gid})\nos.setuid({uid})\n"
    subprocess.run([sys.executable, "-c", change + code], cwd=cwd, umask=umask, check=True, timeout=60)


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what the kernel's time-outs bring about: there is no event for it."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "did not come true within twenty seconds"
        time.sleep(0.01)


def test_files_are_the_same_on_both_sides(source: Path, mnt: Path) -> None:
    (source / "dir").mkdir()
    (source / "dir" / "file").write_bytes(os.urandom(300_000))
    assert (mnt / "dir" / "file").read_bytes() == (source / "dir" / "file").read_bytes()
    (mnt / "dir" / "new").write_text("written through the mount")
    assert (source / "dir" / "new").read_text() == "written through the mount"
    there, here = os.stat(source / "dir" / "file"), os.stat(mnt / "dir" / "file")
    for field in ("st_ino", "st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks", "st_mtime_ns"):
        assert getattr(there, field) == getattr(here, field), field
    assert sorted(os.listdir(mnt / "dir")) == ["file", "new"]


def test_names_of_one_file_share_one_inode(mnt: Path) -> None:
    (mnt / "a").write_text("x")
    os.link(mnt / "a", mnt / "b")
    assert os.stat(mnt / "a").st_ino == os.stat(mnt / "b").st_ino
    assert os.stat(mnt / "a").st_nlink == 2
    (mnt / "b").write_text("changed")
    assert (mnt / "a").read_text() == "changed"
    os.unlink(mnt / "a")
    assert os.stat(mnt / "b").st_nlink == 1
    os.symlink("b", mnt / "l")
    os.link(mnt / "l", mnt / "l2", follow_symlinks=False)
    assert os.readlink(mnt / "l2") == "b"


def test_rename_honours_its_flags(mnt: Path) -> None:
    (mnt / "a").write_text("a")
    (mnt / "d").mkdir()
    (mnt / "d" / "b").write_text("b")
    refused(errno.EEXIST, rename, mnt / "a", mnt / "d" / "b", RENAME_NOREPLACE)
    rename(mnt / "a", mnt / "d" / "b", RENAME_EXCHANGE)
    assert (mnt / "a").read_text() == "b"
    assert (mnt / "d" / "b").read_text() == "a"
    rename(mnt / "a", mnt / "d", RENAME_EXCHANGE)
    assert (mnt / "a" / "b").read_text() == "a"
    assert (mnt / "d").read_text() == "b"
    rename(mnt / "d", mnt / "new", RENAME_NOREPLACE)
    refused(errno.EINVAL, rename, mnt / "a", mnt / "a" / "below", 0)
    assert sorted(os.listdir(mnt)) == ["a", "new"]


def test_an_overwritten_open_file_lives_on(mnt: Path) -> None:
    (mnt / "victim").write_text("old")
    with open(mnt / "victim", "r+") as held:
        (mnt / "other").write_text("new")
        os.rename(mnt / "other", mnt / "victim")
        assert os.fstat(held.fileno()).st_nlink == 0
        assert held.read() == "old"
        assert (mnt / "victim").read_text() == "new"


def test_an_unlinked_open_file_keeps_working(source: Path, mnt: Path) -> None:
    for how in ("created open", "opened later"):
        fd = os.open(mnt / "file", os.O_RDWR | os.O_CREAT)
        if how == "opened later":
            os.close(fd)
            fd = os.open(mnt / "file", os.O_RDWR)
        try:
            os.unlink(mnt / "file")
            assert os.listdir(source) == []
            os.write(fd, b"still here")
            os.fchmod(fd, 0o640)
            os.ftruncate(fd, 5)
            os.utime(fd, ns=(1, 2))
            assert os.pread(fd, 100, 0) == b"still"
            found = os.fstat(fd)
            assert (found.st_nlink, found.st_mode & 0o777, found.st_mtime_ns) == (0, 0o640, 2)
            refused(errno.ENOENT, os.stat, mnt / "file")
        finally:
            os.close(fd)


def test_a_removed_directory_answers_enoent(mnt: Path) -> None:
    (mnt / "d").mkdir()
    fd = os.open(mnt / "d", os.O_RDONLY)
    try:
        os.rmdir(mnt / "d")
        assert os.listdir(fd) == []
        with pytest.raises(FileNotFoundError):
            os.open("x", os.O_CREAT | os.O_RDWR, dir_fd=fd)
        with pytest.raises(FileNotFoundError):
            os.stat("x", dir_fd=fd)
    finally:
        os.close(fd)


def test_extended_attributes(source: Path, mnt: Path) -> None:
    path = mnt / "f"
    path.touch()
    os.setxattr(path, "user.a", b"1")
    os.setxattr(path, "user.b", b"x" * 1000)
    assert os.getxattr(source / "f", "user.a") == b"1"
    assert os.getxattr(path, "user.b") == b"x" * 1000
    assert {"user.a", "user.b"} <= set(os.listxattr(path))
    refused(errno.EEXIST, os.setxattr, path, "user.a", b"2", os.XATTR_CREATE)
    refused(errno.ENODATA, os.setxattr, path, "user.c", b"2", os.XATTR_REPLACE)
    os.removexattr(path, "user.a")
    refused(errno.ENODATA, os.getxattr, path, "user.a")
    os.mkdir(mnt / "d")
    os.setxattr(mnt / "d", "user.d", b"of a directory")
    assert os.getxattr(source / "d", "user.d") == b"of a directory"


@root
def test_special_files(source: Path, mnt: Path) -> None:
    os.mkfifo(mnt / "fifo", 0o600)
    os.mknod(mnt / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(mnt / "block", stat.S_IFBLK | 0o600, os.makedev(259, 70_000))
    os.mknod(mnt / "plain", stat.S_IFREG | 0o644)
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(mnt)  # a socket's address is short
        try:
            listening.bind("socket")
        finally:
            os.chdir(here)
    for name in ("fifo", "null", "block", "plain", "socket"):
        there, seen = os.lstat(source / name), os.lstat(mnt / name)
        assert (there.st_mode, there.st_rdev) == (seen.st_mode, seen.st_rdev)
    assert os.lstat(mnt / "block").st_rdev == os.makedev(259, 70_000)
    reader = os.open(mnt / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(mnt / "fifo", os.O_WRONLY)
    os.write(writer, b"through the fifo")
    assert os.read(reader, 100) == b"through the fifo"
    os.close(reader)
    os.close(writer)


def test_shared_mappings_reach_the_source(source: Path, mnt: Path) -> None:
    (mnt / "f").write_bytes(b"-" * 10_000)
    with open(mnt / "f", "r+b") as f, mmap.mmap(f.fileno(), 10_000) as mapped:
        mapped[5000:5005] = b"mmap!"
        mapped.flush()
    assert (source / "f").read_bytes()[4999:5006] == b"-mmap!-"


def test_time_stamps_are_exact(source: Path, mnt: Path) -> None:
    path = mnt / "f"
    path.touch()
    os.utime(path, ns=(1_000_000_001_000_000_007, 999_999_999_123_456_789))
    assert os.stat(source / "f").st_mtime_ns == 999_999_999_123_456_789
    assert os.stat(path).st_atime_ns == 1_000_000_001_000_000_007
    subprocess.run(["touch", "-a", "-d", "@77.000000001", path], check=True)  # the other one is omitted
    assert (os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns) == (77_000_000_001, 999_999_999_123_456_789)
    os.utime(path, ns=(-1_500_000_000, -1))
    assert os.stat(path).st_atime_ns == -1_500_000_000
    before = time.time_ns()
    os.utime(path)
    assert abs(os.stat(path).st_mtime_ns - before) < 2_000_000_000
    os.symlink("nowhere", mnt / "l")
    os.utime(mnt / "l", ns=(5, 6), follow_symlinks=False)
    assert os.lstat(source / "l").st_mtime_ns == 6
    assert os.lstat(source / "l").st_mode == os.lstat(mnt / "l").st_mode


@root
def test_new_files_belong_to_the_caller(source: Path, mnt: Path) -> None:
    os.chmod(source, 0o777)
    make = "os.close(os.open('f', os.O_CREAT|os.O_WRONLY, 0o666)); os.mkdir('d'); os.symlink('x','l'); os.mkfifo('p')"
    run_as(1234, 2345, make, mnt)
    for name in "fdlp":
        found = os.lstat(source / name)
        assert (found.st_uid, found.st_gid) == (1234, 2345)
    assert stat.S_IMODE(os.stat(source / "f").st_mode) == 0o644
    os.mkdir(mnt / "shared")
    os.chown(mnt / "shared", 0, 777)
    os.chmod(mnt / "shared", 0o2777)
    run_as(1234, 2345, make, mnt / "shared", umask=0o077)
    for name in "fdlp":
        found = os.lstat(source / "shared" / name)
        assert (found.st_uid, found.st_gid) == (1234, 777)
    assert stat.S_IMODE(os.stat(mnt / "shared" / "d").st_mode) == 0o2700
    assert stat.S_IMODE(os.stat(mnt / "shared" / "f").st_mode) == 0o600
    (mnt / "mine").touch()
    assert os.stat(source / "mine").st_uid == 0  # the identity was given back
    run_as(1234, 2345, "os.close(os.open('s', os.O_CREAT|os.O_WRONLY, 0o4755))", mnt)
    assert stat.S_IMODE(os.stat(mnt / "s").st_mode) == 0o4755


@root
def test_the_kernel_checks_permissions(source: Path, mnt: Path) -> None:
    os.chmod(source, 0o755)
    (mnt / "secret").write_text("x")
    os.chmod(mnt / "secret", 0o600)
    check = """
for call in ("open('secret')", "open('new', 'w')", "os.chmod('secret', 0o666)", "os.unlink('secret')"):
    try: eval(call)
    except PermissionError: continue
    raise SystemExit(call)
"""
    run_as(1234, 2345, check, mnt)


@root
def test_chown_behaves_as_posix_wants(mnt: Path) -> None:
    (mnt / "f").touch()
    os.chmod(mnt / "f", 0o6755)
    os.chown(mnt / "f", 12, 13)
    found = os.stat(mnt / "f")
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (12, 13, 0o755)
    before = found.st_ctime_ns
    os.chown(mnt / "f", -1, -1)
    assert os.stat(mnt / "f").st_ctime_ns > before
    os.symlink("f", mnt / "l")
    os.chown(mnt / "l", 21, 22, follow_symlinks=False)
    assert os.lstat(mnt / "l").st_uid == 21
    assert os.stat(mnt / "f").st_uid == 12


def acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


@root
def test_access_control_lists_are_kept_and_enforced(source: Path, mnt: Path) -> None:
    os.chmod(source, 0o755)
    (mnt / "f").write_text("x")
    os.chmod(mnt / "f", 0o600)
    nobody = (1 << 32) - 1
    value = acl((1, 6, nobody), (2, 4, 1234), (4, 0, nobody), (0x10, 4, nobody), (0x20, 0, nobody))
    os.setxattr(mnt / "f", "system.posix_acl_access", value)
    assert os.getxattr(source / "f", "system.posix_acl_access") == value
    run_as(1234, 2345, "assert open('f').read() == 'x'", mnt)
    run_as(4321, 2345, "assert not os.access('f', os.R_OK)", mnt)
    assert stat.S_IMODE(os.stat(mnt / "f").st_mode) == 0o640
    refused(errno.ENODATA, os.getxattr, mnt, "system.posix_acl_default")


def test_changes_behind_the_mount_show_within_the_timeout(source: Path, quick: Direct) -> None:
    mnt = quick.path
    (source / "f").write_text("one")
    assert (mnt / "f").read_text() == "one"
    with open(mnt / "f") as held:
        (source / "f").write_text("two")  # the same size: only the time of modification tells
        eventually(lambda: os.pread(held.fileno(), 10, 0) == b"two")
    eventually(lambda: (mnt / "f").read_text() == "two")
    with open(mnt / "f") as held:
        (source / "f").write_text("longer than before")
        eventually(lambda: os.pread(held.fileno(), 100, 0) == b"longer than before")
    refused(errno.ENOENT, os.stat, mnt / "new")
    (source / "new").touch()
    assert (mnt / "new").exists()
    os.unlink(source / "new")
    eventually(lambda: not (mnt / "new").exists())
    os.rename(source / "f", source / "g")
    eventually(lambda: os.listdir(mnt) == ["g"] and not (mnt / "f").exists())
    assert (mnt / "g").read_text() == "longer than before"


def test_a_warm_read_needs_no_driver(source: Path, quick: Direct) -> None:
    size = 1 << 20
    (source / "f").write_bytes(os.urandom(size))

    def read_by_driver() -> int:
        lines = Path(f"/proc/{quick.process.pid}/io").read_text().split()
        return int(lines[lines.index("rchar:") + 1])

    before = read_by_driver()
    first = (quick.path / "f").read_bytes()
    cold = read_by_driver() - before
    time.sleep(0.06)  # the attributes have timed out, the pages have not
    before = read_by_driver()
    assert (quick.path / "f").read_bytes() == first
    assert cold >= size
    assert read_by_driver() - before < 10_000


def test_a_listing_names_every_entry_once(source: Path, mnt: Path) -> None:
    names = {f"entry-{number}-{'x' * (number % 200)}" for number in range(3000)}
    for name in names:
        (source / name).touch()
    found = os.listdir(mnt)
    assert len(found) == len(names)
    assert set(found) == names
    with os.scandir(mnt) as entries:
        assert all(entry.inode() == os.lstat(source / entry.name).st_ino for entry in entries)
    fd = os.open(mnt, os.O_RDONLY)
    try:
        assert len(os.listdir(fd)) == len(names)
        (mnt / "one more").touch()
        assert len(os.listdir(fd)) == len(names) + 1  # rewinddir looks again
    finally:
        os.close(fd)
    shutil.rmtree(mnt, ignore_errors=True)  # removes while it lists; the mountpoint itself stays
    assert os.listdir(source) == []


def test_a_listing_has_the_dots(mnt: Path) -> None:
    (mnt / "d").mkdir()
    shown = subprocess.run(["ls", "-a", mnt / "d"], check=True, capture_output=True, text=True).stdout
    assert shown.split() == [".", ".."]


@pytest.mark.parametrize("way", BY_NAME)
def test_a_tree_larger_than_the_descriptor_limit(way: str, source: Path, tmp_path: Path) -> None:
    for upper in range(100):
        directory = source / f"d{upper}" / "below" / "and" / "further"
        directory.mkdir(parents=True)
        for lower in range(100):
            (directory / f"f{lower}").write_text(f"{upper}.{lower}")
    with direct_mount("passthrough", tmp_path / "mnt", source, nofile=96, without=BY_NAME[way]) as direct:
        for _ in range(2):
            count = 0
            for where, _, files in os.walk(direct.path):
                for name in files:
                    path = Path(where, name)
                    assert os.stat(path).st_size
                    count += 1
                    if count % 10 == 0:
                        assert path.read_text() == (source / path.relative_to(direct.path)).read_text()
            assert count == 10_000
            assert direct.descriptors() <= 96
        held = [os.open(direct.path / f"d{n}" / "below/and/further/f1", os.O_RDONLY) for n in range(30)]
        for n, fd in enumerate(held):
            assert os.pread(fd, 10, 0) == b"%d.1" % n
            os.close(fd)
        os.rename(direct.path / "d1", direct.path / "d2" / "moved")
        assert (direct.path / "d2" / "moved" / "below/and/further/f7").read_text() == "1.7"


def test_descriptors_go_with_what_the_kernel_forgets(source: Path, tmp_path: Path) -> None:
    with direct_mount("passthrough", tmp_path / "mnt", source) as direct:
        before = direct.descriptors()
        for number in range(500):
            (direct.path / f"f{number}").write_text("x")
        shutil.rmtree(direct.path, ignore_errors=True)
        eventually(lambda: direct.descriptors() < before + 10)  # the event loop has a few


def test_large_files_are_freed_completely(mnt: Path) -> None:
    size = 300 << 20  # sparse; from here on the driver frees them in a thread
    for name in ("unlinked", "overwritten", "truncated", "held"):
        with open(mnt / name, "wb") as f:
            f.truncate(size)
            f.write(b"x" * 1_000_000)
    held = os.open(mnt / "held", os.O_RDWR)
    os.unlink(mnt / "held")
    os.unlink(mnt / "unlinked")
    (mnt / "small").touch()
    os.rename(mnt / "small", mnt / "overwritten")
    os.truncate(mnt / "truncated", 3)
    assert os.stat(mnt / "overwritten").st_size == 0
    assert (mnt / "truncated").read_bytes() == b"xxx"
    assert os.pread(held, 3, 999_997) == b"xxx"
    os.ftruncate(held, 1)
    assert os.fstat(held).st_size == 1
    os.ftruncate(held, size)
    os.close(held)
    assert sorted(os.listdir(mnt)) == ["overwritten", "truncated"]


def test_statfs_and_syncing(source: Path, mnt: Path) -> None:
    there, here = os.statvfs(source), os.statvfs(mnt)
    assert (there.f_bsize, there.f_blocks, there.f_namemax) == (here.f_bsize, here.f_blocks, here.f_namemax)
    fd = os.open(mnt / "f", os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"x")
    os.fsync(fd)
    os.fdatasync(fd)
    os.close(fd)
    fd = os.open(mnt, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    refused(errno.ENAMETOOLONG, (mnt / ("n" * 256)).touch)


@root
def test_an_unprivileged_user_can_serve_a_tree() -> None:
    shared = Path(tempfile.mkdtemp())  # not below tmp_path, which other users may not enter
    os.chmod(shared, 0o755)
    source, mountpoint = shared / "source", shared / "mnt"
    source.mkdir(parents=True)
    mountpoint.mkdir()
    try:
        os.chown(source, 65534, 65534)
        os.chown(mountpoint, 65534, 65534)
        (source / "theirs").write_text("x")
        os.chmod(source / "theirs", 0o600)
        with direct_mount("passthrough", mountpoint, source, user=65534):
            run_as(65534, 65534, USER_STORY, mountpoint)
    finally:
        shutil.rmtree(shared)


USER_STORY = """
open('f', 'w').write('mine'); os.link('f', 'g'); os.rename('g', 'd')
assert open('d').read() == 'mine' and os.stat('f').st_nlink == 2
held = open('d'); os.unlink('d'); os.unlink('f')
assert held.read() == 'mine' and os.fstat(held.fileno()).st_nlink == 0
os.mkdir('dir'); open('dir/x', 'w').close(); os.setxattr('dir/x', 'user.a', b'1')
assert os.listdir('dir') == ['x'] and os.getxattr('dir/x', 'user.a') == b'1'
try: open('theirs')
except PermissionError: pass
else: raise SystemExit(1)
"""
