"""Requests on open files and directories: opening without the driver, reading, writing, listing, closing.

The driver's own open follows at the first request that needs it. Called through the table in `requests`.
"""

from __future__ import annotations

import errno
import os
from math import inf
from struct import Struct
from typing import TYPE_CHECKING

from udf.fuse.flags import Fopen, WriteFlag
from udf.fuse.opcodes import Opcode
from udf.fuse.structs import IN_HEADER, OPEN_OUT
from udf.shim import tasks
from udf.shim.graph import OPEN_FLAGS_SHIFT, OPENED_DIR, OPENED_READ, OPENED_WRITE
from udf.shim.handles import Handle
from udf.shim.tasks import STRIPPED, without_suid

if TYPE_CHECKING:
    from udf.shim.service import Service

BODY = IN_HEADER.size
_U32 = Struct("=I")
_U64 = Struct("=Q")
_pack_open = OPEN_OUT.pack
_KEEP_CACHE = int(Fopen.KEEP_CACHE)
_DIRECT_IO = int(Fopen.DIRECT_IO)
_CACHE_DIR = int(Fopen.CACHE_DIR)
_NOFLUSH = int(Fopen.NOFLUSH)
_WRITE_KILL = int(WriteFlag.KILL_SUIDGID)
# What a driver may not choose: FOPEN_PASSTHROUGH would name one of our own backing files.
FOPEN_ALLOWED = int(
    Fopen.DIRECT_IO
    | Fopen.KEEP_CACHE
    | Fopen.NONSEEKABLE
    | Fopen.CACHE_DIR
    | Fopen.STREAM
    | Fopen.NOFLUSH
    | Fopen.PARALLEL_DIRECT_WRITES
)

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
    # df opens the mountpoint: without a driver, directories are opened as if it had let us before.
    is_known = known & needed == needed or (is_dir and not s.connected)
    if policy == "lazy" or (is_known and policy == "known"):
        s.counters.open_hits += 1
        handle = s.handles.add(slot, flags, is_dir, None)
        nodes.opens[slot] += 1
        fopen = known >> OPEN_FLAGS_SHIFT
        if not s.connected and not fopen & _DIRECT_IO:
            fopen |= _KEEP_CACHE  # the pages that the kernel has are all that there is until a driver comes
        s.answer(unique, open_reply(s, handle, fopen), by="cache")
        return
    driver_id = nodes.driver(slot)
    pending = s.keep(message[4], node_id, slot, message)
    _U64.pack_into(message, 16, driver_id)
    _U32.pack_into(message, BODY, flags & ~STRIPPED)
    s.send(pending, unique, message)


def open_reply(s: Service, handle: Handle, fopen: int) -> bytes:
    """Return the OPEN_OUT for *handle*, with the driver's *fopen* flags and what the mount's contract adds."""
    if not fopen & _DIRECT_IO and (s.exclusive or s.config.open == "lazy"):
        fopen |= _KEEP_CACHE
    if handle.is_dir:
        fopen = fopen | _CACHE_DIR | _KEEP_CACHE if s.exclusive else fopen
    elif handle.flags & os.O_ACCMODE == os.O_RDONLY and not s.config.locks:
        fopen |= _NOFLUSH  # nothing is written through it, and no lock is the driver's
    return _pack_open(handle.number, fopen, 0)


def read(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """READ, the hot one."""
    handle = s.handles.get(_U64.unpack_from(message, BODY)[0])
    if handle is None:
        s.answer_error(unique, errno.EBADF)
    elif handle.driver_handle is None:
        _open_then(s, unique, node_id, message, handle)
    elif s.link.mixed:
        request = bytes(message)
        s.start(unique, 15, request, tasks.read_in_pieces(s, unique, request, handle))
    else:
        s.forward(15, unique, node_id, handle.slot, message, handle)


def write(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """WRITE. For a caller that may not keep them (KILL_SUIDGID) suid and sgid go first."""
    handle = s.handles.get(_U64.unpack_from(message, BODY)[0])
    if handle is None:
        s.answer_error(unique, errno.EBADF)
        return
    slot = handle.slot
    handle.written = True
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
    if s.connected:
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
        if not refused and not s.connected and not s.recovery.lets(unique, op, node_id, message):
            return  # what a driver need not be asked for must not be said of one that is not there
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
        if op == Opcode.SETLKW and unique in s.waiting:
            s.waiting[unique].sent = inf  # whoever holds the lock may hold it for days: no deadline


def flush(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """FLUSH: of a handle that nothing was written through there is nothing to flush.

    What was changed through a mapping the kernel has written before, by a handle that it chose.
    """
    handle = s.handles.get(_U64.unpack_from(message, BODY)[0])
    has_locks = s.config.locks and handle is not None and handle.driver_handle is not None
    if handle is None or not (handle.written or has_locks):
        s.counters.local_answers += 1
        s.answer(unique)
    elif handle.driver_handle is None:
        _open_then(s, unique, node_id, message, handle)  # a driver may keep something back until it is told
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
        s.changes(handle.slot)
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
    source_id, target_id = s.nodes.driver(source.slot), s.nodes.driver(target.slot)
    s.changes(target.slot)
    pending = s.keep(op, node_id, source.slot, message)
    pending.handle = target
    _U64.pack_into(message, 16, source_id)
    _U64.pack_into(message, BODY, source.driver_handle or 0)
    _U64.pack_into(message, BODY + 16, target_id)
    _U64.pack_into(message, BODY + 24, target.driver_handle or 0)
    s.send(pending, unique, message)


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
    if handle.driver_handle is not None and s.connected:
        _U64.pack_into(message, BODY, handle.driver_handle)
        tasks.post(s, message[4], s.nodes.driver(handle.slot), bytes(message[BODY:]), bytes(message))
    if handle.listing is not None:
        s.listings.closed(s, handle)
    s.closed(handle.slot)
