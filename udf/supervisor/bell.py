"""Waiting for something to become true that only changes when somebody says so.

Owns: one wake-up for any number of waiters, each with its own condition. Must never: poll. Called by: mounts.py.
"""

from __future__ import annotations

from collections.abc import Callable

import trio


class Bell:
    """Rung after every change; waiters look again."""

    def __init__(self, rings: Bell | None = None) -> None:
        """`rings`: another one that is rung with it."""
        self._rung = trio.Event()
        self._rings = rings
        self.listeners: list[Callable[[], None]] = []  # called at each ring; they must not block

    def ring(self) -> None:
        """Something has changed."""
        self._rung.set()
        self._rung = trio.Event()
        if self._rings is not None:
            self._rings.ring()
        for told in self.listeners:
            told()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return when the condition is true."""
        while not condition():
            await self._rung.wait()

    async def within(self, seconds: float, condition: Callable[[], bool]) -> bool:
        """Wait that long at most; whether it is true."""
        with trio.move_on_after(seconds):
            await self.until(condition)
        return condition()
