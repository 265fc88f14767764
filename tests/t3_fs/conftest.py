"""What tests of drivers with a store are given."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from memfs_lab import PACKAGE

from udf.driver import journal
from udf.driver.memory import create_memfds


@pytest.fixture
def fd() -> Iterator[int]:
    (fd,) = create_memfds("test")
    yield fd
    os.close(fd)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compactions begin early, so that a short run sees several of them."""
    monkeypatch.setattr(journal, "_FLOOR", 3000)
    monkeypatch.setattr(sys.modules[f"{PACKAGE}.snapshot"], "_CHUNK", 2)
