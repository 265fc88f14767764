"""The process in which emulated devices live: started at the first `udf plug`, ended with the daemon.

Owns: that process, its control connection and its socket (R/usbip.sock, where it is a bus like any other).
Must never: run a device model in the supervisor, or let the process do more than models need: it opens image files, so
it keeps the daemon's user (whoever may plug is that user, or root), and of root's capabilities only those for reading
and writing files. Called by: devices.py.

When it dies all its devices are gone, which is an unplug of each; the next `udf plug` starts another one.
"""

from __future__ import annotations

import json
import logging
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from udf.errors import UserError
from udf.supervisor import spawn
from udf.supervisor.child import Child
from udf.supervisor.output import Output, sentence

START_TIMEOUT = 15.0
COMMAND_TIMEOUT = 30.0
MAX_LINE = 4 * 1024 * 1024  # a list of many devices, with their descriptors
END_GRACE = 2.0

log = logging.getLogger("udf.emulator")
Answer = dict[str, Any]


class Emulator:
    """One process at a time, when there is a need for one. `nursery` ends with the daemon, `reaper` after it."""

    def __init__(self, path: Path, nursery: trio.Nursery, reaper: trio.Nursery) -> None:
        self.path = path
        self._nursery = nursery
        self._reaper = reaper
        self._one_at_a_time = trio.Lock()
        self._child: Child | None = None
        self._control: trio.SocketStream | None = None
        self._buffer = bytearray()

    @property
    def is_running(self) -> bool:
        """Whether there is a process, and so perhaps a device."""
        return self._control is not None and self._child is not None and not self._child.ended.is_set()

    async def start(self) -> None:
        """See to it that there is a process. UserError if it cannot be had."""
        async with self._one_at_a_time:
            if not self.is_running:
                try:
                    await self._start()
                except BaseException:
                    with trio.CancelScope(shield=True):
                        await self._drop()
                    raise

    async def command(self, do: str, **request: Any) -> Answer:
        """One command and its answer. UserError, in one sentence, when it is refused or nobody can carry it out."""
        async with self._one_at_a_time:
            if not self.is_running:
                raise UserError("nothing emulated is plugged in: `udf plug MODEL` or `udf plug FILE` does that")
            try:
                with trio.fail_after(COMMAND_TIMEOUT):
                    answer = await self._ask({"do": do, **{k: v for k, v in request.items() if v is not None}})
            except trio.TooSlowError:
                await self._drop()  # whatever comes later would be taken for the answer to something else
                raise UserError(f"the emulator did not answer within {COMMAND_TIMEOUT:g} s and was ended") from None
            except trio.Cancelled:
                with trio.CancelScope(shield=True):
                    await self._drop()
                raise
        if answer.get("ok") is not True:
            raise UserError(_own_words(str(answer.get("error", "the emulator refused without a word"))))
        return answer

    async def close(self) -> None:
        """End the process in order."""
        async with self._one_at_a_time:
            await self._drop()
        with suppress(OSError):
            self.path.unlink()  # it removes its socket itself, unless it was killed

    async def _start(self) -> None:
        await self._drop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        output = Output("emulator")
        try:
            with theirs:
                self._child = spawn.start_emulator(self.path, theirs, output.write_end)
        except BaseException:
            ours.close()
            raise
        finally:
            output.started()
            self._nursery.start_soon(output.read)
        self._reaper.start_soon(self._child.watch)
        self._nursery.start_soon(self._note_end, self._child)
        self._buffer.clear()
        self._control = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        ready: Answer = {}
        with trio.move_on_after(START_TIMEOUT), suppress(UserError):
            ready = await self._line()
        if ready.get("t") != "ready":
            await self._drop()
            raise UserError(f"the emulator did not start: {output.last_line or 'see the log'}")

    async def _note_end(self, child: Child) -> None:
        await child.ended.wait()
        if child is self._child:
            log.warning("the emulator %s: its devices are gone", child.how())

    async def _ask(self, request: dict[str, Any]) -> Answer:
        assert self._control is not None
        try:
            await self._control.send_all(json.dumps(request).encode() + b"\n")
        except trio.BrokenResourceError:
            raise UserError("the emulator has ended, and its devices with it: plug them in again") from None
        return await self._line()

    async def _line(self) -> Answer:
        assert self._control is not None
        while (end := self._buffer.find(b"\n")) < 0:
            try:
                chunk = await self._control.receive_some(65536)
            except trio.BrokenResourceError:
                chunk = b""
            if not chunk or len(self._buffer) > MAX_LINE:
                raise UserError("the emulator has ended, and its devices with it: plug them in again")
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise UserError("the emulator does not speak as it should: see the log")
        return answer

    async def _drop(self) -> None:
        child, self._child = self._child, None
        if self._control is not None:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self._control)  # it ends with its control connection
            self._control = None
        if child is not None and not child.ended.is_set():
            with trio.CancelScope(shield=True):
                with trio.move_on_after(END_GRACE):
                    await child.ended.wait()
                await child.end(0)


def _own_words(text: str) -> str:
    """An error of the emulator in the form of ours: no capital at its beginning, no full stop."""
    text = sentence(text).rstrip(".")
    first, rest = text[:1], text[1:]
    return text if rest[:1].isupper() else first.lower() + rest
