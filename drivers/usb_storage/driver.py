"""The driver: a device's LUNs as block units.

Owns: what of the device is used, the units by name, and the end of a generation whose device has forgotten writes.
Must never: talk to the device in its own loop. Called by: the driver host.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import usb.core
import usb.util

from udf import BlockUnit, ContractError, DeviceGone, UsbDriver

from .engine import Engine
from .pipes import OneByOne, Pipes, Queued
from .probe import Facts
from .scsi import Data
from .transport import Transport, TransportFault
from .unit import LogicalUnit

log = logging.getLogger("usb_storage")

MASS_STORAGE, BULK_ONLY = 0x08, 0x50
SUBCLASSES = {0x06: 0, 0x05: 12, 0x02: 12, 0x01: 0, 0x04: 12}  # command set -> to how many bytes commands are filled up
GAP = 1.0  # seconds for which a slot is shown empty when its medium has become another one
POLL = 2.0  # seconds between looks at a removable medium that nobody asks for anything
SUPER_SPEED = 4  # as pyusb counts
# Bytes in one command, for slower and for SuperSpeed devices: what macOS asks of them, so they know it.
DEFAULT_TRANSFER = {False: 128 << 10, True: 1 << 20}


class Unit(BlockUnit):
    """One medium in one LUN; when another one comes it gets an object of its own."""

    def __init__(self, engine: Engine, unit: LogicalUnit, facts: Facts) -> None:
        self._engine, self._unit, self._medium = engine, unit, unit.medium
        self.size = facts.size
        self.block_size = facts.block_size
        self.read_only = facts.read_only
        self.can_trim = bool(facts.trim_by) and not facts.read_only
        self.trim_zeroes = facts.trim_zeroes
        self.shape = (unit.medium, facts)  # by which it is known again

    async def read(self, offset: int, size: int) -> Data:
        return await self._engine.run(self._unit.read, self._medium, offset, size)

    async def read_into(self, offset: int, target: memoryview) -> None:
        await self._engine.run(self._unit.read_into, self._medium, offset, target)

    def read_soon(self, offset: int, target: memoryview, done: Callable[[Exception | None], None]) -> bool:
        self._engine.begin(done, partial(self._unit.read_into, self._medium, offset, target))
        return True

    async def write(self, offset: int, data: Data) -> None:
        await self._engine.run(self._unit.write, self._medium, offset, data)

    async def flush(self) -> None:
        await self._engine.run(self._unit.flush, self._medium)

    async def trim(self, offset: int, size: int) -> None:
        await self._engine.run(self._unit.trim, self._medium, offset, size)


class UsbStorage(UsbDriver):
    """Any device of the USB mass storage class that speaks Bulk-Only Transport."""

    def __init__(self, max_transfer: int = 0, queue: bool = True) -> None:
        self._max_transfer = max_transfer
        self._queues = queue
        self._units: dict[int, LogicalUnit] = {}
        self._shown: dict[int, Unit] = {}
        self._unseen: set[LogicalUnit] = set()  # to be looked at before the units are told again
        self._gaps: set[LogicalUnit] = set()  # shown empty although they are not any more
        self._polled = 0.0

    async def start(self) -> None:
        """Reset what a generation before may have left, and see what is there."""
        self._engine = Engine(self._idle)
        interface, endpoint_in, endpoint_out, fill = self._endpoints()
        pipes = self._pipes()
        self._transport = Transport(pipes, interface, endpoint_in, endpoint_out, fill=fill)
        try:
            await self._engine.run(self._begin)
        except TransportFault as exc:
            raise ContractError(f"the device does not behave as mass storage: {exc}") from exc
        if not self._units:
            raise ContractError("the device has no unit with blocks")

    async def eject(self) -> None:
        for unit in list(self._units.values()):
            await self._engine.run(unit.eject)

    async def stop(self) -> None:
        self._engine.close()

    async def units(self) -> Mapping[str, BlockUnit]:
        if self._unseen or self._gaps:
            await self._engine.run(self._look)
        first = min(self._units, default=0)
        return {"" if lun == first else f"lun{lun}": unit for lun, unit in dict(self._shown).items()}

    # ---- in the engine's thread

    def _begin(self) -> None:
        self._transport.begin()
        limit = self._max_transfer or DEFAULT_TRANSFER[(self.device.speed or 0) >= SUPER_SPEED]
        for lun in range(self._transport.max_lun() + 1):
            unit = LogicalUnit(self._transport, lun, max_transfer=limit, notice=self._notice, lost=self._give_up)
            if unit.look() is not None:
                self._units[lun] = unit
        self._polled = time.monotonic()
        self._show()

    def _look(self) -> None:
        while self._unseen:
            self._unseen.pop().look()
        self._show()

    def _show(self) -> None:
        for lun, unit in self._units.items():
            shown, facts = self._shown.get(lun), unit.facts
            if facts is None:
                self._shown.pop(lun, None)
                continue
            if facts.size and _gap_of(unit) > 0:
                # Whoever keeps something for the old medium must see that it went, though the new one be as large.
                self._gaps.add(unit)
                facts = replace(facts, size=0)
            if shown is None or shown.shape != (unit.medium, facts):
                self._shown[lun] = Unit(self._engine, unit, facts)

    def _notice(self, unit: LogicalUnit) -> None:
        if unit not in self._unseen:
            self._unseen.add(unit)
            self._engine.tell(self.units_changed)

    def _idle(self) -> float | None:
        """Look, now and then, for media that come, go or become ready."""
        for unit in [each for each in self._gaps if _gap_of(each) <= 0]:
            self._gaps.discard(unit)
            self._show()
            self._engine.tell(self.units_changed)
        pauses = [self._poll(), *(max(0.01, _gap_of(unit)) for unit in self._gaps)]
        return min((pause for pause in pauses if pause is not None), default=None)

    def _poll(self) -> float | None:
        waiting = [
            unit for unit in self._units.values() if unit.facts and (unit.facts.removable or not unit.facts.size)
        ]
        if not waiting or self.usb.gone.is_set():
            return None
        left = self._polled + POLL - time.monotonic()
        if left > 0:
            return left
        for unit in waiting:
            try:
                unit.poll()
            except (DeviceGone, usb.core.USBError):
                return None
        self._polled = time.monotonic()
        return POLL

    def _give_up(self, reason: str) -> None:
        """The device has forgotten what it had acknowledged. Who has it still writes it again to the next generation.

        Nothing that is under way is answered: in this generation nobody could tell which flush is true.
        """
        log.error("%s; this generation of the driver ends here", reason)
        os._exit(1)

    # ---- what of the device is used

    def _pipes(self) -> Pipes:
        connection = getattr(self.device.backend, "connection", None) if self._queues else None
        return OneByOne(self.device) if connection is None else Queued(self.device, connection)

    def _endpoints(self) -> tuple[int, int, int, int]:
        """The interface, its bulk endpoints, and to how many bytes commands are filled up."""
        try:
            configuration = self.device.get_active_configuration()
        except usb.core.USBError:
            self.device.set_configuration()
            configuration = self.device.get_active_configuration()
        for interface in configuration:
            kind = (interface.bInterfaceClass, interface.bInterfaceProtocol)
            if kind != (MASS_STORAGE, BULK_ONLY) or interface.bInterfaceSubClass not in SUBCLASSES:
                continue
            found: dict[int, int] = {}
            for endpoint in interface:
                if usb.util.endpoint_type(endpoint.bmAttributes) == usb.util.ENDPOINT_TYPE_BULK:
                    direction = usb.util.endpoint_direction(endpoint.bEndpointAddress)
                    found.setdefault(direction, endpoint.bEndpointAddress)
            if len(found) != 2:
                raise ContractError("the mass storage interface lacks a bulk endpoint")
            number = interface.bInterfaceNumber
            try:
                # Of several interfaces only the one that this driver was bound to can be claimed.
                usb.util.claim_interface(self.device, number)
                if interface.bAlternateSetting:
                    self.device.set_interface_altsetting(number, interface.bAlternateSetting)
            except usb.core.USBError as exc:
                if exc.errno == errno.ENODEV:
                    raise DeviceGone(str(exc)) from exc
                if exc.errno == errno.EBUSY:
                    continue
                raise ContractError(f"the mass storage interface cannot be used: {exc}") from exc
            fill = SUBCLASSES[interface.bInterfaceSubClass]
            return number, found[usb.util.ENDPOINT_IN], found[usb.util.ENDPOINT_OUT], fill
        raise ContractError("the device has no mass storage interface with Bulk-Only Transport")


def _gap_of(unit: LogicalUnit) -> float:
    """Seconds for which it is to be shown empty."""
    return unit.left_at + GAP - time.monotonic()
