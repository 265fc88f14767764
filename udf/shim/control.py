"""The shim's side of its control socket: JSON messages with the supervisor, one a packet, descriptors beside them.

The supervisor is trusted; the end of the socket means that it is gone. Typed on the other side (udf.messages).
"""

from __future__ import annotations

import array
import json
import os
import socket
from collections import deque
from typing import Any

_MAX_MESSAGE = 64 * 1024
_MAX_DESCRIPTORS = 4
_BACKLOG = 256  # messages that are kept for a supervisor that does not read; then the oldest go


class SupervisorGone(Exception):
    """The other end is closed."""


class Control:
    """The socket, non-blocking except where a message must not be lost."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)
        self._socket.settimeout(5.0)
        self._backlog: deque[bytes] = deque(maxlen=_BACKLOG)
        self.fd = fd

    def receive(self, timeout: float | None = 5.0) -> tuple[dict[str, Any], list[int]]:
        """Receive one message and its descriptors. Raises SupervisorGone, TimeoutError."""
        self._socket.settimeout(timeout)
        try:
            data, ancillary, _, _ = self._socket.recvmsg(
                _MAX_MESSAGE, socket.CMSG_SPACE(4 * _MAX_DESCRIPTORS), socket.MSG_CMSG_CLOEXEC
            )
        except TimeoutError:
            raise
        except OSError as error:
            raise SupervisorGone(str(error)) from error
        descriptors = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(payload[: len(payload) - len(payload) % 4])
        if not data:
            for fd in descriptors:
                os.close(fd)
            raise SupervisorGone("end of file")
        message: dict[str, Any] = json.loads(data)
        return message, list(descriptors)

    def post(self, message: dict[str, object]) -> None:
        """Send one message without waiting; what a supervisor that is stopped does not take comes later, in order.

        A heartbeat that is late says nothing and is left out. Raises SupervisorGone.
        """
        if message["t"] != "heartbeat" or not self._backlog:
            self._backlog.append(json.dumps(message, separators=(",", ":")).encode()[:_MAX_MESSAGE])
        self.flush(0.0)

    def flush(self, seconds: float) -> None:
        """Send what waits, each not longer than so many seconds. Raises SupervisorGone."""
        self._socket.settimeout(seconds)
        while self._backlog:
            try:
                self._socket.send(self._backlog[0])
            except (BlockingIOError, TimeoutError):
                return
            except OSError as error:
                raise SupervisorGone(str(error)) from error
            self._backlog.popleft()

    def send(self, message: dict[str, object], fds: tuple[int, ...] = ()) -> None:
        """Send one message. Raises SupervisorGone, also when it has not read for five seconds."""
        data = json.dumps(message, separators=(",", ":")).encode()[:_MAX_MESSAGE]
        self._socket.settimeout(5.0)
        try:
            if fds:
                socket.send_fds(self._socket, [data], list(fds))
            else:
                self._socket.send(data)
        except OSError as error:
            raise SupervisorGone(str(error)) from error
