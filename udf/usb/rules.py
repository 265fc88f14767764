"""The operator's rules about devices: which ones no driver gets, which driver gets one, with which options.

Owns: the rules file, read and checked as a manifest is (one sentence per mistake), and whose files are believed.
Must never: see a device (matching.py applies the rules), or keep what is left of a file with a mistake in it: it is all
or nothing, and who asks keeps the last good rules. Called by: udf/supervisor/devices.py, udf doctor.

    [[deny]]                          # no driver gets such a device …
    class = 0x03
    [[allow]]                         # … but these: an allow rule undoes every deny rule for what it fits
    vendor = 0x046d
    [[prefer]]                        # whatever the manifests say
    vendor = 0x0403
    serial = "A1*"
    driver = "my_serial"
    options = { baud = "9600" }
    [[volume]]                        # a filesystem on such a device, by itself (`udf daemon --automount`)
    vendor = 0x0781
    label = "BACKUP*"                 # … with such a label
    automount = false                 # is left alone; or true, with these options, by this driver
    options = { ro = true }

A pattern has the keys of a manifest's `match`, and `port` and `bus`. `driver` makes a deny or allow rule one about that
driver only. A class means that of any interface, or with `device = true` the device's own.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from udf.errors import UserError
from udf.manifest.match import Match, check_pattern
from udf.manifest.text import parse, read_text, shown

SYSTEM_RULES = Path("/etc/udf/rules.toml")
MAX_RULES = 1000
MAX_OPTIONS = 50
MAX_VALUE = 4096
KINDS = ("allow", "deny", "prefer", "volume")
_DRIVER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}\Z")
_OPTION = re.compile(r"[a-z][a-z0-9_]{0,40}\Z")


@dataclass(frozen=True)
class Rule:
    """One rule. `where` names it for a sentence: `rule deny[0] of /etc/udf/rules.toml`."""

    match: Match
    where: str
    driver: str | None = None
    port: str | None = None
    bus: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    label: str | None = None  # of a volume
    automount: bool = True


@dataclass(frozen=True)
class Rules:
    """All rules, in the order in which they count."""

    allow: tuple[Rule, ...] = ()
    deny: tuple[Rule, ...] = ()
    prefer: tuple[Rule, ...] = ()
    volume: tuple[Rule, ...] = ()

    def followed_by(self, other: Rules) -> Rules:
        """These, then the other's."""
        return Rules(
            self.allow + other.allow, self.deny + other.deny, self.prefer + other.prefer, self.volume + other.volume
        )


NO_RULES = Rules()


def rules_files(explicit: str | None = None) -> list[Path]:
    """The files to read, the one that counts first first. They need not be there, but for an explicit one."""
    if explicit is not None:
        return [Path(explicit)]
    home = os.environ.get("HOME", "")
    own = [Path(home) / ".config/udf/rules.toml"] if os.geteuid() != 0 and os.path.isabs(home) else []
    return [*own, SYSTEM_RULES]


def read_rules(path: Path, *, must_exist: bool = False) -> Rules:
    """The rules of one file; none if there is no such file. UserError, in one sentence, if it cannot be used."""
    if not must_exist and not os.path.lexists(path):
        return NO_RULES
    problem = _distrust(path)
    if problem is not None:
        raise UserError(f"{path}: the rules are not used because {problem}")
    text, whole = read_text(str(path), "the rules file")
    if not whole:
        raise UserError(f"{path}: the rules file is larger than 64 KiB")
    return check_rules(parse(text, str(path), "the rules file"), str(path))


def check_rules(table: Mapping[str, Any], path: str) -> Rules:
    """Check all that a rules file says."""

    def refuse(key: str, what: str) -> UserError:
        return UserError(f"{path}: the rule {key!r} {what}")

    for key in table:
        if key not in KINDS:
            raise refuse(key, f"is of no known kind: there are {', '.join(f'[[{kind}]]' for kind in KINDS)}")
    found: dict[str, tuple[Rule, ...]] = {}
    for kind in KINDS:
        entries = table.get(kind, [])
        if not isinstance(entries, list):
            raise refuse(kind, f"must be written as [[{kind}]], once for each rule")
        if len(entries) > MAX_RULES:
            raise refuse(kind, f"is there {len(entries)} times, more than {MAX_RULES}")
        found[kind] = tuple(
            _check_rule(kind, entry, f"{kind}[{number}]", path, refuse) for number, entry in enumerate(entries)
        )
    return Rules(**found)


def _check_rule(kind: str, entry: Any, key: str, path: str, refuse: Callable[[str, str], UserError]) -> Rule:
    if not isinstance(entry, dict):
        raise refuse(key, f"must be a table, not {shown(entry)}")
    rest = dict(entry)
    texts: dict[str, str | None] = {}
    for name in ("driver", "port", "bus", *(("label",) if kind == "volume" else ())):
        value = rest.pop(name, None)
        if value is not None and (not isinstance(value, str) or not 1 <= len(value) <= 200 or not value.isprintable()):
            raise refuse(f"{key}.{name}", f"must be a printable text, not {shown(value)}")
        texts[name] = value
    driver = texts["driver"]
    if driver is not None and not _DRIVER.match(driver):
        raise refuse(f"{key}.driver", f"is {shown(driver)}, which is not the name of a driver")
    if kind == "prefer" and driver is None:
        raise refuse(key, 'names no driver: say which one is preferred with driver = "NAME"')
    automount = rest.pop("automount", True) if kind == "volume" else True
    if not isinstance(automount, bool):
        raise refuse(f"{key}.automount", f"must be true or false, not {shown(automount)}")
    options = _check_options(kind, rest.pop("options", {}), f"{key}.options", refuse)
    pattern = check_pattern(rest, key, refuse)
    return Rule(pattern, f"rule {key} of {path}", options=options, automount=automount, **texts)


def _check_options(kind: str, table: Any, key: str, refuse: Callable[[str, str], UserError]) -> Mapping[str, str]:
    if not isinstance(table, dict) or len(table) > MAX_OPTIONS:
        raise refuse(key, f"must be a table of at most {MAX_OPTIONS} options, not {shown(table)}")
    if table and kind not in ("prefer", "volume"):
        raise refuse(key, "mean nothing here: the options of a driver are given by a [[prefer]] or [[volume]] rule")
    options: dict[str, str] = {}
    for name, value in table.items():
        if not _OPTION.match(name):
            raise refuse(f"{key}.{name}", "is not the name of an option")
        if not isinstance(value, str | int | float) or len(str(value)) > MAX_VALUE:
            raise refuse(f"{key}.{name}", f"must be a text, a number, true or false, not {shown(value)}")
        # As they would be written after -o; the driver's manifest says what they mean.
        options[name] = ("1" if value else "0") if isinstance(value, bool) else str(value)
    return options


def _distrust(path: Path) -> str | None:
    """Why a file, or what leads to it, could have been written by somebody else."""
    own = os.geteuid()
    real = path.resolve()
    for part in (real, *real.parents):
        try:
            status = os.stat(part)
        except OSError as exc:
            return f"{part} cannot be examined: {os.strerror(exc.errno or 0)}"
        if status.st_uid not in (0, own):
            return f"{part} belongs to uid {status.st_uid}, who could change it"
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if status.st_mode & stat.S_IWOTH and not sticky:
            return f"{part} can be written by everybody: chmod o-w"
        if status.st_mode & stat.S_IWGRP and status.st_gid not in (0, os.getegid()) and not sticky:
            return f"{part} can be written by the group {status.st_gid}: chmod g-w"
    return None
