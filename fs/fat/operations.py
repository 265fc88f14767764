"""A FAT volume as the kernel sees it. Here: names.

Owns: looking names up, making and removing them, and the kernel's lookup counts; attributes.py and handles.py are the
other parts of the same class. The semantics are those of Linux' vfat where FAT has none of its own.
Must never: write anything itself: names are changed through directory.py within a change, contents by contents.py.
Called by: pyfuse3, in a driver host; tests, through lab.py.

A name that is not spelled as the directory has it (in another case, its short form) is answered with no time to live,
as is one that does not exist: the kernel would go on to believe in it after the file, or its absence, is gone.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext

from . import entries, names
from .change import Change
from .directory import Directory
from .entries import ARCHIVE, DIRECTORY, READ_ONLY, Entry
from .handles import Handles
from .nodes import Node
from .renames import EXCHANGE, NOREPLACE, Rename

T = TypeVar("T")

_ONCE = 1e-6  # the shim takes this for "do not keep it", even on a mount that nobody else changes

_NO_ENTRY = EntryAttributes()
_NO_ENTRY.st_ino = 0
_NO_ENTRY.entry_timeout = _ONCE


class Fat(Handles):
    """The FAT volume on a block service."""

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
        self.volume.intents.unanswered = None
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
        volume.intents.unanswered = None
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
            self.volume.intents.unanswered = None
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
            self.volume.intents.unanswered = None
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
            if flags & ~(NOREPLACE | EXCHANGE) or flags == NOREPLACE | EXCHANGE:
                raise OSError(errno.EINVAL, "no such way to rename")
            parents = await self._folder(parent_inode_old), await self._folder(parent_inode_new)
            for parent, name in await self._with_room(lambda: self._rename(parents, name_old, name_new, flags)):
                self._invalidate(parent, name)
        except OSError as exc:
            raise self._refusal(exc) from None

    async def _rename(self, parents: tuple[Node, Node], old: bytes, new: bytes, flags: int) -> list[tuple[Node, bytes]]:
        rename = Rename(self.volume, self._nodes, self._contents, parents)
        texts = names.from_kernel(old), names.from_kernel(new)
        intents = self.volume.intents
        if flags & EXCHANGE and intents.is_done(rename.key(*texts)):
            return []
        await rename.run(*texts, flags)
        if flags & EXCHANGE:
            # This runs when the request is answered: from there on the same request is another one.
            trio.lowlevel.current_trio_token().run_sync_soon(intents.settled)
        return rename.stale

    async def _with_room(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do it, and once more if it failed for want of a cluster and there is one after all."""
        try:
            return await work()
        except OSError as exc:
            if exc.errno != errno.ENOSPC or not await self.volume.reclaim():
                raise
        return await work()
