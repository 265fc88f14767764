"""A device that is in a port of the emulator: numbered transfers, faults, observers, one import at a time.

Owns: the port's identity, the engine while there is power, the current session. Must never: outlive `remove`.
Called by: emulator.py and server.py, in the loop's thread; the public methods from any thread.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from udf.testing.devices.device import Device
from udf.testing.devices.engine import Engine
from udf.testing.devices.faults import Rule, parse_all
from udf.testing.devices.session import Session
from udf.testing.devices.transfers import Action, Setup, Transfer
from udf.usb.usbip import DeviceRecord

if TYPE_CHECKING:
    from udf.testing.devices.emulator import Emulator

log = logging.getLogger("udf.devices")
_FIRST = 64  # bytes of a transfer that its observers see


class Seen(NamedTuple):
    """A transfer that is over, as observers get it."""

    number: int  # since the plug, from 1, in the order of arrival
    import_number: int  # since the import, from 1
    imports: int  # which import since the plug, from 1
    endpoint: int  # with the direction bit, for control transfers too
    setup: Setup | None
    length: int  # what was asked for or sent
    actual: int
    first: bytes  # the first bytes that went over the bus
    status: int  # 0 or minus an errno
    fault: str | None  # the fault that it met


Observer = Callable[[Seen], object]


class Plugged:
    """What `Emulator.plug` gives. It stays the same over unplug and replug; `arrival` tells these apart."""

    def __init__(self, emulator: Emulator, name: str, device: Device, busnum: int, port: int) -> None:
        self._emulator = emulator
        self.name = name
        self.device = device
        self.busnum = busnum
        self.port = port
        self.busid = f"{busnum}-{port}"
        self.devnum = 0
        self.arrival = 0
        self.present = False
        self.forgotten = False  # its port is somebody else's
        self.rules: list[Rule] = []
        self.observers: list[Observer] = []
        self.transfers = 0  # since the plug
        self.imports = 0
        self._imported = 0  # transfers since the import
        self._changed = threading.Condition()
        self._engine: Engine | None = None
        self._session: Session | None = None

    # --- from any thread ---

    def unplug(self) -> None:
        """Pull it: whoever uses it is told by the end of the connection. Nothing happens if it is not there."""
        self._emulator.loop.call(self.remove)

    def replug(self, after: float = 0.0) -> None:
        """Pull it, if it is there, and put it back into the same port, at once or after some seconds."""

        def pull() -> None:
            self.remove()
            if after:
                self._emulator.loop.later(after, self.arrive)
            else:
                self.arrive()

        self._emulator.loop.call(pull)

    def connect(self) -> socket.socket:
        """A connection to it that is imported already. OSError EBUSY or ENODEV."""
        return self._emulator.loop.call(self._connect)

    def set_faults(self, faults: Iterable[str | Rule]) -> None:
        """Other rules from now on; they count from their own beginning. UserError if a text is wrong."""
        faults = list(faults)
        rules: list[Rule] = []
        for each in faults:
            rules += parse_all([each]) if isinstance(each, str) else [each]
        self._emulator.loop.call(lambda: setattr(self, "rules", rules))

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Show *observer* every transfer that is over, in the emulator's thread; call the result to end that."""
        self.observers.append(observer)

        def stop() -> None:
            if observer in self.observers:
                self.observers.remove(observer)

        return stop

    def record(self) -> contextlib.AbstractContextManager[list[Seen]]:
        """A list that grows while the context lasts."""
        return _recording(self)

    def wait(self, condition: Callable[[Plugged], object], timeout: float = 10.0) -> None:
        """Until *condition* is true of it; looked at after each plug, unplug, import and end of one. TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: condition(self), timeout):
                raise TimeoutError(f"{self.name} is not what was waited for after {timeout} s")

    @property
    def imported(self) -> bool:
        """Whether somebody uses it."""
        return self._session is not None

    @property
    def devid(self) -> int:
        """What URBs name it by."""
        return self.busnum << 16 | self.devnum

    # --- in the loop's thread ---

    def arrive(self) -> None:
        """Give it power."""
        if self.present or self.forgotten or self._emulator.closed:
            return
        self.arrival, self.devnum = self._emulator.next_arrival(self)
        self.present = True
        self.transfers = self.imports = 0
        for rule in self.rules:
            rule.plugged()
        engine = Engine(self.device, self._emulator.loop, self._finished)
        engine.unplug = self._vanish
        self._engine = self.device._engine = engine
        self._guard(self.device.on_plugged)
        value = self.device.configured
        chosen = next((each for each in self.device.configurations if each.value == value), None)
        if value and chosen is not None:
            engine.configure(chosen)
            self._guard(lambda: self.device.on_configured(value))
        self._tell("arrived")

    def remove(self) -> None:
        """Take its power."""
        if not self.present:
            return
        self.present = False
        if self._session is not None:
            self._session.close()
        self._engine = None
        self.device.power_off()
        self._guard(self.device.on_unplugged)
        self._tell("removed")

    def open(self, sock: socket.socket) -> None:
        """Begin the URB phase on a connection that was granted the import; the socket is ours from now on."""
        assert self._engine is not None
        assert self._session is None
        self.imports += 1
        self._imported = 0
        self._session = Session(self._emulator.loop, sock, self.devid, self._engine, self._arrived, self._released)
        self._tell("changed")

    def record_for_list(self) -> DeviceRecord:
        """As the operations describe it."""
        device, engine = self.device, self._engine
        active = engine.configuration if engine is not None else None
        shown = active or (device.configurations[0] if device.configurations else None)
        triples: Sequence[tuple[int, int, int]] = [each.triple for each in shown.interfaces] if shown else ()
        return DeviceRecord(
            path=f"/sys/devices/platform/udf.{self.busnum}/usb{self.busnum}/{self.busid}",
            busid=self.busid,
            busnum=self.busnum,
            devnum=self.devnum,
            speed=device.speed,
            vendor=device.vendor,
            product=device.product,
            bcd_device=device.release,
            device_class=device.device_class,
            configuration=active.value if active else 0,
            configurations=len(device.configurations),
            interface_count=len(triples),
            interfaces=tuple(triples),
        )

    def _connect(self) -> socket.socket:
        if not self.present:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        if self._session is not None:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        ours, theirs = socket.socketpair()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.open(ours)
        return theirs

    def _arrived(self, transfer: Transfer) -> None:
        engine = self._engine
        assert engine is not None
        self.transfers += 1
        self._imported += 1
        transfer.number = self.transfers
        transfer.import_number = self._imported
        for rule in self.rules:
            action = self._decide(rule, transfer)
            if action is not None:
                transfer.action = action
                break
        engine.submit(transfer)

    def _decide(self, rule: Rule, transfer: Transfer) -> Action | None:
        try:
            return rule.decide(transfer, self.imports)
        except Exception:
            log.exception("a fault rule failed")
            return None

    def _finished(self, transfer: Transfer, status: int, data: bytes | memoryview) -> None:
        if self.observers:
            shown = data if transfer.is_in else transfer.out
            fault = transfer.action.kind if transfer.action is not None else None
            seen = Seen(
                transfer.number, transfer.import_number, self.imports, transfer.address, transfer.setup,
                transfer.length, transfer.actual, bytes(shown[:_FIRST]), status, fault,
            )  # fmt: skip
            for observer in tuple(self.observers):
                self._guard(lambda observer=observer: observer(seen))  # type: ignore[misc]
        transfer.owner.reply(transfer, status, data)

    def _released(self, session: Session) -> None:
        if self._session is session:
            self._session = None
            if self._engine is not None:
                self._engine.forget()
            if self.present:
                self._tell("changed")

    def _vanish(self, back: float) -> None:
        """A fault pulls it, and perhaps puts it back."""
        self.remove()
        if back:
            self._emulator.loop.later(back, self.arrive)

    def _tell(self, what: str) -> None:
        self._emulator.tell(what, self)
        with self._changed:
            self._changed.notify_all()

    def _guard(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception:
            log.exception("%s: a handler failed", self.device)


@contextlib.contextmanager
def _recording(plugged: Plugged) -> Iterator[list[Seen]]:
    seen: list[Seen] = []
    stop = plugged.observe(seen.append)
    try:
        yield seen
    finally:
        stop()
