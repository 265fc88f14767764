"""What the shim does with each kernel request: answer it from what it knows, or send it to the driver.

One function for each opcode, in the table `HANDLERS`; each is given the service, the request's id, the node id of its
header and the whole message in a buffer that it may change. Kernel rules that an answer rests on stand beside it.
Here are names and attributes, and the table; requests on open files are in `open_files`.
A little over 400 lines: one function for each opcode, and the table of all of them.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from struct import Struct
from time import monotonic
from typing import TYPE_CHECKING

from udf.fuse.flags import Fattr, GetattrFlag, SetxattrFlag
from udf.fuse.opcodes import Opcode
from udf.fuse.structs import ENTRY_OUT, IN_HEADER
from udf.shim import open_files, patience, tasks
from udf.shim.graph import ATTR_SIZE, ROOT
from udf.shim.hiding import HIDDEN_NAME, needs_hiding
from udf.shim.remembered import REMEMBERED
from udf.shim.stale import answer_stale, is_unchanged, stale_attributes, stale_entry
from udf.shim.tasks import forward_rename, without_suid

if TYPE_CHECKING:
    from udf.shim.service import Service

BODY = IN_HEADER.size
_U32 = Struct("=I")
_U64 = Struct("=Q")
_ATTR_HEAD = Struct("=QI4x")
_NEGATIVE = Struct("=QQQQII")
_NO_ATTR = bytes(ENTRY_OUT.size - _NEGATIVE.size)
_PAIR = Struct("=QQ")
_GETATTR_FH = int(GetattrFlag.FH)
_FATTR_FH = int(Fattr.FH)
_FATTR_MODE = int(Fattr.MODE)
_FATTR_OWNER = int(Fattr.UID | Fattr.GID)
_FATTR_HOW = int(Fattr.FH | Fattr.LOCKOWNER)
_FATTR_KILL = int(Fattr.KILL_SUIDGID)
_RENAME_EXCHANGE = 2
_ACL_KILL = int(SetxattrFlag.ACL_KILL_SGID)

Handler = Callable[["Service", int, int, memoryview], None]


def lookup(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """LOOKUP: from the name cache while entry and attributes are valid."""
    slot = s.nodes.slot(node_id)
    name = bytes(message[BODY:-1])
    if slot == ROOT and name.startswith(HIDDEN_NAME):
        s.answer_error(unique, errno.ENOENT)
        return
    now = monotonic()
    child = s.nodes.cached(slot, name, now)
    if child:
        s.counters.name_hits += 1
        s.nodes.lookups[child] += 1
        s.answer(unique, s.nodes.pack_entry(child, s.nodes.link(slot, name), now), by="cache")
        return
    if not s.connected and _lookup_stale(s, unique, slot, name):
        return
    if s.nodes.negatives:
        until = s.nodes.negatives.get((node_id, name))
        if until is not None and until > now:
            s.counters.negative_hits += 1
            s.answer(unique, negative(until - now), by="cache")
            return
    s.forward(1, unique, node_id, slot, message)


def _lookup_stale(s: Service, unique: int, slot: int, name: bytes) -> bool:
    """Without a driver a name means what it last meant, until there is one to ask."""
    link = s.nodes.link(slot, name)
    child = s.nodes.link_node[link]
    if not child or s.nodes.is_expired(link) or not is_unchanged(s, child):
        return False
    s.nodes.lookups[child] += 1
    return answer_stale(s, unique, stale_entry(s, child, link))


def negative(valid: float) -> bytes:
    """Return the entry that says for *valid* seconds that there is no such name."""
    return _NEGATIVE.pack(0, 0, int(valid), 0, int(valid % 1 * 1e9), 0) + _NO_ATTR


def getattr_(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """GETATTR: from the cache while valid. The kernel asks again after every read, because the access time changed."""
    nodes = s.nodes
    slot = nodes.slot(node_id)
    until = nodes.attr_until[slot]
    if until:
        valid = until - monotonic()
        if valid > 0:
            s.counters.attr_hits += 1
            attr = nodes.attrs[slot * ATTR_SIZE : slot * ATTR_SIZE + ATTR_SIZE]
            s.answer(unique, _ATTR_HEAD.pack(int(valid), int(valid % 1 * 1e9)) + attr, by="cache")
            return
    if not s.connected and answer_stale(s, unique, stale_attributes(s, slot)):
        return
    driver_id = nodes.driver(slot)
    pending = s.keep(3, node_id, slot, message)
    _U64.pack_into(message, 16, driver_id)
    _drop_unknown_handle(s, message)
    s.send(pending, unique, message)


def statx(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """STATX: only asked for what GETATTR does not give (birth time); most drivers refuse it, once."""
    if Opcode.STATX in s.refused:
        s.counters.local_answers += 1
        s.answer_error(unique, s.refused[Opcode.STATX])
        return
    slot = s.nodes.slot(node_id)
    driver_id = s.nodes.driver(slot)
    pending = s.keep(Opcode.STATX, node_id, slot, message)
    _drop_unknown_handle(s, message)
    _U64.pack_into(message, 16, driver_id)
    s.send(pending, unique, message)


def _drop_unknown_handle(s: Service, message: memoryview) -> None:
    """Put the driver's handle into a GETATTR or STATX, or take the handle out of it."""
    if message[BODY] & _GETATTR_FH:
        handle = s.handles.get(_U64.unpack_from(message, BODY + 8)[0])
        if handle is None or handle.driver_handle is None:
            message[BODY] &= ~_GETATTR_FH
            _U64.pack_into(message, BODY + 8, 0)
        else:
            _U64.pack_into(message, BODY + 8, handle.driver_handle)


def setattr_(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """SETATTR. With HANDLE_KILLPRIV_V2 the server clears suid and sgid: put into the mode that the driver is to set."""
    nodes = s.nodes
    slot = nodes.slot(node_id)
    driver_id = nodes.driver(slot)
    pending = s.keep(4, node_id, slot, message)
    s.changes(slot)
    valid = _U32.unpack_from(message, BODY)[0]
    if valid & _FATTR_FH:
        handle = s.handles.get(_U64.unpack_from(message, BODY + 8)[0])
        if handle is None or handle.driver_handle is None:
            valid &= ~_FATTR_FH
            _U64.pack_into(message, BODY + 8, 0)
        else:
            _U64.pack_into(message, BODY + 8, handle.driver_handle)
    mode = nodes.mode(slot)
    # A request that sets nothing is chown(-1, -1), which takes suid and sgid as every change of owner does.
    if (
        (valid & (_FATTR_KILL | _FATTR_OWNER) or not valid & ~_FATTR_HOW)
        and not valid & _FATTR_MODE
        and not stat.S_ISDIR(mode)
    ):
        killed = without_suid(mode)
        if killed != mode:
            valid |= _FATTR_MODE
            _U32.pack_into(message, BODY + 68, killed)
    _U32.pack_into(message, BODY, valid & ~_FATTR_KILL)
    _U64.pack_into(message, 16, driver_id)
    s.send(pending, unique, message)


def plain(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """A request with nothing to translate in it but the node's id."""
    op = message[4] | message[5] << 8
    refused = s.refused.get(op)
    if refused is not None:
        s.counters.local_answers += 1
        s.answer_error(unique, refused)
        return
    if not s.connected and op in REMEMBERED:
        known = s.remembered.find(node_id, op, bytes(message[BODY:]))
        if known is not None:
            s.counters.stale_hits += 1
            error, body = known
            if error:
                s.answer_error(unique, error, by="cache")
            else:
                s.answer(unique, body, by="cache")
            return
    slot = s.nodes.slot(node_id)
    s.forward(op, unique, node_id, slot, message)


def _apply_umask(s: Service, message: memoryview, mode_at: int, umask_at: int) -> None:
    """The kernel leaves the umask to us (DONT_MASK); a driver that knows nothing of it gets the mode masked."""
    if not s.terms.masks and not s.config.acl:
        mode = _U32.unpack_from(message, mode_at)[0]
        _U32.pack_into(message, mode_at, mode & ~(_U32.unpack_from(message, umask_at)[0] & 0o777))


def mknod(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """MKNOD."""
    slot = s.nodes.slot(node_id)
    driver_id = s.nodes.driver(slot)
    pending = s.keep(8, node_id, slot, message)
    _apply_umask(s, message, BODY, BODY + 8)
    _U64.pack_into(message, 16, driver_id)
    s.send(pending, unique, message)


def mkdir(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """MKDIR."""
    slot = s.nodes.slot(node_id)
    driver_id = s.nodes.driver(slot)
    pending = s.keep(9, node_id, slot, message)
    _apply_umask(s, message, BODY, BODY + 4)
    _U64.pack_into(message, 16, driver_id)
    s.send(pending, unique, message)


def create(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """CREATE and TMPFILE (whose name is a placeholder)."""
    op = message[4]
    refused = s.refused.get(op)
    if refused is not None:
        s.counters.local_answers += 1
        s.answer_error(unique, refused)
        return
    slot = s.nodes.slot(node_id)
    driver_id = s.nodes.driver(slot)
    pending = s.keep(op, node_id, slot, message)
    _apply_umask(s, message, BODY + 4, BODY + 8)
    flags = _U32.unpack_from(message, BODY)[0]
    _U32.pack_into(message, BODY, flags & ~(os.O_APPEND | os.O_DIRECT))
    _U64.pack_into(message, 16, driver_id)
    s.send(pending, unique, message)


def unlink(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """UNLINK: what is open must be opened at the driver while the name is there, and be found by the next one too."""
    slot = s.nodes.slot(node_id)
    name = bytes(message[BODY:-1])
    target = s.nodes.child(slot, name)
    if target and s.nodes.opens[target] and (tasks.unopened(s, target) or needs_hiding(s, target)):
        request = bytes(message)
        s.start(unique, 10, request, tasks.keep_first(s, unique, node_id, request, target, slot, name, goes=True))
        return
    s.forward(10, unique, node_id, slot, message)


def rename(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """RENAME and RENAME2."""
    op = message[4]
    if s.refused.get(op) is not None:
        s.answer_error(unique, s.refused[op])
        return
    start = BODY + (8 if op == Opcode.RENAME else 16)
    new_parent = s.nodes.slot(_U64.unpack_from(message, BODY)[0])
    new_name = bytes(message[start:]).split(b"\0")[1]
    target = s.nodes.child(new_parent, new_name)
    goes = op == Opcode.RENAME or not _U32.unpack_from(message, BODY + 8)[0] & _RENAME_EXCHANGE
    if target and s.nodes.opens[target] and (tasks.unopened(s, target) or (goes and needs_hiding(s, target))):
        request = bytes(message)
        s.start(
            unique, op, request, tasks.keep_first(s, unique, node_id, request, target, new_parent, new_name, goes=goes)
        )
        return
    forward_rename(s, unique, node_id, message)


def link(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """LINK: the header names the directory, the body the file."""
    slot = s.nodes.slot(node_id)
    driver_id = s.nodes.driver(slot)
    target_id = s.nodes.driver(s.nodes.slot(_U64.unpack_from(message, BODY)[0]))
    pending = s.keep(13, node_id, slot, message)
    _U64.pack_into(message, 16, driver_id)
    _U64.pack_into(message, BODY, target_id)
    s.send(pending, unique, message)


def setxattr(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """SETXATTR: the kernel's longer header (SETXATTR_EXT) becomes the one that every driver reads."""
    refused = s.refused.get(21)
    if refused is not None:
        s.counters.local_answers += 1
        s.answer_error(unique, refused)
        return
    slot = s.nodes.slot(node_id)
    request = bytes(message)
    kill = _U32.unpack_from(message, BODY + 8)[0] & _ACL_KILL
    short = bytearray(request[: BODY + 8] + request[BODY + 16 :])
    _U32.pack_into(short, 0, len(short))
    s.changes(slot)
    if s.config.recover and not kill and _U32.unpack_from(message, BODY + 4)[0] & os.XATTR_CREATE:
        name = request[BODY + 16 :].partition(b"\0")[0]
        s.start(unique, 21, request, tasks.note_xattr_first(s, unique, slot, request, bytes(short), name))
        return
    if kill and s.nodes.mode(slot) & stat.S_ISGID:
        s.start(unique, 21, request, tasks.set_acl_then_kill(s, unique, slot, request, bytes(short[BODY:])))
        return
    driver_id = s.nodes.driver(slot)
    pending = s.keep(21, node_id, slot, message)
    _U64.pack_into(short, 16, driver_id)
    s.send(pending, unique, short)


def removexattr(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """REMOVEXATTR changes the change time, and the mode when it is an ACL."""
    slot = s.nodes.slot(node_id)
    s.changes(slot)
    if s.config.recover and Opcode.REMOVEXATTR not in s.refused:
        request = bytes(message)
        name = request[BODY:].partition(b"\0")[0]
        s.start(unique, 24, request, tasks.note_xattr_first(s, unique, slot, request, request, name))
        return
    plain(s, unique, node_id, message)


def forget(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """FORGET: never answered."""
    _forget(s, node_id, _U64.unpack_from(message, BODY)[0])


def batch_forget(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """BATCH_FORGET: never answered."""
    for index in range(_U32.unpack_from(message, BODY)[0]):
        _forget(s, *_PAIR.unpack_from(message, BODY + 8 + 16 * index))


def _forget(s: Service, node_id: int, count: int) -> None:
    slot = s.nodes.slot(node_id)
    if slot:
        s.nodes.forget(slot, count)
        if not s.nodes.slot(node_id):
            s.remembered.forget(node_id)


def statfs(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """STATFS: from the last answer when there is no driver, so that df never hangs on a dead one."""
    if not s.connected and s.statfs is not None:
        s.counters.statfs_hits += 1
        s.answer(unique, s.statfs, by="cache")
        return
    s.forward(17, unique, node_id, s.nodes.slot(node_id), message)


def interrupt(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """INTERRUPT: never answered itself."""
    patience.interrupt(s, _U64.unpack_from(message, BODY)[0])


def destroy(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """DESTROY: the kernel sends it only to block-device mounts; the answer is all it wants."""
    s.answer(unique)


def notify_reply(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """NOTIFY_REPLY: data that a driver retrieved from the page cache; goes to it and is not answered."""
    slot = s.nodes.slot(node_id)
    if slot and s.connected and s.nodes.is_resolved(slot):
        _U64.pack_into(message, 16, s.nodes.driver(slot))
        s.link.send(message)


HANDLERS: dict[int, Handler] = {
    Opcode.LOOKUP: lookup,
    Opcode.FORGET: forget,
    Opcode.GETATTR: getattr_,
    Opcode.SETATTR: setattr_,
    Opcode.READLINK: plain,
    Opcode.SYMLINK: plain,
    Opcode.MKNOD: mknod,
    Opcode.MKDIR: mkdir,
    Opcode.UNLINK: unlink,
    Opcode.RMDIR: plain,
    Opcode.RENAME: rename,
    Opcode.LINK: link,
    Opcode.OPEN: open_files.open_,
    Opcode.READ: open_files.read,
    Opcode.WRITE: open_files.write,
    Opcode.STATFS: statfs,
    Opcode.RELEASE: open_files.release,
    Opcode.FSYNC: open_files.with_handle,
    Opcode.SETXATTR: setxattr,
    Opcode.GETXATTR: plain,
    Opcode.LISTXATTR: plain,
    Opcode.REMOVEXATTR: removexattr,
    Opcode.FLUSH: open_files.flush,
    Opcode.OPENDIR: open_files.open_,
    Opcode.READDIR: open_files.readdir,
    Opcode.RELEASEDIR: open_files.release,
    Opcode.FSYNCDIR: open_files.with_handle,
    Opcode.GETLK: open_files.with_handle,
    Opcode.SETLK: open_files.with_handle,
    Opcode.SETLKW: open_files.with_handle,
    Opcode.ACCESS: plain,
    Opcode.CREATE: create,
    Opcode.INTERRUPT: interrupt,
    Opcode.BMAP: plain,
    Opcode.DESTROY: destroy,
    Opcode.IOCTL: open_files.with_handle,
    Opcode.POLL: open_files.with_handle,
    Opcode.NOTIFY_REPLY: notify_reply,
    Opcode.BATCH_FORGET: batch_forget,
    Opcode.FALLOCATE: open_files.fallocate,
    Opcode.READDIRPLUS: open_files.readdir,
    Opcode.RENAME2: rename,
    Opcode.LSEEK: open_files.with_handle,
    Opcode.COPY_FILE_RANGE: open_files.copy_file_range,
    Opcode.SYNCFS: plain,
    Opcode.TMPFILE: create,
    Opcode.STATX: statx,
    Opcode.COPY_FILE_RANGE_64: open_files.copy_file_range,
}
