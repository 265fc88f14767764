"""A driver whose file names say what their handlers raise."""

from __future__ import annotations

import os
import sys

import pyfuse3
import trio

from udf import Attr, DeviceGone, FsDriver


class Odd(BaseException):
    """Not even an Exception."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


async def grouped() -> None:
    async def fail() -> None:
        raise FileNotFoundError

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)


RAISED = {
    "notfound": FileNotFoundError("x"),
    "permission": PermissionError("x"),
    "oserror28": OSError(28, "full"),
    "oserrorodd": OSError(4711, "odd"),
    "fuse13": pyfuse3.FUSEError(13),
    "fuseodd": pyfuse3.FUSEError(-5),
    "gone": DeviceGone("unplugged"),
    "value": ValueError("bug"),
    "zero": ZeroDivisionError("bug"),
    "odd": Odd(),
    "interrupt": KeyboardInterrupt(),
    "generator": StopAsyncIteration(),
    "memory": MemoryError(),
    "unicode": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
}


class Raises(FsDriver):
    async def list(self, path: str) -> list[str]:
        return list(RAISED)

    async def stat(self, path: str) -> Attr:
        return Attr("dir") if path == "/" else Attr(size=100)

    async def read(self, path: str, offset: int, size: int) -> bytes:
        name = path[1:]
        if name == "exit":
            sys.exit(3)
        if name == "grouped":
            await grouped()
        if name in RAISED:
            raise RAISED[name]
        if name == "stopiteration":
            next(iter(()))
        if name == "recursion":
            return await self.read(path, offset, size)
        return b"fine"

    async def write(self, path: str, offset: int, data: bytes) -> int:
        if path == "/abort":
            os.abort()
        if path == "/kill":
            os.kill(os.getpid(), 9)
        if path == "/exit":
            os._exit(5)
        raise ValueError("write")
