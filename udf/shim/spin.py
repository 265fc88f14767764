"""Bounded, adaptive spinning before the loop sleeps.

A wake-up of a sleeping CPU can cost more than a whole request; looking again for some tens of microseconds saves it
when the next event is that near, and wastes it when not. So the share of looks that found something is followed, and
spinning pauses while it is low. Between two looks the CPU is offered to others: without that, on a loaded machine,
the spinning takes the very CPU that the awaited driver needs. When somebody takes the offer, the machine has better
use for the CPU, and spinning pauses for longer. Never on one CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from time import monotonic

_WINDOW = 50e-6  # seconds after the last event
_TAKEN = 40e-6  # seconds between two looks that mean that somebody else had the CPU
_TRIES = 64  # spins between two judgements
_WORTH = 0.5  # share that must have found something
_PAUSE = 256  # events without spinning before it is tried again
_LONG_PAUSE = 2048  # the same after somebody else wanted the CPU

Poll = Callable[[float], list[tuple[int, int]]]


class Spin:
    """Decides whether the loop looks again before it sleeps."""

    def __init__(self, enabled: bool | None) -> None:
        self.enabled = enabled is not False and len(os.sched_getaffinity(0)) > 1
        self.wanted = False
        self.spins = 0
        self.won = 0
        self._tries = 0
        self._hits = 0
        self._taken = 0
        self._pause = 0

    def worked(self) -> None:
        """Say that an event was handled."""
        if not self.enabled:
            return
        if self._pause:
            self._pause -= 1
            return
        self.wanted = True

    def poll(self, poll: Poll) -> list[tuple[int, int]]:
        """Look until something comes or the moment is over."""
        self.wanted = False
        self.spins += 1
        self._tries += 1
        give_way = os.sched_yield
        looked = monotonic()
        end = looked + _WINDOW
        while not (events := poll(0)):
            now = monotonic()
            if now - looked > _TAKEN:
                self._taken += 1
            if now > end:
                break
            looked = now
            give_way()
        if events:
            self.won += 1
            self._hits += 1
        if self._tries >= _TRIES:
            if self._taken > self._tries // 8:
                self._pause = _LONG_PAUSE
            elif self._hits < self._tries * _WORTH:
                self._pause = _PAUSE
            self._tries = self._hits = self._taken = 0
        return events
