"""What a driver says of nodes: entries and attributes, checked, and the same files found again in the next generation.

Owns: cached attributes and entry time-outs, and every rule by which an entry is believed. The nodes themselves, their
names and lives are in graph.py, the other half of the same table.
"""

from __future__ import annotations

import stat
from struct import Struct

from udf.shim.graph import (
    ALIVE,
    ATTR_SIZE,
    HIDDEN,
    ROOT,
    Graph,
)

_MODE_NLINK = Struct("<II")  # attr offsets 60 and 64
_INO = Struct("<Q")
_ENTRY = Struct("<QQQQII8xq44xI")  # the head, and of the attributes size and mode
_SAME = Struct("<8xQ24xQ52xI")  # of an entry: the inode's generation, its number, the mode
_ENTRY_HEAD = Struct("<QQQQII")  # nodeid generation entry_valid attr_valid entry_valid_nsec attr_valid_nsec
ENTRY_HEAD_SIZE = 40
_MANY_LOOKUPS = 1 << 31
FOREVER = 1 << 40  # seconds; a driver's time-out is cut to this before it becomes a float


Admitted = tuple[int, int, float, float]
"""A slot, the driver's id of a new one (else 0), and until when the entry and the attributes are valid."""


class BadEntry(Exception):
    """A driver's entry contradicts itself or what is known; the sentence says how."""


class NodeTable(Graph):
    """The graph, and what is known of each node in it."""

    # ---- what the kernel may have cached

    @property
    def top(self) -> int:
        """No slot from here on is a node."""
        return self._slots.top

    def is_known(self, slot: int) -> bool:
        """Whether the kernel may have something cached of *slot*."""
        known: bool = self.flags[slot] & ALIVE != 0 and self.lookups[slot] > 0
        return known

    # ---- attributes

    def keep_attr(self, slot: int, buffer: bytearray, at: int, until: float) -> None:
        """Take the attributes at *at*, with the inode number that programs first saw put into *buffer* too.

        Their flags are what some drivers leave uninitialised, and to the kernel they mean mounts and DAX.
        """
        start = slot * ATTR_SIZE
        buffer[at + 84 : at + 88] = _NO_FLAGS
        if self.flags[slot] & HIDDEN:
            _hide_link(buffer, at)
        if self.mode(slot):
            buffer[at : at + 8] = self.attrs[start : start + 8]
        self.attrs[start : start + ATTR_SIZE] = buffer[at : at + ATTR_SIZE]
        self.attr_until[slot] = until

    def set_mode(self, slot: int, mode: int) -> None:
        """Note what the driver has just been made to set."""
        at = slot * ATTR_SIZE + 60
        self.attrs[at : at + 4] = mode.to_bytes(4, "little")

    def check_attr(self, slot: int, buffer: bytearray, at: int) -> None:
        """Raise BadEntry when the attributes at *at* cannot be those of *slot*.

        For the kernel a negative size or another type makes the inode bad for ever.
        """
        if buffer[at + 15] & 0x80:
            raise BadEntry("a negative file size")
        self.check_mode(slot, _MODE_NLINK.unpack_from(buffer, at + 60)[0])

    def _check_no_circle(self, slot: int, parent: int) -> None:
        """Raise BadEntry when *parent* is below *slot*: they would keep each other for ever."""
        at = parent
        while at != ROOT:
            if at == slot:
                raise BadEntry("a directory is below itself")
            link = self.first_link[at]
            if not link:
                return
            at = self.link_parent[link]

    def check_mode(self, slot: int, mode: int) -> None:
        """Raise BadEntry when *mode* cannot be the mode of *slot*."""
        kind = mode & 0o170000
        if mode > 0xFFFF or kind not in _KINDS:
            raise BadEntry(f"mode {mode:#o} has no valid file type")
        if slot:
            known = self.mode(slot)
            if known and known & 0o170000 != kind:
                raise BadEntry(f"a node changed its file type from {known:#o} to {mode:#o}")
            if slot == ROOT and kind != stat.S_IFDIR:
                raise BadEntry("the root is not a directory")

    # ---- entries

    def enter(self, parent: int, name: bytes, buffer: bytearray, at: int, now: float, keep_forever: bool) -> int:
        """Take the driver's entry_out at *at* for *name*, and make it the kernel's (ids, time-outs) in place.

        Counts one lookup by the driver, none by the kernel. Returns the slot. Raises SlotsExhausted, and BadEntry
        (then nothing is counted).
        """
        admitted = self.admit(parent, name, buffer, at, now, keep_forever)
        self.settle(parent, name, admitted, buffer, at)
        return admitted[0]

    def admit(self, parent: int, name: bytes, buffer: bytearray, at: int, now: float, keep_forever: bool) -> Admitted:
        """Do the part of `enter` that the kernel's answer needs; `settle` must follow before anything else is done.

        In between the kernel can be answered, so that the program runs while the tables are brought up to date.
        """
        driver_id, inode_generation, entry_valid, attr_valid, entry_ns, attr_ns, size, mode = _ENTRY.unpack_from(
            buffer, at
        )
        attr_at = at + ENTRY_HEAD_SIZE
        slot = self.by_driver(driver_id)
        if not slot and self.generation > 1:
            slot = self._known_before(parent, name, driver_id, buffer, at)
        if slot == ROOT or entry_ns > 999_999_999 or attr_ns > 999_999_999:
            raise BadEntry("an entry names the root or has an impossible time-out")
        if slot or size < 0 or mode > 0xFFFF or mode & 0o170000 not in _KINDS:
            self.check_attr(slot, buffer, attr_at)
        new = 0
        if slot:
            first = self.first_link[slot]
            if first and self.link_parent[first] != parent and self.mode(slot) & 0o170000 == stat.S_IFDIR:
                self._check_no_circle(slot, parent)
            count = self.driver_lookups[slot] + 1
            if count >= _MANY_LOOKUPS:  # of a name with no time-out, looked up for days
                self.forgets.append((driver_id, count - 1))
                count = 1
            self.driver_lookups[slot] = count
            if self.mode(slot):
                buffer[attr_at : attr_at + 8] = self.attrs[slot * ATTR_SIZE : slot * ATTR_SIZE + 8]
            if self.flags[slot] & HIDDEN:
                _hide_link(buffer, attr_at)
            incarnation = self.incarnation[slot]
        else:
            slot = self._slots.take()
            self.incarnation[slot] = incarnation = (self.incarnation[slot] + 1) & 0xFFFFFFFF
            self.inode_generation[slot] = inode_generation
            new = driver_id
        buffer[attr_at + 84 : attr_at + 88] = _NO_FLAGS
        if keep_forever:
            entry_valid = 0 if is_fleeting(entry_valid, entry_ns) else FOREVER
            attr_valid = FOREVER
            entry_ns = attr_ns = 0
            entry_until, attr_until = now + entry_valid, now + FOREVER
        else:
            if entry_valid > FOREVER or attr_valid > FOREVER:
                entry_valid, attr_valid = min(entry_valid, FOREVER), min(attr_valid, FOREVER)
            entry_until = now + entry_valid + entry_ns * 1e-9
            attr_until = now + attr_valid + attr_ns * 1e-9
        _ENTRY_HEAD.pack_into(buffer, at, incarnation << 32 | slot, 0, entry_valid, attr_valid, entry_ns, attr_ns)
        return slot, new, entry_until, attr_until

    def settle(self, parent: int, name: bytes, admitted: Admitted, buffer: bytearray, at: int) -> None:
        """Note the ids, the name and the attributes of an admitted entry, still in *buffer*. Raises SlotsExhausted."""
        slot, new, entry_until, attr_until = admitted
        if new:
            self.flags[slot] = ALIVE
            self.driver_lookups[slot] = 1
            self._bind(slot, new)
        start = slot * ATTR_SIZE
        self.attrs[start : start + ATTR_SIZE] = buffer[at + ENTRY_HEAD_SIZE : at + ENTRY_HEAD_SIZE + ATTR_SIZE]
        self.attr_until[slot] = attr_until
        self.set_link(parent, name, slot, entry_until)
        mode, links = _MODE_NLINK.unpack_from(self.attrs, start + 60)
        if links > 1 and mode & 0o170000 != stat.S_IFDIR:
            self._linked[self._key(self.inode_generation[slot], self.inode_number(slot))] = slot

    def pack_entry(self, slot: int, link: int, now: float) -> bytes:
        """Return the 128 bytes of an entry_out from what is cached."""
        entry_for = max(0.0, self._link_until[link] - now)
        attr_for = max(0.0, self.attr_until[slot] - now)
        head = _ENTRY_HEAD.pack(
            self.incarnation[slot] << 32 | slot,
            0,
            int(entry_for),
            int(attr_for),
            int(entry_for % 1 * 1e9),
            int(attr_for % 1 * 1e9),
        )
        return head + bytes(self.attrs[slot * ATTR_SIZE : slot * ATTR_SIZE + ATTR_SIZE])

    # ---- generations

    def begin_generation(self) -> None:
        """A new process of the driver serves from here on: it knows nothing but the root, and has counted nothing."""
        if self._stable_nodes:
            self.forgets.extend(self.nameless)  # the old one may have died before it heard of them
            return
        self.forgets.clear()
        self.generation += 1
        self.generation_of[ROOT] = self.generation

    def is_same(self, slot: int, buffer: bytes | bytearray, at: int) -> bool:
        """Whether the driver's entry at *at* is the file that *slot* was when it was first seen."""
        generation, number, mode = _SAME.unpack_from(buffer, at)
        if (mode ^ self.mode(slot)) & 0o170000:
            return False
        if self._inodes == "volatile":
            return True
        if generation != self.inode_generation[slot]:
            return False
        return bool((self._inodes == "generation" and generation) or number == self.inode_number(slot))

    def rebind(self, slot: int, buffer: bytes | bytearray, at: int) -> bool:
        """Take the entry at *at* for what *slot* is called now, one lookup counted; False if it is another file."""
        driver_id: int = _INO.unpack_from(buffer, at)[0]
        if driver_id <= ROOT or self.by_driver(driver_id) or not self.is_same(slot, buffer, at):
            return False
        self._rebind(slot, driver_id, 1)
        return True

    def _rebind(self, slot: int, driver_id: int, lookups: int) -> None:
        self._unbind(slot)
        self._bind(slot, driver_id)
        self.driver_lookups[slot] = lookups

    def _known_before(self, parent: int, name: bytes, driver_id: int, buffer: bytearray, at: int) -> int:
        """Return the node of an older generation that the entry is about, now bound, with no lookup counted; or 0."""
        if driver_id <= ROOT:
            return 0
        known: int = self.link_node[self.link(parent, name)]
        linked = 0
        if self._linked and self._inodes != "volatile":
            linked = self._linked.get(self._key(*_SAME.unpack_from(buffer, at)[:2]), 0)
        for slot in (known, linked):
            if slot > ROOT and not self.is_resolved(slot) and self.is_same(slot, buffer, at):
                self._rebind(slot, driver_id, 0)
                return slot
        return 0


def is_fleeting(seconds: int, nanoseconds: int) -> bool:
    """Whether a driver means that a name is good for this once, even where names are kept as long as the mount.

    None at all would be what drivers say that do not care. A driver for which several spellings are one name says so of
    those that its directory does not have, and of what is missing: nobody could tell the kernel when that ends.
    """
    return not seconds and 0 < nanoseconds <= _FLEETING


_FLEETING = 1_000_000  # ns
_NO_FLAGS = bytes(4)
_KINDS = frozenset((stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK))


def _hide_link(buffer: bytearray, at: int) -> None:
    """Take the shim's own link out of the count in the attributes at *at*."""
    mode, links = _MODE_NLINK.unpack_from(buffer, at + 60)
    if links:
        _MODE_NLINK.pack_into(buffer, at + 60, mode, links - 1)
