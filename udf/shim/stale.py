"""What programs are told while there is no driver to ask: what was true when there last was one.

Owns: answers from what is known although its time is over, and what must be known for that. The kernel may keep them
for a moment, so that programs are not slower than with a driver; the next driver is asked when that is over.
Called by: the loop at its start, and whatever answers (requests.py, listings.py, patience.py, …) without a driver.
"""

from __future__ import annotations

from struct import Struct
from time import monotonic
from typing import TYPE_CHECKING

from udf.fuse.opcodes import Opcode
from udf.fuse.structs import ATTR_OUT, GETATTR_IN, GETXATTR_IN, GETXATTR_OUT, STATFS_OUT
from udf.shim.graph import ATTR_SIZE, ROOT
from udf.shim.inflight import Ask
from udf.shim.nodes import BadEntry

if TYPE_CHECKING:
    from udf.shim.inflight import Steps
    from udf.shim.service import Service

STALE_FOR = 1  # seconds
_ATTR_HEAD = Struct("=QI4x")
_ENTRY_TIMES = Struct("=QQII")  # of an entry, behind node id and generation
_U32 = Struct("=I")
_NLINK_AT = ATTR_OUT.offset("attr.nlink")
_LISTED = (b"system.posix_acl_access", b"system.posix_acl_default", b"security.selinux")  # what ls -l asks for


def stale_attributes(s: Service, slot: int) -> bytes | None:
    """Return the ATTR_OUT of a node as it was last seen; None if it never was, or has changed since.

    An old size would not only be wrong: the kernel cuts the file's pages to it.
    """
    if not (is_unchanged(s, slot) or (slot == ROOT and s.nodes.mode(ROOT))):  # ls of the parent asks for the root
        return None
    return _ATTR_HEAD.pack(STALE_FOR, 0) + bytes(s.nodes.attrs[slot * ATTR_SIZE : slot * ATTR_SIZE + ATTR_SIZE])


def stale_entry(s: Service, slot: int, link: int) -> bytes:
    """Return the entry of a name and its node as they were last seen."""
    entry = bytearray(s.nodes.pack_entry(slot, link, 0.0))
    _ENTRY_TIMES.pack_into(entry, 16, STALE_FOR, STALE_FOR, 0, 0)
    return bytes(entry)


def is_unchanged(s: Service, slot: int) -> bool:
    """Whether nothing is known to have changed since the attributes of *slot* came; only their time may be over."""
    return s.nodes.attr_until[slot] > 0.0 and s.nodes.mode(slot) != 0


def removed_directory(s: Service, slot: int) -> bytes | None:
    """Return the ATTR_OUT of a directory that was removed while somebody had it open; None if *slot* is no such node.

    No generation after that can find it, the kernel lets nothing be made in it, and who has it open may ask what it is.
    """
    nodes = s.nodes
    if nodes.mode(slot) & 0o170000 != 0o040000 or nodes.links_of(slot) or slot == ROOT:
        return None
    body = bytearray(_ATTR_HEAD.pack(0, 0) + nodes.attrs[slot * ATTR_SIZE : slot * ATTR_SIZE + ATTR_SIZE])
    _U32.pack_into(body, _NLINK_AT, 0)
    return bytes(body)


def answer_stale(s: Service, unique: int, body: bytes | None) -> bool:
    """Answer with what is known, if anything is."""
    if body is None:
        return False
    s.counters.stale_hits += 1
    s.answer(unique, body, by="cache")
    return True


def first_looks(s: Service) -> Steps:
    """Ask for what df and ls of the parent directory want, so that they never wait for a driver that is dead."""
    error, reply = yield Ask(Opcode.STATFS, ROOT, b"")
    if not error and len(reply) == STATFS_OUT.size and s.statfs is None:
        s.statfs = reply
    for name in _LISTED:
        question = GETXATTR_IN.pack(0) + name + b"\0"
        error, reply = yield Ask(Opcode.GETXATTR, ROOT, question)
        if not error and len(reply) != GETXATTR_OUT.size:
            return
        number = s.refused.get(Opcode.GETXATTR, error)
        s.remembered.keep(ROOT, Opcode.GETXATTR, question, number, reply)
    error, reply = yield Ask(Opcode.GETATTR, ROOT, bytes(GETATTR_IN.size))
    if not error and len(reply) == ATTR_OUT.size and not s.nodes.mode(ROOT):
        attributes = bytearray(reply)
        try:
            s.nodes.check_attr(ROOT, attributes, 16)
        except BadEntry as bad:
            s.fault(Opcode.GETATTR, "BadEntry", str(bad))
            return
        valid, nanoseconds = _ATTR_HEAD.unpack_from(attributes)
        s.nodes.keep_attr(ROOT, attributes, 16, monotonic() + min(valid, 1 << 40) + nanoseconds * 1e-9)
