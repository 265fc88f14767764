"""Least authority: what a driver's process gives up before the driver's code runs.

Owns: limits, namespaces, mounts out of sight, capabilities and user. Must never: import anything but the standard
library, or leave a process with more than the `start` message grants. Called by: launcher.py and init.py.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from udf.host import capabilities
from udf.host import syscalls as sys_

OOM_SCORE = 300  # a driver is the first to go, before the programs that use it: it can be started again
_HIGHEST_DESCRIPTOR = 0x7FFFFFFF  # closerange is one system call, however large the range
_FUSE_TYPES = ("fuse", "fuseblk")


def limit(nofile: int) -> None:
    """How many descriptors a driver may have; needs no right."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    nofile = nofile if hard == resource.RLIM_INFINITY else min(nofile, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (nofile, nofile))


def settle() -> None:
    """What is the same for every driver and needs no right: no core files, a terminal's signals are not for us."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o022)  # until the driver serves: what its interpreter writes meanwhile is code
    with suppress(OSError):
        os.setsid()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError), open("/proc/self/oom_score_adj", "r+") as file:
        own = int(file.read())
        file.seek(0)
        file.write(str(max(own, OOM_SCORE)))


def close_other_descriptors(keep: Iterable[int]) -> None:
    """Close everything but 0, 1, 2 and `keep`; what the caller's caller left open is not for a driver."""
    first = 3
    for fd in sorted(keep):
        os.closerange(first, fd)
        first = max(first, fd + 1)
    os.closerange(first, _HIGHEST_DESCRIPTOR)


def leave_namespaces(uid: int, gid: int) -> bool:
    """Private mounts, and a process tree that ends with its first process. Whether the kernel allows it."""
    if os.geteuid() == 0:
        try:
            sys_.unshare(sys_.CLONE_NEWNS | sys_.CLONE_NEWPID)
        except OSError as exc:
            _say(f"no namespaces: {exc.strerror}")
            return False
        return True
    try:
        sys_.unshare(sys_.CLONE_NEWUSER | sys_.CLONE_NEWNS | sys_.CLONE_NEWPID)
    except OSError as exc:
        _say(f"no namespaces: {exc.strerror}")
        return False
    # Only our own ids: all others show as the overflow id, so the supervisor asks for this where that does not matter.
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def hide_fuse_mounts(keep_paths: Iterable[str]) -> None:
    """Take every FUSE mount that no kept path lies on out of this namespace.

    A driver cannot wait for itself or for another driver by accident, and keeps no foreign mount busy. What is mounted
    or unmounted later still reaches us (slave), so that an unmounted device becomes free.
    """
    sys_.mount("none", "/", None, sys_.MS_REC | sys_.MS_SLAVE)
    own = {sys.prefix, sys.base_prefix, sys.executable, os.path.dirname(__file__)}
    kept = [os.fsencode(os.path.abspath(path)) for path in {*keep_paths, *own} if path]
    detached: list[bytes] = []
    # The upper ones first: with a mount goes what is mounted below it, and its dead server is never asked for a path.
    for point in sorted(fuse_mountpoints(), key=len):
        if any(_is_below(path, point) for path in kept) or any(_is_below(point, gone) for gone in detached):
            continue
        try:
            sys_.umount2(point, sys_.MNT_DETACH | sys_.UMOUNT_NOFOLLOW)
            detached.append(point)
        except OSError as exc:
            # In a user namespace the mounts that we inherited are locked together and stay; they only stay visible (and
            # see udf/shim/elsewhere.py). One that has been unmounted since the look is no news.
            if os.geteuid() == 0 and point in fuse_mountpoints():
                _say(f"the mount {os.fsdecode(point)} stays visible: {exc.strerror}")


def fuse_mountpoints() -> list[bytes]:
    """Where this namespace has FUSE mounts on top."""
    points: list[bytes] = []
    top: dict[bytes, bool] = {}
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            fields = line.split()
            kind = fields[fields.index(b"-", 6) + 1].decode("ascii", "replace")
            point = fields[4].decode("unicode_escape").encode("latin-1")
            is_fuse = kind in _FUSE_TYPES or kind.startswith(("fuse.", "fuseblk."))
            top[point] = is_fuse  # the last one at a place is the one on top
    points.extend(point for point, is_fuse in top.items() if is_fuse)
    return points


def _is_below(path: bytes, directory: bytes) -> bool:
    return path == directory or path.startswith(directory.rstrip(b"/") + b"/")


def mount_fresh_proc() -> None:
    """A /proc that shows only the own process tree; where it may not be mounted the old one stays."""
    with suppress(OSError):
        sys_.mount("proc", "/proc", "proc", sys_.MS_NOSUID | sys_.MS_NODEV | sys_.MS_NOEXEC)


def drop_privileges(sandbox: dict[str, Any]) -> None:
    """Become the sandbox's user, keep its capabilities and nothing else; arm the death signal again.

    The order matters: dropping from the bounding set needs CAP_SETPCAP, changing the user clears what is effective,
    and each change of credentials clears the parent-death signal and the right to look at our own /proc/self.
    """
    mask = capabilities.mask(sandbox["capabilities"]) if sandbox["capabilities"] else 0
    mask &= sys_.capget()
    for number in range(64):
        try:
            if mask >> number & 1 == 0 and sys_.prctl(sys_.PR_CAPBSET_READ, number):
                with suppress(PermissionError):  # without CAP_SETPCAP; then there is nothing in it that we could get
                    sys_.prctl(sys_.PR_CAPBSET_DROP, number)
        except OSError:
            break  # the kernel's last capability was the one before
    uid, gid = int(sandbox["uid"]), int(sandbox["gid"])
    if os.geteuid() == 0:
        sys_.prctl(sys_.PR_SET_KEEPCAPS, 1)
        os.setgroups([int(group) for group in sandbox["groups"]])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        sys_.prctl(sys_.PR_SET_KEEPCAPS, 0)
    elif (os.geteuid(), os.getegid()) != (uid, gid):
        raise PermissionError(f"only root can run a driver as uid {uid}, gid {gid}")
    sys_.prctl(sys_.PR_CAP_AMBIENT, sys_.PR_CAP_AMBIENT_CLEAR_ALL)
    sys_.capset(mask)
    if uid != 0:
        for number in range(64):
            if mask >> number & 1:
                sys_.prctl(sys_.PR_CAP_AMBIENT, sys_.PR_CAP_AMBIENT_RAISE, number)
    sys_.prctl(sys_.PR_SET_NO_NEW_PRIVS, 1)
    sys_.prctl(sys_.PR_SET_DUMPABLE, 1)
    sys_.prctl(sys_.PR_SET_PDEATHSIG, signal.SIGKILL)


def _say(text: str) -> None:
    print(f"udf host: {text}", file=sys.stderr, flush=True)
