"""The methods of io.udf.Supervisor: what each call means, with the caller's rights.

Owns: the translation between the interface file and the registry. Must never: trust a parameter, or block the loop.
Called by: daemon.py and private.py, which run `serve`.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from pathlib import Path
from typing import Any

import msgspec
import trio

from udf import __version__, messages
from udf.errors import UserError
from udf.supervisor import catalog, images, rights
from udf.supervisor.blocks import BlockEndpoint
from udf.supervisor.client import INTERFACE, PROTOCOL
from udf.supervisor.devicecalls import DeviceCalls
from udf.supervisor.devices import Devices, NoDeviceError
from udf.supervisor.endpoint import Endpoint
from udf.supervisor.instance import Event, Instance
from udf.supervisor.mounts import Mount
from udf.supervisor.output import printable, sentence
from udf.supervisor.plan import BusyError, StartFailedError
from udf.supervisor.procfs import command_of
from udf.supervisor.registry import MountRequest, NotFoundError, Registry
from udf.supervisor.trace import Operation
from udf.supervisor.varlink import SERVICE, Call, Server, Service, VarlinkError
from udf.supervisor.volumes import Volumes

MAX_EVENT_QUEUE = 1000  # events that wait for one client
MAX_EVENT_BATCH = 100  # events in one reply

log = logging.getLogger("udf.control")


class _Info(msgspec.Struct, forbid_unknown_fields=True):
    protocol: int | None = None


class _Which(msgspec.Struct, forbid_unknown_fields=True):
    name: str | None = None
    mountpoint: str | None = None


class _Unmount(_Which, forbid_unknown_fields=True):
    device: str | None = None
    lazy: bool | None = None


class _Eject(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    device: str
    mountpoint: str | None = None


class _Abort(_Which, kw_only=True, forbid_unknown_fields=True):
    request: int


class _Nothing(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _Events(msgspec.Struct, forbid_unknown_fields=True):
    since: int | None = None


class Control:
    """The control interface of one supervisor. `nursery` carries what several calls share."""

    def __init__(
        self,
        registry: Registry,
        nursery: trio.Nursery,
        *,
        devices: Devices | None = None,
        volumes: Volumes | None = None,
        private: bool,
    ) -> None:
        self._registry = registry
        self._volumes = volumes or Volumes(registry, devices)
        self._devices = DeviceCalls(devices, self._volumes)
        self._nursery = nursery
        self._private = private

    def server(self) -> Server:
        """A Varlink server for it."""
        methods = {
            "Info": self._info,
            "Mount": self._mount,
            "Attach": self._attach,
            "Unmount": self._unmount,
            "Eject": self._eject,
            "Status": self._status,
            "Drivers": self._drivers,
            "Events": self._events,
            "Trace": self._trace,
            "Restart": self._restart,
            "Hung": self._hung,
            "Abort": self._abort,
            "Crashes": self._crashes,
            **self._devices.methods(),
        }
        return Server(
            Service(
                product="UDF supervisor",
                version=__version__,
                url="",
                methods={f"{INTERFACE}.{name}": method for name, method in methods.items()},
                abandoned=frozenset({f"{INTERFACE}.Mount", f"{INTERFACE}.Attach"}),
                interfaces={INTERFACE: interface_description()},
                error=as_varlink,
            )
        )

    async def _info(self, call: Call) -> object:
        wanted = call.parameters(_Info).protocol
        if wanted is not None and wanted != PROTOCOL:
            raise _error(
                "VersionMismatch",
                f"this supervisor speaks control protocol {PROTOCOL} and the client {wanted}: use the udf that it was"
                " started with, or start it again",
                protocol=PROTOCOL,
            )
        return {
            "version": __version__,
            "pid": os.getpid(),
            "protocol": PROTOCOL,
            "private": self._private,
            "uid": os.geteuid(),
        }

    async def _mount(self, call: Call) -> object:
        request = call.parameters(MountRequest)
        if self._private:
            raise UserError("this supervisor serves one mount and takes no others: start `udf daemon` for that")
        mount = await self._volumes.mount(request, call.peer.identity)
        return {"name": mount.plan.name, "mountpoint": mount.plan.where}

    async def _attach(self, call: Call) -> object:
        request = call.parameters(images.AttachRequest)
        if self._private:
            raise UserError("this supervisor serves one mount and takes no others: start `udf daemon` for that")
        endpoint = await images.attach(self._registry, request, call.peer.identity)
        return {"name": endpoint.plan.name, "mountpoint": endpoint.plan.where}

    async def _unmount(self, call: Call) -> object:
        wanted, caller = call.parameters(_Unmount), call.peer.identity
        lazy = bool(wanted.lazy)
        if wanted.device is not None:
            if wanted.name is not None or wanted.mountpoint is not None:
                raise UserError("say which mount is meant once: by its device, its name or its mountpoint")
            return {"mountpoints": await self._volumes.unmount(wanted.device, caller, lazy=lazy)}
        endpoint = self._find(call, wanted)
        if isinstance(endpoint, BlockEndpoint):
            return {"mountpoints": await self._volumes.unmount_disk(endpoint, lazy=lazy)}
        await self._registry.unmount(endpoint, lazy=lazy)
        return {"mountpoints": [endpoint.plan.where]}

    async def _eject(self, call: Call) -> object:
        wanted = call.parameters(_Eject)
        return await self._volumes.eject(wanted.device, wanted.mountpoint, call.peer.identity)

    async def _status(self, call: Call) -> object:
        mounts = self._mounts(call)
        rows: dict[int, dict[str, Any]] = {}

        async def describe(number: int, mount: Endpoint) -> None:
            rows[number] = _describe(mount, await mount.counters(), self._volumes.device_of(mount))

        async with trio.open_nursery() as nursery:
            for number, mount in enumerate(mounts):
                nursery.start_soon(describe, number, mount)
        return {"mounts": [rows[number] for number in sorted(rows)]}

    async def _drivers(self, call: Call) -> object:
        call.parameters(_Nothing)
        drivers, warnings = await catalog.listing(trusted_only=not rights.is_trusted(call.peer.identity))
        return {"drivers": drivers, "warnings": warnings}

    async def _events(self, call: Call) -> object:
        since = call.parameters(_Events).since
        waiting: deque[Event] = deque()
        news = trio.Event()
        lost = 0

        def on_event(event: Event) -> None:
            nonlocal lost
            if not self._may_see(call, event):
                return
            if len(waiting) >= MAX_EVENT_QUEUE:
                waiting.popleft()
                lost += 1
            waiting.append(event)
            news.set()

        log_of = self._registry.events
        with log_of.subscribed(on_event):
            past = [event for event in log_of.past(since or 0) if self._may_see(call, event)]
            if not call.more:
                return {"events": past, "lost": 0}
            waiting.extend(past)
            await call.reply_more({"events": [], "lost": 0})  # the client knows now that it will be told
            while True:
                while waiting:
                    batch = [waiting.popleft() for _ in range(min(MAX_EVENT_BATCH, len(waiting)))]
                    told, lost = lost, 0
                    await call.reply_more({"events": batch, "lost": told})
                news = trio.Event()
                await news.wait()

    async def _trace(self, call: Call) -> object:
        mount = self._find(call, call.parameters(_Which))
        if not call.more:
            raise VarlinkError(f"{SERVICE}.ExpectedMore", {})

        async def deliver(operations: list[Operation], lost: int) -> None:
            await call.reply_more({"operations": operations, "lost": lost})

        await mount.traced().listen(self._nursery, deliver)
        return {"operations": [], "lost": 0}

    async def _restart(self, call: Call) -> object:
        return {"generation": await self._find(call, call.parameters(_Which)).restart()}

    async def _hung(self, call: Call) -> object:
        mounts = self._mounts(call)
        found: dict[int, messages.Requests | None] = {}

        async def ask(number: int, mount: Endpoint) -> None:
            found[number] = await mount.requests()

        async with trio.open_nursery() as nursery:
            for number, mount in enumerate(mounts):
                nursery.start_soon(ask, number, mount)
        rows: list[dict[str, Any]] = []
        total, silent = 0, []
        for number, mount in enumerate(mounts):
            answer = found[number]
            if answer is None:
                silent.append(mount.plan.name)
                continue
            total += answer.total
            rows += [_waiting(mount, request) for request in answer.requests]
        return {"requests": rows, "total": total, "silent": silent}

    async def _abort(self, call: Call) -> object:
        wanted = call.parameters(_Abort)
        mount = self._find(call, wanted)
        answer = await mount.requests()
        if answer is None:
            raise UserError(f"the shim of {mount.plan.name} does not answer: unmount it lazily to end what waits")
        # A list that is cut may lack the one that is meant; the shim knows.
        if answer.total <= len(answer.requests) and all(each.id != wanted.request for each in answer.requests):
            raise NotFoundError(f"no request {wanted.request} waits on {mount.plan.where}: it has been answered")
        if not await mount.abort(wanted.request):
            raise UserError(f"the shim of {mount.plan.name} takes no messages: unmount it lazily to end what waits")
        return None

    async def _crashes(self, call: Call) -> object:
        reports = [
            {"name": mount.plan.name, "mountpoint": mount.plan.where, **msgspec.structs.asdict(report)}
            for mount in self._mounts(call)
            for report in mount.recovery.crashes.reports()
        ]
        reports.sort(key=lambda report: report["time"])
        return {"crashes": reports}

    def _mounts(self, call: Call) -> list[Endpoint]:
        """Those that the call names, or all that the caller may see."""
        wanted = call.parameters(_Which)
        if wanted.name is None and wanted.mountpoint is None:
            return self._registry.endpoints(call.peer.identity)
        return [self._find(call, wanted)]

    def _find(self, call: Call, wanted: _Which) -> Endpoint:
        return self._registry.find(call.peer.identity, wanted.name, wanted.mountpoint)

    def _may_see(self, call: Call, event: Event) -> bool:
        # An event carries a name only; the past of a mount that is gone is for those who may see everything.
        caller = call.peer.identity
        return rights.is_trusted(caller) or any(
            mount.plan.name == event.name for mount in self._registry.endpoints(caller)
        )


def interface_description() -> str:
    """The interface file."""
    return Path(__file__).with_name(f"{INTERFACE}.varlink").read_text("utf-8")


def _describe(mount: Endpoint, counters: dict[str, int | float], device: str | None) -> dict[str, Any]:
    plan, instance = mount.plan, mount.instance
    below = mount.below if isinstance(mount, Mount) else None
    return {
        "name": plan.name,
        "mountpoint": plan.where,
        "driver": plan.driver_name,
        "kind": mount.kind,
        "source": plan.source,
        "device": device if plan.lease is None else sentence(plan.lease.name),
        "volume": below is not None,
        "known_again": below is None or below.plan.lease is None or below.has_identity,
        "options": plan.asked_options,
        "uid": plan.owner.uid,
        "state": instance.state,
        "reason": instance.reason,
        "text": mount.text,
        "since": instance.since,
        "generation": mount.generation,
        "restarts_left": mount.recovery.restarts_left,
        "durability": plan.durability,
        "lazy": mount.is_lazy,
        "faults": mount.faults,
        "shim_pid": None if mount.shim is None else mount.shim.pid,
        "driver_pid": mount.driver.pid,
        "spare_pid": mount.recovery.spare_pid,
        "instances": [_instance(each) for each in (mount.instance, *mount.instance.needs)],
        "counters": counters,
    }


def _waiting(mount: Endpoint, request: messages.WaitingRequest) -> dict[str, Any]:
    return {
        "name": mount.plan.name,
        "mountpoint": mount.plan.where,
        "driver": mount.plan.driver_name,
        "driver_pid": mount.driver.pid,
        "id": request.id,
        "op": printable(request.op.encode()[:40]),
        "path": sentence(request.path),
        "age": request.age,
        "pid": request.pid,
        "command": command_of(request.pid),
        "parked": request.parked,
    }


def _instance(instance: Instance) -> dict[str, Any]:
    return {
        "kind": instance.kind,
        "name": instance.name,
        "state": instance.state,
        "reason": instance.reason,
        "text": instance.text,
        "since": instance.since,
        "pid": instance.pid,
    }


def _error(name: str, sentence: str, **parameters: object) -> VarlinkError:
    return VarlinkError(f"{INTERFACE}.{name}", {"sentence": sentence, **parameters})


def as_varlink(exc: Exception) -> VarlinkError:
    """The one table from what a method raises to the interface's errors."""
    match exc:
        case StartFailedError():
            return _error("Failed", str(exc), tree=exc.tree)
        case BusyError():
            return _error("Busy", str(exc), mountpoint=exc.mountpoint)
        case rights.DeniedError():
            return _error("Denied", str(exc))
        case NotFoundError() | NoDeviceError():
            return _error("NotFound", str(exc))
        case UserError():
            return _error("Refused", str(exc))
        case _:
            log.error("a control call failed by our own mistake", exc_info=exc)
            return _error("Failed", f"the supervisor made a mistake ({type(exc).__name__}): see its log", tree=[])
