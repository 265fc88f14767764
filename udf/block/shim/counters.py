"""What the block shim counts."""

from __future__ import annotations


class Counters:
    """Plain integers, read by the supervisor; the data path adds to them in place."""

    __slots__ = (
        "bytes_read",
        "bytes_written",
        "claims_refused",
        "compared",
        "connections_total",
        "driver_faults",
        "driver_round_trips",
        "flushes_idle",
        "flushes_own",
        "held",
        "kept_again",
        "kept_lost",
        "parked",
        "poisoned",
        "refused",
        "replayed",
        "requests",
        "timeouts",
    )

    def __init__(self) -> None:
        self.bytes_read = 0
        self.bytes_written = 0
        self.claims_refused = 0
        self.compared = 0  # sectors, when a device was back
        self.connections_total = 0
        self.driver_faults = 0
        self.driver_round_trips = 0
        self.flushes_own = 0  # because too much was kept
        self.flushes_idle = 0  # because nobody wrote any more
        self.held = 0  # answers that the device is gone, which nobody else had said
        self.kept_again = 0  # acknowledged writes that were written once more
        self.kept_lost = 0  # acknowledged writes that could not be
        self.parked = 0
        self.poisoned = 0
        self.refused = 0  # answered with an error before they went anywhere
        self.replayed = 0
        self.requests = 0
        self.timeouts = 0

    def snapshot(self) -> dict[str, int]:
        """Return all counts."""
        return {name: getattr(self, name) for name in self.__slots__}
