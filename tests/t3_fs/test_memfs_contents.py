"""The contents store of memfs against a bytearray, and what it takes and gives back of its space."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from directmount import load_driver
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pyfuse3 import FUSEError

PAGE = 4096
PAGES = 24


def module(name: str) -> ModuleType:
    """A file of the driver, loaded as the host loads it."""
    import sys

    package = load_driver("memfs").__module__.rpartition(".")[0]
    return sys.modules[f"{package}.{name}"]


Arena = module("arena").Arena
Contents = module("contents").Contents
Space = module("space").Space


def truncate(file: Any, size: int) -> None:
    """Set a length, as SETATTR does."""
    slot, record = file.prepare(size, 0)
    file._arena.kept.journal.append(record, frees=True)
    file.cut(slot, size)


offsets = st.one_of(st.integers(0, 40 * PAGE), st.integers(0, 40).map(lambda page: page * PAGE))
lengths = st.one_of(st.integers(1, 12 * PAGE), st.sampled_from([1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE]))


class StoreMachine(RuleBasedStateMachine):
    """Three files that share an arena which is too small for all that is asked of it."""

    @initialize(spare=st.integers(0, PAGE - 1))
    def start(self, spare: int) -> None:
        self.space = Space(PAGES * PAGE + spare, 10)
        self.arena = Arena(self.space)
        self.arena.view[:] = b"\xee" * len(self.arena.view)  # what is not zeroed shows
        self.files = [Contents(self.arena) for _ in range(3)]
        self.models = [bytearray() for _ in range(3)]
        self.pages: list[set[int]] = [set() for _ in range(3)]
        self.counter = 0

    @rule(which=st.integers(0, 2), offset=offsets, length=lengths)
    def write(self, which: int, offset: int, length: int) -> None:
        self.counter = self.counter % 255 + 1
        data = bytes([self.counter]) * length
        touched = range(offset // PAGE, (offset + length - 1) // PAGE + 1)
        missing = [page for page in touched if page not in self.pages[which]]
        room = self.space.left // PAGE
        fits = length if len(missing) <= room else max(0, missing[room] * PAGE - offset)
        if not fits:
            with pytest.raises(FUSEError) as caught:
                self.files[which].write(offset, data)
            assert caught.value.errno == errno.ENOSPC
            return
        assert self.files[which].write(offset, data) == fits
        self.pages[which].update(page for page in touched if page * PAGE < offset + fits)
        model = self.models[which]
        model.extend(bytes(max(0, offset + fits - len(model))))
        model[offset : offset + fits] = data[:fits]

    @rule(which=st.integers(0, 2), size=offsets)
    def truncate(self, which: int, size: int) -> None:
        truncate(self.files[which], size)
        model = self.models[which]
        model.extend(bytes(max(0, size - len(model))))
        del model[size:]
        self.pages[which] = {page for page in self.pages[which] if page * PAGE < size}

    @rule(which=st.integers(0, 2), offset=offsets, length=lengths)
    def read(self, which: int, offset: int, length: int) -> None:
        assert bytes(self.files[which].read(offset, length)) == self.models[which][offset : offset + length]

    @invariant()
    def everything_adds_up(self) -> None:
        if not hasattr(self, "space"):
            return
        used: list[int] = []
        for file, model, pages in zip(self.files, self.models, self.pages, strict=True):
            assert file.size == len(model)
            assert bytes(file.read(0, 1 << 20)) == model
            assert file.pages == len(pages)
            assert {page for start, _, count in file.extents for page in range(start, start + count)} == pages
            assert list(file.extents) == sorted(file.extents)
            used += [page for _, place, count in file.extents for page in range(place, place + count)]
        assert len(used) == len(set(used)), "a page belongs to two files"
        assert self.space.left == self.space.size - len(used) * PAGE


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_byte_at_one_tebibyte_costs_one_page() -> None:
    space = Space(1 << 20, 10)
    file = Contents(Arena(space))
    assert file.write(1 << 40, b"x") == 1
    assert file.size == (1 << 40) + 1
    assert file.pages == 1
    assert bytes(file.read((1 << 40) - 10, 100)) == bytes(10) + b"x"
    assert bytes(file.read(1 << 30, 8192)) == bytes(8192)


def test_a_file_written_in_order_is_one_extent() -> None:
    file = Contents(Arena(Space(1 << 24, 10)))
    for i in range(100):
        file.write(i * 5000, bytes(5000))
    assert len(file.extents) == 1


def test_space_is_used_to_the_last_page_however_it_is_cut_up() -> None:
    space = Space(256 * PAGE, 10)
    arena = Arena(space)
    files = [Contents(arena) for _ in range(256)]
    for file in files:
        file.write(0, b"x")
    for file in files[::2]:
        truncate(file, 0)
    whole = Contents(arena)
    assert whole.write(0, bytes(200 * PAGE)) == 128 * PAGE
    assert space.left == 0
    assert len(whole.extents) == 128


@given(st.lists(st.integers(1, 70), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_what_was_released_can_be_had_again_in_one_piece(counts: list[int], random: object) -> None:
    space = Space(4096 * PAGE, 10)
    arena = Arena(space)
    runs = [run for count in counts for run in arena.allocate(count, -1)]
    random.shuffle(runs)  # type: ignore[attr-defined]
    for run in runs:
        arena.release(*run)
    assert arena.allocate(4096, -1) == [(0, 4096)]


def test_memory_of_removed_files_goes_back_to_the_system() -> None:
    def resident() -> int:
        return int(Path(f"/proc/{os.getpid()}/statm").read_text().split()[1]) * PAGE

    arena = Arena(Space(1 << 28, 10))
    small = [Contents(arena) for _ in range(8192)]
    large = Contents(arena)
    for _ in range(2):  # the interpreter takes some for itself the first time, more or less by what ran before
        before = resident()
        for file in small:
            file.write(0, bytes(PAGE))
        large.write(0, bytes(32 << 20))
        assert resident() - before > 60 << 20
        truncate(large, 0)
        for file in small:
            truncate(file, 0)
    assert resident() - before < 4 << 20
