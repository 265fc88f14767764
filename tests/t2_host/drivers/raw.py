"""Wrong answers on the level of pyfuse3.Operations, where pyfuse3 itself would end its loop."""

from __future__ import annotations

import stat
from typing import Any

import pyfuse3

from udf import Attr

NAMES = ("entry", "read_text", "read_long", "write_text", "open_number", "good")


class Raw(pyfuse3.Operations):
    """Nodes: 1 is the root, the others are numbered as NAMES."""

    def __init__(self, text: str = "") -> None:
        super().__init__()
        self.text = text

    def attr(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o755 if inode == 1 else stat.S_IFREG | 0o644
        entry.st_size = 100
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> Any:
        if name == b"entry":
            return Attr()
        if name.decode() in NAMES:
            return self.attr(NAMES.index(name.decode()) + 2)
        raise KeyError(name)

    def getattr(self, inode: int, ctx: Any = None) -> Any:  # type: ignore[override]
        return None if inode == 3 else self.attr_later(inode)

    async def attr_later(self, inode: int) -> pyfuse3.EntryAttributes:
        return self.attr(inode)

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        return 7 if NAMES[inode - 2] == "open_number" else pyfuse3.FileInfo(fh=inode)

    async def read(self, fh: int, off: int, size: int) -> Any:
        return {"read_text": "x", "read_long": b"x" * (size + 1)}.get(NAMES[fh - 2], self.text.encode() or b"fine")

    async def write(self, fh: int, off: int, buf: bytes) -> Any:
        return "4"

    async def opendir(self, inode: int, ctx: Any) -> Any:
        return -1

    async def readlink(self, inode: int, ctx: Any) -> Any:
        return "text"

    async def statfs(self, ctx: Any) -> Any:
        return {}

    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> Any:
        return "text"

    async def listxattr(self, inode: int, ctx: Any) -> Any:
        return ["text"]

    async def create(self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        return self.attr(9)

    async def forget(self, inode_list: Any) -> None:
        raise ValueError("forget")
