"""A supervisor for one mount: `udf mount` when no daemon runs, in the background or (`-f`) in the foreground.

Owns: the life of that one mount and what its caller is told. Must never: outlive the mount, or keep anything of the
caller's once it has reported. Called by: udf.cli (`run_foreground`), launch.py (`python -m udf.supervisor.private`).

Signals in the foreground: SIGINT, SIGTERM and SIGHUP unmount and end it. In the background it has a session of its own,
so a terminal's end does not reach it; SIGTERM and SIGINT unmount and end it, SIGHUP is ignored. A mount that is in use
is then unmounted lazily. When `udf mount` is interrupted before the mount can be used, nothing is left behind.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import trio

from udf.errors import UserError
from udf.supervisor import logs, sockets
from udf.supervisor.client import ControlError
from udf.supervisor.control import as_varlink
from udf.supervisor.instance import Reason
from udf.supervisor.registry import MountRequest
from udf.supervisor.service import Frame, running
from udf.supervisor.spawn import Identity
from udf.supervisor.volumes import Volumes

_FOREGROUND_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_BACKGROUND_END = (signal.SIGINT, signal.SIGTERM)
_ORDERLY = (Reason.OPERATOR, Reason.SHUTDOWN, Reason.EXTERNAL)
MAX_REQUEST = 1024 * 1024

Reply = dict[str, Any]


class _InterruptedError(UserError):
    pass


def run_foreground(parameters: Mapping[str, Any], on_mounted: Callable[[Reply], None] | None = None) -> int:
    """Mount, supervise and wait for the end; the exit code. `parameters` are those of the Mount method.

    ControlError (a UserError) when the mount cannot be made. `on_mounted` is told Mount's answer.
    """
    logs.to_stderr(os.environ)
    return _supervise(parameters, _FOREGROUND_END, on_mounted or (lambda _: None), None)


def _supervise(
    parameters: Mapping[str, Any],
    ending: tuple[signal.Signals, ...],
    on_mounted: Callable[[Reply], None],
    caller_end: int | None,
) -> int:
    try:
        request = msgspec.convert(dict(parameters), MountRequest)
    except msgspec.ValidationError as exc:
        raise ControlError("Refused", f"the request cannot be understood: {exc}") from None
    sockets.private_sockets()  # clears away what killed supervisors have left
    control = sockets.ControlSocket.bind(_socket_path())
    try:
        return trio.run(_run, control, request, ending, on_mounted, caller_end)
    finally:
        control.remove()


async def _run(
    control: sockets.ControlSocket,
    request: MountRequest,
    ending: tuple[signal.Signals, ...],
    on_mounted: Callable[[Reply], None],
    caller_end: int | None,
) -> int:
    problem: Exception | None = None
    code = 1
    async with running(control.sock, ending=ending) as frame:
        try:
            code = await _one_mount(frame, request, on_mounted, caller_end)
        except UserError as exc:
            problem = exc  # raised below: in here it would end as a group of exceptions
    if problem is not None:
        error = as_varlink(problem)
        raise ControlError(error.name, str(problem), error.parameters)
    return code


async def _one_mount(
    frame: Frame, request: MountRequest, on_mounted: Callable[[Reply], None], caller_end: int | None
) -> int:
    mount = None
    async with trio.open_nursery() as starting:
        starting.start_soon(_give_up_on, frame.stop, starting.cancel_scope)
        if caller_end is not None:
            starting.start_soon(_give_up_at_end_of, caller_end, starting.cancel_scope)
        problem: UserError | None = None
        try:
            mount = await Volumes(frame.registry).mount(request, Identity.own())
        except UserError as exc:
            problem = exc
        starting.cancel_scope.cancel()
    if problem is not None:
        raise problem
    if mount is None:
        raise _InterruptedError(f"{request.mountpoint} was not mounted: interrupted")
    on_mounted({"name": mount.plan.name, "mountpoint": mount.plan.mountpoint})
    async with trio.open_nursery() as waiting:
        waiting.start_soon(_stop_when_asked, frame)
        await mount.ended.wait()
        await frame.registry.stop_all(frame.hurry)  # what was below it
        waiting.cancel_scope.cancel()
    return 0 if mount.instance.reason in _ORDERLY else 1


async def _stop_when_asked(frame: Frame) -> None:
    await frame.stop.wait()
    await frame.registry.stop_all(frame.hurry)


async def _give_up_on(stop: trio.Event, starting: trio.CancelScope) -> None:
    await stop.wait()
    starting.cancel()


async def _give_up_at_end_of(descriptor: int, starting: trio.CancelScope) -> None:
    await trio.lowlevel.wait_readable(descriptor)  # nothing more is sent on it: what comes is its end
    starting.cancel()


def _socket_path() -> Path:
    sockets.make_directory(sockets.rundir())
    directory = sockets.private_directory()
    sockets.make_directory(directory)
    return directory / f"{os.getpid()}.sock"


def main(report: int) -> int:
    """The background process: the request is a line on stdin, the result goes to the descriptor `report`."""
    os.set_inheritable(report, False)
    os.set_blocking(sys.stdin.fileno(), True)
    reported = False

    def say(reply: Reply) -> None:
        nonlocal reported
        reported = True
        try:
            os.write(report, json.dumps(reply).encode())
        except BrokenPipeError:
            pass  # it went in this very moment; the mount stays, as after any success
        os.close(report)

    def on_mounted(parameters: Reply) -> None:
        say({"parameters": parameters})
        _let_go()

    log_path = _socket_path().with_suffix(".log")
    try:
        logs.to_file(log_path)
        parameters = json.loads(sys.stdin.buffer.readline(MAX_REQUEST))
        return _supervise(parameters, _BACKGROUND_END, on_mounted, sys.stdin.fileno())
    except UserError as exc:
        if not reported:
            error = as_varlink(exc) if not isinstance(exc, ControlError) else exc
            say({"error": error.name, "parameters": {"sentence": str(exc), **error.parameters}})
        return 1
    finally:
        log_path.unlink(missing_ok=True)


def _let_go() -> None:
    """Keep nothing of the caller's: neither its terminal nor its pipes."""
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
