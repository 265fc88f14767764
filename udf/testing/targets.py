"""Which deaths are tried: every step in every place, and how one of them is found by its name.

Owns: the choice. Must never: do I/O. Called by: matrix.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from udf.errors import UserError
from udf.testing import ptrace
from udf.testing.outcome import describe
from udf.testing.steps import Address, Place, Record, Step, Target, name_of
from udf.testing.workload import Section

MOST_POINTS = 16  # of one request, when all are tried


def places() -> list[Place]:
    """Those that this machine can have."""
    return list(Place) if ptrace.SUPPORTED else [Place.BEFORE, Place.AFTER]


def targets_of(steps: Iterable[Step], *, full: bool, cold: bool = False) -> Iterable[Target]:
    """The deaths that are tried over these steps; `full`: at every point of the work, else in its middle."""
    for step in steps:
        for place in places():
            if place is not Place.HALF:
                yield Target(step, place, cold=cold)
            elif full:
                for point in step.all_points(MOST_POINTS):
                    yield Target(step, place, point, cold)
            elif step.points:  # what changes nothing has no middle
                yield Target(step, place, step.middle(), cold)


def find(address: Address, steps: Iterable[Step], cold: Iterable[Step]) -> Target:
    """The death of that name. UserError if there is no such step."""
    for step in cold if address.cold else steps:
        if (step.section, step.number) == (address.section, address.number):
            point = address.point or step.middle()
            return Target(step, address.place, point if address.place is Place.HALF else 0, address.cold)
    raise UserError(f"the workload has no step {address.section}:{address.number}")


def without_barrier(record: Record, section: Section) -> list[Step]:
    """The steps of a section; the look-up after its last operation is the matrix's own."""
    last = len(section.operations)
    return [step for step in record.steps if not (step.operation == last and step.name == "LOOKUP")]


def describe_target(target: Target, section: Section) -> str:
    """The request, and what the program was doing."""
    index = min(target.step.operation, len(section.operations) - 1)
    return f"{name_of(target.step.opcode)} in {describe(section.operations[index])}"
