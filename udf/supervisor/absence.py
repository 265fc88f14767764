"""The time in which an endpoint's device is away: what is known of it, what may come back, and why it is given up.

Owns: the lease of the device that the endpoint has now, whether it is away, the one arrival that is offered in its
place, and the reason why nothing is waited for any more. Must never: touch a process or a state (recovery.py does), or
know who waits for the device, and for how long (the endpoint does, as a Waiter).
Called by: recovery.py; endpoint.py and its three kinds through it.

An endpoint stands on a device of its own (it has a lease) or on another endpoint, whose device is its device (`below`
tells by `unplug` and `plugged`), or on nothing that could be pulled out.
"""

from __future__ import annotations

from typing import Protocol

import trio

from udf.supervisor.bell import Bell
from udf.supervisor.instance import Reason
from udf.supervisor.lease import Lease, Tenancy

NEVER = float("-inf")  # it is not waited for
UNPLUGGED = "the device was unplugged"


class Waiter(Protocol):
    """An endpoint, as its recovery asks it while its device is away."""

    def waits_until(self) -> float:
        """Until when the device is waited for, by trio's clock: NEVER, infinity, or a time. Each ring may change it."""

    def patience(self) -> tuple[float, float]:
        """For so many seconds a program's request waits, and what is cached is answered."""

    async def tell_dependants(self) -> None:
        """Tell what serves from here that the device is gone; return when no driver there runs. Bounded in time."""

    def expect_dependants(self, expected: bool) -> None:
        """The device is there again and is looked at, or that came to nothing."""

    def recall_dependants(self) -> None:
        """It serves again."""

    def why_given_up(self) -> tuple[Reason, str]:
        """What to say when the device is not waited for, or not any more."""


class _Arrival:
    """A device that is offered as the one that is away."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.decided = trio.Event()
        self.is_taken = False

    def decide(self, taken: bool) -> None:
        self.is_taken = taken
        self.decided.set()


class Absence:
    """Whether what the endpoint stands on is there."""

    def __init__(self, bell: Bell, lease: Lease | None) -> None:
        self.tenancy = None if lease is None else Tenancy(lease, bell)
        self.loss: tuple[Reason, str] | None = None  # it is given up, and why
        self.since: float | None = None  # when what served was unplugged, by trio's clock; None: it serves
        self.is_settled = False  # that was done: programs are told, and no driver runs
        self.is_returning = False  # from there until it serves again, or that came to nothing
        self.refusal = ""  # why the last arrival was not taken for the device
        self._is_away = False
        self._is_expected = False
        self._is_new = False
        self._bell = bell
        self._arrival: _Arrival | None = None  # offered, and not yet decided about
        self._closed = False
        if lease is not None:
            lease.tell(bell.ring)

    @property
    def is_unplugged(self) -> bool:
        """Whether there is nothing to serve from."""
        return self._is_away or self.loss is not None or (self.tenancy is not None and self.tenancy.lease.gone)

    @property
    def is_lost(self) -> bool:
        """Whether it is given up, and nothing is left to be told."""
        return self.loss is not None and self.is_settled

    @property
    def is_expected(self) -> bool:
        """Whether the device below is there again and is being looked at."""
        return self._is_expected

    @property
    def may_come_back(self) -> bool:
        """Whether there is something to go on with now."""
        if self.loss is not None:
            return False
        return self._arrival is not None if self.tenancy is not None else not self._is_away

    # ---- what others tell

    def unplug(self) -> None:
        """What it stands on has no device."""
        self._is_away = True
        self._is_expected = False
        self._bell.ring()

    def expect(self, expected: bool) -> None:
        """What it stands on has a device again, which is being looked at; or not, after all."""
        self._is_expected = expected
        self._bell.ring()

    def plugged(self) -> None:
        """What it stands on serves."""
        self._is_away = self._is_expected = False
        self._is_new = True  # if it goes again before we serve, that is another unplug
        self._bell.ring()

    def lose(self, reason: Reason, text: str) -> None:
        """Give it up: it is not waited for any more. The first reason stands."""
        if self.loss is None:
            self.loss = (reason, text)
            self._bell.ring()

    async def offer(self, lease: Lease) -> bool:
        """Here is a device that may be the one that is away. Whether it is: False also when that is of no interest.

        The lease is ours from here on, also to be closed.
        """
        if self._closed or self.loss is not None or self._arrival is not None:
            lease.close()
            return False
        arrival = self._arrival = _Arrival(lease)
        lease.tell(self._bell.ring)
        self._bell.ring()
        await arrival.decided.wait()
        return arrival.is_taken

    # ---- what recovery.py does

    def begin(self) -> None:
        """The unplug is being dealt with."""
        if self.since is None or self._is_new:
            self.since, self._is_new = trio.current_time(), False
        self._is_away = self._is_away or self.tenancy is not None  # also when the lease is exchanged
        self.is_settled = self.is_returning = False

    def settle(self) -> None:
        """It has been dealt with."""
        self.is_settled = True
        self._bell.ring()

    def come_back(self) -> None:
        """Go on with what is there."""
        if self.tenancy is not None:
            assert self._arrival is not None
            self.tenancy.close()
            self.tenancy = Tenancy(self._arrival.lease, self._bell)
        self._is_away = False
        self.is_returning = True
        self.refusal = ""

    def serves(self) -> None:
        """It serves again."""
        self.is_returning = self.is_settled = False
        self.since = None
        self._decide(True)

    def stays_away(self) -> None:
        """What has come is gone again, or it was another device (`refusal`)."""
        self.is_returning = False
        if self.tenancy is not None:
            self._is_away = True
            self.tenancy.fence()
        self._decide(False)

    def give_in(self) -> None:
        """The device is there, but no driver gets on with it."""
        self.is_returning = self.is_settled = False
        self._decide(True)

    def _decide(self, taken: bool) -> None:
        if self._arrival is not None:
            self._arrival.decide(taken)
            self._arrival = None

    def close(self) -> None:
        """The endpoint has ended."""
        self._closed = True
        if self._arrival is not None and (self.tenancy is None or self._arrival.lease is not self.tenancy.lease):
            self._arrival.lease.close()
        self._decide(False)
        if self.tenancy is not None:
            self.tenancy.close()
