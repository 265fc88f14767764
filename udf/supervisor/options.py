"""The options of a mount that UDF itself understands; all others are the driver's.

Owns: the words after -o that do not depend on the driver. Must never: do I/O. Called by: registry.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from udf.errors import UserError

MAX_OPTIONS = 200
MAX_VALUE = 4096
MAX_DEADLINE = 3600.0
GRACE = 30.0  # seconds for a device that was unplugged to come back
_ON_OFF = {"": True, "1": True, "0": False}


class MountOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the mount is like, whatever the driver."""

    read_only: bool = False
    allow_other: bool = False
    nosuid: bool = True
    nodev: bool = True
    noexec: bool = False
    noatime: bool = False
    nonempty: bool = False
    max_read: int = 0
    fsname: str = ""
    spin: bool | None = None
    deadline: float | None = None  # None: the manifest's
    patience: float = 60.0  # seconds that a request waits for a new generation of the driver
    spare: bool = False  # a second driver process stands ready
    on_unplug_wait: float = 0.0  # seconds that a request waits for a device that is unplugged; 0: it fails at once
    max_stale: float = GRACE  # seconds that what is cached is answered without the device
    grace: float = GRACE  # seconds that the mount waits for its device; 0: it ends with it


_FLAGS: dict[str, tuple[str, bool]] = {
    "ro": ("read_only", True),
    "rw": ("read_only", False),
    "allow_other": ("allow_other", True),
    "nosuid": ("nosuid", True),
    "suid": ("nosuid", False),
    "nodev": ("nodev", True),
    "dev": ("nodev", False),
    "noexec": ("noexec", True),
    "exec": ("noexec", False),
    "noatime": ("noatime", True),
    "atime": ("noatime", False),
    "relatime": ("noatime", False),
    "nonempty": ("nonempty", True),
    "spin": ("spin", True),
    "nospin": ("spin", False),
}
# Words for mount(8) and systemd that reach us from fstab and mean nothing here. default_permissions is always on.
_IGNORED = frozenset(
    (
        *("defaults", "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "nousers", "owner", "group"),
        *("async", "default_permissions"),
    )
)


def is_flag(name: str) -> bool:
    """Whether it is an option that is there or not, without a value."""
    return name in _FLAGS


def split(options: Mapping[str, str]) -> tuple[MountOptions, dict[str, str]]:
    """Our own options, and the rest for the driver's manifest to judge. UserError for a bad value of ours."""
    if len(options) > MAX_OPTIONS:
        raise UserError(f"more than {MAX_OPTIONS} options: leave some out")
    ours: dict[str, bool | float | str] = {}
    unplugged: dict[str, float] = {}
    drivers: dict[str, str] = {}
    for key, value in options.items():
        if len(value) > MAX_VALUE or len(key) > MAX_VALUE:
            raise UserError(f"the option {key[:40]!r} is too long: at most {MAX_VALUE} characters")
        if key in _FLAGS:
            if value:
                raise UserError(f"the option {key} takes no value: leave out ={value}")
            field, setting = _FLAGS[key]
            if ours.get(field, setting) != setting:
                raise UserError(f"the options contradict each other: {key} and its opposite")
            ours[field] = setting
        elif key == "max_read":
            if not value.isascii() or not value.isdigit() or not 4096 <= int(value) <= 1 << 20:
                raise UserError(f"max_read={value} is not a number of bytes from 4096 to 1048576")
            ours["max_read"] = int(value)
        elif key in ("deadline", "patience"):
            ours[key] = _seconds(key, value)
        elif key == "on_unplug":
            unplugged["on_unplug_wait"] = _on_unplug(value)
        elif key in ("max_stale", "grace"):
            unplugged[key] = _seconds(key, value, least=0.0)
        elif key == "spare":
            if value not in _ON_OFF:
                raise UserError(f"spare={value} is neither spare=1 nor spare=0")
            ours["spare"] = _ON_OFF[value]
        elif key == "fsname":
            if not value or not value.isprintable():
                raise UserError("fsname needs a printable value: fsname=NAME")
            ours["fsname"] = value
        elif key not in _IGNORED and not key.startswith(("x-", "comment")):
            drivers[key] = value
    ours.update(_consistent(unplugged))
    return msgspec.convert(ours, MountOptions), drivers


def _seconds(key: str, text: str, *, least: float = 0.1, after: str = "") -> float:
    try:
        value = float(text.removeprefix(after).removesuffix("s"))
    except ValueError:
        value = -1.0
    if not least <= value <= MAX_DEADLINE:  # false for a NaN too
        raise UserError(f"{key}={text} is not a number of seconds from {least:g} to {MAX_DEADLINE:g}")
    return value


def _on_unplug(text: str) -> float:
    """The seconds that requests wait for a device that was unplugged."""
    if text == "fail":
        return 0.0
    if not text.startswith("wait:"):
        raise UserError(f"on_unplug={text} is neither on_unplug=fail nor on_unplug=wait:SECONDS")
    return _seconds("on_unplug", text, after="wait:")


def _consistent(given: Mapping[str, float]) -> dict[str, float]:
    """How long the mount outlives its device, and what is cached: what is not said follows from what is."""
    wait, max_stale, grace = given.get("on_unplug_wait", 0.0), given.get("max_stale"), given.get("grace")
    if grace is None:
        grace = max(GRACE, wait)
    elif wait > grace:
        raise UserError(
            f"on_unplug=wait:{wait:g} is longer than grace={grace:g}, after which the mount ends: give a longer grace"
        )
    if max_stale is None:
        max_stale = grace
    elif max_stale > grace:
        raise UserError(
            f"max_stale={max_stale:g} is longer than the {grace:g} s (grace) for which the mount outlives its device:"
            " give a longer grace"
        )
    return {"on_unplug_wait": wait, "max_stale": max_stale, "grace": grace}


def merge_foreign(options: MountOptions, given: Mapping[str, str | bool], asked: Mapping[str, str]) -> MountOptions:
    """Add what a foreign program asked of its fusermount. What the operator said stands, and it gains no rights."""
    changes: dict[str, object] = {}
    if given.get("ro") and "rw" not in asked:
        changes["read_only"] = True
    for key in ("noexec", "noatime"):
        if given.get(key) and not any(_FLAGS[word][0] == key for word in asked if word in _FLAGS):
            changes[key] = True
    if given.get("allow_other"):
        changes["allow_other"] = True
    fsname = given.get("fsname")
    if isinstance(fsname, str) and fsname and fsname.isprintable() and not options.fsname:
        changes["fsname"] = fsname[:MAX_VALUE]
    max_read = given.get("max_read")
    if isinstance(max_read, str) and max_read.isascii() and max_read.isdigit() and not options.max_read:
        value = int(max_read[:10])
        changes["max_read"] = value if 4096 <= value <= 1 << 20 else 0
    return msgspec.structs.replace(options, **changes)
