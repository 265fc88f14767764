"""What is in files: reading, writing and cutting them.

Owns: the order in which contents, chain and entry reach the device, and who may do what to a file at the same time.
Must never: put contents into the metadata cache, or let a program see what was in a cluster before it.
Called by: operations.py.

Contents go straight between the program and the device, a run of clusters by one command. A file that grows: its new
clusters are taken (in memory), filled (nobody can see them yet), and then made part of it in one change: first the
chain, last the size in the entry. When a write is answered, all of that is on the device.
"""

from __future__ import annotations

import dataclasses
import errno
import time

import trio

from udf import still_working

from .ahead import Ahead, Later
from .chain import Chain
from .change import Change, Run, no_space
from .damage import Damaged
from .device import Data
from .entries import ARCHIVE, SLOT, Entry, Found, patch
from .entries import entry as decoded
from .nodes import Node, Nodes
from .reserve import Reserve
from .volume import MOST, Volume

_ZEROS = 8 << 20  # bytes that are made zero at once
_AT_ONCE = 8  # runs of clusters that are read at the same time
_PAIR = 2_000_000_000  # ns: how fine the time of a change is


class Contents:
    """The files of one volume."""

    def __init__(self, volume: Volume, nodes: Nodes) -> None:
        self._volume = volume
        self._nodes = nodes
        self.reserve = Reserve(volume, nodes)
        volume.before_order = self.reserve.give_back

    def chain(self, node: Node) -> Chain:
        """The chain of a file. Damaged."""
        if node.chain is None:
            node.chain = self._volume.chain(node.cluster)
        return node.chain

    # ---- reading

    async def read(self, node: Node, offset: int, size: int) -> bytes | bytearray:
        """What is there, shorter only at the end of the file."""
        while node.cutting:
            async with node.turn:
                pass
        length = node.file_entry.size
        size = min(size, length - offset)
        if size <= 0:
            return b""
        ahead = node.ahead
        if ahead is None:
            ahead = node.ahead = Ahead(self._volume, lambda begin, target: self._fetch(node, begin, target))
        with node.users:
            return await ahead.read(offset, size, length)

    def read_now(self, node: Node, offset: int, size: int, later: Later) -> list[memoryview] | bool:
        """The same, if it was read ahead; valid until anything is awaited.

        True: it is on its way, and `later` will be called with it, or with None if nothing comes of that. False: no.
        """
        if node.cutting or node.ahead is None:
            return False
        length = node.file_entry.size
        return node.ahead.read_now(offset, min(size, length - offset), length, later)

    async def _fetch(self, node: Node, offset: int, target: memoryview) -> None:
        """Read from the device, whatever is in memory."""
        with node.users:
            chain = self.chain(node)
            places = await self._places(chain, offset, len(target))
            device = self._volume.device
            if len(places) == 1:
                await device.read_into(places[0][0], target)
                return
            room = trio.CapacityLimiter(_AT_ONCE)
            failures: list[OSError] = []

            async def get(place: int, part: memoryview) -> None:
                async with room:
                    try:
                        await device.read_into(place, part)
                    except OSError as exc:
                        failures.append(exc)

            async with trio.open_nursery() as nursery:
                at = 0
                for place, length in places:
                    nursery.start_soon(get, place, target[at : at + length])
                    at += length
            if failures:
                raise failures[0]

    async def _places(self, chain: Chain, offset: int, size: int) -> list[Run]:
        """Where on the device a range of a file is: offsets and lengths. Damaged when the chain is too short."""
        volume = self._volume
        stop = volume.clusters(offset + size)
        if await chain.reach(stop) < stop:
            raise Damaged("a file is longer than its chain of clusters")
        return self._pieces(chain.runs(offset // volume.cluster, stop), offset % volume.cluster, size)

    def _pieces(self, runs: list[Run], within: int, size: int) -> list[Run]:
        cluster, pieces = self._volume.cluster, []
        for first, count in runs:
            length = min(size, count * cluster - within)
            pieces.append((self._volume.geometry.cluster_offset(first) + within, length))
            within, size = 0, size - length
            if size <= 0:
                break
        return pieces

    # ---- writing

    async def write(self, node: Node, offset: int, data: bytes) -> int:
        """Write what fits below 4 GiB; how much that was."""
        if offset >= MOST:
            raise OSError(errno.EFBIG, "a file on a FAT volume ends before 4 GiB")
        data = data[: MOST - offset] if offset + len(data) > MOST else data
        async with node.turn:
            return await self._write(node, offset, data)

    async def _write(self, node: Node, offset: int, data: bytes) -> int:
        volume = self._volume
        volume.check()
        size = node.file_entry.size
        chain = self.chain(node)
        runs: list[Run] = []
        if offset + len(data) > size:
            runs, room = await self._more(node, chain, offset + len(data), len(data) if offset == size else 0)
            if room <= offset:
                volume.free.put_back(runs)
                raise no_space()
            data = data[: room - offset] if room < offset + len(data) else data
        node.written = True
        try:
            try:
                if offset > size:
                    await self._zero(chain, runs, size, offset - size)
                pieces = _cut(data, await self._whole_places(chain, runs, offset, len(data)))
            except BaseException:
                volume.free.put_back(runs)
                raise
            if runs:
                await self._fill_and_link(node, chain, runs, pieces)
            else:
                await volume.device.write_all(pieces)
        finally:
            if node.ahead is not None:
                node.ahead.drop()
        await self._enter(node, chain, max(offset + len(data), size))
        return len(data)

    async def _more(self, node: Node, chain: Chain, end: int, appended: int) -> tuple[list[Run], int]:
        """The clusters that a file needs to grow to its new end, or what there is; and how long it can become so."""
        cluster = self._volume.cluster
        have = await chain.all()
        if have < self._volume.clusters(node.file_entry.size):
            raise Damaged("a file is longer than its chain of clusters")
        missing = self._volume.clusters(end) - have
        runs = await self.reserve.take(node, chain, missing, appended) if missing > 0 else []
        return runs, (have + sum(count for _, count in runs)) * cluster

    async def _fill_and_link(self, node: Node, chain: Chain, runs: list[Run], pieces: list[tuple[int, Data]]) -> None:
        """Write contents while their clusters become part of the chain: what is behind the size is nobody's yet."""
        failures: list[OSError] = []

        async def fill() -> None:
            try:
                await self._volume.device.write_all(pieces)
            except OSError as exc:
                failures.append(exc)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fill)
            try:
                await self.reserve.link(node, chain, runs)
            except OSError as exc:
                failures.insert(0, exc)
        if failures:
            raise failures[0]

    async def _whole_places(self, chain: Chain, runs: list[Run], offset: int, size: int) -> list[Run]:
        """Where a range is of a file with clusters that are not part of it yet."""
        if not size:
            return []
        if not runs:
            return await self._places(chain, offset, size)
        cluster = self._volume.cluster
        index = offset // cluster
        known = chain.runs(index, chain.known)
        skip = max(0, index - chain.known)
        for first, count in runs:
            if skip < count:
                known.append((first + skip, count - skip))
            skip = max(0, skip - count)
        return self._pieces(_merged(known), offset % cluster, size)

    async def _zero(self, chain: Chain, runs: list[Run], offset: int, size: int) -> None:
        """Make a range zero that is behind the end of the file."""
        for place, length in await self._whole_places(chain, runs, offset, size):
            for at in range(place, place + length, _ZEROS):
                await self._volume.device.zero(at, min(_ZEROS, place + length - at))
                still_working()

    async def _enter(self, node: Node, chain: Chain, size: int) -> None:
        """Make a new size, the chain and the time of the change part of the entry."""
        now = time.time_ns()
        entry = node.file_entry
        is_same = size == entry.size and entry.modified_ns // _PAIR == now // _PAIR and entry.attributes & ARCHIVE
        if is_same and (entry.cluster or not chain.first):
            self._volume.changed()
            return
        fields = {"size": size, "modified_ns": now, "attributes": entry.attributes | ARCHIVE}
        async with self._volume.change() as change:
            self.reserve.enter(change, node, chain, fields)
            entry = await self.update(change, node, fields)
        node.entry = entry
        self.reserve.entered(node, chain)

    async def update(self, change: Change, node: Node, fields: dict[str, int]) -> Entry:
        """Change the entry; what it is then, for when the change is done."""
        parent, entry = node.parent, node.file_entry
        if node.removed or parent is None:
            return dataclasses.replace(entry, **fields)  # type: ignore[arg-type]
        stream = parent.stream
        if stream is None or stream.change is not None:
            async with self._nodes.changing(parent, change) as directory:
                return await directory.update(entry, **fields)
        # What a directory's index does not have may be changed past it, which is most of what a write of a file does.
        at = (entry.slot + entry.slots - 1) * SLOT
        raw = await stream.read(at, SLOT)
        if raw[:11] != entry.short:
            raise Damaged("an entry is not what it was")
        parent.version += 1
        changed = patch(raw, self._volume.settings, fields)
        if changed != raw:
            stream.change, stream.deletes_last = change, False
            try:
                await stream.write(at, changed)
            finally:
                stream.change = None
        return decoded(Found(changed, b"", entry.slot, entry.slots), entry.name, self._volume.settings)

    # ---- cutting

    async def truncate(self, node: Node, size: int, fields: dict[str, int]) -> None:
        """Set the length and, with it, these fields of the entry. What a file grows by is zeros."""
        if size > MOST:
            raise OSError(errno.EFBIG, "a file on a FAT volume ends before 4 GiB")
        async with node.turn:
            old = node.file_entry.size
            node.written = True
            if node.ahead is not None:
                node.ahead.drop()
            if size > old:
                await self._extend(node, size)
            elif size < old or (not size and node.cluster):
                node.cutting = True
                try:
                    await node.users.none()
                    await self._shorten(node, size)
                finally:
                    node.cutting = False
                    if node.ahead is not None:
                        node.ahead.drop()
            if fields:
                async with self._volume.change() as change:
                    entry = await self.update(change, node, fields)
                node.entry = entry

    async def _extend(self, node: Node, size: int) -> None:
        volume = self._volume
        volume.check()
        chain = self.chain(node)
        old = node.file_entry.size
        runs, room = await self._more(node, chain, size, 0)
        try:
            if room < size:
                raise no_space()
            await self._zero(chain, runs, old, size - old)
        except BaseException:
            volume.free.put_back(runs)
            raise
        await self.reserve.link(node, chain, runs)
        await self._enter(node, chain, size)

    async def _shorten(self, node: Node, size: int) -> None:
        volume = self._volume
        chain = self.chain(node)
        keep = volume.clusters(size)
        if await chain.reach(keep) < keep:
            raise Damaged("a file is longer than its chain of clusters")
        fields = {"size": size, "modified_ns": time.time_ns(), "attributes": node.file_entry.attributes | ARCHIVE}
        if not keep:
            fields["cluster"] = 0
        async with volume.change() as change:
            entry = await self.update(change, node, fields)
            if node.removed and chain.first and not keep:
                change.adopted.append(chain.first)
                volume.in_use.discard(chain.first)
            self.reserve.forget(change, node)
            await volume.release(change, chain, keep)
        node.entry = entry
        chain.cut(keep)

    # ---- the end

    async def touch(self, change: Change, node: Node, now: int) -> None:
        """Set the time of a directory's change, where it has one that is not the same."""
        if node.parent is not None and node.file_entry.modified_ns // _PAIR != now // _PAIR:
            node.entry = await self.update(change, node, {"modified_ns": now})

    async def give_up(self, change: Change, entry: Entry, node: Node | None, *, is_open: bool) -> None:
        """Free the clusters of what has lost its entry; at once, unless somebody has the file open."""
        volume = self._volume
        if node is not None and not node.is_directory:
            self.reserve.forget(change, node)
        if node is not None and is_open and not node.is_directory:
            if entry.cluster:
                change.orphans.append(entry.cluster)
                volume.in_use.add(entry.cluster)
            return
        try:
            await volume.release(change, volume.chain(entry.cluster))
        except Damaged:
            pass  # it names a cluster that is none: there is nothing to free

    def closed(self, node: Node) -> None:
        """Nobody has the file open any more."""
        if node.ahead is not None:
            node.ahead.drop()
        if node.removed and not node.is_directory:
            self._volume.abandon(node.chain.first if node.chain is not None else node.cluster)
        elif node.chain is not None and node.chain.first and not node.cluster:
            self._volume.abandon(node.chain.first)  # it was never entered: the write failed
            node.chain = None

    async def flush(self, node: Node) -> None:
        """Until what was written to the file is durable."""
        if node.written:
            node.written = False
            try:
                if self.reserve.has(node):
                    async with node.turn:
                        await self.reserve.trim(node)
                await self._volume.flush()
            except BaseException:
                node.written = True
                raise


def _cut(data: bytes, places: list[Run]) -> list[tuple[int, Data]]:
    if len(places) == 1:
        return [(places[0][0], data)]
    view, at = memoryview(data), 0
    out: list[tuple[int, Data]] = []
    for place, length in places:
        out.append((place, view[at : at + length]))
        at += length
    return out


def _merged(runs: list[Run]) -> list[Run]:
    """Neighbours as one."""
    out: list[Run] = []
    for first, count in runs:
        if out and out[-1][0] + out[-1][1] == first:
            out[-1] = out[-1][0], out[-1][1] + count
        else:
            out.append((first, count))
    return out
