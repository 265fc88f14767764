"""Slots: which belong together, which are nobody's, and that what is written is what is read."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from .formats import NOW, STAMPS, WIDE, entries, names

NARROW = entries.Settings(wide=False, utc=True)
SHORT = b"NAME~1  TXT"


def short(name: bytes = SHORT, **fields: Any) -> bytes:
    return entries.pack(name, WIDE, **{"attributes": 32, **STAMPS, **fields})


def long(name: str, of: bytes = SHORT) -> list[bytes]:
    data = entries.long_slots(name.encode("utf-16-le"), of)
    return [data[at : at + 32] for at in range(0, len(data), 32)]


def read(*slots: bytes) -> list[tuple[str, int, int]]:
    """Name, first slot and number of slots of each entry, fed slot by slot and all at once."""
    reader, whole = entries.Reader(), entries.Reader()
    found = [one for slot in slots for one in (list(reader.feed(slot)) if not reader.ended else [])]
    assert list(whole.feed(b"".join(slots))) == found
    assert (whole.slot, whole.ended) == (reader.slot, reader.ended)
    return [
        (names.from_units(f.units) or names.from_short(f.raw[:11], f.raw[12], "cp437"), f.slot, f.slots) for f in found
    ]


def test_a_long_name_goes_with_the_short_entry_behind_it() -> None:
    first, last = "A name of just twenty-six!", "and a longer one \U0001f600 of more than thirty-nine units.txt"
    slots = [*long(first), short(), *long(last), short()]
    assert len(long(first)) == 2  # no zero at the end of a full slot
    assert read(*slots) == [(first, 0, 3), (last, 3, len(long(last)) + 1)]
    assert len(long("x" * 255)) == 20
    assert read(*long("x" * 255), short()) == [("x" * 255, 0, 21)]


def test_long_slots_of_nobody_are_not_seen() -> None:
    parts, alone = long("a long name of three slots, no less"), ("NAME~1.TXT", 0)
    assert len(parts) == 3
    deleted = b"\xe5" + bytes(31)
    for left in (parts[:2], parts[1:], parts[:1], [parts[0], parts[2]], [*parts, parts[2]], [parts[1], parts[0]]):
        assert read(*left, short()) == [(alone[0], len(left), 1)]
    assert read(*parts, deleted, short()) == [(alone[0], 4, 1)]
    assert read(parts[0], deleted, *parts[1:], short()) == [(alone[0], 4, 1)]
    assert read(*parts, short(b"OTHER   TXT")) == [("OTHER.TXT", 3, 1)]
    assert read(*parts, short(attributes=8)) == [(alone[0], 3, 1)]  # a volume label has no long name
    assert read(*parts[:2], *parts, short()) == [("a long name of three slots, no less", 2, 4)]
    other = long("a long name of three slots, no less", b"OTHER   TXT")
    assert read(parts[0], other[1], parts[2], short()) == [(alone[0], 3, 1)]
    for number in (0x40, 0x55, 0x7F):  # no part, or too many
        assert read(bytes((number,)) + parts[0][1:], *parts[1:], short()) == [(alone[0], 3, 1)]
    assert read(*parts) == []


def test_the_first_zero_ends_a_directory() -> None:
    reader = entries.Reader()
    assert len(list(reader.feed(short() + bytes(32) + short()))) == 1
    assert (reader.slot, reader.ended) == (1, True)
    assert read(short(), b"\xe5" + bytes(31), short(b"B          "))[1] == ("B", 2, 1)


def test_every_field_comes_back_at_its_granularity() -> None:
    moment = NOW + 1_234_567_890
    raw = short(
        *(SHORT,),
        case=0,
        attributes=0x21,
        cluster=0x0ABCDEF1,
        size=0xFFFFFFFF,
        created_ns=moment,
        modified_ns=moment,
        accessed_ns=moment,
    )
    entry = entries.entry(entries.Found(raw, b"", 7, 1), "x", WIDE)
    assert (entry.attributes, entry.cluster, entry.size) == (0x21, 0x0ABCDEF1, 0xFFFFFFFF)
    assert entry.is_read_only
    assert not entry.is_directory
    assert entry.created_ns == moment - moment % 10_000_000
    assert entry.modified_ns == moment - moment % 2_000_000_000
    assert entry.accessed_ns == moment - moment % 86_400_000_000_000
    assert entries.cluster_of(raw, WIDE) == 0x0ABCDEF1
    # On FAT12 and FAT16 the upper half belongs to somebody else.
    assert entries.entry(entries.Found(raw, b"", 7, 1), "x", NARROW).cluster == 0xDEF1
    assert entries.patch(raw, NARROW, {"cluster": 3})[20:22] == raw[20:22]


def test_a_patch_changes_its_fields_and_no_other() -> None:
    raw = bytes(range(32))
    assert entries.patch(raw, WIDE, {}) == raw
    changed = entries.patch(raw, WIDE, {"size": 1, "cluster": 0x20003})
    assert [n for n in range(32) if changed[n] != raw[n]] == [20, 21, 26, 27, 28, 29, 30, 31]
    changed = entries.patch(raw, WIDE, {"attributes": 0x20, "created_ns": NOW, "modified_ns": NOW, "accessed_ns": NOW})
    assert (
        changed[:11] + changed[12:13] + changed[20:22] + changed[26:] == raw[:11] + raw[12:13] + raw[20:22] + raw[26:]
    )
    renamed = entries.renamed(raw[:12] + b"\xf7" + raw[13:], b"NEW        ", 0x18)
    assert renamed == b"NEW        " + raw[11:12] + b"\xff" + raw[13:]


@given(st.binary(max_size=32 * 24), st.integers(0, 3))
def test_any_bytes_are_entries_or_nothing(data: bytes, seed: int) -> None:
    # Mostly slots of long names, or nothing would ever fit together.
    piece = bytearray(data[: len(data) // 32 * 32])
    for at in range(0, len(piece), 32):
        if piece[at + 1] & 3 > seed:
            piece[at + 11] = 15
    reader = entries.Reader()
    end = 0
    for found in reader.feed(bytes(piece)):
        assert found.slot >= end
        assert 1 <= found.slots <= 21
        end = found.slot + found.slots
        assert end <= len(piece) // 32
        assert found.raw == piece[(end - 1) * 32 : end * 32]
        assert entries.entry(found, "x", WIDE).slots == found.slots


@given(st.text(min_size=1, max_size=120))
def test_what_is_written_is_what_is_read(name: str) -> None:
    try:
        name, units = names.checked(name)
    except OSError:
        return
    data = entries.long_slots(units, SHORT) + short()
    assert list(entries.Reader(5).feed(data)) == [entries.Found(short(), units, 5, len(data) // 32)]
