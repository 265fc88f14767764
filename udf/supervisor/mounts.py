"""One mount: a shim and a driver, started together, watched, and ended in order.

Owns: the mount's start and end, and the shim's life, which is the mount's: the shim's end or silence ends it. The
driver's death does not: recovery.py replaces it, and the mount's state tells how that goes.
Must never: touch the mountpoint (paths.py does, in a process of its own), or believe a driver.
Called by: registry.py.
"""

from __future__ import annotations

import logging

import trio

from udf import messages
from udf.errors import UserError
from udf.supervisor import paths, spawn
from udf.supervisor.bell import Bell
from udf.supervisor.child import REAP_TIMEOUT
from udf.supervisor.generation import Generation
from udf.supervisor.hosts import TERM_GRACE
from udf.supervisor.instance import EventLog, Instance, Reason, State
from udf.supervisor.output import printable, sentence
from udf.supervisor.plan import HEARTBEAT, BusyError, MountPlan, StartFailedError
from udf.supervisor.recovery import LAST_WORDS, Recovery, stop_grace
from udf.supervisor.shim import Listeners, Shim
from udf.supervisor.trace import TraceFeed

SHIM_SILENCE = 30  # heartbeats; more patient than with a driver: with the shim the mount goes
UNMOUNT_TIMEOUT = 40.0  # longer than a driver's usual deadline: an unmount writes back first
UNMOUNT_WITHOUT_DRIVER = 5.0  # there is nobody to write back to
MAX_FAULTS = 200  # told of one by one; a driver that finds more ways to misbehave is counted only

log = logging.getLogger("udf.mounts")


class Mount:
    """A mount from its start to GONE."""

    def __init__(self, plan: MountPlan, events: EventLog, reaper: trio.Nursery) -> None:
        self.plan = plan
        self.driver = Instance(plan.name, "driver", events)
        self.shim = Instance(plan.name, "shim", events)
        self.instance = Instance(plan.name, "mount", events, needs=[self.driver, self.shim])
        self.faults = 0
        self.was_started = False  # whether it could ever be used
        self.ended = trio.Event()
        self._reaper = reaper
        self._bell = Bell()
        self._shim = Shim(self.shim, self._bell)
        self.recovery = Recovery(plan, self.instance, self.driver, self._shim, self._bell, self._fault)
        self._shim.listeners = Listeners(
            fault=self._fault,
            failed=self.recovery.broke_contract,
            overdue=self.recovery.overdue,
            poison=self.recovery.poison,
            detached=self._note_detached,
        )
        self.trace = TraceFeed(self._shim.trace)
        self._asked_to_mount = False
        self._stopping: Reason | None = None
        self._unmounting = trio.Lock()

    @property
    def generation(self) -> int:
        """The count of driver processes that the shim was offered."""
        return self.recovery.generation

    @property
    def is_lazy(self) -> bool:
        """Whether it is out of the tree already and only serves what is still open."""
        return self._shim.detached

    @property
    def is_gone(self) -> bool:
        """Whether nothing of it is left."""
        return self.instance.state is State.GONE

    # ---- life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start, report `started` when it can be used, and return when it is GONE. UserError if it cannot start."""
        problem: StartFailedError | None = None
        try:
            async with trio.open_nursery() as nursery:
                try:
                    with trio.move_on_after(self.plan.start_timeout) as limit:
                        problem = await self._start(nursery)
                    if limit.cancelled_caught:
                        problem = self._too_slow()
                    if problem is None:
                        self._activate()
                        self.was_started = True
                        task_status.started()
                        nursery.start_soon(self.recovery.run)
                        nursery.start_soon(self._watch_heartbeats)
                        await self._bell.until(lambda: self._shim.is_over)
                        await self._bell.within(TERM_GRACE, lambda: self._shim.process.over)
                finally:
                    with trio.CancelScope(shield=True):
                        await self._tear_down(problem)
                    nursery.cancel_scope.cancel()
        finally:
            self.trace.close()
            del self._shim.listeners  # they are this mount's own: a circle that would keep it in memory
            self.ended.set()
        if problem is not None:
            try:
                raise problem
            finally:
                del problem  # its traceback holds this frame: a circle that would keep the mount in memory

    async def _start(self, nursery: trio.Nursery) -> StartFailedError | None:
        plan, shim = self.plan, self._shim
        shim_end, driver_end = spawn.link_pair()
        with shim_end, driver_end:
            shim.start(plan, nursery, self._reaper)
            first = self.recovery.start_first(nursery, self._reaper)
            await self.recovery.serve_first(first, driver_end.fileno())
            driver_end.close()  # the driver's end is the driver's alone, so that its death is seen on the other one
            self.driver.note("waiting for ready")
            await self._bell.until(lambda: first.ready is not None or first.cannot_start or shim.has_trouble)
            if first.ready is None:
                await first.hear_last_words(LAST_WORDS)
                return self._could_not_start(first)
            self.driver.note("serving")
            self.shim.note("waiting for the driver's first answer, then mounting")
            self._asked_to_mount = True
            await shim.process.send(plan.mount_message(first.ready), [shim_end.fileno()])
        await self._bell.until(lambda: shim.mounted or shim.has_trouble or first.cannot_start)
        if shim.mounted and not shim.has_trouble:
            return None
        await first.hear_last_words(LAST_WORDS)
        return self._could_not_start(first)

    def _activate(self) -> None:
        self.recovery.first_serves()
        self.shim.change(State.ACTIVE, Reason.READY)
        self.driver.change(State.ACTIVE, Reason.READY)
        self.instance.change(State.ACTIVE, Reason.READY, f"{self.plan.driver_name} on {self.plan.mountpoint}")
        log.info("%s: %s is mounted on %s", self.plan.name, self.plan.driver_name, self.plan.mountpoint)

    def _could_not_start(self, first: Generation) -> StartFailedError:
        name, reason, shim = self.plan.driver_name, Reason.REFUSED, self._shim
        if first.failed is not None:
            sentence = f"the driver {name} did not start: {first.failed}"
        elif first.process.broken is not None:
            sentence, reason = first.process.broken, Reason.CONTRACT
        elif first.is_ended:
            sentence, reason = f"the driver {name} {first.process.how()} before it was ready", Reason.EXITED
        elif shim.failed is not None:
            sentence = shim.failed
            if self.plan.mountpoint not in sentence:
                sentence = f"cannot mount on {self.plan.mountpoint}: {sentence}"
        elif shim.process.broken is not None:
            sentence, reason = shim.process.broken, Reason.CONTRACT
        else:
            sentence = f"cannot mount on {self.plan.mountpoint}: the shim {shim.process.how()}"
            reason = Reason.CRASHED
        return StartFailedError(sentence, self.instance.tree(), reason)

    def _too_slow(self) -> StartFailedError:
        waiting = self.shim.text if self._asked_to_mount else f"the driver is {self.driver.text or 'not started'}"
        sentence = f"{self.plan.name} was not mounted in {self.plan.start_timeout:g} s ({waiting}): see its log lines"
        return StartFailedError(sentence, self.instance.tree(), Reason.TIMEOUT)

    async def _tear_down(self, problem: StartFailedError | None) -> None:
        """End all processes, the shim first, and leave the mountpoint clean. Bounded in time."""
        shim = self._shim.process
        cancelled = problem is None and self.instance.state is State.STARTING
        orderly = self._shim.unmounted
        if not shim.over:
            shim.hang_up()  # it unmounts lazily and exits
            await self._bell.within(TERM_GRACE, lambda: shim.over)
            orderly = orderly or (shim.over and shim.child is not None and shim.child.status == 0)
            await shim.end(TERM_GRACE)
        self._shim.drop_device()  # or programs would wait for ever on a connection that nobody serves
        left = ""
        if self._asked_to_mount and not orderly:
            left = await paths.clean(self.plan.mountpoint, self.plan.shim_as)
        if left:
            log.warning("%s: %s", self.plan.name, left)
        await self.recovery.end()
        shim.abandon()
        if problem is not None:
            word, text = problem.reason, str(problem)
        elif cancelled:
            word, text = Reason.OPERATOR, "given up while it started"
        else:
            word, text = self._why_gone()
        for instance in (self.shim, self.driver, self.instance):
            if instance.can(State.GONE):
                instance.change(State.GONE, word, f"{text} {left}".rstrip())

    def _why_gone(self) -> tuple[Reason, str]:
        shim = self._shim
        if self._stopping is Reason.HUNG:
            return Reason.HUNG, f"the shim gave no sign of life for {SHIM_SILENCE} s and was ended"
        if shim.unmounted:
            if shim.external and self._stopping is None:
                return Reason.EXTERNAL, "unmounted by somebody else"
            cut_off = self.recovery.cut_off
            text = "unmounted, but the driver was ended before it had finished" if cut_off else "unmounted"
            return self._stopping or Reason.EXTERNAL, text
        if self._stopping is not None:
            return self._stopping, "unmounted lazily"
        if shim.process.broken is not None:
            return Reason.CONTRACT, shim.process.broken
        text = f"the shim {shim.process.how()}"
        log.error("%s: %s; %s is unmounted", self.plan.name, text, self.plan.mountpoint)
        return Reason.CRASHED, text

    # ---- watching

    async def _watch_heartbeats(self) -> None:
        shim = self._shim.process
        while not shim.over:
            await trio.sleep(HEARTBEAT)
            shim.silent += 1
            if shim.silent > SHIM_SILENCE and not shim.over:
                log.error("%s: the shim gave no sign of life for %d s and is ended", self.plan.name, SHIM_SILENCE)
                self._stopping = Reason.HUNG
                shim.kill()
                return
            self.recovery.tick()

    def _note_detached(self) -> None:
        self.instance.note("unmounted lazily; files that are open are still served")

    def _fault(self, operation: str, text: str) -> bool:
        """The driver made a mistake and lives on; whether it is one of those that are told of one by one."""
        self.faults += 1
        if self.faults > MAX_FAULTS:
            return False
        operation, text = printable(operation.encode()[:40]), sentence(text)
        self.driver.fault(operation, text)
        log.warning("%s: the driver %s broke in %s: %s", self.plan.name, self.plan.driver_name, operation, text)
        return True

    # ---- what the operator asks

    async def unmount(self, reason: Reason, *, lazy: bool) -> None:
        """Unmount and wait until it is GONE (or, `lazy`, out of the tree). BusyError when files are open."""
        async with self._unmounting:
            shim = self._shim
            if self.is_gone or shim.process.over:
                await self.ended.wait()
                return
            if shim.detached:
                return
            before, was = shim.busy, self._stopping
            self._stopping = reason
            await shim.process.send(messages.Unmount(lazy=lazy))
            limit = UNMOUNT_TIMEOUT if self.instance.state is State.ACTIVE else UNMOUNT_WITHOUT_DRIVER
            done = await self._bell.within(
                limit, lambda: shim.process.over or shim.unmounted or shim.detached or shim.busy > before
            )
            if shim.process.over or shim.unmounted:
                await self.ended.wait()
                return
            if shim.detached:
                return
            self._stopping = was
        if done:
            text = f"{self.plan.mountpoint} is in use: close the files on it, or unmount it lazily"
        elif limit == UNMOUNT_TIMEOUT:
            text = f"{self.plan.mountpoint} was not unmounted within {limit:g} s: it is written back still"
        else:
            text = (
                f"{self.plan.mountpoint} has no driver now and was not unmounted within {limit:g} s: unmount it lazily"
            )
        raise BusyError(self.plan.mountpoint, text)

    async def end(self, reason: Reason) -> None:
        """Make it GONE whatever it takes: hang up on the shim, end the driver."""
        self._stopping = self._stopping or reason
        self._shim.process.hang_up()
        with trio.move_on_after(TERM_GRACE):
            await self.ended.wait()
        self._shim.process.kill()
        with trio.move_on_after(stop_grace(self.plan) + 2 * TERM_GRACE + 2 * REAP_TIMEOUT):
            await self.ended.wait()

    async def restart(self) -> int:
        """A new generation of the driver, with the same open files; its number. UserError if none could be had."""
        if self.instance.state is State.STARTING:
            raise UserError(f"{self.plan.name} is starting: wait until it is mounted")
        return await self.recovery.restart()

    async def counters(self) -> dict[str, int | float]:
        """The shim's counters, or nothing if it does not answer in time."""
        return await self._shim.counters()

    async def requests(self) -> messages.Requests | None:
        """The requests that wait, or None if the shim does not answer in time."""
        return await self._shim.requests()

    async def abort(self, request: int) -> bool:
        """Have one request that waits answered EIO; whether the shim could be told."""
        return await self._shim.abort(request)
