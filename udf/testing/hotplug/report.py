"""What the exploration has found.

Owns: `Finding`, `Report`, `HotplugError`, and how they read. Must never: do I/O. Called by: explore.py, tests.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

ONE = "UDF_HOTPLUG"  # environment: only this, as a report names it
_SHOWN = 20


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, and the number that makes it happen again."""

    fault: str  # as explore(only=…) takes it: unplug@7; "healthy" needs no fault
    check: str  # which rule was broken: see CHECKS in explore.py
    text: str
    step: str = ""  # the call that the fault was done to, and the driver's line
    stack: str = ""  # of the thread that hangs or was left

    def __str__(self) -> str:
        where = f" [{self.step}]" if self.step else ""
        stack = "".join(f"\n      {line}" for line in self.stack.splitlines())
        return f"{self.fault}{where}: {self.text}{stack}"


@dataclass
class Report:
    """All that was tried, and what is wrong. It is true when nothing is."""

    name: str
    steps: list[str] = field(default_factory=list)  # of the healthy run
    tried: list[str] = field(default_factory=list)  # the faults and conditions that took place
    missed: list[str] = field(default_factory=list)  # those whose step did not come as it was numbered
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return not self.findings

    @property
    def checks(self) -> set[str]:
        """The rules that were broken."""
        return {finding.check for finding in self.findings}

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {len(self.steps)} calls to the device, {len(self.tried)} faults and conditions tried,"
            f" {len(self.findings)} findings"
        ]
        # One of each kind tells more than forty that are alike.
        alike = Counter((finding.check, finding.fault.partition("@")[0], finding.text) for finding in self.findings)
        shown = 0
        for finding in self.findings:
            times = alike.pop((finding.check, finding.fault.partition("@")[0], finding.text), 0)
            if not times or shown >= _SHOWN:
                continue
            shown += 1
            more = f" (and {times - 1} more like this)" if times > 1 else ""
            lines.append(f"  {finding}{more}")
        lines += [f"  note: {note}" for note in self.notes]
        if self.findings:
            first = self.findings[0].fault
            lines.append(f"  one of them again: explore(…, only={first!r}), or {ONE}={first} with the same test")
        return "\n".join(lines)

    __repr__ = __str__


class HotplugError(AssertionError):
    """The exploration has found something: its report is the text, and `report`."""

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report
