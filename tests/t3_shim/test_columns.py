"""The tables that the node table is made of, each against the plain thing that it stands for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from udf.shim.columns import NAME_MAX, NAME_UNIT, Columns, Index, Names, Slots, SlotsExhausted

SETTINGS = settings(max_examples=20, stateful_step_count=30, deadline=None)


@contextlib.contextmanager
def some_columns(size: int = 1 << 20) -> Iterator[Columns]:
    """No fixture: the test's own end must be the end of the memory."""
    memory = Columns("test", size)
    try:
        yield memory
    finally:
        os.close(memory.fd)


def test_columns_do_not_overlap_and_begin_as_zeros():
    with some_columns() as columns:
        small, wide = columns.integers("I", 10), columns.integers("Q", 10)
        floats, raw = columns.floats(10), columns.bytes(7)
        assert not any((*small, *wide, *floats, *raw))
        for at in range(10):
            small[at], wide[at], floats[at] = at + 1, 2**64 - 1 - at, at / 4
        raw[:] = b"\xff" * 7
        assert list(small) == list(range(1, 11))
        assert list(wide) == [2**64 - 1 - at for at in range(10)]
        assert list(floats) == [at / 4 for at in range(10)]


def test_columns_refuse_what_does_not_fit():
    with some_columns() as columns, pytest.raises(MemoryError):
        columns.bytes((1 << 20) + 1)


def test_columns_are_one_file_that_another_process_could_map():
    with some_columns() as columns:
        columns.integers("I", 4)[2] = 0x01020304
        assert os.pread(columns.fd, 4, 8) == b"\x04\x03\x02\x01"


def test_slots_end_where_the_column_ends():
    with some_columns() as columns:
        slots = Slots(columns.integers("I", 5))
        assert [slots.take() for _ in range(4)] == [1, 2, 3, 4]
        with pytest.raises(SlotsExhausted):
            slots.take()
        slots.give(3)
        assert slots.take() == 3
        assert slots.used == 4


class SlotsMachine(RuleBasedStateMachine):
    """Slots against a set."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Columns("test", 1 << 16)
        self.slots = Slots(self.memory.integers("I", 40))
        self.taken: set[int] = set()

    def teardown(self) -> None:
        os.close(self.memory.fd)
        self.__dict__.clear()  # the mapping has a descriptor too

    @precondition(lambda self: len(self.taken) < 39)
    @rule()
    def take(self) -> None:
        slot = self.slots.take()
        assert 0 < slot < 40
        assert slot not in self.taken
        self.taken.add(slot)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.taken)))
        self.slots.give(slot)
        self.taken.remove(slot)

    @invariant()
    def used(self) -> None:
        assert self.slots.used == len(self.taken)
        assert self.slots.top > max(self.taken, default=0)


class IndexMachine(RuleBasedStateMachine):
    """An index against a dictionary, over few hashes so that they collide, and past several doublings."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Columns("test", 1 << 20)
        self.hashes: dict[int, int] = {}
        self.index = Index(
            self.memory.integers("I", 2048), self.memory.integers("I", 8192), lambda slot: self.hashes[slot]
        )
        self.next = 1

    def teardown(self) -> None:
        os.close(self.memory.fd)
        self.__dict__.clear()  # the mapping has a descriptor too

    def chain(self, hashed: int) -> list[int]:
        found, slot = [], self.index.first(hashed)
        while slot:
            found.append(slot)
            slot = self.index.chain[slot]
            assert len(found) <= len(self.hashes), "a chain that has no end"
        return found

    @rule(count=st.integers(1, 200), spread=st.sampled_from((1, 7, 256, 1 << 32)), seed=st.integers(0, 2**32 - 1))
    def add(self, count: int, spread: int, seed: int) -> None:
        for step in range(min(count, 8000 - self.next)):
            hashed = (seed + step * 0x9E3779B1) % spread
            self.hashes[self.next] = hashed
            self.index.add(self.next, hashed)
            self.next += 1

    @precondition(lambda self: self.hashes)
    @rule(data=st.data(), count=st.integers(1, 300))
    def remove(self, data: st.DataObject, count: int) -> None:
        start = data.draw(st.integers(0, len(self.hashes) - 1))
        for slot in sorted(self.hashes)[start : start + count]:
            self.index.remove(slot, self.hashes.pop(slot))

    @invariant()
    def finds(self) -> None:
        assert self.index.count == len(self.hashes)
        for slot in list(self.hashes)[::37]:
            assert self.chain(self.hashes[slot]).count(slot) == 1

    @rule()
    def buckets_hold_everything_once(self) -> None:
        used = self.index.base + self.index.split
        total = 0
        for bucket in range(used):
            slot = self.index.buckets[bucket]
            while slot:
                total += 1
                assert slot in self.hashes
                slot = self.index.chain[slot]
        assert total == len(self.hashes)


class NamesMachine(RuleBasedStateMachine):
    """The arena against a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Columns("test", 1 << 16)
        self.names = Names(self.memory.bytes(48 * 1024))
        self.held: dict[int, bytes] = {}

    def teardown(self) -> None:
        os.close(self.memory.fd)
        self.__dict__.clear()  # the mapping has a descriptor too

    @rule(name=st.binary(min_size=1, max_size=60) | st.integers(200, NAME_MAX).map(lambda size: b"n" * size))
    def put(self, name: bytes) -> None:
        try:
            ref = self.names.put(name)
        except SlotsExhausted:
            assert sum(len(name) + 2 + NAME_UNIT for name in self.held.values()) > 16 * 1024
            return
        assert ref > 0
        assert ref not in self.held
        self.held[ref] = name

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        ref = data.draw(st.sampled_from(sorted(self.held)))
        self.names.drop(ref)
        del self.held[ref]

    @invariant()
    def kept(self) -> None:
        for ref, name in self.held.items():
            assert self.names.get(ref) == name


@pytest.mark.parametrize("machine", [SlotsMachine, IndexMachine, NamesMachine])
def test_tables_do_what_plain_ones_do(machine):
    run_state_machine_as_test(machine, settings=SETTINGS)


@given(st.lists(st.integers(2, 64), max_size=60))
@settings(max_examples=50, deadline=None)
def test_a_freed_name_makes_room_for_one_of_its_length(sizes):
    with some_columns(1 << 16) as memory:
        names = Names(memory.bytes(1 << 16))
        refs = [names.put(b"x" * size) for size in sizes]
        for ref in refs:
            names.drop(ref)
        again = [names.put(b"y" * size) for size in sizes]
        assert sorted(again) == sorted(refs)
