"""The tree: names, link counts, times and limits; every change of metadata goes through here.

Owns the table of nodes and the rules of POSIX for names. Knows nothing of the kernel but its lookup counts, and of
contents only that they end with their node. A method either does all of its work or raises
FUSEError before it changed anything. Called by operations.py, always to the end without an await in between.

Each change is first checked, then committed to the journal as one record, then made in memory: that order is what
makes a kill at any moment harmless, and what the compaction of the journal relies on.

Lookup counts are not kept. What was alive when the process before died may still be open: a node without a name begins
with one inherited lookup, and one that loses its last name before it was looked up here is given one. The FORGET
that ends it counts the lookups of all processes, so it is greater than the count of this one.
"""

from __future__ import annotations

import errno
import gc
import stat
import time
from typing import Protocol, TypeVar

import pyfuse3
from pyfuse3 import FUSEError

from . import acl, records
from .kept import Kept
from .nodes import Directory, File, Node, Symlink
from .space import Space

NAME_MAX = 255
TARGET_MAX = 4095
_NOREPLACE, _EXCHANGE = 1, 2

_FREEZE = 4096

_pack_create, _pack_unlink, _pack_rename = records.create.pack, records.unlink.pack, records.rename.pack

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

    def __init__(self, space: Space, kept: Kept) -> None:
        """Begin without any node: `make_root` or `adopt` is to follow."""
        self.space = space
        self.nodes: dict[int, Node] = {}
        self.last_ino = 0
        self._append = kept.journal.append
        self._freeze_at = _FREEZE
        self._inherited = 0  # nodes up to this one are older than this process
        self.root: Directory

    def make_root(self, mode: int, uid: int, gid: int) -> None:
        """Make the root of a new filesystem."""
        root = Directory(pyfuse3.ROOT_INODE, stat.S_IFDIR | mode, uid, gid, time.time_ns())
        self._append(records.create.pack(records.CREATE, root.mode, uid, gid, 0, root.ino, root.ino, 0, root.ctime))
        root.nlink = 2
        self.adopt({root.ino: root}, root.ino)
        self._inherited = 0

    def adopt(self, nodes: dict[int, Node], last_ino: int) -> None:
        """Begin with these nodes, which are those of a process before."""
        root = nodes.get(pyfuse3.ROOT_INODE)
        assert isinstance(root, Directory)
        self.nodes = nodes
        self.last_ino = self._inherited = last_ino
        for node in nodes.values():
            if not node.nlink:
                node.lookups = 1
            self.space.take_inode()
            if node.nlink > 1 and node.__class__ is not Directory:
                self.space.inodes_left -= node.nlink - 1
            if node.__class__ is Symlink or node.xattrs:
                self.space.left -= self._bytes(node)
        self.root = root
        root.lookups = 1  # the kernel has it from the start and never forgets it

    @staticmethod
    def _bytes(node: Node) -> int:
        """Return what a node takes of the space beside the pages of its contents."""
        count = len(node.target) if isinstance(node, Symlink) else 0
        return count + (sum(len(key) + len(value) for key, value in node.xattrs.items()) if node.xattrs else 0)

    def child(self, parent: Directory, name: bytes) -> Node:
        """Return the node that *name* means in *parent*, or raise ENOENT."""
        entry = parent.entries.get(name)
        if entry is None:
            raise FUSEError(errno.ENAMETOOLONG if len(name) > NAME_MAX else errno.ENOENT)
        return entry[1]

    # new nodes

    def create(self, parent: Directory, name: bytes, mode: int, rdev: int, caller: Caller) -> Node:
        """Make a file, fifo, socket or device (by the type in *mode*)."""
        return self._new(File if stat.S_ISREG(mode) else Node, parent, name, mode, rdev, caller)

    def mkdir(self, parent: Directory, name: bytes, mode: int, caller: Caller) -> Directory:
        """Make a directory; in a setgid directory it becomes one too, and default lists are handed down."""
        if parent.mode & stat.S_ISGID:
            mode |= stat.S_ISGID
        node = self._new(Directory, parent, name, stat.S_IFDIR | (mode & 0o7777), 0, caller)
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
        gid = parent.gid if parent.mode & stat.S_ISGID else caller.gid
        node = Symlink(self.last_ino + 1, target, caller.uid, gid, time.time_ns())
        return self._enter(parent, name, node, len(target), target)

    def _new(self, cls: type[NodeT], parent: Directory, name: bytes, mode: int, rdev: int, caller: Caller) -> NodeT:
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
        node = cls(self.last_ino + 1, mode, caller.uid, gid, time.time_ns())
        node.rdev = rdev
        if xattrs:
            node.xattrs = xattrs
            return self._enter(parent, name, node, self._bytes(node), records.pack_xattrs(xattrs))
        return self._enter(parent, name, node, 0, b"")

    def _check_new(self, parent: Directory, name: bytes) -> None:
        if len(name) > NAME_MAX:
            raise FUSEError(errno.ENAMETOOLONG)
        if name in parent.entries or name in {b".", b".."}:
            raise FUSEError(errno.EEXIST)
        if not parent.nlink:
            raise FUSEError(errno.ENOENT)  # the directory is removed and only held open

    def _enter(self, parent: Directory, name: bytes, node: NodeT, size: int, more: bytes) -> NodeT:
        """Commit and enter a new node, which takes *size* bytes; *more* is what its record has behind the name."""
        space = self.space
        space.require_inode(size)
        ino = node.ino
        now = node.ctime
        if more:
            head = records.create_more.pack(
                records.CREATE_MORE, node.mode, node.uid, node.gid, node.rdev, ino, parent.ino, parent.next_offset, now,
                len(name),
            )  # fmt: skip
            self._append(head + name + more)
        else:
            head = _pack_create(
                records.CREATE, node.mode, node.uid, node.gid, node.rdev, ino, parent.ino, parent.next_offset, now
            )
            self._append(head + name)
        space.inodes_left -= 1
        space.left -= size
        self.last_ino = ino  # never used again, not even after the node is gone
        self.nodes[ino] = node
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
        self.space.require_inode()
        now = time.time_ns()
        self._append(records.link.pack(records.LINK, node.ino, parent.ino, parent.next_offset, now) + name)
        self.space.take_inode()
        node.nlink += 1
        parent.add(name, node)
        node.ctime = parent.mtime = parent.ctime = now

    def unlink(self, parent: Directory, name: bytes) -> None:
        """Remove a name of a node that is no directory."""
        node = self.child(parent, name)
        if node.is_directory:
            raise FUSEError(errno.EISDIR)
        self._remove(parent, name, node, 0)

    def rmdir(self, parent: Directory, name: bytes) -> None:
        """Remove an empty directory."""
        node = self.child(parent, name)
        if not isinstance(node, Directory):
            raise FUSEError(errno.ENOTDIR)
        if node.entries:
            raise FUSEError(errno.ENOTEMPTY)
        self._remove(parent, name, node, records.IS_DIRECTORY)
        parent.nlink -= 1

    def _remove(self, parent: Directory, name: bytes, node: Node, flags: int) -> None:
        now = time.time_ns()
        is_gone = not node.lookups and self._goes(node)
        if is_gone:
            flags |= records.IS_GONE
        self._append(_pack_unlink(records.UNLINK, flags, parent.ino, node.ino, now) + name, True)
        parent.remove(name)
        node.ctime = parent.mtime = parent.ctime = now
        self._unlinked(node, is_gone)

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
        marks = records.IS_DIRECTORY if node.is_directory else 0
        is_gone = False
        if old is not None:
            if old.is_directory:
                marks |= records.OLD_IS_DIRECTORY
            if flags & _EXCHANGE:
                self._refuse_loop(old, parent)
                marks |= records.EXCHANGE
            else:
                self._refuse_replacing(old, node)
                is_gone = self._goes(old)
                if is_gone:
                    marks |= records.IS_GONE
        now = time.time_ns()
        head = _pack_rename(
            records.RENAME, marks, len(name), parent.ino, new_parent.ino, node.ino, 0 if old is None else old.ino,
            new_parent.next_offset, now,
        )  # fmt: skip
        self._append(head + name + new_name, old is not None)
        if flags & _EXCHANGE:
            assert old is not None
            parent.exchange(name, old)
            new_parent.exchange(new_name, node)
            self._moved(old, new_parent, parent)
            old.ctime = now
        elif old is not None:
            parent.remove(name)
            new_parent.exchange(new_name, node)
            if isinstance(old, Directory):
                new_parent.nlink -= 1
            old.ctime = now
            self._unlinked(old, is_gone)
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

    def _goes(self, node: Node) -> bool:
        """Whether the node ends when one of its names goes; one that may be open since an older process does not."""
        return not node.lookups and node.ino > self._inherited and (node.nlink == 1 or node.is_directory)

    def _unlinked(self, node: Node, is_gone: bool) -> None:
        node.nlink = 0 if node.is_directory else node.nlink - 1
        if node.nlink:
            self.space.give_inode()  # the one that the link took
        elif is_gone:
            self._free(node)
        elif not node.lookups:
            node.lookups = 1  # inherited

    def forget(self, ino: int, count: int) -> None:
        """Take *count* from a node's lookup count; at none, and without a name, the node ends."""
        node = self.nodes.get(ino)
        if node is None or node is self.root:
            return
        node.lookups = max(0, node.lookups - count)
        if not node.lookups and not node.nlink:
            try:
                self._append(records.gone.pack(records.GONE, ino), frees=True)
            except FUSEError:
                return  # a FORGET has no answer; the next process finds the node without a name and is told again
            self._free(node)

    def _free(self, node: Node) -> None:
        del self.nodes[node.ino]
        self.space.give_inode()
        if isinstance(node, File) and node.contents is not None:
            node.contents.drop()
        if node.xattrs or isinstance(node, Symlink):
            self.space.take(-self._bytes(node))
