"""BlockDriver and BlockUnit: a block device by byte ranges.

Owns: the verbs that an author implements. Must never: know NBD, sockets, partitions or who reads and writes; nothing
here depends on the runtime that calls it. Called by: udf/block/server.py, many verbs of one unit at once.

The framework keeps every request inside the unit and a multiple of `block_size` at a multiple of it: programs that
read or write less are served by reading the whole blocks, and by reading, changing and writing them. Nothing is ever
asked of a read-only unit that would change it.

Errors are built-in exceptions: PermissionError, OSError with ENOSPC …; DeviceGone when the device is no longer there.
Anything that is no OSError is taken for a mistake in the driver: the program sees EIO, the log has the traceback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

Data = bytes | bytearray | memoryview
"""What a read may answer; it must not change any more. A write is given one of them, and may keep it."""


class Extent(NamedTuple):
    """A piece of a unit, as `extents` tells of it."""

    length: int  # bytes
    hole: bool = False  # nothing is stored for it
    zero: bool = False  # it reads as zeros


class BlockUnit:
    """One addressable medium: a stick has one, a card reader one for each slot.

    Implement `read`; `write` makes it writable; each further verb adds what its name says. The attributes may be set
    by the class or by the object, and may change: after `units_changed()` they are read again.
    """

    size: int = 0  # bytes; 0: there is no medium
    block_size: int = 512  # bytes; what is left of `size` behind the last whole block is not served
    read_only: bool | None = None  # None: unless `write` is implemented
    can_flush: bool | None = None  # None: if `flush` is implemented. Without it a write that is done is durable.
    can_trim: bool | None = None  # None: if `trim` is implemented
    trim_zeroes: bool = False  # what was trimmed reads as zeros, surely
    fast_zero: bool = False  # `zero` (and `trim`, if it zeroes) is faster than writing zeros
    rotational: bool = False
    shared: bool = True  # several connections may write: each sees what the others have written

    async def read(self, offset: int, size: int) -> Data:
        """Exactly `size` bytes from `offset`."""
        raise NotImplementedError("read")

    # ---- all below is optional

    async def read_into(self, offset: int, target: memoryview) -> None:
        """The same into a buffer, all of it; for units that need no memory of their own then. `read` is there too."""
        raise NotImplementedError("read_into")

    def read_soon(self, offset: int, target: memoryview, done: Callable[[Exception | None], None]) -> bool:
        """Begin what `read_into` does, and have `done` called in the loop when all is there, or with what went wrong.

        For units whose work is done by others, such as a thread: a task for each request costs more than the request.
        False: not now; then `read_into` is called.
        """
        return False

    async def write(self, offset: int, data: Data) -> None:
        """Write all of `data` at `offset`."""
        raise NotImplementedError("write")

    async def flush(self) -> None:
        """Return when every write that had returned before would survive a power cut."""
        raise NotImplementedError("flush")

    async def trim(self, offset: int, size: int) -> None:
        """What was in this range is of no use any more."""
        raise NotImplementedError("trim")

    async def zero(self, offset: int, size: int) -> None:
        """Write zeros. Without this verb they are written by `write`."""
        raise NotImplementedError("zero")

    async def extents(self, offset: int, size: int) -> Iterable[Extent]:
        """What is stored from `offset` on, without gaps; it may end before `size` bytes, or behind them."""
        raise NotImplementedError("extents")


class BlockSource:
    """What has units and can tell that they have changed; the common part of block drivers of all kinds."""

    _units_listener: Callable[[], None] | None = None

    async def units(self) -> Mapping[str, BlockUnit]:
        """The units by name; "" is the first one. The same objects as long as they are the same media."""
        raise NotImplementedError("units")

    def units_changed(self) -> None:
        """Tell that a unit came, went or changed its size: whoever uses them looks again. In the driver's own loop."""
        if self._units_listener is not None:
            self._units_listener()


class BlockDriver(BlockSource, BlockUnit):
    """A block device. It may be its single unit, or have several: then it implements `units`."""

    async def units(self) -> Mapping[str, BlockUnit]:
        """The driver itself, unless it says otherwise."""
        return {"": self}


def implements(unit: BlockUnit, verb: str) -> bool:
    """Whether the author's class has the verb."""
    return getattr(type(unit), verb, None) is not getattr(BlockUnit, verb)
