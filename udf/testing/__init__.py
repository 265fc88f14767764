"""For the authors of drivers: tests that are hard to write and easy to use.

`CrashMatrix` kills a driver over every request in three places and looks whether programs notice. It needs what a mount
needs (`udf doctor`); the deaths in the middle of the work need x86-64 besides, and are left out elsewhere.

`plugin` is for pytest: its fixture `usb_bus` is an emulated USB bus for any driver that is written with pyusb, and
tries every fault at every call of it. `devices` are models of USB devices.

Must never: import anything at once: pytest loads the plugin in every run, also where nothing of UDF is tested.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from udf.testing.matrix import CrashMatrix as CrashMatrix
    from udf.testing.report import Failure as Failure
    from udf.testing.report import Report as Report
    from udf.testing.steps import Place as Place
    from udf.testing.steps import Step as Step
    from udf.testing.workload import STANDARD as STANDARD
    from udf.testing.workload import Section as Section
    from udf.testing.workload import section as section

_HOMES = {
    "CrashMatrix": "udf.testing.matrix",
    "Failure": "udf.testing.report",
    "Report": "udf.testing.report",
    "Place": "udf.testing.steps",
    "Step": "udf.testing.steps",
    "STANDARD": "udf.testing.workload",
    "Section": "udf.testing.workload",
    "section": "udf.testing.workload",
}

__all__ = ["STANDARD", "CrashMatrix", "Failure", "Place", "Report", "Section", "Step", "section"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'udf.testing' has no attribute {name!r}")
    import importlib

    value: object = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
