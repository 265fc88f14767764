"""The fixture as an installed plugin brings it, also where the entry point is not installed."""

from __future__ import annotations

from udf.testing.plugin import usb_bus

__all__ = ["usb_bus"]
