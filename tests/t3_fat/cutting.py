"""Power cuts: what a volume may look like when the power goes at any moment of a workload.

Owns: the images that the order of writes and flushes allows, and what was promised at each moment (every file that had
been fsynced, and not changed since). Must never: know how the driver orders its writes. Called by: test_cuts.py.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

from tests.t3_fat.driving import SECTOR, Log
from tests.t3_fat.rawfat import Image


@dataclasses.dataclass
class Promise:
    """A file that has to be intact: under one of these names, from one moment of the log on until another."""

    names: set[str]
    contents: bytes
    since: int
    until: int | None = None


class Promises:
    """What has been promised to a program, as it goes on."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.all: list[Promise] = []

    def _live(self) -> Iterator[Promise]:
        return (promise for promise in self.all if promise.until is None)

    def _flushed(self) -> int:
        return max((at for at, item in enumerate(self.log) if item is None), default=-1)

    def fsynced(self, path: str, contents: bytes) -> None:
        """An fsync of this file has returned."""
        self.changing(path)
        self.all.append(Promise({path}, contents, len(self.log)))

    def changing(self, path: str) -> None:
        """The file is about to be changed, removed or replaced: nothing is promised of it any more."""
        for promise in self._live():
            if path in promise.names:
                promise.until = len(self.log)

    def moving(self, old: str, new: str) -> None:
        """A rename begins: until the next flush that covers it, the old name will do as well as the new one."""
        for promise in list(self._live()):
            moved = {
                new + name[len(old) :] for name in promise.names if name == old or name.startswith(f"{old}/")
            }  # fmt: skip
            if moved:
                promise.until = len(self.log)
                self.all.append(Promise(promise.names | moved, promise.contents, len(self.log)))

    def settled(self, old: str) -> None:
        """Everything has been flushed: the old name of a rename does not do any more."""
        for promise in list(self._live()):
            kept = {name for name in promise.names if name != old and not name.startswith(f"{old}/")}
            if kept and kept != promise.names:
                promise.until = len(self.log)
                self.all.append(Promise(kept, promise.contents, len(self.log)))

    def at(self, moment: int) -> list[Promise]:
        """What is promised when the first `moment` items of the log were sent (whether or not they arrived)."""
        return [p for p in self.all if p.since <= moment and (p.until is None or moment <= p.until)]

    def broken(self, image: Path, moment: int) -> list[str]:
        """Which promises an image breaks."""
        tree = Image.of(image).tree()
        found = []
        for promise in self.at(moment):
            there = [tree[name].contents for name in promise.names if name in tree]
            if promise.contents not in there:
                state = [f"{len(contents)} bytes" for contents in there]
                found.append(f"{sorted(promise.names)}, {len(promise.contents)} bytes, is {state or 'not there'}")
        return found


def applied(base: bytes, log: Log, upto: int) -> bytearray:
    """The image when the first `upto` items arrived, in order."""
    image = bytearray(base)
    for item in log[:upto]:
        if item is not None:
            image[item[0] : item[0] + len(item[1])] = item[1]
    return image


def reordered(base: bytes, log: Log, upto: int, dice: random.Random) -> bytearray:
    """One of the images that a cache makes possible which writes sectors in any order between two flushes."""
    flushed = max((at for at in range(upto) if log[at] is None), default=-1)
    image = applied(base, log, flushed + 1)
    share = dice.choice((0.1, 0.5, 0.5, 0.9))
    torn = dice.random() < 0.5
    for item in log[flushed + 1 : upto]:
        assert item is not None
        offset, data = item
        whole = dice.random() < share
        for at in range(0, len(data), SECTOR):
            if (dice.random() < share) if torn else whole:
                image[offset + at : offset + at + SECTOR] = data[at : at + SECTOR]
    return image


def torn(base: bytes, log: Log, upto: int, dice: random.Random) -> bytearray:
    """In order, but of the last write only some sectors, from the first on, arrived."""
    image = applied(base, log, upto - 1)
    item = log[upto - 1]
    if item is not None:
        offset, data = item
        part = data[: SECTOR * dice.randrange(len(data) // SECTOR + 1)]
        image[offset : offset + len(part)] = part
    return image
