"""The host processes of one endpoint: the one that serves, the next, the spare, and those whose end is awaited.

Owns: their starts and their certain ends, and the state store's memfds, which outlive each of them.
Must never: decide when a driver is replaced, or tell one to serve (recovery.py does both). Called by: recovery.py.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import trio

from udf.driver.memory import create_memfds
from udf.supervisor.bell import Bell
from udf.supervisor.generation import Generation
from udf.supervisor.plan import DriverPlan
from udf.supervisor.spares import Spares

TERM_GRACE = 2.0  # after SIGTERM

log = logging.getLogger("udf.mounts")


class Hosts:
    """Every process that is, was or may become the endpoint's driver."""

    def __init__(self, plan: DriverPlan, bell: Bell, on_fault: Callable[[str, str], bool]) -> None:
        self.store: list[int] = []  # the memfds of the state store, for each generation
        self.alive: list[Generation] = []  # all whose end is not certain
        self.stuck: list[Generation] = []  # those of them that served and cannot be ended
        self.spares = Spares(plan, bell)
        self.lease = plan.lease  # of the device, as it is plugged in now
        self._plan = plan
        self._bell = bell
        self._on_fault = on_fault
        self._next: Generation | None = None  # started, not told anything yet
        self._nursery: trio.Nursery | None = None
        self._reaper: trio.Nursery | None = None

    def open(self, nursery: trio.Nursery, reaper: trio.Nursery) -> None:
        """Begin. `nursery` ends with the endpoint, `reaper` outlives it."""
        self._nursery, self._reaper = nursery, reaper
        if self._plan.durability == "store":
            self.store = create_memfds(self._plan.name)

    def new(self) -> Generation:
        """Start a process; it waits for its orders."""
        assert self._reaper is not None
        generation = Generation(self._plan, self._bell, self._on_fault, self.lease)
        generation.start(self.nursery, self._reaper)
        self.alive.append(generation)
        return generation

    @property
    def nursery(self) -> trio.Nursery:
        """For tasks that end with the endpoint."""
        assert self._nursery is not None
        return self._nursery

    def prestart(self) -> None:
        """Have a process for the next generation: its start may overlap with the end of the one before."""
        if self._next is None:
            self._next = self.spares.take() or self.new()

    def take(self) -> Generation:
        """The process for the next generation."""
        if self._next is not None and self._next.is_lost:
            self.drop_next()
        taken, self._next = self._next or self.spares.take() or self.new(), None
        return taken

    def drop_next(self) -> None:
        """There will be no next generation for now."""
        if self._next is not None:
            self.discard(self._next)
            self._next = None

    def drop_all_of_old_device(self) -> None:
        """The device is another arrival now: what was started ahead knows the one before."""
        self.drop_next()
        spare = self.spares.take()
        if spare is not None:
            self.discard(spare)

    def discard(self, generation: Generation) -> None:
        """End one that has served nothing and will not; nobody waits for it."""
        self.nursery.start_soon(self._end, generation, 0)

    def keep_spare(self, wanted: Callable[[], bool], over: Callable[[], bool]) -> None:
        """From now on have a spare while it is wanted."""
        self.nursery.start_soon(self.spares.run, self.new, self.discard, wanted, over)

    async def bury(self, generation: Generation, grace: float) -> bool:
        """End one that has served; whether it is gone for certain. If not, it is stuck."""
        if grace == 0:
            generation.kill()
        if not await self._end(generation, grace):
            if generation not in self.stuck:
                self.stuck.append(generation)
            return False
        return True

    async def bury_told(self) -> bool:
        """End all that may have touched the source, at once; whether they are gone for certain."""
        told = [generation for generation in self.alive if generation.was_told]
        for generation in told:
            generation.kill()
        async with trio.open_nursery() as nursery:
            for generation in told:
                nursery.start_soon(self.bury, generation, 0)
        return not self.stuck

    async def bury_stuck(self) -> bool:
        """Try again with those that are stuck; whether none is left."""
        for generation in list(self.stuck):
            await self.bury(generation, 0)
        return not self.stuck

    async def end_all(self, orderly: Generation | None, grace: float) -> bool:
        """End every process, one of them in order; whether that one did so in time. Bounded in time."""
        for generation in self.alive:
            if generation is not orderly:
                generation.kill()
        in_time = orderly is None or await orderly.stop(grace)
        async with trio.open_nursery() as nursery:
            for generation in list(self.alive):
                nursery.start_soon(self._end, generation, TERM_GRACE)
        for generation in self.alive:
            pid = generation.instance.pid
            log.error("%s: process %s of the driver cannot be ended; it waits in the kernel", self._plan.name, pid)
            generation.process.abandon()
        for fd in self.store:
            os.close(fd)
        self.store.clear()
        self._on_fault = _nobody  # it is the endpoint's own: a circle that would keep it in memory
        return in_time

    async def _end(self, generation: Generation, grace: float) -> bool:
        if not await generation.end(grace):
            return False
        for generations in (self.alive, self.stuck):
            if generation in generations:
                generations.remove(generation)
        return True


def _nobody(_operation: str, _text: str) -> bool:
    return False
