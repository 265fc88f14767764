"""The driver's messages: each reply goes to the request that waits for it, once, checked as if it came from a network.

Also what an errno means, replies that come late, in pieces, twice or to nothing, and answers to the shim's own
questions.
"""

from __future__ import annotations

import errno
import traceback
from struct import Struct
from time import monotonic
from typing import TYPE_CHECKING

from udf.fuse.opcodes import Opcode
from udf.fuse.structs import IN_HEADER, OUT_HEADER
from udf.shim import tasks
from udf.shim.checks import (
    CHECKS,
    ENTRY_OPS,
    HANDLE_OPS,
    BadReply,
    add_handle,
    name_in,
    remember_negative,
    settle_entry,
)
from udf.shim.columns import SlotsExhausted
from udf.shim.handles import Handle
from udf.shim.inflight import INTERRUPT_UNIQUE, OWN_UNIQUE, Pending
from udf.shim.nodes import FOREVER, BadEntry
from udf.shim.open_files import open_reply
from udf.shim.remembered import REMEMBERED
from udf.shim.requests import negative
from udf.shim.service import Service
from udf.shim.stale import answer_stale, removed_directory
from udf.window import IN_WINDOW, NoWindow

if TYPE_CHECKING:
    from udf.shim.link import Link
    from udf.shim.window import Window

OUT = OUT_HEADER.size
BODY = IN_HEADER.size
_U32 = Struct("=I")
_U64 = Struct("=Q")
_REPLY_HEAD = Struct("=IiQ")

# After one ENOSYS the shim answers by itself, with the errno that makes the kernel or libc fall back rightly:
# posix_fallocate and copy_file_range emulate on EOPNOTSUPP, lseek and statx go on without us on ENOSYS. An fsync that
# a driver does not know is done (0), but the kernel must go on asking: of a device that is away nothing is synced.
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
    Opcode.FSYNC: 0,
    Opcode.FSYNCDIR: 0,
    Opcode.ACCESS: errno.ENOSYS,
    Opcode.GETXATTR: errno.ENOSYS,
    Opcode.SETXATTR: errno.ENOSYS,
    Opcode.LISTXATTR: errno.ENOSYS,
    Opcode.REMOVEXATTR: errno.ENOSYS,
}

_ERRNOS = frozenset(errno.errorcode)


def on_message(s: Service, link: Link, size: int) -> None:
    """Take the message of *size* bytes in the link's buffer: a reply, an answer to us, or a notification."""
    if size < OUT:
        s.fault(0, "garbage", f"a message of {max(size, 0)} bytes, shorter than any header")
        return
    length, error, unique = _REPLY_HEAD.unpack_from(link.buffer)
    if not unique:
        if length == size:
            s.notifier.from_driver(s, error, link.view[OUT:size])
        else:
            s.fault(0, "length", "a notification whose length is not its own")
        return
    if link.mixed and link.incomplete:
        _broken(s, link)
    if error == IN_WINDOW and length == size and link.window is not None:
        _in_window(s, link, link.window, unique, size)
        return
    if unique >= OWN_UNIQUE:
        _own(s, link, unique, error, size, whole=length == size and (not error or size == OUT))
        return
    pending = s.waiting.pop(unique, None)
    if pending is None:
        _unexpected(s, link, unique, error, size)
        return
    if s.interrupted:
        s.interrupted.pop(unique, None)
    if length != size or (error and size != OUT):
        if not (link.mixed and tasks.read_again(s, unique, pending)):
            s.fault(pending.op, "BadReply", f"a reply of {size} bytes that says it has {length}")
            s.answer_error(unique, errno.EIO)
        return
    _finish(s, link, pending, unique, error, size)


def _in_window(s: Service, link: Link, window: Window, unique: int, size: int) -> None:
    """An answer that points at where it is. It is dealt with when we are back, whatever became of it."""
    pending = s.waiting.pop(unique, None)
    is_own, task = unique in s.asks, s.asks.pop(unique, None)
    op = pending.op if pending is not None else task.op if task is not None else 0
    if pending is not None:
        s.interrupted.pop(unique, None)
    parts: list[memoryview] = []
    try:
        parts = window.parts(link.view[OUT:size])
        if pending is None and not is_own:
            _unexpected(s, link, unique, 0, OUT)
        elif op != Opcode.READ:
            raise BadReply("an answer in the window that is no read's")
        elif pending is not None:
            CHECKS[op](s, pending, OUT + sum(map(len, parts)))
            s.pass_on_parts(unique, parts)
    except (BadReply, NoWindow) as bad:
        s.fault(op, type(bad).__name__, str(bad))
        parts = []
        if pending is not None:
            s.answer_error(unique, errno.EIO)
    if task is not None:
        s.resume(task, (0, b"".join(parts)) if parts else (errno.EIO, b""))
    window.dealt_with()


def complete(s: Service, unique: int, pending: Pending, body: bytes) -> None:
    """Answer a request whose reply was lost with its driver, as if the reply had come."""
    size = OUT + len(body)
    s.link.buffer[:size] = OUT_HEADER.pack(size, 0, unique) + body
    _finish(s, s.link, pending, unique, 0, size)


def _finish(s: Service, link: Link, pending: Pending, unique: int, error: int, size: int) -> None:
    """Check a reply, take what it changes, pass it on. The request is answered whatever is wrong with it."""
    try:
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
    except Exception:  # a defect of ours: the program has its answer all the same
        traceback.print_exc()
        s.answer_error(unique, errno.EIO)
        return
    if pending.op in REMEMBERED:
        s.remembered.keep(pending.node_id, pending.op, pending.request[BODY:], 0, bytes(link.view[OUT:size]))
    if size:
        s.pass_on(unique, link.view[:size])
    if s.unsettled is not None:
        settle_entry(s)


def _broken(s: Service, link: Link) -> None:
    unique = link.take_broken()
    if unique is None:
        return
    pending = s.waiting.pop(unique, None)
    if pending is not None and not (link.mixed and tasks.read_again(s, unique, pending)):
        s.fault(pending.op, "BadReply", "a reply that is shorter than it says")
        s.answer_error(unique, errno.EIO)
    task = s.asks.pop(unique, None)
    if task is not None:
        s.fault(task.op, "BadReply", "an answer that is shorter than it says")
        s.resume(task, (errno.EIO, b""))


def give_up_broken(s: Service, link: Link) -> None:
    """The rest of a reply in several packets did not come in time."""
    _broken(s, link)


def _own(s: Service, link: Link, unique: int, error: int, size: int, *, whole: bool) -> None:
    """An answer to a question of the shim's own; *whole*: it is as long as it says."""
    if unique == INTERRUPT_UNIQUE:
        return
    if unique not in s.asks:
        s.fault(0, "unknown", "an answer to a question that was not asked")
        return
    task = s.asks.pop(unique)
    if task is None:
        return
    if not whole:
        s.fault(task.op, "BadReply", f"an answer of {size} bytes that says something else")
        s.resume(task, (errno.EIO, b""))
        return
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
    try:
        if not error:
            settle(s, pending, size)
    except (BadReply, BadEntry, SlotsExhausted):
        pass
    finally:
        s.unpin(pending.slot)


def settle(s: Service, pending: Pending, size: int) -> None:
    """Do what a late reply changes: its names and counts are true, but no program has its handle or its lookup."""
    check = CHECKS.get(pending.op)
    if check is None:
        return
    check(s, pending, size)
    settle_entry(s)
    if pending.op in ENTRY_OPS:
        slot = s.nodes.slot(_U64.unpack_from(s.link.buffer, OUT)[0])
        if slot:
            s.nodes.forget(slot, 1)
    if pending.op in HANDLE_OPS and isinstance(pending.handle, Handle):
        handle = pending.handle
        s.handles.remove(handle)
        s.post_release(handle)
        s.closed(handle.slot)


def _failed(s: Service, pending: Pending, unique: int, error: int) -> None:
    """The driver answered with an errno."""
    op = pending.op
    number = _sane(s, op, error)
    if op in REMEMBERED:
        s.remembered.keep(pending.node_id, op, pending.request[BODY:], number, b"")
    if number == errno.ENOSYS:
        refusal = REFUSALS.get(op)
        if refusal is not None:
            s.refused[op] = number = refusal
        elif op in (Opcode.OPEN, Opcode.OPENDIR):
            # A driver without open: reads come with any handle.
            flags = _U32.unpack_from(pending.request, BODY)[0]
            handle = add_handle(s, pending, pending.slot, flags, 0, op == Opcode.OPENDIR)
            s.answer(unique, open_reply(s, handle, 0), by="driver")
            return
    elif number == errno.ESTALE and op == Opcode.GETATTR:
        # Of a directory that is open a driver need not know more than its name: the one that had opened it has died.
        if answer_stale(s, unique, removed_directory(s, pending.slot)):
            return
    elif number in (errno.EEXIST, errno.ESTALE) and op in ENTRY_OPS:
        s.nodes.negatives.pop((pending.node_id, name_in(pending)), None)
    elif number == errno.ENOENT:
        if op == Opcode.LOOKUP:
            name = name_in(pending)
            gone = s.nodes.unlink(pending.slot, name)
            if gone:
                s.nodes.release(gone)
            if s.exclusive:
                remember_negative(s, pending.node_id, name, monotonic() + FOREVER)
                s.answer(unique, negative(FOREVER), by="driver")
                return
        elif op in (Opcode.UNLINK, Opcode.RMDIR):
            s.nodes.expire(pending.slot, name_in(pending))
    s.answer_error(unique, number, by="driver")
