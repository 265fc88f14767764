"""Giving another name: to something in its directory or another one, over something else, or in exchange.

Owns: the order in which the entries of a renaming are written. Must never: leave a moment in which what was renamed
has no entry. Called by: operations.py, once for each renaming.

The new entry is durable before the old one goes, for a device may well write the two the other way round. What is
replaced keeps its place and its spelling: its entry gets the other's contents in one write, as Linux does it.
"""

from __future__ import annotations

import errno
import time
from contextlib import AsyncExitStack

from . import dots, names
from .contents import Contents
from .directory import Directory
from .entries import Entry
from .intents import Exchange
from .nodes import Node, Nodes
from .volume import Volume

NOREPLACE, EXCHANGE = 1, 2


class Rename:
    """One renaming."""

    def __init__(self, volume: Volume, nodes: Nodes, contents: Contents, parents: tuple[Node, Node]) -> None:
        self._volume = volume
        self._nodes = nodes
        self._contents = contents
        self._parent, self._new_parent = parents
        self._held: list[Node] = []
        self.stale: list[tuple[Node, bytes]] = []  # names by which the kernel knows something else than is there now
        self._moves: list[tuple[Node, Node, Entry]] = []  # what to note when all is done
        self._removed: Node | None = None
        self._reserve = contents.reserve

    async def run(self, name: str, new_name: str, flags: int) -> None:
        """Do it all."""
        try:
            async with self._volume.change() as change:
                self._change = change
                async with AsyncExitStack() as stack:
                    self._old = await stack.enter_async_context(self._nodes.changing(self._parent, change))
                    self._new = self._old
                    if self._new_parent is not self._parent:
                        self._new = await stack.enter_async_context(self._nodes.changing(self._new_parent, change))
                    await self._run(name, new_name, flags)
                now = time.time_ns()
                await self._contents.touch(change, self._parent, now)
                if self._new_parent is not self._parent:
                    await self._contents.touch(change, self._new_parent, now)
                self._parent.subdirectories = self._new_parent.subdirectories = -1
            for node, parent, entry in self._moves:
                self._nodes.move(node, parent, entry)
            if self._removed is not None:
                self._nodes.remove(self._removed)
        finally:
            for node in self._held:
                node.opens -= 1
                self._nodes.release(node)

    def key(self, name: str, new_name: str) -> Exchange:
        """What the next generation knows an exchange by."""
        return self._parent.cluster, names.to_kernel(name), self._new_parent.cluster, names.to_kernel(new_name)

    async def _run(self, name: str, new_name: str, flags: int) -> None:
        self._new_name = new_name
        source, target = await self._old.find(name), await self._new.find(new_name)
        if source is None:
            raise FileNotFoundError(errno.ENOENT, "no such name")
        node = self._hold(self._parent, source)
        self._spelled(self._parent, source, name)
        if target is not None:
            self._spelled(self._new_parent, target, new_name)
        if target is not None and flags & NOREPLACE:
            raise FileExistsError(errno.EEXIST, "the name exists")
        if node.is_directory and self._new_parent.is_at_or_below(node):
            raise OSError(errno.EINVAL, "a directory cannot be moved below itself")
        if target is None:
            if flags & EXCHANGE:
                raise FileNotFoundError(errno.ENOENT, "there is nothing to exchange it with")
            await self._move(node, source, new_name)
            return
        other = self._hold(self._new_parent, target)
        if other is node:
            if not flags & EXCHANGE and target.name != new_name:
                self._note(node, self._parent, await self._careful(source, new_name))
        elif flags & EXCHANGE:
            if other.is_directory and self._parent.is_at_or_below(other):
                raise OSError(errno.EINVAL, "a directory cannot be moved below itself")
            self._change.exchange = self.key(name, new_name)
            await self._exchange(node, source, other, target)
        else:
            await self._replace(node, source, other, target)

    def _spelled(self, parent: Node, entry: Entry, name: str) -> None:
        """The kernel renames what it calls *name*; it may know it by the entry's own spelling too."""
        if entry.name != name:
            self.stale += [(parent, names.to_kernel(entry.name)), (parent, names.to_kernel(name))]

    def _hold(self, parent: Node, entry: Entry) -> Node:
        node = self._nodes.of(parent, entry)
        node.opens += 1
        self._held.append(node)
        return node

    def _note(self, node: Node, parent: Node, entry: Entry) -> None:
        """This entry is the node's when all is done."""
        self._reserve.moved(self._change, node, parent, entry.slot + entry.slots - 1)
        self._moves.append((node, parent, entry))
        if parent is self._new_parent:
            self._spelled(parent, entry, self._new_name)

    async def _careful(self, source: Entry, new_name: str) -> Entry:
        """Rename within the directory."""
        stream = self._parent.stream
        assert stream is not None
        stream.deletes_last = True
        return await self._old.rename(source, new_name)

    async def _move(self, node: Node, source: Entry, new_name: str) -> None:
        """To a name that nothing has."""
        if self._new is self._old:
            self._note(node, self._parent, await self._careful(source, new_name))
            return
        entry = await self._new.insert(new_name, **_fields(source))
        await self._set_parent(node, self._new_parent)
        self._change.barrier()
        await self._old.remove(source)
        self._note(node, self._new_parent, entry)

    async def _set_parent(self, node: Node, parent: Node) -> None:
        """A directory says itself what is above it."""
        if not node.is_directory or self._new_parent is self._parent:
            return
        async with self._nodes.changing(node, self._change):
            stream = node.stream
            assert stream is not None
            await dots.set_parent(stream, parent.cluster, self._volume.settings)

    async def _replace(self, node: Node, source: Entry, other: Node, target: Entry) -> None:
        """Over something, which goes."""
        if other.is_directory:
            if not node.is_directory:
                raise IsADirectoryError(errno.EISDIR, "a directory is there")
            if self._parent.is_at_or_below(other):
                raise OSError(errno.ENOTEMPTY, "the directory is not empty")  # what is renamed is in it
            await self._nodes.require_empty(other)
        elif node.is_directory:
            raise NotADirectoryError(errno.ENOTDIR, "what is there is no directory")
        entry = await self._new.update(target, **_fields(source))
        await self._set_parent(node, self._new_parent)
        self._change.barrier()
        await self._old.remove(source)
        await self._contents.give_up(self._change, target, other, is_open=other.opens > 1)
        self._removed = other
        self._note(node, self._new_parent, entry)

    async def _exchange(self, node: Node, source: Entry, other: Node, target: Entry) -> None:
        """Each gets the other's place. A third entry keeps what is replaced first, until both are durable."""
        old, new, change = self._old, self._new, self._change
        spare = await self._spare(old, source)
        change.barrier()
        first = await old.update(source, **_fields(target))
        await self._set_parent(other, self._parent)
        if spare is not None:
            change.barrier()
        second = await new.update(target, **_fields(source))
        await self._set_parent(node, self._new_parent)
        if spare is not None:
            change.barrier()
            await old.remove(spare)
        self._note(node, self._new_parent, second)
        self._note(other, self._parent, first)

    async def _spare(self, directory: Directory, source: Entry) -> Entry | None:
        """An entry for the same contents; none where there is no room for it, or no need."""
        name = f"~udf{source.slot:05x}"
        try:
            return None if await directory.find(name) is not None else await directory.insert(name, **_fields(source))
        except OSError as exc:
            if exc.errno != errno.ENOSPC:
                raise
            return None


def _fields(entry: Entry) -> dict[str, int]:
    """Everything of an entry but its name and its place."""
    return {
        "attributes": entry.attributes,
        "cluster": entry.cluster,
        "size": entry.size,
        "created_ns": entry.created_ns,
        "modified_ns": entry.modified_ns,
        "accessed_ns": entry.accessed_ns,
    }
