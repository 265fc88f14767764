"""fs/fat behind a real shim and a real kernel: what programs see."""

from __future__ import annotations

import ctypes
import errno
import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.t1_block.lab import OneWriter, background
from tests.t3_fat.lab import MIB, Image, fsck, make
from tests.t3_fs.directmount import fuse_works
from tests.t5_cli.conftest import Command

pytestmark = pytest.mark.skipif(not fuse_works(), reason="this machine does not let us mount")
FDCWD = -100
MAPPED = """
import mmap, sys
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 500_000) as mapped:
    assert mapped[:300_000].count(0) == 300_000
    mapped[1000:1004] = b"here"
    mapped.flush()
"""


class Stick:
    """One mounted image."""

    def __init__(self, directory: Path, image: Path, *options: str) -> None:
        self.udf = Command()
        self.image = image
        self.root = directory / f"mnt-{os.getpid()}"
        self.root.mkdir(exist_ok=True)
        self.medium = Image(image)
        self._options = options
        self._server = background({"": self.medium}, OneWriter())

    def __enter__(self) -> Stick:
        socket = self._server.__enter__()
        self.udf.done("mount", "-t", "fat", socket, self.root, *self._options)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.udf.done("umount", self.root)
        finally:
            self._server.__exit__(None, None, None)
            self.medium.close()

    def row(self) -> dict[str, Any]:
        # Closed after vfork(2), a file that is open here would be flushed while the server in this very process stands
        # still until the child is executed. All are closed on exec anyway.
        told = self.udf.done("status", "--json", close_fds=False)
        return next(row for row in json.loads(told)["mounts"] if row["mountpoint"] == str(self.root))

    def kill_driver(self) -> None:
        os.kill(self.row()["driver_pid"], signal.SIGKILL)


def gone(path: Path) -> None:
    """Until the kernel knows that another spelling of this name was removed: it is told, and nobody waits for it."""
    until = time.monotonic() + 10
    while path.exists():
        assert time.monotonic() < until, f"{path} is still there"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make(tmp_path / "image", 64 * MIB, kind=32)


@pytest.fixture
def stick(tmp_path: Path, image: Path) -> Iterator[Stick]:
    with Stick(tmp_path, image) as mounted:
        yield mounted
    fsck(image)


@pytest.fixture
def root(stick: Stick) -> Path:
    return stick.root


def test_a_tree_is_copied_and_is_the_same_after_a_new_mount(tmp_path: Path, image: Path) -> None:
    source = tmp_path / "source"
    for number in range(40):
        path = source / f"directory {number % 4}" / f"A file with a long name {number}.data"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(number * number * 150))
    with Stick(tmp_path, image) as mounted:
        subprocess.run(["cp", "-r", source, mounted.root], check=True)
        subprocess.run(["diff", "-r", source, mounted.root / "source"], check=True)
    fsck(image)
    with Stick(tmp_path, image) as mounted:
        subprocess.run(["diff", "-r", source, mounted.root / "source"], check=True)
        subprocess.run(["rm", "-r", mounted.root / "source"], check=True)
        assert os.listdir(mounted.root) == []
        space = os.statvfs(mounted.root)
        assert space.f_bfree == space.f_blocks - 1  # the root has one
    fsck(image)


def test_every_spelling_is_the_file_and_none_outlives_it(root: Path) -> None:
    assert not (root / "readme.txt").exists()  # the kernel must not remember that
    (root / "ReadMe.TXT").write_bytes(b"here")
    for name in ("readme.txt", "README.TXT", "ReadMe.TXT"):
        assert (root / name).read_bytes() == b"here"
    assert os.listdir(root) == ["ReadMe.TXT"]
    (root / "readme.txt").unlink()
    for name in ("readme.txt", "README.TXT", "ReadMe.TXT"):
        gone(root / name)
    (root / "README.TXT").mkdir()
    (root / "readme.txt" / "inside").touch()
    os.rename(root / "Readme.txt", root / "other")
    gone(root / "README.TXT")
    assert os.listdir(root / "OTHER") == ["inside"]


def test_what_fat_does_not_have_is_refused_as_linux_does(root: Path) -> None:
    file = root / "file"
    file.write_bytes(b"x")
    for call, *arguments in (
        (os.symlink, "file", root / "link"), (os.link, file, root / "hard"), (os.mkfifo, root / "fifo"),
        (os.chown, file, 12345, -1), (os.chmod, file, 0o4755),
    ):  # fmt: skip
        with pytest.raises(PermissionError):
            call(*arguments)
    with pytest.raises(OSError) as caught:
        (root / "a:b").touch()
    assert caught.value.errno == errno.EINVAL
    file.chmod(0o555)
    assert file.stat().st_mode & 0o777 == 0o555
    file.chmod(0o755)
    file.chmod(0o700)  # cannot be; vfat says nothing
    assert file.stat().st_mode & 0o777 == 0o755
    with open(file, "r+b") as handle, pytest.raises(OSError) as caught:
        handle.truncate(1 << 32)
    assert caught.value.errno == errno.EFBIG
    os.utime(file, ns=(1_700_000_000_123_456_789, 1_700_000_001_999_999_999))
    assert file.stat().st_mtime_ns == 1_700_000_000 * 10**9
    assert root.stat().st_nlink == 2
    (root / "d").mkdir()
    assert root.stat().st_nlink == 3
    assert (root / "d").stat().st_size == 512


def test_what_replaces_a_file_is_there_at_once_and_whole(root: Path) -> None:
    (root / "old").write_bytes(b"old" * 1000)
    with open(root / "old", "rb") as before:
        (root / "new").write_bytes(b"new" * 2000)
        os.replace(root / "new", root / "old")
        assert (root / "old").read_bytes() == b"new" * 2000
        assert before.read() == b"old" * 1000
    (root / "d" / "deep").mkdir(parents=True)
    os.rename(root / "old", root / "d" / "deep" / "moved")
    with pytest.raises(OSError) as caught:
        os.rename(root / "d", root / "d" / "deep" / "d")
    assert caught.value.errno == errno.EINVAL
    os.rename(root / "d" / "deep", root / "up")
    assert (root / "up" / "moved").read_bytes() == b"new" * 2000
    assert os.listdir(root / "d") == []


def test_two_names_are_exchanged(root: Path) -> None:
    (root / "a").write_bytes(b"a")
    (root / "d").mkdir()
    (root / "d" / "b").write_bytes(b"bb")
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.renameat2(FDCWD, os.fsencode(root / "a"), FDCWD, os.fsencode(root / "d" / "b"), 2)
    assert done == 0, os.strerror(ctypes.get_errno())
    assert (root / "a").read_bytes() == b"bb"
    assert (root / "d" / "b").read_bytes() == b"a"
    assert os.listdir(root / "d") == ["b"]


def test_holes_are_zeros_and_mapped_pages_are_written(root: Path) -> None:
    path = root / "file"
    with open(path, "w+b") as file:
        file.seek(300_000)
        file.write(b"end")
        file.truncate(500_000)
        file.flush()
        # Not in this process: a page fault does not let the server's thread run, which the driver reads from.
        subprocess.run([sys.executable, "-c", MAPPED, path], check=True)
    with open(path, "rb") as file:
        assert file.read(1010)[1000:] == b"here" + bytes(6)
        assert os.pread(file.fileno(), 10, 299_999) == b"\0end" + bytes(6)


def test_a_file_that_is_removed_while_it_is_open_survives_its_driver(stick: Stick) -> None:
    path = stick.root / "file"
    with open(path, "w+b") as file:
        file.write(b"kept" * 100_000)
        file.flush()
        path.unlink()
        stick.kill_driver()
        file.write(b"more")
        file.flush()
        file.seek(0)
        assert file.read() == b"kept" * 100_000 + b"more"
        assert os.listdir(stick.root) == []


@pytest.mark.skipif(not shutil.which("mcopy"), reason="needs mtools")
def test_what_was_left_on_a_stick_that_was_pulled_out_for_good_is_removed(tmp_path: Path, image: Path) -> None:
    """It had been removed while a program had it open, on another machine, and took its place for ever, unseen."""
    left = "::.udf-hidden-00000000-00000000-4194000-1-5"
    (tmp_path / "old").write_bytes(b"x" * 100_000)
    for name in (left, "::kept"):
        subprocess.run(["mcopy", "-i", image, tmp_path / "old", name], check=True)
    with Stick(tmp_path, image) as mounted:
        assert os.listdir(mounted.root) == ["kept"]
        until = time.monotonic() + 10
        listed = ""
        while listed.split() != ["::/kept"]:
            assert time.monotonic() < until, listed
            command = ["mdir", "-a", "-b", "-i", image]
            listed = subprocess.run(command, check=False, capture_output=True, text=True).stdout
    fsck(image)


def test_a_copy_goes_on_over_the_deaths_of_the_driver(tmp_path: Path, stick: Stick) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3 * MIB))
    pids = set()
    with open(source, "rb") as data, open(stick.root / "target", "wb", buffering=0) as target:
        while piece := data.read(100_000):
            target.write(piece)
            if data.tell() % 1_000_000 == 0:
                pids.add(stick.row()["driver_pid"])
                stick.kill_driver()
    assert len(pids) == 3
    stick.kill_driver()
    assert filecmp.cmp(source, stick.root / "target", shallow=False)


def test_a_read_only_mount_changes_not_a_byte(tmp_path: Path, image: Path) -> None:
    with Stick(tmp_path, image) as mounted:
        (mounted.root / "file").write_bytes(b"x" * 10_000)
    before = image.read_bytes()
    with Stick(tmp_path, image, "-o", "ro") as mounted:
        assert (mounted.root / "file").read_bytes() == b"x" * 10_000
        with pytest.raises(OSError) as caught:
            (mounted.root / "file").unlink()
        assert caught.value.errno == errno.EROFS
        assert mounted.medium.count["write"] == 0
    assert image.read_bytes() == before


def test_a_volume_at_rest_is_clean_without_an_unmount(stick: Stick) -> None:
    quiet = stick.medium.quiet()
    (stick.root / "file").write_bytes(b"x" * 1_000_000)
    (stick.root / "directory").mkdir()
    quiet.wait()
    fsck(stick.image)


def test_what_is_no_fat_volume_is_refused_in_one_sentence(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    stick = Stick(tmp_path, image)
    with background({"": stick.medium}) as socket:
        sentence = stick.udf.refused("mount", "-t", "fat", socket, stick.root)
    stick.medium.close()
    assert sentence.endswith("there is no filesystem: the first sector is empty"), sentence
