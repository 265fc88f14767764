"""Where a demo takes place: one temporary directory with a daemon of its own.

Owns: the directory, the daemon, the mounts that the acts make, and the end of all of them, however the demo ends. It
neither needs nor disturbs an installed daemon, and everything goes through the command line that a user has.
Called by: demo.py and demo_parts.py, which show something on it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

PATIENCE = 30.0
UDF = [sys.executable, "-m", "udf"]


class DemoError(Exception):
    """Something is not as it should be."""


def show(acts: Iterable[Callable[[Stage], None]], *daemon: str) -> int:
    """Run a demo in a scratch directory, its daemon with these arguments; 0 if all was as it should be."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    scratch = Path(tempfile.mkdtemp(prefix="udf-demo-"))
    began = time.monotonic()
    try:
        with Stage(scratch, bold, plain, daemon) as stage:
            for act in acts:
                act(stage)
        check(not list(scratch.iterdir()), f"something is left in {scratch}")
    except BrokenPipeError:  # the reader went away; Python would complain again when it flushes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (DemoError, OSError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted, cleaned up", file=sys.stderr)
        return 130
    finally:
        _remove(scratch)
    seconds = time.monotonic() - began
    print(f"\n{bold}All checks passed, everything is unmounted, no process is left ({seconds:.0f} s).{plain}")
    return 0


class Stage:
    """The daemon of the demo and the mounts on it."""

    def __init__(self, scratch: Path, bold: str, plain: str, daemon: Iterable[str] = ()) -> None:
        self.scratch = scratch
        self._arguments = daemon
        self.socket = scratch / "udf.sock"
        self.log = scratch / "daemon.log"
        self.bold, self.plain = bold, plain
        self.mounted: list[Path] = []
        self.daemon: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Stage:
        """Start the daemon and wait until it says that it is ready."""
        try:
            self._start_daemon()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_daemon(self) -> None:
        notify = self.scratch / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, self.log.open("wb") as log:
            ready.bind(str(notify))
            ready.settimeout(PATIENCE)
            environment = {**os.environ, "NOTIFY_SOCKET": str(notify)}
            self.daemon = subprocess.Popen(
                [*UDF, "daemon", "--socket", str(self.socket), *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the demo alone, which then stops the daemon in order
            )
            try:
                while b"READY=1" not in ready.recv(4096):
                    pass
            except TimeoutError:
                raise DemoError(f"the daemon did not get ready:\n{self.log.read_text(errors='replace')}") from None
            finally:
                notify.unlink()

    def title(self, text: str) -> None:
        print(f"\n{self.bold}== {text}{self.plain}", flush=True)

    def udf(self, *arguments: str, show: bool = False) -> str:
        """Run one command on the demo's daemon, shown as a user would type it."""
        if show:
            print("$ udf " + " ".join(map(quoted, arguments)), flush=True)
        command = [*UDF, *arguments, "--socket", str(self.socket)]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode != 0:
            raise DemoError(f"udf {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
        if show and done.stdout.strip():
            print(done.stdout.rstrip(), flush=True)
        return done.stdout

    def mount(self, name: str, *arguments: str) -> Path:
        mountpoint = self.scratch / name
        mountpoint.mkdir()
        self.mounted.append(mountpoint)
        self.udf("mount", *arguments, str(mountpoint), show=True)
        check(mounts_below(mountpoint) == [str(mountpoint)], f"{mountpoint} is not mounted")
        return mountpoint

    def unmount_all(self) -> None:
        while self.mounted:
            mountpoint = self.mounted[-1]
            self.udf("umount", str(mountpoint), show=True)
            self.mounted.pop()
            check(not mounts_below(mountpoint), f"{mountpoint} is still mounted")
            mountpoint.rmdir()

    def status(self, mountpoint: Path) -> dict[str, Any]:
        """The row of one mount in `udf status --json`."""
        rows = json.loads(self.udf("status", "--json"))["mounts"]
        for row in rows:
            if row["mountpoint"] == str(mountpoint):
                return dict(row)
        raise DemoError(f"udf status does not know {mountpoint}")

    def round_trips(self, mountpoint: Path) -> int:
        return int(self.status(mountpoint)["counters"]["driver_round_trips"])

    def close(self) -> None:
        """Stop the daemon, which unmounts what it serves; whatever is left then is taken away by force."""
        if self.daemon is not None:
            self.daemon.terminate()
            try:
                status = self.daemon.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(self.daemon.pid, signal.SIGKILL)
                status = self.daemon.wait()
            self.daemon = None
            if sys.exc_info()[0] is None:
                check(status == 0, f"the daemon ended with {status}:\n{self.log.read_text(errors='replace')}")
        self.log.unlink(missing_ok=True)


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def mounts_below(path: Path) -> list[str]:
    """Mountpoints at or below `path`, by the kernel's table."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        points = [line.split()[4] for line in table]
    return [point for point in points if point == str(path) or point.startswith(f"{path}/")]


def quoted(word: str) -> str:
    """A word as it would be typed."""
    return f"'{word}'" if " " in word else word


def check(holds: bool, sentence: str) -> None:
    if not holds:
        raise DemoError(sentence)


def _remove(scratch: Path) -> None:
    for point in reversed(mounts_below(scratch)):
        subprocess.run(["umount", "-l", point], stderr=subprocess.DEVNULL, check=False)
    if not mounts_below(scratch):  # never delete through a mount: that would be the user's own files
        shutil.rmtree(scratch, ignore_errors=True)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
