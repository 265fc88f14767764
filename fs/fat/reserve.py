"""Clusters for files that grow: taken, made part of the chain ahead of the size, and given back when too many.

Owns: how many clusters a growing file gets, and which files have more than their size needs.
Must never: change an entry's size, or leave a file with too much without the next generation knowing.
Called by: contents.py with the file's turn; operations.py and volume.py when things are brought into order.

The chain of a file may be longer than its size for a while; that is harmless, and fsck.fat cuts it. So a program that
appends pays for the table once in a while and not with each write. The chain of a file that had none is nobody's until
its entry names it. Both are in the state store, so that the next generation gives back what was not used.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from .chain import Chain
from .change import Change, Run
from .entries import DIRECTORY, END, FREE, SLOT, VOLUME, cluster_of
from .nodes import Node, Nodes
from .stream import ChainStream

if TYPE_CHECKING:
    from .volume import Volume

_LEAST = 32 * 1024  # bytes of a write that looks as if more of its kind will come
_FIRST = 512 * 1024  # bytes that a small file gets in advance; a larger one as much as it has, but at most
_LARGEST = 8 * 1024 * 1024
_SHARE = 16  # at most this part of what is free
_BATCH = 32768  # clusters that are linked at once
_FILES = 64  # that may have clusters in advance

Place = tuple[int, int]
"""First cluster of a directory (0: the root) and slot of the short entry."""


def place_of(node: Node) -> Place:
    """How the next generation finds a file."""
    assert node.parent is not None
    entry = node.file_entry
    return node.parent.cluster, entry.slot + entry.slots - 1


class Reserve:
    """The files of one volume that have clusters in advance."""

    def __init__(self, volume: Volume, nodes: Nodes) -> None:
        self._volume = volume
        self._nodes = nodes
        self._files: dict[int, Node] = {}  # by inode number, the oldest first

    def surplus(self) -> int:
        """How many clusters files have in advance."""
        clusters = self._volume.clusters
        return sum(
            max(0, node.chain.known - clusters(node.file_entry.size))
            for node in self._files.values()
            if node.chain is not None
        )

    # ---- growing

    async def take(self, node: Node, chain: Chain, missing: int, appended: int) -> list[Run]:
        """At least one and at most a bit more than the missing clusters. *appended*: bytes of this write at the end."""
        volume, goal = self._volume, chain.last + 1 if chain.known else 0
        extra = 0
        if appended >= _LEAST and len(self._files) < _FILES:
            extra = volume.clusters(min(max(node.file_entry.size, _FIRST), _LARGEST))
            extra = min(extra, volume.free.so_far // _SHARE)
        for want in (missing + extra, missing) if extra else (missing,):
            try:
                return await volume.take(want, goal)
            except OSError as exc:
                if exc.errno != errno.ENOSPC:
                    raise
        await self.give_back(others_than=node)
        await volume.reclaim()
        return await volume.free.take(missing, goal, partial=True)

    async def link(self, node: Node, chain: Chain, runs: list[Run]) -> None:
        """Make taken clusters part of the chain. What is not is put back."""
        volume = self._volume
        while runs:
            batch, runs = _split(runs, _BATCH)
            first = 0 if chain.first else batch[0][0]
            try:
                async with volume.change(batch) as change:
                    await volume.table.link(change, batch, chain.last)
                    if first:
                        change.orphans.append(first)
                        volume.in_use.add(first)  # before it is recorded: a sync would free it as soon as it is
                    elif not node.removed and node.cluster:
                        change.ahead.append(place_of(node))
            except BaseException:
                volume.free.put_back(runs)
                volume.in_use.discard(first)
                raise
            chain.append(batch)
        if not node.removed and node.ino not in self._files:
            self._files[node.ino] = node
            node.kids += 1  # it stays: another node of the same file would not know of this

    def enter(self, change: Change, node: Node, chain: Chain, fields: dict[str, int]) -> None:
        """In the change that gives the entry its new size: it names the chain, and what is not too much is its own."""
        if node.removed or not chain.first:
            return
        has_more = chain.known > self._volume.clusters(fields["size"])
        if not node.cluster:
            fields["cluster"] = chain.first
            change.adopted.append(chain.first)
            if has_more:
                change.ahead.append(place_of(node))
        elif not has_more and node.ino in self._files:
            change.not_ahead.append(place_of(node))

    def entered(self, node: Node, chain: Chain) -> None:
        """That change is done."""
        if not node.removed:
            self._volume.in_use.discard(chain.first)
            if chain.known <= self._volume.clusters(node.file_entry.size):
                self._drop(node)

    # ---- giving back

    def has(self, node: Node) -> bool:
        """Whether a file has clusters in advance."""
        return node.ino in self._files

    def forget(self, change: Change, node: Node) -> None:
        """In a change that takes the entry away, or cuts the file: there is nothing in advance after it."""
        if self._drop(node):
            change.not_ahead.append(place_of(node))

    def moved(self, change: Change, node: Node, parent: Node, slot: int) -> None:
        """In a change that gives the file another entry."""
        if node.ino in self._files:
            change.not_ahead.append(place_of(node))
            change.ahead.append((parent.cluster, slot))

    async def give_back(self, *, others_than: Node | None = None) -> None:
        """Cut all files to what they need, but those that are being written to now."""
        for node in list(self._files.values()):
            if node is not others_than and not node.turn.held:
                async with node.turn:
                    await self.trim(node)

    async def trim(self, node: Node) -> None:
        """Cut a file to what it needs; its turn is ours."""
        volume, chain = self._volume, node.chain
        if node.ino not in self._files or chain is None or volume.read_only or volume.device.gone:
            return
        if not node.cluster or node.removed:
            # Nobody's chain: it was never entered, or is not any more.
            self._drop(node)
            if not node.removed:
                node.chain = None
                volume.abandon(chain.first)
            return
        keep = max(1, volume.clusters(node.file_entry.size))
        async with volume.change() as change:
            is_there = not node.removed  # it may have gone while we waited
            if is_there:
                await volume.release(change, chain, keep)
                change.not_ahead.append(place_of(node))
        self._drop(node)
        if is_there:
            chain.cut(keep)

    def _drop(self, node: Node) -> bool:
        if self._files.pop(node.ino, None) is None:
            return False
        node.kids -= 1
        self._nodes.release(node)
        return True


async def cut_left(volume: Volume, place: Place) -> None:
    """Cut a file to which the generation before gave clusters in advance. Nobody uses the volume yet."""
    cluster, slot = place
    async with volume.change() as change:
        change.not_ahead.append(place)
        stream = volume.stream(cluster)
        if isinstance(stream, ChainStream):
            await stream.open()
        raw = await stream.read(slot * SLOT, SLOT)
        if raw[0] in (FREE, END) or raw[11] & (VOLUME | DIRECTORY):
            return  # it cannot be: the record says what was, and the change before it is complete
        first, size = cluster_of(raw, volume.settings), int.from_bytes(raw[28:], "little")
        chain, keep = volume.chain(first), volume.clusters(size)
        if keep and await chain.reach(keep) == keep:
            await volume.release(change, chain, keep)


def _split(runs: list[Run], most: int) -> tuple[list[Run], list[Run]]:
    """The first runs with not more than so many clusters, and the others. Runs are not cut, but one is always there."""
    total = 0
    for n, (_, count) in enumerate(runs):
        total += count
        if total > most and n:
            return runs[:n], runs[n:]
    return runs, []
