"""The models by name, and how they are made from text.

Owns: the registry and the reading of options. Must never: let a wrong option become a traceback.
Called by: emulator.py's commands, __main__.py, `udf plug`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

from udf.errors import UserError
from udf.testing.devices.device import IDENTITY, Device, Option


class Model(NamedTuple):
    """Where a model is, and what it is in a few words."""

    module: str
    name: str
    help: str

    def load(self) -> type[Device]:
        """Its class."""
        found: type[Device] = getattr(import_module(self.module), self.name)
        return found


_HERE = "udf.testing.devices"
MODELS: dict[str, Model] = {
    "thermometer": Model(f"{_HERE}.thermometer", "Thermometer", "a sensor with one control request"),
    "storage": Model(f"{_HERE}.storage", "Storage", "a USB stick: mass storage, Bulk-Only Transport and SCSI"),
    "serial": Model(f"{_HERE}.serial", "Serial", "a serial port, CDC-ACM, with an echo or a pseudo-terminal behind it"),
    "keyboard": Model(f"{_HERE}.keyboard", "Keyboard", "a boot keyboard, HID"),
    "loopback": Model(f"{_HERE}.loopback", "Loopback", "a vendor device that gives back what it gets"),
}


def options_of(model: str) -> dict[str, Option]:
    """What a model can be told. UserError if there is no such model."""
    return {**IDENTITY, **_class(model).options}


def make(model: str, options: Mapping[str, Any]) -> Device:
    """A device from a model's name and options, which may be text. UserError with one sentence for what is wrong."""
    known = options_of(model)
    values: dict[str, Any] = {}
    for key, value in options.items():
        option = known.get(key)
        if option is None:
            raise UserError(f"The model {model!r} has no option {key!r}; it has {', '.join(sorted(known))}.")
        if not isinstance(value, str | int | float | bool):
            raise UserError(f"The option {key!r} of the model {model!r} is neither text nor a number.")
        try:
            values[key] = option.parse(value if isinstance(value, str) else str(value))
        except ValueError as error:
            raise UserError(f"{key}={value} is wrong: {error}.") from None
    try:
        inspect.signature(_class(model)).bind(**values)
    except TypeError as error:
        raise UserError(f"The model {model!r} needs more: {error}.") from None
    try:
        return _class(model)(**values)
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{what}{error.strerror or error}.") from None
    except (ValueError, OverflowError) as error:
        raise UserError(f"The model {model!r} cannot be made: {error}.") from None


def _class(model: str) -> type[Device]:
    found = MODELS.get(model)
    if found is None:
        raise UserError(f"There is no file and no device model {model!r}; the models are {', '.join(MODELS)}.")
    return found.load()
