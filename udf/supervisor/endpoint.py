"""One endpoint: a driver and what stands before it, started together, watched, and ended in order.

Owns: the endpoint's start and end, and the front's life, which is the endpoint's: the front's end or silence ends it.
The driver's death does not: recovery.py replaces it, and the endpoint's state tells how that goes. The end of its
device does.
Must never: know what is served (mounts.py, blocks.py and terminals.py do), or believe a driver.
Called by: registry.py.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, ClassVar

import trio

from udf import messages
from udf.errors import UserError
from udf.supervisor import spawn
from udf.supervisor.absence import NEVER, UNPLUGGED
from udf.supervisor.bell import Bell
from udf.supervisor.child import REAP_TIMEOUT
from udf.supervisor.generation import Generation
from udf.supervisor.hosts import TERM_GRACE
from udf.supervisor.instance import EventLog, Instance, Reason, State
from udf.supervisor.lease import Lease
from udf.supervisor.output import printable, sentence
from udf.supervisor.plan import HEARTBEAT, DriverPlan, StartFailedError
from udf.supervisor.recovery import Recovery
from udf.supervisor.succession import LAST_WORDS, stop_grace

if TYPE_CHECKING:
    from udf.supervisor.front import Front
    from udf.supervisor.trace import TraceFeed

HOLD = 0.15  # seconds that a start which has to wait for its source waits for a fork: by exec it takes longer
MAX_FAULTS = 200  # told of one by one; a driver that finds more ways to misbehave is counted only

log = logging.getLogger("udf.mounts")


class Endpoint(ABC):
    """An endpoint from its start to GONE."""

    kind: ClassVar[str]

    def __init__(self, plan: DriverPlan, events: EventLog, reaper: trio.Nursery, rings: Bell | None = None) -> None:
        """`rings`: the bell of what it depends on, which hears of every change here."""
        self.plan = plan
        self.driver = Instance(plan.name, "driver", events)
        self.shim: Instance | None = None  # the process of its front, if that is one
        self.faults = 0
        self.was_started = False  # whether it could ever be used
        self.ended = trio.Event()
        self._events = events
        self._reaper = reaper
        self._bell = Bell(rings)
        self._front = self._make_front()
        needs = [self.driver, self.shim] if self.shim is not None else [self.driver]
        self.instance = Instance(plan.name, self.kind, events, needs=needs)
        self.recovery = Recovery(plan, self.instance, self.driver, self._front, self._bell, self._fault, self)
        self._stopping: Reason | None = None
        self._is_open = False  # the front was told to serve
        self._is_let = True  # the driver may be told to serve

    @abstractmethod
    def _make_front(self) -> Front:
        """What stands before the driver; sets `shim` if that is a process."""

    @property
    def generation(self) -> int:
        """The count of driver processes that the front was offered."""
        return self.recovery.generation

    @property
    def is_lazy(self) -> bool:
        """Whether it is out of the tree already and only serves what is still open."""
        return False

    @property
    def text(self) -> str:
        """Its state as a sentence, as that is now."""
        return self.instance.text

    @property
    def is_gone(self) -> bool:
        """Whether nothing of it is left."""
        return self.instance.state is State.GONE

    @property
    def dependants(self) -> list[Endpoint]:
        """What serves from it, was started behind it, and ends before it."""
        return []

    # ---- life

    def hold(self) -> None:
        """Have `run` get only as far as it can without the source, which is not there yet, until `let`."""
        self._is_let = False

    def let(self) -> None:
        """The source is there."""
        self._is_let = True
        self._bell.ring()

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
                        nursery.start_soon(self.recovery.run)
                        nursery.start_soon(self._watch_heartbeats)
                        await self._start_dependants(nursery)
                        self.was_started = True
                        task_status.started()
                        await self._bell.until(lambda: self._front.is_over or self.recovery.absence.is_lost)
                        await self._linger()
                finally:
                    with trio.CancelScope(shield=True):
                        await self._tear_down(problem)
                    nursery.cancel_scope.cancel()
        finally:
            self._let_go()
            self.ended.set()
        if problem is not None:
            try:
                raise problem
            finally:
                del problem  # its traceback holds this frame: a circle that would keep it all in memory

    async def _start(self, nursery: trio.Nursery) -> StartFailedError | None:
        front, recovery = self._front, self.recovery
        front.start(nursery, self._reaper)
        our_end, driver_end = front.link()
        with closing(our_end), closing(driver_end):
            if not self._is_let:
                await spawn.wait_for_host(HOLD)
            first = recovery.start_first(nursery, self._reaper)
            if not self._is_let:
                await self._bell.until(lambda: self._is_let or recovery.is_unplugged)
            await recovery.serve(first, driver_end.descriptors)
            driver_end.close()  # the driver's end is the driver's alone, so that its death is seen on the other one
            self.driver.note("waiting for ready")
            await self._bell.until(
                lambda: first.ready is not None or first.cannot_start or front.has_trouble or recovery.is_unplugged
            )
            if first.ready is None or recovery.is_unplugged:
                return await self._could_not_start(first)
            self.driver.note("serving")
            self._is_open = True
            await self._open(first.ready, our_end.descriptors)
        await self._bell.until(lambda: front.is_up or front.has_trouble or first.cannot_start or recovery.is_unplugged)
        if front.is_up and not front.has_trouble:
            return None
        return await self._could_not_start(first)

    @abstractmethod
    async def _open(self, ready: messages.Ready, link: list[int]) -> None:
        """The driver is ready: have the front serve with it."""

    async def _start_dependants(self, nursery: trio.Nursery) -> None:
        """What shall serve from it can be started now."""

    async def _linger(self) -> None:
        """It is over; what may still take a moment before everything is ended."""

    def _let_go(self) -> None:
        """Break every circle that would keep the ended endpoint in memory until a full garbage collection."""

    def _activate(self) -> None:
        self.recovery.first_serves()
        if self.shim is not None:
            self.shim.change(State.ACTIVE, Reason.READY)
        self.driver.change(State.ACTIVE, Reason.READY)
        text = f"{self.plan.driver_name} on {self.plan.where}"
        self.instance.change(State.ACTIVE, Reason.READY, text)
        log.info("%s: %s", self.plan.name, text)

    async def _could_not_start(self, first: Generation) -> StartFailedError:
        await first.hear_last_words(LAST_WORDS)
        await self.recovery.find_device()
        name, reason = self.plan.driver_name, Reason.REFUSED
        if self.recovery.is_unplugged:
            sentence, reason = f"the device was unplugged before the driver {name} had started", Reason.UNPLUGGED
        elif first.failed is not None:
            sentence = f"the driver {name} did not start: {first.failed}"
        elif first.process.broken is not None:
            sentence, reason = first.process.broken, Reason.CONTRACT
        elif first.is_ended:
            sentence, reason = f"the driver {name} {first.process.how()} before it was ready", Reason.EXITED
        elif first.verdict is not None:
            sentence = first.verdict[1]
        else:
            sentence, reason = self._problem_of_front()
        return StartFailedError(sentence, self.instance.tree(), reason)

    @abstractmethod
    def _problem_of_front(self) -> tuple[str, Reason]:
        """Why the front cannot serve."""

    def _too_slow(self) -> StartFailedError:
        waiting = f"the driver is {self.driver.text or 'not started'}"
        if self._is_open and self.shim is not None:
            waiting = self.shim.text
        sentence = f"{self.plan.name} was not mounted in {self.plan.start_timeout:g} s ({waiting}): see its log lines"
        return StartFailedError(sentence, self.instance.tree(), Reason.TIMEOUT)

    async def _tear_down(self, problem: StartFailedError | None) -> None:
        """End all processes, the front first, and leave its place clean. Bounded in time."""
        cancelled = problem is None and not self.was_started
        left = await self._end_front()
        await self.recovery.end()
        self._abandon_front()
        if problem is not None:
            word, text = problem.reason, str(problem)
        elif cancelled:
            word, text = Reason.OPERATOR, "given up while it started"
        elif self.recovery.absence.loss is not None and self.recovery.absence.is_lost:
            word, text = self.recovery.absence.loss
        else:
            word, text = self._why_gone()
        for instance in (*reversed(self.instance.needs), self.instance):
            if instance.can(State.GONE):
                instance.change(State.GONE, word, f"{text} {left}".rstrip())

    @abstractmethod
    async def _end_front(self) -> str:
        """End the front and what depends on it; what is left behind, as a sentence. Bounded in time."""

    def _abandon_front(self) -> None:
        """Stop looking after its process, when that is over or cannot be ended."""

    @abstractmethod
    def _why_gone(self) -> tuple[Reason, str]:
        """Why it is over."""

    # ---- while its device is away

    def waits_until(self) -> float:
        """See Waiter. What has no volumes is of no use to anybody without its device."""
        return NEVER

    def patience(self) -> tuple[float, float]:
        """See Waiter."""
        return 0.0, 0.0

    async def tell_dependants(self) -> None:
        """See Waiter."""

    def expect_dependants(self, expected: bool) -> None:
        """See Waiter."""

    def recall_dependants(self) -> None:
        """See Waiter."""

    def why_given_up(self) -> tuple[Reason, str]:
        """See Waiter."""
        return Reason.UNPLUGGED, UNPLUGGED

    def listen(self, told: Callable[[], None]) -> None:
        """Call `told` when anything of it may have changed."""
        self._bell.listeners.append(told)

    @property
    def may_return(self) -> bool:
        """Whether it goes on if its device, which is gone, is plugged in again now."""
        return False

    @property
    def is_waiting(self) -> bool:
        """Whether its device is away and waited for, and all that follows from the unplug has been done."""
        return self.may_return and self.recovery.absence.is_settled

    async def take_back(self, lease: Lease) -> bool:
        """This may be the device that is away: whether it is, and is served again. The lease is closed here."""
        return await self.recovery.absence.offer(lease)

    def lose(self, reason: Reason, text: str) -> None:
        """Its device will not come back, or is not to be waited for: it ends, without waiting for anything."""
        self.recovery.absence.lose(reason, self._in_better_words(reason, text))

    def _in_better_words(self, reason: Reason, text: str) -> str:
        """If a device was refused, what was wrong with it is what people want to know."""
        return self.recovery.absence.refusal or text if reason is Reason.CHANGED else text

    # ---- watching

    async def _watch_heartbeats(self) -> None:
        while not self._front.is_over:
            await trio.sleep(HEARTBEAT)
            self._front.tick()
            self.recovery.tick()

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

    @abstractmethod
    async def unmount(self, reason: Reason, *, lazy: bool) -> None:
        """End it in order and wait until it is GONE. BusyError when it is in use."""

    async def end(self, reason: Reason) -> None:
        """Make it GONE whatever it takes."""
        self._stopping = self._stopping or reason
        self._hang_up()
        with trio.move_on_after(TERM_GRACE):
            await self.ended.wait()
        self._kill_front()
        with trio.move_on_after(stop_grace(self.plan) + 2 * TERM_GRACE + 2 * REAP_TIMEOUT):
            await self.ended.wait()

    @abstractmethod
    def _hang_up(self) -> None:
        """Have the front end now."""

    def _kill_front(self) -> None:
        """SIGKILL for its process, if it has one."""

    async def restart(self) -> int:
        """A new generation of the driver, with the same open files; its number. UserError if none could be had."""
        if self.instance.state is State.STARTING:
            raise UserError(f"{self.plan.name} is starting: wait until it is mounted")
        return await self.recovery.restart()

    async def counters(self) -> dict[str, int | float]:
        """The front's counters, or nothing if it does not answer in time."""
        return await self._front.counters()

    async def requests(self) -> messages.Requests | None:
        """The requests that wait, or None if the front does not answer in time."""
        return await self._front.requests()

    async def abort(self, request: int) -> bool:
        """Have one request that waits answered EIO; whether the front could be told."""
        return await self._front.abort(request)

    def traced(self) -> TraceFeed:
        """The live trace of what is served there; UserError if there is none."""
        raise UserError(f"{self.plan.name} is no mount, and nothing of it can be traced")
