"""drivers/image: a file's bytes, its holes, its locks and its end."""

from __future__ import annotations

import errno
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.t1_block.lab import MIB, connected, need, run, serving, uri
from udf import BlockDriver, Extent, UserError


@pytest.fixture(scope="module")
def image_class() -> Any:
    spec = importlib.util.spec_from_file_location("udf_driver_image", ROOT / "drivers" / "image.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Image


@pytest.fixture
def make(image_class: Any) -> Iterator[Any]:
    """Makes images; their descriptors are closed at the end, as a driver's death closes them."""
    made: list[Any] = []

    def one(*arguments: object, **options: object) -> BlockDriver:
        made.append(image_class(*map(str, arguments), **options))
        return made[-1]  # type: ignore[no-any-return]

    yield one
    for each in made:
        os.close(each._fd)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.truncate(8 * MIB)
    return path


async def test_what_is_written_is_in_the_file(make: Any, path: Path) -> None:
    data = os.urandom(MIB)
    async with connected(make(path)) as client:
        await client.write(MIB + 5, data)
        await client.flush()
        assert await client.read(MIB + 5, MIB) == data
    assert path.read_bytes() == bytes(MIB + 5) + data + bytes(6 * MIB - 5)


async def test_holes_are_told_made_and_kept(make: Any, path: Path) -> None:
    async with connected(make(path)) as client:
        assert await client.extents(0, 8 * MIB) == [Extent(8 * MIB, True, True)]
        await client.write(MIB, b"x" * MIB)
        holes = [Extent(MIB, True, True), Extent(MIB), Extent(6 * MIB, True, True)]
        assert await client.extents(0, 8 * MIB) == holes
        await client.trim(MIB, MIB)
        assert await client.extents(0, 8 * MIB) == [Extent(8 * MIB, True, True)]
        await client.write(MIB, b"x" * MIB)
        used = path.stat().st_blocks
        await client.zero(MIB, MIB, hole=False, fast=True)
        assert await client.read(MIB, MIB) == bytes(MIB)
        assert path.stat().st_blocks == used
        await client.write(MIB, b"x" * MIB)
        await client.zero(MIB, MIB, fast=True)
        assert await client.read(MIB, MIB) == bytes(MIB)
        assert path.stat().st_blocks < used
    assert path.stat().st_size == 8 * MIB


def test_a_second_writer_is_told_that_the_image_is_in_use(make: Any, path: Path) -> None:
    make(path)
    for how in ({}, {"read_only": True}):
        with pytest.raises(UserError, match="locked"):
            make(path, **how)


def test_readers_share_an_image_and_keep_writers_away(make: Any, path: Path) -> None:
    make(path, read_only=True)
    make(path, read_only=True)
    with pytest.raises(UserError, match="somebody else uses the image"):
        make(path)


def test_a_dead_driver_leaves_no_lock(make: Any, path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "import fcntl,sys,time\nf=open(sys.argv[1],'r+b')\nfcntl.flock(f,fcntl.LOCK_EX)\n"
         "print('locked',flush=True)\ntime.sleep(60)", str(path)],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    with child.stdout:
        child.stdout.readline()
        with pytest.raises(UserError):
            make(path)
        child.kill()
        child.wait()
    make(path)


async def test_a_file_that_may_not_be_written_is_read_only(make: Any, path: Path, monkeypatch: Any) -> None:
    real = os.open

    def refuse(name: str, flags: int, *rest: object) -> int:
        if flags & os.O_ACCMODE == os.O_RDWR:
            raise PermissionError(errno.EACCES, "no")
        return real(name, flags, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)  # root may write everything
        unit = make(path)
    async with connected(unit) as client:
        assert client.read_only
        with pytest.raises(PermissionError):
            await client.write(0, b"x")


def test_only_whole_blocks_are_served(make: Any, path: Path, capsys: Any) -> None:
    with open(path, "r+b") as file:
        file.truncate(10_000)
    assert make(path, read_only=True).size == 9728
    assert "the last 272 bytes are no whole block and are not served" in capsys.readouterr().out
    assert make(path, read_only=True, block_size=4096).size == 8192
    for size in (0, 511):
        os.truncate(path, size)
        with pytest.raises(UserError, match="less than one block"):
            make(path, read_only=True)


@pytest.mark.parametrize("block_size", [0, 3, 256, 513, 131072, -512])
def test_odd_block_sizes_are_refused(block_size: int, make: Any, path: Path) -> None:
    with pytest.raises(UserError, match="block_size must be"):
        make(path, block_size=block_size)


def test_what_is_no_image_is_refused_in_one_sentence(make: Any, tmp_path: Path) -> None:
    for what in (tmp_path, tmp_path / "nothing", Path("/dev/null")):
        with pytest.raises(UserError):
            make(what)


async def test_an_image_that_was_cut_behind_our_back_is_an_error(make: Any, path: Path) -> None:
    async with connected(make(path)) as client:
        os.truncate(path, MIB)
        with pytest.raises(OSError) as caught:
            await client.read(2 * MIB, 4096)
        assert caught.value.errno == errno.EIO


async def test_nbdcopy_keeps_the_holes(make: Any, path: Path, tmp_path: Path) -> None:
    need("nbdcopy")
    with open(path, "r+b") as file:
        file.seek(3 * MIB)
        file.write(os.urandom(MIB))
    async with serving(make(path)) as socket:
        await run("nbdcopy", uri(socket), str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()
    assert (tmp_path / "copy").stat().st_blocks * 512 <= 2 * MIB
