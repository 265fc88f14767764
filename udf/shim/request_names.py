"""Where the names stand in the kernel's requests: one table for all that read them.

Sources: include/uapi/linux/fuse.h, the structures that come before the (first) name of each request.
"""

from __future__ import annotations

from udf.fuse.opcodes import Opcode
from udf.fuse.structs import IN_HEADER

NAME_AT: dict[int, int] = {
    Opcode.LOOKUP: 0,
    Opcode.UNLINK: 0,
    Opcode.RMDIR: 0,
    Opcode.SYMLINK: 0,
    Opcode.MKNOD: 16,
    Opcode.MKDIR: 8,
    Opcode.CREATE: 16,
    Opcode.TMPFILE: 16,  # a placeholder
    Opcode.LINK: 8,
    Opcode.RENAME: 8,
    Opcode.RENAME2: 16,
}


def first_name(op: int, request: bytes | memoryview) -> bytes:
    """Return the (first) name in a whole request."""
    return bytes(request[IN_HEADER.size + NAME_AT[op] :]).partition(b"\0")[0]


def with_name(path: str, op: int, request: bytes | memoryview) -> str:
    """Return what a request is about, for people: *path* is its node's; where it names something there, that."""
    if op not in NAME_AT or op == Opcode.TMPFILE:
        return path
    return f"{path.rstrip('/')}/{first_name(op, request).decode('utf-8', 'backslashreplace')}"
