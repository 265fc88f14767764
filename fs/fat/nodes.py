"""Files and directories that somebody uses: one object for each, however it was reached.

Owns: inode numbers, the kernel's lookup counts, which entry is which node, and the directories that are open inside.
Must never: change the volume. Called by: operations.py, contents.py.

A node is found by its directory and the slot of its short entry, and lives while the kernel knows it, somebody has it
open, or a node below it lives. A file has no identity on a FAT volume but its place, so numbers mean something only
while the node lives; none is given out twice while the mount lasts.
"""

from __future__ import annotations

import errno
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from .damage import Damaged
from .directory import Directory
from .entries import DIRECTORY, Entry
from .stream import ChainStream, RootStream
from .turns import Turn, Users

if TYPE_CHECKING:
    from .ahead import Ahead
    from .chain import Chain
    from .change import Change
    from .volume import Volume

ROOT = 1
_INDEXED = 64  # directories whose index is kept although nothing is going on in them
_INDEXED_BYTES = 8 << 20  # of all of them together, on the volume; the last used one may be larger


class Node:
    """A file or a directory."""

    __slots__ = (
        "ahead", "chain", "cutting", "directory", "entry", "ino", "kids", "lookups", "opens", "parent", "removed",
        "stream", "subdirectories", "turn", "users", "version", "written",
    )  # fmt: skip

    def __init__(self, ino: int, parent: Node | None, entry: Entry | None) -> None:
        self.ino = ino
        self.parent = parent  # None: it is the root
        self.entry = entry  # as its directory has it now; of a removed one as it was. None: the root has none
        self.lookups = 0
        self.opens = 0  # handles, and requests that need it to stay
        self.kids = 0  # nodes whose parent it is
        self.removed = False  # it has no entry any more
        self.turn = Turn()  # of who writes to the file or changes or reads the directory
        # Of files
        self.chain: Chain | None = None
        self.users = Users()  # who reads
        self.cutting = False  # clusters are being taken away: whoever wants to read waits for the turn
        self.ahead: Ahead | None = None
        self.written = False  # since the last flush
        # Of directories
        self.directory: Directory | None = None
        self.stream: ChainStream | RootStream | None = None
        self.subdirectories = -1  # not counted
        self.version = 0  # counts the changes

    @property
    def is_directory(self) -> bool:
        return self.entry is None or bool(self.entry.attributes & DIRECTORY)

    @property
    def cluster(self) -> int:
        """The first; of the root 0, as in the entries of those below."""
        return self.entry.cluster if self.entry is not None else 0

    @property
    def file_entry(self) -> Entry:
        """The entry of what is not the root."""
        assert self.entry is not None
        return self.entry

    def forget_directory(self) -> None:
        """What is in memory of the directory may not be what the volume has."""
        if self.directory is not None:
            self.directory.forget()
        self.directory = self.stream = None
        self.subdirectories = -1

    def is_at_or_below(self, other: Node) -> bool:
        """Whether *other* is this node or a directory above it."""
        node: Node | None = self
        while node is not None:
            if node is other:
                return True
            node = node.parent
        return False


class Nodes:
    """All nodes of one mount."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self.root = Node(ROOT, None, None)
        self.by_ino: dict[int, Node] = {ROOT: self.root}
        self._by_place: dict[tuple[int, int], Node] = {}
        self._open: OrderedDict[int, Node] = OrderedDict()  # directories with an index, the last used one last

    def get(self, ino: int) -> Node:
        """The node of a request. ESTALE when this generation has not given out the number."""
        node = self.by_ino.get(ino)
        if node is None:
            raise OSError(errno.ESTALE, "not known any more")
        return node

    def directory_node(self, ino: int) -> Node:
        """The same, and it is a directory that is still there."""
        node = self.get(ino)
        if not node.is_directory:
            raise NotADirectoryError(errno.ENOTDIR, "not a directory")
        return node

    def file(self, ino: int) -> Node:
        """The same, and it is a file."""
        node = self.get(ino)
        if node.is_directory:
            raise IsADirectoryError(errno.EISDIR, "a directory")
        return node

    @staticmethod
    def _place(parent: Node, entry: Entry) -> tuple[int, int]:
        return parent.ino, entry.slot + entry.slots - 1

    def of(self, parent: Node, entry: Entry) -> Node:
        """The node of an entry that was just read from its directory. It stays only if it gets a lookup or an open."""
        node = self._by_place.get(self._place(parent, entry))
        if node is None:
            node = Node(self._volume.intents.number(), parent, entry)
            self.by_ino[node.ino] = node
            self._by_place[self._place(parent, entry)] = node
            parent.kids += 1
        return node

    def known(self, parent: Node, entry: Entry) -> Node | None:
        """The same, if there is one."""
        return self._by_place.get(self._place(parent, entry))

    def release(self, node: Node) -> None:
        """Forget a node that nobody needs."""
        while not node.lookups and not node.opens and not node.kids and node.parent is not None:
            if self.by_ino.pop(node.ino, None) is None:
                return
            self._unplace(node)
            self._open.pop(node.ino, None)
            if node.removed and node.chain is not None:
                self._volume.abandon(node.chain.first)
            if node.ahead is not None:
                node.ahead.drop()
            parent = node.parent
            parent.kids -= 1
            node = parent

    def _unplace(self, node: Node) -> None:
        if node.parent is not None and not node.removed:
            place = self._place(node.parent, node.file_entry)
            if self._by_place.get(place) is node:
                del self._by_place[place]

    @contextmanager
    def held(self, *nodes: Node | None) -> Iterator[None]:
        """They stay while something is done with them."""
        for node in nodes:
            if node is not None:
                node.opens += 1
        try:
            yield
        finally:
            for node in nodes:
                if node is not None:
                    node.opens -= 1
                    if not node.lookups and not node.opens:
                        self.release(node)

    def move(self, node: Node, parent: Node, entry: Entry) -> None:
        """Its entry is there now."""
        self._unplace(node)
        if node.parent is not parent:
            assert node.parent is not None
            old, node.parent = node.parent, parent
            parent.kids += 1
            old.kids -= 1
            self.release(old)
        node.entry = entry
        self._by_place[self._place(parent, entry)] = node

    def remove(self, node: Node) -> None:
        """It has no entry any more."""
        self._unplace(node)
        node.removed = True
        if node.is_directory:
            self._open.pop(node.ino, None)

    # ---- directories

    async def require_empty(self, node: Node) -> None:
        """OSError when something is in the directory."""
        with self.held(node):
            async with self.reading(node) as directory:
                if not await directory.is_empty():
                    raise OSError(errno.ENOTEMPTY, "the directory is not empty")

    async def open(self, node: Node) -> Directory:
        """A directory, ready to be used by who has its turn. Damaged; ENOENT when it is removed."""
        if node.removed:
            raise FileNotFoundError(errno.ENOENT, "the directory is removed")
        directory = node.directory
        if directory is None:
            volume = self._volume
            self._refuse_loop(node)
            stream = volume.stream(node.cluster)
            if isinstance(stream, ChainStream):
                await stream.open()
            directory = Directory(stream, volume.settings, is_fixed=isinstance(stream, RootStream))
            node.directory, node.stream = directory, stream
            self._open[node.ino] = node
            self._shrink()
        else:
            self._open.move_to_end(node.ino)
        return directory

    def _refuse_loop(self, node: Node) -> None:
        """Raise Damaged when a directory of a bad image is one of those above it, or one that is open elsewhere."""
        if node.parent is None:
            return
        cluster, root = node.cluster, self._volume.geometry.root_cluster
        if not cluster or cluster == root:
            raise Damaged("a directory leads back to the root")
        above = node.parent
        while above.parent is not None:
            if above.cluster == cluster:
                raise Damaged("a directory contains itself")
            above = above.parent
        for other in self._open.values():
            if other is not node and other.cluster == cluster and other.parent is not None:
                raise Damaged("two directories are the same one")

    def _shrink(self) -> None:
        total = sum(node.stream.size for node in self._open.values() if node.stream is not None)
        for ino, node in list(self._open.items())[:-1]:
            if len(self._open) <= _INDEXED and total <= _INDEXED_BYTES:
                return
            if not node.turn.held:
                total -= node.stream.size if node.stream is not None else 0
                del self._open[ino]
                if node.directory is not None:
                    node.directory.forget()
                node.directory = node.stream = None

    @asynccontextmanager
    async def reading(self, node: Node) -> AsyncIterator[Directory]:
        """A directory, with nobody changing it meanwhile."""
        async with node.turn:
            yield await self.open(node)

    @asynccontextmanager
    async def changing(self, node: Node, change: Change) -> AsyncIterator[Directory]:
        """A directory that is changed, as a part of this change."""
        async with node.turn:
            directory = await self.open(node)
            stream = node.stream
            assert stream is not None
            change.nodes.append(node)
            node.version += 1
            stream.change, stream.deletes_last = change, False
            try:
                yield directory
            finally:
                stream.change = None
