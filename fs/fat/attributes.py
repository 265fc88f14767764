"""The volume as a mount: its options, its beginning and its end, and the attributes of what is on it.

Owns: how the volume is opened, what FAT's attributes mean to Linux, by the rules of Linux' vfat, and the one place
where an error becomes a reply. Must never: change a name or contents itself. Part of: operations.py.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from urllib.parse import quote

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FUSEError, RequestContext, SetattrFields, StatvfsData

from udf import BlockClient, DeviceGone, Store, UserError, Window

from .ahead import Buffers
from .contents import Contents
from .damage import Damaged
from .entries import DIRECTORY, END, FREE, READ_ONLY, SLOT
from .nodes import Node, Nodes
from .stream import ChainStream, RootStream
from .volume import Volume

_YEAR = 365 * 86400  # nothing but this mount changes the volume
_BLKSIZE = 128 * 1024  # what programs take as their buffer: one message for each
_NAME_MAX = 255
_PIECE = 64 * 1024  # of a directory that is read at once
_COUNTING = 1.0  # seconds that statfs waits until it is counted what is free


class Attributes(pyfuse3.Operations):
    """A volume, from its opening on, and what its files and directories are like."""

    enable_acl = False
    window: Window | None = None  # what is read ahead goes there
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
            client = await BlockClient.open(source, claim=not self.read_only, watch=True, window=self.window)
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
        volume.buffers = Buffers(self.window)
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

    # ---- errors

    def _refusal(self, exc: OSError) -> FUSEError:
        if isinstance(exc, Damaged):
            self.volume.harm(str(exc.strerror))
        return FUSEError(exc.errno or errno.EIO)


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
