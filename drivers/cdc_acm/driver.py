"""The driver: a port and a terminal, and the bytes between them.

Owns: the life of a connection between a program and the device. Must never: hold more than one piece in each
direction: who is slow makes the other wait (the device by NAK, the program by a full terminal), and nothing is lost.
Called by: the driver host.
"""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Iterator

import trio
import usb.core

from udf import ContractError, DeviceGone, UsbDriver, UserError

from .functional import CARRIER, Coding, Notifications, parse_format
from .line import Settings, Terminal
from .port import Endpoints, Port, find_port

log = logging.getLogger("cdc_acm")

PIECE = 4096  # bytes that are under way in one direction
LOOK = 0.1  # seconds between looks at what a program has set while no data tell that it is at work
DRAIN = 30.0  # seconds for what a program had written before it closed (closing_wait of a serial port)
ERROR_PAUSE = 0.05
MAX_ERRORS = 20  # transfers that fail in a row: then the driver gives up


class CdcAcm(UsbDriver):
    """A USB serial port."""

    def __init__(self, format: str = "8N1") -> None:
        coding = parse_format(format)
        if coding is None:
            raise UserError(f"the option format is {format!r}: it is like 8N1, 7E1 or 8N2")
        self._format = coding
        self._has_carrier = False

    async def start(self) -> None:
        """Find the port; a device without a usable one ends here."""
        try:
            self._endpoints: Endpoints = find_port(self.device)
        except usb.core.USBError as exc:
            raise ContractError(f"the device cannot be used: {exc}") from exc
        self._port = Port(self.usb, self._endpoints)

    async def serve(self, terminal: int) -> None:
        """Until the device is gone (DeviceGone), or the driver is stopped."""
        line = Terminal(terminal)
        gone: DeviceGone | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_state, line)
                while True:
                    await line.wait_open()
                    await self._connect(line)
        except* DeviceGone as group:
            gone = DeviceGone(str(next(_leaves(group))))
        finally:
            line.close()
        if gone is not None:
            raise gone

    async def _connect(self, line: Terminal) -> None:
        """From a program's opening of the terminal to the last close."""
        settings = line.settings()
        await self._apply(settings)
        async with trio.open_nursery() as nursery:
            writing = trio.CancelScope()
            nursery.start_soon(self._to_program, line)
            nursery.start_soon(self._follow, line, writing)
            with writing:
                await self._to_device(line)
            nursery.cancel_scope.cancel()
        if writing.cancelled_caught:
            log.warning("the program has gone, and the device does not take its last bytes")
        line.forget_input()
        if line.settings().hangs_up and not line.is_open:
            await self._port.set_lines(raised=False)

    async def _apply(self, settings: Settings) -> None:
        """A speed of 0 means: hang up. The line keeps its speed then."""
        if settings.baud:
            stop = 2 if settings.two_stops else self._format.stop
            await self._port.set_coding(Coding(settings.baud, stop, self._format.parity, self._format.bits))
        await self._port.set_lines(raised=bool(settings.baud))

    async def _follow(self, line: Terminal, writing: trio.CancelScope) -> None:
        """What the program sets, and that it has gone.

        A pseudo-terminal tells its master of settings only in a mode that changes what programs see (EXTPROC).
        """
        while True:
            await trio.sleep(LOOK)
            if line.is_open:
                writing.deadline = math.inf
                await self._apply(line.settings())
            else:
                writing.deadline = min(writing.deadline, trio.current_time() + DRAIN)

    async def _to_device(self, line: Terminal) -> None:
        """Until the last program has closed the terminal and the device has what it had written."""
        endpoint = self._endpoints.bulk_out
        while data := await line.read(PIECE):
            await self._apply(line.settings())
            errors = 0
            while data:
                try:
                    # Without a time-out: of a transfer that is given up nobody can tell how much the device has taken.
                    data = data[await self.usb.write(endpoint, data, timeout=None) :]
                    errors = 0
                except usb.core.USBError as exc:
                    errors += 1
                    await self._after_error(exc, endpoint, errors)

    async def _to_program(self, line: Terminal) -> None:
        endpoints = self._endpoints
        size = max(PIECE - PIECE % endpoints.packet, endpoints.packet)
        errors = 0
        while True:
            try:
                data = await self.usb.read(endpoints.bulk_in, size, timeout=None)
                errors = 0
            except usb.core.USBError as exc:
                errors += 1
                await self._after_error(exc, endpoints.bulk_in, errors)
                continue
            await line.write(data)

    async def _after_error(self, exc: usb.core.USBError, endpoint: int, errors: int) -> None:
        if errors > MAX_ERRORS:
            raise ContractError(f"the device fails {errors} times in a row: {exc}") from exc
        if exc.errno == errno.EPIPE:
            await self.usb.clear_halt(endpoint)
        if errors > 1:
            await trio.sleep(ERROR_PAUSE * errors)

    async def _watch_state(self, line: Terminal) -> None:
        """What the device tells of its modem lines."""
        endpoints = self._endpoints
        if not endpoints.notify:
            return
        notifications = Notifications()
        errors = 0
        while True:
            try:
                packet = await self.usb.read(endpoints.notify, endpoints.notify_packet, timeout=None)
                errors = 0
            except usb.core.USBError as exc:
                errors += 1
                await self._after_error(exc, endpoints.notify, errors)
                continue
            for state in notifications.feed(packet):
                self._take_state(line, state)

    def _take_state(self, line: Terminal, state: int) -> None:
        had, self._has_carrier = self._has_carrier, bool(state & CARRIER)
        if had and not self._has_carrier and line.is_open and not line.settings().is_local and not line.hang_up():
            log.warning("the carrier is lost, but this process may not hang up on the program that uses the terminal")


def _leaves(group: BaseExceptionGroup[DeviceGone]) -> Iterator[DeviceGone]:
    for each in group.exceptions:
        if isinstance(each, BaseExceptionGroup):
            yield from _leaves(each)
        else:
            yield each
