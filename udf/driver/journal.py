"""The journal of a state store: records that are there completely, or not at all, whenever the process is killed.

Owns the two journals of a store: the active one, and the one into which a compaction writes. Knows nothing
of what a record means. Called by: shelf.py, and by drivers that keep their own records (fs/memfs).

A record is framed by its length and a CRC32, and counts once the commit word (how far the journal is written) has
passed it. The reader believes nothing behind that word; what is damaged before it is an error, never skipped.

Compaction: the author's snapshot, an iterator of records that make the present state, is written into the other
journal a few records at each append, so that no append waits long. A change made meanwhile goes to both journals, there
behind the part of the snapshot that was taken before it. So a snapshot may be fuzzy: records replace what they name
wholly or change it relatively, a change of what is not known (yet) is skipped, and the order says which is
newer. When the iterator ends, one word makes the other journal the active one; a kill before leaves the old one, a kill
after the new one.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterable, Iterator
from zlib import crc32

from udf.driver.memory import JOURNALS, Memory, give_back
from udf.errors import UserError

# Words of the header. Those of the second journal are _SECOND further on.
_MAGIC, _ACTIVE = 0, 1
_COMMIT, _SCHEMA, _BASE = 8, 9, 10
_SECOND = 8
_FORMAT = int.from_bytes(b"udfstor1", "little")  # the last letter is the version of this layout and of the frame

_FRAME = struct.Struct("=II")  # length, CRC32
_HEAD = _FRAME.size
_frame = _FRAME.pack

_FLOOR = 1 << 20  # a journal that is smaller is not worth a compaction
_SLICE = 4  # records of a snapshot that one append copies
_PUNCH = 4 << 20  # bytes of the journal that was left whose memory one append gives back
_RESERVE = 64 << 10  # bytes that only records which free something may use

Snapshot = Callable[[], Iterable[bytes]]
Full = Callable[[], Exception]
Migration = Callable[[int, Iterator[bytes]], Iterable[bytes]]


class Journal:
    """An append-only sequence of records, at most *limit* bytes of them after compaction."""

    __slots__ = (
        "_active", "_base", "_commit", "_copied", "_due", "_end", "_full", "_limit", "_maps", "_memory", "_punch",
        "_room", "_schema", "_snapshot", "_source", "_words",
    )  # fmt: skip

    def __init__(
        self, memory: Memory, limit: int, schema: int, migrate: Migration | None = None, full: Full | None = None
    ) -> None:
        """Open the journals of a store. UserError in one sentence when they are not what this driver can read.

        *full* makes the exception for want of room where it is not to be an OSError.
        """
        if limit < 2 * _RESERVE:
            raise ValueError(f"a journal needs at least {2 * _RESERVE} bytes, not {limit}")
        self._words = words = memory.header
        self._maps = [memory.map(region, limit) for region in JOURNALS]
        self._limit = limit
        self._schema = schema
        self._full = full or (lambda: OSError(errno.ENOSPC, "the state store is full"))
        self._room = limit - _RESERVE
        self._snapshot: Snapshot | None = None
        self._source: Iterator[bytes] | None = None  # the rest of the snapshot while a compaction is under way
        self._copied = 0
        fresh = words[_MAGIC] == 0
        if fresh:
            words[_SCHEMA] = schema
            words[_MAGIC] = _FORMAT
        if words[_MAGIC] != _FORMAT:
            raise UserError("the state store was written by a version of udf that this one cannot read")
        self._activate(words[_ACTIVE] & 1)
        if not fresh:  # a compaction that was killed may have left memory in the other journal
            give_back(self._maps[1 - self._active], 0, limit)
        if self._end > limit:
            raise UserError(f"the state store holds {self._end} bytes of records, more than its limit of {limit}")
        found = words[_SCHEMA + self._active * _SECOND]
        if found != schema:
            if migrate is None:
                raise UserError(f"the state store has schema {found}, but this driver reads only schema {schema}")
            self._start_copy(migrate(found, self.replay()))
            if not self._finish_copy():
                raise UserError(f"the state store is too small for what schema {schema} makes of its records")

    def _activate(self, which: int) -> None:
        self._active = which
        self._memory = self._maps[which]
        self._commit = _COMMIT + which * _SECOND
        self._end = self._words[self._commit]
        self._base = self._words[_BASE + which * _SECOND]
        self._due = 2 * self._base + _FLOOR
        self._punch = 0

    @property
    def size(self) -> int:
        """How many bytes of records there are, those included that a compaction will drop."""
        return self._end

    @property
    def is_compacting(self) -> bool:
        """Whether a compaction is under way."""
        return self._source is not None

    def replay(self) -> Iterator[bytes]:
        """Yield the committed records, oldest first. UserError when one is not what was written."""
        memory, end, at = self._memory, self._end, 0
        unpack, head = _FRAME.unpack_from, _HEAD
        while at < end:
            start = at + head
            if start > end:
                raise _damage(at)
            length, checksum = unpack(memory, at)
            stop = start + length
            if stop > end:
                raise _damage(at)
            record = memory[start:stop]
            if crc32(record) != checksum:
                raise _damage(at)
            yield record
            at = stop

    def compact_with(self, snapshot: Snapshot) -> None:
        """Allow compaction: *snapshot* gives an iterator of records that make the state, evaluated bit by bit.

        Called when the state is loaded. If processes died so fast that no compaction came to its end, it is done now,
        because a journal that is read again and again costs more.
        """
        self._snapshot = snapshot
        if self._end > 2 * self._due:
            self.compact()

    def append(self, record: bytes, frees: bool = False) -> None:
        """Commit a record, before the change that it tells of is made in memory; a whole batch can be one record.

        OSError(ENOSPC), and nothing is changed, when there is no room. Records that free something have a reserve.
        """
        length = len(record)
        at = self._end
        end = at + _HEAD + length
        if end > self._room:
            at = self._make_room(length, frees)
            end = at + _HEAD + length
        self._memory[at:end] = _frame(length, crc32(record)) + record
        self._words[self._commit] = end
        self._end = end
        if end > self._due:
            self._step(record)

    def require(self, size: int) -> None:
        """Raise OSError(ENOSPC) unless records of so many bytes together (frames included) can be appended now."""
        if self._end + size > self._room:
            self._make_room(size, False)

    # compaction

    def compact(self) -> None:
        """Compact now, to the end; for a driver that has time."""
        if self._snapshot is not None:
            if self._source is None:
                self._start_copy(self._snapshot())
            self._finish_copy()

    def _make_room(self, length: int, frees: bool) -> int:
        """Compact where that can help; return where the next record goes, or raise ENOSPC."""
        room = self._limit if frees else self._room
        if self._end + _HEAD + length > room and (self.is_compacting or self._end - self._base > self._limit // 16):
            self.compact()
        if self._end + _HEAD + length > room:
            raise self._full()
        return self._end

    def _step(self, record: bytes) -> None:
        """Do a bounded part of a compaction after *record* was committed, whose change is not made yet."""
        if self._source is None:
            memory = self._maps[1 - self._active]
            if self._punch:
                start = max(0, self._punch - _PUNCH)
                give_back(memory, start, self._punch)
                self._punch = start
                return
            if self._end <= 2 * self._base + _FLOOR or self._snapshot is None:
                self._due = 2 * self._base + _FLOOR if self._snapshot is not None else self._limit
                return
            self._start_copy(self._snapshot())
        assert self._source is not None
        for _ in range(_SLICE):
            part = next(self._source, None)
            if part is None:
                # The record comes last: the snapshot was taken before its change.
                if self._copy(record):
                    self._switch()
                return
            if not self._copy(part):
                return
        self._copy(record)

    def _start_copy(self, records: Iterable[bytes]) -> None:
        self._source = iter(records)
        self._copied = 0
        self._due = 0  # from here on each append comes by

    def _finish_copy(self) -> bool:
        assert self._source is not None
        for part in self._source:
            if not self._copy(part):
                return False
        self._switch()
        return True

    def _copy(self, record: bytes) -> bool:
        """Put one record into the other journal; when it does not fit the compaction is given up."""
        at = self._copied
        end = at + _HEAD + len(record)
        if end > self._limit:
            self._source = None
            self._due = self._limit
            return False
        self._maps[1 - self._active][at:end] = _frame(len(record), crc32(record)) + record
        self._copied = end
        return True

    def _switch(self) -> None:
        other = 1 - self._active
        left = self._end
        words = self._words
        words[_COMMIT + other * _SECOND] = words[_BASE + other * _SECOND] = self._copied
        words[_SCHEMA + other * _SECOND] = self._schema
        words[_ACTIVE] = other  # the one word that decides
        self._source = None
        self._activate(other)
        self._punch = left
        self._due = 0


def _damage(at: int) -> UserError:
    return UserError(f"the state store is damaged: the record at byte {at} is not what was written")
