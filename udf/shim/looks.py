"""Whether a driver that died had carried out a request which must take effect exactly once.

Owns: the look at what is there now, compared with what the tables knew before (no table changes until a reply comes,
so they are the state before). If the work was done, the lost reply is built again from the look; else the request is
sent again. The look itself changes nothing and binds no node. Called by: recovery.py, when a new generation serves.
"""

from __future__ import annotations

import errno
import stat
from struct import Struct
from typing import TYPE_CHECKING

from udf.fuse.opcodes import Opcode
from udf.fuse.structs import ENTRY_OUT, IN_HEADER, OPEN_IN, OPEN_OUT
from udf.shim.inflight import Ask, Pending, Steps
from udf.shim.link import LinkClosed
from udf.shim.resolve import forget_look, look, resolve
from udf.shim.tasks import STRIPPED, caller

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from udf.shim.service import Service

    Looking = Generator[Ask, tuple[int, bytes], bytes | None]

BODY = IN_HEADER.size
_U32 = Struct("=I")
_U64 = Struct("=Q")
_MODE_AT = ENTRY_OUT.offset("attr.mode")
_RDEV_AT = ENTRY_OUT.offset("attr.rdev")
_EXCHANGE = 2
_XATTR_MOST = 64 * 1024


def look_first(s: Service, unique: int, pending: Pending) -> Steps:
    """Find out whether a `ONCE` request was carried out: answer it then, else send it again."""
    body: bytes | None = yield from _LOOKS[pending.op](s, pending)
    if body is None:
        # What the look has cost is given back before a request that may take the last name away: a driver that counts
        # the lookups of its own process only would else drop a file that is still open (stable node ids).
        try:
            s.link.send_forgets(s.nodes.forgets)
        except LinkClosed:
            s.nodes.forgets.clear()  # what comes next finds the link closed too
        s.again(unique, pending.node_id, pending.request)
    elif s.tasks.pop(unique, None) is not None:
        s.counters.rebuilt += 1
        s.complete(unique, pending, body)


# ---- one look for each operation: the body of the lost reply, or None to send the request again


def _names(pending: Pending, start: int) -> list[bytes]:
    return pending.request[BODY + start :].split(b"\0")


def _parent(s: Service, pending: Pending) -> int:
    return s.nodes.slot(pending.node_id)


def _find(s: Service, parent: int, name: bytes) -> Generator[Ask, tuple[int, bytes], tuple[int, bytes]]:
    yield from resolve(s, parent)
    return (yield from look(s, parent, name))


def _made(s: Service, pending: Pending, name: bytes, wanted: int) -> Looking:
    """Of MKNOD, MKDIR, SYMLINK and CREATE: the entry, if there is one of the wanted type."""
    failed, entry = yield from _find(s, _parent(s, pending), name)
    if failed:
        return None
    if (_U32.unpack_from(entry, _MODE_AT)[0] ^ wanted) & 0o170000:
        forget_look(s, failed, entry)
        return None
    return entry


def _mknod(s: Service, pending: Pending) -> Looking:
    mode, rdev = _U32.unpack_from(pending.request, BODY)[0], _U32.unpack_from(pending.request, BODY + 4)[0]
    entry = yield from _made(s, pending, _names(pending, 16)[0], mode if mode & 0o170000 else mode | stat.S_IFREG)
    if entry and (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)) and _U32.unpack_from(entry, _RDEV_AT)[0] != rdev:
        forget_look(s, 0, entry)
        return None
    return entry


def _mkdir(s: Service, pending: Pending) -> Looking:
    return (yield from _made(s, pending, _names(pending, 8)[0], stat.S_IFDIR))


def _symlink(s: Service, pending: Pending) -> Looking:
    name, target = _names(pending, 0)[:2]
    entry = yield from _made(s, pending, name, stat.S_IFLNK)
    if entry is None:
        return None
    failed, there = yield Ask(Opcode.READLINK, _U64.unpack_from(entry)[0], b"")
    if failed or there != target:
        forget_look(s, 0, entry)
        return None
    return entry


def _create(s: Service, pending: Pending) -> Looking:
    entry = yield from _made(s, pending, _names(pending, 16)[0], stat.S_IFREG)
    if entry is None:
        return None
    flags = _U32.unpack_from(pending.request, BODY)[0] & ~STRIPPED
    failed, opened = yield Ask(Opcode.OPEN, _U64.unpack_from(entry)[0], OPEN_IN.pack(flags, 0), caller(pending.request))
    if failed == errno.ENOSYS:
        failed, opened = 0, bytes(OPEN_OUT.size)  # a driver without open: its handles mean nothing
    if failed or len(opened) != OPEN_OUT.size:
        forget_look(s, 0, entry)
        return None
    return entry + opened


def _removed(s: Service, pending: Pending) -> Looking:
    """UNLINK and RMDIR: done if the name is gone, or is another file's now."""
    parent, name = _parent(s, pending), _names(pending, 0)[0]
    victim = s.nodes.child(parent, name)
    failed, entry = yield from _find(s, parent, name)
    forget_look(s, failed, entry)
    if failed:
        return b"" if failed == errno.ENOENT else None
    return b"" if victim and not s.nodes.is_same(victim, entry, 0) else None


def _renamed(s: Service, pending: Pending) -> Looking:
    """RENAME: done if the old name is gone (or, exchanged, the other file's) and the new one is the file's."""
    nodes = s.nodes
    parent, new_parent = _parent(s, pending), nodes.slot(_U64.unpack_from(pending.request, BODY)[0])
    name, new_name = _names(pending, 8 if pending.op == Opcode.RENAME else 16)[:2]
    flags = 0 if pending.op == Opcode.RENAME else _U32.unpack_from(pending.request, BODY + 8)[0]
    source, target = nodes.child(parent, name), nodes.child(new_parent, new_name)
    failed, old = yield from _find(s, parent, name)
    forget_look(s, failed, old)
    if flags & _EXCHANGE:
        if failed or not target or not source or nodes.is_same(source, old, 0):
            return None
        return b"" if nodes.is_same(target, old, 0) else None
    if (failed and failed != errno.ENOENT) or not source or (not failed and nodes.is_same(source, old, 0)):
        return None
    failed, new = yield from _find(s, new_parent, new_name)
    forget_look(s, failed, new)
    return b"" if not failed and nodes.is_same(source, new, 0) else None


def _linked(s: Service, pending: Pending) -> Looking:
    target = s.nodes.slot(_U64.unpack_from(pending.request, BODY)[0])
    failed, entry = yield from _find(s, _parent(s, pending), _names(pending, 8)[0])
    if failed:
        return None
    if not target or not s.nodes.is_same(target, entry, 0):
        forget_look(s, 0, entry)
        return None
    return entry


def _xattr(
    s: Service, pending: Pending, name: bytes, most: int
) -> Generator[Ask, tuple[int, bytes], tuple[int, bytes]]:
    driver_id = yield from resolve(s, s.nodes.slot(pending.node_id))
    body = _U32.pack(most) + bytes(4) + name + b"\0"
    return (yield Ask(Opcode.GETXATTR, driver_id, body, caller(pending.request)))


def _xattr_set(s: Service, pending: Pending) -> Looking:
    """SETXATTR is only in doubt when it was to create the attribute, and that was not there before."""
    if pending.before is not False:
        return None
    size = _U32.unpack_from(pending.request, BODY)[0]
    name = _names(pending, 16)[0]
    start = BODY + 16 + len(name) + 1
    failed, value = yield from _xattr(s, pending, name, _XATTR_MOST)
    return b"" if not failed and value == pending.request[start : start + size] else None


def _xattr_removed(s: Service, pending: Pending) -> Looking:
    """REMOVEXATTR is in doubt when the attribute was there before."""
    if pending.before is not True:
        return None
    failed, _ = yield from _xattr(s, pending, _names(pending, 0)[0], 0)
    return b"" if failed == errno.ENODATA else None


_LOOKS: dict[int, Callable[[Service, Pending], Looking]] = {
    Opcode.SYMLINK: _symlink,
    Opcode.MKNOD: _mknod,
    Opcode.MKDIR: _mkdir,
    Opcode.UNLINK: _removed,
    Opcode.RMDIR: _removed,
    Opcode.RENAME: _renamed,
    Opcode.RENAME2: _renamed,
    Opcode.LINK: _linked,
    Opcode.SETXATTR: _xattr_set,
    Opcode.REMOVEXATTR: _xattr_removed,
    Opcode.CREATE: _create,
}
