"""What the binder's drivers hold of the devices of a bus: all of one, or an interface of it.

Owns: the connection of a device that several drivers share. Must never: keep that connection when nobody uses it any
more, or wait for a device in the loop. Called by: devices.py (makes them), recovery.py (as leases).

A device has one connection. If only one driver uses it, that driver has it, with nothing between; if several do, each
gets one of its own from udf.usb.share, which carries their requests on the one that there is.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

import trio

from udf.supervisor.lease import Lease
from udf.usb.bus import Bus, BusDevice
from udf.usb.matching import Binding, DeviceFacts
from udf.usb.share import Share

Make = Callable[[Binding, bool], Lease]  # True: others have, or will have, its other interfaces


class BusLease(Lease):
    """One arrival of a device, for one driver."""

    def __init__(self, bus: Bus, device: BusDevice, interface: int | None) -> None:
        super().__init__(device.spec(interface))
        self._bus = bus
        self._key = device.key
        self._interface = interface

    async def open(self) -> socket.socket:
        """A connection for one generation, whose `spec` tells the configuration that the one before has left."""
        connection = await self._bus.open(self._key)
        device = self._bus.devices().get(self._key)
        if device is not None:
            self.spec = device.spec(self._interface)
        return connection

    def close(self) -> None:
        """The bus keeps nothing of it."""


class SharedLease(Lease):
    """One interface of a device whose other interfaces others have."""

    def __init__(self, shared: _SharedDevice, device: BusDevice, interface: int) -> None:
        super().__init__(device.spec(interface))
        self._shared = shared
        self._interface = interface

    async def open(self) -> socket.socket:
        """A connection for one generation: to its interface, and those that belong to it by the device's own word."""
        return await self._shared.connect(self._interface)

    def close(self) -> None:
        """The last one closes the device's connection."""
        self._shared.let_go()


class _SharedDevice:
    """The one connection of a device, from its first use until nobody has a lease any more."""

    def __init__(self, bus: Bus, device: BusDevice, nursery: trio.Nursery) -> None:
        self.leases = 0
        self._bus = bus
        self._device = device
        self._nursery = nursery
        self._share: Share | None = None
        self._opening = trio.Lock()

    async def connect(self, interface: int) -> socket.socket:
        """A connection to an interface; DeviceGone, or an OSError (EBUSY: try again)."""
        async with self._opening:
            if self._share is not None:
                try:
                    return self._share.connect(interface)
                except OSError as exc:
                    if exc.errno != errno.ENODEV:
                        raise
                self._drop()  # its connection has ended; whether the device has gone too, the bus knows
            connection = await self._bus.open(self._device.key)
            self._share = Share(connection, self._device.spec())
            return self._share.connect(interface)

    def let_go(self) -> None:
        """One lease less."""
        self.leases -= 1
        if not self.leases:
            self._drop()

    def _drop(self) -> None:
        if self._share is not None:
            # Its thread ends in a moment, but this is the supervisor's loop.
            self._nursery.start_soon(trio.to_thread.run_sync, self._share.close)
            self._share = None


class Leases:
    """Makes them. `nursery` ends with the daemon."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._shared: dict[str, _SharedDevice] = {}

    def of(self, bus: Bus, device: BusDevice, facts: DeviceFacts) -> Make:
        """How leases of this device are made."""

        def make(binding: Binding, shared: bool) -> Lease:
            if not shared or binding.interface is None:
                return BusLease(bus, device, binding.interface)
            whole = self._shared.get(facts.key)
            if whole is None or not whole.leases:
                self._shared = {key: each for key, each in self._shared.items() if each.leases}
                whole = self._shared[facts.key] = _SharedDevice(bus, device, self._nursery)
            whole.leases += 1
            return SharedLease(whole, device, binding.interface)

        return make
