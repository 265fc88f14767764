"""The contestants: native, C passthrough_ll, the same pyfuse3 driver mounted directly, and UDF with it.

Owns: how each is built, mounted and unmounted, and which processes serve it. Every one gets the same source, the same
time-outs for names and attributes, and permission checks by the kernel. Must never: leave a process or a mount.
Called by lab.py, which keeps the list of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks import machine
from udf.shim.spin import Spin

TREE = Path(__file__).resolve().parents[2]
DRIVER = TREE / "fs/passthrough/__init__.py"
EXAMPLE = Path("/usr/share/doc/libfuse3-dev/examples/passthrough_ll.c")
VALID_SECONDS = 3600  # names and attributes: the same for all, longer than any benchmark
START_TIMEOUT = 30.0


class UnavailableError(Exception):
    """A contestant cannot take part; the sentence says why."""


@dataclass
class Mount:
    """A contestant that is mounted. `processes`: who serves it, by role."""

    path: Path
    processes: dict[str, list[int]] = field(default_factory=dict)

    @property
    def pids(self) -> list[int]:
        return [pid for pids in self.processes.values() for pid in pids]


class Peer(ABC):
    """One contestant."""

    name: str
    text: str  # what it is, for the head of the report
    has_own_cache = True  # False: dropping its cached pages would drop the source's

    def prepare(self, folder: Path) -> None:
        """Build what it needs in `folder`. Raises UnavailableError."""
        del folder

    @abstractmethod
    def mounted(self, source: Path, at: Path) -> contextlib.AbstractContextManager[Mount]:
        """Mount `source` on the empty directory `at` for the time of a block. Raises UnavailableError."""


class Native(Peer):
    """The source itself."""

    name = "native"
    text = "the source itself, always from the page cache"
    has_own_cache = False

    @contextlib.contextmanager
    def mounted(self, source: Path, at: Path) -> Iterator[Mount]:
        del at
        yield Mount(source)


class PassthroughLL(Peer):
    """libfuse's example, built from the source that libfuse3-dev ships."""

    def __init__(self, cache: str) -> None:
        self._cache = cache
        self.name = "C" if cache == "auto" else f"C {cache}"
        said = "its default" if cache == "auto" else "keeps pages over opens"
        self.text = f"libfuse's passthrough_ll, multi-threaded, cache={cache} ({said})"
        self._program: Path | None = None

    def prepare(self, folder: Path) -> None:
        program = folder / "passthrough_ll"
        self._program = program
        if program.exists():
            return
        if not EXAMPLE.exists():
            raise UnavailableError(f"{EXAMPLE} is not there (package libfuse3-dev)")
        try:
            found = subprocess.run(
                ["pkg-config", "--cflags", "--libs", "fuse3"], check=True, capture_output=True, text=True
            )
            command = ["cc", "-O2", "-w", str(EXAMPLE), "-o", str(program), *found.stdout.split()]
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UnavailableError(f"passthrough_ll cannot be built: {error}") from None

    @contextlib.contextmanager
    def mounted(self, source: Path, at: Path) -> Iterator[Mount]:
        options = f"source={source},cache={self._cache},timeout={VALID_SECONDS},default_permissions"
        if os.geteuid() == 0:
            options += ",allow_other"
        with _served([str(self._program), "-f", "-o", options, str(at)], at) as mount:
            yield mount


class Direct(Peer):
    """The same driver class as UDF's on its own /dev/fuse, with pyfuse3's receive loop or with UDF's."""

    def __init__(self, receive: str) -> None:
        self._receive = receive
        self.name = "direct" if receive == "pyfuse3" else "direct pump"
        whose = "by stock pyfuse3" if receive == "pyfuse3" else "with the receive loop of UDF's driver host"
        self.text = f"the same pyfuse3 driver class as in UDF, mounted directly {whose}"

    @contextlib.contextmanager
    def mounted(self, source: Path, at: Path) -> Iterator[Mount]:
        job = {
            "driver": str(DRIVER),
            "class": "Passthrough",
            "source": str(source),
            "options": {"timeout": float(VALID_SECONDS)},
            "mountpoint": str(at),
            "receive": self._receive,
        }
        with _served([sys.executable, str(Path(__file__).with_name("direct.py")), json.dumps(job)], at) as mount:
            yield mount


class Udf(Peer):
    """UDF with the same driver, mounted by `udf mount` through a daemon of the benchmark's own."""

    def __init__(self, daemon: Daemon, option: str, *, before: str = "") -> None:
        self._daemon = daemon
        self._option = option
        self.name = f"UDF {option}" if not before else "UDF before"
        is_default = Spin(None).enabled == (option == "spin")
        self.text = f"udf mount -t passthrough -o {option}" + (" (the default)" if is_default else "")
        if before:
            self.text += f", of the checkout {before}"

    def prepare(self, folder: Path) -> None:
        self._daemon.start(folder)

    @contextlib.contextmanager
    def mounted(self, source: Path, at: Path) -> Iterator[Mount]:
        daemon = self._daemon
        options = f"{self._option},timeout={VALID_SECONDS}" + (",allow_other" if os.geteuid() == 0 else "")
        done = daemon.udf("mount", "-t", "passthrough", "-o", options, str(source), str(at))
        if done.returncode:
            raise UnavailableError(done.stderr.strip())
        try:
            row = daemon.status(at)
            driver = row["driver_pid"]
            yield Mount(at, {"shim": [row["shim_pid"]], "driver": [driver, *machine.descendants(driver)]})
        finally:
            done = daemon.udf("umount", str(at))
            if done.returncode:
                print(f"{at} was not unmounted: {done.stderr.strip()}", file=sys.stderr)
                daemon.udf("umount", "-l", str(at))


class Daemon:
    """`udf daemon` with a socket of its own, so that nobody else's mounts are touched."""

    def __init__(self, tree: str | Path = TREE, name: str = "udf", *arguments: str) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._tree = tree
        self._name = name
        self._arguments = arguments
        self._environment = {**os.environ, "PYTHONPATH": str(tree)}
        self.socket = Path()
        self.log = Path()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, folder: Path) -> None:
        """Start it unless it runs. Raises UnavailableError."""
        if self._process is not None:
            return
        self.socket, self.log = folder / f"{self._name}.socket", folder / f"{self._name}.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "udf", "daemon", "--socket", str(self.socket), *self._arguments],
                cwd=self._tree,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us: we end it when its mounts are gone
                env=self._environment,
            )
        end = time.monotonic() + START_TIMEOUT
        while not self.socket.exists():
            if self._process.poll() is not None or time.monotonic() > end:
                self.stop()
                last = self.log.read_text(errors="replace").strip().rpartition("\n")[2]
                raise UnavailableError(f"udf daemon did not start: {last}")
            time.sleep(0.02)

    def udf(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `udf COMMAND`."""
        return subprocess.run(
            [sys.executable, "-m", "udf", command, "--socket", str(self.socket), *arguments],
            cwd=self._tree,
            stdin=subprocess.DEVNULL,
            check=False,
            capture_output=True,
            text=True,
            start_new_session=True,
            env=self._environment,
        )

    def status(self, at: Path) -> dict[str, Any]:
        """One mount as `udf status --json` shows it. Raises UnavailableError."""
        done = self.udf("status", "--json")
        if done.returncode == 0:
            for row in json.loads(done.stdout)["mounts"]:
                if row["mountpoint"] == str(at):
                    found: dict[str, Any] = row
                    return found
        raise UnavailableError(f"udf status does not show {at}: {done.stderr.strip()}")

    def stop(self) -> None:
        """End it, and with it whatever is still mounted."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _served(command: list[str], at: Path) -> Iterator[Mount]:
    """Run a FUSE server in the foreground until the block ends. Raises UnavailableError."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for us: we unmount first
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(TREE)},
    )
    assert process.stderr is not None
    try:
        end = time.monotonic() + START_TIMEOUT
        while not os.path.ismount(at):
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                last = process.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise UnavailableError(f"{Path(command[0]).name} did not mount: {last or 'no reason given'}")
            time.sleep(0.02)
        yield Mount(at, {"server": [process.pid]})
    finally:
        unmount(at)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        process.stderr.close()


def unmount(at: Path) -> None:
    """Unmount, lazily when it is in use; nothing if it is not mounted."""
    plain, lazy = (["umount"], ["umount", "-l"])
    if os.geteuid() != 0:
        program = shutil.which("fusermount3") or "fusermount3"
        plain, lazy = [program, "-u"], [program, "-u", "-z"]
    if not machine.mounts_below(at):
        return
    for command in (plain, lazy):
        if subprocess.run([*command, str(at)], check=False, capture_output=True).returncode == 0:
            return
