"""The window of a client on the server's side: where it wants what it reads.

Owns: the descriptors that come during a handshake, and the window that one of them is. Must never: believe an offset
(udf/window.py checks each), or keep a descriptor open that is not needed.
Called by: handshake.py and stream.py, and the block shim's options.py and streams.py.
"""

from __future__ import annotations

import os
import socket

from udf.block.wire import MalformedError
from udf.window import Mapped, NoWindow

_MOST = 4  # descriptors that are kept until it is known what for


class Descriptors:
    """What has come beside the bytes of a handshake."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def receive(self, sock: socket.socket, target: memoryview) -> int:
        """Receive bytes, as `recv_into` does, and what comes with them."""
        data, fds, _, _ = socket.recv_fds(sock, len(target), _MOST)
        target[: len(data)] = data
        self._fds += fds
        if len(self._fds) > _MOST:
            self.drop()
        return len(data)

    def drop(self) -> None:
        """Close them."""
        while self._fds:
            os.close(self._fds.pop())

    def window(self, payload: bytes, *, structured: bool) -> Mapped:
        """The window that came with OPT_WINDOW. Raises MalformedError; no descriptor is left either way."""
        try:
            if payload:
                raise MalformedError("it has a payload")
            if not structured:
                raise MalformedError("structured replies come first")
            if not self._fds:
                raise MalformedError("no descriptor came with it")
            try:
                return Mapped(self._fds[-1])
            except (NoWindow, OSError) as error:
                raise MalformedError(f"it is no window: {error}") from None
        finally:
            self.drop()
