"""The live trace of one mount: lines from the shim to any number of listeners.

Owns: the pipe on which the shim writes its trace, and the queues of those who listen. Must never: slow the shim down
(it drops lines when the pipe is full) or grow with a slow listener. Called by: mounts.py and control.py.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Awaitable, Callable

import msgspec
import trio

MAX_QUEUE = 2000  # operations that wait for one listener
MAX_BATCH = 200  # operations in one reply
_F_SETPIPE_SZ = 1031
_PIPE_SIZE = 256 * 1024
_MAX_LINE = 64 * 1024


class Operation(msgspec.Struct, frozen=True):
    """One operation that the kernel asked for, as the shim tells it."""

    time: float
    op: str
    node: int
    name: str | None
    pid: int
    uid: int
    us: float
    result: str
    by: str
    bytes: int


class _Listener:
    def __init__(self) -> None:
        self.send, self.receive = trio.open_memory_channel[Operation](MAX_QUEUE)
        self.lost = 0


class TraceFeed:
    """Tracing of one mount: on while somebody listens."""

    def __init__(self, switch: Callable[[int | None], Awaitable[bool]]) -> None:
        self._switch = switch  # tells the shim: a descriptor to write to, or None for off
        self._listeners: list[_Listener] = []
        self._changing = trio.Lock()
        self._closed = False
        self._reading: trio.CancelScope | None = None

    def close(self) -> None:
        """The mount is gone: every listener's stream ends.

        The switch is let go of: it is the mount's own method, and in that circle everything that belonged to an ended
        mount would stay in memory until a full garbage collection, which a quiet daemon has once in hundreds of mounts.
        """
        self._closed = True
        self._switch = _no_shim
        for listener in self._listeners:
            listener.send.close()

    async def listen(self, nursery: trio.Nursery, deliver: Callable[[list[Operation], int], Awaitable[None]]) -> None:
        """Deliver batches of operations, with how many were lost, until the mount is gone or the caller is cancelled.

        `nursery` carries the reader of the pipe, which other listeners share; it must outlive them all.
        """
        listener = _Listener()
        async with self._changing:
            if self._closed:
                return
            self._listeners.append(listener)
            if self._reading is None and not await self._begin(nursery):
                self._listeners.remove(listener)
                return
        try:
            await deliver([], 0)  # from now on nothing is missed
            async for first in listener.receive:
                batch = [first]
                while len(batch) < MAX_BATCH:
                    try:
                        batch.append(listener.receive.receive_nowait())
                    except (trio.WouldBlock, trio.EndOfChannel):
                        break
                lost, listener.lost = listener.lost, 0
                await deliver(batch, lost)
        finally:
            listener.send.close()
            listener.receive.close()
            with trio.CancelScope(shield=True):
                async with self._changing:
                    self._listeners.remove(listener)
                    if not self._listeners:
                        await self._end()

    async def _begin(self, nursery: trio.Nursery) -> bool:
        read_end, write_end = os.pipe()
        for end in (read_end, write_end):
            fcntl.fcntl(end, fcntl.F_SETFL, os.O_NONBLOCK)
        try:
            fcntl.fcntl(write_end, _F_SETPIPE_SZ, _PIPE_SIZE)
        except OSError:
            pass  # above the user's limit; the shim only drops sooner
        try:
            taken = await self._switch(write_end)
        finally:
            os.close(write_end)
        if not taken:
            os.close(read_end)
            return False
        self._reading = trio.CancelScope()
        nursery.start_soon(self._read, read_end, self._reading)
        return True

    async def _end(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        await self._switch(None)

    async def _read(self, read_end: int, scope: trio.CancelScope) -> None:
        partial = b""
        async with trio.lowlevel.FdStream(read_end) as stream:
            with scope:
                while chunk := await stream.receive_some(64 * 1024):
                    lines = (partial + chunk).split(b"\n")
                    partial = lines.pop()[-_MAX_LINE:]
                    for line in lines:
                        self._deliver(line)

    def _deliver(self, line: bytes) -> None:
        try:
            operation = _decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return  # cut at the pipe's edge
        for listener in self._listeners:
            try:
                listener.send.send_nowait(operation)
            except trio.WouldBlock:
                listener.lost += 1
            except (trio.ClosedResourceError, trio.BrokenResourceError):
                pass


async def _no_shim(_write_end: int | None) -> bool:
    """The switch of a mount that is gone."""
    return False


_decoder = msgspec.json.Decoder(Operation)
