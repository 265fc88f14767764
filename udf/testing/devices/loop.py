"""One thread in which every device of an emulator lives: sockets, timers and calls from other threads.

Owns: the epoll object, the timers, the queue of calls. Because all handlers of all models run here, one after the
other, a model needs no locks. Must never: block anywhere but in epoll, or end because a callback failed.
Called by: emulator.py and everything below it.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any, TypeVar

log = logging.getLogger("udf.devices")
T = TypeVar("T")
READ, WRITE = select.EPOLLIN, select.EPOLLOUT
ENDED = select.EPOLLHUP | select.EPOLLERR


class Timer:
    """Something that will be done; cancel() makes it not."""

    __slots__ = ("call", "when")

    def __init__(self, when: float, call: Callable[[], object]) -> None:
        self.when = when
        self.call: Callable[[], object] | None = call

    def cancel(self) -> None:
        """Never mind. In the loop's thread only."""
        self.call = None


class Loop:
    """Start it, give it work from any thread, stop it."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._handlers: dict[int, Callable[[int], object]] = {self._wake: self._woken}
        self._epoll.register(self._wake, READ)
        self._soon: deque[Callable[[], object]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._stopping = False
        self._ident: int | None = None
        self._lock = threading.Lock()  # between a call from outside and the end
        self.ended = False

    # --- from any thread ---

    @property
    def inside(self) -> bool:
        """Whether the caller is the loop's thread."""
        return threading.get_ident() == self._ident

    def soon(self, call: Callable[[], object]) -> None:
        """Do it in the loop's thread, after what is being done. Dropped when the loop has ended."""
        with self._lock:
            if self.ended:
                return
            self._soon.append(call)
            if threading.get_ident() != self._ident:
                os.eventfd_write(self._wake, 1)

    def call(self, call: Callable[[], T]) -> T:
        """Do it in the loop's thread and wait for its result."""
        if self.inside:
            return call()
        done = threading.Event()
        result: list[T] = []
        failure: list[BaseException] = []

        def run() -> None:
            try:
                result.append(call())
            except BaseException as error:  # handed to who waits
                failure.append(error)
            finally:
                done.set()

        with self._lock:
            if self.ended:
                raise RuntimeError("the emulator has ended")
            self._soon.append(run)
            os.eventfd_write(self._wake, 1)
        done.wait()
        if failure:
            raise failure[0]
        return result[0]

    def stop(self) -> None:
        """End `run` after what is being done."""
        self.soon(self._stop)

    # --- in the loop's thread ---

    def later(self, seconds: float, call: Callable[[], object]) -> Timer:
        """Do it after so many seconds."""
        timer = Timer(monotonic() + seconds, call)
        heapq.heappush(self._timers, (timer.when, next(self._order), timer))
        return timer

    def add(self, fd: int, events: int, handler: Callable[[int], object]) -> None:
        """Call *handler* with what epoll says about a descriptor."""
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def change(self, fd: int, events: int) -> None:
        """Wait for other events."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forget a descriptor; before it is closed."""
        if self._handlers.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def run(self) -> None:
        """Work until stop(); then everything that still waits to be called is called."""
        self._ident = threading.get_ident()
        poll = self._epoll.poll
        handlers = self._handlers
        try:
            while not self._stopping:
                for fd, events in poll(self._patience()):
                    handler = handlers.get(fd)  # an earlier event may have removed it
                    if handler is not None:
                        try:
                            handler(events)
                        except Exception:
                            log.exception("an emulated device's connection failed")
                if self._timers:
                    self._expire()
                for _ in range(len(self._soon)):  # what these add waits for the next round
                    self._try(self._soon.popleft())
        finally:
            with self._lock:
                self.ended = True
            while self._soon:
                self._try(self._soon.popleft())
            self._epoll.close()
            os.close(self._wake)

    def _patience(self) -> float | None:
        if self._soon:
            return 0
        if not self._timers:
            return None
        return max(0.0, self._timers[0][0] - monotonic())

    def _expire(self) -> None:
        now = monotonic()
        while self._timers and self._timers[0][0] <= now:
            call = heapq.heappop(self._timers)[2].call
            if call is not None:
                self._try(call)

    def _try(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception:
            log.exception("an emulated device failed")

    def _woken(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _stop(self) -> None:
        self._stopping = True
