"""The system calls that Python 3.11 lacks.

Owns: their numbers and calling conventions. Must never: decide anything. Called by: launcher.py, sandbox.py, init.py,
foreign.py and zygote.py, before a driver's code runs. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct

CLONE_PARENT = 0x00008000
CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_SLAVE = 2, 4, 8, 4096, 16384, 1 << 19
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_NAME = 15
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4

_CAPABILITY_VERSION_3 = 0x20080522

_SYS_CLONE3 = 435  # on every architecture
_CLONE_ARGS = struct.Struct("=8Q")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]  # said once: some hundred calls for each host
_libc_with_gil = ctypes.PyDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(fd: int, flags: int) -> None:
    """setns(2)."""
    _check(_libc.setns(ctypes.c_int(fd), ctypes.c_int(flags)), "setns")


def mount(source: str, target: str, fstype: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)."""
    _check(
        _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            None if fstype is None else fstype.encode(),
            ctypes.c_ulong(flags),
            None if data is None else data.encode(),
        ),
        f"mount at {target}",
    )


def umount2(target: bytes, flags: int) -> None:
    """umount2(2)."""
    _check(_libc.umount2(target, ctypes.c_int(flags)), "umount2")


def prctl(option: int, a: int = 0, b: int = 0, c: int = 0, d: int = 0) -> int:
    """prctl(2) with numbers."""
    return _check(_libc.prctl(option, a, b, c, d), f"prctl({option})")


def set_name(name: str) -> None:
    """The name of this process in ps(1): 15 bytes."""
    buffer = ctypes.create_string_buffer(name.encode("utf-8", "replace")[:15])
    prctl(PR_SET_NAME, ctypes.addressof(buffer))


def fork(flags: int) -> int:
    """As os.fork(), with flags of clone(2): CLONE_PARENT makes our parent the new process's, CLONE_NEWPID a namespace.

    Only for a process with one thread. What fork(3) does beyond that is lost: the C library's own number of the thread
    stays the old one, which only a process that forks again (or uses no thread functions) may live with.
    """
    exit_signal = 0 if flags & CLONE_PARENT else signal.SIGCHLD  # as the parent's other child has it
    arguments = _CLONE_ARGS.pack(flags, 0, 0, 0, exit_signal, 0, 0, 0)
    buffer = ctypes.create_string_buffer(arguments, len(arguments))
    python = ctypes.pythonapi
    python.PyOS_BeforeFork()
    # Under the interpreter's lock, as os.fork() does it.
    pid: int = _libc_with_gil.syscall(ctypes.c_long(_SYS_CLONE3), buffer, ctypes.c_size_t(len(arguments)))
    if pid == 0:
        python.PyOS_AfterFork_Child()
        return 0
    number = ctypes.get_errno()
    python.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, f"clone3: {os.strerror(number)}")
    return pid


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Data(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


def capset(mask: int) -> None:
    """Make these capabilities the effective, permitted and inheritable ones of this thread."""
    header = _Header(_CAPABILITY_VERSION_3, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = (_Data * 2)(_Data(low, low, low), _Data(high, high, high))
    _check(_libc.capset(ctypes.byref(header), data), "capset")


def capget() -> int:
    """The permitted capabilities of this thread."""
    header = _Header(_CAPABILITY_VERSION_3, 0)
    data = (_Data * 2)()
    _check(_libc.capget(ctypes.byref(header), data), "capget")
    return int(data[0].permitted) | int(data[1].permitted) << 32
