"""Between an author's values and pyfuse3's, in both directions, with every value checked.

Owns: what an author may answer. A wrong answer is a ContractError that names the verb, never a broken reply.
Must never: call the driver. Called by: paths.py.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Mapping

import pyfuse3

from udf.driver.fs import Attr, Space
from udf.errors import ContractError

MAX_ENTRIES = 500_000  # of one directory; a listing that does not end must not eat the machine
MAX_NAME = 255  # bytes
MAX_XATTR = 64 * 1024  # the kernel's own limit, for one value and for the list of names

_TYPES = {"file": stat.S_IFREG, "dir": stat.S_IFDIR, "symlink": stat.S_IFLNK}
_MODES = {"file": 0o644, "dir": 0o755, "symlink": 0o777}
_BLOCK = 512
_MAX_SIZE = (1 << 63) - 1


class Converter:
    """What is the same for all files of one driver: its name in messages, defaults, time-outs."""

    def __init__(self, driver: str, valid: float) -> None:
        self._driver = driver
        self._valid = valid
        self._started = time.time_ns()
        self._uid = os.getuid()
        self._gid = os.getgid()

    def wrong(self, verb: str, what: str) -> ContractError:
        """The error for a wrong answer of a verb."""
        return ContractError(f"{self._driver}.{verb}() answered {what}", driver=self._driver, operation=verb)

    def attr(self, verb: str, attr: object) -> Attr:
        """Check that a verb answered an Attr with usable fields."""
        if not isinstance(attr, Attr):
            raise self.wrong(verb, f"{_kind_of(attr)} instead of an Attr")
        if not isinstance(attr.kind, str) or attr.kind not in _TYPES:
            raise self.wrong(verb, f"an Attr of the kind {attr.kind!r}: it is file, dir or symlink")
        if attr.size is None and attr.kind != "file":
            raise self.wrong(verb, f"an Attr of the kind {attr.kind} without a size")
        if attr.size is not None and (not isinstance(attr.size, int) or not 0 <= attr.size <= _MAX_SIZE):
            raise self.wrong(verb, f"an Attr of the size {attr.size!r}")
        if not (attr.ino is None or (isinstance(attr.ino, int) and 0 <= attr.ino < 1 << 64)):
            raise self.wrong(verb, f"an Attr with the ino {attr.ino!r}")
        return attr

    def entry(self, verb: str, attr: Attr, node_id: int) -> pyfuse3.EntryAttributes:
        """A checked Attr as the kernel is told it."""
        entry = pyfuse3.EntryAttributes()
        mtime = self._started if attr.mtime_ns is None else attr.mtime_ns
        mode = _MODES[attr.kind] if attr.mode is None else attr.mode
        links = attr.nlink
        if links is None:
            links = 2 if attr.kind == "dir" else 1
        try:
            entry.st_ino = pyfuse3.InodeT(node_id)
            entry.st_mode = pyfuse3.ModeT(_TYPES[attr.kind] | (mode & 0o7777))
            entry.st_nlink = links
            entry.st_uid = self._uid if attr.uid is None else attr.uid
            entry.st_gid = self._gid if attr.gid is None else attr.gid
            entry.st_size = attr.size or 0
            entry.st_blocks = ((attr.size or 0) + _BLOCK - 1) // _BLOCK
            entry.st_mtime_ns = mtime
            entry.st_atime_ns = mtime if attr.atime_ns is None else attr.atime_ns
            entry.st_ctime_ns = mtime if attr.ctime_ns is None else attr.ctime_ns
        except (TypeError, ValueError, OverflowError) as exc:
            raise self.wrong(verb, f"an Attr with an unusable field: {exc}") from exc
        entry.attr_timeout = self._valid
        entry.entry_timeout = self._valid
        return entry

    def absent(self) -> pyfuse3.EntryAttributes:
        """That there is nothing at a name, so that the kernel need not ask again for a while."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(0)
        entry.entry_timeout = self._valid
        return entry

    def listing(self, names: object) -> list[tuple[str, Attr | None]]:
        """A directory's snapshot."""
        if isinstance(names, str | bytes) or not isinstance(names, Iterable):
            raise self.wrong("list", f"{_kind_of(names)} instead of names")
        attrs = names if isinstance(names, Mapping) else None
        snapshot: list[tuple[str, Attr | None]] = []
        seen = set()
        for name in names:
            if len(snapshot) >= MAX_ENTRIES:
                raise self.wrong("list", f"more than {MAX_ENTRIES} names")
            self.name(name)
            if name not in seen:
                seen.add(name)
                snapshot.append((name, None if attrs is None else self.attr("list", attrs[name])))
        return snapshot

    def name(self, name: object) -> None:
        """Check one name of a listing."""
        if not isinstance(name, str):
            raise self.wrong("list", f"a name that is {_kind_of(name)}")
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise self.wrong("list", f"the name {name[:80]!r}, which no file can have")
        try:
            if len(os.fsencode(name)) > MAX_NAME:
                raise self.wrong("list", f"a name of more than {MAX_NAME} bytes: {name[:40]!r}…")
        except UnicodeEncodeError:
            raise self.wrong("list", f"the name {name[:80]!r}, which cannot be encoded") from None

    def content(self, data: object, size: int) -> bytes:
        """What `read` answered."""
        if type(data) is not bytes:
            if not isinstance(data, bytes | bytearray | memoryview):
                raise self.wrong("read", f"{_kind_of(data)} instead of bytes")
            data = bytes(data)
        if len(data) > size:
            raise self.wrong("read", f"{len(data)} bytes when {size} were asked for")
        return data

    def written(self, count: object, size: int) -> int:
        """What `write` answered."""
        if count is None:
            return size
        if type(count) is not int or not 0 <= count <= size:
            raise self.wrong("write", f"{count!r} for {size} bytes")
        return count

    def target(self, text: object) -> bytes:
        """What `readlink` answered."""
        if not isinstance(text, str) or not text or "\0" in text or len(text) > 4095:
            raise self.wrong("readlink", f"{_kind_of(text)} that is no target of a link")
        return os.fsencode(text)

    def value(self, data: object) -> bytes:
        """What `getxattr` answered."""
        if not isinstance(data, bytes) or len(data) > MAX_XATTR:
            raise self.wrong("getxattr", f"{_kind_of(data)} that is no value of at most {MAX_XATTR} bytes")
        return data

    def xattrs(self, names: object) -> list[bytes]:
        """What `listxattr` answered."""
        if isinstance(names, str | bytes) or not isinstance(names, Iterable):
            raise self.wrong("listxattr", f"{_kind_of(names)} instead of names")
        encoded: list[bytes] = []
        room = MAX_XATTR
        for name in names:
            if not isinstance(name, str) or not name or "\0" in name:
                raise self.wrong("listxattr", f"the name {name!r}")
            encoded.append(os.fsencode(name))
            room -= len(encoded[-1]) + 1
            if room < 0:
                raise self.wrong("listxattr", f"more than {MAX_XATTR} bytes of names")
        return encoded

    def space(self, space: object) -> pyfuse3.StatvfsData:
        """What `statfs` answered."""
        if not isinstance(space, Space):
            raise self.wrong("statfs", f"{_kind_of(space)} instead of a Space")
        data = pyfuse3.StatvfsData()
        try:
            data.f_bsize = data.f_frsize = space.block
            data.f_blocks = space.total // space.block
            data.f_bfree = data.f_bavail = space.free // space.block
            data.f_files = space.files
            data.f_ffree = data.f_favail = space.files_free
            data.f_namemax = space.name_max
        except (TypeError, ValueError, OverflowError, ZeroDivisionError) as exc:
            raise self.wrong("statfs", f"a Space with an unusable field: {exc}") from exc
        return data


def _kind_of(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
