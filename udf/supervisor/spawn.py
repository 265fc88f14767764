"""Starting the processes of a mount: shims and driver hosts.

Owns: argv, environment, descriptors and kernel protection (OOM score, IO flusher); what happens then is child.py's.
Must never: wait in the loop, or start a child from a worker thread: children ask for PR_SET_PDEATHSIG, which the kernel
sends when the *thread* that started them ends, and worker threads end after some idle seconds (so no
trio.lowlevel.open_process, which uses one). A start in the loop costs about a millisecond (vfork).
Called by: mounts.py and paths.py.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import site
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from udf.errors import UserError
from udf.supervisor import zygote
from udf.supervisor.child import Child, Host

PACKAGE_PARENT = str(Path(__file__).resolve().parent.parent.parent)
LINK_BUFFER = 2 * 1024 * 1024  # a 128 KiB message needs more than the default of 208 KiB leaves
SHIELDED_SCORE = -900  # below every ordinary process; not -1000, so that a leak of ours can still be ended
PR_SET_IO_FLUSHER = 57
SO_SNDBUFFORCE = 32

# A daemon's environment is not the caller's; only what every program may know is passed on.
_COMMON_ENVIRONMENT = ("PATH", "LANG", "LANGUAGE", "TZ", "TMPDIR")
_OWN_ENVIRONMENT = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "JOURNAL_STREAM", "INVOCATION_ID")

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Identity:
    """Who somebody is for the kernel."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    @classmethod
    def own(cls) -> Identity:
        """This process."""
        return cls(os.geteuid(), os.getegid(), tuple(os.getgroups()))


def control_pair() -> tuple[socket.socket, socket.socket]:
    """A control socket: our end (non-blocking), the child's end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs


def link_pair() -> tuple[socket.socket, socket.socket]:
    """The link of a mount: the shim's end, the driver's end, with buffers as large as we may."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in pair:
        try:
            end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, LINK_BUFFER)
        except PermissionError:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LINK_BUFFER)  # cut to wmem_max by the kernel
    return pair


def start_shim(name: str, control: socket.socket, output: int, run_as: Identity | None) -> Child:
    """Start a mount's shim. `run_as` is another user than ours: it then mounts with that user's rights only."""
    return _start_shim("udf.shim", name, control, output, run_as)


def start_block_shim(name: str, control: socket.socket, output: int) -> Child:
    """Start the shim of a block driver. It opens nothing itself: its sockets are given to it."""
    return _start_shim("udf.block.shim", name, control, output, None)


def _start_shim(module: str, name: str, control: socket.socket, output: int, run_as: Identity | None) -> Child:
    environment = {"PYTHONPATH": PACKAGE_PARENT, "PATH": _path(), "UDF_INSTANCE": name}
    argv = [sys.executable, "-P", "-s", "-S", "-m", module, str(control.fileno())]
    child = _start(argv, environment, output, output, run_as, control.fileno())
    _set_oom_score(child.pid, SHIELDED_SCORE)
    return child


def start_host(name: str, control: socket.socket, output: int, environment: Mapping[str, str]) -> Host:
    """Start a driver host. Its sandbox (and its user) is what the `start` message says; it begins as what we are.

    It is a fork that stood by, if there is one; else an interpreter of its own, which takes a tenth of a second more.
    """
    environment = {**environment, **_import_path(), "UDF_INSTANCE": name}
    ahead = zygote.current.get()
    host = None if ahead is None else ahead.take(name, control, output, environment)
    if host is not None:
        return host
    ours, theirs = control_pair()
    try:
        with theirs:
            # Where another user's home is named, its site-packages must not run in here, as what we are.
            site_packages = [] if environment.get("HOME") == os.environ.get("HOME") else ["-s"]
            argv = [sys.executable, "-P", *site_packages, "-m", "udf.host", str(control.fileno()), str(theirs.fileno())]
            with _unshielded():
                popen = _popen(argv, environment, output, output, None, control.fileno(), theirs.fileno())
        _set_oom_score(popen.pid, max(0, _first_score))
        return Host(popen, ours)
    except BaseException:
        ours.close()
        raise


async def wait_for_host(seconds: float) -> None:
    """Until a fork stands by that `start_host` will take, so long at most."""
    ahead = zygote.current.get()
    if ahead is not None:
        with trio.move_on_after(seconds):
            await ahead.wait()


def new_zygote() -> zygote.Zygote:
    """What hosts are forked from; it does so as long as its `run` does."""
    kept = {
        key: value for key, value in os.environ.items() if key in (*_COMMON_ENVIRONMENT, "HOME") or key[:3] == "LC_"
    }
    environment = {"PATH": _path(), **kept, **_import_path()}

    def start(requests: socket.socket, output: int) -> Child:
        argv = [sys.executable, "-P", "-m", "udf.host.zygote", str(requests.fileno())]
        with _unshielded():
            child = _start(argv, environment, output, output, None, requests.fileno())
        _set_oom_score(child.pid, max(0, _first_score))  # before its first fork, which inherits it
        return child

    return zygote.Zygote(start, environment)


def start_emulator(path: Path, control: socket.socket, output: int) -> Child:
    """Start the process of the emulated devices. It may read and write files as we may, and nothing more than that."""
    argv = [sys.executable, "-P", "-s", "-m", "udf.testing.devices", "--socket", str(path)]
    argv += ["--control", str(control.fileno())]
    setpriv = shutil.which("setpriv", path=_path())
    if setpriv is not None and os.geteuid() == 0:
        kept = "-all,+dac_override,+dac_read_search,+fowner"
        argv = [setpriv, "--no-new-privs", "--inh-caps", "-all", "--bounding-set", kept, "--", *argv]
    environment = {**_common(os.environ), **_import_path()}
    with _unshielded():
        child = _start(argv, environment, output, output, None, control.fileno())
    _set_oom_score(child.pid, max(0, _first_score))
    return child


def start_program(module: str, arguments: Sequence[str], output: int, run_as: Identity | None) -> Child:
    """Start one of our own short-lived programs (standard library only), whose stdout is `output`."""
    argv = [sys.executable, "-P", "-s", "-S", "-m", module, *arguments]
    return _start(argv, {"PYTHONPATH": PACKAGE_PARENT, "PATH": _path()}, output, None, run_as)


def _start(
    argv: list[str],
    environment: Mapping[str, str],
    stdout: int,
    stderr: int | None,
    run_as: Identity | None,
    *passed: int,
) -> Child:
    return Child(_popen(argv, environment, stdout, stderr, run_as, *passed))


def _popen(
    argv: list[str],
    environment: Mapping[str, str],
    stdout: int,
    stderr: int | None,
    run_as: Identity | None,
    *passed: int,
) -> subprocess.Popen[bytes]:
    try:
        # A session of its own: a terminal's ^C and hang-up are for the supervisor, which then unmounts in order.
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            pass_fds=passed,
            start_new_session=True,
            cwd="/",
            env=environment,
            user=run_as.uid if run_as else None,
            group=run_as.gid if run_as else None,
            extra_groups=list(run_as.groups) if run_as else None,
        )
    except PermissionError as exc:
        if run_as is None:
            raise
        raise UserError(
            f"the user {run_as.uid} may not run {argv[0]}: install udf and its interpreter where every user may read"
        ) from exc


def private_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What a driver gets from the user's own `udf mount`: all but what is meant for us or steers our interpreter."""
    return {
        key: value
        for key, value in environment.items()
        if key not in _OWN_ENVIRONMENT and not key.startswith(("PYTHON", "LISTEN_", "LD_"))
    }


def daemon_environment(environment: Mapping[str, str], home: str, user: str) -> dict[str, str]:
    """What a driver gets from a daemon: nothing of the daemon's own but the common things."""
    return {**_common(environment), "HOME": home, "USER": user, "LOGNAME": user}


def _common(environment: Mapping[str, str]) -> dict[str, str]:
    kept = {key: value for key, value in environment.items() if key in _COMMON_ENVIRONMENT or key.startswith("LC_")}
    return {"PATH": _path(), **kept}


def shield() -> None:
    """Protect this process and thread from the OOM killer and from waiting on its own write-back, where permitted."""
    global _first_score, _shielded  # noqa: PLW0603 - facts about this process, which exists once
    _first_score = _read_oom_score()
    _set_oom_score(os.getpid(), SHIELDED_SCORE)
    _shielded = _libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0


_first_score = 0
_shielded = False


@contextmanager
def _unshielded() -> Iterator[None]:
    # The flag is the thread's and is inherited. A driver must not have it: its memory would come before everyone's.
    if not _shielded:
        yield
        return
    _libc.prctl(PR_SET_IO_FLUSHER, 0, 0, 0, 0)
    try:
        yield
    finally:
        _libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0)


def _read_oom_score() -> int:
    try:
        return int(Path("/proc/self/oom_score_adj").read_text())
    except (OSError, ValueError):
        return 0


def _set_oom_score(pid: int, score: int) -> None:
    try:
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(score))
    except OSError:
        pass  # needs CAP_SYS_RESOURCE to go down; a user's mounts live without


def _path() -> str:
    return os.environ.get("PATH") or os.defpath


def _import_path() -> dict[str, str]:
    # Where udf is installed the interpreter finds it, and a PYTHONPATH would only leak into a driver's own children.
    installed = [*site.getsitepackages(), site.getusersitepackages()]
    return {} if PACKAGE_PARENT in installed else {"PYTHONPATH": PACKAGE_PARENT}
