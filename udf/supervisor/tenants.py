"""What the binder knows: devices that are there, drivers that have one, and who runs them for it.

Owns: these nouns. Must never: decide or do anything. Called by: binder.py; starter.py and devices.py, which fill them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import trio

from udf.manifest import Manifest
from udf.supervisor.instance import Instance, Reason
from udf.supervisor.lease import Lease
from udf.usb.matching import Binding, DeviceFacts, Verdict


class Endpoint(Protocol):
    """What runs for one binding."""

    instance: Instance
    ended: trio.Event

    @property
    def may_return(self) -> bool:
        """Whether it goes on if its device, which is gone, is plugged in again now."""

    @property
    def is_waiting(self) -> bool:
        """Whether its device is away and waited for, and all that follows from the unplug has been done."""

    def listen(self, told: Callable[[], None]) -> None:
        """Call `told` when `is_waiting` may have changed."""

    async def take_back(self, lease: Lease) -> bool:
        """This may be the device that is away. Whether it is and is served again; the lease is its own, as at a start.

        False: it is another device, it is gone again, or nobody waits for it any more.
        """

    def lose(self, reason: Reason, text: str) -> None:
        """Its device will not come back: it ends by itself, soon."""

    async def end(self, reason: Reason) -> None:
        """Make it GONE whatever it takes."""


@dataclass(frozen=True)
class Present:
    """A device that is there, with what its bus can make of it."""

    facts: DeviceFacts
    lease: Callable[[Binding, bool], Lease]  # True: others have, or will have, its other interfaces
    name: str = ""  # what its bus calls it, if it does


class Starter(Protocol):
    """Runs instances; the registry, as devices.py adapts it."""

    async def start(self, name: str, binding: Binding, lease: Lease) -> Endpoint:
        """Start and wait until it can be used. UserError says why it cannot. It ends by itself when the lease does.

        The lease is its own from here on, also to be closed.
        """

    def is_taken(self, name: str) -> bool:
        """Whether something has this name that is not ours."""

    def linked(self, name: str, by_id: str) -> None:
        """It can be used: show it under its name by-id."""

    def unlinked(self, by_id: str) -> None:
        """It has ended: take that name away."""


class Tenant:
    """A driver with a device, from the decision to the end of its instance."""

    def __init__(self, binding: Binding, facts: DeviceFacts, lease: Lease) -> None:
        self.binding = binding
        self.facts = facts
        self.lease = lease
        self.name = ""
        self.by_id = ""
        self.is_linked = False  # its name by-id can be seen
        self.endpoint: Endpoint | None = None
        self.stopping = trio.Event()  # it is not wanted any more
        self.is_returning = False  # a device that may be its own is being looked at
        self.refused: set[str] = set()  # arrivals that were not its device, or were gone too soon

    @property
    def slot(self) -> tuple[str, int | None]:
        """What it has: a device, or an interface of it."""
        return self.binding.key, self.binding.interface

    @property
    def serves(self) -> bool:
        """Whether it can be used."""
        return self.is_running and not self.is_returning and not self.lease.gone

    @property
    def is_running(self) -> bool:
        """Whether its instance was started and has not ended."""
        return self.endpoint is not None and not self.endpoint.ended.is_set()

    @property
    def is_absent(self) -> bool:
        """Whether its device is gone, and may be plugged in again."""
        return self._is_without and self.endpoint is not None and self.endpoint.may_return

    @property
    def is_waiting(self) -> bool:
        """Whether its device is away, and nothing more is done about it."""
        return self._is_without and not self.is_returning and self.endpoint is not None and self.endpoint.is_waiting

    @property
    def _is_without(self) -> bool:
        return self.is_running and self.lease.gone


@dataclass
class Failure:
    """What came of the last attempt at a binding."""

    driver: Manifest
    options: Mapping[str, str]
    text: str
    count: int = 0
    again: float | None = None  # when to try again, by trio's clock; None: not by itself


@dataclass
class Known:
    """What is known of one device: the last verdict, and its own line among the events."""

    facts: DeviceFacts
    name: str
    instance: Instance
    verdict: Verdict | None = None
    is_shared: bool = False  # those who have it now have a connection for each interface
    failures: dict[tuple[int | None, str], Failure] = field(default_factory=dict)
    ejected: set[tuple[int | None, str]] = field(default_factory=set)  # interface and driver, as above
