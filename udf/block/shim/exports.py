"""What the world sees of the driver's units: each whole unit and each of its partitions is an export.

Owns: the exports' names, and reading partition tables through a unit without waiting for it.
Must never: change an export that a connection uses: a new table makes new exports, and who has the old one keeps it.
Called by: service.py.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from time import monotonic
from typing import TYPE_CHECKING

from udf.block import wire
from udf.block.partitions import Table, read_table
from udf.block.shim.request import Request
from udf.block.shim.watched import HEAD

if TYPE_CHECKING:
    from udf.block.shim.units import Unit

MOST_EXPORTS = 160  # of all units: with their labels they fit into one message
_MOST_LABEL = 24
_MOST_READS = 512  # of one look at a partition table
_MOST_BYTES = 2 << 20  # in one of them


class Region:
    """One export: a whole unit, or a partition of it."""

    __slots__ = ("label", "name", "offset", "partition", "read_only", "size", "type", "unit")

    def __init__(self, name: str, unit: Unit, offset: int, size: int, *, read_only: bool, partition: int = 0) -> None:
        self.name = name
        self.unit = unit
        self.offset = offset
        self.size = size
        self.read_only = read_only
        self.partition = partition
        self.type = ""
        self.label = ""

    def overlaps(self, other: Region) -> bool:
        """Whether there is a byte in both."""
        return (
            self.unit is other.unit
            and self.offset < other.offset + other.size
            and other.offset < self.offset + self.size
        )

    def message(self) -> dict[str, object]:
        """As the supervisor is told of it."""
        return {
            "name": self.name,
            "unit": self.unit.name,
            "offset": self.offset,
            "size": self.size,
            "block_size": self.unit.block_size,
            "read_only": self.read_only,
            "partition": self.partition,
            "type": self.type,
            "label": self.label,
        }


def exports_of(units: Iterable[Unit], *, read_only: bool) -> dict[str, Region]:
    """All exports, by name. A unit's table is what was last read of it."""
    exports: dict[str, Region] = {}
    for unit in units:
        if unit.gone:
            continue
        fixed = read_only or unit.read_only
        exports[unit.label] = Region(unit.label, unit, 0, unit.size, read_only=fixed)
        prefix = "" if unit.index == 0 else f"{unit.label}-"
        for one in unit.table.partitions:
            name = f"{prefix}part{one.number}"
            if len(exports) >= MOST_EXPORTS or name in exports or not 0 < one.size <= unit.size - one.offset:
                continue
            region = Region(name, unit, one.offset, one.size, read_only=fixed, partition=one.number)
            region.type = one.type[:36]
            region.label = "".join(c if c.isprintable() else "?" for c in one.name[:_MOST_LABEL])
            exports[name] = region
    return exports


class _Read:
    """Awaited by the reader of tables: hands what it wants to whoever drives the coroutine."""

    def __init__(self, offset: int, size: int) -> None:
        self._wanted = offset, size

    def __await__(self) -> Generator[tuple[int, int], bytes, bytes]:
        return (yield self._wanted)


async def _read(offset: int, size: int) -> bytes:
    return await _Read(offset, size)


class Scan:
    """Reads one unit's partition table: a coroutine that goes on with each answer of the driver."""

    def __init__(self, unit: Unit, done: Callable[[Unit, Table | None], None]) -> None:
        """*done* gets the table; None: the device went away, and what was known of it is all that is known."""
        self._unit = unit
        self._done = done
        self._steps = read_table(_read, unit.size, unit.block_size)
        self._reads = 0
        self._over = False

    def start(self) -> None:
        """Ask for the first of it."""
        self._go_on(None)

    def _go_on(self, data: bytes | None) -> None:
        try:
            if data is None and self._reads:
                wanted = self._steps.throw(OSError("it cannot be read"))
            else:
                wanted = self._steps.send(data)
        except StopIteration as end:
            self._end(end.value)
        except (OSError, ValueError):
            self._end(Table())
        else:
            self._ask(*wanted)

    def _end(self, table: Table | None) -> None:
        self._over = True
        self._steps.close()
        self._done(self._unit, table)

    def _ask(self, offset: int, size: int) -> None:
        unit = self._unit
        if not self._reads:
            size = max(size, min(HEAD, unit.size - offset))  # the first read is of the head, and tells what that is
        self._reads += 1
        # Whole blocks, whatever is wanted of them.
        start = offset - offset % unit.block_size
        end = min(unit.size, -(-(offset + size) // unit.block_size) * unit.block_size)
        if self._reads > _MOST_READS or not 0 < end - start <= _MOST_BYTES:
            self._end(Table())
            return
        request = Request(unit, wire.CMD_READ, 0, start, end - start, monotonic())
        request.then = lambda request: self._answered(request, offset - start, size)
        request.watch = self._reads == 1
        unit.send_own(request)

    def _answered(self, request: Request, at: int, size: int) -> None:
        if self._over:
            return
        if request.error == wire.ESHUTDOWN:
            self._end(None)
        elif request.error or request.buffer is None:
            self._go_on(None)
        else:
            self._go_on(bytes(request.buffer.view[at : min(at + size, request.length)]))

    def stop(self) -> None:
        """The driver is gone, or the unit is."""
        self._over = True
        self._steps.close()
