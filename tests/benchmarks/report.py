"""How results look: tables, targets and notes on a terminal, the same as JSON for programs.

Owns: the format, medians and percentiles. Must never: measure anything. Called by every benchmark.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Table:
    """Rows of cells that are text already; the first column is left-aligned, the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def lines(self) -> list[str]:
        cells = [list(self.columns), *(list(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        out = [self.title]
        for row in cells:
            first, *rest = zip(row, widths, strict=True)
            parts = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
            out.append("  " + "   ".join(parts).rstrip())
        return out


@dataclass
class Target:
    """A bar that was set before measuring. `reached` is None when it could not be measured."""

    text: str
    measured: str
    reached: bool | None

    def line(self) -> str:
        word = {True: "reached", False: "NOT REACHED", None: "not measured"}[self.reached]
        return f"  {word:12}  {self.text}: {self.measured}"


@dataclass
class Result:
    """What one benchmark found. `data` is for programs: everything that the tables are made of."""

    name: str
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        lines = [f"== {self.name}", *(f"  {note}" for note in self.notes)]
        for table in self.tables:
            lines += ["", *table.lines()]
        if self.targets:
            lines += ["", "targets", *(target.line() for target in self.targets)]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie (the largest one when there are few)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def ratio_of_rounds(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios of each round: what disturbs a whole round disturbs both sides of it."""
    return median([a / b for a, b in zip(ours, theirs, strict=True)])


def at_most(text: str, measured: float | None, limit: float, unit: str = "") -> Target:
    if measured is None:
        return Target(f"{text} ≤ {limit:g}{unit}", "one side is missing", None)
    return Target(f"{text} ≤ {limit:g}{unit}", f"{measured:.2f}{unit}", measured <= limit)


def at_least(text: str, measured: float | None, limit: float, unit: str = "") -> Target:
    if measured is None:
        return Target(f"{text} ≥ {limit:g}{unit}", "one side is missing", None)
    return Target(f"{text} ≥ {limit:g}{unit}", f"{measured:.2f}{unit}", measured >= limit)


def micro(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


@dataclass
class Series:
    """One peer's rounds of one measure: a figure for each round, and all single times for the p99."""

    rounds: list[float] = field(default_factory=list)
    samples: list[float] = field(default_factory=list)

    def add(self, samples: Sequence[float]) -> None:
        """Take one round's times of single operations."""
        self.rounds.append(median(samples))
        self.samples += samples

    def summary(self) -> dict[str, float]:
        return {"median": median(self.rounds), "p99": percentile(self.samples, 0.99), "rounds": len(self.rounds)}


def compared(series: Mapping[str, Series], peer: str, base: str) -> float | None:
    """The ratio of two peers, or None when one of them was not there."""
    if peer not in series or base not in series or not series[peer].rounds or not series[base].rounds:
        return None
    return ratio_of_rounds(series[peer].rounds, series[base].rounds)
