"""What a driver answers: checked as if it came from a network, noted in the tables, made the kernel's.

One function for each opcode, in the table `CHECKS`: it is given the pending request and the reply's length (the reply is in
the link's buffer), puts the shim's ids into it and raises BadReply for what cannot be right. An opcode without a function
has an empty answer. The kernel refuses some replies without ever answering the program, so nothing unchecked goes there.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from struct import Struct
from time import monotonic
from typing import TYPE_CHECKING

from udf.fuse.flags import Fopen
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
from udf.shim.handles import Handle
from udf.shim.inflight import OWN_UNIQUE, Pending
from udf.shim.nodes import FOREVER, OPEN_FLAGS_SHIFT, OPENED_DIR, ROOT, BadEntry
from udf.shim.requests import NEEDED, negative, open_reply
from udf.shim.service import INTERRUPT_UNIQUE, Service

if TYPE_CHECKING:
    from udf.shim.link import Link

OUT = OUT_HEADER.size
BODY = IN_HEADER.size
_U32 = Struct("=I")
_U64 = Struct("=Q")
_ATTR_HEAD = Struct("=QI4x")
_REPLY_HEAD = Struct("=IiQ")
_MODE_AT = ATTR_OUT.offset("attr.mode")
_STATX_INO_AT = STATX_OUT.offset("stat.ino")
_STATX_MODE_AT = STATX_OUT.offset("stat.mode")
_IOCTL_LIMIT = 64 * 1024
_LINK_TARGET_LIMIT = 4095
# What a driver may not choose: FOPEN_PASSTHROUGH would name one of our own backing files.
_FOPEN_ALLOWED = int(
    Fopen.DIRECT_IO
    | Fopen.KEEP_CACHE
    | Fopen.NONSEEKABLE
    | Fopen.CACHE_DIR
    | Fopen.STREAM
    | Fopen.NOFLUSH
    | Fopen.PARALLEL_DIRECT_WRITES
)

# After one ENOSYS the shim answers by itself, with the errno that makes the kernel or libc fall back rightly:
# posix_fallocate and copy_file_range emulate on EOPNOTSUPP, lseek and statx go on without us on ENOSYS.
REFUSALS: dict[int, int] = {
    Opcode.FALLOCATE: errno.EOPNOTSUPP,
    Opcode.COPY_FILE_RANGE: errno.EOPNOTSUPP,
    Opcode.COPY_FILE_RANGE_64: errno.ENOSYS,
    Opcode.TMPFILE: errno.EOPNOTSUPP,
    Opcode.IOCTL: errno.ENOTTY,
    Opcode.LSEEK: errno.ENOSYS,
    Opcode.STATX: errno.ENOSYS,
    Opcode.POLL: errno.ENOSYS,
    Opcode.SYNCFS: errno.ENOSYS,
    Opcode.BMAP: errno.ENOSYS,
    Opcode.RENAME2: errno.ENOSYS,
    Opcode.FSYNC: errno.ENOSYS,
    Opcode.FSYNCDIR: errno.ENOSYS,
    Opcode.ACCESS: errno.ENOSYS,
    Opcode.GETXATTR: errno.ENOSYS,
    Opcode.SETXATTR: errno.ENOSYS,
    Opcode.LISTXATTR: errno.ENOSYS,
    Opcode.REMOVEXATTR: errno.ENOSYS,
}

_ERRNOS = frozenset(errno.errorcode)


class BadReply(Exception):
    """A reply that cannot be right; the program gets EIO, the sentence goes to the log."""


Check = Callable[[Service, Pending, int], int]


def on_message(s: Service, link: Link, size: int) -> None:
    """Take the message of *size* bytes in the link's buffer: a reply, an answer to a question of ours, a notification."""
    if size < OUT:
        s.fault(0, "garbage", f"a message of {size} bytes, shorter than any header")
        return
    length, error, unique = _REPLY_HEAD.unpack_from(link.buffer)
    if not unique:
        if length == size:
            s.notifier.from_driver(s, error, link.view[OUT:size])
        else:
            s.fault(0, "length", "a notification whose length is not its own")
        return
    if link.incomplete:
        _broken(s, link)
    if unique >= OWN_UNIQUE:
        _own(s, link, unique, error if length == size else -errno.EIO, size)
        return
    pending = s.waiting.pop(unique, None)
    if pending is None:
        _unexpected(s, link, unique, error, size)
        return
    if s.interrupted:
        s.interrupted.pop(unique, None)
    try:
        if length != size or (error and size != OUT):
            raise BadReply(f"a reply of {size} bytes that says it has {length}")
        if error:
            _failed(s, pending, unique, error)
            return
        check = CHECKS.get(pending.op)
        if check is not None:
            size = check(s, pending, size)
        elif size != OUT:
            raise BadReply(f"an answer of {size - OUT} bytes where none is due")
    except (BadReply, BadEntry) as bad:
        s.fault(pending.op, type(bad).__name__, str(bad))
        s.answer_error(unique, errno.EIO)
        return
    except SlotsExhausted:
        s.answer_error(unique, errno.ENOMEM)
        return
    if size:
        s.pass_on(unique, link.view[:size])


def _broken(s: Service, link: Link) -> None:
    unique = link.take_broken()
    if unique is None:
        return
    pending = s.waiting.pop(unique, None)
    if pending is not None:
        s.fault(pending.op, "BadReply", "a reply that is shorter than it says")
        s.answer_error(unique, errno.EIO)


def give_up_broken(s: Service, link: Link) -> None:
    """The rest of a reply in several packets did not come in time."""
    _broken(s, link)


def _own(s: Service, link: Link, unique: int, error: int, size: int) -> None:
    """An answer to a question of the shim's own."""
    if unique == INTERRUPT_UNIQUE:
        return
    if unique not in s.asks:
        s.fault(0, "unknown", "an answer to a question that was not asked")
        return
    task = s.asks.pop(unique)
    if task is not None:
        s.resume(task, (_sane(s, task.op, error), bytes(link.view[OUT:size])))


def _sane(s: Service, op: int, error: int) -> int:
    """Return a positive errno that programs may see (0 stays 0)."""
    if error and -error not in _ERRNOS:
        s.fault(op, "errno", f"an impossible errno ({error})")
        return errno.EIO
    return -error


def _unexpected(s: Service, link: Link, unique: int, error: int, size: int) -> None:
    """A reply to nothing that waits: a late one is settled, everything else is a fault."""
    pending = s.late.pop(unique, None)
    if pending is None:
        s.fault(0, "unknown", "a reply to a request that was not made, or a second reply to one")
        return
    if error or size < OUT:
        return
    try:
        settle(s, pending, size)
    except (BadReply, BadEntry, SlotsExhausted):
        return


def settle(s: Service, pending: Pending, size: int) -> None:
    """Do what a late reply changes: its names and counts are true, but no program has its handle or its lookup."""
    check = CHECKS.get(pending.op)
    if check is None or s.nodes.slot(pending.node_id) != pending.slot:
        return
    check(s, pending, size)
    if pending.op in _ENTRY_OPS:
        slot = s.nodes.slot(_U64.unpack_from(s.link.buffer, OUT)[0])
        if slot:
            s.nodes.forget(slot, 1)
    if pending.op in _HANDLE_OPS and isinstance(pending.handle, Handle):
        handle = pending.handle
        s.handles.remove(handle)
        s.post_release(handle)
        s.nodes.closed(handle.slot)


def _failed(s: Service, pending: Pending, unique: int, error: int) -> None:
    """The driver answered with an errno."""
    op = pending.op
    number = _sane(s, op, error)
    if number == errno.ENOSYS:
        refusal = REFUSALS.get(op)
        if refusal is not None:
            s.refused[op] = number = refusal
        elif op in (Opcode.OPEN, Opcode.OPENDIR):
            # A driver without open: reads come with any handle.
            flags = _U32.unpack_from(pending.request, BODY)[0]
            handle = _add_handle(s, pending, pending.slot, flags, 0, op == Opcode.OPENDIR)
            s.answer(unique, open_reply(s, handle, 0), by="driver")
            return
    elif number == errno.ENOENT:
        if op == Opcode.LOOKUP:
            name = _name(pending)
            gone = s.nodes.unlink(pending.slot, name)
            if gone:
                s.nodes.release(gone)
            if s.exclusive:
                _remember_negative(s, pending.slot, name, monotonic() + FOREVER)
                s.answer(unique, negative(FOREVER), by="driver")
                return
        elif op in (Opcode.UNLINK, Opcode.RMDIR):
            s.nodes.expire(pending.slot, _name(pending))
    s.answer_error(unique, number, by="driver")


def _name(pending: Pending) -> bytes:
    """Return the (first) name in a request's body."""
    start = BODY + _NAME_AT.get(pending.op, 0)
    request = pending.request
    return request[start : request.index(0, start)]


_NAME_AT = {
    int(Opcode.MKNOD): 16,
    int(Opcode.MKDIR): 8,
    int(Opcode.CREATE): 16,
    int(Opcode.TMPFILE): 16,
    int(Opcode.LINK): 8,
    int(Opcode.RENAME): 8,
    int(Opcode.RENAME2): 16,
}
_NEGATIVES = 4096


def _remember_negative(s: Service, slot: int, name: bytes, until: float) -> None:
    negatives = s.nodes.negatives
    negatives[slot, name] = until
    if len(negatives) > _NEGATIVES:
        del negatives[next(iter(negatives))]


# ---- one function for each answer with a body


def _expect(size: int, body: int) -> None:
    if size != OUT + body:
        raise BadReply(f"an answer of {size - OUT} bytes instead of {body}")


def _enter(s: Service, pending: Pending, name: bytes) -> int:
    """Take the entry in a reply; the kernel counts one lookup of it."""
    buffer = s.link.buffer
    driver_id = _U64.unpack_from(buffer, OUT)[0]
    if not driver_id:
        raise BadReply("an entry without a node")
    try:
        slot = s.nodes.enter(pending.slot, name, buffer, OUT, monotonic(), s.exclusive)
    except BadEntry:
        if driver_id != ROOT:
            s.nodes.forgets.append((driver_id, 1))
        raise
    s.nodes.lookups[slot] += 1
    return slot


def _lookup(s: Service, pending: Pending, size: int) -> int:
    _expect(size, ENTRY_OUT.size)
    buffer = s.link.buffer
    if not _U64.unpack_from(buffer, OUT)[0]:
        name = _name(pending)
        valid = min(_U64.unpack_from(buffer, OUT + 16)[0], FOREVER)
        if valid or s.exclusive:
            _remember_negative(s, pending.slot, name, monotonic() + (FOREVER if s.exclusive else valid))
        gone = s.nodes.unlink(pending.slot, name)
        if gone:
            s.nodes.release(gone)
        buffer[OUT : OUT + ENTRY_OUT.size] = negative(FOREVER if s.exclusive else valid)
        return size
    _enter(s, pending, _name(pending))
    return size


def _made(s: Service, pending: Pending, size: int) -> int:
    """SYMLINK, MKNOD, MKDIR: a new entry in a changed directory."""
    _expect(size, ENTRY_OUT.size)
    s.nodes.touch(pending.slot)
    _enter(s, pending, _name(pending))
    return size


def _linked(s: Service, pending: Pending, size: int) -> int:
    _expect(size, ENTRY_OUT.size)
    s.nodes.touch(pending.slot)
    s.nodes.touch(s.nodes.slot(_U64.unpack_from(pending.request, BODY)[0]))
    _enter(s, pending, _name(pending))
    return size


def _created(s: Service, pending: Pending, size: int) -> int:
    """CREATE and TMPFILE: an entry and a handle."""
    _expect(size, ENTRY_OUT.size + OPEN_OUT.size)
    buffer = s.link.buffer
    s.nodes.touch(pending.slot)
    name = _name(pending)
    driver_handle, fopen, _ = OPEN_OUT.unpack_from(buffer, OUT + ENTRY_OUT.size)
    slot = _enter(s, pending, name)
    if pending.op == Opcode.TMPFILE:
        s.nodes.unlink(pending.slot, name)  # its name was only the request's
    flags = _U32.unpack_from(pending.request, BODY)[0]
    handle = _add_handle(s, pending, slot, flags, driver_handle, False, fopen)
    buffer[OUT + ENTRY_OUT.size : size] = open_reply(s, handle, fopen & _FOPEN_ALLOWED)
    return size


def _add_handle(
    s: Service, pending: Pending, slot: int, flags: int, driver_handle: int, is_dir: bool, fopen: int = 0
) -> Handle:
    nodes = s.nodes
    handle = pending.handle = s.handles.add(slot, flags, is_dir, driver_handle)
    nodes.opens[slot] += 1
    known = OPENED_DIR if is_dir else NEEDED.get(flags & 3, 0)
    fopen &= _FOPEN_ALLOWED
    nodes.flags[slot] = (nodes.flags[slot] & ((1 << OPEN_FLAGS_SHIFT) - 1)) | known | (fopen << OPEN_FLAGS_SHIFT)
    return handle


def _opened(s: Service, pending: Pending, size: int) -> int:
    _expect(size, OPEN_OUT.size)
    buffer = s.link.buffer
    driver_handle, fopen, _ = OPEN_OUT.unpack_from(buffer, OUT)
    flags = _U32.unpack_from(pending.request, BODY)[0]
    handle = _add_handle(s, pending, pending.slot, flags, driver_handle, pending.op == Opcode.OPENDIR, fopen)
    buffer[OUT:size] = open_reply(s, handle, fopen & _FOPEN_ALLOWED)
    return size


def _attributes(s: Service, pending: Pending, size: int) -> int:
    """GETATTR and SETATTR."""
    _expect(size, ATTR_OUT.size)
    buffer = s.link.buffer
    nodes = s.nodes
    slot = pending.slot
    valid, nanoseconds = _ATTR_HEAD.unpack_from(buffer, OUT)
    nodes.check_mode(slot, _U32.unpack_from(buffer, OUT + _MODE_AT)[0])
    if nanoseconds > 999_999_999:
        raise BadReply("an impossible attribute time-out")
    if s.exclusive:
        valid, nanoseconds = FOREVER, 0
    valid = min(valid, FOREVER)
    if pending.op == Opcode.SETATTR:
        nodes.touch(slot)
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
    gone = s.nodes.unlink(pending.slot, _name(pending))
    if gone:
        s.nodes.release(gone)
    return size


def _renamed(s: Service, pending: Pending, size: int) -> int:
    _expect(size, 0)
    request = pending.request
    start = BODY + _NAME_AT[pending.op]
    name, new_name = request[start:].split(b"\0")[:2]
    flags = _U32.unpack_from(request, BODY + 8)[0] if pending.op == Opcode.RENAME2 else 0
    new_parent = s.nodes.slot(_U64.unpack_from(request, BODY)[0])
    s.nodes.touch(pending.slot)
    s.nodes.touch(new_parent)
    if flags & 2:
        s.nodes.exchange(pending.slot, name, new_parent, new_name)
    else:
        s.nodes.move(pending.slot, name, new_parent, new_name)
    s.nodes.negatives.pop((new_parent, new_name), None)
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
_ENTRY_OPS = frozenset(
    (Opcode.LOOKUP, Opcode.SYMLINK, Opcode.MKNOD, Opcode.MKDIR, Opcode.LINK, Opcode.CREATE, Opcode.TMPFILE)
)
_HANDLE_OPS = frozenset((Opcode.OPEN, Opcode.OPENDIR, Opcode.CREATE, Opcode.TMPFILE))
