"""memfs without a mount: nodes and their lookup counts, limits, listings, access lists, memory."""

from __future__ import annotations

import errno
import gc
import os
import stat
import struct
import sys
import tracemalloc
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from directmount import load_driver
from hypothesis import given
from hypothesis import strategies as st
from pyfuse3 import FUSEError

Memfs = load_driver("memfs")
PACKAGE = Memfs.__module__.rpartition(".")[0]
acl = sys.modules[f"{PACKAGE}.acl"]
nodes = sys.modules[f"{PACKAGE}.nodes"]

ROOT = SimpleNamespace(uid=0, gid=0, umask=0o22, pid=1)
USER = SimpleNamespace(uid=1000, gid=1000, umask=0o27, pid=1)
PAGE = 4096


def run(handler: Coroutine[Any, Any, Any]) -> Any:
    """What a handler returns; fails if it awaits, because handlers are to be atomic."""
    try:
        handler.send(None)
    except StopIteration as stop:
        return stop.value
    pytest.fail("the handler awaited something")


def refused(number: int, handler: Coroutine[Any, Any, Any]) -> None:
    with pytest.raises(FUSEError) as caught:
        run(handler)
    assert errno.errorcode[caught.value.errno] == errno.errorcode[number]


def create(fs: Any, parent: int, name: bytes, mode: int = 0o666, ctx: Any = ROOT) -> int:
    return int(run(fs.create(parent, name, stat.S_IFREG | mode, os.O_RDWR, ctx))[1].st_ino)


def mkdir(fs: Any, parent: int, name: bytes, mode: int = 0o777, ctx: Any = ROOT) -> int:
    return int(run(fs.mkdir(parent, name, stat.S_IFDIR | mode, ctx)).st_ino)


def free(fs: Any) -> tuple[int, int]:
    answer = run(fs.statfs(ROOT))
    return answer.f_bfree, answer.f_ffree


# nodes, lookup counts, limits


def test_an_unlinked_file_lives_until_the_kernel_forgets_it() -> None:
    fs = Memfs(size=64 * PAGE, inodes=10)
    before = free(fs)
    ino = create(fs, 1, b"file")
    run(fs.write(ino, 0, b"held open"))
    run(fs.lookup(1, b"file", ROOT))
    run(fs.unlink(1, b"file", ROOT))
    assert run(fs.open(ino, os.O_RDONLY, ROOT)).fh == ino, "a lazy open may come after the unlink"
    assert bytes(run(fs.read(ino, 0, 100))) == b"held open"
    assert run(fs.getattr(ino, ROOT)).st_nlink == 0
    run(fs.forget([(ino, 1)]))
    assert bytes(run(fs.read(ino, 0, 100))) == b"held open"
    run(fs.forget([(ino, 1)]))
    refused(errno.ESTALE, fs.getattr(ino, ROOT))
    assert free(fs) == before


def test_a_forgotten_file_that_has_a_name_stays() -> None:
    fs = Memfs()
    ino = create(fs, 1, b"file")
    run(fs.forget([(ino, 1)]))
    assert run(fs.lookup(1, b"file", ROOT)).st_ino == ino
    run(fs.forget([(ino, 1), (4711, 3), (1, 99)]))
    run(fs.unlink(1, b"file", ROOT))
    refused(errno.ESTALE, fs.getattr(ino, ROOT))
    assert run(fs.getattr(1, ROOT)).st_nlink == 2


def test_inode_numbers_are_never_used_again() -> None:
    fs = Memfs()
    seen = set()
    for _ in range(50):
        ino = create(fs, 1, b"file")
        run(fs.unlink(1, b"file", ROOT))
        run(fs.forget([(ino, 1)]))
        seen.add(ino)
    assert len(seen) == 50


def test_a_missing_name_is_remembered_by_the_kernel() -> None:
    entry = run(Memfs().lookup(1, b"missing", ROOT))
    assert entry.st_ino == 0
    assert entry.entry_timeout > 86400


def test_dot_and_dotdot_can_be_looked_up() -> None:
    fs = Memfs()
    directory = mkdir(fs, 1, b"d")
    assert run(fs.lookup(directory, b".", ROOT)).st_ino == directory
    assert run(fs.lookup(directory, b"..", ROOT)).st_ino == 1
    assert run(fs.lookup(1, b"..", ROOT)).st_ino == 1


def test_nothing_can_be_made_in_a_removed_directory() -> None:
    fs = Memfs()
    directory = mkdir(fs, 1, b"d")
    file = create(fs, 1, b"f")
    run(fs.rmdir(1, b"d", ROOT))
    refused(errno.ENOENT, fs.create(directory, b"x", 0o644, 0, ROOT))
    refused(errno.ENOENT, fs.mkdir(directory, b"x", 0o755, ROOT))
    refused(errno.ENOENT, fs.symlink(directory, b"x", b"y", ROOT))
    refused(errno.ENOENT, fs.link(file, directory, b"x", ROOT))
    refused(errno.ENOENT, fs.rename(1, b"f", directory, b"x", 0, ROOT))


def test_a_directory_cannot_be_moved_below_itself() -> None:
    fs = Memfs()
    a = mkdir(fs, 1, b"a")
    b = mkdir(fs, a, b"b")
    refused(errno.EINVAL, fs.rename(1, b"a", b, b"c", 0, ROOT))
    refused(errno.EINVAL, fs.rename(1, b"a", a, b"c", 0, ROOT))
    refused(errno.EINVAL, fs.rename(1, b"a", a, b"b", 2, ROOT))
    refused(errno.EINVAL, fs.rename(a, b"b", 1, b"a", 2, ROOT))
    refused(errno.ENOTEMPTY, fs.rename(a, b"b", 1, b"a", 0, ROOT))
    refused(errno.EINVAL, fs.rename(1, b"a", 1, b"c", 4, ROOT))
    refused(errno.EINVAL, fs.rename(1, b"a", 1, b"c", 3, ROOT))


def test_exchanging_a_directory_with_a_file_moves_the_link_counts() -> None:
    fs = Memfs()
    a = mkdir(fs, 1, b"a")
    mkdir(fs, a, b"sub")
    create(fs, 1, b"file")
    run(fs.rename(1, b"file", a, b"sub", 2, ROOT))
    assert run(fs.getattr(1, ROOT)).st_nlink == 4
    assert run(fs.getattr(a, ROOT)).st_nlink == 2
    assert run(fs.lookup(run(fs.lookup(1, b"file", ROOT)).st_ino, b"..", ROOT)).st_ino == 1


def test_inodes_and_further_links_are_limited_exactly() -> None:
    fs = Memfs(inodes=4)
    first = create(fs, 1, b"1")
    run(fs.link(first, 1, b"2", ROOT))
    create(fs, 1, b"3")
    assert free(fs)[1] == 0
    refused(errno.ENOSPC, fs.mkdir(1, b"4", 0o755, ROOT))
    refused(errno.ENOSPC, fs.link(first, 1, b"4", ROOT))
    run(fs.unlink(1, b"1", ROOT))
    assert free(fs)[1] == 1
    mkdir(fs, 1, b"4")
    assert free(fs)[1] == 0


def test_xattrs_and_symlinks_count_as_space_and_give_it_back() -> None:
    fs = Memfs(size=8 * PAGE)
    before = free(fs)
    link = run(fs.symlink(1, b"link", b"t" * 4095, ROOT)).st_ino
    assert free(fs)[0] == before[0] - 1
    refused(errno.ENAMETOOLONG, fs.symlink(1, b"long", b"t" * 4096, ROOT))
    file = create(fs, 1, b"file")
    run(fs.setxattr(file, b"user.a", b"v" * 3 * PAGE, ROOT))
    refused(errno.ENOSPC, fs.setxattr(file, b"user.b", b"v" * 5 * PAGE, ROOT))
    run(fs.setxattr(file, b"user.a", b"v" * 5 * PAGE, ROOT))
    assert run(fs.write(file, 0, bytes(8 * PAGE))) == PAGE, "what is left is used to the last page"
    refused(errno.ENOSPC, fs.write(file, PAGE, b"x"))
    assert run(fs.write(file, 0, bytes(PAGE))) == PAGE, "what is there can be written again"
    run(fs.removexattr(file, b"user.a", ROOT))
    assert run(fs.write(file, PAGE, b"x")) == 1
    run(fs.setxattr(file, b"user.a", b"v", ROOT))
    run(fs.unlink(1, b"file", ROOT))
    run(fs.unlink(1, b"link", ROOT))
    run(fs.forget([(file, 1), (link, 1)]))
    assert free(fs) == before


def test_what_fails_for_want_of_space_changes_nothing() -> None:
    fs = Memfs(size=PAGE)
    run(fs.setxattr(1, acl.DEFAULT, acl.pack([(1, 7, 0), (4, 7, 0), (32, 7, 0)]), ROOT))
    run(fs.setxattr(1, b"user.fill", b"v" * (PAGE - 100), ROOT))
    before = free(fs)
    refused(errno.ENOSPC, fs.mkdir(1, b"d", 0o755, ROOT))
    refused(errno.ENOSPC, fs.symlink(1, b"s", b"t" * 200, ROOT))
    assert free(fs) == before
    assert run(fs.lookup(1, b"d", ROOT)).st_ino == 0


def test_setting_nothing_takes_suid_away_like_any_chown() -> None:
    """The kernel makes that of chown(-1, -1) once HANDLE_KILLPRIV is negotiated; suid used to stay."""
    fs = Memfs()
    fields = SimpleNamespace(
        **{f"update_{name}": False for name in ("size", "uid", "gid", "mode", "atime", "mtime", "ctime")}
    )
    for mode, after in ((0o6755, 0o755), (0o2644, 0o2644)):
        file = create(fs, 1, b"%o" % mode, mode)
        assert run(fs.setattr(file, None, fields, None, ROOT)).st_mode == stat.S_IFREG | after
    directory = mkdir(fs, 1, b"d", 0o2755)
    assert run(fs.setattr(directory, None, fields, None, ROOT)).st_mode == stat.S_IFDIR | 0o2755


def test_bounds_of_xattrs() -> None:
    fs = Memfs()
    file = create(fs, 1, b"file")
    refused(errno.E2BIG, fs.setxattr(file, b"user.a", bytes(65537), ROOT))
    run(fs.setxattr(file, b"user.a", bytes(65536), ROOT))
    refused(errno.ENODATA, fs.getxattr(file, b"user.b", ROOT))
    refused(errno.ENODATA, fs.removexattr(file, b"user.b", ROOT))
    refused(errno.EOPNOTSUPP, fs.setxattr(file, b"system.other", b"", ROOT))
    refused(errno.EOPNOTSUPP, fs.getxattr(file, b"other", ROOT))
    for count in range(65536 // 256):
        name = b"user.%0250d" % count
        if count < 65536 // 256 - 1:
            run(fs.setxattr(file, name, b"", ROOT))
    refused(errno.ENOSPC, fs.setxattr(file, name, b"", ROOT))
    run(fs.setxattr(file, name[:-7], b"", ROOT))
    assert sum(len(name) + 1 for name in run(fs.listxattr(file, ROOT))) == 65536


def test_trusted_xattrs_are_listed_for_root_only() -> None:
    fs = Memfs()
    run(fs.setxattr(1, b"trusted.a", b"", ROOT))
    run(fs.setxattr(1, b"user.a", b"", ROOT))
    assert run(fs.listxattr(1, ROOT)) == [b"trusted.a", b"user.a"]
    assert run(fs.listxattr(1, USER)) == [b"user.a"]


def test_capabilities_go_with_the_contents_they_were_given_for() -> None:
    fs = Memfs()
    file = create(fs, 1, b"file")
    none = dict.fromkeys(("size", "uid", "gid", "mode", "atime", "mtime", "ctime"), False)

    def setattr_(**what: bool) -> Any:
        fields = SimpleNamespace(**{f"update_{name}": value for name, value in {**none, **what}.items()})
        return run(fs.setattr(file, SimpleNamespace(st_size=1, st_uid=5, st_gid=5, st_mode=0o644), fields, None, ROOT))

    def dropped_by(change: Any) -> bool:
        run(fs.setxattr(file, b"security.capability", b"cap", ROOT))
        change()
        return b"security.capability" not in run(fs.listxattr(file, ROOT))

    assert dropped_by(lambda: run(fs.write(file, 0, b"x")))
    assert dropped_by(lambda: setattr_(size=True))
    assert dropped_by(lambda: setattr_(uid=True))
    assert dropped_by(lambda: setattr_(gid=True))
    assert dropped_by(lambda: run(fs.open(file, os.O_TRUNC | os.O_WRONLY, ROOT)))
    assert not dropped_by(lambda: setattr_(mode=True))


@pytest.mark.parametrize(
    "options", [{"size": 100}, {"size": 1 << 60}, {"size": 1 << 70}, {"inodes": 0}, {"mode": "rwx"}, {"mode": "888"}]
)
def test_senseless_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Memfs(**options)


def test_an_empty_file_costs_a_few_hundred_bytes() -> None:
    fs = Memfs()
    gc.collect()
    tracemalloc.start()
    try:
        for i in range(20000):
            create(fs, 1, b"file%08d" % i)
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    assert used / 20000 < 600


# listings


@given(st.data())
def test_a_listing_in_pieces_shows_every_name_that_stays_exactly_once(data: st.DataObject) -> None:
    directory = nodes.Directory(1, stat.S_IFDIR, 0, 0, 0)
    node = nodes.Node(2, stat.S_IFIFO, 0, 0, 0)
    names = {b"%d" % i for i in range(data.draw(st.integers(0, 120)))}
    for name in names:
        directory.add(name, node)
    staying, fresh, listed, offset, end = set(names), 1000, [], 0, directory.next_offset
    while True:
        piece = [entry for entry, _ in zip(directory.after(offset), range(data.draw(st.integers(1, 30))), strict=False)]
        piece = [entry for entry in piece if entry[0] < end]
        if not piece:
            break
        listed += [name for _, name, _ in piece]
        offset = piece[-1][0]
        for name in data.draw(st.sets(st.sampled_from(sorted(directory.entries)))) if directory.entries else ():
            directory.remove(name)
            staying.discard(name)
        for _ in range(data.draw(st.integers(0, 5))):
            directory.add(b"%d" % fresh, node)
            fresh += 1
    assert len(listed) == len(set(listed))
    assert staying <= set(listed) <= names


def test_the_order_of_a_directory_forgets_removed_names() -> None:
    directory = nodes.Directory(1, stat.S_IFDIR, 0, 0, 0)
    node = nodes.Node(2, stat.S_IFIFO, 0, 0, 0)
    directory.add(b"first", node)
    for i in range(1000):
        directory.add(b"%d" % i, node)
        directory.add(b"last", node)
        directory.remove(b"%d" % i)
        directory.remove(b"last")
    assert len(directory._names) < 50
    assert [name for _, name, _ in directory.after(0)] == [b"first"]


# access lists

permissions = st.integers(0, 7)
modes = st.integers(0, 0o777)


@st.composite
def access_lists(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    users = sorted(draw(st.sets(st.integers(0, 2**32 - 2), max_size=3)))
    groups = sorted(draw(st.sets(st.integers(0, 2**32 - 2), max_size=3)))
    entries = [(acl.USER_OBJ, draw(permissions), 2**32 - 1)]
    entries += [(acl.USER, draw(permissions), uid) for uid in users]
    entries += [(acl.GROUP_OBJ, draw(permissions), 2**32 - 1)]
    entries += [(acl.GROUP, draw(permissions), gid) for gid in groups]
    if users or groups or draw(st.booleans()):
        entries.append((acl.MASK, draw(permissions), 2**32 - 1))
    return [*entries, (acl.OTHER, draw(permissions), 2**32 - 1)]


def allowed(entries: list[tuple[int, int, int]]) -> dict[tuple[int, int], int]:
    """What each class of users may do by POSIX 1003.1e: all but owner and others are bounded by the mask."""
    mask = next((perm for tag, perm, _ in entries if tag == acl.MASK), 7)
    free = {acl.USER_OBJ, acl.OTHER, acl.MASK}
    return {(tag, who): perm if tag in free else perm & mask for tag, perm, who in entries}


@given(access_lists(), modes)
def test_a_new_file_allows_what_both_the_default_list_and_its_mode_allow(entries: Any, mode: int) -> None:
    new_mode, value = acl.inherit(acl.pack(entries), stat.S_IFREG | 0o4000 | mode)
    assert new_mode & ~0o777 == stat.S_IFREG | 0o4000
    bits = {acl.USER_OBJ: mode >> 6 & 7, acl.OTHER: mode & 7}
    expected = {who: perm & bits.get(who[0], mode >> 3 & 7) for who, perm in allowed(entries).items()}
    if value is None:
        assert len(entries) == 3
        assert new_mode & 0o777 == (
            expected[acl.USER_OBJ, 2**32 - 1] << 6
            | expected[acl.GROUP_OBJ, 2**32 - 1] << 3
            | expected[acl.OTHER, 2**32 - 1]
        )
    else:
        assert allowed(acl.parse(value)) == expected
        assert acl.set_access(value, new_mode) == (new_mode, value), "mode and list say the same"


@given(access_lists(), modes, modes)
def test_chmod_and_the_list_agree(entries: Any, old: int, new: int) -> None:
    mode, value = acl.set_access(acl.pack(entries), stat.S_IFREG | old)
    group = next((perm for tag, perm, _ in entries if tag == acl.MASK), entries[-2][1])
    assert (mode >> 6 & 7, mode >> 3 & 7, mode & 7) == (entries[0][1], group, entries[-1][1])
    assert (value is None) == (len(entries) == 3)
    if value is not None:
        changed = acl.chmod(value, new)
        assert acl.set_access(changed, stat.S_IFREG) == (stat.S_IFREG | new, changed)
        named = {acl.USER, acl.GROUP, acl.GROUP_OBJ}
        assert [e for e in acl.parse(changed) if e[0] in named] == [e for e in entries if e[0] in named]


@given(
    st.one_of(
        st.binary(max_size=60),
        st.lists(st.tuples(st.integers(0, 64), st.integers(0, 9), permissions)).map(
            lambda entries: struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
        ),
    )
)
def test_a_malformed_list_is_refused_and_never_kept(value: bytes) -> None:
    fs = Memfs()
    try:
        acl.parse(value)
    except ValueError:
        refused(errno.EINVAL, fs.setxattr(1, acl.ACCESS, value, ROOT))
        refused(errno.EINVAL, fs.setxattr(1, acl.DEFAULT, value, ROOT))
        assert run(fs.listxattr(1, ROOT)) == []


def test_umask_counts_only_without_a_default_list() -> None:
    fs = Memfs()
    plain = create(fs, 1, b"plain", 0o666, USER)
    assert run(fs.getattr(plain, ROOT)).st_mode == stat.S_IFREG | 0o640
    directory = mkdir(fs, 1, b"d")
    default = acl.pack(
        [(acl.USER_OBJ, 7, 0), (acl.USER, 6, 7), (acl.GROUP_OBJ, 5, 0), (acl.MASK, 7, 0), (acl.OTHER, 4, 0)]
    )
    run(fs.setxattr(directory, acl.DEFAULT, default, ROOT))
    file = create(fs, directory, b"file", 0o666, USER)
    assert run(fs.getattr(file, ROOT)).st_mode == stat.S_IFREG | 0o664
    sub = mkdir(fs, directory, b"sub", 0o700, USER)
    assert run(fs.getattr(sub, ROOT)).st_mode == stat.S_IFDIR | 0o700
    assert run(fs.getxattr(sub, acl.DEFAULT, ROOT)) == default
    assert acl.parse(run(fs.getxattr(sub, acl.ACCESS, ROOT)))[-2][1] == 0
    link = run(fs.symlink(directory, b"link", b"x", USER))
    assert link.st_mode == stat.S_IFLNK | 0o777
    refused(errno.ENODATA, fs.getxattr(link.st_ino, acl.ACCESS, ROOT))


def test_a_default_list_is_for_directories_only() -> None:
    fs = Memfs()
    file = create(fs, 1, b"file")
    value = acl.pack([(1, 7, 0), (4, 7, 0), (32, 7, 0)])
    refused(errno.EACCES, fs.setxattr(file, acl.DEFAULT, value, ROOT))
    run(fs.setxattr(1, acl.DEFAULT, value, ROOT))
    run(fs.removexattr(1, acl.DEFAULT, ROOT))
    run(fs.removexattr(1, acl.DEFAULT, ROOT))
    refused(errno.ENODATA, fs.getxattr(1, acl.DEFAULT, ROOT))


def test_a_setgid_directory_hands_its_group_down() -> None:
    fs = Memfs()
    directory = mkdir(fs, 1, b"d", 0o2777, SimpleNamespace(uid=0, gid=77, umask=0, pid=1))
    file = run(fs.getattr(create(fs, directory, b"f", 0o666, USER), ROOT))
    sub = run(fs.getattr(mkdir(fs, directory, b"s", 0o777, USER), ROOT))
    link = run(fs.symlink(directory, b"l", b"x", USER))
    assert (file.st_gid, sub.st_gid, link.st_gid) == (77, 77, 77)
    assert sub.st_mode & stat.S_ISGID
    assert not file.st_mode & stat.S_ISGID
