"""Taking turns without a pass through the scheduler when nobody else wants the turn.

Owns: a lock that is handed over in the order of asking, and a count of users that somebody can wait out.
Must never: know what it guards. Called by: volume.py, nodes.py, chain.py, contents.py.

trio's own Lock yields at each acquisition, which would cost a warm look-up more than everything else it does.
"""

from __future__ import annotations

from trio.lowlevel import ParkingLot


class Turn:
    """A lock: `async with turn`."""

    __slots__ = ("_lot", "held")

    def __init__(self) -> None:
        self.held = False
        self._lot: ParkingLot | None = None

    async def __aenter__(self) -> None:
        if not self.held:
            self.held = True
            return
        if self._lot is None:
            self._lot = ParkingLot()
        await self._lot.park()  # it is ours when we are woken: it was never free in between

    async def __aexit__(self, *_: object) -> None:
        if self._lot:
            self._lot.unpark()
        else:
            self.held = False


class Users:
    """Who uses something now: `with users`; and who waits until nobody does."""

    __slots__ = ("_lot", "count")

    def __init__(self) -> None:
        self.count = 0
        self._lot: ParkingLot | None = None

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, *_: object) -> None:
        self.count -= 1
        if not self.count and self._lot:
            self._lot.unpark_all()

    async def none(self) -> None:
        """Until nobody uses it."""
        while self.count:
            if self._lot is None:
                self._lot = ParkingLot()
            await self._lot.park()
