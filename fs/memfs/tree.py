"""The tree: names, link counts, times and limits; every change of metadata goes through here.

Owns the table of nodes and the rules of POSIX for names. Knows nothing of the kernel but its lookup counts, and of
contents only that they end with their node. A method either does all of its work or raises
FUSEError before it changed anything. Called by operations.py, always to the end without an await in between.
"""

from __future__ import annotations

import errno
import gc
import stat
import time
from typing import Protocol, TypeVar

import pyfuse3
from pyfuse3 import FUSEError

from . import acl
from .nodes import Directory, File, Node, Symlink
from .space import Space

NAME_MAX = 255
TARGET_MAX = 4095
_NOREPLACE, _EXCHANGE = 1, 2

_FREEZE = 4096

NodeT = TypeVar("NodeT", bound=Node)


class Caller(Protocol):
    """Who makes a node; pyfuse3's RequestContext is one."""

    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def umask(self) -> int: ...


class Tree:
    """All nodes of one filesystem."""

    def __init__(self, space: Space, mode: int, uid: int, gid: int) -> None:
        self.space = space
        self.nodes: dict[int, Node] = {}
        self._last_ino = pyfuse3.ROOT_INODE
        self._freeze_at = _FREEZE
        space.take_inode()
        self.root = Directory(pyfuse3.ROOT_INODE, stat.S_IFDIR | mode, uid, gid, time.time_ns())
        self.root.nlink = 2
        self.root.lookups = 1  # the kernel has it from the start and never forgets it
        self.nodes[pyfuse3.ROOT_INODE] = self.root

    def child(self, parent: Directory, name: bytes) -> Node:
        """Return the node that *name* means in *parent*, or raise ENOENT."""
        entry = parent.entries.get(name)
        if entry is None:
            raise FUSEError(errno.ENAMETOOLONG if len(name) > NAME_MAX else errno.ENOENT)
        return entry[1]

    # new nodes

    def create(self, parent: Directory, name: bytes, mode: int, rdev: int, caller: Caller) -> Node:
        """Make a file, fifo, socket or device (by the type in *mode*)."""
        node = self._new(File if stat.S_ISREG(mode) else Node, parent, name, mode, caller)
        node.rdev = rdev
        return node

    def mkdir(self, parent: Directory, name: bytes, mode: int, caller: Caller) -> Directory:
        """Make a directory; in a setgid directory it becomes one too, and default lists are handed down."""
        if parent.mode & stat.S_ISGID:
            mode |= stat.S_ISGID
        node = self._new(Directory, parent, name, stat.S_IFDIR | (mode & 0o7777), caller)
        node.parent = parent
        node.nlink = 2
        parent.nlink += 1
        return node

    def symlink(self, parent: Directory, name: bytes, target: bytes, caller: Caller) -> Symlink:
        """Make a symbolic link; its target counts as space."""
        if len(target) > TARGET_MAX:
            raise FUSEError(errno.ENAMETOOLONG)
        if not target:
            raise FUSEError(errno.ENOENT)
        self._check_new(parent, name)
        self._take(len(target))
        gid = parent.gid if parent.mode & stat.S_ISGID else caller.gid
        now = time.time_ns()
        return self._enter(parent, name, Symlink(self._last_ino + 1, target, caller.uid, gid, now), now)

    def _new(self, cls: type[NodeT], parent: Directory, name: bytes, mode: int, caller: Caller) -> NodeT:
        self._check_new(parent, name)
        gid = parent.gid if parent.mode & stat.S_ISGID else caller.gid
        xattrs: dict[bytes, bytes] | None = None
        default = parent.xattrs.get(acl.DEFAULT) if parent.xattrs is not None else None
        if default is None:
            mode &= ~caller.umask
        else:
            mode, access = acl.inherit(default, mode)
            xattrs = {} if access is None else {acl.ACCESS: access}
            if cls is Directory:
                xattrs[acl.DEFAULT] = default
        self._take(sum(len(key) + len(value) for key, value in xattrs.items()) if xattrs else 0)
        now = time.time_ns()
        node = cls(self._last_ino + 1, mode, caller.uid, gid, now)
        node.xattrs = xattrs or None
        return self._enter(parent, name, node, now)

    def _check_new(self, parent: Directory, name: bytes) -> None:
        if len(name) > NAME_MAX:
            raise FUSEError(errno.ENAMETOOLONG)
        if name in parent.entries or name in {b".", b".."}:
            raise FUSEError(errno.EEXIST)
        if not parent.nlink:
            raise FUSEError(errno.ENOENT)  # the directory is removed and only held open

    def _take(self, count: int) -> None:
        self.space.take_inode()
        try:
            self.space.take(count)
        except FUSEError:
            self.space.give_inode()
            raise

    def _enter(self, parent: Directory, name: bytes, node: NodeT, now: int) -> NodeT:
        self._last_ino = node.ino  # never used again, not even after the node is gone
        self.nodes[node.ino] = node
        node.nlink = 1
        parent.add(name, node)
        parent.mtime = parent.ctime = now
        if len(self.nodes) > self._freeze_at:
            # A node that goes is in no cycle, so the cyclic collector need not look at them: with a million of them
            # each of its full runs would stop this process for half a second.
            gc.freeze()
            self._freeze_at = len(self.nodes) * 9 // 8 + _FREEZE
        return node

    # names

    def link(self, node: Node, parent: Directory, name: bytes) -> None:
        """Give a node that is no directory one more name."""
        self._check_new(parent, name)
        if node.is_directory:
            raise FUSEError(errno.EPERM)
        if not node.nlink:
            raise FUSEError(errno.ENOENT)
        self.space.take_inode()
        node.nlink += 1
        parent.add(name, node)
        node.ctime = parent.mtime = parent.ctime = time.time_ns()

    def unlink(self, parent: Directory, name: bytes) -> None:
        """Remove a name of a node that is no directory."""
        node = self.child(parent, name)
        if node.is_directory:
            raise FUSEError(errno.EISDIR)
        parent.remove(name)
        node.ctime = parent.mtime = parent.ctime = time.time_ns()
        self._unlinked(node)

    def rmdir(self, parent: Directory, name: bytes) -> None:
        """Remove an empty directory."""
        node = self.child(parent, name)
        if not isinstance(node, Directory):
            raise FUSEError(errno.ENOTDIR)
        if node.entries:
            raise FUSEError(errno.ENOTEMPTY)
        parent.remove(name)
        parent.nlink -= 1
        node.ctime = parent.mtime = parent.ctime = time.time_ns()
        self._unlinked(node)

    def rename(self, parent: Directory, name: bytes, new_parent: Directory, new_name: bytes, flags: int) -> None:
        """Move a name, replacing what is there, unless NOREPLACE, or exchanging with it, if EXCHANGE."""
        if flags & ~(_NOREPLACE | _EXCHANGE) or flags == _NOREPLACE | _EXCHANGE:
            raise FUSEError(errno.EINVAL)
        node = self.child(parent, name)
        entry = new_parent.entries.get(new_name)
        if entry is None:
            if flags & _EXCHANGE:
                raise FUSEError(errno.ENOENT)
            if len(new_name) > NAME_MAX:
                raise FUSEError(errno.ENAMETOOLONG)
            if not new_parent.nlink:
                raise FUSEError(errno.ENOENT)
        old = entry[1] if entry is not None else None
        if old is not None and flags & _NOREPLACE:
            raise FUSEError(errno.EEXIST)
        if old is node:
            return  # two names of one file, or one name twice: POSIX wants nothing done
        self._refuse_loop(node, new_parent)
        now = time.time_ns()
        if flags & _EXCHANGE:
            assert old is not None
            self._refuse_loop(old, parent)
            parent.exchange(name, old)
            new_parent.exchange(new_name, node)
            self._moved(old, new_parent, parent)
            old.ctime = now
        elif old is not None:
            self._refuse_replacing(old, node)
            parent.remove(name)
            new_parent.exchange(new_name, node)
            if isinstance(old, Directory):
                new_parent.nlink -= 1
            old.ctime = now
            self._unlinked(old)
        else:
            parent.remove(name)
            new_parent.add(new_name, node)
        self._moved(node, parent, new_parent)
        node.ctime = parent.mtime = parent.ctime = new_parent.mtime = new_parent.ctime = now

    @staticmethod
    def _refuse_loop(node: Node, parent: Directory) -> None:
        """Raise EINVAL when *parent* is *node* or below it."""
        if isinstance(node, Directory):
            while parent is not node:
                if parent is parent.parent:
                    return
                parent = parent.parent
            raise FUSEError(errno.EINVAL)

    @staticmethod
    def _refuse_replacing(old: Node, node: Node) -> None:
        if isinstance(old, Directory):
            if not node.is_directory:
                raise FUSEError(errno.EISDIR)
            if old.entries:
                raise FUSEError(errno.ENOTEMPTY)
        elif node.is_directory:
            raise FUSEError(errno.ENOTDIR)

    @staticmethod
    def _moved(node: Node, parent: Directory, new_parent: Directory) -> None:
        if isinstance(node, Directory) and parent is not new_parent:
            parent.nlink -= 1
            new_parent.nlink += 1
            node.parent = new_parent

    # the end of nodes

    def _unlinked(self, node: Node) -> None:
        node.nlink = 0 if node.is_directory else node.nlink - 1
        if node.nlink:
            self.space.give_inode()  # the one that the link took
        elif not node.lookups:
            self._free(node)

    def forget(self, ino: int, count: int) -> None:
        """Take *count* from a node's lookup count; at none, and without a name, the node ends."""
        node = self.nodes.get(ino)
        if node is None or node is self.root:
            return
        node.lookups = max(0, node.lookups - count)
        if not node.lookups and not node.nlink:
            self._free(node)

    def _free(self, node: Node) -> None:
        del self.nodes[node.ino]
        self.space.give_inode()
        if isinstance(node, File):
            if node.contents is not None:
                node.contents.truncate(0)
        elif isinstance(node, Symlink):
            self.space.take(-len(node.target))
        if node.xattrs:
            self.space.take(-sum(len(key) + len(value) for key, value in node.xattrs.items()))
