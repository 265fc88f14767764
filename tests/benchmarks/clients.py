"""The work that programs do on a mount, timed one operation at a time.

Owns: the loops and what makes them cold. Must never: know which contestant it works on. Called by the benchmarks.
"""

from __future__ import annotations

import array
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from time import perf_counter

PAGE = 4096


def open_random(path: str | os.PathLike[str]) -> int:
    """A descriptor without readahead: each page that is not cached is one request of 4 KiB."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    return fd


def drop_pages(fd: int) -> None:
    """Forget this file's clean pages in its mount; the source's stay."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def reads(fd: int, pages: Sequence[int]) -> list[float]:
    """Seconds for each read of 4 KiB."""
    samples = []
    pread = os.pread
    for page in pages:
        start = perf_counter()
        data = pread(fd, PAGE, page * PAGE)
        samples.append(perf_counter() - start)
        if len(data) != PAGE:
            raise RuntimeError(f"page {page} was read short: {len(data)} bytes")
    return samples


def stats(directory: int, names: Sequence[str]) -> list[float]:
    """Seconds for each stat."""
    samples = []
    stat = os.stat
    for name in names:
        start = perf_counter()
        stat(name, dir_fd=directory)
        samples.append(perf_counter() - start)
    return samples


def creates(directory: int, names: Sequence[str]) -> list[float]:
    """Seconds for each file that is created, closed and removed."""
    samples = []
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    for name in names:
        start = perf_counter()
        os.close(os.open(name, flags, 0o644, dir_fd=directory))
        os.unlink(name, dir_fd=directory)
        samples.append(perf_counter() - start)
    return samples


def sequential(fd: int, buffer: bytearray, size: int) -> list[float]:
    """Seconds for each read of the buffer's size, from the start of the file to its end."""
    samples = []
    os.lseek(fd, 0, os.SEEK_SET)
    buffers = [buffer]
    got = 0
    while got < size:
        start = perf_counter()
        count = os.readv(fd, buffers)
        samples.append(perf_counter() - start)
        if not count:
            raise RuntimeError(f"the file ends at {got} of {size} bytes")
        got += count
    return samples


def together(count: int, work: Callable[[int], Sequence[float]]) -> tuple[float, list[float]]:
    """Run `work(number)` in `count` processes that start at the same moment.

    Returns the seconds from the first start to the last end, and all samples. The work's result is its samples.
    """
    go_read, go_write = os.pipe()
    children: list[tuple[int, int, int]] = []
    try:
        for number in range(count):
            ready_read, ready_write = os.pipe()
            pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
                os.close(go_write)
                _child(number, work, go_read, ready_write)
            os.close(ready_write)
            children.append((pid, ready_read, number))
        for _, ready, number in children:
            if os.read(ready, 1) != b"r":
                raise RuntimeError(f"client {number} did not start")
        os.close(go_write)
        go_write = -1
        starts, ends, samples = [], [], array.array("d")
        for _, ready, number in children:
            data = array.array("d")
            data.frombytes(_read_all(ready))
            if len(data) < 2:
                raise RuntimeError(f"client {number} failed")
            starts.append(data[0])
            ends.append(data[1])
            samples += data[2:]
        return max(ends) - min(starts), list(samples)
    except BaseException:
        for pid, _, _ in children:
            os.kill(pid, signal.SIGKILL)
        raise
    finally:
        for end in (go_read, go_write):
            if end >= 0:
                os.close(end)
        for pid, ready, _ in children:
            os.close(ready)
            os.waitpid(pid, 0)


def _child(number: int, work: Callable[[int], Sequence[float]], go: int, result: int) -> None:
    """Never returns: a fork of a benchmark must not run its cleaning up."""
    code = 1
    try:
        os.write(result, b"r")
        os.read(go, 1)  # until its other end is closed
        start = perf_counter()
        samples = work(number)
        data = array.array("d", [start, perf_counter()])
        data.extend(samples)
        view = memoryview(data).cast("B")
        while view:
            view = view[os.write(result, view) :]
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _read_all(fd: int) -> bytes:
    chunks = []
    while chunk := os.read(fd, 1 << 16):
        chunks.append(chunk)
    return b"".join(chunks)
