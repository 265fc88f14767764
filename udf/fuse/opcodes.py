"""The numbers of FUSE requests and notifications, protocol 7.31 to 7.45.

Owns the two tables of names; whoever reads or writes FUSE messages (shim, link,
tests) takes the numbers from here. Must never know what an operation means.
Kept free of imports other than enum: the shim pays for every megabyte.

An `IntEnum` compares and hashes like its number, but a look-up by value costs
a function call: hot paths index a list with the plain number.
"""

from __future__ import annotations

from enum import IntEnum


class Opcode(IntEnum):
    """What the kernel asks (`fuse_in_header.opcode`)."""

    LOOKUP = 1
    FORGET = 2  # never answered
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36  # answered only with EAGAIN ("ask again"), otherwise never
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41  # the data that NOTIFY_RETRIEVE asked for; never answered
    BATCH_FORGET = 42  # never answered
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48  # virtiofs only, like the next
    REMOVEMAPPING = 49
    SYNCFS = 50  # 7.34
    TMPFILE = 51  # 7.37
    STATX = 52  # 7.39
    COPY_FILE_RANGE_64 = 53  # 7.45: COPY_FILE_RANGE whose reply counts in 64 bits
    CUSE_INIT = 4096
    CUSE_INIT_BSWAP_RESERVED = 1048576  # CUSE_INIT from a peer of the other byte order
    INIT_BSWAP_RESERVED = 436207616  # INIT from a peer of the other byte order


class Notify(IntEnum):
    """What a server tells the kernel unasked (`fuse_out_header.error`, with unique 0)."""

    POLL = 1
    INVAL_INODE = 2
    INVAL_ENTRY = 3
    STORE = 4
    RETRIEVE = 5
    DELETE = 6
    RESEND = 7  # 7.40
    INC_EPOCH = 8  # 7.44
    PRUNE = 9  # 7.45


# Not the kernel's: a driver's word to a shim of UDF that requests of one opcode (a u32) are being worked on.
STILL_WORKING = 0x554446

# Requests the kernel waits for no answer to; an answer gets ENOENT from write(2).
UNANSWERED = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY})
