"""What a generation leaves to the next one: the change that it was about to write, and what is still to be done.

Owns: the records in the state store, and the numbers of inodes. Must never: touch the device, or believe a store that
is about another volume. Called by: change.py before each change is written, volume.py at the start and at the end.

Each record is everything, so the last one is all that counts: the steps of the last change (writing them again is
harmless: no other has altered those sectors since), the chains that nobody owns any more, the files that have clusters
in advance, the count of free clusters, and whether the dirty bit is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from udf import Store, UserError

if TYPE_CHECKING:
    from .change import Change

SCHEMA = 1
_LIMIT = 32 << 20  # bytes of records before compaction
_NUMBERS = 4096  # inode numbers that are set aside at once

Exchange = tuple[int, bytes, int, bytes]
"""Twice: a directory's first cluster and a name."""

Steps = list[tuple[bool, list[tuple[int, bytes]]]]


class Record(msgspec.Struct, array_like=True):
    """All that the next generation has to know."""

    volume: bytes
    steps: Steps = []
    orphans: list[int] = []
    ahead: list[tuple[int, int]] = []  # directory's first cluster and slot of files that have clusters in advance
    free: int = -1
    next: int = 2
    dirty: bool = False  # the volume is marked as in use, and it was us
    exchange: Exchange | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Record).decode


class Intents:
    """The state store of one mount."""

    def __init__(self, store: Store | None) -> None:
        self._store = store or Store.temporary()
        self._journal = self._store.journal(schema=SCHEMA, limit=_LIMIT)
        self._words = self._store.table(1)
        self._number = self._numbers_end = 0
        last = None
        for last in self._journal.replay():  # noqa: B007 - only the last counts
            pass
        self.left: Record | None = None  # by the generation before
        if last is not None:
            try:
                self.left = _decode(last)
            except msgspec.DecodeError as exc:
                raise UserError(f"the state store holds a record that is none of this driver: {exc}") from exc
        self._now = self.left or Record(b"")
        self.unanswered: Exchange | None = None  # a renaming that was done, and of which nobody may have been told
        self._journal.compact_with(self._snapshot)

    def _snapshot(self) -> Iterator[bytes]:
        yield _encode(self._now)

    def begin(self, volume: bytes) -> None:
        """Go on with this volume, which is named by these bytes; what is left of another is of no use."""
        if self._now.volume != volume:
            self.left = None
            self._append(Record(volume))
        elif self.left is not None:
            self.unanswered = self.left.exchange

    def _append(self, record: Record, frees: bool = False) -> None:
        self._journal.append(_encode(record), frees)
        self._now = record

    def record(self, change: Change, steps: Steps) -> None:
        """Note a change before it is written."""
        now = self._now
        orphans = now.orphans
        if change.orphans or change.adopted:
            orphans = [first for first in (*orphans, *change.orphans) if first not in change.adopted]
        ahead = now.ahead
        if change.ahead or change.not_ahead:
            ahead = sorted(set(ahead) - set(change.not_ahead) | set(change.ahead))
        self._append(
            Record(
                now.volume,
                steps,
                orphans,
                ahead,
                -1 if change.free_after is None else change.free_after,
                change.next_after,
                change.dirty_after,
                change.exchange,
            ),
            True,
        )

    def is_done(self, exchange: Exchange) -> bool:
        """Whether just this exchange of names is what the generation before had done last, unanswered.

        Of all requests this is the one that looks the same before and after, and that twice is not the same as once.
        """
        done, self.unanswered = self.unanswered == exchange, None
        return done

    def settled(self) -> None:
        """The last change is not to be written again: the device has it, or has refused it."""
        if self._now.steps or self._now.exchange:
            now = self._now
            self._append(Record(now.volume, [], now.orphans, now.ahead, now.free, now.next, now.dirty), True)

    @property
    def orphans(self) -> list[int]:
        """First clusters of chains that are to be freed."""
        return self._now.orphans

    @property
    def ahead(self) -> list[tuple[int, int]]:
        """Where the entries are of files that have clusters in advance."""
        return self._now.ahead

    def number(self) -> int:
        """A number for an inode that no generation of this mount has given out before."""
        if self._number >= self._numbers_end:
            self._number = max(self._words[0], 2)
            self._numbers_end = self._words[0] = self._number + _NUMBERS
        self._number += 1
        return self._number - 1
