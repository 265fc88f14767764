"""The way up: the second entry of every directory but the root.

Owns: reading and changing the cluster that it names. (entries.dots makes both entries of a new directory.)
Must never: touch any other slot. Called by: operations.py, when a directory moves, and where a loop is looked for.
"""

from __future__ import annotations

from . import entries
from .damage import Damaged
from .entries import DOTDOT, SLOT, Settings
from .slots import Stream


async def parent(stream: Stream, settings: Settings) -> int:
    """The cluster that a directory's '..' names: 0 is the root. Damaged when it has none."""
    return entries.cluster_of(await _dotdot(stream), settings)


async def set_parent(stream: Stream, cluster: int, settings: Settings) -> None:
    """Make a directory's '..' name another directory; 0 is the root, also on FAT32. One write."""
    raw = await _dotdot(stream)
    changed = entries.patch(raw, settings, {"cluster": cluster})
    if changed != raw:
        await stream.write(SLOT, changed)


async def _dotdot(stream: Stream) -> bytes:
    raw = await stream.read(SLOT, SLOT) if stream.size >= 2 * SLOT else b""
    if raw[:11] != DOTDOT or not raw[11] & entries.DIRECTORY:
        raise Damaged("the directory has no entry for the directory above it")
    return raw
