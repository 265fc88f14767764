"""How a Python driver waits for its next request: without a pass through trio's scheduler for each.

Owns: the names that pyfuse3 looks up in its global `trio`, which it lets others replace (its own asyncio mode does).
A request costs pyfuse3 a checkpoint for a free lock, and an epoll registration and a scheduler pass to wait for the
link: more than half of the time of a cold round trip. Here the free lock is taken without a checkpoint, and as
long as no handler is suspended the link is asked, and for a moment waited for, directly.

Nothing starves: while handlers are suspended trio runs at least every half millisecond, otherwise every five
milliseconds; a direct wait ends after two, and then trio waits as it always does. So other tasks of a driver, calls
from its threads and the supervisor's word are late by at most that.
Called by: serve.py, once, before pyfuse3.init. Drivers do not see it.
"""

from __future__ import annotations

import select
from collections.abc import Awaitable, Callable
from time import perf_counter
from types import SimpleNamespace, TracebackType
from typing import Any

import pyfuse3
import trio
from trio.lowlevel import ParkingLot, checkpoint

from udf.host.at_once import AtOnce, Found

DIRECT_WAIT = 0.002  # seconds that the link is waited for while trio's loop stands still
FAIR_SUSPENDED = 0.0005  # seconds between two passes through trio while handlers are suspended
FAIR = 0.005  # and while none is
STREAMING = 0.01  # seconds after a read that was answered at once

_Worker = Callable[..., Awaitable[None]]


class Pump:
    """The state of one session: how many of pyfuse3's workers there are, and what they do."""

    def __init__(self) -> None:
        self._workers = 0
        self._queued = 0  # workers that wait for the lock; one more holds it and waits for the link
        self._fresh = False  # a worker was started and has not run yet
        self._closing = False
        self._answered = 0.0  # when something was answered at once
        self._passed = 0.0  # when trio's scheduler last ran for us
        self._poll: Callable[[float], list[tuple[int, int]]] | None = None
        self._nursery: trio.Nursery | None = None  # of pyfuse3's workers
        self.at_once: AtOnce | None = None  # answers what libfuse need not see

    def install(self) -> None:
        """Have pyfuse3 wait through this object."""
        pump = self

        class Lock(_Lock):
            def __init__(self) -> None:
                super().__init__(pump)

        lowlevel = SimpleNamespace(
            current_task=trio.lowlevel.current_task,
            current_trio_token=trio.lowlevel.current_trio_token,
            wait_readable=self._wait_readable,
            notify_closing=self._notify_closing,
        )
        vars(pyfuse3)["trio"] = SimpleNamespace(
            Lock=Lock,
            open_nursery=lambda: _Nursery(pump),
            ClosedResourceError=trio.ClosedResourceError,
            from_thread=trio.from_thread,
            lowlevel=lowlevel,
        )

    def answer_at_once(self, at_once: AtOnce) -> None:
        """Before the session begins: have it look at each request first."""
        at_once.spawn = self._spawn
        self.at_once = at_once

    def _spawn(self, handler: Callable[[], Awaitable[None]]) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(handler)

    async def _work(self, worker: _Worker, arguments: tuple[Any, ...]) -> None:
        try:
            await worker(*arguments)
        finally:
            self._workers -= 1

    def _notify_closing(self, fd: int) -> None:
        self._closing = True  # who is between two looks would miss trio's word
        trio.lowlevel.notify_closing(fd)

    async def _wait_readable(self, fd: int) -> None:
        while not await self._is_for_libfuse(fd):
            pass

    async def _is_for_libfuse(self, fd: int) -> bool:
        """Wait for the next request; False if it was answered at once."""
        now = perf_counter()
        suspended = self._workers - 1 - self._queued
        # pyfuse3 starts a worker for each request during which none is idle: the new one must run to count as idle.
        at_once = self.at_once
        if at_once is not None:
            suspended += at_once.waiting
        if self._fresh or now - self._passed > (FAIR_SUSPENDED if suspended else FAIR):
            self._fresh = False
            await checkpoint()
            self._passed = perf_counter()
        if self._closing:
            raise trio.ClosedResourceError("the session is ending")
        poll = self._poll
        if poll is None:
            epoll = select.epoll()
            epoll.register(fd, select.EPOLLIN)
            poll = self._poll = epoll.poll
        if at_once is None:
            if not poll(0) and (suspended > 0 or not poll(DIRECT_WAIT)):
                await trio.lowlevel.wait_readable(fd)
                self._passed = perf_counter()
            return True
        found = at_once.look()
        if found is Found.OTHER:
            return True
        if found is Found.ANSWERED:
            self._answered = now
            return False
        # While a file is read, what comes next may be the driver's own: bytes that it reads ahead.
        if suspended > 0 or now - self._answered < STREAMING or not poll(DIRECT_WAIT):
            await trio.lowlevel.wait_readable(fd)
            self._passed = perf_counter()
        return False


class _Lock:
    """The one lock of a session. Who holds it waits for the next request."""

    def __init__(self, pump: Pump) -> None:
        self._pump = pump
        self._held = False
        self._parked = ParkingLot()

    async def __aenter__(self) -> None:
        if self._held:
            self._pump._queued += 1
            try:
                while self._held:
                    await self._parked.park()
            finally:
                self._pump._queued -= 1
        self._held = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held = False
        if self._parked:
            self._parked.unpark()  # runs only if our handler suspends; otherwise we are back first


class _Nursery:
    """A nursery that counts the workers started in it."""

    def __init__(self, pump: Pump) -> None:
        self._pump = pump
        self._manager = trio.open_nursery()
        self._nursery: trio.Nursery

    async def __aenter__(self) -> _Nursery:
        self._nursery = self._pump._nursery = await self._manager.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        return bool(await self._manager.__aexit__(kind, error, trace))

    @property
    def cancel_scope(self) -> trio.CancelScope:
        return self._nursery.cancel_scope

    def start_soon(self, worker: _Worker, *arguments: Any, name: object = None) -> None:
        self._pump._workers += 1
        self._pump._fresh = True
        self._nursery.start_soon(self._pump._work, worker, arguments, name=name)
