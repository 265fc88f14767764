"""What POSIX programs notice first when a filesystem gets it wrong."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import random
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import Tree


def run_as(uid: int, code: str, path: Path, umask: int = 0o022) -> str:
    """Run Python code as another user, who cannot reach *path* but from its own directory; its output."""
    result = subprocess.run(
        [program_for(uid), "-I", "-c", code, f"./{path.name}"],
        cwd=path.parent,
        user=uid,
        group=uid,
        extra_groups=[],
        umask=umask,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def program_for(uid: int) -> str:
    """An interpreter that this user can reach; ours may be in a directory of root's alone."""
    if uid == os.geteuid():
        return sys.executable
    system = "/usr/bin/python3"
    if not os.access(system, os.X_OK):
        pytest.skip("no interpreter that another user can run")
    return system


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to act as other users")


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_new_files_get_the_umask_of_their_maker(tree: Tree) -> None:
    make = "import os,sys; p=sys.argv[1]; os.close(os.open(p+'/f', os.O_CREAT, 0o666)); os.mkdir(p+'/d', 0o777)"
    for mask in (0o022, 0o077, 0o000, 0o027):
        top = tree.root / f"{mask:o}"
        top.mkdir()
        top.chmod(0o777)
        run_as(os.geteuid(), make, top, umask=mask)
        assert permissions(top / "f") == 0o666 & ~mask
        assert permissions(top / "d") == 0o777 & ~mask


def test_a_default_acl_replaces_the_umask(tree: Tree) -> None:
    top = tree.root / "shared"
    top.mkdir()
    subprocess.run(["setfacl", "-d", "-m", "g::rwx,o::rx", top], check=True)
    make = "import os,sys; p=sys.argv[1]; os.close(os.open(p+'/f', os.O_CREAT, 0o666)); os.mkdir(p+'/d', 0o777)"
    run_as(os.geteuid(), make, top, umask=0o077)
    assert permissions(top / "f") & 0o070 == 0o060
    assert permissions(top / "d") & 0o077 == 0o075


@needs_root
def test_writing_takes_suid_and_sgid_from_a_file(tree: Tree) -> None:
    path = tree.root / "program"
    path.write_bytes(b"x" * 10)
    for change in ("os.write(fd, b'y')", "os.ftruncate(fd, 5)"):
        os.chown(path, 1234, 1234)
        path.chmod(0o6777)
        assert permissions(path) == 0o6777
        run_as(1234, f"import os,sys; fd=os.open(sys.argv[1], os.O_RDWR); {change}", path)
        assert permissions(path) == 0o0777, change


@needs_root
def test_changing_the_owner_takes_suid_and_sgid(tree: Tree) -> None:
    path = tree.root / "program"
    path.touch()
    path.chmod(0o6755)
    os.chown(path, 1, 1)
    assert permissions(path) == 0o755


@needs_root
def test_new_files_belong_to_their_maker_and_to_a_setgid_directory(tree: Tree) -> None:
    top = tree.root / "d"
    top.mkdir()
    os.chown(top, 0, 777)
    top.chmod(0o2777)
    run_as(1234, "import sys; open(sys.argv[1], 'w')", top / "f")
    status = (top / "f").stat()
    assert (status.st_uid, status.st_gid) == (1234, 777)


@needs_root
def test_permissions_are_checked_against_the_caller(tree: Tree) -> None:
    (tree.root / "secret").write_text("x")
    (tree.root / "secret").chmod(0o600)
    code = "import sys\ntry: open(sys.argv[1])\nexcept PermissionError: print('refused')"
    assert run_as(1234, code, tree.root / "secret") == "refused"


def test_unlinked_file_is_read_and_written_until_closed(tree: Tree) -> None:
    path = tree.root / "f"
    with path.open("w+b") as file:
        file.write(b"before")
        file.flush()
        path.unlink()
        assert not path.exists()
        file.write(b" after")
        file.seek(0)
        assert file.read() == b"before after"
        assert os.fstat(file.fileno()).st_nlink == 0
    assert list(tree.root.iterdir()) == []


def test_file_opened_for_reading_survives_being_unlinked_or_replaced(tree: Tree) -> None:
    for name in ("unlinked", "replaced"):
        path = tree.root / name
        path.write_bytes(name.encode() * 1000)
        with path.open("rb", buffering=0):
            pass  # the driver has accepted an open: the next one is answered without it
        with path.open("rb", buffering=0) as file:
            if name == "unlinked":
                path.unlink()
            else:
                (tree.root / "other").write_bytes(b"other")
                (tree.root / "other").replace(path)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert file.read() == name.encode() * 1000


def test_hard_links_are_one_file(tree: Tree) -> None:
    one, two = tree.root / "one", tree.root / "two"
    one.write_text("x")
    os.link(one, two)
    assert one.stat().st_ino == two.stat().st_ino
    assert one.stat().st_nlink == 2
    two.write_text("changed")
    assert one.read_text() == "changed"
    one.unlink()
    assert two.stat().st_nlink == 1


def test_rename_flags(tree: Tree) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    a, b = tree.root / "a", tree.root / "b"
    a.write_text("a")
    b.mkdir()

    def renameat2(flags: int) -> int:
        if libc.renameat2(-100, bytes(a), -100, bytes(b), flags) == 0:
            return 0
        return ctypes.get_errno()

    assert renameat2(1) == errno.EEXIST  # RENAME_NOREPLACE
    assert renameat2(2) == 0  # RENAME_EXCHANGE
    assert a.is_dir()
    assert b.read_text() == "a"


def test_time_stamps_move_as_posix_says(tree: Tree) -> None:
    top = tree.root / "d"
    top.mkdir()
    path = top / "f"
    path.write_text("1")
    os.utime(path, ns=(1, 2))
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (1, 2)
    os.utime(top, ns=(1, 2))
    time.sleep(0.02)
    before = time.time_ns() - 10_000_000
    path.write_text("12")
    assert path.stat().st_mtime_ns >= before
    assert top.stat().st_mtime_ns == 2
    path.rename(top / "g")
    assert top.stat().st_mtime_ns >= before


def test_extended_attributes(tree: Tree) -> None:
    path = tree.root / "f"
    path.touch()
    os.setxattr(path, "user.a", b"1")
    os.setxattr(path, "user.b", b"x" * 3000)
    assert sorted(n for n in os.listxattr(path) if n.startswith("user.")) == ["user.a", "user.b"]
    assert os.getxattr(path, "user.b") == b"x" * 3000
    os.removexattr(path, "user.a")
    with pytest.raises(OSError, match="No data"):
        os.getxattr(path, "user.a")


def test_special_files(tree: Tree) -> None:
    os.mkfifo(tree.root / "fifo")
    assert stat.S_ISFIFO((tree.root / "fifo").lstat().st_mode)
    if os.geteuid() == 0:
        os.mknod(tree.root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        assert (tree.root / "null").stat().st_rdev == os.makedev(1, 3)
        (tree.root / "null").write_bytes(b"gone")
    (tree.root / "link").symlink_to("a/b c")
    assert os.readlink(tree.root / "link") == "a/b c"


def test_names_that_are_not_text_or_too_long(tree: Tree) -> None:
    name = bytes(tree.root) + b"/\xff\xfe \n"
    with open(name, "wb"):
        pass
    assert b"\xff\xfe \n" in os.listdir(bytes(tree.root))
    (tree.root / ("n" * 255)).touch()
    with pytest.raises(OSError, match="name too long"):
        (tree.root / ("n" * 256)).touch()


def test_shared_mapping_and_file_show_the_same_bytes(tree: Tree) -> None:
    path = tree.root / "f"
    path.write_bytes(bytes(8192))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 8192) as mapped:
        mapped[5000:5005] = b"hello"
        mapped.flush()
        assert os.pread(file.fileno(), 5, 5000) == b"hello"
        os.pwrite(file.fileno(), b"world", 100)
        assert mapped[100:105] == b"world"


def test_kernel_fall_backs_for_what_the_library_lacks(tree: Tree) -> None:
    path = tree.root / "f"
    path.write_bytes(b"x" * 100_000)
    with path.open("r+b") as file, (tree.root / "copy").open("w+b") as copy:
        os.posix_fallocate(file.fileno(), 0, 200_000)
        assert os.fstat(file.fileno()).st_size == 200_000
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 0
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 200_000
        assert os.copy_file_range(file.fileno(), copy.fileno(), 50_000, offset_src=0) == 50_000
        assert os.pread(copy.fileno(), 50_000, 0) == b"x" * 50_000
        with pytest.raises(OSError, match="ioctl"):
            fcntl.ioctl(file, 0x1234)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(copy, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with (tree.root / "copy").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(OSError, match="not supported"):
        os.open(tree.root, os.O_TMPFILE | os.O_RDWR)


def test_directory_listing_is_whole_and_offsets_hold_while_it_changes(tree: Tree) -> None:
    names = {f"file-{number:04}" for number in range(2000)}
    for name in names:
        (tree.root / name).touch()
    assert set(os.listdir(tree.root)) == names
    seen = []
    with os.scandir(tree.root) as entries:
        for count, entry in enumerate(entries):
            seen.append(entry.name)
            if count == 100:
                for number in range(1000, 1100):
                    (tree.root / f"file-{number:04}").unlink()
                    (tree.root / f"new-{number:04}").touch()
    assert len(seen) == len(set(seen))
    gone = {f"file-{number:04}" for number in range(1000, 1100)}
    assert names - gone <= set(seen)


def test_lookup_counts_balance_after_the_kernel_has_dropped_its_caches(tree: Tree) -> None:
    if os.geteuid() != 0:
        pytest.skip("dropping caches needs root")
    for number in range(50):
        (tree.root / f"d{number}").mkdir()
        for inner in range(10):
            (tree.root / f"d{number}" / f"f{inner}").touch()
    subprocess.run(["ls", "-lR", tree.root], stdout=subprocess.DEVNULL, check=True)
    (tree.root / "d0" / "f0").rename(tree.root / "d1" / "moved")
    subprocess.run(["rm", "-r", tree.root / "d2"], check=True)
    assert tree.counters()["nodes"] > 400
    for _ in range(20):
        subprocess.run(["sync", "-f", tree.root], check=True)
        Path("/proc/sys/vm/drop_caches").write_text("2\n")
        time.sleep(0.1)
        counters = tree.counters()
        if counters["nodes"] == 1:
            break
    assert (counters["nodes"], counters["kernel_lookups"], counters["driver_lookups"]) == (1, 0, 0)
    assert counters["handles"] == counters["waiting"] == counters["late"] == 0


def test_cached_reads_and_stats_do_not_reach_the_driver(tree: Tree) -> None:
    path = tree.root / "f"
    path.write_bytes(random.Random(1).randbytes(300_000))
    path.read_bytes()
    path.stat()
    before = tree.counters()
    for _ in range(5):
        assert len(path.read_bytes()) == 300_000
        path.stat()
    after = tree.counters()
    assert after["driver_round_trips"] == before["driver_round_trips"]
    assert after["open_hits"] >= before["open_hits"] + 5
