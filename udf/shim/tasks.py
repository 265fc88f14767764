"""Requests that take several steps at the driver, as generators that yield what they ask and are sent the answers.

Each ends by forwarding or answering its kernel request, or raises Refuse. They run in the loop, so nothing in them
waits; between two yields the shim's state may have changed.
"""

from __future__ import annotations

import errno
import os
import stat
from struct import Struct
from typing import TYPE_CHECKING

from udf.fuse.flags import Fattr
from udf.fuse.opcodes import Opcode
from udf.fuse.structs import IN_HEADER, OPEN_IN, OPEN_OUT, READ_IN, SETATTR_IN
from udf.shim.handles import Handle
from udf.shim.hiding import hide, needs_hiding
from udf.shim.inflight import Ask, Pending, Refuse, Steps, Wait
from udf.shim.resolve import resolve

if TYPE_CHECKING:
    from udf.shim.service import Service


BODY = IN_HEADER.size
_U64 = Struct("=Q")
# Toward the driver an open has none of these: offsets are the kernel's, truncation came as a SETATTR before,
# and a handle may be opened a second time.
STRIPPED = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_APPEND | os.O_DIRECT
# What splice(2) sends to a socket at once is 16 buffers: the header, and 15 pages that need not begin with a page.
_PIECE = 14 * 4096


def without_suid(mode: int) -> int:
    """Return *mode* without what a write, truncation or change of owner takes away (setattr_should_drop_suidgid)."""
    mode &= ~stat.S_ISUID
    return mode & ~stat.S_ISGID if mode & stat.S_IXGRP else mode


def caller(request: bytes) -> tuple[int, int, int]:
    """Return (uid, gid, pid) of the program that made *request*."""
    fields = IN_HEADER.unpack_from(request)
    return fields[4], fields[5], fields[6]


def unopened(s: Service, slot: int) -> list[Handle]:
    """Return the open file handles of *slot* that the driver has not been told of."""
    return [handle for handle in s.handles.of(slot) if handle.driver_handle is None and not handle.is_dir]


def post(s: Service, op: int, driver_id: int, body: bytes, request: bytes) -> None:
    """Send a request whose answer changes nothing."""
    s.ask(Ask(op, driver_id, body, caller(request)), None)


def open_handle(s: Service, handle: Handle, request: bytes) -> Steps:
    """Open *handle* at the driver, if nobody has; several tasks may want it at once. Raises Refuse."""
    while handle.driver_handle is None:
        if handle.opening:
            yield Wait(handle.number)
            continue
        handle.opening = True
        try:
            op = Opcode.OPENDIR if handle.is_dir else Opcode.OPEN
            body = OPEN_IN.pack(handle.flags & ~STRIPPED, 0)
            driver_id = yield from resolve(s, handle.slot)
            error, reply = yield Ask(op, driver_id, body, caller(request))
        except Refuse as refusal:
            # A directory that is not there any more has no names either.
            error, reply = errno.ENOENT if handle.is_dir and refusal.errno == errno.ESTALE else refusal.errno, b""
        finally:
            handle.opening = False
        if error == errno.ENOSYS:
            handle.driver_handle = 0  # a driver without open: its handle means nothing
        elif error:
            s.opened(handle)
            raise Refuse(error)
        elif len(reply) != OPEN_OUT.size:
            s.fault(op, "length", f"an answer of {len(reply)} bytes instead of {OPEN_OUT.size}")
            s.opened(handle)
            raise Refuse(errno.EIO)
        else:
            handle.driver_handle = OPEN_OUT.unpack_from(reply)[0]
        if s.handles.get(handle.number) is not handle:  # closed while we waited
            s.post_release(handle)
            s.opened(handle)
            raise Refuse(errno.EBADF)
        s.opened(handle)


def open_then_again(s: Service, unique: int, node_id: int, request: bytes, handle: Handle) -> Steps:
    """Open the driver's handle, then go on with the request."""
    yield from open_handle(s, handle, request)
    s.again(unique, node_id, request)


def forward_rename(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """Send a rename to the driver."""
    slot = s.nodes.slot(node_id)
    driver_id = s.nodes.driver(slot)
    new_parent_id = s.nodes.driver(s.nodes.slot(_U64.unpack_from(message, BODY)[0]))
    pending = s.keep(message[4], node_id, slot, message)
    _U64.pack_into(message, 16, driver_id)
    _U64.pack_into(message, BODY, new_parent_id)
    s.send(pending, unique, message)


def read_in_pieces(s: Service, unique: int, request: bytes, handle: Handle) -> Steps:
    """Read as much at a time as a splicing driver answers in one packet."""
    _, offset, size, *rest = READ_IN.unpack_from(request, BODY)
    data = bytearray()
    while len(data) < size:
        wanted = min(_PIECE, size - len(data))
        body = READ_IN.pack(handle.driver_handle or 0, offset + len(data), wanted, *rest)
        error, piece = yield Ask(Opcode.READ, s.nodes.driver(handle.slot), body, caller(request))
        if error:
            raise Refuse(error)
        if len(piece) > wanted:
            s.fault(Opcode.READ, "BadReply", f"{len(piece)} bytes for a read of {wanted}")
            raise Refuse(errno.EIO)
        data += piece
        if len(piece) < wanted:
            break
    if s.tasks.pop(unique, None) is not None:
        s.answer(unique, data, by="driver")


def read_again(s: Service, unique: int, pending: Pending) -> bool:
    """Ask once more, in pieces, for what came mixed with another reply; whether it can be."""
    if pending.op != Opcode.READ or not isinstance(pending.handle, Handle):
        return False
    s.fault(Opcode.READ, "mixed", "replies came mixed, packet by packet: from now on it is read in small pieces")
    s.start(unique, Opcode.READ, pending.request, read_in_pieces(s, unique, pending.request, pending.handle))
    return True


def keep_first(
    s: Service, unique: int, node_id: int, request: bytes, target: int, parent: int, name: bytes, *, goes: bool
) -> Steps:
    """Have an open file outlive its *name* in *parent*, which an UNLINK or RENAME is about to take; then go on.

    Not *goes*: the name only becomes another file's while the file gets that one's.
    """
    for handle in unopened(s, target):
        try:
            yield from open_handle(s, handle, request)
        except Refuse:
            continue  # its reads will fail for that handle alone; removing the name is not its business
    is_unlink = request[4] == Opcode.UNLINK
    moved = False
    if goes and needs_hiding(s, target):
        try:
            moved = yield from hide(s, parent, name, target, may_move=is_unlink)
        except Refuse:
            pass  # it is not there any more, or not that file: nothing of ours to keep
    if moved:
        s.nodes.touch(parent)
        if s.tasks.pop(unique, None) is not None:
            s.answer(unique, by="driver")
        return
    yield from resolve(s, s.nodes.slot(node_id))
    yield from resolve(s, parent)
    if s.tasks.pop(unique, None) is None:
        return
    message = memoryview(bytearray(request))
    if is_unlink:
        s.forward(Opcode.UNLINK, unique, node_id, s.nodes.slot(node_id), message)
    else:
        forward_rename(s, unique, node_id, message)


def set_mode(s: Service, slot: int, mode: int) -> Steps:
    """Have the driver set a node's permission bits. Raises Refuse."""
    s.nodes.touch(slot)
    values = dict.fromkeys(SETATTR_IN.fields, 0)
    values["valid"], values["mode"] = int(Fattr.MODE), mode
    driver_id = yield from resolve(s, slot)
    error, _ = yield Ask(Opcode.SETATTR, driver_id, SETATTR_IN.pack(*values.values()))
    s.nodes.touch(slot)
    if error:
        raise Refuse(error)


def kill_suid_first(s: Service, unique: int, node_id: int, request: bytes, slot: int) -> Steps:
    """Take suid and sgid away before a write by a caller who may not keep them."""
    mode = without_suid(s.nodes.mode(slot))
    yield from set_mode(s, slot, mode)
    s.nodes.set_mode(slot, mode)
    s.again(unique, node_id, request)


def note_xattr_first(s: Service, unique: int, slot: int, request: bytes, message: bytes, name: bytes) -> Steps:
    """Note whether an attribute is there before it is created or removed, then send *message*.

    Should the driver die over it, only that tells a success whose reply was lost from a failure.
    """
    driver_id = yield from resolve(s, slot)
    error, _ = yield Ask(Opcode.GETXATTR, driver_id, bytes(8) + name + b"\0", caller(request))
    if s.tasks.pop(unique, None) is None:
        return
    _, op, _, node_id, *_ = IN_HEADER.unpack_from(request)
    pending = s.keep(op, node_id, slot, memoryview(request))
    pending.before = not error
    short = bytearray(message)
    _U64.pack_into(short, 16, driver_id)
    s.send(pending, unique, short)


def set_acl_then_kill(s: Service, unique: int, slot: int, request: bytes, body: bytes) -> Steps:
    """Set an ACL for a caller who may not keep sgid with it."""
    driver_id = yield from resolve(s, slot)
    error, _ = yield Ask(Opcode.SETXATTR, driver_id, body, caller(request))
    if error:
        raise Refuse(error)
    s.nodes.touch(slot)
    yield from set_mode(s, slot, s.nodes.mode(slot) & ~0o2000)
    if s.tasks.pop(unique, None) is not None:
        s.answer(unique, by="driver")
