"""The thermometer of the README: one control request.

Vendor request 1, to the host: the temperature in hundredths of a degree Celsius, signed, 16 bits, little-endian.
Called by: models.py, tests; `celsius` may be set from any thread.
"""

from __future__ import annotations

import struct
from typing import Any

from udf.testing.devices.device import Device, Option
from udf.testing.devices.layout import Configuration, Interface
from udf.testing.devices.transfers import Setup, Stall

TEMPERATURE = 1


class Thermometer(Device):
    """A sensor on a cable."""

    vendor, product = 0x1209, 0x7E57
    product_name = "Thermometer"
    device_class = (0xFF, 0, 0)
    configurations = [Configuration([Interface(0xFF)])]
    options = {"celsius": Option(float, "the temperature, 21.5 if not given")}

    def __init__(self, celsius: float = 21.5, **identity: Any) -> None:
        super().__init__(**identity)
        self.celsius = celsius

    def on_control(self, setup: Setup, data: bytes) -> bytes | None:
        """The temperature, if that is what is asked."""
        if not setup.is_in or setup.type != 2 or setup.request != TEMPERATURE:
            raise Stall
        return struct.pack("<h", max(-32768, min(32767, round(self.celsius * 100))))
