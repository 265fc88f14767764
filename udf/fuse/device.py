"""The FUSE device: opening it, its ioctls, and notifications as bytes for one write(2).

Owns no descriptor: whoever asks for one closes it. Called by the shim and by
tests. Must never decide when to notify: an INVAL_*, STORE or DELETE can block on
the inode being served, so its sender must not be the one who would answer.

What the kernel says to a notification's write(2): ENOENT when it does not know the
node or the name (nothing to do), EINVAL when it does not know the notification.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from udf.fuse import structs
from udf.fuse.opcodes import Notify

TYPE_CHECKING = False
if TYPE_CHECKING:  # not needed at run time, and the shim pays for it
    from collections.abc import Sequence

    Data = bytes | bytearray | memoryview

DEVICE = "/dev/fuse"

# _IOR(229, 0, uint32_t), _IOW(229, 1, struct fuse_backing_map), _IOW(229, 2, uint32_t), _IO(229, 3)
IOC_CLONE = 0x8004E500
IOC_BACKING_OPEN = 0x4010E501
IOC_BACKING_CLOSE = 0x4004E502
IOC_SYNC_INIT = 0xE503

_SENTENCES = {
    errno.ENOENT: f"there is no {DEVICE}: run `modprobe fuse`, or give this container the device",
    errno.ENODEV: f"{DEVICE} has no driver in this kernel: load the kernel module with `modprobe fuse`",
    errno.ENXIO: f"{DEVICE} has no driver in this kernel: load the kernel module with `modprobe fuse`",
    errno.EACCES: f"you may not open {DEVICE}: it must be readable and writable for you (usually its mode is 0666)",
    errno.EPERM: f"you may not open {DEVICE}: this container's device rules forbid it",
}

_HEADER = structs.OUT_HEADER.struct


def open_device(*, nonblocking: bool = False) -> int:
    """A descriptor of a new, not yet mounted connection, closed on exec. OSError says what to do."""
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_NONBLOCK if nonblocking else 0)
    try:
        return os.open(DEVICE, flags)
    except OSError as error:
        raise OSError(error.errno, _SENTENCES.get(error.errno or 0, error.strerror), DEVICE) from error


def clone(fd: int) -> int:
    """Another device on the connection of `fd`, to read requests in parallel.

    Requests read from a clone are aborted when its last holder dies, RESEND does not bring
    them back: what has to survive uses duplicates of one descriptor instead.
    """
    copy = open_device()
    try:
        fcntl.ioctl(copy, IOC_CLONE, struct.pack("=I", fd))
    except BaseException:
        os.close(copy)
        raise
    return copy


def read_ahead(fd: int, size: int) -> bool:
    """Have the kernel read so many bytes ahead on a mounted connection; whether it does so from here on.

    Without: 128 KiB. Only root may, and not where /sys cannot be written to (sysfs-class-bdi in the kernel's ABI).
    """
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb") as info:
            for line in info:
                if line.startswith(b"fuse_connection:"):
                    number = int(line.split()[1])
                    break
            else:
                return False  # before Linux 6.9
        with open(f"/sys/class/bdi/{number >> 20}:{number & 0xFFFFF}/read_ahead_kb", "w", encoding="ascii") as setting:
            setting.write(str(size // 1024))
    except (OSError, ValueError, IndexError):
        return False
    return True


def backing_open(fd: int, file: int) -> int:
    """Register the open regular file `file` for passthrough; returns its backing id (>= 1).

    EPERM: PASSTHROUGH was not negotiated (or WRITEBACK_CACHE was), or no CAP_SYS_ADMIN.
    ELOOP: the file's filesystem is stacked too deep. The kernel keeps the file itself; `file` may be closed.
    """
    # Mutable, because for an immutable buffer ioctl() returns the buffer and the id is lost.
    request = bytearray(structs.BACKING_MAP.pack(file, 0))
    backing_id: int = fcntl.ioctl(fd, IOC_BACKING_OPEN, request, True)
    return backing_id


def backing_close(fd: int, backing_id: int) -> None:
    """Give a backing id back. Not before the OPEN that used it is done: that open would get EIO."""
    fcntl.ioctl(fd, IOC_BACKING_CLOSE, struct.pack("=I", backing_id))


def _notification(code: Notify, *parts: Data) -> bytes:
    length = structs.OUT_HEADER.size + sum(map(len, parts))
    return b"".join((_HEADER.pack(length, code, 0), *parts))


def notify_poll(kh: int) -> bytes:
    """Wake the pollers of the POLL requests that carried the kernel handle `kh`."""
    return _notification(Notify.POLL, structs.NOTIFY_POLL_WAKEUP_OUT.pack(kh))


def notify_inval_inode(nodeid: int, offset: int = 0, length: int = 0) -> bytes:
    """Forget a node's attributes and `length` bytes of its data (0: to the end). offset < 0: attributes only."""
    return _notification(Notify.INVAL_INODE, structs.NOTIFY_INVAL_INODE_OUT.pack(nodeid, offset, length))


def notify_inval_entry(parent: int, name: bytes, *, expire_only: bool = False) -> bytes:
    """Forget a name, or (HAS_EXPIRE_ONLY) only have it looked up again, which is safe under open files and mounts."""
    head = structs.NOTIFY_INVAL_ENTRY_OUT.pack(parent, len(name), 1 if expire_only else 0)
    return _notification(Notify.INVAL_ENTRY, head, name, b"\0")


def notify_delete(parent: int, child: int, name: bytes) -> bytes:
    """`name` was removed: as inval_entry, and watchers (inotify) are told if it still means the node `child`."""
    head = structs.NOTIFY_DELETE_OUT.pack(parent, child, len(name))
    return _notification(Notify.DELETE, head, name, b"\0")


def notify_store_head(nodeid: int, offset: int, size: int) -> bytes:
    """What comes before `size` bytes of data in one writev(2): puts them into the node's page cache."""
    head = structs.NOTIFY_STORE_OUT.pack(nodeid, offset, size)
    return _HEADER.pack(structs.OUT_HEADER.size + len(head) + size, Notify.STORE, 0) + head


def notify_store(nodeid: int, offset: int, data: Data) -> bytes:
    """Put `data` into a node's page cache; the file grows to hold it."""
    return b"".join((notify_store_head(nodeid, offset, len(data)), data))


def notify_retrieve(notify_unique: int, nodeid: int, offset: int, size: int) -> bytes:
    """Ask for cached data: NOTIFY_REPLY follows, with NOTIFY_RETRIEVE_IN, the data, and this unique in its header."""
    head = structs.NOTIFY_RETRIEVE_OUT.pack(notify_unique, nodeid, offset, size)
    return _notification(Notify.RETRIEVE, head)


def notify_resend() -> bytes:
    """Have every request delivered again that was read and not answered, with UNIQUE_RESEND in its id (HAS_RESEND)."""
    return _notification(Notify.RESEND)


def notify_inc_epoch() -> bytes:
    """Expire every name and cached listing at once; attributes and data stay (7.44)."""
    return _notification(Notify.INC_EPOCH)


def notify_prune(nodeids: Sequence[int]) -> bytes:
    """Have the kernel drop (and FORGET) what it caches of these nodes where nothing uses them (7.45)."""
    head = structs.NOTIFY_PRUNE_OUT.pack(len(nodeids))
    return _notification(Notify.PRUNE, head, struct.pack(f"={len(nodeids)}Q", *nodeids))
