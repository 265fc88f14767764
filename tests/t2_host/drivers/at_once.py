"""One file of zeros behind three handles' worth of answers: what `read_now` says is told by the offset."""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable
from typing import Any

import pyfuse3
import trio


class AtOnce(pyfuse3.Operations):
    """`read` answers b"read"; what else comes is `read_now`'s. Offset: what it does. 7: tells what waits to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Callable[[Any], None]] = []

    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o755 if inode == 1 else stat.S_IFREG | 0o644
        entry.st_size = 1 << 20
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
        return await self.getattr(2)

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=inode)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        if off == 7:
            for number, answer in enumerate(self.waiting):
                answer(memoryview(b"later %d" % number))
            self.waiting = []
        if off == 8:
            await trio.sleep_forever()
        return b"read"

    def read_now(self, fh: int, off: int, size: int, answer: Callable[[Any], None]) -> Any:
        match off:
            case 0:
                return b"now"
            case 1:
                return memoryview(bytearray(b"a view"))
            case 2:
                self.waiting.append(answer)
                return True
            case 3:
                raise ValueError("a mistake")
            case 4:
                return bytes(size + 1)
            case 5:
                trio.lowlevel.current_trio_token().run_sync_soon(answer, OSError(errno.ENODEV, "gone"))
                return True
            case 6:
                trio.lowlevel.current_trio_token().run_sync_soon(answer, bytes(size + 1))
                return True
            case 9:
                return None
        return False
