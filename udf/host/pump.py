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

DIRECT_WAIT = 0.002  # seconds that the link is waited for while trio's loop stands still
FAIR_SUSPENDED = 0.0005  # seconds between two passes through trio while handlers are suspended
FAIR = 0.005  # and while none is

_Worker = Callable[..., Awaitable[None]]


class Pump:
    """The state of one session: how many of pyfuse3's workers there are, and what they do."""

    def __init__(self) -> None:
        self._workers = 0
        self._queued = 0  # workers that wait for the lock; one more holds it and waits for the link
        self._fresh = False  # a worker was started and has not run yet
        self._closing = False
        self._passed = 0.0  # when trio's scheduler last ran for us
        self._poll: Callable[[float], list[tuple[int, int]]] | None = None

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

    async def _work(self, worker: _Worker, arguments: tuple[Any, ...]) -> None:
        try:
            await worker(*arguments)
        finally:
            self._workers -= 1

    def _notify_closing(self, fd: int) -> None:
        self._closing = True  # who is between two looks would miss trio's word
        trio.lowlevel.notify_closing(fd)

    async def _wait_readable(self, fd: int) -> None:
        now = perf_counter()
        suspended = self._workers - 1 - self._queued
        # pyfuse3 starts a worker for each request during which none is idle: the new one must run to count as idle.
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
        if poll(0) or (suspended <= 0 and poll(DIRECT_WAIT)):
            return
        await trio.lowlevel.wait_readable(fd)
        self._passed = perf_counter()


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
        self._nursery = await self._manager.__aenter__()
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
