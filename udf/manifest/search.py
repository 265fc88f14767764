"""Finding drivers: the search path, and whose files are believed.

Owns: the order of the search path and the rule that a driver's file, and every directory above it, can be changed only
by root and by the user it runs for. Must never: run driver code, or follow a path that it has not checked.
Called by: the supervisor's registry and `udf drivers`.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from udf.errors import UserError
from udf.manifest.check import Manifest, read_manifest

MAX_PACKAGE_FILES = 2000

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}\Z")
_PACKAGE = Path(__file__).resolve().parent.parent  # udf/


@dataclass(frozen=True)
class Trust:
    """For whom drivers are looked up: only that user and root may be able to change them."""

    uid: int
    gid: int
    home: str | None = None

    @classmethod
    def own(cls) -> Trust:
        """This process."""
        return cls(os.geteuid(), os.getegid(), os.environ.get("HOME"))


def search_path(trust: Trust) -> list[Path]:
    """The directories in which drivers are looked for, first match first."""
    path = [Path("/etc/udf/drivers")]
    if trust.home and os.path.isabs(trust.home):
        path.append(Path(trust.home) / ".local/share/udf/drivers")
    path.append(Path("/usr/local/lib/udf/drivers"))
    # Built in: beside the package in a checkout, inside it when installed.
    for tree in ("fs", "drivers"):
        path.extend(root / tree for root in (_PACKAGE, _PACKAGE.parent) if (root / tree).is_dir())
    return path


def find_driver(name_or_path: str, trust: Trust | None = None, path: list[Path] | None = None) -> Manifest:
    """The manifest of a driver by its name on the search path, or by the path of its file (with a "/").

    UserError, in one sentence, when there is none, when it is not believed, or when its manifest is wrong.
    """
    trust = trust or Trust.own()
    if "/" in name_or_path:
        return _read(_explicit(name_or_path), trust)
    if not _NAME.match(name_or_path):
        raise UserError(f"{name_or_path!r} is not the name of a driver: names have letters, digits, '.', '_' and '-'")
    distrusted = None
    for directory in search_path(trust) if path is None else path:
        for candidate in _candidates(directory, name_or_path):
            if not candidate.is_file():
                continue
            distrusted = distrusted or _distrust(directory, trust)
            if distrusted is None:
                return _read(candidate, trust)
    if distrusted is not None:
        raise UserError(distrusted)
    raise UserError(f"there is no driver named {name_or_path!r}: `udf drivers` lists those that are installed")


def list_drivers(trust: Trust | None = None, path: list[Path] | None = None) -> tuple[list[Manifest], list[str]]:
    """Every driver on the search path that could be used, and a warning for each that could not."""
    trust = trust or Trust.own()
    found: dict[str, Manifest] = {}
    warnings: list[str] = []
    for directory in search_path(trust) if path is None else path:
        try:
            names = sorted(os.listdir(directory))
        except OSError:
            continue
        distrusted = _distrust(directory, trust)
        if distrusted is not None:
            warnings.append(distrusted)
            continue
        for entry in names:
            name = entry.removesuffix(".py").removesuffix(".toml")
            if not _NAME.match(name) or name in found or name.startswith("__"):
                continue
            for candidate in _candidates(directory, name):
                if candidate.is_file():
                    try:
                        found[name] = manifest = _read(candidate, trust)
                        warnings.extend(manifest.warnings)
                    except UserError as exc:
                        warnings.append(str(exc))
                    break
    return sorted(found.values(), key=lambda manifest: manifest.name), list(dict.fromkeys(warnings))


def _candidates(directory: Path, name: str) -> tuple[Path, ...]:
    return directory / f"{name}.py", directory / name / "__init__.py", directory / f"{name}.toml"


def _explicit(text: str) -> Path:
    path = Path(os.path.abspath(text))
    if path.is_dir():
        path /= "__init__.py"
    if not path.exists():
        raise UserError(f"there is no driver at {path}")
    if path.suffix not in (".py", ".toml"):
        raise UserError(f"{path} is not a driver: it is neither a .py nor a .toml")
    return path


def _read(candidate: Path, trust: Trust) -> Manifest:
    # The real path is what is checked, read and later loaded: a link cannot be turned in between.
    path = candidate.resolve()
    name = candidate.parent.name if candidate.name == "__init__.py" else candidate.stem
    problem = _distrust(path, trust)
    if problem is None and path.name == "__init__.py":
        problem = _distrust_package(path.parent, trust)
    if problem is not None:
        raise UserError(problem)
    return read_manifest(str(path), name)


def _distrust(path: Path, trust: Trust) -> str | None:
    path = path.resolve()
    for part in (path, *path.parents):
        problem = _who_else(part, trust)
        if problem is not None:
            return f"the driver path {path} is not used because {problem}"
    return None


def _distrust_package(directory: Path, trust: Trust) -> str | None:
    count = 0
    for root, _, files in os.walk(directory):
        for file in (root, *(os.path.join(root, name) for name in files)):
            count += 1
            if count > MAX_PACKAGE_FILES:
                return f"the driver {directory} has more than {MAX_PACKAGE_FILES} files"
            if os.path.islink(file):
                problem = _distrust(Path(file), trust)
            elif (why := _who_else(Path(file), trust)) is not None:
                problem = f"the driver path {directory} is not used because {why}"
            else:
                problem = None
            if problem is not None:
                return problem
    return None


def _who_else(path: Path, trust: Trust) -> str | None:
    try:
        status = os.stat(path)
    except OSError as exc:
        return f"{path} cannot be examined: {os.strerror(exc.errno or 0)}"
    if status.st_uid not in (0, trust.uid):
        return f"{path} belongs to uid {status.st_uid}, who could change it"
    if stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX:
        return None  # as in /tmp: others may add names, but not replace these
    if status.st_mode & stat.S_IWOTH:
        return f"{path} can be written by everybody: chmod o-w"
    if status.st_mode & stat.S_IWGRP and status.st_gid not in (0, trust.gid):
        return f"{path} can be written by the group {status.st_gid}: chmod g-w"
    return None
