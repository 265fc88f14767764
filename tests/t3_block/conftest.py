"""Fixtures of the block shim's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.t3_block.lab import MIB


@pytest.fixture
def disk(runtime_dir: Path) -> Path:
    """A file for a medium of 4 MiB, zeros."""
    path = runtime_dir / "disk.img"
    path.write_bytes(bytes(4 * MIB))
    return path
