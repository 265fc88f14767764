"""All devices of one daemon: its buses, what is bound to what, and what the operator asks of them.

Owns: the buses, and the answers for `udf devices`, `udf why`, `udf plug` and their like. Must never: decide which
driver a device gets (udf.usb.matching does) or when (binder.py does), or put a device's text into a path or an answer
as it is. Called by: daemon.py, devicecalls.py.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from udf.errors import UserError
from udf.supervisor import sockets
from udf.supervisor.bell import Bell
from udf.supervisor.binder import EJECTED, Binder
from udf.supervisor.blocks import BlockEndpoint
from udf.supervisor.emulator import Emulator
from udf.supervisor.endpoint import Endpoint
from udf.supervisor.instance import Reason, State
from udf.supervisor.leases import Leases
from udf.supervisor.offers import Offers
from udf.supervisor.output import sentence
from udf.supervisor.places import BY_ID
from udf.supervisor.registry import Registry
from udf.supervisor.spawn import Identity
from udf.supervisor.starter import RegistryStarter
from udf.supervisor.tenants import Known, Present, Tenant
from udf.usb.bus import Bus, BusDevice
from udf.usb.matching import DeviceFacts, InterfaceFacts, Verdict
from udf.usb.operations import Address
from udf.usb.remote import UsbipBus

ARRIVAL_WAIT = 10.0  # from the emulator's word that it is plugged in until the bus has it
BINDING_WAIT = 30.0  # from there until a driver serves it, or does not
MAX_SEARCHED = 8192  # bytes of a configuration; the largest cameras have half of that
EMULATED = "emulated"
_WITHIN = {"files": "", "block": "/disk", "terminal": "/tty"}  # what a program opens, below the instance's directory

log = logging.getLogger("udf.devices")
Row = dict[str, Any]


class Devices:
    """`runtime` is the daemon's directory (R). `nursery` ends with the daemon, `reaper` after it."""

    def __init__(
        self,
        runtime: Path,
        registry: Registry,
        nursery: trio.Nursery,
        reaper: trio.Nursery,
        *,
        usbip: Sequence[str] = (),
        rules: str | None = None,
    ) -> None:
        runtime = Path(os.path.realpath(runtime))
        self.root = runtime / "dev"
        self.by_id = self.root / BY_ID
        self._buses: list[Bus] = [UsbipBus(address, f"usbip:{address}") for address in map(Address.parse, usbip)]
        self.listeners: list[Callable[[], None]] = []  # called when a bus, a driver's file or a rule has changed
        self._facts: dict[str, DeviceFacts] = {}  # read once for each arrival: a driver may configure it differently
        self._leases = Leases(nursery)
        self._nursery = nursery
        self._registry = registry
        self.offers = Offers(rules, self._changed)
        self.binder = Binder(
            self._present, lambda: self.offers.now, RegistryStarter(registry, self.by_id), registry.events, nursery
        )
        self._emulator = Emulator(runtime / "usbip.sock", nursery, reaper)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; `started` when drivers and rules are known."""
        self._make_directories()
        async with trio.open_nursery() as nursery:
            await nursery.start(self.offers.run)
            for bus in self._buses:
                nursery.start_soon(self._run_bus, bus)
            nursery.start_soon(self.binder.run)
            task_status.started()

    async def close(self) -> None:
        """After the end of all instances: nothing is plugged in any more."""
        await self._emulator.close()
        shutil.rmtree(self.by_id, ignore_errors=True)
        with suppress(OSError):
            self.root.rmdir()

    def _changed(self) -> None:
        self.binder.poke()
        for listener in self.listeners:
            listener()

    async def _run_bus(self, bus: Bus, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            await bus.run(self._changed, task_status=task_status)
        except Exception:
            # One bus must not take the mounts of all others with it.
            log.exception("the bus %s failed by our own mistake; its devices are gone", bus.name)
            self._buses.remove(bus)
            self._changed()

    def _make_directories(self) -> None:
        sockets.make_directory(self.root)
        shutil.rmtree(self.by_id, ignore_errors=True)  # of a daemon that was killed
        self.by_id.mkdir(mode=0o755, exist_ok=True)

    # ---- what is there

    def _present(self) -> Mapping[str, Present]:
        found: dict[str, Present] = {}
        for bus in self._buses:
            for device in bus.devices().values():
                key = f"{bus.name}/{device.key}"
                facts = self._facts.get(key)
                if facts is None:
                    facts = self._facts[key] = facts_of(key, bus.name, device)
                found[key] = Present(
                    facts, self._leases.of(bus, device, facts), device.name if bus.name == EMULATED else ""
                )
        for key in [key for key in self._facts if key not in found]:
            del self._facts[key]
        return found

    def rows(self) -> list[Row]:
        """Every device as the interface describes it, and those that are away and waited for."""
        away = [each for each in self.binder.tenants if each.is_absent and each.binding.key not in self.binder.known]
        return [self._row(known) for _, known in sorted(self.binder.known.items())] + [*map(self._away, away)]

    def find(self, text: str) -> Known:
        """The device that is meant: by a driver's instance, its name, port, key, VENDOR:PRODUCT or serial number."""
        self.binder.poke()
        devices = list(self.binder.known.values())
        for names in (self._exact_names, self._other_names):
            found = [known for known in devices if text in names(known)]
            if len(found) == 1:
                return found[0]
            if found:
                keys = ", ".join(sorted(_shown(known.facts.key) for known in found))
                raise UserError(f"{text!r} may be any of {keys}: say which one is meant")
        raise NoDeviceError(f"there is no device {text!r}: `udf devices` lists those that are there")

    def _exact_names(self, known: Known) -> set[str]:
        names = {known.facts.key, _shown(known.facts.key), known.name}
        for tenant in self.binder.tenants_of(known.facts.key):
            names |= {tenant.name, tenant.by_id}
        return names - {""}

    def _other_names(self, known: Known) -> set[str]:
        facts = known.facts
        return {facts.port, facts.serial, _shown(facts.serial), f"{facts.vendor:04x}:{facts.product:04x}"} - {""}

    def why(self, known: Known) -> list[Row]:
        """Every driver that was looked at for a device, and why it was or was not chosen."""
        verdict = known.verdict
        return [
            {
                "driver": each.driver,
                "interface": each.interface,
                "score": each.score,
                "chosen": each.chosen,
                "reason": sentence(each.reason),
            }
            for each in (verdict.candidates if verdict is not None else ())
        ]

    def facts_of(self, instance: str) -> DeviceFacts | None:
        """Of the device that an instance serves, if it is one."""
        return next((tenant.facts for tenant in self.binder.tenants if tenant.name == instance), None)

    def row(self, known: Known) -> Row:
        """One device as the interface describes it."""
        return self._row(known)

    def _row(self, known: Known) -> Row:
        tenants = self.binder.tenants_of(known.facts.key)
        word, text = self._state(known, tenants)
        return self._describe(known.facts, known.name, word, text, tenants)

    def _away(self, tenant: Tenant) -> Row:
        text = f"it was pulled out while {tenant.name} was used: plug it in again to go on"
        return self._describe(tenant.facts, "", "away", text, [tenant])

    def _describe(self, facts: DeviceFacts, name: str, word: str, text: str, tenants: list[Tenant]) -> Row:
        return {
            "key": _shown(facts.key),
            "bus": _shown(facts.bus),
            "port": _shown(facts.port),
            "name": _shown(name),
            "vendor": facts.vendor,
            "product": facts.product,
            "manufacturer": _shown(facts.manufacturer),
            "product_name": _shown(facts.product_name),
            "serial": _shown(facts.serial),
            "classes": [f"{a:02x}/{b:02x}/{c:02x}" for a, b, c in _triples(facts)],
            "state": word,
            "text": sentence(text),
            "instances": [self._instance(tenant) for tenant in tenants],
        }

    def _instance(self, tenant: Tenant) -> Row:
        instance = None if tenant.endpoint is None else tenant.endpoint.instance
        is_part = len(tenant.facts.bounded()) > 1
        return {
            "name": tenant.name,
            "driver": tenant.binding.driver.name,
            "interface": tenant.binding.interface if is_part else None,
            "provides": tenant.binding.driver.provides,
            "state": State.STARTING if instance is None else instance.state,
            "text": "" if instance is None else sentence(instance.text),
            "path": str(self.root / tenant.name) + _WITHIN[tenant.binding.driver.provides],
            "by_id": str(self.by_id / tenant.by_id) if tenant.serves else "",
        }

    def _state(self, known: Known, tenants: list[Tenant]) -> tuple[str, str]:
        """One word and a sentence: what a person wants to know first."""
        verdict = known.verdict or Verdict(known.facts.key, "waiting", "it has just arrived")
        if tenants:
            if any(tenant.stopping.is_set() for tenant in tenants):
                return "ending", f"{tenants[0].name} gives it back"
            if all(tenant.serves for tenant in tenants):
                broken = [t.endpoint for t in tenants if t.endpoint and t.endpoint.instance.state is State.FAILED]
                if broken:
                    return "failed", broken[0].instance.text
                return "bound", "; ".join([_names(tenants), *self._not_served(known, verdict, tenants)])
            return "starting", f"{tenants[0].binding.driver.name} starts"
        if known.ejected:
            return "ejected", EJECTED
        for driver, _, text, again in self.binder.failures_of(known.facts.key):
            after = (
                "; it is tried again" if again else f": `udf replug`, or a change of the driver {driver}, tries again"
            )
            return "failed", f"{text}{after}"
        return verdict.word, verdict.text

    def _not_served(self, known: Known, verdict: Verdict, tenants: list[Tenant]) -> Iterator[str]:
        """The interfaces of a device that is bound otherwise, whose drivers are not there."""
        failures = {interface: text for _, interface, text, _ in self.binder.failures_of(known.facts.key)}
        served = {tenant.binding.interface for tenant in tenants}
        for each in verdict.bindings if None not in served else ():
            if each.interface not in served:
                yield f"{each.driver.name}: {failures.get(each.interface, 'it gets its interface at the next plug')}"

    # ---- what the operator asks

    async def plug(self, model: str, options: Mapping[str, str], name: str | None, faults: Sequence[str]) -> Row:
        """Plug an emulated device in, and wait until it is bound, or known why it is not."""
        file = options.get("file")
        if file is not None and Path(os.path.normpath(file)).is_relative_to(self.root):
            # The emulator would wait for the driver of a device, and that for the emulator, until both are given up.
            raise UserError(f"{file} is served by this daemon itself: copy it, and plug in the copy")
        await self._emulator.start()
        await self._ensure_emulated_bus()
        before = set(self._present())
        answer = await self._emulator.command(
            "plug", model=model, options=dict(options), name=name, faults=list(faults)
        )
        return await self._arrival(str(answer.get("busid", "")), before)

    async def unplug(self, text: str) -> None:
        """Pull an emulated device out, and wait until its driver has ended."""
        name, busid = self._emulated(text)
        before = self._on_bus(busid)
        await self._emulator.command("unplug", name=name)
        await self._departure(before)

    async def replug(self, text: str) -> Row:
        """Pull it out and plug it in again; as `plug`."""
        name, busid = self._emulated(text)
        before = set(self._present())
        answer = await self._emulator.command("replug", name=name)
        return await self._arrival(str(answer.get("busid", busid)), before)

    async def faults(self, text: str, rules: Sequence[str]) -> None:
        """What goes wrong with an emulated device from now on."""
        await self._emulator.command("faults", name=self._emulated(text)[0], faults=list(rules))

    async def eject(self, disk: Endpoint) -> None:
        """End the driver of a block device in order, so that the device may be pulled out. BusyError: it goes on."""
        tenant = next((each for each in self.binder.tenants if each.name == disk.plan.name), None)
        if tenant is None:
            raise NoDeviceError(f"{disk.plan.name} is no device that is plugged in")
        self.binder.eject(tenant)
        try:
            disk.recovery.eject()
            await disk.unmount(Reason.OPERATOR, lazy=False)
        except BaseException:
            self.binder.eject(tenant, disk.is_gone)
            raise
        await self.binder.bell.within(BINDING_WAIT, lambda: tenant not in self.binder.tenants)

    def _emulated(self, text: str) -> tuple[str, str]:
        """The name and port of the emulated device that is meant; one that is out just now has no port."""
        try:
            known = self.find(text)
        except NoDeviceError:
            return text, ""  # the emulator knows also what is out, and says what there is
        if not known.name:
            raise UserError(f"{text!r} is not an emulated device: pull it out by hand")
        return known.name, known.facts.port

    def _on_bus(self, busid: str) -> set[str]:
        return {key for key, each in self._present().items() if each.facts.bus == EMULATED and each.facts.port == busid}

    async def _arrival(self, busid: str, before: set[str]) -> Row:
        bell = self.binder.bell
        with trio.move_on_after(ARRIVAL_WAIT):
            await bell.until(lambda: bool(self._on_bus(busid) - before))
        new = self._on_bus(busid) - before
        if not new:
            raise UserError(f"it is plugged in as {busid}, but the bus has not told of it in {ARRIVAL_WAIT:g} s")
        key = max(new)
        await self.binder.settled(key, BINDING_WAIT)
        known = self.binder.known.get(key)
        if known is None:
            raise UserError("it was unplugged while its driver started")
        return self._row(known)

    async def _departure(self, keys: set[str]) -> None:
        def is_gone() -> bool:
            return not keys & self._present().keys() and not any(self.binder.tenants_of(key) for key in keys)

        # The binder need not hear of it when all is done for a device that is waited for; its endpoint does.
        names = {tenant.name for key in keys for tenant in self.binder.tenants_of(key)}
        disks = [each for each in self._registry.endpoints(Identity.own()) if isinstance(each, BlockEndpoint)]
        bells = [self.binder.bell, *(each.bell for each in disks if each.plan.name in names)]
        self.binder.poke()
        with trio.move_on_after(BINDING_WAIT):
            async with trio.open_nursery() as nursery:

                async def listen(bell: Bell) -> None:
                    await bell.until(is_gone)
                    nursery.cancel_scope.cancel()

                for bell in bells:
                    nursery.start_soon(listen, bell)

    async def _ensure_emulated_bus(self) -> None:
        if not any(bus.name == EMULATED for bus in self._buses):
            bus = UsbipBus(str(self._emulator.path), EMULATED)
            self._buses.append(bus)
            await self._nursery.start(self._run_bus, bus)


class NoDeviceError(UserError):
    """No such device."""


def facts_of(key: str, bus: str, device: BusDevice) -> DeviceFacts:
    """What matching needs of a device; of nonsense in its descriptors as much as can be read."""
    active = device.active()
    interfaces = []
    for alternates in active.interfaces if active is not None else ():
        if active is not None and alternates:
            number = alternates[0].number
            # To look for it in all that a hostile device can say, for each interface, would keep the loop.
            function = active.function(number) if active.total_length <= MAX_SEARCHED else frozenset()
            interfaces.append(InterfaceFacts(number, tuple(each.triple for each in alternates), function))
    return DeviceFacts(
        key=key,
        vendor=device.vendor,
        product=device.product,
        device_class=device.device_class,
        interfaces=tuple(interfaces),
        manufacturer=device.manufacturer,
        product_name=device.product_name,
        serial=device.serial,
        port=device.busid,
        bus=bus,
        is_readable=bool(device.device_descriptor),
    )


def _names(tenants: list[Tenant]) -> str:
    return ", ".join(tenant.binding.driver.name for tenant in tenants)


def _triples(facts: DeviceFacts) -> list[tuple[int, int, int]]:
    found = [triple for interface in facts.bounded() for triple in interface.triples[:1]]
    return list(dict.fromkeys(found or [facts.device_class]))


def _shown(text: str) -> str:
    """A text of a device or a bus for an answer: bounded, on one line, without anything that steers a terminal."""
    return sentence(text[:200])
