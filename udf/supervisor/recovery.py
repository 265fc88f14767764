"""The generations of one endpoint's driver: the first one, and a new one for each that is lost.

Owns: which process is the driver, its certain end before another one may touch the source or the device, and the
endpoint's states RECOVERING, ACTIVE, DETACHED and FAILED after its start.
Must never: let two generations serve at once, wait for a driver without a bound, start one when the endpoint ends, or
know what is served (front.py says what it has to know).
Called by: endpoint.py.

The order of a recovery, of which each step waits for the one before: the old host is dead for certain → its connection
to the device is shut down → the policy lets a new one start (its process may stand already, but it has no link and has
touched nothing) → it has a connection of its own, and says READY → the front has said that the old link is drained →
`attach` → `attached`. A device that is gone ends this at any point: see `_leave`, and `_come_back` for its return.

A little over 400 lines: each step is a few lines, and their order is what there is to read.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from functools import partial

import trio

from udf import messages
from udf.errors import DeviceGone, UdfError, UserError
from udf.supervisor import crashes
from udf.supervisor.absence import UNPLUGGED, Absence, Waiter
from udf.supervisor.bell import Bell
from udf.supervisor.crashes import CrashLog
from udf.supervisor.front import Front
from udf.supervisor.generation import Generation
from udf.supervisor.hosts import TERM_GRACE, Hosts
from udf.supervisor.instance import Instance, Reason, State
from udf.supervisor.output import sentence
from udf.supervisor.plan import DriverPlan
from udf.supervisor.restart import Death, Decision, History, Kind

HOST_SILENCE = 10  # heartbeats; counted in our own ticks, so that our own sleep is never taken for a driver's
LINK_GRACE = 2.0  # between the end of a process and the end of its link, whichever is seen first
LAST_WORDS = 0.2  # after a death of its own making, for what it printed
STOP_GRACE = 5.0  # for the host to end after `stop`
UNPLUG_GRACE = 0.2  # for a driver to see that its device is gone, before it is ended
BURY_GRACE = 0.5  # after an unplug; who is not dead by then is not waited for
CUT_GRACE = 0.05  # between the end of a connection and the bus's word that the device is gone

log = logging.getLogger("udf.mounts")
_NOTHING_LOST = messages.LinkLost()


class Recovery:
    """The driver of one endpoint, whatever process that is."""

    def __init__(
        self,
        plan: DriverPlan,
        endpoint: Instance,
        driver: Instance,
        front: Front,
        bell: Bell,
        on_fault: Callable[[str, str], bool],
        waiter: Waiter,
    ) -> None:
        self.generation = 0  # the last one that the front was offered
        self.crashes = CrashLog()
        self.cut_off = False  # the last driver had to be ended by a signal
        self._plan = plan
        self._endpoint = endpoint
        self._driver = driver
        self._front = front
        self._bell = bell
        self._hosts = Hosts(plan, bell, on_fault)
        self._history = History()
        self._serving: Generation | None = None  # none between two generations, and after the last
        self._trying: Generation | None = None  # on its way to serve
        self._counted = True  # whether the last death of one that served was its own making
        self._restart_asked = False
        self._failures = 0  # starts that failed
        self._is_ending = False
        self.absence = Absence(bell, plan.lease)
        self._waiter: Waiter | None = waiter

    # ---- the first generation

    def start_first(self, nursery: trio.Nursery, reaper: trio.Nursery) -> Generation:
        """Start the process of the first generation; the endpoint's start decides what its failure means."""
        self._hosts.open(nursery, reaper)
        self._serving = self._hosts.new()
        self._show(self._serving)
        return self._serving

    async def serve(self, generation: Generation, link: int) -> None:
        """Give it all that it needs, with a connection of its own to the device, and tell it to serve."""
        device: list[int] = []
        tenancy = self.absence.tenancy
        if tenancy is not None:
            try:
                device.append(await tenancy.open(self._hosts.nursery))
            except DeviceGone:
                self._bell.ring()  # it is not the generation's failure, and it is not told to serve
                return
            except (OSError, UdfError) as exc:
                text = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
                generation.condemn(Kind.REFUSED, f"the device cannot be opened: {sentence(text)}")
                return
        await generation.serve(link, *device, *self._hosts.store)

    def first_serves(self) -> None:
        """The endpoint can be used."""
        assert self._serving is not None
        self.generation = 1
        self._serving.serves(1)

    # ---- what others see

    @property
    def restarts_left(self) -> int:
        """So many deaths of its own making are followed by a new generation, if they came now."""
        return self._history.restarts_left(trio.current_time())

    @property
    def spare_pid(self) -> int | None:
        """The process that stands ready, if there is one."""
        return self._hosts.spares.pid

    @property
    def is_unplugged(self) -> bool:
        """Whether the device is gone, its own or that of what it depends on."""
        return self.absence.is_unplugged

    async def find_device(self) -> None:
        """A start has failed: find out whether the device is gone, which its end may have been quicker to tell."""
        tenancy = self.absence.tenancy
        if tenancy is None:
            return
        await self._bell.within(CUT_GRACE, lambda: self.is_unplugged or tenancy.is_cut)
        if tenancy.is_cut and not self.is_unplugged:
            await tenancy.ask()

    def eject(self) -> None:
        """An operator takes the device out: the driver is told so at its end."""
        if self._serving is not None:
            self._serving.ejects = True

    def tick(self) -> None:
        """A heartbeat is due from the driver that serves: silence and a loop that stands still are a hang."""
        serving = self._serving
        if serving is None or self._endpoint.state is not State.ACTIVE:
            return
        serving.tick()
        if serving.process.silent > HOST_SILENCE:
            serving.condemn(Kind.HUNG, f"the driver gave no sign of life for {HOST_SILENCE} s")
        elif serving.loop_age > max(self._plan.deadline, HOST_SILENCE):
            serving.condemn(Kind.HUNG, f"the driver's loop has not turned for {serving.loop_age:.0f} s")

    def overdue(self, operation: str, age: float) -> None:
        """A request has passed its deadline."""
        driver = self._serving or self._trying  # it may be serving before we have heard so
        if driver is not None:
            driver.condemn(Kind.HUNG, f"the driver has not answered {operation} for {age:.0f} s")

    def broke_contract(self, text: str) -> None:
        """The shim has given the driver up."""
        if self._serving is not None:
            self._serving.condemn(Kind.CONTRACT, text)

    def poison(self, operation: str, path: str) -> None:
        """A request was answered EIO because drivers died at it."""
        what = f"{operation} {path}".rstrip()
        self.crashes.add_poison(what)
        self._endpoint.tell("poison", operation, f"{what} was given up: the driver died at it each time")
        log.warning("%s: %s was given up, because the driver died at it each time", self._plan.name, what)

    def expect_device(self) -> None:
        """The device is there again, and will be ours in a moment if it is the same."""
        if self.absence.is_settled and not self._is_final():
            self._hosts.prestart()

    # ---- the loop

    async def run(self) -> None:
        """Replace each driver that is lost, until the endpoint ends or its device is gone."""
        if self._plan.options.spare:
            self._hosts.keep_spare(lambda: self._endpoint.state is State.ACTIVE, self._is_final)
        while True:
            await self._bell.until(lambda: self._over() or self._restart_asked or self._is_lost())
            if not self._restart_asked and not self._over():
                await self._hear_both_ends()
            if not self._over():
                await self._replace()
            while self.is_unplugged and not self._is_final():
                await self._leave()
            if self._over():
                return

    def _over(self) -> bool:
        """Whether what is being done has no purpose any more."""
        return self._is_final() or self.is_unplugged

    def _is_final(self) -> bool:
        """Whether there will be no other driver."""
        return self._is_ending or self._front.is_over or self.absence.is_lost

    async def _unless_over(self, act: Callable[[], Awaitable[bool]]) -> bool:
        """What it comes to; False as soon as it has no purpose any more."""
        result = False

        async def run(scope: trio.CancelScope) -> None:
            nonlocal result
            result = await act()
            scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, nursery.cancel_scope)
            await self._bell.until(self._over)
            nursery.cancel_scope.cancel()
        return result

    def _is_lost(self) -> bool:
        return self._serving is not None and (self._serving.is_lost or not self._front.linked or self._is_cut)

    @property
    def _is_cut(self) -> bool:
        return self.absence.tenancy is not None and self.absence.tenancy.is_cut

    async def _hear_both_ends(self) -> None:
        """A death shows twice, at the process and at the link. The end of the mount itself may show as the first.

        With a device it may show three times, and the end of the connection may be that of the device.
        """
        serving = self._serving
        assert serving is not None
        if self.absence.tenancy is not None and self._is_cut:
            # A driver that ends itself because its device is gone may be quicker than the bus, and has not failed.
            if not await self._bell.within(CUT_GRACE, self._over):
                await self.absence.tenancy.ask()
            if self._over():
                return
            serving.condemn(Kind.EXTERNAL, "the connection to the device ended")
        if serving.is_ended:
            self._front.driver_ended()
        if serving.is_ended or not serving.is_lost:
            await self._bell.within(
                LINK_GRACE,
                lambda: (
                    self._over()
                    or (serving.is_ended and not self._front.linked)
                    or (serving.is_lost and not serving.is_ended)
                ),
            )
        if not serving.is_lost:
            serving.condemn(Kind.CONTRACT, "the driver closed its link and did not end")

    async def _replace(self) -> None:
        """From the loss of a driver (or an operator's wish) to the next one that serves, or to FAILED."""
        begun = trio.current_time()
        old, self._serving = self._serving, None
        asked, self._restart_asked = self._restart_asked, False
        decision = Decision()
        if asked:
            self._history = History()
            self._enter(State.RECOVERING, Reason.OPERATOR, "restarted by an operator")
        if old is not None and asked and not old.is_lost:
            self._prestart()
            if not await self._unless_over(partial(old.stop, stop_grace(self._plan))) and not self._over():
                log.warning("%s: the driver did not end when it was told to and is ended", self._plan.name)
            old.condemn(Kind.OPERATOR, "the driver was restarted by an operator")
            if not await self._is_gone(old, TERM_GRACE):
                return
            self._counted = False
        elif old is not None:
            await old.hear_last_words(LAST_WORDS)
            kind, text = old.cause()
            self._enter(State.RECOVERING, Reason(kind), text)
            self._prestart()
            if not await self._is_gone(old, 0):
                return
            self._counted = kind.is_counted
            await self._bell.within(LINK_GRACE, lambda: self._over() or not self._front.linked)
            decision = self._note_death(old, kind, text)
        await self._bring_back(begun, decision)
        if self.absence.refusal:  # by an operator's restart after a return that came to nothing
            self.absence.lose(Reason.CHANGED, self.absence.refusal)

    async def _bring_back(self, begun: float, decision: Decision) -> None:
        """Start generation after generation as the policy says, until one serves or it says stop."""
        while not self._over():
            if decision.quarantine:
                text = f"{self._endpoint.text}; it died too often and is not started again: see `udf crashes`"
                await self._give_up(Reason.QUARANTINE, text)
                return
            if decision.delay:
                self._driver.note(f"it is started again in {decision.delay:.1f} s")
                await self._bell.within(decision.delay, lambda: self._over() or self._restart_asked)
                if self._over():
                    return
            if self._restart_asked:
                self._restart_asked, self._history = False, History()
            generation = self._trying = self._hosts.take()
            attached = await self._try(generation)
            if self._over():
                return  # who comes next ends it
            self._trying = None
            if attached is not None:
                self._serves(generation, attached, begun)
                return
            await generation.hear_last_words(LAST_WORDS)
            await self.find_device()  # its start may have failed because the device is gone
            if self._over():
                return
            kind, text = generation.cause()
            if not await self._is_gone(generation, 0) or self.absence.refusal:
                return
            decision = self._note_death(generation, kind, text)
            self._failures += 1
            self._bell.ring()

    async def _try(self, generation: Generation) -> messages.Attached | None:
        """Have it serve and the front take it. None: it did not come to that, and it is or must be ended."""
        self._show(generation)
        self._driver.note("waiting for ready")
        our_end, driver_end = self._front.link()
        with closing(our_end), closing(driver_end):
            await self.serve(generation, driver_end.fileno())
            driver_end.close()
            if not await self._bell.within(
                self._plan.start_timeout,
                lambda: generation.ready is not None or generation.cannot_start or self._over(),
            ):
                generation.condemn(Kind.HUNG, f"the driver was not ready within {self._plan.start_timeout:g} s")
            # Only now: what the old generation had answered counts before anything is asked again.
            await self._bell.until(lambda: not self._front.linked or generation.cannot_start or self._over())
            if generation.cannot_start or self._over():
                return None
            self.generation += 1
            generation.number = self.generation
            self._driver.note("waiting for its front to take it")
            await self._front.attach(self.generation, counted=self._counted, link=our_end.fileno())
        return await self._answer_of_front(generation)

    async def _answer_of_front(self, generation: Generation) -> messages.Attached | None:
        front, limit = self._front, self._plan.start_timeout + LINK_GRACE

        def answered() -> bool:
            return self._over() or (front.answer is not None and front.answer.generation == generation.number)

        if not await self._bell.within(limit, lambda: answered() or not front.linked or generation.is_lost):
            generation.condemn(Kind.HUNG, f"the driver did not answer INIT within {limit:g} s")
        if self._over():
            return None
        if isinstance(front.answer, messages.Attached) and answered():
            return front.answer  # should it be dead by now, that is the death of one that served
        # The end of a process closes its link, so what looks like a breach may be a death that shows in a moment.
        error = "it closed its link"
        if isinstance(front.answer, messages.Refused):
            error = front.answer.error
            if front.answer.changed:
                self.absence.refusal = sentence(error)
        if not self.absence.refusal:
            await self._bell.within(LAST_WORDS, lambda: generation.is_lost or self._over())
        generation.condemn(Kind.CONTRACT, f"the {self._endpoint.kind} cannot go on with this driver: {sentence(error)}")
        # The front must have let go of this link before it is offered another one.
        generation.kill()
        await self._bell.until(lambda: answered() or not front.linked)
        return front.answer if isinstance(front.answer, messages.Attached) and not self._over() else None

    def _serves(self, generation: Generation, attached: messages.Attached, begun: float) -> None:
        generation.serves(attached.generation)
        self._serving, self._restart_asked = generation, False
        reason, since = Reason.READY, self.absence.since
        pause = (trio.current_time() - (begun if since is None else since)) * 1000
        text = f"generation {attached.generation} after {pause:.1f} ms"
        if attached.replayed or attached.parked:
            text += f"; requests asked again: {attached.replayed}, that had waited: {attached.parked}"
        if since is not None:
            reason = Reason.REATTACHED
            text = f"the device was plugged in again after {pause / 1000:.1f} s, and all goes on ({text})"
            self.absence.serves()
        self._driver.change(State.ACTIVE, reason)
        self._endpoint.change(
            State.ACTIVE,
            reason,
            text,
            pause_ms=pause,
            generation=attached.generation,
            replayed=attached.replayed,
            parked=attached.parked,
        )
        log.info("%s: %s", self._plan.name, text)
        if reason is Reason.REATTACHED and self._waiter is not None:
            self._waiter.recall_dependants()
        self._bell.ring()

    # ---- ends

    async def _is_gone(self, generation: Generation, grace: float) -> bool:
        """End it for certain. If that is not to be had the endpoint is FAILED: there is never a second writer."""
        if await self._unless_over(partial(self._hosts.bury, generation, grace)):
            if self.absence.tenancy is not None:
                self.absence.tenancy.fence()
            self._front.driver_ended()
            return True
        if not self._over():
            pid = generation.instance.pid
            text = f"process {pid} of the driver waits in the kernel and cannot be ended, so no other may serve"
            log.error("%s: %s", self._plan.name, text)
            await self._give_up(Reason.STUCK, text)
        return False

    def _note_death(self, generation: Generation, kind: Kind, text: str) -> Decision:
        """Report a certain death and ask the policy what follows."""
        now = trio.current_time()
        self._history = self._history.after(Death(now, kind, generation.served))
        lost = self._front.lost if generation.served is not None else None
        report = self.crashes.add(time.time(), generation, kind, text, lost or _NOTHING_LOST)
        self._hosts.nursery.start_soon(self._read_out, generation, report)
        self._driver.tell(
            "death",
            "counted" if kind.is_counted else "external",
            text,
            generation=generation.number,
            served=generation.served or 0.0,
            restarts_left=self.restarts_left,
        )
        log.log(logging.ERROR if kind.is_counted else logging.INFO, "%s: %s", self._plan.name, text)
        if self._endpoint.state is State.RECOVERING:
            self._endpoint.note(text)
        return self._history.decide(now, random.uniform(-1.0, 1.0))  # noqa: S311 - spreads starts, guards nothing

    async def _read_out(self, generation: Generation, report: crashes.CrashReport) -> None:
        await self._bell.until(lambda: generation.process.over)
        crashes.fill_output(report, generation.process.last_lines)

    async def _give_up(self, reason: Reason, text: str) -> None:
        """No new generation until an operator asks: what is not cached fails at once."""
        self._hosts.drop_next()
        if self._over():
            return
        self._enter(State.FAILED, reason, text)
        await self._front.fail(text)
        self._bell.ring()

    def _enter(self, state: State, reason: Reason, text: str) -> None:
        for instance in (self._driver, self._endpoint):
            if instance.state is not state:
                instance.change(state, reason, text)

    def _prestart(self) -> None:
        if not self._over():
            self._hosts.prestart()

    def _show(self, generation: Generation) -> None:
        """The endpoint's driver instance shows this process from now on."""
        self._driver.process = generation.instance

    # ---- the device is gone, and comes back

    async def _leave(self) -> None:
        """Programs are told first, then the driver ends; then the device is waited for, or given up.

        It returns when it serves again, when nothing is waited for any more, and when the device is gone once more.
        """
        absence, waiter = self.absence, self._waiter
        assert waiter is not None
        absence.begin()
        if self._endpoint.state is State.FAILED:
            self._history = History()  # who plugs it in again wants it tried again
        self._enter_detached(_unplugged(absence, waiter))
        await waiter.tell_dependants()
        wait, max_stale = waiter.patience()
        await self._front.detach(UNPLUGGED, wait=wait, max_stale=max_stale)
        await self._end_driver()
        absence.settle()
        while not self._is_final():
            until = waiter.waits_until()
            if absence.may_come_back:
                await self._come_back()
                if not absence.refusal:
                    return
            elif until <= trio.current_time():
                absence.lose(*waiter.why_given_up())
            else:
                await self._bell.within(until - trio.current_time(), self._something_else_than(until))

    def _something_else_than(self, until: float) -> Callable[[], bool]:
        waiter, absence = self._waiter, self.absence
        assert waiter is not None
        return lambda: self._is_final() or absence.may_come_back or waiter.waits_until() != until

    async def _end_driver(self) -> None:
        """None that may have touched the source goes on, as far as that can be had in a moment."""
        self._hosts.drop_next()
        tenancy = self.absence.tenancy
        serving, trying, self._serving, self._trying = self._serving, self._trying, None, None
        if trying is not None and not trying.was_told:
            self._hosts.discard(trying)
        if tenancy is not None:
            tenancy.cut()  # a bus may be quicker to tell us than to end the connection
            if serving is not None and not serving.is_lost:
                await serving.stop(UNPLUG_GRACE)
            tenancy.fence()
        with trio.move_on_after(BURY_GRACE):
            await self._hosts.bury_told()
        self._front.driver_ended()

    async def _come_back(self) -> None:
        """There is a device again: go on with it, if it is the same."""
        absence, waiter = self.absence, self._waiter
        assert waiter is not None
        absence.come_back()
        if absence.tenancy is not None:
            self._hosts.lease = absence.tenancy.lease
            self._hosts.drop_all_of_old_device()
        self._endpoint.note("the device was plugged in again: its driver is started, and what is on it is looked at")
        waiter.expect_dependants(True)
        self._counted, self._restart_asked = False, False
        if await self._unless_over(self._hosts.bury_told):
            await self._bring_back(trio.current_time(), Decision())
        elif self._hosts.stuck:
            absence.lose(Reason.STUCK, "the device was unplugged, and its driver could not be ended")
        if self._endpoint.state is State.ACTIVE:
            return
        waiter.expect_dependants(False)
        if self._endpoint.state is State.FAILED and not self.is_unplugged:
            absence.give_in()
            return
        await self._end_driver()
        absence.stays_away()
        if absence.refusal:
            log.info("%s: what was plugged in is not taken for its device: %s", self._plan.name, absence.refusal)
            self._endpoint.note(f"{UNPLUGGED}; another one was not taken for it: {absence.refusal}")

    def _enter_detached(self, text: str) -> None:
        for instance in (self._driver, self._endpoint):
            if instance.can(State.DETACHED):
                instance.change(State.DETACHED, Reason.UNPLUGGED, text)
        log.info("%s: %s", self._plan.name, text)

    # ---- what the operator asks

    async def restart(self) -> int:
        """A new generation, whatever the state, and a clean history; its number. UserError if there is none."""
        if self.is_unplugged:
            raise UserError(f"the device of {self._plan.name} is unplugged: plug it in again, and it goes on by itself")
        if not await self._hosts.bury_stuck():
            raise UserError(f"{self._plan.name} cannot be restarted: {self._endpoint.text}")
        failures = self._failures
        self._restart_asked = True
        self._hosts.spares.reset()
        self._bell.ring()
        await self._bell.until(
            lambda: (
                self._over()
                or self._failures > failures
                or (not self._restart_asked and self._endpoint.state in (State.ACTIVE, State.FAILED))
            )
        )
        if self.is_unplugged:
            raise UserError(f"the device of {self._plan.name} was unplugged before its driver was restarted")
        if self._over():
            raise UserError(f"{self._plan.name} was unmounted before its driver was restarted")
        if self._endpoint.state is not State.ACTIVE:
            raise UserError(f"the driver of {self._plan.name} was not restarted: {self._endpoint.text}")
        return self.generation

    # ---- the end of the endpoint

    async def stop_linked(self, seconds: float) -> None:
        """Have the one that serves end while it has its link, to which nothing comes any more; so long at most."""
        self._is_ending = True
        if self._serving is not None and not self._serving.is_lost:
            await self._serving.stop(seconds, linked=True)

    async def end(self) -> None:
        """End every process, the one that serves in order. Bounded in time."""
        self._is_ending = True
        self._bell.ring()
        orderly = self._serving if self._serving is not None and not self._serving.is_lost else None
        grace = stop_grace(self._plan) if orderly is not None and orderly.ready is not None else 0.0
        if not await self._hosts.end_all(orderly, grace) and grace:
            self.cut_off = True
            log.warning(
                "%s: the driver did not end within %g s of its unmount and is ended; what it had not saved is lost",
                self._plan.name,
                grace,
            )
        self._serving = self._trying = None
        self.absence.close()
        self._waiter = None  # the endpoint itself: a circle that would keep it in memory


def _unplugged(absence: Absence, waiter: Waiter) -> str:
    if absence.loss is not None:
        return absence.loss[1]
    until, now = waiter.waits_until(), trio.current_time()
    if until <= now:
        return UNPLUGGED
    return (
        f"{UNPLUGGED}: plug it in again"
        + (f" within {until - now:.0f} s" if until != float("inf") else "")
        + " to go on"
    )


def stop_grace(plan: DriverPlan) -> float:
    """Seconds for the host to end; a foreign program may have to save, and that takes as long as a request may."""
    return STOP_GRACE if plan.driver.command is None else max(STOP_GRACE, plan.deadline)
