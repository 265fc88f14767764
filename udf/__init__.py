"""What a driver's author needs, and nothing else: `from udf import FsDriver, Attr`.

Must never: import anything at once. The shim and the launcher of a driver host are `udf` programs too and stay small,
so every name is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from udf.block.client import BlockClient as BlockClient
    from udf.driver.block import BlockDriver as BlockDriver
    from udf.driver.block import BlockUnit as BlockUnit
    from udf.driver.block import Extent as Extent
    from udf.driver.fs import Attr as Attr
    from udf.driver.fs import FsDriver as FsDriver
    from udf.driver.fs import Space as Space
    from udf.driver.journal import Journal as Journal
    from udf.driver.store import Store as Store
    from udf.driver.usb import UsbDriver as UsbDriver
    from udf.driver.window import Window as Window
    from udf.errors import ContractError as ContractError
    from udf.errors import DeviceGone as DeviceGone
    from udf.errors import UdfError as UdfError
    from udf.errors import UserError as UserError
    from udf.host.progress import still_working as still_working

__version__ = "0.1.0"
INTERFACE = 1  # the version of everything exported here; a manifest names the one it was written for

_HOMES = {
    "BlockClient": "udf.block.client",
    "BlockDriver": "udf.driver.block",
    "BlockUnit": "udf.driver.block",
    "Extent": "udf.driver.block",
    "Attr": "udf.driver.fs",
    "FsDriver": "udf.driver.fs",
    "Space": "udf.driver.fs",
    "Journal": "udf.driver.journal",
    "Store": "udf.driver.store",
    "UsbDriver": "udf.driver.usb",
    "Window": "udf.driver.window",
    "still_working": "udf.host.progress",
    "ContractError": "udf.errors",
    "DeviceGone": "udf.errors",
    "UdfError": "udf.errors",
    "UserError": "udf.errors",
}

__all__ = [
    "INTERFACE",
    "Attr",
    "BlockClient",
    "BlockDriver",
    "BlockUnit",
    "ContractError",
    "DeviceGone",
    "Extent",
    "FsDriver",
    "Journal",
    "Space",
    "Store",
    "UdfError",
    "UsbDriver",
    "UserError",
    "Window",
    "__version__",
    "still_working",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'udf' has no attribute {name!r}")
    import importlib

    value: object = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
