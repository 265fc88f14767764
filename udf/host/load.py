"""Loading a Python driver by its path.

Owns: from a file and a class name to an object that serves. Must never: search, or put a driver's directory on
sys.path. Called by: serve.py and faces.py, inside the sandbox. What goes wrong is a UserError with one sentence.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from udf.driver.store import Store
from udf.errors import UserError

OptionValue = bool | int | float | str


def load_class(path: str, class_name: str) -> type:
    """Run the driver's file (a package: its __init__.py) and return the class in it."""
    module = _load_module(path)
    cls = getattr(module, class_name, None)
    if cls is None:
        raise UserError(f"{path}: there is no class {class_name}, which the manifest names")
    if not isinstance(cls, type):
        raise UserError(f"{path}: {class_name}, which the manifest names, is not a class")
    return cls


def instantiate(
    cls: type,
    path: str,
    source: str | None,
    options: Mapping[str, OptionValue],
    store_fds: Sequence[int] = (),
    attributes: Mapping[str, Any] | None = None,
) -> Any:
    """Make the driver: cls(source, **options), without the source where there is none.

    With descriptors of a state store it is called with the keyword `store` too, and they are the store's from here on.
    The attributes (its device) are there before its `__init__` runs, which need not know of them.
    """
    try:
        keywords: dict[str, Any] = dict(options)
        if store_fds:
            keywords["store"] = Store(store_fds)
        arguments = () if source is None else (source,)
        if not attributes:
            return cls(*arguments, **keywords)
        driver: Any = object.__new__(cls)
        for name, value in attributes.items():
            setattr(driver, name, value)
        driver.__init__(*arguments, **keywords)
        return driver
    except BaseException as exc:
        raise failure(path, "could not be started", exc) from exc


def _load_module(path: str) -> ModuleType:
    is_package = os.path.basename(path) == "__init__.py"
    stem = os.path.basename(os.path.dirname(path)) if is_package else os.path.basename(path).removesuffix(".py")
    # A name that nothing else has: a driver may be called like a module that it imports itself.
    name = "udf_driver_" + "".join(letter if letter.isalnum() else "_" for letter in stem)
    spec = importlib.util.spec_from_file_location(
        name, path, submodule_search_locations=[os.path.dirname(path)] if is_package else None
    )
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: the file is not a Python driver")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as exc:
        raise failure(path, "could not be loaded", exc) from exc
    return module


def failure(path: str, what: str, exc: BaseException) -> UserError:
    """What an author's code raised, as one sentence for the operator."""
    if isinstance(exc, UserError):
        return exc  # the author's own sentence for the operator
    try:
        text = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
    except Exception:
        text = type(exc).__name__
    where = ""
    for frame in traceback.extract_tb(exc.__traceback__):
        if frame.filename == path:
            where = f" (line {frame.lineno})"
    return UserError(f"{path}: the driver {what}: {' '.join(text.split())[:500]}{where}")
