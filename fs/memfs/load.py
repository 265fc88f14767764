"""A memfs from its journal: what the process before had acknowledged.

Owns what each record means. A record that changes what is not known is skipped: a compaction was under way, and what it
changed is told completely further on (snapshot.py). Called once, by operations.py, before the first request: how long
this takes is part of the pause that programs see, so the loop over the records is flat.
"""

from __future__ import annotations

import gc
import stat
import struct
from collections.abc import Callable, Iterable

from udf import UserError

from . import records
from .arena import Arena
from .contents import Contents
from .nodes import Directory, File, Node, Symlink
from .tree import Tree


def load(tree: Tree, arena: Arena) -> bool:
    """Fill the tree and the arena. False when there is nothing yet; UserError when what is there makes no sense."""
    was_enabled = gc.isenabled()
    gc.disable()  # all that is made here stays, so looking through it again and again is only a loss
    try:
        loader = _Loader(arena)
        loader.read(arena.kept.journal.replay())
        if not loader.nodes:
            return False
        loader.finish(tree)
    except (LookupError, AttributeError, struct.error, ValueError, AssertionError) as error:
        raise UserError(f"the state store does not hold a memfs that can be served: {error}") from error
    finally:
        if was_enabled:
            gc.enable()
    gc.freeze()
    return True


class _Loader:
    def __init__(self, arena: Arena) -> None:
        self.nodes: dict[int, Node] = {}
        self._arena = arena
        self._last_ino = 0
        self._parents: dict[int, int] = {}  # of directories
        self._slots: dict[int, Contents] = {}
        self._moved: Contents | None = None
        # Names of nodes that are told further on: their entry has the inode number in place of the node.
        self._unresolved: list[tuple[Directory, bytes, int, int]] = []

    def read(self, journal: Iterable[bytes]) -> None:
        """Do what each record says."""
        handlers: dict[int, Callable[[bytes], None]] = {
            records.CREATE_MORE: self._create_more,
            records.LINK: self._link,
            records.UNLINK: self._unlink,
            records.RENAME: self._rename,
            records.ATTRIBUTES: self._attributes,
            records.XATTR: self._xattr,
            records.GONE: self._gone,
            records.HOLD: self._hold,
            records.PAGES: self._pages,
            records.MOVE: self._move,
            records.BATCH: self._batch,
            records.NODE: self._node,
            records.NAMES: self._names,
            records.STATE: self._state,
        }
        create, unpack, size = records.CREATE, records.create.unpack_from, records.create.size
        for record in journal:
            kind = record[0]
            if kind == create:
                _, mode, uid, gid, rdev, ino, parent, offset, now = unpack(record)
                self._create(mode, uid, gid, rdev, ino, parent, offset, now, record[size:], b"")
            else:
                handlers[kind](record)

    def _create(
        self,
        mode: int,
        uid: int,
        gid: int,
        rdev: int,
        ino: int,
        parent_ino: int,
        offset: int,
        now: int,
        name: bytes,
        more: bytes,
    ) -> None:
        node: Node
        kind = mode & 0o170000
        if kind == stat.S_IFREG:
            node = File(ino, mode, uid, gid, now)
        elif kind == stat.S_IFDIR:
            node = Directory(ino, mode, uid, gid, now)
            self._parents[ino] = parent_ino
        elif kind == stat.S_IFLNK:
            node = Symlink(ino, more, uid, gid, now)
        else:
            node = Node(ino, mode, uid, gid, now)
            node.rdev = rdev
        node.nlink = 1
        if more and kind != stat.S_IFLNK:
            node.xattrs = records.unpack_xattrs(more)
        parent = self._directory(parent_ino)
        self.nodes[ino] = node
        self._last_ino = max(self._last_ino, ino)
        if parent is not None:
            parent.entries[name] = (offset, node)
            parent.next_offset = offset + 1
            parent.mtime = parent.ctime = now
        if kind == stat.S_IFDIR:
            node.nlink = 2
            if parent is not None:
                parent.nlink += 1

    def _create_more(self, record: bytes) -> None:
        _, mode, uid, gid, rdev, ino, parent, offset, now, length = records.create_more.unpack_from(record)
        name = record[records.create_more.size :][:length]
        more = record[records.create_more.size + length :]
        self._create(mode, uid, gid, rdev, ino, parent, offset, now, name, more)

    def _directory(self, ino: int) -> Directory | None:
        node = self.nodes.get(ino)
        assert node is None or isinstance(node, Directory)
        return node

    def _enter(self, parent: Directory, name: bytes, offset: int, ino: int) -> None:
        node = self.nodes.get(ino)
        if node is None:
            self._unresolved.append((parent, name, offset, ino))
            node = parent  # never seen: `finish` puts the right one there
        parent.entries[name] = (offset, node)

    def _link(self, record: bytes) -> None:
        _, ino, parent_ino, offset, now = records.link.unpack_from(record)
        node, parent = self.nodes.get(ino), self._directory(parent_ino)
        if node is not None:
            node.nlink += 1
            node.ctime = now
        if parent is not None:
            self._enter(parent, record[records.link.size :], offset, ino)
            parent.next_offset = offset + 1
            parent.mtime = parent.ctime = now

    def _unlink(self, record: bytes) -> None:
        _, flags, parent_ino, ino, now = records.unlink.unpack_from(record)
        parent = self._directory(parent_ino)
        if parent is not None:
            parent.entries.pop(record[records.unlink.size :], None)
            parent.mtime = parent.ctime = now
            if flags & records.IS_DIRECTORY:
                parent.nlink -= 1
        self._unlinked(ino, flags, now)

    def _unlinked(self, ino: int, flags: int, now: int) -> None:
        node = self.nodes.get(ino)
        if node is not None:
            node.ctime = now
            node.nlink = 0 if isinstance(node, Directory) else node.nlink - 1
            if flags & records.IS_GONE:
                self._end(node)

    def _end(self, node: Node) -> None:
        del self.nodes[node.ino]
        if isinstance(node, File) and node.contents is not None:
            del self._slots[node.contents.slot]

    def _rename(self, record: bytes) -> None:
        _, flags, length, parent_ino, new_parent_ino, ino, old, offset, now = records.rename.unpack_from(record)
        name = record[records.rename.size :][:length]
        new_name = record[records.rename.size + length :]
        parent, new_parent = self._directory(parent_ino), self._directory(new_parent_ino)
        if flags & records.EXCHANGE:
            self._replace(parent, name, old)
            self._replace(new_parent, new_name, ino)
            self._moved_to(old, flags & records.OLD_IS_DIRECTORY, new_parent, parent, parent_ino)
        else:
            if parent is not None:
                parent.entries.pop(name, None)
            if old:
                self._replace(new_parent, new_name, ino)
                if new_parent is not None and flags & records.OLD_IS_DIRECTORY:
                    new_parent.nlink -= 1
            elif new_parent is not None:
                self._enter(new_parent, new_name, offset, ino)
                new_parent.next_offset = offset + 1
        if old in self.nodes:
            self.nodes[old].ctime = now
            if not flags & records.EXCHANGE:
                self._unlinked(old, flags, now)
        self._moved_to(ino, flags & records.IS_DIRECTORY, parent, new_parent, new_parent_ino)
        for node in (self.nodes.get(ino), parent, new_parent):
            if node is not None:
                node.ctime = now
        for directory in (parent, new_parent):
            if directory is not None:
                directory.mtime = now

    def _replace(self, parent: Directory | None, name: bytes, ino: int) -> None:
        entry = parent.entries.get(name) if parent is not None else None
        if parent is not None and entry is not None:
            self._enter(parent, name, entry[0], ino)

    def _moved_to(
        self, ino: int, is_directory: int, parent: Directory | None, new_parent: Directory | None, new_ino: int
    ) -> None:
        if is_directory and parent is not new_parent:
            if parent is not None:
                parent.nlink -= 1
            if new_parent is not None:
                new_parent.nlink += 1
        if is_directory and ino in self.nodes:
            self._parents[ino] = new_ino

    def _attributes(self, record: bytes) -> None:
        _, mode, uid, gid, ino, atime, mtime, ctime = records.attributes.unpack_from(record)
        node = self.nodes.get(ino)
        if node is not None:
            node.mode, node.uid, node.gid = mode, uid, gid
            node.atime, node.mtime, node.ctime = atime, mtime, ctime

    def _xattr(self, record: bytes) -> None:
        _, is_kept, length, mode, ino, ctime = records.xattr.unpack_from(record)
        node = self.nodes.get(ino)
        if node is None:
            return
        name = record[records.xattr.size :][:length]
        values = node.xattrs or {}
        if is_kept:
            values[name] = record[records.xattr.size + length :]
        else:
            values.pop(name, None)
        node.xattrs = values or None
        node.mode = mode
        node.ctime = ctime

    def _gone(self, record: bytes) -> None:
        _, ino = records.gone.unpack(record)
        if ino in self.nodes:
            self._end(self.nodes[ino])

    def _hold(self, record: bytes) -> None:
        _, ino, slot = records.hold.unpack(record)
        node = self.nodes.get(ino)
        if node is not None:
            assert isinstance(node, File)
            node.contents = self._slots[slot] = Contents(self._arena, slot)

    def _pages(self, record: bytes) -> None:
        _, slot, _ = records.pages.unpack_from(record)
        contents = self._slots.get(slot)
        if contents is not None:
            for page, place, count in records.run.iter_unpack(record[records.pages.size :]):
                contents.adopt_run(page, place, count)

    def _move(self, record: bytes) -> None:
        _, slot, new_slot, size = records.move.unpack(record)
        contents = self._slots.pop(slot, None)
        if contents is not None:
            contents.adopt_move(new_slot, size)
            self._slots[new_slot] = self._moved = contents

    def _batch(self, record: bytes) -> None:
        self.read(records.split(record))

    def _node(self, record: bytes) -> None:
        (
            _, mode, uid, gid, rdev, nlink, ino, atime, mtime, ctime, first, second, runs, xattrs, target
        ) = records.node.unpack_from(record)  # fmt: skip
        at = records.node.size
        behind_runs = at + runs * records.run.size
        behind_xattrs = behind_runs + xattrs
        node: Node
        kind = mode & 0o170000
        if kind == stat.S_IFREG:
            node = File(ino, mode, uid, gid, ctime)
            if first:
                node.contents = self._slots[first - 1] = Contents(self._arena, first - 1)
                if runs == 1:  # as most have
                    node.contents.adopt_runs([records.run.unpack_from(record, at)])
                elif runs:
                    node.contents.adopt_runs(list(records.run.iter_unpack(record[at:behind_runs])))
        elif kind == stat.S_IFDIR:
            node = Directory(ino, mode, uid, gid, ctime)
            node.next_offset = second
            self._parents[ino] = first
        elif kind == stat.S_IFLNK:
            node = Symlink(ino, record[behind_xattrs : behind_xattrs + target], uid, gid, ctime)
        else:
            node = Node(ino, mode, uid, gid, ctime)
            node.rdev = rdev
        node.mode = mode
        node.nlink = nlink
        node.atime = atime
        node.mtime = mtime
        if xattrs:
            node.xattrs = records.unpack_xattrs(record[behind_runs:behind_xattrs])
        self.nodes[ino] = node
        self._last_ino = max(self._last_ino, ino)

    def _names(self, record: bytes) -> None:
        _, ino, count = records.names.unpack_from(record)
        parent = self._directory(ino)
        if parent is None:
            return
        at = records.names.size + count * records.entry.size
        nodes, entries = self.nodes, parent.entries
        for offset, child, length in records.entry.iter_unpack(record[records.names.size : at]):
            name = record[at : at + length]
            node = nodes.get(child)
            if node is None:
                self._enter(parent, name, offset, child)
            else:
                entries[name] = (offset, node)
            at += length

    def _state(self, record: bytes) -> None:
        self._last_ino = max(self._last_ino, records.state.unpack(record)[1])

    def finish(self, tree: Tree) -> None:
        """Join what the records left open, and hand all of it over."""
        nodes = self.nodes
        for parent, name, offset, ino in reversed(self._unresolved):
            entry = parent.entries.get(name)
            # A later record may have given the name, and its place, to another node or to none.
            if entry is not None and entry == (offset, parent):
                parent.entries[name] = (offset, nodes[ino])
        runs: list[tuple[int, int]] = []
        used: set[int] = set()
        table = self._arena.kept.table
        for node in nodes.values():
            if isinstance(node, File):
                contents = node.contents
                if contents is not None:
                    stamp = contents.adopt_words(table, used, runs)
                    if stamp:
                        node.mtime = stamp
                        node.ctime = max(node.ctime, stamp)
            elif isinstance(node, Directory):
                parent_node = nodes.get(self._parents[node.ino], nodes[1])  # of a removed one it may be gone
                assert isinstance(parent_node, Directory)
                node.parent = parent_node
                node.adopt_order()
        self._arena.kept.adopt_slots(used)
        self._arena.adopt(runs)
        if self._moved is not None:
            self._moved.zero_tail()
        tree.adopt(nodes, self._last_ino)
