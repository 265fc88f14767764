"""Flag bits and limits of the FUSE wire, protocol 7.31 to 7.45.

Owns names and values only, one class per field of a message; which of them a
mount negotiates is decided by the shim. Names are the kernel's without their
prefix. Kept free of imports other than enum: the shim pays for every megabyte.

Arithmetic on `IntFlag` members costs about a microsecond each: hot paths take
`int(Fopen.KEEP_CACHE)` once, at import.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

KERNEL_VERSION = 7
KERNEL_MINOR_VERSION = 45  # the newest protocol these tables describe
OLDEST_MINOR_VERSION = 31  # the oldest peer (libfuse 3.14 answers 7.31) they were written for

ROOT_ID = 1  # the node id of a mount's root
MIN_READ_BUFFER = 8192  # read(2) on /dev/fuse with less is EINVAL; max_write + 80 where that is more
UNIQUE_RESEND = 1 << 63  # set in `unique` of a request the kernel delivers again; the reply repeats it
INVALID_UIDGID = 0xFFFFFFFF  # uid/gid of a request that has none under ALLOW_IDMAP
IOCTL_MAX_IOV = 256  # in_iovs + out_iovs of an IOCTL reply that asks for a retry
CUSE_INIT_INFO_MAX = 4096
URING_IN_OUT_HEADER_SZ = 128
URING_OP_IN_OUT_SZ = 128


class Init(IntFlag):
    """What both sides can do; 64 bits, of which the wire carries 32 in `flags` and 32 in `flags2`."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    FILE_OPS = 1 << 2
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    SPLICE_WRITE = 1 << 7
    SPLICE_MOVE = 1 << 8
    SPLICE_READ = 1 << 9
    FLOCK_LOCKS = 1 << 10
    HAS_IOCTL_DIR = 1 << 11
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16  # excludes PASSTHROUGH
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    HANDLE_KILLPRIV = 1 << 19
    POSIX_ACL = 1 << 20
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22  # INIT_OUT.max_pages is valid
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    MAP_ALIGNMENT = 1 << 26  # 7.31
    SUBMOUNTS = 1 << 27  # 7.32
    HANDLE_KILLPRIV_V2 = 1 << 28  # 7.33
    SETXATTR_EXT = 1 << 29  # 7.33: SETXATTR_IN instead of SETXATTR_IN_COMPAT
    INIT_EXT = 1 << 30  # 7.36: `flags2` is valid
    INIT_RESERVED = 1 << 31
    SECURITY_CTX = 1 << 32  # 7.36
    HAS_INODE_DAX = 1 << 33  # 7.36
    CREATE_SUPP_GROUP = 1 << 34  # 7.38
    HAS_EXPIRE_ONLY = 1 << 35  # 7.38
    DIRECT_IO_ALLOW_MMAP = 1 << 36  # 7.39
    DIRECT_IO_RELAX = 1 << 36  # its former name
    PASSTHROUGH = 1 << 37  # 7.40: INIT_OUT.max_stack_depth is valid
    NO_EXPORT_SUPPORT = 1 << 38  # 7.40
    HAS_RESEND = 1 << 39  # 7.40
    ALLOW_IDMAP = 1 << 40  # 7.41
    OVER_IO_URING = 1 << 41  # 7.42
    REQUEST_TIMEOUT = 1 << 42  # 7.43: INIT_OUT.request_timeout is valid


def join_init_flags(flags: int, flags2: int) -> int:
    """The 64 INIT flags of a message; `flags2` counts only where `flags` has INIT_EXT."""
    return flags | flags2 << 32 if flags & 1 << 30 else flags


def split_init_flags(flags: int) -> tuple[int, int]:
    """The two 32-bit fields for 64 INIT flags; INIT_EXT is set when the second one is needed."""
    high = flags >> 32 & 0xFFFFFFFF
    low = flags & 0xFFFFFFFF
    return (low | 1 << 30 if high else low), high


class CuseInit(IntFlag):
    """`flags` of CUSE_INIT."""

    UNRESTRICTED_IOCTL = 1 << 0


class Fopen(IntFlag):
    """`open_flags` of the replies to OPEN, OPENDIR, CREATE and TMPFILE."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    NONSEEKABLE = 1 << 2
    CACHE_DIR = 1 << 3
    STREAM = 1 << 4
    NOFLUSH = 1 << 5  # 7.35; no effect under WRITEBACK_CACHE
    PARALLEL_DIRECT_WRITES = 1 << 6  # 7.38
    PASSTHROUGH = 1 << 7  # 7.40: OPEN_OUT.backing_id is valid


class Fattr(IntFlag):
    """`valid` of SETATTR: which fields are to be changed."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    LOCKOWNER = 1 << 9
    CTIME = 1 << 10
    KILL_SUIDGID = 1 << 11  # 7.33


class OpenFlag(IntFlag):
    """`open_flags` of OPEN and CREATE requests (not the open(2) flags)."""

    KILL_SUIDGID = 1 << 0  # 7.33


class ReleaseFlag(IntFlag):
    """`release_flags` of RELEASE."""

    FLUSH = 1 << 0
    FLOCK_UNLOCK = 1 << 1


class GetattrFlag(IntFlag):
    """`getattr_flags` of GETATTR and STATX."""

    FH = 1 << 0  # `fh` is valid


class LkFlag(IntFlag):
    """`lk_flags` of GETLK, SETLK and SETLKW."""

    FLOCK = 1 << 0  # flock(2), not fcntl(2)


class WriteFlag(IntFlag):
    """`write_flags` of WRITE."""

    CACHE = 1 << 0  # from the page cache: fh, uid and pid are guesses
    LOCKOWNER = 1 << 1
    KILL_SUIDGID = 1 << 2
    KILL_PRIV = 1 << 2  # its former name


class ReadFlag(IntFlag):
    """`read_flags` of READ."""

    LOCKOWNER = 1 << 1


class IoctlFlag(IntFlag):
    """`flags` of IOCTL requests and replies."""

    COMPAT = 1 << 0
    UNRESTRICTED = 1 << 1
    RETRY = 1 << 2
    IS_32BIT = 1 << 3
    DIR = 1 << 4
    COMPAT_X32 = 1 << 5


class PollFlag(IntFlag):
    """`flags` of POLL."""

    SCHEDULE_NOTIFY = 1 << 0  # someone waits: NOTIFY_POLL is wanted


class FsyncFlag(IntFlag):
    """`fsync_flags` of FSYNC and FSYNCDIR."""

    FDATASYNC = 1 << 0


class AttrFlag(IntFlag):
    """`flags` of ATTR."""

    SUBMOUNT = 1 << 0  # 7.32
    DAX = 1 << 1  # 7.36


class SetxattrFlag(IntFlag):
    """`setxattr_flags` of SETXATTR_IN (its `flags` are setxattr(2)'s)."""

    ACL_KILL_SGID = 1 << 0  # 7.33


class EntryExpire(IntFlag):
    """`flags` of NOTIFY_INVAL_ENTRY."""

    EXPIRE_ONLY = 1 << 0  # 7.38


class MappingFlag(IntFlag):
    """`flags` of SETUPMAPPING."""

    WRITE = 1 << 0
    READ = 1 << 1


class ExtType(IntEnum):
    """`type` of EXT_HEADER; values up to MAX_NR_SECCTX are the count of a SECCTX_HEADER."""

    MAX_NR_SECCTX = 31
    GROUPS = 32


class UringCommand(IntEnum):
    """Commands to the kernel on an io_uring queue (7.42)."""

    INVALID = 0
    REGISTER = 1
    COMMIT_AND_FETCH = 2
