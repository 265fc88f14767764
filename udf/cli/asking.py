"""Which supervisor to ask, and about what: paths and options.

Owns: finding the supervisor of a mount, absolute paths that are found without asking a mount that may hang, the words
behind -o.
Must never: print, import trio or pyfuse3, or look below a mountpoint.
Called by commands.py, recovering.py, unmounting.py, devices.py.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from udf.errors import UserError
from udf.supervisor import client

MAX_LINKS = 40
TAGS = ("LABEL=", "UUID=")  # words for a volume, whatever it is on
Row = Mapping[str, Any]


def all_supervisors(path: str | None) -> Iterator[client.Connection]:
    """Every supervisor that can be asked; NoSupervisorError when there is none at all."""
    connections = client.supervisors(path)
    first = next(connections, None)
    if first is None:
        raise client.NoSupervisorError("no daemon runs and nothing is mounted: start `udf daemon`, or use `udf mount`")
    return itertools.chain([first], connections)


class Meant(NamedTuple):
    """What a MOUNT on the command line means: a supervisor, and how that is told which one of its own."""

    connection: client.Connection
    which: dict[str, str]  # by mountpoint or by name
    mountpoint: str


def find_meant(text: str, path: str | None) -> Meant | None:
    """Whose mount (or device) that is, by its place or, without a slash in it, by its name. None: nobody's of us.

    NoSupervisorError only for a socket that was asked for.
    """
    ways = [{"mountpoint": absolute_mountpoint(text)}]
    if "/" not in text:
        ways.append({"name": text})
    for which in ways:
        for connection in client.supervisors(path):
            try:
                mounts = connection.call("Status", **which)["mounts"]
            except client.ControlError as error:
                if error.name not in ("NotFound", "Disconnected"):
                    raise
                continue
            if mounts:
                return Meant(client.Connection(connection.path), which, str(mounts[0]["mountpoint"]))
    return None


def meant(text: str, path: str | None) -> Meant:
    """The same; UserError if it is nobody's of us."""
    found = find_meant(text, path)
    if found is None:
        raise not_ours(absolute_mountpoint(text))
    return found


def not_ours(mountpoint: str) -> UserError:
    """What to say of a path that nobody of us serves."""
    return UserError(f"{mountpoint} is not a mount of udf (`udf status` lists them)")


def absolute_mountpoint(path: str) -> str:
    """The mountpoint's real path, found without asking the filesystem that is, or was, mounted there.

    Symlinks are resolved in its parent; of the last name only the link itself is read, which a hung mount allows.
    """
    path = os.path.join(current_directory(path), path)
    for _ in range(MAX_LINKS):
        path = path.rstrip("/") or "/"
        parent, name = os.path.split(os.path.abspath(path) if os.path.basename(path) in (".", "..") else path)
        path = os.path.join(os.path.realpath(parent), name)
        try:
            target = os.readlink(path)
        except OSError:
            return path
        path = os.path.join(os.path.dirname(path), target)
    raise UserError(f"{path}: too many symbolic links")


def absolute(path: str) -> str:
    """A path made absolute by its text alone."""
    return os.path.normpath(os.path.join(current_directory(path), path))


def may_be_device(text: str) -> bool:
    """Whether it is not a path."""
    return text.startswith(TAGS) or not (text.startswith(("/", ".")) or os.path.lexists(text))


def current_directory(path: str) -> str:
    """Only needed, and only looked for, when the path is relative."""
    try:
        return "/" if path.startswith("/") else os.getcwd()
    except OSError as error:
        raise UserError(f"{path} is relative, and the current directory cannot be read: {error.strerror}") from None


def options_of(given: list[str]) -> dict[str, str]:
    r"""`-o a=1,b` as a mapping; `\,` and `\\` stand for a comma and a backslash in a value."""
    options: dict[str, str] = {}
    for word in itertools.chain.from_iterable(map(_split_options, given)):
        name, _, value = word.partition("=")
        if not name:
            raise UserError(f"-o {word}: an option needs a name")
        options[name] = value
    return options


def _split_options(text: str) -> list[str]:
    words, escaped = [""], False
    for character in text:
        if escaped:
            words[-1] += character if character in "\\," else "\\" + character
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == ",":
            words.append("")
        else:
            words[-1] += character
    if escaped:
        words[-1] += "\\"
    return [word for word in words if word]
