"""What is in a disk: an image file, or memory, behind a write cache that dies with the power.

Owns: the open file with its lock, the cache. Must never: open the file twice, write outside of it, or write what was
not flushed when the power goes: a FLUSH that a driver has forgotten must be found. It does not guard against a crash of
the machine that runs the emulator. Called by: scsi.py, storage.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import random
import socket
import stat

PAGE = 4096
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_ZEROS = bytes(1 << 20)
_MAP_NORESERVE = 0x4000  # asm-generic/mman-common.h; Python has the name from 3.13 on
LARGE = 64 * 1024  # bytes that are sent from where the kernel has them


class Mapping(mmap.mmap):
    """An image in our address space, which can tell where in the file a view of it lies. Nobody writes into it."""

    fd: int
    _base: int

    def __new__(cls, fd: int, size: int) -> Mapping:
        """Raises OSError, ValueError. The descriptor is looked at through a duplicate of its own."""
        # Private and writable, although nothing is written: ctypes tells no address of what is read-only.
        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
        self = super().__new__(cls, fd, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self))
        self.fd = os.dup(fd)
        return self

    def __del__(self) -> None:
        fd, self.fd = getattr(self, "fd", -1), -1
        if fd >= 0:
            os.close(fd)

    def offset(self, view: memoryview) -> int:
        """Where in the file this view of us begins."""
        return ctypes.addressof(ctypes.c_char.from_buffer(view)) - self._base


def send(sock: socket.socket, part: bytes | memoryview) -> int:
    """Send what goes without waiting, as `socket.send` does; what is in a file goes from there without a copy."""
    if isinstance(part, memoryview) and isinstance(part.obj, Mapping) and len(part) >= LARGE:
        sent = os.sendfile(sock.fileno(), part.obj.fd, part.obj.offset(part), len(part))
        if not sent:
            raise OSError(errno.EFAULT, "the image was cut")
        return sent
    return sock.send(part)


class Medium:
    """Bytes at offsets. Everything is bounded by the size that the file had when it was opened."""

    def __init__(
        self,
        path: str | None = None,
        *,
        size: int = 0,
        read_only: bool = False,
        cache: int = 0,
        keep: float = 0.0,
        seed: int = 0,
    ) -> None:
        """*path*: an image, locked as long as it is used; None: memory of *size* bytes. *cache*: bytes that may wait
        for a flush; *keep*: the chance of a page that was not flushed to have been written nevertheless.
        """
        self.path = path
        self.read_only = read_only
        self.cache = cache
        self._keep = keep
        self._choice = random.Random(seed)  # noqa: S311 - reproducible on purpose
        self._map: memoryview | None = None  # of a Mapping
        self._cannot_map = False
        self._dirty: dict[int, bytearray] = {}  # page -> its content, oldest first
        self._fd = _open(path, read_only) if path is not None else os.memfd_create("udf-medium")
        try:
            if path is None:
                os.ftruncate(self._fd, size)
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        """Give the file back. What was not flushed is lost."""
        self._dirty.clear()
        self._map = None  # what is still to be sent keeps it
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def dirty(self) -> int:
        """Bytes that the next loss of power would take."""
        return len(self._dirty) * PAGE

    def read(self, offset: int, size: int) -> bytes | memoryview:
        """Exactly so many bytes; OSError if the file is shorter by now. Valid until the next write."""
        if size >= LARGE and not self._dirty and os.fstat(self._fd).st_size >= offset + size:
            mapped = self._mapped()
            if mapped is not None:
                return mapped[offset : offset + size]
        data = os.pread(self._fd, size, offset)
        if len(data) != size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if not self._dirty:
            return data
        mixed: bytearray | None = None
        for page in range(offset // PAGE, (offset + size - 1) // PAGE + 1):
            content = self._dirty.get(page)
            if content is None:
                continue
            if mixed is None:
                mixed = bytearray(data)
            begin, end = max(offset, page * PAGE), min(offset + size, page * PAGE + PAGE)
            mixed[begin - offset : end - offset] = content[begin - page * PAGE : end - page * PAGE]
        return bytes(mixed) if mixed is not None else data

    def _mapped(self) -> memoryview | None:
        """The file in our address space. The kernel alone looks into it, when it sends: if it is cut, that fails."""
        if self._map is None and not self._cannot_map:
            try:
                self._map = memoryview(Mapping(self._fd, self.size))
            except (OSError, ValueError):
                self._cannot_map = True
        return self._map

    def write(self, offset: int, data: bytes | memoryview, *, through: bool = False) -> None:
        """Into the cache, if there is one, or (*through*: FUA) to the medium."""
        if self.read_only or offset + len(data) > self.size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if through or not self.cache:
            self._write_through(offset, data)
            return
        view = memoryview(data)
        done = 0
        while done < len(view):
            page, within = divmod(offset + done, PAGE)
            part = view[done : done + PAGE - within]
            content = self._dirty.pop(page, None)  # it becomes the youngest
            if content is None:
                content = bytearray(part) if len(part) == PAGE else bytearray(self._page(page))
            content[within : within + len(part)] = part
            self._dirty[page] = content
            done += len(part)
        while self.dirty > self.cache:
            oldest = next(iter(self._dirty))
            self._write_page(oldest, self._dirty.pop(oldest))

    def flush(self) -> None:
        """Everything that was written survives the loss of power from now on."""
        while self._dirty:
            page = next(iter(self._dirty))
            self._write_page(page, self._dirty[page])
            del self._dirty[page]

    def lose_power(self) -> None:
        """Take what was not flushed, or all but a seeded choice of it."""
        if self._keep:
            for page, content in self._dirty.items():
                if self._choice.random() < self._keep:
                    self._write_page(page, content)
        self._dirty.clear()

    def trim(self, offset: int, size: int) -> None:
        """Zeros that take no room. Like any other write they are not certain before a flush."""
        if self.cache or self.read_only:
            self.fill(offset, size, b"\0")
            return
        libc = ctypes.CDLL(None, use_errno=True)
        punched = libc.fallocate(self._fd, _KEEP_SIZE | _PUNCH_HOLE, ctypes.c_longlong(offset), ctypes.c_longlong(size))
        if punched:
            self.fill(offset, size, b"\0")

    def fill(self, offset: int, size: int, pattern: bytes) -> None:
        """The pattern again and again; its length divides the size."""
        many = pattern * max(1, len(_ZEROS) // len(pattern)) if any(pattern) else _ZEROS
        end = offset + size
        while offset < end:
            part = memoryview(many)[: end - offset]
            self.write(offset, part)
            offset += len(part)

    def _page(self, page: int) -> bytes:
        return os.pread(self._fd, PAGE, page * PAGE).ljust(PAGE, b"\0")

    def _write_page(self, page: int, content: bytes | bytearray) -> None:
        _pwrite(self._fd, memoryview(content)[: self.size - page * PAGE], page * PAGE)

    def _write_through(self, offset: int, data: bytes | memoryview) -> None:
        _pwrite(self._fd, memoryview(data), offset)
        if not self._dirty:
            return
        for page in range(offset // PAGE, (offset + len(data) - 1) // PAGE + 1):
            content = self._dirty.get(page)
            if content is not None:
                begin, end = max(offset, page * PAGE), min(offset + len(data), page * PAGE + PAGE)
                content[begin - page * PAGE : end - page * PAGE] = data[begin - offset : end - offset]


def _pwrite(fd: int, view: memoryview, offset: int) -> None:
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def _open(path: str, read_only: bool) -> int:
    """OSError with the path; BlockingIOError becomes a sentence about who holds it."""
    flags = os.O_RDONLY if read_only else os.O_RDWR
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block the emulator
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise OSError(errno.EINVAL, "is no image file", path)
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(errno.EBUSY, "somebody else uses this image", path) from None
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(fd)
        raise
    return fd
