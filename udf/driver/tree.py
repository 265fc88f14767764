"""The known part of a driver's tree: which node id is which path.

Owns: node ids, names, lookup counts and open counts; a rename moves a whole subtree by moving one name.
Must never: await, or call the driver. Called by: paths.py, and nothing here depends on its runtime.

A node lives as long as the kernel counts a lookup of it, a handle is open, or a child of it lives. What the kernel has
forgotten gets the same id again when it is looked up anew: ids are derived from the parent's id and the name, or from
the identity that the driver gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

from udf.errors import InternalError

ROOT = 1
_ID_BITS = (1 << 63) - 1
_FIRST_ID = 2


class Node:
    """One file or directory. `names` are its places: several for hard links, none once it is removed."""

    __slots__ = (
        "busy",
        "children",
        "frozen",
        "hidden",
        "id",
        "identity",
        "is_dated",
        "is_dir",
        "is_sized",
        "lookups",
        "names",
        "opens",
    )

    def __init__(self, node_id: int, identity: int | None, is_dir: bool) -> None:
        self.id = node_id
        self.identity = identity
        self.is_dir = is_dir
        self.is_dated = False  # the driver tells a time stamp of its own
        self.is_sized = True  # its size is known; else each open reads it anew, as a whole
        self.names: list[tuple[Node, str]] = []
        self.children: dict[str, Node] = {}
        self.lookups = 0
        self.opens = 0
        self.busy = 0  # verbs at work on its path
        self.frozen = False  # a rename or removal is at work: new verbs wait
        self.hidden: str | None = None  # the path under which a removed but open file lives on


class Tree:
    """All known nodes."""

    def __init__(self) -> None:
        self.root = Node(ROOT, None, True)
        self.root.lookups = 1  # the kernel never forgets the root
        self._nodes: dict[int, Node] = {ROOT: self.root}
        self._identities: dict[int, Node] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def get(self, node_id: int) -> Node | None:
        """The node with this id, if it is known."""
        return self._nodes.get(node_id)

    def path(self, node: Node) -> str | None:
        """A path of the node; None if it has been removed."""
        if node.hidden is not None:
            return node.hidden
        parts: list[str] = []
        while node is not self.root:
            if not node.names:
                return None
            parent, name = node.names[0]
            parts.append(name)
            node = parent
        return "/" + "/".join(reversed(parts))

    def child_path(self, parent: Node, name: str) -> str | None:
        """The path of a name in a directory."""
        path = self.path(parent)
        if path is None:
            return None
        return path + name if path == "/" else f"{path}/{name}"

    def above(self, node: Node) -> Iterator[Node]:
        """The node and every directory above its first name."""
        while True:
            yield node
            if not node.names:
                return
            node = node.names[0][0]

    def bind(self, parent: Node, name: str, is_dir: bool, identity: int | None) -> Node:
        """The node at this name, new if it must be; counts nothing yet."""
        known = parent.children.get(name)
        if known is not None and known.is_dir == is_dir and identity in (None, known.identity):
            return known
        if known is not None:
            # Another file has taken the name behind our back; the old node keeps its id and loses the name.
            self.unbind(parent, name)
        node = self._identities.get(identity) if identity is not None and not is_dir else None
        if node is None or node.is_dir:
            node = Node(self._new_id(parent, name, identity), identity, is_dir)
            self._nodes[node.id] = node
            if identity is not None and not is_dir:
                self._identities.setdefault(identity, node)
        self.attach(node, parent, name)
        return node

    def attach(self, node: Node, parent: Node, name: str) -> None:
        """Give the node one more name."""
        node.names.append((parent, name))
        parent.children[name] = node

    def unbind(self, parent: Node, name: str) -> Node | None:
        """Take the name away; the node that had it, if it was known."""
        node = parent.children.pop(name, None)
        if node is None:
            return None
        node.names.remove((parent, name))
        self.prune(node)
        self.prune(parent)
        return node

    def move(self, parent: Node, name: str, new_parent: Node, new_name: str) -> None:
        """What rename(2) did: the target's name is gone, the moved node has it, with all that is below."""
        target = new_parent.children.get(new_name)
        moved = parent.children.get(name)
        if target is not None and target is moved:
            return  # two names of one file: POSIX leaves both
        if target is not None:
            # Not yet pruned: the directory may be known only for what is in it.
            del new_parent.children[new_name]
            target.names.remove((new_parent, new_name))
        if moved is not None:
            position = moved.names.index((parent, name))
            del parent.children[name]
            moved.names[position] = (new_parent, new_name)
            new_parent.children[new_name] = moved
        if target is not None:
            self.prune(target)
            self.prune(new_parent)
        self.prune(parent)

    def forget(self, node_id: int, count: int) -> None:
        """The kernel dropped so many lookups."""
        node = self._nodes.get(node_id)
        if node is None or node is self.root:
            return
        node.lookups = max(0, node.lookups - count)
        self.prune(node)

    def prune(self, node: Node) -> None:
        """Drop the node, and those above it that only it kept, if nothing needs it."""
        while not (node.lookups or node.opens or node.busy or node.children) and node is not self.root:
            if self._nodes.pop(node.id, None) is None:
                return
            if node.identity is not None and self._identities.get(node.identity) is node:
                del self._identities[node.identity]
            above = [parent for parent, _ in node.names]
            for parent, name in node.names:
                del parent.children[name]
            node.names.clear()
            for parent in above[1:]:
                self.prune(parent)
            if not above:
                return
            node = above[0]

    def _new_id(self, parent: Node, name: str, identity: int | None) -> int:
        # An identity of the driver's is shown as it is where that is possible; the rest is a hash, so that the same
        # name has the same inode number in every life of the driver.
        candidate = identity if identity is not None else 0
        if _FIRST_ID <= candidate <= _ID_BITS and candidate not in self._nodes:
            return candidate
        seed = f"{parent.id}/{name}".encode("utf-8", "surrogateescape")
        for attempt in range(1000):
            digest = blake2b(seed, digest_size=8, salt=attempt.to_bytes(4, "little")).digest()
            candidate = int.from_bytes(digest, "little") & _ID_BITS
            if candidate >= _FIRST_ID and candidate not in self._nodes:
                return candidate
        raise InternalError("no free node id in a thousand hashes")
