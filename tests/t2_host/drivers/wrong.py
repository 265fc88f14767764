"""A driver that answers what the interface does not allow; which, its path says."""

from __future__ import annotations

import itertools
from typing import Any

from udf import Attr, FsDriver

LISTS: dict[str, Any] = {
    "slash": ["a/b"],
    "nul": ["a\0b"],
    "dot": ["."],
    "empty": [""],
    "number": [7],
    "string": "abc",
    "none": None,
    "long": ["x" * 300],
    "surrogate": ["\ud800"],
    "mapping": {"a": "not an Attr"},
    "good": ["a", "a", "b"],
}
ATTRS: dict[str, Any] = {
    "none": None,
    "tuple": (1, 2),
    "kind": Attr("socket"),  # type: ignore[arg-type]
    "unhashable": Attr([]),  # type: ignore[arg-type]
    "size": Attr(size="5"),  # type: ignore[arg-type]
    "negative": Attr(size=-1),
    "mode": Attr(mode="rw"),  # type: ignore[arg-type]
    "uid": Attr(uid=-1),
    "time": Attr(mtime_ns="now"),  # type: ignore[arg-type]
    "nlink": Attr(nlink=1 << 70),
    "ino": Attr(ino=-4),
}
READS: dict[str, Any] = {
    "long": b"x" * 100_000,
    "text": "text",
    "none": None,
    "number": 7,
    "list": [1, 2],
    "bytearray": bytearray(b"fine"),
    "view": memoryview(b"fine"),
}
WRITES: dict[str, Any] = {"text": "3", "many": 1 << 40, "negative": -1, "bool": True, "none": None, "half": 2}


class Wrong(FsDriver):
    async def list(self, path: str) -> Any:
        name = path.rpartition("/")[2]
        if name == "endless":
            return (str(number) for number in itertools.count())
        return LISTS.get(name, [])

    async def stat(self, path: str) -> Any:
        top, _, name = path[1:].partition("/")
        if top == "stat" and name in ATTRS:
            return ATTRS[name]
        if top == "link":
            return Attr("symlink" if name else "dir")
        return Attr("dir") if not name or (top == "list" and name in ("endless", *LISTS)) else Attr(size=1 << 20)

    async def read(self, path: str, offset: int, size: int) -> Any:
        return READS[path.rpartition("/")[2]]

    async def write(self, path: str, offset: int, data: bytes) -> Any:
        return WRITES[path.rpartition("/")[2]]

    async def readlink(self, path: str) -> Any:
        return {"none": None, "nul": "a\0b", "empty": "", "bytes": b"x", "good": "target"}[path.rpartition("/")[2]]

    async def getxattr(self, path: str, name: str) -> Any:
        return {"user.none": None, "user.text": "x", "user.long": b"x" * 100_000, "user.good": b"v"}[name]

    async def listxattr(self, path: str) -> Any:
        return {"none": None, "bytes": [b"x"], "nul": ["a\0"]}.get(path.rpartition("/")[2], ["user.good"])

    async def statfs(self) -> Any:
        return 7
