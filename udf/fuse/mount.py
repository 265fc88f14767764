"""Mounting a FUSE connection somewhere, and unmounting it.

Owns mount(2), umount2(2) and the conversation with fusermount3. Called by the
shim (mount, unmount) and the supervisor (what is mounted where, stale mounts).
Must never look at a mounted filesystem itself (see stale.py). The calls block:
an unmount while files are dirty waits for the server, so a server that unmounts
its own mount does it in a thread.

Errors are `MountError`: one sentence and an errno.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from contextlib import suppress
from dataclasses import dataclass

from udf.fuse.mountinfo import Mount, find_mount, read_mountinfo
from udf.fuse.stale import connection_is_gone

__all__ = [
    "Mount",
    "MountError",
    "MountOptions",
    "clean_stale",
    "find_mount",
    "is_busy",
    "is_stale",
    "mount_by_fusermount",
    "mount_direct",
    "read_mountinfo",
    "unmount",
]

SUBTYPE = "udfd"
FSTYPE = f"fuse.{SUBTYPE}"  # never `udf`: that is the kernel's Universal Disk Format
HELPER = "fusermount3"

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_NOATIME = 1, 2, 4, 8, 1024
_MNT_DETACH, _MNT_EXPIRE, _UMOUNT_NOFOLLOW = 2, 4, 8

_STACKED = 64  # more mounts than this at one mountpoint are not ours to clean up


class MountError(OSError):
    """A mount or an unmount failed; str() is a sentence for the operator."""

    def __init__(self, sentence: str, number: int) -> None:
        super().__init__(number, sentence)

    def __str__(self) -> str:
        return str(self.strerror)


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What mount(2) is told. The kernel always checks permissions itself (default_permissions)."""

    fsname: str = "udf"  # what df(1) and the table of mounts show as the source
    read_only: bool = False
    nosuid: bool = True
    nodev: bool = True
    noexec: bool = False
    noatime: bool = False
    allow_other: bool = False
    max_read: int = 0  # 0: the kernel's own limit
    uid: int = 0  # the owner of the mount; fusermount3 takes the caller's instead
    gid: int = 0
    rootmode: int = stat.S_IFDIR  # must be of the mountpoint's type

    def flags(self) -> int:
        """The mountflags of mount(2)."""
        return (
            (_MS_RDONLY if self.read_only else 0)
            | (_MS_NOSUID if self.nosuid else 0)
            | (_MS_NODEV if self.nodev else 0)
            | (_MS_NOEXEC if self.noexec else 0)
            | (_MS_NOATIME if self.noatime else 0)
        )

    def data(self, fd: int) -> str:
        """The data of mount(2): numbers and words, nothing that comes from outside."""
        words = [f"fd={fd}", f"rootmode={self.rootmode:o}", f"user_id={self.uid}", f"group_id={self.gid}"]
        return ",".join(words + self._words())

    def helper_options(self) -> str:
        """The -o of fusermount3, which adds fd, rootmode and the owner itself."""
        fsname = self.fsname.replace("\\", "\\\\").replace(",", "\\,")
        words = [f"fsname={fsname}", f"subtype={SUBTYPE}", "ro" if self.read_only else "rw"]
        words += ["noexec"] * self.noexec + ["noatime"] * self.noatime
        if os.geteuid() == 0:  # for anyone else it insists on nosuid and nodev
            words += ["nosuid" if self.nosuid else "suid", "nodev" if self.nodev else "dev"]
        return ",".join(words + self._words())

    def _words(self) -> list[str]:
        words = ["default_permissions"]
        if self.allow_other:
            words.append("allow_other")
        if self.max_read:
            words.append(f"max_read={self.max_read}")
        return words


def mount_direct(fd: int, mountpoint: str, options: MountOptions) -> None:
    """Mount the connection `fd` with mount(2). Returns before the server has answered INIT.

    A connection that is mounted already is attached at `mountpoint` too, as the same filesystem. After an error the
    connection may be used up (ENOTCONN from then on): open a new one to try again.
    """
    number = _system_call(
        "mount",
        _path(options.fsname),
        _path(mountpoint),
        FSTYPE.encode(),
        options.flags(),
        options.data(fd).encode(),
    )
    if number:
        sentences = {
            errno.EPERM: "only root may mount directly",
            errno.ENOENT: "there is no such directory",
            errno.ENODEV: "this kernel has no FUSE (run `modprobe fuse`)",
            errno.EINVAL: "the kernel refused the options or the connection",
        }
        raise MountError(f"cannot mount on {mountpoint}: {sentences.get(number, os.strerror(number))}", number)


def mount_by_fusermount(mountpoint: str, options: MountOptions, timeout: float = 10.0) -> int:
    """Have fusermount3 open and mount a connection, for callers that are not root; returns its descriptor."""
    import socket

    _path(mountpoint)
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(timeout)
        with theirs:
            environment = {"_FUSE_COMMFD": str(theirs.fileno())}
            arguments = ["-o", options.helper_options(), "--", mountpoint]
            helper = _Helper(arguments, timeout, environment, theirs.fileno())
        # Our copy of its end is closed: if it dies, this ends too.
        try:
            _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
        except (TimeoutError, ConnectionError):
            descriptors = []
        code, text = helper.end()
    if descriptors:
        os.set_inheritable(descriptors[0], False)
        return descriptors[0]
    reason = text or ("no answer in time" if code is None else f"{HELPER} exited with status {code}")
    raise MountError(f"cannot mount on {mountpoint}: {reason}", errno.ETIMEDOUT if code is None else _errno_in(text))


def is_busy(mountpoint: str) -> bool:
    """Whether an unmount would find what is top-most there in use. Only root is told; for others nothing is.

    umount2 with MNT_EXPIRE answers EBUSY, or marks a mount that is not in use and answers EAGAIN; the second time in a
    row it would unmount it. Whoever lets go of the mount wipes the mark out: we do, before and after.
    """
    path = _path(mountpoint)
    _touch(mountpoint)
    try:
        return _system_call("umount2", path, _UMOUNT_NOFOLLOW | _MNT_EXPIRE) == errno.EBUSY
    finally:
        _touch(mountpoint)


def _touch(mountpoint: str) -> None:
    """Take the mount and let it go; its root is in the kernel, and nobody is asked for it."""
    with suppress(OSError):
        os.close(os.open(mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))


def unmount(mountpoint: str, lazy: bool = False) -> None:
    """Unmount what is top-most at `mountpoint`. EBUSY: it is in use; lazy: it goes away when its last user does.

    With umount2(2), or by fusermount3 where we may not.
    """
    path = _path(mountpoint)
    number = _system_call("umount2", path, _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0))
    if number == errno.EPERM and os.geteuid() != 0:
        helper = _Helper(["-u", *(["-z"] if lazy else []), "--", mountpoint], timeout=30.0)
        code, text = helper.end()
        if code == 0:
            return
        number = errno.ETIMEDOUT if code is None else _errno_in(text)
        if number != errno.EBUSY:
            raise MountError(f"cannot unmount {mountpoint}: {text or os.strerror(number)}", number)
    if number:
        sentences = {
            errno.EBUSY: f"it is in use (`fuser -vm {mountpoint}` says by whom)",
            errno.EINVAL: "nothing is mounted there",
            errno.ENOENT: "there is no such directory",
            errno.EPERM: "you may not",
        }
        raise MountError(f"cannot unmount {mountpoint}: {sentences.get(number, os.strerror(number))}", number)


def is_stale(mountpoint: str, timeout: float = 2.0) -> bool:
    """Whether the top-most mount there is a FUSE mount whose server is gone. False when in doubt; never hangs."""
    mount = find_mount(mountpoint)
    return mount is not None and mount.is_fuse and connection_is_gone(mount, timeout)


def clean_stale(mountpoint: str, timeout: float = 2.0) -> str | None:
    """Unmount FUSE mounts without a server from `mountpoint`; what was done, or None if there was nothing to do."""
    cleaned: list[str] = []
    while len(cleaned) < _STACKED:
        mount = find_mount(mountpoint)
        if mount is None or not mount.is_fuse or not connection_is_gone(mount, timeout):
            break
        if find_mount(mountpoint) == mount:  # nothing came on top while we asked
            unmount(mount.mountpoint, lazy=True)
            cleaned.append(f"{mount.source} ({mount.fstype})")
    return f"unmounted from {mountpoint}, whose server was gone: {', '.join(cleaned)}" if cleaned else None


def _path(path: str) -> bytes:
    encoded = os.fsencode(path)
    if b"\0" in encoded:  # C would stop reading there
        raise MountError(f"{path!r} is not a path", errno.EINVAL)
    return encoded


def _system_call(name: str, *arguments: bytes | int) -> int:
    """Call libc; returns 0 or the errno. Other threads run meanwhile."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    function = libc[name]
    function.argtypes = [ctypes.c_ulong if isinstance(value, int) else ctypes.c_char_p for value in arguments]
    return ctypes.get_errno() if function(*arguments) else 0


class _Helper:
    """A running fusermount3, which gets `timeout` seconds in all."""

    def __init__(
        self, arguments: list[str], timeout: float, environment: dict[str, str] | None = None, keep: int | None = None
    ) -> None:
        import subprocess

        self._until = time.monotonic() + timeout
        try:
            self._process = subprocess.Popen(
                [HELPER, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, "LC_ALL": "C", **(environment or {})},
                pass_fds=() if keep is None else (keep,),
            )
        except OSError as error:
            sentence = f"cannot run {HELPER}: {error.strerror} (it comes with the package fuse3)"
            raise MountError(sentence, error.errno or errno.ENOENT) from error

    def end(self) -> tuple[int | None, str]:
        """Its exit status and what it complained of; no status if it did not end and was killed."""
        import subprocess

        try:
            _, complaint = self._process.communicate(timeout=max(0.1, self._until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            try:
                self._process.communicate(timeout=1.0)
            except subprocess.TimeoutExpired:  # stuck in the kernel: reaped when it comes back
                pass
            return None, ""
        lines = [line.removeprefix(f"{HELPER}: ") for line in os.fsdecode(complaint).splitlines()]
        return self._process.returncode, "; ".join(filter(None, lines))


def _errno_in(text: str) -> int:
    """The errno that fusermount3 had, as far as its words tell; EPERM for its own refusals."""
    known = (errno.EBUSY, errno.EACCES, errno.ENOENT, errno.ENODEV, errno.ENOTDIR, errno.EINVAL, errno.ENOTCONN)
    for number in known:
        if os.strerror(number) in text:
            return number
    return errno.EINVAL if "not mounted" in text or "not found in" in text else errno.EPERM
