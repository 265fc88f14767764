"""`make demo-parts`: three filesystems, and then three devices; checked while they are shown.

Owns: what is done with the filesystems. Ends with an error if anything is not as it should be, and leaves nothing
behind however it ends (demo_stage.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import demo_devices
from demo_stage import PATIENCE, UDF, DemoError, Stage, check, checksum, show

SOURCE = Path("/usr/share/doc")
MOST_FILES = 500
MOST_BYTES = 4 << 20
MOST_PASSES = 5


def run(stage: Stage) -> None:
    """The filesystems."""
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


if __name__ == "__main__":
    sys.exit(show((run, demo_devices.run)))
