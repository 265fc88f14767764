"""What a workload can do with files; run as a script this is the program that does it, on a mount or anywhere else.

It does one operation after the other, as program.py tells it over a pipe, and sends back what a program sees of it:
a value or an errno. Times, inode numbers and sizes of directories are no part of that, because no two filesystems agree
on them.
Must never: know what it works on. Nothing but the standard library, and little of it.

A path is below the directory that `begin` has chosen. A handle is a word that the workload chooses.
"""

from __future__ import annotations

import ctypes
import errno
import marshal
import mmap
import os
import select
import stat as modes
import zlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_AT_FDCWD = -100
_MOST = 1 << 16  # bytes of a file that a look at a tree quotes whole
_libc = ctypes.CDLL(None, use_errno=True)

_base = "/"
_handles: dict[str, int] = {}


def begin(base: str) -> None:
    """Work below this directory from now on, and keep nothing open from before."""
    global _base  # noqa: PLW0603 - one program has one place to work in
    _base = base
    for fd in _handles.values():
        os.close(fd)
    _handles.clear()


def _path(name: str) -> str:
    return f"{_base}/{name}" if name else _base


def _fd(handle: str) -> int:
    if handle not in _handles:  # it could not be opened, which is a result of its own
        raise OSError(errno.EBADF, "no such handle")
    return _handles[handle]


def _attributes(st: os.stat_result) -> dict[str, int]:
    found = {"mode": st.st_mode, "uid": st.st_uid, "gid": st.st_gid}
    if not modes.S_ISDIR(st.st_mode):
        found |= {"nlink": st.st_nlink, "size": st.st_size}
    if modes.S_ISCHR(st.st_mode) or modes.S_ISBLK(st.st_mode):
        found["rdev"] = st.st_rdev
    return found


def stat(name: str) -> dict[str, int]:
    """Attributes, without those on which filesystems differ."""
    return _attributes(os.lstat(_path(name)))


def fstat(handle: str) -> dict[str, int]:
    """The same of an open file."""
    return _attributes(os.fstat(_fd(handle)))


def times(name: str) -> tuple[int, int]:
    """Access and modification time, for those who have set them just now."""
    st = os.lstat(_path(name))
    return st.st_atime_ns, st.st_mtime_ns


def access(name: str, mode: int) -> bool:
    """access(2)."""
    return os.access(_path(name), mode)


def statfs(name: str) -> int:
    """statvfs(3): the longest name; the rest is the filesystem's own."""
    return os.statvfs(_path(name)).f_namemax


def readlink(name: str) -> str:
    """readlink(2)."""
    return os.readlink(_path(name))


def names(name: str) -> list[str]:
    """The names in a directory."""
    return sorted(os.listdir(_path(name)))


def listing(name: str) -> list[tuple[str, dict[str, int]]]:
    """The names in a directory with what `ls -l` shows of each."""
    with os.scandir(_path(name)) as entries:
        return sorted((entry.name, _attributes(entry.stat(follow_symlinks=False))) for entry in entries)


def names_of(handle: str) -> list[str]:
    """The names in an open directory, from its beginning."""
    os.lseek(_fd(handle), 0, os.SEEK_SET)
    return sorted(os.listdir(_fd(handle)))


def get(name: str) -> bytes:
    """A file's contents."""
    fd = os.open(_path(name), os.O_RDONLY)
    try:
        return _all_of(fd)
    finally:
        os.close(fd)


def _all_of(fd: int) -> bytes:
    parts, offset = [], 0
    while part := os.pread(fd, 1 << 20, offset):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


# ---- files


def create(name: str, flags: int = 0, mode: int = 0o644, handle: str = "") -> None:
    """open(2) with O_CREAT; with a handle it stays open."""
    _keep(os.open(_path(name), os.O_RDWR | os.O_CREAT | flags, mode), handle)


def open(name: str, flags: int, handle: str) -> None:
    """open(2)."""
    _keep(os.open(_path(name), flags), handle)


def _keep(fd: int, handle: str) -> None:
    if handle:
        _handles[handle] = fd
    else:
        os.close(fd)


def close(handle: str) -> None:
    """close(2)."""
    fd = _fd(handle)
    del _handles[handle]
    os.close(fd)


def put(name: str, data: bytes, flags: int = 0) -> int:
    """Write a file, which is made if it is not there."""
    fd = os.open(_path(name), os.O_WRONLY | os.O_CREAT | flags, 0o644)
    try:
        return os.write(fd, data)
    finally:
        os.close(fd)


def read(handle: str, size: int, offset: int) -> bytes:
    """pread(2)."""
    return os.pread(_fd(handle), size, offset)


def read_direct(handle: str, size: int, offset: int) -> bytes:
    """A read that no cache answers."""
    with mmap.mmap(-1, size) as buffer:
        return buffer[: os.preadv(_fd(handle), [buffer], offset)]


def write(handle: str, data: bytes, offset: int) -> int:
    """pwrite(2)."""
    return os.pwrite(_fd(handle), data, offset)


def write_direct(handle: str, data: bytes, offset: int) -> int:
    """A write past the kernel's cache: from memory that begins and ends with a page."""
    with mmap.mmap(-1, len(data)) as buffer:
        buffer[:] = data
        return os.pwritev(_fd(handle), [buffer], offset)


def append(handle: str, data: bytes) -> int:
    """write(2), where the file's offset (or O_APPEND) says."""
    return os.write(_fd(handle), data)


def seek(handle: str, offset: int, whence: int) -> int:
    """lseek(2)."""
    return os.lseek(_fd(handle), offset, whence)


def allocate(handle: str, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    fallocate = _libc.fallocate
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    if fallocate(_fd(handle), mode, offset, length):
        raise OSError(ctypes.get_errno(), "fallocate")


def copy_range(source: str, target: str, size: int, offset: int, to: int) -> int:
    """copy_file_range(2)."""
    return os.copy_file_range(_fd(source), _fd(target), size, offset, to)


def poll(handle: str, events: int) -> int:
    """poll(2) that does not wait."""
    waiting = select.poll()
    waiting.register(_fd(handle), events)
    return sum(found for _, found in waiting.poll(0))


def has_birth_time(name: str) -> bool:
    """statx(2): whether it tells when a file was made."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statx(_AT_FDCWD, os.fsencode(_path(name)), 0x100, 0x800, buffer):
        raise OSError(ctypes.get_errno(), "statx")
    return bool(int.from_bytes(buffer.raw[:4], "little") & 0x800)


def fsync(handle: str) -> None:
    """fsync(2)."""
    os.fsync(_fd(handle))


# ---- names


def mkdir(name: str, mode: int = 0o755) -> None:
    """mkdir(2)."""
    os.mkdir(_path(name), mode)


def rmdir(name: str) -> None:
    """rmdir(2)."""
    os.rmdir(_path(name))


def unlink(name: str) -> None:
    """unlink(2)."""
    os.unlink(_path(name))


def link(name: str, other: str) -> None:
    """link(2): *other* becomes a name of the same file."""
    os.link(_path(name), _path(other))


def symlink(target: str, name: str) -> None:
    """symlink(2)."""
    os.symlink(target, _path(name))


def mknod(name: str, mode: int, device: int = 0) -> None:
    """mknod(2)."""
    os.mknod(_path(name), mode, device)


def rename(old: str, new: str) -> None:
    """rename(2)."""
    os.rename(_path(old), _path(new))


def rename2(old: str, new: str, flags: int) -> None:
    """renameat2(2)."""
    if _libc.renameat2(_AT_FDCWD, os.fsencode(_path(old)), _AT_FDCWD, os.fsencode(_path(new)), flags):
        raise OSError(ctypes.get_errno(), "renameat2")


# ---- attributes


def chmod(name: str, mode: int) -> None:
    """chmod(2)."""
    os.chmod(_path(name), mode)


def fchmod(handle: str, mode: int) -> None:
    """fchmod(2)."""
    os.fchmod(_fd(handle), mode)


def chown(name: str, uid: int, gid: int) -> None:
    """lchown(2)."""
    os.lchown(_path(name), uid, gid)


def fchown(handle: str, uid: int, gid: int) -> None:
    """fchown(2)."""
    os.fchown(_fd(handle), uid, gid)


def utimens(name: str, atime: int, mtime: int) -> None:
    """utimensat(2), in nanoseconds."""
    os.utime(_path(name), ns=(atime, mtime), follow_symlinks=False)


def futimens(handle: str, atime: int, mtime: int) -> None:
    """futimens(3)."""
    os.utime(_fd(handle), ns=(atime, mtime))


def truncate(name: str, size: int) -> None:
    """truncate(2)."""
    os.truncate(_path(name), size)


def ftruncate(handle: str, size: int) -> None:
    """ftruncate(2)."""
    os.ftruncate(_fd(handle), size)


def setxattr(name: str, attribute: str, value: bytes, flags: int = 0) -> None:
    """lsetxattr(2)."""
    os.setxattr(_path(name), attribute, value, flags, follow_symlinks=False)


def getxattr(name: str, attribute: str) -> bytes:
    """lgetxattr(2)."""
    return os.getxattr(_path(name), attribute, follow_symlinks=False)


def listxattr(name: str) -> list[str]:
    """llistxattr(2), of the attributes that belong to users."""
    found = os.listxattr(_path(name), follow_symlinks=False)
    return sorted(attribute for attribute in found if attribute.startswith("user."))


def removexattr(name: str, attribute: str) -> None:
    """lremovexattr(2)."""
    os.removexattr(_path(name), attribute, follow_symlinks=False)


def tree() -> dict[str, Any]:
    """Everything below the chosen directory, by path, with all that can be compared."""
    found: dict[str, Any] = {}
    pending = [""]
    while pending:
        name = pending.pop()
        entry: dict[str, Any] = stat(name)
        found[name or "."] = entry
        mode = entry["mode"]
        if modes.S_ISDIR(mode):
            pending += [f"{name}/{child}" if name else child for child in names(name)]
        elif modes.S_ISLNK(mode):
            entry["target"] = readlink(name)
        elif modes.S_ISREG(mode):
            data = get(name)
            entry["data"] = data if len(data) <= _MOST else (len(data), zlib.crc32(data))
        if not modes.S_ISLNK(mode):
            entry["xattrs"] = _xattrs(name)
    return found


def _xattrs(name: str) -> dict[str, bytes]:
    try:
        return {attribute: getxattr(name, attribute) for attribute in listxattr(name)}
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENOSYS):
            return {}
        raise


def main() -> None:
    """Do what comes, until nothing comes any more."""
    functions: dict[str, Callable[..., object]] = {
        name: value for name, value in globals().items() if callable(value) and not name.startswith("_")
    }
    os.umask(0)
    while True:
        head = os.read(0, 4)
        if len(head) < 4:
            return
        size = int.from_bytes(head, "little")
        data = b""
        while len(data) < size:
            part = os.read(0, size - len(data))
            if not part:
                return
            data += part
        call, args = marshal.loads(data)  # noqa: S302 - from who started us
        try:
            result = ("value", functions[call](*args))
        except OSError as error:
            result = ("errno", error.errno)
        answer = marshal.dumps(result)  # type: ignore[arg-type]
        answer = len(answer).to_bytes(4, "little") + answer
        while answer:
            answer = answer[os.write(1, answer) :]


if __name__ == "__main__":
    main()
