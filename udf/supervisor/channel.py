"""A message channel to a shim or a driver host: SOCK_SEQPACKET, one JSON object per packet, descriptors beside it.

Owns: framing, bounds and the descriptors that arrive. Must never: trust what it receives, or keep a descriptor that
nobody asked for. Called by: mounts.py; the types and their decoders are udf.messages.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import trio

from udf import messages
from udf.errors import ContractError
from udf.supervisor.child import descriptors

SEND_TIMEOUT = 10.0  # a peer that takes no packet for so long is as good as hung
MAX_RATE = 2000  # packets per second; far above any honest peer, far below what would keep our loop busy
_FD_SIZE = array.array("i").itemsize
# The only messages that may bring descriptors, and how many.
_EXPECTED: dict[type, int] = {messages.Mounted: 1}

T = TypeVar("T")


class ChannelClosedError(Exception):
    """The peer's end is closed: its process has ended, or is about to."""


class Channel(Generic[T]):
    """Our end of one control socket. One task receives; any task may send."""

    def __init__(self, sock: socket.socket, decode: Callable[[bytes], T], peer: str) -> None:
        self._sock = trio.socket.from_stdlib_socket(sock)
        self._decode = decode
        self._peer = peer
        self._sending = trio.Lock()
        self._window = 0.0
        self._count = 0

    async def send(self, message: messages.Message, fds: Sequence[int] = ()) -> None:
        """Send one packet; the caller keeps its descriptors. ChannelClosedError when nobody takes it."""
        data = messages.encode(message)
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            with trio.fail_after(SEND_TIMEOUT):
                async with self._sending:
                    await self._sock.sendmsg([data], control, socket.MSG_NOSIGNAL)
        except trio.TooSlowError:
            raise ChannelClosedError(f"{self._peer} takes no messages") from None
        except (OSError, trio.ClosedResourceError) as exc:
            raise ChannelClosedError(f"{self._peer} has closed its control socket") from exc

    async def receive(self) -> tuple[T, list[int]]:
        """The next message and the descriptors that belong to it (the caller's from now on).

        Raises ChannelClosedError at the end, ContractError for anything that the wire does not allow.
        """
        room = socket.CMSG_SPACE(messages.MAX_DESCRIPTORS * _FD_SIZE)
        try:
            data, control, flags, _ = await self._sock.recvmsg(messages.MAX_MESSAGE + 1, room, socket.MSG_CMSG_CLOEXEC)
        except (OSError, trio.ClosedResourceError) as exc:
            raise ChannelClosedError(f"{self._peer} has closed its control socket") from exc
        fds = descriptors(control)
        message: T | None = None
        try:
            if not data:  # no message is empty, so this is the end
                raise ChannelClosedError(f"{self._peer} has closed its control socket")
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ContractError(f"{self._peer} sent a message that is too large")
            self._count_one()
            message = self._decode(data)
            expected = _EXPECTED.get(type(message), 0)
            if len(fds) < expected:
                raise ContractError(f"{self._peer} sent {type(message).__name__} without its descriptor")
            if expected:
                kept, fds = fds[:expected], fds[expected:]
                return message, kept
            return message, []
        finally:
            for fd in fds:
                # A descriptor that nobody asked for; on success with an expected one only the surplus is left here.
                os.close(fd)

    def _count_one(self) -> None:
        now = trio.current_time()
        if now - self._window >= 1.0:
            self._window, self._count = now, 0
        self._count += 1
        if self._count > MAX_RATE:
            raise ContractError(f"{self._peer} sent more than {MAX_RATE} messages in a second")

    def close(self) -> None:
        """Close our end: to the peer that means that the supervisor is gone."""
        self._sock.close()
