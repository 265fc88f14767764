"""The programs: how each is started, what it serves, and how what was written shows in its source afterwards.

The same command line serves a mount of UDF and a direct one; `Direct` makes the latter, to compare with.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import select
import shlex
import shutil
import stat
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import wait_for_mounts

PATIENCE = 60.0
Tree = dict[str, tuple[str, object]]


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def run(*argv: str | Path, **more: object) -> bytes:
    result = subprocess.run(list(map(str, argv)), check=False, capture_output=True, timeout=PATIENCE, **more)  # type: ignore[call-overload]
    assert result.returncode == 0, (argv, result)
    return bytes(result.stdout)


def grow(top: Path) -> Path:
    """A small tree with what filesystems have."""
    chance = random.Random(7)
    (top / "many").mkdir(parents=True)
    (top / "deep/er/still").mkdir(parents=True)
    for number in range(60):
        (top / f"many/file {number:02}").write_bytes(chance.randbytes(chance.randrange(9000)))
    (top / "big").write_bytes(chance.randbytes(3_000_001))
    (top / "empty").touch()
    (top / "deep/er/still/grüße, 'quoted' name").write_bytes(b"found\n")
    (top / "program").write_text("#!/bin/sh\necho it runs\n")
    (top / "program").chmod(0o755)
    (top / "link").symlink_to("deep/er/still")
    return top


def tree_of(top: Path) -> Tree:
    """What is there: kinds, targets, sizes and checksums."""
    found: Tree = {}
    for root, directories, files in os.walk(top):
        for name in directories + files:
            path = Path(root, name)
            mode = path.lstat().st_mode
            what: tuple[str, object]
            if stat.S_ISLNK(mode):
                what = ("link", os.readlink(path))
            elif stat.S_ISDIR(mode):
                what = ("directory", None)
            else:
                what = ("file", (path.lstat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()))
            found[str(path.relative_to(top))] = what
    return found


def squashfs(tree: Path, work: Path) -> str:
    need("mksquashfs")
    run("mksquashfs", tree, work / "image", "-quiet", "-no-progress")
    return str(work / "image")


def iso(tree: Path, work: Path) -> str:
    need("genisoimage")
    run("genisoimage", "-quiet", "-R", "-o", work / "image", tree)
    return str(work / "image")


def zipped(tree: Path, work: Path) -> str:
    need("zip")
    run("zip", "-qry", work / "image.zip", ".", cwd=tree)
    return str(work / "image.zip")


def ext4(tree: Path, work: Path) -> str:
    need("mkfs.ext4")
    run("mkfs.ext4", "-q", "-d", tree, work / "image", "32M")
    return str(work / "image")


def directory(tree: Path, work: Path) -> str:
    shutil.copytree(tree, work / "source", symlinks=True)
    return str(work / "source")


def layers(tree: Path, work: Path) -> str:
    (work / "upper").mkdir()
    (work / "temporary").mkdir()
    return directory(tree, work)


def in_directory(work: Path, name: str) -> bytes:
    return (work / "source" / name).read_bytes()


def in_upper(work: Path, name: str) -> bytes:
    assert not (work / "source" / name).exists()
    return (work / "upper" / name).read_bytes()


def in_zip(work: Path, name: str) -> bytes:
    with zipfile.ZipFile(work / "image.zip") as archive:
        assert archive.testzip() is None
        return archive.read(name)


def in_ext4(work: Path, name: str) -> bytes:
    need("e2fsck", "debugfs")
    run("e2fsck", "-fn", work / "image")
    return run("debugfs", "-R", f"cat /{name}", work / "image")


@dataclass(frozen=True)
class Program:
    """One program over one kind of source."""

    name: str
    command: str  # with {source}, {mountpoint} and our own {work}
    origin: Callable[[Path, Path], str]
    written: Callable[[Path, str], bytes] | None = None  # None: it cannot write

    def prepare(self, tree: Path, work: Path) -> tuple[str, str]:
        """The command and the source."""
        need(shlex.split(self.command)[0])
        work.mkdir()
        origin = self.origin(tree, work)
        return self.command.replace("{work}", str(work)), origin


PROGRAMS = [
    Program("squashfuse_ll", "squashfuse_ll -f {source} {mountpoint}", squashfs),
    Program("squashfuse", "squashfuse -f {source} {mountpoint}", squashfs),
    Program("fuseiso", "fuseiso -n {source} {mountpoint} -f", iso),
    Program("fuse-zip", "fuse-zip -f {source} {mountpoint}", zipped, in_zip),
    Program("fuse2fs", "fuse2fs -f {source} {mountpoint}", ext4, in_ext4),
    Program("bindfs", "bindfs -f {source} {mountpoint}", directory, in_directory),
    Program(
        "fuse-overlayfs",
        "fuse-overlayfs -f -o lowerdir={source},upperdir={work}/upper,workdir={work}/temporary {mountpoint}",
        layers,
        in_upper,
    ),
]
every_program = pytest.mark.parametrize("program", PROGRAMS, ids=[program.name for program in PROGRAMS])


@contextlib.contextmanager
def direct_mount(command: str, source: str, mountpoint: Path) -> Iterator[None]:
    """The same program without UDF."""
    mountpoint.mkdir(exist_ok=True)
    words = [word.replace("{source}", source).replace("{mountpoint}", str(mountpoint)) for word in shlex.split(command)]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_mounts(mountpoint, 1)
        yield
        run("umount", mountpoint)
        wait_for(process.pid)
    finally:
        process.kill()
        process.wait()
        subprocess.run(["umount", "-l", str(mountpoint)], check=False, capture_output=True)


def wait_for(pid: int) -> None:
    """Until a child of ours has ended, by itself."""
    descriptor = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        assert poll.poll(PATIENCE * 1000), f"{pid} does not end"
    finally:
        os.close(descriptor)
