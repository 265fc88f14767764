"""What filesystem is on a block device, by looking through the service that everybody uses.

Owns: that look, bounded in bytes and in time, away from the loop. Must never: believe what it finds (labels are
cleaned by who shows them or makes a path of them), or keep a device's trouble for another's look.
Called by: volumes.py, automount.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from udf.block.client import BlockClient
from udf.block.probe import probe
from udf.errors import DeviceGone, UserError
from udf.supervisor import catalog
from udf.supervisor.blocks import BlockEndpoint

LOOK_TIMEOUT = 8.0  # seconds; a device that spins up first needs some
_THREADS = 16  # one for each device that is slow just now

_threads: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("udf_contents_threads")


@dataclass(frozen=True)
class Content:
    """What was found. All of it is the device's word."""

    filesystem: str = ""  # as mount(8) calls it; empty: nothing that is known
    label: str = ""
    uuid: str = ""


NOTHING = Content()


async def look(endpoint: BlockEndpoint, export: str) -> Content:
    """What is in an export now. UserError if that cannot be read."""
    try:
        limiter = _threads.get()
    except LookupError:
        limiter = trio.CapacityLimiter(_THREADS)
        _threads.set(limiter)
    uri, name = endpoint.uri(export), f"{endpoint.plan.name}/{export}"
    return await catalog.in_thread(lambda: trio.run(_look, uri, name), name, limiter)


async def _look(uri: str, name: str) -> Content:
    """In a loop of its own: what a device makes of the parsing costs nobody else a turn."""
    try:
        with trio.move_on_after(LOOK_TIMEOUT):
            async with await BlockClient.open(uri) as client:
                found = await probe(client.read, client.size)
            return NOTHING if found is None else Content(found.type, found.label, found.uuid)
    except (OSError, DeviceGone) as exc:
        raise UserError(f"{name} cannot be read: {getattr(exc, 'strerror', None) or exc}") from None
    raise UserError(f"{name} does not answer within {LOOK_TIMEOUT:g} s: see `udf hung`")
