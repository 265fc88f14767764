"""Who may work on which path at the same time.

Owns: the rule that a path which a verb was given stays valid until the verb returns. Must never: call the driver.
Called by: paths.py.

Three steps, always taken in this order, so that nobody waits in a circle: (1) the names that an operation is about,
all at once; (2) the nodes whose paths it uses; (3) for a rename or a removal: the nodes that lose their path, which are
frozen until every verb at or below them has returned, while new ones wait.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

import trio

from udf.driver.tree import Node, Tree


class Gate:
    """The waits of one tree."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._active: set[Node] = set()
        self._names: set[Hashable] = set()
        self._frozen = 0
        self._waiting = 0
        self._changed = trio.Event()

    def try_enter(self, node: Node) -> str | None:
        """Begin to use the node's path and return it; None when a rename is at work there (then `enter` waits)."""
        if self._frozen and any(above.frozen for above in self._tree.above(node)):
            return None
        path = self._tree.path(node)
        if path is None:
            raise OSError(errno.ESTALE, "removed")
        node.busy += 1
        if node.busy == 1:
            self._active.add(node)
        return path

    async def enter(self, node: Node) -> str:
        """Begin to use the node's path, as soon as it is settled."""
        while (path := self.try_enter(node)) is None:
            await self._wait()
        return path

    def leave(self, node: Node) -> None:
        """End what `enter` began."""
        node.busy -= 1
        if node.busy == 0:
            self._active.discard(node)
            if not node.lookups:
                self._tree.prune(node)
        if self._waiting:
            self._notify()

    def names(self, *names: Hashable) -> _Names:
        """Be the only one who works on these names: `async with`."""
        return _Names(self, names)

    @asynccontextmanager
    async def frozen(self, *nodes: Node | None) -> AsyncIterator[None]:
        """Be the only one who works at or below these nodes."""
        wanted = {node for node in nodes if node is not None}
        while any(node.frozen for node in wanted):
            await self._wait()
        for node in wanted:
            node.frozen = True
        self._frozen += len(wanted)
        try:
            while any(not wanted.isdisjoint(self._tree.above(active)) for active in self._active):
                await self._wait()
            yield
        finally:
            for node in wanted:
                node.frozen = False
            self._frozen -= len(wanted)
            if self._waiting:
                self._notify()

    async def _wait(self) -> None:
        self._waiting += 1
        try:
            await self._changed.wait()
        finally:
            self._waiting -= 1

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class _Names:
    """Names being worked on. A class and not a generator: every lookup passes here."""

    __slots__ = ("_gate", "_names")

    def __init__(self, gate: Gate, names: tuple[Hashable, ...]) -> None:
        self._gate = gate
        self._names = names

    async def __aenter__(self) -> None:
        taken = self._gate._names
        # All or none of them, so that two who want the same names cannot wait for each other.
        while not taken.isdisjoint(self._names):
            await self._gate._wait()
        taken.update(self._names)

    async def __aexit__(self, *_: object) -> None:
        self._gate._names.difference_update(self._names)
        if self._gate._waiting:
            self._gate._notify()
