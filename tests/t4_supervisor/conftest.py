"""What every test of the supervisor is checked for, and where its sockets are."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import pytest
import trio
from lab import Lab, laboratory
from staging import Stage

from udf.supervisor import endpoint, hosts, mounts, paths, process, recovery, restart, spawn, succession
from udf.supervisor.spawn import Identity


@pytest.fixture(autouse=True)
def no_descriptor_stays() -> Iterator[None]:
    """Of any kind; processes and mounts are looked after for all tests."""
    before = descriptors()
    yield
    until = time.monotonic() + 10
    # What hypothesis opens is its own; a thread that has just been let go may still be closing what it had.
    while left := {n: to for n, to in descriptors().items() if before.get(n) != to and ".hypothesis" not in to}:
        assert time.monotonic() < until, f"descriptors left open: {left}"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def own_rundir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sockets and locks of the tests are not the machine's."""
    from udf.supervisor import sockets

    rundir = tmp_path / "run"
    monkeypatch.setattr(sockets, "ROOT_RUNDIR", rundir)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "xdg"))
    monkeypatch.setattr(sockets, "rundir", lambda: rundir)
    return rundir


def descriptors() -> dict[str, str]:
    found = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            found[number] = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue
    return {number: target for number, target in found.items() if not target.startswith("/proc/")}


@pytest.fixture
async def stage(nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage(nursery, tmp_path)

    def start_shim(name: str, control: socket.socket, output: int, run_as: Identity | None) -> spawn.Child:
        return stage.start("shim", control, output)

    def start_host(name: str, control: socket.socket, output: int, environment: Mapping[str, str]) -> spawn.Child:
        return stage.start("host", control, output)

    async def clean(mountpoint: str, run_as: Identity | None) -> str:
        stage.cleaned.append(mountpoint)
        return ""

    monkeypatch.setattr(spawn, "start_shim", start_shim)
    monkeypatch.setattr(spawn, "start_host", start_host)
    monkeypatch.setattr(paths, "clean", clean)
    for module in (endpoint, mounts, recovery, succession, hosts):
        for name, value in {"LINK_GRACE": 1.0, "STOP_GRACE": 0.5, "TERM_GRACE": 0.3, "HEARTBEAT": 0.1}.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(process, "DRAIN", 0.2)
    monkeypatch.setattr(restart, "FIRST_DELAY", 0.02)
    return stage


@pytest.fixture
async def lab(own_rundir: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lab]:
    """A registry that serves devices, with a bus of emulated ones."""
    from udf.supervisor import sockets

    monkeypatch.setattr(sockets, "rundir", lambda: runtime_dir)
    async with laboratory(runtime_dir) as lab:
        yield lab
