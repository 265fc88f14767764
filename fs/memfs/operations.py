"""memfs as the kernel sees it: every FUSE operation, each one a few calls into tree, contents and xattrs.

Owns lookup counts, times and attributes in replies. No handler awaits anything, so each one is atomic: no locks, and
no half-done state for another request to see. Permissions are the kernel's (default_permissions is always on).
A file handle is its inode number: the kernel holds a lookup count while a file is open, so there is nothing
to keep per handle, a file may be opened after it was unlinked, and a handle of a process before is still good. There is
nothing to flush, so FLUSH stays the base class's ENOSYS, which saves a round trip for each close(2).
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Sequence
from typing import cast

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, SetattrFields, StatvfsData

from udf import Store

from . import records, snapshot, xattrs
from .arena import PAGE, Arena
from .change import Change
from .contents import Contents
from .kept import Kept
from .load import load
from .nodes import DOT, DOTDOT, Directory, File, Node, Symlink
from .space import Space
from .tree import NAME_MAX, Tree

_YEAR = 365 * 86400  # nothing but this mount can change anything: what the kernel knows stays true
_DAY = 86400 * 10**9
_BLKSIZE = 65536  # what stdio and others take as their buffer: one round trip instead of sixteen

_NO_ENTRY = EntryAttributes()
_NO_ENTRY.st_ino = 0  # the kernel remembers that the name is not there
_NO_ENTRY.entry_timeout = _YEAR


def _attributes(node: Node) -> EntryAttributes:
    entry = EntryAttributes()
    entry.st_ino = node.ino
    entry.attr_timeout = entry.entry_timeout = _YEAR
    entry.st_mode = node.mode
    entry.st_nlink = node.nlink
    entry.st_uid = node.uid
    entry.st_gid = node.gid
    entry.st_blksize = _BLKSIZE
    entry.st_atime_ns = node.atime
    entry.st_mtime_ns = node.mtime
    entry.st_ctime_ns = node.ctime
    if isinstance(node, File):
        contents = node.contents
        if contents is not None:
            entry.st_size = contents.size
            entry.st_blocks = contents.pages * (PAGE // 512)
    elif isinstance(node, Symlink):
        entry.st_size = len(node.target)
    else:
        entry.st_rdev = node.rdev
    return entry


class Memfs(pyfuse3.Operations):
    """A filesystem in memory, *size* bytes and *inodes* inodes large; both limits are exact."""

    enable_acl = True
    enable_writeback_cache = False
    supports_dot_lookup = True

    def __init__(
        self,
        size: int = 1 << 30,
        inodes: int = 1 << 20,
        mode: str = "755",
        uid: int = -1,
        gid: int = -1,
        store: Store | None = None,
    ) -> None:
        """Go on with what is in the store, or begin; without a store all ends with this process."""
        super().__init__()
        if size < PAGE:
            raise ValueError(f"size must be at least {PAGE} bytes, not {size}")
        if inodes < 1:
            raise ValueError(f"inodes must be at least 1, not {inodes}")
        if not re.fullmatch("[0-7]{1,5}", mode):
            raise ValueError(f"mode must be octal, such as 1777, not {mode!r}")
        self._space = Space(size, inodes)
        kept = Kept(store or Store.temporary(), self._space)
        self._journal = kept.journal
        self._arena = Arena(self._space, kept)
        self._tree = Tree(self._space, kept)
        if not load(self._tree, self._arena):
            self._tree.make_root(
                int(mode, 8) & 0o7777, os.getuid() if uid < 0 else uid, os.getgid() if gid < 0 else gid
            )
        self._journal.compact_with(lambda: snapshot.take(self._tree))
        self._nodes = self._tree.nodes
        self._listings: dict[int, tuple[Directory, int]] = {}  # open directories: where the listing ends
        self._last_listing = 0

    # nodes of requests; one that is not known is from another life of this filesystem

    def _node(self, inode: int) -> Node:
        node = self._nodes.get(inode)
        if node is None:
            raise FUSEError(errno.ESTALE)
        return node

    def _directory(self, inode: int) -> Directory:
        node = self._nodes.get(inode)
        if not isinstance(node, Directory):
            raise FUSEError(errno.ESTALE if node is None else errno.ENOTDIR)
        return node

    def _file(self, inode: int) -> File:
        node = self._nodes.get(inode)
        if not isinstance(node, File):
            raise FUSEError(errno.ESTALE if node is None else errno.EINVAL)
        return node

    # names

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        parent = self._directory(parent_inode)
        entry = parent.entries.get(name)
        if entry is not None:
            node = entry[1]
        elif name == b".":
            node = parent
        elif name == b"..":
            node = parent.parent
        elif len(name) > NAME_MAX:
            raise FUSEError(errno.ENAMETOOLONG)
        else:
            return _NO_ENTRY
        node.lookups += 1
        return _attributes(node)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for inode, count in inode_list:
            self._tree.forget(inode, count)

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        parent = self._directory(parent_inode)
        entry = parent.entries.get(name)
        node: Node
        if entry is None:
            node = self._tree.create(parent, name, stat.S_IFREG | stat.S_IMODE(mode), 0, ctx)
        else:
            node = entry[1]
            if flags & os.O_EXCL or not isinstance(node, File):
                raise FUSEError(errno.EEXIST)
            if flags & os.O_TRUNC:
                self._truncate(node)
        node.lookups += 1
        return FileInfo(fh=node.ino), _attributes(node)

    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        if stat.S_ISDIR(mode) or stat.S_ISLNK(mode):
            raise FUSEError(errno.EINVAL)
        if not stat.S_IFMT(mode):
            mode |= stat.S_IFREG
        node = self._tree.create(self._directory(parent_inode), name, mode, rdev, ctx)
        node.lookups += 1
        return _attributes(node)

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        node = self._tree.mkdir(self._directory(parent_inode), name, mode, ctx)
        node.lookups += 1
        return _attributes(node)

    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        node = self._tree.symlink(self._directory(parent_inode), name, target, ctx)
        node.lookups += 1
        return _attributes(node)

    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        node = self._node(inode)
        self._tree.link(node, self._directory(new_parent_inode), new_name)
        node.lookups += 1
        return _attributes(node)

    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        self._tree.unlink(self._directory(parent_inode), name)

    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        self._tree.rmdir(self._directory(parent_inode), name)

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        self._tree.rename(
            self._directory(parent_inode_old), name_old, self._directory(parent_inode_new), name_new, flags
        )

    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        node = self._node(inode)
        if not isinstance(node, Symlink):
            raise FUSEError(errno.EINVAL)
        self._accessed(node)
        return node.target

    # attributes

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return _attributes(self._node(inode))

    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        node = self._node(inode)
        change = Change(node)
        if fields.update_size:
            self._file(inode)
            change.truncate(attr.st_size)
        if fields.update_uid:
            change.uid = attr.st_uid
        if fields.update_gid:
            change.gid = attr.st_gid
        others = fields.update_size or fields.update_mode or fields.update_atime or fields.update_mtime
        if fields.update_uid or fields.update_gid or not others:
            change.drop_privileges()  # setting nothing at all is what the kernel makes of chown(-1, -1)
        if fields.update_mode:
            change.chmod(attr.st_mode)
        if fields.update_atime:
            change.atime = attr.st_atime_ns
        if fields.update_mtime:
            change.mtime = attr.st_mtime_ns
        # The kernel sets a ctime only when it caches writes, which is not negotiated.
        change.commit(self._arena)
        return _attributes(node)

    def _truncate(self, node: File) -> None:
        change = Change(node)
        change.truncate(0)
        change.commit(self._arena)

    def _accessed(self, node: Node) -> None:
        """Set the access time by the rule of relatime: when it is older than the last change, or than a day."""
        atime = node.atime
        now = time.time_ns()
        if atime <= node.mtime or atime <= node.ctime or now - atime > _DAY:
            change = records.attributes.pack(
                records.ATTRIBUTES, node.mode, node.uid, node.gid, node.ino, now, node.mtime, node.ctime
            )
            try:
                self._journal.append(change)
            except FUSEError:
                return  # what is full can still be read
            node.atime = now

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        space = self._space
        result = StatvfsData()
        result.f_bsize = result.f_frsize = PAGE
        result.f_blocks = space.size // PAGE
        result.f_bfree = result.f_bavail = space.left // PAGE
        result.f_files = space.inodes
        result.f_ffree = result.f_favail = space.inodes_left
        result.f_namemax = NAME_MAX
        return result

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        xattrs.put(self._journal, self._space, self._node(inode), name, value)

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        return xattrs.get(self._node(inode), name)

    async def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        return xattrs.names(self._node(inode), ctx.uid == 0)

    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        xattrs.remove(self._journal, self._space, self._node(inode), name)

    # open files

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        node = self._file(inode)
        if flags & os.O_TRUNC:
            self._truncate(node)
        return FileInfo(fh=inode)

    async def release(self, fh: int) -> None:
        pass

    async def fsync(self, fh: int, datasync: bool) -> None:
        pass

    async def read(self, fh: int, off: int, size: int) -> bytes:
        node = self._nodes.get(fh)
        if node.__class__ is not File:
            node = self._file(fh)
        self._accessed(node)
        contents = node.contents
        if contents is None:
            return b""
        # pyfuse3 copies the reply before anything else runs, so a view of the arena is as good as bytes.
        return cast(bytes, contents.read(off, size))

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        node = self._nodes.get(fh)
        if node.__class__ is not File:
            node = self._file(fh)
        contents = node.contents
        if contents is None:
            contents = self._begin(node)
        written = contents.write(off, buf)
        if node.xattrs is not None:
            xattrs.drop_capability(self._journal, self._space, node)
        node.mtime = node.ctime = now = time.time_ns()
        contents.stamp(now)
        return written

    def _begin(self, node: File) -> Contents:
        """Give contents to a file that has none yet."""
        contents = Contents(self._arena)
        try:
            self._journal.append(records.hold.pack(records.HOLD, node.ino, contents.slot))
        except FUSEError:
            contents.drop()
            raise
        node.contents = contents
        return contents

    # open directories

    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        directory = self._directory(inode)
        self._last_listing += 1
        self._listings[self._last_listing] = (directory, directory.next_offset)
        return self._last_listing

    async def releasedir(self, fh: int) -> None:
        self._listings.pop(fh, None)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        pass

    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        listing = self._listings.get(fh)
        if listing is None:
            raise FUSEError(errno.EBADF)
        directory, end = listing
        if not start_id:
            # Names added from here on are not listed: a program that renames what it lists would never end.
            end = directory.next_offset
            self._listings[fh] = (directory, end)
        self._accessed(directory)
        reply = pyfuse3.readdir_reply
        # The kernel counts no lookup for "." and "..".
        if start_id < DOT and not reply(token, b".", _attributes(directory), DOT):
            return
        if start_id < DOTDOT and not reply(token, b"..", _attributes(directory.parent), DOTDOT):
            return
        for offset, name, node in directory.after(max(start_id, DOTDOT)):
            if offset >= end or not reply(token, name, _attributes(node), offset):
                return
            node.lookups += 1
