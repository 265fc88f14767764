"""Reading one manifest and checking it.

Owns: every key of a manifest, with one sentence per mistake.
Must never: run, import or compile driver code.
Called by: search.py, which finds the files.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from udf import INTERFACE
from udf.errors import UserError
from udf.host.capabilities import NAMES as CAPABILITY_NAMES
from udf.host.capabilities import REFUSED as REFUSED_CAPABILITIES
from udf.manifest.match import MAX_ENTRIES, Match, check_entry
from udf.manifest.size import parse_size
from udf.manifest.text import MAX_MANIFEST, manifest_block, parse, read_text, shown

MAX_DEADLINE = 3600.0
MIN_WINDOW, MAX_WINDOW = 2 << 20, 32 << 20  # the host takes it in pieces of 2 MiB

OptionValue = bool | int | float | str

KINDS = ("fs", "block", "usb")
SOURCES = ("none", "directory", "file", "block", "device", "url", "any")
IMAGE_SOURCES = ("file", "block", "device", "any")  # of which a filesystem can be made out by looking
PROVIDES = ("files", "block", "terminal")
OPEN_POLICIES = ("known", "lazy", "driver")
DURABILITIES = ("source", "store", "none")
STABILITIES = ("stable", "volatile")
OPTION_TYPES = ("str", "int", "float", "bool", "size", "path")
# Options that belong to the mount, whatever the driver: a manifest cannot declare them.
MOUNT_WORDS = {
    "ro", "rw", "allow_other", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "noatime", "atime", "relatime",
    "nonempty", "max_read", "fsname", "spin", "nospin", "deadline", "patience", "spare", "on_unplug", "max_stale",
    "grace", "defaults", "auto", "noauto", "nofail", "user", "nouser", "users", "owner", "group", "async",
    "default_permissions",
}  # fmt: skip

_DOCSTRING = re.compile(r'^"""([^"\n]{1,200})', re.MULTILINE)  # what a driver without a description is described by
_OPTION_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}\Z")
_CLASS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,100}\Z")
_PROGRAM = re.compile(r"[A-Za-z0-9._+-]{1,100}\Z")
_REQUISITE = re.compile(r"drivers:[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}\Z")
_FILESYSTEM = re.compile(r"[a-z0-9][a-z0-9._+-]{0,31}\Z")
_BASE_NAME = re.compile(r"[a-z](?:[a-z0-9_-]{0,30}[a-z_-])?\Z")  # no digit at its end: a number follows
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
    match: tuple[Match, ...] = ()
    provides: str = "files"
    names: str = ""  # the instances of a device driver are called so, with a number behind
    filesystems: tuple[str, ...] = ()
    window: int = 0  # bytes of memory that it shares with its shim, for large reads
    options: Mapping[str, Option] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def read_manifest(path: str, name: str) -> Manifest:
    """Read and check the manifest in `path` (a .py or a .toml). UserError says what is wrong in one sentence."""
    text, whole = read_text(path, "the driver")
    if path.endswith(".toml"):
        if not whole:
            raise UserError(f"{path}: the manifest is larger than {MAX_MANIFEST // 1024} KiB")
        return check_manifest(parse(text, path), path, name, foreign=True)
    manifest = check_manifest(parse(manifest_block(text, path, whole), path), path, name, foreign=False)
    summary = None if manifest.description else _DOCSTRING.search(text)
    return replace(manifest, description=summary[1].strip()) if summary else manifest


def check_manifest(table: Mapping[str, Any], path: str, name: str, *, foreign: bool) -> Manifest:
    """Check a manifest's keys. `foreign`: for a program that is started by a command, not for a Python class."""
    refuse = _Refusal(path)
    rest = dict(table)
    optional = rest.pop("optional", {})
    if not isinstance(optional, dict):
        raise refuse("optional", f"must be a table of keys, not {shown(optional)}")
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
    if "window" in values and (foreign or values["kind"] != "fs"):
        raise refuse("window", "is for Python drivers of kind fs")
    if values.get("durability") == "store" and isinstance(options, dict) and "store" in options:
        raise refuse("option.store", "has the name by which a driver with a state store is given it: choose another")
    _check_kind(values, name, foreign, refuse)
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
        raise refuse(key, f"must be a printable text, not {shown(value)}")
    return value


def _flag(value: Any, key: str, refuse: _Refusal) -> bool:
    if not isinstance(value, bool):
        raise refuse(key, f"must be true or false, not {shown(value)}")
    return value


def _word(*words: str) -> _Check:
    def check(value: Any, key: str, refuse: _Refusal) -> str:
        if value not in words:
            raise refuse(key, f"must be one of {', '.join(words)}, not {shown(value)}")
        return str(value)

    return check


def _interface(value: Any, key: str, refuse: _Refusal) -> int:
    if type(value) is not int or value < 1:
        raise refuse(key, f"must be a whole number from 1, not {shown(value)}")
    if value != INTERFACE:
        raise refuse(key, f"is {value}, but this version of udf speaks {INTERFACE}: update one of the two")
    return value


def _class_name(value: Any, key: str, refuse: _Refusal) -> str:
    if not isinstance(value, str) or not _CLASS_NAME.match(value):
        raise refuse(key, f"must be the name of a class in the file, not {shown(value)}")
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
        raise refuse(key, f"must be a list of texts, not {shown(value)}")
    return tuple(value)


def _requisites(value: Any, key: str, refuse: _Refusal) -> tuple[str, ...]:
    names = _texts(value, key, refuse)
    for name in names:
        if not _PROGRAM.match(name) and not _REQUISITE.match(name):
            raise refuse(key, f"names {name!r}, which is neither a program on PATH nor drivers:NAME")
    return names


def _match(value: Any, key: str, refuse: _Refusal) -> tuple[Match, ...]:
    if not isinstance(value, list) or not value:
        raise refuse(key, f"must be a list such as [{{ vendor = 0x1209, product = 0x7e57 }}], not {shown(value)}")
    if len(value) > MAX_ENTRIES:
        raise refuse(key, f"has {len(value)} entries, more than {MAX_ENTRIES}")
    return tuple(check_entry(entry, f"{key}[{number}]", refuse) for number, entry in enumerate(value))


def _base_name(value: Any, key: str, refuse: _Refusal) -> str:
    if not isinstance(value, str) or not _BASE_NAME.match(value):
        raise refuse(
            key, f"must be a short word of small letters such as disk, which gets a number, not {shown(value)}"
        )
    return value


def _filesystems(value: Any, key: str, refuse: _Refusal) -> tuple[str, ...]:
    names = _texts(value, key, refuse)
    for name in names:
        if not _FILESYSTEM.match(name):
            raise refuse(key, f"names {name[:40]!r}, which is not a filesystem such as ext4")
    return names


def _window(value: Any, key: str, refuse: _Refusal) -> int:
    try:
        size = parse_size(value) if isinstance(value, str) else -1
    except ValueError:
        size = -1
    if not MIN_WINDOW <= size <= MAX_WINDOW:
        raise refuse(key, f'must be a size from "{MIN_WINDOW >> 20}M" to "{MAX_WINDOW >> 20}M", not {shown(value)}')
    return size


def _deadline(value: Any, key: str, refuse: _Refusal) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_DEADLINE:
        raise refuse(key, f"must be a number of seconds up to {MAX_DEADLINE:.0f}, not {shown(value)}")
    return float(value)


_KEYS: dict[str, _Check] = {
    "kind": _word(*KINDS),
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
    "requires": _requisites,
    "match": _match,
    "provides": _word(*PROVIDES),
    "names": _base_name,
    "filesystems": _filesystems,
    "window": _window,
}


def _near_key(key: str, foreign: bool) -> str:
    if key == "command" and not foreign:
        return " for a Python file: put it in a .toml of its own"
    if key == "class" and foreign:
        return " for a .toml: a Python class carries its manifest in its own file"
    return ": remove it, or put it below [optional]"


def _check_kind(values: dict[str, Any], name: str, foreign: bool, refuse: _Refusal) -> None:
    """What only some kinds have, and what their words default to."""
    kind, source = values["kind"], values.get("source", "none")
    if foreign and kind != "fs":
        raise refuse("kind", f"is {kind!r}, which only a Python driver can be: a program serves kind fs")
    if kind == "usb":
        if "match" not in values:
            raise refuse("match", "is missing: a driver of kind usb says which devices it is for")
        if source != "none":
            raise refuse("source", f"is {source!r}, but the source of a driver of kind usb is its device: leave it out")
    elif "match" in values:
        raise refuse("match", f"is for drivers of kind usb, and this one is of kind {kind}")
    if kind == "block":
        if values.setdefault("provides", "block") != "block":
            raise refuse("provides", f'is {values["provides"]!r}, and a driver of kind block provides "block"')
        if source == "none":
            raise refuse("source", "is missing: a driver of kind block says what it makes a block device of")
    if kind == "fs":
        for key in ("provides", "names"):
            if key in values:
                raise refuse(key, "is for drivers of kinds usb and block, and this one is of kind fs")
        if "filesystems" in values and source not in IMAGE_SOURCES:
            raise refuse("filesystems", f"needs a source in which they are: {', '.join(IMAGE_SOURCES)}, not {source}")
    else:
        if "filesystems" in values:
            raise refuse("filesystems", f"is for drivers of kind fs, and this one is of kind {kind}")
        values.setdefault("names", _default_name(name))
    if kind != "usb" and any(word.startswith("drivers:") for word in values.get("requires", ())):
        raise refuse(
            "requires", f"names drivers, which only a driver of kind usb waits for: this one is of kind {kind}"
        )


def _default_name(name: str) -> str:
    """What the instances of a driver are called whose manifest does not say."""
    base = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_0123456789")
    return base[:31].rstrip("0123456789") or "device"


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
        raise refuse("option", f"must be a table [option.NAME], not {shown(table)}")
    options: dict[str, Option] = {}
    for name, fields in table.items():
        key = f"option.{name}"
        if not _OPTION_NAME.match(name):
            raise refuse(key, "is not a usable option name: small letters, digits and _ only")
        if name in MOUNT_WORDS or name in ("source", "mountpoint"):
            raise refuse(key, "is a word that udf itself uses: choose another name")
        if not isinstance(fields, dict):
            raise refuse(key, f"must be a table, not {shown(fields)}")
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
    raise refuse(key, f"must be of type {option.type}, not {shown(value)}")
