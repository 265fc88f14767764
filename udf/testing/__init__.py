"""For the authors of drivers: tests that are hard to write and easy to use.

`CrashMatrix` kills a driver over every request in three places and looks whether programs notice. It needs what a mount
needs (`udf doctor`); the deaths in the middle of the work need x86-64 besides, and are left out elsewhere.
"""

from __future__ import annotations

from udf.testing.matrix import CrashMatrix
from udf.testing.report import Failure, Report
from udf.testing.steps import Place, Step
from udf.testing.workload import STANDARD, Section, section

__all__ = ["STANDARD", "CrashMatrix", "Failure", "Place", "Report", "Section", "Step", "section"]
