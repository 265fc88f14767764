"""The graph of nodes and names: what the kernel may ask for by node id, by which names it is known, how long it lives.

Owns: node ids, the kernel's and the driver's lookup counts, names (a node may have several) and which driver's id means
which node. It never sends anything: FORGETs that have become due to the driver are left in `forgets`.

Node id = incarnation << 32 | slot, so an id is never used twice and finding a node is one table access; the root is 1.
A node lives while the kernel counts a lookup, a child, an open handle or a pin (a listing in progress) needs it.

A driver's ids, and its lookups, are those of one generation of it. Nothing is done to the nodes when the next comes: a
node of an older one is `Unresolved` until its name has been looked up again and the same file was found there.

All memory is in columns of one memfd (about 200 bytes a node with its name); nothing is kept per node as an object.
What a driver says of nodes is checked and taken in nodes.py, the other half of the same table.
"""

from __future__ import annotations

import stat
import time
from collections import deque
from struct import Struct
from zlib import crc32

from udf.shim.columns import Columns, Index, Names, Slots

ROOT = 1
CAPACITY = 1 << 23  # nodes, and links; memory is charged only for those in use
NAMES_SIZE = CAPACITY * 32
ATTR_SIZE = 88

# Flags of a node. The low byte says how a driver's OPEN may be answered without it.
ALIVE = 0x100
BOUND = 0x200  # found by the driver's id, which may be of an older generation
HIDDEN = 0x400  # removed while open: one of its links is the shim's own, and programs do not see it counted
OPENED_READ = 0x1  # the driver has accepted an open for reading
OPENED_WRITE = 0x2
OPENED_DIR = 0x4
OPEN_FLAGS_SHIFT = 16  # FOPEN_* as the driver gave them at the last open it answered

_MODE_NLINK = Struct("<II")  # attr offsets 60 and 64
_INO = Struct("<Q")


class Unresolved(Exception):
    """This generation of the driver does not know the node `slot` yet."""

    def __init__(self, slot: int) -> None:
        super().__init__(slot)
        self.slot = slot


class Graph:
    """All nodes of one mount. Slots are internal; ids are what the kernel sees."""

    def __init__(self, *, stable_nodes: bool = False, inodes: str = "stable") -> None:
        n = CAPACITY
        memory = Columns(
            "udf-nodes", n * (8 * 4 + 4 * 10 + ATTR_SIZE) + n * (4 * 6 + 8) + n * 16 + NAMES_SIZE + (1 << 20)
        )
        self._stable_nodes = stable_nodes
        self._inodes = inodes
        column = memory.integers
        self.driver_id = column("Q", n)
        self.lookups = column("Q", n)  # the kernel's count
        self.attr_until = memory.floats(n)  # monotonic; 0: not valid
        self.inode_generation = column("Q", n)  # as the driver gave it first: what tells a reused inode number
        self.driver_lookups = column("I", n)  # the driver's count, of this generation
        self.generation_of = column("I", n)
        self.incarnation = column("I", n)
        self.first_link = column("I", n)
        self._driver_chain = column("I", n)
        self.children = column("I", n)  # links whose parent this is
        self.opens = column("I", n)
        self.pins = column("I", n)
        self.version = column("I", n)  # changes with every possible change of the attributes
        self.flags = column("I", n)
        self.attrs = memory.bytes(n * ATTR_SIZE)
        self._link_chain = column("I", n)
        self.link_parent = column("I", n)
        self.link_node = column("I", n)
        self._link_hash = column("I", n)
        self._link_name = column("I", n)
        self._link_sibling = column("I", n)
        self._link_until = memory.floats(n)
        link_hash, driver_id = self._link_hash, self.driver_id
        self._by_name = Index(column("I", n), self._link_chain, link_hash.__getitem__)
        self._by_driver = Index(column("I", n), self._driver_chain, lambda slot: _mix(driver_id[slot]))
        self._slots = Slots(self._driver_chain)
        self._links = Slots(self._link_chain)
        self._names = Names(memory.bytes(NAMES_SIZE))
        self.generation = 1
        self.forgets: list[tuple[int, int]] = []
        self.nameless: deque[tuple[int, int]] = deque(maxlen=4096)  # the last forgets of nodes without a name
        self._linked: dict[int, int] = {}  # files with several links: what they are known by -> slot
        self.negatives: dict[tuple[int, bytes], float] = {}  # by node id: a slot's next node must not inherit them
        root = self._slots.take()
        assert root == ROOT
        self.flags[root] = ALIVE
        self.lookups[root] = 1  # never given back
        self._bind(root, ROOT)

    # ---- finding

    def __len__(self) -> int:
        """Return the number of live nodes, the root included."""
        return self._slots.used

    def slot(self, node_id: int) -> int:
        """Return the slot of a live node, or 0."""
        slot = node_id & 0xFFFFFFFF
        if slot and slot < CAPACITY and self.flags[slot] & ALIVE and self.incarnation[slot] == node_id >> 32:
            return slot
        return 0

    def node_id(self, slot: int) -> int:
        """Return the id under which the kernel knows *slot*."""
        incarnation: int = self.incarnation[slot]
        return incarnation << 32 | slot

    def by_driver(self, driver_id: int) -> int:
        """Return the slot that this generation of the driver calls *driver_id*, or 0."""
        slot = self._by_driver.first(_mix(driver_id))
        while slot and (self.driver_id[slot] != driver_id or self.generation_of[slot] != self.generation):
            slot = self._driver_chain[slot]
        return slot

    def driver(self, slot: int) -> int:
        """Return what this generation of the driver calls *slot*. Raises Unresolved."""
        if self.generation_of[slot] != self.generation:
            raise Unresolved(slot)
        driver_id: int = self.driver_id[slot]
        return driver_id

    def is_resolved(self, slot: int) -> bool:
        """Whether this generation of the driver knows *slot*."""
        resolved: bool = self.generation_of[slot] == self.generation
        return resolved

    def link(self, parent: int, name: bytes) -> int:
        """Return the link called *name* in *parent*, or 0."""
        return self._find(crc32(name, parent), parent, name)

    def _find(self, hashed: int, parent: int, name: bytes) -> int:
        link = self._by_name.first(hashed)
        while link:
            if (
                self._link_hash[link] == hashed
                and self.link_parent[link] == parent
                and self._names.get(self._link_name[link]) == name
            ):
                return link
            link = self._link_chain[link]
        return 0

    def child(self, parent: int, name: bytes) -> int:
        """Return the node that *name* in *parent* was last seen to be, or 0."""
        slot: int = self.link_node[self.link(parent, name)]
        return slot

    def cached(self, parent: int, name: bytes, now: float) -> int:
        """Return the node that *name* in *parent* is, if its entry and attributes are still valid, else 0."""
        link = self.link(parent, name)
        if link and self._link_until[link] > now:
            slot: int = self.link_node[link]
            if self.attr_until[slot] > now:
                return slot
        return 0

    def path(self, slot: int) -> str | None:
        """Return the path of *slot* below the mountpoint by its first names, for people; None when it has none."""
        parts: list[str] = []
        while slot != ROOT:
            link = self.first_link[slot]
            if not link or len(parts) > 256:
                return None
            parts.append(self._names.get(self._link_name[link]).decode("utf-8", "backslashreplace"))
            slot = self.link_parent[link]
        return "/" + "/".join(reversed(parts))

    def mode(self, slot: int) -> int:
        """Return the mode as last seen (0: never)."""
        at = slot * ATTR_SIZE
        mode: int = _MODE_NLINK.unpack_from(self.attrs, at + 60)[0]
        return mode

    def total_lookups(self) -> int:
        """Return the kernel's lookups of all nodes but the root."""
        return sum(self.lookups[slot] for slot in self._live())

    def total_driver_lookups(self) -> int:
        """Return the driver's lookups of all nodes but the root."""
        return sum(self.driver_lookups[slot] for slot in self._live())

    def _live(self) -> list[int]:
        return [slot for slot in range(ROOT + 1, self._slots.top) if self.flags[slot] & ALIVE]

    def touch(self, slot: int) -> None:
        """Say that the attributes of *slot* may have changed."""
        self.attr_until[slot] = 0.0
        self.version[slot] = (self.version[slot] + 1) & 0xFFFFFFFF

    def inode_number(self, slot: int) -> int:
        """Return st_ino as programs first saw it (0: never)."""
        number: int = _INO.unpack_from(self.attrs, slot * ATTR_SIZE)[0]
        return number

    def _key(self, generation: int, number: int) -> int:
        """By what a file with several names is found again."""
        return generation if self._inodes == "generation" and generation else number

    # ---- names

    def links_of(self, slot: int) -> list[tuple[int, bytes]]:
        """Return the names of *slot*: (parent, name)."""
        found = []
        link = self.first_link[slot]
        while link:
            found.append((self.link_parent[link], self._names.get(self._link_name[link])))
            link = self._link_sibling[link]
        return found

    def set_link(self, parent: int, name: bytes, slot: int, until: float) -> None:
        """Make *name* in *parent* mean *slot*; a directory loses the name that it had elsewhere."""
        if self.negatives:
            self.negatives.pop((self.node_id(parent), name), None)
        hashed = crc32(name, parent)
        link = self._find(hashed, parent, name)
        if link:
            known = self.link_node[link]
            if known == slot:
                self._link_until[link] = until
                return
            self._remove_link(link)
            self.release(known)
        first = self.first_link[slot]
        if first and self.mode(slot) & 0o170000 == stat.S_IFDIR:
            old_parent = self.link_parent[first]
            self._remove_link(first)
            self.pins[slot] += 1  # a directory moved below itself by a lying driver must not free what we hold
            self.release(old_parent)
            self.pins[slot] -= 1
        link = self._links.take()
        self._link_name[link] = self._names.put(name)
        self._link_hash[link] = hashed
        self.link_parent[link] = parent
        self.link_node[link] = slot
        self._link_until[link] = until
        self._link_sibling[link] = self.first_link[slot]
        self.first_link[slot] = link
        self.children[parent] += 1
        self._by_name.add(link, hashed)

    def unlink(self, parent: int, name: bytes) -> int:
        """Say that *name* is no longer in *parent*. Returns the node that it was, to be released, or 0."""
        link = self.link(parent, name)
        if not link:
            return 0
        slot: int = self.link_node[link]
        mode, links = _MODE_NLINK.unpack_from(self.attrs, slot * ATTR_SIZE + 60)
        last = links <= 1 or mode & 0o170000 == stat.S_IFDIR
        self._remove_link(link)
        self.touch(slot)
        if last and not self.first_link[slot] and not self.opens[slot]:
            self._unbind(slot)  # the driver may use the number again for another file
        return slot

    def move(self, parent: int, name: bytes, new_parent: int, new_name: bytes) -> None:
        """Follow a rename."""
        link = self.link(parent, name)
        replaced = self.link(new_parent, new_name)
        if link and replaced and self.link_node[link] == self.link_node[replaced]:
            return  # POSIX: renaming a file onto another link to itself does nothing
        target = self.unlink(new_parent, new_name)
        if link:
            slot, until = self.link_node[link], self._link_until[link]
            self._remove_link(link)
            self.set_link(new_parent, new_name, slot, until)
            self.touch(slot)
        if target:
            self.release(target)

    def exchange(self, parent: int, name: bytes, other: int, other_name: bytes) -> None:
        """Follow a rename with RENAME_EXCHANGE."""
        first, second = self.link(parent, name), self.link(other, other_name)
        one, two = self.link_node[first], self.link_node[second]
        for link in (first, second):
            if link:
                self._remove_link(link)
        now = time.monotonic()
        if two:
            self.set_link(parent, name, two, now)
            self.touch(two)
        if one:
            self.set_link(other, other_name, one, now)
            self.touch(one)

    def expire(self, parent: int, name: bytes) -> None:
        """Say that *name* in *parent* must be looked up again."""
        self.negatives.pop((self.node_id(parent), name), None)
        link = self.link(parent, name)
        if link:
            self._link_until[link] = 0.0

    def is_expired(self, link: int) -> bool:
        """Whether *link* was said to be no longer true, other than by the end of its time."""
        return self._link_until[link] == 0.0

    # ---- lifetimes

    def forget(self, slot: int, count: int) -> None:
        """Take back *count* of the kernel's lookups."""
        if slot == ROOT:
            return
        known = self.lookups[slot]
        self.lookups[slot] = known - count if known > count else 0
        if known <= count:
            self.release(slot)

    def release(self, slot: int) -> None:
        """Free *slot*, and then its parents, if nothing needs it any more."""
        while slot != ROOT and not (self.lookups[slot] or self.children[slot] or self.opens[slot] or self.pins[slot]):
            if not self.flags[slot] & ALIVE:
                return
            parents = []
            link = self.first_link[slot]
            while link:
                parents.append(self.link_parent[link])
                following = self._link_sibling[link]
                self._remove_link(link)
                link = following
            self._unbind(slot)
            if self.driver_lookups[slot] and self.generation_of[slot] == self.generation:
                due = self.driver_id[slot], self.driver_lookups[slot]
                self.forgets.append(due)
                if self._stable_nodes and not parents:
                    self.nameless.append(due)
            if self._linked:
                key = self._key(self.inode_generation[slot], self.inode_number(slot))
                if self._linked.get(key) == slot:
                    del self._linked[key]
            self.flags[slot] = 0
            self.driver_lookups[slot] = 0
            self.version[slot] = (self.version[slot] + 1) & 0xFFFFFFFF
            self.attr_until[slot] = 0.0
            self.attrs[slot * ATTR_SIZE : slot * ATTR_SIZE + ATTR_SIZE] = _NO_ATTR
            self._slots.give(slot)
            if not parents:
                return
            for parent in parents[1:]:
                self.release(parent)
            slot = parents[0]

    def closed(self, slot: int) -> None:
        """Say that one handle of *slot* is closed."""
        self.opens[slot] -= 1
        if not self.opens[slot]:
            if not self.first_link[slot] and slot != ROOT:
                self._unbind(slot)
            self.release(slot)

    def _bind(self, slot: int, driver_id: int) -> None:
        self.driver_id[slot] = driver_id
        self.generation_of[slot] = self.generation
        self.flags[slot] |= BOUND
        self._by_driver.add(slot, _mix(driver_id))

    def _unbind(self, slot: int) -> None:
        """Forget that the driver's id means *slot*; requests for the node still go to that id."""
        if self.flags[slot] & BOUND:
            self.flags[slot] &= ~BOUND
            self._by_driver.remove(slot, _mix(self.driver_id[slot]))

    def _remove_link(self, link: int) -> None:
        slot, parent = self.link_node[link], self.link_parent[link]
        at = self.first_link[slot]
        if at == link:
            self.first_link[slot] = self._link_sibling[link]
        else:
            while self._link_sibling[at] != link:
                at = self._link_sibling[at]
            self._link_sibling[at] = self._link_sibling[link]
        self._by_name.remove(link, self._link_hash[link])
        self._names.drop(self._link_name[link])
        self.link_node[link] = 0
        self._links.give(link)
        self.children[parent] -= 1


_NO_ATTR = bytes(ATTR_SIZE)


def _mix(driver_id: int) -> int:
    """Hash a driver's node id; many are pointers or inode numbers, whose low bits are alike."""
    return ((driver_id ^ driver_id >> 32) * 0x9E3779B1 >> 8) & 0xFFFFFFFF
