"""Volumes: filesystems on block devices of ours and in image files, mounted by what is in them, ended with care.

Owns: `udf mount` of a SOURCE (which device, which export, which driver), `udf umount` of a device, `udf eject`, and
what is told of an export. Must never: read an image (paths.py does, in a process with the caller's rights), let anybody
mount what is not theirs, or leave a block device that nobody asked for.
Called by: control.py, private.py, devicecalls.py, automount.py.

A driver that takes a block service (fs/fat) is given the export itself, and its mount is a volume: it lives and goes
with the device. One that takes a file is given the file in R/dev, and knows nothing of devices.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec
import trio

from udf import messages
from udf.errors import UserError
from udf.supervisor import catalog, images, paths, rights
from udf.supervisor.bell import Bell
from udf.supervisor.blocks import BlockEndpoint
from udf.supervisor.catalog import Driver
from udf.supervisor.contents import Content
from udf.supervisor.devices import Devices
from udf.supervisor.endpoint import Endpoint
from udf.supervisor.images import AttachRequest
from udf.supervisor.instance import Event, Reason, State
from udf.supervisor.mounts import Mount
from udf.supervisor.output import sentence
from udf.supervisor.paths import Image
from udf.supervisor.plan import BusyError
from udf.supervisor.registry import MountRequest, NotFoundError, Registry
from udf.supervisor.sources import TAGS, Place, Sources
from udf.supervisor.spawn import Identity

if TYPE_CHECKING:
    from udf.supervisor.automount import Automount

Row = dict[str, Any]
MOUNTING_WAIT = 5.0
PARTITION = "partition"  # the option that says which one of several is meant
_UNDER_WAY = (State.STARTING, State.DETACHED, State.RECOVERING)
_SERVICES = ("nbd://", "nbd+unix://")

log = logging.getLogger("udf.volumes")


class Volumes:
    """The volumes of one supervisor; a private one has no `devices`."""

    def __init__(self, registry: Registry, devices: Devices | None = None) -> None:
        self.sources = Sources(registry, devices)
        self.automount: Automount | None = None
        self.bell = Bell()  # rung after every event, and by automount.py
        self._registry = registry
        self._devices = devices

    def on_event(self, event: Event) -> None:
        """Something happened."""
        if event.what == "exports":
            self.sources.exports_changed(event.name)
        self.bell.ring()

    # ---- mounting

    async def mount(self, request: MountRequest, caller: Identity) -> Mount:
        """Mount; what the source is, and without a driver in the request what is in it, decides how."""
        source = request.source
        if request.command is not None or source is None:
            return await self._registry.mount(request, caller)
        driver = None
        if request.driver is not None:
            rights.check_driver(caller, request.driver)
            driver = await catalog.find(request.driver, trusted_only=not rights.is_trusted(caller))
            kind, is_named = driver.source_kind, source.partition("=")[0] in TAGS
            if kind in ("directory", "device") and not source.startswith("/"):
                raise UserError(f"the source {sentence(source[:200])} does not exist")
            if kind not in ("file", "block") or (kind == "block" and source.startswith(_SERVICES)):
                return await self._registry.mount(request, caller)
            if kind == "file" and not is_named and "://" in source:
                return await self._registry.mount(request, caller)
        place = await self.sources.find(source, caller)
        if place is not None:
            return await self._mount_place(place, driver, request, caller)
        images.check_path(source)
        options = request.options or {}
        if driver is not None and driver.source_kind == "file" and not _means_partition(driver, options):
            return await self._registry.mount(request, caller)
        image = await paths.look(source, rights.acts_as(caller))
        place = await self.sources.find(image.path, caller)  # it may be a link to one of ours
        if place is not None:
            return await self._mount_place(place, driver, request, caller)
        return await self._mount_image(image, driver, request, caller)

    async def _mount_place(self, place: Place, driver: Driver | None, request: MountRequest, caller: Identity) -> Mount:
        check_use(caller, place.endpoint)
        options = dict(request.options or {})
        wanted = options.pop(PARTITION, None)
        export, content = await self.sources.which(place, wanted, insists=driver is not None)
        place = Place(place.endpoint, export.name)
        if driver is None:
            if not content.filesystem:
                raise UserError(f"{place} holds no filesystem that is known: say with -t DRIVER what mounts it")
            driver = await self._driver_for(content.filesystem, caller)
            request = msgspec.structs.replace(request, driver=driver.name)
        return await self.mount_on(place.endpoint, export, driver, _with(request, options=options), caller)

    async def mount_on(
        self,
        disk: BlockEndpoint,
        export: messages.Export,
        driver: Driver,
        request: MountRequest,
        caller: Identity,
        *,
        fresh: bool = False,
    ) -> Mount:
        """Mount an export by this driver, which the request names; `fresh`: on a directory that we have just made."""
        place = Place(disk, export.name)
        options = dict(request.options or {})
        if disk.plan.lease is not None and not options.keys().isdisjoint(("suid", "dev")):
            raise rights.DeniedError(f"{place} can be taken out and changed: it is mounted nosuid and nodev only")
        if export.read_only and "rw" not in options:
            options["ro"] = ""
        self._check_free(place, export, read_only="ro" in options)
        if driver.source_kind != "block":
            source = f"{disk.plan.where}/{export.name}"
            return await self._registry.mount(_with(request, source=source, options=options), caller)
        options.setdefault("fsname", str(place))
        request = _with(request, options=options)
        return await self._registry.mount(request, caller, on=disk, export=export.name, fresh=fresh)

    async def _mount_image(self, image: Image, driver: Driver | None, request: MountRequest, caller: Identity) -> Mount:
        options = dict(request.options or {})
        wanted = options.pop(PARTITION, None)
        if image.kind == "socket":
            if driver is None:
                raise UserError(f"{request.source} is a socket: say with -t DRIVER what mounts the block device there")
            uri = f"nbd+unix:///?socket={quote(image.path)}"
            return await self._registry.mount(_with(request, source=uri), caller)
        number, filesystem = _choose(str(request.source), image, wanted, driver)
        if driver is None:
            driver = await self._driver_for(filesystem, caller)
            request = msgspec.structs.replace(request, driver=driver.name)
        if not number and driver.source_kind == "file":
            return await self._registry.mount(_with(request, source=image.path, options=options), caller)
        return await self._mount_attached(image.path, number, driver, _with(request, options=options), caller)

    async def _mount_attached(
        self, path: str, number: int, driver: Driver, request: MountRequest, caller: Identity
    ) -> Mount:
        """Mount a part of an image (0: all of it) by a block device that ends with the mount."""
        asked = AttachRequest(source=path, options=images.of_disk(request.options or {}))
        disk = await images.attach_path(self._registry, path, asked, caller)
        try:
            if not isinstance(disk, BlockEndpoint):
                raise UserError(f"{path} is no block device")
            place = Place(disk, f"part{number}" if number else "disk")
            export = next((each for each in disk.exports if each.name == place.export), None)
            if export is None:
                raise UserError(f"{path} has no {place.export} any more")
            mounted = await self.mount_on(disk, export, driver, request, caller)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._registry.end(disk, Reason.OPERATOR)
            raise
        self._registry.end_with(disk, mounted)
        return mounted

    async def _driver_for(self, filesystem: str, caller: Identity) -> Driver:
        return await catalog.for_filesystem(filesystem, trusted_only=not rights.is_trusted(caller))

    def _check_free(self, place: Place, export: messages.Export, *, read_only: bool) -> None:
        """Refuse what somebody has already; a claim would too, but could not say who it is."""
        others = {each.name: each for each in place.endpoint.exports}
        for mount in self.users(place.endpoint):
            other = others.get(export_of(mount))
            if other is not None and _overlap(export, other) and not (read_only and mount.plan.options.read_only):
                which = str(place) if other.name == export.name else f"{place} overlaps {other.name}, which"
                raise BusyError(mount.plan.where, f"{which} is mounted on {mount.plan.where}: unmount it there first")

    # ---- what uses a disk

    def users(self, disk: Endpoint) -> list[Mount]:
        """The mounts that are made from it, the first one first."""
        if not isinstance(disk, BlockEndpoint):
            return []
        inside = f"{disk.plan.where}/"
        return [
            each
            for each in self._registry.endpoints(Identity.own())
            if isinstance(each, Mount)
            and not each.is_gone
            and (each.below is disk or (each.plan.source or "").startswith(inside))
        ]

    # ---- unmounting

    async def unmount(self, text: str, caller: Identity, *, lazy: bool) -> list[str]:
        """Unmount whatever is mounted of a device (or image) or of one export of it; from where."""
        place = await self.sources.find(text, caller)
        if place is None:
            raise NotFoundError(f"{sentence(text[:200])} is not a mount of udf (`udf status` lists them)")
        check_use(caller, place.endpoint)
        return await self.unmount_disk(place.endpoint, place.export, lazy=lazy)

    async def unmount_disk(self, disk: Endpoint, export: str = "", *, lazy: bool) -> list[str]:
        """The same for a device that was found; an image of which nothing is mounted is detached."""
        users = [each for each in self.users(disk) if export in ("", export_of(each))]
        name = disk.plan.name
        if not users and (export or (disk.plan.lease is not None and isinstance(disk, BlockEndpoint))):
            what = f"{name}/{export}" if export else name
            raise UserError(f"nothing of {what} is mounted; `udf eject {name}` ends it, so that it may be pulled out")
        if not users:
            await self._registry.unmount(disk, lazy=lazy)
            return [disk.plan.where]
        for mount in reversed(users):
            await self._registry.unmount(mount, lazy=lazy)
        return [mount.plan.where for mount in users]

    async def eject(self, text: str, mountpoint: str | None, caller: Identity) -> Row:
        """End a device in order, with all that is mounted of it, so that it may be pulled out. BusyError: it stays."""
        disk = await self._to_eject(text, mountpoint, caller)
        check_use(caller, disk)
        name, is_away = disk.plan.name, disk.instance.state is State.DETACHED
        if not is_away:
            await self.settled([name], MOUNTING_WAIT)  # what is being mounted can be unmounted then
        users = self.users(disk)
        files = [each for each in disk.dependants if isinstance(each, Mount)]
        if not is_away:
            for where in await paths.busy([each.plan.where for each in (*users, *files)]):
                raise BusyError(where, f"{where} is in use: close the files on it first")
        try:
            for mount in reversed(users):
                await self._registry.unmount(mount, lazy=False)
            if disk.plan.lease is None or self._devices is None:
                if not disk.is_gone:
                    await self._registry.unmount(disk, lazy=False)
                text = f"{name} is detached"
            else:
                await self._devices.eject(disk)
                text = f"{name} was pulled out already" if is_away else f"{name} may be pulled out"
        except UserError:
            if self.automount is not None and isinstance(disk, BlockEndpoint) and not disk.is_gone:
                self.automount.again(disk)
            raise
        log.info("%s", text)
        return {"name": name, "mountpoints": [each.plan.where for each in users], "text": text}

    async def _to_eject(self, text: str, mountpoint: str | None, caller: Identity) -> Endpoint:
        for name, place in ((text, None), (None, mountpoint)):
            if name is None and place is None:
                continue
            try:
                found = self._registry.find(caller, name, place)
            except NotFoundError:
                continue
            disk = self._disk_of(found)
            if disk is None:
                raise UserError(f"{sentence(text[:200])} is no device, and on none: `udf umount` unmounts it")
            return disk
        source = await self.sources.find(text, caller)
        if source is None:
            raise NotFoundError(f"there is no device {sentence(text[:200])}: `udf devices` lists those that are there")
        return source.endpoint

    def _disk_of(self, endpoint: Endpoint) -> BlockEndpoint | None:
        """The block device that it is, shows as files, or is mounted from."""
        return next(
            (
                each
                for each in self.sources.disks(Identity.own())
                if each is endpoint or endpoint in each.dependants or endpoint in self.users(each)
            ),
            None,
        )

    async def settled(self, names: Collection[str], seconds: float) -> None:
        """Wait until what is on these devices is mounted, or back, or will not be; not for ever."""

        def is_quiet() -> bool:
            disks = [each for each in self.sources.disks(Identity.own()) if each.plan.name in names]
            return all(
                (self.automount is None or self.automount.is_quiet(disk))
                and not any(each.instance.state in _UNDER_WAY for each in self.users(disk))
                for disk in disks
            )

        if self.automount is not None:
            self.automount.poke()
        await self.bell.within(seconds, is_quiet)

    # ---- what is told

    def rows_of(self, name: str) -> list[Row]:
        """What the device instance of this name serves, as the interface describes it."""
        disk = next((each for each in self.sources.disks(Identity.own()) if each.plan.name == name), None)
        if disk is None:
            return []
        users = {export_of(each): each for each in self.users(disk)}
        return [_row(export, self.sources.seen(disk, export), users.get(export.name)) for export in disk.exports]

    def device_of(self, endpoint: Endpoint) -> str | None:
        """The export (or image) that a mount is made from, as a person writes it."""
        if not isinstance(endpoint, Mount):
            return None
        disk = next((each for each in self.sources.disks(Identity.own()) if endpoint in self.users(each)), None)
        return None if disk is None else str(Place(disk, export_of(endpoint)))


def check_use(caller: Identity, disk: Endpoint) -> None:
    """Refuse a device to those whose it is not."""
    if not rights.may_touch(caller, disk.plan.owner):
        raise rights.DeniedError("only root and the daemon's own user may use what is on a device: ask as one of them")
    own = rights.acts_as(caller) or Identity.own()
    if own.uid != disk.plan.owner.uid:
        raise UserError(
            f"{disk.plan.name} is uid {disk.plan.owner.uid}'s, whose drivers alone reach it: ask as that user"
        )


def export_of(mount: Mount) -> str:
    """The export that a mount is of, as a volume or by its file in R/dev."""
    return mount.export.name if mount.export is not None else (mount.plan.source or "").rpartition("/")[2]


def _overlap(one: messages.Export, other: messages.Export) -> bool:
    return one.unit == other.unit and one.offset < other.offset + other.size and other.offset < one.offset + one.size


def _row(export: messages.Export, content: Content | None, mount: Mount | None) -> Row:
    return {
        "export": export.name,
        "size": export.size,
        "filesystem": "" if content is None else content.filesystem,
        "label": "" if content is None else sentence(content.label[:100]),
        "uuid": "" if content is None else sentence(content.uuid[:100]),
        "mountpoint": None if mount is None else mount.plan.where,
        "state": None if mount is None else mount.instance.state,
        "text": "" if mount is None else sentence(mount.instance.text),
    }


def _means_partition(driver: Driver, options: Mapping[str, str]) -> bool:
    return PARTITION in options and (driver.manifest is None or PARTITION not in driver.manifest.options)


def _choose(source: str, image: Image, wanted: str | None, driver: Driver | None) -> tuple[int, str]:
    """The number of the partition that is meant (0: all of the image), and the filesystem in it."""
    partitions = image.partitions
    if wanted is not None:
        if not wanted.isascii() or not wanted.isdigit() or int(wanted[:9]) not in partitions:
            numbers = ", ".join(map(str, sorted(partitions))) or "none"
            raise UserError(f"{source} has no partition {wanted[:40]}: it has {numbers}")
        number = int(wanted)
        if not partitions[number] and driver is None:
            raise UserError(f"partition {number} of {source} holds no filesystem that is known")
        return number, partitions[number]
    if image.filesystem:
        return 0, image.filesystem
    if not partitions:
        if driver is not None:
            return 0, ""
        raise UserError(f"{source} holds no filesystem that is known: say with -t DRIVER what mounts it")
    if image.kind != "file":
        raise UserError(f"{source} has partitions: mount the device of one of them")
    known = _known(partitions, driver)
    if len(known) == 1:
        return next(iter(known.items()))
    if not known:
        raise UserError(f"no partition of {source} holds a filesystem that is known")
    shown = ", ".join(f"{number} ({filesystem})" for number, filesystem in sorted(known.items()))
    raise UserError(f"{source} has several partitions with filesystems: say -o partition=N for one of {shown}")


def _known(partitions: Mapping[int, str], driver: Driver | None) -> dict[int, str]:
    """The partitions with a filesystem; of a driver that was named, those that it mounts if there are some."""
    known = {number: filesystem for number, filesystem in partitions.items() if filesystem}
    own: Iterable[str] = () if driver is None or driver.manifest is None else driver.manifest.filesystems
    return {number: filesystem for number, filesystem in known.items() if filesystem in own} or known


def _with(request: MountRequest, **changes: Any) -> MountRequest:
    return msgspec.structs.replace(request, **changes)
