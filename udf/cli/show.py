"""How answers look: tables, durations, events and trace lines on a terminal, JSON for programs.

Owns: stdout. Must never: talk to a daemon or decide an exit code. Called by udf.cli.commands.
Everything shown may come from a driver or a caller, so control characters never reach the terminal.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any


def as_json(value: object) -> None:
    """One JSON document on one line."""
    print(json.dumps(value, ensure_ascii=False, separators=(",", ":")), flush=True)


def line(text: str) -> None:
    """One line; flushed, because a follower may wait for it."""
    print(clean(text), flush=True)


def complain(text: str) -> None:
    """The one sentence about what went wrong."""
    print(f"udf: {clean(' '.join(text.split()))}", file=sys.stderr, flush=True)


def clean(text: str) -> str:
    """Without anything that a terminal would act on."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def table(heading: Sequence[str], rows: Sequence[Sequence[object]], *, right: frozenset[str] = frozenset()) -> None:
    """Columns as wide as they need; those named in `right` are numbers."""
    cells = [[clean(str(cell)) for cell in row] for row in rows]
    widths = [max(len(column) for column in columns) for columns in zip(heading, *cells, strict=True)]
    for row in (list(heading), *cells):
        fields = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(heading, row, widths, strict=True)
        ]
        print("  ".join(fields).rstrip())
    sys.stdout.flush()


def duration(seconds: float) -> str:
    """A length of time in its two largest units."""
    whole = max(0, int(seconds))
    for unit, size, below, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // part}{below}"
    return f"{whole}s"


def clock(seconds: float) -> str:
    """Local time of day with milliseconds."""
    return time.strftime("%H:%M:%S", time.localtime(seconds)) + f".{int(seconds % 1 * 1000):03}"


TRACE_HEADING = f"{'TIME':12}  {'OP':14} {'NODE':>11}  {'BY':6} {'µs':>8}  {'RESULT':12} {'BYTES':>8}  PID NAME"


def trace_line(entry: Mapping[str, Any]) -> str:
    """One request as `udf trace` shows it."""
    name = entry.get("name") or ""
    return (
        f"{clock(float(entry['time']))}  {entry['op']:14} {entry['node']:>11}  {entry['by']:6} {entry['us']:>8.0f}"
        f"  {entry['result']:12} {entry.get('bytes', 0):>8}  {entry.get('pid', 0)} {name}"
    ).rstrip()
