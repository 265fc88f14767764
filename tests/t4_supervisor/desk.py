"""Sticks on an emulated bus, and everything that a daemon has for them: the bus, the binder, the registry, drivers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from lab import Lab, laboratory
from real import PATIENCE

from udf.supervisor.blocks import BlockEndpoint
from udf.supervisor.devices import Devices
from udf.supervisor.instance import State
from udf.supervisor.mounts import Mount
from udf.supervisor.tenants import Tenant
from udf.testing.devices import Plugged
from udf.testing.devices.storage import Storage

MIB = 1 << 20


class Desk:
    """Plugs sticks in and pulls them out; what follows is the binder's."""

    def __init__(self, lab: Lab, devices: Devices, home: Path) -> None:
        self.lab = lab
        self.devices = devices
        self.home = home

    def image(self, name: str, size: int = 2 * MIB) -> Path:
        path = self.home / f"{name}.img"
        path.write_bytes(bytes(size))
        return path

    async def plug(self, image: Path, serial: str = "S1", **options: object) -> Plugged:
        device = Storage(str(image), serial=serial, **options)  # type: ignore[arg-type]
        return await trio.to_thread.run_sync(self.lab.bus.plug, device)

    async def pull(self, plugged: Plugged) -> None:
        """Into the drawer: it is `put_back` into the same port."""
        await trio.to_thread.run_sync(plugged.unplug)

    async def put_back(self, plugged: Plugged) -> None:
        await trio.to_thread.run_sync(plugged.replug)

    async def take_away(self, plugged: Plugged) -> None:
        """Its port is free again, and its image too."""
        await trio.to_thread.run_sync(self.lab.bus.unplug, plugged)

    async def until(self, condition, seconds: float = PATIENCE) -> None:  # type: ignore[no-untyped-def]
        with trio.fail_after(seconds):
            while not condition():
                await trio.sleep(0.005)

    def tenant(self, name: str) -> Tenant | None:
        return next((each for each in self.devices.binder.tenants if each.name == name), None)

    def disk_of(self, name: str) -> BlockEndpoint | None:
        found = [each for each in self.lab.registry.endpoints(self.lab.registry_owner) if each.plan.name == name]
        return found[0] if found and isinstance(found[0], BlockEndpoint) else None

    async def disk(self, name: str = "disk0", *, other_than: BlockEndpoint | None = None) -> BlockEndpoint:
        """The disk that is bound by this name."""

        def is_there() -> bool:
            tenant, disk = self.tenant(name), self.disk_of(name)
            return tenant is not None and tenant.serves and disk is not None and disk is not other_than

        await self.until(is_there)
        disk = self.disk_of(name)
        assert disk is not None
        return disk

    async def mounted(
        self, image: Path, serial: str = "S1", name: str = "disk0", **options: str
    ) -> tuple[Plugged, Mount]:
        """A stick with a volume."""
        plugged = await self.plug(image, serial)
        disk = await self.disk(name)
        return plugged, await self.lab.mount(disk, self.home / f"mnt-{name}", **options)

    async def is_away(self, volume: Mount) -> None:
        assert volume.below is not None
        await self.until(lambda: volume.is_gone or volume.below.is_waiting)  # type: ignore[union-attr]
        assert volume.instance.state is State.DETACHED

    async def goes_on(self, volume: Mount) -> None:
        await self.until(lambda: volume.is_gone or volume.instance.state is State.ACTIVE)
        assert not volume.is_gone, volume.instance.text


@asynccontextmanager
async def desk_at(home: Path) -> AsyncIterator[Desk]:
    """`home` is the supervisor's own directory. At the end nothing may be left."""
    async with laboratory(home) as lab, trio.open_nursery() as reaper:
        async with trio.open_nursery() as nursery:
            devices = Devices(home, lab.registry, nursery, reaper, usbip=[lab.bus.path])
            await nursery.start(devices.run)
            try:
                yield Desk(lab, devices, home)
            finally:
                devices.binder.close()
                with trio.CancelScope(shield=True), trio.move_on_after(30):
                    await lab.registry.stop_all(trio.Event())
            nursery.cancel_scope.cancel()
        await devices.close()
