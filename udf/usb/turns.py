"""Who reads the socket: one thread at a time leads, the others sleep until they are done or it is their turn.

Owns: the lead and the queue of those that wait. Must never: be used without the lock that it shares with the table of
transfers, where that is said, or lose the lead: whoever has it passes it on, however it is interrupted.
Called by: client.py, table.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from udf.usb.urb import Transfer


class Waiter:
    """A thread that sleeps."""

    __slots__ = ("leads", "wake", "woken")

    def __init__(self) -> None:
        self.wake = threading.Lock()
        self.wake.acquire()
        self.woken = False
        self.leads = False


class Turns:
    """`state` is the lock; `nobody` is called, with it held, when nobody leads and nobody waits."""

    def __init__(self, state: threading.Lock, nobody: Callable[[], None]) -> None:
        self._state = state
        self._nobody = nobody
        self._waiters: dict[Waiter, None] = {}
        self.leading = False  # somebody leads; the lock is held to change it

    def follow(self, transfer: Transfer | None, timeout: float | None) -> bool:
        """Sleep until we lead (True), or the transfer is done, the connection has ended or the time is over (False).

        At once if nobody leads.
        """
        with self._state:
            if transfer is not None and transfer.done:
                return False
            if not self.leading:
                self.leading = True
                return True
            waiter = Waiter()
            self._waiters[waiter] = None
            if transfer is not None:
                transfer.waiters.append(waiter)
        try:
            waiter.wake.acquire(timeout=-1 if timeout is None else min(max(timeout, 0), threading.TIMEOUT_MAX))
        finally:
            with self._state:
                interrupted = not waiter.woken
                self._waiters.pop(waiter, None)
                waiter.woken = True  # nobody is to wake it any more: it might be given the lead and not know
        return waiter.leads and not interrupted

    def resign(self) -> None:
        """Pass the lead on to whoever has waited longest."""
        with self._state:
            if self._waiters:
                self.wake(next(iter(self._waiters)), leads=True)
            else:
                self.leading = False
                self._nobody()

    def take_if_free(self) -> bool:
        """Lead if nobody does. The lock is held."""
        if self.leading:
            return False
        self.leading = True
        return True

    def wake(self, waiter: Waiter, *, leads: bool) -> None:
        """End its sleep. The lock is held."""
        if not waiter.woken:
            self._waiters.pop(waiter, None)
            waiter.woken = True
            waiter.leads = leads
            waiter.wake.release()

    def wake_all(self) -> None:
        """The connection has ended. The lock is held."""
        for waiter in list(self._waiters):
            self.wake(waiter, leads=False)
