"""What a memfs finds in its store, and what it makes of it: open files without a name, limits, memory."""

from __future__ import annotations

import errno
import os
import sys

import pytest
from memfs_lab import PACKAGE, PAGE, ROOT, SIZE, forget_nameless, opened, picture, run
from pyfuse3 import FUSEError

from tests.killing import in_child, memory_of
from udf import Store, UserError


def test_a_journal_does_not_grow_when_processes_die_before_a_compaction_ends(fd: int, eager: None) -> None:
    def churn() -> int:
        fs = opened(fd)
        for i in range(8):
            run(fs.create(1, b"%0200d" % i, 0o100644, 2, ROOT))
            run(fs.unlink(1, b"%0200d" % i, ROOT))
            forget_nameless(fs)
        return int(fs._journal.size)

    assert max(in_child(churn) for _ in range(20)) < 4 * 3000 + 5000


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
