"""What the shim counts. A cache hit is a request that was answered with no round trip to the driver."""

from __future__ import annotations


class Counters:
    """Plain integers, read by the supervisor; the hot path adds to them in place."""

    __slots__ = (
        "attr_hits",
        "detaches",
        "driver_faults",
        "driver_round_trips",
        "interrupts",
        "invalidated",
        "listing_hits",
        "local_answers",
        "name_hits",
        "negative_hits",
        "notifications",
        "open_hits",
        "parked",
        "poisoned",
        "rebuilt",
        "replayed",
        "requests",
        "resolved",
        "spins",
        "spins_won",
        "stale_hits",
        "statfs_hits",
        "timeouts",
    )

    def __init__(self) -> None:
        self.attr_hits = 0
        self.detaches = 0  # times that the device went away
        self.driver_faults = 0
        self.driver_round_trips = 0
        self.interrupts = 0
        self.invalidated = 0  # nodes of which the kernel was made to forget everything, because the device stays away
        self.listing_hits = 0
        self.local_answers = 0
        self.name_hits = 0
        self.negative_hits = 0
        self.notifications = 0
        self.open_hits = 0
        self.parked = 0
        self.poisoned = 0
        self.rebuilt = 0
        self.replayed = 0
        self.requests = 0
        self.resolved = 0
        self.spins = 0
        self.spins_won = 0
        self.stale_hits = 0  # answered from what was known because there was no driver to ask
        self.statfs_hits = 0
        self.timeouts = 0

    def snapshot(self) -> dict[str, int]:
        """Return all counts, and `cache_hits`, the sum of the hits."""
        counts: dict[str, int] = {name: getattr(self, name) for name in self.__slots__}
        counts["cache_hits"] = sum(count for name, count in counts.items() if name.endswith("_hits"))
        return counts
