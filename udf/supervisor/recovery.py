"""The driver of one endpoint over its life: when it is lost, while its device is away, and at the end.

Owns: the decision that a driver is lost, the order in which an unplug and a return are dealt with, and the endpoint's
states RECOVERING, ACTIVE, DETACHED and FAILED after its start.
Must never: start a driver when the endpoint ends, or know what is served (front.py says what it has to know).
Called by: endpoint.py.

How one generation follows another is in succession.py. A device that is gone ends that at any point: `_leave` tells the
front and ends the driver, and waits; `_come_back` goes on with what is plugged in then, if it is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from udf.errors import UserError
from udf.supervisor.absence import UNPLUGGED, Absence, Waiter
from udf.supervisor.instance import Reason, State
from udf.supervisor.restart import Decision, History, Kind
from udf.supervisor.succession import CUT_GRACE, LINK_GRACE, Succession, stop_grace

HOST_SILENCE = 10  # heartbeats; counted in our own ticks, so that our own sleep is never taken for a driver's
UNPLUG_GRACE = 0.2  # for a driver to see that its device is gone, before it is ended
BURY_GRACE = 0.5  # after an unplug; who is not dead by then is not waited for

log = logging.getLogger("udf.mounts")


class Recovery(Succession):
    """The driver of one endpoint, whatever process that is, or none."""

    # ---- what others see

    @property
    def spare_pid(self) -> int | None:
        """The process that stands ready, if there is one."""
        return self._hosts.spares.pid

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
