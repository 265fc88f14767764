"""What the tests of block devices share: units in memory, our server in a task, foreign servers as processes."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio

from udf import BlockClient, BlockDriver, BlockUnit, Extent
from udf.block.handshake import Claims
from udf.block.server import Report, Server

MIB = 1024 * 1024


class Memory(BlockDriver):
    """A medium in memory, which checks what it is asked for."""

    def __init__(self, size: int = MIB, block_size: int = 512) -> None:
        self.size = size
        self.block_size = block_size
        self.data = bytearray(size)
        self.calls: list[str] = []
        self.flushed = 0

    def _checked(self, verb: str, offset: int, size: int) -> slice:
        assert size > 0
        assert offset >= 0
        assert offset % self.block_size == 0
        assert size % self.block_size == 0
        assert offset + size <= self.size
        self.calls.append(verb)
        return slice(offset, offset + size)

    async def read(self, offset: int, size: int) -> bytes:
        return bytes(self.data[self._checked("read", offset, size)])

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.data[self._checked("write", offset, len(data))] = data

    async def flush(self) -> None:
        self.calls.append("flush")
        self.flushed += 1


class Sparse(Memory):
    """One that can do everything."""

    trim_zeroes = True
    fast_zero = True

    async def trim(self, offset: int, size: int) -> None:
        self.data[self._checked("trim", offset, size)] = bytes(size)

    async def zero(self, offset: int, size: int) -> None:
        self.data[self._checked("zero", offset, size)] = bytes(size)

    async def extents(self, offset: int, size: int) -> list[Extent]:
        found = []
        for at in range(offset, offset + size, self.block_size):
            zero = not any(self.data[at : at + self.block_size])
            found.append(Extent(self.block_size, zero, zero))
        return found


@contextlib.asynccontextmanager
async def serving(
    units: Mapping[str, BlockUnit] | BlockDriver, claims: Claims | None = None, directory: Path | None = None
) -> AsyncIterator[Path]:
    """Our server on a socket of its own; its path. It has ended when this ends.

    Who may be killed meanwhile gives the directory, in which a socket may have been left.
    """
    from tests.conftest import make_runtime_dir

    async def known() -> Mapping[str, BlockUnit]:
        return units  # type: ignore[return-value]

    place = make_runtime_dir() if directory is None else contextlib.nullcontext(directory)
    with place as where, socket.socket(socket.AF_UNIX) as listener:
        path = where / "nbd.sock"
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        listener.listen(16)
        server = Server(units.units if isinstance(units, BlockDriver) else known, claims=claims, report=_fail)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.listen, listener)
            yield path
            nursery.cancel_scope.cancel()
        path.unlink()


class OneWriter:
    """Claims: each export has at most one writer."""

    def __init__(self) -> None:
        self.holders: dict[str, object] = {}

    def take(self, holder: object, export: str) -> None:
        if self.holders.setdefault(export, holder) is not holder:
            raise PermissionError(errno.EPERM, f"somebody else writes to {export}")

    def drop(self, holder: object) -> None:
        self.holders = {export: known for export, known in self.holders.items() if known is not holder}


@contextlib.contextmanager
def background(units: Mapping[str, BlockUnit], claims: Claims | None = None) -> Iterator[Path]:
    """Our server in a thread, for tests that block; it asks the mapping each time. All has ended when this ends."""
    from tests.conftest import make_runtime_dir

    async def known() -> Mapping[str, BlockUnit]:
        return dict(units)

    async def main(listener: socket.socket) -> None:
        nonlocal token
        async with trio.open_nursery() as nursery:
            token, scope = trio.lowlevel.current_trio_token(), nursery.cancel_scope
            scopes.append(scope)
            started.set()
            await Server(known, claims=claims, report=_fail).listen(listener)

    token: trio.lowlevel.TrioToken | None = None
    scopes: list[trio.CancelScope] = []
    started = threading.Event()
    with make_runtime_dir() as directory, socket.socket(socket.AF_UNIX) as listener:
        path = directory / "nbd.sock"
        listener.bind(str(path))
        listener.listen(16)
        thread = threading.Thread(target=trio.run, args=(main, listener))
        thread.start()
        started.wait()
        try:
            yield path
        finally:
            assert token is not None
            token.run_sync_soon(scopes[0].cancel)
            thread.join()
            path.unlink()


def _fail(operation: str, line: str, text: str) -> None:
    raise AssertionError(f"{operation}: {line}\n{text}")


@contextlib.asynccontextmanager
async def connected(unit: BlockUnit, report: Report | None = None, **how: Any) -> AsyncIterator[BlockClient]:
    """Our client on our server, over a socket pair."""
    ours, theirs = socket.socketpair()

    async def units() -> Mapping[str, BlockUnit]:
        return {"": unit}

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Server(units, report=report or _fail).serve, theirs)
        async with await BlockClient.on(ours, **how) as client:
            yield client


def uri(path: Path | str, export: str = "") -> str:
    return f"nbd+unix:///{export}?socket={path}"


def need(*programs: str) -> None:
    for program in programs:
        if not tool(program):
            pytest.skip(f"{program} is not installed")


def tool(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")


async def run(*command: str, check: bool = True, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run a program beside the server's tasks."""
    done = await trio.run_process(
        command,
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        stdin=stdin or None,
    )
    if check:
        assert done.returncode == 0, f"{command}: {done.returncode}: {done.stderr.decode()}"
    return done


@contextlib.contextmanager
def nbdkit(*arguments: str) -> Iterator[Path]:
    """nbdkit on a socket of its own, ended at the end; it tells by its pid file that it listens."""
    from tests.conftest import make_runtime_dir

    need("nbdkit")
    with make_runtime_dir() as directory:
        path, pid = directory / "nbdkit.sock", directory / "pid"
        os.mkfifo(pid)
        process = subprocess.Popen(["nbdkit", "-f", "-U", str(path), "-P", str(pid), *arguments])
        (directory / "number").write_text(str(process.pid))
        try:
            _wait_for_fifo(pid, process)
            yield path
        finally:
            process.terminate()
            process.wait()
            path.unlink(missing_ok=True)


def _wait_for_fifo(path: Path, process: subprocess.Popen[bytes]) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        readable, _, _ = select.select([fd], [], [], 20)
        assert readable, f"the server does not listen (exit code {process.poll()})"
    finally:
        os.close(fd)


@contextlib.contextmanager
def qemu_nbd(image: Path, *arguments: str) -> Iterator[Path]:
    """qemu-nbd on a socket of its own; it forks when it listens."""
    from tests.conftest import make_runtime_dir, wait_for_end

    need("qemu-nbd")
    with make_runtime_dir() as directory:
        path, pid = directory / "qemu.sock", directory / "pid"
        command = ["qemu-nbd", "-t", "--fork", "-e", "8", "-f", "raw", "-k", str(path), f"--pid-file={pid}"]
        subprocess.run([*command, *arguments, str(image)], check=True)
        number = int(pid.read_text())
        try:
            yield path
        finally:
            os.kill(number, 15)
            wait_for_end(number)
            path.unlink(missing_ok=True)
