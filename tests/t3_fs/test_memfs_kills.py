"""memfs and its store: a process is killed at any step of any operation, and the next one goes on with what was there.

Time is the number of the operation, so that two runs of the same operations are the same to the last byte. A run
without kills says what is to be after each operation; what a killed run leaves is compared with that.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import random
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from directmount import load_driver
from pyfuse3 import FUSEError

from tests.killing import KILLED, copy, in_child, memory_of, steps
from udf import Store, UserError
from udf.driver import journal as journal_module
from udf.driver.memory import create_memfds

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


@pytest.fixture
def fd() -> Iterator[int]:
    (fd,) = create_memfds("test")
    yield fd
    os.close(fd)


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


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compactions begin early, so that a short run sees several of them."""
    monkeypatch.setattr(journal_module, "_FLOOR", 3000)
    monkeypatch.setattr(sys.modules[f"{PACKAGE}.snapshot"], "_CHUNK", 2)


def whole_run(todo: list[Operation]) -> tuple[list[Picture], list[str]]:
    """What is to be seen before and after each operation, and what each one answers."""

    def work() -> tuple[list[Picture], list[str]]:
        at_time(0)
        fs = Memfs(size=SIZE, inodes=100)
        pictures = [picture(fs)]
        answers = []
        for i, (_, action) in enumerate(todo):
            at_time(i + 1)
            answers.append(attempt(fs, action))
            pictures.append(picture(fs))
        return pictures, answers

    result: tuple[list[Picture], list[str]] = in_child(work)
    return result


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("seed", range(6))
def test_kills_at_random_moments_lose_nothing_that_was_acknowledged(fd: int, seed: int) -> None:
    todo = operations(seed, 800)
    pictures, answers = whole_run(todo)
    assert len(set(answers)) > 3, answers
    progress = memoryview(mmap.mmap(-1, 4096)).cast("Q")  # operations that were answered
    dice = random.Random(seed)

    def serve(first: int) -> str:
        at_time(first)
        fs = opened(fd)
        for i in range(first, len(todo)):
            at_time(i + 1)
            assert attempt(fs, todo[i][1]) == answers[i], f"operation {i}, {todo[i][0]}"
            progress[0] = i + 1
        return "all"

    def check(done: int) -> int:
        """The operation to go on with; one that was under way is done again where it is not seen to be done."""
        at_time(done)
        fs = opened(fd)
        forget_nameless(fs)  # once more, because the FORGET may have been lost
        now = picture(fs)
        if done < len(todo) and now == pictures[done + 1]:
            return done + 1
        if done < len(todo) and todo[done][0] in IN_PART:
            return done
        assert now == pictures[done], f"operation {done}, {todo[min(done, len(todo) - 1)][0]}"
        return done

    generations = 0
    first = 0
    while in_child(lambda: serve(first), step=dice.randrange(dice.choice([3000, 9000, 30000])), files=CODE) == KILLED:  # noqa: B023 - at once
        generations += 1
        first = in_child(lambda: check(int(progress[0])))
        progress[0] = first
    assert in_child(lambda: check(len(todo))) == len(todo)
    assert generations > 5


def test_a_journal_does_not_grow_when_processes_die_before_a_compaction_ends(fd: int, eager: None) -> None:
    def churn() -> int:
        fs = opened(fd)
        for i in range(8):
            run(fs.create(1, b"%0200d" % i, 0o100644, 2, ROOT))
            run(fs.unlink(1, b"%0200d" % i, ROOT))
            forget_nameless(fs)
        return int(fs._journal.size)

    assert max(in_child(churn) for _ in range(20)) < 4 * 3000 + 5000


def prepare(fs: Any) -> None:
    """A small tree in which each kind of operation has something to do."""
    for name in (b"a", b"b", b"a/sub", b"empty"):
        run(fs.mkdir(*parted(fs, name), 0o755, ROOT))
    for name in (b"file", b"a/other", b"open"):
        ino = run(fs.create(*parted(fs, name), 0o100644, os.O_RDWR, ROOT))[1].st_ino
        run(fs.write(ino, 0, b"old" * 2000))
    run(fs.link(find(fs, b"file"), 1, b"link", ROOT))
    run(fs.setxattr(find(fs, b"file"), b"security.capability", b"cap", ROOT))
    run(fs.setxattr(find(fs, b"a"), acl.DEFAULT, DEFAULT, ROOT))
    run(fs.setxattr(find(fs, b"a/other"), acl.ACCESS, DEFAULT, ROOT))
    run(fs.unlink(1, b"open", ROOT))


OPEN = 8  # the inode of the file that has no name


SINGLE: dict[str, Callable[[Any], Any]] = {
    "create": lambda fs: run(fs.create(1, b"new", 0o100644, os.O_RDWR, ROOT)),
    "create with a list": lambda fs: run(fs.create(find(fs, b"a"), b"new", 0o100666, os.O_RDWR, ROOT)),
    "mkdir with lists": lambda fs: run(fs.mkdir(find(fs, b"a"), b"new", 0o777, ROOT)),
    "symlink": lambda fs: run(fs.symlink(1, b"new", b"target", ROOT)),
    "mknod": lambda fs: run(fs.mknod(1, b"new", stat.S_IFBLK | 0o600, 4321, ROOT)),
    "link": lambda fs: run(fs.link(find(fs, b"file"), find(fs, b"b"), b"new", ROOT)),
    "unlink one of two": lambda fs: run(fs.unlink(1, b"link", ROOT)),
    "unlink the last": lambda fs: run(fs.unlink(find(fs, b"a"), b"other", ROOT)),
    "forget": lambda fs: run(fs.forget([(OPEN, 2)])),
    "rmdir": lambda fs: run(fs.rmdir(1, b"empty", ROOT)),
    "rename": lambda fs: run(fs.rename(1, b"file", find(fs, b"b"), b"moved", 0, ROOT)),
    "rename a directory": lambda fs: run(fs.rename(1, b"a", find(fs, b"b"), b"moved", 0, ROOT)),
    "rename over a file": lambda fs: run(fs.rename(1, b"file", find(fs, b"a"), b"other", 0, ROOT)),
    "rename over a directory": lambda fs: run(fs.rename(1, b"a", 1, b"empty", 0, ROOT)),
    "exchange": lambda fs: run(fs.rename(find(fs, b"a"), b"sub", 1, b"file", 2, ROOT)),
    "setattr": lambda fs: setattr_(fs, find(fs, b"file"), size=100, mode=0o600, uid=7, mtime=5),
    "setattr with a list": lambda fs: setattr_(fs, find(fs, b"a/other"), mode=0o700),
    "grow": lambda fs: setattr_(fs, find(fs, b"file"), size=1 << 33),
    "utime": lambda fs: setattr_(fs, find(fs, b"file"), atime=3, mtime=4),
    "setxattr": lambda fs: run(fs.setxattr(find(fs, b"file"), b"user.a", b"v" * 500, ROOT)),
    "set a list": lambda fs: run(fs.setxattr(find(fs, b"file"), acl.ACCESS, DEFAULT, ROOT)),
    "removexattr": lambda fs: run(fs.removexattr(find(fs, b"file"), b"security.capability", ROOT)),
    "read": lambda fs: run(fs.read(find(fs, b"file"), 0, 10)),
}


@pytest.mark.parametrize("name", SINGLE)
def test_an_operation_that_is_killed_at_any_line_is_done_or_not_done(fd: int, name: str) -> None:
    def prepared() -> tuple[Picture, Picture, int]:
        at_time(1)
        fs = opened(fd)
        prepare(fs)
        fs._journal.compact()  # the same records, however the time before was spent
        return picture(fs), picture(opened(fd)), loading_steps(fd)

    def change() -> Picture:
        fs = opened(fd)
        at_time(2)
        SINGLE[name](fs)
        return picture(fs)

    def work(_: int) -> Callable[[], Picture]:
        copy(source, fd)
        return change

    before, loaded, first = in_child(prepared)
    assert before == loaded
    (source,) = create_memfds("prepared")
    try:
        copy(fd, source)
        after = in_child(change)
        assert after != before
        seen = set()
        # Loading is not of interest here, so the kills begin with its last lines.
        for _, result in steps(work, files=CODE, lines=True, first=first, stride=2):
            left = in_child(lambda: picture(opened(fd)))
            assert left in (before, after)
            seen.add(left == after)
            if result != KILLED:
                assert left == result
        assert seen == {False, True}
    finally:
        os.close(source)


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


WRITES = {
    "over what is there": (100, 5000),
    "behind the end, in its page": (10_100, 2000),
    "over the end": (PAGE + 100, 3 * PAGE),
    "into a hole": (21 * PAGE, 3 * PAGE + 5),
    "far behind": (40 * PAGE + 7, 100),
    "between two extents": (19 * PAGE + 50, 3 * PAGE),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_that_is_killed_harms_nothing_else_and_can_be_done_again(fd: int, name: str) -> None:
    at, length = WRITES[name]
    old = b"1" * 10_000 + bytes(20 * PAGE - 10_000) + b"2" * PAGE
    if name in ("behind the end, in its page", "over the end"):
        old = old[:10_000]
    new = b"n" * length

    def prepared() -> int:
        fs = opened(fd)
        for number in range(12):  # so that what is free is not zero
            run(fs.create(1, b"%d" % number, 0o100644, os.O_RDWR, ROOT))
            run(fs.write(number + 2, 0, b"dirty" * 3000))
        for number in range(11):  # the last one stays: what is free behind all files is zero for the next process
            run(fs.unlink(1, b"%d" % number, ROOT))
        forget_nameless(fs)
        fs._journal.compact()
        ino = run(fs.create(1, b"f", 0o100644, os.O_RDWR, ROOT))[1].st_ino
        run(fs.write(ino, 0, old[:10_000]))
        if len(old) > 10_000:
            run(fs.write(ino, 20 * PAGE, old[20 * PAGE :]))
        forget_nameless(fs)
        return loading_steps(fd)

    def work(_: int) -> Callable[[], int]:
        copy(source, fd)
        return lambda: int(run(opened(fd).write(14, at, new)))

    def check() -> str:
        fs = opened(fd)
        picture(fs)
        text = bytes(run(fs.read(14, 0, 1 << 20)))
        assert len(text) in (len(old), max(len(old), at + length))
        for i, byte in enumerate(text):
            was = old[i] if i < len(old) else 0
            assert byte in ({was, ord("n")} if at <= i < at + length else {was}), f"byte {i} is {byte}"
        run(fs.write(14, at, new))
        done = (old.ljust(at, b"\0"))[:at] + new + old[at + length :]
        assert bytes(run(fs.read(14, 0, 1 << 20))) == done
        assert picture(fs) == picture(opened(fd))
        return "old" if text == old else "new" if text == done else "part"

    first = in_child(prepared)
    (source,) = create_memfds("prepared")
    try:
        copy(fd, source)
        seen = [in_child(check) for _ in steps(work, files=CODE, lines=True, first=first)]
    finally:
        os.close(source)
    assert seen[0] == "old"
    assert seen[-1] == "new"


def test_what_is_open_without_a_name_is_kept_until_the_whole_count_is_forgotten(fd: int) -> None:
    def before() -> tuple[int, int]:
        fs = opened(fd)
        left = run(fs.statfs(ROOT)).f_bfree
        nameless = run(fs.create(1, b"nameless", 0o100444, os.O_RDWR, ROOT))[1].st_ino
        run(fs.write(nameless, 0, b"still here"))
        run(fs.unlink(1, b"nameless", ROOT))
        named = run(fs.create(1, b"named", 0o100644, os.O_RDWR, ROOT))[1].st_ino
        run(fs.lookup(1, b"named", ROOT))
        assert (nameless, named) == (2, 3)
        return int(left), int(run(fs.statfs(ROOT)).f_ffree)

    left, inodes = in_child(before)

    def after() -> None:
        fs = opened(fd)
        assert run(fs.open(2, os.O_RDWR, ROOT)).fh == 2
        assert bytes(run(fs.read(2, 0, 100))) == b"still here"
        assert run(fs.getattr(2, ROOT)).st_nlink == 0
        run(fs.unlink(1, b"named", ROOT))
        assert run(fs.getattr(3, ROOT)).st_nlink == 0, "it may be open since the process before"
        run(fs.forget([(4711, 5)]))
        run(fs.forget([(2, 1)]))
        with pytest.raises(FUSEError):
            run(fs.getattr(2, ROOT))
        run(fs.forget([(3, 2)]))
        with pytest.raises(FUSEError):
            run(fs.getattr(3, ROOT))
        assert (run(fs.statfs(ROOT)).f_bfree, run(fs.statfs(ROOT)).f_ffree) == (left, inodes + 2)

    in_child(after)
    assert in_child(lambda: run(opened(fd).statfs(ROOT)).f_bfree) == left


def test_a_lookup_of_this_process_does_not_end_with_an_inherited_one(fd: int) -> None:
    in_child(lambda: run(opened(fd).create(1, b"file", 0o100644, os.O_RDWR, ROOT)) and None)

    def work() -> None:
        fs = opened(fd)
        run(fs.lookup(1, b"file", ROOT))
        run(fs.lookup(1, b"file", ROOT))
        run(fs.unlink(1, b"file", ROOT))
        run(fs.forget([(2, 1)]))
        assert run(fs.getattr(2, ROOT)).st_nlink == 0
        run(fs.forget([(2, 1)]))
        with pytest.raises(FUSEError):
            run(fs.getattr(2, ROOT))

    in_child(work)


def test_inode_numbers_and_directory_offsets_are_never_used_again(fd: int) -> None:
    def work() -> tuple[int, int]:
        fs = opened(fd)
        ino = run(fs.create(1, b"file", 0o100644, os.O_RDWR, ROOT))[1].st_ino
        offset = fs._tree.root.entries[b"file"][0]
        run(fs.unlink(1, b"file", ROOT))
        run(fs.forget([(ino, 1)]))
        fs._journal.compact()
        return int(ino), int(offset)

    seen = [in_child(work) for _ in range(3)]
    assert seen == sorted(set(seen))


def test_more_than_the_limits_allow_is_refused_in_one_sentence(fd: int) -> None:
    def grow() -> None:
        fs = opened(fd)
        run(fs.create(1, b"f", 0o100644, 2, ROOT))
        run(fs.write(2, 0, b"x" * 20 * PAGE))

    in_child(grow)
    with pytest.raises(AssertionError, match=r"UserError: the state store does not hold .* need more than size 32768"):
        in_child(lambda: opened(fd, size=8 * PAGE) and None)
    assert in_child(lambda: len(run(opened(fd).read(2, 0, 1 << 20)))) == 20 * PAGE


def test_a_store_of_another_driver_is_refused(fd: int) -> None:
    def other() -> None:
        Store([os.dup(fd)]).journal(schema=1, limit=1 << 20).append(b"\xfe what is this")

    in_child(other)

    def work() -> None:
        with pytest.raises(UserError, match="the state store does not hold a memfs that can be served"):
            opened(fd)

    in_child(work)


def test_a_full_journal_is_enospc_and_what_is_there_can_be_read_and_removed(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = sys.modules[f"{PACKAGE}.kept"]
    monkeypatch.setattr(kept, "_MIB", 3 << 10)
    monkeypatch.setattr(kept, "_PER_INODE", 0)

    def work() -> None:
        fs = opened(fd, size=SIZE, inodes=100_000)
        made: list[int] = []

        def fill() -> None:
            for i in range(100_000):
                made.append(run(fs.create(1, b"%0200d" % i, 0o100644, 2, ROOT))[1].st_ino)

        with pytest.raises(FUSEError) as caught:
            fill()
        assert caught.value.errno == errno.ENOSPC
        assert len(made) > 500
        before = picture(fs)
        for action in (
            lambda: run(fs.mkdir(1, b"d" * 200, 0o755, ROOT)),
            lambda: run(fs.link(made[0], 1, b"l" * 200, ROOT)),
            lambda: run(fs.setxattr(made[0], b"user.a", b"v" * 1000, ROOT)),
        ):
            with pytest.raises(FUSEError):
                action()
        assert picture(fs) == before == picture(opened(fd, inodes=100_000))
        assert bytes(run(fs.read(made[0], 0, 10))) == b""
        for i, ino in enumerate(made):
            run(fs.unlink(1, b"%0200d" % i, ROOT))
            run(fs.forget([(ino, 1)]))
        run(fs.mkdir(1, b"d", 0o755, ROOT))
        assert len(picture(fs)) == 3 + 2

    in_child(work)


def test_the_memory_of_what_is_removed_goes_back_over_deaths(fd: int) -> None:
    size = 64 << 20

    def fill() -> None:
        fs = opened(fd, size=size)
        for i in range(4):
            ino = run(fs.create(1, b"%d" % i, 0o100644, 2, ROOT))[1].st_ino
            for at in range(0, 8 << 20, 1 << 20):
                run(fs.write(ino, at, b"x" * (1 << 20)))

    def remove() -> None:
        fs = opened(fd, size=size)
        for i in range(4):
            run(fs.unlink(1, b"%d" % i, ROOT))
            run(fs.forget([(i + 2, 1)]))
        assert run(fs.statfs(ROOT)).f_bfree == size // PAGE

    in_child(fill)
    assert memory_of(fd) > 32 << 20
    in_child(remove)
    assert memory_of(fd) < 1 << 20
