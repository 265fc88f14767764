"""Replies: attributes of a node, the pages of a directory listing, the errno of an OSError.

Owns the open directories' positions. Called by the handlers in __init__.py; never awaits.
"""

from __future__ import annotations

import errno
import os

import pyfuse3
from pyfuse3 import EntryAttributes, FUSEError, ReaddirToken, StatvfsData

from . import calls
from .nodes import Node, Nodes

_S_IFDIR = 0o040000
_STATVFS = (
    "f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_namemax",
)  # fmt: skip


def refusal(e: OSError) -> FUSEError:
    """The one exception that pyfuse3 takes from a handler."""
    return FUSEError(e.errno or errno.EIO)


def entry_of(node: Node, st: os.stat_result, timeout: float) -> EntryAttributes:
    """What is said of a name. By the generation, made of its handle, a file is known again in each run of the driver.

    Its number is not enough: it may be given to another file, and a second bearer gets another node id in this run.
    """
    entry = attributes(node.id, st, timeout)
    if node.handle is not None:
        entry.generation = calls.number_of(node.handle)
    return entry


def attributes(node_id: int, st: os.stat_result, timeout: float) -> EntryAttributes:
    """What a stat result says, under the node's id."""
    entry = EntryAttributes()
    entry.st_ino = node_id
    entry.entry_timeout = entry.attr_timeout = timeout
    entry.st_mode = st.st_mode
    entry.st_nlink = st.st_nlink
    entry.st_uid = st.st_uid
    entry.st_gid = st.st_gid
    entry.st_rdev = st.st_rdev
    entry.st_size = st.st_size
    entry.st_blksize = st.st_blksize
    entry.st_blocks = st.st_blocks
    entry.st_atime_ns = st.st_atime_ns
    entry.st_mtime_ns = st.st_mtime_ns
    entry.st_ctime_ns = st.st_ctime_ns
    return entry


def filesystem(fd: int) -> StatvfsData:
    """statvfs(3) of a descriptor."""
    found = os.statvfs(fd)
    data = StatvfsData()
    for field in _STATVFS:
        setattr(data, field, getattr(found, field))
    return data


class Listing:
    """An open directory: its own descriptor, and what of the last batch was not delivered yet.

    Offsets are the source's own, so they mean the same for as long as the directory exists, and nothing of the
    listing is kept beyond one batch of the kernel's.
    """

    __slots__ = ("_batch", "_nodes", "_position", "_timeout", "fd", "node")

    def __init__(self, fd: int, node: Node, nodes: Nodes, timeout: float) -> None:
        self.fd = fd
        self.node = node
        self._nodes = nodes
        self._timeout = timeout
        self._batch: list[tuple[bytes, int, int]] = []  # reversed: the next one is the last
        self._position = 0  # the offset that continues with the batch

    def deliver(self, start: int, token: ReaddirToken) -> None:
        """Fill the kernel's buffer from start on; its size bounds the work of one call."""
        if start != self._position or start == 0:
            os.lseek(self.fd, start, os.SEEK_SET)
            self._batch = []
            self._position = start
        while True:
            if not self._batch:
                self._batch = calls.directory_entries(self.fd)[::-1]
                if not self._batch:
                    return
            while self._batch:
                if not self._deliver_one(token, *self._batch[-1]):
                    return
                self._position = self._batch.pop()[1]

    def _deliver_one(self, token: ReaddirToken, name: bytes, following: int, ino: int) -> bool:
        """False: no room left."""
        nodes = self._nodes
        if name in (b".", b".."):
            entry = EntryAttributes()  # the kernel binds no node to these
            entry.st_ino = self.node.id if name == b"." or self.node is nodes.root else ino
            entry.st_mode = _S_IFDIR
            return pyfuse3.readdir_reply(token, name, entry, following)
        try:
            if nodes.by_handle:
                node, st = nodes.enter_by_handle(self.fd, name)
            else:
                node, st = nodes.enter(self.node.id, name)
        except OSError:
            return True  # gone since, or a mount point
        if pyfuse3.readdir_reply(token, name, entry_of(node, st, self._timeout), following):
            node.lookups += 1
            return True
        nodes.drop_unused(node)
        return False
