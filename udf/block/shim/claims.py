"""Who may write where: a region of a unit has at most one exclusive writer, and regions that overlap are one.

Owns: the claims. Must never: keep a reader out. A claim ends with its connection, but not before the driver has
answered what was written over it: the next writer must not be overtaken by the one before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from udf.block.shim.client import Client
    from udf.block.shim.exports import Region


class Claims:
    """The claims of all connections; each has at most one for each export, few in all."""

    def __init__(self) -> None:
        self._held: dict[Client, list[Region]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))

    def holds(self, client: Client, region: Region) -> bool:
        """Whether *client* is the writer of *region*."""
        return region in self._held.get(client, ())

    def in_the_way(self, client: Client, region: Region) -> Client | None:
        """The connection whose claim overlaps *region*, one that goes on before one that is ending."""
        ending = None
        for other, regions in self._held.items():
            if other is not client and any(region.overlaps(one) for one in regions):
                if not other.closed:
                    return other
                ending = other
        return ending

    def take(self, client: Client, region: Region) -> None:
        """Make *client* the writer; nobody may be in the way."""
        self._held.setdefault(client, []).append(region)

    def end(self, client: Client) -> bool:
        """The connection has ended, and so have its writes; whether it had a claim."""
        return self._held.pop(client, None) is not None
