"""What tests of memfs and its store share: a filesystem in a memfd, a picture of all that is in it, random operations.

Time is the number of the operation, so that two runs of the same operations are the same to the last byte.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import re
import stat
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from directmount import load_driver
from pyfuse3 import FUSEError

from udf import Store

Memfs = load_driver("memfs")
PACKAGE = Memfs.__module__.rpartition(".")[0]
acl = sys.modules[f"{PACKAGE}.acl"]
PAGE = 4096
SIZE = 64 * PAGE
ROOT = SimpleNamespace(uid=0, gid=0, umask=0o22, pid=1)
FIELDS = ("size", "uid", "gid", "mode", "atime", "mtime", "ctime")
DEFAULT = acl.pack([(1, 7, 0), (2, 6, 7), (4, 5, 0), (16, 7, 0), (32, 4, 0)])
# What may be there in part after a kill: the shim sends these again, and doing them twice is as good as once.
IN_PART = ("write",)

CODE = "fs/memfs/|udf/driver/journal"

Picture = dict[str, Any]


def run(handler: Any) -> Any:
    try:
        handler.send(None)
    except StopIteration as stop:
        return stop.value
    pytest.fail("the handler awaited something")


def opened(fd: int, **options: Any) -> Any:
    return Memfs(**{"size": SIZE, "inodes": 100, **options}, store=Store([os.dup(fd)]))


def at_time(number: int) -> None:
    """Let the clock show a time that belongs to one operation."""
    ticks = itertools.count(number * 1000 + 10**18)
    time.time_ns = lambda: next(ticks)


def picture(fs: Any) -> Picture:
    """All that a process is to know of the filesystem; also checks that it adds up."""
    tree, space, arena = fs._tree, fs._space, fs._arena
    result: Picture = {"last": tree.last_ino, "left": space.left, "inodes": space.inodes_left}
    places: list[int] = []
    slots: list[int] = []
    size = inodes = 0
    named: dict[int, int] = {}
    for node in tree.nodes.values():
        kind = type(node).__name__
        more: Any = node.rdev
        if kind == "File":
            contents = node.contents
            if contents is not None:
                places += [page for _, place, n in contents.extents for page in range(place, place + n)]
                slots.append(contents.slot)
                assert arena.kept.table[contents.slot] == contents.size
                assert contents.pages == sum(n for _, _, n in contents.extents)
                pages = sorted(page for start, _, n in contents.extents for page in range(start, start + n))
                last = contents.size % PAGE
                if last and contents.size // PAGE in pages:
                    where = {start + i: place + i for start, place, n in contents.extents for i in range(n)}
                    at = where[contents.size // PAGE] * PAGE
                    tail = bytes(arena.view[at + last : at + PAGE])
                    assert not any(tail), "behind the end of a file are bytes that are not zero"
                text = bytes(contents.read(0, min(contents.size, 40 * PAGE)))
                more = (contents.size, pages, text) if contents.size else None
            else:
                more = None
        elif kind == "Directory":
            entries = {name: (offset, child.ino) for name, (offset, child) in node.entries.items()}
            listed = [(offset, name) for offset, name, _ in node.after(0)]
            assert listed == sorted((offset, name) for name, (offset, _) in entries.items())
            for name, (_, child) in node.entries.items():
                named[child.ino] = named.get(child.ino, 0) + 1
                assert tree.nodes.get(child.ino) is child, f"{name!r} is a name of no node"
            more = (entries, node.next_offset, node.parent.ino if node.nlink else None)
        elif kind == "Symlink":
            more = node.target
        xattrs = dict(sorted((node.xattrs or {}).items()))
        size += tree._bytes(node)
        inodes += 1 if kind == "Directory" else max(1, node.nlink)
        result[str(node.ino)] = (
            oct(node.mode), node.nlink, node.uid, node.gid, node.atime, node.mtime, node.ctime, xattrs, more
        )  # fmt: skip
    for node in tree.nodes.values():
        if type(node).__name__ != "Directory":
            assert node.nlink == named.get(node.ino, 0)
    assert len(places) == len(set(places)), "a page belongs to two files"
    assert len(slots) == len(set(slots)), "two files have one row of the table"
    assert space.left == space.size - size - len(places) * PAGE
    assert space.inodes_left == space.inodes - inodes
    free = [page for start, n in arena._by_start.items() for page in range(start, start + n)]
    assert sorted(free + places) == list(range(arena._top)), "a page is neither used nor free"
    return result


def setattr_(fs: Any, ino: int, **what: int) -> Any:
    fields = SimpleNamespace(**{f"update_{name}": name in what for name in FIELDS})
    names = {"atime": "st_atime_ns", "mtime": "st_mtime_ns", "ctime": "st_ctime_ns"}
    attr = SimpleNamespace(**{names.get(name, f"st_{name}"): value for name, value in what.items()})
    return run(fs.setattr(ino, attr, fields, None, ROOT))


Operation = tuple[str, Callable[[Any], Any]]


def find(fs: Any, path: bytes) -> int:
    """The inode of a path, without a lookup that counts."""
    node = fs._tree.root
    for name in path.split(b"/") if path else []:
        node = fs._tree.child(node, name)
        if type(node).__name__ != "Directory" and name != path.split(b"/")[-1]:
            raise FUSEError(errno.ENOTDIR)
    return int(node.ino)


def parted(fs: Any, path: bytes) -> tuple[int, bytes]:
    head, _, name = path.rpartition(b"/")
    return find(fs, head), name


def forget_nameless(fs: Any) -> None:
    """The kernel has nothing open: it forgets what has no name, with all lookups of all processes."""
    run(fs.forget([(ino, 99) for ino, node in fs._tree.nodes.items() if not node.nlink]))


def attempt(fs: Any, action: Callable[[Any], Any]) -> str:
    try:
        action(fs)
    except FUSEError as error:
        return errno.errorcode[error.errno]
    finally:
        forget_nameless(fs)
    return "done"


def operations(seed: int, count: int) -> list[Operation]:
    """Random operations; the kernel's part, lookups before and forgets after, is in them."""
    dice = random.Random(seed)
    paths = [b"a", b"b", b"c", b"d", b"a/x", b"a/y", b"b/x", b"b/z", b"a/x/deep", b"l" * 200]
    return [operation(dice, dice.choice(paths), dice.choice(paths)) for _ in range(count)]


def operation(dice: random.Random, path: bytes, other: bytes) -> Operation:
    size = dice.choice([0, 1, 100, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 7, dice.randrange(20 * PAGE), 1 << 40])
    data = bytes([dice.randrange(1, 256)]) * dice.choice([1, 100, PAGE, PAGE + 1, 5 * PAGE])
    at = dice.choice([0, 10, PAGE, 2 * PAGE - 1, dice.randrange(12 * PAGE), 1 << 30])
    mode = dice.choice([0o644, 0o444, 0o6755, 0])
    flags = dice.choice([0, 0, 1, 2])
    name = dice.choice([b"user.a", b"user.b", b"security.capability", acl.ACCESS, acl.DEFAULT])
    value = DEFAULT if name.startswith(b"system.") else bytes(dice.choice([0, 10, 3000]))
    ids = dice.randrange(5)

    def keep(fs: Any, entry: Any) -> None:
        fs._tree.nodes[entry.st_ino].lookups = 0  # the kernel forgets at once

    choices: list[tuple[int, str, Callable[[Any], Any]]] = [
        (8, "create", lambda fs: keep(fs, run(fs.create(*parted(fs, path), 0o100000 | mode, os.O_RDWR, ROOT))[1])),
        (5, "mkdir", lambda fs: keep(fs, run(fs.mkdir(*parted(fs, path), 0o755, ROOT)))),
        (2, "symlink", lambda fs: keep(fs, run(fs.symlink(*parted(fs, path), b"t" * (size % 4000), ROOT)))),
        (2, "mknod", lambda fs: keep(fs, run(fs.mknod(*parted(fs, path), stat.S_IFCHR | mode, 300, ROOT)))),
        (4, "link", lambda fs: keep(fs, run(fs.link(find(fs, path), *parted(fs, other), ROOT)))),
        (4, "unlink", lambda fs: run(fs.unlink(*parted(fs, path), ROOT))),
        (3, "rmdir", lambda fs: run(fs.rmdir(*parted(fs, path), ROOT))),
        (9, "rename", lambda fs: run(fs.rename(*parted(fs, path), *parted(fs, other), flags, ROOT))),
        (14, "write", lambda fs: run(fs.write(find(fs, path), at, data))),
        (5, "truncate", lambda fs: setattr_(fs, find(fs, path), size=size, mtime=size)),
        (2, "open-truncate", lambda fs: run(fs.open(find(fs, path), os.O_WRONLY | os.O_TRUNC, ROOT))),
        (3, "chmod", lambda fs: setattr_(fs, find(fs, path), mode=mode)),
        (2, "chown", lambda fs: setattr_(fs, find(fs, path), uid=ids, gid=ids)),
        (3, "utime", lambda fs: setattr_(fs, find(fs, path), atime=size, mtime=at)),
        (6, "setxattr", lambda fs: run(fs.setxattr(find(fs, path), name, value, ROOT))),
        (3, "removexattr", lambda fs: run(fs.removexattr(find(fs, path), name, ROOT))),
        (3, "read", lambda fs: run(fs.read(find(fs, path), at, 10))),
    ]
    _, text, action = dice.choices(choices, [weight for weight, _, _ in choices])[0]
    return text, action


def loading_steps(fd: int) -> int:
    """About how many lines of memfs run before the first request, for a filesystem as it is now."""
    count = 0

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal count
        if not re.search(CODE, frame.f_code.co_filename):
            return None
        count += event == "line"
        return trace

    sys.settrace(trace)
    opened(fd)
    sys.settrace(None)
    return count - 5
