"""Whether the server of a FUSE mount is gone, found out without risk of hanging with it.

Owns the question only; nothing here unmounts. Called by mount.py. Must never ask
a mount anything from this process: a request to a server that lives and hangs
cannot be interrupted, not even by SIGKILL once the server has read it.

How: an orphaned process of its own asks with statfs(2), because the kernel never
answers that from a cache. A mount whose connection is gone says ENOTCONN at once;
any other answer, or none in time, means that there is (or may be) a server. As a
living server may also answer ENOTCONN (one that lost its network, say), a
process that still holds the connection open and unbroken overrules it, where
the kernel tells who that is (6.17 and later, in fdinfo).
"""

from __future__ import annotations

import errno
import os
import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # not needed at run time, and the shim pays for it
    from udf.fuse.mountinfo import Mount

# Run by a fresh interpreter, so that nothing is forked from a process with threads. It forks once and ends, so that
# we have nothing to reap that could be stuck. O_PATH reaches the mount's root without asking the server, and before
# the rights to walk there are given up: without allow_other only the mount's owner is let through to the server.
_PROBE = """
import os, signal, sys
if os.fork():
    os._exit(0)
seconds, mount, uid, gid, path = sys.argv[1:]
signal.alarm(int(seconds))
answer = 0
try:
    fd = os.open(os.fsencode(path), os.O_PATH | os.O_NOFOLLOW)
    with open(f"/proc/self/fdinfo/{fd}") as info:
        if f"mnt_id:\\t{mount}\\n" not in info.read():
            os._exit(1)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(int(gid), int(gid), int(gid))
        os.setresuid(int(uid), int(uid), int(uid))
    os.fstatvfs(fd)
except OSError as error:
    answer = error.errno
os.write(1, str(answer).encode())
os._exit(0)
"""


def connection_is_gone(mount: Mount, timeout: float) -> bool:
    """Whether nobody will ever answer on this FUSE mount again. Takes `timeout` seconds at most (and a little)."""
    answer = _ask(mount, timeout)
    if answer == errno.ECONNABORTED:  # it went while it was being asked
        answer = _ask(mount, timeout)
    return answer == errno.ENOTCONN and not _is_held(mount)


def _ask(mount: Mount, timeout: float) -> int | None:
    """The errno of statfs(2) there, 0, or None if nothing came in time (or nobody could be sent to ask)."""
    reader, writer = os.pipe()
    try:
        argv = [
            *(sys.executable, "-I", "-S", "-c", _PROBE),
            *(str(int(timeout) + 1), str(mount.id)),
            *(mount.super_option("user_id") or "0", mount.super_option("group_id") or "0", mount.mountpoint),
        ]
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, writer, 1),
            (os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0),
        ]
        until = time.monotonic() + timeout
        starter = os.posix_spawn(sys.executable, argv, {}, file_actions=actions)
    except OSError:
        os.close(reader)
        return None
    finally:
        os.close(writer)
    try:
        os.waitpid(starter, 0)  # it only forks
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            return None
        answer = os.read(reader, 16)
        return int(answer) if answer else None
    finally:
        os.close(reader)


def _is_held(mount: Mount) -> bool:
    """Whether a process that we can see holds the mount's connection, and the connection is not aborted."""
    line = f"fuse_connection:\t{mount.device[0] << 20 | mount.device[1]}\n"
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            descriptors = os.listdir(f"/proc/{pid}/fd")
        except OSError:  # ended, or not ours to see
            continue
        for fd in descriptors:
            try:
                if not os.readlink(f"/proc/{pid}/fd/{fd}").endswith("/fuse"):
                    continue
                with open(f"/proc/{pid}/fdinfo/{fd}") as info:
                    held = line in info.read()
                if held and not _is_aborted(int(pid), int(fd)):
                    return True
            except OSError:
                continue
    return False


def _is_aborted(pid: int, fd: int) -> bool:
    """Whether the connection behind descriptor `fd` of process `pid` is aborted; False when we may not know."""
    import ctypes

    pidfd_getfd = 438
    pidfd = os.pidfd_open(pid)
    try:
        copy = ctypes.CDLL(None, use_errno=True).syscall(pidfd_getfd, pidfd, fd, 0)
    finally:
        os.close(pidfd)
    if copy < 0:
        return False
    try:
        poll = select.poll()
        poll.register(copy, 0)
        return any(events & select.POLLERR for _, events in poll.poll(0))
    finally:
        os.close(copy)
