"""What the crash matrix has found.

Owns: `Failure` and `Report`, and how they read. Must never: do I/O. Called by: matrix.py (fills), tests (read).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from udf.testing.steps import Step

_SHOWN = 40


@dataclass(frozen=True)
class Failure:
    """One difference between a run with a death and the same run without."""

    death: str  # as CrashMatrix.run_one and UDF_CRASH take it: SECTION:STEP/PLACE
    operation: str  # over which request, and what the program was doing
    path: str  # where in the tree it shows; empty: in a result
    difference: str
    note: str = ""

    def __str__(self) -> str:
        where = f" {self.path}:" if self.path else ""
        note = f" ({self.note})" if self.note else ""
        return f"{self.death} [{self.operation}]{where} {self.difference}{note}"


@dataclass
class Report:
    """All that was tried, and what failed. It is true when nothing failed."""

    driver: str
    steps: list[Step] = field(default_factory=list)
    tried: int = 0  # deaths
    unreached: int = 0  # of them: the request did not come as it was numbered
    missing: list[str] = field(default_factory=list)  # which
    places: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def add(self, failure: Failure) -> None:
        """Note a failure."""
        self.failures.append(failure)

    @property
    def requests(self) -> set[str]:
        """The names of the requests over which the driver died."""
        return {step.name for step in self.steps}

    def __bool__(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        lines = [
            f"{self.driver}: {len(self.steps)} steps ({', '.join(self.places)}), {self.tried} deaths,"
            f" {self.unreached} without their step, {len(self.failures)} failures"
        ]
        lines += [f"  {failure}" for failure in self.failures[:_SHOWN]]
        if len(self.failures) > _SHOWN:
            lines.append(f"  and {len(self.failures) - _SHOWN} more")
        if self.failures:
            lines.append("  one of them again: UDF_CRASH='SECTION:STEP/PLACE' with the same test")
        return "\n".join(lines)
