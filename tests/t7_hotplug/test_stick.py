"""The storage driver: every fault at every call of its start, a write, a read and a flush.

`UDF_HOTPLUG_FULL=1` does that with transfers one by one too, which takes as long again.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys

import pytest

from tests.conftest import ROOT
from udf.testing.devices.storage import Storage
from udf.testing.hotplug import UsbBus

PACKAGE = ROOT / "drivers" / "usb_storage" / "__init__.py"
DATA = bytes(range(256)) * 16
OFFSET = 4096
QUEUES = [True, False] if os.environ.get("UDF_HOTPLUG_FULL") else [True]
pytestmark = pytest.mark.skipif(not PACKAGE.exists(), reason="the driver is not here")


class Stick(Storage):
    """Its cache dies with the power: what is on the medium at its end is what counts."""

    def __init__(self):
        super().__init__(size=1 << 20, cache=1 << 20)
        self.kept = b""

    def on_medium(self):
        medium = self.units[0].medium
        return os.pread(medium._fd, len(DATA), OFFSET) if medium._fd >= 0 else self.kept

    def close(self):
        self.kept = self.on_medium()
        super().close()


@pytest.fixture
def driver(monkeypatch):
    """The driver's class; plugin trees are loaded by path."""
    spec = importlib.util.spec_from_file_location(
        "usb_storage", PACKAGE, submodule_search_locations=[str(PACKAGE.parent)]
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "usb_storage", module)
    spec.loader.exec_module(module)
    logging.getLogger("usb_storage").setLevel(logging.CRITICAL)  # it tells of each of some hundred errors
    yield module.UsbStorage
    logging.getLogger("usb_storage").setLevel(logging.NOTSET)
    for name in [name for name in sys.modules if name.startswith("usb_storage.")]:
        del sys.modules[name]


def is_kept(stick):
    assert stick.on_medium() == DATA, "what was flushed is not on the medium"


async def write(driver):
    unit = (await driver.units())[""]
    await unit.write(OFFSET, DATA)
    assert bytes(await unit.read(OFFSET, len(DATA))) == DATA


async def write_and_flush(driver):
    await write(driver)
    await (await driver.units())[""].flush()


@pytest.mark.parametrize("queue", QUEUES)
def test_no_fault_makes_it_hang_lie_or_fail_later(driver, queue):
    report = UsbBus().explore_driver(
        driver, Stick, write_and_flush, state=is_kept, options={"queue": queue}, bound=10, check=False
    )
    assert report, str(report)
    assert len(report.tried) > 200
    assert not report.missed


def test_a_flush_that_is_not_done_would_be_found(driver):
    report = UsbBus().explore_driver(driver, Stick, write, state=is_kept, bound=10, check=False)
    assert "what was flushed is not on the medium" in str(report)
