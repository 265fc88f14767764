"""One change of the volume's metadata: all of it, in an order that is harmless to cut, or nothing.

Owns: the steps of a change, from the first byte that is altered in memory to the last one that is on the device.
Must never: be under way twice at once on a volume (it holds the volume's turn), or reach the device before the state
store has all of it.
Called by: everything that changes metadata: `async with volume.change() as change`.

A change is made in the cached pages, recorded in the state store as a whole, and then written in its steps: one
step is on the device before the next begins, the sectors within one are in no order. A process that is killed in
the middle leaves the record, and the next one writes all of it again: for it every change is done or not begun. A
device that is pulled in the middle has the first steps and not the others, and the order makes that harmless; what
must not be turned round even by the device's own cache has a flush between the steps.

Whatever is raised inside leaves the volume as it was: the pages are put back.
"""

from __future__ import annotations

import errno
from collections.abc import Set
from typing import TYPE_CHECKING

import trio

from .device import Data
from .sectors import PAGE

if TYPE_CHECKING:
    from .nodes import Node
    from .volume import Volume

Run = tuple[int, int]
"""Consecutive clusters: the first, and how many."""


class Step:
    """What may be written in any order."""

    __slots__ = ("flush", "images")

    def __init__(self, flush: bool) -> None:
        self.flush = flush  # before it
        self.images: dict[int, bytes] = {}  # by offset, whole sectors of the device


class Change:
    """A change under way."""

    def __init__(self, volume: Volume, taken: list[Run]) -> None:
        """*taken*: clusters that were taken for it before it began; they are put back if it comes to nothing."""
        self._volume = volume
        self._sectors = volume.sectors
        self._unit = volume.device.block
        self._steps: list[Step] = []
        self._loose: set[int] = set()  # sectors that were altered and are in no step yet
        self._flush = False
        self.taken = [*taken]
        self.freed: list[Run] = []
        self.orphans: list[int] = []  # first clusters of chains that no entry has any more: to be freed
        self.adopted: list[int] = []  # of those that are none any more
        self.ahead: list[tuple[int, int]] = []  # files that have clusters in advance from here on
        self.not_ahead: list[tuple[int, int]] = []  # and those that have not any more
        self.leaves_dirty: bool | None = None  # None: as the volume is
        self.nodes: list[Node] = []  # directories whose index is to be built again if this comes to nothing
        self.exchange: tuple[int, bytes, int, bytes] | None = None

    async def __aenter__(self) -> Change:
        await self._volume.turn.__aenter__()
        try:
            await self._volume.begin()
        except BaseException:
            self._volume.free.put_back(self.taken)
            await self._volume.turn.__aexit__()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None:
                self.undo()
            else:
                await self.commit()
        finally:
            await self._volume.turn.__aexit__()

    def take(self, runs: list[Run]) -> None:
        """These clusters are used from here on; they were taken from volume.free."""
        self.taken += runs

    def give(self, runs: list[Run]) -> None:
        """These are free once this is done, and not before."""
        self.freed += runs
        self._volume.free.hold(runs)

    @property
    def free_after(self) -> int | None:
        """How many clusters are free then."""
        total = self._volume.free.total
        if total is None:
            return None
        return total + sum(count for _, count in self.freed) - sum(count for _, count in self.taken)

    @property
    def dirty_after(self) -> bool:
        """Whether the volume is marked as in use then."""
        return self._volume.dirty if self.leaves_dirty is None else self.leaves_dirty

    @property
    def next_after(self) -> int:
        """Where to look for the next one."""
        return self._volume.free.next

    # ---- altering

    async def write(self, offset: int, data: bytes) -> None:
        """The next step: these bytes. What was written by the step before to the same single sector is one with it."""
        units = await self._alter(offset, data)
        last = self._steps[-1] if self._steps else None
        if last is not None and len(units) == 1 and last.images.keys() == units and not self._flush and not self._loose:
            self._steps.pop()
            self._flush = last.flush
        self._loose |= units
        self.step()

    async def put(self, offset: int, data: bytes) -> None:
        """Alter these bytes; they are written with all others that are put until `step`."""
        self._loose |= await self._alter(offset, data)

    @property
    def loose(self) -> Set[int]:
        """Sectors that were altered and are in no step yet."""
        return self._loose

    def units(self, offset: int, size: int) -> set[int]:
        """The sectors of the device in which these bytes are."""
        return set(range(offset - offset % self._unit, offset + size, self._unit))

    def step(self, copies: tuple[int, ...] = (), but: Set[int] = frozenset()) -> None:
        """End a step; *copies*: the same sectors are written at these distances too (the other tables).

        The sectors *but* are left for the next step.
        """
        units = self._loose - but
        if not units:
            return
        step = Step(self._flush)
        for unit in units:
            number, at = divmod(unit, PAGE)
            page = self._sectors.peek(number)
            assert page is not None  # pinned
            image = bytes(page[at : at + self._unit])
            step.images[unit] = image
            for distance in copies:
                step.images[unit + distance] = image
        self._steps.append(step)
        self._loose -= units
        self._flush = False

    def barrier(self) -> None:
        """What was done so far is durable before the next step begins."""
        self._flush = bool(self._steps)

    async def _alter(self, offset: int, data: bytes) -> set[int]:
        pinned = self._sectors.pinned
        end = offset + len(data)
        first, last = offset // PAGE, (end - 1) // PAGE
        for number in range(first, last + 1):
            page = await self._sectors.page(number)
            pinned.setdefault(number, bytes(page))
            begin = max(offset, number * PAGE)
            stop = min(end, (number + 1) * PAGE)
            page[begin - number * PAGE : stop - number * PAGE] = data[begin - offset : stop - offset]
        return self.units(offset, len(data))

    # ---- the end

    def undo(self) -> None:
        """Put everything back."""
        for number, before in self._sectors.pinned.items():
            page = self._sectors.peek(number)
            if page is not None:
                page[:] = before
        self._sectors.pinned.clear()
        self._volume.free.put_back(self.taken)
        self._volume.free.let_go(self.freed)
        for node in self.nodes:
            node.forget_directory()

    async def commit(self, *, is_tidying: bool = False) -> None:
        """Record it and write it. When this returns it is on the device; nothing cancels it once it is recorded."""
        volume = self._volume
        if self._loose:
            self.step()
        if not (self._steps or self.orphans or self.adopted or self.ahead or self.not_ahead):
            self._sectors.pinned.clear()
            return
        try:
            volume.intents.record(self, [(step.flush, sorted(step.images.items())) for step in self._steps])
        except BaseException:
            self.undo()
            raise
        with trio.CancelScope(shield=True):
            try:
                await write_steps(volume, [(step.flush, sorted(step.images.items())) for step in self._steps])
            except OSError as exc:
                for node in self.nodes:
                    node.forget_directory()
                volume.failed(exc)
                raise
        self._sectors.pinned.clear()
        volume.free.settle(self.taken, self.freed)
        if not is_tidying:
            volume.changed()


async def write_steps(volume: Volume, steps: list[tuple[bool, list[tuple[int, bytes]]]]) -> None:
    """Write a recorded change. Also of a generation that was killed: then the sectors come from the store."""
    for flush, images in steps:
        if flush:
            await volume.device.flush()
        await volume.device.write_all(joined(images), watch=True)


def joined(images: list[tuple[int, bytes]]) -> list[tuple[int, Data]]:
    """Neighbours as one."""
    out: list[tuple[int, Data]] = []
    parts: list[bytes] = []
    begin = end = -1
    for offset, image in images:
        if offset != end and parts:
            out.append((begin, b"".join(parts)))
            parts = []
        if not parts:
            begin = offset
        parts.append(image)
        end = offset + len(image)
    if parts:
        out.append((begin, b"".join(parts)))
    return out


def no_space() -> OSError:
    """What a program gets when nothing is left."""
    return OSError(errno.ENOSPC, "no cluster is free")
