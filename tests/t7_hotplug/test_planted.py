"""Typical hot-plug bugs in small drivers: the exploration finds each of them, and raises no alarm without them."""

from __future__ import annotations

import contextlib
import difflib
import os
from functools import partial

import pytest

from tests.t7_hotplug import models, planting
from udf.testing.hotplug import UsbBus

SCALE = {"plug": models.Scale}
THERMOMETER = {"plug": models.Thermometer}
inside, outside = (partial(models.Thermometer, raw=raw, serial=name) for raw, name in ((2150, "inside"), (0, "out")))


def shows(display):
    assert display.shown == bytes(128), f"{len(display.shown)} bytes are shown"


# The planted bug -> what its author would write besides the scenario, the check that finds it, and a fault that does.
BUGS = {
    "closed_while_read": ({"plug": models.Button}, "misuse", "any"),
    "configuration_assumed": ({**SCALE, "also": ["unconfigured"]}, "unconfigured", "unconfigured"),
    "configuration_insisted": ({"plug": models.CombinedScale, "also": ["unconfigured"]}, "in_use", "in_use"),
    "double_close": (SCALE, "raised", "unplug"),
    "error_swallowed": (THERMOMETER, "wrong", "unplug"),
    "event_loop_blocked": (SCALE, "blocks", "timeout"),
    "handle_leak": (THERMOMETER, "handle", "unplug"),
    "interface_not_released": (SCALE, "claim", "unplug"),
    "kernel_driver_assumed": ({"plug": models.HidScale}, "healthy", "healthy"),
    "kernel_driver_forgotten": ({"plug": models.HidScale}, "kernel_driver", "kernel_driver"),
    "lock_file_left": (THERMOMETER, "descriptor", "unplug"),
    "no_timeout": (SCALE, "hang", "timeout"),
    "no_zero_length_packet": ({"plug": models.Display, "state": shows}, "healthy", "healthy"),
    "none_not_checked": (THERMOMETER, "absent", "absent"),
    "optional_request": ({"plug": models.Stick}, "optional", "stall"),
    "partial_write": ({"plug": models.Printer, "state": lambda model: model.page}, "wrong", "short"),
    "remembered_factor": (
        {**THERMOMETER, "replacement": partial(models.Thermometer, factor=2)},
        "replacement",
        "replacement",
    ),
    "retry_forever": (SCALE, "retries", "unplug"),
    "setting_lost_by_reset": ({"plug": models.Camera}, "raised", "stall"),
    "short_packet_ignored": (THERMOMETER, "wrong", "short"),
    "small_buffer": (
        {"plug": models.Meter, "replacement": partial(models.Meter, name="UDF,Meter number,12")},
        "replacement",
        "replacement",
    ),
    "stale_answer": ({"plug": models.Meter}, "after", "timeout"),
    "stale_cache": (SCALE, "after", "unplug"),
    "stall_not_cleared": (SCALE, "after", "stall"),
    "thread_dies": (SCALE, "died", "unplug"),
    "thread_outlives": (SCALE, "thread", "unplug"),
    "two_devices": ({"plug": inside, "twin": outside}, "twin", "twin"),
    "unplug_is_end": ({"plug": models.Logger}, "wrong", "unplug"),
    "wrong_errno": (THERMOMETER, "raised", "unplug"),
    "zero_length_is_end": ({"plug": models.Logger}, "wrong", "empty"),
}


def explore(name: str, *, bug: bool, **more):
    driver = planting.load(name, bug=bug)
    how = {**BUGS[name][0], **more}
    if hasattr(driver, "close") and name == "stale_cache":
        how["close"] = driver.close
    return UsbBus().explore(driver.use, check=False, **how)


def test_every_planted_bug_is_in_the_table():
    assert list(BUGS) == planting.NAMES
    assert len(BUGS) >= 20


@pytest.fixture
def closing():
    """A driver that leaves descriptors behind does so here too."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    for number in set(os.listdir("/proc/self/fd")) - before:
        with contextlib.suppress(OSError):
            os.close(int(number))


@pytest.mark.parametrize("name", BUGS)
def test_the_bug_is_found(name, closing):
    report = explore(name, bug=True)
    _, check, kind = BUGS[name]
    found = [finding for finding in report.findings if finding.check == check]
    assert [finding for finding in found if kind in (finding.fault.partition("@")[0], "any")], str(report)


@pytest.mark.parametrize("name", BUGS)
def test_there_is_no_alarm_without_the_bug(name):
    report = explore(name, bug=False)
    assert report, str(report)
    assert len(report.tried) >= 8
    assert not report.missed


@pytest.mark.parametrize("name", BUGS)
def test_the_two_versions_differ_in_the_bug_only(name):
    correct, wrong = (planting.source(name, bug=bug).splitlines() for bug in (False, True))
    changed = [line for line in difflib.ndiff(correct, wrong) if line[0] in "+-"]
    assert 0 < len(changed) <= 8
    assert len(correct) <= 40
