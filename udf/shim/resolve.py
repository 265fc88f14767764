"""Finding a node again in a new generation of the driver: by its names, from the root down, when it is needed.

Owns: the look-ups of our own that this takes. What is found must be the file that the node was: else ESTALE, never
another file's bytes. Nothing is done for nodes that nobody asks for, so recovery does not cost with the tree's size.
"""

from __future__ import annotations

import errno
from struct import Struct
from typing import TYPE_CHECKING

from udf.fuse.opcodes import Opcode
from udf.fuse.structs import ENTRY_OUT, IN_HEADER
from udf.shim.graph import ROOT
from udf.shim.inflight import Ask, Refuse, Steps
from udf.shim.stale import answer_stale, removed_directory

if TYPE_CHECKING:
    from collections.abc import Generator

    from udf.shim.service import Service

_U64 = Struct("=Q")
_DEEPEST = 4096  # directories in a path; PATH_MAX allows no more
_LOST = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ELOOP, errno.ENAMETOOLONG)


def resolve(s: Service, slot: int) -> Generator[Ask, tuple[int, bytes], int]:
    """Return the driver's id of *slot*, looked up again if need be. Raises Refuse(ESTALE) if it is not there."""
    nodes = s.nodes
    while not nodes.is_resolved(slot):
        # The highest directory that is not resolved comes first; its parent is.
        at, depth = slot, 0
        while True:
            links = nodes.links_of(at)
            if not links or depth > _DEEPEST:
                raise Refuse(errno.ESTALE)
            parent = next((parent for parent, _ in links if nodes.is_resolved(parent)), links[0][0])
            if nodes.is_resolved(parent):
                break
            at, depth = parent, depth + 1
        yield from _find_again(s, at)
    return nodes.driver(slot)


def _find_again(s: Service, slot: int) -> Generator[Ask, tuple[int, bytes], None]:
    """Look up the names of a node, one after the other, until one is the same file. Raises Refuse."""
    nodes = s.nodes
    error = errno.ESTALE
    nodes.pins[slot] += 1
    try:
        for parent, name in nodes.links_of(slot):
            if not nodes.is_resolved(parent):
                try:
                    yield from resolve(s, parent)
                except Refuse:
                    continue
            failed, entry = yield from look(s, parent, name)
            if nodes.is_resolved(slot):
                forget_look(s, failed, entry)  # another request was quicker
                return
            if not failed and nodes.rebind(slot, entry, 0):
                s.counters.resolved += 1
                return
            forget_look(s, failed, entry)
            if failed and failed not in _LOST:
                error = failed
    finally:
        s.unpin(slot)
    raise Refuse(error)


def look(s: Service, parent: int, name: bytes) -> Generator[Ask, tuple[int, bytes], tuple[int, bytes]]:
    """Look *name* up in the resolved *parent*, binding nothing: (errno or 0, entry). The driver counts a lookup."""
    failed, entry = yield Ask(Opcode.LOOKUP, s.nodes.driver(parent), name + b"\0")
    if not failed and len(entry) != ENTRY_OUT.size:
        s.fault(Opcode.LOOKUP, "length", f"an answer of {len(entry)} bytes instead of {ENTRY_OUT.size}")
        return errno.EIO, b""
    if not failed and _U64.unpack_from(entry)[0] == 0:
        return errno.ENOENT, b""
    return failed, entry


def forget_look(s: Service, failed: int, entry: bytes) -> None:
    """Give back the lookup that a look has cost the driver."""
    if not failed:
        driver_id: int = _U64.unpack_from(entry)[0]
        if driver_id > ROOT:
            s.nodes.forgets.append((driver_id, 1))


def resolve_then_again(s: Service, unique: int, node_id: int, request: bytes, slot: int) -> Steps:
    """Have the driver know *slot*, then go on with the request."""
    body = removed_directory(s, slot) if IN_HEADER.unpack_from(request)[1] == Opcode.GETATTR else None
    if body is None:
        yield from resolve(s, slot)
        s.again(unique, node_id, request)
    elif s.tasks.pop(unique, None) is not None:
        s.interrupted.pop(unique, None)
        answer_stale(s, unique, body)
