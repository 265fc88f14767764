"""memfs is killed at any step of any operation, and the next process goes on with what was there.

A run without kills says what is to be after each operation; what a killed run leaves is compared with that.
"""

from __future__ import annotations

import mmap
import os
import random
import stat
from collections.abc import Callable
from typing import Any

import pytest
from memfs_lab import (
    CODE,
    DEFAULT,
    IN_PART,
    PAGE,
    ROOT,
    SIZE,
    Memfs,
    Operation,
    Picture,
    acl,
    at_time,
    attempt,
    find,
    forget_nameless,
    loading_steps,
    opened,
    operations,
    parted,
    picture,
    run,
    setattr_,
)

from tests.killing import FULL, KILLED, copy, in_child, steps
from udf.driver.memory import create_memfds


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
@pytest.mark.parametrize("seed", range(6 if FULL else 3))
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
