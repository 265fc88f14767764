"""What this machine has and lacks for mounting, and how to mend it.

Owns: the checks behind `udf doctor`. Features of the kernel are found by probing (a throwaway mount that nothing
but a forked child can see), never guessed from version numbers. Must never: change the machine, touch a path below
a FUSE mount, import trio or pyfuse3. Called by udf.cli.
A little over 400 lines: one check after the other, each for itself.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import shutil
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from udf.errors import UserError
from udf.fuse.flags import Init
from udf.fuse.mount import FSTYPE, MountOptions, find_mount, is_stale, mount_direct, read_mountinfo
from udf.fuse.opcodes import Opcode
from udf.fuse.structs import IN_HEADER, INIT_IN
from udf.supervisor.sockets import rundir
from udf.usb.rules import read_rules, rules_files

State = Literal["ok", "note", "bad"]

OLDEST_MINOR = 31
CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
MS_REC_PRIVATE = 0x4000 | 0x40000
PROBE_SECONDS = 10
STALE_SECONDS = 3  # for all mounts together

# What UDF does with a kernel feature, and since which kernel it can be had.
WANTED = {
    Init.DO_READDIRPLUS: ("listings that bring their attributes along", "3.9"),
    Init.POSIX_ACL: ("POSIX access control lists", "4.9"),
    Init.EXPLICIT_INVAL_DATA: ("page caches that live until a driver invalidates them", "5.2"),
    Init.HANDLE_KILLPRIV_V2: ("set-uid bits dropped on write without a round trip", "5.11"),
    Init.INIT_EXT: ("feature bits above 31", "5.17"),
    Init.PASSTHROUGH: ("reads at the speed of the filesystem underneath", "6.9"),
    Init.HAS_RESEND: ("requests that survive the death of their server", "6.9"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `fix` is what the operator can do, empty where nothing is needed."""

    name: str
    state: State
    text: str
    fix: str = ""
    needed: bool = False  # mounting is impossible while this one is bad


@dataclass(frozen=True)
class Probe:
    """The kernel's side of FUSE_INIT as a throwaway mount saw it, or why there was none."""

    major: int = 0
    minor: int = 0
    flags: int = 0
    error: str = ""


def examine() -> list[Finding]:
    """Every check in the order of the report; never raises for what it finds."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _software,
        _device,
        _kernel,
        _fusermount,
        _configuration,
        _namespaces,
        _limits,
        _systemd,
        _rules,
        _runtime_directory,
        _stale_mounts,
    )
    return [finding for check in checks for finding in check()]


def can_mount(findings: list[Finding]) -> bool:
    """Whether nothing that mounting needs is bad."""
    return not any(finding.needed and finding.state == "bad" for finding in findings)


def _software() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")
    for name in ("udfd", "pyfuse3", "trio", "msgspec"):
        try:
            yield Finding(name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            needed = name != "udfd"  # a checkout on PYTHONPATH has no metadata and works
            text = "is not installed" if needed else "runs from a source tree that is not installed"
            yield Finding(name, "bad" if needed else "note", text, "run `make setup`", needed)
    try:
        version = ctypes.CDLL("libfuse3.so.3").fuse_pkgversion
        version.restype = ctypes.c_char_p
        yield Finding("libfuse", "ok", version().decode())
    except (OSError, AttributeError):  # fuse_pkgversion is as old as libfuse 3
        fix = "run `apt-get install libfuse3-3` as root"
        yield Finding("libfuse", "bad", "libfuse3.so.3 cannot be loaded, and pyfuse3 needs it", fix, needed=True)


def _device() -> Iterator[Finding]:
    path = "/dev/fuse"
    try:
        mode = os.stat(path).st_mode
    except OSError:
        fix = "run `modprobe fuse` as root; in a container, start it with `--device /dev/fuse --cap-add SYS_ADMIN`"
        yield Finding(path, "bad", "does not exist", fix, needed=True)
        return
    if not stat.S_ISCHR(mode):
        fix = "remove it and run `mknod -m 666 /dev/fuse c 10 229` as root"
        yield Finding(path, "bad", "is not a character device", fix, needed=True)
        return
    bits = f"mode {stat.S_IMODE(mode):04o}"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        text = f"{bits}, cannot be opened: {os.strerror(error.errno or 0)}"
        if isinstance(error, PermissionError) and os.geteuid() != 0:
            yield Finding(path, "bad", text, "run `chmod 666 /dev/fuse` as root (udev's own rule does)", needed=True)
        elif isinstance(error, PermissionError):
            yield Finding(path, "bad", text, "let the container use it: `--device /dev/fuse`", needed=True)
        else:
            yield Finding(path, "bad", text, "run `modprobe fuse` as root", needed=True)
        return
    if mode & 0o006 != 0o006:
        fix = "run `chmod 666 /dev/fuse` as root if users are to mount"
        yield Finding(path, "note", f"{bits}, so other users cannot mount", fix)
    else:
        yield Finding(path, "ok", bits)


def _kernel() -> Iterator[Finding]:
    release = os.uname().release
    probe = probe_init()
    if probe.error:
        root = os.geteuid() == 0
        fix = "in a container, add `--cap-add SYS_ADMIN` and an AppArmor profile that allows mount" if root else ""
        text = probe.error
        if root and _in_plain_chroot():
            text = "in this chroot / is no mount point, so no driver can be given a view of the mounts of its own"
            fix = "run `mount --bind DIR DIR` before `chroot DIR`, or run udf outside of the chroot"
        yield Finding("kernel", "bad" if root else "note", f"{release}; {text}", fix, needed=root)
        return
    protocol = f"{release}, FUSE protocol {probe.major}.{probe.minor}"
    if (probe.major, probe.minor) < (7, OLDEST_MINOR):
        yield Finding("kernel", "bad", protocol, f"use Linux 5.4 or newer (protocol 7.{OLDEST_MINOR})", needed=True)
        return
    yield Finding("kernel", "ok", protocol)
    names = [flag.name or "" for flag in Init if probe.flags & flag]
    yield Finding("features", "ok", " ".join(names))
    for flag, (use, since) in WANTED.items():
        if not probe.flags & flag:
            yield Finding(
                flag.name or "", "note", f"not offered by this kernel: no {use}", f"use Linux {since} or newer"
            )


def _in_plain_chroot() -> bool:
    """Whether / is no mount point: its propagation cannot be changed then (EINVAL), which every start of a driver by
    root does, and the kernel gives users no namespaces (EPERM)."""
    try:
        return find_mount("/") is None
    except OSError:
        return False  # without /proc nobody knows


def probe_init() -> Probe:
    """Mount once where only a child process sees it and read the kernel's FUSE_INIT.

    The child answers nothing: its end closes the device, which ends the mount, and its mount namespace goes with it.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            os.write(writer, _probe_in_child())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    if len(answer) == INIT_PACKED.size:
        return Probe(*INIT_PACKED.unpack(answer))
    return Probe(error=answer.decode() or "the probe died")


INIT_PACKED = struct.Struct("<IIQ")


def _probe_in_child() -> bytes:
    """The packed INIT of the kernel, or a sentence in UTF-8 of another length."""
    _alarm(PROBE_SECONDS)
    user = 0 if os.geteuid() == 0 else CLONE_NEWUSER
    identity = (os.geteuid(), os.getegid())
    try:
        _libc("unshare", ctypes.c_int(user | CLONE_NEWNS))
    except OSError as error:
        return f"no private mount namespace for a probe ({os.strerror(error.errno or 0)})".encode()
    try:
        if user:
            _map_to_root(*identity)
        _libc("mount", None, b"/", None, ctypes.c_ulong(MS_REC_PRIVATE), None)
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        # Over "/": always there, and no path below it is looked up again in this process.
        mount_direct(device, "/", MountOptions(fsname="udf-probe"))
        request = os.read(device, 1 << 17)
    except OSError as error:
        return f"a throwaway mount failed ({os.strerror(error.errno or 0)})".encode()
    opcode = IN_HEADER.unpack_from(request)[1]
    if opcode != Opcode.INIT:
        return f"the kernel began with opcode {opcode} instead of INIT".encode()
    # The tail of INIT_IN is missing on kernels before 5.17.
    body = request[IN_HEADER.size :].ljust(INIT_IN.size, b"\0")
    major, minor, _readahead, flags, flags2 = INIT_IN.unpack_from(body)[:5]
    if not flags & Init.INIT_EXT:
        flags2 = 0
    return INIT_PACKED.pack(major, minor, flags | flags2 << 32)


def _alarm(seconds: int) -> None:
    import signal

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)


def _map_to_root(uid: int, gid: int) -> None:
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def _libc(name: str, *arguments: object) -> None:
    """One system call by its libc name; OSError on failure."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)


def _fusermount() -> Iterator[Finding]:
    root = os.geteuid() == 0
    path = shutil.which("fusermount3")
    if path is None:
        state: State = "note" if root else "bad"
        text = "not found" + (", so users other than root cannot mount" if root else "")
        yield Finding("fusermount3", state, text, "run `apt-get install fuse3` as root", needed=not root)
        return
    version = _first_number(_output(path, "--version"))
    if os.stat(path).st_mode & stat.S_ISUID and os.stat(path).st_uid == 0:
        yield Finding("fusermount3", "ok", f"{version} ({path}, set-uid root)")
    else:
        fix = f"run `chown root {path}; chmod u+s {path}` as root"
        text = f"{version} ({path}) is not set-uid root, so users other than root cannot mount"
        yield Finding("fusermount3", "note" if root else "bad", text, fix, needed=not root)


def _configuration() -> Iterator[Finding]:
    try:
        lines = Path("/etc/fuse.conf").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    if any(line.strip() == "user_allow_other" for line in lines):
        yield Finding("user_allow_other", "ok", "set in /etc/fuse.conf")
    else:
        text = "not set, so mounts of users other than root cannot have -o allow_other"
        yield Finding("user_allow_other", "note", text, "add the line `user_allow_other` to /etc/fuse.conf")


def _namespaces() -> Iterator[Finding]:
    root = os.geteuid() == 0
    flags = CLONE_NEWNS | CLONE_NEWPID | (0 if root else CLONE_NEWUSER)
    who = "root" if root else "this user"
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            _libc("unshare", ctypes.c_int(flags))
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1] == 0:
        yield Finding("namespaces", "ok", f"{who} can create mount and PID namespaces for drivers")
        return
    text = f"{who} cannot create mount and PID namespaces: drivers run without them"
    fix = "in a container, add `--cap-add SYS_ADMIN`"
    if not root:
        switches = {
            "kernel/unprivileged_userns_clone": "1",
            "kernel/apparmor_restrict_unprivileged_userns": "0",
        }
        wrong = [name for name, good in switches.items() if _sysctl(name) not in ("", good)]
        fix = "; ".join(f"run `sysctl {n.replace('/', '.')}={switches[n]}` as root" for n in wrong) or (
            "run udf outside of the chroot" if _in_plain_chroot() else "set user.max_user_namespaces above 0 as root"
        )
    yield Finding("namespaces", "note", text, fix)


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = hard != resource.RLIM_INFINITY and hard < 4096
    fix = "raise `ulimit -Hn` (LimitNOFILE= of the unit)" if low else ""
    yield Finding("open files", "note" if low else "ok", f"soft limit {soft}, hard limit {hard}", fix)
    pages = _sysctl("fs/fuse/max_pages_limit")
    if pages:
        yield Finding("fs.fuse.max_pages_limit", "ok", f"{pages} pages in one request")
    for name in ("default_request_timeout", "max_request_timeout"):
        seconds = _sysctl(f"fs/fuse/{name}")
        if seconds not in ("", "0"):
            text = f"{seconds} s: the kernel aborts a whole mount when one request takes longer"
            yield Finding(f"fs.fuse.{name}", "note", text, f"run `sysctl fs.fuse.{name}=0` as root")
    pipe = _sysctl("fs/pipe-max-size")
    yield Finding("fs.pipe-max-size", "ok", f"{pipe} bytes")
    buffers = int(_sysctl("net/core/wmem_max") or 0)
    if os.geteuid() != 0 and buffers < 1 << 20:
        text = f"{buffers} bytes, so large requests of users wait for one another"
        yield Finding("net.core.wmem_max", "note", text, "run `sysctl net.core.wmem_max=1048576` as root")
    else:
        yield Finding("net.core.wmem_max", "ok", f"{buffers} bytes")


def _systemd() -> Iterator[Finding]:
    if not Path("/run/systemd/system").is_dir():
        yield Finding("systemd", "note", "does not run here: start `udf daemon` by other means if you want one")
        return
    version = _first_number(_output("systemctl", "--version"))
    yield Finding("systemd", "ok", version)


def _rules() -> Iterator[Finding]:
    for path in rules_files():
        if os.path.lexists(path):
            try:
                rules = read_rules(path)
            except UserError as exc:
                yield Finding(
                    "rules", "bad", str(exc), "mend it: a daemon goes on with the last rules that it could read"
                )
            else:
                count = len(rules.allow) + len(rules.deny) + len(rules.prefer)
                yield Finding("rules", "ok", f"{path}: {count} about devices")


def _runtime_directory() -> Iterator[Finding]:
    if os.geteuid() == 0:
        yield Finding("runtime directory", "ok", "/run/udf")
        return
    path = os.environ.get("XDG_RUNTIME_DIR", "")
    if path and os.access(path, os.W_OK):
        yield Finding("runtime directory", "ok", f"{path}/udf")
    else:
        fix = "log in through PAM and systemd-logind, or set XDG_RUNTIME_DIR to a private directory"
        text = f"{rundir()}, because XDG_RUNTIME_DIR is not set to a writable directory"
        yield Finding("runtime directory", "note", text, fix)


def _stale_mounts() -> Iterator[Finding]:
    until = time.monotonic() + STALE_SECONDS
    for mount in read_mountinfo():
        if mount.fstype != FSTYPE or time.monotonic() > until:
            continue
        try:
            stale = is_stale(mount.mountpoint, timeout=0.5)
        except OSError:  # it went meanwhile, or the interpreter may not start another one
            continue
        if stale:
            fix = f"run `udf umount {mount.mountpoint}`"
            yield Finding("stale mount", "note", f"{mount.mountpoint} is mounted and nobody serves it", fix)


def _sysctl(name: str) -> str:
    """The value, or "" where this kernel has no such setting."""
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return ""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def _first_number(text: str) -> str:
    found = re.search(r"(?<![a-z])\d+(\.\d+)*", text)  # the 3 of fusermount3 is none
    return found.group() if found else "version unknown"
