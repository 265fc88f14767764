"""Open files and directories: the kernel's handles, and the driver's behind them.

Owns: handle numbers, whether the driver has been told of an open yet, and each open directory's listing.
A handle that the shim opened by itself has `driver_handle` None until the first request that the driver must see.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from struct import Struct

_DIRENT = Struct("<QQII")  # ino off namelen type
LISTING_LIMIT = 64 << 20  # bytes of one directory's listing; a driver's listing that never ends stops here


class Listing:
    """A directory's entries as plain dirents, in the order the driver gave them; offset n is behind entry n.

    Offsets are indexes, so they mean the same whatever the driver's own offsets are. It grows chunk by chunk as the
    kernel asks, and `complete` says that nothing more will come.
    """

    __slots__ = ("complete", "data", "ends", "generation", "next_offset", "nodes", "seen", "until", "version")

    def __init__(self, version: int, generation: int = 1) -> None:
        self.data = bytearray()
        self.ends = array("Q")  # where entry n ends in data
        self.nodes = array("I")  # the slot of entry n, pinned by this listing; 0: not looked up
        self.next_offset = 0  # the driver's offset to go on from
        self.complete = False
        self.version = version  # of the directory when the listing began
        self.until = 0.0
        self.generation = generation  # of the driver, whose offset next_offset is
        self.seen: set[bytes] = set()  # names that an older generation gave, which must not come twice

    def begin_again(self, generation: int) -> None:
        """Go on with another generation: from its beginning, leaving out the names that are here already."""
        if self.generation != generation and not self.complete:
            self.generation = generation
            self.next_offset = 0
            self.seen = {self.entry(index)[1] for index in range(len(self.ends))}

    def add(self, ino: int, kind: int, name: bytes, slot: int) -> None:
        """Append one entry."""
        self.data += _DIRENT.pack(ino, len(self.ends) + 1, len(name), kind)
        self.data += name
        self.data += bytes(-len(name) % 8)
        self.ends.append(len(self.data))
        self.nodes.append(slot)

    def slice(self, offset: int, size: int) -> memoryview:
        """Return the dirents from *offset* on that fit into *size* bytes."""
        ends = self.ends
        if offset >= len(ends):
            return memoryview(b"")
        start = ends[offset - 1] if offset else 0
        last = bisect_right(ends, start + size, offset) - 1
        return memoryview(self.data)[start : ends[last]] if last >= offset else memoryview(b"")

    def entry(self, index: int) -> tuple[int, bytes, bytes]:
        """Return (slot, name, dirent with padding) of one entry."""
        start = self.ends[index - 1] if index else 0
        record = bytes(self.data[start : self.ends[index]])
        length = _DIRENT.unpack_from(record)[2]
        return self.nodes[index], record[24 : 24 + length], record


class Handle:
    """One open file or directory of the kernel's."""

    __slots__ = ("driver_handle", "flags", "is_dir", "listing", "number", "opening", "slot", "written")

    def __init__(self, number: int, slot: int, flags: int, is_dir: bool, driver_handle: int | None) -> None:
        self.number = number
        self.slot = slot
        self.flags = flags
        self.is_dir = is_dir
        self.driver_handle = driver_handle
        self.opening = False
        self.written = False  # a close must tell the driver, whichever generation of it there is then
        self.listing: Listing | None = None


class HandleTable:
    """All handles of one mount, by number, and by node for those that are open."""

    def __init__(self) -> None:
        self._by_number: dict[int, Handle] = {}
        self._by_slot: dict[int, list[Handle]] = {}
        self._next = 1
        self.get = self._by_number.get

    def __len__(self) -> int:
        """Return the number of open handles."""
        return len(self._by_number)

    def add(self, slot: int, flags: int, is_dir: bool, driver_handle: int | None) -> Handle:
        """Make a handle for *slot*."""
        handle = Handle(self._next, slot, flags, is_dir, driver_handle)
        self._next += 1
        self._by_number[handle.number] = handle
        self._by_slot.setdefault(slot, []).append(handle)
        return handle

    def forget_driver(self) -> None:
        """The driver is gone, and with it what it had opened."""
        for handle in self._by_number.values():
            handle.driver_handle = None
            handle.opening = False

    def remove(self, handle: Handle) -> None:
        """Forget *handle*."""
        del self._by_number[handle.number]
        siblings = self._by_slot[handle.slot]
        siblings.remove(handle)
        if not siblings:
            del self._by_slot[handle.slot]

    def of(self, slot: int) -> list[Handle]:
        """Return the open handles of *slot*."""
        return self._by_slot.get(slot, [])
