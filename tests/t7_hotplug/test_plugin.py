"""The fixture `usb_bus`: what plain pyusb code sees on it, what goes wrong on request, and what may not be left."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
import usb.backend.libusb1
import usb.core
import usb.util

import udf.testing.plugin
from tests.conftest import ROOT
from tests.t7_hotplug import models
from udf.errors import UserError
from udf.testing.devices import BulkIn, BulkOut, Configuration, Device, Interface
from udf.testing.hotplug import UsbBus
from udf.testing.hotplug.steps import EXTRA, FAULTS


class Echo(Device):
    """What goes out on bulk 1 comes back."""

    vendor, product = 0x1209, 0x0010
    configurations = [Configuration([Interface(0xFF, endpoints=[BulkIn(1, 64), BulkOut(1, 64)])])]

    def on_out(self, endpoint, data):
        self.push(0x81, data)

    def on_control(self, setup, data):
        return b"12345678"[: setup.length] if setup.is_in else None


@pytest.fixture
def echo(usb_bus):
    usb_bus.plug(Echo)
    device = usb.core.find(idProduct=0x0010)
    yield device
    usb.util.dispose_resources(device)


def test_find_sees_every_device_that_is_plugged_in_and_no_other(usb_bus):
    assert usb.core.find() is None
    first, second = usb_bus.plug(models.Thermometer(serial="A")), usb_bus.plug(models.Scale(serial="B"))
    assert [device.serial_number for device in usb.core.find(find_all=True)] == ["A", "B"]
    assert usb.core.find(idVendor=0x0922).address == second.address
    usb_bus.unplug(first)
    assert [device.serial_number for device in usb.core.find(find_all=True)] == ["B"]
    again = usb_bus.replug(second)
    (found,) = usb.core.find(find_all=True)
    assert (found.port_number, found.address) == (second.port, again.address)
    assert again.address != second.address


def test_who_has_kept_the_backend_sees_the_bus_too(usb_bus):
    usb_bus.plug(Echo)
    backend = usb.backend.libusb1.get_backend(find_library=lambda name: None)
    assert usb.core.find(backend=backend) is not None
    assert usb.core.find().backend.__module__ == "usb.backend.libusb1"  # what python-escpos looks at
    other = UsbBus()
    with other.checked():
        assert usb.core.find(backend=backend) is None
        other.plug(models.Scale)
        assert usb.core.find(backend=backend).idVendor == 0x0922
    assert usb.core.find(backend=backend).idVendor == 0x1209


def test_pyusb_is_as_before_afterwards():
    before = usb.backend.libusb1.get_backend
    kept = usb.backend.libusb1._lib_object
    with UsbBus().checked() as bus:
        bus.plug(Echo)
        assert usb.core.find() is not None
        assert usb.backend.libusb1.get_backend is not before
    assert usb.backend.libusb1.get_backend is before
    assert usb.backend.libusb1._lib_object is kept


def test_a_read_that_waits_is_woken_by_the_unplug(usb_bus):
    plugged = usb_bus.plug(Echo)
    device = usb.core.find()
    errors = []

    def read():
        try:
            device.read(0x81, 64, timeout=0)
        except usb.core.USBError as error:
            errors.append(error.errno)

    thread = threading.Thread(target=read)
    thread.start()
    while not plugged.link._waiting:
        thread.join(0.001)
    usb_bus.unplug(plugged)
    thread.join(1)
    assert errors == [errno.ENODEV]
    with pytest.raises(usb.core.USBError) as caught:
        device.write(0x01, b"x")
    assert caught.value.errno == errno.ENODEV
    usb.util.dispose_resources(device)


def test_every_call_is_recorded_with_the_line_that_made_it(echo, usb_bus):
    echo.write(0x01, b"hello")
    echo.read(0x81, 64)
    with pytest.raises(usb.core.USBTimeoutError):
        echo.read(0x81, 64, timeout=1)
    assert [(step.call, step.data, step.result) for step in usb_bus.transfers if step.call in ("read", "write")] == [
        ("write", b"hello", ""),
        ("read", b"hello", ""),
        ("read", b"", "timeout"),
    ]
    assert all(step.where.startswith("test_plugin.py:") for step in usb_bus.transfers)
    assert [step.number for step in usb_bus.transfers] == list(range(1, len(usb_bus.transfers) + 1))


# What each fault does to a write of 200 bytes and the read of its echo; then the two are done once more.
HEALTHY = (200, 200)
EFFECTS = {
    "unplug": (errno.ENODEV, None, errno.ENODEV),
    "replug": (errno.ENODEV, None, errno.ENODEV),
    "timeout": (errno.ETIMEDOUT, 200, HEALTHY),
    "eio": (errno.EIO, None, HEALTHY),
    "babble": (errno.EOVERFLOW, None, HEALTHY),
    "stall": (errno.EPIPE, 200, HEALTHY),
    "short": (100, None, HEALTHY),
    "split": (100, 100, HEALTHY),
    "empty": (0, 200, HEALTHY),
    "corrupt": (200, None, HEALTHY),
}


def attempt(call):
    try:
        result = call()
        return result if isinstance(result, int) else len(result)
    except usb.core.USBError as error:
        return error.errno


@pytest.mark.parametrize("kind", EFFECTS)
def test_what_a_fault_does_to_a_read(kind, echo, usb_bus):
    data = bytes(range(200))
    echo.write(0x01, data)
    usb_bus.fault(kind, endpoint=0x81)
    first, second, later = EFFECTS[kind]
    read = []
    assert attempt(lambda: read.append(echo.read(0x81, 256)) or read[0]) == first
    if kind == "corrupt":
        assert sum(a != b for a, b in zip(read[0], data, strict=True)) == 1
    if kind == "stall":
        assert attempt(lambda: echo.read(0x81, 256)) == errno.EPIPE  # until it is cleared
        echo.clear_halt(0x81)
    if second is not None:
        assert attempt(lambda: echo.read(0x81, 256)) == second
    if later is not HEALTHY:
        assert attempt(lambda: echo.write(0x01, data)) == later
        assert len(list(usb.core.find(find_all=True))) == (kind == "replug")
    else:
        assert (attempt(lambda: echo.write(0x01, data)), attempt(lambda: echo.read(0x81, 256))) == later


def test_what_a_fault_does_to_a_write(echo, usb_bus):
    data = bytes(range(200))
    for kind, result, arrives in (("short", 64, 64), ("timeout", errno.ETIMEDOUT, 0), ("eio", errno.EIO, 0)):
        usb_bus.fault(kind, endpoint=0x01)
        assert attempt(lambda: echo.write(0x01, data)) == result
        assert attempt(lambda: echo.read(0x81, 256, timeout=1)) == (arrives or errno.ETIMEDOUT)
    usb_bus.fault("stall", endpoint=0x01)
    assert attempt(lambda: echo.write(0x01, data)) == errno.EPIPE
    echo.clear_halt(0x01)
    assert attempt(lambda: echo.write(0x01, data)) == 200


def test_what_a_fault_does_to_a_control_transfer(echo, usb_bus):
    def ask():
        return echo.ctrl_transfer(0xC0, 1, 0, 0, 8)

    assert attempt(ask) == 8
    errors = {"stall": errno.EPIPE, "timeout": errno.ETIMEDOUT, "eio": errno.EIO, "babble": errno.EOVERFLOW}
    for kind, result in {**errors, "short": 4}.items():
        usb_bus.fault(kind)
        assert attempt(ask) == result
        assert attempt(ask) == 8


def test_a_fault_comes_when_it_is_wanted(echo, usb_bus):
    usb_bus.fault("eio", endpoint=0x01, at=2, count=2)
    assert [attempt(lambda: echo.write(0x01, b"x")) for _ in range(4)] == [1, errno.EIO, errno.EIO, 1]
    usb_bus.fault("timeout", endpoint=0)
    assert attempt(lambda: echo.write(0x01, b"x")) == 1
    assert attempt(lambda: echo.ctrl_transfer(0xC0, 1, 0, 0, 8)) == errno.ETIMEDOUT
    usb_bus.fault("busy")
    usb.util.release_interface(echo, 0)
    assert attempt(lambda: echo.write(0x01, b"x")) == errno.EBUSY


def test_every_fault_is_tried_above():
    assert {*EFFECTS, "busy"} == set(FAULTS)
    assert set(EXTRA) - set(FAULTS) == {"unconfigured"}


def test_kernel_drivers_and_other_programs_are_in_the_way(usb_bus):
    plugged = usb_bus.plug(models.CombinedScale, kernel_driver=[0], in_use=[1])
    device = usb.core.find()
    assert attempt(lambda: usb.util.claim_interface(device, 1) or 0) == errno.EBUSY
    assert attempt(lambda: device.read(0x81, 8)) == errno.EBUSY
    assert attempt(lambda: device.set_configuration() or 0) == errno.EBUSY
    assert device.is_kernel_driver_active(0)
    device.detach_kernel_driver(0)
    assert attempt(lambda: device.detach_kernel_driver(0) or 0) == errno.ENOENT
    assert attempt(lambda: device.read(0x81, 8)) == 6
    assert attempt(lambda: device.attach_kernel_driver(0) or 0) == errno.EBUSY
    usb.util.release_interface(device, 0)
    device.attach_kernel_driver(0)
    assert plugged.kernel == {0}
    usb.util.dispose_resources(device)


def test_an_unconfigured_device_wants_to_be_configured(usb_bus):
    usb_bus.plug(models.Scale, configured=False)
    device = usb.core.find()
    assert attempt(lambda: device.read(0x81, 8)) is None  # pyusb: Configuration not set
    device.set_configuration()
    assert attempt(lambda: device.read(0x81, 8)) == 6
    usb.util.dispose_resources(device)


# ---- what may not be left at the end of a test


def ending(misdeed):
    """The text of a test's end on a bus where that was done."""
    kept = []

    def test():
        with UsbBus().checked() as bus:
            bus.grace = 0.01
            bus.plug(Echo)
            kept.append(misdeed(bus))

    with pytest.raises(AssertionError) as caught:
        test()
    if hasattr(kept[0], "close"):
        kept[0].close()
    return str(caught.value)


def opened(bus):
    device = usb.core.find()
    usb.util.claim_interface(device, 0)
    return device


def test_a_handle_that_is_left_open_fails_the_test():
    text = ending(opened)
    assert "handle of Echo" in text
    assert "interface 0 claimed" in text
    assert "test_plugin.py" in text


def test_a_handle_that_only_the_collector_finds_is_left_open():
    """pyusb closes it by a weak reference, which the collector has cleared before."""

    def lose(bus):
        device = usb.core.find()
        device.myself = device
        device.write(0x01, b"x")

    assert "is left open" in ending(lose)


def test_a_descriptor_that_is_left_open_fails_the_test():
    assert "is left open on /dev/null" in ending(lambda bus: os.fdopen(os.open("/dev/null", os.O_RDONLY)))


def test_a_thread_that_is_left_fails_the_test_and_its_place_is_shown():
    event = threading.Event()

    class Waiting(threading.Thread):
        def run(self):
            event.wait(10)

        close = staticmethod(event.set)

    def start(bus):
        thread = Waiting(name="waiting")
        thread.start()
        return thread

    assert "the thread 'waiting' is left" in ending(start)


def test_a_fault_that_is_never_reached_fails_the_test():
    assert "the fault rule stall at 3 endpoint 0x81 was never reached" in ending(
        lambda bus: bus.fault("stall", at=3, endpoint=0x81)
    )


def test_a_handle_that_is_used_or_closed_after_its_end_fails_the_test():
    def twice(bus):
        device = usb.core.find()
        device.write(0x01, b"x")
        handle, backend = device._ctx.handle, device._ctx.backend
        usb.util.dispose_resources(device)
        backend.close_device(handle)
        with pytest.raises(usb.core.USBError):
            backend.get_configuration(handle)

    text = ending(twice)
    assert "is closed twice" in text
    assert "is used after it was closed" in text


def test_a_call_that_blocks_an_event_loop_fails_the_test():
    async def read(device):
        with pytest.raises(usb.core.USBTimeoutError):
            device.read(0x81, 64, timeout=100)
        usb.util.dispose_resources(device)

    assert "blocks the event loop" in ending(lambda bus: asyncio.run(read(usb.core.find())))


def test_mistakes_in_a_rule_are_told_in_a_sentence(usb_bus):
    with pytest.raises(UserError, match="no fault 'explode': choose from unplug"):
        usb_bus.fault("explode")
    with pytest.raises(UserError, match="begin with 1"):
        usb_bus.fault("stall", at=0)


# ---- as an outsider meets it


def test_the_plugin_loads_nothing_heavy_before_it_is_used():
    code = "import sys, pytest; before = set(sys.modules); import udf.testing.plugin; print(set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {each for each in ("trio", "msgspec", "usb", "udf.supervisor", "udf.usb") if repr(each) in loaded}, (
        loaded
    )


OUTSIDER = """
import usb.core, usb.util
from udf.testing.devices import Configuration, Device, Interface

class Thermometer(Device):                                    # the device, in Python
    vendor, product = 0x1209, 0x7E57
    configurations = [Configuration([Interface(0xFF)])]

    def on_control(self, setup, data):
        return (2150).to_bytes(2, "little")

def celsius():                                                # the driver, with plain pyusb
    device = usb.core.find(idVendor=0x1209, idProduct=0x7E57)
    try:
        return int.from_bytes(device.ctrl_transfer(0xC0, 1, 0, 0, 2), "little") / 100
    except usb.core.USBError:
        return 0.0
    finally:
        usb.util.dispose_resources(device)

def test_celsius_survives_everything(usb_bus):
    usb_bus.explore(celsius, plug=Thermometer)
"""


def outside(directory: Path, text: str, **environment: str):
    (directory / "test_outside.py").write_text(text)
    # Only this plugin, by its module, because the entry point may be another checkout's; it has a test of its own.
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "udf.testing.plugin", "test_outside.py"],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_pytest_finds_the_plugin_where_the_package_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"udf": udf.testing.plugin.__name__}


def test_an_outsider_finds_a_bug_in_25_lines(tmp_path):
    assert len(OUTSIDER.strip().splitlines()) <= 25
    run = outside(tmp_path, OUTSIDER)
    assert run.returncode == 1
    assert "unplug@1 [open; test_outside.py:15]: no error, but it returns 0.0 instead of 21.5" in run.stdout
    assert "without the device: AttributeError: 'NoneType' object has no attribute" in run.stdout
    assert "only='absent'" in run.stdout
    again = outside(tmp_path, OUTSIDER, UDF_HOTPLUG="unplug@2")
    assert "2 faults and conditions tried, 1 findings" in again.stdout
    assert "unplug@2" in again.stdout


def test_the_example_of_the_plugins_own_text_is_true(tmp_path):
    blocks = [""]
    for line in udf.testing.plugin.__doc__.splitlines():
        if line.startswith("    "):
            blocks[-1] += line.removeprefix("    ") + "\n"
        elif line.strip():
            blocks.append("")
        else:
            blocks[-1] += "\n"
    code, said = (block.strip() for block in blocks if "import usb" in block or "HotplugError" in block)
    run = outside(tmp_path, code)
    assert "1 failed, 1 passed" in run.stdout
    for line in said.splitlines():
        assert line.strip().removeprefix("HotplugError: ") in run.stdout


FIXED = """
def celsius():
    device = usb.core.find(idVendor=0x1209, idProduct=0x7E57)
    if device is None:
        raise FileNotFoundError("no thermometer")
    try:
        data = device.ctrl_transfer(0xC0, 1, 0, 0, 2)
    finally:
        usb.util.dispose_resources(device)
    if len(data) != 2:
        raise OSError("a short answer")
    return int.from_bytes(data, "little") / 100

def test_"""


def test_the_outsiders_driver_without_its_bugs_passes(tmp_path):
    model, _, rest = OUTSIDER.partition("\ndef celsius()")
    run = outside(tmp_path, model + FIXED + rest.partition("def test_")[2])
    assert run.returncode == 0, run.stdout
    assert "1 passed" in run.stdout
