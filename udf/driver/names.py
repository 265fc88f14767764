"""Operations on names: each is alone on its names while it runs (gate.py).

Owns: lookups, and making, removing and moving names. Must never: leave the tree (tree.py) in another state than the
driver's after a verb has returned. Part of: paths.py.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

import pyfuse3

from udf.driver.fs import Attr
from udf.driver.session import Session, decode, join

_RENAMES = ("rename",)  # the name that all renames share, so that only one is at work


class NameOperations(Session):
    """Operations on names."""

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Answer absence as well, so that the kernel need not ask again for a while."""
        parent, text = self._node(parent_inode), decode(name)
        async with self._gate.names((parent.id, text)):
            directory = await self._gate.enter(parent)
            try:
                if self._hiding.is_hidden(parent, text):
                    return self._convert.absent()
                try:
                    attr = await self._stat(join(directory, text))
                except FileNotFoundError:
                    self._tree.unbind(parent, text)
                    return self._convert.absent()
                return self._found(parent, text, attr)
            finally:
                self._gate.leave(parent)

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        """Drop lookups that the kernel has dropped."""
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
        """Make a file and open it."""
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
        """Make a file; other kinds of nodes have no verb."""
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
        """Make a directory."""
        return await self._make(parent_inode, name, "mkdir", ctx, stat.S_IMODE(mode))

    async def symlink(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        target: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Make a symbolic link."""
        return await self._make(parent_inode, name, "symlink", ctx, os.fsdecode(target))

    async def link(
        self,
        inode: pyfuse3.InodeT,
        new_parent_inode: pyfuse3.InodeT,
        new_name: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Give a file one more name."""
        self._missing.check("link")
        node, parent, text = self._node(inode), self._node(new_parent_inode), decode(new_name)
        async with self._gate.names((parent.id, text)):
            directory = await self._gate.enter(parent)
            try:
                old = await self._gate.enter(node)
                try:
                    self._hiding.refuse_name(parent, text)
                    path = join(directory, text)
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
        """Remove a name; an open file lives on (hiding.py)."""
        await self._remove(parent_inode, name, directory=False)

    async def rmdir(self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext) -> None:
        """Remove an empty directory."""
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
        """Move a name and all that is below it; what is replaced and open lives on."""
        self._missing.check("rename")
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise OSError(errno.EINVAL, "names cannot be exchanged")
        parent, name = self._node(parent_inode_old), decode(name_old)
        new_parent, new_name = self._node(parent_inode_new), decode(name_new)
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
                    if target is not None and target in self._tree.above(parent):
                        raise OSError(errno.ENOTEMPTY, new_name)
                    old, new = join(old_directory, name), join(new_directory, new_name)
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
        parent, text = self._node(parent_id), decode(name)
        async with self._gate.names((parent.id, text)):
            directory = await self._gate.enter(parent)
            try:
                self._hiding.refuse_name(parent, text)
                path = join(directory, text)
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
        parent, text = self._node(parent_id), decode(name)
        async with self._gate.names((parent.id, text)):
            above = await self._gate.enter(parent)
            try:
                if self._hiding.is_hidden(parent, text):
                    raise FileNotFoundError(text)
                path = join(above, text)
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
        names = self._convert.listing(await self._driver.list(path))
        if any(not self._hiding.is_hidden_path(join(path, name)) for name, _ in names):
            raise OSError(errno.ENOTEMPTY, path)
