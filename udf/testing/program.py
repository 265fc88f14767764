"""The program that works on a mount: a process of its own, because whoever waits for its own answer waits for ever.

Owns: the process and the pipe to it (operations.py is what runs there). Must never: touch a mount itself.
Called by: bench.py and matrix.py.
"""

from __future__ import annotations

import marshal
import os
import subprocess
import sys
from pathlib import Path

import trio

Result = tuple[str, object]  # ("value", what it returned) or ("errno", number)

PATIENCE = 20.0  # seconds; what takes longer hangs


class NoAnswerError(Exception):
    """The program waits for an operation that does not come back, or has ended."""


class Program:
    """One program. `do` has it do one of the operations."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("operations.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to = trio.lowlevel.FdStream(os.dup(self._process.stdin.fileno()))
        self._from = trio.lowlevel.FdStream(os.dup(self._process.stdout.fileno()))
        self._process.stdin.close()
        self._process.stdout.close()

    async def do(self, call: str, *args: object) -> Result:
        """Do one operation there and return what came of it. NoAnswerError after `PATIENCE` seconds."""
        data = marshal.dumps((call, args))  # type: ignore[arg-type]
        with trio.move_on_after(PATIENCE):
            try:
                await self._to.send_all(len(data).to_bytes(4, "little") + data)
                size = int.from_bytes(await self._receive(4), "little")
                answer: Result = marshal.loads(await self._receive(size))  # noqa: S302 - from our own child
                return answer
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                raise NoAnswerError(f"the program ended in {call}") from None
        raise NoAnswerError(f"{call} has not come back for {PATIENCE:g} s")

    async def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = await self._from.receive_some(size - len(data))
            if not part:
                raise trio.BrokenResourceError
            data += part
        return data

    async def end(self) -> None:
        """End it, and wait for that. What it waits for must have been given up by then."""
        if self._process.returncode is not None:
            return
        with trio.CancelScope(shield=True):
            self._process.kill()
            descriptor = os.pidfd_open(self._process.pid)
            try:
                await trio.lowlevel.wait_readable(descriptor)
            finally:
                os.close(descriptor)
            self._process.wait()
            await trio.aclose_forcefully(self._to)
            await trio.aclose_forcefully(self._from)
