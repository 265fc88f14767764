"""The node table against a model of dictionaries: nodes live as long as something needs them, and counts balance."""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from udf.fuse import structs
from udf.shim import graph as graph_module
from udf.shim.graph import ROOT
from udf.shim.nodes import FOREVER, BadEntry, NodeTable

SETTINGS = settings(max_examples=60, stateful_step_count=50, deadline=None)
REGULAR, DIRECTORY = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755


def entry(driver_id: int, mode: int = REGULAR, *, nlink: int = 1, valid: int = 10, ino: int = 0) -> bytearray:
    """A driver's entry_out."""
    head = struct.pack("=QQQQII", driver_id, 77, valid, valid, 0, 0)
    return bytearray(head + structs.ATTR.pack(ino or driver_id, 0, 0, 0, 0, 0, 0, 0, 0, mode, nlink, 0, 0, 0, 4096, 0))


def make_table() -> tuple[NodeTable, int]:
    """A table, and the descriptor of its memory, which the shim never closes."""
    made: list[int] = []
    create = os.memfd_create
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "memfd_create", lambda *args: made.append(create(*args)) or made[0])
        return NodeTable(), made[0]


@contextlib.contextmanager
def some_table() -> Iterator[NodeTable]:
    """No fixture: the test's own end must be the end of the memory."""
    table, fd = make_table()
    try:
        yield table
    finally:
        os.close(fd)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "CAPACITY", 4096)
    monkeypatch.setattr(graph_module, "NAMES_SIZE", 4096 * 32)


def enter(table: NodeTable, parent: int, name: bytes, driver_id: int, mode: int = REGULAR, **more: int) -> int:
    """As a LOOKUP does: one lookup of the driver's and one of the kernel's."""
    slot = table.enter(parent, name, entry(driver_id, mode, **more), 0, 1.0, False)
    table.lookups[slot] += 1
    return slot


def balance(table: NodeTable) -> dict[int, int]:
    """FORGETs that have become due, by driver id."""
    totals: dict[int, int] = {}
    for driver_id, count in table.forgets:
        totals[driver_id] = totals.get(driver_id, 0) + count
    table.forgets.clear()
    return totals


class NodeMachine(RuleBasedStateMachine):
    """What the shim does with a table, next to a driver's filesystem and a kernel's dentries as dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fd = make_table()
        self.given: dict[int, int] = {}  # driver id -> lookups that the driver gave
        self.taken: dict[int, int] = {}  # and that were given back
        self.kernel: dict[int, int] = {}  # node id -> the kernel's count
        self.ids: dict[int, int] = {ROOT: ROOT}  # node id -> driver id
        self.kind: dict[int, int] = {ROOT: DIRECTORY}  # driver id -> mode
        self.tree: dict[tuple[int, bytes], int] = {}  # (driver id of the parent, name) -> driver id
        self.opens: list[int] = []  # slots
        self.pins: list[int] = []
        self.next = 10

    def teardown(self) -> None:
        os.close(self.fd)
        self.__dict__.clear()  # the mapping has a descriptor too

    # ---- helpers

    def known_directories(self) -> list[int]:
        return [ROOT] + [n for n, count in self.kernel.items() if count and self.kind[self.ids[n]] == DIRECTORY]

    def look_up(self, parent: int, name: bytes, driver_id: int) -> int:
        mode = self.kind[driver_id]
        buffer = entry(driver_id, mode)
        slot = self.table.enter(self.table.slot(parent), name, buffer, 0, 1.0, False)
        node_id = struct.unpack_from("=Q", buffer)[0]
        assert node_id == self.table.node_id(slot)
        self.given[driver_id] = self.given.get(driver_id, 0) + 1
        known = self.ids.get(node_id)
        assert known in (None, driver_id), "a node id was used twice"
        self.ids[node_id] = driver_id
        self.table.lookups[slot] += 1
        self.kernel[node_id] = self.kernel.get(node_id, 0) + 1
        return slot

    names = st.sampled_from([b"a", b"b", b"c", b"a-name-that-is-longer-than-one-unit-of-the-arena"])

    # ---- rules

    @rule(data=st.data(), name=names, mode=st.sampled_from((REGULAR, DIRECTORY)))
    def create(self, data: st.DataObject, name: bytes, mode: int) -> None:
        parent = data.draw(st.sampled_from(self.known_directories()))
        if (self.ids[parent], name) in self.tree:
            return
        driver_id, self.next = self.next, self.next + 1
        self.kind[driver_id] = mode
        self.tree[self.ids[parent], name] = driver_id
        self.look_up(parent, name, driver_id)

    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        parents = self.known_directories()
        by_driver = {self.ids[parent]: parent for parent in parents}
        there = [(by_driver[p], name, child) for (p, name), child in self.tree.items() if p in by_driver]
        if there:
            self.look_up(*data.draw(st.sampled_from(there)))

    @rule(data=st.data(), name=names)
    def link(self, data: st.DataObject, name: bytes) -> None:
        files = [n for n, count in self.kernel.items() if count and self.kind[self.ids[n]] == REGULAR]
        parent = data.draw(st.sampled_from(self.known_directories()))
        if files and (self.ids[parent], name) not in self.tree:
            driver_id = self.ids[data.draw(st.sampled_from(files))]
            if driver_id in self.tree.values():
                self.tree[self.ids[parent], name] = driver_id
                self.look_up(parent, name, driver_id)

    @rule(data=st.data(), share=st.integers(1, 4))
    def forget(self, data: st.DataObject, share: int) -> None:
        held = [n for n, count in self.kernel.items() if count]
        # The kernel holds a directory as long as it holds what is in it.
        parents = {self.table.link_parent[self.table.first_link[self.table.slot(n)]] for n in held}
        held = [n for n in held if self.table.slot(n) not in parents]
        if held:
            node_id = data.draw(st.sampled_from(held))
            count = max(1, self.kernel[node_id] // share)
            self.kernel[node_id] -= count
            self.table.forget(self.table.slot(node_id), count)

    @precondition(lambda self: any(self.kernel.values()))
    @rule(data=st.data())
    def open(self, data: st.DataObject) -> None:
        slot = self.table.slot(data.draw(st.sampled_from([n for n, count in self.kernel.items() if count])))
        self.table.opens[slot] += 1
        self.opens.append(slot)

    @precondition(lambda self: self.opens)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        self.table.closed(self.opens.pop(data.draw(st.integers(0, len(self.opens) - 1))))

    @precondition(lambda self: any(self.kernel.values()))
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        slot = self.table.slot(data.draw(st.sampled_from([n for n, count in self.kernel.items() if count])))
        self.table.pins[slot] += 1
        self.pins.append(slot)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        slot = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))
        self.table.pins[slot] -= 1
        self.table.release(slot)

    def _there(self, data: st.DataObject) -> tuple[int, bytes] | None:
        by_driver = {self.ids[parent]: parent for parent in self.known_directories()}
        there = [(by_driver[p], name) for p, name in self.tree if p in by_driver]
        return data.draw(st.sampled_from(there)) if there else None

    @rule(data=st.data())
    def unlink(self, data: st.DataObject) -> None:
        where = self._there(data)
        if where is None:
            return
        parent, name = where
        target = self.tree[self.ids[parent], name]
        if any(p == target for p, _ in self.tree):
            return  # a directory that is not empty
        del self.tree[self.ids[parent], name]
        gone = self.table.unlink(self.table.slot(parent), name)
        if gone:
            self.table.release(gone)

    @rule(data=st.data(), new_name=names)
    def rename(self, data: st.DataObject, new_name: bytes) -> None:
        where = self._there(data)
        if where is None:
            return
        parent, name = where
        new_parent = data.draw(st.sampled_from(self.known_directories()))
        old, new = (self.ids[parent], name), (self.ids[new_parent], new_name)
        moved, target = self.tree[old], self.tree.get(new)
        if self._below(new[0], moved) or (target is not None and any(p == target for p, _ in self.tree)):
            return
        if target is not None and (self.kind[target] != self.kind[moved]):
            return
        self.table.move(self.table.slot(parent), name, self.table.slot(new_parent), new_name)
        if target != moved:
            del self.tree[old]
            self.tree[new] = moved

    @rule(data=st.data())
    def exchange(self, data: st.DataObject) -> None:
        one, two = self._there(data), self._there(data)
        if one is None or two is None or one == two:
            return
        first, second = (self.ids[one[0]], one[1]), (self.ids[two[0]], two[1])
        if self._below(first[0], self.tree[second]) or self._below(second[0], self.tree[first]):
            return
        self.table.exchange(self.table.slot(one[0]), one[1], self.table.slot(two[0]), two[1])
        self.tree[first], self.tree[second] = self.tree[second], self.tree[first]

    def _below(self, driver_id: int, top: int) -> bool:
        """Whether a directory is *top* or below it."""
        seen = {top}
        while True:
            more = {child for (p, _), child in self.tree.items() if p in seen} - seen
            if not more:
                return driver_id in seen
            seen |= more

    # ---- what must hold

    @invariant()
    def counts_balance(self) -> None:
        for driver_id, count in balance(self.table).items():
            self.taken[driver_id] = self.taken.get(driver_id, 0) + count
        live: dict[int, int] = {}
        for slot in self.table._live():
            driver_id = self.table.driver_id[slot]
            live[driver_id] = live.get(driver_id, 0) + self.table.driver_lookups[slot]
        for driver_id, count in self.given.items():
            assert count == self.taken.get(driver_id, 0) + live.get(driver_id, 0), driver_id

    @invariant()
    def nodes_live_while_they_are_needed(self) -> None:
        for node_id, count in self.kernel.items():
            slot = self.table.slot(node_id)
            if count:
                assert slot, "a node that the kernel knows is gone"
                assert self.table.lookups[slot] == count
        for slot in (*self.opens, *self.pins):
            assert self.table.flags[slot] & graph_module.ALIVE

    @invariant()
    def names_are_what_the_driver_has(self) -> None:
        for (parent, name), child in self.tree.items():
            slot = self.table.by_driver(parent)
            found = self.table.child(slot, name) if slot else 0
            assert not found or self.table.driver_id[found] == child

    @invariant()
    def nothing_lives_on_for_nothing(self) -> None:
        needed = {self.table.slot(n) for n, count in self.kernel.items() if count} | set(self.opens) | set(self.pins)
        grew = True
        while grew:
            grew = False
            for slot in list(needed):
                link = self.table.first_link[slot]
                while link:
                    parent = self.table.link_parent[link]
                    grew |= parent not in needed
                    needed.add(parent)
                    link = self.table._link_sibling[link]
        assert set(self.table._live()) <= needed


def test_a_node_table_does_what_dictionaries_do():
    run_state_machine_as_test(NodeMachine, settings=SETTINGS)


def test_everything_forgotten_is_everything_freed():
    with some_table() as table:
        top = enter(table, ROOT, b"d", 5, DIRECTORY)
        for number in range(300):
            enter(table, top, b"%d" % number, 100 + number)
        for slot in table._live():
            if slot != top:
                table.forget(slot, 1)
        table.forget(top, 1)
        assert len(table) == 1
        assert balance(table) == {5: 1, **{100 + number: 1 for number in range(300)}}
        assert table._links.used == 0


def test_a_slot_that_is_used_again_has_another_node_id():
    with some_table() as table:
        seen = set()
        for number in range(50):
            slot = enter(table, ROOT, b"x", 100 + number)
            node_id = table.node_id(slot)
            assert node_id not in seen
            seen.add(node_id)
            table.unlink(ROOT, b"x")
            table.forget(slot, 1)
            assert table.slot(node_id) == 0


def test_the_inode_number_that_programs_first_saw_stays():
    with some_table() as table:
        slot = enter(table, ROOT, b"x", 7, ino=1234)
        buffer = entry(7, ino=9999)
        table.enter(ROOT, b"x", buffer, 0, 1.0, False)
        assert table.inode_number(slot) == 1234
        assert struct.unpack_from("=Q", buffer, 40)[0] == 1234


def test_a_freed_node_leaves_nothing_to_the_next_one_in_its_slot():
    with some_table() as table:
        first = enter(table, ROOT, b"d", 7, DIRECTORY, ino=1234)
        table.negatives[table.node_id(first), b"x"] = 1e12
        table.flags[first] |= 0x7 | 3 << graph_module.OPEN_FLAGS_SHIFT
        table.forget(first, 1)
        second = enter(table, ROOT, b"e", 8, DIRECTORY, ino=4321)
        assert second == first
        assert table.inode_number(second) == 4321
        assert table.flags[second] == graph_module.ALIVE | graph_module.BOUND
        assert (table.node_id(second), b"x") not in table.negatives


@pytest.mark.parametrize(
    "bad",
    [
        entry(ROOT),
        entry(9, 0),
        entry(9, 0o644),
        entry(9, 0o777777777),
        entry(9)[:32] + struct.pack("=II", 1_000_000_000, 0) + entry(9)[40:],
        entry(9)[:32] + struct.pack("=II", 0, 1_000_000_000) + entry(9)[40:],
        entry(9)[:48] + struct.pack("=Q", 1 << 63) + entry(9)[56:],
    ],
    ids=["the root", "no type", "no type but bits", "too many bits", "entry nsec", "attr nsec", "a negative size"],
)
def test_a_bad_entry_is_refused_and_counts_nothing(bad):
    with some_table() as table:
        with pytest.raises(BadEntry):
            table.enter(ROOT, b"x", bytearray(bad), 0, 1.0, False)
        assert len(table) == 1
        assert table.child(ROOT, b"x") == 0


def test_a_node_may_not_change_its_type():
    with some_table() as table:
        slot = enter(table, ROOT, b"x", 7)
        with pytest.raises(BadEntry):
            table.enter(ROOT, b"x", entry(7, DIRECTORY), 0, 1.0, False)
        assert table.driver_lookups[slot] == 1
        assert table.mode(slot) == REGULAR


def test_a_directory_is_never_below_itself():
    """A driver that gives a directory as its own grandchild made a circle of nodes that kept one another for ever."""
    with some_table() as table:
        top = enter(table, ROOT, b"d", 5, DIRECTORY)
        below = enter(table, top, b"e", 6, DIRECTORY)
        for parent, name in ((below, b"again"), (top, b"self")):
            with pytest.raises(BadEntry):
                table.enter(parent, name, entry(5, DIRECTORY), 0, 1.0, False)
        for slot in (below, top):
            table.forget(slot, 1)
        assert len(table) == 1
        assert balance(table) == {5: 1, 6: 1}


def test_a_time_out_without_an_end_is_cut():
    with some_table() as table:
        buffer = entry(7, valid=2**64 - 1)
        table.enter(ROOT, b"x", buffer, 0, 1.0, False)
        assert struct.unpack_from("=QQ", buffer, 16) == (FOREVER, FOREVER)


def test_a_removed_directory_gives_its_driver_id_free():
    """A driver that numbers by inode uses a removed directory's number again while a program still stands in it."""
    with some_table() as table:
        old = enter(table, ROOT, b"d", 5, DIRECTORY, nlink=2)
        assert table.unlink(ROOT, b"d") == old
        new = enter(table, ROOT, b"f", 5)
        assert new != old


def test_unknown_ids_are_no_slots():
    with some_table() as table:
        slot = enter(table, ROOT, b"x", 7)
        good = table.node_id(slot)
        assert table.slot(good) == slot
        for bad in (0, good + 1, good + (1 << 32), 1 << 32 | 1, 2**64 - 1, 4096, 4095):
            assert table.slot(bad) == 0
