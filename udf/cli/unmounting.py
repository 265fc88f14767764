"""`udf umount` and `udf eject`: the end of mounts and devices, and who is in its way.

Owns: what these ask, and the cleaning of a mount that nobody serves any more. Must never: import trio or pyfuse3, or
look below a mountpoint. Called by udf.cli.main by way of udf.cli.commands.
"""

from __future__ import annotations

import argparse
import sys

from udf.cli import show
from udf.cli.asking import Meant, absolute, absolute_mountpoint, find_meant, may_be_device, not_ours
from udf.errors import UserError
from udf.supervisor import client


def umount(arguments: argparse.Namespace) -> int:
    """`udf umount`: whichever supervisor has the mount does it."""
    found = find_meant(arguments.mountpoint, arguments.socket) or _find_device(arguments.mountpoint, arguments.socket)
    mountpoint = absolute_mountpoint(arguments.mountpoint) if found is None else found.mountpoint
    if found is None:
        _clean_stale(mountpoint)
    else:
        mountpoints = _ask_to_unmount(found, arguments.lazy)
        mountpoint = found.mountpoint or mountpoints[0]
    if arguments.json:
        show.as_json({"mountpoint": mountpoint})
    return 0


def _find_device(text: str, path: str | None) -> Meant | None:
    """A device of a daemon, of which something may be mounted; whether there is one, only the daemon can tell."""
    connection = client.find_daemon(path)
    if connection is None:
        return None
    device = text if may_be_device(text) else absolute(text)
    return Meant(connection, {"device": device}, "")


def _ask_to_unmount(found: Meant, lazy: bool) -> list[str]:
    with found.connection:
        try:
            return list(found.connection.call("Unmount", **found.which, lazy=lazy or None)["mountpoints"])
        except client.ControlError as error:
            if error.name == "NotFound" and "device" in found.which:
                return [_clean_or_refuse(found.which["device"])]
            raise _busy(error, found.mountpoint, "end that first, or use `udf umount -l`") from None


def _busy(error: client.ControlError, mountpoint: str, what_to_do: str) -> client.ControlError | UserError:
    """What to say of a mount that is in use: by whom."""
    if error.name != "Busy":
        return error
    from udf.cli.holders import describe

    where = mountpoint or str(error.parameters.get("mountpoint", ""))
    return UserError(f"{where} is in use by {describe(where)}: {what_to_do}")


def _clean_or_refuse(text: str) -> str:
    mountpoint = absolute_mountpoint(text)
    _clean_stale(mountpoint)
    return mountpoint


def eject(arguments: argparse.Namespace) -> int:
    """`udf eject`: everything that is mounted of a device is unmounted, and the device ends."""
    connection = client.find_daemon(arguments.socket)
    if connection is None:
        raise client.NoSupervisorError("no daemon runs, and devices are served by one: start `udf daemon`")
    text = arguments.device
    with connection:
        try:
            answer = connection.call(
                "Eject", device=text if may_be_device(text) else absolute(text), mountpoint=absolute_mountpoint(text)
            )
        except client.ControlError as error:
            raise _busy(error, "", "end that first; nothing was ejected") from None
    if arguments.json:
        show.as_json(answer)
    else:
        show.line(f"{answer['text']}.")
    return 0


def _clean_stale(mountpoint: str) -> None:
    """Take away a mount of ours whose shim was killed together with its supervisor."""
    from udf.fuse import mount as mounting

    found = mounting.find_mount(mountpoint)
    if found is None or found.fstype != mounting.FSTYPE:
        raise not_ours(mountpoint)
    try:
        done = mounting.clean_stale(mountpoint)
    except mounting.MountError as error:
        raise UserError(str(error)) from error
    if done is None:
        raise UserError(f"{mountpoint} is served by a supervisor that cannot be reached: ask as its user, or as root")
    print(f"udf: {done}", file=sys.stderr)
