"""A small complete filesystem in memory, with every verb; what the adapter's rules are tested on."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass, field

import trio

from udf import Attr, FsDriver, Space


@dataclass(eq=False)
class File:
    kind: str = "file"
    mode: int = 0o644
    data: bytearray = field(default_factory=bytearray)
    target: str = ""
    names: int = 1
    uid: int = 0
    gid: int = 0
    mtime_ns: int = field(default_factory=time.time_ns)
    xattrs: dict[str, bytes] = field(default_factory=dict)


class Shelf(FsDriver):
    """`delay` seconds pass inside each verb that changes a name; SLOW in a path makes a read slow as well."""

    def __init__(self, delay: float = 0.0) -> None:
        self.files = {"/": File("dir", 0o755)}
        self.delay = delay

    def _get(self, path: str) -> File:
        if path not in self.files:
            raise FileNotFoundError(path)
        return self.files[path]

    def _add(self, path: str, file: File) -> None:
        if path in self.files:
            raise FileExistsError(path)
        if self._get(os.path.dirname(path)).kind != "dir":
            raise NotADirectoryError(path)
        self.files[path] = file

    async def list(self, path: str) -> list[str]:
        start = path.rstrip("/") + "/"
        return [p[len(start) :] for p in self.files if p.startswith(start) and p != "/" and "/" not in p[len(start) :]]

    async def stat(self, path: str) -> Attr:
        file = self._get(path)
        return Attr(
            file.kind,  # type: ignore[arg-type]
            size=len(file.data) or len(file.target),
            mode=file.mode,
            mtime_ns=file.mtime_ns,
            nlink=file.names if file.kind != "dir" else None,
            uid=file.uid,
            gid=file.gid,
        )

    async def read(self, path: str, offset: int, size: int) -> bytes:
        if "SLOW" in path:
            await trio.sleep(0.2)
        return bytes(self._get(path).data[offset : offset + size])

    async def write(self, path: str, offset: int, data: bytes) -> None:
        file = self._get(path)
        file.data.extend(bytes(max(0, offset - len(file.data))))
        file.data[offset : offset + len(data)] = data
        file.mtime_ns = time.time_ns()

    async def create(self, path: str, mode: int) -> None:
        self._add(path, File("file", mode))

    async def mkdir(self, path: str, mode: int) -> None:
        self._add(path, File("dir", mode))

    async def remove(self, path: str) -> None:
        await trio.sleep(self.delay)
        if await self.list(path) and self._get(path).kind == "dir":
            raise OSError(errno.ENOTEMPTY, path)
        self._get(path).names -= 1
        del self.files[path]

    async def rename(self, old: str, new: str) -> None:
        await trio.sleep(self.delay)
        self._get(old)
        if new in self.files:
            self.files[new].names -= 1
        for path in [p for p in self.files if p == old or p.startswith(old + "/")]:
            self.files[new + path[len(old) :]] = self.files.pop(path)
        await trio.sleep(self.delay)

    async def truncate(self, path: str, size: int) -> None:
        data = self._get(path).data
        data[size:] = bytes(max(0, size - len(data)))

    async def symlink(self, path: str, target: str) -> None:
        self._add(path, File("symlink", 0o777, target=target))

    async def readlink(self, path: str) -> str:
        return self._get(path).target

    async def link(self, old: str, new: str) -> None:
        self._add(new, self._get(old))
        self._get(old).names += 1

    async def setattr(
        self,
        path: str,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
    ) -> None:
        file = self._get(path)
        file.mode = file.mode if mode is None else mode
        file.uid = file.uid if uid is None else uid
        file.gid = file.gid if gid is None else gid
        file.mtime_ns = file.mtime_ns if mtime_ns is None else mtime_ns

    async def statfs(self) -> Space:
        return Space(total=1 << 20, free=1 << 19, files=100, files_free=50)

    async def fsync(self, path: str) -> None:
        self._get(path)

    async def getxattr(self, path: str, name: str) -> bytes:
        return self._get(path).xattrs[name]

    async def setxattr(self, path: str, name: str, value: bytes) -> None:
        self._get(path).xattrs[name] = value

    async def listxattr(self, path: str) -> list[str]:
        return list(self._get(path).xattrs)

    async def removexattr(self, path: str, name: str) -> None:
        del self._get(path).xattrs[name]


class NoRename(Shelf):
    """The same without rename and link: a removal of an open file has to wait."""

    rename = FsDriver.rename  # type: ignore[assignment]
    link = FsDriver.link  # type: ignore[assignment]


class NoLink(Shelf):
    """The same without link."""

    link = FsDriver.link  # type: ignore[assignment]


class ReadOnly(FsDriver):
    """Only what is required."""

    async def list(self, path: str) -> list[str]:
        return ["file"]

    async def stat(self, path: str) -> Attr:
        return Attr("dir") if path == "/" else Attr(size=4)

    async def read(self, path: str, offset: int, size: int) -> bytes:
        return b"text"[offset : offset + size]
