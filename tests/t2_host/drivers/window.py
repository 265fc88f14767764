"""One large file, read through a window: `read` by itself, or `read_now` from pieces of the window."""

from __future__ import annotations

import errno
import stat
from typing import Any

import pyfuse3

from udf import Window

SIZE = 4 << 20


def content(offset: int, size: int) -> bytes:
    pattern = bytes(range(251))
    begin = offset % 251
    return (pattern * (size // 251 + 2))[begin : begin + max(0, min(size, SIZE - offset))]


class Reads(pyfuse3.Operations):
    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o755 if inode == 1 else stat.S_IFREG | 0o644
        entry.st_size = SIZE
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
        return await self.getattr(2)

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=inode)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        if off == 1:
            raise pyfuse3.FUSEError(errno.ENODEV)
        if off == 2:
            raise ValueError("a mistake")
        if off == 3:
            return bytes(size + 1)
        return content(off, size)


class Points(Reads):
    window: Window | None = None
    last: memoryview | None = None

    def read_now(self, fh: int, off: int, size: int, answer: Any) -> Any:
        if off < 16 or self.window is None:
            return False
        if self.last is not None:
            self.window.give_back(self.last)  # its answer was given
        piece = self.last = self.window.take()
        if piece is None:
            return False
        data = content(off, size)
        half = len(data) // 2
        piece[: len(data)] = data
        return [piece[:half], piece[half : len(data)]] if half else [piece[: len(data)]]
