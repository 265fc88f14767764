"""The host under test, and where its test drivers are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.t2_host.peer import Host
from tests.t2_host.peer import host as make_host

DRIVERS = Path(__file__).parent / "drivers"


@pytest.fixture
def host() -> Iterator[Host]:
    """A host that has not been told anything yet."""
    with make_host() as peer:
        yield peer


@pytest.fixture
def drivers() -> Path:
    """The directory of the test drivers."""
    return DRIVERS
