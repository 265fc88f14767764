"""A registry in the test's own process, with devices of an emulated bus: real shims, real hosts, real connections."""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from real import PATIENCE

from udf import messages
from udf.errors import DeviceGone
from udf.manifest import read_manifest
from udf.supervisor import catalog, spawn
from udf.supervisor.attach import DevicePlan
from udf.supervisor.blocks import BlockEndpoint
from udf.supervisor.endpoint import Endpoint
from udf.supervisor.instance import Event, EventLog, State
from udf.supervisor.lease import Lease
from udf.supervisor.mounts import Mount
from udf.supervisor.registry import MountRequest, Registry
from udf.supervisor.spawn import Identity
from udf.testing.devices import Device, Emulator, Plugged

DRIVERS = Path(__file__).with_name("device_drivers")
VOLUME_DRIVERS = Path(__file__).with_name("volume_drivers")
ROOT = Path(__file__).resolve().parents[2]


class EmulatedLease(Lease):
    """A device of an emulator; the test says when it is gone."""

    def __init__(self, plugged: Plugged) -> None:
        device = plugged.device
        configuration = device.configuration_descriptor(0)
        assert configuration is not None
        super().__init__(
            messages.DeviceSpec(
                bus="usbip",
                key=f"{plugged.busid}/{plugged.arrival}",
                busnum=plugged.busnum,
                devnum=plugged.devnum,
                port=plugged.busid,
                speed=int(device.speed),
                device_descriptor=base64.b64encode(device.device_descriptor()).decode(),
                configurations=[base64.b64encode(configuration).decode()],
                configuration=1,
                serial=device.serial or "",
            )
        )
        self.plugged = plugged
        self.arrival = plugged.arrival
        self.opened = 0
        self.closed = False
        self.refuse: list[OSError] = []  # what the next attempts end with

    async def open(self) -> socket.socket:
        await trio.lowlevel.checkpoint()
        if self.refuse:
            raise self.refuse.pop(0)
        if not self.plugged.present or self.plugged.arrival != self.arrival:
            raise DeviceGone("unplugged")
        self.opened += 1
        return self.plugged.connect()

    def close(self) -> None:
        self.closed = True


class Lab:
    """Plugs devices and binds drivers to them."""

    def __init__(self, registry: Registry, events: EventLog, bus: Emulator, home: Path) -> None:
        self.registry = registry
        self.events = events
        self.bus = bus
        self.home = home
        self.registry_owner = Identity.own()

    async def plug(self, device: Device, name: str | None = None) -> EmulatedLease:
        return EmulatedLease(await trio.to_thread.run_sync(self.bus.plug, device, name))

    async def unplug(self, lease: EmulatedLease, *, told: bool = True) -> None:
        """Pull it, and say so as its bus would."""
        await trio.to_thread.run_sync(lease.plugged.unplug)
        if told:
            lease.end()

    def plan(
        self,
        name: str,
        driver: str | Path,
        lease: Lease | None = None,
        options: Mapping[str, str] | None = None,
        source: str | None = None,
    ) -> DevicePlan:
        path = Path(driver) if "/" in str(driver) else DRIVERS / f"{driver}.py"
        return DevicePlan(
            name=name,
            driver=catalog.from_manifest(read_manifest(str(path), path.stem)),
            lease=lease,
            source=source,
            options=options or {},
        )

    async def start(self, name: str, driver: str | Path, lease: Lease | None = None, **more: object) -> Endpoint:
        return await self.registry.start_device(self.plan(name, driver, lease, **more))  # type: ignore[arg-type]

    async def mount(
        self, disk: Endpoint, mountpoint: Path, export: str = "disk", *, driver: str = "window", **options: str
    ) -> Mount:
        """A volume of it."""
        assert isinstance(disk, BlockEndpoint)
        mountpoint.mkdir(exist_ok=True)
        request = MountRequest(
            mountpoint=str(mountpoint),
            driver=str(VOLUME_DRIVERS / f"{driver}.py"),
            options=dict(options),
        )
        return await self.registry.mount(request, self.registry_owner, on=disk, export=export)

    async def replug(self, lease: EmulatedLease, seconds: float = 0.0) -> EmulatedLease:
        """Put it back into its port: another arrival, with another lease, which nobody has been offered yet."""
        await trio.to_thread.run_sync(lease.plugged.replug, seconds)
        return EmulatedLease(lease.plugged)

    def place(self, name: str) -> Path:
        return self.home / "dev" / name

    @staticmethod
    def is_resting(endpoint: Endpoint) -> bool:
        """Whether its driver is started again only after a while."""
        return "it is started again in" in endpoint.driver.text

    def life(self, name: str, kind: str) -> list[tuple[str, str]]:
        return [(str(e.state), e.reason) for e in self.told("state") if e.kind == kind and e.name == name]

    def told(self, what: str) -> list[Event]:
        return [event for event in self.events.past() if event.what == what]

    def nothing_is_left(self) -> None:
        assert not list((self.home / "dev").glob("*")), "places are left"
        assert not list((self.home / "block").glob("*")), "sockets are left"
        assert not list((self.home / "locks").glob("*")), "locks are left"


@asynccontextmanager
async def laboratory(home: Path) -> AsyncIterator[Lab]:
    """`home` is the supervisor's own directory. At the end everything is stopped, and nothing may be left."""
    events = EventLog()
    with Emulator() as bus:
        async with trio.open_nursery() as reaper, trio.open_nursery() as nursery:
            nursery.start_soon(spawn.new_zygote().run, reaper)
            registry = Registry(events, nursery, reaper, home=home)
            lab = Lab(registry, events, bus, home)
            yield lab
            with trio.fail_after(30):
                await registry.stop_all(trio.Event())
            nursery.cancel_scope.cancel()
    lab.nothing_is_left()


async def gone(endpoint: Endpoint, seconds: float = PATIENCE) -> None:
    with trio.fail_after(seconds):
        await endpoint.ended.wait()
    assert endpoint.is_gone


async def serves(endpoint: Endpoint, generation: int) -> None:
    """Until this generation serves."""
    with trio.fail_after(PATIENCE):
        while endpoint.instance.state is not State.ACTIVE or endpoint.generation != generation:
            await trio.sleep(0.002)


async def warm_spare(endpoint: Endpoint, *, other_than: int | None = None) -> int:
    """The pid of its spare, once that is the pid of the process that will be the driver: first it is its parent's."""
    with trio.fail_after(PATIENCE):
        while True:
            spare = endpoint.recovery._hosts.spares._spare
            if spare is not None and spare.process._worker_pidfd >= 0 and spare.instance.pid != other_than:
                assert spare.instance.pid is not None
                return spare.instance.pid
            await trio.sleep(0.01)


async def read(path: Path) -> bytes:
    """In a thread, as all that may wait for a driver."""
    return await trio.to_thread.run_sync(path.read_bytes, abandon_on_cancel=True)


async def errno_of_read(path: Path) -> int:
    def fail() -> int:
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.read(descriptor, 100)
            finally:
                os.close(descriptor)
        except OSError as exc:
            return exc.errno or 0
        return 0

    return await trio.to_thread.run_sync(fail, abandon_on_cancel=True)


def write(path: Path, data: bytes, offset: int = 0) -> None:
    file = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(file, data, offset)
        os.fsync(file)
    finally:
        os.close(file)


async def in_thread(work, *arguments):  # type: ignore[no-untyped-def]
    with trio.fail_after(PATIENCE):
        return await trio.to_thread.run_sync(work, *arguments, abandon_on_cancel=True)
