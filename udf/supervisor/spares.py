"""The spare of a mount (`-o spare`): a second host that only lacks the link, so that a recovery need not wait for it.

Owns: the spare until it is taken, and its replacement when it dies, by the same policy as for the driver itself.
Must never: change the mount's state, or let a spare touch the source. Called by: recovery.py.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import trio

from udf.supervisor.bell import Bell
from udf.supervisor.generation import Generation
from udf.supervisor.plan import DriverPlan
from udf.supervisor.restart import Death, Decision, History

REST = 0.05  # seconds after the mount's return to ACTIVE

log = logging.getLogger("udf.mounts")


class Spares:
    """At most one spare."""

    def __init__(self, plan: DriverPlan, bell: Bell) -> None:
        self._plan = plan
        self._bell = bell
        self._spare: Generation | None = None
        self._history = History()
        self._given_up = False

    @property
    def pid(self) -> int | None:
        """The process that stands ready, if there is one."""
        return self._spare.instance.pid if self._spare is not None else None

    def take(self) -> Generation | None:
        """The spare, to be the next generation; another one follows when the mount is ACTIVE again."""
        if self._spare is None or self._spare.cannot_start:
            return None
        taken, self._spare = self._spare, None
        return taken

    def reset(self) -> None:
        """An operator wants it tried again."""
        self._history, self._given_up = History(), False

    async def run(
        self,
        start: Callable[[], Generation],
        discard: Callable[[Generation], None],
        wanted: Callable[[], bool],
        over: Callable[[], bool],
    ) -> None:
        """Keep one ready while it is wanted, until it is over.

        `start` makes a process, `discard` ends one without waiting.
        """
        while True:
            await self._bell.until(lambda: over() or (wanted() and self._spare is None and not self._given_up))
            # Programs that have waited for the driver's return need the CPU first.
            await self._bell.within(REST, over)
            if over():
                return
            if self._spare is not None or not wanted():
                continue
            spare = self._spare = start()
            await spare.prepare()
            await self._bell.until(lambda: over() or self._spare is not spare or spare.cannot_start)  # noqa: B023 - awaited
            if over():
                return
            if self._spare is spare:
                self._spare = None
                decision = self._note_death(spare)
                discard(spare)
                if decision.quarantine:
                    self._given_up = True
                    log.error("%s: its spares died too often; it goes on without one", self._plan.name)
                await self._bell.within(decision.delay, over)

    def _note_death(self, spare: Generation) -> Decision:
        kind, text = spare.cause()
        log.warning("%s: a spare is replaced: %s", self._plan.name, text)
        now = trio.current_time()
        self._history = self._history.after(Death(now, kind, None))
        return self._history.decide(now, random.uniform(-1.0, 1.0))  # noqa: S311 - spreads starts, guards nothing
