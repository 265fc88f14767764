"""Exports as files, mounted for real, with our own server or nbdkit behind them."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.t1_block.lab import MIB, Memory, OneWriter, Sparse, background, nbdkit, need, tool
from tests.t3_fs.directmount import Direct, direct_mount, fuse_works

pytestmark = pytest.mark.skipif(not fuse_works(), reason="this machine does not let us mount")


@contextlib.contextmanager
def mounted(units: dict[str, Memory], tmp_path: Path) -> Iterator[Path]:
    with background(units, OneWriter()) as path, direct_mount("blockfiles", tmp_path / "mnt", path) as mount:
        yield mount.path


class ReadOnly(Memory):
    read_only = True


def test_exports_are_files_with_their_size_and_mode(tmp_path: Path) -> None:
    disk = Memory(4 * MIB)
    with mounted(
        {"": disk, "disk": disk, "part1": Memory(MIB), "a/b": Memory(), "rom": ReadOnly(2 * MIB)}, tmp_path
    ) as d:
        assert sorted(os.listdir(d)) == ["disk", "part1", "rom"]
        sizes = {name: ((d / name).stat().st_size, oct((d / name).stat().st_mode)) for name in os.listdir(d)}
        assert sizes == {"disk": (4 * MIB, "0o100600"), "part1": (MIB, "0o100600"), "rom": (2 * MIB, "0o100400")}
        with pytest.raises(FileNotFoundError):
            (d / "part2").stat()
        with pytest.raises(OSError) as caught:
            os.open(d / "rom", os.O_RDWR)
        assert caught.value.errno in (errno.EROFS, errno.EACCES)


@pytest.mark.parametrize("block", ["1", "7", "512", "4096", "100000", "1M"])
def test_dd_with_any_block_size(block: str, tmp_path: Path) -> None:
    size = 5_000 if block in ("1", "7") else MIB
    disk = Memory(MIB, 4096)
    data = os.urandom(size)
    (tmp_path / "in").write_bytes(data)
    with mounted({"": disk}, tmp_path) as d:
        subprocess.run(["dd", f"if={tmp_path}/in", f"of={d}/disk", f"bs={block}", "status=none"], check=True)
        assert disk.data[:size] == data
        subprocess.run(
            ["dd", f"if={d}/disk", f"of={tmp_path}/out", f"bs={block}", "status=none", f"count={size}",
             "iflag=count_bytes"], check=True,
        )  # fmt: skip
    assert (tmp_path / "out").read_bytes() == data
    assert disk.flushed, "close is not the end before the medium has it"


def test_the_end_of_the_disk_is_the_end(tmp_path: Path) -> None:
    disk = Memory(MIB)
    with mounted({"": disk}, tmp_path) as d, open(d / "disk", "r+b", buffering=0) as file:
        assert os.pwrite(file.fileno(), b"x" * 1024, MIB - 512) == 512
        for write in (lambda: os.pwrite(file.fileno(), b"x", MIB), lambda: os.pwrite(file.fileno(), b"x", 1 << 40)):
            with pytest.raises(OSError) as caught:
                write()
            assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
        assert os.pread(file.fileno(), 1024, MIB - 512) == b"x" * 512
        assert os.pread(file.fileno(), 1024, MIB) == b""


def test_a_disk_is_not_cut(tmp_path: Path) -> None:
    disk = Memory(MIB)
    disk.data[:] = b"x" * MIB
    with mounted({"": disk}, tmp_path) as d:
        with open(d / "disk", "wb") as file:
            assert file.write(b"new") == 3
        assert (d / "disk").stat().st_size == MIB
        assert disk.data == b"new" + b"x" * (MIB - 3)
        for size in (0, 1, MIB + 1):
            with open(d / "disk", "r+b") as file, pytest.raises(OSError) as caught:
                os.ftruncate(file.fileno(), size)
            assert caught.value.errno == errno.EINVAL
        with open(d / "disk", "r+b") as file:
            os.ftruncate(file.fileno(), MIB)
        for change in (
            lambda: os.unlink(d / "disk"),
            lambda: os.mkdir(d / "x"),
            lambda: os.rename(d / "disk", d / "y"),
        ):
            with pytest.raises(OSError):
                change()
        assert (d / "disk").read_bytes() == disk.data


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with mounted({"": Memory(MIB)}, tmp_path) as d:
        path = d / "disk"
        with open(path, "r+b", buffering=0) as one, open(path, "r+b", buffering=0) as two:
            one.write(b"1")
            with pytest.raises(OSError) as caught:
                two.write(b"2")
            assert caught.value.errno == errno.EBUSY
            with pytest.raises(OSError) as caught:
                os.close(os.open(path, os.O_WRONLY))
            assert caught.value.errno == errno.EBUSY
            assert two.read(1) == b"1", "reading is free to all"
            one.close()
            two.seek(0)
            two.write(b"2")
        fd = os.open(path, os.O_WRONLY)
        os.close(fd)


def test_an_open_shows_what_others_have_written(tmp_path: Path) -> None:
    """The pages of a file were kept from one open to the next: what was written to a partition did not show."""
    disk = Memory(4 * MIB)

    class Part(Memory):
        """Half of the disk."""

        def __init__(self) -> None:
            super().__init__(2 * MIB)
            self.data = disk.data

    with mounted({"": disk, "part1": Part()}, tmp_path) as d:
        assert (d / "disk").read_bytes() == bytes(4 * MIB)
        with open(d / "part1", "r+b") as part:
            part.write(b"x" * MIB)
        assert (d / "disk").read_bytes() == b"x" * MIB + bytes(3 * MIB)
        disk.data[:MIB] = b"y" * MIB  # over NBD
        assert (d / "part1").read_bytes() == b"y" * MIB + bytes(MIB)


def test_many_small_writes_by_one_descriptor_and_readers_beside(tmp_path: Path) -> None:
    disk = Memory(MIB, 512)
    with mounted({"": disk}, tmp_path) as d, open(d / "disk", "r+b", buffering=0) as file:
        for at in range(0, 20_000, 7):
            os.pwrite(file.fileno(), at.to_bytes(7, "big"), at)
        os.fsync(file.fileno())
        assert disk.flushed == 1
        with open(d / "disk", "rb") as reader:
            data = reader.read()
    assert data == disk.data


MAPPING = """
import mmap, sys
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
    sys.stdout.buffer.write(view[:])
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as view:
    view[1 << 20 : (1 << 20) + 5] = b"hello"
    view.flush()
"""


def test_mmap_readers_and_writers(tmp_path: Path) -> None:
    """In a process of their own: a page fault holds the interpreter's lock, which our server's thread needs."""
    disk = Memory(4 * MIB)
    disk.data[:] = data = bytearray(os.urandom(4 * MIB))
    with mounted({"": disk}, tmp_path) as d:
        done = subprocess.run([sys.executable, "-c", MAPPING, str(d / "disk")], capture_output=True, check=True)
    assert done.stdout == data
    assert disk.data[MIB : MIB + 5] == b"hello"


def test_exports_come_and_go(tmp_path: Path) -> None:
    units = {"": Memory(MIB)}
    with background(units) as path, direct_mount("blockfiles", tmp_path / "mnt", path, options={}) as mount:
        d = mount.path
        assert os.listdir(d) == ["disk"]
        units["part1"] = Memory(MIB)
        _until(lambda: sorted(os.listdir(d)) == ["disk", "part1"])
        with open(d / "part1", "rb") as file:
            del units["part1"]
            _until(lambda: os.listdir(d) == ["disk"])
            assert file.read(512) == bytes(512), "who has it open has its connection"


def _until(true: object) -> None:
    """What is believed is believed for a second."""
    import time

    end = time.monotonic() + 40
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_device_that_is_gone_is_enodev(tmp_path: Path) -> None:
    class Pulled(Memory):
        gone = False

        async def read(self, offset: int, size: int) -> bytes:
            from udf import DeviceGone

            if self.gone:
                raise DeviceGone("pulled out")
            return await super().read(offset, size)

    disk = Pulled(MIB)
    with background({"": disk}) as path, direct_mount("blockfiles", tmp_path / "mnt", path) as mount:
        fd = os.open(mount.path / "disk", os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, 4096) as buffer:
                assert os.preadv(fd, [buffer], 0) == 4096
                disk.gone = True
                with pytest.raises(OSError) as caught:
                    os.preadv(fd, [buffer], 0)
                assert caught.value.errno == errno.ENODEV
        finally:
            os.close(fd)


def test_a_new_medium_is_for_new_opens_while_the_old_one_is_open_still(tmp_path: Path) -> None:
    """One descriptor of the medium that was taken out made ENODEV of every later open."""

    class Taken(Memory):
        async def read(self, offset: int, size: int) -> bytes:
            from udf import DeviceGone

            raise DeviceGone("another medium is in")

    disk = Memory(MIB)
    units = {"": disk}
    with background(units) as path, direct_mount("blockfiles", tmp_path / "mnt", path) as mount:
        old = os.open(mount.path / "disk", os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, 4096) as buffer:
                assert os.preadv(old, [buffer], 0) == 4096
                disk.__class__ = Taken  # type: ignore[assignment]  # the connections that are there have this one
                units[""] = Memory(MIB)
                units[""].data[:3] = b"new"
                for _ in range(2):
                    assert (mount.path / "disk").read_bytes()[:3] == b"new"
                    with pytest.raises(OSError) as caught:
                        os.preadv(old, [buffer], 0)
                    assert caught.value.errno == errno.ENODEV, "who had it open has lost it"
        finally:
            os.close(old)


def test_a_server_that_is_gone_is_enodev(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        server = contextlib.ExitStack()
        path = server.enter_context(background({"": Memory(MIB)}))
        mount: Direct = stack.enter_context(direct_mount("blockfiles", tmp_path / "mnt", path))
        fd = os.open(mount.path / "disk", os.O_RDWR)
        stack.callback(os.close, fd)
        server.close()
        for call in (lambda: os.pread(fd, 512, 0), lambda: os.pwrite(fd, b"x", 0)):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.ENODEV
        with pytest.raises(OSError) as caught:
            os.open(mount.path / "disk", os.O_RDONLY)
        assert caught.value.errno == errno.ENODEV


def test_nothing_is_left_open_after_many_opens(tmp_path: Path) -> None:
    with background({"": Memory(MIB)}) as path, direct_mount("blockfiles", tmp_path / "mnt", path) as mount:
        (mount.path / "disk").read_bytes()
        before = mount.descriptors()
        for _ in range(50):
            with open(mount.path / "disk", "r+b") as file:
                file.write(b"x")
        _until(lambda: mount.descriptors() <= before)


def test_ext4_is_made_checked_and_filled_on_a_file(tmp_path: Path) -> None:
    need("mkfs.ext4", "e2fsck", "debugfs")
    disk = Sparse(32 * MIB)
    (tmp_path / "text").write_bytes(os.urandom(3 * MIB))
    with mounted({"": disk}, tmp_path) as d:
        for command in (
            ["mkfs.ext4", "-q", "-F", str(d / "disk")],
            ["debugfs", "-w", "-R", f"write {tmp_path}/text text", str(d / "disk")],
            ["e2fsck", "-f", "-n", str(d / "disk")],
            ["debugfs", "-R", f"dump /text {tmp_path}/again", str(d / "disk")],
        ):
            subprocess.run([str(tool(command[0])), *command[1:]], check=True, capture_output=True)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "text").read_bytes()
    (tmp_path / "image").write_bytes(disk.data)
    subprocess.run([str(tool("e2fsck")), "-f", "-n", str(tmp_path / "image")], check=True, capture_output=True)


def test_fuse2fs_serves_a_filesystem_from_a_file(tmp_path: Path) -> None:
    need("mkfs.ext4", "e2fsck", "fuse2fs")
    disk = Memory(32 * MIB)
    data = os.urandom(3 * MIB)
    (tmp_path / "ext").mkdir()
    with mounted({"": disk}, tmp_path) as d:
        subprocess.run([str(tool("mkfs.ext4")), "-q", "-F", str(d / "disk")], check=True, capture_output=True)
        subprocess.run(["fuse2fs", str(d / "disk"), str(tmp_path / "ext"), "-o", "fakeroot"], check=True)
        try:
            (tmp_path / "ext" / "file").write_bytes(data)
            with pytest.raises(OSError) as caught:
                (d / "disk").write_bytes(b"x")
            assert caught.value.errno == errno.EBUSY, "what is mounted is written to by nobody else"
            assert (tmp_path / "ext" / "file").read_bytes() == data
        finally:
            subprocess.run(["umount", str(tmp_path / "ext")], check=True)
        # fuse2fs ends a moment after its mount.
        _until(lambda: not _users(d / "disk"))
        subprocess.run([str(tool("e2fsck")), "-f", "-n", str(d / "disk")], check=True, capture_output=True)


def _users(path: Path) -> list[str]:
    """Processes that have a file open."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == str(path):
                found.append(str(link))
    return found


def test_sfdisk_partitions_a_file(tmp_path: Path) -> None:
    need("sfdisk")
    with mounted({"": Memory(64 * MIB)}, tmp_path) as d:
        command = [str(tool("sfdisk")), "-q", "--no-reread", str(d / "disk")]
        subprocess.run(command, input="label: gpt\nsize=4M\nsize=8M\n", text=True, check=True)
        done = subprocess.run(
            [str(tool("sfdisk")), "--dump", str(d / "disk")], capture_output=True, text=True, check=True
        )
    assert done.stdout.count("start=") == 2


def test_qemu_img_converts_into_a_file_and_compares(tmp_path: Path) -> None:
    need("qemu-img")
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3 * MIB) + bytes(5 * MIB))
    disk = Memory(8 * MIB)
    disk.data[:] = b"x" * len(disk.data)
    with mounted({"": disk}, tmp_path) as d:
        convert = ["qemu-img", "convert", "-f", "raw", "-O", "raw", str(source), str(d / "disk")]
        done = subprocess.run(convert, capture_output=True, text=True, check=False)
        assert done.returncode != 0, "a file that cannot be emptied must not be taken for an empty one"
        subprocess.run([*convert[:2], "-n", *convert[2:]], check=True)
        compare = ["qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), str(d / "disk")]
        subprocess.run(compare, check=True, capture_output=True)
    assert disk.data == source.read_bytes()


@pytest.mark.parametrize("direct", ["0", "1"])
def test_fio_verifies_what_it_wrote(direct: str, tmp_path: Path) -> None:
    need("fio")
    with mounted({"": Memory(16 * MIB)}, tmp_path) as d:
        done = subprocess.run(
            ["fio", "--name=v", f"--filename={d}/disk", "--rw=randwrite", "--bsrange=512-128k", "--size=16m",
             "--verify=crc32c", f"--direct={direct}", "--io_size=16m", "--randseed=1", "--ioengine=psync",
             "--fallocate=none"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_foreign_server_behind_it(tmp_path: Path) -> None:
    with nbdkit("pattern", "4M") as path, direct_mount("blockfiles", tmp_path / "mnt", path) as mount:
        data = (mount.path / "disk").read_bytes()
    assert data == b"".join(at.to_bytes(8, "big") for at in range(0, 4 * MIB, 8))
