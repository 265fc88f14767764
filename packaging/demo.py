"""`make demo`: a stick is plugged in, used, robbed of its drivers, pulled out in the middle of a copy, and put back.

Owns: the stick's image, which mkfs.fat makes and mtools fill and read, so that others than UDF say what is on it; the
program that copies. Checked while it is shown; leaves nothing behind however it ends (demo_stage.py).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo_stage import PATIENCE, DemoError, Stage, check, checksum, quoted, show

KIB, MIB = 1 << 10, 1 << 20
LABEL, SERIAL = "HOLIDAY", "DEMO0001"
FILM = 24 * MIB
CHUNK = 128 * KIB
SLOW = "ms=2"  # each transfer of the stick takes so long, as of a real one
SOON = 5.0  # seconds, within which whoever waits for a stick that is pulled out is told, on a slow machine too
CALM = 1.0  # seconds after the last write, when the stick is flushed and marked as clean
LETTER = "Dear all,\nthe film of the lake is on this stick.\n"
OTHER = "Read this one only when the stick is back.\n"


def run(stage: Stage) -> None:
    """The life of a stick."""
    stick = Stick(stage)
    stick.make()
    plug_in(stick)
    work(stick)
    kill_both(stick)
    with Copy(stick.film, stick.at / "copy of the film.bin") as copy:
        pull_out(stick, copy)
        put_back(stick, copy)
    pull_unannounced(stick)
    eject(stick)


class Stick:
    """The emulated stick, and the directory on which it is mounted."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.image = stage.scratch / "stick.img"
        self.film = stage.scratch / "film.bin"
        self.at = stage.scratch / "media" / LABEL
        self.sum = ""

    def make(self) -> None:
        self.stage.title("A stick with a film and two letters on it")
        with self.image.open("wb") as file:
            file.truncate(320 * MIB)
        self.film.write_bytes(random.Random(5).randbytes(FILM))
        self.sum = checksum(self.film)
        self.tool("mkfs.fat", "-F", "32", "-s", "8", "-n", LABEL, str(self.image), words="mkfs.fat")
        for name, text in (("letter.txt", LETTER), ("other letter.txt", OTHER)):
            path = self.stage.scratch / name
            path.write_text(text)
            self.tool("mcopy", "-i", str(self.image), str(path), "::")
            path.unlink()
        self.tool("mcopy", "-i", str(self.image), str(self.film), "::")

    def tool(self, *command: str, words: str = "") -> bytes:
        """Run a program of dosfstools or mtools on the image, shown as a user would type it. Its output."""
        print("$ " + " ".join(map(quoted, command)), flush=True)
        path = shutil.which(command[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        check(path is not None, f"{command[0]} is not installed: `make setup` does that")
        done = subprocess.run([path or "", *command[1:]], stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if words and done.returncode == 0:
            print(done.stdout.decode(errors="replace").splitlines()[0], flush=True)
        told = (done.stdout + done.stderr).decode(errors="replace")
        check(done.returncode == 0, f"{command[0]} ended with {done.returncode}: {told.strip()}")
        return done.stdout

    def plug(self) -> None:
        slow = [word for ep in ("0x81", "2") for word in ("--faults", f"delay ep={ep} {SLOW}")]
        self.stage.udf("plug", str(self.image), "--serial", SERIAL, *slow, show=True)
        check(os.path.ismount(self.at), f"{self.at} is no mountpoint")

    def unplug(self) -> None:
        self.stage.udf("unplug", self.image.stem, show=True)

    def row(self, driver: str) -> dict[str, Any]:
        """The row of `udf status --json` of what is served by a driver."""
        rows = json.loads(self.stage.udf("status", "--json"))["mounts"]
        for row in rows:
            if row["driver"] == driver:
                return dict(row)
        raise DemoError(f"udf status shows nothing that is served by {driver}")

    def states(self) -> str:
        """What `udf status` says of the device and of the volume on it."""
        states = {driver: self.row(driver)["state"] for driver in ("usb_storage", "fat")}
        check(len(set(states.values())) == 1, f"not the same state: {states}")
        return str(states["fat"])

    def fsck(self) -> None:
        """What a volume must be when nothing was left half done: clean, in the eyes of dosfstools."""
        print(self.tool("fsck.fat", "-n", str(self.image)).decode(errors="replace").splitlines()[-1], flush=True)

    def check_by_mtools(self, name: str) -> None:
        path = self.stage.scratch / "seen.bin"
        self.tool("mcopy", "-i", str(self.image), f"::{name}", str(path))
        check(checksum(path) == self.sum, f"mtools read other bytes from {name!r} than were written")
        path.unlink()


class Copy(threading.Thread):
    """A program that copies a film to the stick. Told of an error it stops, and keeps its file open."""

    def __init__(self, source: Path, target: Path) -> None:
        super().__init__(daemon=True)
        self._source = source
        self._stopped = threading.Event()
        self._file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self.target = target
        self.done = 0
        self.error: OSError | None = None
        self.waited = 0.0  # seconds, for the error

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its file, whatever has become of that."""
        self._stopped.set()
        if self.is_alive():
            self.join(PATIENCE)
        file, self._file = self._file, -1
        if file >= 0:
            with contextlib.suppress(OSError):
                os.close(file)

    def run(self) -> None:
        """From where the last write ended to the end, which is on the stick then."""
        self.error = None
        began = 0.0
        try:
            with self._source.open("rb") as source:
                source.seek(self.done)
                while not self._stopped.is_set() and (data := source.read(CHUNK)):
                    began = time.monotonic()
                    self.done += os.write(self._file, data)
            if not self._stopped.is_set():  # else the file may be closed: who is just starting is not waited for
                os.fsync(self._file)
        except OSError as error:
            self.error, self.waited = error, time.monotonic() - began

    def go_on(self) -> None:
        """Do it to its end, in the same open file."""
        self.run()
        check(self.error is None, f"the copy cannot go on: {self.error}")


def plug_in(stick: Stick) -> None:
    stick.stage.title("Plug it in")
    stick.plug()
    stick.stage.udf("devices", show=True)
    names = sorted(path.name for path in stick.at.iterdir())
    print(f"$ ls '{stick.at}'\n" + "\n".join(names), flush=True)
    check(names == ["film.bin", "letter.txt", "other letter.txt"], f"the stick shows {names}")
    say(
        "The daemon saw a device that says of itself that it is mass storage, gave it to the driver for that (a",
        "process of its own), found a FAT volume on what that serves, and started a second driver for it; the volume",
        "is mounted by its label. No kernel driver was involved, neither for USB nor for FAT.",
    )


def work(stick: Stick) -> None:
    stick.stage.title("Read it, and write to it")
    text = (stick.at / "letter.txt").read_text()
    print(f"$ cat '{stick.at}/letter.txt'\n{text.rstrip()}", flush=True)
    check(text == LETTER, "the letter has other words than were written")
    answer = stick.at / "Answers" / "An answer with a long name.txt"
    answer.parent.mkdir()
    answer.write_text("Thank you!\n")
    print(f"$ mkdir '{answer.parent}'; echo 'Thank you!' > '{answer}'", flush=True)
    print(f"$ cat '{answer}'\n{answer.read_text().rstrip()}", flush=True)
    check(answer.read_text() == "Thank you!\n", "the answer has other words than were written")


def kill_both(stick: Stick) -> None:
    stick.stage.title("Kill both of its drivers, while a program reads the film")
    film = stick.at / "film.bin"
    pids = {driver: stick.row(driver)["driver_pid"] for driver in ("usb_storage", "fat")}
    began = time.monotonic()
    with subprocess.Popen(
        ["sha256sum", str(film)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as reader:
        print(f"$ sha256sum '{film}' &", flush=True)
        for number, (driver, pid) in enumerate(pids.items()):
            wait_until(lambda: has_read(reader.pid, (number + 1) * FILM // 4))  # noqa: B023 - awaited
            check(reader.poll() is None, f"the film was read before {driver} could be killed")
            os.kill(pid, signal.SIGKILL)
            print(f"$ kill -9 {pid}    # {driver}", flush=True)
        told = reader.communicate()[0]
    seconds = time.monotonic() - began
    check(reader.returncode == 0, f"sha256sum ended with {reader.returncode}")
    print(told.rstrip(), flush=True)
    check(told.split()[0] == stick.sum, "the checksum of the film is wrong")
    generations = {driver: stick.row(driver)["generation"] for driver in ("usb_storage", "fat")}
    check(set(generations.values()) == {2}, f"the drivers were not replaced once: {generations}")
    say(
        "Both were replaced at once: the second generation of each goes on where the first one was killed. The program",
        f"that read noticed a pause; its checksum is that of the film ({seconds:.1f} s).",
    )


def pull_out(stick: Stick, copy: Copy) -> None:
    stage = stick.stage
    stage.title("Pull it out in the middle of a copy")
    drops = cache_drops()
    check((stick.at / "letter.txt").read_text() == LETTER, "the letter has other words than before")
    print(f"$ cp film.bin '{copy.target}' &", flush=True)
    copy.start()
    wait_until(lambda: copy.done > FILM // 4 or not copy.is_alive())
    stick.unplug()
    copy.join(PATIENCE)
    check(not copy.is_alive(), "the program that copies hangs")
    check(copy.error is not None, "the program that copies was told nothing")
    check(word(copy.error) == "ENODEV", f"the program that copies was told {word(copy.error)}, not ENODEV")
    check(copy.waited < SOON, f"the program that copies was told after {copy.waited:.1f} s only")
    told = f"{os.strerror(errno.ENODEV)} (ENODEV), {copy.waited * 1000:.0f} ms after it began to write"
    print(f"cp: {told} the piece at {copy.done // KIB} KiB of {FILM // KIB}", flush=True)
    stage.udf("status", show=True)
    check(stick.states() == "DETACHED", f"the stick is {stick.states()}")
    try:
        text = (stick.at / "letter.txt").read_text()
    except OSError as error:
        check(cache_drops() > drops, f"the letter is not cached any more: whoever reads it is told {word(error)}")
        text = f"cat: {error.strerror} (somebody has just had the kernel drop all its caches)"
    else:
        check(text == LETTER, "the letter has other words while the stick is away")
    print(f"$ cat '{stick.at}/letter.txt'\n{text.rstrip()}", flush=True)
    try:
        (stick.at / "other letter.txt").read_text()
        told = "nothing"
    except OSError as error:
        told = word(error)
    check(told == "ENODEV", f"whoever reads what was never read is told {told}, not ENODEV")
    print(f"$ cat '{stick.at}/other letter.txt'\ncat: {os.strerror(errno.ENODEV)}", flush=True)
    say(
        "The write that was under way failed in that very call, with ENODEV: no program was told that something is on",
        "the stick that is not. What had been read already is still there to be read, for a while; all else is told",
        "ENODEV at once. The mount waits for this stick, and no driver runs: the program still has its file open.",
    )


def put_back(stick: Stick, copy: Copy) -> None:
    stage = stick.stage
    stage.title("Put it back: the copy goes on")
    before = copy.done
    stick.plug()
    check(stick.states() == "ACTIVE", f"the stick is {stick.states()}")
    copy.go_on()
    copy.close()
    print(f"cp goes on at {before // KIB} KiB, and ends", flush=True)
    got = checksum(copy.target)
    print(f"$ sha256sum '{copy.target}'\n{got}", flush=True)
    check(got == stick.sum, "the copy differs from the film")
    text = (stick.at / "other letter.txt").read_text()
    print(f"$ cat '{stick.at}/other letter.txt'\n{text.rstrip()}", flush=True)
    check(text == OTHER, "the other letter has other words than were written")
    say(
        "It was the same stick by its serial number, and the same volume: what had been read or written of its meta-",
        "data was compared first, and only then the writes that it may have lost in its own cache were written again.",
        "New drivers took over, and the program went on with the file that it had open.",
    )


def pull_unannounced(stick: Stick) -> None:
    stick.stage.title(f"Pull it out {CALM} s later, without ceremony, and look at it with other programs")
    time.sleep(CALM)
    stick.unplug()
    stick.fsck()
    for name in ("film.bin", "copy of the film.bin"):
        stick.check_by_mtools(name)
    say(
        "Nobody said that it would be pulled out. The stick had been flushed and marked as clean by itself, a moment",
        "after the last write: fsck.fat finds nothing to repair, and mtools read the same film twice.",
    )


def eject(stick: Stick) -> None:
    stage = stick.stage
    stage.title("Put it back once more, and take it out in order")
    stick.plug()
    (stick.at / "film.bin").unlink()
    print(f"$ rm '{stick.at}/film.bin'", flush=True)
    stage.udf("eject", LABEL, show=True)
    check(not stick.at.exists(), f"{stick.at} is left")
    stick.unplug()
    stick.fsck()
    stick.check_by_mtools("copy of the film.bin")
    rows = json.loads(stage.udf("status", "--json"))["mounts"]
    check(rows == [], f"udf status still lists {rows}")
    rows = json.loads(stage.udf("devices", "--json"))["devices"]
    check(rows == [], f"udf devices still lists {rows}")
    stick.image.unlink()
    stick.film.unlink()
    say(
        "`udf eject` had the volume and the stick write out everything, and took the mount and its directory away.",
        "Nothing is left of the drivers.",
    )


def say(*lines: str) -> None:
    print("\n" + "\n".join(lines), flush=True)


def word(error: OSError | None) -> str:
    return "nothing" if error is None else errno.errorcode.get(error.errno or 0, str(error))


def has_read(pid: int, size: int) -> bool:
    """Whether a process is so far in a file that it reads, or has ended."""
    try:
        places = [path.read_text() for path in Path(f"/proc/{pid}/fdinfo").iterdir()]
    except FileNotFoundError:
        return True
    return any(int(text.split()[1]) >= size for text in places)


def cache_drops() -> int:
    """How often somebody had the kernel forget what it has cached, which other programs' tests and benchmarks do."""
    lines = [line.split() for line in Path("/proc/vmstat").read_text().splitlines()]
    return sum(int(count) for name, count in lines if name in ("drop_pagecache", "drop_slab"))


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not holds() and time.monotonic() < until:
        time.sleep(0.005)


if __name__ == "__main__":
    sys.exit(show([run], "--automount"))
