"""`udf daemon --automount`: every filesystem on a device that is plugged in is mounted by its label.

Owns: which exports of devices are mounted by themselves, and the directories for that. Must never: look at a device in
the loop, take away a directory that it did not make, mount again what an operator has unmounted (before the next plug),
or keep anybody from using a device in another way.
Called by: service.py, which runs it; devicecalls.py and volumes.py.

Level-triggered as the binder is: an event only rings, and each pass looks at the exports that are there now. One task
for each of them, as long as it is there: look, wait until a driver and the rules allow it, mount, wait for its end.
"""

from __future__ import annotations

import enum
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import trio

from udf import messages
from udf.errors import UserError
from udf.manifest import Manifest
from udf.supervisor import catalog, naming
from udf.supervisor.blocks import BlockEndpoint
from udf.supervisor.contents import NOTHING, Content
from udf.supervisor.devices import Devices
from udf.supervisor.instance import Event, Reason, State
from udf.supervisor.mediadir import MediaDirectory
from udf.supervisor.mounts import Mount
from udf.supervisor.options import is_flag
from udf.supervisor.output import sentence
from udf.supervisor.plan import BusyError, StartFailedError
from udf.supervisor.registry import MountRequest, Registry
from udf.supervisor.sources import Place, of_use
from udf.supervisor.spawn import Identity
from udf.supervisor.volumes import Volumes, export_of
from udf.usb.matching import volume_rule

LOOK = 10.0  # for events that were lost
RETRIES = (1.0, 4.0, 16.0)  # seconds after a look that failed, or a mount that was lost
_UP = (State.ACTIVE, State.RECOVERING, State.DETACHED, State.FAILED)
_LOST = (Reason.CRASHED, Reason.HUNG, Reason.CONTRACT)  # nobody wanted that

log = logging.getLogger("udf.automount")


@dataclass
class Slot:
    """One export of a device, from when it is seen until it is gone."""

    disk: BlockEndpoint
    export: messages.Export
    content: Content = NOTHING
    mount: Mount | None = None
    is_busy: bool = True  # something is under way that ends by itself
    is_left: bool = False  # until the next plug
    is_gone: bool = False
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def place(self) -> Place:
        """Its name."""
        return Place(self.disk, self.export.name)

    def __str__(self) -> str:
        """What a person is told of it."""
        content = self.content
        label = sentence(content.label[:60])
        return f"{label} ({content.filesystem} on {self.place})" if label else f"{self.place} ({content.filesystem})"


class Outcome(enum.Enum):
    """How a mount came to its end."""

    FAILED = enum.auto()  # it was none
    LOST = enum.auto()  # its shim was
    ENDED = enum.auto()  # by its device or somebody's word


@dataclass(frozen=True)
class Wish:
    """How a volume is to be mounted."""

    driver: Manifest
    options: Mapping[str, str]


class Automount:
    """Mounts the volumes of devices below a directory, which stays its maker's."""

    def __init__(self, media: MediaDirectory, registry: Registry, devices: Devices, volumes: Volumes) -> None:
        self._media = media
        self._registry = registry
        self._devices = devices
        self._volumes = volumes
        self._slots: list[Slot] = []
        self._bell = volumes.bell
        self._poked = trio.Event()
        self._closing = False
        self._passes = 0
        volumes.automount = self
        devices.listeners.append(self.poke)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; `started` when nothing of an earlier daemon is left."""
        await self._media.clean()
        async with trio.open_nursery() as nursery:
            with self._registry.events.subscribed(self._on_event):
                task_status.started()
                while True:
                    self._poked = trio.Event()
                    self._pass(nursery)
                    self._passes += 1
                    self._bell.ring()
                    with trio.move_on_after(LOOK):
                        await self._poked.wait()

    def stop(self) -> None:
        """Begin nothing any more."""
        self._closing = True
        self.poke()

    async def close(self) -> None:
        """After the end of all mounts: wait until their directories are gone too."""
        await self._bell.within(LOOK, lambda: all(slot.mount is None for slot in self._slots))

    def poke(self) -> None:
        """Something may have changed."""
        self._poked.set()

    def _on_event(self, event: Event) -> None:
        if event.kind in ("block", "mount", "device"):
            self.poke()

    def _pass(self, nursery: trio.Nursery) -> None:
        """No await in it, so that it sees one moment."""
        there = [
            (disk, export)
            for disk in self._volumes.sources.disks(Identity.own())
            if disk.plan.lease is not None and disk.instance.state in _UP
            for export in of_use(disk.exports)
        ]
        for slot in list(self._slots):
            if (slot.disk, slot.export) not in there:
                slot.is_gone = True  # for good: what looks the same later is another medium
                slot.scope.cancel()  # a mount goes on, and ends as the device's endpoint says
            if slot.is_gone and slot.mount is None:
                self._slots.remove(slot)
        for disk, export in there:
            known = any(slot.disk is disk and slot.export == export and not slot.is_gone for slot in self._slots)
            if not known and not self._closing and disk.instance.state is State.ACTIVE:
                slot = Slot(disk, export)
                self._slots.append(slot)
                nursery.start_soon(self._serve, slot)

    # ---- one volume

    async def _serve(self, slot: Slot) -> None:
        try:
            with slot.scope:
                await self._follow(slot)
        except Exception:
            log.exception("%s: mounting it failed by our own mistake", slot.place)
        finally:
            slot.is_busy, slot.is_left = False, True
            self._bell.ring()
            self.poke()

    async def _follow(self, slot: Slot) -> None:
        await self._look(slot)
        if not slot.content.filesystem:
            return
        tried: Wish | None = None  # in vain: the same again would fail as well
        losses = 0
        while (wish := await self._other_wish(slot, tried)) is not None:
            await self._bell.until(lambda: not any(each.mount for each in self._slots if self._went_before(each, slot)))
            if self._is_used(slot):
                return  # somebody was quicker, and it is theirs
            outcome = await self._mount(slot, wish)
            if outcome is Outcome.ENDED or losses >= len(RETRIES):
                return
            tried = wish if outcome is Outcome.FAILED else None
            if outcome is Outcome.LOST:
                await trio.sleep(RETRIES[losses])
                losses += 1

    async def _other_wish(self, slot: Slot, tried: Wish | None) -> Wish | None:
        """How it is to be mounted, when drivers and rules allow that in another way than was tried; None: the end."""
        while not self._closing:
            wish = self._wish(slot)
            if wish is not None and wish != tried:
                slot.is_busy = True
                return wish
            if slot.is_busy:
                slot.is_busy = False
                self._bell.ring()
            await self._news()
        return None

    async def _news(self) -> None:
        """The next pass: a driver or a rule may be another one."""
        seen = self._passes
        await self._bell.until(lambda: self._passes > seen)

    async def _look(self, slot: Slot) -> None:
        for pause in (*RETRIES, None):
            try:
                slot.content = await self._volumes.sources.look(slot.disk, slot.export)
                return
            except UserError as exc:
                if pause is None:
                    self._tell(slot, "failed", f"{slot.place} is not mounted: {exc}")
                    return
            await trio.sleep(pause)

    def _wish(self, slot: Slot) -> Wish | None:
        """How it is to be mounted, if drivers and rules allow that now."""
        offer, content = self._devices.offers.now, slot.content
        facts = self._devices.facts_of(slot.disk.plan.name)
        rule = None if facts is None else volume_rule(facts, content.label, offer.rules)
        if rule is not None and not rule.automount:
            return None
        fitting = catalog.fitting_for(content.filesystem, offer.mounting)
        if rule is not None and rule.driver is not None:
            fitting = [each for each in fitting if each.name == rule.driver]
        if len(fitting) != 1 or fitting[0].name in offer.missing:
            return None
        return Wish(fitting[0], {**self._usual_options(fitting[0]), **_as_given(rule.options if rule else {})})

    def _usual_options(self, driver: Manifest) -> dict[str, str]:
        """Of root's daemon: for whoever may look into the directory; a group may write where files have no owners."""
        if os.geteuid() != 0:
            return {}
        options = {"allow_other": ""}
        if self._media.group is not None and {"gid", "umask"} <= driver.options.keys():
            options |= {"gid": str(self._media.group), "umask": "002"}
        return options

    def _went_before(self, old: Slot, new: Slot) -> bool:
        """Whether it was in the same place."""
        return old.is_gone and old.disk is new.disk and old.export.name == new.export.name

    def _is_used(self, slot: Slot) -> bool:
        mine = (slot.export.name, slot.export.unit)
        exports = {each.name: each for each in slot.disk.exports}
        for mount in self._volumes.users(slot.disk):
            export = exports.get(export_of(mount))
            if export is not None and (export.name, export.unit) == mine:
                return True
        return False

    async def _mount(self, slot: Slot, wish: Wish) -> Outcome:
        """Mount it, wait for the end of that, and leave nothing behind."""
        content = slot.content
        name = naming.volume(content.filesystem, content.label, content.uuid)
        try:
            path = await self._media.make(name)
        except UserError as exc:
            self._tell(slot, "failed", f"{slot} is not mounted: {exc}")
            return Outcome.FAILED
        try:
            request = MountRequest(mountpoint=str(path), driver=wish.driver.name, options=dict(wish.options))
            driver = catalog.from_manifest(wish.driver)
            try:
                mount = await self._volumes.mount_on(
                    slot.disk, slot.export, driver, request, Identity.own(), fresh=True
                )
            except BusyError as exc:
                log.info("%s: %s", slot.place, exc)
                return Outcome.ENDED
            except UserError as exc:
                if slot.disk.instance.state is State.ACTIVE:
                    use = f"; it can be used as {slot.disk.plan.where}/{slot.export.name}"
                    self._tell(slot, "failed", f"{slot} could not be mounted: {exc}{use}")
                is_refused = not isinstance(exc, StartFailedError) or exc.reason is Reason.REFUSED
                return Outcome.FAILED if is_refused else Outcome.LOST
            slot.mount, slot.is_busy = mount, False
            self._tell(slot, "mounted", f"{slot} is mounted on {path}")
            with trio.CancelScope(shield=True):  # it lives as long as it lives, and its directory is ours
                await mount.ended.wait()
            self._tell(slot, str(mount.instance.reason), f"{slot} is not mounted any more: {mount.instance.text}")
            return Outcome.LOST if mount.instance.reason in _LOST else Outcome.ENDED
        finally:
            slot.mount, slot.is_busy = None, True
            with trio.CancelScope(shield=True):
                await self._media.remove(path)
            self._bell.ring()

    def _tell(self, slot: Slot, word: str, text: str) -> None:
        log.log(logging.WARNING if word == "failed" else logging.INFO, "%s", text)
        slot.disk.instance.tell("volume", word, text)

    # ---- what others ask

    def is_quiet(self, disk: BlockEndpoint) -> bool:
        """Whether nothing is under way for a device."""
        return all(
            any(slot.disk is disk and slot.export == export and not slot.is_busy for slot in self._slots)
            for export in of_use(disk.exports)
        )

    def again(self, disk: BlockEndpoint) -> None:
        """What was unmounted for an end that did not come is mounted again."""
        for slot in [slot for slot in self._slots if slot.disk is disk and slot.is_left and slot.mount is None]:
            self._slots.remove(slot)
        self.poke()


def _as_given(options: Mapping[str, str]) -> dict[str, str]:
    """A rule's options as they would be written after -o: `ro = true` is the word alone, `ro = false` nothing."""
    given = {}
    for name, value in options.items():
        if is_flag(name) and value in ("0", "1"):
            if value == "1":
                given[name] = ""
        else:
            given[name] = value
    return given
