"""Dicts and files in a state store: what authors see of it, also after a kill at each line."""

from __future__ import annotations

import errno
import mmap
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.killing import in_child, memory_of, steps
from udf import Store, UserError
from udf.driver import journal as journal_module
from udf.driver import shelf as shelf_module
from udf.driver.memory import create_memfds
from udf.host.load import instantiate, load_class
from udf.manifest.check import read_manifest

PAGE = 4096


@pytest.fixture
def fd() -> Iterator[int]:
    (fd,) = create_memfds("test")
    yield fd
    os.close(fd)


def with_store(fd: int, work: Callable[[Store], Any], **bounds: int) -> Any:
    store = Store([os.dup(fd)])
    try:
        if bounds:
            store.open(**bounds)
        return work(store)
    finally:
        store.close()


def picture(store: Store) -> tuple[dict[str, Any], dict[str, bytes]]:
    """All that is in a store; also checks that each page is used once or free once."""
    shelf = store._shelves()
    used = [place for file in shelf._files.values() for place in file.used()]
    assert len(used) == len(set(used))
    assert set(used) | set(shelf._free) == set(range(1, shelf._top + 1))
    assert len(used) + len(shelf._free) == shelf._top
    dicts = {name: dict(items) for name, items in shelf._dicts.items() if items}
    return dicts, {name: file.pread(1 << 30, 0) for name, file in shelf._files.items()}


def test_a_dict_and_a_file_are_there_for_the_next_process(fd: int) -> None:
    def first(store: Store) -> None:
        notes = store.dict("notes")
        notes["list"] = [1, "two", b"three", None, {"four": 4.5}]
        notes[b"\xff"] = True
        notes["gone"] = 1
        del notes["gone"]
        assert store.file("text").pwrite(b"hello", 10_000) == 5
        store.file("empty")

    in_child(lambda: with_store(fd, first))

    def second(store: Store) -> None:
        notes = store.dict("notes")
        assert dict(notes) == {"list": [1, "two", b"three", None, {"four": 4.5}], b"\xff": True}
        assert list(notes) == ["list", b"\xff"]
        assert "gone" not in notes
        assert store.file("text").pread(100, 9_999) == b"\0hello"
        assert store.file("empty").size == 0
        store.file("text").remove()
        assert store.file("text").size == 0

    with_store(fd, second)
    assert with_store(fd, picture)[1] == {"empty": b"", "text": b""}


def test_a_value_that_was_got_is_a_copy(fd: int) -> None:
    def work(store: Store) -> None:
        store.dict("d")["key"] = [1]
        store.dict("d")["key"].append(2)
        assert store.dict("d")["key"] == [1]

    with_store(fd, work)


def test_keys_and_values_that_cannot_be_kept_are_refused_before_anything_changes(fd: int) -> None:
    def work(store: Store) -> None:
        items = store.dict("d")
        with pytest.raises(TypeError, match="is str or bytes, not int"):
            items[1] = 2  # type: ignore[index]
        with pytest.raises(TypeError):
            items["key"] = object()
        with pytest.raises(KeyError):
            del items["key"]
        with pytest.raises(OSError, match="negative"):
            store.file("f").pwrite(b"x", -1)
        assert dict(items) == {}

    with_store(fd, work)
    assert with_store(fd, picture) == ({}, {"f": b""})


def test_the_schema_and_the_bounds_are_the_authors(fd: int) -> None:
    with_store(fd, lambda store: store.dict("d").update(a=1), schema=3)
    with pytest.raises(UserError, match="has schema 3, but this driver reads only schema 1"):
        with_store(fd, lambda store: store.dict("d"))
    with_store(fd, lambda store: store.file("f").pwrite(bytes(10 * PAGE), 0), schema=3)
    with pytest.raises(UserError, match="more than its limit"):
        with_store(fd, picture, schema=3, size=8 * PAGE)


def test_a_raw_record_is_none_of_a_dict(fd: int) -> None:
    with_store(fd, lambda store: store.journal(schema=1).append(b"\x00"))
    with pytest.raises(UserError, match="a record that is none of a dict or file"):
        with_store(fd, picture)


def test_full_is_enospc_and_changes_nothing(fd: int) -> None:
    def work(store: Store) -> None:
        file = store.file("f")
        file.pwrite(b"a" * 6 * PAGE, 0)
        before = picture(store)
        with pytest.raises(OSError) as caught:
            file.pwrite(b"b" * 4 * PAGE, 5 * PAGE)
        assert caught.value.errno == errno.ENOSPC
        assert picture(store) == before
        assert file.pwrite(b"c" * 3 * PAGE, 5 * PAGE) == 3 * PAGE, "to the last page"
        file.truncate(PAGE)
        assert file.pwrite(b"d" * 6 * PAGE, PAGE) == 6 * PAGE, "what was freed can be used again"
        items = store.dict("d")
        with pytest.raises(OSError) as caught:
            items.update({str(i): "v" * 2000 for i in range(100)})
        assert caught.value.errno == errno.ENOSPC
        assert len(items) > 20
        del items["0"]
        with pytest.raises(OSError):
            items["again"] = "v" * 100_000

    with_store(fd, work, size=8 * PAGE, limit=128 << 10)


def test_the_memory_of_a_truncated_file_goes_back(fd: int) -> None:
    def work(store: Store) -> None:
        file = store.file("f")
        for at in range(0, 8 << 20, 1 << 20):
            file.pwrite(b"x" * (1 << 20), at)
        assert memory_of(fd) > 8 << 20
        file.truncate(PAGE + 1)
        assert memory_of(fd) < 1 << 20
        assert file.pread(10, PAGE) == b"x"
        file.truncate(3 * PAGE)
        assert file.pread(10, PAGE) == b"x" + bytes(9)

    with_store(fd, work)


def actions(seed: int, count: int) -> list[tuple[str, Any]]:
    """Changes of dicts and files; each one as (its name, how a plain dict and bytearray do it, how the store does)."""
    dice = random.Random(seed)
    result: list[tuple[str, Any]] = []
    for i in range(count):
        name = dice.choice("ab")
        kind = dice.choice(["set", "set", "delete", "write", "write", "truncate", "remove"])
        at = dice.choice([0, 1, PAGE - 1, PAGE, 2 * PAGE + 5, dice.randrange(5 * PAGE)])
        data = bytes([i % 255 + 1]) * dice.choice([1, 10, PAGE, PAGE + 1, 2 * PAGE])
        result.append((kind, (name, at, data)))
    return result


Model = tuple[dict[str, dict[str, Any]], dict[str, bytearray]]


def do_plain(state: Model, kind: str, what: tuple[str, int, bytes]) -> None:
    name, at, data = what
    dicts, files = state
    if kind == "set":
        dicts.setdefault(name, {})[str(at)] = data[:20]
    elif kind == "delete":
        items = dicts.setdefault(name, {})
        if items:
            del items[min(items)]
    elif kind == "remove":
        files.pop(name, None)
    else:
        file = files.setdefault(name, bytearray())
        if kind == "write":
            file.extend(bytes(max(0, at + len(data) - len(file))))
            file[at : at + len(data)] = data
        else:
            file.extend(bytes(max(0, at - len(file))))
            del file[at:]


def do_stored(store: Store, kind: str, what: tuple[str, int, bytes]) -> None:
    name, at, data = what
    if kind == "set":
        store.dict(name)[str(at)] = data[:20]
    elif kind == "delete":
        items = store.dict(name)
        if items:
            del items[min(items)]
    elif kind == "remove":
        store.file(name).remove()
    elif kind == "write":
        store.file(name).pwrite(data, at)
    else:
        store.file(name).truncate(at)


def plain(seed: int, count: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    state: Model = ({}, {})
    for kind, what in actions(seed, count):
        do_plain(state, kind, what)
    return {name: items for name, items in state[0].items() if items}, {n: bytes(f) for n, f in state[1].items()}


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_at_any_line_loses_nothing_that_was_acknowledged(
    fd: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "_FLOOR", 400)
    monkeypatch.setattr(shelf_module, "_CHUNK", 2)
    total = 30
    progress = mmap.mmap(-1, 4096)

    def work(_: int) -> Callable[[], None]:
        os.ftruncate(fd, 0)
        progress[0] = 0

        def run(store: Store) -> None:
            for i, (kind, what) in enumerate(actions(seed, total)):
                do_stored(store, kind, what)
                progress[0] = i + 1

        return lambda: with_store(fd, run)

    models = [plain(seed, count) for count in range(total + 1)]
    killed = 0
    for step, _ in steps(work, files="udf/driver/", lines=True, stride=7):
        dicts, files = with_store(fd, picture)
        done = progress[0]
        kind, (name, at, data) = actions(seed, total)[min(done, total - 1)]
        where = f"seed {seed}, killed at step {step} in change {done}, {kind} {name} {at} {len(data)}"
        old, new = models[done], models[min(done + 1, total)]
        assert dicts in (old[0], new[0]), where
        rest = {other: text for other, text in files.items() if other != name}
        assert rest in ({n: t for n, t in model[1].items() if n != name} for model in (old, new)), where
        text, before, then = files.get(name, b""), old[1].get(name, b""), new[1].get(name, b"")
        if kind != "write":
            assert text in (before, then), where
        else:  # the part that was there already may be overwritten in part, the length is one of the two
            assert len(text) in (len(before), len(then)), where
            for i, byte in enumerate(text):
                assert byte in (before[i : i + 1] or b"\0") + then[i : i + 1], where
        killed += 1
    assert killed > 50


def test_the_host_gives_the_store_to_the_class(fd: int) -> None:
    class Driver:
        def __init__(self, size: int, store: Store) -> None:
            self.size = size
            self.store = store

    driver = instantiate(Driver, "driver.py", None, {"size": 5}, [os.dup(fd)])
    driver.store.dict("d")["key"] = driver.size
    driver.store.close()
    assert with_store(fd, lambda store: store.dict("d")["key"]) == 5
    with pytest.raises(UserError, match="could not be started"):
        instantiate(Driver, "driver.py", None, {"size": 5})


def test_a_temporary_store_works_without_descriptors() -> None:
    store = Store.temporary()
    store.dict("d")["key"] = 1
    store.file("f").pwrite(b"text", 0)
    assert (store.dict("d")["key"], store.file("f").pread(9, 0)) == (1, b"text")
    store.close()
    with pytest.raises(ValueError, match="a state store has 1 descriptors, not 2"):
        Store([0, 1])


async def test_the_example_of_the_readme_keeps_its_notes(fd: int, tmp_path: Path) -> None:
    found = re.search(r"<!-- file notes\.py -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    path = tmp_path / "notes.py"
    path.write_text(found[1])
    assert read_manifest(str(path), "notes").durability == "store"
    cls = load_class(str(path), "Notes")
    stores = [Store([os.dup(fd)]) for _ in range(2)]
    first = cls(store=stores[0])
    await first.create("/a", 0o644)
    await first.write("/a", 3, b"text")
    await first.create("/b", 0o644)
    await first.remove("/b")
    second = cls(store=stores[1])
    assert await second.list("/") == ["a"]
    assert (await second.stat("/a")).size == 7
    assert await second.read("/a", 0, 100) == b"\0\0\0text"
    for store in stores:
        store.close()
