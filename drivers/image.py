# /// udf
# kind = "block"
# interface = 1
# class = "Image"
# description = "serves an image file as a block device"
# source = "file"
# provides = "block"
# names = "disk"
#
# [option.read_only]
# type = "bool"
# default = false
# help = "never write to the file"
#
# [option.block_size]
# type = "int"
# default = 512
# help = "bytes in one block: a power of two from 512 to 65536"
# ///
"""An image file as a block device.

As loop devices do, it serves whole blocks: what the file has behind the last one is left alone, and a file that grows
is not followed. A file that is written to is locked (flock), and so is one that is read, against who would write.
Holes are told, made by trim, and kept by zeros. Flush is fdatasync.

Reads that the page cache cannot answer wait in a thread, so that others go on; so does what may take long.
"""

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Iterator

import trio

from udf import BlockDriver, Extent, UserError

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10
_PIECE = 1024 * 1024
_MAX_EXTENTS = 1024

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Image(BlockDriver):
    """A file's bytes."""

    trim_zeroes = True
    fast_zero = True

    def __init__(self, source: str, read_only: bool = False, block_size: int = 512) -> None:
        if block_size & (block_size - 1) or not 512 <= block_size <= 65536:
            raise UserError(f"block_size must be a power of two from 512 to 65536, not {block_size}")
        self.block_size = block_size
        self.read_only = read_only
        self._fd = self._open(source)
        try:
            self._lock(source)
            self.size = self._size(source)
        except BaseException:
            os.close(self._fd)
            raise
        self._cached = True  # the file's filesystem can tell whether a read would wait
        self.can_trim = not self.read_only

    def _open(self, source: str) -> int:
        if not self.read_only:
            try:
                return os.open(source, os.O_RDWR | os.O_CLOEXEC)
            except PermissionError:
                self.read_only = True
            except OSError as exc:
                if exc.errno != errno.EROFS:
                    raise UserError(f"{source}: {exc.strerror}") from None
                self.read_only = True
        try:
            return os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise UserError(f"{source}: {exc.strerror}") from None

    def _lock(self, source: str) -> None:
        try:
            fcntl.flock(self._fd, (fcntl.LOCK_SH if self.read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            what = "writes to" if self.read_only else "uses"
            raise UserError(f"{source}: somebody else {what} the image already (it is locked)") from None

    def _size(self, source: str) -> int:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
            raise UserError(f"{source}: this is neither a file nor a block device")
        size = os.lseek(self._fd, 0, os.SEEK_END)
        if size < self.block_size:
            raise UserError(f"{source}: the image has {size} bytes, and that is less than one block")
        if rest := size % self.block_size:
            print(f"{source}: the last {rest} bytes are no whole block and are not served")
        return size - rest

    async def read(self, offset: int, size: int) -> bytes | bytearray:
        data = bytearray(size)
        view = memoryview(data)
        done = 0
        if self._cached:
            try:
                done = os.preadv(self._fd, [view], offset, os.RWF_NOWAIT)
            except BlockingIOError:
                pass
            except OSError as exc:
                if exc.errno != errno.EOPNOTSUPP:
                    raise
                self._cached = False
        if done < size:
            await trio.to_thread.run_sync(self._read_all, view[done:], offset + done)
        return data

    def _read_all(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.preadv(self._fd, [view], offset)
            if not count:
                raise OSError(errno.EIO, "the image has become shorter")
            view, offset = view[count:], offset + count

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._fd, view, offset)
            view, offset = view[count:], offset + count

    async def flush(self) -> None:
        await trio.to_thread.run_sync(os.fdatasync, self._fd)

    async def trim(self, offset: int, size: int) -> None:
        await trio.to_thread.run_sync(self._allocate, _PUNCH_HOLE | _KEEP_SIZE, offset, size)

    async def zero(self, offset: int, size: int) -> None:
        await trio.to_thread.run_sync(self._allocate, _ZERO_RANGE | _KEEP_SIZE, offset, size)

    def _allocate(self, mode: int, offset: int, size: int) -> None:
        """Make zeros in the file's filesystem, or write them where it cannot."""
        if not _fallocate(self._fd, mode, offset, size):
            return
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(number, os.strerror(number))
        self.fast_zero = self.can_trim = False
        zeros, end = bytes(_PIECE), offset + size
        while offset < end:
            offset += os.pwrite(self._fd, memoryview(zeros)[: end - offset], offset)

    async def extents(self, offset: int, size: int) -> list[Extent]:
        return list(self._extents(offset, offset + size))

    def _extents(self, at: int, end: int) -> Iterator[Extent]:
        for _ in range(_MAX_EXTENTS):
            if at >= end:
                return
            try:
                data = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError as exc:
                if exc.errno != errno.ENXIO:  # a filesystem that cannot tell
                    yield Extent(end - at)
                    return
                data = end  # a hole up to the file's end
            data = min(data, end)
            if data > at:
                yield Extent(data - at, hole=True, zero=True)
            if data >= end:
                return
            at = min(os.lseek(self._fd, data, os.SEEK_HOLE), end)
            yield Extent(at - data)
