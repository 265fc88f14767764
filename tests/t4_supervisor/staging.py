"""A mount with scripted processes in the place of shim and hosts, for tests of what the real ones do not on demand."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from real import PATIENCE

from udf import messages
from udf.supervisor import spawn
from udf.supervisor.instance import Event, EventLog, Reason, State
from udf.supervisor.mounts import Mount
from udf.supervisor.options import MountOptions
from udf.supervisor.plan import MountPlan, StartFailedError
from udf.supervisor.spawn import Identity

PEER = str(Path(__file__).with_name("scripted_peer.py"))
GOOD_SHIM = ("receive", "mounted", "serve")
GOOD_HOST = ("receive", "started", "ready", "serve")


class Stage:
    """Makes mounts whose processes follow scripts."""

    def __init__(self, nursery: trio.Nursery, tmp_path: Path) -> None:
        self.nursery = nursery
        self.events = EventLog()
        self.shim: tuple[str, ...] = GOOD_SHIM
        self.host: tuple[str, ...] = GOOD_HOST
        self.hosts: list[tuple[str, ...]] = []  # of the first generations; `host` is all others'
        self.started: list[int] = []  # the hosts' pids
        self.driver = messages.DriverSpec(path="/x")
        self.options = MountOptions()
        self.durability = "none"
        self.cleaned: list[str] = []
        self.start_timeout = 10.0
        self.mark = str(tmp_path / "mounted")
        self._mountpoint = str(tmp_path / "mnt")

    def start(self, role: str, control: socket.socket, output: int) -> spawn.Child:
        steps = self.shim if role == "shim" else self.hosts.pop(0) if self.hosts else self.host
        argv = [sys.executable, "-I", "-S", PEER, str(control.fileno()), role, self.mark, *steps]
        child = spawn._start(argv, {}, output, output, None, control.fileno())
        if role == "host":
            self.started.append(child.pid)
        return child

    def make(self) -> Mount:
        plan = MountPlan(
            name="m",
            mountpoint=self._mountpoint,
            driver_name="scripted",
            driver=self.driver,
            source=None,
            driver_options={},
            asked_options={},
            options=self.options,
            durability=self.durability,
            owner=Identity.own(),
            shim_as=None,
            sandbox=messages.Sandbox(uid=0, gid=0),
            environment={},
            start_timeout=self.start_timeout,
        )
        return Mount(plan, self.events, self.nursery)

    async def mounted(self) -> Mount:
        mount = self.make()
        await self.nursery.start(mount.run)
        Path(self.mark).touch()
        return mount

    async def refused(self) -> StartFailedError:
        with pytest.raises(StartFailedError) as caught:
            await self.nursery.start(self.make().run)
        return caught.value

    def told(self, what: str) -> list[Event]:
        return [event for event in self.events.past() if event.what == what]

    def life(self, kind: str) -> list[tuple[str, str]]:
        return [(str(e.state), e.reason) for e in self.events.past() if e.kind == kind and e.what == "state"]


async def gone(mount: Mount) -> None:
    with trio.fail_after(PATIENCE):
        await mount.ended.wait()
    assert mount.is_gone


async def state_of(mount: Mount, state: State) -> None:
    with trio.fail_after(PATIENCE):
        while mount.instance.state is not state:
            await trio.sleep(0.01)


async def until(condition: Callable[[], Any]) -> None:
    """For what the mount does by itself."""
    with trio.fail_after(PATIENCE):
        while not condition():
            await trio.sleep(0.01)


async def generation_of(mount: Mount, number: int) -> None:
    """Until this generation serves."""
    await until(lambda: mount.instance.state is State.ACTIVE and mount.generation == number)


async def unmount(mount: Mount) -> None:
    await mount.unmount(Reason.OPERATOR, lazy=False)
    await gone(mount)
