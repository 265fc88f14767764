"""The writes of one unit that are acknowledged and that no FLUSH has covered yet: what a lost power supply would lose.

Owns: those writes, as ranges that do not overlap: a newer one takes the place of what it covers, so all of them can be
written again in any order. Must never: grow without bound; `bytes` is what it holds, and who adds to it looks there.
Called by: units.py as answers come, recovery.py when a new generation is there.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from udf.block.shim.buffers import Buffer, Pool

_PER_ENTRY = 512  # bytes of an entry without data, generously


class Entry:
    """One range that was written (with a buffer), trimmed or zeroed."""

    __slots__ = ("at", "buffer", "deaths", "end", "flags", "op", "start", "version")

    def __init__(self, start: int, end: int, op: int, flags: int, buffer: Buffer | None, at: int, version: int) -> None:
        self.start = start
        self.end = end
        self.op = op
        self.flags = flags
        self.buffer = buffer
        self.at = at  # where its data begins in the buffer
        self.version = version
        self.deaths = 0  # of the driver at which it was being written again


class Kept:
    """Ranges in order of their place, each of the newest write to it."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._starts: list[int] = []
        self._entries: list[Entry] = []
        self._holders: dict[int, tuple[Buffer, int]] = {}  # id of a buffer -> it, entries that use it
        self.bytes = 0
        self.version = 0  # grows with each write; what a flush covers is everything up to that of its start

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> list[Entry]:
        """All that is kept."""
        return list(self._entries)

    def within(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """What is kept of a range: start, end and version of each write that has a byte in it."""
        first = max(0, bisect_right(self._starts, start) - 1)
        last = bisect_left(self._starts, end, first)
        return [(one.start, one.end, one.version) for one in self._entries[first:last] if one.end > start]

    def add(self, start: int, length: int, op: int, flags: int, buffer: Buffer | None) -> None:
        """Keep a write that has been acknowledged. The buffer gets another reader."""
        end = start + length
        starts, entries = self._starts, self._entries
        first = bisect_right(starts, start)
        if first and entries[first - 1].end > start:
            first -= 1
        last = bisect_left(starts, end, first)
        self.version += 1
        new = [Entry(start, end, op, flags, buffer, 0, self.version)]
        for old in entries[first:last]:
            if old.start < start:
                new.insert(0, self._part(old, old.start, start))
            if old.end > end:
                new.append(self._part(old, end, old.end))
        for one in new:
            self._hold(one)
        for old in entries[first:last]:
            self._let_go(old)
        entries[first:last] = new
        starts[first:last] = [one.start for one in new]

    @staticmethod
    def _part(old: Entry, start: int, end: int) -> Entry:
        part = Entry(start, end, old.op, old.flags, old.buffer, old.at + start - old.start, old.version)
        part.deaths = old.deaths
        return part

    def _hold(self, entry: Entry) -> None:
        self.bytes += _PER_ENTRY
        if entry.buffer is not None:
            buffer, uses = self._holders.get(id(entry.buffer), (entry.buffer, 0))
            self._holders[id(buffer)] = (buffer, uses + 1)
            if not uses:
                buffer.refs += 1
                self.bytes += buffer.capacity

    def _let_go(self, entry: Entry) -> None:
        self.bytes -= _PER_ENTRY
        if entry.buffer is not None:
            buffer, uses = self._holders[id(entry.buffer)]
            if uses > 1:
                self._holders[id(buffer)] = (buffer, uses - 1)
            else:
                del self._holders[id(buffer)]
                self.bytes -= buffer.capacity
                self._pool.drop(buffer)

    def covered(self, version: int) -> None:
        """A flush that began when the newest write was *version* has succeeded."""
        stay = []
        for entry in self._entries:
            if entry.version > version:
                stay.append(entry)
            else:
                self._let_go(entry)
        self._entries = stay
        self._starts = [entry.start for entry in stay]

    def remove(self, entry: Entry) -> None:
        """Give one up."""
        index = bisect_left(self._starts, entry.start)
        if index < len(self._entries) and self._entries[index] is entry:
            del self._entries[index], self._starts[index]
            self._let_go(entry)

    def remove_all(self, entries: set[Entry]) -> None:
        """Some of them are safe."""
        for entry in self._entries:
            if entry in entries:
                self._let_go(entry)
        self._entries = [entry for entry in self._entries if entry not in entries]
        self._starts = [entry.start for entry in self._entries]

    def clear(self) -> None:
        """Give all of it up."""
        self.covered(self.version)
