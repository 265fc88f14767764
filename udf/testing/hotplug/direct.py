"""A device model and a driver in one process, without a socket or a thread between them.

Owns: the lock under which all models of a bus run, their timers, and `Link`, which is to `udf.usb.backend.Backend` what
a connection over USB/IP is. Must never: start a thread or open a descriptor (what a driver leaves behind is counted),
or keep a caller for longer than the bus's patience allows. Called by: bus.py, backend.py.

A model's timers run while somebody waits for a transfer, and before each transfer: nothing else takes time here.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import count
from time import monotonic
from typing import TypeVar

from udf.testing.devices.device import Device
from udf.testing.devices.engine import Engine
from udf.testing.devices.loop import Timer
from udf.testing.devices.transfers import SETUP, Setup
from udf.testing.devices.transfers import Transfer as DeviceTransfer
from udf.usb.calls import NO_SETUP, Calls
from udf.usb.errors import Failure, failure_of, usb_error
from udf.usb.urb import Buffer, bytes_of

T = TypeVar("T")
ENODEV = -19
_PATIENCE = 0.5  # seconds for a model's handler to end


class Here:
    """The models' loop, in whichever thread calls: it takes the lock. Stands in for devices.loop.Loop."""

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.RLock())
        self._owner: int | None = None
        self._depth = 0
        self._soon: deque[Callable[[], object]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = count()

    @property
    def inside(self) -> bool:
        """Whether the caller has the lock."""
        return self._owner == threading.get_ident()

    def __enter__(self) -> Here:
        self._condition.acquire()
        self._entered()
        return self

    def enter_within(self, seconds: float) -> bool:
        """Enter, if whoever is inside leaves in time: a model's handler may hang."""
        entered = bool(self._condition.acquire(timeout=seconds))
        if entered:
            self._entered()
        return entered

    def _entered(self) -> None:
        self._owner = threading.get_ident()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        try:
            while self._depth == 1 and self._soon:
                self._soon.popleft()()
        finally:
            self._depth -= 1
            if not self._depth:
                self._owner = None
            self._condition.release()

    def soon(self, call: Callable[[], object]) -> None:
        """Do it now, or after what is being done."""
        with self:
            self._soon.append(call)

    def call(self, call: Callable[[], T]) -> T:
        """Do it and return its result."""
        with self:
            return call()

    def later(self, seconds: float, call: Callable[[], object]) -> Timer:
        """Do it after so many seconds, if anybody waits then."""
        timer = Timer(monotonic() + seconds, call)
        heappush(self._timers, (timer.when, next(self._order), timer))
        return timer

    def expire(self) -> None:
        """Do what is due."""
        now = monotonic()
        while self._timers and self._timers[0][0] <= now:
            call = heappop(self._timers)[2].call
            if call is not None:
                call()

    def wake(self) -> None:
        """Something has happened that someone may wait for."""
        self._condition.notify_all()

    def wait(self, until: float | None) -> None:
        """Let others in until something happens, or until then, or until a timer is due."""
        if self._timers:
            until = self._timers[0][0] if until is None else min(until, self._timers[0][0])
        depth, self._depth, self._owner = self._depth, 0, None
        try:
            self._condition.wait(None if until is None else max(0.0, until - monotonic()))
        finally:
            self._depth, self._owner = depth, threading.get_ident()


class Transfer:
    """What a client's transfer is to the backend: done, or to be waited for."""

    def __init__(self, link: Link, view: memoryview, is_in: bool) -> None:
        self._link = link
        self._view = view
        self._is_in = is_in
        self._inner: DeviceTransfer | None = None
        self.done = False
        self.actual = 0
        self.status = 0
        self.packets: list[tuple[int, int]] = []

    @property
    def data(self) -> bytes:
        """What has come in."""
        return bytes(self._view[: self.actual])

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end: the number of bytes, or a USBError. A time-out ends the transfer."""
        here = self._link.here
        patience = self._link.patience
        limit = patience if timeout is None else min(timeout, patience)
        until = None if timeout is None and patience == float("inf") else monotonic() + limit
        with here:
            while not self.done:
                here.expire()
                if self.done:
                    break
                if until is not None and monotonic() >= until:
                    if timeout is None:
                        self._link.endless()
                    self.cancel()
                    if self.actual:
                        break
                    raise usb_error(Failure.TIMEOUT)
                here.wait(until)
        failure = failure_of(self.status)
        if failure is not None:
            raise usb_error(failure)
        return self.actual

    def cancel(self) -> None:
        """Give it up."""
        with self._link.here:
            if not self.done and self._inner is not None:
                self._link.engine.cancel(self._inner)
                self._keep(self._inner.got)
                self.done = True

    def finish(self, status: int, data: Buffer) -> None:
        """The device has answered."""
        self.done = True
        self.status = status
        if self._is_in:
            self._keep([data])
        elif self._inner is not None:
            self.actual = self._inner.actual
        if self._inner is not None and self._inner.results:
            self.packets = list(self._inner.results)

    def _keep(self, chunks: Sequence[Buffer]) -> None:
        at = 0
        for chunk in chunks:
            data = memoryview(chunk)[: len(self._view) - at]
            self._view[at : at + len(data)] = data
            at += len(data)
        self.actual = at


class Link(Calls["Transfer"]):
    """The connection to one plugged device: what udf.usb.client.Connection is to the backend."""

    def __init__(self, here: Here, device: Device, name: str) -> None:
        self.here = here
        self.name = name
        self.patience = float("inf")  # seconds that a transfer may really wait
        self.endless: Callable[[], None] = lambda: None  # called when one without a time-out has waited that long
        self.devid = 1
        self.gone = False
        self._numbers = count(1)
        self._waiting: dict[DeviceTransfer, Transfer] = {}
        self._on_end: list[Callable[[], None]] = []
        self.engine = Engine(device, here, self._finished)  # type: ignore[arg-type]  # Here does what Loop does
        self.engine.unplug = lambda _back: self.end()

    def submit(
        self,
        endpoint: int,
        data_or_length: Buffer | int,
        *,
        setup: bytes = NO_SETUP,
        interval: int = 0,
        packets: Sequence[int] = (),
    ) -> Transfer:
        """Start a transfer, as Connection.submit does."""
        view = bytes_of(data_or_length)
        is_in = bool(endpoint & 0x80)
        with self.here:
            if self.gone:
                raise usb_error(Failure.NO_DEVICE)
            self.here.expire()
            transfer = Transfer(self, view, is_in)
            inner = DeviceTransfer(self, next(self._numbers), endpoint, view.nbytes)
            inner.setup = Setup(*SETUP.unpack(setup)) if not endpoint & 0x0F else None
            inner.out = b"" if is_in else bytes(view)
            offset, layout = 0, []
            for length in packets:
                layout.append((offset, length))
                offset += length
            inner.packets = layout
            transfer._inner = inner
            self._waiting[inner] = transfer
            self.engine.submit(inner)
        return transfer

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call it when the device is gone."""
        self._on_end.append(callback)

    def close(self) -> None:
        """As Connection.close: who waits gets ENODEV."""
        self.end()

    def end(self) -> None:
        """The device is gone, also if its own handler hangs."""
        if not self.here.enter_within(_PATIENCE):
            self.gone = True
            return
        try:
            if self.gone:
                return
            self.gone = True
            device = self.engine.device
            device._engine = None
            for inner, transfer in list(self._waiting.items()):
                inner.done = True
                transfer.finish(ENODEV, b"")
            self._waiting.clear()
            self.here.wake()
            device.on_unplugged()
            callbacks, self._on_end = self._on_end, []
        finally:
            self.here.__exit__()
        for callback in callbacks:
            callback()

    def reply(self, transfer: DeviceTransfer, status: int, data: Buffer) -> None:
        """The engine's way to answer whoever owns a transfer."""
        self._finished(transfer, status, data)

    def _finished(self, inner: DeviceTransfer, status: int, data: Buffer) -> None:
        transfer = self._waiting.pop(inner, None)
        if transfer is not None:
            transfer.finish(status, data)
            self.here.wake()
