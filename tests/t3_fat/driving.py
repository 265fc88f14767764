"""fs/fat as the kernel drives it, in this process: by paths, on a medium that tests can watch, stop and look into.

Owns: the medium (a file, so that fsck.fat can look at it at any moment) and the translation of paths to the calls that
the kernel would make, lookups counted and forgotten. Must never: decide what an answer should be.
Called by: the tests that prove fs/fat or break it (model, fuzz, cuts, zoo).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import trio

from tests.t1_block.lab import serving, uri
from udf import BlockDriver, DeviceGone, Store
from udf.host.load import load_class

TREE = Path(__file__).resolve().parents[2]
SECTOR = 512
ROOT = pyfuse3.ROOT_INODE
CONTEXT = SimpleNamespace(uid=0, gid=0, umask=0o022, pid=1)
FIELDS = ("size", "uid", "gid", "mode", "atime", "mtime", "ctime")
DAMAGE = frozenset({
    errno.EIO, errno.ENODEV, errno.EROFS, errno.ENOENT, errno.ENOSPC, errno.EEXIST, errno.ENOTDIR, errno.EISDIR,
    errno.ENOTEMPTY, errno.EINVAL, errno.ENAMETOOLONG, errno.EFBIG, errno.EPERM, errno.ESTALE, errno.EBADF,
})  # fmt: skip

Log = list[tuple[int, bytes] | None]  # what was written where; None: a flush


class Refused(OSError):
    """What the driver answered, in the one form that tests ask for."""


class Medium(BlockDriver):
    """A file, or the piece of it at `offset`, as the device: it logs, and says no to what must not be written."""

    def __init__(self, path: Path, *, offset: int = 0, size: int | None = None, block_size: int = SECTOR) -> None:
        self.fd = os.open(path, os.O_RDWR)
        self.offset = offset
        self.size = (os.fstat(self.fd).st_size if size is None else size + offset) - offset
        self.block_size = block_size
        self.log: Log | None = None
        self.reads = self.writes = self.flushes = 0
        self.allowed: Callable[[int, bytes], str | None] = lambda offset, data: None
        self.forbidden: list[str] = []
        self.before_write: Callable[[int], None] = lambda number: None
        self.transfers = 0
        self.gone_at: int | None = None  # the number of the transfer with which the device goes away

    def close(self) -> None:
        os.close(self.fd)

    async def read(self, offset: int, size: int) -> bytes:
        self._there()
        self.reads += 1
        return os.pread(self.fd, size, self.offset + offset)

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._there()
        kept = bytes(data)
        refusal = self.allowed(offset, kept)
        if refusal:
            self.forbidden.append(refusal)
            raise OSError(errno.EIO, refusal)
        self.before_write(self.writes)
        self.writes += 1
        if self.log is not None:
            self.log.append((offset, kept))
        os.pwrite(self.fd, kept, self.offset + offset)

    async def flush(self) -> None:
        self._there()
        self.flushes += 1
        if self.log is not None:
            self.log.append(None)

    def _there(self) -> None:
        self.transfers += 1
        if self.gone_at is not None and self.transfers > self.gone_at:
            raise DeviceGone("planned")


class _Listing(list[tuple[bytes, Any, int]]):
    """What a readdir gave; so many entries fit into one reply."""

    room = 30


def _reply(token: _Listing, name: bytes, attributes: Any, following: int) -> bool:
    if len(token) >= token.room:
        return False
    token.append((bytes(name), attributes, following))
    return True


@functools.cache
def driver() -> type[Any]:
    """The class that is tested, loaded once."""
    path = os.environ.get("FAT_DRIVER", str(TREE / "fs" / "fat" / "__init__.py"))
    return load_class(path, "Fat")


class Driven:
    """A started driver, by paths. Every method raises Refused with the errno that a program would see."""

    def __init__(self, operations: Any) -> None:
        self.operations = operations

    async def _call(self, verb: str, *arguments: Any) -> Any:
        try:
            return await getattr(self.operations, verb)(*arguments)
        except pyfuse3.FUSEError as error:
            raise Refused(error.errno, os.strerror(error.errno)) from error
        except OSError as error:
            number = errno.ENODEV if isinstance(error, DeviceGone) else error.errno or errno.EIO
            raise Refused(number, str(error)) from error

    async def _forget(self, inodes: Iterable[int]) -> None:
        for inode in inodes:
            if inode != ROOT:
                await self.operations.forget([(inode, 1)])

    @contextlib.asynccontextmanager
    async def at(self, path: str) -> AsyncIterator[int]:
        """The inode of a path, looked up from the root, for as long as the block lasts."""
        held: list[int] = []
        inode, directory = ROOT, True
        try:
            for name in path.split("/") if path else []:
                if not directory:
                    raise Refused(errno.ENOTDIR, path)
                entry = await self._call("lookup", inode, os.fsencode(name), CONTEXT)
                if entry.st_ino == 0:
                    raise Refused(errno.ENOENT, path)
                inode, directory = entry.st_ino, stat.S_ISDIR(entry.st_mode)
                held.append(inode)
            yield inode
        finally:
            with trio.CancelScope(shield=True):
                await self._forget(held)

    @contextlib.asynccontextmanager
    async def _parent(self, path: str) -> AsyncIterator[tuple[int, bytes]]:
        head, _, name = path.rpartition("/")
        async with self.at(head) as inode:
            yield inode, name.encode("utf-8", "surrogateescape")

    async def stat(self, path: str) -> Any:
        async with self.at(path) as inode:
            return await self._call("getattr", inode, CONTEXT)

    async def listing(
        self, path: str = "", check: Callable[[str, Any], Awaitable[None]] | None = None
    ) -> dict[str, Any]:
        """Name: attributes, without the dots; each name once. `check` is asked while the listed inode is held."""
        found: dict[str, Any] = {}
        async with self.at(path) as inode:
            handle = await self._call("opendir", inode, CONTEXT)
            position = 0
            while True:
                token = _Listing()
                await self._call("readdir", handle, position, token)
                if not token:
                    break
                for name, attributes, following in token:
                    position = following
                    if name in (b".", b".."):
                        continue
                    if check is not None:
                        await check(os.fsdecode(name), attributes)
                    await self._forget([attributes.st_ino])
                    assert os.fsdecode(name) not in found, f"{name!r} is listed twice"
                    found[os.fsdecode(name)] = attributes
            await self._call("releasedir", handle)
        return found

    @contextlib.asynccontextmanager
    async def opened(self, path: str, flags: int = os.O_RDWR) -> AsyncIterator[int]:
        async with self.at(path) as inode:
            handle = (await self._call("open", inode, flags, CONTEXT)).fh
            try:
                yield handle
            finally:
                with trio.CancelScope(shield=True):
                    try:
                        await self._call("flush", handle)
                    finally:
                        await self._call("release", handle)

    async def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """All of it, or a piece, in the sizes in which the kernel asks."""
        pieces = []
        async with self.opened(path, os.O_RDONLY) as handle:
            while size is None or size > 0:
                want = min(131072, size if size is not None else 131072)
                piece = bytes(await self._call("read", handle, offset, want))
                pieces.append(piece)
                offset += len(piece)
                size = None if size is None else size - len(piece)
                if len(piece) < want:
                    break
        return b"".join(pieces)

    async def write(self, path: str, offset: int, data: bytes) -> int:
        """How many bytes were taken: fewer than all when the volume is full after some of them."""
        done = 0
        async with self.opened(path, os.O_WRONLY) as handle:
            while done < len(data):
                try:
                    written = await self._call("write", handle, offset + done, data[done : done + 131072])
                except Refused:
                    if done:
                        return done
                    raise
                assert 0 < written <= len(data) - done
                done += written
        return done

    async def fsync(self, path: str) -> None:
        async with self.opened(path) as handle:
            await self._call("fsync", handle, False)

    async def sync(self) -> None:
        """Everything that was answered is on the device, and the volume is clean."""
        await self._call("sync")

    async def create(self, path: str, data: bytes = b"") -> int:
        """A new file; its inode number."""
        async with self._parent(path) as (parent, name):
            info, entry = await self._call(
                "create", parent, name, 0o100644, os.O_RDWR | os.O_CREAT | os.O_EXCL, CONTEXT
            )
            try:
                if data:
                    await self._call("write", info.fh, 0, data)
            finally:
                with trio.CancelScope(shield=True):
                    await self._call("flush", info.fh)
                    await self._call("release", info.fh)
                    await self._forget([entry.st_ino])
            return int(entry.st_ino)

    async def mkdir(self, path: str) -> int:
        async with self._parent(path) as (parent, name):
            entry = await self._call("mkdir", parent, name, 0o755, CONTEXT)
            await self._forget([entry.st_ino])
            return int(entry.st_ino)

    async def unlink(self, path: str) -> None:
        async with self._parent(path) as (parent, name):
            await self._call("unlink", parent, name, CONTEXT)

    async def rmdir(self, path: str) -> None:
        async with self._parent(path) as (parent, name):
            await self._call("rmdir", parent, name, CONTEXT)

    async def rename(self, old: str, new: str, flags: int = 0) -> None:
        async with self._parent(old) as (parent, name), self._parent(new) as (other, wanted):
            await self._call("rename", parent, name, other, wanted, flags, CONTEXT)

    async def setattr(self, path: str, **what: int) -> Any:
        """size, mode, uid, gid; atime, mtime in nanoseconds."""
        fields = SimpleNamespace(**{f"update_{name}": name in what for name in FIELDS})
        names = {"atime": "st_atime_ns", "mtime": "st_mtime_ns", "ctime": "st_ctime_ns"}
        attributes = pyfuse3.EntryAttributes()
        for name, value in what.items():
            setattr(attributes, names.get(name, f"st_{name}"), value)
        async with self.at(path) as inode:
            return await self._call("setattr", inode, attributes, fields, None, CONTEXT)

    async def statfs(self) -> Any:
        return await self._call("statfs", CONTEXT)

    async def tree(self, path: str = "") -> dict[str, bytes | None]:
        """Every path with its contents, None for a directory."""
        found: dict[str, bytes | None] = {}
        for name, attributes in sorted((await self.listing(path)).items()):
            here = f"{path}/{name}" if path else name
            if stat.S_ISDIR(attributes.st_mode):
                found[here] = None
                found |= await self.tree(here)
            else:
                found[here] = await self.read(here)
        return found


@contextlib.asynccontextmanager
async def driven(
    medium: Medium, *, store: Store | None = None, directory: Path | None = None, **options: Any
) -> AsyncIterator[Driven]:
    """A driver on a medium, started and, at the end, stopped in order (unless the block was left by an error).

    `directory`: for the socket between them, if this process may be killed.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyfuse3, "readdir_reply", _reply)
        async with serving({"disk": medium}, directory=directory) as socket:
            own = Store.temporary() if store is None else None
            operations = driver()(uri(socket, "disk"), store=store or own, **{"utc": True, **options})
            try:
                await operations.start()
                try:
                    yield Driven(operations)
                finally:
                    await operations.stop()
            finally:
                if own is not None:
                    own.close()
