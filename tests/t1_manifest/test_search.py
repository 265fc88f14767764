"""Finding drivers: names, paths, and whose files are believed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.t1_manifest.test_manifest import sentence, write
from udf.manifest import Trust, find_driver, list_drivers, search_path

BLOCK = 'kind = "fs"\ninterface = 1\nclass = "X"'
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
OTHER = 12345


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "package").mkdir()
    write(tmp_path / "single.py", BLOCK)
    write(tmp_path / "package/__init__.py", BLOCK)
    (tmp_path / "foreign.toml").write_text('kind = "fs"\ninterface = 1\ncommand = "sh {mountpoint}"\n')
    (tmp_path / "notes.txt").write_text("no driver")
    return tmp_path


@pytest.mark.parametrize("name", ["single", "package", "foreign"])
def test_a_driver_is_found_by_name_in_each_form(tree: Path, name: str) -> None:
    assert find_driver(name, path=[tree]).name == name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("single.py", "single"),
        ("package", "package"),
        ("package/", "package"),
        ("package/__init__.py", "package"),
        ("foreign.toml", "foreign"),
    ],
)
def test_a_driver_is_found_by_path(tree: Path, path: str, name: str) -> None:
    manifest = find_driver(f"{tree}/{path}")
    assert manifest.name == name
    assert os.path.isabs(manifest.path)


def test_the_first_directory_wins(tree: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    write(second / "single.py", BLOCK)
    assert find_driver("single", path=[second, tree]).path == str(second / "single.py")
    assert [m.name for m in list_drivers(path=[second, tree])[0]] == ["foreign", "package", "single"]


def test_what_is_not_there_is_one_sentence(tree: Path) -> None:
    assert "there is no driver named 'nothing'" in sentence(find_driver, "nothing", path=[tree, tree / "missing"])
    assert "there is no driver at" in sentence(find_driver, f"{tree}/nothing.py")
    assert "neither a .py nor a .toml" in sentence(find_driver, f"{tree}/notes.txt")
    assert "not the name of a driver" in sentence(find_driver, "a b")


def test_the_built_in_trees_and_the_users_own_are_searched(tmp_path: Path) -> None:
    path = search_path(Trust(os.geteuid(), os.getegid(), str(tmp_path)))
    assert path[0] == Path("/etc/udf/drivers")
    assert tmp_path / ".local/share/udf/drivers" in path
    assert find_driver("hello").class_name == "Hello"


def test_a_broken_driver_is_a_warning_in_the_list(tree: Path) -> None:
    (tree / "broken.py").write_text("x = 1\n")
    drivers, warnings = list_drivers(path=[tree])
    assert [manifest.name for manifest in drivers] == ["foreign", "package", "single"]
    assert len(warnings) == 1
    assert "broken.py: the file has no manifest block" in warnings[0]


@pytest.mark.parametrize("what", ["single.py", "package", "package/__init__.py", "."])
def test_what_everybody_can_write_is_not_believed(tree: Path, what: str) -> None:
    (tree / what).chmod(0o777)
    name = "single" if "package" not in what else "package"
    for wanted in (name, f"{tree}/{'single.py' if name == 'single' else 'package'}"):
        text = sentence(find_driver, wanted, path=[tree])
        assert "can be written by everybody: chmod o-w" in text
    drivers, warnings = list_drivers(path=[tree])
    assert name not in [manifest.name for manifest in drivers]
    assert any("chmod o-w" in warning for warning in warnings)


def test_any_file_of_a_package_counts(tree: Path) -> None:
    (tree / "package/other.py").write_text("")
    (tree / "package/other.py").chmod(0o666)
    assert "can be written by everybody" in sentence(find_driver, "package", path=[tree])


@needs_root
def test_root_does_not_believe_others_files_but_they_do(tree: Path) -> None:
    os.chown(tree / "single.py", OTHER, OTHER)
    assert f"belongs to uid {OTHER}" in sentence(find_driver, "single", path=[tree])
    assert f"belongs to uid {OTHER}" in sentence(find_driver, f"{tree}/single.py")
    assert find_driver("single", Trust(OTHER, OTHER), [tree]).name == "single"
    assert find_driver("package", Trust(OTHER, OTHER), [tree]).name == "package", "root's files are everyone's"


@needs_root
def test_a_link_is_judged_by_where_it_leads(tree: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tree / "single.py").rename(elsewhere / "single.py")
    (tree / "single.py").symlink_to(elsewhere / "single.py")
    assert find_driver("single", path=[tree]).path == str(elsewhere / "single.py")
    os.chown(elsewhere, OTHER, OTHER)
    assert f"belongs to uid {OTHER}" in sentence(find_driver, "single", path=[tree])


@needs_root
def test_a_file_that_a_group_can_write_is_believed_only_by_members_of_it_alone(tree: Path) -> None:
    os.chown(tree / "single.py", 0, OTHER)
    (tree / "single.py").chmod(0o664)
    assert "can be written by the group" in sentence(find_driver, "single", path=[tree])
    assert find_driver("single", Trust(OTHER, OTHER), [tree]).name == "single"


def test_a_pipe_on_the_search_path_does_not_stop_the_list(tree: Path) -> None:
    os.mkfifo(tree / "pipe.py")
    assert len(list_drivers(path=[tree])[0]) == 3
