"""Which file a node id means, and a descriptor for it: the table between FUSE node ids and inodes of the source.

Owns the O_PATH descriptors of nodes (bounded, least recently used go first), the lookup counts and the choice of
node ids. It must never follow a symbolic link, never use a path of more than one component and never enter another
mount. Called by the handlers in __init__.py, from the loop's thread only, and it never awaits: what is said here
about order holds because nothing else runs in between.

A node is found again in one of two ways, decided once for the whole source:
* by file handle, where the filesystem has them and we have CAP_DAC_READ_SEARCH: a lookup then costs no descriptor;
* by the name it was last seen under in its parent's node, checked by device and inode number; a file that was
  removed or moved behind the mount is ESTALE then, unless its descriptor is still there.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Iterable

from . import calls

ROOT = 1
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_DESCRIPTORS = 8192  # each pins an inode and a dentry of the source in kernel memory
_FEWEST_DESCRIPTORS = 16
_TOO_MANY = (errno.EMFILE, errno.ENFILE)


class Node:
    """One inode of the source that the kernel knows."""

    __slots__ = ("device", "fd", "file", "handle", "id", "ino", "kind", "lookups", "name", "opened", "parent", "used")

    def __init__(self, node_id: int, st: os.stat_result) -> None:
        self.id = node_id
        self.device = st.st_dev
        self.ino = st.st_ino
        self.kind = stat.S_IFMT(st.st_mode)
        self.fd = -1
        self.file = -1  # while it is open since its creation: that open file
        self.handle: bytes | None = None
        self.parent: Node | None = None  # with name: only where there are no handles
        self.name = b""
        self.lookups = 0
        self.opened = 0  # open files and directories: it may have no name left, so its descriptor stays
        self.used = False  # since the last pass of the eviction


class Nodes:
    """All nodes of one source directory."""

    def __init__(self, source: str) -> None:
        self.root_fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.proc = os.open("/proc/self/fd", _PATH | os.O_DIRECTORY)
        st = os.fstat(self.root_fd)
        self._device = st.st_dev
        self._mount, self._handles = self._try_handles()
        self.root = Node(ROOT, st)
        self.root.fd = self.root_fd
        self.root.lookups = 1
        self._by_id = {ROOT: self.root}
        # Nodes whose id is not their inode number: the root, other devices (subvolumes, overlays), reused numbers.
        self._renumbered: dict[tuple[int, int], Node] = {(st.st_dev, st.st_ino): self.root}
        self._cached: dict[int, Node] = {}  # id(node) -> node with a descriptor, oldest first; never the root
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit == resource.RLIM_INFINITY:
            limit = 2 * _MOST_DESCRIPTORS
        self._most = max(_FEWEST_DESCRIPTORS, min(_MOST_DESCRIPTORS, limit // 2))

    def _try_handles(self) -> tuple[int, bool]:
        """The mount's id (-1: unknown), and whether a handle leads back to its file."""
        try:
            mount, handle = calls.handle_of(self.root_fd, b"")
        except OSError:
            return -1, False
        try:
            os.close(calls.open_handle(self.root_fd, handle, _PATH))
        except OSError:
            return mount, False
        return mount, True

    @property
    def by_handle(self) -> bool:
        """Whether nodes are found again by file handle."""
        return self._handles

    # -- descriptors

    def fd(self, node_id: int) -> int:
        """A descriptor of the node, O_PATH or better; valid until the next call that may need another one."""
        node = self._by_id.get(node_id)
        if node is None:
            raise OSError(errno.ESTALE, "unknown node")
        if node.fd >= 0:
            node.used = True
            return node.fd
        return node.file if node.file >= 0 else self._reopen(node)

    def fds(self, first: int, second: int) -> tuple[int, int]:
        """Two descriptors at once: getting the second may have evicted the first, then the first is got again."""
        while True:
            pair = self.fd(first), self.fd(second)
            if self.fd(first) == pair[0]:
                return pair

    def open(self, name: bytes, flags: int, directory: int, mode: int = 0) -> int:
        """os.open beneath directory (a node's descriptor or self.proc) that makes room when descriptors run out."""
        try:
            return os.open(name, flags | os.O_CLOEXEC, mode, dir_fd=directory)
        except OSError as e:
            if e.errno not in _TOO_MANY:
                raise
        self._evict(len(self._cached) // 2, keep=directory)
        return os.open(name, flags | os.O_CLOEXEC, mode, dir_fd=directory)

    def open_again(self, node_id: int, flags: int) -> int:
        """Open a regular file or directory for I/O through its O_PATH descriptor."""
        fd = self.fd(node_id)
        try:
            return os.open(b"%d" % fd, flags | os.O_CLOEXEC, dir_fd=self.proc)
        except OSError as e:
            if e.errno not in _TOO_MANY:
                raise
        self._evict(len(self._cached) // 2, keep=fd)
        return os.open(b"%d" % fd, flags | os.O_CLOEXEC, dir_fd=self.proc)

    def _reopen(self, node: Node) -> int:
        if node.handle is not None:
            try:
                fd = self._open_handle(node.handle)
            except OSError as e:
                # ENOENT would be a statement about a name; ext4 says ENOMEM while the number is given to a new file
                if e.errno in (errno.ENOENT, errno.ENOMEM):
                    raise OSError(errno.ESTALE, "file is gone") from None
                raise
        elif node.parent is not None:
            fd = self._open_beneath(node.parent, node.name)
        else:
            raise OSError(errno.ESTALE, "file is gone")
        st = os.fstat(fd)
        if st.st_ino != node.ino or st.st_dev != node.device:
            os.close(fd)
            raise OSError(errno.ESTALE, "another file has taken the name")
        self._keep(node, fd)
        return fd

    def _open_handle(self, handle: bytes) -> int:
        try:
            return calls.open_handle(self.root_fd, handle, _PATH)
        except OSError as e:
            if e.errno not in _TOO_MANY:
                raise
        self._evict(len(self._cached) // 2)
        return calls.open_handle(self.root_fd, handle, _PATH)

    def _open_beneath(self, parent: Node, name: bytes) -> int:
        directory = parent.fd if parent.fd >= 0 else self._reopen(parent)
        parent.used = True
        try:
            return calls.open_beneath(directory, name, _PATH)
        except OSError as e:
            if e.errno not in _TOO_MANY:
                raise
        self._evict(len(self._cached) // 2, keep=directory)
        return calls.open_beneath(directory, name, _PATH)

    def _keep(self, node: Node, fd: int) -> None:
        """Cache fd as the node's; beyond the bound an older one goes."""
        node.fd = fd
        node.used = True
        if len(self._cached) >= self._most:
            self._evict(1)
        self._cached[id(node)] = node

    def _evict(self, count: int, keep: int = -1) -> None:
        """Close count descriptors, the least recently used first (second chance); keep is in use by the caller."""
        for _ in range(2 * len(self._cached)):
            if count <= 0:
                return
            key, node = next(iter(self._cached.items()))
            del self._cached[key]
            if node.used or node.opened or node.fd == keep or not (node.handle or node.parent):
                node.used = False
                self._cached[key] = node
            else:
                os.close(node.fd)
                node.fd = -1
                count -= 1

    # -- identity

    def find(self, st: os.stat_result) -> Node | None:
        """The node of the file that st describes, if the kernel knows it."""
        node = self._by_id.get(st.st_ino)
        if node is not None and node.ino == st.st_ino and node.device == st.st_dev:
            return node
        return self._renumbered.get((st.st_dev, st.st_ino))

    def enter(self, parent_id: int, name: bytes) -> tuple[Node, os.stat_result]:
        """The node of name in the directory parent_id, and its attributes; the caller counts the lookup."""
        directory = self.fd(parent_id)
        if self._handles:
            return self.enter_by_handle(directory, name)
        return self._enter_by_name(self._by_id[parent_id], name)

    def enter_by_handle(self, directory: int, name: bytes) -> tuple[Node, os.stat_result]:
        """As enter(), beneath any descriptor of a directory. The mount is checked before the file is touched:
        the source may contain our own mountpoint, and asking there for attributes would wait for ourselves."""
        mount, handle = calls.handle_of(directory, name)
        if mount != self._mount:
            raise OSError(errno.EXDEV, "a mount point inside the source")
        st = os.stat(name, dir_fd=directory, follow_symlinks=False)
        node = self.find(st)
        if node is None:
            node = self.add(st)
            node.handle = handle
        elif node.handle != handle and node is not self.root:
            node = self._settle(node, st, handle)
        return node, st

    def _settle(self, node: Node, st: os.stat_result, handle: bytes) -> Node:
        """The inode number is known, the handle differs: the number was reused after the old file had gone (if it
        was held open it could not be), or handle and attributes were taken from two files in a race. If the old
        node is still there then st is about it; else it must not become this file."""
        try:
            if node.fd < 0:
                self._reopen(node)
            return node
        except OSError:
            self._abandon(node)
        fresh = self.add(st)
        fresh.handle = handle
        return fresh

    def _enter_by_name(self, parent: Node, name: bytes) -> tuple[Node, os.stat_result]:
        fd = self._open_beneath(parent, name)
        st = os.fstat(fd)
        node = self.find(st)
        if node is not None and node.fd < 0 and node.kind != stat.S_IFMT(st.st_mode):
            self._abandon(node)  # a reused inode number: without handles the type is all that can tell
            node = None
        if node is None:
            node = self.add(st)
        if node.fd < 0:
            self._keep(node, fd)
        else:
            os.close(fd)
        if node is not self.root:
            node.parent, node.name = parent, name
        return node, st

    def created(self, parent_id: int, name: bytes, opened: int) -> tuple[Node, os.stat_result]:
        """The node of a file that was just created and is open (counted here) as the descriptor opened."""
        st = os.fstat(opened)
        node = self.find(st)
        if node is not None:  # the old bearer of this inode number is gone, or the number would not be free
            self._abandon(node)
        node = self.add(st)
        if self._handles:
            _, node.handle = calls.handle_of(opened, b"")
        else:
            node.parent, node.name = self._by_id[parent_id], name
        node.file = opened
        node.opened = 1
        return node, st

    def add(self, st: os.stat_result) -> Node:
        """A new node for a file that has none; it is up to the caller to say how it is found again."""
        node_id = st.st_ino
        if st.st_dev != self._device or node_id in self._by_id or not ROOT < node_id < 1 << 62:
            node_id = self._other_id(st.st_dev, st.st_ino)
        node = self._by_id[node_id] = Node(node_id, st)
        if node_id != st.st_ino:
            self._renumbered[st.st_dev, st.st_ino] = node
        return node

    def _other_id(self, device: int, ino: int) -> int:
        """An id in a range of its own that is free now; where only devices differ it is the same in every run."""
        node_id = (ino ^ device * 0x9E3779B97F4A7C15) & (1 << 62) - 1 | 1 << 62
        while node_id in self._by_id:
            node_id = node_id + 1 & (1 << 62) - 1 | 1 << 62
        return node_id

    def _abandon(self, node: Node) -> None:
        """The node's file is gone and its inode number belongs to another: found by nobody, re-opened never."""
        self._renumbered.pop((node.device, node.ino), None)
        node.device = -1

    # -- lifetime

    def opened(self, node_id: int) -> Node:
        """Note that the node is open once more: its descriptor is not evicted."""
        node = self._by_id[node_id]
        node.opened += 1
        return node

    def released(self, node: Node, fd: int) -> None:
        """Note that the node's open file fd is about to be closed."""
        node.opened -= 1
        if node.file == fd:
            node.file = -1

    def moved(self, parent_id: int, name: bytes) -> None:
        """name in parent_id is now some known node's (rename, link): learn it where nodes are found by name."""
        if not self._handles:
            try:
                node, _ = self.enter(parent_id, name)
            except OSError:
                return  # gone again already: whoever needs the node will see
            self.drop_unused(node)

    def pin(self, parent_id: int, name: bytes) -> None:
        """name is about to go: where nodes are found by name, its node must live on its descriptor from now on."""
        if self._handles:
            return
        try:
            node, _ = self.enter(parent_id, name)
        except OSError:
            return  # the removal itself will say why
        node.parent, node.name = None, b""
        self.drop_unused(node)

    def drop_unused(self, node: Node) -> None:
        """Remove a node that enter() made and nobody counted."""
        if node.lookups <= 0:
            fd = self._remove(node)
            if fd >= 0:
                os.close(fd)

    def forget(self, forgotten: Iterable[tuple[int, int]]) -> list[int]:
        """The kernel gives back lookups; nodes without any go. The caller closes the descriptors returned."""
        left = []
        for node_id, count in forgotten:
            node = self._by_id.get(node_id)
            if node is None or node is self.root:
                continue
            node.lookups -= count
            if node.lookups <= 0:
                fd = self._remove(node)
                if fd >= 0:
                    left.append(fd)
        return left

    def _remove(self, node: Node) -> int:
        if self._by_id.get(node.id) is node:
            del self._by_id[node.id]
        if self._renumbered.get((node.device, node.ino)) is node:
            del self._renumbered[node.device, node.ino]
        self._cached.pop(id(node), None)
        fd, node.fd = node.fd, -1
        return fd
