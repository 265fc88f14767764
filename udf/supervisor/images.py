"""Image files: attached as block devices, and mounted by what is in them.

Owns: `udf attach`, and `udf mount` without a driver: which filesystem it is, which driver mounts it, and, when it is in
a partition, the block device behind the mount, which ends with it.
Must never: read an image (paths.py does, in a process with the caller's rights), or leave a block device that nobody
asked for. Called by: control.py, private.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import msgspec
import trio

from udf.errors import UserError
from udf.supervisor import catalog, paths, rights
from udf.supervisor.attach import DevicePlan
from udf.supervisor.endpoint import Endpoint
from udf.supervisor.instance import Reason
from udf.supervisor.mounts import Mount
from udf.supervisor.plan import BusyError
from udf.supervisor.registry import MountRequest, Registry
from udf.supervisor.spawn import Identity

IMAGE = "image"  # the driver that makes a block device of a file
BASE = "disk"
MAX_NUMBER = 10_000
MAX_PATH = 4096

log = logging.getLogger("udf.images")


class AttachRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The parameters of the Attach method."""

    source: str
    driver: str | None = None
    options: dict[str, str] | None = None
    name: str | None = None


async def attach(registry: Registry, request: AttachRequest, caller: Identity) -> Endpoint:
    """Make a block device of a source. It lasts until somebody ends it."""
    _check_path(request.source)
    rights.check_driver(caller, request.driver)
    look = await paths.look(request.source, rights.acts_as(caller))
    return await _attach(registry, look.path, request, caller)


async def mount(registry: Registry, request: MountRequest, caller: Identity) -> Mount:
    """Mount; without a driver in the request, by what is in the source."""
    options = dict(request.options or {})
    if request.driver is not None or request.command is not None or request.source is None:
        return await registry.mount(request, caller)
    _check_path(request.source)
    wanted = options.pop("partition", None)
    image = await paths.look(request.source, rights.acts_as(caller))
    trusted_only = not rights.is_trusted(caller)
    if image.filesystem and wanted is None:
        driver = await catalog.for_filesystem(image.filesystem, trusted_only=trusted_only)
        return await registry.mount(_with(request, driver, image.path, options), caller)
    if not image.partitions:
        raise UserError(f"{request.source} holds no filesystem that is known: say with -t DRIVER what mounts it")
    if not image.is_file:
        raise UserError(f"{request.source} has partitions: mount the device of one of them")
    number, filesystem = _choose(request.source, image.partitions, wanted)
    driver = await catalog.for_filesystem(filesystem, trusted_only=trusted_only)
    disk = await _attach(registry, image.path, AttachRequest(source=image.path, options=_of_disk(options)), caller)
    try:
        source = f"{disk.plan.where}/part{number}"
        mounted = await registry.mount(_with(request, driver, source, options), caller)
    except BaseException:
        with trio.CancelScope(shield=True):
            await registry.end(disk, Reason.OPERATOR)
        raise
    registry.end_with(disk, mounted)
    return mounted


async def _attach(registry: Registry, source: str, request: AttachRequest, caller: Identity) -> Endpoint:
    registry.check_limit(caller)
    name = request.driver or IMAGE
    driver = await catalog.find(name, trusted_only=not rights.is_trusted(caller), kinds=("block",))
    base = driver.manifest.names if driver.manifest is not None and driver.manifest.names else BASE
    run_as = rights.acts_as(caller)
    names = [request.name] if request.name else (f"{base}{number}" for number in range(MAX_NUMBER))
    for instance in names:
        if request.name is None and registry.is_taken(instance):
            continue
        plan = DevicePlan(
            name=instance,
            driver=driver,
            source=driver.check_source(source),
            options=request.options or {},
            owner=run_as,
        )
        try:
            return await registry.start_device(plan)
        except BusyError:
            if request.name is not None:
                raise  # another supervisor may have it, and then the next one is as good
    raise UserError("too many disks are attached: detach some")


def _choose(source: str, partitions: Mapping[int, str], wanted: str | None) -> tuple[int, str]:
    if wanted is not None:
        if not wanted.isascii() or not wanted.isdigit() or int(wanted[:9]) not in partitions:
            numbers = ", ".join(map(str, sorted(partitions)))
            raise UserError(f"{source} has no partition {wanted[:40]}: it has {numbers}")
        number = int(wanted)
        if not partitions[number]:
            raise UserError(f"partition {number} of {source} holds no filesystem that is known")
        return number, partitions[number]
    known = {number: filesystem for number, filesystem in partitions.items() if filesystem}
    if len(known) == 1:
        return next(iter(known.items()))
    if not known:
        raise UserError(f"no partition of {source} holds a filesystem that is known")
    shown = ", ".join(f"{number} ({filesystem})" for number, filesystem in sorted(known.items()))
    raise UserError(f"{source} has several partitions with filesystems: say -o partition=N for one of {shown}")


def _of_disk(options: Mapping[str, str]) -> dict[str, str]:
    """What of a mount's options concerns the disk below it."""
    return {key: value for key, value in options.items() if key in ("ro", "rw", "deadline", "patience")}


def _with(request: MountRequest, driver: str, source: str, options: dict[str, str]) -> MountRequest:
    return msgspec.structs.replace(request, driver=driver, source=source, options=options)


def _check_path(source: str) -> None:
    if not source.startswith("/") or "\0" in source or len(source) >= MAX_PATH:
        raise UserError(f"the source {source[:80]!r} must be an absolute path of at most {MAX_PATH - 1} characters")
