"""A change of one node's attributes and length, as SETATTR asks for several at once: all of it, or none.

Owns the order: collect, commit one record (or one batch), then change the memory. Called by operations.py.
"""

from __future__ import annotations

import stat
import time

from pyfuse3 import FUSEError

from . import acl, records, xattrs
from .arena import Arena
from .contents import Contents
from .nodes import File, Node


class Change:
    """What is to be of one node; the fields begin as the node has them."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._now = time.time_ns()
        self._xattrs: dict[bytes, bytes | None] = {}
        self._size: int | None = None
        self.mode = node.mode
        self.uid = node.uid
        self.gid = node.gid
        self.atime = node.atime
        self.mtime = node.mtime

    def truncate(self, size: int) -> None:
        """Set the length of a regular file."""
        self._size = size
        self.mtime = self._now
        self._xattrs[xattrs.CAPABILITY] = None

    def drop_privileges(self) -> None:
        """Take suid, sgid and capabilities away, as each chown does, root's too.

        With HANDLE_KILLPRIV the kernel leaves it to the filesystem.
        """
        if not stat.S_ISDIR(self.mode):
            self.mode &= ~(stat.S_ISUID | (stat.S_ISGID if self.mode & stat.S_IXGRP else 0))
            self._xattrs[xattrs.CAPABILITY] = None

    def chmod(self, mode: int) -> None:
        """Set the permission bits, and those of the access list where there is one."""
        self.mode = stat.S_IFMT(self.mode) | stat.S_IMODE(mode)
        value = xattrs.changed_list(self._node, mode)
        if value is not None:
            self._xattrs[acl.ACCESS] = value

    def commit(self, arena: Arena) -> None:
        """Commit and make the change, or raise ENOSPC and change nothing."""
        node = self._node
        contents = node.contents if isinstance(node, File) else None
        fresh = None
        todo = []
        if contents is None and self._size:
            contents = fresh = Contents(arena)
            todo.append(records.hold.pack(records.HOLD, node.ino, contents.slot))
        slot = None
        size = 0
        # A time of the last write that the slot has is newer than what an older record says, but not than this one.
        if contents is not None and (self._size is not None or self.mtime != node.mtime):
            size = contents.size if self._size is None else self._size
            slot, move = contents.prepare(size, 0)
            todo.append(move)
        present = node.xattrs or {}
        values = {name: value for name, value in self._xattrs.items() if name in present}
        todo += [xattrs.record(node, name, value, self.mode, self._now) for name, value in values.items()]
        todo.append(
            records.attributes.pack(
                records.ATTRIBUTES, self.mode, self.uid, self.gid, node.ino, self.atime, self.mtime, self._now
            )
        )
        try:
            arena.kept.journal.append(todo[0] if len(todo) == 1 else records.batch(todo), frees=self._size == 0)
        except FUSEError:
            if slot is not None:
                arena.kept.give_slot(slot)
            if fresh is not None:
                fresh.drop()
            raise
        if fresh is not None and isinstance(node, File):
            node.contents = fresh
        if slot is not None and contents is not None:
            contents.cut(slot, size)
        for name, value in values.items():
            xattrs.apply(arena.space, node, name, value)
        node.mode, node.uid, node.gid = self.mode, self.uid, self.gid
        node.atime, node.mtime, node.ctime = self.atime, self.mtime, self._now
