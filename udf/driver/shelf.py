"""Dicts and files in a state store, for authors who do not want to keep records of their own.

Owns the records that stand for them in the journal, and the pages of the arena. Each change is one record, committed
before it is made in memory. Called by: store.py.

A page belongs to a file once the record that says so is committed, and is filled before that; it is given up only
after the record that frees it. Bytes that a file has already are overwritten in place: a write that a kill interrupts
may be there in part, which does no harm, because it was not acknowledged and is asked for again.
"""

from __future__ import annotations

import errno
import mmap
from array import array
from collections.abc import Iterator, MutableMapping
from typing import Any

import msgspec
from msgspec.msgpack import Decoder, Encoder, decode

from udf.driver.journal import Journal
from udf.driver.memory import give_back
from udf.errors import UserError

PAGE = 4096
_CHUNK = 512  # pages of a file in one record of a snapshot
_ZEROS = bytes(PAGE)

Key = str | bytes


class _Record(msgspec.Struct, array_like=True):
    name: str


class _Set(_Record, tag=1):
    key: Any  # str or bytes
    value: msgspec.Raw


class _Delete(_Record, tag=2):
    key: Any  # str or bytes


class _File(_Record, tag=3):
    """The file is there, with this size and no pages."""

    size: int


class _Pages(_Record, tag=4):
    """From page `first` on the file has these pages; 0 is none, n is the arena's page n - 1."""

    size: int
    first: int
    pages: list[int]


class _Cut(_Record, tag=5):
    size: int


class _Remove(_Record, tag=6):
    pass


_encode = Encoder().encode
_decode = Decoder(_Set | _Delete | _File | _Pages | _Cut | _Remove).decode


class StoreDict(MutableMapping[Key, Any]):
    """A dict whose changes outlive the process. A value that was got is a copy: set it again to change it."""

    def __init__(self, journal: Journal, name: str) -> None:
        self._journal = journal
        self._name = name
        self._items: dict[Key, bytes] = {}

    def __getitem__(self, key: Key) -> Any:
        return decode(self._items[key])

    def __contains__(self, key: object) -> bool:
        return key in self._items

    def __setitem__(self, key: Key, value: Any) -> None:
        """Set and commit. OSError(ENOSPC) when the store is full, TypeError for what msgpack does not have."""
        if not isinstance(key, str | bytes):
            raise TypeError(f"a key of a store's dict is str or bytes, not {type(key).__name__}")
        data = _encode(value)
        self._journal.append(_encode(_Set(self._name, key, msgspec.Raw(data))))
        self._items[key] = data

    def __delitem__(self, key: Key) -> None:
        if key not in self._items:
            raise KeyError(key)
        self._journal.append(_encode(_Delete(self._name, key)), frees=True)
        del self._items[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class StoreFile:
    """Bytes that outlive the process; a hole reads as zeros and takes no memory."""

    def __init__(self, shelf: Shelf, name: str) -> None:
        self._shelf = shelf
        self._name = name
        self._pages = array("Q")
        self.size = 0

    def pread(self, size: int, offset: int) -> bytes:
        """Return what is at *offset*, shorter only at the end of the file."""
        if offset < 0 or size < 0:
            raise OSError(errno.EINVAL, "negative size or offset")
        end = min(offset + size, self.size)
        view = self._shelf.arena
        parts = []
        while offset < end:
            count = min(end - offset, PAGE - offset % PAGE)
            place = self._place(offset // PAGE)
            at = (place - 1) * PAGE + offset % PAGE
            parts.append(view[at : at + count] if place else _ZEROS[:count])
            offset += count
        return b"".join(parts)

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> int:
        """Write all of *data* and commit, or raise OSError(ENOSPC) and change nothing."""
        if offset < 0:
            raise OSError(errno.EINVAL, "negative offset")
        source = memoryview(data).cast("B")
        if not source:
            return 0
        shelf = self._shelf
        end = offset + len(source)
        first, stop = offset // PAGE, (end - 1) // PAGE + 1
        places = [self._place(page) for page in range(first, stop)]
        missing = [i for i, place in enumerate(places) if not place]
        size = max(self.size, end)
        changed = bool(missing) or size > self.size
        if changed:
            shelf.journal.require(9 * len(places) + 5 * len(self._name) + 64)
        for i, place in zip(missing, shelf.take(len(missing)), strict=True):
            places[i] = place
            if i == 0 or i == len(places) - 1:
                shelf.arena[(place - 1) * PAGE : place * PAGE] = _ZEROS
        at = offset
        for place in places:
            count = min(end - at, PAGE - at % PAGE)
            to = (place - 1) * PAGE + at % PAGE
            shelf.arena[to : to + count] = source[at - offset : at - offset + count]
            at += count
        if changed:
            shelf.journal.append(_encode(_Pages(self._name, size, first, places)))
            self.apply_pages(size, first, places)
        return len(source)

    def truncate(self, size: int) -> None:
        """Set the size and commit; pages beyond it are freed, new bytes read as zeros."""
        if size < 0:
            raise OSError(errno.EINVAL, "negative size")
        self._shelf.journal.append(_encode(_Cut(self._name, size)), frees=True)
        self._shelf.release(self.apply_cut(size))
        self.zero_tail()

    def remove(self) -> None:
        """Remove the file; this object must not be used any more."""
        self._shelf.journal.append(_encode(_Remove(self._name)), frees=True)
        self._shelf.forget(self._name)
        self._shelf.release(self.apply_cut(0))

    # for the shelf: what a record does in memory

    def apply_pages(self, size: int, first: int, places: list[int]) -> None:
        """Take pages over from a record."""
        pages = self._pages
        if len(pages) < first + len(places):
            pages.frombytes(bytes(8 * (first + len(places) - len(pages))))
        pages[first : first + len(places)] = array("Q", places)
        self.size = size

    def apply_cut(self, size: int) -> list[int]:
        """Take a new size over; return the pages that are free by it."""
        keep = (size + PAGE - 1) // PAGE
        freed = [place for place in self._pages[keep:] if place]
        del self._pages[keep:]
        self.size = size
        return freed

    def zero_tail(self) -> None:
        """See to it that bytes behind the end are zeros, which a kill may have prevented."""
        place = self._place(self.size // PAGE)
        if self.size % PAGE and place:
            self._shelf.arena[(place - 1) * PAGE + self.size % PAGE : place * PAGE] = _ZEROS[self.size % PAGE :]

    def used(self) -> Iterator[int]:
        """Yield the arena's pages of this file."""
        return (place for place in self._pages if place)

    def records(self) -> Iterator[bytes]:
        """Yield records that make this file."""
        yield _encode(_File(self._name, self.size))
        for first in range(0, len(self._pages), _CHUNK):
            places = self._pages[first : first + _CHUNK].tolist()
            yield _encode(_Pages(self._name, self.size, first, places))

    def _place(self, page: int) -> int:
        return self._pages[page] if page < len(self._pages) else 0


class Shelf:
    """All dicts and files of one store."""

    def __init__(self, journal: Journal, arena: mmap.mmap) -> None:
        self.journal = journal
        self.arena = arena
        self._dicts: dict[str, StoreDict] = {}
        self._files: dict[str, StoreFile] = {}
        for data in journal.replay():
            self._apply(data)
        used = {place for file in self._files.values() for place in file.used()}
        self._top = max(used, default=0)  # pages are counted from 1, pages above have never been used or are free
        self._free = [place for place in range(self._top, 0, -1) if place not in used]
        if self._top * PAGE > len(self.arena):
            raise UserError(f"the files of the state store need more than its limit of {len(self.arena)} bytes")
        give_back(arena, self._top * PAGE, len(arena))
        for file in self._files.values():
            file.zero_tail()
        journal.compact_with(self._snapshot)

    def _apply(self, data: bytes) -> None:
        try:
            record = _decode(data)
        except msgspec.DecodeError as exc:
            raise UserError(f"the state store holds a record that is none of a dict or file: {exc}") from exc
        match record:
            case _Set():
                self.dict(record.name)._items[record.key] = bytes(record.value)
            case _Delete():
                self.dict(record.name)._items.pop(record.key, None)
            case _File():
                file = self._files[record.name] = StoreFile(self, record.name)
                file.size = record.size
            case _Remove():
                self._files.pop(record.name, None)
            case _Pages() if record.name in self._files:
                self._files[record.name].apply_pages(record.size, record.first, record.pages)
            case _Cut() if record.name in self._files:
                self._files[record.name].apply_cut(record.size)

    def _snapshot(self) -> Iterator[bytes]:
        for name, items in list(self._dicts.items()):
            for key in list(items._items):
                value = items._items.get(key)
                if value is not None:
                    yield _encode(_Set(name, key, msgspec.Raw(value)))
        for name in list(self._files):
            file = self._files.get(name)
            for record in file.records() if file is not None else ():
                if self._files.get(name) is not file:
                    break  # removed meanwhile; another may have its name now
                yield record

    def dict(self, name: str) -> StoreDict:
        """Return the dict of this name."""
        found = self._dicts.get(name)
        if found is None:
            found = self._dicts[name] = StoreDict(self.journal, name)
        return found

    def file(self, name: str) -> StoreFile:
        """Return the file of this name; a new one is committed."""
        found = self._files.get(name)
        if found is None:
            self.journal.append(_encode(_File(name, 0)))
            found = self._files[name] = StoreFile(self, name)
        return found

    def forget(self, name: str) -> None:
        """Drop a removed file."""
        del self._files[name]

    # pages

    def take(self, count: int) -> list[int]:
        """Take *count* pages with arbitrary bytes in them, or raise ENOSPC and take none."""
        if count > len(self._free) + len(self.arena) // PAGE - self._top:
            raise OSError(errno.ENOSPC, "the files of the state store are full")
        old = min(count, len(self._free))
        taken = [self._free.pop() for _ in range(old)]
        taken += range(self._top + 1, self._top + 1 + count - old)
        self._top += count - old
        return taken

    def release(self, places: list[int]) -> None:
        """Take pages back; no committed record names them any more."""
        self._free += places
        places.sort()
        start = 0
        for i in range(1, len(places) + 1):
            if i == len(places) or places[i] != places[i - 1] + 1:
                give_back(self.arena, (places[start] - 1) * PAGE, places[i - 1] * PAGE)
                start = i
