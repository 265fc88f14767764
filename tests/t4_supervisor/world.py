"""The binder alone, in a world in which every moment can be held; the instances are scripted."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
from trio.testing import wait_all_tasks_blocked

from udf import messages
from udf.errors import UserError
from udf.manifest import Manifest, check_manifest
from udf.supervisor.binder import Binder
from udf.supervisor.instance import EventLog, Instance, Reason, State
from udf.supervisor.lease import Lease
from udf.supervisor.offers import Offer
from udf.supervisor.tenants import Present
from udf.usb.matching import Binding, DeviceFacts, InterfaceFacts


def driver(name: str, *match: dict[str, Any], **more: Any) -> Manifest:
    table = {"kind": "usb", "interface": 1, "class": "X", "match": list(match), **more}
    return check_manifest(table, f"/drivers/{name}.py", name, foreign=False)


STORAGE = driver("storage", {"class": 8}, provides="block", names="disk")
THERMOMETER = driver("thermometer", {"vendor": 0x1209, "product": 0x7E57})


class ScriptedLease(Lease):
    closed = False

    async def open(self) -> socket.socket:
        raise AssertionError("nobody opens a connection here")

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class ScriptedEndpoint:
    """Ends with its lease (unless it is used), or when it is told to; not before its end is let happen."""

    def __init__(self, world: World, name: str, lease: Lease) -> None:
        self.instance = Instance(name, "mount", world.events)
        self.instance.change(State.ACTIVE, Reason.READY)
        self.ended = trio.Event()
        self._ending = trio.Event()
        self._reason = Reason.UNPLUGGED
        self._lease = lease
        self._world = world
        self._is_used = False
        lease.tell(self._unplugged)

    @property
    def is_used(self) -> bool:
        """As by a volume that is mounted: it waits for its device."""
        return self._is_used

    @is_used.setter
    def is_used(self, used: bool) -> None:
        self._is_used = used
        if self._lease.gone:
            self._unplugged()

    def _unplugged(self) -> None:
        if not self.is_used:
            self._ending.set()

    @property
    def may_return(self) -> bool:
        return self.is_used and not self._ending.is_set()

    is_waiting = may_return

    def listen(self, told: Callable[[], None]) -> None:
        self._lease.tell(told)  # after it has heard of that itself

    async def take_back(self, lease: Lease) -> bool:
        self._world.offered.append((self.instance.name, lease.spec.key))
        await self._world.let_return.wait()
        if self._ending.is_set() or lease.gone or not self._world.accepts(self.instance.name, lease.spec.key):
            lease.close()
            return False
        self._lease.close()
        self._lease = lease
        lease.tell(self._unplugged)
        return True

    def lose(self, reason: Reason, text: str) -> None:
        self.die(reason)

    async def end(self, reason: Reason) -> None:
        self._reason = reason
        self._ending.set()
        await self.ended.wait()

    def die(self, reason: Reason) -> None:
        self._reason = reason
        self._ending.set()

    async def run(self, world: World) -> None:
        await self._ending.wait()
        await world.let_end.wait()
        self.instance.change(State.GONE, self._reason, "ended")
        del world.running[self.instance.name]
        self._lease.close()
        self.ended.set()


class World:
    """What a daemon would be, with every moment in our hands."""

    def __init__(self, nursery: trio.Nursery, *drivers: Manifest, pokes: bool = True) -> None:
        self.devices: dict[str, DeviceFacts] = {}
        self.offer = Offer(drivers=drivers)
        self.events = EventLog()
        self.running: dict[str, ScriptedEndpoint] = {}
        self.started: list[tuple[str, str]] = []  # name and driver, in their order
        self.leases: list[ScriptedLease] = []
        self.shared: list[bool] = []  # of each lease, whether it has only a part of its device
        self.links: dict[str, str] = {}
        self.taken: set[str] = set()
        self.refuse: Callable[[Binding], str | None] = lambda _: None
        self.offered: list[tuple[str, str]] = []  # to whom, and which arrival
        self.accepts: Callable[[str, str], bool] = lambda _name, _key: True
        self.let_start, self.let_end, self.let_return = trio.Event(), trio.Event(), trio.Event()
        self.let_start.set()
        self.let_end.set()
        self.let_return.set()
        self._nursery = nursery
        self._pokes = pokes
        self._arrivals = 0
        self.binder = Binder(self._present, lambda: self.offer, self, self.events, nursery)

    # what the binder sees

    def _present(self) -> dict[str, Present]:
        return {key: Present(facts, self._lease) for key, facts in self.devices.items()}

    def _lease(self, binding: Binding, shared: bool) -> Lease:
        self.shared.append(shared)
        spec = messages.DeviceSpec(bus="usbip", key=binding.key, busnum=1, devnum=1, interface=binding.interface)
        self.leases.append(ScriptedLease(spec))
        return self.leases[-1]

    async def start(self, name: str, binding: Binding, lease: Lease) -> ScriptedEndpoint:
        assert name not in self.running, f"{name} runs already"
        self.started.append((name, binding.driver.name))
        await self.let_start.wait()
        problem = "the device is gone" if lease.gone else self.refuse(binding)
        if problem is not None:
            lease.close()
            raise UserError(problem)
        slot = (binding.key, binding.interface)
        assert slot not in [tenant.slot for tenant in self.binder.tenants if tenant.endpoint is not None]
        endpoint = self.running[name] = ScriptedEndpoint(self, name, lease)
        self._nursery.start_soon(endpoint.run, self)
        return endpoint

    def is_taken(self, name: str) -> bool:
        return name in self.taken or name in self.running

    def linked(self, name: str, by_id: str) -> None:
        assert by_id not in self.links
        self.links[by_id] = name

    def unlinked(self, by_id: str) -> None:
        del self.links[by_id]

    # what happens

    def plug(self, port: str = "1-1", **more: Any) -> str:
        self._arrivals += 1
        key = f"bus/{port}#{self._arrivals}"
        facts = {"vendor": 0x1209, "product": 0x7E57, "port": port, "bus": "bus", **more}
        self.devices[key] = DeviceFacts(key=key, **facts)
        self.changed()
        return key

    def unplug(self, key: str) -> None:
        del self.devices[key]
        self.changed()

    def offers(self, *drivers: Manifest, **more: Any) -> None:
        self.offer = Offer(drivers=drivers, **more)
        self.changed()

    def changed(self) -> None:
        if self._pokes:
            self.binder.poke()

    def hold(self) -> None:
        """Let nothing start or end; what waits already goes on waiting for the same."""
        for name in ("let_start", "let_end", "let_return"):
            if getattr(self, name).is_set():
                setattr(self, name, trio.Event())

    async def used(self, name: str) -> None:
        """Somebody uses what is on it: from now on it waits for its device."""
        await quiet()
        self.running[name].is_used = True

    def words(self) -> dict[str, str]:
        return {key: known.verdict.word for key, known in self.binder.known.items() if known.verdict}

    def all_is_over(self) -> bool:
        return not self.binder.tenants and not self.running and not self.links


@asynccontextmanager
async def world_of(*drivers: Manifest, pokes: bool = True) -> AsyncIterator[World]:
    """A world with a running binder, from which everything is pulled out at the end: nothing may be left."""
    async with trio.open_nursery() as nursery:
        world = World(nursery, *drivers, pokes=pokes)
        nursery.start_soon(world.binder.run)
        await wait_all_tasks_blocked()
        yield world
        for event in (world.let_start, world.let_end, world.let_return):
            event.set()
        world.devices.clear()
        for endpoint in world.running.values():
            endpoint.lose(Reason.EXPIRED, "at the end of the test")
        world.binder.poke()
        await wait_all_tasks_blocked()
        assert world.all_is_over()
        assert not world.binder.known
        assert all(lease.closed for lease in world.leases)
        nursery.cancel_scope.cancel()


async def quiet() -> None:
    await wait_all_tasks_blocked()


STICK: dict[str, Any] = {"vendor": 0x0781, "product": 0x5567, "interfaces": (InterfaceFacts(0, ((8, 6, 0x50),)),)}
