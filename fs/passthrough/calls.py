"""The Linux system calls that Python's os module lacks: handles, renameat2, openat2, getdents64, credentials.

Owns the argument buffers, so it must be called from one thread only (the loop's; credentials are per thread anyway).
Every function raises OSError with the call's errno. No policy: nodes.py and __init__.py decide.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import struct

AT_EMPTY_PATH = 0x1000
RESOLVE_NO_XDEV = 0x01
UTIME_OMIT = (1 << 30) - 2

# linux/magic.h: what has a flush operation, so that close(2) can report an error or wait for a server.
_REMOTE_MAGICS = {0x6969, 0xFF534D42, 0xFE534D42, 0x517B, 0x65735546, 0x00C36400, 0x20030528, 0x6B414653, 0x5346414F}

_SYS_OPENAT2 = 437  # the same on every architecture: it came after their numbers were unified
_MAX_HANDLE = 128
_DIRENT = struct.Struct("<QqH")
_NAME = 19  # after the type, which is one byte
_DIRENTS_SIZE = 32768

_libc = ctypes.CDLL(None, use_errno=True)
_handle_buffer = ctypes.create_string_buffer(8 + _MAX_HANDLE)
_handle_address = ctypes.addressof(_handle_buffer)
_handle_size = ctypes.c_uint32.from_buffer(_handle_buffer)
_mount_id = ctypes.c_int()
_mount_id_address = ctypes.addressof(_mount_id)
_dirents = ctypes.create_string_buffer(_DIRENTS_SIZE)
_dirents_address = ctypes.addressof(_dirents)
_timespecs = (ctypes.c_long * 4)()
_statfs = ctypes.create_string_buffer(256)

_name_to_handle_at = _libc.name_to_handle_at
_name_to_handle_at.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
_open_by_handle_at = _libc.open_by_handle_at
_open_by_handle_at.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
_renameat2 = _libc.renameat2
_renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_utimensat = _libc.utimensat
_utimensat.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
_getdents64 = _libc.getdents64
_getdents64.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
_getdents64.restype = ctypes.c_ssize_t
_fstatfs = _libc.fstatfs
_fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]
_openat2 = _libc.syscall
_setfsuid = _libc.setfsuid
_setfsuid.argtypes = [ctypes.c_uint]
_setfsgid = _libc.setfsgid
_setfsgid.argtypes = [ctypes.c_uint]
_capget = _libc.capget
_capget.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
_capset = _libc.capset
_capset.argtypes = [ctypes.c_char_p, ctypes.c_char_p]

_CAP_VERSION_3 = struct.pack("<Ii", 0x20080522, 0)
_CAP_SETGID, _CAP_SETUID = 6, 7


def _failure() -> OSError:
    number = ctypes.get_errno() or errno.EIO
    return OSError(number, os.strerror(number))


def handle_of(directory: int, name: bytes) -> tuple[int, bytes]:
    """The mount id and file handle of name in directory (of the descriptor itself when name is empty)."""
    _handle_size.value = _MAX_HANDLE
    flags = 0 if name else AT_EMPTY_PATH
    if _name_to_handle_at(directory, name, _handle_address, _mount_id_address, flags):
        raise _failure()
    return _mount_id.value, ctypes.string_at(_handle_address, 8 + _handle_size.value)


def number_of(handle: bytes) -> int:
    """A number that no other file's handle has: the handle itself where it is short (ext4: inode and generation)."""
    opaque = handle[8:]
    short = opaque if len(opaque) <= 8 else hashlib.blake2b(opaque, digest_size=8).digest()
    return int.from_bytes(short, "little")


def open_handle(mount: int, handle: bytes, flags: int) -> int:
    """A descriptor for the file that handle names; mount is any readable descriptor of its filesystem."""
    descriptor: int = _open_by_handle_at(mount, handle, flags | os.O_CLOEXEC)
    if descriptor < 0:
        raise _failure()
    return descriptor


def open_beneath(directory: int, name: bytes, flags: int) -> int:
    """Open name in directory, refusing with EXDEV to enter another mount."""
    how = struct.pack("<QQQ", flags | os.O_CLOEXEC, 0, RESOLVE_NO_XDEV)
    descriptor: int = _openat2(_SYS_OPENAT2, directory, ctypes.c_char_p(name), ctypes.c_char_p(how), len(how))
    if descriptor < 0:
        raise _failure()
    return descriptor


def rename(old_directory: int, old: bytes, new_directory: int, new: bytes, flags: int) -> None:
    """renameat2(2), for the flags that os.rename does not take."""
    if _renameat2(old_directory, old, new_directory, new, flags):
        raise _failure()


def set_times(descriptor: int, atime_ns: int | None, mtime_ns: int | None) -> None:
    """utimensat(2) on any descriptor, O_PATH and symbolic links included; None leaves a stamp as it is."""
    for at, stamp in ((0, atime_ns), (2, mtime_ns)):
        _timespecs[at], _timespecs[at + 1] = (0, UTIME_OMIT) if stamp is None else divmod(stamp, 1_000_000_000)
    if _utimensat(descriptor, b"", ctypes.addressof(_timespecs), AT_EMPTY_PATH):
        raise _failure()


def directory_entries(descriptor: int) -> list[tuple[bytes, int, int]]:
    """The next entries of an open directory as (name, offset of the next one, inode number); [] at its end."""
    size = _getdents64(descriptor, _dirents_address, _DIRENTS_SIZE)
    if size < 0:
        raise _failure()
    data = ctypes.string_at(_dirents_address, size)
    found = []
    at = 0
    while at < size:
        ino, offset, length = _DIRENT.unpack_from(data, at)
        found.append((data[at + _NAME : data.index(0, at + _NAME)], offset, ino))
        at += length
    return found


def is_remote(descriptor: int) -> bool:
    """Whether the filesystem talks to a server, so that calls may take long and close(2) may fail."""
    if _fstatfs(descriptor, ctypes.addressof(_statfs)):
        raise _failure()
    (magic,) = struct.unpack_from("@l", _statfs)
    return magic & 0xFFFFFFFF in _REMOTE_MAGICS


class Identity:
    """Creates files in a caller's name: this thread's filesystem ids, with the capabilities kept.

    The ids decide who owns a new file, so there is no moment at which it belongs to the driver, and the source's
    own rules (setgid directories, quota) apply. Going from uid 0 to another makes the kernel drop the capabilities
    on files from the effective set, while the check of permissions was the kernel's already, with the caller's
    supplementary groups that we do not have: they are raised again at once.
    """

    def __init__(self) -> None:
        self.uid = os.geteuid()
        self.gid = os.getegid()
        sets = ctypes.create_string_buffer(24)
        if _capget(_CAP_VERSION_3, ctypes.addressof(sets)):
            raise _failure()
        self._sets = sets.raw
        effective = int.from_bytes(self._sets[:4], "little")
        wanted = 1 << _CAP_SETGID | 1 << _CAP_SETUID
        self.can_change = effective & wanted == wanted

    def assume(self, uid: int, gid: int) -> None:
        """Act as uid and gid on files from here to restore()."""
        _setfsgid(gid)
        _setfsuid(uid)
        if uid != self.uid and _capset(_CAP_VERSION_3, self._sets):
            raise _failure()

    def restore(self) -> None:
        """Be the driver's own user again."""
        _setfsuid(self.uid)
        _setfsgid(self.gid)
        if self.uid and _capset(_CAP_VERSION_3, self._sets):  # going back to uid 0 raises them by itself
            raise _failure()
