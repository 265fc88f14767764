"""Between the server and a unit: what an author must never see, and what an author need not do.

Owns: bounds, whole blocks (a part of a block is read with it, and written by reading and changing it), zeros without
a verb for them, what a unit can do in one set of flags, and the check of what a unit answers.
Must never: know connections. One Access for a unit, however many connections use it: the writing of parts of blocks
is exclusive. Called by: server.py.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from trio.lowlevel import ParkingLot

from udf.block import wire
from udf.driver.block import BlockUnit, Data, implements
from udf.errors import ContractError

_ZERO_PIECE = 1024 * 1024  # bytes of zeros that are written at once where there is no verb for it
MAX_BLOCK = 1024 * 1024


class Terms(NamedTuple):
    """What is said of a unit when a connection opens it."""

    size: int
    flags: int
    sizes: wire.BlockSizes


class Access:
    """One unit, by bytes."""

    def __init__(self, unit: BlockUnit) -> None:
        self.unit = unit
        self._writers = 0
        self._alone = False  # a part of a block is being written
        self._lot = ParkingLot()

    @property
    def size(self) -> int:
        """Bytes that can be reached: whole blocks only."""
        unit = self.unit
        size, block = unit.size, unit.block_size
        if type(block) is not int or not 0 < block <= MAX_BLOCK:
            raise ContractError(f"the unit has blocks of {block!r:.40} bytes")
        if type(size) is not int or not 0 <= size <= wire.MAX_SIZE:
            raise ContractError(f"the unit has a size of {size!r:.40} bytes")
        return size - size % block

    @property
    def writable(self) -> bool:
        """Whether anything may be changed now."""
        unit = self.unit
        return implements(unit, "write") if unit.read_only is None else not unit.read_only

    @property
    def can_trim(self) -> bool:
        """Whether `trim` may be asked of the unit."""
        unit = self.unit
        return self.writable and (implements(unit, "trim") if unit.can_trim is None else bool(unit.can_trim))

    @property
    def _can_flush(self) -> bool:
        unit = self.unit
        return implements(unit, "flush") if unit.can_flush is None else bool(unit.can_flush)

    @property
    def _trim_zeroes(self) -> bool:
        return bool(self.unit.trim_zeroes) and self.can_trim

    def terms(self) -> Terms:
        """What the unit is and can do now."""
        flags = wire.HAS_FLAGS | wire.SEND_FLUSH | wire.SEND_FUA | wire.SEND_CACHE | wire.SEND_DF
        if self.writable:
            flags |= wire.SEND_WRITE_ZEROES | wire.SEND_FAST_ZERO
            flags |= wire.SEND_TRIM if self.can_trim else 0
        else:
            flags |= wire.READ_ONLY
        flags |= wire.ROTATIONAL if self.unit.rotational else 0
        # Flush means all of the unit, so one connection may flush what another has written.
        flags |= wire.CAN_MULTI_CONN if self.unit.shared or not self.writable else 0
        return Terms(self.size, flags, wire.BlockSizes(1, self._preferred(), wire.MAX_PAYLOAD))

    def _preferred(self) -> int:
        block = self.unit.block_size
        return block if 512 <= block <= wire.MAX_PAYLOAD and block & (block - 1) == 0 else 4096

    # ---- requests; offset and size are inside the unit, size is not 0

    async def read(self, offset: int, size: int) -> Data:
        """Exactly these bytes."""
        unit = self.unit
        block = unit.block_size
        front, back = offset % block, -(offset + size) % block
        data = await unit.read(offset - front, front + size + back)
        if type(data) is not bytes and type(data) is not bytearray:
            data = _buffer(data)
        if len(data) != front + size + back:
            raise ContractError(f"read answered {len(data)} bytes when {front + size + back} were asked for")
        return memoryview(data)[front : front + size] if front or back else data

    async def read_into(self, offset: int, target: memoryview) -> None:
        """The same into a buffer, by the unit itself if it can."""
        unit = self.unit
        if implements(unit, "read_into") and not offset % unit.block_size and not len(target) % unit.block_size:
            await unit.read_into(offset, target)
        else:
            target[:] = memoryview(await self.read(offset, len(target))).cast("B")

    def read_soon(self, offset: int, target: memoryview, done: Callable[[Exception | None], None]) -> bool:
        """The same without a task: whether it has begun, and `done` will be called."""
        unit = self.unit
        block = unit.block_size
        return not offset % block and not len(target) % block and unit.read_soon(offset, target, done) is True

    async def write(self, offset: int, data: Data) -> None:
        """Write all of them."""
        block = self.unit.block_size
        if offset % block or len(data) % block:
            await self._patch(offset, data)
            return
        while self._alone:
            await self._lot.park()
        self._writers += 1
        try:
            await self.unit.write(offset, data)
        finally:
            self._writers -= 1
            if self._lot and not self._writers:
                self._lot.unpark_all()

    async def _patch(self, offset: int, data: Data) -> None:
        block = self.unit.block_size
        front = offset % block
        begin, end = offset - front, offset + len(data)
        end += -end % block
        async with self._exclusive():
            whole = bytearray(end - begin)
            whole[:block] = await self.read(begin, block)
            if end - begin > block:
                whole[-block:] = await self.read(end - block, block)
            whole[front : front + len(data)] = data
            await self.unit.write(begin, whole)

    @asynccontextmanager
    async def _exclusive(self) -> AsyncIterator[None]:
        """No other write is under way: it could be to the same block, and be undone by ours."""
        while self._alone or self._writers:
            await self._lot.park()
        self._alone = True
        try:
            yield
        finally:
            self._alone = False
            self._lot.unpark_all()

    async def flush(self) -> None:
        """Until what was written is durable."""
        if self._can_flush:
            await self.unit.flush()

    async def trim(self, offset: int, size: int) -> None:
        """Only the whole blocks in the range: this is a hint."""
        begin, end = self._inner(offset, size)
        if begin < end:
            await self._changing(self.unit.trim, begin, end)

    async def zero(self, offset: int, size: int, *, hole: bool, fast: bool) -> None:
        """Write zeros; `hole`: what is stored there may be given up; `fast`: fail if writing would not be slower."""
        unit = self.unit
        trims = hole and self._trim_zeroes
        if fast and not (unit.fast_zero and (trims or implements(unit, "zero"))):
            raise OSError(errno.EOPNOTSUPP, "zeros are not written faster than data")
        begin, end = self._inner(offset, size)
        if begin >= end:
            await self.write(offset, bytes(size))
            return
        if offset < begin:
            await self.write(offset, bytes(begin - offset))
        if trims:
            await self._changing(unit.trim, begin, end)
        elif implements(unit, "zero"):
            await self._changing(unit.zero, begin, end)
        else:
            piece = max(unit.block_size, _ZERO_PIECE - _ZERO_PIECE % unit.block_size)
            for at in range(begin, end, piece):
                await self.write(at, bytes(min(piece, end - at)))
        if end < offset + size:
            await self.write(end, bytes(offset + size - end))

    async def _changing(self, verb: Callable[[int, int], Any], begin: int, end: int) -> None:
        while self._alone:
            await self._lot.park()
        self._writers += 1
        try:
            await verb(begin, end - begin)
        finally:
            self._writers -= 1
            if self._lot and not self._writers:
                self._lot.unpark_all()

    def _inner(self, offset: int, size: int) -> tuple[int, int]:
        block = self.unit.block_size
        end = offset + size
        return offset + -offset % block, end - end % block

    async def extents(self, offset: int, size: int) -> list[tuple[int, int]]:
        """Lengths and status flags from `offset` on: at least one, none empty, in all not more than `size`."""
        if not implements(self.unit, "extents"):
            return [(size, 0)]
        found: list[tuple[int, int]] = []
        front = offset % self.unit.block_size
        at, end = offset - front, offset + size
        for extent in await self.unit.extents(at, end - at + -end % self.unit.block_size):
            length = extent.length
            if type(length) is not int or length <= 0:
                raise ContractError(f"an extent has a length of {length!r:.40}")
            status = (wire.STATE_HOLE if extent.hole else 0) | (wire.STATE_ZERO if extent.zero else 0)
            begin, at = max(at, offset), at + length
            length = min(at, end) - begin
            if length <= 0:
                continue
            if found and found[-1][1] == status:
                found[-1] = found[-1][0] + length, status
            else:
                found.append((length, status))
            if at >= end or len(found) >= wire.MAX_EXTENTS:
                break
        return found or [(size, 0)]


def _buffer(data: object) -> memoryview:
    try:
        return memoryview(data).cast("B")  # type: ignore[arg-type]
    except TypeError:
        raise ContractError(f"read answered a {type(data).__name__} instead of bytes") from None
