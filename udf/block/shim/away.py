"""A driver's word that its device is gone: kept from the clients until somebody who knows has said so too.

An unplug is the supervisor's to tell, from the bus; a filesystem driver that heard of it before would tell its programs
something else than the mount's shim is about to. Owns: the answers that are held, and for how long. Must never: hold
one for longer than `SECONDS`, or ask the driver for anything meanwhile.
Called by: units.py with the driver's answers, the loop when time is up.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from udf.block import wire
from udf.block.shim.phase import Phase

if TYPE_CHECKING:
    from udf.block.shim.request import Request
    from udf.block.shim.units import Unit

SECONDS = 0.9  # programs know of an unplug within a second, whoever tells them


class Away:
    """One unit's, from a driver's word to that of somebody else; the driver's death in between changes nothing."""

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        self._held: list[Request] = []
        self._until = math.inf  # inf: the driver has not said so
        self.holds = False  # it has, and time is not up

    @property
    def is_over(self) -> bool:
        """It has said so, nobody else has in time, and it has not said anything else since."""
        return not self.holds and self._until < math.inf

    def begins(self, now: float) -> None:
        """The driver says that the device is gone."""
        if self._until == math.inf:
            self.holds = True
            self._until = now + SECONDS
            self._unit.service.wake_at(self._until)

    def hold(self, request: Request, now: float) -> bool:
        """Whether this answer is not to be given yet."""
        self.begins(now)
        if not self.holds:
            return False
        request.held = True
        self._held.append(request)
        self._unit.service.counters.held += 1
        return True

    def answered(self) -> None:
        """The driver has done something with the device."""
        if not self.holds:
            self._until = math.inf

    def check(self, now: float) -> None:
        """Give the answers if time is up."""
        if not self.holds or now < self._until:
            if self.holds:
                self._unit.service.wake_at(self._until)
            return
        self.holds = False
        held, self._held = self._held, []
        service = self._unit.service
        for request in held:
            service.answer(request, wire.ESHUTDOWN)
        if service.phase is Phase.VERIFYING:
            service.recovery.gone_again()
        elif service.phase is Phase.REPLAYING:
            service.give_up_all(wire.ESHUTDOWN, self._unit)
        elif service.pumping:
            self._unit.pump()

    def clear(self) -> None:
        """Somebody else has said what follows: what was held is answered, or asked again with everything else."""
        self._held.clear()
        self._until = math.inf
        self.holds = False
