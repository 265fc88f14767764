"""`udf daemon`: the supervisor of a machine or of a user's session.

Owns: the daemon's start and end, and what systemd is told. Must never: say READY before the control socket listens,
or end with a mount left behind that it could unmount. Called by: udf.cli.

Signals: SIGTERM and SIGINT unmount everything in order and end it (a second one hurries); SIGHUP is ignored, because
there is nothing to read again and mounts must not depend on a terminal. SIGKILL: shims and hosts see the end of their
control sockets, unmount lazily and end; the next start replaces the socket, and clears away mounts without a server.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import trio

from udf.supervisor import logs, paths, sockets
from udf.supervisor.instance import Event
from udf.supervisor.mediadir import MediaDirectory
from udf.supervisor.notify import Notifier
from udf.supervisor.places import Places
from udf.supervisor.registry import Registry
from udf.supervisor.service import DaemonOptions, Frame, running
from udf.supervisor.spawn import Identity
from udf.usb.operations import Address
from udf.usb.rules import read_rules

_ENDING = (signal.SIGTERM, signal.SIGINT)


def main(
    socket_path: str | None = None,
    *,
    usbip: Sequence[str] = (),
    rules: str | None = None,
    automount: str | None = None,
) -> int:
    """Run until a signal ends it; the exit code. UserError when another one listens there already.

    `usbip` are the addresses of USB/IP servers, `rules` the file that is read instead of the usual ones, `automount`
    the directory below which volumes are mounted by themselves (empty: the usual one).
    """
    for address in usbip:
        Address.parse(address)  # a mistake is told before anything is begun
    if rules is not None:
        read_rules(Path(rules), must_exist=True)
    path = Path(socket_path).absolute() if socket_path else sockets.daemon_socket()
    logs.to_stderr(os.environ)
    control = sockets.ControlSocket.bind(path)
    try:
        sockets.private_sockets()  # clears away what killed supervisors have left
        home = sockets.home_of(path)
        lock = sockets.lock_home(home)
        try:
            media = None if automount is None else MediaDirectory.take(home, automount)
            try:
                trio.run(_run, control, DaemonOptions(home, usbip, rules, media))
            finally:
                if media is not None:
                    media.leave()
        finally:
            lock.release()
    finally:
        control.remove()
    return 0


async def _run(control: sockets.ControlSocket, options: DaemonOptions) -> None:
    notifier = Notifier(os.environ)
    try:
        await paths.sweep()  # before anybody is served, who might want one of those mountpoints
        places = Places(options.home)
        places.sweep()
        async with running(control.sock, ending=_ENDING, daemon=options) as frame:
            if notifier.watchdog is not None:
                frame.nursery.start_soon(_watchdog, notifier, notifier.watchdog)
            notifier.say(READY=1, STATUS=f"Listening on {control.path}")
            await _until_stopped(frame, notifier)
        places.leave()
    finally:
        notifier.close()


async def _until_stopped(frame: Frame, notifier: Notifier) -> None:
    def on_event(event: Event) -> None:
        if event.kind == "mount":
            notifier.say(STATUS=_status(frame.registry))

    with frame.registry.events.subscribed(on_event):
        await frame.stop.wait()
        notifier.say(STOPPING=1, STATUS="Unmounting everything")
    if frame.devices is not None:
        frame.devices.binder.close()
    if frame.automount is not None:
        frame.automount.stop()
    await frame.registry.stop_all(frame.hurry)
    if frame.automount is not None:
        await frame.automount.close()
    if frame.devices is not None:
        await frame.devices.close()


async def _watchdog(notifier: Notifier, interval: float) -> None:
    # From the loop itself, so that a loop that no longer turns says nothing.
    while True:
        notifier.say(WATCHDOG=1)
        await trio.sleep(interval)


def _status(registry: Registry) -> str:
    states = Counter(str(each.instance.state) for each in registry.endpoints(Identity.own()) if not each.is_gone)
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "Nothing is mounted"
