"""Wanted state against running instances: which driver serves which device, brought about step by step.

Owns: the tenants (one for each driver that has, gets or gives back a device), when a start that failed is tried again,
and what is said of each device. Must never: know a bus or how an instance is run (the starter does), keep anything that
cannot be had again by looking, or let one device's trouble wait for another's.
Called by: devices.py, which runs it and tells it that something may have changed.

Level-triggered: whatever happens (arrival, removal, a driver's file, a rule, the end of an instance, an operator) only
rings; each pass computes from what is there now what should run, and starts or ends the difference. So it does not
matter which event it was, whether it came twice, or whether it came at all: a slow look heals what was lost.

A device that was pulled out while somebody used what is on it may come back: its tenant is kept, and what arrives and
looks like its device is offered to it before anything is begun anew.

What serves goes on serving: a better driver that appears later gets the device at its next plug. Only the operator's
word (a rule, a disabled driver) takes a device away from a driver that has it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

import trio

from udf.errors import UserError
from udf.manifest import Manifest
from udf.supervisor import naming
from udf.supervisor.bell import Bell
from udf.supervisor.instance import EventLog, Instance, Reason, State
from udf.supervisor.lease import Lease
from udf.supervisor.naming import Identity, Numbers
from udf.supervisor.offers import Offer
from udf.supervisor.rebinding import (
    Absent,
    is_replaced,
    is_taken_over,
    may_begin,
    may_stay,
    retry_delay,
    whose_device,
)
from udf.supervisor.tenants import Endpoint, Failure, Known, Present, Starter, Tenant
from udf.usb.matching import Binding, DeviceFacts, Verdict, wanted

LOOK = 10.0  # for events that were lost
NAME_WAIT = 10.0  # for the end of what had the name before; then the device gets another one
EJECTED = "it was ejected and may be pulled out; plugged in again it is served again"
HEALTHY = 60.0  # what served so long may fail as often as a new one
_FINAL = (Reason.OPERATOR, Reason.EXTERNAL, Reason.SHUTDOWN)  # somebody wanted the end: it is not started again

log = logging.getLogger("udf.binder")


class Binder:
    """`present` and `offer` are looked at anew in each pass. `nursery` carries the tenants."""

    def __init__(
        self,
        present: Callable[[], Mapping[str, Present]],
        offer: Callable[[], Offer],
        starter: Starter,
        events: EventLog,
        nursery: trio.Nursery,
    ) -> None:
        self.bell = Bell()  # rung after every pass and every change of a tenant
        self.disabled: frozenset[str] = frozenset()
        self.tenants: list[Tenant] = []
        self.known: dict[str, Known] = {}
        self._present = present
        self._offer = offer
        self._starter = starter
        self._events = events
        self._nursery = nursery
        self._numbers = Numbers()
        self._poked = trio.Event()
        self._passes = 0
        self._closing = False

    def poke(self) -> None:
        """Something may have changed. Any number of these before the next pass are one."""
        self._poked.set()

    async def run(self) -> None:
        """Make it so, again and again."""
        while True:
            self._poked = trio.Event()
            again = float("inf")
            try:
                again = self._pass()
            except Exception:
                log.exception("binding failed by our own mistake; what serves goes on")  # the next look is another try
            self._passes += 1
            self.bell.ring()
            with trio.move_on_at(min(again, trio.current_time() + LOOK)):
                await self._poked.wait()
            await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Start nothing any more."""
        self._closing = True

    # ---- one pass: no await in it, so that it sees one moment

    def _pass(self) -> float:
        """Start and stop what has to be; when there is something to try again (infinity: never)."""
        present, offer = self._present(), self._offer()
        for tenant in self.tenants:
            if tenant.binding.key not in present:
                tenant.lease.end()
                self._unlink(tenant)  # its name may be wanted for what comes in its place
        for tenant in self._absent():
            if any(is_replaced(_as_absent(tenant), each.facts) for each in present.values()):
                self._lose(tenant, "another device was plugged in in its place")
        for key in [key for key in self.known if key not in present]:
            self._forget(self.known.pop(key))
        verdicts = wanted(
            (each.facts for each in present.values()), offer.drivers, offer.rules, self.disabled, self._missing(offer)
        )
        again = float("inf")
        for key, verdict in verdicts.items():
            known = self.known.get(key) or self._meet(present[key])
            known.verdict = verdict
            again = min(again, self._settle(known, present[key], verdict))
        return again

    def _settle(self, known: Known, present: Present, verdict: Verdict) -> float:
        mine = [tenant for tenant in self.tenants if tenant.binding.key == verdict.key]
        for tenant in mine:
            if not tenant.stopping.is_set() and not may_stay(tenant.binding, verdict):
                log.info("%s: %s is taken from it by a rule", tenant.name, tenant.binding.driver.name)
                tenant.stopping.set()
        again = float("inf")
        for binding in verdict.bindings:
            if self._closing or not may_begin(binding, [tenant.binding for tenant in mine], known.is_shared):
                continue
            failure = known.failures.get((binding.interface, binding.driver.name))
            if (binding.interface, binding.driver.name) in known.ejected:
                continue
            if failure is not None and (failure.driver, failure.options) == (binding.driver, binding.options):
                if failure.again is None:
                    continue
                if failure.again > trio.current_time():
                    again = min(again, failure.again)
                    continue
            if not mine:
                known.is_shared = len(verdict.bindings) > 1
            loser = self._who_has_lost(binding, present)
            if loser is None:
                mine.append(self._begin(binding, present, known.is_shared))
            elif not loser.is_returning:  # else it is about to learn that what it looks at is gone again
                self._give_back(loser, binding, present, known.is_shared)
                mine.append(loser)
        self._describe(known, mine, verdict)
        return again

    # ---- devices that were pulled out and may come back

    def _absent(self) -> list[Tenant]:
        return [tenant for tenant in self.tenants if tenant.is_absent]

    def _who_has_lost(self, binding: Binding, present: Present) -> Tenant | None:
        """The driver whose device this may be."""
        absent = self._absent()
        number = whose_device(binding, present.facts, [_as_absent(each) for each in absent])
        return None if number is None else absent[number]

    def _give_back(self, tenant: Tenant, binding: Binding, present: Present, shared: bool) -> None:
        """Offer it a device."""
        before = tenant.binding, tenant.facts, tenant.lease
        tenant.binding, tenant.facts, tenant.lease = binding, present.facts, present.lease(binding, shared)
        tenant.is_returning = True
        self._nursery.start_soon(self._return, tenant, before)

    async def _return(self, tenant: Tenant, before: tuple[Binding, DeviceFacts, Lease]) -> None:
        assert tenant.endpoint is not None
        taken = False
        try:
            taken = await tenant.endpoint.take_back(tenant.lease)
        except Exception:  # the border: as at a start
            log.exception("%s: giving it its device back failed by our own mistake", tenant.name)
            tenant.endpoint.lose(Reason.CHANGED, "the supervisor made a mistake: see its log")
        tenant.is_returning = False
        if taken:
            tenant.by_id = self._name_by_id(tenant)
            self._link(tenant)
        else:
            tenant.refused.add(tenant.binding.key)
            tenant.binding, tenant.facts, tenant.lease = before
        self.bell.ring()
        self.poke()

    def _lose(self, tenant: Tenant, why: str) -> None:
        assert tenant.endpoint is not None
        tenant.endpoint.lose(Reason.CHANGED, why)

    # ---- new tenants

    def _begin(self, binding: Binding, present: Present, shared: bool) -> Tenant:
        for tenant in self._absent():
            if is_taken_over(_as_absent(tenant), binding, present.facts):
                self._lose(tenant, "what was plugged in again is not what was pulled out")
        tenant = Tenant(binding, present.facts, present.lease(binding, shared))
        taken = self._names_of_present()
        tenant.name = self._name(tenant, taken)
        tenant.by_id = self._name_by_id(tenant)
        self.tenants.append(tenant)
        self._nursery.start_soon(self._serve, tenant)
        return tenant

    def _name_by_id(self, tenant: Tenant) -> str:
        # Those of the gone are free at once.
        taken = {each.by_id for each in self.tenants if each is not tenant and not each.lease.gone}
        return naming.by_id(_identity(tenant), tenant.facts.manufacturer, tenant.facts.product_name, taken)

    def _name(self, tenant: Tenant, taken: set[str]) -> str:
        while True:
            name = self._numbers.name(tenant.binding.driver.names, _identity(tenant), taken)
            if not self._starter.is_taken(name) or any(each.name == name for each in self.tenants):
                return name
            taken = taken | {name}

    def _names_of_present(self) -> set[str]:
        return {each.name for each in self.tenants if not each.lease.gone}

    def _missing(self, offer: Offer) -> dict[str, str]:
        """By driver, what it requires and is not there: a program, or another driver that does not serve yet."""
        missing = dict(offer.missing)
        serving = {word for tenant in self.tenants if tenant.serves for word in _services(tenant.binding.driver)}
        for driver in offer.drivers:
            for word in driver.requires:
                if word.startswith("drivers:") and word[8:] not in serving:
                    missing.setdefault(driver.name, f"nothing serves {word[8:]} yet")
        return missing

    # ---- one tenant

    async def _serve(self, tenant: Tenant) -> None:
        try:
            await self._wait_for_name(tenant)
            if tenant.stopping.is_set() or tenant.lease.gone:
                tenant.lease.close()
            else:
                await self._start_and_watch(tenant)
        finally:
            self.tenants.remove(tenant)
            self.bell.ring()
            self.poke()

    async def _wait_for_name(self, tenant: Tenant) -> None:
        """What had the name before, as the same device before it was pulled out, may not have ended yet."""

        def is_free() -> bool:
            return not any(each.name == tenant.name for each in self.tenants if each is not tenant)

        if is_free():
            return
        free = await self.bell.within(NAME_WAIT, lambda: is_free() or tenant.stopping.is_set() or tenant.lease.gone)
        if not free:
            old, tenant.name = tenant.name, ""
            tenant.name = self._name(tenant, {each.name for each in self.tenants})
            log.warning(
                "what was called %s has not ended in %g s: the device is called %s", old, NAME_WAIT, tenant.name
            )

    async def _start_and_watch(self, tenant: Tenant) -> None:
        driver = tenant.binding.driver
        try:
            endpoint = await self._starter.start(tenant.name, tenant.binding, tenant.lease)
        except UserError as exc:
            if not tenant.lease.gone:
                log.warning("%s: the driver %s could not be started: %s", tenant.name, driver.name, exc)
                self._failed(tenant, str(exc), served=0.0)
            return
        except Exception as exc:  # the border: a start must not take all other devices with it
            log.exception("%s: starting the driver %s failed by our own mistake", tenant.name, driver.name)
            self._failed(tenant, f"the supervisor made a mistake ({type(exc).__name__}): see its log", served=0.0)
            return
        tenant.endpoint = endpoint
        endpoint.listen(self.bell.ring)
        began = trio.current_time()
        self._link(tenant)
        self.bell.ring()
        self.poke()  # something may have waited for it
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end_when_unwanted, tenant, endpoint)
                await endpoint.ended.wait()
                nursery.cancel_scope.cancel()
        finally:
            self._unlink(tenant)
        if not tenant.lease.gone and not tenant.stopping.is_set() and not tenant.is_returning:
            final = endpoint.instance.reason in _FINAL
            self._failed(tenant, endpoint.instance.text, trio.current_time() - began, final=final)

    def _link(self, tenant: Tenant) -> None:
        if not tenant.lease.gone:
            tenant.is_linked = True
            self._starter.linked(tenant.name, tenant.by_id)

    def _unlink(self, tenant: Tenant) -> None:
        if tenant.is_linked:
            tenant.is_linked = False
            self._starter.unlinked(tenant.by_id)

    async def _end_when_unwanted(self, tenant: Tenant, endpoint: Endpoint) -> None:
        await tenant.stopping.wait()
        if not tenant.lease.gone:  # of an unplug it learns by its lease
            await endpoint.end(Reason.OPERATOR)

    def _failed(self, tenant: Tenant, text: str, served: float, *, final: bool = False) -> None:
        known = self.known.get(tenant.binding.key)
        if known is None:
            return  # its device is gone
        driver = tenant.binding.driver
        slot = (tenant.binding.interface, driver.name)
        before = known.failures.get(slot)
        count = 1 if before is None or served >= HEALTHY else before.count + 1
        delay = None if final else retry_delay(count)
        again = None if delay is None else trio.current_time() + delay
        known.failures[slot] = Failure(driver, tenant.binding.options, text, count, again)

    # ---- what is said of a device

    def _meet(self, present: Present) -> Known:
        key = present.facts.key
        known = self.known[key] = Known(present.facts, present.name, Instance(key, "device", self._events))
        return known

    def _forget(self, known: Known) -> None:
        known.instance.change(State.GONE, Reason.UNPLUGGED, "unplugged")

    def _describe(self, known: Known, mine: list[Tenant], verdict: Verdict) -> None:
        """Tell of changes only: a pass that finds everything as it was says nothing."""
        instance = known.instance
        serving = [tenant for tenant in mine if tenant.serves]
        if serving:
            text = ", ".join(f"{tenant.name} by {tenant.binding.driver.name}" for tenant in serving)
            if instance.state is State.FAILED:
                instance.change(State.RECOVERING, Reason.STARTING, text)
            if instance.state is not State.ACTIVE:
                instance.change(State.ACTIVE, Reason.BOUND, text)
        elif not mine:
            text = next((failure.text for failure in known.failures.values()), "") or verdict.text
            text = EJECTED if known.ejected else text
            if instance.state is not State.FAILED:
                instance.change(State.FAILED, Reason.NO_DRIVER, text)
            elif instance.text != text:
                instance.note(text)
                instance.tell("device", Reason.NO_DRIVER, text)

    def tenants_of(self, key: str) -> list[Tenant]:
        """Those of one device, in the order of their start; not those who wait until it comes back."""
        return [tenant for tenant in self.tenants if tenant.binding.key == key and not tenant.is_waiting]

    def failures_of(self, key: str) -> Iterator[tuple[str, int | None, str, bool]]:
        """Driver, interface, sentence and whether it is tried again, of each binding of a device that did not hold."""
        known = self.known.get(key)
        for (interface, driver), failure in () if known is None else known.failures.items():
            yield driver, interface, failure.text, failure.again is not None

    async def settled(self, key: str, seconds: float) -> bool:
        """Wait until nothing is under way for a device any more, but so long at most; whether that is so."""
        seen = self._passes  # a pass that may have begun before the device came says nothing

        def is_quiet() -> bool:
            is_due = self._poked.is_set()  # a driver may just have found that this is not its device
            return self._passes > seen and not is_due and all(tenant.serves for tenant in self.tenants_of(key))

        self.poke()
        return await self.bell.within(seconds, is_quiet)

    def eject(self, tenant: Tenant, ejected: bool = True) -> None:
        """An operator ends it, and its driver does not get the device again before the next plug (or all the same)."""
        known = self.known.get(tenant.binding.key)
        if known is not None:
            slot = (tenant.binding.interface, tenant.binding.driver.name)
            (known.ejected.add if ejected else known.ejected.discard)(slot)

    def retry(self, key: str) -> None:
        """An operator asks: forget what failed."""
        known = self.known.get(key)
        if known is not None:
            known.failures.clear()
            self.poke()


def _as_absent(tenant: Tenant) -> Absent:
    return Absent(tenant.facts, tenant.binding, tenant.refused)


def _services(driver: Manifest) -> tuple[str, str]:
    return driver.name, driver.provides


def _identity(tenant: Tenant) -> Identity:
    facts = tenant.facts
    interface = tenant.binding.interface if len(facts.bounded()) > 1 else None  # of one alone nobody wants the number
    return Identity(facts.bus, facts.vendor, facts.product, facts.serial, facts.port, interface)
