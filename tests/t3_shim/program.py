"""Programs that use a mount: processes of their own, told what to do over a pipe.

A process that waits for its own thread's answer can neither be timed out nor killed, so no test touches a mount itself.
What they do there is in `calls`.
"""

from __future__ import annotations

import marshal
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PATIENCE = 40.0  # seconds; what takes longer hangs, on a busy machine too


class StillWaiting(AssertionError):
    """The program got no answer in time."""


class Program:
    """One program. `do` calls one of the functions in `calls`, or of `os`, over there."""

    def __init__(self, uid: int | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("calls.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            bufsize=0,
        )
        self.pid = self._process.pid
        self._received = b""
        if uid is not None:  # over there, because that user may not be able to run this interpreter
            self.do("become", uid)

    def start(self, call: str, *args: object) -> None:
        """Have it do *call*; `wait` gives the result."""
        assert self._process.stdin is not None
        data = marshal.dumps((call, args))
        self._process.stdin.write(len(data).to_bytes(4, "little") + data)

    def wait(self, seconds: float = PATIENCE) -> Any:
        """Return the result of what was started. Raises its OSError, or StillWaiting."""
        assert self._process.stdout is not None
        until = time.monotonic() + seconds
        while len(self._received) < 4 or len(self._received) < 4 + int.from_bytes(self._received[:4], "little"):
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise StillWaiting(f"no result within {seconds} s")
            data = os.read(self._process.stdout.fileno(), 1 << 20)
            if not data:
                raise EOFError("the program has ended")
            self._received += data
        size = 4 + int.from_bytes(self._received[:4], "little")
        good, value = marshal.loads(self._received[4:size])
        self._received = self._received[size:]
        if good:
            return value
        number, text = value
        raise OSError(number, text) if number else AssertionError(text)

    def do(self, call: str, *args: object, seconds: float = PATIENCE) -> Any:
        """Start and wait."""
        self.start(call, *args)
        return self.wait(seconds)

    def fails(self, call: str, *args: object, seconds: float = PATIENCE) -> int:
        """Return the errno of a call that must fail."""
        try:
            result = self.do(call, *args, seconds=seconds)
        except OSError as error:
            return error.errno or 0
        raise AssertionError(f"{call} did not fail but gave {result!r:.200}")

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def ended(self, seconds: float = PATIENCE) -> bool:
        """Whether it ends within *seconds*."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self) -> None:
        """End it, whatever it does."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(40)  # in the kernel it ends when the shim answers, at its deadline at the latest
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
