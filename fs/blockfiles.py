# /// udf
# kind = "fs"
# interface = 1
# class = "BlockFiles"
# description = "shows the exports of a block service as files"
# source = "block"
# open = "driver"
# nodes = "stable"
#
# [option.timeout]
# type = "float"
# default = 120.0
# help = "seconds after which a device that does not answer is an error"
# ///
"""Disks and partitions as files: `disk`, `part1`, … are read and written in place, as /dev/sda and /dev/sda1 are.

The source is the socket of an NBD server, or an NBD URI. What it exports may come and go.

Who may write: a file that is open for writing only is claimed by the open, any other by the first write to it, and
the claim ends with a close (if other descriptors of that open are left, their next write takes it again). While it is
held, whoever else wants to write there (to the file, to the whole disk, or to a partition in it) gets EBUSY. Reading
is free to all.

A disk cannot be cut: O_TRUNC does nothing, as with the kernel's own block devices, and ftruncate to another size is
EINVAL. Programs that rely on it must be told so (dd: conv=notrunc, if seek= is given; qemu-img convert: -n).
Writing behind the end is ENOSPC. There is no fallocate, because pyfuse3 has no handler for it. fsync reaches the
device's medium, and so does the close of a file that was written to. When the device is gone, everything is ENODEV.
"""

import errno
import os
import stat
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from urllib.parse import quote

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, SetattrFields, StatvfsData

from udf import BlockClient, DeviceGone

VALID = 1.0  # seconds for which it is believed what the server exports
MAX_FILES = 1024
GOODBYE = 5.0  # seconds for a server to take back a claim
_BLKSIZE = 128 * 1024  # what programs take as their buffer: one message for each


@dataclass
class File:
    """One export, for as long as the server has it or the kernel knows it."""

    id: int
    export: str
    size: int = 0
    read_only: bool = False
    lookups: int = 0
    opens: int = 0
    changed_ns: int = field(default_factory=time.time_ns)
    reader: BlockClient | None = None
    lost: list[BlockClient] = field(default_factory=list)  # readers that have only errors for whoever holds them
    opening: trio.Lock = field(default_factory=trio.Lock)


@dataclass
class Handle:
    """One open file."""

    file: File
    reader: BlockClient | None = None  # the file's at the time of the open
    has_read: bool = False
    writer: BlockClient | None = None
    writing: int = 0  # requests under way
    dirty: bool = False  # written to since the last flush
    opening: trio.Lock = field(default_factory=trio.Lock)


class BlockFiles(pyfuse3.Operations):
    """One directory of exports."""

    def __init__(self, source: str, timeout: float = 120.0) -> None:
        self._uri = source if "://" in source else f"nbd+unix:///?socket={quote(source)}"
        self._timeout = timeout
        self._by_name: dict[str, File] = {}  # what the server exports now
        self._by_id: dict[int, File] = {}  # and what the kernel still knows
        self._handles: dict[int, Handle] = {}
        self._numbers = count(1)
        self._listed = -VALID
        self._listing = trio.Lock()
        self._started_ns = time.time_ns()

    # -- what there is

    async def _look(self) -> dict[str, File]:
        """The files by name, as the server tells, or told a moment ago."""
        if trio.current_time() - self._listed < VALID:
            return self._by_name
        async with self._listing:
            if trio.current_time() - self._listed < VALID:
                return self._by_name
            offers = await BlockClient.exports(self._uri, timeout=self._timeout)
            names = {export: export for export in offers if _is_name(export)}
            if "" in offers and "disk" not in names:
                names["disk"] = ""
            found = {}
            for name in sorted(names)[:MAX_FILES]:
                offer = offers[names[name]]
                file = self._by_name.get(name) or self._new(name, names[name])
                file.export = names[name]
                if file.size != offer.size:
                    file.size, file.changed_ns = offer.size, time.time_ns()
                file.read_only = offer.read_only
                found[name] = file
            gone = [file for name, file in self._by_name.items() if name not in found]
            self._by_name, self._listed = found, trio.current_time()
            for file in gone:
                self._drop(file)
            return found

    def _new(self, name: str, export: str) -> File:
        """A file with the id that its name had in every generation of this driver."""
        number = 1 << 32 | zlib.crc32(name.encode())
        while number in self._by_id:
            number += 1
        file = self._by_id[number] = File(number, export)
        return file

    def _drop(self, file: File) -> None:
        """Forget a file that neither the server nor the kernel knows any more."""
        if not file.lookups and not file.opens and file not in self._by_name.values():
            self._by_id.pop(file.id, None)

    async def _file(self, inode: int) -> File:
        """The file with this id, which may have been given out by the process before this one."""
        file = self._by_id.get(inode)
        if file is None:
            await self._look()
            file = self._by_id.get(inode)
            if file is None:
                raise FUSEError(errno.ESTALE)
        return file

    # -- names and attributes

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        try:
            file = (await self._look()).get(name.decode(errors="replace"))
        except (OSError, DeviceGone) as exc:
            raise _refusal(exc) from None
        if file is None:
            raise FUSEError(errno.ENOENT)
        file.lookups += 1
        return self._attributes(file)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for inode, lookups in inode_list:
            file = self._by_id.get(inode)
            if file is not None:
                file.lookups = max(0, file.lookups - lookups)
                self._drop(file)

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        if inode == pyfuse3.ROOT_INODE:
            return self._root()
        try:
            file = await self._file(inode)
            await self._look()
        except (OSError, DeviceGone) as exc:
            raise _refusal(exc) from None
        return self._attributes(file)

    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise FUSEError(errno.EPERM)
        if inode == pyfuse3.ROOT_INODE:
            return self._root()
        try:
            file = await self._file(inode)
        except (OSError, DeviceGone) as exc:
            raise _refusal(exc) from None
        # Without a handle a size of 0 is what O_TRUNC asks for; programs open disks with it and mean no harm.
        if fields.update_size and attr.st_size != file.size and (fh is not None or attr.st_size):
            raise FUSEError(errno.EINVAL)
        return self._attributes(file)

    def _root(self) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = pyfuse3.ROOT_INODE
        entry.st_mode = stat.S_IFDIR | 0o755
        entry.st_nlink = 2
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._started_ns
        entry.entry_timeout = entry.attr_timeout = VALID
        return entry

    def _attributes(self, file: File) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = file.id
        entry.st_mode = stat.S_IFREG | (0o400 if file.read_only else 0o600)
        entry.st_nlink = 1
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.st_size = file.size
        entry.st_blocks = file.size // 512
        entry.st_blksize = _BLKSIZE
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = file.changed_ns
        entry.entry_timeout = entry.attr_timeout = VALID
        return entry

    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        try:
            files = await self._look()
        except (OSError, DeviceGone) as exc:
            raise _refusal(exc) from None
        # By ids, because what comes or goes between two calls must not move the others.
        for name, file in sorted(files.items(), key=lambda item: item[1].id):
            if file.id <= start_id:
                continue
            if not pyfuse3.readdir_reply(token, name.encode(), self._attributes(file), file.id):
                return
            file.lookups += 1

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        found = StatvfsData()
        found.f_bsize = found.f_frsize = 512
        found.f_blocks = max((file.size for file in self._by_name.values()), default=0) // 512
        found.f_files = len(self._by_name)
        found.f_namemax = 255
        return found

    # -- open files

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        access = flags & os.O_ACCMODE
        try:
            file = await self._file(inode)
            if file.read_only and access != os.O_RDONLY:
                raise FUSEError(errno.EROFS)
            handle = Handle(file)
            if access == os.O_WRONLY:
                await self._writer(handle)
            else:
                handle.reader = await self._reader(file)
        except (OSError, DeviceGone) as exc:
            raise _refusal(exc) from None
        file.opens += 1
        number = next(self._numbers)
        self._handles[number] = handle
        # Somebody else may have written since, by another name or over NBD.
        return FileInfo(fh=number, keep_cache=False)

    async def _connect(self, file: File, *, claim: bool) -> BlockClient:
        client = await BlockClient.open(self._uri, file.export, claim=claim, timeout=self._timeout)
        file.size = client.size
        return client

    async def _reader(self, file: File) -> BlockClient:
        """The file's connection for reading, a new one if the last one has ended."""
        if file.reader is not None and not file.reader.ended:
            return file.reader
        async with file.opening:
            if file.reader is None or file.reader.ended:
                file.reader = await self._connect(file, claim=False)
            return file.reader

    async def _writer(self, handle: Handle) -> BlockClient:
        """The handle's own connection, which holds the claim; PermissionError if somebody else does."""
        if handle.writer is not None and not handle.writer.ended:
            return handle.writer
        async with handle.opening:
            if handle.writer is None or handle.writer.ended:
                try:
                    handle.writer = await self._connect(handle.file, claim=True)
                except PermissionError as exc:
                    # EACCES would be the socket's.
                    raise OSError(errno.EBUSY if exc.errno == errno.EPERM else exc.errno, exc.strerror) from None
            return handle.writer

    async def read(self, fh: int, off: int, size: int) -> bytes:  # or a bytearray, which pyfuse3 takes as well
        handle = self._handles[fh]
        try:
            client = handle.writer if handle.writer is not None else handle.reader
            if client is None or client.ended:
                client = handle.reader = await self._reader(handle.file)
            try:
                data = await self._read(client, off, size)
            except DeviceGone:
                await self._lost(handle.file, client)
                if handle.has_read or client is not handle.reader:
                    raise
                # The connection was lost to others before this open: what is in the device now is what it is for.
                handle.reader = await self._reader(handle.file)
                data = await self._read(handle.reader, off, size)
            handle.has_read = True
            return data
        except (OSError, DeviceGone) as exc:
            raise _refusal(exc) from None

    async def _read(self, client: BlockClient, off: int, size: int) -> bytes:
        size = min(size, client.size - off)
        return await client.read(off, size) if size > 0 else b""  # type: ignore[return-value]

    async def _lost(self, file: File, client: BlockClient) -> None:
        """What a connection was for is gone, perhaps for another medium: that is for new opens only."""
        if file.reader is client:
            file.reader = None
            file.lost.append(client)  # it is told apart from one that has ended as long as somebody reads by it

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        handle = self._handles[fh]
        handle.writing += 1
        try:
            client = await self._writer(handle)
            size = min(len(buf), client.size - off)
            if size <= 0:
                raise FUSEError(errno.ENOSPC)
            handle.dirty = True
            await client.write(off, buf if size == len(buf) else buf[:size])
            handle.file.changed_ns = time.time_ns()
            return size
        except (OSError, DeviceGone) as exc:
            raise _refusal(exc) from None
        finally:
            handle.writing -= 1

    async def fsync(self, fh: int, datasync: bool) -> None:
        file = self._handles[fh].file
        for handle in list(self._handles.values()):
            if handle.file is file:
                await self._flush(handle)

    async def flush(self, fh: int) -> None:
        """A close: of the last descriptor, as far as anybody can know. RELEASE comes too late, after close(2)."""
        handle = self._handles[fh]
        await self._flush(handle)
        if handle.writer is not None and not handle.writing:
            writer, handle.writer = handle.writer, None
            await writer.aclose(GOODBYE)

    async def _flush(self, handle: Handle) -> None:
        if not handle.dirty or handle.writer is None:
            return
        handle.dirty = False
        try:
            await handle.writer.flush()
        except (OSError, DeviceGone) as exc:
            handle.dirty = True
            raise _refusal(exc) from None

    async def release(self, fh: int) -> None:
        handle = self._handles.pop(fh)
        file = handle.file
        if handle.writer is not None:
            await handle.writer.aclose()
        file.opens -= 1
        if not file.opens:
            ended, file.lost = file.lost, []
            if file.reader is not None:
                ended.append(file.reader)
                file.reader = None
            for reader in ended:
                await reader.aclose()
        self._drop(file)


def _refusal(exc: OSError | DeviceGone) -> FUSEError:
    if isinstance(exc, DeviceGone):
        return FUSEError(errno.ENODEV)
    # The socket is gone with the device, or nobody listens on it any more.
    if isinstance(exc, FileNotFoundError | ConnectionError):
        return FUSEError(errno.ENODEV)
    return FUSEError(exc.errno or errno.EIO)


def _is_name(export: str) -> bool:
    return (
        0 < len(export.encode()) <= 255 and export not in (".", "..") and export.isprintable() and "/" not in export
    )  # fmt: skip
