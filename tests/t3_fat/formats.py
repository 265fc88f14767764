"""The format modules of fs/fat without the driver around them, and a directory's stream in memory."""

from __future__ import annotations

import errno
import importlib
import sys
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# A package of our own name: fs/fat/__init__.py, and with it all of the driver, is not run.
_PACKAGE = "udf_fat_formats"
if _PACKAGE not in sys.modules:
    _package = types.ModuleType(_PACKAGE)
    _package.__path__ = [str(ROOT / "fs" / "fat")]
    sys.modules[_PACKAGE] = _package


def module(name: str) -> Any:
    return importlib.import_module(f"{_PACKAGE}.{name}")


boot = module("boot")
damage = module("damage")
directory = module("directory")
dots = module("dots")
entries = module("entries")
names = module("names")
times = module("times")

WIDE = entries.Settings(wide=True, utc=True)
NOW = 1_700_000_000_000_000_000
STAMPS = {"created_ns": NOW, "modified_ns": NOW, "accessed_ns": NOW}


class Cut(Exception):
    """The power went before this write."""


class Memory:
    """A directory's bytes. Every write is counted and checked; after `left` of them the power goes."""

    def __init__(self, data: bytes = b"", *, cluster: int = 512, most: int | None = None) -> None:
        self.data = bytearray(data or bytes(cluster))
        self.cluster = cluster
        self.most = most
        self.writes: list[tuple[int, bytes]] = []
        self.left = -1
        self.reads = 0

    @property
    def size(self) -> int:
        return len(self.data)

    async def read(self, offset: int, size: int) -> bytes:
        assert 0 <= offset <= offset + size <= len(self.data)
        self.reads += size
        return bytes(self.data[offset : offset + size])

    async def write(self, offset: int, data: bytes) -> None:
        assert data
        assert 0 <= offset <= offset + len(data) <= len(self.data)
        assert offset // 512 == (offset + len(data) - 1) // 512, "a write that can be torn"
        self._count()
        self.writes.append((offset, bytes(data)))
        self.data[offset : offset + len(data)] = data

    async def grow(self) -> None:
        if self.most is not None and len(self.data) + self.cluster > self.most:
            raise OSError(errno.ENOSPC, "no cluster is free")
        self._count()
        self.data += bytes(self.cluster)

    def _count(self) -> None:
        if self.left == 0:
            raise Cut
        self.left -= 1


def open_directory(data: bytes = b"", **options: Any) -> tuple[Any, Memory]:
    stream = Memory(data, **options)
    return directory.Directory(stream, WIDE), stream
