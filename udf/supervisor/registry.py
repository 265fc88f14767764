"""All endpoints of one supervisor: checking requests, unique names and places, and ending everything in order.

Owns: the table of mounts and of what drivers of devices serve, and the way from a request to a plan. Must never: touch
a path of a caller's (paths.py and worker threads do), or know how a request came in.
Called by: control.py, daemon.py, private.py, images.py, and starter.py for devices.

A little over 400 lines: what is taken and given back is easier to see in one place.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pwd
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import trio

from udf.errors import UserError
from udf.fuse.mountinfo import find_mount
from udf.supervisor import attach, catalog, options, paths, rights, sockets, spawn
from udf.supervisor.attach import DevicePlan
from udf.supervisor.blocks import BlockEndpoint
from udf.supervisor.catalog import Driver
from udf.supervisor.endpoint import Endpoint
from udf.supervisor.instance import EventLog, Reason
from udf.supervisor.mounts import Mount
from udf.supervisor.places import Places
from udf.supervisor.plan import BlockPlan, BusyError, DriverPlan, MountPlan
from udf.supervisor.spawn import Identity

MAX_STARTS = 8  # at once; more would only make each other miss their time limits
MAX_MOUNTS_OF_OTHERS = 100  # of one user who is neither root nor ours
MAX_PATH = 4096
MAX_COMMAND = 16 * 1024
MAX_REQUEST = 32 * 1024  # it goes on to the driver host in one message of at most 64 KiB
DEFAULT_START_TIMEOUT = 30.0
STOP_ALL_TIMEOUT = 60.0  # below systemd's TimeoutStopSec

log = logging.getLogger("udf.registry")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class NotFoundError(UserError):
    """No such mount."""


class MountRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The parameters of the Mount method."""

    mountpoint: str
    driver: str | None = None
    command: str | None = msgspec.field(default=None, name="exec")
    source: str | None = None
    options: dict[str, str] | None = None
    name: str | None = None
    start_timeout: float | None = None


class Registry:
    """The endpoints. `nursery` carries them, `reaper` what must be reaped after them. `home` is our own directory."""

    def __init__(
        self,
        events: EventLog,
        nursery: trio.Nursery,
        reaper: trio.Nursery,
        *,
        private_environment: bool = False,
        home: Path | None = None,
    ) -> None:
        self.events = events
        self.places = Places(home or sockets.rundir())
        self._nursery = nursery
        self._reaper = reaper
        self._private_environment = private_environment
        self._endpoints: dict[str, Endpoint] = {}  # by name, in the order of their start
        self._names: set[str] = set()  # that are taken, also by what waits for its start
        # Places that are taken, and how they are given back.
        self._taken: dict[str, tuple[DriverPlan, Callable[[], None]]] = {}
        self._below: dict[Endpoint, Endpoint] = {}  # what was started for a mount and ends with it
        self._starting = trio.CapacityLimiter(MAX_STARTS)
        self._closing = False

    def endpoints(self, caller: Identity) -> list[Endpoint]:
        """Those that the caller may see, in the order of their start, each before what serves from it."""
        return [
            each
            for endpoint in self._endpoints.values()
            if rights.may_touch(caller, endpoint.plan.owner)
            for each in (endpoint, *endpoint.dependants)
        ]

    def find(self, caller: Identity, name: str | None, place: str | None) -> Endpoint:
        """The endpoint with this name, or at this (real) path. NotFoundError also for what the caller may not see."""
        if (name is None) == (place is None):
            raise UserError("say which mount is meant: by its name or by its mountpoint")
        for endpoint in self.endpoints(caller):
            if name == endpoint.plan.name or (place == endpoint.plan.where and not endpoint.is_lazy):
                return endpoint
        raise NotFoundError(f"nothing is mounted {f'by the name {name}' if name else f'on {place}'} here")

    def is_taken(self, name: str) -> bool:
        """Whether something has this name, or waits for its start with it."""
        return name in self._names

    # ---- mounting

    async def mount(
        self,
        request: MountRequest,
        caller: Identity,
        *,
        on: BlockEndpoint | None = None,
        export: str = "",
        fresh: bool = False,
    ) -> Mount:
        """Check, start and wait until it can be used. Cancelled before that, it leaves nothing behind.

        `on`: the source is this export of it, whatever the request says, and the mount is a volume of it: it is away
        and comes back with the device, and ends with the block endpoint at the latest. `fresh`: its mountpoint is a
        directory that we have just made, and needs no look.
        """
        if self._closing:
            raise UserError("the supervisor is ending: start it again first")
        self.check_limit(caller)
        if on is not None:
            on.find(export)
        plan = await self.plan(request, caller, on=on, export=export, fresh=fresh)
        # From here to the end of _reserve nothing is awaited: of two that want the same, one gets it.
        plan = dataclasses.replace(plan, name=self._name(request.name, plan.mountpoint))
        found = None if on is None else on.find(export)
        self._reserve(plan)
        mount = Mount(plan, self.events, self._reaper, on, found)
        if on is not None:
            on.carry(mount)
        await self._start(mount)
        return mount

    def check_limit(self, caller: Identity) -> None:
        """Refuse more than one user may have who is neither root nor ours."""
        own = sum(endpoint.plan.owner.uid == caller.uid for endpoint in self._endpoints.values())
        if own >= MAX_MOUNTS_OF_OTHERS and not rights.is_trusted(caller):
            raise UserError(f"you have {own} mounts, which is the most for one user: unmount some")

    async def _start(self, endpoint: Endpoint) -> None:
        """Start what has its name and its place. Cancelled, or if that fails, it leaves nothing behind."""
        plan = endpoint.plan
        try:
            async with self._starting:
                self._endpoints[plan.name] = endpoint
                await self._nursery.start(self._run, endpoint)
        except BaseException:
            self._forget(plan)
            raise

    async def _run(self, endpoint: Endpoint, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            await endpoint.run(task_status=task_status)
        except Exception:
            if not endpoint.was_started:
                raise  # to who asked for it
            log.exception("%s: its supervision failed by our own mistake", endpoint.plan.name)
        finally:
            self._forget(endpoint.plan)

    def _reserve(self, plan: MountPlan) -> None:
        if plan.mountpoint in self._taken:
            raise BusyError(plan.mountpoint, f"{plan.mountpoint} is being mounted by another call: choose another one")
        lock = sockets.lock_mountpoint(plan.mountpoint)
        if lock is None:
            raise BusyError(plan.mountpoint, f"{plan.mountpoint} is being mounted by another udf: choose another one")
        there = find_mount(plan.mountpoint)
        if there is not None:
            lock.release()
            raise BusyError(plan.mountpoint, f"{plan.mountpoint} is a mountpoint already ({there.fstype})")
        self._taken[plan.mountpoint] = (plan, lock.release)
        self._names.add(plan.name)

    def _forget(self, plan: DriverPlan) -> None:
        """Give name and place back; harmless when that has been done."""
        endpoint = self._endpoints.get(plan.name)
        if endpoint is None or endpoint.plan is plan:
            self._endpoints.pop(plan.name, None)
            self._names.discard(plan.name)
            if isinstance(plan, BlockPlan):
                self._names.discard(attach.files_name(plan.name))
        self._free_place(plan)

    def _free_place(self, plan: DriverPlan) -> None:
        owner, give_back = self._taken.get(plan.where, (None, None))
        if owner is plan and give_back is not None:
            del self._taken[plan.where]
            give_back()

    # ---- devices

    async def start_device(self, asked: DevicePlan) -> Endpoint:
        """Start a driver for a device and wait until it can be used; it ends by itself when its lease does.

        UserError says why that cannot be: BusyError when the name or the place is taken, StartFailedError when the
        driver did not start (with the reason UNPLUGGED when it could not have).
        """
        try:
            if self._closing:
                raise UserError("the supervisor is ending: start it again first")
            files = None
            if asked.driver.provides == "block":
                files = await self._files_driver()
            environment = await self._environment(asked.owner or Identity.own())
            # From here to the end of _start's first step nothing is awaited: of two that want the same, one gets it.
            endpoint = self._reserve_device(asked, environment, files)
        except BaseException:
            if asked.lease is not None:
                asked.lease.close()
            raise
        await self._start(endpoint)
        return endpoint

    async def end(self, endpoint: Endpoint, reason: Reason) -> None:
        """End what was started for a device: in order if that can be had, and in any case. Bounded in time."""
        try:
            await endpoint.unmount(reason, lazy=False)
        except BusyError:
            log.info("%s: it is in use and is ended all the same", endpoint.plan.name)
        if not endpoint.is_gone:
            await endpoint.end(reason)

    def end_with(self, endpoint: Endpoint, mount: Mount) -> None:
        """Have an endpoint end when a mount that was made from it has ended."""
        self._nursery.start_soon(self._end_with, endpoint, mount)

    async def _end_with(self, endpoint: Endpoint, mount: Mount) -> None:
        self._below[mount] = endpoint
        try:
            await mount.ended.wait()
            await self.end(endpoint, Reason.OPERATOR)
        finally:
            del self._below[mount]

    def _reserve_device(self, asked: DevicePlan, environment: Mapping[str, str], files: Driver | None) -> Endpoint:
        names = {asked.name}
        if not _NAME.fullmatch(asked.name):
            raise UserError(f"{asked.name[:80]!r} is no name for an instance")
        if asked.driver.provides == "block":
            names.add(attach.files_name(asked.name))
        for name in sorted(names & self._names):
            raise BusyError(name, f"the name {name} is taken: choose another name")
        place = self.places.take(asked.name, (asked.owner or Identity.own()).uid)
        try:
            around = attach.Surroundings(
                place=place.path, socket=self.places.socket(asked.name), environment=environment, files=files
            )
            plan = attach.make_plan(asked, around)
            endpoint = attach.make_endpoint(plan, self.events, self._reaper)
        except BaseException:
            place.give_back()
            raise
        self._taken[plan.where] = (plan, place.give_back)
        self._names |= names
        return endpoint

    async def _files_driver(self) -> Driver | None:
        try:
            return await catalog.find(attach.FILES, trusted_only=False)
        except UserError as exc:
            log.warning("block devices are not shown as files: %s", exc)
            return None

    async def plan(
        self,
        request: MountRequest,
        caller: Identity,
        *,
        on: BlockEndpoint | None = None,
        export: str = "",
        fresh: bool = False,
    ) -> MountPlan:
        """Check a request; its plan, which has no name yet. Nothing is taken or started."""
        _check_request(request)
        rights.check_driver(caller, request.driver)
        asked = request.options or {}
        mount_options, driver_options = options.split(asked)
        rights.check_options(caller, mount_options)
        if request.command is not None:
            driver = catalog.from_command(request.command, request.source)
        else:
            assert request.driver is not None
            driver = await catalog.find(request.driver, trusted_only=not rights.is_trusted(caller))
        for warning in driver.warnings:
            log.warning("%s", warning)
        values = driver.check_options(driver_options)
        if on is not None and driver.source_kind not in ("block", "any"):
            raise UserError(f"the driver {driver.name} does not read a block device, but a {driver.source_kind}")
        path = driver.check_source(request.source) if on is None else None
        run_as = rights.acts_as(caller)
        if fresh and on is not None:
            checked = paths.Checked(request.mountpoint, None, None)
        else:
            checked = await paths.check(
                request.mountpoint, path, driver.source_kind, nonempty=mount_options.nonempty, run_as=run_as
            )
        if checked.cleaned:
            log.warning("%s: %s", request.mountpoint, checked.cleaned)
        owner = run_as or Identity.own()
        source, kept = (checked.source, checked.source) if on is None else (on.uri(export), str(on.plan.socket))
        return MountPlan(
            name="",  # chosen when it is reserved
            mountpoint=checked.mountpoint,
            driver_name=driver.name,
            driver=driver.spec,
            source=source,
            driver_options=values,
            asked_options=dict(asked),
            options=mount_options,
            owner=owner,
            shim_as=run_as,
            sandbox=driver.sandbox(owner, kept),
            environment=await self._environment(owner),
            exclusive=driver.exclusive,
            acl=driver.acl,
            locks=driver.locks,
            open=driver.open,
            durability=driver.durability,
            stable_nodes=driver.stable_nodes,
            inodes=driver.inodes,
            deadline=mount_options.deadline or driver.deadline,
            start_timeout=request.start_timeout or DEFAULT_START_TIMEOUT,
        )

    def _name(self, asked: str | None, mountpoint: str) -> str:
        if asked is not None:
            if not _NAME.fullmatch(asked):
                raise UserError(f"{asked[:80]!r} is no name for a mount: letters, digits, '.', '_' and '-', at most 64")
            if asked in self._names:
                raise UserError(f"a mount with the name {asked} exists: choose another name")
            return asked
        base = re.sub(r"[^A-Za-z0-9._-]+", "-", os.path.basename(mountpoint)).lstrip("._-")[:50] or "mount"
        name, number = base, 1
        while name in self._names:
            number += 1
            name = f"{base}-{number}"
        return name

    async def _environment(self, owner: Identity) -> Mapping[str, str]:
        if self._private_environment:
            return spawn.private_environment(os.environ)
        try:
            entry = await trio.to_thread.run_sync(pwd.getpwuid, owner.uid)  # may ask a directory server
            home, user = entry.pw_dir, entry.pw_name
        except KeyError:
            home, user = "/", str(owner.uid)
        return spawn.daemon_environment(os.environ, home, user)

    # ---- unmounting

    async def unmount(self, endpoint: Endpoint, *, lazy: bool) -> None:
        """Unmount for an operator. BusyError when files are open."""
        if endpoint.plan.lease is not None and not endpoint.recovery.is_unplugged:
            raise UserError(
                f"{endpoint.plan.where} is where the device of {endpoint.plan.name} is found as long as it is plugged"
                " in: unplug it, or deny it its driver by a rule"
            )
        below = self._below.get(endpoint)
        await endpoint.unmount(Reason.OPERATOR, lazy=lazy)
        if below is not None and endpoint.is_gone:
            await below.ended.wait()  # what it was made from is free again when this is answered
        if endpoint.is_lazy:
            self._free_place(endpoint.plan)  # somebody else may mount there while this one still serves

    async def stop_all(self, hurry: trio.Event) -> None:
        """End everything, the last one first. What is in use is unmounted lazily. Bounded in time.

        With `hurry` set nothing is waited for any more.
        """
        self._closing = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cut_short, hurry, nursery.cancel_scope)
            for endpoint in reversed(list(self._endpoints.values())):
                try:
                    await endpoint.unmount(Reason.SHUTDOWN, lazy=False)
                except BusyError:
                    name, where = endpoint.plan.name, endpoint.plan.where
                    log.warning("%s: %s is in use and is unmounted lazily", name, where)
                    await endpoint.end(Reason.SHUTDOWN)
                if endpoint.is_lazy:
                    await endpoint.end(Reason.SHUTDOWN)
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            for endpoint in list(self._endpoints.values()):
                nursery.start_soon(endpoint.end, Reason.SHUTDOWN)

    async def _cut_short(self, hurry: trio.Event, stopping: trio.CancelScope) -> None:
        with trio.move_on_after(STOP_ALL_TIMEOUT) as limit:
            await hurry.wait()
        if limit.cancelled_caught:
            log.error("not everything could be unmounted within %g s; the rest is cut off", STOP_ALL_TIMEOUT)
        stopping.cancel()


def _check_request(request: MountRequest) -> None:
    if (request.driver is None) == (request.command is None):
        raise UserError("say what serves the mount: either a driver or a command to execute")
    try:
        size = len(msgspec.json.encode(request))
    except UnicodeEncodeError:
        raise UserError("a path or option is not UTF-8 text, which cannot be told on: rename it") from None
    if size > MAX_REQUEST:
        raise UserError(f"the request is larger than {MAX_REQUEST // 1024} KiB: use shorter options")
    for text, what, limit in (
        (request.mountpoint, "mountpoint", MAX_PATH),
        (request.source, "source", MAX_PATH),
        (request.driver, "driver", MAX_PATH),
        (request.command, "command", MAX_COMMAND),
    ):
        if text is not None and ("\0" in text or not text or len(text) >= limit):
            raise UserError(f"the {what} must have 1 to {limit - 1} characters and no NUL")
    if not request.mountpoint.startswith("/"):
        raise UserError(f"the mountpoint {request.mountpoint} must be an absolute path")
    if request.driver is not None and "/" in request.driver and not request.driver.startswith("/"):
        raise UserError(f"the path of the driver {request.driver} must be absolute")
    if request.start_timeout is not None and not 0 < request.start_timeout <= 3600:
        raise UserError("the start time-out must be more than 0 and at most 3600 seconds")
    if request.command is not None:
        _check_command(request.command)


def _check_command(command: str) -> None:
    try:
        words = shlex.split(command)
    except ValueError as exc:
        raise UserError(f"the command {command[:80]!r} cannot be split into words: {exc}") from None
    if not any("{mountpoint}" in word for word in words[1:]):
        raise UserError("the command needs {mountpoint} where the program expects its mountpoint")
