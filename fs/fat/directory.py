"""One directory: list, find, insert, update, rename and remove entries, in writes that may be cut off anywhere.

Owns: what each of these means, and the index while the directory is in use. (slots.py: where and in which order.)
Must never: allocate or free clusters (the stream does), follow a chain, or go beyond `Stream.size`.
Called by: whoever holds the volume. Changes wait for each other here.

A write within 512 bytes is done or not done. So an entry is put where one write does it: in a hole of one sector, or
at the end; while the directory is small, slots that would make an entry straddle two sectors are marked as deleted
first. Where an entry has to straddle, its long name is written first and its short entry last, and removed in the
other order: what a cut leaves are long-name slots without an entry, which nobody sees, whose room is used again, and
which fsck.fat deletes by itself. A renamed entry stays in its sector if there is room: one write. Else the new one is
written before the old one goes.

The end mark: before it is overwritten, the slot behind what is written is made to begin with 0x00 (it does unless
another system left something there), so that nothing old ever comes back.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import trio

from . import entries, names
from .damage import Damaged
from .entries import MAX_SLOTS, SLOT, VOLUME, Entry, Found, Reader, Settings
from .index import Index, is_listed, place, run
from .slots import Slots, Stream

__all__ = ["Directory", "Stream"]

# Within the class, `list` is its method.
Entries = list[Entry]
Batch = list[Found]

_FIRST = 4 * 1024
_PIECE = 64 * 1024  # read at once


class Directory:
    """A directory on its stream.

    The index is made by the first call that needs it and kept until `forget`; whoever holds many directories calls
    that for those that are not in use. After an exception in the middle of a change it is made again.
    """

    def __init__(self, stream: Stream, settings: Settings, *, is_fixed: bool = False) -> None:
        """*is_fixed*: the root of FAT12 and FAT16, which cannot grow."""
        self._stream = stream
        self._settings = settings
        self._slots = Slots(stream, is_fixed)
        self._index: Index | None = None
        self._lock = trio.Lock()

    def forget(self) -> None:
        """Give the index's memory back; the next call reads the directory again."""
        self._index = None

    @property
    def skipped(self) -> int:
        """Entries that no name leads to, as far as the directory has been read: the image is damaged."""
        return self._index.skipped if self._index is not None else 0

    # Reading

    async def list(self) -> Entries:
        """Every file and directory, in the order of the directory."""
        index = self._index
        if index is None:
            async with self._lock:
                if self._index is None:
                    listed: Entries = []
                    await self._read_index(listed)
                    return listed
                index = self._index
        out, reader = [], Reader()
        while (batch := await self._more(reader)) is not None:
            for found in batch:
                if name := index.name_of(found):
                    out.append(entries.entry(found, name, self._settings))
        return out

    async def find(self, name: str) -> Entry | None:
        """The entry with this name, long or short, in any case."""
        index = await self._indexed()
        at = index.find(name)
        if at is None:
            return None
        found = await self._load(*run(at))
        seen = index.name_of(found)
        if not seen:
            raise Damaged(f"the directory's entry for {name!r} is not where it was")
        return entries.entry(found, seen, self._settings)

    async def at(self, slot: int, slots: int) -> Entry | None:
        """The entry that has exactly these slots."""
        if not 0 <= slot < MAX_SLOTS or not 1 <= slots <= entries.MAX_LONG + 1:
            return None
        index = await self._indexed()
        try:
            found = await self._load(slot, slots)
        except Damaged:
            return None
        name = index.name_of(found)
        return entries.entry(found, name, self._settings) if name else None

    async def is_empty(self) -> bool:
        """Whether it may be removed: nothing is in it, not even what no name leads to."""
        if self._index is not None:
            return not self._index.count
        reader = Reader()
        while (batch := await self._more(reader)) is not None:
            if any(map(is_listed, batch)):
                return False
        return True

    async def label(self) -> str:
        """The volume's label, if this is the root directory and has one."""
        reader = Reader()
        while (batch := await self._more(reader)) is not None:
            for found in batch:
                if found.raw[11] & VOLUME and not found.raw[11] & entries.DIRECTORY:
                    return names.label(found.raw[:11], self._settings.codepage)
        return ""

    # Changes

    async def insert(
        self,
        name: str,
        *,
        attributes: int,
        cluster: int = 0,
        size: int = 0,
        created_ns: int,
        modified_ns: int,
        accessed_ns: int,
    ) -> Entry:
        """A new entry. FileExistsError when the name is there, long or short, in any case."""
        name, units = names.checked(name)
        async with self._changing() as index:
            if index.find(name) is not None:
                raise FileExistsError(errno.EEXIST, "the name exists")
            short, case, needs_long = index.choose(name)
            raw = entries.pack(
                *(short, self._settings),
                case=case,
                attributes=attributes,
                cluster=cluster,
                size=size,
                created_ns=created_ns,
                modified_ns=modified_ns,
                accessed_ns=accessed_ns,
            )
            return self._put(index, await self._slots.write(index, raw, units if needs_long else b""))

    async def update(self, entry: Entry, **changes: int) -> Entry:
        """Change attributes, cluster, size, created_ns, modified_ns or accessed_ns, in one write."""
        async with self._lock, self._or_forget():
            found = await self._same(entry)
            raw = entries.patch(found.raw, self._settings, changes)
            if raw != found.raw:
                await self._slots.patch(found.slot + found.slots - 1, raw)
            return entries.entry(found._replace(raw=raw), entry.name, self._settings)

    async def remove(self, entry: Entry) -> None:
        """Remove an entry; its clusters are the caller's."""
        async with self._lock, self._or_forget():
            found = await self._same(entry)
            await self._slots.erase(found)
            if self._index is not None:
                self._drop(self._index, found)

    async def rename(self, entry: Entry, new_name: str) -> Entry:
        """Give it another name in this directory. FileExistsError when another entry has that, long or short."""
        new_name, units = names.checked(new_name)
        async with self._changing() as index:
            found = await self._same(entry)
            here = place(found.slot, found.slots)
            if index.find(new_name) not in (None, here):
                raise FileExistsError(errno.EEXIST, "the name exists")
            short, case, needs_long = index.choose(new_name, apart_from=here)
            raw = entries.renamed(found.raw, short, case)
            if not needs_long:
                units = b""
            slots = -(-len(units) // entries.LONG_BYTES) + 1
            slot = index.hole_near(found, slots)
            if slot is None or slot + slots > self._slots.capacity():
                # For a moment both are there: with the same short name they would be one too many.
                short, case, needs_long = index.choose(new_name)
                raw = entries.renamed(found.raw, short, case)
                new = await self._slots.write(index, raw, names.checked(new_name)[1] if needs_long else b"")
                await self._slots.erase(found)
            else:
                new = Found(raw, units, slot, slots)
                await self._slots.move(index, found, new)
            self._drop(index, found)
            return self._put(index, new)

    async def clear_orphans(self) -> int:
        """Delete long-name slots without an entry: what a change that was cut off leaves. How many there were."""
        async with self._changing() as index:
            return await self._slots.clear_orphans(index)

    # How: reading

    async def _more(self, reader: Reader) -> Batch | None:
        """What the next piece of the directory has; None behind the end mark."""
        offset, end = reader.slot * SLOT, self._slots.capacity() * SLOT
        if reader.ended or offset >= end:
            return None
        if offset:  # a large directory takes a while, and may be all in a cache
            await trio.lowlevel.checkpoint()
        # A little first: most directories are small, and their clusters need not be.
        piece = await self._stream.read(offset, min(max(_FIRST, offset), _PIECE, end - offset))
        if len(piece) < SLOT:
            raise Damaged(f"the directory ends after {offset} bytes, where {end} should be")
        return [*reader.feed(piece)]

    async def _indexed(self) -> Index:
        if self._index is None:
            async with self._lock:
                if self._index is None:
                    return await self._read_index(None)
        return self._index

    async def _read_index(self, listed: Entries | None) -> Index:
        index = Index(self._settings)
        reader = Reader()
        while (batch := await self._more(reader)) is not None:
            for found in batch:
                name = index.add(found)
                if name and listed is not None:
                    listed.append(entries.entry(found, name, self._settings))
        index.pass_by(reader.slot)
        self._index = index
        return index

    async def _load(self, slot: int, slots: int) -> Found:
        if slot + slots <= self._slots.capacity():
            for found in Reader(slot).feed(await self._stream.read(slot * SLOT, slots * SLOT)):
                if found.slot == slot and found.slots == slots:
                    return found
        raise Damaged(f"there is no entry of {slots} slots at slot {slot} of the directory")

    async def _same(self, entry: Entry) -> Found:
        """The entry as it is now. FileNotFoundError when it is not there any more."""
        with suppress(Damaged):
            found = await self._load(entry.slot, entry.slots)
            if found.raw[:11] == entry.short and is_listed(found):
                return found
        raise FileNotFoundError(errno.ENOENT, "the entry is not in the directory any more")

    # How: changes

    @asynccontextmanager
    async def _changing(self) -> AsyncIterator[Index]:
        """Alone, with the index."""
        async with self._lock, self._or_forget():
            yield self._index or await self._read_index(None)

    @asynccontextmanager
    async def _or_forget(self) -> AsyncIterator[None]:
        """When a change breaks off after a write began, nobody knows what is there: the index is made again."""
        self._slots.is_touched = False
        try:
            yield
        except BaseException:
            if self._slots.is_touched:
                self._index = None
            raise

    def _drop(self, index: Index, found: Found) -> None:
        index.drop(found)
        if index.is_doubtful:  # another entry may have been waiting for the name
            self._index = None

    def _put(self, index: Index, found: Found) -> Entry:
        return entries.entry(found, index.add(found), self._settings)
