"""The third stage of a driver host: load a Python driver, say READY, serve it over the link.

Owns: the driver's process once its sandbox stands; its loop, its heartbeat and its orderly end.
Must never: regain a right, or write to the link itself (pyfuse3 does). Called by: init.py, in a fork.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import traceback
from typing import Any

import pyfuse3
import trio

from udf import messages
from udf.driver.fs import REQUIRED_VERBS, FsDriver, verbs_of
from udf.driver.paths import PathOperations
from udf.errors import ContractError, UserError
from udf.host import libfuse_log
from udf.host.guard import Guard
from udf.host.load import instantiate, load_class
from udf.host.progress import serve_on
from udf.host.pulse import Pulse, Supervisor
from udf.host.pump import Pump

FINISH_TIMEOUT = 2.0  # seconds for what a driver does at its orderly end


def run(control: socket.socket, link: int | None, packet: bytes, store_fds: list[int], told: int) -> int:
    """Serve until the supervisor or the link ends it. Returns the exit status.

    `store_fds` are the memfds of the driver's state store. A spare has neither them nor a link: it loads the driver's
    code, which must not touch the source, and makes the driver only when its turn has come. `told` is a pipe that ends
    when the supervisor knows our process: nothing is said before that.
    """
    supervisor = Supervisor(control)
    _open_output()
    libfuse_log.redirect()
    try:
        start = messages.decode_to_host(packet)
        if not isinstance(start, messages.Start):
            raise UserError("the driver host was told something else than to start")
        cls = _load_class(start)
        Pump().install()
        os.read(told, 1)
        os.close(told)
        if link is None:
            trio.run(trio.lowlevel.checkpoint)  # brings in what the first run needs; the second is quick
            supervisor.send(messages.Warm())
            fds = supervisor.wait_for_turn(start.heartbeat)
            if fds is None:
                return 0
            link, *store_fds = fds
        operations = _load(start, cls, store_fds)
    except (UserError, ContractError) as exc:
        cause = exc.__cause__
        if cause is not None:
            traceback.print_exception(cause)
        supervisor.send(messages.HostFailed(error=str(exc)))
        return 1
    # Modes come from the programs that use the mount; and no module may be cached with such a mode from here on.
    sys.dont_write_bytecode = True
    os.umask(0)
    try:
        # An existing descriptor as mountpoint: libfuse mounts nothing and takes no mount options.
        serve_on(link)
        pyfuse3.init(Guard(operations, supervisor.report_fault), f"/dev/fd/{link}", set())
    except RuntimeError as exc:
        supervisor.send(messages.HostFailed(error=f"libfuse does not take the link: {exc}"))
        return 1
    try:
        trio.run(_serve, supervisor, operations, start.heartbeat)
    except* OSError:
        # pyfuse3 says so when the shim has closed its end, which is how a mount ends; else it is the driver's death.
        if not _is_closed(link):
            raise
    return 0


def _is_closed(link: int) -> bool:
    poll = select.poll()
    poll.register(link, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


async def _serve(supervisor: Supervisor, operations: pyfuse3.Operations, heartbeat: float) -> None:
    async with trio.open_nursery() as nursery:
        pulse = Pulse(supervisor, heartbeat, trio.lowlevel.current_trio_token(), pyfuse3.terminate)
        await nursery.start(_end_on_sigterm)
        supervisor.send(messages.Ready(services=[]))
        pulse.start()
        try:
            await pyfuse3.main()
        finally:
            nursery.cancel_scope.cancel()
            if isinstance(operations, PathOperations):
                with trio.move_on_after(FINISH_TIMEOUT, shield=True):
                    await operations.finish()


async def _end_on_sigterm(task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            pyfuse3.terminate()


def _load_class(start: messages.Start) -> type:
    path, class_name = start.driver.path, start.driver.class_name
    if not class_name:
        raise UserError(f"{path}: no class is named for the driver")
    cls = load_class(path, class_name)
    if not issubclass(cls, FsDriver | pyfuse3.Operations):
        raise UserError(f"{path}: the class {class_name} is neither an FsDriver nor a pyfuse3.Operations")
    return cls


def _load(start: messages.Start, cls: type, store_fds: list[int]) -> pyfuse3.Operations:
    path = start.driver.path
    driver: Any = instantiate(cls, path, start.source, start.options, store_fds)
    if isinstance(driver, FsDriver):
        missing = [verb for verb in REQUIRED_VERBS if verb not in verbs_of(driver)]
        if missing:
            raise UserError(f"{path}: the class {cls.__name__} has no {missing[0]}(), which every filesystem needs")
        return PathOperations(driver)
    operations: pyfuse3.Operations = driver
    return operations


def _open_output() -> None:
    # What an author prints is a log: by lines, and never an error because of a character.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    os.chdir("/")
