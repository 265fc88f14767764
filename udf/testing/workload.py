"""What is done on a mount while its driver dies: sections, each a short list of operations in a directory of its own.

Owns: `Section`, and `STANDARD`, which makes the kernel send every FUSE request that changes or reads a file.
Must never: do any of it (operations.py has the operations), or depend on time, chance or what another section has left.
Called by: matrix.py; authors make sections of their own.
"""

from __future__ import annotations

import os
import select
import stat
from collections.abc import Sequence
from dataclasses import dataclass

Operation = tuple[str, tuple[object, ...]]

_APPEND, _EXCLUSIVE, _TRUNCATE = os.O_APPEND, os.O_EXCL, os.O_TRUNC
_READ, _WRITE, _BOTH, _DIRECT, _DIRECTORY = os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_DIRECT, os.O_DIRECTORY
_NOREPLACE, _EXCHANGE = 1, 2  # RENAME_
_CREATE, _REPLACE = 1, 2  # XATTR_
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # FALLOC_FL_
_SEEK_DATA, _SEEK_HOLE = 3, 4
_LONG = bytes(range(251)) * 1200  # 301,200 bytes: several WRITEs and READs, and no page looks like another
_MOMENT = 1_600_000_000_123_456_789  # ns


@dataclass(frozen=True)
class Section:
    """Operations that are done one after the other, each given by its name in operations.py and its arguments."""

    name: str
    operations: tuple[Operation, ...]
    portable: bool = True  # an ordinary directory gives the same results


def section(name: str, *operations: Sequence[object], portable: bool = True) -> Section:
    """Write a section down: `section("rename", ("put", "a", b"1"), ("rename", "a", "b"))`."""
    return Section(name, tuple((str(call), tuple(args)) for call, *args in operations), portable)


STANDARD: tuple[Section, ...] = (
    section(
        "create",
        ("create", "a", 0, 0o640, "a"),
        ("append", "a", b"first"),
        ("fstat", "a"),
        ("create", "a", _EXCLUSIVE),  # EEXIST
        ("create", "b", _EXCLUSIVE, 0o444, "b"),  # nobody but who made it may write
        ("append", "b", b"second"),
        ("create", "none/c"),  # ENOENT
        ("create", "a/c"),  # ENOTDIR
        ("close", "a"),
        ("close", "b"),
        ("create", "a", _TRUNCATE),
        ("stat", "a"),
    ),
    section(
        "directories",
        ("mkdir", "d", 0o750),
        ("mkdir", "d"),  # EEXIST
        ("mkdir", "d/e"),
        ("mkdir", "none/e"),  # ENOENT
        ("open", "d", _READ | _DIRECTORY, "d"),
        ("names_of", "d"),
        ("create", "d/f"),
        ("names_of", "d"),
        ("fsync", "d"),
        ("rmdir", "d"),  # ENOTEMPTY
        ("unlink", "d/f"),
        ("rmdir", "d/e"),
        ("rmdir", "d"),
        ("names_of", "d"),
        ("close", "d"),
        ("rmdir", "d"),  # ENOENT
    ),
    section(
        "listings",
        ("mkdir", "d"),
        ("put", "d/a", b"1"),
        ("put", "d/b", b"22"),
        ("symlink", "a", "d/c"),
        ("mkdir", "d/e"),
        ("names", "d"),
        ("listing", "d"),
        ("unlink", "d/a"),
        ("listing", "d"),
        ("names", "d/a"),  # ENOENT
    ),
    section(
        "links",
        ("symlink", "no/where", "s"),
        ("readlink", "s"),
        ("symlink", "other", "s"),  # EEXIST
        ("get", "s"),  # ENOENT
        ("put", "a", b"one"),
        ("link", "a", "b"),
        ("stat", "b"),
        ("link", "a", "b"),  # EEXIST
        ("put", "b", b"two"),
        ("get", "a"),
        ("unlink", "a"),
        ("stat", "b"),
        ("link", "none", "c"),  # ENOENT
        ("chown", "s", 7, 8),
        ("utimens", "s", 1, 2),
        ("times", "s"),
    ),
    section(
        "nodes",
        ("mknod", "file", stat.S_IFREG | 0o604),
        ("mknod", "fifo", stat.S_IFIFO | 0o600),
        ("mknod", "socket", stat.S_IFSOCK | 0o600),
        ("mknod", "device", stat.S_IFCHR | 0o600, os.makedev(1, 3)),
        ("mknod", "file", stat.S_IFREG | 0o600),  # EEXIST
        ("stat", "file"),
        ("stat", "fifo"),
        ("stat", "device"),
    ),
    section(
        "unlink",
        ("put", "a", b"open until the end"),
        ("open", "a", _BOTH, "a"),
        ("unlink", "a"),
        ("names", ""),
        ("fstat", "a"),
        ("read_direct", "a", 4096, 0),
        ("write", "a", b"OPEN", 0),
        ("fchmod", "a", 0o600),
        ("ftruncate", "a", 8),
        ("put", "a", b"another"),
        ("read", "a", 100, 0),
        ("get", "a"),
        ("fstat", "a"),
        ("close", "a"),
        ("unlink", "a"),
        ("unlink", "a"),  # ENOENT
        ("mkdir", "d"),
        ("unlink", "d"),  # EISDIR
    ),
    section(
        "rename",
        ("put", "a", b"a"),
        ("put", "b", b"b"),
        ("open", "b", _BOTH, "b"),
        ("rename", "a", "b"),  # over an open file
        ("get", "b"),
        ("read", "b", 10, 0),
        ("write", "b", b"gone", 0),
        ("fstat", "b"),
        ("rename", "a", "c"),  # ENOENT
        ("mkdir", "d"),
        ("open", "b", _BOTH, "moved"),
        ("rename", "b", "d/b"),
        ("write", "moved", b"moved", 0),
        ("rename", "d", "e"),
        ("get", "e/b"),
        ("fstat", "moved"),
        ("rename", "e", "e/f"),  # EINVAL
        ("mkdir", "g"),
        ("rename", "g", "e"),  # ENOTEMPTY
        ("link", "e/b", "same"),
        ("rename", "same", "e/b"),  # nothing: both are one file
        ("stat", "same"),
        ("close", "b"),
        ("close", "moved"),
    ),
    section(
        "rename2",
        ("put", "a", b"a"),
        ("put", "b", b"b"),
        ("rename2", "a", "b", _NOREPLACE),  # EEXIST
        ("rename2", "a", "c", _NOREPLACE),
        ("rename2", "b", "c", _EXCHANGE),
        ("get", "b"),
        ("get", "c"),
        ("mkdir", "d"),
        ("rename2", "b", "d", _EXCHANGE),
        ("stat", "b"),
        ("stat", "d"),
        ("rename2", "b", "none", _EXCHANGE),  # ENOENT
    ),
    section(
        "data",
        ("create", "a", 0, 0o644, "a"),
        ("write", "a", _LONG, 0),
        ("write", "a", b"middle", 150_000),
        ("write", "a", b"far", 1_000_000),
        ("read", "a", 4096, 149_990),
        ("read", "a", 100, 600_000),
        ("fsync", "a"),
        ("close", "a"),
        ("open", "a", _BOTH | _DIRECT, "direct"),
        ("read_direct", "direct", 131_072, 135_168),
        ("write_direct", "direct", _LONG[:8192], 4096),
        ("write_direct", "direct", _LONG[:266_240], 300 * 4096),
        ("read_direct", "direct", 8192, 4096),
        ("close", "direct"),
        ("stat", "a"),
    ),
    section(
        "append",
        ("put", "log", b"one\n"),
        ("open", "log", _WRITE | _APPEND, "log"),
        ("append", "log", b"two\n"),
        ("append", "log", b"three\n"),
        ("open", "log", _WRITE | _APPEND, "other"),
        ("append", "other", b"four\n"),
        ("append", "log", b"five\n"),
        ("put", "log", b"six\n", _APPEND),
        ("close", "log"),
        ("close", "other"),
        ("get", "log"),
    ),
    section(
        "sizes",
        ("put", "a", b"0123456789" * 1000),
        ("truncate", "a", 15),
        ("stat", "a"),
        ("truncate", "a", 9000),
        ("get", "a"),
        ("open", "a", _BOTH, "a"),
        ("ftruncate", "a", 4),
        ("write", "a", b"tail", 5000),
        ("read", "a", 10_000, 0),
        ("put", "a", b"new", _TRUNCATE),
        ("fstat", "a"),
        ("close", "a"),
        ("truncate", "none", 1),  # ENOENT
    ),
    section(
        "attributes",
        ("put", "a", b"a"),
        ("mkdir", "d"),
        ("chmod", "a", 0o4750),
        ("stat", "a"),
        ("chown", "a", 1001, 1002),  # takes the set-uid bit away
        ("stat", "a"),
        ("chmod", "d", 0o1777),
        ("chown", "d", 5, 6),
        ("utimens", "a", _MOMENT, _MOMENT + 10**9),
        ("times", "a"),
        ("open", "a", _BOTH, "a"),
        ("fchmod", "a", 0o604),
        ("fchown", "a", 3, 4),
        ("futimens", "a", 5, 6),
        ("times", "a"),
        ("fstat", "a"),
        ("access", "a", os.R_OK),
        ("chmod", "none", 0o600),  # ENOENT
        ("close", "a"),
        ("statfs", ""),
    ),
    section(
        "xattrs",
        ("put", "a", b""),
        ("setxattr", "a", "user.one", b"1"),
        ("setxattr", "a", "user.one", b"2", _CREATE),  # EEXIST
        ("setxattr", "a", "user.two", b"2", _REPLACE),  # ENODATA
        ("setxattr", "a", "user.two", b"2", _CREATE),
        ("setxattr", "a", "user.one", b"uno" * 300, _REPLACE),
        ("getxattr", "a", "user.one"),
        ("getxattr", "a", "user.none"),  # ENODATA
        ("listxattr", "a"),
        ("removexattr", "a", "user.two"),
        ("removexattr", "a", "user.two"),  # ENODATA
        ("mkdir", "d"),
        ("setxattr", "d", "user.dir", b""),
        ("listxattr", "d"),
    ),
    section(
        "rare",
        ("open", "", _BOTH | os.O_TMPFILE, "nameless"),
        ("create", "p", 0, 0o644, "p"),
        ("poll", "p", select.POLLIN | select.POLLOUT),
        ("has_birth_time", "p"),
        ("append", "p", b"1"),
        ("close", "p"),
        portable=False,  # a file without a name, and a birth time, are not everybody's
    ),
    section(
        "space",
        ("create", "a", 0, 0o644, "a"),
        ("allocate", "a", 0, 0, 20_000),
        ("fstat", "a"),
        ("write", "a", b"data", 100_000),
        ("allocate", "a", _KEEP_SIZE, 200_000, 5000),
        ("allocate", "a", _KEEP_SIZE | _PUNCH_HOLE, 100_000, 2),
        ("seek", "a", 100_000, _SEEK_DATA),
        ("seek", "a", 100_000, _SEEK_HOLE),
        ("create", "b", 0, 0o644, "b"),
        ("copy_range", "a", "b", 4, 100_000, 0),
        ("append", "b", b"xyz"),
        ("close", "a"),
        ("close", "b"),
        ("get", "b"),
        portable=False,  # which of these a filesystem has, and where its holes are, is its own
    ),
)
