"""The steps of a workload, and which of them is the driver's last.

A step is a request over the link that the driver must answer, counted from the beginning of a section; the shim's own
questions are steps too. FORGET, INTERRUPT and the like have no answer and are none.

Owns: the vocabulary of the matrix (`Place`, `Step`, `Target`). Must never: do I/O. Called by: all of udf.testing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from udf.errors import UserError
from udf.fuse.opcodes import UNANSWERED, Opcode

NOT_STEPS = UNANSWERED | {Opcode.INIT, Opcode.DESTROY}


class Place(enum.StrEnum):
    """Where the driver dies over a request."""

    BEFORE = "before"  # it has not seen it
    HALF = "half"  # in the middle of the work
    AFTER = "after"  # the work is done, and the reply is lost


@dataclass(frozen=True)
class Step:
    """One request that the driver must answer: the *number*th one of a section, counted from 1."""

    section: str
    number: int
    opcode: int
    operation: int  # which operation of the section was under way, counted from 0
    points: int = 0  # at which the driver changes something, see tracer.py

    def __str__(self) -> str:
        return f"{self.section}:{self.number}"

    @property
    def name(self) -> str:
        """The request's name."""
        return name_of(self.opcode)

    def middle(self) -> int:
        """The point in the middle of the work. The one after the last is the reply: then all is done."""
        return self.points // 2 + 1 if self.points > 1 else self.points + 1

    def all_points(self, most: int) -> list[int]:
        """Every point but the first, at which nothing is done yet: at most so many, evenly spread, the reply as one."""
        inner = range(2, self.points + 2) if self.points else [1]
        if len(inner) <= most:
            return list(inner)
        return sorted({inner[index * (len(inner) - 1) // (most - 1)] for index in range(most)})


@dataclass(frozen=True)
class Target:
    """A death to be tried."""

    step: Step
    place: Place
    point: int = 0  # HALF: before which point
    cold: bool = False  # on a mount that is new: the request comes there only once

    def __str__(self) -> str:
        point = f".{self.point}" if self.place is Place.HALF else ""
        return f"{'cold ' if self.cold else ''}{self.step}/{self.place}{point}"


@dataclass(frozen=True)
class Address:
    """How people name a death: `SECTION:NUMBER/PLACE`, with `.POINT` behind `half` for another than the middle.

    With `cold` before it: on a new mount, over a request that is not sent again once the driver has said that it lacks
    it (ENOSYS).
    """

    section: str
    number: int
    place: Place
    point: int | None = None
    cold: bool = False

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read it. UserError in one sentence."""
        cold = text.startswith("cold ")
        step, _, place = text.removeprefix("cold ").partition("/")
        section, _, number = step.rpartition(":")
        place, _, point = place.partition(".")
        try:
            return cls(section, int(number), Place(place), int(point) if point else None, cold)
        except ValueError:
            raise UserError(f"{text!r} names no death: write SECTION:NUMBER/PLACE, as in rename:7/after") from None


@dataclass
class Record:
    """What the relay saw of one section."""

    steps: list[Step] = field(default_factory=list)
    unsupported: set[int] = field(default_factory=set)  # opcodes that were answered ENOSYS: they come once only


def name_of(opcode: int) -> str:
    """The name of a request."""
    try:
        return Opcode(opcode).name
    except ValueError:
        return f"opcode {opcode}"
