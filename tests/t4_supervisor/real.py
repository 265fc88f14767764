"""Running the real daemon and the real private supervisor for the tests: real shims, real hosts, real mounts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from udf.fuse.mountinfo import Mount, find_mount
from udf.supervisor.client import Connection

ROOT = Path(__file__).resolve().parents[2]
CAN_MOUNT = os.path.exists("/dev/fuse") and os.geteuid() == 0
needs_fuse = pytest.mark.skipif(not CAN_MOUNT, reason="needs /dev/fuse and root")
PATIENCE = 40.0  # seconds that anything may take on a busy machine
AT_ONCE = 10.0  # seconds: more than a busy machine takes for what waits for nobody, less than any time of grace

DAEMON_PROGRAM = """
import sys
from pathlib import Path
from udf.errors import UserError
from udf.supervisor import daemon, sockets
sockets.rundir = lambda: Path(sys.argv[2])
try:
    sys.exit(daemon.main(sys.argv[1]))
except UserError as error:
    sys.exit(f"udf: {error}")
"""
PRIVATE_PROGRAM = """
import json, sys
from pathlib import Path
from udf.errors import UserError
from udf.supervisor import private, sockets
sockets.rundir = lambda: Path(sys.argv[2])
try:
    sys.exit(private.run_foreground(json.loads(sys.argv[1]), lambda answer: print(json.dumps(answer), flush=True)))
except UserError as error:
    sys.exit(f"udf: {error}")
"""


def start(
    program: str, *arguments: str, environment: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def start_private(request: str, rundir: str) -> subprocess.Popen[str]:
    """`udf mount -f`."""
    return start(PRIVATE_PROGRAM, request, rundir)


class Daemon:
    """A running `udf daemon` of its own."""

    def __init__(self, directory: Path, environment: Mapping[str, str] | None = None) -> None:
        self.path = directory / "run" / "control"
        self.process = start(DAEMON_PROGRAM, str(self.path), str(directory / "run"), environment=environment)
        self._log: str | None = None

    def connect(self) -> Connection:
        wait_for(lambda: self.path.exists() or self.process.poll() is not None)
        return Connection(self.path)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        with self.connect() as connection:
            return connection.call(method, **parameters)

    def mount(self, mountpoint: Path, driver: str = "hello", **parameters: Any) -> dict[str, Any]:
        if find_mount(str(mountpoint)) is None:
            mountpoint.mkdir(exist_ok=True)
        return self.call("Mount", driver=driver, mountpoint=str(mountpoint), **parameters)

    def status(self, mountpoint: Path) -> dict[str, Any]:
        (row,) = self.call("Status", mountpoint=str(mountpoint))["mounts"]
        return row  # type: ignore[no-any-return]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self._log is None:
            self.process.send_signal(number)
            self.finish()
        return self.process.returncode

    def finish(self) -> None:
        _, self._log = self.process.communicate(timeout=PATIENCE)

    @property
    def log(self) -> str:
        assert self._log is not None, "the log can be read when the daemon has ended"
        return self._log


def wait_for(condition: Callable[[], Any]) -> Any:
    """Until it is true; for what other processes do and nobody tells us of."""
    until = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)
    return result


def mounted_at(path: Path) -> Mount | None:
    return find_mount(str(path))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children_named(pid: int, *names: str) -> list[int]:
    """The children of a supervisor by the name that ps(1) shows."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{child}/comm").read_text().strip() in names:
                found.append(int(child))
    return found


def idle_children(pid: int) -> list[int]:
    """The zygote and what stands by, once both are there."""
    return wait_for(  # type: ignore[no-any-return]
        lambda: children_named(pid, "udf-standby") and children_named(pid, "udf-zygote", "udf-standby")
    )
