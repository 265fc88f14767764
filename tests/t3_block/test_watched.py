"""What is known of watched sectors, against a model of a device with a cache that is lost with its power."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udf.block.shim import watched
from udf.block.shim.buffers import Pool
from udf.block.shim.watched import HEAD, MOST, SECTOR, Seen, Span, Watched, checksums

SPACE = 24  # sectors
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, SPACE - 1), st.integers(1, 6)),
        st.tuples(st.just("watched"), st.integers(0, SPACE - 1), st.integers(1, 6)),
        st.tuples(st.just("fua"), st.integers(0, SPACE - 1), st.integers(1, 6)),
        st.tuples(st.just("zero"), st.integers(0, SPACE - 1), st.integers(1, 6)),
        st.tuples(st.just("part"), st.integers(0, SPACE - 1), st.integers(1, 2)),
        st.tuples(st.just("read"), st.integers(0, SPACE - 1), st.integers(1, 6)),
        st.tuples(st.just("begin flush"), st.just(0), st.just(0)),
        st.tuples(st.just("end flush"), st.just(0), st.just(0)),
        st.tuples(st.just("begin read"), st.integers(0, SPACE - 1), st.integers(1, 6)),
        st.tuples(st.just("end read"), st.just(0), st.just(0)),
        st.tuples(st.just("fail"), st.integers(0, SPACE - 1), st.integers(1, 6)),
    ),
    max_size=40,
)


def sector_of(number: int) -> bytes:
    return number.to_bytes(4, "little") * (SECTOR // 4)


def learn(known: Watched, offset: int, data: memoryview, mark: int, unflushed: list[Span] | None = None) -> None:
    buffer = known._pool.take(len(data) + 5)
    buffer.view[5 : 5 + len(data)] = data
    known.learn_later(Seen(offset, len(data), buffer, 5, mark, unflushed or []))
    known._pool.drop(buffer)


def view(contents: list[bytes]) -> memoryview:
    return memoryview(b"".join(contents))


@given(steps)
def test_all_that_may_be_there_is_accepted_and_after_a_flush_only_the_newest(todo: list[tuple[str, int, int]]) -> None:
    known = Watched(Pool())
    newest = [sector_of(0)] * SPACE
    possible = [{newest[0]} for _ in range(SPACE)]  # on the device, if its power went now
    since: list[list[tuple[int, bytes]]] = [[] for _ in range(SPACE)]
    version = 0
    flush: int | None = None
    reading: tuple[int, int, list[bytes]] | None = None

    def unflushed() -> list[Span]:
        return [(i * SECTOR, (i + 1) * SECTOR, old[-1][0]) for i, old in enumerate(since) if old]

    for number, (what, at, most) in enumerate(todo, 1):
        size = min(most, SPACE - at)
        if what in ("write", "watched", "zero", "fua"):
            data = [sector_of(0 if what == "zero" else number * 100 + index) for index in range(size)]
            version += 1
            safe = what == "fua"
            known.written(
                *(at * SECTOR, size * SECTOR, None if what == "zero" else view(data)),
                version=None if safe else version,
                flagged=what == "watched",
            )
            for index, content in enumerate(data, at):
                if safe:
                    since[index], possible[index] = [], {content}
                else:
                    since[index].append((version, newest[index]))
                    possible[index].add(content)
                newest[index] = content
        elif what == "part":
            known.written(at * SECTOR + 5, 7, view([b"x" * 7]), version=None)
            newest[at] = newest[at][:5] + b"x" * 7 + newest[at][12:]
            since[at], possible[at] = [], {newest[at]}
        elif what == "fail":
            known.unsure(at * SECTOR, size * SECTOR)
            for index in range(at, at + size):
                if number % 2:  # it was done in part
                    newest[index] = sector_of(number * 100 + index)
                since[index], possible[index] = [], {newest[index]}
        elif what == "read":
            mark = known.expect(at * SECTOR, size * SECTOR)
            learn(known, at * SECTOR, view(newest[at : at + size]), mark, unflushed())
        elif what == "begin read":
            reading = at, known.expect(at * SECTOR, size * SECTOR), newest[at : at + size]
        elif what == "end read" and reading is not None:
            begin, mark, seen = reading
            learn(known, begin * SECTOR, view(seen), mark, unflushed())  # as late as can be
            reading = None
        elif what == "begin flush":
            flush = version
        elif what == "end flush" and flush is not None:
            known.flushed(flush)
            for index in range(SPACE):
                since[index] = [one for one in since[index] if one[0] > flush]
                possible[index] = {content for _, content in since[index]} | {newest[index]}
            flush = None
        for sector in known.comparable():
            for content in possible[sector]:
                assert known.accepts(sector, checksums(memoryview(content))[0]), (what, sector)
            assert not known.accepts(sector, checksums(memoryview(sector_of(1 << 31)))[0])
    known.flushed(version)
    for sector in known.comparable():
        for _, content in since[sector]:
            if content != newest[sector]:
                assert not known.accepts(sector, checksums(memoryview(content))[0])
    assert sum(known._chunks.values()) == len(known)
    assert not known._before


def test_it_is_bounded_and_forgets_the_oldest_but_no_head() -> None:
    known = Watched(Pool())
    known.pin(0, 1 << 40)
    learn(known, 0, memoryview(bytes(HEAD)), known.expect(0, HEAD))
    rng = random.Random(1)
    last = 0
    for _ in range(2 * MOST // 64):
        last = 8 + rng.randrange(1 << 30)
        at = last * SECTOR
        learn(known, at, memoryview(bytes(64 * SECTOR)), known.expect(at, 64 * SECTOR))
        assert len(known) <= MOST
    assert len(known) > MOST * 3 // 4
    comparable = known.comparable()
    assert comparable[:8] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert comparable[8] == last + 63
    assert sum(known._chunks.values()) == len(known)


def test_one_sector_that_is_written_without_end_does_not_grow() -> None:
    known = Watched(Pool())
    for number in range(1000):
        known.written(0, SECTOR, memoryview(sector_of(number)), version=number, flagged=True)
    assert len(known._before[0]) <= 16
    assert known.comparable() == []  # it may hold anything until a flush
    known.flushed(999)
    assert known.comparable() == [0]
    assert known.accepts(0, hash(sector_of(999)))


def test_no_more_heads_are_kept_than_there_can_be_exports() -> None:
    known = Watched(Pool())
    for number in range(1000):
        known.pin(number << 20, 1 << 20)
    assert len(known._heads) == watched._MOST_HEADS
    assert len(known._pinned) == watched._MOST_HEADS * 8


@pytest.mark.parametrize("size", [1 << 20, 4 << 30])
def test_a_write_of_data_costs_nothing_for_each_of_its_sectors(size: int) -> None:
    known = Watched(Pool())
    learn(known, 0, memoryview(bytes(HEAD)), known.expect(0, HEAD))
    known.digest()
    assert list(known._known(1 << 40, size)) == []
    known.written(0, size, None, version=1)
    assert len(known) == 8
