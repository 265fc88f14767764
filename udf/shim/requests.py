"""What the shim does with each kernel request: answer it from what it knows, or send it to the driver.

One function for each opcode, in the table `HANDLERS`; each is given the service, the request's id, the node id of its
header and the whole message in a buffer that it may change. Kernel rules that an answer rests on stand beside it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from struct import Struct
from time import monotonic
from typing import TYPE_CHECKING

from udf.fuse.flags import Fattr, Fopen, GetattrFlag, SetxattrFlag, WriteFlag
from udf.fuse.opcodes import Opcode
from udf.fuse.structs import ENTRY_OUT, IN_HEADER, OPEN_OUT
from udf.shim import tasks
from udf.shim.handles import Handle
from udf.shim.nodes import ATTR_SIZE, FOREVER, OPEN_FLAGS_SHIFT, OPENED_DIR, OPENED_READ, OPENED_WRITE

if TYPE_CHECKING:
    from udf.shim.service import Service

BODY = IN_HEADER.size
_U32 = Struct("=I")
_U64 = Struct("=Q")
_pack_open = OPEN_OUT.pack
_ATTR_HEAD = Struct("=QI4x")
_NEGATIVE = ENTRY_OUT.pack(*[0] * len(ENTRY_OUT.fields))
_NEGATIVE_FOREVER = Struct("=QQQ").pack(0, 0, FOREVER) + _NEGATIVE[24:]

# Toward the driver an open has none of these: offsets are the kernel's, truncation came as a SETATTR before,
# and a handle may be opened a second time.
STRIPPED = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_APPEND | os.O_DIRECT
_KEEP_CACHE = int(Fopen.KEEP_CACHE)
_DIRECT_IO = int(Fopen.DIRECT_IO)
_CACHE_DIR = int(Fopen.CACHE_DIR)
_NOFLUSH = int(Fopen.NOFLUSH)
_GETATTR_FH = int(GetattrFlag.FH)
_FATTR_FH = int(Fattr.FH)
_FATTR_MODE = int(Fattr.MODE)
_FATTR_OWNER = int(Fattr.UID | Fattr.GID)
_FATTR_KILL = int(Fattr.KILL_SUIDGID)
_WRITE_KILL = int(WriteFlag.KILL_SUIDGID)
_ACL_KILL = int(SetxattrFlag.ACL_KILL_SGID)

Handler = Callable[["Service", int, int, memoryview], None]


def lookup(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """LOOKUP: from the name cache while entry and attributes are valid."""
    slot = s.nodes.slot(node_id)
    name = bytes(message[BODY:-1])
    now = monotonic()
    child = s.nodes.cached(slot, name, now)
    if child:
        s.counters.name_hits += 1
        s.nodes.lookups[child] += 1
        s.answer(unique, s.nodes.pack_entry(child, s.nodes.link(slot, name), now), by="cache")
        return
    if s.nodes.negatives:
        until = s.nodes.negatives.get((slot, name))
        if until is not None and until > now:
            s.counters.negative_hits += 1
            valid = until - now
            s.answer(unique, _NEGATIVE_FOREVER if valid > FOREVER / 2 else negative(valid), by="cache")
            return
    s.forward(1, unique, node_id, slot, message)


def negative(valid: float) -> bytes:
    """Return the entry that says for *valid* seconds that there is no such name."""
    return Struct("=QQQQII").pack(0, 0, int(valid), 0, int(valid % 1 * 1e9), 0) + _NEGATIVE[40:]


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
    pending = s.keep(3, node_id, slot, message)
    _U64.pack_into(message, 16, nodes.driver_id[slot])
    _drop_unknown_handle(s, message)
    s.send(pending, unique, message)


def statx(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """STATX: only asked for what GETATTR does not give (birth time); most drivers refuse it, once."""
    if Opcode.STATX in s.refused:
        s.counters.local_answers += 1
        s.answer_error(unique, s.refused[Opcode.STATX])
        return
    slot = s.nodes.slot(node_id)
    pending = s.keep(Opcode.STATX, node_id, slot, message)
    _drop_unknown_handle(s, message)
    _U64.pack_into(message, 16, s.nodes.driver_id[slot])
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
    pending = s.keep(4, node_id, slot, message)
    nodes.touch(slot)
    valid = _U32.unpack_from(message, BODY)[0]
    if valid & _FATTR_FH:
        handle = s.handles.get(_U64.unpack_from(message, BODY + 8)[0])
        if handle is None or handle.driver_handle is None:
            valid &= ~_FATTR_FH
            _U64.pack_into(message, BODY + 8, 0)
        else:
            _U64.pack_into(message, BODY + 8, handle.driver_handle)
    mode = nodes.mode(slot)
    if valid & (_FATTR_KILL | _FATTR_OWNER) and not valid & _FATTR_MODE and not stat.S_ISDIR(mode):
        killed = without_suid(mode)
        if killed != mode:
            valid |= _FATTR_MODE
            _U32.pack_into(message, BODY + 68, killed)
    _U32.pack_into(message, BODY, valid & ~_FATTR_KILL)
    _U64.pack_into(message, 16, nodes.driver_id[slot])
    s.send(pending, unique, message)


def without_suid(mode: int) -> int:
    """Return *mode* without what a write, truncation or change of owner takes away (setattr_should_drop_suidgid)."""
    mode &= ~stat.S_ISUID
    return mode & ~stat.S_ISGID if mode & stat.S_IXGRP else mode


def plain(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """A request with nothing to translate in it but the node's id."""
    op = message[4] | message[5] << 8
    refused = s.refused.get(op)
    if refused is not None:
        s.counters.local_answers += 1
        s.answer_error(unique, refused)
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
    pending = s.keep(8, node_id, slot, message)
    _apply_umask(s, message, BODY, BODY + 8)
    _U64.pack_into(message, 16, s.nodes.driver_id[slot])
    s.send(pending, unique, message)


def mkdir(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """MKDIR."""
    slot = s.nodes.slot(node_id)
    pending = s.keep(9, node_id, slot, message)
    _apply_umask(s, message, BODY, BODY + 4)
    _U64.pack_into(message, 16, s.nodes.driver_id[slot])
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
    pending = s.keep(op, node_id, slot, message)
    _apply_umask(s, message, BODY + 4, BODY + 8)
    flags = _U32.unpack_from(message, BODY)[0]
    _U32.pack_into(message, BODY, flags & ~(os.O_APPEND | os.O_DIRECT))
    _U64.pack_into(message, 16, s.nodes.driver_id[slot])
    s.send(pending, unique, message)


def unlink(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """UNLINK: a handle that the driver has not been told of yet must be opened while the name is there."""
    slot = s.nodes.slot(node_id)
    target = s.nodes.child(slot, bytes(message[BODY:-1]))
    if target and s.nodes.opens[target] and tasks.unopened(s, target):
        request = bytes(message)
        s.start(unique, 10, request, tasks.open_first(s, unique, node_id, request, target))
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
    if target and s.nodes.opens[target] and tasks.unopened(s, target):
        request = bytes(message)
        s.start(unique, op, request, tasks.open_first(s, unique, node_id, request, target))
        return
    forward_rename(s, unique, node_id, message)


def forward_rename(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """Send a rename to the driver."""
    slot = s.nodes.slot(node_id)
    pending = s.keep(message[4], node_id, slot, message)
    new_parent = s.nodes.slot(_U64.unpack_from(message, BODY)[0])
    _U64.pack_into(message, 16, s.nodes.driver_id[slot])
    _U64.pack_into(message, BODY, s.nodes.driver_id[new_parent])
    s.send(pending, unique, message)


def link(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """LINK: the header names the directory, the body the file."""
    slot = s.nodes.slot(node_id)
    pending = s.keep(13, node_id, slot, message)
    target = s.nodes.slot(_U64.unpack_from(message, BODY)[0])
    _U64.pack_into(message, 16, s.nodes.driver_id[slot])
    _U64.pack_into(message, BODY, s.nodes.driver_id[target])
    s.send(pending, unique, message)


NEEDED = {os.O_RDONLY: OPENED_READ, os.O_WRONLY: OPENED_WRITE, os.O_RDWR: OPENED_READ | OPENED_WRITE}


def open_(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """OPEN and OPENDIR: answered here if the driver has accepted the like before (or its manifest says always).

    The driver's own open follows at the first request that needs it; the kernel has checked the permissions.
    """
    nodes = s.nodes
    slot = nodes.slot(node_id)
    is_dir = message[4] == Opcode.OPENDIR
    flags = _U32.unpack_from(message, BODY)[0]
    policy = s.config.open
    known = nodes.flags[slot]
    needed = OPENED_DIR if is_dir else NEEDED.get(flags & os.O_ACCMODE, OPENED_READ | OPENED_WRITE)
    if policy == "lazy" or (known & needed == needed and policy == "known"):
        s.counters.open_hits += 1
        handle = s.handles.add(slot, flags, is_dir, None)
        nodes.opens[slot] += 1
        s.answer(unique, open_reply(s, handle, known >> OPEN_FLAGS_SHIFT), by="cache")
        return
    pending = s.keep(message[4], node_id, slot, message)
    _U64.pack_into(message, 16, nodes.driver_id[slot])
    _U32.pack_into(message, BODY, flags & ~STRIPPED)
    s.send(pending, unique, message)


def open_reply(s: Service, handle: Handle, fopen: int) -> bytes:
    """Return the OPEN_OUT for *handle*, with the driver's *fopen* flags and what the mount's contract adds."""
    if not fopen & _DIRECT_IO and (s.exclusive or s.config.open == "lazy"):
        fopen |= _KEEP_CACHE
    if handle.is_dir:
        fopen = fopen | _CACHE_DIR | _KEEP_CACHE if s.exclusive else fopen
    elif handle.flags & os.O_ACCMODE == os.O_RDONLY and handle.driver_handle is None and not s.config.locks:
        fopen |= _NOFLUSH  # nothing was written through it, and no lock is the driver's
    return _pack_open(handle.number, fopen, 0)


def read(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """READ, the hot one."""
    handle = s.handles.get(_U64.unpack_from(message, BODY)[0])
    if handle is None:
        s.answer_error(unique, errno.EBADF)
    elif handle.driver_handle is None:
        _open_then(s, unique, node_id, message, handle)
    else:
        s.forward(15, unique, node_id, handle.slot, message, handle)


def write(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """WRITE. For a caller that may not keep them (KILL_SUIDGID) suid and sgid go first."""
    handle = s.handles.get(_U64.unpack_from(message, BODY)[0])
    if handle is None:
        s.answer_error(unique, errno.EBADF)
        return
    slot = handle.slot
    if message[BODY + 20] & _WRITE_KILL:
        mode = s.nodes.mode(slot)
        if without_suid(mode) != mode:
            request = bytes(message)
            s.start(unique, 16, request, tasks.kill_suid_first(s, unique, node_id, request, slot))
            return
        message[BODY + 20] &= ~_WRITE_KILL
    if handle.driver_handle is None:
        _open_then(s, unique, node_id, message, handle)
        return
    s.nodes.touch(slot)
    s.forward(16, unique, node_id, slot, message, handle)


def _open_then(s: Service, unique: int, node_id: int, message: memoryview, handle: Handle) -> None:
    request = bytes(message)
    s.start(unique, message[4], request, tasks.open_then_again(s, unique, node_id, request, handle))


def with_handle(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """A request that begins with a handle, which the driver must have opened."""
    op = message[4]
    refused = s.refused.get(op)
    if refused is not None:
        s.counters.local_answers += 1
        s.answer_error(unique, refused)
        return
    handle = s.handles.get(_U64.unpack_from(message, BODY)[0])
    if handle is None:
        s.answer_error(unique, errno.EBADF)
    elif handle.driver_handle is None:
        _open_then(s, unique, node_id, message, handle)
    else:
        s.forward(op, unique, node_id, handle.slot, message, handle)


def flush(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """FLUSH: of a handle that the driver does not know there is nothing to flush."""
    handle = s.handles.get(_U64.unpack_from(message, BODY)[0])
    if handle is None or handle.driver_handle is None:
        s.counters.local_answers += 1
        s.answer(unique)
    else:
        s.forward(25, unique, node_id, handle.slot, message, handle)


def fallocate(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """FALLOCATE changes size and blocks, and takes suid and sgid from a caller that is not root."""
    handle = s.handles.get(_U64.unpack_from(message, BODY)[0])
    if handle is not None and Opcode.FALLOCATE not in s.refused:
        mode = s.nodes.mode(handle.slot)
        if _U32.unpack_from(message, 24)[0] and without_suid(mode) != mode:
            request = bytes(message)
            s.start(unique, 43, request, tasks.kill_suid_first(s, unique, node_id, request, handle.slot))
            return
        s.nodes.touch(handle.slot)
    with_handle(s, unique, node_id, message)


def copy_file_range(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """COPY_FILE_RANGE and _64: two handles, two nodes."""
    op = message[4]
    if op in s.refused:
        s.counters.local_answers += 1
        s.answer_error(unique, s.refused[op])
        return
    source = s.handles.get(_U64.unpack_from(message, BODY)[0])
    target = s.handles.get(_U64.unpack_from(message, BODY + 24)[0])
    if source is None or target is None:
        s.answer_error(unique, errno.EBADF)
        return
    for handle in (source, target):
        if handle.driver_handle is None:
            _open_then(s, unique, node_id, message, handle)
            return
    s.nodes.touch(target.slot)
    pending = s.keep(op, node_id, source.slot, message)
    pending.handle = target
    _U64.pack_into(message, 16, s.nodes.driver_id[source.slot])
    _U64.pack_into(message, BODY, source.driver_handle or 0)
    _U64.pack_into(message, BODY + 16, s.nodes.driver_id[target.slot])
    _U64.pack_into(message, BODY + 24, target.driver_handle or 0)
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
    s.nodes.touch(slot)
    if kill and s.nodes.mode(slot) & stat.S_ISGID:
        s.start(unique, 21, request, tasks.set_acl_then_kill(s, unique, slot, request, bytes(short[BODY:])))
        return
    pending = s.keep(21, node_id, slot, message)
    _U64.pack_into(short, 16, s.nodes.driver_id[slot])
    s.send(pending, unique, short)


def removexattr(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """REMOVEXATTR changes the change time, and the mode when it is an ACL."""
    s.nodes.touch(s.nodes.slot(node_id))
    plain(s, unique, node_id, message)


def readdir(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """READDIR and READDIRPLUS: from the handle's listing, which is fetched chunk by chunk."""
    handle = s.handles.get(_U64.unpack_from(message, BODY)[0])
    if handle is None:
        s.answer_error(unique, errno.EBADF)
        return
    offset = _U64.unpack_from(message, BODY + 8)[0]
    size = _U32.unpack_from(message, BODY + 16)[0]
    plus = message[4] == Opcode.READDIRPLUS
    if s.listings.serve(s, unique, handle, offset, size, plus):
        return
    request = bytes(message)
    s.start(unique, message[4], request, s.listings.fetch(s, unique, handle, offset, size, plus))


def release(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """RELEASE and RELEASEDIR: nobody waits for them, so the kernel has its answer before the driver hears of it."""
    handle = s.handles.get(_U64.unpack_from(message, BODY)[0])
    s.counters.local_answers += 1
    s.answer(unique)
    if handle is None:
        return
    s.handles.remove(handle)
    if handle.driver_handle is not None and s.alive:
        _U64.pack_into(message, BODY, handle.driver_handle)
        tasks.post(s, message[4], s.nodes.driver_id[handle.slot], bytes(message[BODY:]), bytes(message))
    if handle.listing is not None:
        s.listings.closed(s, handle)
    s.nodes.closed(handle.slot)


def forget(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """FORGET: never answered."""
    slot = s.nodes.slot(node_id)
    if slot:
        s.nodes.forget(slot, _U64.unpack_from(message, BODY)[0])


def batch_forget(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """BATCH_FORGET: never answered."""
    pairs = Struct("=QQ")
    for index in range(_U32.unpack_from(message, BODY)[0]):
        node, count = pairs.unpack_from(message, BODY + 8 + 16 * index)
        slot = s.nodes.slot(node)
        if slot:
            s.nodes.forget(slot, count)


def statfs(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """STATFS: from the last answer when there is no driver, so that df never hangs on a dead one."""
    if not s.alive and s.statfs is not None:
        s.counters.statfs_hits += 1
        s.answer(unique, s.statfs, by="cache")
        return
    s.forward(17, unique, node_id, s.nodes.slot(node_id), message)


def interrupt(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """INTERRUPT: never answered itself."""
    s.interrupt(_U64.unpack_from(message, BODY)[0])


def destroy(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """DESTROY: the kernel sends it only to block-device mounts; the answer is all it wants."""
    s.answer(unique)


def notify_reply(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """NOTIFY_REPLY: data that a driver retrieved from the page cache; goes to it and is not answered."""
    slot = s.nodes.slot(node_id)
    if slot and s.alive:
        _U64.pack_into(message, 16, s.nodes.driver_id[slot])
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
    Opcode.OPEN: open_,
    Opcode.READ: read,
    Opcode.WRITE: write,
    Opcode.STATFS: statfs,
    Opcode.RELEASE: release,
    Opcode.FSYNC: with_handle,
    Opcode.SETXATTR: setxattr,
    Opcode.GETXATTR: plain,
    Opcode.LISTXATTR: plain,
    Opcode.REMOVEXATTR: removexattr,
    Opcode.FLUSH: flush,
    Opcode.OPENDIR: open_,
    Opcode.READDIR: readdir,
    Opcode.RELEASEDIR: release,
    Opcode.FSYNCDIR: with_handle,
    Opcode.GETLK: with_handle,
    Opcode.SETLK: with_handle,
    Opcode.SETLKW: with_handle,
    Opcode.ACCESS: plain,
    Opcode.CREATE: create,
    Opcode.INTERRUPT: interrupt,
    Opcode.BMAP: plain,
    Opcode.DESTROY: destroy,
    Opcode.IOCTL: with_handle,
    Opcode.POLL: with_handle,
    Opcode.NOTIFY_REPLY: notify_reply,
    Opcode.BATCH_FORGET: batch_forget,
    Opcode.FALLOCATE: fallocate,
    Opcode.READDIRPLUS: readdir,
    Opcode.RENAME2: rename,
    Opcode.LSEEK: with_handle,
    Opcode.COPY_FILE_RANGE: copy_file_range,
    Opcode.SYNCFS: plain,
    Opcode.TMPFILE: create,
    Opcode.STATX: statx,
    Opcode.COPY_FILE_RANGE_64: copy_file_range,
}
