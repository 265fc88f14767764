"""The options that an operator gives to a driver, checked against what its manifest declares.

Owns: their types and defaults, and whether the programs a driver needs are there.
Must never: know the options of the mount itself (the supervisor splits those off before).
Called by: the supervisor's registry and binder.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
from collections.abc import Mapping

from udf.errors import UserError
from udf.manifest.check import Manifest, Option, OptionValue
from udf.manifest.size import parse_size


def check_requires(manifest: Manifest) -> None:
    """UserError unless every program that the driver needs is on PATH. Other drivers are the binder's to look for."""
    needed = [word for word in manifest.requires if not word.startswith("drivers:")]
    if manifest.command is not None:
        needed.insert(0, shlex.split(manifest.command)[0])
    for program in needed:
        if shutil.which(program) is None:
            raise UserError(f"the driver {manifest.name} needs the program {program}: install it first")


def driver_options(manifest: Manifest, given: Mapping[str, str], directory: str = "/") -> dict[str, OptionValue]:
    """The driver's options, typed as its manifest declares them; an empty text means that only the name was given.

    Relative values of type path count from `directory`. UserError for an unknown, missing or unusable one.
    """
    values: dict[str, OptionValue] = {}
    for name, text in given.items():
        option = manifest.options.get(name)
        if option is None:
            offered = ", ".join(sorted(manifest.options)) or "none"
            raise UserError(f"the driver {manifest.name} has no option {name!r}: it has {offered}")
        values[name] = _option_value(option, text, manifest.name, directory)
    for option in manifest.options.values():
        if option.name in values:
            continue
        if option.required:
            raise UserError(f"the driver {manifest.name} needs the option {option.name}: add -o {option.name}=…")
        if option.default is not None:
            values[option.name] = option.default
    return values


_TRUE = frozenset({"", "1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


def _option_value(option: Option, text: str, driver: str, directory: str) -> OptionValue:
    wanted = {"size": "a size such as 64M", "int": "a whole number", "float": "a number", "bool": "yes or no"}
    try:
        if option.type == "bool":
            if text.lower() not in _TRUE | _FALSE:
                raise ValueError
            return text.lower() in _TRUE
        if not text or "\0" in text:
            raise ValueError
        if option.type == "int":
            return int(text)
        if option.type == "float":
            value = float(text)
            if not math.isfinite(value):
                raise ValueError
            return value
        if option.type == "size":
            return parse_size(text)
        return os.path.join(directory, text) if option.type == "path" else text
    except ValueError:
        what = wanted.get(option.type, "a value")
        given = f"not {text!r}" if text else "and it was given none"
        raise UserError(f"the option {option.name} of the driver {driver} needs {what}, {given}") from None
