"""`udf devices`, `udf why`, `udf plug`, `udf unplug`, `udf replug` and `udf faults`: devices and what serves them.

Owns: what these ask a daemon and how the answers are printed. Must never: import trio or pyfuse3, or open an image file
(the emulator does, as the daemon's user). Called by udf.cli.main by way of udf.cli.commands.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator

from udf.cli import show
from udf.cli.asking import Row, absolute, options_of
from udf.errors import UserError
from udf.supervisor import client

_UNBOUND = ("failed", "tie")  # a driver was meant to serve it, and that did not work


def devices(arguments: argparse.Namespace) -> int:
    """`udf devices`: what is there, and what serves it."""
    with _daemon(arguments) as connection:
        rows = list(connection.call("Devices")["devices"])
    if arguments.json:
        show.as_json({"devices": rows})
        return 0
    if not rows:
        show.line("No device is there.")
        return 0
    heading = ("STATE", "ID", "NAME", "PORT", "DEVICE", "SERIAL", "CLASS", "DRIVER", "WHERE")
    show.table(heading, [_device_row(row) for row in rows])
    for row in rows:
        name = _label(row)
        if row["state"] != "bound":
            show.line(f"{name}: {row['state']}: {row['text']}")
        for volume in (each for instance in row["instances"] for each in instance["volumes"]):
            if volume["mountpoint"] is not None:
                show.line(f"{name}: {_volume(volume)}")
    return 0


def _label(row: Row) -> str:
    """What a device is called in a sentence; one that is away has only its instance's name."""
    instances = list(row["instances"]) if row["state"] == "away" else []
    return str(row["name"] or (instances[0]["name"] if instances else row["key"]))


def _device_row(row: Row) -> tuple[object, ...]:
    instances = list(row["instances"])
    return (
        row["state"],
        f"{row['vendor']:04x}:{row['product']:04x}",
        row["name"] or "-",
        f"{row['bus']}/{row['port']}",
        f"{row['manufacturer']} {row['product_name']}".strip() or "-",
        row["serial"] or "-",
        " ".join(row["classes"]),
        " ".join(str(each["driver"]) for each in instances) or "-",
        " ".join(str(each["path"]) for each in instances) or "-",
    )


def why(arguments: argparse.Namespace) -> int:
    """`udf why`: every driver that was looked at for a device."""
    with _daemon(arguments) as connection:
        answer = connection.call("Why", device=arguments.device)
    if arguments.json:
        show.as_json(answer)
        return 0
    row = answer["device"]
    what = " ".join(filter(None, (row["manufacturer"], row["product_name"], row["serial"]))) or "a device"
    show.line(f"{row['name'] or row['key']} is {what}, {row['vendor']:04x}:{row['product']:04x}, at {row['port']}.")
    for text in _said_of(row):
        show.line(text)
    for each in answer["candidates"]:
        show.line(f"  {'*' if each['chosen'] else '-'} {each['driver']} {each['reason']}")
    if not answer["candidates"] and row["state"] == "no_driver":
        show.line("  There is no driver for USB devices on the search path (`udf drivers`).")
    return 0


def plug(arguments: argparse.Namespace) -> int:
    """`udf plug`: an emulated device, by an image file or by the name of its model."""
    options = options_of(arguments.options)
    model, what = arguments.model, arguments.what
    if model is not None or "/" in what or os.path.isfile(what):
        model = model or "storage"
        options["file"] = absolute(what)
    else:
        model = what
    if arguments.serial is not None:
        options["serial"] = arguments.serial
    name = arguments.name
    if name is None and "file" in options:
        name = _name_of(what)
    with _daemon(arguments) as connection:
        answer = connection.call("Plug", model=model, options=options, name=name, faults=arguments.faults or None)
    return _plugged(answer["device"], arguments.json)


def _name_of(file: str) -> str | None:
    """What a device is called by its image file: that has more names than devices may have."""
    stem = os.path.splitext(os.path.basename(file))[0]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:64] or None


def unplug(arguments: argparse.Namespace) -> int:
    """`udf unplug`: answers when the driver has ended."""
    with _daemon(arguments) as connection:
        connection.call("Unplug", name=arguments.name)
    if arguments.json:
        show.as_json({"name": arguments.name})
    return 0


def replug(arguments: argparse.Namespace) -> int:
    """`udf replug`: out and in again."""
    with _daemon(arguments) as connection:
        answer = connection.call("Replug", name=arguments.name)
    return _plugged(answer["device"], arguments.json)


def faults(arguments: argparse.Namespace) -> int:
    """`udf faults`: other rules for a device that is plugged in."""
    with _daemon(arguments) as connection:
        connection.call("Faults", name=arguments.name, faults=arguments.rules)
    if arguments.json:
        show.as_json({"name": arguments.name, "faults": arguments.rules})
    return 0


def _plugged(row: Row, as_json: bool) -> int:
    """Say what became of a device that was plugged in; a driver that should serve it and does not is a failure."""
    failed = row["state"] in _UNBOUND
    if as_json:
        show.as_json({"device": row})
    elif failed:
        raise UserError(f"{row['name']} is plugged in, but no driver serves it: {row['text']}")
    else:
        for text in _said_of(row):
            show.line(text)
    return 1 if failed else 0


def _said_of(row: Row) -> Iterator[str]:
    name = row["name"] or row["key"]
    for each in row["instances"]:
        part = "" if each["interface"] is None else f", interface {each['interface']}"
        state = "" if each["state"] == "ACTIVE" else f", {each['state']}"
        yield f"{name}{part}: {each['driver']} serves it as {each['name']}{state}: {each['path']}"
        for volume in each["volumes"]:
            if volume["mountpoint"] is not None:
                yield f"{name}: {_volume(volume)}"
    if row["state"] != "bound":
        yield f"{name}: {row['state']}: {row['text']}"


def _volume(row: Row) -> str:
    """A mounted volume in a sentence."""
    what = f"{row['label'] or row['export']} ({row['filesystem'] or 'mounted'})"
    state = "" if row["state"] == "ACTIVE" else f", {row['state']}: {row['text']}"
    return f"{what} is mounted on {row['mountpoint']}{state}"


def _daemon(arguments: argparse.Namespace) -> client.Connection:
    """Devices are a daemon's; private supervisors have none."""
    connection = client.find_daemon(arguments.socket)
    if connection is None:
        raise client.NoSupervisorError("no daemon runs, and devices are served by one: start `udf daemon`")
    return connection
