"""Loading a Python driver by its path.

Owns: from a file and a class name to an object that serves. Must never: search, or put a driver's directory on
sys.path. Called by: serve.py, inside the sandbox. Everything that goes wrong is a UserError with one sentence.
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
    cls: type, path: str, source: str | None, options: Mapping[str, OptionValue], store_fds: Sequence[int] = ()
) -> Any:
    """Make the driver: cls(source, **options), without the source where there is none.

    With descriptors of a state store it is called with the keyword `store` too, and they are the store's from here on.
    """
    try:
        keywords: dict[str, Any] = dict(options)
        if store_fds:
            keywords["store"] = Store(store_fds)
        return cls(**keywords) if source is None else cls(source, **keywords)
    except BaseException as exc:
        raise _failure(path, "could not be started", exc) from exc


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
        raise _failure(path, "could not be loaded", exc) from exc
    return module


def _failure(path: str, what: str, exc: BaseException) -> UserError:
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
