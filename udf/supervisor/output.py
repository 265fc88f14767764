"""What a child process prints, as log lines with its name: bounded in rate, length and memory.

Owns: the reading end of one pipe that is a child's stdout and stderr. Must never: let a child wait long for its print,
whatever it prints and however much; let it fill our log or our CPU. Called by: mounts.py.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections import deque

import trio

MAX_LINE = 1000
BURST = 100  # lines at once
RATE = 10.0  # lines per second afterwards
LAST_LINES = 50  # a traceback is longer than its last word
_CHUNK = 64 * 1024
_FLOOD_PAUSE = 0.002  # bounds what a child that prints without end costs us, to about 32 MB/s

log = logging.getLogger("udf.output")


class Output:
    """The pipe of one child."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._read_end, self.write_end = os.pipe()
        fcntl.fcntl(self._read_end, fcntl.F_SETFL, os.O_NONBLOCK)
        self._partial = b""
        self._tokens = float(BURST)
        self._filled = trio.current_time()
        self._suppressed = 0
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self.closed = trio.Event()

    def started(self) -> None:
        """The child has its end now; ours of it is closed, so that we see the end."""
        os.close(self.write_end)
        self.write_end = -1

    @property
    def last_line(self) -> str:
        """The last line that says something, for the text of an event."""
        return self._last[-1] if self._last else ""

    @property
    def last_lines(self) -> list[str]:
        """The last lines that say something, oldest first."""
        return list(self._last)

    async def read(self) -> None:
        """Log what comes, until every process has closed the pipe."""
        try:
            async with trio.lowlevel.FdStream(self._read_end) as stream:
                while chunk := await stream.receive_some(_CHUNK):
                    if self._take(chunk):
                        await trio.sleep(_FLOOD_PAUSE)
                if self._partial:
                    self._line(self._partial)
        finally:
            self._say_suppressed()
            if self.write_end >= 0:
                self.started()
            self.closed.set()

    def _take(self, chunk: bytes) -> bool:
        """Log the lines of a chunk; whether it was part of a flood."""
        self._refill()
        lines = (self._partial + chunk).split(b"\n")
        self._partial = lines.pop()
        if len(self._partial) > MAX_LINE:  # a line without end is cut into lines
            lines.append(self._partial)
            self._partial = b""
        for line in lines[: BURST + 1]:
            self._line(line)
        if len(lines) > BURST + 1:
            self._suppressed += len(lines) - BURST - 1
            self._remember(lines[-1])
        return self._tokens < 1

    def _refill(self) -> None:
        now = trio.current_time()
        self._tokens = min(BURST, self._tokens + (now - self._filled) * RATE)
        self._filled = now
        if self._tokens >= 1:
            self._say_suppressed()

    def _line(self, line: bytes) -> None:
        text = self._remember(line)
        if not text:
            return
        if self._tokens < 1:
            self._suppressed += 1
            return
        self._tokens -= 1
        log.info("%s: %s", self._name, text)

    def _remember(self, line: bytes) -> str:
        text = printable(line[:MAX_LINE])
        if text:
            self._last.append(text)
        return text

    def _say_suppressed(self) -> None:
        if self._suppressed:
            log.info("%s: (%d lines more were not logged)", self._name, self._suppressed)
            self._suppressed = 0


def printable(data: bytes) -> str:
    """Text that cannot steer a terminal or forge a log line."""
    text = data.decode("utf-8", "backslashreplace").rstrip()
    return "".join(char if char.isprintable() or char == "\t" else f"\\x{ord(char):02x}" for char in text)


def sentence(text: str) -> str:
    """A text from a process that we do not trust, as one bounded line."""
    return printable(text.replace("\n", " ").encode("utf-8", "backslashreplace")[:600])
