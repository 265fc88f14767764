"""`make demo`: filesystems, and then devices, in a minute; checked while they are shown.

Owns: one temporary directory with a daemon of its own, so that it neither needs nor disturbs an installed one.
Everything goes through the command line that a user has. Ends with an error if anything is not as it should be, and
leaves nothing behind however it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import demo_devices

SOURCE = Path("/usr/share/doc")
MOST_FILES = 500
MOST_BYTES = 4 << 20
MOST_PASSES = 5
PATIENCE = 30.0
UDF = [sys.executable, "-m", "udf"]


class DemoError(Exception):
    """Something is not as it should be."""


def main() -> int:
    """Run the demo in a scratch directory; 0 if all was as it should be."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    scratch = Path(tempfile.mkdtemp(prefix="udf-demo-"))
    try:
        with Stage(scratch, bold, plain) as stage:
            run(stage)
            demo_devices.run(stage)
        check(not list(scratch.iterdir()), f"something is left in {scratch}")
    except (DemoError, demo_devices.DeviceDemoError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader went away; Python would complain again when it flushes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted, cleaned up", file=sys.stderr)
        return 130
    finally:
        _remove(scratch)
    print(f"\n{bold}All checks passed, everything is unmounted, no process is left.{plain}")
    return 0


class Stage:
    """The daemon of the demo and the mounts on it."""

    def __init__(self, scratch: Path, bold: str, plain: str) -> None:
        self.scratch = scratch
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
                [*UDF, "daemon", "--socket", str(self.socket)],
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
            print("$ udf " + " ".join(arguments), flush=True)
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


def run(stage: Stage) -> None:
    """The demo itself."""
    stage.title("A real directory tree, mirrored by a driver that is an ordinary process")
    doc = stage.mount("doc", "-t", "passthrough", "-o", "ro,timeout=60", str(SOURCE))
    show_checksums(stage, doc)

    stage.title("The smallest filesystem: fs/hello.py")
    hello = stage.mount("hello", "-t", "hello")
    for path in sorted(hello.iterdir()):
        content = path.read_text()
        print(f"$ cat {path}\n{content.rstrip()}")
        check(content.strip() != "", f"{path} is empty")

    stage.title("A filesystem in memory, with everything that POSIX asks for")
    show_memory(stage.mount("mem", "-t", "memfs"))

    stage.title("What the supervisor knows")
    stage.udf("status", show=True)

    stage.title("Every request of a few commands, live")
    show_trace(stage, doc)

    stage.title("Unmount")
    stage.unmount_all()
    rows = json.loads(stage.udf("status", "--json"))["mounts"]
    check(rows == [], f"udf status still lists {rows}")


def show_checksums(stage: Stage, doc: Path) -> None:
    names = sorted(p.name for p in SOURCE.iterdir())
    check(sorted(p.name for p in doc.iterdir()) == names, f"{doc} lists other names than {SOURCE}")
    print(f"$ ls {doc} | head -3\n" + "\n".join(names[:3]) + f"\n… {len(names)} names, the same as in {SOURCE}")
    files = list(regular_files(SOURCE))
    check(bool(files), f"{SOURCE} has no files on this machine")
    want = [checksum(SOURCE / name) for name in files]
    print(f"sha256 of {len(files)} files, compared with {SOURCE}:")
    trips: list[int] = []
    # Two passes, unless somebody has the kernel drop its caches meanwhile.
    while len(trips) < MOST_PASSES and (len(trips) < 2 or trips[-1] > trips[0] / 2):
        before, start = stage.round_trips(doc), time.perf_counter()
        got = [checksum(doc / name) for name in files]
        seconds = time.perf_counter() - start
        trips.append(stage.round_trips(doc) - before)
        wrong = [str(name) for name, a, b in zip(files, want, got, strict=True) if a != b]
        check(not wrong, f"{len(wrong)} files differ from {SOURCE}, the first is {wrong[:1]}")
        print(f"  pass {len(trips)}: all equal, {seconds * 1000:7.0f} ms, {trips[-1]:6} round trips to the driver")
    check(trips[0] > 0, "no request reached the driver, so nothing was proved")
    check(trips[-1] <= trips[0] / 2, "no pass was answered from the caches")
    check(int(stage.status(doc)["counters"]["cache_hits"]) > 0, "the shim answered nothing from its caches")


def show_memory(mem: Path) -> None:
    note = mem / "notes" / "today"
    note.parent.mkdir()
    note.write_text("written to memory\n")
    os.link(note, mem / "again")
    os.symlink("notes/today", mem / "shortcut")
    note.rename(mem / "notes" / "yesterday")
    with (mem / "notes" / "yesterday").open("r+") as file:
        (mem / "notes" / "yesterday").unlink()
        file.seek(0, os.SEEK_END)
        file.write("still open after its name went\n")
    text = (mem / "again").read_text()
    listing = subprocess.run(["ls", "-l", str(mem)], capture_output=True, text=True, check=True).stdout.rstrip()
    print(f"$ ls -l {mem}\n{listing}\n$ cat {mem}/again\n{text.rstrip()}")
    check(text == "written to memory\nstill open after its name went\n", "the file has other bytes than were written")
    check((mem / "again").stat().st_nlink == 1, "the link count is wrong")


def show_trace(stage: Stage, doc: Path) -> None:
    command = [*UDF, "trace", str(doc), "--socket", str(stage.socket)]
    print(f"$ udf trace {doc} &   # and then a stat, two ls and a statfs")

    def look() -> None:
        with contextlib.suppress(FileNotFoundError):
            (doc / f"no-such-file-{time.monotonic_ns()}").stat()

    def list_and_measure() -> None:
        folder = next(path for path in sorted(doc.iterdir()) if path.is_dir())
        os.listdir(folder)
        os.statvfs(doc)

    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as trace:
        try:
            text = until_traced(trace, look, "LOOKUP") + until_traced(trace, list_and_measure, "STATFS")
        finally:
            trace.send_signal(signal.SIGINT)
    print(text.rstrip())


def until_traced(trace: subprocess.Popen[bytes], act: Callable[[], None], word: str) -> str:
    """Act until the trace shows it, and return what it showed: it begins a moment after its heading."""
    assert trace.stdout is not None
    shown = b""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        act()
        while select.select([trace.stdout], [], [], 0.5)[0]:
            data = os.read(trace.stdout.fileno(), 65536)
            if not data:
                raise DemoError("the trace ended by itself")
            shown += data
            if word.encode() in shown and shown.endswith(b"\n"):
                return shown.decode()
    raise DemoError(f"the trace shows no {word}")


def regular_files(root: Path) -> Iterator[Path]:
    """Names below `root` of at most MOST_FILES regular files of at most MOST_BYTES."""
    count = 0
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_symlink() or not path.is_file() or path.stat().st_size > MOST_BYTES:
                continue
            yield path.relative_to(root)
            count += 1
            if count == MOST_FILES:
                return


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def mounts_below(path: Path) -> list[str]:
    """Mountpoints at or below `path`, by the kernel's table."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        points = [line.split()[4] for line in table]
    return [point for point in points if point == str(path) or point.startswith(f"{path}/")]


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


if __name__ == "__main__":
    sys.exit(main())
