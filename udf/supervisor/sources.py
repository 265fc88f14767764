"""What a SOURCE means when it is one of our own block devices: by name, by path, by what is on it.

Owns: disk0, disk0/part1, R/dev/disk0/part1, R/dev/by-id/NAME/part1, a device's names, LABEL= and UUID=, and which of
several filesystems is meant. Must never: touch a path that is not the supervisor's own (a link in R/dev/by-id is), or
show a caller what is another user's. Called by: volumes.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import trio

from udf import messages
from udf.errors import UserError
from udf.supervisor import contents, rights
from udf.supervisor.blocks import BlockEndpoint
from udf.supervisor.contents import NOTHING, Content
from udf.supervisor.devices import Devices, NoDeviceError
from udf.supervisor.instance import State
from udf.supervisor.output import sentence
from udf.supervisor.places import BY_ID
from udf.supervisor.registry import NotFoundError, Registry
from udf.supervisor.spawn import Identity

MAX_TEXT = 4096
TAGS = ("LABEL", "UUID")
_OWN_DEPTH = (1, 2)  # names below R/dev: of a disk, and of an export of it


@dataclass(frozen=True)
class Place:
    """A block device of ours, and one of its exports or (empty) whichever is meant."""

    endpoint: BlockEndpoint
    export: str = ""

    def __str__(self) -> str:
        """As a person writes it."""
        return f"{self.endpoint.plan.name}/{self.export}" if self.export else self.endpoint.plan.name


class Sources:
    """The block devices of one supervisor; a private one has no `devices`."""

    def __init__(self, registry: Registry, devices: Devices | None) -> None:
        self._registry = registry
        self._devices = devices
        self._dev = str(registry.places.path(BY_ID).parent)
        self._seen: WeakKeyDictionary[BlockEndpoint, list[tuple[messages.Export, Content]]] = WeakKeyDictionary()

    def disks(self, caller: Identity) -> list[BlockEndpoint]:
        """Those that the caller may use."""
        return [each for each in self._registry.endpoints(caller) if isinstance(each, BlockEndpoint)]

    async def find(self, text: str, caller: Identity) -> Place | None:
        """What a text names, if that is one of ours; None: a path of somebody else's. NotFoundError: nothing."""
        if not text or "\0" in text or len(text) >= MAX_TEXT:
            raise UserError(f"{text[:80]!r} names no device: it must have 1 to {MAX_TEXT - 1} characters")
        tag, _, value = text.partition("=")
        if tag in TAGS:
            return await self._tagged(tag, value, caller)
        if text.startswith("/"):
            return self._by_path(text)
        name, _, export = text.partition("/")
        disk = self.disk(name) or (None if export else self.disk(text))
        if disk is None:
            raise NotFoundError(
                f"there is neither a file nor a device {sentence(text[:200])}: `udf devices` and `udf status` list"
                " what there is"
            )
        return Place(disk, export)

    def disk(self, name: str) -> BlockEndpoint | None:
        """By the name of an instance, or by that of a device which has one."""
        own = Identity.own()
        for each in self.disks(own):
            if each.plan.name == name:
                return each
        if self._devices is None:
            return None
        try:
            known = self._devices.find(name)
        except NoDeviceError:
            return None
        names = {tenant.name for tenant in self._devices.binder.tenants_of(known.facts.key)}
        found = [each for each in self.disks(own) if each.plan.name in names]
        return found[0] if len(found) == 1 else None

    def _by_path(self, path: str) -> Place | None:
        path = os.path.normpath(path)
        if not path.startswith(self._dev + "/"):
            return None
        parts = path[len(self._dev) + 1 :].split("/")
        if parts[0] == BY_ID and len(parts) > 1:
            try:
                parts = [os.path.basename(os.readlink(os.path.join(self._dev, BY_ID, parts[1]))), *parts[2:]]
            except OSError:
                return None
        if len(parts) not in _OWN_DEPTH:
            return None
        disk = next((each for each in self.disks(Identity.own()) if each.plan.name == parts[0]), None)
        return None if disk is None else Place(disk, "".join(parts[1:]))

    async def _tagged(self, tag: str, value: str, caller: Identity) -> Place:
        places = [Place(disk, export.name) for disk in self.disks(caller) for export in of_use(disk.exports)]
        found = await self.look_all(places)
        fitting = [
            place
            for place, content in found.items()
            if content.filesystem and value == (content.label if tag == "LABEL" else content.uuid)
        ]
        what = f"{tag}={sentence(value[:100])}"
        if not fitting:
            more = "" if rights.is_trusted(caller) else " that you may use"
            raise NotFoundError(f"no volume{more} has {what}: `udf devices` lists what is plugged in")
        if len(fitting) > 1:
            names = ", ".join(map(str, fitting))
            raise UserError(f"several volumes have {what} ({names}): say which of these is meant")
        return fitting[0]

    async def which(self, place: Place, partition: str | None, *, insists: bool) -> tuple[messages.Export, Content]:
        """The one export that is meant, with what is in it. `insists`: also if that is nothing that is known."""
        disk, name = place.endpoint, place.endpoint.plan.name
        if disk.instance.state is State.DETACHED:
            raise UserError(f"{name} was pulled out: plug it in again")
        exports = {export.name: export for export in disk.exports if export.size}
        if not exports:
            raise UserError(f"there is no medium in {name}: put one in")
        if partition is not None:
            place = Place(disk, _partition(name, partition, exports.values()))
        if place.export:
            if place.export not in exports:
                raise UserError(f"{name} has no {sentence(place.export[:80])}: it has {', '.join(exports)}")
            return exports[place.export], await self.look(disk, exports[place.export])
        found = await self.look_all([Place(disk, export.name) for export in of_use(disk.exports)])
        known = {each: content for each, content in found.items() if content.filesystem}
        if not known and insists and len(found) == 1:
            known = found
        if not known:
            raise UserError(f"{name} holds no filesystem that is known: say with -t DRIVER what mounts it")
        if len(known) > 1:
            shown = ", ".join(f"{each} ({content.filesystem or '?'})" for each, content in known.items())
            raise UserError(f"{name} holds several filesystems: say which one is meant of {shown}")
        ((only, content),) = known.items()
        return exports[only.export], content

    # ---- what is in them

    async def look(self, disk: BlockEndpoint, export: messages.Export) -> Content:
        """What is in an export now. UserError if that cannot be read."""
        content = await contents.look(disk, export.name)
        seen = [(each, old) for each, old in self._seen.get(disk, []) if each != export]
        self._seen[disk] = [*seen, (export, content)]
        return content

    async def look_all(self, places: Iterable[Place]) -> dict[Place, Content]:
        """The same for each of them, in their order; what cannot be read holds nothing."""
        found = dict.fromkeys(places, NOTHING)

        async def look(place: Place) -> None:
            for export in place.endpoint.exports:
                if export.name == place.export:
                    with suppress(UserError):  # one device's trouble is no answer about another
                        found[place] = await self.look(place.endpoint, export)

        async with trio.open_nursery() as nursery:
            for place in found:
                nursery.start_soon(look, place)
        return found

    def seen(self, disk: BlockEndpoint, export: messages.Export) -> Content | None:
        """What was in it when somebody looked last; None if nobody has since it is there."""
        return next((content for each, content in self._seen.get(disk, []) if each == export), None)

    def exports_changed(self, name: str) -> None:
        """A device serves something else than before: forget what went, for what comes in its place looks the same."""
        for disk, seen in list(self._seen.items()):
            if disk.plan.name == name:
                self._seen[disk] = [each for each in seen if each[0] in disk.exports]


def of_use(exports: Iterable[messages.Export]) -> list[messages.Export]:
    """The partitions, and units that have none."""
    there = [export for export in exports if export.size]
    parted = {export.unit for export in there if export.partition}
    return [export for export in there if export.partition or export.unit not in parted]


def _partition(name: str, wanted: str, exports: Iterable[messages.Export]) -> str:
    numbers: Mapping[str, str] = {str(each.partition): each.name for each in exports if each.partition}
    if wanted not in numbers:
        has = ", ".join(numbers) if numbers else "none"
        raise UserError(f"{name} has no partition {sentence(wanted[:40])}: it has {has}")
    return numbers[wanted]
