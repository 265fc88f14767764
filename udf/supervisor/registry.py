"""All mounts of one supervisor: checking requests, unique names and mountpoints, and ending everything in order.

Owns: the table of mounts, and the way from a request to a plan. Must never: touch a path (paths.py and worker threads
do), or know how a request came in. Called by: control.py, daemon.py, private.py.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pwd
import re
import shlex
from collections.abc import Mapping

import msgspec
import trio

from udf import messages
from udf.errors import UserError
from udf.fuse.mountinfo import find_mount
from udf.supervisor import catalog, options, paths, rights, sockets, spawn
from udf.supervisor.catalog import Driver
from udf.supervisor.instance import EventLog, Reason
from udf.supervisor.mounts import Mount
from udf.supervisor.plan import BusyError, MountPlan
from udf.supervisor.spawn import Identity

MAX_STARTS = 8  # at once; more would only make each other miss their time limits
MAX_MOUNTS_OF_OTHERS = 100  # of one user who is neither root nor ours
MAX_PATH = 4096
MAX_COMMAND = 16 * 1024
MAX_REQUEST = 32 * 1024  # it goes on to the driver host in one message of at most 64 KiB
DEFAULT_START_TIMEOUT = 30.0
NOFILE = 65536  # a driver that mirrors a tree keeps a descriptor for each file that the kernel knows
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
    """The mounts. `nursery` carries them, `reaper` what must be reaped after them."""

    def __init__(
        self, events: EventLog, nursery: trio.Nursery, reaper: trio.Nursery, *, private_environment: bool = False
    ) -> None:
        self.events = events
        self._nursery = nursery
        self._reaper = reaper
        self._private_environment = private_environment
        self._mounts: dict[str, Mount] = {}  # by name, in the order of their start
        self._names: set[str] = set()  # that are taken, also by what waits for its start
        self._points: dict[str, tuple[MountPlan, sockets.Lock]] = {}  # mountpoints that are taken
        self._starting = trio.CapacityLimiter(MAX_STARTS)
        self._closing = False

    def mounts(self, caller: Identity) -> list[Mount]:
        """Those that the caller may see, in the order of their start."""
        return [mount for mount in self._mounts.values() if rights.may_touch(caller, mount.plan.owner)]

    def find(self, caller: Identity, name: str | None, mountpoint: str | None) -> Mount:
        """The mount with this name, or at this (real) path. NotFoundError also for what the caller may not see."""
        if (name is None) == (mountpoint is None):
            raise UserError("say which mount is meant: by its name or by its mountpoint")
        for mount in self.mounts(caller):
            if name == mount.plan.name or (mountpoint == mount.plan.mountpoint and not mount.is_lazy):
                return mount
        raise NotFoundError(f"nothing is mounted {f'by the name {name}' if name else f'on {mountpoint}'} here")

    # ---- mounting

    async def mount(self, request: MountRequest, caller: Identity) -> Mount:
        """Check, start and wait until it can be used. Cancelled before that, it leaves nothing behind."""
        if self._closing:
            raise UserError("the supervisor is ending: start it again first")
        own = sum(mount.plan.owner.uid == caller.uid for mount in self._mounts.values())
        if own >= MAX_MOUNTS_OF_OTHERS and not rights.is_trusted(caller):
            raise UserError(f"you have {own} mounts, which is the most for one user: unmount some")
        plan = await self.plan(request, caller)
        # From here to the end of _reserve nothing is awaited: of two that want the same, one gets it.
        plan = dataclasses.replace(plan, name=self._name(request.name, plan.mountpoint))
        self._reserve(plan)
        try:
            async with self._starting:
                mount = Mount(plan, self.events, self._reaper)
                self._mounts[plan.name] = mount
                await self._nursery.start(self._run, mount)
        except BaseException:
            self._forget(plan)
            raise
        return mount

    async def _run(self, mount: Mount, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            await mount.run(task_status=task_status)
        except Exception:
            if not mount.was_started:
                raise  # to who asked for it
            log.exception("%s: its supervision failed by our own mistake", mount.plan.name)
        finally:
            self._forget(mount.plan)

    def _reserve(self, plan: MountPlan) -> None:
        if plan.mountpoint in self._points:
            raise BusyError(plan.mountpoint, f"{plan.mountpoint} is being mounted by another call: choose another one")
        lock = sockets.lock_mountpoint(plan.mountpoint)
        if lock is None:
            raise BusyError(plan.mountpoint, f"{plan.mountpoint} is being mounted by another udf: choose another one")
        there = find_mount(plan.mountpoint)
        if there is not None:
            lock.release()
            raise BusyError(plan.mountpoint, f"{plan.mountpoint} is a mountpoint already ({there.fstype})")
        self._points[plan.mountpoint] = (plan, lock)
        self._names.add(plan.name)

    def _forget(self, plan: MountPlan) -> None:
        """Give name and mountpoint back; harmless when that has been done."""
        mount = self._mounts.get(plan.name)
        if mount is None or mount.plan is plan:
            self._mounts.pop(plan.name, None)
            self._names.discard(plan.name)
        self._free_point(plan)

    def _free_point(self, plan: MountPlan) -> None:
        owner, lock = self._points.get(plan.mountpoint, (None, None))
        if owner is plan and lock is not None:
            del self._points[plan.mountpoint]
            lock.release()

    async def plan(self, request: MountRequest, caller: Identity) -> MountPlan:
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
        source = driver.check_source(request.source)
        run_as = rights.acts_as(caller)
        checked = await paths.check(
            request.mountpoint, source, driver.source_kind, nonempty=mount_options.nonempty, run_as=run_as
        )
        if checked.cleaned:
            log.warning("%s: %s", request.mountpoint, checked.cleaned)
        owner = run_as or Identity.own()
        return MountPlan(
            name="",  # chosen when it is reserved
            mountpoint=checked.mountpoint,
            driver_name=driver.name,
            driver=driver.spec,
            source=checked.source,
            driver_options=values,
            asked_options=dict(asked),
            options=mount_options,
            owner=owner,
            shim_as=run_as,
            sandbox=_sandbox(driver, owner, checked.source),
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

    async def unmount(self, mount: Mount, *, lazy: bool) -> None:
        """Unmount for an operator. BusyError when files are open."""
        await mount.unmount(Reason.OPERATOR, lazy=lazy)
        if mount.is_lazy:
            self._free_point(mount.plan)  # somebody else may mount there while this one still serves

    async def stop_all(self, hurry: trio.Event) -> None:
        """End every mount, the last one first. What is in use is unmounted lazily. Bounded in time.

        With `hurry` set nothing is waited for any more.
        """
        self._closing = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cut_short, hurry, nursery.cancel_scope)
            for mount in reversed(list(self._mounts.values())):
                try:
                    await mount.unmount(Reason.SHUTDOWN, lazy=False)
                except BusyError:
                    log.warning("%s: %s is in use and is unmounted lazily", mount.plan.name, mount.plan.mountpoint)
                    await mount.end(Reason.SHUTDOWN)
                if mount.is_lazy:
                    await mount.end(Reason.SHUTDOWN)
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            for mount in list(self._mounts.values()):
                nursery.start_soon(mount.end, Reason.SHUTDOWN)

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


def _sandbox(driver: Driver, owner: Identity, source: str | None) -> messages.Sandbox:
    # Capabilities are only for root's own mounts: with them a mirror would show a user what only root may read.
    is_root = os.geteuid() == 0
    # Without root, namespaces cost a user namespace, in which all other users' ids look the same. A program needs them
    # for the fusermount in its place; a driver that mirrors a tree would show wrong owners, and goes without.
    mirrors = driver.spec.command is None and driver.source_kind not in ("none", "file", "url")
    return messages.Sandbox(
        uid=owner.uid,
        gid=owner.gid,
        groups=list(owner.groups),
        capabilities=list(driver.capabilities) if is_root and owner.uid == 0 else [],
        namespaces=is_root or not mirrors,
        nofile=NOFILE,
        keep_paths=[source] if source is not None and source.startswith("/") else [],
    )
