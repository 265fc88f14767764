"""The crash matrix's own piece of the link: every packet between a shim and one generation of a driver passes here.

Owns: both ends that are not the shim's and the driver's. What happens at a step, the watcher decides. Like the kernel
it passes on what the driver said before it died, except the reply that is to be lost.
Must never: change, reorder or invent a packet. Called by: bench.py.
"""

from __future__ import annotations

import socket
import struct
from typing import Protocol

import trio

from udf.fuse.structs import IN_HEADER, OUT_HEADER

_PACKET = 1 << 20
_HEAD = struct.Struct("=IIQ")  # length, opcode, unique of a request


class Watcher(Protocol):
    """Who decides at each request and reply."""

    async def on_request(self, opcode: int, unique: int) -> bool:
        """A request is about to be passed on; whether it shall be."""

    async def on_reply(self, unique: int, error: int) -> bool:
        """A reply (or, with 0 for *unique*, a notification) is about to be passed on; whether it shall be."""


class Relay:
    """Between one link to the shim and one to a driver, until the driver's end is closed."""

    def __init__(self, shim: socket.socket, driver: socket.socket, watcher: Watcher) -> None:
        """The sockets are the relay's from now on."""
        for each in (shim, driver):
            each.setblocking(False)
        self._shim = trio.socket.from_stdlib_socket(shim)
        self._driver = trio.socket.from_stdlib_socket(driver)
        self._watcher = watcher
        self.closed = trio.Event()

    async def run(self) -> None:
        """Pass packets on, until the driver has ended and all that it said is passed on, or the shim has ended."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._to_driver, nursery.cancel_scope)
                await self._from_driver()
                nursery.cancel_scope.cancel()
        finally:
            self._driver.close()
            self._shim.close()
            self.closed.set()

    async def _to_driver(self, scope: trio.CancelScope) -> None:
        passes = True
        while data := await _receive(self._shim):
            _, opcode, unique = _HEAD.unpack_from(data) if len(data) >= IN_HEADER.size else (0, 0, 0)
            # A driver that is to die gets nothing any more; its successor is asked again.
            passes = passes and await self._watcher.on_request(opcode, unique)
            if passes and not await _send(self._driver, data):
                passes = False
        scope.cancel()  # the shim has closed its end

    async def _from_driver(self) -> None:
        left, passes = 0, True  # a long reply may come in several packets
        while data := await _receive(self._driver):
            if left <= 0:
                length, error, unique = OUT_HEADER.unpack_from(data) if len(data) >= OUT_HEADER.size else (0, 0, 0)
                left, passes = length, await self._watcher.on_reply(unique, error)
            left -= len(data)
            if passes and not await _send(self._shim, data):
                return


async def _receive(sock: trio.socket.SocketType) -> bytes:
    """The next packet; nothing at the end."""
    while True:
        try:
            return await sock.recv(_PACKET)
        except ConnectionResetError:
            continue  # told once when the peer ended with packets unread; what it had sent before comes now


async def _send(sock: trio.socket.SocketType, data: bytes) -> bool:
    try:
        await sock.send(data)
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True
