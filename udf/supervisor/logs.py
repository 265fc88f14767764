"""Where a supervisor's log lines go: stderr, with journal levels when systemd reads it, or a bounded file.

Owns: the handlers of the `udf` logger. Must never: wait for who reads them longer than a write takes.
Called by: daemon.py and private.py.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

MAX_FILE = 1024 * 1024

_LEVELS = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))


class _JournalFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = next((number for limit, number in _LEVELS if record.levelno >= limit), 7)
        return "\n".join(f"<{level}>{line}" for line in super().format(record).splitlines())


def to_stderr(environment: Mapping[str, str]) -> None:
    """Log to stderr: times for people, levels for the journal (which has times of its own)."""
    handler = logging.StreamHandler(sys.stderr)
    if _is_journal(environment):
        handler.setFormatter(_JournalFormatter("%(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _install(handler)


class _BoundedFile(logging.FileHandler):
    def emit(self, record: logging.LogRecord) -> None:
        if self.stream is not None and self.stream.tell() > MAX_FILE:
            self.stream.truncate(0)  # opened for appending: the next line is the first one
        super().emit(record)


def to_file(path: Path) -> None:
    """Log to a file of at most about 1 MiB, which starts anew when it is full. Only its owner can read it."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    handler = _BoundedFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _install(handler)


def _install(handler: logging.Handler) -> None:
    logger = logging.getLogger("udf")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _is_journal(environment: Mapping[str, str]) -> bool:
    device, _, inode = environment.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(sys.stderr.fileno())
        return (status.st_dev, status.st_ino) == (int(device), int(inode))
    except (OSError, ValueError):
        return False
