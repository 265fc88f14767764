"""The two INITs: the mount's fixed contract with the kernel, and what is offered to a driver.

Owns: which capabilities the mount has. Decided once, before the kernel is answered, from the first driver's INIT reply
and the manifest; what a driver lacks of it the shim emulates (umask, killing of suid bits, READDIRPLUS, ...).
Pure: no I/O here. Flag meanings: include/uapi/linux/fuse.h, fuse_init_in and fuse_init_out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from udf.fuse.flags import Init
from udf.fuse.opcodes import Opcode
from udf.fuse.structs import IN_HEADER, INIT_IN, INIT_OUT

MAX_WRITE = 128 * 1024  # link messages stay this small: default socket buffers carry them
PAGE = 4096
OUR_MAJOR, OUR_MINOR = 7, 45
OLDEST_KERNEL_MINOR = 31
OLDEST_DRIVER_MINOR = 12  # older ones have shorter mknod and create requests
OLD_INIT_OUT = 24  # bytes of fuse_init_out up to protocol 7.22
MAX_BACKGROUND = 64
CONGESTION = 48

INIT_UNIQUE = (1 << 62) + 1  # ours: the kernel's requests count up from 2 in steps of 2

# Splicing drivers would send a reply in several packets; ATOMIC_O_TRUNC, EXPORT_SUPPORT and locks would make
# requests that cannot be sent again; WRITEBACK_CACHE would acknowledge what no driver has seen.
_OFFER = int(
    Init.ASYNC_READ
    | Init.BIG_WRITES
    | Init.DONT_MASK
    | Init.HAS_IOCTL_DIR
    | Init.AUTO_INVAL_DATA
    | Init.DO_READDIRPLUS
    | Init.READDIRPLUS_AUTO
    | Init.ASYNC_DIO
    | Init.PARALLEL_DIROPS
    | Init.POSIX_ACL
    | Init.ABORT_ERROR
    | Init.MAX_PAGES
    | Init.CACHE_SYMLINKS
    | Init.EXPLICIT_INVAL_DATA
)
_LOCKS = int(Init.POSIX_LOCKS | Init.FLOCK_LOCKS)

_CONTRACT = int(
    Init.ASYNC_READ
    | Init.BIG_WRITES
    | Init.DONT_MASK
    | Init.HAS_IOCTL_DIR
    | Init.DO_READDIRPLUS
    | Init.ASYNC_DIO
    | Init.PARALLEL_DIROPS
    | Init.HANDLE_KILLPRIV_V2
    | Init.ABORT_ERROR
    | Init.MAX_PAGES
    | Init.CACHE_SYMLINKS
    | Init.SETXATTR_EXT
    | Init.INIT_EXT
    | Init.HAS_RESEND
)


class ContractRefused(Exception):
    """The kernel or the driver speaks a protocol that cannot be served; one sentence."""


@dataclass(frozen=True, slots=True)
class KernelOffer:
    """What the kernel's INIT said."""

    unique: int
    minor: int
    max_readahead: int
    flags: int


@dataclass(frozen=True, slots=True)
class DriverTerms:
    """What a driver's INIT reply accepted."""

    minor: int
    flags: int
    max_write: int
    max_readahead: int
    time_granularity: int
    readdirplus: bool
    readdir: bool  # plain READDIR is answered as well
    masks: bool  # applies the umask itself

    def without_plus(self) -> DriverTerms:
        """Return the terms of a driver that accepted READDIRPLUS and then did not know it."""
        return replace(self, readdirplus=False, readdir=True)


def parse_kernel_init(buffer: bytes | bytearray | memoryview) -> KernelOffer:
    """Read the kernel's INIT request. Raises ContractRefused."""
    unique = IN_HEADER.unpack_from(buffer, 0)[2]
    major, minor, readahead, flags, flags2 = INIT_IN.unpack_from(buffer, IN_HEADER.size)
    if major != OUR_MAJOR or minor < OLDEST_KERNEL_MINOR:
        raise ContractRefused(
            f"the kernel speaks FUSE {major}.{minor}, and at least {OUR_MAJOR}.{OLDEST_KERNEL_MINOR} is needed"
            " (Linux 5.4)"
        )
    if flags & int(Init.INIT_EXT):
        flags |= flags2 << 32
    return KernelOffer(unique, minor, readahead, flags)


def driver_init(*, locks: bool) -> bytes:
    """Return the INIT request for a driver."""
    flags = _OFFER | (_LOCKS if locks else 0)
    body = INIT_IN.pack(OUR_MAJOR, OUR_MINOR, MAX_WRITE, flags, 0)
    header = IN_HEADER.pack(IN_HEADER.size + len(body), Opcode.INIT, INIT_UNIQUE, 0, 0, 0, 0, 0)
    return header + body


def parse_driver_init(reply: bytes | bytearray | memoryview, *, locks: bool) -> DriverTerms:
    """Read a driver's INIT reply body (without its header). Raises ContractRefused."""
    if len(reply) < OLD_INIT_OUT:
        raise ContractRefused("the driver's INIT reply is too short")
    padded = bytes(reply[: INIT_OUT.size]).ljust(INIT_OUT.size, b"\0")
    major, minor, readahead, flags, _background, _congestion, max_write, granularity = INIT_OUT.unpack_from(padded)[:8]
    if major != OUR_MAJOR or minor < OLDEST_DRIVER_MINOR:
        raise ContractRefused(
            f"the driver speaks FUSE {major}.{minor}, and {OUR_MAJOR}.{OLDEST_DRIVER_MINOR} or later is needed"
        )
    flags &= _OFFER | (_LOCKS if locks else 0)
    plus = bool(flags & int(Init.DO_READDIRPLUS))
    return DriverTerms(
        minor=minor,
        flags=flags,
        max_write=max(PAGE, min(max_write, MAX_WRITE)),
        max_readahead=readahead,
        time_granularity=granularity if 1 <= granularity <= 1_000_000_000 else 1,
        readdirplus=plus,
        readdir=not plus or bool(flags & int(Init.READDIRPLUS_AUTO)),
        masks=bool(flags & int(Init.DONT_MASK)),
    )


def lacks(first: DriverTerms, new: DriverTerms) -> str:
    """Return what the mount's contract rests on and *new* does not have, in words; "" if it has everything."""
    if new.max_write < first.max_write:
        return f"writes of {first.max_write} bytes (it takes {new.max_write})"
    if new.time_granularity > first.time_granularity:
        return f"time stamps of {first.time_granularity} ns (it has {new.time_granularity})"
    for flag, what in ((Init.POSIX_ACL, "ACLs"), (Init.POSIX_LOCKS, "locks"), (Init.FLOCK_LOCKS, "flock locks")):
        if first.flags & ~new.flags & int(flag):
            return what
    return ""


def kernel_reply(
    offer: KernelOffer, terms: DriverTerms, *, exclusive: bool, acl: bool, locks: bool, max_read: int = MAX_WRITE
) -> bytes:
    """Return the body of the answer to the kernel's INIT: the contract of this mount for its whole life."""
    flags = _CONTRACT
    flags |= int(Init.EXPLICIT_INVAL_DATA) if exclusive else int(Init.AUTO_INVAL_DATA)
    if terms.readdir:
        # Else the driver is asked for READDIRPLUS anyway (pyfuse3 knows no other), and what it says of each entry
        # is worth more in the kernel than thrown away.
        flags |= int(Init.READDIRPLUS_AUTO)
    if acl:
        flags |= int(Init.POSIX_ACL)
    if locks:
        flags |= terms.flags & _LOCKS
    flags &= offer.flags
    values = dict.fromkeys(INIT_OUT.fields, 0)
    values.update(
        major=OUR_MAJOR,
        minor=min(offer.minor, OUR_MINOR),
        max_readahead=min(offer.max_readahead, MAX_WRITE),
        flags=flags & 0xFFFFFFFF,
        flags2=flags >> 32,
        max_background=MAX_BACKGROUND,
        congestion_threshold=CONGESTION,
        max_write=terms.max_write,
        time_gran=terms.time_granularity,
        max_pages=max_read // PAGE,  # which a small max_write must not bound
    )
    return INIT_OUT.pack(*values.values())
