"""What the tests of the drivers share: their modules, found as the host finds them: by path."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

from udf.host.load import load_class

DRIVERS = Path(__file__).resolve().parents[2] / "drivers"


def driver_class(name: str, class_name: str) -> type:
    """The class of a driver."""
    path = DRIVERS / name / "__init__.py"
    return load_class(str(path if path.exists() else DRIVERS / f"{name}.py"), class_name)


def module(driver: str, name: str) -> ModuleType:
    """A module of a driver's package that is loaded."""
    return sys.modules[f"udf_driver_{driver}.{name}"]


UsbStorage = driver_class("usb_storage", "UsbStorage")
