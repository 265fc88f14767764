"""Emulated USB devices: models in Python on a USB/IP bus, for tests and for `udf plug`.

`Device` is what a model subclasses, `Emulator` the bus that it is plugged into; see device.py and emulator.py.
"""

from __future__ import annotations

from udf.testing.devices.device import Device, Option
from udf.testing.devices.emulator import Emulator
from udf.testing.devices.faults import Fault, Rule
from udf.testing.devices.layout import (
    Association,
    BulkIn,
    BulkOut,
    Configuration,
    Endpoint,
    Interface,
    InterruptIn,
    InterruptOut,
    IsoIn,
    IsoOut,
)
from udf.testing.devices.models import MODELS, make
from udf.testing.devices.plugged import Plugged, Seen
from udf.testing.devices.transfers import Action, Nak, Setup, Stall, Transfer
from udf.usb.usbip import Speed

__all__ = [
    "MODELS",
    "Action",
    "Association",
    "BulkIn",
    "BulkOut",
    "Configuration",
    "Device",
    "Emulator",
    "Endpoint",
    "Fault",
    "Interface",
    "InterruptIn",
    "InterruptOut",
    "IsoIn",
    "IsoOut",
    "Nak",
    "Option",
    "Plugged",
    "Rule",
    "Seen",
    "Setup",
    "Speed",
    "Stall",
    "Transfer",
    "make",
]
