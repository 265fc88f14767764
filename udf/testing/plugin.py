"""pytest plugin: the fixture `usb_bus`, an emulated USB bus that plain pyusb code finds its devices on.

Any driver that is written with pyusb can be tested, without hardware, without root, and without the rest of UDF:

    import usb.core, usb.util
    from udf.testing.devices import Configuration, Device, Interface

    class Thermometer(Device):
        vendor, product = 0x1209, 0x7E57
        configurations = [Configuration([Interface(0xFF)])]

        def on_control(self, setup, data):
            return (2150).to_bytes(2, "little")

    def read_celsius():
        device = usb.core.find(idVendor=0x1209, idProduct=0x7E57)
        if device is None:
            raise FileNotFoundError("no thermometer")
        try:
            return int.from_bytes(device.ctrl_transfer(0xC0, 1, 0, 0, 2), "little") / 100
        finally:
            usb.util.dispose_resources(device)

    def test_it_reads(usb_bus):
        usb_bus.plug(Thermometer)
        assert read_celsius() == 21.5

    def test_it_survives_everything(usb_bus):
        usb_bus.explore(read_celsius, plug=Thermometer)

The second test finds that a short answer is not noticed:

    HotplugError: read_celsius: 2 calls to the device, 11 faults and conditions tried, 1 findings
      short@2 [control 0xc0 request 0x01, 2 bytes; test_outside.py:16]: no error, but it returns 1.02 instead of 21.5
      one of them again: explore(…, only='short@2'), or UDF_HOTPLUG=short@2 with the same test

By hand: `device = usb_bus.plug(model)`, `usb_bus.unplug(device)`, `device = usb_bus.replug(device)`,
`usb_bus.fault("stall", endpoint=0x81, at=3)`; `usb_bus.transfers` has every call that the driver made. At the end of
the test no handle, claim, thread or descriptor may be left, and no fault rule unused.

`explore` runs the scenario once for each of its calls and each fault (FAULTS in udf/testing/hotplug/steps.py), and
under some conditions (CONDITIONS there). A run is right if it returns the healthy result, or raises an error that says
what has happened (after an unplug: errno ENODEV); if it ends, with few calls and within `bound`; if it leaves nothing
behind; and if the next run, on the replugged device or on the same one, is a healthy one. explore.explore has the
keywords. In an exploration time-outs do not take their time: nothing is waited for longer than 0.2 s.

`usb_bus.explore_driver(Thermometer, plug=Model, use=read)` does the same with a `udf.UsbDriver`, in this process: `use`
is awaited with the driver. What a process leaves to its end is not looked at there.

What it cannot do: it sees what goes through pyusb only, numbers the calls of several threads in the order in which they
come (so `only=` may miss then), cannot end a thread that waits for a lock for ever (it is left behind as a daemon), and
has no isochronous faults but unplug, time-out and EIO. A driver that asked pyusb for its backend when it was imported,
before the first test began, does not see the bus.

Owns: the fixture. Must never: import anything heavy before the fixture is used: every pytest run loads this.
Called by: pytest, by its entry point.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from udf.testing.hotplug import UsbBus


@pytest.fixture
def usb_bus() -> Iterator[UsbBus]:
    """An emulated USB bus that `usb.core.find()` sees; at the end of the test nothing may be left on it."""
    from udf.testing.hotplug import UsbBus

    with UsbBus().checked() as bus:
        yield bus
