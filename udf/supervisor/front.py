"""What stands before a driver, as the driver's recovery sees it: programs talk to it, and it outlives each generation.

Owns: what a shim of a mount, a shim of block devices and a terminal have in common: a link to the driver, its loss, a
new generation that is offered and taken or not, and the two ways of having none.
Must never: decide anything about a driver (recovery.py does). Called by: endpoint.py and recovery.py; the three kinds
are in shim.py and terminal.py.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Protocol

import trio

from udf import messages
from udf.supervisor.instance import Reason


class _End(Protocol):
    def fileno(self) -> int: ...

    def close(self) -> None: ...


class LinkEnd:
    """One end of a link, with the window that belongs to the link if there is one."""

    def __init__(self, end: _End, window: int = -1) -> None:
        self._end = end
        self._window = window

    @property
    def descriptors(self) -> list[int]:
        """The link, then the window."""
        return [self._end.fileno(), *([self._window] if self._window >= 0 else [])]

    def close(self) -> None:
        """Close it; it may be closed twice."""
        self._end.close()
        if self._window >= 0:
            os.close(self._window)
            self._window = -1


class Front(ABC):
    """One front, from its start to its end."""

    def __init__(self) -> None:
        self.linked = True  # it has a link whose end it has not seen
        self.lost: messages.LinkLost | None = None  # the last loss of a link
        self.answer: messages.Attached | messages.Refused | None = None  # to the last `attach`

    @property
    @abstractmethod
    def is_up(self) -> bool:
        """Whether programs can use it."""

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """Whether it serves nobody any more, and will not."""

    @property
    @abstractmethod
    def has_trouble(self) -> bool:
        """Whether it cannot get to the point of being up."""

    @abstractmethod
    def problem(self) -> tuple[str, Reason]:
        """Why that is so: a sentence, or the end of one."""

    @abstractmethod
    def start(self, nursery: trio.Nursery, reaper: trio.Nursery) -> None:
        """Begin. `nursery` ends with the endpoint, `reaper` outlives it."""

    @abstractmethod
    def link(self) -> tuple[LinkEnd, LinkEnd]:
        """A link for one generation: the front's end, the driver's end."""

    @abstractmethod
    async def attach(self, generation: int, *, counted: bool, link: list[int]) -> None:
        """Offer a new generation; `answer` will be set, or its link is lost without one."""

    @abstractmethod
    async def fail(self, text: str) -> None:
        """There is no new generation for now: what waits fails, and so does what comes, until another `attach`."""

    @abstractmethod
    async def detach(self, text: str, *, wait: float = 0.0, max_stale: float = 0.0) -> None:
        """The device is gone: what waits and what comes fails with ENODEV, until another `attach`.

        Of a mount, requests may `wait` for so many seconds before they fail, and what is cached goes on being
        answered for `max_stale` seconds.
        """

    def driver_ended(self) -> None:
        """The driver's process is dead for certain; a front that cannot see the end of its link takes it for that."""

    def tick(self) -> None:
        """A sign of life is due from it, should it be a process."""

    async def counters(self) -> dict[str, int | float]:
        """Its counters, or nothing if it has none or does not answer in time."""
        return {}

    async def requests(self) -> messages.Requests | None:
        """The requests that wait, or None if it does not answer in time."""
        return messages.Requests(id=0, total=0, requests=[])

    async def abort(self, request: int) -> bool:
        """Have one request answered EIO; whether the front was told."""
        return False
