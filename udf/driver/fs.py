"""FsDriver: a filesystem by paths.

Owns: the verbs that an author implements and the small values they exchange with UDF. Must never: know inodes, lookup
counts, file handles, errno or FUSE; nothing here depends on the runtime that calls it.
Called by: an adapter (paths.py for pyfuse3), one verb at a time per file name, many at once in all.

Paths are absolute inside the filesystem: "/" is its root, "/a/b" a file in a directory, never with "." or "..", never
with "/" at the end. Names that are not UTF-8 arrive and leave with surrogate escapes, as os.fsdecode makes them.
A path stays valid while a verb works on it: a rename or removal of it waits.

Errors are built-in exceptions: FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError …, or an OSError
with an errno of its own. Anything else is taken for a mistake in the driver: the program sees EIO, the log has the
traceback.
"""

from __future__ import annotations

import os
import stat as _stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["file", "dir", "symlink"]
WHOLE = 1024 * 1024  # bytes that a file of unknown size may have


@dataclass(frozen=True, slots=True)
class Attr:
    """What stat(2) tells. Only `kind`, and for files `size`, must be said.

    `size=None`: it is not known before the file is read, as with a value that is asked of a device. stat(2) shows 0
    and programs read to the end all the same: at the first read after each open `read` is asked for all of it at once
    (from 0, at most WHOLE bytes), and that is what this open file holds until it is closed.
    """

    kind: Kind = "file"
    size: int | None = 0
    mode: int | None = None  # permission bits; None: 0o755 for directories, 0o777 for links, 0o644 for files
    mtime_ns: int | None = None  # nanoseconds since 1970; None: when the driver was started
    atime_ns: int | None = None  # None: as mtime_ns
    ctime_ns: int | None = None  # None: as mtime_ns
    nlink: int | None = None  # None: 1, for directories 2
    uid: int | None = None  # None: the user that the driver runs as
    gid: int | None = None
    ino: int | None = None  # the file's identity where it has one (then names with the same one are one file)

    @classmethod
    def of(cls, status: os.stat_result) -> Attr:
        """From os.stat() of a real file."""
        kinds: dict[int, Kind] = {_stat.S_IFDIR: "dir", _stat.S_IFLNK: "symlink", _stat.S_IFREG: "file"}
        kind = kinds.get(_stat.S_IFMT(status.st_mode))
        if kind is None:
            raise NotImplementedError("only files, directories and symbolic links")
        return cls(
            kind=kind,
            size=status.st_size,
            mode=_stat.S_IMODE(status.st_mode),
            mtime_ns=status.st_mtime_ns,
            atime_ns=status.st_atime_ns,
            ctime_ns=status.st_ctime_ns,
            nlink=status.st_nlink,
            uid=status.st_uid,
            gid=status.st_gid,
            ino=status.st_ino,
        )


@dataclass(frozen=True, slots=True)
class Space:
    """What statfs tells, in bytes and numbers of files."""

    total: int = 0
    free: int = 0
    files: int = 0
    files_free: int = 0
    block: int = 4096
    name_max: int = 255


class FsDriver:
    """A filesystem. Implement `list`, `stat` and `read`; each further verb adds what its name says.

    Without any verb that changes something the filesystem is read-only (EROFS). A verb that is not implemented
    fails the way programs expect of filesystems that lack the feature.
    """

    valid: float = 1.0  # seconds for which the kernel may believe names and attributes without asking again

    async def list(self, path: str) -> Iterable[str] | Mapping[str, Attr]:
        """The names in a directory (without "." and ".."), or better a mapping of names to attributes."""
        raise NotImplementedError("list")

    async def stat(self, path: str) -> Attr:
        """The attributes of what is there (of a symbolic link itself); FileNotFoundError if nothing is."""
        raise NotImplementedError("stat")

    async def read(self, path: str, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`; fewer only at the end of the file, none behind it."""
        raise NotImplementedError("read")

    # ---- all below is optional

    async def write(self, path: str, offset: int, data: bytes) -> int | None:
        """Write all of `data` at `offset`, behind the end too; or say how many bytes of it were written."""
        raise NotImplementedError("write")

    async def create(self, path: str, mode: int) -> None:
        """Make an empty file with these permission bits; FileExistsError if the name is taken."""
        raise NotImplementedError("create")

    async def mkdir(self, path: str, mode: int) -> None:
        """Make an empty directory; FileExistsError if the name is taken."""
        raise NotImplementedError("mkdir")

    async def remove(self, path: str) -> None:
        """Remove a file, a symbolic link or an empty directory (that it is empty has been checked)."""
        raise NotImplementedError("remove")

    async def rename(self, old: str, new: str) -> None:
        """Give a file or a whole directory another path, in one step replacing what has that path already."""
        raise NotImplementedError("rename")

    async def truncate(self, path: str, size: int) -> None:
        """Cut a file to `size` bytes, or lengthen it with zeros."""
        raise NotImplementedError("truncate")

    async def symlink(self, path: str, target: str) -> None:
        """Make a symbolic link at `path` that says `target`."""
        raise NotImplementedError("symlink")

    async def readlink(self, path: str) -> str:
        """What a symbolic link says."""
        raise NotImplementedError("readlink")

    async def link(self, old: str, new: str) -> None:
        """Give a file a second name."""
        raise NotImplementedError("link")

    async def setattr(
        self,
        path: str,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
    ) -> None:
        """Change those of the attributes that are not None."""
        raise NotImplementedError("setattr")

    async def statfs(self) -> Space:
        """How large the filesystem is, and how full."""
        raise NotImplementedError("statfs")

    async def fsync(self, path: str) -> None:
        """Return when everything written to the file would survive a power cut."""
        raise NotImplementedError("fsync")

    async def getxattr(self, path: str, name: str) -> bytes:
        """An extended attribute; KeyError if there is none of that name."""
        raise NotImplementedError("getxattr")

    async def setxattr(self, path: str, name: str, value: bytes) -> None:
        """Set an extended attribute."""
        raise NotImplementedError("setxattr")

    async def listxattr(self, path: str) -> Iterable[str]:
        """The names of the extended attributes."""
        raise NotImplementedError("listxattr")

    async def removexattr(self, path: str, name: str) -> None:
        """Remove an extended attribute; KeyError if there is none of that name."""
        raise NotImplementedError("removexattr")


REQUIRED_VERBS = ("list", "stat", "read")
MUTATIONS = (
    "write", "create", "mkdir", "remove", "rename", "truncate", "symlink", "link", "setattr", "setxattr", "removexattr",
)  # fmt: skip
OPTIONAL_VERBS = (*MUTATIONS, "readlink", "statfs", "fsync", "getxattr", "listxattr")


def verbs_of(driver: FsDriver) -> frozenset[str]:
    """The verbs that an author's class implements."""
    cls = type(driver)
    return frozenset(
        verb for verb in (*REQUIRED_VERBS, *OPTIONAL_VERBS) if getattr(cls, verb, None) is not getattr(FsDriver, verb)
    )
