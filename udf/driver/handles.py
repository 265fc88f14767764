"""Open files and directories of one driver.

Owns: the numbers of handles and the snapshots of directories being listed. Must never: await. Called by: paths.py.
"""

from __future__ import annotations

import errno
import time

from udf.driver.fs import Attr
from udf.driver.tree import Node


class Listing:
    """A directory as it was when its listing began: offsets into it stay valid while the handle is open."""

    __slots__ = ("_changes", "_taken", "names")

    def __init__(self, names: list[tuple[str, Attr | None]], changes: int) -> None:
        self.names = names
        self._changes = changes
        self._taken = time.monotonic()

    def is_fresh(self, changes: int, valid: float) -> bool:
        """Whether the attributes that came with the names may still be told to the kernel."""
        return changes == self._changes and time.monotonic() - self._taken <= valid


class Handles:
    """The handles that the kernel has open."""

    def __init__(self) -> None:
        self._nodes: dict[int, Node] = {}
        self._listings: dict[int, Listing] = {}
        self._wholes: dict[int, bytes] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._nodes)

    def add(self, node: Node) -> int:
        """A new handle; the numbers are not used twice."""
        handle = self._next
        self._next += 1
        self._nodes[handle] = node
        return handle

    def node(self, handle: int) -> Node:
        """What the handle is open on."""
        try:
            return self._nodes[handle]
        except KeyError:
            raise OSError(errno.EBADF, "no such handle") from None

    def remove(self, handle: int) -> Node:
        """Close the handle."""
        node = self.node(handle)
        del self._nodes[handle]
        self._listings.pop(handle, None)
        self._wholes.pop(handle, None)
        return node

    def listing(self, handle: int) -> Listing | None:
        """The snapshot that the handle lists."""
        return self._listings.get(handle)

    def keep_listing(self, handle: int, listing: Listing) -> None:
        """Note the snapshot, unless the handle was closed meanwhile."""
        if handle in self._nodes:
            self._listings[handle] = listing

    def whole(self, handle: int) -> bytes | None:
        """What a file of unknown size holds for this handle."""
        return self._wholes.get(handle)

    def keep_whole(self, handle: int, data: bytes) -> bytes:
        """Note it, unless another read was quicker: all reads of one handle see the same."""
        if handle in self._nodes:
            return self._wholes.setdefault(handle, data)
        return data
