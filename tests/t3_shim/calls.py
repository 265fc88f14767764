"""What programs that use a mount do there; run as a script this is such a program.

It does one call after the other, as `program.Program` tells it over a pipe, and sends back the result or the errno.
Nothing but the standard library, and little of it: it starts for nearly every test.
"""

from __future__ import annotations

import errno
import marshal
import os


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


_STAT = ("st_ino", "st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_mtime_ns")


def stat(path: str) -> dict[str, int]:
    got = os.lstat(path)
    return {key: getattr(got, key) for key in _STAT}


def fstat(fd: int) -> dict[str, int]:
    got = os.fstat(fd)
    return {key: getattr(got, key) for key in _STAT}


def btime(path: str) -> int:
    """statx(2) that wants the birth time: the mask that was answered."""
    import ctypes

    buffer = ctypes.create_string_buffer(256)
    if ctypes.CDLL(None, use_errno=True).statx(-100, path.encode(), 0x2000, 0xFFF, buffer):
        raise OSError(ctypes.get_errno(), "statx")
    return int.from_bytes(buffer.raw[:4], "little")


def statfs(path: str) -> tuple[int, int]:
    got = os.statvfs(path)
    return got.f_blocks, got.f_bfree


def slurp(path: str, flags: int = 0) -> bytes:
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        parts = []
        # A bad driver may give any file a size of 2**63 bytes: reading that to its end is nobody's mistake.
        while len(parts) < 64 and (part := os.read(fd, 1 << 20)):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def spill(path: str, data: bytes, flags: int = 0, mode: int = 0o644) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | flags, mode)
    try:
        return os.write(fd, data)
    finally:
        os.close(fd)


def direct_read(path: str, size: int = 4096, offset: int = 0) -> bytes:
    """A read that always becomes a READ."""
    import mmap

    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, size) as buffer:
            return buffer[: os.preadv(fd, [buffer], offset)]
    finally:
        os.close(fd)


def direct_pread(fd: int, size: int = 4096, offset: int = 0) -> bytes:
    import mmap

    with mmap.mmap(-1, size) as buffer:
        return buffer[: os.preadv(fd, [buffer], offset)]


def direct_readers(path: str, count: int) -> list[bytes]:
    """READs of one handle by several threads at once."""
    import threading

    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(direct_pread(fd))) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    return results


def open_and_write(path: str) -> int:
    """A descriptor through which the driver has written."""
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, b"x", 0)
    return fd


def many_writers(fds: list[int], size: int) -> list[int]:
    """One write by each of many threads; the errno of each (0: it went well)."""
    import threading

    data = b"x" * size
    results: list[int] = []

    def write(fd: int) -> None:
        try:
            os.pwrite(fd, data, 0)
            results.append(0)
        except OSError as error:
            results.append(error.errno or -1)

    threading.stack_size(64 * 1024)
    threads = [threading.Thread(target=write, args=(fd,)) for fd in fds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def exists(path: str) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def names(path: str) -> list[str]:
    return sorted(os.listdir(path))


def count_names(path: str) -> int:
    return sum(1 for _ in os.scandir(path))


def scan(path: str) -> dict[str, int]:
    """Names and their sizes: a listing with attributes."""
    return {entry.name: entry.stat(follow_symlinks=False).st_size for entry in os.scandir(path)}


def walk(path: str) -> int:
    """Look at everything below; the number of things."""
    count = 0
    for entry in os.scandir(path):
        entry.stat(follow_symlinks=False)
        count += 1
        if entry.is_dir(follow_symlinks=False):
            count += walk(entry.path)
    return count


def times(count: int, call: str, *args: object) -> None:
    """Do a call so many times."""
    function = globals().get(call) or getattr(os, call)
    for _ in range(count):
        function(*args)


def drop_caches() -> None:
    """Have the kernel forget what it can of names and inodes."""
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("2")


def renameat2(old: str, new: str, flags: int) -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).renameat2(-100, old.encode(), -100, new.encode(), flags):
        raise OSError(ctypes.get_errno(), "renameat2")


def lseek(path: str, offset: int, whence: int) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.lseek(fd, offset, whence)
    finally:
        os.close(fd)


def fallocate(path: str, size: int) -> int:
    """posix_fallocate(3), which emulates what the filesystem refuses with EOPNOTSUPP; the size then."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(fd, 0, size)
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def punch(path: str, mode: int) -> None:
    """fallocate(2) itself."""
    import ctypes

    fd = os.open(path, os.O_RDWR)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(4096)):
            raise OSError(ctypes.get_errno(), "fallocate")
    finally:
        os.close(fd)


def copy_range(source: str, target: str, size: int) -> int:
    one, two = os.open(source, os.O_RDONLY), os.open(target, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        return os.copy_file_range(one, two, size)
    finally:
        os.close(one)
        os.close(two)


def ioctl(path: str, number: int) -> int:
    import fcntl

    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, number, bytearray(16))
        return 0
    finally:
        os.close(fd)


def lock(path: str, kind: str) -> None:
    import fcntl

    fd = os.open(path, os.O_RDWR)
    try:
        if kind == "flock":
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            fcntl.lockf(fd, fcntl.LOCK_EX if kind == "wait" else fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fd)


def mapped(path: str) -> bytes:
    import mmap

    fd = os.open(path, os.O_RDONLY)
    try:
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as view:
            return view[:]
    finally:
        os.close(fd)


_map: list[object] = []  # the mapping of this program, and its descriptor


def map_open(path: str) -> None:
    """Map a file, shared and writable."""
    import mmap

    fd = os.open(path, os.O_RDWR)
    _map[:] = mmap.mmap(fd, 0), fd


def map_read(offset: int, size: int) -> bytes:
    return _map[0][offset : offset + size]  # type: ignore[index]


def map_write(offset: int, data: bytes) -> None:
    _map[0][offset : offset + len(data)] = data  # type: ignore[index]


def map_sync() -> None:
    _map[0].flush()  # type: ignore[attr-defined]


def map_fault(offset: int) -> bool:
    """Whether the page cannot be had: SIGBUS, in a process that may die of it."""
    child = os.fork()
    if not child:
        map_read(offset, 1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -7


def map_close() -> None:
    _map[0].close()  # type: ignore[attr-defined]
    os.close(_map[1])  # type: ignore[arg-type]


def interruptible_write(path: str) -> int:
    """A WRITE, with a handler for SIGUSR1 that does nothing: the errno with which the system call ended.

    The descriptor stays open: a close might wait again.
    """
    import ctypes
    import signal

    libc = ctypes.CDLL(None, use_errno=True)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.siginterrupt(signal.SIGUSR1, True)
    fd = os.open(path, os.O_WRONLY)
    got = libc.pwrite(fd, b"x", ctypes.c_size_t(1), ctypes.c_long(0))
    return ctypes.get_errno() if got < 0 else 0


def interruptible_read(path: str) -> int:
    """A READ, with a handler for SIGUSR1 that raises: the errno with which the system call ended (0: it did not)."""
    import ctypes
    import mmap
    import signal

    libc = ctypes.CDLL(None, use_errno=True)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.siginterrupt(signal.SIGUSR1, True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    got = libc.pread(fd, ctypes.c_void_p(address), ctypes.c_size_t(4096), ctypes.c_long(0))
    number = ctypes.get_errno() if got < 0 else 0
    os.close(fd)
    return number


def interruptible_mkdir(path: str) -> int:
    """A MKDIR, with a handler for SIGUSR1 that does nothing: the errno with which the system call ended."""
    import ctypes
    import signal

    libc = ctypes.CDLL(None, use_errno=True)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.siginterrupt(signal.SIGUSR1, True)
    return ctypes.get_errno() if libc.mkdir(path.encode(), 0o755) < 0 else 0


def access_open(path: str) -> None:
    os.close(os.open(path, os.O_RDONLY))


def overwrite(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def fsync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock_open(fd: int, call: str) -> None:
    import fcntl

    (fcntl.flock if call == "flock" else fcntl.lockf)(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def symlinked(path: str) -> None:
    os.symlink("target", path)


def fsync(path: str) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename_to(path: str, name: str) -> None:
    os.rename(path, os.path.join(os.path.dirname(path), name))


def link_to(path: str, name: str) -> None:
    os.link(path, os.path.join(os.path.dirname(path), name))


def renamed_2(path: str, name: str) -> None:
    renameat2(path, os.path.join(os.path.dirname(path), name), 2)


def linkat(fd: int, path: str) -> None:
    """Give an open file a name."""
    import ctypes

    if ctypes.CDLL(None, use_errno=True).linkat(-100, f"/proc/self/fd/{fd}".encode(), -100, path.encode(), 0x400):
        raise OSError(ctypes.get_errno(), "linkat")


def entries(fd: int) -> list[str]:
    """One getdents64(2): the names it gave."""
    import ctypes

    buffer = ctypes.create_string_buffer(4096)
    got = ctypes.CDLL(None, use_errno=True).syscall(217, fd, buffer, 4096)
    if got < 0:
        raise OSError(ctypes.get_errno(), "getdents64")
    found, at = [], 0
    while at < got:
        found.append(buffer.raw[at + 19 : buffer.raw.index(0, at + 19)].decode())
        at += int.from_bytes(buffer.raw[at + 16 : at + 18], "little")
    return found


def main() -> None:
    """Do what is asked until the pipe ends."""
    while header := os.read(0, 4):
        size = int.from_bytes(header, "little")
        data = b""
        while len(data) < size:
            data += os.read(0, size - len(data))
        call, args = marshal.loads(data)
        try:
            answer = (True, (globals().get(call) or getattr(os, call))(*args))
        except OSError as error:
            answer = (False, (error.errno or errno.EIO, str(error)))
        except Exception as error:
            answer = (False, (0, repr(error)))
        reply = marshal.dumps(answer)
        reply = len(reply).to_bytes(4, "little") + reply
        while reply:
            reply = reply[os.write(1, reply) :]


if __name__ == "__main__":
    main()
