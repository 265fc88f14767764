"""What the tests of fs/fat share: volumes made by mkfs.fat, our driver on them in this process, and paths to files.

async with opened(image) as operations:      # a started Fat over a real block server on the file
    disk = Disk(operations)                  # POSIX words with paths, as the kernel would ask
    await disk.write_file("/a/b.txt", b"...")
fsck(image)                                  # after the driver's orderly end: clean, or AssertionError
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pyfuse3
import pytest

from tests.t1_block.lab import serving, uri
from udf import BlockDriver, DeviceGone, Store
from udf.host.load import load_class

ROOT = Path(__file__).resolve().parents[2]
PATH = str(ROOT / "fs" / "fat" / "__init__.py")
Fat: Any = load_class(PATH, "Fat")
fat = sys.modules[Fat.__module__.rpartition(".")[0]]  # the package, as it is loaded by path
CONTEXT: Any = pyfuse3.RequestContext()
MIB = 1024 * 1024


def module(name: str) -> Any:
    """A module of the driver, by its short name."""
    return sys.modules[f"{fat.__name__}.{name}"]


class Image(BlockDriver):
    """An image file as a block device; what is done to it can be seen, and stopped, before it is done."""

    def __init__(self, path: Path, block_size: int = 512) -> None:
        self._fd = os.open(path, os.O_RDWR)
        self.size = os.fstat(self._fd).st_size
        self.block_size = block_size
        self.seen: Callable[[str, int, bytes], None] = lambda verb, offset, data: None
        self.count = {"read": 0, "write": 0, "flush": 0}
        self.pulled = False

    async def read(self, offset: int, size: int) -> bytes:
        self._there()
        assert 0 <= offset <= offset + size <= self.size
        self.count["read"] += 1
        self.seen("read", offset, b"")
        return os.pread(self._fd, size, offset)

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._there()
        assert 0 <= offset <= offset + len(data) <= self.size
        self.count["write"] += 1
        self.seen("write", offset, bytes(data))
        os.pwrite(self._fd, data, offset)

    async def flush(self) -> None:
        self._there()
        self.count["flush"] += 1
        self.seen("flush", 0, b"")

    def _there(self) -> None:
        if self.pulled:
            raise DeviceGone("planned")

    def quiet(self) -> Quiet:
        """What waits until the volume is marked as clean again, after it was not."""
        return Quiet(self)

    def close(self) -> None:
        os.close(self._fd)


class Quiet:
    """Watches the flushes of an image: the one that follows the clearing of the dirty bit is the last."""

    def __init__(self, image: Image) -> None:
        self._done = threading.Event()
        self._steps = ["clean", "dirty"]
        self._image = image
        image.seen = self._see

    def _see(self, verb: str, offset: int, data: bytes) -> None:
        if verb == "write" and offset == 0 and self._steps:
            geometry = 0x41 if data[22:24] == b"\0\0" else 0x25
            if self._steps[-1] == ("dirty" if data[geometry] & 1 else "clean"):
                self._steps.pop()
        elif verb == "flush" and not self._steps:
            self._done.set()

    def wait(self, seconds: float = 40.0) -> None:
        """Until that has been done."""
        assert self._done.wait(seconds), "the volume does not come to rest"
        self._image.seen = lambda verb, offset, data: None


@contextlib.asynccontextmanager
async def opened(
    image: Path, *, store: Store | None = None, unit: Image | None = None, orderly: bool = True, **options: Any
) -> AsyncIterator[Any]:
    """Our driver, started, on an image. `orderly`: it ends with a sync, as at an unmount; else as if it were killed.

    `store`: the state store of the generation before (see `Stores`). `unit`: an Image of your own, which you close.
    """
    own = unit or Image(image)
    try:
        async with serving({"": own}) as path:
            operations = Fat(uri(path), store=store, **options)
            await operations.start()
            try:
                yield operations
            finally:
                if orderly:
                    await operations.stop()
                else:
                    await operations.drop()
    finally:
        if unit is None:
            own.close()
        if store is not None:
            store.close()


class Stores:
    """The state store of one mount: `store()` for each generation."""

    def __init__(self) -> None:
        from udf.driver.memory import create_memfds

        self._fds = create_memfds("fat-test")

    def store(self) -> Store:
        return Store([os.dup(fd) for fd in self._fds])

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)


def need(*programs: str) -> None:
    for program in programs:
        if not tool(program):
            pytest.skip(f"{program} is not installed")


def tool(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")


def make(path: Path, size: int, *arguments: str, kind: int = 0) -> Path:
    """A volume of so many bytes, sparse; arguments are those of mkfs.fat."""
    need("mkfs.fat")
    with open(path, "wb") as file:
        file.truncate(size)
    command = [str(tool("mkfs.fat")), *(["-F", str(kind)] if kind else []), *arguments, str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


def fsck(image: Path) -> str:
    """What fsck.fat says when it changes nothing; AssertionError unless the volume is clean."""
    done = subprocess.run([str(tool("fsck.fat")), "-n", str(image)], capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert len(text.splitlines()) == 2, text  # its version, and how many files there are
    return text


class Disk:
    """Files by path, asked of the operations as the kernel does it: look-ups, handles, forgets."""

    def __init__(self, operations: Any) -> None:
        self.operations = operations

    async def node(self, path: str) -> int:
        """The inode number; the look-ups are given back when the test's operations end. FUSEError."""
        inode = pyfuse3.ROOT_INODE
        for name in filter(None, path.split("/")):
            entry = await self.operations.lookup(inode, os.fsencode(name), CONTEXT)
            if not entry.st_ino:
                raise FileNotFoundError(path)
            inode = entry.st_ino
        return inode

    async def _parent(self, path: str) -> tuple[int, bytes]:
        directory, _, name = path.rstrip("/").rpartition("/")
        return await self.node(directory), os.fsencode(name)

    async def stat(self, path: str) -> Any:
        return await self.operations.getattr(await self.node(path), CONTEXT)

    async def exists(self, path: str) -> bool:
        try:
            await self.node(path)
        except FileNotFoundError:
            return False
        return True

    async def create(self, path: str, mode: int = 0o644, flags: int = os.O_RDWR) -> int:
        """A new file's handle."""
        parent, name = await self._parent(path)
        info, _ = await self.operations.create(parent, name, mode, flags | os.O_CREAT, CONTEXT)
        return info.fh

    async def open(self, path: str, flags: int = os.O_RDWR) -> int:
        return (await self.operations.open(await self.node(path), flags, CONTEXT)).fh

    async def close(self, handle: int) -> None:
        await self.operations.flush(handle)
        await self.operations.release(handle)

    async def write_file(self, path: str, data: bytes, piece: int = 128 * 1024) -> None:
        """Create or overwrite, in pieces of what the kernel sends."""
        handle = await self.create(path, flags=os.O_RDWR | os.O_TRUNC)
        await self.write(handle, 0, data, piece)
        await self.close(handle)

    async def write(self, handle: int, offset: int, data: bytes, piece: int = 128 * 1024) -> None:
        for at in range(0, len(data), piece):
            part = data[at : at + piece]
            assert await self.operations.write(handle, offset + at, part) == len(part)

    async def read_file(self, path: str, piece: int = 128 * 1024) -> bytes:
        handle = await self.open(path, os.O_RDONLY)
        out = bytearray()
        while data := await self.operations.read(handle, len(out), piece):
            out += data
        await self.operations.release(handle)
        return bytes(out)

    async def mkdir(self, path: str) -> None:
        parent, name = await self._parent(path)
        await self.operations.mkdir(parent, name, 0o755, CONTEXT)

    async def unlink(self, path: str) -> None:
        parent, name = await self._parent(path)
        await self.operations.unlink(parent, name, CONTEXT)

    async def rmdir(self, path: str) -> None:
        parent, name = await self._parent(path)
        await self.operations.rmdir(parent, name, CONTEXT)

    async def rename(self, old: str, new: str, flags: int = 0) -> None:
        await self.operations.rename(*await self._parent(old), *await self._parent(new), flags, CONTEXT)

    async def setattr(self, path: str, **values: Any) -> Any:
        """size, mode, uid, gid, atime_ns, mtime_ns."""
        attributes = pyfuse3.EntryAttributes()
        fields = Fields()
        for name, value in values.items():
            setattr(attributes, f"st_{name}", value)
            setattr(fields, f"update_{name.removesuffix('_ns')}", True)
        return await self.operations.setattr(await self.node(path), attributes, fields, None, CONTEXT)

    async def truncate(self, path: str, size: int) -> None:
        await self.setattr(path, size=size)

    async def truncate_file(self, path: str, size: int) -> None:
        """A new file of so many zeros."""
        await self.close(await self.create(path))
        await self.truncate(path, size)

    async def list(self, path: str = "/") -> list[str]:
        return [entry.name for entry in await self.entries(path)]

    async def entries(self, path: str = "/") -> list[Any]:
        """The directory's own entries (entries.Entry): readdir itself needs a kernel that takes what it says."""
        operations = self.operations
        node = operations._nodes.get(await self.node(path))
        async with operations._nodes.reading(node) as directory:
            return list(await directory.list())

    async def walk(self, path: str = "") -> dict[str, bytes | None]:
        """Everything by its path: contents, or None for a directory."""
        found: dict[str, bytes | None] = {}
        for entry in await self.entries(path or "/"):
            below = f"{path}/{entry.name}"
            if stat.S_ISDIR((await self.stat(below)).st_mode):
                found[below] = None
                found.update(await self.walk(below))
            else:
                found[below] = await self.read_file(below)
        return found

    async def free(self) -> int:
        return (await self.operations.statfs(CONTEXT)).f_bfree


class Fields:
    """What pyfuse3.SetattrFields says; that one cannot be made in Python."""

    update_size = update_mode = update_uid = update_gid = update_atime = update_mtime = update_ctime = False
