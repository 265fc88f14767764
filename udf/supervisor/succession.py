"""From the loss of an endpoint's driver to the next one that serves.

Owns: which process is the driver, its certain end before another one may touch the source or the device, the policy's
word before each start, and what is told of each death.
Must never: let two generations serve at once, wait for a driver without a bound, or decide that it is lost (recovery.py
does, as it decides everything that follows when the device is gone).
Called by: recovery.py, whose part it is.

The order, of which each step waits for the one before: the old host is dead for certain → its connection to the device
is shut down → the policy lets a new one start (its process may stand already, but it has no link and has touched
nothing) → it has a connection of its own, and says READY → the front has said that the old link is drained → `attach` →
`attached`. Whatever ends the endpoint, or its device, ends this at any point: see `_over`.
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
from udf.errors import DeviceGone, UdfError
from udf.supervisor import crashes
from udf.supervisor.absence import Absence, Waiter
from udf.supervisor.bell import Bell
from udf.supervisor.crashes import CrashLog
from udf.supervisor.front import Front
from udf.supervisor.generation import Generation
from udf.supervisor.hosts import TERM_GRACE, Hosts
from udf.supervisor.instance import Instance, Reason, State
from udf.supervisor.output import sentence
from udf.supervisor.plan import DriverPlan
from udf.supervisor.restart import Death, Decision, History, Kind

LINK_GRACE = 2.0  # between the end of a process and the end of its link, whichever is seen first
LAST_WORDS = 0.2  # after a death of its own making, for what it printed
STOP_GRACE = 5.0  # for the host to end after `stop`
CUT_GRACE = 0.05  # between the end of a connection and the bus's word that the device is gone

log = logging.getLogger("udf.mounts")
_NOTHING_LOST = messages.LinkLost()


class Succession:
    """The driver of one endpoint, whatever process that is, and the one after it."""

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

    async def serve(self, generation: Generation, link: list[int]) -> None:
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
        await generation.serve(*link, *device, *self._hosts.store)

    def first_serves(self) -> None:
        """The endpoint can be used."""
        assert self._serving is not None
        self.generation = 1
        self._serving.serves(1)

    # ---- what ends it at any point

    @property
    def is_unplugged(self) -> bool:
        """Whether the device is gone, its own or that of what it depends on."""
        return self.absence.is_unplugged

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

    async def find_device(self) -> None:
        """A start has failed: find out whether the device is gone, which its end may have been quicker to tell."""
        tenancy = self.absence.tenancy
        if tenancy is None:
            return
        await self._bell.within(CUT_GRACE, lambda: self.is_unplugged or tenancy.is_cut)
        if tenancy.is_cut and not self.is_unplugged:
            await tenancy.ask()

    # ---- from one to the next

    @property
    def restarts_left(self) -> int:
        """So many deaths of its own making are followed by a new generation, if they came now."""
        return self._history.restarts_left(trio.current_time())

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
            await self.serve(generation, driver_end.descriptors)
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
            await self._front.attach(self.generation, counted=self._counted, link=our_end.descriptors)
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


def stop_grace(plan: DriverPlan) -> float:
    """Seconds for the host to end; a foreign program may have to save, and that takes as long as a request may."""
    return STOP_GRACE if plan.driver.command is None else max(STOP_GRACE, plan.deadline)
