"""Open files and directories: what is asked by handle.

Owns: handles, and the snapshot that a directory is listed from. Must never: change a name. Part of: operations.py.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections.abc import Callable
from itertools import count
from typing import Any

import pyfuse3
from pyfuse3 import FileInfo, ReaddirToken, RequestContext

from . import names
from .attributes import Attributes
from .entries import Entry
from .nodes import Node

_DOT, _DOTDOT = 1, 2  # positions in a listing; those of entries are their slots, from _FIRST on
_FIRST = 3
_BATCH = 64  # entries whose attributes are gathered at once


class Handle:
    """An open file or directory."""

    __slots__ = ("listing", "node", "version")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.version = 0  # of the directory when it was listed
        self.listing: list[Entry] | None = None


class Handles(Attributes):
    """Operations on what is open."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._handles: dict[int, Handle] = {}
        self._numbers = count(1)

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

    def read_now(self, fh: int, off: int, size: int, answer: Callable[[Any], None]) -> Any:
        """As `read`, of what was read ahead, for UDF's driver host: see `udf.host.at_once`."""
        handle = self._handles.get(fh)
        if handle is None:
            return False
        node = handle.node

        async def as_ever() -> None:
            try:
                answer(await self._contents.read(node, off, size))
            except OSError as exc:
                answer(OSError(self._refusal(exc).errno, exc.strerror))

        def later(data: list[memoryview] | None) -> None:
            if data is None:
                self.volume.spawn(as_ever)
            else:
                answer(data)

        return self._contents.read_now(node, off, size, later)

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


def _slot(entry: Entry) -> int:
    return entry.slot
