"""The foreign programs that say whether a FAT image is right: mkfs.fat and fsck.fat (dosfstools), and mtools.

Owns how they are called: in UTC, with UTF-8 names, without anybody's configuration, and what their answers mean.
Called by: every test of fs/fat that wants another opinion than our own.
"""

from __future__ import annotations

import datetime
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SECTOR = 512
ENVIRONMENT = {
    "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "MTOOLSRC": "/dev/null",
    "HOME": "/nonexistent",
    "MTOOLS_SKIP_CHECK": "1",  # its own takes a chain that goes to the very last cluster for damage
}


class Verdict(AssertionError):
    """A foreign program found fault with an image."""


def need() -> None:
    """Skip without the programs."""
    for program in ("mkfs.fat", "fsck.fat", "mcopy"):
        if shutil.which(program, path=ENVIRONMENT["PATH"]) is None:
            pytest.skip(f"{program} is not installed")


def call(
    *command: str | Path, zone: str = "UTC", check: bool = True, stdin: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, check=False, env={**ENVIRONMENT, "TZ": zone}, input=stdin
    )
    if check and done.returncode:
        raise Verdict(f"{command}: {done.returncode}: {(done.stderr + done.stdout).decode(errors='replace')}")
    return done


def made(
    path: Path, size: int, *, kind: int = 16, cluster: int = 2048, sector: int = SECTOR, fats: int = 2,
    label: str = "", offset: int = 0, more: tuple[str, ...] = (),
) -> Path:  # fmt: skip
    """A new volume of `size` bytes at `offset` of a sparse file."""
    with open(path, "ab") as file:
        file.truncate(offset + size)
    command = ["mkfs.fat", "-F", str(kind), "-s", str(cluster // sector), "-S", str(sector), "-f", str(fats)]
    command += ["-i", "1234abcd", *(["-n", label] if label else []), *more]
    command += [f"--offset={offset // sector}"] if offset else []
    call(*command, path, *([str(size // 1024)] if offset else []))
    return path


# ---- fsck.fat


def complaints(image: Path) -> str:
    """What fsck.fat has to say about an image, which it leaves alone; "" if nothing."""
    done = call("fsck.fat", "-n", "-v", image, check=False)
    text = (done.stdout + done.stderr).decode(errors="replace")
    faults = [line for line in text.splitlines() if line.strip() and not _harmless(line)]
    return "\n".join(faults) if faults or done.returncode == 0 else text


_HARMLESS = re.compile(
    r"fsck\.fat \d|Boot sector contents:|System ID |Media byte |\s+\d+ (bytes|sectors|hidden|reserved|FATs|root)"
    r"|First FAT starts|\s+\d+ bytes per FAT|Root directory starts|Data area starts|\s+\d+ data clusters"
    r"|\s*\d+ bits|\s*\d+ sectors/track|Reclaiming unconnected|Checking (for|we|free)|Warning: Filesystem is FAT32"
    r"|  but has only \d+ clusters|  This may lead to problems|.*: \d+ files, \d+/\d+ clusters$|Checking file "
    r"|  \d+ FATs, \d+ bit entries|  \d+ root directory entries|Root directory start|Verifying "
)


def _harmless(line: str) -> bool:
    return _HARMLESS.match(line) is not None


def check(image: Path, why: str = "") -> None:
    """The image is clean, without any repair."""
    found = complaints(image)
    if found:
        raise Verdict(f"fsck.fat finds{f' ({why})' if why else ''}:\n{found}")


def repaired(image: Path, *options: str) -> str:
    """Let fsck.fat repair an image until it is content; what it did.

    Once is enough for files. A directory whose cluster belongs to another name (its rename was under way) or to nobody
    (its table entry did not arrive) takes three times: first it is given the first cluster 0, which is deleted when
    fsck.fat looks again, and then what that leaves of a long name.
    """
    text = ""
    for _ in range(3):
        done = call("fsck.fat", *(options or ("-a",)), image, check=False)
        text += (done.stdout + done.stderr).decode(errors="replace")
        if done.returncode not in (0, 1):
            raise Verdict(f"fsck.fat gives up with {done.returncode}:\n{text}")
        if done.returncode == 0 or not re.search("Truncating second to 0|Assuming EOF|root directory. Deleting", text):
            break
    again = call("fsck.fat", "-n", image, check=False)
    if again.returncode:
        raise Verdict(
            f"fsck.fat is not content with its own repair:\n{text}\nthen:\n{again.stdout.decode(errors='replace')}"
        )
    return text


# ---- mtools


def mtools(command: str, image: Path, *arguments: str | Path, offset: int = 0, zone: str = "UTC") -> str:
    """Run one of them on the volume at `offset` of an image; what it prints. Errors on stderr are errors."""
    where = f"{image}@@{offset}" if offset else str(image)
    done = call(command, "-i", where, *arguments, zone=zone)
    if done.stderr.strip():
        raise Verdict(f"{command} {arguments}: {done.stderr.decode(errors='replace')}")
    return done.stdout.decode(errors="replace")


def filled(image: Path, tree: Path, *, offset: int = 0, zone: str = "UTC") -> None:
    """Copy everything below a directory into the volume, with its times."""
    names = sorted(tree.iterdir())
    if names:
        mtools("mcopy", image, "-s", "-m", "-Q", *names, "::", offset=offset, zone=zone)


Seen = dict[str, tuple[bytes | None, int]]  # path: contents (None: a directory), when modified (0: a directory)


def extracted(image: Path, scratch: Path, *, offset: int = 0, zone: str = "UTC") -> Seen:
    """Everything that mtools finds in the volume: contents and times of modification in seconds."""
    scratch.mkdir()
    try:
        mtools("mcopy", image, "-s", "-n", "-m", "-Q", "::", scratch, offset=offset, zone=zone)
        return pictured(scratch)
    finally:
        shutil.rmtree(scratch)


def pictured(top: Path) -> Seen:
    """The same of a directory of the host."""
    found: Seen = {}
    for path in top.rglob("*"):
        name = str(path.relative_to(top))
        found[name] = (None, 0) if path.is_dir() else (path.read_bytes(), int(path.stat().st_mtime))
    return found


def attributes(image: Path, *, offset: int = 0) -> dict[str, str]:
    """What mattrib says of every file and directory: the letters of A H R S in alphabetical order."""
    found = {}
    for line in mtools("mattrib", image, "-/", "-X", "::*", offset=offset).splitlines():
        name = line.partition("::/")[2]
        if name:
            found[name] = line.partition("::/")[0]
    return found


def moment(seconds: float) -> datetime.datetime:
    """A POSIX time as a naive one in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).replace(tzinfo=None)
