"""Whether the device that is back is the one that was pulled out, with nothing changed on it meanwhile.

Owns: which of the watched sectors are read, in which order, and what is said of the outcome. Must never: write, or
read without bounds: many sectors are read in one command, the most telling ones come first, and those for which there
is no time are not compared.
Called by: recovery.py, which writes what is kept only after this has found nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from time import monotonic
from typing import TYPE_CHECKING

from udf.block import wire
from udf.block.shim.request import Request
from udf.block.shim.watched import SECTOR, checksums

if TYPE_CHECKING:
    from udf.block.shim.units import Unit

SECONDS = 5.0  # after which only the heads are still waited for
_GAP = 8 * 1024 // SECTOR  # sectors that are read in vain so that there is one command less
_LONGEST = 256 * 1024  # bytes of one read
_MOST_READS = 2048
_MOST_BYTES = 64 << 20
_AT_ONCE = 8

CHANGED = "the volume on it has changed since it was pulled out"


class _Read:
    """One read, and the sectors in it that are compared."""

    def __init__(self, unit: Unit, sectors: list[int]) -> None:
        self.unit = unit
        self.sectors = sectors
        block = max(unit.terms.minimum, SECTOR)
        start = sectors[0] * SECTOR
        self.start = start - start % block
        self.end = min(unit.size, -(-(sectors[-1] + 1) * SECTOR // block) * block)
        self.is_head = any(unit.watched.is_head(sector) for sector in sectors)


class Verification:
    """One comparison of all units; `done` is told None, or why it is not the same, in a sentence. Once."""

    def __init__(self, units: Iterable[Unit], done: Callable[[str | None], None]) -> None:
        self._done = done
        self._waiting: deque[_Read] = deque()
        self._under_way: set[_Read] = set()
        self._until = 0.0
        self._over = False
        reads = [read for unit in units for read in _reads_of(unit)]
        reads.sort(key=lambda read: not read.is_head)
        size = 0
        for read in reads[:_MOST_READS]:
            size += read.end - read.start
            if size <= _MOST_BYTES or read.is_head:
                self._waiting.append(read)

    def start(self) -> None:
        """Ask for the first of it."""
        self._until = monotonic() + SECONDS
        self._go_on()

    def _go_on(self) -> None:
        late = monotonic() > self._until
        while self._waiting and len(self._under_way) < _AT_ONCE and not self._over:
            read = self._waiting.popleft()
            if late and not read.is_head:
                self._waiting.clear()
                break
            self._under_way.add(read)
            request = Request(read.unit, wire.CMD_READ, 0, read.start, read.end - read.start, monotonic())
            request.then = lambda request, read=read: self._answered(request, read)
            read.unit.send_own(request)
        if not self._under_way and not self._waiting:
            self._end(None)

    def _answered(self, request: Request, read: _Read) -> None:
        if self._over:
            return
        self._under_way.discard(read)
        if request.error == wire.ESHUTDOWN:
            return  # it has gone again: who told it to be read is about to tell what follows, or time does
        if request.error or request.buffer is None:
            self._end("what is on it cannot be read where it has to be the same as before")
            return
        first, watched = read.start // SECTOR, read.unit.watched
        data = request.buffer.view[: (read.end - read.start) // SECTOR * SECTOR]
        contents = checksums(data)
        if not all(watched.accepts(sector, contents[sector - first]) for sector in read.sectors):
            self._end(CHANGED)
            return
        read.unit.service.counters.compared += len(read.sectors)
        self._go_on()

    def _end(self, sentence: str | None) -> None:
        if not self._over:
            self._over = True
            self._waiting.clear()
            self._done(sentence)

    def stop(self) -> None:
        """The driver is gone, or the device is: nothing will be said."""
        self._over = True
        self._waiting.clear()


def _reads_of(unit: Unit) -> list[_Read]:
    """All that can be compared of a unit, in as few reads as that takes, the most telling ones first."""
    comparable = unit.watched.comparable()
    rank = {sector: number for number, sector in enumerate(comparable)}
    runs: list[list[int]] = []
    longest = min(_LONGEST, unit.maximum) // SECTOR
    for sector in sorted(comparable):
        if (sector + 1) * SECTOR > unit.size:
            continue
        run = runs[-1] if runs else []
        if run and sector - run[-1] <= _GAP and sector - run[0] < longest:
            run.append(sector)
        else:
            runs.append([sector])
    runs.sort(key=lambda run: min(rank[sector] for sector in run))
    return [_Read(unit, run) for run in runs]
