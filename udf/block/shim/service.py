"""The device as the world sees it, over one generation of its driver after the other.

Owns: the table of requests, and the one way by which each leaves it; the phase; the exports; the account of memory.
Must never: touch a path, or wait.
Called by: the loop, clients with requests, units with answers, recovery.py with what becomes of the driver.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from udf.block import wire
from udf.block.partitions import Table
from udf.block.shim.buffers import Pool
from udf.block.shim.claims import Claims
from udf.block.shim.client import Client
from udf.block.shim.counters import Counters
from udf.block.shim.driver import DriverConnection
from udf.block.shim.exports import Region, Scan, exports_of
from udf.block.shim.phase import Phase
from udf.block.shim.recovery import Recovery
from udf.block.shim.request import COMMANDS, Request

if TYPE_CHECKING:
    from udf.block.shim.config import Config
    from udf.block.shim.units import Unit

TOTAL_LIMIT = 128 << 20  # bytes of all clients that are under way
_RECENT = 50  # operations in a crash report
_SHOWN = 100  # waiting requests that are shown


class Service:
    """One device."""

    def __init__(self, config: Config, tell: Callable[[dict[str, object]], None]) -> None:
        self.config = config
        self.tell = tell
        self.pool = Pool()
        self.counters = Counters()
        self.claims = Claims()
        self.units: list[Unit] = []
        self.exports: dict[str, Region] = {}
        self.clients: set[Client] = set()
        self.requests: dict[int, Request] = {}
        self.recent: deque[Request] = deque(maxlen=_RECENT)
        self.charged = 0  # bytes of all clients
        self.freed = False  # some of them were given back, or a claim has ended, in this turn of the loop
        self.hungry: dict[Client, None] = {}  # who waits for room, in turn
        self.touched: set[Client | DriverConnection] = set()  # whose outbox has something
        self.broken: set[Client] = set()  # whose connections have ended
        self.phase = Phase.OPENING
        self.pumping = False  # the phase is SERVING
        self.stopping = False  # no client is read any more
        self.readers: set[Unit] = set()  # of which metadata was read, and no checksums are made yet
        self.alarm = math.inf  # when a unit wants to look at something
        self.recovery = Recovery(self)
        self._scans: dict[Unit, Scan] = {}
        self._next_id = 0
        self._next_cookie = 0
        self._faults: set[tuple[str, str]] = set()

    # ---- requests

    def register(self, request: Request) -> None:
        """Put a request into the table."""
        self._next_id += 1
        request.id = self._next_id
        self.requests[request.id] = request

    def next_cookie(self) -> int:
        """A number for a command to the driver that no other had."""
        self._next_cookie += 1
        return self._next_cookie

    def submit(self, request: Request) -> None:
        """A client's request is complete."""
        unit = request.unit
        if unit.gone:
            self.answer(request, unit.gone)
        elif self.phase is Phase.DETACHED:
            self.answer(request, wire.ESHUTDOWN)
        elif self.phase is Phase.FAILED:
            self.answer(request, wire.EIO)
        elif request.op == wire.CMD_BLOCK_STATUS and unit.terms.context is None:
            self.answer(request, 0)
        elif unit.away.is_over and self.phase is Phase.REPLAYING:
            self.answer(request, wire.ESHUTDOWN)
        else:
            if request.watch and request.op == wire.CMD_READ:
                request.mark = unit.watched.expect(request.offset, request.length)
            if unit.size and request.op in (wire.CMD_WRITE, wire.CMD_WRITE_ZEROES):
                unit.table_touched = True
            unit.queue.append(request)
            if self.pumping:
                unit.pump()
            else:
                self.counters.parked += 1

    def answer(self, request: Request, error: int) -> None:
        """Answer a request; what was answered already is left alone."""
        if request.answered:
            return
        request.answered = True
        self.requests.pop(request.id, None)
        client = request.client
        if client is not None:
            if request.op == wire.CMD_FLUSH and not error:
                unit = request.unit
                if unit.lost != client.lost_seen or unit.unsafe != client.unsafe_seen:
                    error = wire.EIO  # something that it may have written was lost, or a flush before this one failed
                client.unsafe_seen = unit.unsafe
            client.reply(request, error)
            return
        request.error = request.error or error
        if request.then is not None:
            request.then(request)
        if request.buffer is not None and (not request.open or request.buffer.arena is not None):
            self.pool.drop(request.buffer)
        request.buffer = None

    def give_up(self, request: Request, error: int) -> None:
        """Answer a request without the driver's answer, which will mean nothing when it comes."""
        request.unit.abandon(request)
        self.answer(request, error)

    def give_up_all(self, error: int, unit: Unit | None = None) -> None:
        """Answer everything of the clients', or of one unit's."""
        for request in list(self.requests.values()):
            client = request.client
            if (unit is None or request.unit is unit) and client is not None and not client.is_receiving(request):
                self.give_up(request, error)
        for one in self.units if unit is None else [unit]:
            one.queue.clear()

    def set_phase(self, phase: Phase) -> None:
        """The one place where the phase changes."""
        self.phase = phase
        self.pumping = phase is Phase.SERVING
        if self.pumping:
            for unit in self.units:
                unit.pump()
                unit.rest()

    @property
    def detached(self) -> bool:
        """Whether the device is gone."""
        return self.phase is Phase.DETACHED

    def digest(self) -> None:
        """Make the checksums of the metadata that has been read."""
        while self.readers:
            self.readers.pop().watched.digest()

    # ---- time

    def wake_at(self, moment: float) -> None:
        """A unit wants to look at something then."""
        self.alarm = min(self.alarm, moment)

    def ring(self, now: float) -> None:
        """Let the units look, whose next moments are set anew."""
        self.alarm = math.inf
        for unit in self.units:
            unit.check(now)

    # ---- memory

    def has_room(self, client: Client, charge: int) -> bool:
        """Whether so many bytes more may be under way; who waits for room gets it in turn."""
        if self.charged + charge <= TOTAL_LIMIT and (not self.hungry or next(iter(self.hungry)) is client):
            self.hungry.pop(client, None)
            return True
        self.hungry[client] = None
        return False

    # ---- clients

    def client_settled(self, client: Client) -> None:
        """One request less of a client; with the last one of a connection that has ended, its claim ends."""
        if client.closed and not client.under_way and self.claims.end(client):
            self.freed = True
            self._look_again()

    def _look_again(self) -> None:
        """A writer is gone: it may have left another partition table."""
        for unit in self.units:
            if unit.table_touched:
                unit.table_touched = False
                if self.pumping and unit.connection is not None:
                    self.scan(unit)
                else:
                    unit.scan_again = True

    def find_export(self, name: str) -> Region | None:
        """The export of that name; the first unit is the default."""
        return self.exports.get(name or "disk")

    # ---- exports

    def scan(self, unit: Unit) -> None:
        """Read a unit's partition table; the exports are told of when all tables are read."""
        running = self._scans.pop(unit, None)
        if running is not None:
            running.stop()
        if not unit.size:
            unit.table = Table()
            return
        scan = self._scans[unit] = Scan(unit, self._scanned)
        scan.start()

    def _scanned(self, unit: Unit, table: Table | None) -> None:
        self._scans.pop(unit, None)
        if table is None:
            unit.scan_again = True
        else:
            unit.table = table
        if not self._scans:
            self.publish()

    @property
    def scanning(self) -> bool:
        """Whether a table is being read."""
        return bool(self._scans)

    def stop_scans(self) -> None:
        """The driver is gone."""
        for unit, scan in self._scans.items():
            scan.stop()
            unit.scan_again = True
        self._scans.clear()

    def publish(self) -> None:
        """Make the exports what the units and their tables say, and tell of it if it is something new."""
        new = exports_of(self.units, read_only=self.config.read_only)
        for name, region in new.items():
            old = self.exports.get(name)
            # An export that did not change stays the same object: claims and connections are about it.
            if old is not None and old.unit is region.unit and old.message() == region.message():
                new[name] = old
        changed = list(new.values()) != list(self.exports.values())
        self.exports = new
        if self.phase is Phase.OPENING:
            self.set_phase(Phase.SERVING)
            changed = True
        if changed:
            self.tell({"t": "serving", "exports": [region.message() for region in new.values()]})

    # ---- what the supervisor asks

    def waiting(self) -> dict[str, object]:
        """What waits, for people: the oldest first, not more than one message holds."""
        now = monotonic()
        waiting = [request for request in self.requests.values() if request.client is not None]
        shown = [
            {
                "id": request.id,
                "op": COMMANDS.get(request.op, str(request.op)),
                "path": request.describe(),
                "age": round(now - request.since, 3),
                "pid": request.client.pid if request.client is not None else 0,
                "parked": not request.sent and not self.pumping,
            }
            for request in waiting[:_SHOWN]
        ]
        return {"total": len(waiting), "requests": shown}

    def recent_lines(self) -> list[str]:
        """The driver's last operations, for the crash report."""
        return [f"{COMMANDS.get(request.op, '?')} {request.describe()}" for request in self.recent]

    def figures(self) -> dict[str, int]:
        """The counters, and how much there is of everything now."""
        counts = self.counters.snapshot()
        counts.update(
            connections=len(self.clients),
            waiting=len(self.requests),
            charged_bytes=self.charged,
            kept_bytes=sum(unit.kept.bytes for unit in self.units),
            kept_writes=sum(len(unit.kept) for unit in self.units),
            watched_sectors=sum(len(unit.watched) for unit in self.units),
            idle_bytes=self.pool.idle_bytes,
            claims=len(self.claims),
            units=len(self.units),
            exports=len(self.exports),
        )
        return counts

    def fault(self, op: str, sentence: str) -> None:
        """Report a driver's fault, once for each operation and kind."""
        self.counters.driver_faults += 1
        kind = (op, "".join(c for c in sentence if not c.isdigit()))
        if kind not in self._faults and len(self._faults) < 1000:
            self._faults.add(kind)
            self.tell({"t": "fault", "op": op, "error": sentence[:500]})
