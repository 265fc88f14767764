"""`udf restart`, `udf hung` and `udf crashes`: drivers that died, hang or should be started anew.

Owns: what these three ask and how the answers are printed. Must never: import trio or pyfuse3, or look below a
mountpoint. Called by udf.cli.main by way of udf.cli.commands.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

from udf.cli import show
from udf.cli.asking import Row, all_supervisors, meant
from udf.errors import UserError
from udf.supervisor import client


def restart(arguments: argparse.Namespace) -> int:
    """`udf restart`: a new generation of the driver."""
    connection, which, mountpoint = meant(arguments.mountpoint, arguments.socket)
    with connection:
        answer = connection.call("Restart", **which)
    if arguments.json:
        show.as_json({"mountpoint": mountpoint, **answer})
    return 0


def hung(arguments: argparse.Namespace) -> int:
    """`udf hung`: the requests that wait, or the end of one of them."""
    if arguments.abort is not None:
        return _abort(arguments)
    rows: list[Row] = []
    total, silent = 0, []
    for answer in _ask("Hung", arguments):
        rows += answer["requests"]
        total += int(answer["total"])
        silent += list(answer["silent"])
    if arguments.json:
        show.as_json({"requests": rows, "total": total, "silent": silent})
        return 0
    for name in silent:
        show.complain(f"the shim of {name} does not answer")
    if not rows:
        show.line("No request waits.")
        return 0
    heading = ("ID", "OPERATION", "AGE", "PID", "COMMAND", "WAITS FOR", "MOUNTPOINT", "PATH")
    cells = [
        (
            row["id"],
            row["op"],
            f"{row['age']:.1f}s",
            row["pid"],
            row["command"] or "-",
            f"a new {row['driver']}" if row["parked"] else row["driver"],
            row["mountpoint"],
            row["path"] or "-",
        )
        for row in rows
    ]
    show.table(heading, cells, right=frozenset(("ID", "AGE", "PID")))
    if total > len(rows):
        show.line(f"… and {total - len(rows)} more")
    return 0


def _abort(arguments: argparse.Namespace) -> int:
    if arguments.mountpoint is None:
        raise UserError("say on which mount the request waits: udf hung MOUNT --abort ID")
    connection, which, mountpoint = meant(arguments.mountpoint, arguments.socket)
    with connection:
        connection.call("Abort", **which, request=arguments.abort)
    if arguments.json:
        show.as_json({"mountpoint": mountpoint, "request": arguments.abort})
    return 0


def crashes(arguments: argparse.Namespace) -> int:
    """`udf crashes`: the reports that supervisors keep."""
    reports = [report for answer in _ask("Crashes", arguments) for report in answer["crashes"]]
    reports.sort(key=lambda report: float(report["time"]))
    if arguments.json:
        show.as_json({"crashes": reports})
        return 0
    for number, report in enumerate(reports):
        if number:
            show.line("")
        for text in _report_lines(report):
            show.line(text)
    if not reports:
        show.line("No driver has died.")
    return 0


def _report_lines(report: Row) -> Iterator[str]:
    when = time.strftime("%Y-%m-%d", time.localtime(report["time"])) + " " + show.clock(report["time"])
    counted = "counted" if report["counted"] else "not counted"
    yield f"{when}  {report['mountpoint']}, generation {report['generation'] or '-'}: {report['text']}"
    facts = [f"{report['kind']} ({counted})"]
    served = report["served"]
    facts.append("failed before it served" if served is None else f"served {show.duration(served)}")
    if report["memory"] is not None:
        facts.append(f"{report['memory'] / 1048576:.1f} MiB in memory")
    facts.append(f"{report['pending']} requests without an answer")
    yield f"  {', '.join(facts)}"
    for title, lines in (
        ("given up", report["poison"]),
        ("its last operations", report["operations"]),
        ("a mistake that it survived", report["fault"]),
        ("it printed", report["output"]),
    ):
        if lines:
            yield f"  {title}:"
            yield from (f"    {line}" for line in lines)


def _ask(method: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """The answers of the supervisor of one mount, or of all supervisors."""
    if arguments.mountpoint is not None:
        connection, which, _ = meant(arguments.mountpoint, arguments.socket)
        with connection:
            yield connection.call(method, **which)
        return
    for connection in all_supervisors(arguments.socket):
        try:
            yield connection.call(method)
        except client.ControlError as error:
            if error.name != "Disconnected" or arguments.socket:
                raise  # a private supervisor may end between the look and the question
