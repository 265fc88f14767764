"""Changes that were given up while a driver had been told of them: whether they were made, nobody knows.

Owns: what is forgotten then, here and in the kernel, so that the next driver is asked. Without that a mount whose
caches are good for ever would go on showing a name that is gone, or hide one that was made.
Called by: recovery.py and patience.py, when they answer such a request.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

from udf.fuse.flags import WriteFlag
from udf.fuse.opcodes import Opcode
from udf.fuse.structs import IN_HEADER
from udf.shim.replay import PURE
from udf.shim.request_names import NAME_AT

if TYPE_CHECKING:
    from udf.shim.service import Service

BODY = IN_HEADER.size
_U64 = Struct("=Q")
_U32 = Struct("=I")
_WRITE_CACHE = int(WriteFlag.CACHE)
_RENAMES = (Opcode.RENAME, Opcode.RENAME2)
_PAGES = frozenset((int(Opcode.FALLOCATE), int(Opcode.COPY_FILE_RANGE), int(Opcode.COPY_FILE_RANGE_64)))


def is_from_page_cache(op: int, request: bytes | bytearray | memoryview) -> bool:
    """Whether this writes pages that a program changed through a mapping."""
    return op == Opcode.WRITE and bool(_U32.unpack_from(request, BODY + 20)[0] & _WRITE_CACHE)


def doubt(s: Service, op: int, request: bytes) -> None:
    """Forget what a change that may have been made may have changed."""
    if op in PURE:
        return
    nodes = s.nodes
    slot = nodes.slot(IN_HEADER.unpack_from(request)[3])
    touched = {slot}
    if op in NAME_AT:
        names = request[BODY + NAME_AT[op] :].split(b"\0")
        places = [(slot, names[0])]
        if op in _RENAMES:
            places.append((nodes.slot(_U64.unpack_from(request, BODY)[0]), names[1]))
        elif op == Opcode.LINK:
            touched.add(nodes.slot(_U64.unpack_from(request, BODY)[0]))
        for parent, name in places:
            if parent:
                touched.update((parent, nodes.child(parent, name)))
                nodes.expire(parent, name)
                s.notifier.expire(nodes.node_id(parent), name)
    elif op in (Opcode.COPY_FILE_RANGE, Opcode.COPY_FILE_RANGE_64):
        touched.add(nodes.slot(_U64.unpack_from(request, BODY + 16)[0]))
    for each in touched - {0}:
        node_id = nodes.node_id(each)
        nodes.touch(each)
        s.remembered.forget(node_id)
        s.notifier.invalidate(node_id, pages=op in _PAGES)
