"""Operations on what is inside: files and directories by handle.

Owns: handles, and the snapshot that a directory is listed from. Must never: change a name. Part of: paths.py.
"""

from __future__ import annotations

import errno
import os

import pyfuse3

from udf.driver.fs import WHOLE, Attr
from udf.driver.handles import Listing
from udf.driver.session import Session, join
from udf.driver.tree import Node

_WRITING = os.O_WRONLY | os.O_RDWR


class ContentOperations(Session):
    """Operations on contents."""

    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a file; from here on it lives until its release."""
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
        handle = pyfuse3.FileHandleT(self._handles.add(node))
        if not node.is_sized:
            return pyfuse3.FileInfo(fh=handle, direct_io=True)  # else the kernel ends each read at the size it knows: 0
        # Pages may outlive an open only if a change would show in the time stamp.
        return pyfuse3.FileInfo(fh=handle, keep_cache=node.is_dated)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """Read at most `size` bytes."""
        node = self._handles.node(fh)
        if not node.is_sized and (whole := self._handles.whole(fh)) is not None:
            return whole[off : off + size]
        path = self._gate.try_enter(node) or await self._gate.enter(node)
        try:
            if not node.is_sized:
                content = self._convert.content(await self._driver.read(path, 0, WHOLE), WHOLE)
                return self._handles.keep_whole(fh, content)[off : off + size]
            return self._convert.content(await self._driver.read(path, off, size), size)
        finally:
            self._gate.leave(node)

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        """Write at an offset; appending is resolved by the kernel."""
        self._missing.check("write")
        node = self._handles.node(fh)
        path = self._gate.try_enter(node) or await self._gate.enter(node)
        try:
            self._changes += 1
            return self._convert.written(await self._driver.write(path, off, buf), len(buf))
        finally:
            self._gate.leave(node)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        """Make what was written durable."""
        self._missing.check("fsync")
        node = self._handles.node(fh)
        path = await self._gate.enter(node)
        try:
            await self._driver.fsync(path)
        finally:
            self._gate.leave(node)

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        """The last close of a handle: what was removed meanwhile goes now."""
        node = self._handles.remove(fh)
        node.opens -= 1
        try:
            if node.opens == 0 and node.hidden is not None:
                async with self._gate.frozen(node):
                    await self._hiding.bury(node)
        finally:
            self._tree.prune(node)

    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        """Open a directory."""
        node = self._node(inode)
        if not node.is_dir:
            raise NotADirectoryError(inode)
        node.opens += 1
        return pyfuse3.FileHandleT(self._handles.add(node))

    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List from a snapshot, so that offsets stay valid; each entry told counts as a lookup."""
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
                        attr = await self._stat(join(path, name))
                    except FileNotFoundError:
                        continue
                child = self._tree.bind(node, name, attr.kind == "dir", attr.ino)
                try:
                    entry = self._entry(child, attr)
                    if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(os.fsencode(name)), entry, position + 1):
                        return
                    child.lookups += 1
                finally:
                    self._tree.prune(child)

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        """Close a directory."""
        node = self._handles.remove(fh)
        node.opens -= 1
        self._tree.prune(node)

    async def fsyncdir(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        """No verb for it: the kernel does not ask again."""
        raise pyfuse3.FUSEError(errno.ENOSYS)
