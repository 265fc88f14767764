"""What a device's USB controller does: takes transfers, asks the model's handlers, answers by the rules of the bus.

Owns: configurations and alternate settings, halts, the order of transfers on each endpoint, packets (short, zero
length, too many), the reaction to a fault. Must never: know sockets, or end because a handler failed: that is a stall
and a line in the log. Runs in the loop's thread only. Called by: device.py (from handlers), plugged.py.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from udf.testing.devices.layout import Configuration, Endpoint, Kind
from udf.testing.devices.loop import Loop
from udf.testing.devices.transfers import (
    EOVERFLOW,
    EPIPE,
    EPROTO,
    ESHUTDOWN,
    OK,
    Action,
    Nak,
    Pipe,
    Stall,
    Transfer,
)
from udf.usb.usbip import Speed

if TYPE_CHECKING:
    from udf.testing.devices.device import Device

log = logging.getLogger("udf.devices")
_NOTHING = b""


class Engine:
    """The controller of one device while it is plugged in."""

    def __init__(self, device: Device, loop: Loop, finished: Callable[[Transfer, int, bytes | memoryview], None]):
        self.device = device
        self.loop = loop
        self.configuration: Configuration | None = None
        self.alternates: list[int] = []
        self.control = Pipe(Endpoint(0, Kind.CONTROL, device.max_packet0), device.speed)
        self.pipes: dict[int, Pipe] = {}
        self.unplug: Callable[[float], None] = lambda _back: None
        self.remote_wakeup = False
        self._finished = finished

    # --- the host's side ---

    def submit(self, transfer: Transfer) -> None:
        """A transfer has arrived, with the fault that is decided for it."""
        action = transfer.action
        if action is not None and action.kind == "unplug" and not action.late:
            self.unplug(action.seconds)
            return
        pipe = self.control if transfer.setup is not None else self.pipes.get(transfer.address)
        if pipe is None or (bool(transfer.packets) != (pipe.kind is Kind.ISO)):
            self._end(transfer, EPROTO)  # nobody answers there
            return
        if action is not None and not action.late:
            if action.kind == "drop":
                transfer.held = True
            elif action.kind == "delay":
                transfer.held = True
                self.loop.later(action.seconds, lambda: self._release(pipe, transfer))
        pipe.waiting.append(transfer)
        if len(pipe.waiting) == 1:
            self.pump(pipe)

    def cancel(self, transfer: Transfer) -> None:
        """Whoever asked does not wait any more."""
        transfer.done = True
        pipe = self.control if transfer.setup is not None else self.pipes.get(transfer.address)
        if pipe is not None and transfer in pipe.waiting:
            pipe.waiting.remove(transfer)
            self.pump(pipe)

    def pump(self, pipe: Pipe) -> None:
        """Go on with the transfers of an endpoint, as far as the device lets."""
        if pipe.busy or pipe.blocked:
            pipe.again = True
            return
        pipe.busy = True
        try:
            while pipe.waiting:
                transfer = pipe.waiting[0]
                if transfer.held:
                    return
                pipe.again = False
                if not self._serve(pipe, transfer):
                    if pipe.again:
                        continue
                    return
                # A handler may have unplugged, reset or reconfigured its own device.
                if pipe.waiting and pipe.waiting[0] is transfer:
                    pipe.waiting.popleft()
                if pipe.blocked:
                    return
        finally:
            pipe.busy = False

    def end_all(self, status: int) -> None:
        """Everything that waits ends so."""
        for pipe in (self.control, *self.pipes.values()):
            self._flush(pipe, status)

    def forget(self) -> None:
        """The host's end is gone: nobody waits any more. What the device has queued, it still has."""
        for pipe in (self.control, *self.pipes.values()):
            for transfer in pipe.waiting:
                transfer.done = True
            pipe.waiting.clear()

    # --- one transfer ---

    def _serve(self, pipe: Pipe, transfer: Transfer) -> bool:
        """Try; whether it is over."""
        action = transfer.action
        if action is not None and not action.late and (status := _AT_ONCE.get(action.kind)) is not None:
            if status == EPIPE and pipe is not self.control:
                pipe.halted = True
            self._end(transfer, status)
            return True
        try:
            if pipe is self.control:
                return self._serve_control(transfer)
            if pipe.kind is Kind.ISO:
                return self._serve_iso(pipe, transfer)
            if pipe.is_in:
                return self._serve_in(pipe, transfer)
            if pipe.halted:
                self._end(transfer, EPIPE)
                return True
            data = transfer.out if action is None else _spoil_out(transfer)
            self.device.on_out(transfer.address, data)
            transfer.actual = len(data)
            pipe.passed(len(data))
        except Nak:
            return transfer.done
        except Stall:
            pipe.halted = pipe is not self.control
            self._end(transfer, EPIPE, b"".join(transfer.got))
            return True
        except Exception:
            log.exception("%s: a handler failed; the transfer is stalled", self.device)
            pipe.halted = pipe is not self.control
            self._end(transfer, EPIPE)
            return True
        self._end(transfer, OK)
        return True

    def _serve_in(self, pipe: Pipe, transfer: Transfer) -> bool:
        size, on_in, address = pipe.size, self.device.on_in, transfer.address
        while (room := transfer.length - transfer.actual) > 0:
            if pipe.halted:
                self._end(transfer, EPIPE, b"".join(transfer.got))
                return True
            data = on_in(address, room)
            if data is None:
                return transfer.done
            length = len(data)
            if length > room:
                self._end(transfer, EOVERFLOW)
                return True
            if length:
                transfer.got.append(data)
                transfer.actual += length
            if length % size or not length:
                break  # a short packet is the end
        got = transfer.got
        pipe.passed(transfer.actual)
        self._end(transfer, OK, got[0] if len(got) == 1 else b"".join(got))
        return True

    def _serve_control(self, transfer: Transfer) -> bool:
        setup = transfer.setup
        assert setup is not None
        out = transfer.out if transfer.action is None else _spoil_out(transfer)
        reply = self.device.control(setup, out)
        if setup.is_in:
            self._end(transfer, OK, (reply or b"")[: min(setup.length, transfer.length)])
        else:
            transfer.actual = len(out)
            self._end(transfer, OK)
        return True

    def _serve_iso(self, pipe: Pipe, transfer: Transfer) -> bool:
        """Isochronous transfers take the time that their packets take, and never wait for data."""
        now = monotonic()
        begin = max(now, pipe.due)
        pipe.due = begin + len(transfer.packets) * self._period(pipe)
        transfer.frame = int(begin * 1000) & 0x7FF
        self.loop.later(pipe.due - now, lambda: self._iso_done(pipe, transfer))
        transfer.held = True
        return True

    def _iso_done(self, pipe: Pipe, transfer: Transfer) -> None:
        if transfer.done:
            return
        results: list[tuple[int, int]] = []
        chunks: list[bytes | memoryview] = []
        for offset, length in transfer.packets:
            status, data = OK, _NOTHING
            try:
                if pipe.is_in:
                    data = bytes(self.device.on_in(transfer.address, length) or _NOTHING)
                    if len(data) > length:
                        status, data = EOVERFLOW, _NOTHING
                else:
                    data = transfer.out[offset : offset + length]
                    self.device.on_out(transfer.address, data)
            except (Nak, Stall):
                data = _NOTHING
            except Exception:
                log.exception("%s: a handler failed; the packet is lost", self.device)
                status, data = EPROTO, _NOTHING
            results.append((len(data), status))
            chunks.append(data)
        if transfer.done:
            return
        transfer.actual = sum(length for length, _ in results)
        transfer.results = results
        self._end(transfer, OK, b"".join(chunks) if pipe.is_in else _NOTHING)

    def _period(self, pipe: Pipe) -> float:
        interval = min(max(pipe.endpoint.interval, 1), 16)
        return (1 << interval - 1) * (125e-6 if self.device.speed >= Speed.HIGH else 1e-3)

    def _end(self, transfer: Transfer, status: int, data: bytes | memoryview = _NOTHING) -> None:
        if transfer.done:
            return
        action = transfer.action
        if action is not None:
            if action.late and status == OK:
                if action.kind == "delay":
                    self._answer_later(transfer, status, data)
                    return
                if action.kind == "unplug":
                    self.unplug(action.seconds)
                    return
                if action.kind == "drop":
                    return
                status, data = _AT_ONCE[action.kind], _NOTHING
                if status == EPIPE and (pipe := self.pipes.get(transfer.address)) is not None:
                    pipe.halted = transfer.setup is None
            elif transfer.is_in and status == OK:
                data = _spoil(action, data)
        transfer.done = True
        if len(transfer.results) != len(transfer.packets):
            transfer.results = [(0, status)] * len(transfer.packets)
        if transfer.is_in:
            transfer.actual = len(data)
        elif status != OK:
            transfer.actual = 0
        self._finished(transfer, status, data)

    def _answer_later(self, transfer: Transfer, status: int, data: bytes | memoryview) -> None:
        """The device has done it; the answer, and all after it on this endpoint, take their time."""
        assert transfer.action is not None
        pipe = self.control if transfer.setup is not None else self.pipes.get(transfer.address)
        if pipe is not None:
            pipe.blocked = True

        def answer() -> None:
            self._end(transfer, status, data)
            if pipe is not None:
                pipe.blocked = False
                self.pump(pipe)

        self.loop.later(transfer.action.seconds, answer)
        transfer.action = transfer.action._replace(late=False)

    def _release(self, pipe: Pipe, transfer: Transfer) -> None:
        transfer.held = False
        self.pump(pipe)

    def _flush(self, pipe: Pipe, status: int) -> None:
        waiting = list(pipe.waiting)
        pipe.waiting.clear()
        for transfer in waiting:
            self._end(transfer, status)

    # --- the device's side ---

    def push(self, address: int, data: bytes, zlp: bool) -> None:
        """Queue data to the host; nothing is queued on an endpoint that is not there."""
        pipe = self.pipes.get(address)
        if pipe is None:
            return
        pipe.queue.append(data)
        if zlp and data and len(data) % pipe.size == 0:
            pipe.queue.append(_NOTHING)
        if pipe.waiting:
            self.pump(pipe)

    def halt(self, address: int, wedge: bool) -> None:
        """Stall an endpoint from now on."""
        if (pipe := self.pipes.get(address)) is not None:
            pipe.halted = True
            pipe.wedged = wedge
            self.pump(pipe)

    def clear_halt(self, address: int) -> bool:
        """CLEAR_FEATURE(ENDPOINT_HALT); False if there is no such endpoint."""
        pipe = self.pipes.get(address)
        if pipe is None:
            return address & 0x7F == 0
        pipe.toggle = 0  # chapter 9.4.5: halted or not
        if not pipe.wedged:
            pipe.halted = False
            self.pump(pipe)
        return True

    def configure(self, configuration: Configuration | None) -> None:
        """SET_CONFIGURATION: every endpoint begins anew."""
        old, self.pipes = self.pipes, {}
        self.configuration = configuration
        self.alternates = [0] * len(configuration.interfaces) if configuration else []
        for pipe in old.values():
            self._flush(pipe, ESHUTDOWN)
        for number in range(len(self.alternates)):
            self._open(number)

    def set_alternate(self, number: int, alternate: int) -> bool:
        """SET_INTERFACE: the endpoints of that interface begin anew; False if there is no such setting."""
        if self.configuration is None or number >= len(self.alternates):
            return False
        interface = self.configuration.interfaces[number]
        if interface.setting(alternate) is None:
            return False
        gone = interface.setting(self.alternates[number])
        assert gone is not None
        self.alternates[number] = alternate
        for endpoint in gone.endpoints:
            if (pipe := self.pipes.pop(endpoint.address, None)) is not None:
                self._flush(pipe, ESHUTDOWN)
        self._open(number)
        return True

    def _open(self, number: int) -> None:
        assert self.configuration is not None
        setting = self.configuration.interfaces[number].setting(self.alternates[number])
        for endpoint in setting.endpoints if setting else ():
            self.pipes[endpoint.address] = Pipe(endpoint, self.device.speed)


_AT_ONCE = {"stall": EPIPE, "eio": EPROTO, "babble": EOVERFLOW}


def _spoil_out(transfer: Transfer) -> bytes:
    """What of the host's data reaches the device."""
    action = transfer.action
    return transfer.out if action is None else bytes(_spoil(action, transfer.out))


def _spoil(action: Action, data: bytes | memoryview) -> bytes | memoryview:
    """Data as a fault leaves them."""
    if action.kind == "short":
        return data[: len(data) // 2 if action.size is None else action.size]
    if action.kind == "corrupt" and data:
        changed = bytearray(data)
        choice = random.Random(action.seed)  # noqa: S311 - reproducible on purpose
        for _ in range(action.size or 1):
            changed[choice.randrange(len(changed))] ^= choice.randrange(1, 256)
        return bytes(changed)
    return data
