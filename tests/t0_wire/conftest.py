"""Fixtures of the tests that mount something themselves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from rawserver import RawServer, detach, serving

from udf.fuse import device


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RawServer]:
    """A served mount that negotiated nothing."""
    with serving(tmp_path) as server:
        yield server


@pytest.fixture
def point(tmp_path: Path) -> Iterator[str]:
    """A mountpoint that nothing stays mounted on."""
    path = tmp_path / "point"
    path.mkdir()
    yield str(path)
    detach(path)


@pytest.fixture
def fd() -> Iterator[int]:
    """A connection to be mounted. Nobody answers on it."""
    fd = device.open_device()
    yield fd
    os.close(fd)
