"""The journal of a state store: torn, damaged, full, compacted, migrated, and killed at each bytecode."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator

import pytest

from tests.killing import KILLED, in_child, memory_of, steps
from udf import UserError
from udf.driver import journal as module
from udf.driver.journal import Journal
from udf.driver.memory import JOURNALS, Memory, create_memfds

LIMIT = 1 << 20
RECORDS = [b"first", b"", b"the third, which is the last one"]


@pytest.fixture
def fd() -> Iterator[int]:
    (fd,) = create_memfds("test")
    yield fd
    os.close(fd)


class Opened:
    """A journal in a memfd, for as long as a with block."""

    def __init__(self, fd: int, **arguments: object) -> None:
        self.memory = Memory([os.dup(fd)])
        self.arguments = {"limit": LIMIT, "schema": 1, **arguments}

    def __enter__(self) -> Journal:
        try:
            return Journal(self.memory, **self.arguments)  # type: ignore[arg-type]
        except BaseException:
            self.memory.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.memory.close()


def records(fd: int, **arguments: object) -> list[bytes]:
    with Opened(fd, **arguments) as journal:
        return list(journal.replay())


def fill(fd: int, contents: list[bytes]) -> None:
    with Opened(fd) as journal:
        for record in contents:
            journal.append(record)


def poke(fd: int, at: int, data: bytes) -> None:
    os.pwrite(fd, data, at)


def test_what_was_appended_is_there_for_the_next_process(fd: int) -> None:
    assert records(fd) == []
    in_child(lambda: fill(fd, RECORDS))
    assert records(fd) == RECORDS
    fill(fd, [b"more"])
    assert records(fd) == [*RECORDS, b"more"]


def test_a_torn_last_record_is_not_there_wherever_it_is_torn(fd: int) -> None:
    fill(fd, RECORDS[:2])
    start = sum(8 + len(record) for record in RECORDS[:2])
    with Opened(fd) as journal:
        frame = module._FRAME.pack(len(RECORDS[2]), module.crc32(RECORDS[2])) + RECORDS[2]
        assert journal.size == start
    for length in range(len(frame) + 1):
        poke(fd, JOURNALS[0] + start, frame[:length] + b"\xff" * (len(frame) - length))
        assert records(fd) == RECORDS[:2]
    fill(fd, [b"instead"])
    assert records(fd) == [*RECORDS[:2], b"instead"]


def test_a_committed_record_that_is_damaged_is_refused_at_each_of_its_bytes(fd: int) -> None:
    fill(fd, RECORDS)
    whole = os.pread(fd, sum(8 + len(record) for record in RECORDS), JOURNALS[0])
    last = len(whole) - 8 - len(RECORDS[2])
    for at in range(last, len(whole)):
        poke(fd, JOURNALS[0] + at, bytes([whole[at] ^ 0x10]))
        with pytest.raises(UserError, match=rf"^the state store is damaged: the record at byte {last} is not what"):
            records(fd)
        poke(fd, JOURNALS[0] + at, whole[at : at + 1])
    assert records(fd) == RECORDS


def test_another_schema_is_refused_and_changes_nothing(fd: int) -> None:
    fill(fd, RECORDS)
    with pytest.raises(UserError, match=r"^the state store has schema 1, but this driver reads only schema 2$"):
        records(fd, schema=2)
    assert records(fd) == RECORDS


def test_a_store_of_another_layout_is_refused(fd: int) -> None:
    fill(fd, RECORDS)
    poke(fd, 0, b"udfstor9")
    with pytest.raises(UserError, match="a version of udf that this one cannot read"):
        records(fd)


def migrate(found: int, old: Iterator[bytes]) -> Iterator[bytes]:
    for record in old:
        yield b"%d:" % found + record


def test_a_migration_is_done_entirely_or_not_at_all(fd: int) -> None:
    def migration(_: int) -> object:
        os.ftruncate(fd, 0)
        fill(fd, RECORDS)
        return lambda: records(fd, schema=2, migrate=migrate)

    new = [b"1:" + record for record in RECORDS]
    seen = set()
    for _, result in steps(migration, files="driver/journal.py"):  # type: ignore[arg-type]
        if result == KILLED:
            try:
                assert records(fd) == RECORDS
                seen.add("old")
            except UserError:
                assert records(fd, schema=2) == new
                seen.add("new")
        else:
            assert result == new
    assert seen == {"old", "new"}
    with pytest.raises(UserError, match="schema 2"):
        records(fd)


def test_a_full_journal_takes_no_record_and_is_not_changed(fd: int) -> None:
    with Opened(fd) as journal:

        def fill_up() -> None:
            while True:
                journal.append(b"x" * 1000)

        with pytest.raises(OSError) as caught:
            fill_up()
        assert caught.value.errno == errno.ENOSPC
        count = journal.size // 1008
        assert journal.size == count * 1008
        with pytest.raises(OSError):
            journal.require(2000)
        journal.append(b"frees something", frees=True)
        with pytest.raises(OSError):
            journal.append(b"x" * (128 << 10), frees=True)
    assert len(records(fd)) == count + 1


def test_a_full_journal_is_compacted_when_that_helps(fd: int) -> None:
    with Opened(fd, limit=256 << 10) as journal:
        state: list[bytes] = []
        journal.compact_with(lambda: iter(state))
        for i in range(5000):
            record = b"%d" % i * 100
            journal.append(record)
            state[:] = [record]
    assert records(fd, limit=256 << 10)[-1] == b"4999" * 100


def test_an_exception_of_the_authors_own_says_that_it_is_full(fd: int) -> None:
    with Opened(fd, full=lambda: KeyError("full")) as journal, pytest.raises(KeyError):
        journal.append(bytes(LIMIT))


class Model:
    """A dict whose changes are records "key=value", the kind of user that a journal is for."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.items: dict[bytes, bytes] = {}
        for record in journal.replay():
            key, _, value = record.partition(b"=")
            self.items[key] = value
        self.pulled = 0
        journal.compact_with(self.snapshot)

    def snapshot(self) -> Iterator[bytes]:
        for key in list(self.items):
            self.pulled += 1
            yield key + b"=" + self.items[key]

    def set(self, key: bytes, value: bytes) -> None:
        self.journal.append(key + b"=" + value)
        self.items[key] = value


def changes(count: int) -> list[tuple[bytes, bytes]]:
    return [(b"%d" % (i * 7 % 11), b"value %d" % i) for i in range(count)]


def after(count: int) -> dict[bytes, bytes]:
    return dict(changes(count))


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compactions begin early, so that a short run sees several of them."""
    monkeypatch.setattr(module, "_FLOOR", 120)


@pytest.mark.usefixtures("eager")
def test_a_kill_at_any_bytecode_loses_nothing_that_was_acknowledged(fd: int) -> None:
    total = 40
    progress = mmap.mmap(-1, 4096)

    def work(_: int) -> object:
        os.ftruncate(fd, 0)
        progress[:8] = bytes(8)

        def run() -> int:
            switches = 0
            with Opened(fd) as journal:
                model = Model(journal)
                for i, (key, value) in enumerate(changes(total)):
                    before = journal._active
                    model.set(key, value)
                    switches += before != journal._active
                    progress[0] = i + 1
            return switches

        return run

    killed = 0
    for step, result in steps(work, files="driver/journal.py", stride=3):  # type: ignore[arg-type]
        with Opened(fd) as journal:
            items = Model(journal).items
        done = progress[0]
        assert items in (after(done), after(done + 1)), f"killed at step {step}, {done} changes acknowledged"
        if result == KILLED:
            killed += 1
        else:
            assert result >= 2, "no compaction was seen to its end"
            assert items == after(total)
    assert killed > 300


@pytest.mark.usefixtures("eager")
def test_an_append_does_only_a_bounded_part_of_a_compaction(fd: int) -> None:
    with Opened(fd) as journal:
        model = Model(journal)
        for i in range(3000):
            model.pulled = 0
            model.set(b"key %d" % (i % 500), b"value")
            assert model.pulled <= module._SLICE
        assert journal.size < 2 * 500 * 30 + 2000
        journal.compact()
        assert journal.size == sum(8 + len(key) + 6 for key in model.items)


def test_the_memory_of_records_that_nobody_needs_goes_back(fd: int) -> None:
    limit = 64 << 20
    with Opened(fd, limit=limit) as journal:
        model = Model(journal)
        most = 0
        for i in range(40):
            for j in range(20):
                model.set(b"key %d" % j, bytes([i]) * 65536)
            most = max(most, memory_of(fd))
        for _ in range(100):
            model.set(b"key 0", b"small")
        assert most < 12 << 20, "52 MB were written, of which 1.3 MB are needed"
        model.items = {b"key 0": b"small"}
        journal.compact()
        for _ in range(100):
            model.set(b"key 0", b"small")
        assert memory_of(fd) < 1 << 20
    assert records(fd, limit=limit)[-1] == b"key 0=small"


@pytest.mark.usefixtures("eager")
def test_a_compaction_that_does_not_fit_is_given_up(fd: int) -> None:
    limit = 160 << 10
    with Opened(fd, limit=limit) as journal:
        journal.compact_with(lambda: iter([b"x" * 1000] * 1000))
        for _ in range(60):
            journal.append(b"y" * 1000)
        assert not journal.is_compacting
    assert records(fd, limit=limit) == [b"y" * 1000] * 60
