"""A program that tries, in the directory it is given, what some filesystems can and others cannot.

It prints the results. A foreign program must give the same ones through UDF and mounted directly; none of them is
right or wrong by itself.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import stat
import subprocess
import sys
from collections.abc import Callable

libc = ctypes.CDLL(None, use_errno=True)
HOLDER = """
import fcntl, os, sys
file = os.open(sys.argv[1], os.O_RDWR)
(fcntl.flock if sys.argv[2] == "flock" else fcntl.lockf)(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def fresh(name: str, size: int = 0) -> int:
    file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    os.write(file, b"x" * size)
    return file


def fallocate(mode: int, offset: int, length: int, size: int = 0) -> object:
    file = fresh("fallocated", size)
    os.fsync(file)
    check(libc.fallocate(file, mode, ctypes.c_long(offset), ctypes.c_long(length)))
    status = os.fstat(file)
    return status.st_size, status.st_blocks, os.pread(file, 1, offset).hex()


def posix_fallocate() -> object:
    file = fresh("fallocated")
    os.posix_fallocate(file, 0, 1 << 20)
    return os.fstat(file).st_size


def holes() -> object:
    file = fresh("holes")
    os.pwrite(file, b"d" * 65536, 1 << 20)
    os.ftruncate(file, 4 << 20)
    os.fsync(file)
    return os.lseek(file, 0, os.SEEK_DATA), os.lseek(file, 1 << 20, os.SEEK_HOLE)


def copy() -> object:
    source, target, done = fresh("source", 300_000), fresh("target"), 0
    while count := os.copy_file_range(source, target, 300_000 - done, done, done):
        done += count
    return done, os.pread(target, 10, 299_990).decode()


def xattrs() -> object:
    fresh("attributed")
    os.setxattr("attributed", "user.key", b"v" * 100)
    before = len(os.getxattr("attributed", "user.key")), os.listxattr("attributed")
    os.removexattr("attributed", "user.key")
    return before, os.listxattr("attributed")


def locks(kind: str) -> object:
    """Whether a lock excludes, whether another one waits for it, and gets it."""
    file = fresh("locked", 100)

    def holder() -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-c", HOLDER, "locked", kind]
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    with holder() as first:
        assert first.stdout is not None
        assert first.stdin is not None
        first.stdout.readline()
        try:
            (fcntl.flock if kind == "flock" else fcntl.lockf)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return "does not exclude"
        except BlockingIOError:
            pass
        with holder() as second:
            assert second.stdout is not None
            assert second.stdin is not None
            try:
                second.wait(0.5)
                waits = False
            except subprocess.TimeoutExpired:
                waits = True
            first.stdin.close()
            got = second.stdout.readline().decode()
            second.stdin.close()
    return waits, got


def unnamed() -> object:
    file = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(file, b"x")
    os.link(f"/proc/self/fd/{file}", "named", follow_symlinks=True)
    return os.stat("named").st_size


def mapped() -> object:
    file = fresh("mapped", 8192)
    with mmap.mmap(file, 8192) as memory:
        memory[5000] = 65
        memory.flush()
    return os.pread(file, 2, 5000).decode()


def renamed(flags: int) -> object:
    fresh("one", 1)
    fresh("two", 2)
    check(libc.renameat2(-100, b"one", -100, b"two", flags))
    return os.stat("one").st_size, os.stat("two").st_size


def linked() -> object:
    fresh("first")
    os.link("first", "second")
    return os.stat("first").st_nlink, os.stat("first").st_ino == os.stat("second").st_ino


def owned() -> object:
    fresh("owned")
    os.chown("owned", 1, 2)
    return os.stat("owned").st_uid, os.stat("owned").st_gid


def node(mode: int) -> object:
    name = f"node{mode:o}"
    os.mknod(name, mode, os.makedev(1, 3))
    return oct(os.stat(name).st_mode)


def unlinked() -> object:
    file = fresh("unlinked", 10)
    os.unlink("unlinked")
    os.write(file, b"more")
    return os.pread(file, 20, 0).decode(), os.fstat(file).st_nlink


def times() -> object:
    fresh("timed")
    os.utime("timed", ns=(123_456_789, 987_654_321))
    return os.stat("timed").st_atime_ns, os.stat("timed").st_mtime_ns


def appended() -> object:
    fresh("appended", 10)
    os.write(os.open("appended", os.O_WRONLY | os.O_APPEND), b"abc")
    return os.stat("appended").st_size


def truncated() -> object:
    fresh("truncated", 10)
    os.open("truncated", os.O_WRONLY | os.O_TRUNC)
    return os.stat("truncated").st_size


def unbuffered() -> object:
    fresh("direct", 8192)
    return os.preadv(os.open("direct", os.O_RDONLY | os.O_DIRECT), [mmap.mmap(-1, 4096)], 4096)


def directories() -> object:
    os.makedirs("a/b")
    try:
        os.rmdir("a")
        refused = "no"
    except OSError as error:
        refused = errno.errorcode[error.errno or 0]
    os.rename("a", "c")
    return refused, os.listdir("c"), os.path.exists("a")


def masked() -> object:
    before = os.umask(0o027)
    file = os.open("masked", os.O_CREAT | os.O_RDWR, 0o666)
    os.umask(before)
    return oct(os.fstat(file).st_mode)


TRIES: dict[str, Callable[[], object]] = {
    "fallocate": lambda: fallocate(0, 0, 1 << 20),
    "fallocate, size kept": lambda: fallocate(1, 0, 1 << 20),
    "fallocate, hole punched": lambda: fallocate(3, 65536, 65536, 1 << 20),
    "posix_fallocate": posix_fallocate,
    "lseek": holes,
    "copy_file_range": copy,
    "extended attributes": xattrs,
    "flock": lambda: locks("flock"),
    "fcntl locks": lambda: locks("fcntl"),
    "O_TMPFILE": unnamed,
    "mmap": mapped,
    "RENAME_NOREPLACE": lambda: renamed(1),
    "RENAME_EXCHANGE": lambda: renamed(2),
    "hard links": linked,
    "owners": owned,
    "devices": lambda: node(stat.S_IFCHR | 0o644),
    "pipes": lambda: node(stat.S_IFIFO | 0o644),
    "unlinked files": unlinked,
    "times": times,
    "O_APPEND": appended,
    "O_TRUNC": truncated,
    "O_DIRECT": unbuffered,
    "directories": directories,
    "umask": masked,
}


def main() -> None:
    os.chdir(sys.argv[1])
    results: dict[str, object] = {}
    for name, attempt in TRIES.items():
        try:
            results[name] = attempt()
        except OSError as error:
            results[name] = errno.errorcode.get(error.errno or 0)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
