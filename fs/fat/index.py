"""The index of one directory: where each name is and which slots are free, after one pass over it.

Owns: which of two equal names is the one that is seen, which short names are taken, where a new entry goes.
Must never: do I/O; it is told what was read and what has been written.
Called by: directory.py.

A name of a bad image that nobody could ask for (none at all, '.', one that an earlier entry has) is replaced by the
entry's short one, and where that does not help either the entry is skipped and counted.

Memory: about 120 bytes for a short name and 210 for a long one, so 8 MB for a directory that is full of either. An
entry that is short is found by its 11 bytes alone. What is free is one integer with a bit for each slot before the end
mark, 8 KiB at most, so that finding room is a few shifts of it however large the directory.
"""

from __future__ import annotations

import functools
import itertools

from . import names
from .entries import DOT, DOTDOT, MAX_SLOTS, PER_SECTOR, VOLUME, Found, Settings

_COUNT_BITS = 5  # an entry has 21 slots at most

Place = int  # first slot and number of slots in one number


def place(slot: int, slots: int) -> Place:
    """Where an entry is."""
    return slot << _COUNT_BITS | slots


def run(at: Place) -> tuple[int, int]:
    """First slot and number of slots."""
    return at >> _COUNT_BITS, at & (1 << _COUNT_BITS) - 1


def is_listed(found: Found) -> bool:
    """Whether it is a file or a directory, and not a volume label or a way to the directory itself or up."""
    return not found.raw[11] & VOLUME and found.raw[:11] not in (DOT, DOTDOT)


class Index:
    """Names and free slots of one directory."""

    def __init__(self, settings: Settings) -> None:
        """Begin with an empty directory."""
        self._codepage = settings.codepage
        self._long: dict[str, Place] = {}  # every name that is seen, but for plain short ones
        self._short: dict[bytes, Place] = {}
        self._numbers = names.Numbers()
        self.free = 0  # bit n: slot n; none from `end` on
        self.end = 0  # slots from here on are free too, and can only be taken in order
        self.count = 0  # of entries that are listed
        self.skipped = 0  # that no name leads to
        self.is_doubtful = False  # some entry does not have the name that it should have

    # Reading

    def add(self, found: Found) -> str:
        """Take in what the directory has. The name under which it is seen; empty: under none."""
        self.take(found.slot, found.slots)
        if not is_listed(found):
            return ""
        self.count += 1
        at = place(found.slot, found.slots)
        short = found.raw[:11]
        is_first = self._short.setdefault(short, at) == at
        if found.units:
            name = names.from_units(found.units)
            if name and self._long.setdefault(names.key(name), at) == at:
                self.is_doubtful = self.is_doubtful or not is_first
                return name
            self.is_doubtful = True
        name = names.from_short(short, found.raw[12], self._codepage)
        if name and (is_first if names.is_plain(short) else self._long.setdefault(names.key(name), at) == at):
            return name
        self.is_doubtful = True
        self.skipped += 1
        return ""

    def name_of(self, found: Found) -> str:
        """The name under which an entry of this index is seen; empty: under none."""
        if not is_listed(found):
            return ""
        at = place(found.slot, found.slots)
        if found.units:
            name = names.from_units(found.units)
            if name and self._long.get(names.key(name)) == at:
                return name
        short = found.raw[:11]
        name = names.from_short(short, found.raw[12], self._codepage)
        if names.is_plain(short):
            return name if name and self._short.get(short) == at else ""
        return name if name and self._long.get(names.key(name)) == at else ""

    def find(self, name: str) -> Place | None:
        """Where the entry with this name is, long or short, in any case."""
        at = self._long.get(names.key(name))
        if at is None and (short := names.as_short(name, self._codepage)) is not None:
            at = self._short.get(short)
        return at

    # Writing

    def choose(self, name: str, *, apart_from: Place | None = None) -> tuple[bytes, int, bool]:
        """Short name, case bits and whether a long name is needed, for a name that is not there.

        *apart_from*: an entry that is about to lose its names.
        """
        alias = names.Alias(name, self._codepage)

        def is_taken(short: bytes) -> bool:
            if self._short.get(short, apart_from) != apart_from:
                return True
            # A long name that looks like a short one but has another: both would answer to it.
            seen = names.from_short(short, 0, self._codepage)
            return self._long.get(names.key(seen), apart_from) != apart_from

        if alias.is_exact and not is_taken(alias.short):
            return alias.short, alias.case, alias.needs_long
        return self._numbers.pick(alias, is_taken), 0, True

    def drop(self, found: Found) -> None:
        """An entry was removed."""
        slot, slots = found.slot, found.slots
        at = place(slot, slots)
        short = found.raw[:11]
        if self._short.get(short) == at:
            del self._short[short]
        for name in (names.from_units(found.units), names.from_short(short, found.raw[12], self._codepage)):
            if name and self._long.get(key := names.key(name)) == at:
                del self._long[key]
        self.free |= (1 << slots) - 1 << slot
        self.count -= 1
        if not self.count:
            self._numbers = names.Numbers()

    # Room

    def take(self, slot: int, slots: int) -> None:
        """These slots are in use; what is between them and the end was deleted."""
        if slot >= self.end:  # in order: most are, and this costs nothing
            self.pass_by(slot)
        else:
            self.free &= ~((1 << slots) - 1 << slot)
        self.end = max(self.end, slot + slots)

    def pass_by(self, end: int) -> None:
        """The end mark is here now, and what is before it is free where nobody has it."""
        if end > self.end:
            self.free |= (1 << end) - (1 << self.end)
            self.end = end

    def is_free(self, slot: int) -> bool:
        """Whether a slot before the end mark is nobody's."""
        return bool(self.free >> slot & 1)

    def hole(self, slots: int, *, in_one_sector: bool) -> int | None:
        """The first run of free slots before the end mark."""
        starts: int = self.free
        have = 1
        while have < slots:
            step = min(have, slots - have)
            starts &= starts >> step
            have += step
        if in_one_sector:
            starts &= _within_sector(slots)
        return (starts & -starts).bit_length() - 1 if starts else None

    def hole_near(self, found: Found, slots: int) -> int | None:
        """Room for an entry in the one sector in which another is that leaves its own slots to it."""
        base = found.slot // PER_SECTOR * PER_SECTOR
        if found.slot + found.slots > base + PER_SECTOR or slots > PER_SECTOR:
            return None
        end = min(self.end - base, PER_SECTOR)
        mine = (1 << found.slots) - 1 << found.slot - base
        free = self.free >> base & (1 << PER_SECTOR) - 1 | mine | (1 << PER_SECTOR) - (1 << end)
        wanted = (1 << slots) - 1
        # Its own place first: so the order of a listing stays. Never with a gap behind the end.
        for start in itertools.chain((found.slot - base,), range(end + 1)):
            if start + slots <= PER_SECTOR and free >> start & wanted == wanted:
                return base + start
        return None


@functools.lru_cache(maxsize=PER_SECTOR)
def _within_sector(slots: int) -> int:
    """The slots at which a run of so many begins that does not leave its sector."""
    if slots > PER_SECTOR:
        return 0
    pattern = (1 << PER_SECTOR - slots + 1) - 1
    return int.from_bytes(pattern.to_bytes(PER_SECTOR // 8, "little") * (MAX_SLOTS // PER_SECTOR), "little")
