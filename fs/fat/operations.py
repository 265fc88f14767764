"""A FAT volume as the kernel sees it: names, attributes and handles.

Owns: every FUSE request, with the semantics of Linux' vfat where FAT has none of its own; lookup counts and handles.
Must never: write anything itself: names are changed through directory.py within a change, contents by contents.py.
Called by: pyfuse3, in a driver host; tests, through lab.py.

A name that is not spelled as the directory has it (in another case, its short form) is answered with no time to live,
as is one that does not exist: the kernel would go on to believe in it after the file, or its absence, is gone.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import TypeVar
from urllib.parse import quote

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, SetattrFields, StatvfsData

from udf import BlockClient, DeviceGone, Store, UserError

from . import entries, names
from .change import Change
from .contents import Contents
from .damage import Damaged
from .directory import Directory
from .entries import ARCHIVE, DIRECTORY, END, FREE, READ_ONLY, SLOT, Entry
from .nodes import Node, Nodes
from .renames import Rename
from .stream import ChainStream, RootStream
from .volume import Volume

T = TypeVar("T")

_YEAR = 365 * 86400  # nothing but this mount changes the volume
_ONCE = 1e-6  # the shim takes this for "do not keep it", even on a mount that nobody else changes
_BLKSIZE = 128 * 1024  # what programs take as their buffer: one message for each
_NAME_MAX = 255
_NOREPLACE, _EXCHANGE = 1, 2
_DOT, _DOTDOT = 1, 2  # positions in a listing; those of entries are their slots, from _FIRST on
_FIRST = 3
_BATCH = 64  # entries whose attributes are gathered at once
_PIECE = 64 * 1024  # of a directory that is read at once
_COUNTING = 1.0  # seconds that statfs waits until it is counted what is free

_NO_ENTRY = EntryAttributes()
_NO_ENTRY.st_ino = 0
_NO_ENTRY.entry_timeout = _ONCE


class Handle:
    """An open file or directory."""

    __slots__ = ("listing", "node", "version")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.version = 0  # of the directory when it was listed
        self.listing: list[Entry] | None = None


class Fat(pyfuse3.Operations):
    """The FAT volume on a block service."""

    enable_acl = False
    enable_writeback_cache = False
    supports_dot_lookup = False
    read_only = False  # the host says so: nothing will be changed through this mount

    def __init__(
        self,
        source: str,
        *,
        ro: bool = False,
        uid: int = -1,
        gid: int = -1,
        umask: str = "022",
        dmask: str = "",
        fmask: str = "",
        utc: bool = False,
        codepage: int = 437,
        quiet: bool = False,
        store: Store | None = None,
    ) -> None:
        """Open the volume now, unless trio runs already: then `start` does."""
        super().__init__()
        self._source = source if "://" in source else f"nbd+unix:///?socket={quote(source)}"
        if ro:
            self.read_only = True
        self._uid = os.getuid() if uid < 0 else uid
        self._gid = os.getgid() if gid < 0 else gid
        mask = _octal("umask", umask)
        self._dmask = _octal("dmask", dmask) if dmask else mask
        self._fmask = _octal("fmask", fmask) if fmask else mask
        self._utc = utc
        self._codepage = _page(codepage)
        self._quiet = quiet
        self._store = store
        self._handles: dict[int, Handle] = {}
        self._numbers = count(1)
        self._started = False
        self._starting: trio.Event | None = None
        self.volume: Volume
        self._nodes: Nodes
        if not trio.lowlevel.in_trio_run():
            trio.run(self._open)  # a volume that is none is refused before anything is mounted

    # ---- the beginning and the end

    async def _open(self) -> None:
        source = self._source
        try:
            client = await BlockClient.open(source, claim=not self.read_only)
        except PermissionError as exc:
            if exc.errno == errno.EPERM:
                raise UserError(
                    f"{source}: somebody else writes to it: mount it with -o ro, or end the other use"
                ) from exc
            raise
        except DeviceGone as exc:
            raise UserError(f"{source}: {exc}") from exc
        try:
            volume = await Volume.open(
                client, self._store, read_only=self.read_only, utc=self._utc, codepage=self._codepage
            )
        except BaseException:
            await client.aclose()
            raise
        self._begin(volume)

    def _begin(self, volume: Volume) -> None:
        self.volume = volume
        self._nodes = Nodes(volume)
        self._contents = Contents(volume, self._nodes)

    async def start(self) -> None:
        """Begin to serve, in trio's loop. The first request does it where nobody else does."""
        if self._starting is not None:
            await self._starting.wait()
            return
        self._starting = trio.Event()
        if not hasattr(self, "volume"):
            await self._open()
        await self.volume.start()
        self._started = True
        self._starting.set()

    async def stop(self) -> None:
        """Bring the volume into order and let go of it."""
        if hasattr(self, "volume"):
            await self.volume.aclose()

    async def drop(self) -> None:
        """Let go of the volume as it is, as if this process were killed."""
        await self.volume.drop()

    async def sync(self) -> None:
        """Everything done so far is durable, and the volume in order."""
        await self.volume.sync()

    async def _node(self, inode: int) -> Node:
        if not self._started:
            await self.start()
        return self._nodes.get(inode)

    async def _folder(self, inode: int) -> Node:
        if not self._started:
            await self.start()
        return self._nodes.directory_node(inode)

    # ---- attributes

    def _mode(self, node: Node) -> int:
        if node.is_directory:
            return stat.S_IFDIR | 0o777 & ~self._dmask
        mode = 0o777 & ~self._fmask
        return stat.S_IFREG | (mode & ~0o222 if node.file_entry.attributes & READ_ONLY else mode)

    async def _attributes(self, node: Node) -> EntryAttributes:
        volume = self.volume
        found = EntryAttributes()
        found.st_ino = node.ino
        found.attr_timeout = found.entry_timeout = _YEAR
        found.st_mode = self._mode(node)
        found.st_uid = self._uid
        found.st_gid = self._gid
        found.st_blksize = _BLKSIZE
        found.st_nlink = 1
        entry = node.entry
        if node.is_directory:
            size, found.st_nlink = await self._measure(node)
        else:
            assert entry is not None
            size = entry.size
        if node.removed:
            found.st_nlink = 0
        found.st_size = size
        found.st_blocks = volume.clusters(size) * volume.cluster // 512
        if entry is not None:
            found.st_atime_ns = entry.accessed_ns
            found.st_mtime_ns = found.st_ctime_ns = entry.modified_ns
        return found

    async def _measure(self, node: Node) -> tuple[int, int]:
        """A directory's size and links. One that is damaged still has attributes, or it could not even be listed."""
        if node.removed:
            return 0, 0
        try:
            async with self._nodes.reading(node):
                stream = node.stream
                assert stream is not None
                if node.subdirectories < 0:
                    node.subdirectories = await _count_directories(stream)
                return stream.size, 2 + node.subdirectories
        except Damaged:
            return 0, 2

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        try:
            return await self._attributes(await self._node(inode))
        except OSError as exc:
            raise self._refusal(exc) from None

    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        try:
            node = await self._node(inode)
            changes = self._checked(node, attr, fields)
            with self._nodes.held(node):
                if fields.update_size:
                    if node.is_directory:
                        raise IsADirectoryError(errno.EISDIR, "a directory has no length to set")
                    self.volume.check()
                    await self._contents.truncate(node, attr.st_size, changes)
                elif changes and node.entry is not None:
                    async with self.volume.change() as change:
                        entry = await self._contents.update(change, node, changes)
                    node.entry = entry
                return await self._attributes(node)
        except OSError as exc:
            raise self._refusal(exc) from None

    def _checked(self, node: Node, attr: EntryAttributes, fields: SetattrFields) -> dict[str, int]:
        """What is to be changed in the entry, by the rules of Linux' vfat."""
        changes: dict[str, int] = {}
        wrong = (
            (fields.update_uid and attr.st_uid != self._uid)
            or (fields.update_gid and attr.st_gid != self._gid)
            or (fields.update_mode and attr.st_mode & 0o7000)
        )
        if wrong and not self._quiet:
            raise PermissionError(errno.EPERM, "FAT knows no owners, and no more modes than read-only")
        if fields.update_mode and not wrong and not node.is_directory:
            # A mode that the volume cannot have is passed over in silence, as Linux does: cp and tar live by it.
            mask, mode = self._fmask, attr.st_mode & 0o777 & ~self._fmask
            writes = 0o222 & ~mask
            if mode & 0o555 == 0o555 & ~mask and mode & 0o222 in (0, writes) and writes:
                attributes = node.file_entry.attributes
                attributes = attributes & ~READ_ONLY if mode & 0o222 else attributes | READ_ONLY
                if attributes != node.file_entry.attributes:
                    changes["attributes"] = attributes
        if fields.update_atime:
            changes["accessed_ns"] = attr.st_atime_ns
        if fields.update_mtime:
            changes["modified_ns"] = attr.st_mtime_ns
        return changes

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        try:
            await self._node(pyfuse3.ROOT_INODE)
            free = await self.volume.count_free(_COUNTING) + self._contents.reserve.surplus()
        except OSError as exc:
            raise self._refusal(exc) from None
        found = StatvfsData()
        found.f_bsize = found.f_frsize = self.volume.cluster
        found.f_blocks = self.volume.geometry.clusters
        found.f_bfree = found.f_bavail = free
        found.f_namemax = _NAME_MAX
        return found

    # ---- names

    async def _find(self, directory: Directory, name: bytes) -> Entry | None:
        try:
            return await directory.find(names.from_kernel(name))
        except OSError as exc:
            if exc.errno == errno.EINVAL:
                return None  # what is no name cannot be there
            raise

    async def _entered(self, node: Node, name: bytes) -> EntryAttributes:
        """The answer that makes the kernel know a node under this name."""
        with self._nodes.held(node):
            found = await self._attributes(node)
            if node.entry is not None and names.to_kernel(node.entry.name) != name:
                found.entry_timeout = _ONCE
            node.lookups += 1
        return found

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        try:
            parent = await self._folder(parent_inode)
            if name == b".":
                return await self._entered(parent, name)
            if name == b"..":
                return await self._entered(parent.parent or parent, name)
            async with self._nodes.reading(parent) as directory:
                entry = await self._find(directory, name)
                if entry is None:
                    return _NO_ENTRY
                node = self._nodes.of(parent, entry)
                node.opens += 1  # until it has its lookup
            try:
                return await self._entered(node, name)
            finally:
                node.opens -= 1
                self._nodes.release(node)
        except OSError as exc:
            raise self._refusal(exc) from None

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        if not self._started:
            return
        for inode, lookups in inode_list:
            node = self._nodes.by_ino.get(inode)
            if node is not None:
                node.lookups = max(0, node.lookups - lookups)
                self._nodes.release(node)

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        try:
            exclusive = bool(flags & os.O_EXCL)
            node, is_new = await self._with_room(lambda: self._make_file(parent_inode, name, mode, exclusive=exclusive))
            try:
                if not is_new and flags & os.O_TRUNC:
                    await self._contents.truncate(node, 0, {})
                found = await self._entered(node, name)
                return FileInfo(fh=self._handle(node), keep_cache=True), found
            finally:
                node.opens -= 1
                self._nodes.release(node)
        except OSError as exc:
            raise self._refusal(exc) from None

    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        try:
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise PermissionError(errno.EPERM, "FAT has files and directories only")
            node, _ = await self._with_room(lambda: self._make_file(parent_inode, name, mode, exclusive=True))
            try:
                return await self._entered(node, name)
            finally:
                node.opens -= 1
                self._nodes.release(node)
        except OSError as exc:
            raise self._refusal(exc) from None

    async def _make_file(self, parent_inode: int, name: bytes, mode: int, *, exclusive: bool) -> tuple[Node, bool]:
        """A new file, or the one that is there; it is held once."""
        parent = await self._folder(parent_inode)
        text = names.from_kernel(name)
        async with self.volume.change() as change, self._nodes.changing(parent, change) as directory:
            entry = await directory.find(text)
            is_new = entry is None
            if entry is None:
                writable = mode & 0o222 or not 0o222 & ~self._fmask
                entry = await self._insert(
                    change, parent, directory, text, ARCHIVE if writable else ARCHIVE | READ_ONLY
                )
            elif exclusive or entry.is_directory:
                raise FileExistsError(errno.EEXIST, "the name exists")
        node = self._nodes.of(parent, entry)
        node.opens += 1
        return node, is_new

    async def _insert(
        self, change: Change, parent: Node, directory: Directory, name: str, attributes: int, cluster: int = 0
    ) -> Entry:
        now = time.time_ns()
        entry = await directory.insert(
            name, attributes=attributes, cluster=cluster, created_ns=now, modified_ns=now, accessed_ns=now
        )
        await self._contents.touch(change, parent, now)
        return entry

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        try:
            parent = await self._folder(parent_inode)
            node = await self._with_room(lambda: self._make_directory(parent, names.from_kernel(name)))
            try:
                return await self._entered(node, name)
            finally:
                node.opens -= 1
                self._nodes.release(node)
        except OSError as exc:
            raise self._refusal(exc) from None

    async def _make_directory(self, parent: Node, name: str) -> Node:
        volume = self.volume
        async with volume.change() as change, self._nodes.changing(parent, change) as directory:
            if await directory.find(name) is not None:
                raise FileExistsError(errno.EEXIST, "the name exists")
            names.checked(name)
            runs = await volume.take(1)
            change.take(runs)
            cluster = runs[0][0]
            offset = volume.geometry.cluster_offset(cluster)
            # Nobody can see this cluster yet; when an entry names it, it is a directory.
            content = entries.dots(cluster, parent.cluster, volume.settings, time.time_ns()).ljust(
                volume.cluster, b"\0"
            )
            await volume.device.write(offset, content, watch=True)
            volume.sectors.fill(offset, content)
            await volume.table.link(change, runs, 0)
            entry = await self._insert(change, parent, directory, name, DIRECTORY, cluster)
            parent.subdirectories = -1
        node = self._nodes.of(parent, entry)
        node.opens += 1
        return node

    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        try:
            parent = await self._folder(parent_inode)
            async with self.volume.change() as change, self._nodes.changing(parent, change) as directory:
                entry = await self._required(directory, name)
                if entry.is_directory:
                    raise IsADirectoryError(errno.EISDIR, "a directory")
                await directory.remove(entry)
                node = self._nodes.known(parent, entry)
                await self._contents.give_up(change, entry, node, is_open=node is not None and node.opens > 0)
                await self._contents.touch(change, parent, time.time_ns())
            self._gone(node, parent, entry, name)
        except OSError as exc:
            raise self._refusal(exc) from None

    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        try:
            parent = await self._folder(parent_inode)
            async with self.volume.change() as change, self._nodes.changing(parent, change) as directory:
                entry = await self._required(directory, name)
                if not entry.is_directory:
                    raise NotADirectoryError(errno.ENOTDIR, "not a directory")
                await self._nodes.require_empty(self._nodes.of(parent, entry))
                await directory.remove(entry)
                node = self._nodes.known(parent, entry)
                await self._contents.give_up(change, entry, node, is_open=node is not None and node.opens > 0)
                await self._contents.touch(change, parent, time.time_ns())
                parent.subdirectories = -1
            self._gone(node, parent, entry, name)
        except OSError as exc:
            raise self._refusal(exc) from None

    async def _required(self, directory: Directory, name: bytes) -> Entry:
        entry = await self._find(directory, name)
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, "no such name")
        return entry

    def _gone(self, node: Node | None, parent: Node, entry: Entry, name: bytes) -> None:
        """An entry was removed by this name."""
        own = names.to_kernel(entry.name)
        if own != name:
            self._invalidate(parent, own)
        if node is not None:
            self._nodes.remove(node)
            self._nodes.release(node)

    def _invalidate(self, parent: Node, name: bytes) -> None:
        """The kernel may know something by this name that is not what is there."""
        pyfuse3.invalidate_entry_async(parent.ino, name, 0, True)

    # ---- renaming

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        try:
            if flags & ~(_NOREPLACE | _EXCHANGE) or flags == _NOREPLACE | _EXCHANGE:
                raise OSError(errno.EINVAL, "no such way to rename")
            parents = await self._folder(parent_inode_old), await self._folder(parent_inode_new)
            for parent, name in await self._with_room(lambda: self._rename(parents, name_old, name_new, flags)):
                self._invalidate(parent, name)
        except OSError as exc:
            raise self._refusal(exc) from None

    async def _rename(self, parents: tuple[Node, Node], old: bytes, new: bytes, flags: int) -> list[tuple[Node, bytes]]:
        rename = Rename(self.volume, self._nodes, self._contents, parents)
        await rename.run(names.from_kernel(old), names.from_kernel(new), flags)
        return rename.stale

    async def _with_room(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do it, and once more if it failed for want of a cluster and there is one after all."""
        try:
            return await work()
        except OSError as exc:
            if exc.errno != errno.ENOSPC or not await self.volume.reclaim():
                raise
        return await work()

    # ---- open files

    def _handle(self, node: Node) -> int:
        node.opens += 1
        number = next(self._numbers)
        self._handles[number] = Handle(node)
        return number

    def _open_handle(self, fh: int) -> Handle:
        handle = self._handles.get(fh)
        if handle is None:
            raise OSError(errno.EBADF, "no such handle")
        return handle

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        try:
            await self._node(inode)
            node = self._nodes.file(inode)
            if node.removed and not node.opens:
                raise FileNotFoundError(errno.ENOENT, "the file is removed")
            if flags & os.O_ACCMODE != os.O_RDONLY:
                self.volume.check()
                if flags & os.O_TRUNC:
                    await self._contents.truncate(node, 0, {})
            return FileInfo(fh=self._handle(node), keep_cache=True)
        except OSError as exc:
            raise self._refusal(exc) from None

    async def read(self, fh: int, off: int, size: int) -> bytes:
        try:
            return await self._contents.read(self._open_handle(fh).node, off, size)  # type: ignore[return-value]
        except OSError as exc:
            raise self._refusal(exc) from None

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        try:
            return await self._contents.write(self._open_handle(fh).node, off, buf)
        except OSError as exc:
            raise self._refusal(exc) from None

    async def flush(self, fh: int) -> None:
        try:
            await self._contents.flush(self._open_handle(fh).node)
        except OSError as exc:
            raise self._refusal(exc) from None

    async def fsync(self, fh: int, datasync: bool) -> None:
        try:
            self._open_handle(fh).node.written = False
            await self.volume.flush()
        except OSError as exc:
            raise self._refusal(exc) from None

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self.fsync(fh, datasync)

    async def release(self, fh: int) -> None:
        handle = self._handles.pop(fh, None)
        if handle is not None:
            node = handle.node
            node.opens -= 1
            if not node.opens:
                self._contents.closed(node)
                self._nodes.release(node)

    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        try:
            return self._handle(await self._folder(inode))
        except OSError as exc:
            raise self._refusal(exc) from None

    async def releasedir(self, fh: int) -> None:
        await self.release(fh)

    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        try:
            handle = self._open_handle(fh)
            await self._list(handle, start_id, token)
        except OSError as exc:
            raise self._refusal(exc) from None

    async def _list(self, handle: Handle, start: int, token: ReaddirToken) -> None:
        node = handle.node
        if handle.listing is None or not start:
            async with self._nodes.reading(node) as directory:
                handle.listing = await directory.list()
                handle.version = node.version
        reply = pyfuse3.readdir_reply
        # The kernel counts no lookup for "." and "..".
        if start < _DOT and not reply(token, b".", await self._attributes(node), _DOT):
            return
        if start < _DOTDOT and not reply(token, b"..", await self._attributes(node.parent or node), _DOTDOT):
            return
        listing = handle.listing
        at = bisect_right(listing, start - _FIRST, key=_slot) if start >= _FIRST else 0
        while at < len(listing):
            batch = await self._still_there(handle, listing[at : at + _BATCH])
            for n, (entry, child) in enumerate(batch):
                try:
                    child.opens += 1
                    found = await self._attributes(child)
                    if not reply(token, names.to_kernel(entry.name), found, _slot(entry) + _FIRST):
                        return
                    child.lookups += 1
                finally:
                    child.opens -= 1
                    if not child.lookups and not child.opens:
                        for _, other in batch[n:]:
                            self._nodes.release(other)
            at += _BATCH

    async def _still_there(self, handle: Handle, entries_: list[Entry]) -> list[tuple[Entry, Node]]:
        """The nodes of listed entries; those that are not what they were when they were listed are left out."""
        node = handle.node
        if node.version != handle.version:
            async with self._nodes.reading(node) as directory:
                now = [await directory.at(entry.slot, entry.slots) for entry in entries_]
            entries_ = [new for new, old in zip(now, entries_, strict=True) if new is not None and new.name == old.name]
        return [(entry, self._nodes.of(node, entry)) for entry in entries_]

    # ---- errors

    def _refusal(self, exc: OSError) -> FUSEError:
        if isinstance(exc, Damaged):
            self.volume.harm(str(exc.strerror))
        return FUSEError(exc.errno or errno.EIO)


def _slot(entry: Entry) -> int:
    return entry.slot


async def _count_directories(stream: ChainStream | RootStream) -> int:
    """How many entries are directories, without reading more of each."""
    found = 0
    for offset in range(0, stream.size, _PIECE):
        data = await stream.read(offset, min(_PIECE, stream.size - offset))
        for first, attributes in zip(data[::SLOT], data[11::SLOT], strict=True):
            if first == END:
                return found
            if attributes & 0x18 == DIRECTORY and first not in (FREE, 0x2E):
                found += 1
    return found


def _octal(name: str, text: str) -> int:
    if not re.fullmatch("[0-7]{1,4}", text):
        raise UserError(f"{name} must be octal, such as 022, not {text!r}")
    return int(text, 8) & 0o777


def _page(number: int) -> str:
    name = f"cp{number}"
    try:
        b"".decode(name)
    except LookupError:
        raise UserError(f"there is no code page {number}: 437 is the usual one, 850 that of western Europe") from None
    return name
