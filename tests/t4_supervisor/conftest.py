"""What every test of the supervisor is checked for, and where its sockets are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def no_descriptor_stays() -> Iterator[None]:
    """Of any kind; processes and mounts are looked after for all tests."""
    before = descriptors()
    yield
    # What hypothesis opens is its own.
    left = {n: target for n, target in descriptors().items() if before.get(n) != target and ".hypothesis" not in target}
    assert not left, f"descriptors left open: {left}"


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
