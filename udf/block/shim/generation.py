"""One generation of the driver: its link, and the opening of its units' connections.

Owns: the link, the sockets that were sent over it, and which of them are in use. Must never: know whether there was a
generation before; what was found is told to recovery.py.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from functools import partial

from udf.block.shim.driver import DriverConnection
from udf.block.shim.streams import Ended
from udf.block.shim.terms import BrokenDriver

_BUFFER = 2 << 20
_SO_SNDBUFFORCE = 32
_MOST_PACKETS = 64  # of the driver's on its link in one turn


def enlarge(sock: socket.socket) -> None:
    """A request's payload should fit into a socket: each part of it that does not costs two wake-ups."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
    except OSError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)  # cut to wmem_max by the kernel


class Look:
    """One look at what units the driver has: it ends with a connection for each."""

    def __init__(self, generation: Generation, done: Callable[[dict[str, DriverConnection]], None]) -> None:
        self._generation = generation
        self._done = done
        self._wanted: list[str] = []
        self._opened: dict[str, DriverConnection] = {}
        self._listing = generation.connect()
        self._listing.ask_names(self._listed)

    def _listed(self, names: list[str]) -> None:
        self._wanted = names
        for name in names:
            self._generation.connect().open(name, partial(self._on_open, name))
        if not names:
            self._finish()

    def _on_open(self, name: str, connection: DriverConnection) -> None:
        self._opened[name] = connection
        if len(self._opened) == len(self._wanted):
            self._finish()

    def _finish(self) -> None:
        self._generation.release(self._listing)
        self._done({name: self._opened[name] for name in self._wanted})


class Generation:
    """The link and what hangs on it."""

    def __init__(
        self,
        fd: int,
        number: int,
        watch: Callable[[DriverConnection], None],
        forget: Callable[[DriverConnection], None],
    ) -> None:
        self.link = socket.socket(fileno=fd)
        self.link.setblocking(False)
        self.number = number
        self.connections: set[DriverConnection] = set()
        self._watch = watch
        self._forget = forget

    def connect(self) -> DriverConnection:
        """Make a connection to the driver. Raises Ended."""
        ours, theirs = socket.socketpair()
        try:
            enlarge(ours)
            enlarge(theirs)
            with theirs:
                socket.send_fds(self.link, [b"n"], [theirs.fileno()])
        except OSError as error:
            ours.close()
            raise Ended(str(error)) from None
        connection = DriverConnection(ours)
        self.connections.add(connection)
        self._watch(connection)
        return connection

    def release(self, connection: DriverConnection) -> None:
        """Let go of a connection that is not needed."""
        if connection in self.connections:
            self.connections.remove(connection)
            if connection.arena is not None:
                connection.arena.end()
            self._forget(connection)

    def receive(self) -> bool:
        """Take what the driver says on its link; whether its units have changed. Raises Ended, BrokenDriver."""
        changed = False
        for _ in range(_MOST_PACKETS):
            try:
                data = self.link.recv(4096)
            except (BlockingIOError, InterruptedError):
                return changed
            except OSError as error:
                raise Ended(str(error)) from None
            if not data:
                raise Ended("the driver closed its link")
            try:
                message = json.loads(data)
            except (ValueError, RecursionError):
                raise BrokenDriver("link", "a packet on its link is not JSON") from None
            if not isinstance(message, dict):
                raise BrokenDriver("link", "a packet on its link is not an object")
            changed = changed or message.get("t") == "changed"
        return changed

    def drain(self) -> None:
        """Take all replies that have come: they count, whatever has become of who sent them. Raises BrokenDriver."""
        for connection in list(self.connections):
            try:
                connection.on_readable(drain=True)
            except Ended:
                pass
