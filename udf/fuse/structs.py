"""The layout of every FUSE message, protocol 7.31 to 7.45.

Owns one `Layout` per kernel structure (named after it, without `fuse_`) and the
alignment of directory records. Read and written by the shim, the link and the
tests. Must never interpret a value. Kept free of imports other than struct:
the shim pays for every megabyte.

Reserved fields (padding, dummy, unused, spare) are bytes without a value: they
are skipped when unpacking and written as zero. A structure inside another one
is flat: `ENTRY_OUT` takes 6 values of its own and then those of `ATTR`, named
`attr.ino` and so on. Byte order is the machine's, as the kernel's is.

Shorter forms. Most of the kernel's compatibility sizes are for peers older than
7.13, which UDF does not talk to (the constants are here so that a check of a
length can name them). What a 7.31+ peer may really send:

* INIT_IN: 16 bytes before 7.36 (`INIT_IN_COMPAT`), then 64. Read what the header's
  length says is there; `flags2` and the rest are zero when missing.
* INIT_OUT: the kernel takes 8 and 24 bytes too, but reads `time_gran` and all that
  follows only from the full 64. A server may only answer 8 bytes to say that it
  speaks another major version; libfuse answers 64 from 7.23 on.
* SETXATTR_IN: 16 bytes if SETXATTR_EXT was negotiated, otherwise 8 (`SETXATTR_IN_COMPAT`).
* IN_HEADER: `total_extlen` was padding before 7.38, and zero.
* ATTR: `flags` was padding before 7.32; OPEN_OUT: `backing_id` before 7.40;
  OPEN_IN and CREATE_IN: `open_flags` before 7.33. Some servers leave padding
  uninitialised: a field is trusted only where its INIT flag was negotiated.
* RENAME is sent with RENAME_IN unless flags are asked for: then RENAME2.
* GETATTR of a kernel that answers stat(2) is always 16 bytes since 7.9; READ and WRITE
  are always 40.
"""

from __future__ import annotations

from struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing would cost the shim memory
    from collections.abc import Callable
    from typing import Any


class Layout:
    """One structure: its `struct.Struct` and where each field is.

    `pack`, `pack_into` and `unpack_from` are the Struct's own bound methods; they
    take and give the values in the order of `fields`.
    """

    __slots__ = ("_members", "name", "pack", "pack_into", "size", "struct", "unpack_from")

    name: str
    struct: Struct
    size: int
    pack: Callable[..., bytes]
    pack_into: Callable[..., None]
    unpack_from: Callable[..., tuple[Any, ...]]

    def __init__(self, name: str, members: str) -> None:
        """`members` lists "name:code" with the codes of the struct module, `Nx` for reserved bytes."""
        self.name = name
        self._members = members
        self.struct = Struct("=" + "".join(member.partition(":")[2] for member in members.split()))
        self.size = self.struct.size
        self.pack = self.struct.pack
        self.pack_into = self.struct.pack_into
        self.unpack_from = self.struct.unpack_from

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the values, in order; reserved fields have none."""
        return tuple(name for name, code, _ in self.members() if not code.endswith("x"))

    def members(self) -> list[tuple[str, str, int]]:
        """Every member, reserved ones too: (name, struct code, offset)."""
        found = []
        offset = 0
        for member in self._members.split():
            name, _, code = member.partition(":")
            found.append((name, code, offset))
            offset += Struct("=" + code).size
        return found

    def offset(self, field: str) -> int:
        """Bytes before `field`; KeyError if there is none of that name."""
        for name, _, offset in self.members():
            if name == field:
                return offset
        raise KeyError(f"{self.name} has no field {field}")

    def __repr__(self) -> str:
        return f"<Layout {self.name} {self.size} bytes>"


def _inner(prefix: str, members: str) -> str:
    """The members of a structure inside another one."""
    return " ".join(f"{prefix}.{member}" for member in members.split())


# -- headers ---------------------------------------------------------------------------------------

IN_HEADER = Layout(
    "in_header", "len:I opcode:I unique:Q nodeid:Q uid:I gid:I pid:I total_extlen:H padding:2x"
)  # total_extlen counts units of 8 bytes
OUT_HEADER = Layout("out_header", "len:I error:i unique:Q")  # error: -errno, or a Notify code with unique 0

# -- attributes ------------------------------------------------------------------------------------

_ATTR = (
    "ino:Q size:Q blocks:Q atime:Q mtime:Q ctime:Q atimensec:I mtimensec:I ctimensec:I"
    " mode:I nlink:I uid:I gid:I rdev:I blksize:I flags:I"
)  # the kernel's times are unsigned on the wire and signed in meaning
_SX_TIME = "tv_sec:q tv_nsec:I __reserved:4x"
_STATX = (
    "mask:I blksize:I attributes:Q nlink:I uid:I gid:I mode:H __spare0:2x ino:Q size:Q blocks:Q attributes_mask:Q "
    + " ".join(_inner(time, _SX_TIME) for time in ("atime", "btime", "ctime", "mtime"))
    + " rdev_major:I rdev_minor:I dev_major:I dev_minor:I __spare2:112x"
)
_KSTATFS = "blocks:Q bfree:Q bavail:Q files:Q ffree:Q bsize:I namelen:I frsize:I padding:4x spare:24x"
_FILE_LOCK = "start:Q end:Q type:I pid:I"

ATTR = Layout("attr", _ATTR)
SX_TIME = Layout("sx_time", _SX_TIME)
STATX = Layout("statx", _STATX)
KSTATFS = Layout("kstatfs", _KSTATFS)
FILE_LOCK = Layout("file_lock", _FILE_LOCK)

_ENTRY_OUT = "nodeid:Q generation:Q entry_valid:Q attr_valid:Q entry_valid_nsec:I attr_valid_nsec:I " + _inner(
    "attr", _ATTR
)
ENTRY_OUT = Layout("entry_out", _ENTRY_OUT)
ATTR_OUT = Layout("attr_out", "attr_valid:Q attr_valid_nsec:I dummy:4x " + _inner("attr", _ATTR))
STATX_OUT = Layout("statx_out", "attr_valid:Q attr_valid_nsec:I flags:I spare:16x " + _inner("stat", _STATX))
STATFS_OUT = Layout("statfs_out", _inner("st", _KSTATFS))

GETATTR_IN = Layout("getattr_in", "getattr_flags:I dummy:4x fh:Q")
STATX_IN = Layout("statx_in", "getattr_flags:I reserved:4x fh:Q sx_flags:I sx_mask:I")
SETATTR_IN = Layout(
    "setattr_in",
    "valid:I padding:4x fh:Q size:Q lock_owner:Q atime:Q mtime:Q ctime:Q atimensec:I mtimensec:I ctimensec:I"
    " mode:I unused4:4x uid:I gid:I unused5:4x",
)
ACCESS_IN = Layout("access_in", "mask:I padding:4x")

# -- names -----------------------------------------------------------------------------------------

FORGET_IN = Layout("forget_in", "nlookup:Q")
FORGET_ONE = Layout("forget_one", "nodeid:Q nlookup:Q")
BATCH_FORGET_IN = Layout("batch_forget_in", "count:I dummy:4x")  # count FORGET_ONE follow
MKNOD_IN = Layout("mknod_in", "mode:I rdev:I umask:I padding:4x")
MKDIR_IN = Layout("mkdir_in", "mode:I umask:I")
RENAME_IN = Layout("rename_in", "newdir:Q")
RENAME2_IN = Layout("rename2_in", "newdir:Q flags:I padding:4x")
LINK_IN = Layout("link_in", "oldnodeid:Q")
CREATE_IN = Layout("create_in", "flags:I mode:I umask:I open_flags:I")  # of TMPFILE too

# -- open files ------------------------------------------------------------------------------------

OPEN_IN = Layout("open_in", "flags:I open_flags:I")
OPEN_OUT = Layout("open_out", "fh:Q open_flags:I backing_id:i")
RELEASE_IN = Layout("release_in", "fh:Q flags:I release_flags:I lock_owner:Q")
FLUSH_IN = Layout("flush_in", "fh:Q unused:4x padding:4x lock_owner:Q")
READ_IN = Layout("read_in", "fh:Q offset:Q size:I read_flags:I lock_owner:Q flags:I padding:4x")
WRITE_IN = Layout("write_in", "fh:Q offset:Q size:I write_flags:I lock_owner:Q flags:I padding:4x")
WRITE_OUT = Layout("write_out", "size:I padding:4x")
FSYNC_IN = Layout("fsync_in", "fh:Q fsync_flags:I padding:4x")
FALLOCATE_IN = Layout("fallocate_in", "fh:Q offset:Q length:Q mode:I padding:4x")
LSEEK_IN = Layout("lseek_in", "fh:Q offset:Q whence:I padding:4x")
LSEEK_OUT = Layout("lseek_out", "offset:Q")
COPY_FILE_RANGE_IN = Layout(
    "copy_file_range_in", "fh_in:Q off_in:Q nodeid_out:Q fh_out:Q off_out:Q len:Q flags:Q"
)  # COPY_FILE_RANGE is answered with WRITE_OUT, COPY_FILE_RANGE_64 with COPY_FILE_RANGE_OUT
COPY_FILE_RANGE_OUT = Layout("copy_file_range_out", "bytes_copied:Q")
LK_IN = Layout("lk_in", "fh:Q owner:Q " + _inner("lk", _FILE_LOCK) + " lk_flags:I padding:4x")
LK_OUT = Layout("lk_out", _inner("lk", _FILE_LOCK))
BMAP_IN = Layout("bmap_in", "block:Q blocksize:I padding:4x")
BMAP_OUT = Layout("bmap_out", "block:Q")
IOCTL_IN = Layout("ioctl_in", "fh:Q flags:I cmd:I arg:Q in_size:I out_size:I")
IOCTL_IOVEC = Layout("ioctl_iovec", "base:Q len:Q")
IOCTL_OUT = Layout("ioctl_out", "result:i flags:I in_iovs:I out_iovs:I")
POLL_IN = Layout("poll_in", "fh:Q kh:Q flags:I events:I")
POLL_OUT = Layout("poll_out", "revents:I padding:4x")
SYNCFS_IN = Layout("syncfs_in", "padding:8x")

# -- extended attributes ---------------------------------------------------------------------------

SETXATTR_IN = Layout("setxattr_in", "size:I flags:I setxattr_flags:I padding:4x")
SETXATTR_IN_COMPAT = Layout("setxattr_in_compat", "size:I flags:I")  # without SETXATTR_EXT
GETXATTR_IN = Layout("getxattr_in", "size:I padding:4x")  # of LISTXATTR too
GETXATTR_OUT = Layout("getxattr_out", "size:I padding:4x")  # answers a size of 0

# -- directories -----------------------------------------------------------------------------------

_DIRENT = "ino:Q off:Q namelen:I type:I"
DIRENT = Layout("dirent", _DIRENT)  # the name follows, padded to 8 bytes
DIRENTPLUS = Layout("direntplus", _inner("entry_out", _ENTRY_OUT) + " " + _inner("dirent", _DIRENT))


def rec_align(length: int) -> int:
    """`length` rounded up to the 8 bytes that variable records are aligned to."""
    return (length + 7) & ~7


# -- the connection --------------------------------------------------------------------------------

INIT_IN = Layout("init_in", "major:I minor:I max_readahead:I flags:I flags2:I unused:44x")
INIT_IN_COMPAT = Layout("init_in_compat", "major:I minor:I max_readahead:I flags:I")  # before 7.36
INIT_OUT = Layout(
    "init_out",
    "major:I minor:I max_readahead:I flags:I max_background:H congestion_threshold:H max_write:I time_gran:I"
    " max_pages:H map_alignment:H flags2:I max_stack_depth:I request_timeout:H unused:22x",
)
INTERRUPT_IN = Layout("interrupt_in", "unique:Q")
BACKING_MAP = Layout("backing_map", "fd:i flags:I padding:8x")

# -- extensions of creating requests, after the name(s) ---------------------------------------------

SECCTX_HEADER = Layout("secctx_header", "size:I nr_secctx:I")
SECCTX = Layout("secctx", "size:I padding:4x")  # name + NUL, then size bytes of context
EXT_HEADER = Layout("ext_header", "size:I type:I")
SUPP_GROUPS = Layout("supp_groups", "nr_groups:I")  # nr_groups uint32 follow

# -- notifications ---------------------------------------------------------------------------------

NOTIFY_POLL_WAKEUP_OUT = Layout("notify_poll_wakeup_out", "kh:Q")
NOTIFY_INVAL_INODE_OUT = Layout("notify_inval_inode_out", "ino:Q off:q len:q")
NOTIFY_INVAL_ENTRY_OUT = Layout("notify_inval_entry_out", "parent:Q namelen:I flags:I")  # name + NUL follow
NOTIFY_DELETE_OUT = Layout("notify_delete_out", "parent:Q child:Q namelen:I padding:4x")  # name + NUL follow
NOTIFY_STORE_OUT = Layout("notify_store_out", "nodeid:Q offset:Q size:I padding:4x")  # data follows
NOTIFY_RETRIEVE_OUT = Layout("notify_retrieve_out", "notify_unique:Q nodeid:Q offset:Q size:I padding:4x")
NOTIFY_RETRIEVE_IN = Layout("notify_retrieve_in", "dummy1:8x offset:Q size:I dummy2:4x dummy3:8x dummy4:8x")
NOTIFY_PRUNE_OUT = Layout("notify_prune_out", "count:I padding:4x spare:8x")  # count uint64 node ids follow

# -- virtiofs, CUSE, io_uring ------------------------------------------------------------------------

SETUPMAPPING_IN = Layout("setupmapping_in", "fh:Q foffset:Q len:Q flags:Q moffset:Q")
REMOVEMAPPING_IN = Layout("removemapping_in", "count:I")  # count REMOVEMAPPING_ONE follow
REMOVEMAPPING_ONE = Layout("removemapping_one", "moffset:Q len:Q")
CUSE_INIT_IN = Layout("cuse_init_in", "major:I minor:I unused:4x flags:I")
CUSE_INIT_OUT = Layout(
    "cuse_init_out",
    "major:I minor:I unused:4x flags:I max_read:I max_write:I dev_major:I dev_minor:I spare:40x",
)
URING_ENT_IN_OUT = Layout("uring_ent_in_out", "flags:Q commit_id:Q payload_sz:I padding:4x reserved:8x")
URING_REQ_HEADER = Layout(
    "uring_req_header",
    "in_out:128s op_in:128s " + _inner("ring_ent_in_out", "flags:Q commit_id:Q payload_sz:I padding:4x reserved:8x"),
)
URING_CMD_REQ = Layout("uring_cmd_req", "flags:Q commit_id:Q qid:H padding:6x")

# Lengths of structures before they grew (see the module's text for those that still occur).
COMPAT_INIT_OUT_SIZE = 8  # before 7.5
COMPAT_22_INIT_OUT_SIZE = 24  # before 7.23
COMPAT_ENTRY_OUT_SIZE = 120  # before 7.9
COMPAT_ATTR_OUT_SIZE = 96  # before 7.9
COMPAT_WRITE_IN_SIZE = 24  # before 7.9
COMPAT_MKNOD_IN_SIZE = 8  # before 7.12
COMPAT_STATFS_SIZE = 48  # before 7.4
COMPAT_SETXATTR_IN_SIZE = 8  # without SETXATTR_EXT
