"""Reading one manifest and checking it.

Owns: the block in a .py (or the .toml), and every key of it with one sentence per mistake.
Must never: run, import or compile driver code, or read more than 64 KiB of a file.
Called by: search.py, which finds the files.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from udf import INTERFACE
from udf.errors import UserError
from udf.host.capabilities import NAMES as CAPABILITY_NAMES
from udf.host.capabilities import REFUSED as REFUSED_CAPABILITIES
from udf.manifest.size import parse_size

MAX_MANIFEST = 64 * 1024
MAX_DEADLINE = 3600.0

OptionValue = bool | int | float | str

KINDS = ("fs",)
KNOWN_KINDS = ("block", "usb")  # words of the design that this version does not serve yet
SOURCES = ("none", "directory", "file", "device", "url", "any")
OPEN_POLICIES = ("known", "lazy", "driver")
DURABILITIES = ("source", "store", "none")
STABILITIES = ("stable", "volatile")
OPTION_TYPES = ("str", "int", "float", "bool", "size", "path")
# Options that belong to the mount, whatever the driver: a manifest cannot declare them.
MOUNT_WORDS = {
    "ro", "rw", "allow_other", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "noatime", "atime", "relatime",
    "nonempty", "max_read", "fsname", "spin", "nospin", "deadline", "patience", "spare", "defaults", "auto",
    "noauto", "nofail", "user", "nouser", "users", "owner", "group", "async", "default_permissions",
}  # fmt: skip

_BLOCK = re.compile(r"^# /// udf[ \t]*\r?\n((?:#(?:[ \t][^\n]*)?\r?\n)*?)# ///[ \t]*\r?$", re.MULTILINE)
_BLOCK_START = re.compile(r"^# /// udf[ \t]*\r?$", re.MULTILINE)
_DOCSTRING = re.compile(r'^"""([^"\n]{1,200})', re.MULTILINE)  # what a driver without a description is described by
_OPTION_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}\Z")
_CLASS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,100}\Z")
_PROGRAM = re.compile(r"[A-Za-z0-9._+-]{1,100}\Z")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Option:
    """One declared option of a driver."""

    name: str
    type: str = "str"
    default: OptionValue | None = None
    help: str = ""
    required: bool = False


@dataclass(frozen=True)
class Manifest:
    """A checked manifest. `path` is the real path of the file that was read."""

    name: str
    path: str
    kind: str
    interface: int
    class_name: str | None = None
    command: str | None = None
    description: str = ""
    source: str = "none"
    capabilities: tuple[str, ...] = ()
    exclusive: bool = False
    acl: bool = False
    locks: bool = False
    open: str = "known"
    durability: str = "source"
    nodes: str = "volatile"
    inodes: str = "stable"
    deadline: float = 30.0
    requires: tuple[str, ...] = ()
    options: Mapping[str, Option] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def read_manifest(path: str, name: str) -> Manifest:
    """Read and check the manifest in `path` (a .py or a .toml). UserError says what is wrong in one sentence."""
    text, whole = _read_text(path)
    if path.endswith(".toml"):
        if not whole:
            raise UserError(f"{path}: the manifest is larger than {MAX_MANIFEST // 1024} KiB")
        return check_manifest(_parse(text, path), path, name, foreign=True)
    manifest = check_manifest(_parse(_block(text, path, whole), path), path, name, foreign=False)
    summary = None if manifest.description else _DOCSTRING.search(text)
    return replace(manifest, description=summary[1].strip()) if summary else manifest


def check_manifest(table: Mapping[str, Any], path: str, name: str, *, foreign: bool) -> Manifest:
    """Check a manifest's keys. `foreign`: for a program that is started by a command, not for a Python class."""
    refuse = _Refusal(path)
    rest = dict(table)
    optional = rest.pop("optional", {})
    if not isinstance(optional, dict):
        raise refuse("optional", f"must be a table of keys, not {_shown(optional)}")
    options = rest.pop("option", {})
    known = dict(_KEYS)
    known.update({"command": _text} if foreign else {"class": _class_name})
    values: dict[str, Any] = {}
    for key, value in rest.items():
        if key not in known:
            hint = _near_key(key, foreign)
            raise refuse(key, f"is not a key of interface {INTERFACE}{hint}")
        values[key] = known[key](value, key, refuse)
    # Keys that a later interface may define go below [optional]; those that we know count as if they stood above.
    warnings = []
    for key, value in optional.items():
        if key in known:
            values.setdefault(key, known[key](value, key, refuse))
        else:
            warnings.append(f"{path}: the optional key {key!r} is not known to this version and is skipped")
    for key in ("kind", "interface", "command" if foreign else "class"):
        if key not in values:
            raise refuse(key, "is missing: every manifest of this kind needs it")
    if foreign:
        values.setdefault("inodes", "volatile")  # programs that number their files as they meet them are common
        _check_command(values["command"], options if isinstance(options, dict) else {}, values, refuse)
    if foreign and values.get("durability") == "store":
        raise refuse("durability", 'is "store", which only a Python driver can have: a program has no state store')
    if values.get("durability") == "store" and isinstance(options, dict) and "store" in options:
        raise refuse("option.store", "has the name by which a driver with a state store is given it: choose another")
    return Manifest(
        name=name,
        path=path,
        class_name=values.pop("class", None),
        options=_check_options(options, refuse),
        warnings=tuple(warnings),
        **values,
    )


class _Refusal:
    """Makes the sentence for a mistake in one key of one file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, key: str, what: str) -> UserError:
        return UserError(f"{self.path}: the manifest key {key!r} {what}")


_Check = Callable[[Any, str, _Refusal], Any]


def _text(value: Any, key: str, refuse: _Refusal) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise refuse(key, f"must be a printable text, not {_shown(value)}")
    return value


def _flag(value: Any, key: str, refuse: _Refusal) -> bool:
    if not isinstance(value, bool):
        raise refuse(key, f"must be true or false, not {_shown(value)}")
    return value


def _word(*words: str) -> _Check:
    def check(value: Any, key: str, refuse: _Refusal) -> str:
        if value not in words:
            raise refuse(key, f"must be one of {', '.join(words)}, not {_shown(value)}")
        return str(value)

    return check


def _kind(value: Any, key: str, refuse: _Refusal) -> str:
    if value in KNOWN_KINDS:
        raise refuse(key, f"is {value!r}, which this version of udf cannot run yet: it runs {', '.join(KINDS)}")
    return str(_word(*KINDS)(value, key, refuse))


def _interface(value: Any, key: str, refuse: _Refusal) -> int:
    if type(value) is not int or value < 1:
        raise refuse(key, f"must be a whole number from 1, not {_shown(value)}")
    if value != INTERFACE:
        raise refuse(key, f"is {value}, but this version of udf speaks {INTERFACE}: update one of the two")
    return value


def _class_name(value: Any, key: str, refuse: _Refusal) -> str:
    if not isinstance(value, str) or not _CLASS_NAME.match(value):
        raise refuse(key, f"must be the name of a class in the file, not {_shown(value)}")
    return value


def _capabilities(value: Any, key: str, refuse: _Refusal) -> tuple[str, ...]:
    names = _texts(value, key, refuse)
    for name in names:
        if name not in CAPABILITY_NAMES:
            raise refuse(key, f"names {name!r}, which is not a capability (they look like CAP_CHOWN)")
        if name in REFUSED_CAPABILITIES:
            raise refuse(key, f"asks for {name}, which no driver gets")
    return names


def _texts(value: Any, key: str, refuse: _Refusal) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise refuse(key, f"must be a list of texts, not {_shown(value)}")
    return tuple(value)


def _programs(value: Any, key: str, refuse: _Refusal) -> tuple[str, ...]:
    names = _texts(value, key, refuse)
    for name in names:
        if not _PROGRAM.match(name):
            raise refuse(key, f"names {name!r}, which is not the name of a program on PATH")
    return names


def _deadline(value: Any, key: str, refuse: _Refusal) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_DEADLINE:
        raise refuse(key, f"must be a number of seconds up to {MAX_DEADLINE:.0f}, not {_shown(value)}")
    return float(value)


_KEYS: dict[str, _Check] = {
    "kind": _kind,
    "interface": _interface,
    "description": _text,
    "source": _word(*SOURCES),
    "capabilities": _capabilities,
    "exclusive": _flag,
    "acl": _flag,
    "locks": _flag,
    "open": _word(*OPEN_POLICIES),
    "durability": _word(*DURABILITIES),
    "nodes": _word(*STABILITIES),
    "inodes": _word(*STABILITIES, "generation"),
    "deadline": _deadline,
    "requires": _programs,
}


def _near_key(key: str, foreign: bool) -> str:
    if key == "command" and not foreign:
        return " for a Python file: put it in a .toml of its own"
    if key == "class" and foreign:
        return " for a .toml: a Python class carries its manifest in its own file"
    return ": remove it, or put it below [optional]"


def _check_command(command: str, options: dict[str, Any], values: dict[str, Any], refuse: _Refusal) -> None:
    try:
        words = shlex.split(command)
    except ValueError as exc:
        raise refuse("command", f"cannot be split into words: {exc}") from None
    if not words or "{" in words[0]:
        raise refuse("command", "must begin with the name of a program")
    names = [name for word in words for name in _PLACEHOLDER.findall(word)]
    for name in names:
        if name not in ("source", "mountpoint") and name not in options:
            raise refuse("command", f"uses {{{name}}}, which is neither source, mountpoint nor a declared option")
    if "mountpoint" not in names:
        raise refuse("command", "must contain {mountpoint}, where the program is to mount")
    if "source" in names and values.get("source", "none") == "none":
        raise refuse("command", 'uses {source}, but the key "source" is "none"')


def _check_options(table: Any, refuse: _Refusal) -> dict[str, Option]:
    if not isinstance(table, dict):
        raise refuse("option", f"must be a table [option.NAME], not {_shown(table)}")
    options: dict[str, Option] = {}
    for name, fields in table.items():
        key = f"option.{name}"
        if not _OPTION_NAME.match(name):
            raise refuse(key, "is not a usable option name: small letters, digits and _ only")
        if name in MOUNT_WORDS or name in ("source", "mountpoint"):
            raise refuse(key, "is a word that udf itself uses: choose another name")
        if not isinstance(fields, dict):
            raise refuse(key, f"must be a table, not {_shown(fields)}")
        unknown = set(fields) - {"type", "default", "help", "required"}
        if unknown:
            raise refuse(f"{key}.{min(unknown)}", "is not a key of an option: it has type, default, help and required")
        option = Option(
            name=name,
            type=_word(*OPTION_TYPES)(fields.get("type", "str"), f"{key}.type", refuse),
            help=_text(fields["help"], f"{key}.help", refuse) if "help" in fields else "",
            required=_flag(fields.get("required", False), f"{key}.required", refuse),
        )
        if "default" in fields:
            if option.required:
                raise refuse(f"{key}.default", "makes no sense for a required option")
            default = _default(option, fields["default"], f"{key}.default", refuse)
            option = Option(name, option.type, default, option.help, option.required)
        options[name] = option
    return options


def _default(option: Option, value: Any, key: str, refuse: _Refusal) -> OptionValue:
    if option.type == "bool" and isinstance(value, bool):
        return value
    if not isinstance(value, bool):
        if option.type in ("int", "size") and isinstance(value, int) and (option.type == "int" or value >= 0):
            return value
        if option.type == "float" and isinstance(value, int | float):
            return float(value)
        if option.type in ("str", "path") and isinstance(value, str):
            return value
        if option.type == "size" and isinstance(value, str):
            try:
                return parse_size(value)
            except ValueError:
                pass
    raise refuse(key, f"must be of type {option.type}, not {_shown(value)}")


def _read_text(path: str) -> tuple[str, bool]:
    # Not blocking: a name on the search path may be a FIFO.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise UserError(f"{path}: the driver cannot be read: {os.strerror(exc.errno or 0)}") from None
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UserError(f"{path}: the driver is not a regular file")
        data = file.read(MAX_MANIFEST + 1)
    whole = len(data) <= MAX_MANIFEST
    try:
        # A file that is longer may be cut inside a character, or be odd far behind its manifest.
        return data[:MAX_MANIFEST].decode("utf-8", "strict" if whole else "replace"), whole
    except UnicodeDecodeError:
        raise UserError(f"{path}: the file is not UTF-8 text") from None


def _block(text: str, path: str, whole: bool) -> str:
    blocks = _BLOCK.findall(text)
    if len(blocks) == 1 and len(_BLOCK_START.findall(text)) == 1:
        return "\n".join(line.rstrip("\r")[2:] for line in blocks[0].split("\n"))
    if len(_BLOCK_START.findall(text)) > 1:
        raise UserError(f"{path}: the file has more than one manifest block '# /// udf'")
    if _BLOCK_START.search(text):
        raise UserError(f"{path}: the manifest block '# /// udf' has no end '# ///' (each line begins with '# ')")
    where = "" if whole else f" in its first {MAX_MANIFEST // 1024} KiB"
    raise UserError(f"{path}: the file has no manifest block '# /// udf'{where}, so it is not a driver")


def _parse(text: str, path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as exc:
        raise UserError(f"{path}: the manifest is not valid TOML: {exc}") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
