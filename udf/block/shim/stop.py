"""The orderly end: what is under way is finished, then what was written is flushed; both are bounded in time.

Owns: how far a stop is. Must never: end anything itself (the loop does), or wait.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from udf.block.shim.phase import Phase

if TYPE_CHECKING:
    from udf.block.shim.service import Service

_PATIENCE = 10.0  # seconds for what is under way, and as many for the flush


class Stop:
    """A stop that has begun: no client is read any more."""

    def __init__(self, service: Service, now: float) -> None:
        self._s = service
        self._until = now + _PATIENCE
        self._flushing = False
        service.stopping = True
        service.touched.update(service.clients)

    def is_done(self, now: float) -> bool:
        """Whether everything is answered and flushed, or the time for it is over."""
        s = self._s
        s.touched.update(s.clients)
        if not self._flushing:
            # Without a driver nothing gets on, and there will be no other; nor will the device come back in time.
            waits = s.phase in (Phase.SERVING, Phase.GREETING, Phase.REPLAYING) and not s.recovery.is_unverified
            if self._is_under_way and waits and now < self._until:
                return False
            self._flushing = True
            self._until = now + _PATIENCE
            # Not while some of it is still to be written again: a flush would cover what is not there.
            for unit in s.units if s.pumping else ():
                unit.flush_kept()
                if unit.connection is not None:
                    s.touched.add(unit.connection)
        unsafe = [unit for unit in s.units if len(unit.kept)]
        if any(unit.flushing for unit in unsafe) and now < self._until:
            return False
        for unit in unsafe:
            print(f"udf-block-shim: {unit.label}: what was written is perhaps not all on the device", file=sys.stderr)
        return True

    @property
    def _is_under_way(self) -> bool:
        s = self._s
        return any(client.out.queued for client in s.clients) or any(
            request.client is not None and not request.client.is_receiving(request) for request in s.requests.values()
        )
