"""The exploration of a UsbDriver, whose transfers are awaited; and that the stand-ins are what they stand in for."""

from __future__ import annotations

import errno

import pytest
import trio
import usb.core

from tests.t7_hotplug import models
from udf import Attr, UsbDriver
from udf.testing.hotplug import UsbBus
from udf.testing.hotplug.direct import Here, Link
from udf.testing.hotplug.hosting import Line
from udf.usb.backend import Backend
from udf.usb.client import Connection


class Thermometer(UsbDriver):
    async def list(self, path):
        return ["celsius"]

    async def stat(self, path):
        return Attr("dir")

    async def read(self, path, offset, size):
        raw = await self.usb.control_in(0xC0, 1, length=2)
        if len(raw) != 2:
            raise OSError(errno.EPROTO, "a short answer")
        return b"%d" % int.from_bytes(raw, "little")


class Meter(UsbDriver):
    """Clears old answers when it starts, and asks with pyusb and with its own transfers."""

    patience = 5.0

    def __init__(self, question="READ?"):
        self.question = question

    async def start(self):
        await self.usb.clear_halt(0x01)
        await self.usb.clear_halt(0x81)
        await trio.to_thread.run_sync(self.device.ctrl_transfer, 0x40, 5)

    async def ask(self):
        await self.usb.write(1, self.question.encode() + b"\n")
        answer = await self.usb.read(0x81, 512, timeout=self.patience)
        if not answer.endswith(b"\n"):
            raise OSError(errno.EPROTO, "half an answer")
        return answer


async def read(driver):
    return await driver.read("/celsius", 0, 100)


def explore(driver, model, use, **how):
    return UsbBus().explore_driver(driver, model, use, check=False, **how)


def test_every_transfer_of_a_driver_has_every_fault():
    report = explore(Thermometer, models.Thermometer, read)
    assert report, str(report)
    assert report.tried == ["healthy", "absent", *(
        f"{kind}@1" for kind in ("unplug", "replug", "stall", "short", "timeout", "eio", "babble")
    )]  # fmt: skip
    report = explore(Meter, models.Meter, Meter.ask, options={"question": "*IDN?"})
    assert report, str(report)
    assert {"split@6", "empty@6", "unplug@6", "short@6", "stall@5", "unplug@1"} <= set(report.tried), report.steps


def test_a_short_answer_that_is_not_noticed_is_found():
    class Careless(Thermometer):
        async def read(self, path, offset, size):
            return b"%d" % int.from_bytes(await self.usb.control_in(0xC0, 1, length=2), "little")

    report = explore(Careless, models.Thermometer, read)
    assert [finding.fault for finding in report.findings] == ["short@1"]


def test_an_answer_that_is_waited_for_without_end_is_found():
    class Patient(Meter):
        patience = None

    report = explore(Patient, models.Meter, Meter.ask)
    assert {(finding.fault, finding.check) for finding in report.findings} == {("timeout@6", "hang")}


def test_a_pyusb_call_that_waits_on_the_hosts_loop_is_found():
    class Blocking(Thermometer):
        async def read(self, path, offset, size):
            return bytes(self.device.ctrl_transfer(0xC0, 1, 0, 0, 2))

    assert "blocks" in explore(Blocking, models.Thermometer, read, without=["short"]).checks


def test_gone_is_said_of_a_device_that_is_gone_only():
    class Pessimist(Thermometer):
        async def read(self, path, offset, size):
            from udf import DeviceGone

            try:
                return await super().read(path, offset, size)
            except usb.core.USBError as error:
                raise DeviceGone("it does not answer") from error

    report = explore(Pessimist, models.Thermometer, read, without=["short"])
    assert {finding.fault for finding in report.findings} == {"stall@1", "timeout@1", "eio@1", "babble@1"}


@pytest.mark.parametrize("stand_in", [Link, Line])
def test_stand_ins_have_what_the_backend_and_the_transfers_use(stand_in):
    used = {"gone", "submit", "transfer", "move", "control", "on_end"}
    assert used <= set(dir(Connection))
    link = Link(Here(), models.Thermometer(), "thermometer")
    found = link if stand_in is Link else Line
    assert used <= set(dir(found)), "the client has changed: see which of its methods the backend calls"


def test_the_backend_uses_nothing_else_of_a_connection():
    import inspect
    import re

    import udf.usb.transfers

    source = inspect.getsource(Backend) + inspect.getsource(udf.usb.transfers)
    assert set(re.findall(r"_?connection\.(\w+)", source)) <= {
        "gone",
        "submit",
        "transfer",
        "move",
        "control",
        "on_end",
    }
