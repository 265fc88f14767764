"""What becomes of a request that the driver had not answered when it died: one row for each opcode.

The same table says which requests may be answered EINTR, or asked again, at any time.
"""

from __future__ import annotations

from enum import Enum

from udf.fuse.opcodes import Opcode


class Replay(Enum):
    """How a request is treated that a dead generation may or may not have carried out."""

    PURE = "sent again: it changes nothing"
    IDEMPOTENT = "sent again: twice is the same as once"
    ONCE = "looked for: its reply is built again if it was done, else it is sent again"
    LOCAL = "answered by the shim"
    REFUSED = "EIO: nobody can know whether it was done"


REPLAY: dict[int, Replay] = {
    Opcode.LOOKUP: Replay.PURE,
    Opcode.FORGET: Replay.LOCAL,
    Opcode.GETATTR: Replay.PURE,
    Opcode.SETATTR: Replay.IDEMPOTENT,
    Opcode.READLINK: Replay.PURE,
    Opcode.SYMLINK: Replay.ONCE,
    Opcode.MKNOD: Replay.ONCE,
    Opcode.MKDIR: Replay.ONCE,
    Opcode.UNLINK: Replay.ONCE,
    Opcode.RMDIR: Replay.ONCE,
    Opcode.RENAME: Replay.ONCE,
    Opcode.LINK: Replay.ONCE,
    Opcode.OPEN: Replay.PURE,
    Opcode.READ: Replay.PURE,
    Opcode.WRITE: Replay.IDEMPOTENT,
    Opcode.STATFS: Replay.PURE,
    Opcode.RELEASE: Replay.LOCAL,
    Opcode.FSYNC: Replay.IDEMPOTENT,
    Opcode.SETXATTR: Replay.ONCE,
    Opcode.GETXATTR: Replay.PURE,
    Opcode.LISTXATTR: Replay.PURE,
    Opcode.REMOVEXATTR: Replay.ONCE,
    Opcode.FLUSH: Replay.IDEMPOTENT,
    Opcode.INIT: Replay.LOCAL,
    Opcode.OPENDIR: Replay.PURE,
    Opcode.READDIR: Replay.PURE,
    Opcode.RELEASEDIR: Replay.LOCAL,
    Opcode.FSYNCDIR: Replay.IDEMPOTENT,
    Opcode.GETLK: Replay.PURE,
    Opcode.SETLK: Replay.REFUSED,
    Opcode.SETLKW: Replay.REFUSED,
    Opcode.ACCESS: Replay.PURE,
    Opcode.CREATE: Replay.ONCE,
    Opcode.INTERRUPT: Replay.LOCAL,
    Opcode.BMAP: Replay.PURE,
    Opcode.DESTROY: Replay.LOCAL,
    Opcode.IOCTL: Replay.REFUSED,
    Opcode.POLL: Replay.PURE,
    Opcode.NOTIFY_REPLY: Replay.LOCAL,
    Opcode.BATCH_FORGET: Replay.LOCAL,
    Opcode.FALLOCATE: Replay.IDEMPOTENT,
    Opcode.READDIRPLUS: Replay.PURE,
    Opcode.RENAME2: Replay.ONCE,
    Opcode.LSEEK: Replay.PURE,
    Opcode.COPY_FILE_RANGE: Replay.IDEMPOTENT,
    Opcode.SYNCFS: Replay.IDEMPOTENT,
    Opcode.TMPFILE: Replay.IDEMPOTENT,  # the file of the lost reply has no name, and went with who held it
    Opcode.STATX: Replay.PURE,
    Opcode.COPY_FILE_RANGE_64: Replay.IDEMPOTENT,
    Opcode.SETUPMAPPING: Replay.REFUSED,  # like the following, these never come from a kernel's FUSE mount
    Opcode.REMOVEMAPPING: Replay.REFUSED,
    Opcode.CUSE_INIT: Replay.REFUSED,
    Opcode.CUSE_INIT_BSWAP_RESERVED: Replay.REFUSED,
    Opcode.INIT_BSWAP_RESERVED: Replay.REFUSED,
}

PURE = frozenset(op for op, replay in REPLAY.items() if replay is Replay.PURE)
