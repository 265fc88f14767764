"""The exploration itself: what it tries, what counts as right, and that it ends whatever the driver does."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from functools import partial

import pytest
import usb.core
import usb.util

from tests.t7_hotplug import models
from udf.errors import UserError
from udf.testing.hotplug import HotplugError, UsbBus
from udf.testing.hotplug.steps import CONDITIONS, FAULTS, Fault


def find(**what):
    device = usb.core.find(**what)
    if device is None:
        raise OSError(errno.ENODEV, "no device")
    return device


def celsius():
    device = find(idProduct=0x7E57)
    try:
        data = device.ctrl_transfer(0xC0, 1, 0, 0, 2)
    finally:
        usb.util.dispose_resources(device)
    if len(data) != 2:
        raise OSError(errno.EPROTO, "a short answer")
    return int.from_bytes(data, "little") / 100


def explore(scenario, plug=models.Thermometer, **how):
    return UsbBus().explore(scenario, plug=plug, check=False, **how)


def test_every_fault_is_tried_at_every_call_that_can_have_it():
    report = explore(celsius, also=["corrupt", "unconfigured"], without=["corrupt"])
    assert report
    assert [step.partition(";")[0] for step in report.steps] == ["open", "control 0xc0 request 0x01, 2 bytes"]
    assert report.tried == [
        "healthy", "absent", "unconfigured", "unplug@1", "replug@1",
        "unplug@2", "replug@2", "stall@2", "short@2", "timeout@2", "eio@2", "babble@2",
    ]  # fmt: skip


def test_two_explorations_are_the_same():
    def weight():
        device = find(idVendor=0x0922)
        data = device.read(0x81, 8)
        usb.util.dispose_resources(device)
        return int.from_bytes(data[4:], "little")

    first, second = (explore(weight, models.Scale, also=["corrupt"]) for _ in range(2))
    assert str(first) == str(second)
    assert first.findings
    one = first.findings[-1]
    again = explore(weight, models.Scale, only=one.fault)
    assert (one.fault, one.check, one.text) in [(each.fault, each.check, each.text) for each in again.findings]


def test_a_finding_raises_and_carries_the_report(usb_bus):
    with pytest.raises(HotplugError, match=r"only='absent'") as caught:
        usb_bus.explore(lambda: usb.core.find().ctrl_transfer(0xC0, 1, 0, 0, 2)[0], plug=models.Thermometer)
    assert "absent" in caught.value.report.checks


def test_what_may_be_raised_is_the_authors_choice():
    class ThermometerError(Exception):
        pass

    def wrapped():
        try:
            return celsius()
        except OSError as error:
            raise ThermometerError from error

    report = explore(wrapped)
    assert report.checks == {"raised"}
    assert explore(wrapped, errors=ThermometerError)
    assert explore(wrapped, errors=[KeyError, ThermometerError])


def test_a_driver_that_fails_without_a_fault_is_told_with_its_traceback():
    def broken():
        celsius()
        raise ZeroDivisionError("oh")

    (finding,) = explore(broken).findings
    assert (finding.fault, finding.check) == ("healthy", "healthy")
    assert 'raise ZeroDivisionError("oh")' in finding.stack


def test_a_result_that_changes_by_itself_is_told_at_once():
    results = iter(range(100))

    def changing():
        celsius()
        return next(results)

    (finding,) = explore(changing).findings
    assert "the second run on the same device is not like the first one: it returns 1 instead of 0" in finding.text


def test_a_scenario_that_uses_no_device_is_refused_in_one_sentence():
    with pytest.raises(UserError, match=r"no call to a device"):
        explore(lambda: 1)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"faults": ["explode"]}, "no fault 'explode'"),
        ({"only": "unplug"}, "unplug@7"),
        ({"only": "unplug@99"}, "a healthy run makes 2 calls"),
        ({"only": "7"}, "names no fault"),
        ({"only": "twin"}, "cannot be tried here"),
    ],
)
def test_mistakes_are_told_in_one_sentence(how, words):
    with pytest.raises(UserError, match=words):
        explore(celsius, **how)


def test_faults_have_names_that_can_be_read_back():
    for fault in (Fault("unplug", 7), Fault("absent")):
        assert Fault.parse(str(fault)) == fault
    assert Fault.parse("drop@3") == Fault("timeout", 3)
    assert not set(CONDITIONS) & set(FAULTS)


def test_a_scenario_that_is_not_the_same_each_time_is_noted():
    first = iter([4])

    def chatty():
        for _ in range(next(first, 0)):
            celsius()
        return celsius()

    report = explore(chatty, without=["short"])
    assert report
    assert "unplug@10" in report.missed
    assert "faults did not find their call: the scenario is not the same each time" in str(report)


def test_when_nothing_works_any_more_the_rest_is_not_tried():
    broken = []

    def brittle():
        if broken:
            raise RuntimeError("broken for ever")
        try:
            return celsius()
        except OSError:
            broken.append(True)
            raise

    report = explore(brittle, faults=["unplug"])
    assert report.tried == ["healthy", "unplug@1"]
    assert "after unplug@1 it does not work any more, also without a fault: the rest is untried" in str(report)


# ---- it ends


def test_a_driver_that_waits_in_a_lock_for_ever_is_left_behind_and_its_place_is_shown():
    never = threading.Event()

    def stuck():
        try:
            return celsius()
        except OSError:
            never.wait()
            raise

    before = time.monotonic()
    report = explore(stuck, only="unplug@2", bound=0.2)
    assert time.monotonic() - before < 60
    (finding,) = report.findings
    assert finding.check == "hang"
    assert "never.wait()" in finding.stack
    never.set()
    for thread in threading.enumerate():
        if thread.name == "scenario":
            thread.join(5)


def test_a_driver_that_waits_for_its_device_to_come_back_is_ended():
    def waiting():
        while True:
            try:
                return celsius()
            except OSError:
                time.sleep(0.01)

    report = explore(waiting, bound=0.2, only="unplug@1")
    assert report.checks == {"hang"}
    assert "time.sleep(0.01)" in report.findings[0].stack
    assert not [thread for thread in threading.enumerate() if thread.name == "scenario" and thread.is_alive()]


def test_a_driver_that_catches_everything_is_ended():
    def greedy():
        device = find(idProduct=0x7E57)
        while True:
            try:
                return bytes(device.ctrl_transfer(0xC0, 1, 0, 0, 2))
            except BaseException:
                continue

    report = explore(greedy, bound=0.2, only="unplug@2")
    assert "retries" in report.checks


def test_a_model_that_hangs_holds_nobody_for_ever():
    enough = threading.Event()

    class Hanging(models.Thermometer):
        def on_control(self, setup, data):
            enough.wait()
            return b"xx"

    (finding,) = explore(celsius, Hanging, bound=0.1).findings
    assert finding.check == "hang"
    assert "enough.wait()" in finding.stack
    enough.set()


def test_a_healthy_run_that_does_not_end_is_a_finding():
    def endless():
        celsius()
        threading.Event().wait(5)

    (finding,) = explore(endless, bound=0.1).findings
    assert (finding.fault, finding.check) == ("healthy", "hang")


# ---- drivers that keep their device


class Keeper:
    """Keeps its device open, and forgets it when it fails."""

    device = None
    forgets = True

    def read(self):
        try:
            if self.device is None:
                self.device = find(idProduct=0x7E57)
            data = self.device.ctrl_transfer(0xC0, 1, 0, 0, 2)
        except OSError:
            if self.forgets:
                self.close()
            raise
        if len(data) != 2:
            raise OSError(errno.EPROTO, "a short answer")
        return int.from_bytes(data, "little")

    def close(self):
        if self.device is not None:
            usb.util.dispose_resources(self.device)
        self.device = None


def test_a_driver_may_keep_its_device_if_it_says_how_it_is_closed():
    keeper = Keeper()
    report = explore(keeper.read, close=keeper.close)
    assert report, str(report)
    assert {"unplug@3", "unplug@4", "replug@4"} <= set(report.tried)  # in the second run, and between two
    keeper = Keeper()
    (finding,) = explore(keeper.read).findings
    assert "say close=" in finding.text
    keeper.close()


def test_a_loss_between_two_runs_is_noticed_once():
    keeper = Keeper()
    keeper.forgets = False
    report = explore(keeper.read, close=keeper.close, only="replug@4")
    assert [finding.text.partition(":")[0] for finding in report.findings] == ["after it was plugged in again it fails"]


def test_a_close_that_fails_is_a_finding():
    def close():
        raise usb.core.USBError("cannot", None, errno.EIO)

    report = explore(celsius, close=close)
    assert report.checks == {"close"}


# ---- more than one device


def test_a_driver_for_one_serial_leaves_the_other_device_alone():
    def wanted(device):
        try:
            return device.serial_number == "A"
        except ValueError:
            return False

    def careful():
        device = find(idProduct=0x7E57, custom_match=wanted)
        try:
            return bytes(device.ctrl_transfer(0xC0, 1, 0, 0, 2))
        finally:
            usb.util.dispose_resources(device)

    plug, twin = (partial(models.Thermometer, serial=serial) for serial in "AB")
    assert explore(careful, plug, twin=twin, without=["short"])
    careless = explore(celsius, plug, twin=twin)
    assert careless.checks == {"twin", "absent"}
    assert [finding.fault for finding in careless.findings] == ["twin", "twin_alone", "twin_alone"]


def test_an_event_loop_is_allowed_to_wait_elsewhere():
    async def in_a_thread():
        return await asyncio.to_thread(celsius)

    assert explore(in_a_thread)
