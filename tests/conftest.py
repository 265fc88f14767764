"""What every test may use, and what every test must leave behind: nothing."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]
PR_SET_CHILD_SUBREAPER = 36
SHORT = f"/tmp/udf-t{os.getpid()}-"  # ours alone: other test runs may share the machine
GRACE = 40.0  # what ends by itself may take this long; it is waited for by event, not by sleep
SOON = 5.0  # and what nobody tells us of, this

# A busy machine is no failure; what failed is printed so that it can be repeated.
hypothesis.settings.register_profile("udf", deadline=None, print_blob=True)
hypothesis.settings.load_profile("udf")

# Orphans become ours, so that whatever a test started is found below us however often it forked.
ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skip says why, also where it came out of an async test, which makes pytest forget."""
    report = yield
    if call.excinfo is not None and isinstance(call.excinfo.value, pytest.skip.Exception):
        path, line, _ = item.location
        report.longrepr = (path, (line or 0) + 1, f"Skipped: {_reason(call.excinfo.value)}")
    return report


def _reason(error: BaseException | None) -> str:
    """Why a test was skipped: pytest-trio raises a new exception, without a reason, out of the group of the old one."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_reason, error.exceptions)), "")
    if error is None:
        return ""
    return str(getattr(error, "msg", None) or "") or _reason(error.__cause__ or error.__context__)


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """A directory for the sockets of one test."""
    with make_runtime_dir() as path:
        yield path


@contextlib.contextmanager
def make_runtime_dir() -> Iterator[Path]:
    """A private directory, short because socket paths are bounded by 108 bytes; no socket may be left in it."""
    path = Path(tempfile.mkdtemp(prefix=SHORT, dir="/"))
    try:
        yield path
        left = sorted(str(p) for p in path.rglob("*") if stat.S_ISSOCK(p.lstat().st_mode))
        assert not left, f"sockets are left: {left}"
    finally:
        _unmount_below(path)
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No process, mount or device descriptor of a test outlives it. First in, so last out."""
    processes, descriptors = set(_descendants()), _descriptors()
    yield
    problems = [f"process {pid} is left: {command}" for pid, command in _end_leftovers(processes)]
    until = time.monotonic() + SOON
    if _descriptors() - descriptors:
        gc.collect()  # the traceback of an error that was expected may hold what has one
    # A thread that was let go may still be closing what it had, and the kernel unmounting what was closed.
    while time.monotonic() < until and (_descriptors() - descriptors or _mounted(tmp_path_factory)):
        time.sleep(0.02)
    for point in _mounted(tmp_path_factory):
        problems.append(f"{point} is left mounted")
        subprocess.run(["umount", "-l", point], check=False, capture_output=True)
    problems += [f"descriptor {fd} is left: {name}" for fd, name in (_descriptors() - descriptors)]
    if problems:
        pytest.fail("left behind:\n  " + "\n  ".join(problems), pytrace=False)


def _mounted(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [point for base in (tmp_path_factory.getbasetemp(), SHORT) for point in mounts_below(base)]


def _descendants() -> Iterator[int]:
    pending = [os.getpid()]
    while pending:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pending[-1]}/task"):
                children = Path(f"/proc/{pending[-1]}/task/{task}/children").read_text().split()
                pending[:0] = map(int, children)
                yield from map(int, children)
        pending.pop()


def _stands_by(pid: int, before: set[int]) -> bool:
    """Whether it is the zygote of a supervisor that is older than the test, or what was forked ahead from it."""
    with contextlib.suppress(OSError, ValueError):
        while pid > 1:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            # A process that was forked a moment ago still has its parent's name: look further up too.
            if name in ("udf-zygote", "udf-standby") and pid in before:
                return True
    return False


def _end_leftovers(before: set[int]) -> list[tuple[int, str]]:
    """Processes that did not end by themselves; they are ended here."""
    left = []
    until = time.monotonic() + GRACE
    # Twice: what ends may leave orphans to us.
    for _ in range(2):
        for pid in [p for p in _descendants() if p not in before and not _stands_by(p, before)]:
            if _ended(pid, max(0.0, until - time.monotonic())):
                continue
            left.append((pid, _command(pid)))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _ended(pid, GRACE)
    return left


def _ended(pid: int, seconds: float) -> bool:
    """Wait for an end and reap; an orphan that ended is our zombie."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return False
    finally:
        os.close(fd)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return True


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "already gone"


def _descriptors() -> set[tuple[str, str]]:
    """Our descriptors on FUSE devices and shared memory: what keeps a mount or a store alive."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            name = os.readlink(f"/proc/self/fd/{fd}")
            if name.startswith(("/dev/fuse", "/memfd:", "anon_inode:[fuse")):
                found.add((fd, name))
    return found


def mounts_below(base: str | Path) -> list[str]:
    """Mountpoints at, below or beginning with `base`, innermost first."""
    table = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    points = [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split()[4]) for line in table]
    return sorted((p for p in points if p.startswith(str(base))), key=len, reverse=True)


def _unmount_below(base: str | Path) -> list[str]:
    points = mounts_below(base)
    for point in points:
        subprocess.run(["umount", "-l", point], check=False, capture_output=True)
    return points


@pytest.fixture
def python() -> str:
    """The interpreter of this run, for processes of the project."""
    return sys.executable


def wait_for_mounts(base: str | Path, wanted: int, seconds: float = GRACE) -> None:
    """Until so many mounts are below `base`: the kernel tells of each change of its table."""
    until = time.monotonic() + seconds
    with open("/proc/self/mountinfo", "rb") as table:
        poll = select.poll()
        poll.register(table, select.POLLPRI)
        while len(mounts_below(base)) != wanted:
            left = until - time.monotonic()
            assert left > 0, f"{mounts_below(base)} are mounted, not {wanted}"
            poll.poll(min(left, 1.0) * 1000)


def wait_for_end(pid: int, seconds: float = GRACE) -> None:
    """Until a process has ended."""
    assert _ended(pid, seconds), f"process {pid} ({_command(pid)}) does not end"
