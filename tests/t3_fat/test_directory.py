"""Directories: against a model, in every state that a cut-off change can leave, and on nonsense.

UDF_FAT_SEEDS says with how many seeds (4): a hundred take about a minute.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .formats import NOW, STAMPS, WIDE, Cut, Memory, damage, directory, dots, entries, names, open_directory

SEEDS = int(os.environ.get("UDF_FAT_SEEDS", "4"))  # of the random runs
LONG = "a long name that needs {} slots or so, as many as are in it.txt"


async def insert(d: Any, name: str, **fields: Any) -> Any:
    return await d.insert(name, **{"attributes": 32, **STAMPS, **fields})


async def listed(data: bytes, **options: Any) -> dict[str, Any]:
    """What a reader who has no index finds."""
    return {entry.name: entry for entry in await directory.Directory(Memory(data, **options), WIDE).list()}


def sound(data: bytes) -> None:
    """No orphan, no short name twice, nothing behind the end mark."""
    data = bytes(data)
    reader = entries.Reader()
    shorts, used = [], set()
    for found in reader.feed(data):
        shorts.append(found.raw[:11])
        used |= set(range(found.slot, found.slot + found.slots))
    assert len(set(shorts)) == len(shorts)
    for slot in range(reader.slot):
        assert (slot in used) == (data[slot * 32] != 0xE5), f"slot {slot} is nobody's"
    assert not any(data[slot * 32] for slot in range(reader.slot, len(data) // 32))


async def test_what_is_inserted_is_found_by_each_of_its_names() -> None:
    d, stream = open_directory()
    long = await insert(d, "Long name.text", size=5, cluster=0x12345)
    plain = await insert(d, "plain.txt")
    assert (long.name, long.short, long.slots, long.size, long.cluster) == (
        "Long name.text",
        b"LONGNA~1TEX",
        3,
        5,
        0x12345,
    )
    assert (plain.short, plain.slots) == (b"PLAIN   TXT", 1)
    for name in ("Long name.text", "LONG NAME.TEXT", "long name.text...", "longna~1.tex"):
        assert await d.find(name) == long
    assert await d.find("PLAIN.txt") == plain
    for name in ("Long name.tex", "plain", "plain.txt ", "", "...", "x" * 300, "\ud800"):
        assert await d.find(name) is None
    for name in ("LONG NAME.text", "LONGNA~1.TEX", "plain.TXT."):
        with pytest.raises(FileExistsError):
            await insert(d, name)
    assert await d.list() == [long, plain]
    assert not await d.is_empty()
    sound(stream.data)


async def test_numbers_go_up_and_avoid_what_is_there() -> None:
    d, _ = open_directory()
    await insert(d, "common~2.txt")
    await insert(d, "common name.txt")
    shorts = [(await insert(d, f"common name {n}.txt")).short for n in range(12)]
    assert shorts[:2] == [b"COMMON~3TXT", b"COMMON~4TXT"]
    assert shorts[6:9] == [b"COMMON~9TXT", b"COMMO~10TXT", b"COMMO~11TXT"]
    assert (await d.find("common~1.txt")).name == "common name.txt"


async def test_an_update_is_one_write_of_what_changed() -> None:
    d, stream = open_directory()
    entry = await insert(d, LONG.format(6), size=1)
    stream.writes.clear()
    later = await d.update(entry, size=77, cluster=9, modified_ns=NOW + 60_000_000_000)
    assert len(stream.writes) == 1
    assert later == replace(entry, size=77, cluster=9, modified_ns=NOW + 60_000_000_000)
    assert await d.find(entry.name) == later
    assert await d.update(later, size=77) == later
    assert len(stream.writes) == 1
    with pytest.raises(TypeError):
        await d.update(later, slot=3)
    await d.remove(later)
    for change in (d.update(later, size=1), d.remove(later), d.rename(later, "x")):
        with pytest.raises(FileNotFoundError):
            await change


async def test_an_entry_is_written_at_once_unless_it_is_too_long() -> None:
    d, stream = open_directory()
    for n in range(40):
        before = len(stream.writes)
        entry = await insert(d, f"{'x' * (n % 12) * 13}{n} long name.txt")
        assert entry.slot // 16 == (entry.slot + entry.slots - 1) // 16
        assert len(stream.writes) - before <= 3  # zeros for a new cluster aside: what is skipped, and the entry
    sound(stream.data)
    entry = await insert(d, "y" * 255)
    assert entry.slots == 21


async def test_room_is_used_again() -> None:
    d, stream = open_directory()
    made = [await insert(d, f"a long name {n:04}.txt") for n in range(200)]
    size = stream.size
    for _ in range(3):
        for entry in made[::2]:
            await d.remove(entry)
        for n in range(0, 200, 2):
            made[n] = await insert(d, f"another name {n:03}.txt")
    assert stream.size == size
    for entry in made:
        await d.remove(entry)
    assert await d.is_empty()
    d.forget()
    assert await d.is_empty()
    for n in range(11):
        await insert(d, f"{n} {'z' * 240}")  # straddles sectors
    assert stream.size == size
    sound(stream.data)


async def test_a_rename_in_its_sector_is_one_write() -> None:
    d, stream = open_directory()
    entry = await insert(d, "first.txt")
    other = await insert(d, "other.txt")
    for new in ("second.txt", "Second.TXT", "a longer name than this.text", "short", "Other name", "SECOND.txt"):
        stream.writes.clear()
        renamed = await d.rename(entry, new)
        assert len(stream.writes) == 1
        assert renamed == replace(entry, name=new, short=renamed.short, slot=renamed.slot, slots=renamed.slots)
        assert await d.find(new.upper()) == renamed
        assert set(await listed(stream.data)) == {new, "other.txt"}
        sound(stream.data)
        entry = renamed
    with pytest.raises(FileExistsError):
        await d.rename(entry, "OTHER.TXT")
    assert await d.find("other.txt") == other


async def test_a_rename_to_its_own_short_name_is_possible() -> None:
    d, stream = open_directory()
    entry = await insert(d, "A long name")
    entry = await d.rename(entry, "alongn~1")
    assert await d.list() == [entry]
    assert entry.short == b"ALONGN~1   "
    # Also where there is no room for it nearby.
    for n in range(20):
        await insert(d, f"FILL{n}")
    entry = await d.rename(entry, "Alongn~1")
    entry = await d.rename(entry, "aLONGN~1")
    assert await d.find("alongn~1") == entry
    assert len(await listed(stream.data)) == 21
    sound(stream.data)


async def test_the_directory_grows_to_its_limit_and_no_further() -> None:
    d, stream = open_directory(cluster=65536)
    stream.data = bytearray(65535 * 32 + 32)
    raw = entries.pack(b"X          ", WIDE, attributes=32, **STAMPS)
    for slot in range(65535):
        stream.data[slot * 32 : slot * 32 + 32] = b"%08d   " % slot + raw[11:]
    with pytest.raises(OSError) as full:
        await insert(d, "too long a name")
    assert full.value.errno == errno.ENOSPC
    last = await insert(d, "short")
    assert last.slot == 65535
    with pytest.raises(OSError) as full:
        await insert(d, "x")
    assert full.value.errno == errno.ENOSPC
    assert stream.size == 65536 * 32
    await d.remove(await d.find("00000123"))
    assert (await insert(d, "x")).slot == 123


async def test_the_fixed_root_is_filled_to_the_last_slot() -> None:
    stream = Memory(cluster=512 * 32, most=512 * 32)
    d = directory.Directory(stream, WIDE, is_fixed=True)
    count = 0
    with contextlib.suppress(OSError):
        while True:
            await insert(d, f"a long name {count:04}.txt")
            count += 1
    assert count >= 512 // 3 - 9
    for n in range(512 - sum([e.slots for e in await d.list()])):
        await insert(d, f"{n}")
    with pytest.raises(OSError):
        await insert(d, "one more")
    sound(stream.data)


async def test_a_full_device_leaves_the_directory_as_it_was() -> None:
    d, stream = open_directory(most=512)
    made = [await insert(d, f"{n}") for n in range(15)]
    with pytest.raises(OSError) as full:
        await insert(d, "a long name")
    assert full.value.errno == errno.ENOSPC
    assert await d.list() == made
    await insert(d, "short")
    assert len(await listed(stream.data)) == 16
    sound(stream.data)


async def test_nothing_old_comes_back_from_behind_the_end() -> None:
    old = entries.pack(b"OLD        ", WIDE, attributes=32, **STAMPS)
    for name in ("new", "a new name", "n" * 200, "n" * 250):
        for before in range(17):
            stream = Memory(old * 64)
            stream.data[before * 32] = 0
            for n in range(before):
                stream.data[n * 32 : n * 32 + 11] = b"%-11d" % n
            first = bytes(stream.data)
            for left in range(8):
                stream.data[:], stream.left = first, left
                d = directory.Directory(stream, WIDE)
                try:
                    await insert(d, name)
                except Cut:
                    assert set(await listed(stream.data)) - {name} == {str(n) for n in range(before)}
                else:
                    break
            assert list(await listed(stream.data)) == [*(str(n) for n in range(before)), name]


@pytest.mark.parametrize("seed", range(SEEDS // 4))
async def test_every_cut_leaves_the_old_or_the_new(seed: int) -> None:
    """Every write of some hundred changes fails once; then somebody else reads, cleans up, and tries again."""
    pick = random.Random(seed)
    d, stream = open_directory()
    model: dict[str, int] = {}
    for step in range(150):
        name = f"{'n' * pick.choice((2, 9, 30, 220))}{step}{'.TXT' * pick.randrange(2)}"
        entry = await d.find(pick.choice(list(model))) if model and pick.random() < 0.7 else None

        what = pick.randrange(3)

        async def change(name: str = name, entry: Any = entry, what: int = what, step: int = step) -> None:
            if entry is None:
                await insert(d, name, size=step)
            elif what == 0:
                await d.rename(entry, name)
            elif what == 1:
                await d.remove(entry)
            else:
                await d.update(entry, size=step)

        after = dict(model)
        if entry is not None and what < 2:
            del after[entry.name]
        if entry is None or what == 0:
            after[name] = step if entry is None else entry.size
        if entry is not None and what == 2:
            after[entry.name] = step
        both = {**model, **after} if entry is not None and what == 0 else model
        first = bytes(stream.data)
        for left in range(100):
            stream.data[:] = first
            stream.left = left
            d.forget()
            try:
                await change()
                break
            except Cut:
                found = {n: e.size for n, e in (await listed(stream.data)).items()}
                assert found in (model, after, both)
                # The index was made again: it knows what is there.
                stream.left = -1
                assert {e.name: e.size for e in await d.list()} == found
                await d.clear_orphans()
                sound(stream.data)
                assert {n: e.size for n, e in (await listed(stream.data)).items()} == found
        model = after
        stream.left = -1
        assert {n: e.size for n, e in (await listed(stream.data)).items()} == model
        sound(stream.data)


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_random_changes_are_those_of_a_model(seed: int) -> None:
    pick = random.Random(seed)
    fixed = seed % 4 == 3
    stream = Memory(cluster=16384 if fixed else 512 << seed % 4, most=16384 if fixed else None)
    d = directory.Directory(stream, WIDE, is_fixed=fixed)
    model: dict[str, Any] = {}  # by key
    stems = ["a", "A file", "longer name \u00e4", "\U0001f600", "x" * 150, "same prefix,", "y" * 250, "q.w.e"]

    def check(entry: Any, name: str) -> None:
        assert entry.name == name
        model[names.key(name)] = entry

    for step in range(800):
        name = f"{pick.choice(stems)}{pick.choice(['', pick.randrange(60)])}"
        name = pick.choice([str.upper, str.lower, str.title, str])(name)
        entry = pick.choice(list(model.values())) if model else None
        what = pick.randrange(10)
        try:
            if what < 4 or entry is None:
                check(await insert(d, name, size=step), name)
            elif what < 6:
                await d.remove(entry)
                del model[names.key(entry.name)]
            elif what < 8:
                renamed = await d.rename(entry, name)
                del model[names.key(entry.name)]
                check(renamed, name)
            else:
                model[names.key(entry.name)] = await d.update(entry, size=step)
        except FileExistsError:
            assert await d.find(name) is not None
        except OSError as exc:
            if not fixed or exc.errno != errno.ENOSPC:
                raise
        found = await d.find(name.swapcase() if name.swapcase().swapcase() == name else name)
        if names.key(name) in model:
            assert found == model[names.key(name)]
        if step % 50 == 0:
            fresh = await listed(stream.data, cluster=stream.cluster)
            assert fresh == {e.name: e for e in model.values()} == {e.name: e for e in await d.list()}
            sound(stream.data)
            assert (await d.is_empty()) == (not model)
        if step % 170 == 0:
            d.forget()


async def test_of_equal_names_on_a_bad_volume_each_is_seen_once() -> None:
    def one(name: str, short: bytes, attributes: int = 32) -> bytes:
        slots = entries.long_slots(name.encode("utf-16-le"), short) if name else b""
        return slots + entries.pack(short, WIDE, attributes=attributes, **STAMPS)

    data = b"".join(
        (
            one("", b"LABEL      ", 8),
            one("Same name", b"SAMENA~1   "),
            one("same NAME", b"SAMENA~2   "),  # seen by its short name
            one("Same name", b"SAMENA~1   "),  # not to be seen
            one("..", b"DOTS       "),
            one("", b"A/B        "),
            one("", b".          "),
            one("", b"           "),
            one("", b"lower   \x80\x01 "),
            one("", b"LOWER   \x80\x01 "),
        )
    )
    d, stream = open_directory(data.ljust(4096, b"\0"))
    assert [e.name for e in await d.list()] == ["Same name", "SAMENA~2", "DOTS", "A_B", "lower.\u00c7\x01"]
    assert d.skipped == 3
    assert [e.name for e in await d.list()] == [e.name for e in await directory.Directory(stream, WIDE).list()]
    for entry in await d.list():
        assert await d.find(entry.name) == entry
        assert await d.at(entry.slot, entry.slots) == entry
    assert await d.at(0, 1) is None
    assert await d.at(1, 1) is None
    assert await d.at(5000, 1) is None
    assert await d.label() == "LABEL"
    for entry in await d.list():
        await d.remove(entry)
    assert not await d.is_empty()  # three are still there
    assert await d.label() == "LABEL"


def apart(entry: Any, data: bytearray) -> None:
    """Next to an entry there is no part of a long name that is not its own."""
    for near in (entry.slot - 1, entry.slot + entry.slots):
        assert near < 0 or data[near * 32] in (0, 0xE5, ord("X"))


async def test_what_a_cut_left_is_gone_before_an_entry_is_put_behind_it() -> None:
    parts = entries.long_slots("a long name of three slots, no less".encode("utf-16-le"), b"NOBODY     ")
    entry = entries.pack(b"X          ", WIDE, attributes=32, **STAMPS)
    for left in (parts, parts[:32], parts[32:]):
        for behind in (b"", entry, b"\xe5" + bytes(31) + entry):
            for name in ("new", "a new name"):
                d, stream = open_directory((left + behind).ljust(512, b"\0"))
                apart(await insert(d, name), stream.data)
                assert set(await listed(stream.data)) == {name} | {"X" for _ in behind[:1]}
                d, stream = open_directory((left + entry).ljust(512, b"\0"))
                apart(await d.rename(await d.find("x"), name), stream.data)
                sound(stream.data)


async def test_changes_to_known_entries_need_no_look_at_the_others() -> None:
    d, stream = open_directory(cluster=65536)
    made = [await insert(d, f"F{n}") for n in range(2000)]
    d.forget()
    stream.reads = 0
    later = await d.update(made[5], size=3)
    await d.remove(made[6])
    assert stream.reads < 512
    assert await d.list() == [*made[:5], later, *made[7:]]


async def test_a_short_name_is_not_given_that_is_the_long_name_of_another() -> None:
    other = entries.long_slots("alongn~1".encode("utf-16-le"), b"OTHER      ")
    other += entries.pack(b"OTHER      ", WIDE, attributes=32, **STAMPS)
    d, _ = open_directory(other.ljust(512, b"\0"))
    assert (await insert(d, "a long name")).short == b"ALONGN~2   "


async def test_dots_are_made_and_moved() -> None:
    data = entries.dots(7, 5, WIDE, NOW)
    d, stream = open_directory(data.ljust(512, b"\0"))
    assert await d.list() == []
    assert await d.is_empty()
    assert await dots.parent(stream, WIDE) == 5
    await dots.set_parent(stream, 0x12345, WIDE)
    assert await dots.parent(stream, WIDE) == 0x12345
    assert len(stream.writes) == 1
    assert (await insert(d, "x")).slot == 2
    for bad in (b"", bytes(32), data[:32] * 2, struct.pack("<11sB20x", b"..         ", 32) * 2):
        with pytest.raises(damage.Damaged):
            await dots.parent(Memory(bad), WIDE)


async def test_a_failed_write_makes_the_index_again() -> None:
    d, stream = open_directory()
    await insert(d, "one")
    stream.left = 0
    with pytest.raises(Cut):
        await insert(d, "two")
    stream.left = -1
    assert await d.find("two") is None
    await insert(d, "two")
    assert [e.name for e in await d.list()] == ["one", "two"]


async def test_an_insert_does_not_read_the_directory_again() -> None:
    d, stream = open_directory(cluster=65536)
    for n in range(2000):
        await insert(d, f"F{n}")
    stream.reads = 0
    await insert(d, "one more")
    await d.find("F77")
    assert stream.reads <= 512


@given(st.binary(max_size=32 * 40), st.integers(0, 2**16))
def test_on_any_bytes_changes_do_what_they_say(noise: bytes, seed: int) -> None:
    import trio

    pick = random.Random(seed)
    slots = [
        entries.long_slots(
            f"Name {pick.randrange(4)} of some length".encode("utf-16-le"), b"NAME~%d     " % pick.randrange(3)
        )
        + entries.pack(b"NAME~%d     " % pick.randrange(3), WIDE, attributes=pick.choice((32, 16, 8)), **STAMPS)
        for _ in range(pick.randrange(12))
    ]
    image = bytearray(b"".join(slots).ljust(1024, b"\0"))
    for at, byte in enumerate(noise[:60]):
        if byte & 1:
            image[pick.randrange(len(image))] = noise[-1 - at]
    image[:] = image.ljust(-(-len(image) // 512) * 512, b"\0")

    async def run() -> None:
        stream = Memory(bytes(image))
        d = directory.Directory(stream, WIDE)
        for _ in range(8):
            there = await d.list()
            assert len({names.key(e.name) for e in there}) == len(there)
            for entry in there:
                assert await d.find(entry.name) == entry
            others = await directory.Directory(stream, WIDE).list()
            assert others == there
            what = pick.randrange(4)
            entry = pick.choice(there) if there else None
            name = f"New name {pick.randrange(5)}"
            try:
                if what == 0 or entry is None:
                    made = await insert(d, name)
                    assert {*await d.list()} == {*there, made}
                elif what == 1:
                    await d.remove(entry)
                    assert entry not in await d.list()
                elif what == 2:
                    made = await d.rename(entry, name)
                    assert made in await d.list()
                else:
                    await d.clear_orphans()
                    assert await d.list() == there
            except FileExistsError:
                assert await d.find(name) is not None

    trio.run(run)
