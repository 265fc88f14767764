"""Who may import whom: the folders are the architecture, and this keeps them so."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Package -> what of `udf` it may import. The longest name that matches a module decides; None is no limit.
MAY_IMPORT: dict[str, tuple[str, ...] | None] = {
    "udf": ("udf",),
    "udf.errors": (),
    "udf.window": (),
    "udf.messages": ("udf.errors",),
    "udf.manifest": ("udf.manifest", "udf.errors", "udf.host.capabilities", "udf:INTERFACE"),
    "udf.fuse": ("udf.fuse",),
    "udf.shim": ("udf.fuse", "udf.shim", "udf.window"),
    "udf.usb": ("udf.usb", "udf.errors", "udf.messages"),
    "udf.usb.matching": ("udf.usb", "udf.manifest"),
    "udf.usb.rules": ("udf.usb", "udf.errors", "udf.manifest"),
    "udf.block": ("udf.block", "udf.driver", "udf.errors", "udf.window"),
    "udf.block.shim": ("udf.block", "udf.shim.control", "udf.errors", "udf.window"),
    "udf.driver": ("udf.driver", "udf.errors", "udf.window"),
    "udf.driver.usb": ("udf.driver", "udf.usb", "udf.errors", "udf.messages"),
    "udf.host": (
        *("udf.host", "udf.driver", "udf.errors", "udf.messages", "udf.manifest", "udf.fuse"),
        *("udf.usb", "udf.block", "udf.window"),
    ),
    "udf.supervisor.hosts": ("udf.supervisor", "udf.driver.memory"),  # it makes the state store's empty memfds
    "udf.supervisor": (
        *("udf.supervisor", "udf.errors", "udf.messages", "udf.manifest", "udf.fuse", "udf:__version__"),
        *("udf.usb", "udf.block", "udf.window"),
    ),
    "udf.testing": (
        *("udf.testing", "udf.supervisor", "udf.driver.memory", "udf.errors", "udf.messages", "udf.fuse"),
        *("udf.usb", "udf.window"),
    ),
    "udf.testing.usb_conformance": ("udf.testing.devices", "udf.usb", "udf.errors"),
    "udf.testing.devices": ("udf.testing.devices", "udf.usb.usbip", "udf.errors"),
    "udf.doctor": ("udf.fuse", "udf.errors", "udf.usb.rules", "udf.supervisor.sockets"),
    "udf.cli": ("udf.cli", "udf.doctor", "udf.errors", "udf.supervisor", "udf.fuse", "udf:__version__"),
    "udf.__main__": ("udf.cli",),
}
# Modules whose first moments count (see test_quick_start) or whose memory is bounded.
NEVER: dict[str, tuple[str, ...]] = {
    "udf.shim": ("trio", "pyfuse3", "msgspec"),
    "udf.fuse": ("trio", "pyfuse3", "msgspec"),
    "udf.block.shim": ("trio", "pyfuse3", "msgspec"),
    "udf.cli": ("pyfuse3",),
    "udf.testing.devices": ("udf.testing.devices", "udf.usb.usbip", "udf.errors"),
    "udf.doctor": ("trio", "pyfuse3"),
}


def imports_of(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, late imports included; `from a import b` gives `a:b`."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            name = ".".join(filter(None, (above, node.module)))
            for alias in node.names:
                yield node.lineno, f"{name}:{alias.name}"


def modules() -> list[tuple[Path, str]]:
    """Every module of the package with its dotted name."""
    found = []
    for path in sorted((ROOT / "udf").rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        found.append((path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)))
    return found


def is_below(name: str, package: str) -> bool:
    return name == package or name.startswith((package + ".", package + ":"))


def rule_for(module: str, rules: Mapping[str, tuple[str, ...] | None]) -> tuple[str, ...] | None:
    matching = [package for package in rules if is_below(module, package)]
    return rules[max(matching, key=len)] if matching else None


def allowed(name: str, may: tuple[str, ...]) -> bool:
    plain = name.replace(":", ".")  # `from udf.fuse import mount` may mean the module udf.fuse.mount
    return name in may or any(is_below(plain, package) for package in may if ":" not in package)


@pytest.mark.parametrize(("path", "module"), modules(), ids=[name for _, name in modules()])
def test_module_imports_only_what_its_layer_may(path: Path, module: str) -> None:
    may = rule_for(module, {k: v for k, v in MAY_IMPORT.items() if k != "udf"}) if module != "udf" else None
    wrong = []
    for line, name in imports_of(path, module):
        top = name.split(":")[0].split(".")[0]
        if top in ("fs", "drivers", "tests"):
            wrong.append(f"{path}:{line}: {name}: plugin trees are loaded by path, never imported")
        if top == "udf" and may is not None and not allowed(name, may):
            wrong.append(f"{path}:{line}: {module} may not import {name}")
        never = rule_for(module, NEVER) or ()
        if top in never:
            wrong.append(f"{path}:{line}: {module} must stay free of {top}")
    assert not wrong, "\n".join(wrong)


def plugins() -> list[Path]:
    return [path for tree in ("fs", "drivers") for path in sorted((ROOT / tree).rglob("*.py"))]


@pytest.mark.parametrize("path", plugins(), ids=[str(path.relative_to(ROOT)) for path in plugins()])
def test_driver_imports_only_the_author_interface(path: Path) -> None:
    wrong = [
        f"{path}:{line}: {name}"
        for line, name in imports_of(path, path.stem)
        if name.split(":")[0].split(".")[0] in ("udf", "fs", "drivers", "tests") and name.split(":")[0] != "udf"
    ]
    assert not wrong, "\n".join(wrong)


def test_every_module_of_the_package_has_a_rule() -> None:
    loose = [
        name
        for _, name in modules()
        if name != "udf" and not [p for p in MAY_IMPORT if p != "udf" and is_below(name, p)]
    ]
    assert not loose, f"say in MAY_IMPORT what these may import: {loose}"


def test_the_check_sees_late_and_relative_imports(tmp_path: Path) -> None:
    path = tmp_path / "late.py"
    path.write_text("def f():\n    from fs.hello import Hello\n    from . import shim\n    from ..fuse import mount\n")
    assert list(imports_of(path, "udf.cli.late")) == [(2, "fs.hello:Hello"), (3, "udf.cli:shim"), (4, "udf.fuse:mount")]
