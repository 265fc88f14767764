"""Reports of how a mount's drivers died, for `udf crashes`.

Owns: the reports of one mount, bounded in number and size. Must never: do I/O, or pass on text of a driver's that could
steer a terminal. Called by: recovery.py (adds), control.py (reads).
"""

from __future__ import annotations

import signal

import msgspec

from udf import messages
from udf.supervisor.generation import Generation
from udf.supervisor.output import printable
from udf.supervisor.restart import Kind

MAX_REPORTS = 20
MAX_LINES = 50
MAX_LINE = 300


class CrashReport(msgspec.Struct, kw_only=True):
    """One death. `output` comes a moment later than the rest, when the last of it has been read."""

    time: float  # seconds since the epoch
    generation: int
    kind: str  # a restart.Kind
    counted: bool
    text: str
    status: int | None  # the exit status, if it ended by itself
    signal: str | None  # the signal that ended it
    served: float | None  # seconds; None: it failed before it served
    memory: int | None  # bytes in memory at most, as far as known
    pending: int  # requests that it had not answered
    operations: list[str]  # its last ones, oldest first
    output: list[str]  # its last lines, tracebacks too, oldest first
    fault: list[str]  # the last mistake that it had survived, with its traceback
    poison: list[str]  # requests that were given up because of this death and others like it


class CrashLog:
    """The reports of one mount, oldest first."""

    def __init__(self) -> None:
        self._reports: list[CrashReport] = []

    def add(self, time: float, generation: Generation, kind: Kind, text: str, lost: messages.LinkLost) -> CrashReport:
        """Keep a report of this death."""
        status = generation.status
        report = CrashReport(
            time=time,
            generation=generation.number,
            kind=kind,
            counted=kind.is_counted,
            text=text,
            status=status if status is not None and status >= 0 else None,
            signal=_signal_name(-status) if status is not None and status < 0 else None,
            served=generation.served,
            memory=generation.memory,
            pending=lost.pending,
            operations=[_line(operation) for operation in lost.recent[-MAX_LINES:]],
            output=[],
            fault=[_line(line) for line in generation.traceback[-MAX_LINES:]],
            poison=[],
        )
        self._reports.append(report)
        if len(self._reports) > MAX_REPORTS:
            # A storm of kills from outside must not push out what the driver did by itself.
            first = next((number for number, each in enumerate(self._reports[:-1]) if not each.counted), 0)
            del self._reports[first]
        return report

    def add_poison(self, request: str) -> None:
        """A request was given up; the last death that counted is the one that decided it."""
        for report in reversed(self._reports):
            if report.counted:
                if len(report.poison) < MAX_LINES:
                    report.poison.append(_line(request))
                return

    def reports(self) -> list[CrashReport]:
        """All that are kept, oldest first."""
        return list(self._reports)


def fill_output(report: CrashReport, lines: list[str]) -> None:
    """The last lines of the dead one, now that all of them have been read."""
    report.output = [_line(line) for line in lines[-MAX_LINES:]]


def _line(text: str) -> str:
    return printable(text.encode("utf-8", "backslashreplace")[:MAX_LINE])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
