"""The command line as a user has it: processes, a daemon on a socket of its own, mountpoints."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import site
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, make_runtime_dir, mounts_below

PATIENCE = 60.0  # seconds that anything may take on a busy machine


class Command:
    """Runs `udf`, by default against one socket."""

    def __init__(self, control: Path | None = None) -> None:
        self.socket = control

    def argv(self, *arguments: str | Path) -> list[str]:
        at = ["--socket", str(self.socket)] if self.socket else []
        return [sys.executable, "-m", "udf", *map(str, arguments), *at]

    def __call__(self, *arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run to the end, whatever the exit code."""
        more = {"timeout": PATIENCE, "stdin": subprocess.DEVNULL, "cwd": ROOT, **more}
        return subprocess.run(self.argv(*arguments), capture_output=True, text=True, check=False, **more)

    def done(self, *arguments: str | Path, **more: Any) -> str:
        """Run; stdout of a command that must succeed in silence."""
        result = self(*arguments, **more)
        assert (result.returncode, result.stderr) == (0, ""), result
        return result.stdout

    def refused(self, *arguments: str | Path, code: int = 1, **more: Any) -> str:
        """Run; the one sentence of a command that must be refused."""
        result = self(*arguments, **more)
        assert result.returncode == code, result
        assert result.stdout == "", result
        lines = result.stderr.splitlines()
        assert len(lines) == 1, result
        assert lines[0].startswith("udf: "), result
        assert "Traceback" not in lines[0], result
        assert "Errno" not in lines[0], result
        return lines[0]

    def mounts(self) -> list[dict[str, Any]]:
        return list(json.loads(self.done("status", "--json"))["mounts"])


class Daemon:
    """A running `udf daemon`, ready when constructed."""

    def __init__(self, directory: Path, *arguments: str | Path, **environment: str) -> None:
        self.directory = directory
        self.socket = directory / "udf.sock"
        self.udf = Command(self.socket)
        notify = directory / "notify"
        self.log = directory / "daemon.log"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, self.log.open("wb") as log:
            ready.bind(str(notify))
            ready.settimeout(PATIENCE)
            self.process = subprocess.Popen(
                self.udf.argv("daemon", *arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, **environment, "NOTIFY_SOCKET": str(notify)},
                start_new_session=True,
            )
            try:
                while b"READY=1" not in ready.recv(4096):
                    pass
            except BaseException as exc:
                self.process.kill()
                self.process.wait()
                exc.add_note(self.text())
                raise
            finally:
                notify.unlink()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def text(self) -> str:
        return self.log.read_text(errors="replace")


@pytest.fixture
def udf() -> Command:
    return Command()


@contextlib.contextmanager
def running_daemon(directory: Path, *arguments: str | Path, **environment: str) -> Iterator[Daemon]:
    """A daemon that must end in order, unless the test ended it already."""
    running = Daemon(directory, *arguments, **environment)
    try:
        yield running
        if running.process.poll() is None:
            assert running.stop() == 0, running.text()
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


@pytest.fixture
def daemon(runtime_dir: Path) -> Iterator[Daemon]:
    with running_daemon(runtime_dir) as running:
        yield running


@pytest.fixture(scope="module")
def shared_daemon() -> Iterator[Daemon]:
    """One daemon for a table of tests that must not leave anything in it."""
    with make_runtime_dir() as directory, running_daemon(directory) as running:
        yield running


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    path = tmp_path / f"mnt-{os.getpid()}"  # its name is the mount's, and other runs may share the machine
    path.mkdir()
    return path


@pytest.fixture
def no_system_daemon() -> None:
    """For tests of what happens without a daemon."""
    result = Command()("events", "--follow", timeout=5) if Path("/run/udf/io.udf.Supervisor").exists() else None
    if result is not None and result.returncode != 3:
        pytest.skip("a daemon of the system runs here")


@pytest.fixture
def is_mounted() -> Callable[[Path], bool]:
    """By the kernel's table; nothing below the path is asked."""
    return lambda path: str(path) in mounts_below(path)


# A shell in a mount namespace of its own, for a machine that lacks something. It must not keep the mounts of others
# there: those that are unmounted outside would not end before it.
_LET_GO = r"""
sed -n 's/^[^ ]* [^ ]* [^ ]* [^ ]* \([^ ]*\) .* - fuse\(blk\)\{0,1\}[. ].*/\1/p' /proc/self/mountinfo |
    while read -r point; do umount -l "$(printf "$point")" 2>/dev/null; done
"""


def elsewhere(program: str, *arguments: str | Path) -> list[str]:
    """A command that runs a shell's program (with "sh" as $0 before its arguments) in a mount namespace of its own."""
    return ["unshare", "-m", "sh", "-c", _LET_GO + program, "sh", *map(str, arguments)]


NOBODY: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []}


def _python_for_others() -> tuple[str, str] | None:
    """An interpreter and a PYTHONPATH with which another user can run the project; root's own may be root's alone."""
    paths = os.pathsep.join([str(ROOT), *site.getsitepackages()])
    for executable in (sys.executable, "/usr/bin/python3"):
        command = [executable, "-c", "import sys, msgspec, trio, pyfuse3, udf; assert sys.version_info >= (3, 11)"]
        environment = {"PYTHONPATH": paths, "PATH": os.defpath}
        with contextlib.suppress(OSError):
            if (
                subprocess.run(command, cwd="/", env=environment, capture_output=True, check=False, **NOBODY).returncode
                == 0
            ):
                return executable, paths
    return None


@pytest.fixture
def as_nobody() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `udf` as a user without rights."""
    found = _python_for_others() if os.geteuid() == 0 else None
    if found is None:
        pytest.skip("needs root, and an interpreter and a checkout that other users can read")
    executable, paths = found

    def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [executable, "-m", "udf", *map(str, arguments)],
            cwd="/",
            env={"PATH": os.environ["PATH"], "PYTHONPATH": paths, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            **NOBODY,
        )

    return run
