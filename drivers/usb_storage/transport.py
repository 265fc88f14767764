"""Bulk-Only Transport: one command at a time, in order, with every way out of an error that the specification has.

Owns: the tags, the two bulk endpoints and the recovery of the device. Must never: retry a command (the caller knows
which may be repeated), wait without a bound, or send a command before the status of the one before it is read: the
specification forbids it (5.3), and a device that still expects data would take it for them.
Called by: unit.py, in the one thread that talks to the device.

So that the bus does not idle, the three transfers of a command are queued at the host at once: the device's NAK orders
them. A device that cannot stand that (an early IN token is answered with a stall) ends in Reset Recovery; then the
next commands go one transfer at a time, for longer after each such end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import usb.core

from udf import DeviceGone

from . import wire
from .pipes import Pending, Pipes, outcome_of
from .scsi import Command
from .wire import Outcome, Status, Turn

CANCEL_TIMEOUT = 3.0  # seconds for a transfer that was given up to be over
DEAD_PAUSE = 5.0  # seconds for which nothing is tried with a device that could not be reset
FIRST_CAUTION, MAX_CAUTION = 32, 65536  # commands that are not queued after a recovery


class TransportFault(Exception):
    """The command has no result: the transport broke and was recovered, or (`is_dead`) could not be."""

    def __init__(self, reason: str, *, is_dead: bool = False) -> None:
        super().__init__(reason)
        self.is_dead = is_dead


class Reply(NamedTuple):
    """What became of a command; `moved` counts the bytes that the device has taken, or given, for good."""

    status: Status
    moved: int


class Transport:
    """One Bulk-Only interface."""

    def __init__(self, pipes: Pipes, interface: int, endpoint_in: int, endpoint_out: int, *, fill: int = 0) -> None:
        """`fill`: shorter commands are filled up to so many bytes, as the command sets of drives want it."""
        self._pipes = pipes
        self._interface = interface
        self._fill = fill
        self._in, self._out = endpoint_in, endpoint_out
        self._tag = int.from_bytes(time.time_ns().to_bytes(8, "little")[:4], "little")  # unlike those of the past
        self._caution = 0
        self._next_caution = FIRST_CAUTION
        self._is_broken = False
        self._dead_until = 0.0
        self._lies_about_residue = False
        self.recoveries = 0

    def max_lun(self) -> int:
        """The highest LUN; devices with one may stall the question."""
        try:
            answer = self._pipes.control_in(wire.CLASS_IN, wire.GET_MAX_LUN, 0, self._interface, 1)
        except usb.core.USBError as exc:
            if outcome_of(exc) is Outcome.GONE:
                raise DeviceGone(str(exc)) from exc
            return 0
        return min(answer[0], wire.MAX_LUN) if answer else 0

    def begin(self) -> None:
        """Whatever a generation before us was in the middle of ends here."""
        self._reset_recovery(is_first=True)

    def run(self, lun: int, command: Command, timeout: float, buffer: memoryview | None = None) -> Reply:
        """Run a command to its status, at most for `timeout` seconds. What it reads goes into `buffer`.

        TransportFault: nobody knows what the device did; it is in order again for the next command. DeviceGone.
        """
        if self._is_broken:
            self._reset_recovery()
        self._tag = self._tag % 0xFFFFFFFF + 1
        command = command._replace(cdb=command.cdb.ljust(self._fill, b"\0"))
        run = _Run(self._pipes, self._in, self._out, self._tag, lun, command, time.monotonic() + timeout, buffer)
        queues = self._pipes.queues and not self._caution
        try:
            reply = run.go(queues)
        except _Lost as exc:
            run.end()
            self._caution = self._next_caution
            self._next_caution = min(self._next_caution * 2, MAX_CAUTION)
            self._recover(f"{command.name}: {exc}")
            raise TransportFault(f"{command.name}: {exc}") from None
        except BaseException:
            self._is_broken = True
            run.end()
            raise
        self._caution = max(0, self._caution - 1)
        return self._believe(command, run.received, reply)

    def _believe(self, command: Command, received: int, csw: wire.Csw) -> Reply:
        # Devices exist that count wrongly. They give themselves away where everything has come and nothing can lack.
        residue = csw.residue
        if command.cdb[0] in (0x12, 0x25) and csw.status is Status.PASSED and residue and received == command.length:
            self._lies_about_residue = True
        length = command.length or (0 if command.data is None else len(command.data))
        moved = received if self._lies_about_residue else min(received, length - residue)
        return Reply(csw.status, moved)

    # ---- recovery (5.3.4)

    def _recover(self, reason: str) -> None:
        self._is_broken = True
        self.recoveries += 1
        try:
            self._reset_recovery()
        except TransportFault as exc:
            raise TransportFault(f"{reason}; and {exc}", is_dead=True) from exc

    def _reset_recovery(self, *, is_first: bool = False) -> None:
        if time.monotonic() < self._dead_until:
            raise TransportFault("the device could not be reset a moment ago", is_dead=True)
        for step in (self._class_reset, self._port_reset):
            try:
                self._tolerate_stall(step) if is_first else step()
                self._pipes.clear_halt(self._in)
                self._pipes.clear_halt(self._out)
            except usb.core.USBError as exc:
                if outcome_of(exc) is Outcome.GONE:
                    raise DeviceGone(str(exc)) from exc
                if step == self._port_reset:
                    self._dead_until = time.monotonic() + DEAD_PAUSE
                    raise TransportFault(f"the device cannot be reset: {exc}", is_dead=True) from exc
            else:
                break
        self._is_broken = False

    @staticmethod
    def _tolerate_stall(step: Callable[[], None]) -> None:
        """A device that does not know the request may have no error to recover from."""
        try:
            step()
        except usb.core.USBError as exc:
            if outcome_of(exc) is not Outcome.STALL:
                raise

    def _class_reset(self) -> None:
        self._pipes.control_out(wire.CLASS_OUT, wire.RESET, 0, self._interface)

    def _port_reset(self) -> None:
        self._pipes.reset()
        self._class_reset()


class _Lost(Exception):
    """The command has lost its thread; the device needs Reset Recovery."""


class _Run:
    """One command on its way."""

    def __init__(
        self,
        pipes: Pipes,
        endpoint_in: int,
        endpoint_out: int,
        tag: int,
        lun: int,
        command: Command,
        until: float,
        buffer: memoryview | None,
    ) -> None:
        self._pipes = pipes
        self._in, self._out = endpoint_in, endpoint_out
        self._tag = tag
        self._until = until
        is_in = command.length > 0
        self._data_endpoint = endpoint_in if is_in else endpoint_out
        self._data = buffer if is_in else command.data
        self._length = 0 if self._data is None else len(self._data)
        self._cbw = wire.pack_cbw(tag, self._length, is_in, lun, command.cdb)
        self._csw = bytearray(wire.CSW.size)
        self._flight: list[Pending] = []
        self.received = 0

    def go(self, queues: bool) -> wire.Csw:
        """From the CBW to a valid CSW."""
        data = status = None
        if queues:
            command, data, status = self._begin_all()
        else:
            command = self._begin(self._out, self._cbw)
        self._go_on(wire.after_command(self._finish(command)[0]), "sending the command")
        if self._length:
            data = data or self._begin(self._data_endpoint, self._data)
            outcome, self.received = self._finish(data)
            csw = self._status_instead_of_data() if outcome is Outcome.OK else None
            if csw is not None:
                return csw
            turn = wire.after_data(outcome)
            if turn is Turn.CLEAR_AND_GO_ON:
                status = self._clear_data_halt(status)
            else:
                self._go_on(turn, f"moving the data: {outcome.value}")
        return self._read_status(status)

    def _clear_data_halt(self, status: Pending | None) -> Pending | None:
        # A status that was queued behind the data fails with them, and before their halt is cleared; else it could
        # be answered, or not, depending on who is quicker.
        if status is not None and self._data_endpoint == self._in:
            outcome, count = self._finish(status)
            if outcome is Outcome.GONE:
                raise DeviceGone("the device is gone")
            self._clear(self._data_endpoint)
            return None if outcome is not Outcome.OK or not count else _Done(count)
        self._clear(self._data_endpoint)
        return status

    def _read_status(self, status: Pending | None) -> wire.Csw:
        for attempt in range(2):
            outcome, count = self._finish(status or self._begin(self._in, self._csw))
            status = None
            turn = wire.after_status(outcome, count, attempt)
            if turn is Turn.GO_ON:
                csw = wire.read_csw(bytes(self._csw[:count]), self._tag, self._length)
                if isinstance(csw, str):
                    raise _Lost(csw)
                return csw
            if turn is Turn.CLEAR_AND_READ_STATUS_AGAIN:
                self._clear(self._in)
            elif turn is not Turn.READ_STATUS_AGAIN:
                self._go_on(turn, f"reading the status: {outcome.value}")
        raise _Lost("it gives no status")

    def _status_instead_of_data(self) -> wire.Csw | None:
        """Some devices leave out a data stage that they have nothing for, and give the status at once."""
        if self._data_endpoint != self._in or self.received != wire.CSW.size or self._length == self.received:
            return None
        assert self._data is not None
        csw = wire.read_csw(bytes(self._data[: wire.CSW.size]), self._tag, self._length)
        if isinstance(csw, str):
            return None
        self.received = 0
        self.end()
        return csw

    def _begin(self, endpoint: int, data: object) -> Pending:
        return self._submit([(endpoint, data)])[0]

    def _begin_all(self) -> tuple[Pending, Pending | None, Pending]:
        stages: list[tuple[int, object]] = [(self._out, self._cbw), (self._in, self._csw)]
        if not self._length:
            command, status = self._submit(stages)
            return command, None, status
        stages.insert(1, (self._data_endpoint, self._data))
        command, data, status = self._submit(stages)
        return command, data, status

    def _submit(self, transfers: list[tuple[int, object]]) -> list[Pending]:
        try:
            pending = self._pipes.submit_all(transfers)
        except usb.core.USBError as exc:
            if outcome_of(exc) is Outcome.GONE:
                raise DeviceGone(str(exc)) from exc
            raise _Lost(f"a transfer is refused: {exc}") from exc
        self._flight += pending
        return pending

    def _finish(self, pending: Pending) -> tuple[Outcome, int]:
        try:
            count = pending.wait(max(0.001, self._until - time.monotonic()))
        except usb.core.USBError as exc:
            return outcome_of(exc), 0
        finally:
            if pending in self._flight:
                self._flight.remove(pending)
        return Outcome.OK, count

    def _clear(self, endpoint: int) -> None:
        try:
            self._pipes.clear_halt(endpoint)
        except usb.core.USBError as exc:
            if outcome_of(exc) is Outcome.GONE:
                raise DeviceGone(str(exc)) from exc
            raise _Lost(f"a halt cannot be cleared: {exc}") from exc

    @staticmethod
    def _go_on(turn: Turn, doing: str) -> None:
        if turn is Turn.GIVE_UP:
            raise DeviceGone("the device is gone")
        if turn is not Turn.GO_ON:
            raise _Lost(doing)

    def end(self) -> None:
        """Nothing of this command is under way when this returns, and its buffers are the caller's again."""
        for pending in self._flight:
            pending.cancel()
        for pending in self._flight:
            try:
                pending.wait(CANCEL_TIMEOUT)
            except usb.core.USBError:
                pass
        self._flight.clear()


class _Done:
    """A transfer that is over already."""

    def __init__(self, count: int) -> None:
        self._count = count

    def wait(self, timeout: float | None = None) -> int:
        return self._count

    def cancel(self) -> None:
        """Nothing is left to give up."""
