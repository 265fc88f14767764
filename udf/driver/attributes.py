"""Operations on what a node is: attributes, links' targets, extended attributes.

Must never: change a name. Part of: paths.py.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

import pyfuse3

from udf.driver.convert import MAX_NAME
from udf.driver.session import Session


class AttributeOperations(Session):
    """Operations on attributes."""

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Attributes of a node, wherever its path is now."""
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
        """Set the size and the other attributes, each by its verb."""
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
                so_far = {key: getattr(now, f"st_{key}") for key in wanted}
                if "mode" in so_far:
                    so_far["mode"] = stat.S_IMODE(so_far["mode"])
                is_changed = so_far != wanted
                if is_changed and not fields.update_size:
                    self._missing.check("setattr")
            return now
        finally:
            self._gate.leave(node)

    async def readlink(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileNameT:
        """The target of a link."""
        self._missing.check("readlink")
        node = self._node(inode)
        path = await self._gate.enter(node)
        try:
            return pyfuse3.FileNameT(self._convert.target(await self._driver.readlink(path)))
        finally:
            self._gate.leave(node)

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Without the verb: all zero, as filesystems without a size do."""
        if "statfs" in self._verbs:
            return self._convert.space(await self._driver.statfs())
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_namemax = MAX_NAME
        return data

    async def getxattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> bytes:
        """One extended attribute."""
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
        """Set an extended attribute."""
        self._missing.check("setxattr")
        node = self._node(inode)
        path = await self._gate.enter(node)
        try:
            await self._driver.setxattr(path, os.fsdecode(name), value)
        finally:
            self._gate.leave(node)

    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> Sequence[pyfuse3.XAttrNameT]:
        """The names of the extended attributes."""
        self._missing.check("listxattr")
        node = self._node(inode)
        path = await self._gate.enter(node)
        try:
            return [pyfuse3.XAttrNameT(name) for name in self._convert.xattrs(await self._driver.listxattr(path))]
        finally:
            self._gate.leave(node)

    async def removexattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> None:
        """Remove an extended attribute."""
        self._missing.check("removexattr")
        node = self._node(inode)
        path = await self._gate.enter(node)
        try:
            await self._driver.removexattr(path, os.fsdecode(name))
        except KeyError:
            raise OSError(errno.ENODATA, name) from None
        finally:
            self._gate.leave(node)
