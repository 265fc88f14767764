"""What a daemon and a private supervisor have in common: the process's set-up, its nurseries and its signals.

Owns: the frame in which registry and control run. Must never: decide when it ends. Called by: daemon.py, private.py.
"""

from __future__ import annotations

import logging
import resource
import signal
import socket
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from udf.supervisor import spawn
from udf.supervisor.automount import Automount
from udf.supervisor.control import Control
from udf.supervisor.devices import Devices
from udf.supervisor.instance import Event, EventLog, State
from udf.supervisor.mediadir import MediaDirectory
from udf.supervisor.registry import Registry
from udf.supervisor.volumes import Volumes

MAX_DESCRIPTORS = 65536  # a mount needs about ten of ours
REAP_GRACE = 1.0
LAST_ANSWERS = 1.0  # seconds for calls that are under way at the end

log = logging.getLogger("udf.service")


@dataclass(frozen=True)
class DaemonOptions:
    """What a daemon is told, and where its own directory is."""

    home: Path
    usbip: Sequence[str] = ()
    rules: str | None = None
    media: MediaDirectory | None = None  # where volumes are mounted by themselves


@dataclass(frozen=True)
class Frame:
    """What runs."""

    registry: Registry
    devices: Devices | None  # only a daemon has some
    automount: Automount | None
    nursery: trio.Nursery
    stop: trio.Event  # somebody asked for the end
    hurry: trio.Event  # and again


@asynccontextmanager
async def running(
    sock: socket.socket, *, ending: Iterable[signal.Signals], daemon: DaemonOptions | None = None
) -> AsyncIterator[Frame]:
    """Serve `sock` as long as the context lasts; without `daemon` as a private supervisor, which has no devices.

    One of the signals `ending` sets `stop`; others that ask for the end of a process are logged and ignored.
    """
    spawn.shield()
    _raise_limits()
    async with trio.open_nursery() as reaper:
        async with trio.open_nursery() as nursery:
            private = daemon is None
            home = None if daemon is None else daemon.home
            registry = Registry(EventLog(), nursery, reaper, private_environment=private, home=home)
            devices = None
            if daemon is not None:
                devices = Devices(daemon.home, registry, nursery, reaper, usbip=daemon.usbip, rules=daemon.rules)
            volumes = Volumes(registry, devices)
            automount = None
            if daemon is not None and devices is not None and daemon.media is not None:
                automount = Automount(daemon.media, registry, devices, volumes)
            frame = Frame(registry, devices, automount, nursery, trio.Event(), trio.Event())
            await nursery.start(_signals, frame, frozenset(ending))
            nursery.start_soon(_zygote, registry.events, reaper, private)
            if devices is not None:
                await nursery.start(devices.run)
            if automount is not None:
                await nursery.start(automount.run)
            control = Control(registry, nursery, devices=devices, volumes=volumes, private=private)
            server = control.server()
            nursery.start_soon(server.serve, sock)
            with registry.events.subscribed(volumes.on_event):
                yield frame
            with trio.move_on_after(LAST_ANSWERS):
                await server.quiet()  # who has unmounted the last mount is told so
            nursery.cancel_scope.cancel()
        reaper.cancel_scope.deadline = trio.current_time() + REAP_GRACE  # a process in D state is left to init


async def _zygote(events: EventLog, reaper: trio.Nursery, private: bool) -> None:
    """Have hosts forked ahead; for the one mount of a private supervisor not before it can be used."""
    zygote = spawn.new_zygote()
    if private:
        active = trio.Event()

        def on_event(event: Event) -> None:
            if event.kind == "mount" and event.state is State.ACTIVE:
                active.set()

        with events.subscribed(on_event):
            await active.wait()
    await zygote.run(reaper)


async def _signals(
    frame: Frame,
    ending: frozenset[signal.Signals],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
        task_status.started()
        async for number in received:
            if number not in ending:
                log.info("%s is ignored", signal.Signals(number).name)
            elif frame.stop.is_set():
                frame.hurry.set()
            else:
                log.info("%s: unmounting", signal.Signals(number).name)
                frame.stop.set()


def _raise_limits() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(MAX_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
