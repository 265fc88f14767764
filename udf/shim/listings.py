"""Directory listings: fetched from the driver chunk by chunk, paged out to the kernel, kept for the next reader.

Owns: READDIR and READDIRPLUS in both directions. An open directory pages through its own listing, so its offsets stay
right whatever happens to the directory or to the driver's offsets. A driver that answers only one of the two requests
serves both. Completed listings are kept, bounded, as long as the directory's attributes are valid.
"""

from __future__ import annotations

import errno
from collections import OrderedDict
from struct import Struct
from time import monotonic
from typing import TYPE_CHECKING

from udf.fuse.opcodes import Opcode
from udf.fuse.structs import ENTRY_OUT, READ_IN
from udf.shim.columns import NAME_MAX
from udf.shim.graph import ROOT
from udf.shim.handles import LISTING_LIMIT, Handle, Listing
from udf.shim.hiding import HIDDEN_NAME
from udf.shim.inflight import Ask, Refuse, Steps
from udf.shim.nodes import BadEntry
from udf.shim.stale import stale_entry
from udf.shim.tasks import caller, open_handle

if TYPE_CHECKING:
    from udf.shim.service import Service

_DIRENT = Struct("=QQII")
_NO_ENTRY = bytes(ENTRY_OUT.size)
_U64 = Struct("=Q")
_CHUNK = 64 * 1024
_KEPT_BYTES = 2 << 20  # all kept listings together


class ListingCache:
    """The listings of one mount."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, Listing] = OrderedDict()
        self._bytes = 0

    def serve(self, s: Service, unique: int, handle: Handle, offset: int, size: int, plus: bool) -> bool:
        """Answer from what is there; False when the driver must be asked."""
        listing = handle.listing
        if offset == 0 and (listing is None or len(listing.ends)):
            kept = self._find(s, handle.slot)
            if listing is not None and listing is not kept:
                self._unpin(s, listing)
            handle.listing = listing = kept
            if kept is not None:
                s.counters.listing_hits += 1
        if listing is None or (offset >= len(listing.ends) and not listing.complete):
            return False
        self._reply(s, unique, handle, offset, size, plus, "cache")
        return True

    def fetch(self, s: Service, unique: int, handle: Handle, offset: int, size: int, plus: bool) -> Steps:
        """Fetch chunks until *offset* is there, then answer."""
        request = s.tasks[unique].request
        listing = handle.listing
        if listing is None:
            listing = handle.listing = Listing(s.nodes.version[handle.slot], s.recovery.generation)
        listing.begin_again(s.recovery.generation)
        yield from open_handle(s, handle, request)
        while offset >= len(listing.ends) and not listing.complete:
            ask_plus = s.terms.readdirplus and (plus or not s.terms.readdir)
            op = Opcode.READDIRPLUS if ask_plus else Opcode.READDIR
            before = len(listing.ends)
            driver_offset = listing.next_offset
            wanted = size if ask_plus and plus else max(size, _CHUNK)
            body = READ_IN.pack(handle.driver_handle or 0, driver_offset, wanted, 0, 0, 0)
            error, chunk = yield Ask(op, s.nodes.driver(handle.slot), body, caller(request))
            if handle.listing is not listing or len(listing.ends) != before:
                # another reader of the same handle was quicker, or rewound it
                self._give_back(s, chunk if ask_plus and not error else b"")
                if handle.listing is not listing:
                    raise Refuse(errno.EINTR)
                continue
            if error == errno.ENOSYS and ask_plus and s.terms.readdir:
                s.terms = s.terms.without_plus()
                continue
            if error:
                raise Refuse(error)
            # A chunk of just what the kernel asks for is its answer, once our ids are in it.
            relay = (
                ask_plus
                and plus
                and offset == before
                and len(chunk) <= size
                and unique in s.tasks
                and not listing.seen
                and not (handle.slot == ROOT and HIDDEN_NAME in chunk)
            )
            answer = bytearray(chunk)
            try:
                self._take(s, handle, listing, answer, ask_plus, relay)
                if not listing.complete and listing.next_offset == driver_offset:
                    raise BadEntry("a listing that does not get ahead")
            except BadEntry as bad:
                if relay:
                    self._take_back(s, answer, len(listing.ends) - before)
                s.fault(op, "listing", str(bad))
                raise Refuse(errno.EIO) from None
            if relay and answer:
                del s.tasks[unique]
                s.answer(unique, answer, by="driver")
                return
        if listing.complete:
            self._keep(s, handle.slot, listing)
        if s.tasks.pop(unique, None) is not None:
            self._reply(s, unique, handle, offset, size, plus, "driver")

    def closed(self, s: Service, handle: Handle) -> None:
        """The handle is closed: let its listing's nodes go."""
        if handle.listing is not None:
            self._unpin(s, handle.listing)  # one that is kept holds names, not nodes
        handle.listing = None

    def _find(self, s: Service, slot: int) -> Listing | None:
        kept = self._kept.get(slot)
        if kept is None:
            return None
        in_time = kept.until > monotonic() or not s.connected
        if kept.version == s.nodes.version[slot] and in_time and s.nodes.flags[slot]:
            self._kept.move_to_end(slot)
            return kept
        del self._kept[slot]
        self._bytes -= len(kept.data)
        return None

    def _keep(self, s: Service, slot: int, listing: Listing) -> None:
        """Keep a complete listing, if nothing changed in the directory while it was fetched."""
        if listing.version != s.nodes.version[slot] or len(listing.data) > _KEPT_BYTES // 4:
            return
        listing.until = s.nodes.attr_until[slot]
        if listing.until <= monotonic():
            return
        old = self._kept.pop(slot, None)
        if old is not None:
            self._bytes -= len(old.data)
        self._kept[slot] = listing
        self._bytes += len(listing.data)
        while self._bytes > _KEPT_BYTES:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= len(oldest.data)

    def _take(self, s: Service, handle: Handle, listing: Listing, chunk: bytearray, plus: bool, relay: bool) -> None:
        """Append a driver's chunk. Raises BadEntry; what came before the bad entry stays.

        With *relay* the chunk becomes the kernel's: its offsets and entries ours, and a lookup counted for each node.
        """
        end = len(chunk)
        if end == 0:
            listing.complete = True
            return
        at = 0
        nodes = s.nodes
        now = monotonic()
        head = ENTRY_OUT.size if plus else 0
        while at + head + 24 <= end:
            ino, driver_offset, length, kind = _DIRENT.unpack_from(chunk, at + head)
            name_at = at + head + 24
            if length == 0 or length > NAME_MAX or name_at + length > end:
                raise BadEntry(f"a name of {length} bytes in a listing")
            name = bytes(chunk[name_at : name_at + length])
            following = at + ((head + 24 + length + 7) & ~7)
            if name in listing.seen or (handle.slot == ROOT and name.startswith(HIDDEN_NAME)):
                self._give_back(s, bytes(chunk[at:following]) if plus else b"")
                listing.next_offset = driver_offset
                at = following
                continue
            if b"/" in name or b"\0" in name:
                raise BadEntry(f"a name with a slash or NUL in a listing: {name[:40]!r}")
            slot = 0
            if plus and name not in (b".", b".."):
                driver_id = _U64.unpack_from(chunk, at)[0]
                if driver_id:
                    try:
                        slot = nodes.enter(handle.slot, name, chunk, at, now, s.exclusive)
                    except BadEntry:
                        if driver_id != ROOT:
                            nodes.forgets.append((driver_id, 1))
                        raise
                    if relay:
                        nodes.lookups[slot] += 1
                    else:
                        nodes.pins[slot] += 1
                    ino = _U64.unpack_from(chunk, at + 40)[0]
            if relay:
                if not slot:
                    chunk[at : at + head] = _NO_ENTRY  # of "." and "..", which count no lookup
                _U64.pack_into(chunk, at + head + 8, len(listing.ends) + 1)
                listing.add(ino, kind & 0xF, name, 0)
            else:
                listing.add(ino, kind & 0xF, name, slot)
            listing.next_offset = driver_offset
            at = following
        if relay:
            del chunk[at:]
        if at == 0:
            raise BadEntry("a listing that is shorter than its first entry")
        if len(listing.data) > LISTING_LIMIT:
            raise BadEntry(f"a listing of more than {LISTING_LIMIT >> 20} MiB; it may never end")

    def _take_back(self, s: Service, chunk: bytearray, count: int) -> None:
        """Uncount the lookups of the first *count* entries of a chunk that turned out bad before the kernel saw it."""
        at = 0
        for _ in range(count):
            slot = s.nodes.slot(_U64.unpack_from(chunk, at)[0])
            if slot:
                s.nodes.forget(slot, 1)
            at += (ENTRY_OUT.size + 24 + _DIRENT.unpack_from(chunk, at + ENTRY_OUT.size)[2] + 7) & ~7

    def _give_back(self, s: Service, chunk: bytes) -> None:
        """Forget the look-ups of a chunk that nobody needs any more."""
        at, end = 0, len(chunk)
        while at + ENTRY_OUT.size + 24 <= end:
            driver_id = _U64.unpack_from(chunk, at)[0]
            length = _DIRENT.unpack_from(chunk, at + ENTRY_OUT.size)[2]
            name_at = at + ENTRY_OUT.size + 24
            if driver_id > ROOT and chunk[name_at : name_at + length] not in (b".", b".."):
                s.nodes.forgets.append((driver_id, 1))
            at += (ENTRY_OUT.size + 24 + length + 7) & ~7

    def _reply(self, s: Service, unique: int, handle: Handle, offset: int, size: int, plus: bool, by: str) -> None:
        listing = handle.listing
        assert listing is not None
        if not plus:
            s.answer(unique, listing.slice(offset, size), by=by)
            return
        nodes = s.nodes
        now = monotonic()
        reply = bytearray()
        for index in range(offset, len(listing.ends)):
            slot, name, record = listing.entry(index)
            if len(reply) + len(record) + ENTRY_OUT.size > size:
                break
            entry = _NO_ENTRY
            if name not in (b".", b".."):
                link = nodes.link(handle.slot, name)
                child = nodes.link_node[link]
                # Only what is still valid: an entry without a node makes the kernel look the name up itself.
                in_time = nodes.attr_until[child] > (now if s.connected else 0.0)
                if child and (not slot or child == slot) and in_time:
                    nodes.lookups[child] += 1
                    entry = nodes.pack_entry(child, link, now) if s.connected else stale_entry(s, child, link)
            reply += entry
            reply += record
        s.answer(unique, reply, by=by)

    def _unpin(self, s: Service, listing: Listing) -> None:
        nodes = s.nodes
        for index, slot in enumerate(listing.nodes):
            if slot:
                listing.nodes[index] = 0
                nodes.pins[slot] -= 1
                nodes.release(slot)
