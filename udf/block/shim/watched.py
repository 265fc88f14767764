"""The sectors of one unit that have to be the same when its device comes back, and what each of them may hold then.

Owns: a checksum for each sector that a client has called metadata, and for the first 4 KiB of the unit and of each
partition that was opened. Until a FLUSH has covered a write the device may come back with what was there before it, so
each content since the last flush is as good as the newest. Must never: grow without bound (the oldest are forgotten),
believe a content that it cannot be sure of (that is not compared), or cost a write of data more than a look at a table
of 64 KiB chunks.
Called by: units.py as answers come, verification.py when the device is back.

A checksum is Python's own keyed hash of 64 bits: nobody can aim at it, and it never leaves this process. A sector
takes some 120 bytes here, at worst 250: with `MOST` of them 8 to 16 MiB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from struct import Struct
from typing import NamedTuple

from udf.block.shim.buffers import Buffer, Pool

SECTOR = 512
MOST = 65_536  # sectors of a unit
HEAD = 4096  # bytes at the beginning of a unit or a partition
_MOST_HEADS = 256
_CHUNK = 7  # sectors of a chunk, as a power of two
_MOST_CONTENTS = 16  # of one sector between two flushes; one that had more may hold anything until the next
_MOST_LATER = 16
_ZEROS = hash(bytes(SECTOR))
_SECTORS = Struct(f"{SECTOR}s")

Span = tuple[int, int, int]  # of bytes: start, end, and the newest write in it


class Seen(NamedTuple):
    """What a read has told."""

    offset: int
    length: int
    buffer: Buffer
    at: int  # where it begins in the buffer
    mark: int  # that `expect` has given
    unflushed: list[Span]  # what was written there and may still be undone, to what was before and nobody has seen


def checksums(data: memoryview) -> list[int]:
    """Of each sector of *data*, which is whole ones."""
    return [hash(sector) for (sector,) in _SECTORS.iter_unpack(data)]


class Watched:
    """What is known of one unit's sectors."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._later: list[Seen] = []  # whose checksums are still to be made: before anything else is told or asked
        self._newest: dict[int, int | None] = {}  # sector -> its content; None: not seen yet. The oldest first
        self._chunks: dict[int, int] = {}  # chunk -> sectors of it that are watched
        # What a sector may hold besides, oldest first, each with the write that replaced it; None: anything.
        self._before: dict[int, list[tuple[int, int | None]]] = {}
        self._heads: dict[int, int] = {}  # byte offset -> bytes
        self._pinned: set[int] = set()  # their sectors, which are not forgotten
        self.changes = 0  # grows when anything but a read changes what is known, or that something is

    def __len__(self) -> int:
        return len(self._newest)

    # ---- what is watched

    def pin(self, offset: int, size: int) -> None:
        """What begins there is to be known again by its first bytes."""
        if offset in self._heads or offset % SECTOR:
            return
        if len(self._heads) >= _MOST_HEADS:
            del self._heads[next(iter(self._heads))]
            self._pinned = {s for at, length in self._heads.items() for s in _whole(at, length)}
        self._heads[offset] = min(size, HEAD) // SECTOR * SECTOR
        self._pinned.update(_whole(offset, self._heads[offset]))
        self.expect(offset, self._heads[offset])

    def unseen_heads(self) -> list[tuple[int, int]]:
        """Heads that must be read before they can be compared: offset and size."""
        self.digest()
        newest = self._newest
        return [
            (offset, size)
            for offset, size in self._heads.items()
            if size and not all(newest.get(sector) is not None for sector in _whole(offset, size))
        ]

    def expect(self, offset: int, length: int) -> int:
        """A read will tell what is there: from now on writes there count. Returns the mark to be given to `learn`."""
        newest, chunks = self._newest, self._chunks
        whole = _whole(offset, length)
        at = whole.start
        while at < whole.stop:
            chunk = at >> _CHUNK
            end = min(whole.stop, (chunk + 1) << _CHUNK)
            sectors: Iterable[int] = range(at, end)
            at = end
            if chunk in chunks:
                if len(newest) > MOST // 2:  # before that nothing is about to be forgotten
                    for sector in sectors:
                        if sector in newest:
                            newest[sector] = newest.pop(sector)  # the youngest again
                sectors = [sector for sector in sectors if sector not in newest]
            before = len(newest)
            newest.update(dict.fromkeys(sectors))
            if len(newest) > before:
                chunks[chunk] = chunks.get(chunk, 0) + len(newest) - before
        self._forget_oldest()
        return self.changes

    def learn_later(self, seen: Seen) -> None:
        """A read has told what is there, and nobody was writing there when it did. The buffer gets another reader."""
        seen.buffer.refs += 1
        self._later.append(seen)
        if len(self._later) >= _MOST_LATER:
            self.digest()

    def digest(self) -> None:
        """Make the checksums of what was read: while the driver works, not while a program waits for its data."""
        if self._later:
            later, self._later = self._later, []
            for seen in later:
                data = seen.buffer.view[seen.at : seen.at + seen.length]
                self._learn(seen.offset, data, seen.mark, seen.unflushed)
                self._pool.drop(seen.buffer)

    def _learn(self, offset: int, data: memoryview, mark: int, unflushed: list[Span]) -> None:
        newest, before = self._newest, self._before
        sectors = _whole(offset, len(data))
        start = sectors.start * SECTOR - offset
        contents = checksums(data[start : start + len(sectors) * SECTOR])
        calm = mark == self.changes
        if calm and len(sectors) <= MOST // 2 and before.keys().isdisjoint(sectors):
            newest.update(zip(sectors, contents, strict=True))  # the usual case, and a fast one
        else:
            for sector, content in zip(sectors, contents, strict=True):
                # What was written is known better, and what was forgotten meanwhile was so for a reason.
                if sector in newest and sector not in before and (calm or newest[sector] is None):
                    newest[sector] = content
        for first, last, version in unflushed:
            start, end = max(first, offset), min(last, offset + len(data))
            for sector in self._known(start, end - start):
                before.setdefault(sector, [(version, None)])

    # ---- what changes it

    def written(
        self, offset: int, length: int, data: memoryview | None, *, version: int | None, flagged: bool = False
    ) -> None:
        """A write (of zeros, without data) has been acknowledged.

        `version`: a flush up to it makes it safe; None: it is safe already. `flagged`: it is to be watched.
        """
        self.digest()
        whole = _whole(offset, length)
        hits = [*self._known(offset, length)]
        if not hits and not flagged:
            return
        self.changes += 1
        for sector in hits:
            if sector not in whole:
                self._forget(sector)  # a part of it is something else now
        base = whole.start * SECTOR - offset
        if flagged:
            sectors: list[int] | range = whole
            contents = [_ZEROS] * len(whole) if data is None else checksums(data[base : base + len(whole) * SECTOR])
        else:
            sectors = [sector for sector in hits if sector in whole]
            at = [base + (sector - whole.start) * SECTOR for sector in sectors]
            contents = [_ZEROS if data is None else hash(bytes(data[i : i + SECTOR])) for i in at]
        for sector, content in zip(sectors, contents, strict=True):
            self._replace(sector, content, version)
        self._forget_oldest()

    def _replace(self, sector: int, content: int, version: int | None) -> None:
        newest = self._newest
        old = newest.get(sector)
        if sector in newest:
            del newest[sector]
            newest[sector] = content
        else:
            self._add(sector, content)
        if version is None:
            self._before.pop(sector, None)
        elif old is None or old != content:
            contents = self._before.setdefault(sector, [])
            if len(contents) >= _MOST_CONTENTS:
                contents[:] = [(version, None)]
            else:
                contents.append((version, old))

    def unsure(self, offset: int, length: int) -> None:
        """Nobody knows what is there: it is not compared until somebody has seen it again."""
        self.digest()
        for sector in [*self._known(offset, length)]:
            self.changes += 1
            self._forget(sector)

    def doubt(self, offset: int, length: int, version: int) -> None:
        """What was written there is being written again, and may be there or not until a flush up to *version*."""
        self.digest()
        for sector in self._known(offset, length):
            self._before[sector] = [(version, None)]
        self.changes += 1

    def doubt_unflushed(self) -> None:
        """What was written since the last flush may be lost, or not."""
        self.digest()
        for sector in [*self._before]:
            self.changes += 1
            self._forget(sector)

    def flushed(self, version: int) -> None:
        """A flush has made everything safe up to this write: what was replaced by it cannot be there any more."""
        self.digest()
        for sector, contents in [*self._before.items()]:
            left = [one for one in contents if one[0] > version]
            if left:
                self._before[sector] = left
            else:
                del self._before[sector]

    # ---- what is compared

    def comparable(self) -> list[int]:
        """The sectors of which something can be said: heads first, then the newest first."""
        self.digest()
        before = self._before
        sure = [
            sector
            for sector in reversed(self._newest)
            if self._newest[sector] is not None
            and (sector not in before or all(content is not None for _, content in before[sector]))
        ]
        pinned = self._pinned
        return [s for s in sure if s in pinned] + [s for s in sure if s not in pinned]

    def is_head(self, sector: int) -> bool:
        """Whether it is one of the first of something."""
        return sector in self._pinned

    def accepts(self, sector: int, content: int) -> bool:
        """Whether a sector may hold this."""
        return content == self._newest.get(sector) or any(content == other for _, other in self._before.get(sector, ()))

    # ---- the tables

    def _known(self, offset: int, length: int) -> Iterator[int]:
        """The watched sectors of which there is a byte in the range."""
        chunks, newest = self._chunks, self._newest
        if not chunks or not length:
            return
        first, last = offset // SECTOR, (offset + length - 1) // SECTOR
        low, high = first >> _CHUNK, last >> _CHUNK
        if high - low < len(chunks):
            met = [chunk for chunk in range(low, high + 1) if chunk in chunks]
        else:
            met = [chunk for chunk in chunks if low <= chunk <= high]
        for chunk in met:
            for sector in range(max(first, chunk << _CHUNK), min(last + 1, (chunk + 1) << _CHUNK)):
                if sector in newest:
                    yield sector

    def _add(self, sector: int, content: int | None) -> None:
        self._newest[sector] = content
        chunk = sector >> _CHUNK
        self._chunks[chunk] = self._chunks.get(chunk, 0) + 1

    def _forget(self, sector: int) -> None:
        self._before.pop(sector, None)
        if sector in self._pinned:
            self._newest[sector] = None
            return
        del self._newest[sector]
        chunk = sector >> _CHUNK
        left = self._chunks[chunk] - 1
        if left:
            self._chunks[chunk] = left
        else:
            del self._chunks[chunk]

    def _forget_oldest(self) -> None:
        over = len(self._newest) - MOST
        if over <= 0:
            return
        self.changes += 1
        # Many at once: to find the first one of a table from which others were taken takes long.
        pinned = self._pinned
        oldest = islice((sector for sector in self._newest if sector not in pinned), over + MOST // 16)
        for sector in list(oldest):
            self._forget(sector)


def _whole(offset: int, length: int) -> range:
    """The sectors that lie in the range with all of their bytes."""
    first = -(-offset // SECTOR)
    return range(first, max(first, (offset + length) // SECTOR))
