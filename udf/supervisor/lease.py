"""A driver's hold on one device: a connection for each generation, and the end of all of them.

Owns: `Lease`, what a bus's device is to the rest of the supervisor, and `Tenancy`, the connection of the generation
that serves now: opened for it, watched for its end, shut down behind it.
Must never: know a bus, speak on a connection, or let two generations have one at once.
Called by: the binder (makes leases), recovery.py (uses them).

The supervisor keeps a duplicate of the connection. It is shut down when the generation is dead (the fence: nothing that
it had sent on can reach the device behind its successor's back), and its end tells of an unplug where a bus does not.
"""

from __future__ import annotations

import errno
import select
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress

import trio

from udf import messages
from udf.errors import DeviceGone
from udf.supervisor.bell import Bell

REOPEN_TIMEOUT = 5.0  # for a device that is busy still: its server learns of the fence in a moment
ASK_TIMEOUT = 1.0
_FIRST_WAIT, _LONGEST_WAIT = 0.005, 0.2


class Lease(ABC):
    """One arrival of a device, bound to one driver. Made by who knows the bus.

    A lease ends once: `end` says that the device is gone (the bus says so), and there is no way back: the same device
    plugged in again is another arrival, with another lease.
    """

    def __init__(self, spec: messages.DeviceSpec) -> None:
        self.spec = spec  # what each generation is told of the device
        self.gone = False
        self._listeners: list[Callable[[], None]] = []

    @property
    def name(self) -> str:
        """The device in a few words, for people; it may quote the device."""
        product = " ".join(filter(None, (self.spec.manufacturer, self.spec.product)))
        return f"{product} ({self.spec.port})" if product else self.spec.port or self.spec.key

    @abstractmethod
    async def open(self) -> socket.socket:
        """A new connection for one generation, the caller's own; DeviceGone, or an OSError (EBUSY: try again)."""

    @abstractmethod
    def close(self) -> None:
        """The driver's instance has ended and opens no connection any more. Called once."""

    def end(self) -> None:
        """The device is gone. Harmless when that is known."""
        if not self.gone:
            self.gone = True
            for listener in self._listeners:
                listener()
            self._listeners.clear()

    def tell(self, listener: Callable[[], None]) -> None:
        """Have `listener` called once, in the moment when the device is gone, or now if it is. It must not wait."""
        if self.gone:
            listener()
        else:
            self._listeners.append(listener)


class Tenancy:
    """The connection of the present generation."""

    def __init__(self, lease: Lease, bell: Bell) -> None:
        self.lease = lease
        self.is_cut = False  # it ended although nobody of ours ended it
        self._bell = bell
        self._connection: socket.socket | None = None
        self._closed = False
        self._watching: trio.CancelScope | None = None

    async def open(self, nursery: trio.Nursery) -> int:
        """A descriptor for the next generation; ours stays. DeviceGone, or the OSError of the last attempt."""
        self.fence()
        deadline, wait = trio.current_time() + REOPEN_TIMEOUT, _FIRST_WAIT
        while True:
            if self.lease.gone:
                raise DeviceGone("the device is gone")
            try:
                connection = await self.lease.open()
                break
            except DeviceGone:
                self.lease.end()
                raise
            except OSError as exc:
                if exc.errno != errno.EBUSY or trio.current_time() > deadline:
                    raise
            await self._bell.within(wait, lambda: self.lease.gone)
            wait = min(2 * wait, _LONGEST_WAIT)
        if self._closed:  # meanwhile; nobody else would close this one
            connection.close()
            raise DeviceGone("the endpoint has ended")
        self._connection = connection
        self.is_cut = False
        self._watching = trio.CancelScope()
        nursery.start_soon(self._watch, connection, self._watching)
        return connection.fileno()

    async def ask(self) -> None:
        """The connection has ended, and nobody has said why: is the device there? Bounded in time."""
        with trio.move_on_after(ASK_TIMEOUT), suppress(OSError):
            try:
                (await self.lease.open()).close()
            except DeviceGone:
                self.lease.end()

    def fence(self) -> None:
        """The generation is dead: nothing of what it has sent goes on to the device."""
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        if self._connection is not None:
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            self._connection.close()
            self._connection = None

    def close(self) -> None:
        """The endpoint has ended."""
        self._closed = True
        self.fence()
        self.lease.close()

    def cut(self) -> None:
        """End the connection under a driver that lives: its transfers fail as they do when the device is gone."""
        if self._connection is not None:
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)

    async def _watch(self, connection: socket.socket, scope: trio.CancelScope) -> None:
        # Only for the end: what the device says is for the driver, and would make the socket itself readable. The epoll
        # is a descriptor of its own, so that the connection may be closed while this still waits.
        with scope, select.epoll() as end:
            end.register(connection.fileno(), select.EPOLLRDHUP)
            await trio.lowlevel.wait_readable(end.fileno())
            self.is_cut = True
            self._bell.ring()
