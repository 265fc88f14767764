"""A listing's pages, and the spinning: the small parts without a mount."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from udf.fuse.structs import DIRENT
from udf.shim import spin as spin_module
from udf.shim.handles import HandleTable, Listing
from udf.shim.spin import Spin

NAMES = st.lists(st.binary(min_size=1, max_size=300).filter(lambda name: b"/" not in name and b"\0" not in name))


def parse(page: bytes) -> list[tuple[int, int, int, bytes]]:
    found, at = [], 0
    while at < len(page):
        ino, offset, length, kind = DIRENT.unpack_from(page, at)
        found.append((ino, offset, kind, page[at + 24 : at + 24 + length]))
        at += (24 + length + 7) & ~7
    assert at == len(page)
    return found


def filled(names: list[bytes]) -> Listing:
    listing = Listing(0)
    for number, name in enumerate(names):
        listing.add(number + 1000, 8, name, number)
    return listing


@given(NAMES, st.integers(24, 2000))
@settings(deadline=None)
def test_pages_of_any_size_give_every_entry_once(names, size):
    listing = filled(names)
    offset, seen = 0, []
    while True:
        page = bytes(listing.slice(offset, size))
        assert len(page) <= size
        entries = parse(page)
        if not entries:
            break
        assert [entry[1] for entry in entries] == list(range(offset + 1, offset + 1 + len(entries)))
        seen += entries
        offset = entries[-1][1]
    if offset < len(names):
        assert (24 + len(names[offset]) + 7) & ~7 > size, "the next one does not fit"
    assert [entry[3] for entry in seen] == names[: len(seen)]


@given(NAMES)
@settings(deadline=None)
def test_an_entry_is_what_was_added(names):
    listing = filled(names)
    for index, name in enumerate(names):
        slot, found, record = listing.entry(index)
        assert (slot, found) == (index, name)
        assert parse(record) == [(index + 1000, index + 1, 8, name)]


@given(NAMES, st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_an_offset_behind_the_end_is_the_end(names, offset):
    assert bytes(filled(names).slice(len(names) + offset, 4096)) == b""


def test_handles_are_found_by_number_and_by_node():
    table = HandleTable()
    first, second, other = (table.add(slot, os.O_RDONLY, False, None) for slot in (5, 5, 6))
    assert len({first.number, second.number, other.number}) == 3
    assert table.of(5) == [first, second]
    table.remove(first)
    assert table.of(5) == [second]
    assert table.get(first.number) is None
    table.remove(second)
    assert list(table.of(5)) == []
    assert len(table) == 1


@pytest.fixture
def quiet_machine(monkeypatch):
    """Two CPUs that nobody else wants: each look at the clock is a microsecond after the one before."""
    ticks = itertools.count()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(spin_module, "monotonic", lambda: next(ticks) * 1e-6)


def spun(spin: Spin, found: bool) -> None:
    events = [(1, 1)] if found else []
    spin.worked()
    if spin.wanted:
        spin.poll(lambda timeout: events)


@pytest.mark.usefixtures("quiet_machine")
def test_spinning_stops_where_it_finds_nothing_and_tries_again_later():
    spin = Spin(True)
    for _ in range(1000):
        spun(spin, False)
    assert spin.spins < 300
    assert spin.won == 0
    tried = spin.spins
    for _ in range(1000):
        spun(spin, True)
    assert spin.spins > tried + 500, "it is worth it again"


@pytest.mark.usefixtures("quiet_machine")
def test_spinning_goes_on_where_it_finds_something():
    spin = Spin(True)
    for found in itertools.islice(itertools.cycle((True, True, True, False)), 1000):
        spun(spin, found)
    assert spin.spins > 900


def test_one_cpu_never_spins(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    spin = Spin(True)
    spin.worked()
    assert not spin.wanted
