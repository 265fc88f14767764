"""Image files, attached as block devices.

Owns: `udf attach`, and the block device behind a mount of an image. Must never: read an image (paths.py does, in a
process with the caller's rights). Called by: control.py, volumes.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from udf.errors import UserError
from udf.supervisor import catalog, paths, rights
from udf.supervisor.attach import DevicePlan
from udf.supervisor.endpoint import Endpoint
from udf.supervisor.plan import BusyError
from udf.supervisor.registry import Registry
from udf.supervisor.spawn import Identity

IMAGE = "image"  # the driver that makes a block device of a file
BASE = "disk"
MAX_NUMBER = 10_000
MAX_PATH = 4096


class AttachRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The parameters of the Attach method."""

    source: str
    driver: str | None = None
    options: dict[str, str] | None = None
    name: str | None = None


async def attach(registry: Registry, request: AttachRequest, caller: Identity) -> Endpoint:
    """Make a block device of a source. It lasts until somebody ends it."""
    check_path(request.source)
    rights.check_driver(caller, request.driver)
    look = await paths.look(request.source, rights.acts_as(caller))
    return await attach_path(registry, look.path, request, caller)


async def attach_path(registry: Registry, source: str, request: AttachRequest, caller: Identity) -> Endpoint:
    """The same for a real path that has been looked at."""
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


def of_disk(options: Mapping[str, str]) -> dict[str, str]:
    """What of a mount's options concerns the disk below it."""
    return {key: value for key, value in options.items() if key in ("ro", "rw", "deadline", "patience")}


def check_path(source: str) -> None:
    """Refuse what is no path."""
    if not source.startswith("/") or "\0" in source or len(source) >= MAX_PATH:
        raise UserError(f"the source {source[:80]!r} must be an absolute path of at most {MAX_PATH - 1} characters")
