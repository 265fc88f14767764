"""Every place where a USB device can vanish or fail under a driver, tried one after the other.

`bus.py` is what tests see; `udf.testing.plugin` brings it into pytest. Who may import whom: explore -> trial -> bus ->
backend -> faulty, bus -> direct; steps, report, running and left are leaves.
"""

from __future__ import annotations

from udf.testing.hotplug.bus import Plugged, UsbBus
from udf.testing.hotplug.report import Finding, HotplugError, Report
from udf.testing.hotplug.steps import FAULTS, Step

__all__ = ["FAULTS", "Finding", "HotplugError", "Plugged", "Report", "Step", "UsbBus"]
