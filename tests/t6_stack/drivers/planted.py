# /// udf
# kind = "fs"
# interface = 1
# class = "Planted"
# source = "directory"
#
# [option.bug]
# type = "str"
# default = "none"
# help = "none, early, copies or forgets"
# ///
"""Mirrors a directory by paths, with one mistake on request that only shows when the process dies."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from udf import Attr, FsDriver

KINDS = {stat.S_IFDIR: "dir", stat.S_IFREG: "file", stat.S_IFLNK: "symlink"}


class Planted(FsDriver):
    """`early` writes when the next thing is asked, `copies` renames by copying, `forgets` keeps modes to itself."""

    valid = 0.0  # the kernel asks for everything, so that there are many steps

    def __init__(self, source: str, bug: str = "none") -> None:
        self._source = source
        self._bug = bug
        self._late: list[Callable[[], object]] = []
        self._modes: dict[str, int] = {}

    def _path(self, path: str) -> str:
        while self._late:
            self._late.pop(0)()
        return self._source + path

    async def list(self, path: str) -> list[str]:
        return os.listdir(self._path(path))

    async def stat(self, path: str) -> Attr:
        st = os.lstat(self._path(path))
        mode = self._modes.get(path, st.st_mode & 0o7777)
        kind = KINDS[stat.S_IFMT(st.st_mode)]
        return Attr(kind, size=st.st_size, mode=mode, ino=st.st_ino)  # type: ignore[arg-type]

    async def read(self, path: str, offset: int, size: int) -> bytes:
        with open(self._path(path), "rb") as file:
            return os.pread(file.fileno(), size, offset)

    async def write(self, path: str, offset: int, data: bytes) -> None:
        place = self._path(path)

        def write() -> None:
            with open(place, "r+b", buffering=0) as file:
                os.pwrite(file.fileno(), data, offset)

        if self._bug == "early":
            self._late.append(write)
        else:
            write()

    async def create(self, path: str, mode: int) -> None:
        os.close(os.open(self._path(path), os.O_CREAT | os.O_EXCL, mode))

    async def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self._path(path), mode)

    async def remove(self, path: str) -> None:
        place = self._path(path)
        if os.path.isdir(place) and not os.path.islink(place):
            os.rmdir(place)
        else:
            os.unlink(place)

    async def rename(self, old: str, new: str) -> None:
        if self._bug != "copies":
            os.rename(self._path(old), self._path(new))
            return
        with open(self._path(old), "rb") as source:
            data = source.read()
        fd = os.open(self._path(new), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, os.stat(self._path(old)).st_mode)
        os.write(fd, data)
        os.close(fd)
        os.unlink(self._path(old))

    async def truncate(self, path: str, size: int) -> None:
        os.truncate(self._path(path), size)

    async def setattr(self, path: str, *, mode: int | None = None, **others: int | None) -> None:
        if mode is not None and self._bug == "forgets":
            self._modes[path] = mode
        elif mode is not None:
            os.chmod(self._path(path), mode)
