"""Telling systemd how we are: the sd_notify protocol.

Owns: the datagrams to NOTIFY_SOCKET and the watchdog's interval. Must never: block, or fail because nobody listens.
Called by: daemon.py.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


class Notifier:
    """One service manager, or none."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._sock: socket.socket | None = None
        self._unsaid: dict[str, str] = {}
        if address.startswith(("/", "@")):
            self._address = "\0" + address[1:] if address.startswith("@") else address
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.watchdog = self._interval(environment) if self._sock else None

    @staticmethod
    def _interval(environment: Mapping[str, str]) -> float | None:
        pid = environment.get("WATCHDOG_PID")
        if pid is not None and pid != str(os.getpid()):
            return None  # meant for another process
        try:
            microseconds = int(environment.get("WATCHDOG_USEC", ""))
        except ValueError:
            return None
        return microseconds / 1e6 / 2 if microseconds > 0 else None

    def say(self, **fields: str | int) -> None:
        """Send e.g. READY=1, STATUS=…; what a full socket does not take now is said with the next message."""
        if self._sock is None:
            return
        self._unsaid.update({key: str(value).partition("\n")[0] for key, value in fields.items()})
        text = "\n".join(f"{key}={value}" for key, value in self._unsaid.items())
        try:
            self._sock.sendto(text.encode(), self._address)
        except OSError:
            self._unsaid.pop("WATCHDOG", None)  # a sign of life is only true at its time
        else:
            self._unsaid.clear()

    def close(self) -> None:
        """Nothing more to say."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
