"""From one generation of the driver to the next.

Owns: the way from the end of a link to the first answers over the next one; what is asked again, and in which order;
which requests are suspected of killing drivers. Must never: decide whether or when there is a new generation (the
supervisor does), or lose a request: what is parked leaves only by being asked again, answered, or given up with an
error.

When the device was away, nothing is written before verification.py has found that it is the same, and what is on it.
All commands of a block device may be given twice. In order: (1) the writes that were acknowledged and that no FLUSH has
covered, after any end of a generation: after a replug the device's own cache is lost, and after the driver's death
alone it does no harm (they are flushed every few MiB, so that drivers that die soon get done with them together);
(2) once all of these are answered, what was unanswered, by age; (3) what has come since.

Over 400 lines: the steps are short, and their order is what there is to read.
"""

from __future__ import annotations

from collections import deque
from time import monotonic
from typing import TYPE_CHECKING

from udf.block import wire
from udf.block.shim.driver import DriverConnection
from udf.block.shim.kept import Entry
from udf.block.shim.phase import Phase
from udf.block.shim.request import COMMANDS, Request
from udf.block.shim.units import WINDOW, Unit
from udf.block.shim.verification import Verification

if TYPE_CHECKING:
    from udf.block.shim.service import Service

_REST = 4 << 20  # bytes that are written again before they are flushed
_SUSPECT = 2  # deaths of the driver's own making at which a request was under way
_CONTRACT = wire.SEND_FLUSH | wire.SEND_FUA | wire.SEND_TRIM | wire.SEND_WRITE_ZEROES | wire.SEND_FAST_ZERO
_CONTRACT |= wire.SEND_CACHE


class Recovery:
    """The way to the next generation."""

    def __init__(self, service: Service) -> None:
        self._s = service
        self.number = 1
        self._counted = False
        self._unanswered: list[Request] = []  # under way at the last death
        self._suspects: deque[Request] = deque()
        self._alone: Request | None = None
        self._again: deque[tuple[Unit, Entry]] = deque()  # kept writes that are still to be written again
        self._again_under_way: dict[Request, tuple[Unit, Entry]] = {}
        self._again_bytes = 0
        self._again_done: set[Entry] = set()  # of one unit: written again, and not flushed
        self._again_done_bytes = 0
        self._again_gone = False
        self._killed: list[tuple[Unit, Entry]] = []  # being written again at the last death
        self._lost_at = 0.0
        self._told_overdue = False
        self.is_unverified = False  # the device was away, and nobody knows yet whether what is back is the same
        self._verification: Verification | None = None
        self._found: dict[str, DriverConnection] = {}  # what is being verified
        self._verdict: str | None = None  # of the verification that has ended: "", or why it is not the same

    # ---- without a driver

    def lost(self, reason: str, *, tell: bool = True) -> None:
        """The driver is gone, and all that it had said is taken: park what it had not answered."""
        s = self._s
        under_way = [request for request in s.requests.values() if request.sent and request.client is not None]
        self._killed = [*self._again_under_way.values()]
        self._unanswered = [request for request in under_way if not request.held]
        self._lost_at = monotonic()
        s.set_phase(Phase.PARKED)
        self._drop_driver()
        parked: dict[Unit, list[Request]] = {}
        for request in under_way:
            request.open = 0  # nothing of it can come any more
            client = request.client
            if client is not None and client.closed:
                request.unit.abandon(request)
                s.answer(request, wire.EIO)  # nobody waits for it, and it cannot be half done later
                continue
            request.begin_again()
            parked.setdefault(request.unit, []).append(request)
        for unit in s.units:
            again = {request.id: request for request in parked.get(unit, ())}
            waiting = [one for one in unit.queue if not one.answered and one.id not in again]
            unit.queue.clear()
            # Ids grow with arrival: what was asked first stays first.
            unit.queue.extend(sorted([*again.values(), *waiting], key=lambda request: request.id))
        s.counters.parked += len(under_way)
        if tell:
            s.tell({"t": "link_lost", "pending": len(under_way), "recent": s.recent_lines(), "text": reason[:200]})
        s.recent.clear()

    def _drop_driver(self) -> None:
        """Forget what of our own was asked of it."""
        s = self._s
        s.stop_scans()
        if self._verification is not None:
            self._verification.stop()
        self._verification = self._verdict = None
        self._found = {}
        self._again.clear()
        self._again_under_way.clear()
        self._again_bytes = 0
        self._done_again()
        self._suspects.clear()
        self._alone = None
        for unit in s.units:
            unit.drop_connection()
        for request in [request for request in s.requests.values() if request.client is None]:
            request.then = None
            request.open = 0
            s.answer(request, wire.EIO)

    def fail(self) -> None:
        """There is no new generation for now: everything that waits fails, and so does what comes."""
        self._s.set_phase(Phase.FAILED)
        self._s.give_up_all(wire.EIO)
        self._drop_driver()

    def detach(self) -> None:
        """The device is gone. What is kept stays kept: it may be plugged in again."""
        self.is_unverified = True
        # What was being written again may be there, or not, or some of each. What its program waits for: see `abandon`.
        for unit, entry in (*self._killed, *self._again_under_way.values()):
            unit.watched.doubt(entry.start, entry.end - entry.start, unit.kept.version)
        self._s.set_phase(Phase.DETACHED)
        self._s.give_up_all(wire.ESHUTDOWN)
        self._drop_driver()
        for unit in self._s.units:
            unit.away.clear()

    def check_time(self, now: float) -> None:
        """Give up what has waited too long; a driver that does not get on is told of once."""
        s = self._s
        config = s.config
        if not s.pumping:
            before = now - config.patience
            if self._lost_at <= before:
                for request in [r for r in s.requests.values() if not r.sent and r.since <= before]:
                    client = request.client
                    if client is not None and not client.is_receiving(request):
                        s.give_up(request, wire.EIO)
        for unit in s.units:
            if s.pumping and unit.queue:
                unit.pump()  # what was held back
            late = unit.overdue(now, config.deadline)
            if late and not self._told_overdue:
                self._told_overdue = True
                s.counters.timeouts += 1
                age = round(now - late[0].sent, 3)
                op = COMMANDS.get(late[0].op, "?")
                s.fault(op, f"no answer within {config.deadline:g} s")
                s.tell({"t": "overdue", "op": op, "age": age})
            # The next generation should answer it; should there be none, the program has its answer all the same.
            hopeless = unit.overdue(now, 2 * config.deadline) if late else ()
            for piece in hopeless:
                whole = piece.request
                for request in (whole.riders or [whole]) if whole is not None else ():
                    if request.client is not None:
                        s.give_up(request, wire.EIO)
            if hopeless:
                for request in [r for r in unit.queue if not r.answered and now - r.since > 2 * config.deadline]:
                    s.give_up(request, wire.EIO)

    # ---- a new generation

    def greeting(self, number: int, counted: bool) -> None:
        """A new generation is being opened."""
        self.number = number
        self._counted = counted
        self._told_overdue = False
        for unit in self._s.units:
            unit.away.clear()
        self._s.set_phase(Phase.GREETING)

    def opened(self, found: dict[str, DriverConnection]) -> list[DriverConnection]:
        """The units of a new generation are there, or those of the one that serves are looked at again.

        Returns the connections that are not needed.
        """
        if self.is_unverified:
            self._verify(found)
            return []
        return self._adopt(found)

    def _verify(self, found: dict[str, DriverConnection]) -> None:
        """After a Detach: nothing is written, nor anybody told that it is back, before all is known to be the same."""
        s = self._s
        self._found = found
        s.set_phase(Phase.VERIFYING)
        units = []
        for unit in s.units:
            connection = found.get(unit.name)
            difference = "it has no medium" if connection is None else _difference(unit, connection)
            if not difference:
                assert connection is not None
                unit.connect(connection)
                units.append(unit)
            elif unit.size:  # into a slot that was empty anything may have been put
                self._verdict = f"it is another disk: {difference}"
                return
        self._verification = Verification(units, self._compared)
        self._verification.start()

    def _compared(self, difference: str | None) -> None:
        self._verdict = difference or ""

    def gone_again(self) -> None:
        """The driver says so, and nobody else has said anything."""
        self._verdict = "the device was gone again before all of it was compared"

    @property
    def is_decided(self) -> bool:
        """Whether a verification has ended; the loop, which asks, then has `decide` say what follows."""
        return self._verdict is not None

    def decide(self) -> list[DriverConnection] | None:
        """Go on with the device that is back; returns the connections that are not needed. None: it is not the same."""
        difference, self._verdict = self._verdict, None
        if difference:
            self.refuse(difference, changed=True)
            return None
        self.is_unverified = False
        self._verification = None
        found, self._found = self._found, {}
        return self._adopt(found)

    def refuse(self, sentence: str, *, changed: bool = False) -> None:
        """This generation will not serve; the device, as far as anybody knows, is still away or not the same."""
        s = self._s
        if self.is_unverified:
            self.detach()
        else:
            s.set_phase(Phase.PARKED)
            self._drop_driver()
        s.tell({"t": "refused", "generation": self.number, "error": sentence[:500], "changed": changed})

    def _adopt(self, found: dict[str, DriverConnection]) -> list[DriverConnection]:
        s = self._s
        first, again = s.phase is Phase.OPENING, s.phase is Phase.SERVING
        unneeded = []
        present = {unit.name: unit for unit in s.units if not unit.gone}
        scans = []
        for name, unit in present.items():
            connection = found.get(name)
            if connection is None or _difference(unit, connection):
                if unit.connection is not None:
                    unneeded.append(unit.connection)
                self._vanish(unit)
            elif again:
                unneeded.append(connection)
                scans.append(unit)  # it has said that something changed
            else:
                unit.connect(connection)
        for name, connection in found.items():
            if name not in present or present[name].gone:
                unit = self._new_unit(name, connection)
                s.units.append(unit)
                scans.append(unit)
        s.units = sorted((unit for unit in s.units if not unit.gone), key=lambda unit: unit.index)
        for unit in scans:
            s.scan(unit)
        if first or again:
            if not s.scanning:
                s.publish()
            return unneeded
        s.publish()
        self._go_on()
        return unneeded

    def _new_unit(self, name: str, connection: DriverConnection) -> Unit:
        s = self._s
        assert connection.terms is not None
        taken = {unit.index: unit.name for unit in s.units}
        index = next((i for i, other in taken.items() if other == name), None)
        if index is None:
            index = next(i for i in range(1 << 10) if i not in taken)
        unit = Unit(s, name, index, connection.terms)
        unit.connect(connection)
        return unit

    def _vanish(self, unit: Unit) -> None:
        """A unit is not there any more, or is another one: whoever had it open has lost it."""
        s = self._s
        unit.gone = wire.ESHUTDOWN
        if len(unit.kept):
            unit.lose(len(unit.kept))
            unit.kept.clear()
        s.give_up_all(wire.ESHUTDOWN, unit)
        unit.drop_connection()

    def _go_on(self) -> None:
        s = self._s
        s.set_phase(Phase.REPLAYING)
        self._again_gone = False
        unanswered = [request for request in self._unanswered if not request.answered]
        waiting = sum(1 for request in s.requests.values() if request.client is not None)
        if self._counted:
            for request in unanswered:
                request.deaths += 1
            for _, entry in self._killed:
                entry.deaths += 1
        killed = self._killed
        self._unanswered, self._killed = [], []
        s.counters.replayed += len(unanswered)
        s.tell(
            {
                "t": "attached",
                "generation": self.number,
                "replayed": len(unanswered),
                "parked": max(0, waiting - len(unanswered)),
            }
        )
        suspects = [request for request in unanswered if request.deaths >= _SUSPECT] if self._counted else []
        if len(suspects) == 1:
            self._poison(suspects[0])
        else:
            self._suspects.extend(suspects)
        everything = [(unit, entry) for unit in s.units for entry in unit.kept.entries()]
        if self._counted and len(killed) == 1 and killed[0][1].deaths >= _SUSPECT:
            pair = next((pair for pair in everything if pair[1] is killed[0][1]), None)
            if pair is not None:
                self._give_up_kept(*pair)
                everything.remove(pair)
        # Those that may kill the driver come last and one by one: what is before them is safe by then.
        everything.sort(key=lambda pair: pair[1].deaths >= _SUSPECT)
        self._again.extend(everything)
        self._write_again()

    # ---- (1) what was acknowledged and not flushed

    def _write_again(self) -> None:
        s = self._s
        while self._again:
            unit, entry = self._again[0]
            if self._again_done_bytes >= _REST and unit.can_flush:
                if not self._again_under_way:
                    self._flush_again()
                return
            if self._again_under_way and (entry.deaths >= _SUSPECT or self._again_bytes >= WINDOW):
                return
            self._again.popleft()
            request = Request(unit, entry.op, entry.flags, entry.start, entry.end - entry.start, monotonic())
            request.buffer = entry.buffer
            request.then = self._written_again
            if entry.buffer is not None:
                entry.buffer.refs += 1
                request.at = entry.at
                self._again_bytes += request.length
            self._again_under_way[request] = (unit, entry)
            s.counters.kept_again += 1
            unit.send_own(request)
            if entry.deaths >= _SUSPECT:
                return
        if not self._again_under_way:
            self.next_suspect()

    def _written_again(self, request: Request) -> None:
        pair = self._again_under_way.pop(request, None)
        if pair is None:
            return
        unit, entry = pair
        if request.buffer is not None:
            self._again_bytes -= request.length
        if request.error == wire.ESHUTDOWN:
            # The device has gone again: nothing is lost yet, and what waits goes on waiting for the next one.
            self._again.clear()
            self._again_gone = True
        elif request.error:
            self._give_up_kept(unit, entry)
        else:
            entry.deaths = 0
            if self._again and self._again[0][0] is not unit:
                self._done_again()
            else:
                self._again_done.add(entry)
                self._again_done_bytes += request.length if request.buffer is not None else 0
        if not self._again_gone:
            self._write_again()

    def _done_again(self) -> set[Entry]:
        """What is written again since the last flush; it is not asked for twice."""
        done, self._again_done, self._again_done_bytes = self._again_done, set(), 0
        return done

    def _flush_again(self) -> None:
        """Flush what is written again so far, so that a driver that dies soon has got something done."""
        unit, done = self._again[0][0], self._done_again()

        def flushed(request: Request) -> None:
            if request.error == wire.ESHUTDOWN:
                self._again.clear()
                self._again_gone = True
                return
            if not request.error:
                unit.kept.remove_all(done)
            self._write_again()

        request = Request(unit, wire.CMD_FLUSH, 0, 0, 0, monotonic())
        request.then = flushed
        self._s.counters.flushes_own += 1
        unit.send_own(request)
        request.mark = 0  # it makes safe what was written again, and nothing else

    def _give_up_kept(self, unit: Unit, entry: Entry) -> None:
        """A write that was acknowledged is lost: the next FLUSH says so."""
        unit.kept.remove(entry)
        unit.watched.unsure(entry.start, entry.end - entry.start)
        unit.lose(1)
        where = f"{unit.label} {entry.start}+{entry.end - entry.start}"
        self._s.fault(COMMANDS[entry.op], f"what was acknowledged could not be written again: {where}")

    # ---- (2) suspects alone, (3) everything

    def next_suspect(self) -> None:
        """With one suspect answered, try the next; with none left, go on with everything."""
        s = self._s
        while self._suspects:
            request = self._suspects.popleft()
            if request.answered or request.unit.connection is None:
                continue
            request.unit.queue.remove(request)
            self._alone = request
            request.unit.ask_whole(request)
            return
        self._alone = None
        s.set_phase(Phase.SERVING)
        for unit in s.units:
            if unit.scan_again:
                unit.scan_again = False
                s.scan(unit)

    def look_at_suspect(self) -> None:
        """Whether the one that is tried alone is answered; the loop asks."""
        if self._alone is not None and self._alone.answered:
            self.next_suspect()

    def _poison(self, request: Request) -> None:
        s = self._s
        s.counters.poisoned += 1
        s.tell({"t": "poison", "op": COMMANDS.get(request.op, "?"), "path": request.describe()})
        s.give_up(request, wire.EIO)


def _difference(unit: Unit, connection: DriverConnection) -> str:
    """Why this cannot be what clients were promised; "" if it can be."""
    old, new = unit.terms, connection.terms
    assert new is not None
    if new.size != old.size:
        return f"it has {new.size} bytes and not {old.size}"
    if (new.flags ^ old.flags) & wire.READ_ONLY:
        return f"it can{'not' if new.flags & wire.READ_ONLY else ''} be written"
    if new.minimum > old.minimum:
        return f"its blocks have {new.minimum} bytes and not {old.minimum}"
    if old.flags & ~new.flags & _CONTRACT or (old.context is not None and new.context is None):
        return "it cannot do all that it could"
    return ""
