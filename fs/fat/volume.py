"""A mounted volume: everything below files and names, and its state of order.

Owns: the turn of those who change metadata, whether the volume may be changed, the dirty bits, FSInfo, flushes, and
what is done when nobody asks for anything: 150 ms after the last change the volume is brought into order, so that a
stick that is pulled out without ceremony is usually clean. Must never: know files or names.
Called by: operations.py and contents.py; tests, through lab.py.

A little over 400 lines: begin, change, sync and end are the one life of a volume, and read as such.

What was dirty when it was mounted (and not by a generation of ours that died) stays dirty: only fsck.fat knows better.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from udf import BlockClient, Store

from . import boot
from .ahead import Buffers
from .chain import Chain
from .change import Change, Run, write_steps
from .device import Device
from .entries import MAX_SLOTS, SLOT, Settings
from .free import Free
from .intents import Intents
from .reserve import cut_left
from .sectors import Sectors
from .stream import ChainStream, RootStream
from .table import Table
from .turns import Turn

IDLE = 0.15  # seconds without a change after which the volume is brought into order
MOST = 0xFFFF_FFFF  # bytes of a file
_SMALL = 4096  # clusters of a chain that is freed at once with its entry
_BATCH = 16384  # clusters of an ownerless chain that are freed at once
_SCAN = 1.0  # seconds without a change before the free clusters are counted
_PER_READ = 4  # windows of the table that are looked at by one command when they are counted

_log = logging.getLogger("fat")


class Volume:
    """The volume on one connection. Made by `open`."""

    def __init__(self, device: Device, geometry: boot.Geometry, settings: Settings, intents: Intents) -> None:
        self.device = device
        self.geometry = geometry
        self.settings = settings
        self.intents = intents
        self.cluster = geometry.cluster
        self.sectors = Sectors(device)
        self.table = Table(geometry, self.sectors)
        self.free = Free(geometry, self.table)
        self.turn = Turn()  # of who changes metadata
        self.read_only = ""  # why nothing may be changed; empty: it may
        self.dirty = False  # as the volume itself says
        self.read_ahead = 0  # bytes of files that were read before anybody asked for them
        self.buffers = Buffers(None)  # for that
        self.before_order: Callable[[], Awaitable[None]] | None = None  # files are cut to what they need
        self.in_use: set[int] = set()  # first clusters of ownerless chains of files that are still open
        self._keep_dirty = False
        self._fsinfo = False
        self._flushing = Turn()
        self._flushed = device.writes
        self._changed = trio.Event()
        self._changed_at = 0.0
        self._untidy = False  # there is something to be brought into order
        self._nursery: trio.Nursery | None = None
        self._over = trio.Event()

    @classmethod
    async def open(
        cls, client: BlockClient, store: Store | None, *, read_only: bool, utc: bool = False, codepage: str = "cp437"
    ) -> Volume:
        """Look at the volume, and complete what a generation before this one was about. UserError: it is no FAT."""
        device = Device(client)
        first = await device.read(0, min(boot.INFO_BYTES, device.size), watch=True)
        geometry = boot.parse(bytes(first), device.size)
        device.limit(geometry.size)
        intents = Intents(store)
        intents.begin(_identity(geometry))
        settings = Settings(wide=geometry.wide, codepage=codepage, utc=utc)
        volume = cls(device, geometry, settings, intents)
        if read_only or device.read_only:
            volume.read_only = "it is mounted read-only"
        elif geometry.is_cut:
            volume.read_only = "the device ends before the volume does"
        await volume._begin()
        return volume

    async def _begin(self) -> None:
        left = self.intents.left
        geometry = self.geometry
        if left is not None and left.steps and not self.read_only:
            await write_steps(self, left.steps)
            await self.flush()
            self.intents.settled()
        state = (await self.sectors.read(geometry.dirty_offset, 1))[0]
        is_dirty = bool(state & 1)
        second = await self.table.second()
        if not boot.says_clean(geometry.kind, second):
            is_dirty = True
        ours = left is not None and left.dirty
        if is_dirty and not ours:
            self._keep_dirty = True
            _log.warning("the volume was not taken out in order: it is served as it is, and fsck.fat should look at it")
        self.dirty = is_dirty
        info = None
        if geometry.fsinfo_offset:
            info = boot.parse_fsinfo(await self.sectors.read(geometry.fsinfo_offset, boot.INFO_BYTES), geometry)
            self._fsinfo = info is not None
        total, following = (info.free, info.next) if info is not None else (None, None)
        if left is not None and left.free >= 0:
            total, following = min(left.free, geometry.clusters), left.next
        if following is not None and not geometry.has_cluster(following):
            following = None
        self.free.start(total, following)
        if not self.read_only:
            for place in list(self.intents.ahead):
                try:
                    await cut_left(self, place)
                except OSError as exc:
                    _log.warning("a file that has too many clusters could not be cut: %s", exc.strerror)

    # ---- tasks of our own

    async def start(self) -> None:
        """Begin to look after the volume, in trio's loop."""
        ready = trio.Event()
        trio.lowlevel.spawn_system_task(self._keep, ready)
        await ready.wait()

    async def _keep(self, ready: trio.Event) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                ready.set()
                await self._tend()
        finally:
            self._nursery = None
            self._over.set()

    def spawn(self, task: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Run something beside; it ends with the volume, and what goes wrong in it is only logged."""
        if self._nursery is not None:
            self._nursery.start_soon(self._alone, task, arguments)

    async def _alone(self, task: Callable[..., Awaitable[None]], arguments: tuple[Any, ...]) -> None:
        try:
            await task(*arguments)
        except OSError:
            pass  # whoever asks next will be told
        except Exception:
            _log.exception("a task of the volume's own failed")

    async def aclose(self) -> None:
        """Bring the volume into order, as far as the device lets us, and end."""
        await self._end_tasks()
        try:
            await self.sync()
        except OSError as exc:
            _log.warning("the volume could not be brought into order: %s", exc.strerror)
        await self.device.aclose()

    async def drop(self) -> None:
        """End at once."""
        await self._end_tasks()
        await self.device.aclose()

    async def _end_tasks(self) -> None:
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
            await self._over.wait()

    async def _tend(self) -> None:
        """Do what is due when nobody changes anything."""
        self._changed_at = trio.current_time()
        if self.intents.orphans or (self.dirty and not self._keep_dirty):
            self.changed()  # left by the generation before
        elif self.free.total is None or self._keep_dirty:
            self._changed.set()
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            await self._quiet(IDLE)
            try:
                await self.sync()
                if self.free.total is None or self._keep_dirty:
                    await self._count()
            except OSError as exc:
                if not self.device.gone:
                    _log.warning("the volume could not be brought into order: %s", exc.strerror)

    async def _quiet(self, seconds: float) -> None:
        while (left := self._changed_at + seconds - trio.current_time()) > 0:  # noqa: ASYNC110 - it moves on
            await trio.sleep(left)

    async def _count(self) -> None:
        """Look at all of the table, a piece whenever nothing has been changed for a while, to count what is free."""
        while (window := self.free.unknown) is not None:
            first, count = self.free.span(window)
            async with self.turn:
                if self.geometry.kind == 12:
                    self.free.look(window, await self.table.free_map(first, count))
                else:
                    data = await self.device.read(*self.table.place(first, count))
                    self.free.look(window, self.table.mapped(data))
            await trio.lowlevel.checkpoint()

    # ---- changing

    def change(self, taken: list[Run] | None = None) -> Change:
        """Change metadata: `async with`. OSError when the volume cannot be changed."""
        return Change(self, taken or [])

    def check(self) -> None:
        """OSError unless the volume may be changed."""
        if self.device.gone:
            raise OSError(errno.ENODEV, "the device is gone")
        if self.read_only:
            raise OSError(errno.EROFS, self.read_only)

    async def begin(self) -> None:
        """Before a change: the volume is marked as in use, and that is durable."""
        self.check()
        if not self.dirty:
            change = self.change()
            try:
                await self._mark(change, True)
                change.leaves_dirty = True
            except BaseException:
                change.undo()
                raise
            self.dirty = True
            await change.commit()
            await self.flush()

    async def _mark(self, change: Change, dirty: bool) -> None:
        geometry = self.geometry
        byte = (await self.sectors.read(geometry.dirty_offset, 1))[0]
        await change.put(geometry.dirty_offset, bytes((boot.with_dirty(byte, dirty),)))
        change.step()
        second = await self.table.second()
        await self.table.set_second(change, boot.with_clean(geometry.kind, second, not dirty))

    def changed(self) -> None:
        """Something is not as it was: the volume is to be brought into order."""
        self._untidy = True
        self._changed_at = trio.current_time()
        self._changed.set()

    def failed(self, exc: OSError) -> None:
        """A change could not be written."""
        if self.device.gone:
            return  # a generation that has the device again will complete it
        self.intents.settled()
        self.sectors.forget_all()
        self.harm(f"the device does not take what is written ({exc.strerror})")

    def harm(self, why: str) -> None:
        """Change nothing any more: what is known of the volume is not to be relied on."""
        if not self.read_only:
            self.read_only = why
            _log.warning("the volume is read-only from here on: %s", why)

    async def take(self, want: int, goal: int = 0) -> list[Run]:
        """So many clusters, as free.take says; what was freed a moment ago is made usable if need be."""
        try:
            return await self.free.take(want, goal)
        except OSError as exc:
            if exc.errno != errno.ENOSPC or not self.free.young:
                raise
        await self.flush()
        return await self.free.take(want, goal)

    async def release(self, change: Change, chain: Chain, keep: int = 0) -> None:
        """Give up the clusters of a chain from the one of this index on; the entry is changed before.

        A long chain is only noted, and freed afterwards. One that is damaged is freed as far as it makes sense.
        """
        if not chain.first:
            return
        if keep:
            tail = chain.place(keep - 1)[0]
            rest = await self.table.following(tail)
            if not rest:
                return
            runs, following = await self.table.walk(rest, _SMALL)
            if following:
                await self.table.cut(change, tail, [])
                change.orphans.append(rest)
            else:
                await self.table.cut(change, tail, runs)
            return
        runs, following = await self.table.walk(chain.first, _SMALL)
        if following:
            change.orphans.append(chain.first)
        else:
            await self.table.release(change, runs)

    async def free_orphans(self) -> None:
        """Free the chains that nobody owns any more; not within a change."""
        for first in [first for first in self.intents.orphans if first not in self.in_use]:
            await self._free_orphan(first)

    async def _free_orphan(self, first: int) -> None:
        """Free a chain that nobody owns, in pieces."""
        while first:
            async with self.change() as change:
                if first in self.in_use or first not in self.intents.orphans:
                    return  # somebody took it, or freed it, while we waited for our turn
                runs, following = await self.table.walk(first, _BATCH)
                change.adopted.append(first)
                if following:
                    change.orphans.append(following)
                await self.table.release(change, runs)
            first = following

    async def reclaim(self) -> bool:
        """Make usable what nobody needs any more; whether that was anything. Not from within a change."""
        taken = self.free.so_far
        if self.before_order is not None:
            await self.before_order()
        for first in [first for first in self.intents.orphans if first not in self.in_use]:
            await self._free_orphan(first)
        is_more = self.free.young > 0 or self.free.so_far > taken
        await self.flush()
        return is_more

    # ---- order

    async def flush(self) -> None:
        """Until everything that was written before is durable."""
        async with self._flushing:
            writes, young = self.device.writes, self.free.young
            if writes == self._flushed:
                return
            await self.device.flush()
            self._flushed = writes
            self.free.flushed(young)

    async def sync(self) -> None:
        """Bring the volume into order: nothing half-done, FSInfo true, marked as clean, and all of that durable."""
        if not self.read_only and not self.device.gone:
            if self.before_order is not None:
                await self.before_order()
            await self.free_orphans()
        await self.flush()
        if not self._untidy or not self.dirty or self.read_only or self.device.gone:
            return
        async with self.turn:
            if not self._untidy or not self.dirty:
                return  # somebody else did it while we waited
            await self.flush()
            change = self.change()
            try:
                if self._fsinfo and self.free.total is not None:
                    counts = boot.pack_counts(self.free.total, self.free.next)
                    await change.put(self.geometry.fsinfo_offset + boot.COUNTS_OFFSET, counts)
                    change.step()
                if not self._keep_dirty and not self.intents.orphans:
                    await self._mark(change, False)
                    change.leaves_dirty = False
            except BaseException:
                change.undo()
                raise
            await change.commit(is_tidying=True)
            self._untidy = False  # not before: who is cancelled or fails on the way leaves it to the next one
            self.dirty = change.dirty_after
            await self.flush()
            self.intents.settled()

    def abandon(self, first: int) -> None:
        """A file without an entry is not open any more: its chain may be freed."""
        if first in self.in_use:
            self.in_use.discard(first)
            self.changed()

    async def count_free(self, patience: float) -> int:
        """How many clusters are free; what is known of them when that takes too long."""
        if not self.read_only:
            for first in [first for first in self.intents.orphans if first not in self.in_use]:
                await self._free_orphan(first)
        if self.free.total is None:
            with trio.move_on_after(patience):
                await self._count()
        return self.free.so_far

    # ---- chains and directories

    def clusters(self, size: int) -> int:
        """How many clusters so many bytes take."""
        return -(-size // self.cluster)

    def chain(self, first: int, most: int = MOST) -> Chain:
        """A chain of at most so many bytes."""
        return Chain(self.table, first, min(self.clusters(most), self.geometry.clusters))

    def stream(self, cluster: int) -> ChainStream | RootStream:
        """The bytes of a directory; cluster 0 is the root."""
        geometry = self.geometry
        if not cluster and not geometry.wide:
            return RootStream(self, geometry.root_offset, geometry.root_entries * SLOT)
        return ChainStream(self, self.chain(cluster or geometry.root_cluster, MAX_SLOTS * SLOT))


def _identity(geometry: boot.Geometry) -> bytes:
    """What tells this volume from others."""
    return hashlib.blake2b(repr(dataclasses.replace(geometry, is_dirty=False)).encode(), digest_size=16).digest()
