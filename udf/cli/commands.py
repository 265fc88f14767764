"""What each command asks, and how its answer is printed.

Owns: turning arguments into calls of the control interface and answers into text; what concerns dead and hung drivers
is in recovering.py, what ends mounts in unmounting.py, what concerns devices in devices.py. Must never: import trio or
pyfuse3 outside of `daemon` and `mount -f`, or look below a mountpoint.
Called by udf.cli.main, which owns errors.
"""

from __future__ import annotations

import argparse
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping

from udf.cli import devices, recovering, show, unmounting
from udf.cli.asking import (
    TAGS,
    Row,
    absolute,
    absolute_mountpoint,
    all_supervisors,
    may_be_device,
    meant,
    options_of,
)
from udf.errors import UserError
from udf.supervisor import client


def daemon(arguments: argparse.Namespace) -> int:
    """`udf daemon`."""
    from udf.supervisor.daemon import main

    automount = arguments.automount and absolute(arguments.automount)
    rules = arguments.rules and absolute(arguments.rules)
    return main(arguments.socket, usbip=arguments.usbip, rules=rules, automount=automount)


def mount(arguments: argparse.Namespace) -> int:
    """`udf mount`: through the daemon, or by a supervisor of its own."""
    if len(arguments.paths) > 2:
        raise UserError("mount takes one SOURCE and one MOUNTPOINT: udf mount [-t DRIVER] [SOURCE] MOUNTPOINT")
    if arguments.driver and arguments.program:
        raise UserError("-t and --exec exclude each other: a mount has one driver")
    *sources, mountpoint = arguments.paths
    if not sources and not arguments.driver and not arguments.program:
        raise UserError("say which driver is meant with -t DRIVER (`udf drivers` lists them), or give a SOURCE")
    if arguments.foreground and arguments.socket:
        raise UserError("-f supervises the mount itself and --socket asks a daemon: give one of them")
    options = options_of(arguments.options)
    connection = None if arguments.foreground else client.find_daemon(arguments.socket)
    source = _absolute_source(sources[0], connection) if sources else None
    driver = arguments.driver
    if source is not None and not driver and not arguments.program and _source_kind(source) in ("url", "directory"):
        driver = _guess_driver(source, _list_drivers(connection)[0])
    request = {
        "driver": absolute(driver) if driver and "/" in driver else driver,
        "exec": arguments.program,
        "source": source,
        "mountpoint": absolute_mountpoint(mountpoint),
        "options": options,
    }
    request = {key: value for key, value in request.items() if value is not None}
    if arguments.foreground:
        from udf.supervisor.private import run_foreground

        return run_foreground(request, show.as_json if arguments.json else None)
    if connection is None:
        from udf.supervisor.launch import launch_private

        answer = launch_private(request)
    else:
        with connection:
            answer = connection.call("Mount", **request)
    if arguments.json:
        show.as_json(answer)
    return 0


def attach(arguments: argparse.Namespace) -> int:
    """`udf attach`: a file as a block device."""
    connection = client.find_daemon(arguments.socket)
    if connection is None:
        raise client.NoSupervisorError("no daemon runs that could keep it attached: start `udf daemon`")
    driver = arguments.driver
    request = {
        "source": absolute(arguments.source),
        "driver": absolute(driver) if driver and "/" in driver else driver,
        "name": arguments.name,
        "options": options_of(arguments.options),
    }
    with connection:
        answer = connection.call("Attach", **{key: value for key, value in request.items() if value is not None})
    if arguments.json:
        show.as_json(answer)
    else:
        show.line(f"{answer['name']}: {answer['mountpoint']}/disk")
    return 0


def _guess_driver(source: str, drivers: list[Row]) -> str:
    """The one driver that takes such a source."""
    kind = _source_kind(source)
    fitting = [str(driver["name"]) for driver in drivers if driver["source"] == kind and driver["kind"] == "fs"]
    if len(fitting) == 1:
        return fitting[0]
    found = f"{len(fitting)} drivers take a {kind} ({', '.join(fitting)})" if fitting else f"no driver takes a {kind}"
    raise UserError(f"{found}: say which one is meant with -t DRIVER (`udf drivers` lists them)")


def _source_kind(source: str) -> str:
    """The word that manifests use for such a source."""
    if not source.startswith("/"):
        return "url" if ":" in source.partition("/")[0] and not source.startswith(TAGS) else "name"
    try:
        mode = os.stat(source).st_mode
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        return "directory"
    return "file" if stat.S_ISREG(mode) else "device"


def status(arguments: argparse.Namespace) -> int:
    """`udf status`: the mounts of the daemon and of every private supervisor."""
    mounts: list[Row] = []
    for connection in all_supervisors(arguments.socket):
        try:
            mounts += connection.call("Status")["mounts"]
        except client.ControlError as error:
            if error.name != "Disconnected" or arguments.socket:
                raise  # a private supervisor may end between the look and the question
    mounts.sort(key=lambda row: str(row["mountpoint"]))
    if arguments.json:
        show.as_json({"mounts": mounts})
    elif mounts:
        heading = (
            *("STATE", "DRIVER", "MOUNTPOINT", "SOURCE", "GENERATION", "RESTARTS LEFT", "DURABILITY"),
            *("REQUESTS", "CACHE HITS", "ROUND TRIPS", "SINCE"),
        )
        right = frozenset(("GENERATION", "RESTARTS LEFT", "REQUESTS", "CACHE HITS", "ROUND TRIPS", "SINCE"))
        show.table(heading, [_status_row(row) for row in mounts], right=right)
        for row in mounts:
            if row["state"] != "ACTIVE" and row["text"]:
                show.line(f"{row['mountpoint']}: {row['reason']}: {row['text']}")
            elif row["kind"] == "mount" and row["device"] and not row["volume"]:
                show.line(
                    f"{row['mountpoint']}: {row['driver']} takes files: this mount does not live through an unplug"
                )
            elif not row["known_again"]:
                show.line(
                    f"{row['mountpoint']}: {row['device']} has no serial number to know it again by:"
                    " this mount does not live through an unplug"
                )
    else:
        show.line("Nothing is mounted.")
    return 0


def _status_row(row: Row) -> tuple[object, ...]:
    counters = row["counters"]
    state = f"{row['state']} (lazy)" if row.get("lazy") else row["state"]
    return (
        state,
        row["driver"],
        row["mountpoint"],
        (row["kind"] == "mount" and row.get("device")) or row["source"] or row.get("device") or "-",
        row["generation"],
        row["restarts_left"],
        row["durability"],
        *(_count(counters, name) for name in ("requests", "cache_hits", "driver_round_trips")),
        show.duration(time.time() - row["since"]),
    )


def _count(counters: Mapping[str, float], name: str) -> str:
    return str(int(counters[name])) if name in counters else "-"


def drivers(arguments: argparse.Namespace) -> int:
    """`udf drivers`: what the daemon can find, or what a private supervisor would."""
    found, warnings = _list_drivers(client.find_daemon(arguments.socket))
    if arguments.json:
        show.as_json({"drivers": found, "warnings": warnings})
        return 0
    rows = [(driver["name"], driver["kind"], _takes(driver), driver["description"]) for driver in found]
    show.table(("NAME", "KIND", "SOURCE", "DESCRIPTION"), rows)
    for warning in warnings:
        show.complain(warning)
    return 0


def _takes(driver: Row) -> str:
    """The source of a driver; of a usb driver, which devices it is for."""
    match = list(driver["match"])
    more = f" (or {len(match) - 1} more)" if len(match) > 1 else ""
    return f"{match[0]}{more}" if match else str(driver["source"])


def _list_drivers(connection: client.Connection | None) -> tuple[list[Row], list[str]]:
    """The drivers on the search path, and a sentence for each file there that is none."""
    if connection is not None:
        answer = connection.call("Drivers")
        return list(answer["drivers"]), list(answer["warnings"])
    import functools

    import trio

    from udf.supervisor import catalog

    found, warnings = trio.run(functools.partial(catalog.listing, trusted_only=False))
    return list(found), warnings


def events(arguments: argparse.Namespace) -> int:
    """`udf events`: the daemon's, else those of the private supervisors one after the other."""
    if arguments.follow:
        connection = client.find_daemon(arguments.socket)
        if connection is None:
            raise client.NoSupervisorError("no daemon runs whose events could be followed: start `udf daemon`")
        with connection:
            _print_events(connection.stream("Events"), arguments.json)
        return 0
    for connection in all_supervisors(arguments.socket):
        try:
            reply = connection.call("Events")
        except client.ControlError as error:
            if error.name != "Disconnected" or arguments.socket:
                raise
            continue  # a private supervisor may end between the look and the question
        _print_events(iter([reply]), arguments.json)
    return 0


def _print_events(replies: Iterator[Row], as_json: bool) -> None:
    for reply in replies:
        for event in reply["events"]:
            if as_json:
                show.as_json(event)
                continue
            change = event["state"] if not event.get("previous") else f"{event['previous']} → {event['state']}"
            what = change if event["what"] == "state" else event["what"]
            show.line(
                f"{show.clock(event['time'])}  {event['kind']:8} {event['name']:20} {what:22} {event['reason']:12}"
                f" {event['text']}".rstrip()
            )
        _tell_lost(reply)


def trace(arguments: argparse.Namespace) -> int:
    """`udf trace`: every request of one mount until Ctrl-C or its end."""
    connection, which, _ = meant(arguments.mountpoint, arguments.socket)
    with connection:
        try:
            _print_operations(connection.stream("Trace", **which), arguments.json)
        except client.ControlError as error:
            if error.name != "Disconnected" or not connection.info.get("private"):
                raise  # a private supervisor ends with its mount, and so does the trace
    return 0


def _print_operations(replies: Iterator[Row], as_json: bool) -> None:
    for number, reply in enumerate(replies):
        if number == 0 and not as_json:
            show.line(show.TRACE_HEADING)
        for operation in reply["operations"]:
            if as_json:
                show.as_json(operation)
            else:
                show.line(show.trace_line(operation))
        _tell_lost(reply)


def _tell_lost(reply: Row) -> None:
    if reply.get("lost"):
        print(f"udf: {reply['lost']} lines were lost, because this end was too slow", file=sys.stderr, flush=True)


def doctor(arguments: argparse.Namespace) -> int:
    """`udf doctor`: exit code 1 if mounting is impossible."""
    from udf import doctor as checks

    findings = checks.examine()
    able = checks.can_mount(findings)
    if arguments.json:
        rows = [{"name": f.name, "state": f.state, "text": f.text, "fix": f.fix} for f in findings]
        show.as_json({"can_mount": able, "checks": rows})
    else:
        for finding in findings:
            show.line(f"{finding.state:4}  {finding.name}: {finding.text}")
            if finding.fix:
                show.line(f"      → {finding.fix}")
        show.line("This machine can mount." if able else "This machine cannot mount: see the lines with “bad”.")
    return 0 if able else 1


def _absolute_source(source: str, connection: client.Connection | None = None) -> str | None:
    """A path made absolute; a URL, host:path or device word as it is; `none` as mount(8) has it.

    A relative path that does not exist may be the name of a device, if there is a daemon that has devices.
    """
    if source == "none":
        return None
    head, _, _ = source.partition("/")
    if source.startswith(TAGS):
        if connection is None:
            raise client.NoSupervisorError(
                f"no daemon runs that could know {source}: start `udf daemon`, or name the image or device itself"
            )
        return source
    if ":" in head or (connection is not None and may_be_device(source)):
        return source
    return absolute(source)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    command.__name__: command for command in (daemon, mount, attach, status, drivers, events, trace, doctor)
}
COMMANDS |= {command.__name__: command for command in (unmounting.umount, unmounting.eject)}
COMMANDS |= {command.__name__: command for command in (recovering.restart, recovering.hung, recovering.crashes)}
COMMANDS |= {
    command.__name__: command
    for command in (devices.devices, devices.why, devices.plug, devices.unplug, devices.replug, devices.faults)
}
