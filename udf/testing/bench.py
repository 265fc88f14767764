"""One mount with a real shim and a real driver host, whose driver can be made to die over a certain request.

Plays the supervisor: it starts shim and hosts as the supervisor does, keeps the state store, and after a death gives
the shim the next generation. Unlike the supervisor it has the link pass through a relay, so that it sees each request,
and it has the next process stand by all the time, because it knows that it will be needed.

Owns: the processes of one mount and their end. Must never: touch the mount (the program does), or judge what is seen
there (matrix.py does). Called by: matrix.py.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress

import trio

from udf import messages
from udf.driver.memory import create_memfds
from udf.errors import UserError
from udf.fuse.mount import MountError, clean_stale
from udf.supervisor import spawn
from udf.supervisor.bell import Bell
from udf.supervisor.front import LinkEnd
from udf.supervisor.generation import Generation
from udf.supervisor.instance import EventLog, Instance
from udf.supervisor.plan import MountPlan
from udf.supervisor.shim import Listeners, MountShim
from udf.supervisor.succession import LINK_GRACE, stop_grace
from udf.testing.program import Program
from udf.testing.relay import Relay
from udf.testing.steps import Record, Target
from udf.testing.watch import BenchFailedError, Watch
from udf.window import create_window

_MOST_DEATHS = 3  # of the driver's own making, one after the other: then the mount is given up
_END = 5.0  # seconds for the shim to end


class Bench:
    """One mount. Use `mounted`."""

    def __init__(self, plan: MountPlan, nursery: trio.Nursery, reaper: trio.Nursery) -> None:
        self.plan = plan
        self.program = Program()
        self.remarks: list[str] = []  # what went wrong besides the deaths that were wanted
        self.mountpoint = plan.mountpoint
        self.names: set[str] = set()  # at the root, as they should be
        self._nursery = nursery
        self._reaper = reaper
        self._bell = Bell()
        self._shim = MountShim(Instance(plan.name, "shim", EventLog()), self._bell, plan.shim_as, plan.driver.window)
        self._store = create_memfds(plan.name) if plan.durability == "store" else []
        self._serving: Generation | None = None
        self._next: Generation | None = None
        self._number = 0  # of the generation
        self._failed = ""  # why the mount does not go on
        self._watch = Watch(self)
        self._counted = 0  # deaths of the driver's own making since the last operation that came back
        self._is_ending = False

    # ---- what the matrix does with it

    async def do(self, call: str, *args: object) -> tuple[str, object]:
        """Have the program do one operation."""
        answer = await self.program.do(call, *args)
        self._counted = 0
        return answer

    @property
    def is_traced(self) -> bool:
        """Whether it does so already."""
        return self._watch.is_traced

    async def trace(self) -> None:
        """Count the points of each step from now on, until the mount's end."""
        await self._watch.trace()

    def record(self, section: str, record: Record) -> None:
        """Note the steps of a section from now on."""
        self._watch.record(section, record)

    def aim(self, target: Target) -> None:
        """Have the driver die over this request. Steps are counted from now."""
        self._watch.aim(target)

    def rest(self) -> None:
        """Count and kill no more."""
        self._watch.rest()

    def at(self, operation: int) -> None:
        """This operation of the section is about to be done."""
        self._watch.operation = operation

    async def quiet(self) -> None:
        """Wait until the driver is asked nothing: what came before, and what the shim asks at its start, is over."""
        watch = self._watch
        while True:
            seen = watch.seen
            for _ in range(2):  # what it had received before the first question is dealt with before the second
                await self._shim.counters()
            await self.settle()
            if watch.seen == seen and not watch.waiting:
                return

    async def settle(self) -> None:
        """Have the relay take what the shim has sent it by now."""
        for _ in range(3):  # one turn of the loop sees that there is something, the next one takes it
            await trio.lowlevel.checkpoint()

    @property
    def hit(self) -> bool:
        """Whether the driver died where it was to die."""
        return self._watch.hit

    async def ready(self) -> None:
        """Wait until a driver serves (again). BenchFailedError if that will not be."""
        await self._bell.until(lambda: bool(self._failed) or (self._is_well() and not self._watch.killed))
        if self._failed:
            raise BenchFailedError(self._failed)

    async def waiting(self) -> list[str]:
        """What waits in the shim, for a sentence on a hang."""
        answer = await self._shim.requests()
        return [f"{one.op} {one.path}" for one in answer.requests] if answer else []

    # ---- its life

    async def start(self) -> None:
        """Mount. UserError in one sentence if that cannot be done."""
        shim = self._shim
        shim.listeners = Listeners(
            fault=self._fault,
            failed=self._give_up,
            overdue=lambda op, age: self._kill_as_hung(f"{op} was not answered for {age:.0f} s"),
            poison=lambda op, path: self.remarks.append(f"{op} {path} was given up as poison"),
            detached=lambda: None,
        )
        first = self._serving = self._new()
        shim.start(self._nursery, self._reaper)
        shim_end = await self._connect(first)
        with closing(shim_end):
            with trio.move_on_after(self.plan.start_timeout):
                await self._bell.until(lambda: first.ready is not None or first.cannot_start or shim.has_trouble)
            if first.ready is None:
                raise UserError(first.cause()[1])
            await shim.process.send(self.plan.mount_message(first.ready), shim_end.descriptors)
        with trio.move_on_after(self.plan.start_timeout):
            await self._bell.until(lambda: shim.is_up or shim.has_trouble or first.cannot_start)
        if not shim.is_up:
            raise UserError(shim.failed or first.cause()[1])
        self._number = 1
        first.serves(1)
        self._nursery.start_soon(self._recover)
        await self._stand_by()

    def _new(self) -> Generation:
        generation = Generation(self.plan, self._bell, self._fault)
        generation.start(self._nursery, self._reaper)
        return generation

    async def _stand_by(self) -> None:
        self._next = self._new()
        await self._next.prepare()

    async def _connect(self, generation: Generation) -> LinkEnd:
        """Have it serve over a link through the relay; the shim's end of that."""
        shim_end, relay_shim = spawn.link_pair()
        relay_driver, driver_end = spawn.link_pair()
        ends = LinkEnd(shim_end), LinkEnd(driver_end)
        if self.plan.driver.window:
            window = create_window(self.plan.name, self.plan.driver.window)
            ends = LinkEnd(shim_end, window), LinkEnd(driver_end, os.dup(window))
        self._watch.waiting.clear()
        with closing(ends[1]):
            self._watch.link = os.fstat(driver_end.fileno()).st_ino
            await generation.serve(*ends[1].descriptors, *self._store)
        self._nursery.start_soon(Relay(relay_shim, relay_driver, self._watch).run)
        return ends[0]

    def _is_well(self) -> bool:
        return self._serving is not None and not self._serving.is_lost and self._shim.linked

    async def _recover(self) -> None:
        while True:
            await self._bell.until(lambda: self._is_ending or not self._is_well() or self._shim.is_over)
            if self._is_ending:
                return
            if self._shim.is_over:
                self._give_up(f"the shim {self._shim.process.how()}")
                return
            old, self._serving = self._serving, None
            try:
                if old is not None:
                    await self._bury(old)
                await self._replace()
            except BenchFailedError as error:
                self._give_up(str(error))
                await self._shim.process.send(messages.Fail(text=self._failed))
                return

    async def _bury(self, old: Generation) -> None:
        """Make certain of a death, and note it if nobody wanted it."""
        wanted = self._watch.killed
        if not wanted:
            await self._bell.within(LINK_GRACE, lambda: old.is_ended)
            await old.hear_last_words(0.2)
            self.remarks.append(f"by itself {old.cause()[1]}")
            self._counted += 1
            if self._counted > _MOST_DEATHS:
                raise BenchFailedError("the driver dies again and again")
        await self._watch.traced()
        old.kill()
        if not await old.end(0):
            raise BenchFailedError("the driver could not be ended")
        # Only now: what it had answered counts, before anything is asked again.
        if not await self._bell.within(_END, lambda: not self._shim.linked):
            raise BenchFailedError("the shim does not see the end of its link")

    async def _replace(self) -> None:
        shim, new = self._shim, self._next or self._new()
        self._next = None
        shim_end = await self._connect(new)
        with closing(shim_end):
            limit = self.plan.start_timeout
            if not await self._bell.within(limit, lambda: new.ready is not None or new.cannot_start):
                raise BenchFailedError(f"the next driver was not ready within {limit:g} s")
            if new.ready is None:
                raise BenchFailedError(f"the next generation cannot serve: {new.cause()[1]}")
            self._number += 1
            counted, self._watch.killed = not self._watch.killed, False
            await shim.attach(self._number, counted=counted, link=shim_end.descriptors)
        await self._bell.within(limit, lambda: shim.answer is not None or not shim.linked or new.is_lost)
        if isinstance(shim.answer, messages.Refused):
            raise BenchFailedError(f"the mount cannot go on with the next driver: {shim.answer.error}")
        self._serving = new
        new.serves(self._number)
        await self._stand_by()
        self._bell.ring()

    def kill(self) -> None:
        """End the driver, now."""
        if self._serving is not None:
            self._serving.kill()

    @property
    def driver_pid(self) -> int:
        """The process of the driver that serves."""
        pid = self._serving.instance.pid if self._serving is not None else None
        if pid is None:
            raise BenchFailedError("no driver serves")
        return pid

    def _fault(self, operation: str, text: str) -> bool:
        self.remarks.append(f"the driver broke in {operation}: {text}")
        return False

    def _kill_as_hung(self, text: str) -> None:
        self.remarks.append(f"the driver hung: {text}")
        self.kill()

    def _give_up(self, why: str) -> None:
        if not self._failed:
            self._failed = why
            self._bell.ring()

    async def end(self, *, orderly: bool) -> None:
        """Unmount and end everything. What an operation that hangs waits for is given up first."""
        shim = self._shim
        if orderly and not self._failed:
            await self.program.end()
            orderly = await self._unmount()
        self._is_ending = True
        self._bell.ring()
        if not shim.process.over:
            shim.process.hang_up()
            await self._bell.within(_END, lambda: shim.process.over)
            await shim.process.end(0)
        shim.drop_device()
        await self.program.end()
        with suppress(MountError):
            clean_stale(self.mountpoint)
        if self._serving is not None and orderly:
            await self._serving.stop(stop_grace(self.plan))
        for generation in filter(None, (self._serving, self._next)):
            generation.kill()
            await self._watch.traced()
            await generation.end(0)
        for fd in self._store:
            os.close(fd)

    async def _unmount(self) -> bool:
        """Whether it could be unmounted; the kernel may still be closing what the program had open."""
        shim = self._shim
        with trio.move_on_after(_END):
            while not (shim.unmounted or shim.process.over):
                before = shim.busy
                await shim.process.send(messages.Unmount())
                await self._bell.until(lambda: shim.unmounted or shim.process.over or shim.busy > before)  # noqa: B023
                if shim.busy > before:
                    await trio.sleep(0.01)
        return shim.unmounted


@asynccontextmanager
async def mounted(plan: MountPlan, reaper: trio.Nursery) -> AsyncIterator[Bench]:
    """A mount as long as the context lasts. What is left of its processes belongs to `reaper`."""
    async with trio.open_nursery() as nursery:
        bench = Bench(plan, nursery, reaper)
        orderly = False
        try:
            await bench.start()
            yield bench
            orderly = True
        finally:
            with trio.CancelScope(shield=True):
                await bench.end(orderly=orderly)
            nursery.cancel_scope.cancel()
