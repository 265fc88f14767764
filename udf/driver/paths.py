"""An FsDriver as pyfuse3.Operations: inodes and handles on FUSE's side, paths on the author's.

Owns: the translation of each FUSE operation into verbs. Must never: catch what an author raises (the host's guard maps
it), or answer something that an author got wrong (convert.py refuses it). Called by: udf/host/serve.py.
The rules it rests on are elsewhere and know nothing of pyfuse3: tree.py (ids and paths), gate.py (who may work where).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

import pyfuse3

from udf.driver.absent import MissingVerbs
from udf.driver.convert import MAX_NAME, Converter
from udf.driver.fs import Attr, FsDriver, verbs_of
from udf.driver.gate import Gate
from udf.driver.handles import Handles, Listing
from udf.driver.hiding import Hiding
from udf.driver.tree import Node, Tree

_WRITING = os.O_WRONLY | os.O_RDWR
_RENAMES = ("rename",)  # the name that all renames share, so that only one is at work


class PathOperations(pyfuse3.Operations):
    """Serves one FsDriver."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, driver: FsDriver) -> None:
        super().__init__()
        self._driver = driver
        self._verbs = verbs_of(driver)
        self._missing = MissingVerbs(self._verbs)
        self._convert = Converter(type(driver).__name__, float(driver.valid))
        self._tree = Tree()
        self._gate = Gate(self._tree)
        self._handles = Handles()
        self._hiding = Hiding(driver, self._tree, self._verbs)
        self._changes = 0  # counts mutations: attributes noted before one are not believed after it

    # ---- names

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        parent, text = self._node(parent_inode), _decode(name)
        async with self._gate.names((parent.id, text)):
            directory = await self._gate.enter(parent)
            try:
                if self._hiding.is_hidden(parent, text):
                    return self._convert.absent()
                try:
                    attr = await self._stat(_join(directory, text))
                except FileNotFoundError:
                    self._tree.unbind(parent, text)
                    return self._convert.absent()
                return self._found(parent, text, attr)
            finally:
                self._gate.leave(parent)

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        for node_id, count in inode_list:
            self._tree.forget(node_id, count)

    async def create(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        entry = await self._make(parent_inode, name, "create", ctx, stat.S_IMODE(mode))
        node = self._node(entry.st_ino)
        node.opens += 1
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(self._handles.add(node))), entry

    async def mknod(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        rdev: int,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        if not stat.S_ISREG(mode):
            raise OSError(errno.EROFS if self._missing.read_only else errno.EPERM, "only files")
        return await self._make(parent_inode, name, "create", ctx, stat.S_IMODE(mode))

    async def mkdir(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        return await self._make(parent_inode, name, "mkdir", ctx, stat.S_IMODE(mode))

    async def symlink(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        target: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        return await self._make(parent_inode, name, "symlink", ctx, os.fsdecode(target))

    async def link(
        self,
        inode: pyfuse3.InodeT,
        new_parent_inode: pyfuse3.InodeT,
        new_name: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        self._missing.check("link")
        node, parent, text = self._node(inode), self._node(new_parent_inode), _decode(new_name)
        async with self._gate.names((parent.id, text)):
            directory = await self._gate.enter(parent)
            try:
                old = await self._gate.enter(node)
                try:
                    self._hiding.refuse_name(parent, text)
                    path = _join(directory, text)
                    self._changes += 1
                    await self._driver.link(old, path)
                    attr = await self._stat(path)
                    if node.hidden is None and parent.children.get(text) is not node:
                        self._tree.unbind(parent, text)
                        self._tree.attach(node, parent, text)
                    return self._found(parent, text, attr)
                finally:
                    self._gate.leave(node)
            finally:
                self._gate.leave(parent)

    async def unlink(self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext) -> None:
        await self._remove(parent_inode, name, directory=False)

    async def rmdir(self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext) -> None:
        await self._remove(parent_inode, name, directory=True)

    async def rename(
        self,
        parent_inode_old: pyfuse3.InodeT,
        name_old: pyfuse3.FileNameT,
        parent_inode_new: pyfuse3.InodeT,
        name_new: pyfuse3.FileNameT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        self._missing.check("rename")
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise OSError(errno.EINVAL, "names cannot be exchanged")
        parent, name = self._node(parent_inode_old), _decode(name_old)
        new_parent, new_name = self._node(parent_inode_new), _decode(name_new)
        names = (parent.id, name), (new_parent.id, new_name)
        async with self._gate.names(_RENAMES, *names):
            old_directory = await self._gate.enter(parent)
            try:
                new_directory = await self._gate.enter(new_parent)
                try:
                    self._hiding.refuse_name(parent, name)
                    self._hiding.refuse_name(new_parent, new_name)
                    moved = parent.children.get(name)
                    target = new_parent.children.get(new_name)
                    if moved is not None and moved is target:
                        return
                    if moved is not None and moved in self._tree.above(new_parent):
                        raise OSError(errno.EINVAL, "a directory cannot be moved into itself")
                    old, new = _join(old_directory, name), _join(new_directory, new_name)
                    noreplace = bool(flags & pyfuse3.RENAME_NOREPLACE)
                    async with self._gate.frozen(moved, target):
                        await self._check_target(old, new, noreplace)
                        self._changes += 1
                        await self._hiding.replace(old, new, target)
                        self._tree.move(parent, name, new_parent, new_name)
                finally:
                    self._gate.leave(new_parent)
            finally:
                self._gate.leave(parent)

    async def _check_target(self, old: str, new: str, noreplace: bool) -> None:
        # The author's rename replaces; that what it replaces may be replaced is decided here.
        try:
            there = await self._stat(new)
        except FileNotFoundError:
            return
        if noreplace:
            raise FileExistsError(new)
        moved_is_dir = (await self._stat(old)).kind == "dir"
        if there.kind == "dir":
            if not moved_is_dir:
                raise IsADirectoryError(new)
            await self._check_empty(new)
        elif moved_is_dir:
            raise NotADirectoryError(new)

    async def _make(
        self,
        parent_id: int,
        name: bytes,
        verb: str,
        ctx: pyfuse3.RequestContext,
        argument: int | str,
    ) -> pyfuse3.EntryAttributes:
        self._missing.check(verb)
        parent, text = self._node(parent_id), _decode(name)
        async with self._gate.names((parent.id, text)):
            directory = await self._gate.enter(parent)
            try:
                self._hiding.refuse_name(parent, text)
                path = _join(directory, text)
                self._changes += 1
                if verb == "symlink":
                    await self._driver.symlink(path, str(argument))
                elif verb == "mkdir":
                    await self._driver.mkdir(path, int(argument))
                else:
                    await self._driver.create(path, int(argument))
                attr = await self._owned(path, await self._stat(path), ctx)
                self._tree.unbind(parent, text)  # what had this name before was not this file
                return self._found(parent, text, attr)
            finally:
                self._gate.leave(parent)

    async def _owned(self, path: str, attr: Attr, ctx: pyfuse3.RequestContext) -> Attr:
        # What a program makes is its user's, where the driver knows owners and may give files away.
        if "setattr" not in self._verbs or attr.uid is None or (attr.uid, attr.gid) == (ctx.uid, ctx.gid):
            return attr
        try:
            await self._driver.setattr(path, uid=ctx.uid, gid=ctx.gid)
        except (OSError, NotImplementedError):
            return attr
        return await self._stat(path)

    async def _remove(self, parent_id: int, name: bytes, *, directory: bool) -> None:
        self._missing.check("remove")
        parent, text = self._node(parent_id), _decode(name)
        async with self._gate.names((parent.id, text)):
            above = await self._gate.enter(parent)
            try:
                if self._hiding.is_hidden(parent, text):
                    raise FileNotFoundError(text)
                path = _join(above, text)
                child = parent.children.get(text)
                async with self._gate.frozen(child):
                    is_dir = (await self._stat(path)).kind == "dir"
                    if is_dir != directory:
                        raise IsADirectoryError(path) if is_dir else NotADirectoryError(path)
                    if is_dir:
                        await self._check_empty(path)
                    self._changes += 1
                    await self._hiding.remove(path, child)
                    self._tree.unbind(parent, text)
            finally:
                self._gate.leave(parent)

    async def _check_empty(self, path: str) -> None:
        # A few names are enough to know; the listing itself is checked when someone lists it.
        if any(not self._hiding.is_hidden_path(_join(path, name)) for name in list(await self._driver.list(path))[:9]):
            raise OSError(errno.ENOTEMPTY, path)

    # ---- attributes

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        node = self._node(inode)
        path = self._gate.try_enter(node) or await self._gate.enter(node)
        try:
            return self._entry(node, self._convert.attr("stat", await self._driver.stat(path)))
        finally:
            self._gate.leave(node)

    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        node = self._node(inode)
        path = await self._gate.enter(node)
        try:
            self._changes += 1
            if fields.update_size:
                self._missing.check("truncate")
                await self._driver.truncate(path, attr.st_size)
            wanted: dict[str, int] = {}
            if fields.update_mode:
                wanted["mode"] = stat.S_IMODE(attr.st_mode)
            if fields.update_uid:
                wanted["uid"] = attr.st_uid
            if fields.update_gid:
                wanted["gid"] = attr.st_gid
            if fields.update_atime:
                wanted["atime_ns"] = attr.st_atime_ns
            if fields.update_mtime:
                wanted["mtime_ns"] = attr.st_mtime_ns
            now = self._entry(node, await self._stat(path))
            if "setattr" in self._verbs:
                if wanted:
                    await self._driver.setattr(path, **wanted)
                    return self._entry(node, await self._stat(path))
            else:
                # truncate(2) brings times along; and what is so already needs no verb.
                is_changed = any(getattr(now, f"st_{key}") & 0o7777 != value & 0o7777 for key, value in wanted.items())
                if is_changed and not fields.update_size:
                    self._missing.check("setattr")
            return now
        finally:
            self._gate.leave(node)

    async def readlink(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileNameT:
        self._missing.check("readlink")
        node = self._node(inode)
        path = await self._gate.enter(node)
        try:
            return pyfuse3.FileNameT(self._convert.target(await self._driver.readlink(path)))
        finally:
            self._gate.leave(node)

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        if "statfs" in self._verbs:
            return self._convert.space(await self._driver.statfs())
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_namemax = MAX_NAME
        return data

    async def getxattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> bytes:
        self._missing.check("getxattr")
        node = self._node(inode)
        path = await self._gate.enter(node)
        try:
            return self._convert.value(await self._driver.getxattr(path, os.fsdecode(name)))
        except KeyError:
            raise OSError(errno.ENODATA, name) from None
        finally:
            self._gate.leave(node)

    async def setxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        self._missing.check("setxattr")
        node = self._node(inode)
        path = await self._gate.enter(node)
        try:
            await self._driver.setxattr(path, os.fsdecode(name), value)
        finally:
            self._gate.leave(node)

    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> Sequence[pyfuse3.XAttrNameT]:
        self._missing.check("listxattr")
        node = self._node(inode)
        path = await self._gate.enter(node)
        try:
            return [pyfuse3.XAttrNameT(name) for name in self._convert.xattrs(await self._driver.listxattr(path))]
        finally:
            self._gate.leave(node)

    async def removexattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> None:
        self._missing.check("removexattr")
        node = self._node(inode)
        path = await self._gate.enter(node)
        try:
            await self._driver.removexattr(path, os.fsdecode(name))
        except KeyError:
            raise OSError(errno.ENODATA, name) from None
        finally:
            self._gate.leave(node)

    # ---- contents

    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        node = self._node(inode)
        if flags & _WRITING:
            self._missing.check("write")
        path = await self._gate.enter(node)  # waits while a removal is at work, and fails after it
        try:
            node.opens += 1
            if flags & os.O_TRUNC and flags & _WRITING:
                self._missing.check("truncate")
                self._changes += 1
                await self._driver.truncate(path, 0)
        except BaseException:
            node.opens -= 1
            raise
        finally:
            self._gate.leave(node)
        # Pages may outlive an open only if a change would show in the time stamp.
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(self._handles.add(node)), keep_cache=node.is_dated)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        node = self._handles.node(fh)
        path = self._gate.try_enter(node) or await self._gate.enter(node)
        try:
            return self._convert.content(await self._driver.read(path, off, size), size)
        finally:
            self._gate.leave(node)

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        self._missing.check("write")
        node = self._handles.node(fh)
        path = self._gate.try_enter(node) or await self._gate.enter(node)
        try:
            self._changes += 1
            return self._convert.written(await self._driver.write(path, off, buf), len(buf))
        finally:
            self._gate.leave(node)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        self._missing.check("fsync")
        node = self._handles.node(fh)
        path = await self._gate.enter(node)
        try:
            await self._driver.fsync(path)
        finally:
            self._gate.leave(node)

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        node = self._handles.remove(fh)
        node.opens -= 1
        if node.opens == 0 and node.hidden is not None:
            async with self._gate.frozen(node):
                await self._hiding.bury(node)
        self._tree.prune(node)

    # ---- listings

    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        node = self._node(inode)
        if not node.is_dir:
            raise NotADirectoryError(inode)
        node.opens += 1
        return pyfuse3.FileHandleT(self._handles.add(node))

    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        node = self._handles.node(fh)
        path = await self._gate.enter(node)
        try:
            listing = self._handles.listing(fh)
            if listing is None or start_id == 0:
                changes = self._changes
                names = self._convert.listing(await self._driver.list(path))
                listing = Listing(names, changes)
                self._handles.keep_listing(fh, listing)
            await self._reply_listing(node, path, listing, start_id, token)
        finally:
            self._gate.leave(node)

    async def _reply_listing(
        self, node: Node, path: str, listing: Listing, start_id: int, token: pyfuse3.ReaddirToken
    ) -> None:
        above = node.names[0][0] if node.names else node
        for position, (dot, target) in enumerate(((b".", node), (b"..", above)), 1):
            if start_id < position:
                entry = self._convert.entry("stat", Attr("dir"), target.id)
                if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(dot), entry, position):
                    return
        for position in range(max(start_id, 2), 2 + len(listing.names)):
            name, attr = listing.names[position - 2]
            if self._hiding.is_hidden(node, name):
                continue
            async with self._gate.names((node.id, name)):
                if attr is None or not listing.is_fresh(self._changes, self._driver.valid):
                    try:
                        attr = await self._stat(_join(path, name))
                    except FileNotFoundError:
                        continue
                child = self._tree.bind(node, name, attr.kind == "dir", attr.ino)
                entry = self._entry(child, attr)
                if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(os.fsencode(name)), entry, position + 1):
                    self._tree.prune(child)
                    return
                child.lookups += 1

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        node = self._handles.remove(fh)
        node.opens -= 1
        self._tree.prune(node)

    async def fsyncdir(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def finish(self) -> None:
        """The orderly end: remove what is only here because it was open."""
        await self._hiding.bury_all()

    # ---- what they share

    def _node(self, node_id: int) -> Node:
        node = self._tree.get(node_id)
        if node is None:
            raise OSError(errno.ESTALE, "forgotten")
        return node

    async def _stat(self, path: str) -> Attr:
        return self._convert.attr("stat", await self._driver.stat(path))

    def _found(self, parent: Node, name: str, attr: Attr) -> pyfuse3.EntryAttributes:
        node = self._tree.bind(parent, name, attr.kind == "dir", attr.ino)
        entry = self._entry(node, attr)
        node.lookups += 1
        return entry

    def _entry(self, node: Node, attr: Attr) -> pyfuse3.EntryAttributes:
        if (attr.kind == "dir") != node.is_dir:
            # Another file has the path now; the open one is not to be confused with it.
            raise OSError(errno.ESTALE, "replaced")
        node.is_dated = attr.mtime_ns is not None
        entry = self._convert.entry("stat", attr, node.id)
        if node.hidden is not None:
            entry.st_nlink = max(0, entry.st_nlink - 1)
        return entry


def _decode(name: bytes) -> str:
    if len(name) > MAX_NAME:
        raise OSError(errno.ENAMETOOLONG, "name too long")
    return os.fsdecode(name)


def _join(directory: str, name: str) -> str:
    return directory + name if directory == "/" else f"{directory}/{name}"
