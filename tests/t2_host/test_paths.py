"""The adapter: what an author's paths become in the terms of inodes and handles."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.t2_host.peer import ROOT, Host, Refused, named, structs
from udf.fuse.flags import Fattr
from udf.fuse.opcodes import Opcode


def serve(host: Host, drivers: Path, class_name: str = "Shelf", **options: float) -> None:
    host.start(drivers / "shelf.py", class_name, options=dict(options))
    host.ready()
    host.link.init()


def errno_of(call: object, *arguments: object, **named_arguments: object) -> int:
    with pytest.raises(Refused) as caught:
        call(*arguments, **named_arguments)  # type: ignore[operator]
    return caught.value.errno


def names(host: Host, node: int = ROOT) -> list[str]:
    return sorted(name for name, _ in host.link.listing(node) if name not in (".", ".."))


def test_what_is_written_is_read(host: Host, drivers: Path) -> None:
    serve(host, drivers)
    node, handle = host.link.create("file")
    data = os.urandom(100_000)
    assert host.link.write(node, handle, data, 5) == len(data)
    assert host.link.read(node, handle, 0, 128 * 1024) == bytes(5) + data
    assert host.link.getattr(node)["attr.size"] == 100_005


def test_a_renamed_tree_keeps_its_nodes_and_handles(host: Host, drivers: Path) -> None:
    serve(host, drivers)
    top = host.link.mkdir("top")
    middle = host.link.mkdir("middle", top)
    node, handle = host.link.create("file", middle)
    host.link.write(node, handle, b"content")
    host.link.rename("top", "other")
    assert host.link.read(node, handle) == b"content"
    assert host.link.walk("other/middle/file")["nodeid"] == node
    assert host.link.lookup("top")["nodeid"] == 0
    host.link.rename("middle", "moved", top, ROOT)
    assert host.link.walk("moved/file")["nodeid"] == node
    assert host.link.getattr(node)["attr.size"] == 7


def test_inode_numbers_are_the_same_after_forgetting_and_in_another_life(drivers: Path) -> None:
    from tests.t2_host.peer import host as make_host

    seen = []
    for _ in range(2):
        with make_host() as host:
            serve(host, drivers)
            directory = host.link.mkdir("directory")
            node, handle = host.link.create("file", directory)
            host.link.release(node, handle)
            host.link.forget(node, 1)
            host.link.forget(directory, 1)
            again = host.link.walk("directory/file")
            assert again["nodeid"] == again["attr.ino"] == node
            seen.append(node)
    assert seen[0] == seen[1]


def test_a_forgotten_node_is_stale(host: Host, drivers: Path) -> None:
    serve(host, drivers)
    node, handle = host.link.create("file")
    host.link.release(node, handle)
    host.link.lookup("file")
    host.link.forget(node, 1)
    assert host.link.getattr(node)["attr.nlink"] == 1
    host.link.forget(node, 1)
    assert errno_of(host.link.getattr, node) == errno.ESTALE


def test_every_listed_entry_counts_as_a_lookup(host: Host, drivers: Path) -> None:
    serve(host, drivers)
    node, handle = host.link.create("file")
    host.link.release(node, handle)
    host.link.forget(node, 1)
    listed = dict(host.link.listing())["file"]
    assert host.link.getattr(listed)["attr.nlink"] == 1
    host.link.forget(listed, 1)
    assert errno_of(host.link.getattr, listed) == errno.ESTALE


def test_a_long_listing_pages_without_loss_while_files_come_and_go(host: Host, drivers: Path) -> None:
    serve(host, drivers)
    for number in range(300):
        host.link.create(f"file-{number:03}")
    assert names(host) == [f"file-{number:03}" for number in range(300)]
    body = structs.OPEN_IN.pack(0, 0)
    handle = structs.OPEN_OUT.unpack_from(host.link.ask(Opcode.OPENDIR, ROOT, body))[0]
    first = host.link.ask(Opcode.READDIRPLUS, ROOT, named(structs.READ_IN, fh=handle, size=4096))
    host.link.unlink("file-000")
    host.link.create("new")
    offset = 10
    again = host.link.ask(Opcode.READDIRPLUS, ROOT, named(structs.READ_IN, fh=handle, offset=offset, size=4096))
    assert first
    assert b"file-008" in again
    assert b"file-007" not in again


@pytest.mark.parametrize("class_name", ["Shelf", "NoLink", "NoRename"])
def test_an_open_file_lives_on_when_it_is_removed(host: Host, drivers: Path, class_name: str) -> None:
    serve(host, drivers, class_name)
    node, handle = host.link.create("file")
    host.link.write(node, handle, b"content")
    host.link.unlink("file")
    assert host.link.lookup("file")["nodeid"] == 0
    assert names(host) == []
    assert host.link.read(node, handle) == b"content"
    assert host.link.write(node, handle, b"CONTENT") == 7
    assert host.link.getattr(node)["attr.nlink"] == 0
    if class_name == "NoRename":
        assert errno_of(host.link.create, "file") == errno.EBUSY
    else:
        other, _ = host.link.create("file")
        assert other != node
        host.link.unlink("file")
    host.link.release(node, handle)
    host.link.forget(node, 1)
    assert errno_of(host.link.getattr, node) == errno.ESTALE
    host.link.create("file")
    assert names(host) == ["file"]


@pytest.mark.parametrize("class_name", ["Shelf", "NoLink"])
def test_an_open_file_lives_on_when_it_is_replaced(host: Host, drivers: Path, class_name: str) -> None:
    serve(host, drivers, class_name)
    old, old_handle = host.link.create("target")
    host.link.write(old, old_handle, b"old")
    new, new_handle = host.link.create("file")
    host.link.write(new, new_handle, b"new")
    host.link.rename("file", "target")
    assert host.link.read(old, old_handle) == b"old"
    assert host.link.read(new, new_handle) == b"new"
    assert host.link.lookup("target")["nodeid"] == new
    assert names(host) == ["target"]
    host.link.release(old, old_handle)
    assert names(host) == ["target"]


def test_a_directory_whose_open_file_was_removed_can_be_removed(host: Host, drivers: Path) -> None:
    serve(host, drivers)
    directory = host.link.mkdir("directory")
    node, handle = host.link.create("file", directory)
    host.link.unlink("file", directory)
    host.link.rmdir("directory")
    assert host.link.read(node, handle) == b""
    host.link.release(node, handle)


def test_hard_links_are_one_node_and_one_file(host: Host, drivers: Path) -> None:
    serve(host, drivers)
    node, handle = host.link.create("one")
    host.link.write(node, handle, b"shared")
    entry = host.link.link(node, "two")
    assert (entry["nodeid"], entry["attr.nlink"]) == (node, 2)
    assert host.link.lookup("two")["nodeid"] == node
    host.link.unlink("one")
    assert host.link.read(node, handle) == b"shared"
    assert host.link.getattr(node)["attr.nlink"] == 1
    host.link.unlink("two")
    assert host.link.read(node, handle) == b"shared"
    assert host.link.getattr(node)["attr.nlink"] == 0


def test_a_rename_to_another_name_of_the_same_file_changes_nothing(host: Host, drivers: Path) -> None:
    serve(host, drivers)
    node, _ = host.link.create("one")
    host.link.link(node, "two")
    host.link.rename("one", "two")
    assert names(host) == ["one", "two"]


def test_renames_obey_the_rules_of_posix(host: Host, drivers: Path) -> None:
    serve(host, drivers)
    directory = host.link.mkdir("directory")
    inner = host.link.mkdir("inner", directory)
    host.link.mkdir("empty")
    host.link.create("file")
    assert errno_of(host.link.rename, "file", "directory") == errno.EISDIR
    assert errno_of(host.link.rename, "directory", "file") == errno.ENOTDIR
    assert errno_of(host.link.rename, "empty", "directory") == errno.ENOTEMPTY
    assert errno_of(host.link.rename, "missing", "else") == errno.ENOENT
    assert errno_of(host.link.rename, "directory", "x", ROOT, inner) == errno.EINVAL
    assert errno_of(host.link.rename, "file", "empty", flags=1) == errno.EEXIST
    assert errno_of(host.link.rename, "file", "empty", flags=2) == errno.EINVAL
    assert errno_of(host.link.rename, "inner", "directory", directory, ROOT) == errno.ENOTEMPTY
    host.link.rename("directory", "empty")
    assert names(host) == ["empty", "file"]


def test_removals_obey_the_rules_of_posix(host: Host, drivers: Path) -> None:
    serve(host, drivers)
    directory = host.link.mkdir("directory")
    host.link.create("file", directory)
    assert errno_of(host.link.rmdir, "directory") == errno.ENOTEMPTY
    assert errno_of(host.link.unlink, "directory") == errno.EISDIR
    assert errno_of(host.link.rmdir, "file", directory) == errno.ENOTDIR
    assert errno_of(host.link.unlink, "missing") == errno.ENOENT
    assert errno_of(host.link.create, "x" * 256) == errno.ENAMETOOLONG


def test_a_path_stays_valid_while_a_verb_uses_it(host: Host, drivers: Path) -> None:
    """A read that had its path before a rename used to find nothing there after it."""
    serve(host, drivers, delay=0.05)
    directory = host.link.mkdir("directory")
    node, handle = host.link.create("SLOW", directory)
    host.link.write(node, handle, b"content")
    read = host.link.send(Opcode.READ, node, named(structs.READ_IN, fh=handle, size=10))
    body = named(structs.RENAME2_IN, newdir=ROOT) + b"directory\0elsewhere\0"
    renamed = host.link.send(Opcode.RENAME2, ROOT, body)
    later = host.link.send(Opcode.READ, node, named(structs.READ_IN, fh=handle, size=10))
    assert host.link.receive(read) == b"content"
    assert host.link.receive(renamed) == b""
    assert host.link.receive(later) == b"content"


def test_attributes_are_set(host: Host, drivers: Path) -> None:
    serve(host, drivers)
    node, _ = host.link.create("file", mode=0o640)
    assert host.link.getattr(node)["attr.mode"] & 0o7777 == 0o640
    assert host.link.setattr(node, Fattr.MODE, mode=0o100600)["attr.mode"] & 0o7777 == 0o600
    assert host.link.setattr(node, Fattr.SIZE, size=10)["attr.size"] == 10
    entry = host.link.setattr(node, Fattr.MTIME, mtime=1234, mtimensec=5)
    assert (entry["attr.mtime"], entry["attr.mtimensec"]) == (1234, 5)
    assert host.link.setattr(node, Fattr.UID | Fattr.GID, uid=7, gid=8)["attr.uid"] == 7


def test_a_new_file_belongs_to_who_made_it(host: Host, drivers: Path) -> None:
    serve(host, drivers)
    node, _ = host.link.create("file", uid=1234, gid=5678)
    attributes = host.link.getattr(node)
    assert (attributes["attr.uid"], attributes["attr.gid"]) == (1234, 5678)


def test_symbolic_links_and_extended_attributes(host: Host, drivers: Path) -> None:
    serve(host, drivers)
    host.link.ask(Opcode.SYMLINK, ROOT, b"link\0target\0")
    node = host.link.lookup("link")["nodeid"]
    assert host.link.ask(Opcode.READLINK, node) == b"target"
    value = structs.SETXATTR_IN_COMPAT.pack(5, 0) + b"user.name\0value"
    host.link.ask(Opcode.SETXATTR, node, value)
    get = structs.GETXATTR_IN.pack(100)
    assert host.link.ask(Opcode.GETXATTR, node, get + b"user.name\0") == b"value"
    assert host.link.ask(Opcode.LISTXATTR, node, get) == b"user.name\0"
    host.link.ask(Opcode.REMOVEXATTR, node, b"user.name\0")
    assert errno_of(host.link.ask, Opcode.GETXATTR, node, get + b"user.name\0") == errno.ENODATA


def test_a_read_only_driver_says_so(host: Host, drivers: Path) -> None:
    serve(host, drivers, "ReadOnly")
    node = host.link.lookup("file")["nodeid"]
    assert errno_of(host.link.open, node, os.O_RDWR) == errno.EROFS
    assert errno_of(host.link.create, "new") == errno.EROFS
    assert errno_of(host.link.mkdir, "new") == errno.EROFS
    assert errno_of(host.link.unlink, "file") == errno.EROFS
    assert errno_of(host.link.rename, "file", "new") == errno.EROFS
    assert errno_of(host.link.link, node, "new") == errno.EROFS
    assert errno_of(host.link.setattr, node, Fattr.SIZE, size=0) == errno.EROFS
    assert errno_of(host.link.setattr, node, Fattr.MODE, mode=0o100600) == errno.EROFS
    assert errno_of(host.link.ask, Opcode.SYMLINK, ROOT, b"link\0target\0") == errno.EROFS
    assert errno_of(host.link.ask, Opcode.READLINK, node) == errno.EINVAL
    assert host.link.setattr(node, Fattr.MODE, mode=0o100644)["attr.mode"] & 0o777 == 0o644
    assert host.link.ask(Opcode.STATFS, ROOT)


def test_missing_verbs_fail_as_programs_expect(host: Host, drivers: Path) -> None:
    serve(host, drivers, "NoRename")
    node, _ = host.link.create("file")
    assert errno_of(host.link.rename, "file", "new") == errno.EXDEV
    assert errno_of(host.link.link, node, "new") == errno.EPERM


def test_names_that_are_not_utf8_pass_through(host: Host, drivers: Path) -> None:
    serve(host, drivers)
    name = os.fsdecode(b"caf\xe9")
    node, _ = host.link.create(name)
    assert host.link.lookup(name)["nodeid"] == node
    assert names(host) == [name]


def test_what_is_only_hidden_is_gone_after_an_orderly_end(host: Host, drivers: Path, tmp_path: Path) -> None:
    code = (drivers / "shelf.py").read_text() + (
        f"\nclass Logged(Shelf):\n    async def remove(self, path):\n"
        f"        open({str(tmp_path / 'log')!r}, 'a').write(path + '\\n'); await super().remove(path)\n"
    )
    (tmp_path / "logged.py").write_text(code)
    host.start(tmp_path / "logged.py", "Logged")
    host.ready()
    host.link.init()
    host.link.create("file")
    host.link.unlink("file")
    host.process.terminate()
    assert host.wait() == 0
    assert (tmp_path / "log").read_text().startswith("/.udf-open-")
