"""What each of a driver's answers must look like, and what it changes in the tables.

One function for each opcode, in the table `CHECKS`: it is given the pending request and the reply's length (the reply
is in the link's buffer), puts the shim's ids into it and raises BadReply or BadEntry for what cannot be right. An
opcode without a function has an empty answer. The kernel refuses some replies and leaves the program waiting, so
nothing unchecked goes there.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from struct import Struct
from time import monotonic

from udf.fuse.opcodes import Opcode
from udf.fuse.structs import (
    ATTR_OUT,
    BMAP_OUT,
    COPY_FILE_RANGE_OUT,
    ENTRY_OUT,
    IN_HEADER,
    IOCTL_OUT,
    LK_OUT,
    LSEEK_OUT,
    OPEN_OUT,
    OUT_HEADER,
    POLL_OUT,
    STATFS_OUT,
    STATX_OUT,
    WRITE_OUT,
)
from udf.shim.columns import SlotsExhausted
from udf.shim.graph import OPEN_FLAGS_SHIFT, OPENED_DIR, ROOT
from udf.shim.handles import Handle
from udf.shim.inflight import Pending
from udf.shim.nodes import FOREVER, Admitted, BadEntry, is_fleeting
from udf.shim.open_files import FOPEN_ALLOWED, NEEDED, open_reply
from udf.shim.request_names import NAME_AT
from udf.shim.requests import negative
from udf.shim.service import Service

OUT = OUT_HEADER.size
BODY = IN_HEADER.size
_U32 = Struct("=I")
_U64 = Struct("=Q")
_ATTR_HEAD = Struct("=QI4x")
_ENTRY_MODE_AT = ENTRY_OUT.offset("attr.mode")
_STATX_INO_AT = STATX_OUT.offset("stat.ino")
_STATX_MODE_AT = STATX_OUT.offset("stat.mode")
_IOCTL_LIMIT = 64 * 1024
_LINK_TARGET_LIMIT = 4095


class BadReply(Exception):
    """A reply that cannot be right; the program gets EIO, the sentence goes to the log."""


Check = Callable[[Service, Pending, int], int]


def name_in(pending: Pending) -> bytes:
    """Return the (first) name in a request's body."""
    start = BODY + NAME_AT[pending.op]
    request = pending.request
    return request[start : request.index(0, start)]


_NEGATIVES = 4096


def remember_negative(s: Service, node_id: int, name: bytes, until: float) -> None:
    """Note that there is no *name* in a directory; the oldest of too many goes."""
    negatives = s.nodes.negatives
    negatives[node_id, name] = until
    if len(negatives) > _NEGATIVES:
        del negatives[next(iter(negatives))]


# ---- one function for each answer with a body


def _expect(size: int, body: int) -> None:
    if size != OUT + body:
        raise BadReply(f"an answer of {size - OUT} bytes instead of {body}")


def _enter(s: Service, pending: Pending, name: bytes) -> int:
    """Take the entry in a reply; the kernel counts one lookup of it."""
    buffer = s.link.buffer
    if not _U64.unpack_from(buffer, OUT)[0]:
        raise BadReply("an entry without a node")
    admitted = _admit(s, pending.slot, name)
    s.nodes.settle(pending.slot, name, admitted, buffer, OUT)
    return admitted[0]


def _lookup(s: Service, pending: Pending, size: int) -> int:
    _expect(size, ENTRY_OUT.size)
    buffer = s.link.buffer
    name = name_in(pending)
    if not _U64.unpack_from(buffer, OUT)[0]:
        valid = min(_U64.unpack_from(buffer, OUT + 16)[0], FOREVER)
        if s.exclusive and not is_fleeting(valid, _U32.unpack_from(buffer, OUT + 32)[0]):
            valid = FOREVER
        if valid:
            remember_negative(s, pending.node_id, name, monotonic() + valid)
        gone = s.nodes.unlink(pending.slot, name)
        if gone:
            s.nodes.release(gone)
        buffer[OUT : OUT + ENTRY_OUT.size] = negative(valid)
        return size
    s.unsettled = pending.slot, name, _admit(s, pending.slot, name)
    return size


def settle_entry(s: Service) -> None:
    """Bring the tables up to date with an entry that the kernel knows already."""
    if s.unsettled is None:
        return
    parent, name, admitted = s.unsettled
    s.unsettled = None
    try:
        s.nodes.settle(parent, name, admitted, s.link.buffer, OUT)
    except SlotsExhausted:
        pass  # the node is there; only its name is not remembered


def _admit(s: Service, parent: int, name: bytes) -> Admitted:
    """Take the entry in a reply as far as the kernel's answer needs it; the kernel counts one lookup of it."""
    try:
        admitted = s.nodes.admit(parent, name, s.link.buffer, OUT, monotonic(), s.exclusive)
    except BadEntry:
        driver_id = _U64.unpack_from(s.link.buffer, OUT)[0]
        if driver_id != ROOT:
            s.nodes.forgets.append((driver_id, 1))
        raise
    s.nodes.lookups[admitted[0]] += 1
    return admitted


def _wanted_type(s: Service, wanted: int) -> None:
    """Refuse an entry of another type than was to be made: the kernel would, and forget nothing of it."""
    buffer = s.link.buffer
    if (_U32.unpack_from(buffer, OUT + _ENTRY_MODE_AT)[0] ^ wanted) & 0o170000:
        node = _U64.unpack_from(buffer, OUT)[0]
        if node > ROOT:
            s.nodes.forgets.append((node, 1))
        raise BadReply("something of another type than was to be made")


def _made(s: Service, pending: Pending, size: int) -> int:
    """SYMLINK, MKNOD, MKDIR: a new entry in a changed directory."""
    _expect(size, ENTRY_OUT.size)
    s.nodes.touch(pending.slot)
    if pending.op == Opcode.MKNOD:
        wanted = _U32.unpack_from(pending.request, BODY)[0]
        _wanted_type(s, wanted if wanted & 0o170000 else stat.S_IFREG)
    else:
        _wanted_type(s, stat.S_IFDIR if pending.op == Opcode.MKDIR else stat.S_IFLNK)
    _enter(s, pending, name_in(pending))
    return size


def _linked(s: Service, pending: Pending, size: int) -> int:
    _expect(size, ENTRY_OUT.size)
    s.nodes.touch(pending.slot)
    target = s.nodes.slot(_U64.unpack_from(pending.request, BODY)[0])
    s.nodes.touch(target)
    if target:
        _wanted_type(s, s.nodes.mode(target))
    _enter(s, pending, name_in(pending))
    return size


def _created(s: Service, pending: Pending, size: int) -> int:
    """CREATE and TMPFILE: an entry and a handle."""
    _expect(size, ENTRY_OUT.size + OPEN_OUT.size)
    buffer = s.link.buffer
    s.nodes.touch(pending.slot)
    _wanted_type(s, stat.S_IFREG)
    name = name_in(pending)
    driver_handle, fopen, _ = OPEN_OUT.unpack_from(buffer, OUT + ENTRY_OUT.size)
    slot = _enter(s, pending, name)
    flags = _U32.unpack_from(pending.request, BODY)[0]
    handle = add_handle(s, pending, slot, flags, driver_handle, False, fopen)
    handle.written = True  # it is new, even if nothing is ever written
    if pending.op == Opcode.TMPFILE:  # open, so that a LINK of it finds the same node
        s.nodes.unlink(pending.slot, name)  # its name was only the request's
    buffer[OUT + ENTRY_OUT.size : size] = open_reply(s, handle, fopen & FOPEN_ALLOWED)
    return size


def add_handle(
    s: Service, pending: Pending, slot: int, flags: int, driver_handle: int, is_dir: bool, fopen: int = 0
) -> Handle:
    """Make a handle that the driver has opened, and note what it accepted, for later opens."""
    nodes = s.nodes
    handle = pending.handle = s.handles.add(slot, flags, is_dir, driver_handle)
    nodes.opens[slot] += 1
    known = OPENED_DIR if is_dir else NEEDED.get(flags & 3, 0)
    fopen &= FOPEN_ALLOWED
    nodes.flags[slot] = (nodes.flags[slot] & ((1 << OPEN_FLAGS_SHIFT) - 1)) | known | (fopen << OPEN_FLAGS_SHIFT)
    return handle


def _opened(s: Service, pending: Pending, size: int) -> int:
    _expect(size, OPEN_OUT.size)
    buffer = s.link.buffer
    driver_handle, fopen, _ = OPEN_OUT.unpack_from(buffer, OUT)
    flags = _U32.unpack_from(pending.request, BODY)[0]
    handle = add_handle(s, pending, pending.slot, flags, driver_handle, pending.op == Opcode.OPENDIR, fopen)
    buffer[OUT:size] = open_reply(s, handle, fopen & FOPEN_ALLOWED)
    return size


def _attributes(s: Service, pending: Pending, size: int) -> int:
    """GETATTR and SETATTR."""
    _expect(size, ATTR_OUT.size)
    buffer = s.link.buffer
    nodes = s.nodes
    slot = pending.slot
    valid, nanoseconds = _ATTR_HEAD.unpack_from(buffer, OUT)
    nodes.check_attr(slot, buffer, OUT + 16)
    if nanoseconds > 999_999_999:
        raise BadReply("an impossible attribute time-out")
    if s.exclusive:
        valid, nanoseconds = FOREVER, 0
    valid = min(valid, FOREVER)
    if pending.op == Opcode.SETATTR:
        nodes.touch(slot)
        s.remembered.forget(pending.node_id)
        current = True
    else:
        current = nodes.version[slot] == pending.version
    until = monotonic() + valid + nanoseconds * 1e-9 if current else 0.0
    nodes.keep_attr(slot, buffer, OUT + 16, until)
    _ATTR_HEAD.pack_into(buffer, OUT, valid, nanoseconds)
    return size


def _statx(s: Service, pending: Pending, size: int) -> int:
    _expect(size, STATX_OUT.size)
    buffer = s.link.buffer
    s.nodes.check_mode(pending.slot, int.from_bytes(buffer[OUT + _STATX_MODE_AT : OUT + _STATX_MODE_AT + 2], "little"))
    ino = s.nodes.inode_number(pending.slot)
    if ino:
        _U64.pack_into(buffer, OUT + _STATX_INO_AT, ino)
    return size


def _removed(s: Service, pending: Pending, size: int) -> int:
    _expect(size, 0)
    s.nodes.touch(pending.slot)
    gone = s.nodes.unlink(pending.slot, name_in(pending))
    if gone:
        s.nodes.release(gone)
    return size


def _renamed(s: Service, pending: Pending, size: int) -> int:
    _expect(size, 0)
    request = pending.request
    start = BODY + NAME_AT[pending.op]
    name, new_name = request[start:].split(b"\0")[:2]
    flags = _U32.unpack_from(request, BODY + 8)[0] if pending.op == Opcode.RENAME2 else 0
    new_parent = s.nodes.slot(_U64.unpack_from(request, BODY)[0])
    s.nodes.touch(pending.slot)
    s.nodes.touch(new_parent)
    if flags & 2:
        s.nodes.exchange(pending.slot, name, new_parent, new_name)
    else:
        s.nodes.move(pending.slot, name, new_parent, new_name)
    s.nodes.negatives.pop((s.nodes.node_id(new_parent), new_name), None)
    return size


def _read(s: Service, pending: Pending, size: int) -> int:
    if size - OUT > _U32.unpack_from(pending.request, BODY + 16)[0]:
        raise BadReply(f"{size - OUT} bytes for a read of {_U32.unpack_from(pending.request, BODY + 16)[0]}")
    return size


def _written(s: Service, pending: Pending, size: int) -> int:
    _expect(size, WRITE_OUT.size)
    if _U32.unpack_from(s.link.buffer, OUT)[0] > _U32.unpack_from(pending.request, BODY + 16)[0]:
        raise BadReply("more bytes written than were asked for")
    s.nodes.touch(pending.slot)
    return size


def _copied(s: Service, pending: Pending, size: int) -> int:
    target = pending.handle
    if isinstance(target, Handle):
        s.nodes.touch(target.slot)
    asked = _U64.unpack_from(pending.request, BODY + 40)[0]
    if pending.op == Opcode.COPY_FILE_RANGE:
        _expect(size, WRITE_OUT.size)
        copied = _U32.unpack_from(s.link.buffer, OUT)[0]
    else:
        _expect(size, COPY_FILE_RANGE_OUT.size)
        copied = _U64.unpack_from(s.link.buffer, OUT)[0]
    if copied > asked:
        raise BadReply("more bytes copied than were asked for")
    return size


def _changed(s: Service, pending: Pending, size: int) -> int:
    """FALLOCATE, SETXATTR, REMOVEXATTR: no body, changed attributes."""
    _expect(size, 0)
    s.nodes.touch(pending.slot)
    s.remembered.forget(pending.node_id)
    return size


def _readlink(s: Service, pending: Pending, size: int) -> int:
    target = size - OUT
    if not 0 < target <= _LINK_TARGET_LIMIT or s.link.buffer.find(0, OUT, size) >= 0:
        raise BadReply("an impossible symbolic link target")
    return size


def _xattr(s: Service, pending: Pending, size: int) -> int:
    asked = _U32.unpack_from(pending.request, BODY)[0]
    if asked == 0:
        _expect(size, 8)
    elif size - OUT > asked:
        raise BadReply(f"{size - OUT} bytes for an attribute buffer of {asked}")
    return size


def _statfs(s: Service, pending: Pending, size: int) -> int:
    _expect(size, STATFS_OUT.size)
    s.statfs = bytes(s.link.view[OUT:size])
    return size


def _ioctl(s: Service, pending: Pending, size: int) -> int:
    """IOCTL: only the restricted kind; a retry would have the driver choose our caller's memory."""
    if not IOCTL_OUT.size <= size - OUT <= IOCTL_OUT.size + _IOCTL_LIMIT:
        raise BadReply("an impossible ioctl answer")
    _, flags, _, _ = IOCTL_OUT.unpack_from(s.link.buffer, OUT)
    if flags:
        raise BadReply("an ioctl answer that asks for a retry")
    return size


def _exact(length: int) -> Check:
    def check(s: Service, pending: Pending, size: int) -> int:
        _expect(size, length)
        return size

    return check


CHECKS: dict[int, Check] = {
    Opcode.LOOKUP: _lookup,
    Opcode.GETATTR: _attributes,
    Opcode.SETATTR: _attributes,
    Opcode.READLINK: _readlink,
    Opcode.SYMLINK: _made,
    Opcode.MKNOD: _made,
    Opcode.MKDIR: _made,
    Opcode.UNLINK: _removed,
    Opcode.RMDIR: _removed,
    Opcode.RENAME: _renamed,
    Opcode.RENAME2: _renamed,
    Opcode.LINK: _linked,
    Opcode.OPEN: _opened,
    Opcode.OPENDIR: _opened,
    Opcode.READ: _read,
    Opcode.WRITE: _written,
    Opcode.STATFS: _statfs,
    Opcode.SETXATTR: _changed,
    Opcode.REMOVEXATTR: _changed,
    Opcode.FALLOCATE: _changed,
    Opcode.GETXATTR: _xattr,
    Opcode.LISTXATTR: _xattr,
    Opcode.CREATE: _created,
    Opcode.TMPFILE: _created,
    Opcode.GETLK: _exact(LK_OUT.size),
    Opcode.BMAP: _exact(BMAP_OUT.size),
    Opcode.IOCTL: _ioctl,
    Opcode.POLL: _exact(POLL_OUT.size),
    Opcode.LSEEK: _exact(LSEEK_OUT.size),
    Opcode.COPY_FILE_RANGE: _copied,
    Opcode.COPY_FILE_RANGE_64: _copied,
    Opcode.STATX: _statx,
}
ENTRY_OPS = frozenset(
    (Opcode.LOOKUP, Opcode.SYMLINK, Opcode.MKNOD, Opcode.MKDIR, Opcode.LINK, Opcode.CREATE, Opcode.TMPFILE)
)
HANDLE_OPS = frozenset((Opcode.OPEN, Opcode.OPENDIR, Opcode.CREATE, Opcode.TMPFILE))
