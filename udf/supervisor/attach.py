"""From a driver and its device (or its image file) to the plan of what it serves.

Owns: `DevicePlan`, what a binder or an operator asks for, and the translation of a manifest's `provides` into an
endpoint. Must never: touch a path, or start anything. Called by: registry.py; devices.py makes device plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from udf.supervisor import options as mount_options
from udf.supervisor.blocks import BlockEndpoint
from udf.supervisor.catalog import Driver
from udf.supervisor.endpoint import Endpoint
from udf.supervisor.instance import EventLog
from udf.supervisor.lease import Lease
from udf.supervisor.mounts import Mount
from udf.supervisor.plan import BlockPlan, DriverPlan, MountPlan, TerminalPlan
from udf.supervisor.spawn import Identity
from udf.supervisor.terminals import TerminalEndpoint

START_TIMEOUT = 30.0
FILES = "blockfiles"  # the driver that shows block devices as files


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """A driver for a device, or for an image that is to look like one."""

    name: str  # of the instance: disk0
    driver: Driver
    lease: Lease | None = None
    source: str | None = None  # a real path; instead of a lease
    options: Mapping[str, str] = field(default_factory=dict)
    owner: Identity | None = None  # whose rights the driver has; None: our own
    start_timeout: float = START_TIMEOUT


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a plan needs besides."""

    place: Path
    socket: Path
    environment: Mapping[str, str]
    files: Driver | None  # the driver for the files of block devices


def make_plan(asked: DevicePlan, around: Surroundings) -> DriverPlan:
    """The plan. UserError for options that the driver does not have."""
    own, drivers = mount_options.split(asked.options)
    values = asked.driver.check_options(drivers)
    owner = asked.owner or Identity.own()
    driver = asked.driver
    common: dict[str, Any] = {
        "name": asked.name,
        "driver_name": driver.name,
        "driver": driver.spec,
        "source": asked.source,
        "driver_options": values,
        "asked_options": dict(asked.options),
        "options": own,
        "owner": owner,
        "sandbox": driver.sandbox(owner, asked.source),
        "environment": around.environment,
        "durability": driver.durability,
        "deadline": own.deadline or driver.deadline,
        "start_timeout": asked.start_timeout,
        "lease": asked.lease,
        "place": around.place,
    }
    match driver.provides:
        case "block":
            files = None if around.files is None else _files_plan(asked, around, around.files, owner, own)
            return BlockPlan(**common, socket=around.socket, files=files)
        case "terminal":
            return TerminalPlan(**common)
        case _:
            return MountPlan(**common, mountpoint=str(around.place), shim_as=asked.owner, **_of_manifest(driver))


def _files_plan(
    asked: DevicePlan, around: Surroundings, driver: Driver, owner: Identity, own: mount_options.MountOptions
) -> MountPlan:
    source = str(around.socket)
    return MountPlan(
        name=files_name(asked.name),
        mountpoint=str(around.place),
        driver_name=driver.name,
        driver=driver.spec,
        source=source,
        driver_options=driver.check_options({}),
        asked_options={},
        options=mount_options.MountOptions(read_only=own.read_only, allow_other=own.allow_other),
        owner=owner,
        shim_as=asked.owner,
        sandbox=driver.sandbox(owner, source),
        environment=around.environment,
        durability=driver.durability,
        deadline=own.deadline or driver.deadline,
        start_timeout=asked.start_timeout,
        **_of_manifest(driver),
    )


def files_name(name: str) -> str:
    """What the mount is called that shows the block devices of this name."""
    return f"{name}-files"


def _of_manifest(driver: Driver) -> dict[str, Any]:
    return {
        "exclusive": driver.exclusive,
        "acl": driver.acl,
        "locks": driver.locks,
        "open": driver.open,
        "stable_nodes": driver.stable_nodes,
        "inodes": driver.inodes,
    }


def make_endpoint(plan: DriverPlan, events: EventLog, reaper: trio.Nursery) -> Endpoint:
    """What carries out a plan."""
    match plan:
        case BlockPlan():
            return BlockEndpoint(plan, events, reaper)
        case TerminalPlan():
            return TerminalEndpoint(plan, events, reaper)
        case MountPlan():
            return Mount(plan, events, reaper)
    raise TypeError(type(plan).__name__)
