"""The tree of known nodes, compared with a plain model while names come, go and move."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from udf.driver.tree import ROOT, Node, Tree

NAMES = st.sampled_from(["a", "b", "c"])


class TreeMachine(RuleBasedStateMachine):
    """The model: for each path the identity of what is there; for each identity what the kernel counts."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = Tree()
        self.paths: dict[str, Node] = {"/": self.tree.root}
        self.counts: dict[Node, int] = {}

    def directories(self) -> list[str]:
        return sorted(path for path, node in self.paths.items() if node.is_dir)

    def join(self, directory: str, name: str) -> str:
        return directory.rstrip("/") + "/" + name

    @rule(data=st.data(), name=NAMES, is_dir=st.booleans())
    def look_up(self, data: st.DataObject, name: str, is_dir: bool) -> None:
        directory = data.draw(st.sampled_from(self.directories()))
        path = self.join(directory, name)
        known = self.paths.get(path)
        node = self.tree.bind(self.paths[directory], name, is_dir if known is None else known.is_dir, None)
        assert known in (None, node)
        node.lookups += 1
        self.paths[path] = node
        self.counts[node] = self.counts.get(node, 0) + 1

    @precondition(lambda self: len(self.paths) > 1)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(sorted(self.paths.keys() - {"/"})))
        if any(other.startswith(path + "/") for other in self.paths):
            return
        node = self.paths.pop(path)
        directory, _, name = path.rpartition("/")
        assert self.tree.unbind(self.paths[directory or "/"], name) is node
        self.drop_unknown()

    @precondition(lambda self: len(self.paths) > 1)
    @rule(data=st.data(), name=NAMES)
    def rename(self, data: st.DataObject, name: str) -> None:
        old = data.draw(st.sampled_from(sorted(self.paths.keys() - {"/"})))
        directory = data.draw(st.sampled_from(self.directories()))
        new = self.join(directory, name)
        inside = (old == directory or directory.startswith(old + "/"), any(p.startswith(new + "/") for p in self.paths))
        if any(inside) or new == old or old.startswith(new + "/"):
            return
        old_directory, _, old_name = old.rpartition("/")
        self.tree.move(self.paths[old_directory or "/"], old_name, self.paths[directory], name)
        self.paths.pop(new, None)
        for path in [p for p in self.paths if p == old or p.startswith(old + "/")]:
            self.paths[new + path[len(old) :]] = self.paths.pop(path)
        self.drop_unknown()

    @precondition(lambda self: bool(self.counts))
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        nodes = sorted(self.counts, key=lambda node: node.id)
        node = data.draw(st.sampled_from(nodes))
        self.tree.forget(node.id, self.counts.pop(node))
        self.drop_unknown()

    def drop_unknown(self) -> None:
        for path in sorted(self.paths, key=len, reverse=True):
            # What nobody counts and nothing lies below is not known any more.
            there = self.paths[path]
            if path != "/" and there not in self.counts and not any(p.startswith(path + "/") for p in self.paths):
                del self.paths[path]

    @invariant()
    def paths_agree(self) -> None:
        for path, node in self.paths.items():
            assert self.tree.path(node) == path
            assert self.tree.get(node.id) is node
        for node in self.counts:
            assert self.tree.get(node.id) is node
        assert len(self.tree) == len({node.id for node in (*self.paths.values(), *self.counts)})


TreeMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestTree = TreeMachine.TestCase


def test_ids_are_the_same_in_every_life() -> None:
    first, second = (Tree().bind(tree.root, "name", False, None).id for tree in (Tree(), Tree()))
    assert first == second


def test_one_identity_is_one_file_and_never_one_directory() -> None:
    tree = Tree()
    file = tree.bind(tree.root, "a", False, 77)
    assert file.id == 77
    assert tree.bind(tree.root, "b", False, 77) is file
    directory = tree.bind(tree.root, "c", True, 77)
    assert directory is not file
    assert tree.bind(tree.root, "d", True, 77) is not directory


@pytest.mark.parametrize("identity", [0, 1, (1 << 64) - 1])
def test_identities_that_no_node_may_have_are_replaced(identity: int) -> None:
    tree = Tree()
    node = tree.bind(tree.root, "a", False, identity)
    assert node.id not in (0, ROOT)
    assert 0 < node.id < 1 << 63
    assert tree.bind(tree.root, "b", False, identity) is node


def test_another_file_at_a_known_name_is_another_node() -> None:
    tree = Tree()
    first = tree.bind(tree.root, "a", False, 7)
    first.lookups += 1
    second = tree.bind(tree.root, "a", False, 8)
    assert second is not first
    assert tree.path(first) is None
    assert tree.path(second) == "/a"
    third = tree.bind(tree.root, "a", True, None)
    assert third.is_dir


def test_a_rename_over_the_only_known_name_of_a_directory_keeps_the_directory() -> None:
    """The directory went with the name that was replaced, and what was moved there had no path."""
    tree = Tree()
    directory = tree.bind(tree.root, "d", True, None)
    target, moved = tree.bind(directory, "a", False, None), tree.bind(tree.root, "b", False, None)
    moved.lookups = 1
    tree.move(tree.root, "b", directory, "a")
    assert tree.path(moved) == "/d/a"
    assert tree.get(target.id) is None
