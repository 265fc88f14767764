"""The third stage of a driver host: load a Python driver, say READY, serve it over the link.

Owns: the driver's process once its sandbox stands; its loop, its heartbeat and its orderly end. A filesystem is served
here, by pyfuse3; what else there is, and what is particular to devices, is in faces.py.
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
from collections.abc import Awaitable, Callable
from typing import Any

import pyfuse3
import trio

from udf import messages
from udf.driver.fs import REQUIRED_VERBS, FsDriver, verbs_of
from udf.driver.paths import PathOperations
from udf.driver.window import Window
from udf.errors import ContractError, UserError
from udf.host import faces, libfuse_log
from udf.host.at_once import AtOnce
from udf.host.guard import Guard
from udf.host.load import instantiate, load_class
from udf.host.progress import serve_on
from udf.host.pulse import Pulse, Supervisor
from udf.host.pump import Pump
from udf.window import NoWindow

FINISH_TIMEOUT = 2.0  # seconds for what a driver does at its orderly end


def run(control: socket.socket, link: int | None, packet: bytes, fds: list[int], told: int) -> int:
    """Serve until the supervisor or the link ends it. Returns the exit status.

    `fds` are the driver's window and the connection to its device, if it has such, and the memfds of its state store. A
    spare has neither them nor a link: it loads the driver's code, which must not touch the source, and makes the driver
    only when its turn has come. `told` is a pipe that ends when the supervisor knows our process: nothing is said
    before that.
    """
    supervisor = Supervisor(control)
    _open_output()
    libfuse_log.redirect()
    try:
        start = messages.decode_to_host(packet)
        if not isinstance(start, messages.Start):
            raise UserError("the driver host was told something else than to start")
        cls = _load_class(start)
        face = faces.face_of(start.driver)
        pump = Pump()
        if face == "files":
            pump.install()
        os.read(told, 1)
        os.close(told)
        if link is None:
            trio.run(trio.lowlevel.checkpoint)  # brings in what the first run needs; the second is quick
            supervisor.send(messages.Warm())
            turn = supervisor.wait_for_turn(start.heartbeat)
            if turn is None:
                return 0
            link, *fds = turn
        window = _window(start, fds)
        driver = _make(start, cls, fds, window)
        operations = _operations(start, driver) if face == "files" else None
    except (UserError, ContractError) as exc:
        return _fail(supervisor, exc)
    # Modes come from the programs that use the mount; and no module may be cached with such a mode from here on.
    sys.dont_write_bytecode = True
    os.umask(0)
    life = _Life(supervisor, driver, start)
    if operations is None:
        return life.run(faces.server(driver, face, link, supervisor.report_fault))
    guarded = Guard(operations, supervisor.report_fault)
    read_now = getattr(operations, "read_now", None)
    if read_now is not None or window is not None:
        pump.answer_at_once(AtOnce(link, read_now or _not_now, guarded.read, window))
    try:
        # An existing descriptor as mountpoint: libfuse mounts nothing and takes no mount options.
        serve_on(link)
        pyfuse3.init(guarded, f"/dev/fd/{link}", set())
    except RuntimeError as exc:
        supervisor.send(messages.HostFailed(error=f"libfuse does not take the link: {exc}"))
        return 1
    try:
        return life.run_fuse(operations)
    except* OSError:
        # pyfuse3 says so when the shim has closed its end, which is how a mount ends; else it is the driver's death.
        if not _is_closed(link):
            raise
    finally:
        if pump.at_once is not None:
            pump.at_once.close()
    return 0


def _fail(supervisor: Supervisor, exc: UserError | ContractError) -> int:
    if exc.__cause__ is not None and exc.__cause__ is not exc:
        traceback.print_exception(exc.__cause__)
    supervisor.send(messages.HostFailed(error=str(exc)))
    return 1


def _is_closed(link: int) -> bool:
    poll = select.poll()
    poll.register(link, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


class _Life:
    """The driver's loop, from its first task to its orderly end."""

    def __init__(self, supervisor: Supervisor, driver: Any, start: messages.Start) -> None:
        self._supervisor = supervisor
        self._driver = driver
        self._start = start
        self._ejects = False  # the device is about to be taken out
        self._has_hooks = start.driver.kind != "fs"
        self._terminate: Callable[[], None] = pyfuse3.terminate

    def run_fuse(self, operations: pyfuse3.Operations) -> int:
        """Serve pyfuse3's session; the exit status."""

        async def serve() -> None:
            self._terminate = pyfuse3.terminate
            await pyfuse3.main()

        async def finish() -> None:
            last = operations.finish if isinstance(operations, PathOperations) else getattr(operations, "stop", None)
            if last is not None:
                with trio.move_on_after(FINISH_TIMEOUT, shield=True):
                    await last()

        return trio.run(self._run, serve, finish)

    def run(self, face: Callable[[], Awaitable[None]]) -> int:
        """Serve something else, until it returns; the exit status."""
        status = 0

        async def serve() -> None:
            nonlocal status
            with trio.CancelScope() as scope:
                self._terminate = scope.cancel
                status = await faces.serve(face)

        return trio.run(self._run, serve, _nothing) or status

    async def _run(self, serve: Callable[[], Awaitable[None]], finish: Callable[[], Awaitable[None]]) -> int:
        supervisor = self._supervisor
        async with trio.open_nursery() as nursery:
            pulse = Pulse(supervisor, self._start.heartbeat, trio.lowlevel.current_trio_token(), self._end)
            await nursery.start(self._end_on_sigterm)
            try:
                if self._has_hooks:
                    pulse.start()
                    status = await self._start_driver()
                    if status is not None:
                        return status
                supervisor.send(messages.Ready(services=[]))
                if not self._has_hooks:
                    pulse.start()
                await serve()
            finally:
                nursery.cancel_scope.cancel()
                await finish()
                if self._has_hooks:
                    await faces.stop(self._driver, eject=self._ejects)
        return 0

    async def _start_driver(self) -> int | None:
        """The author's `start`, which the supervisor's word ends; None: it is ready, else the exit status."""
        with trio.CancelScope() as scope:
            self._terminate = scope.cancel
            try:
                await faces.start(self._driver, self._start.driver.path)
            except (UserError, ContractError) as exc:
                return _fail(self._supervisor, exc)
        return 0 if scope.cancel_called else None

    def _end(self, eject: bool) -> None:
        self._ejects = eject
        self._terminate()

    async def _end_on_sigterm(self, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            task_status.started()
            async for _ in signals:
                self._terminate()


async def _nothing() -> None:
    pass


def _load_class(start: messages.Start) -> type:
    path, class_name = start.driver.path, start.driver.class_name
    if not class_name:
        raise UserError(f"{path}: no class is named for the driver")
    cls = load_class(path, class_name)
    if start.driver.kind != "fs":
        faces.check_class(cls, path, start.driver)
    elif not issubclass(cls, FsDriver | pyfuse3.Operations):
        raise UserError(f"{path}: the class {class_name} is neither an FsDriver nor a pyfuse3.Operations")
    return cls


def _window(start: messages.Start, fds: list[int]) -> Window | None:
    """The driver's window, whose descriptor is the first one then."""
    if not start.driver.window:
        return None
    if not fds:
        raise UserError(f"{start.driver.path}: the driver was started without its window")
    try:
        return Window(fds.pop(0))
    except (NoWindow, OSError) as exc:
        raise UserError(f"{start.driver.path}: the driver's window cannot be mapped: {exc}") from exc


def _not_now(*_: object) -> bool:
    return False


def _make(start: messages.Start, cls: type, fds: list[int], window: Window | None) -> Any:
    path = start.driver.path
    attributes: dict[str, Any] = {}
    if window is not None and hasattr(cls, "window"):
        attributes["window"] = window
    if start.read_only and hasattr(cls, "read_only"):
        attributes["read_only"] = True
    if start.device is not None:
        if not fds:
            raise UserError(f"{path}: the driver was started without the connection to its device")
        connection, *fds = fds
        attributes.update(faces.open_device(connection, start.device))
    return instantiate(cls, path, start.source, start.options, fds, attributes)


def _operations(start: messages.Start, driver: Any) -> pyfuse3.Operations:
    if isinstance(driver, FsDriver):
        missing = [verb for verb in REQUIRED_VERBS if verb not in verbs_of(driver)]
        if missing:
            raise UserError(
                f"{start.driver.path}: the class {type(driver).__name__} has no {missing[0]}(), which every filesystem"
                " needs"
            )
        return PathOperations(driver)
    operations: pyfuse3.Operations = driver
    return operations


def _open_output() -> None:
    # What an author prints is a log: by lines, and never an error because of a character.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    os.chdir("/")
