"""The Varlink wire, server side, on trio: NUL-terminated JSON over a unix stream socket.

Owns: framing, bounds, replies, who the peer is, and the standard interface org.varlink.service.
Must never: know what the methods do, or let one client keep another waiting. Called by: control.py.

The PyPI package `varlink` could do the parsing without I/O (`Service.handle`), but its handlers are synchronous
generators (a mount takes seconds), it hands untrusted JSON to them unchecked where it does not fit the interface, and
it knows no peer credentials. It is the foreign client of the tests instead.
"""

from __future__ import annotations

import errno
import logging
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import trio

from udf.supervisor import rights
from udf.supervisor.spawn import Identity

MAX_MESSAGE = 1024 * 1024
MAX_CONNECTIONS = 128
MAX_CONNECTIONS_OF_OTHERS = 16  # of one user who is neither root nor ours
MAX_WAITING = 4  # calls sent ahead on one connection
SEND_TIMEOUT = 30.0  # a client that reads nothing for so long is cut off
SERVICE = "org.varlink.service"
SO_PEERGROUPS = 59

log = logging.getLogger("udf.control")
T = TypeVar("T")


class ClientGoneError(Exception):
    """The client has closed its end or takes nothing any more: whatever it asked for may end."""


class VarlinkError(Exception):
    """An error reply: its full name and parameters."""

    def __init__(self, name: str, parameters: Mapping[str, Any]) -> None:
        super().__init__(name)
        self.name = name
        self.parameters = dict(parameters)


def invalid_parameter(name: str) -> VarlinkError:
    """The standard error for a parameter that is missing, unknown or of a wrong type."""
    return VarlinkError(f"{SERVICE}.InvalidParameter", {"parameter": name})


@dataclass(frozen=True)
class Peer:
    """Who is at the other end, as the kernel says it."""

    pid: int
    identity: Identity

    @property
    def uid(self) -> int:
        """The user."""
        return self.identity.uid

    @classmethod
    def of(cls, sock: Any) -> Peer:
        """Read it from a connected socket; it was fixed when the peer connected."""
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, gid = struct.unpack("=iII", credentials)
        try:
            groups = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024)
        except OSError as exc:
            # An old kernel, or more than 256 groups, which Python cannot receive: fewer rights, never more.
            if exc.errno not in (errno.ENOPROTOOPT, errno.ERANGE):
                raise
            groups = b""
        return cls(pid, Identity(uid, gid, struct.unpack(f"={len(groups) // 4}I", groups)))


class _Call(msgspec.Struct):
    method: str
    parameters: msgspec.Raw = msgspec.Raw(b"{}")
    more: bool = False
    oneway: bool = False
    upgrade: bool = False


_call_decoder = msgspec.json.Decoder(_Call)
_encode = msgspec.json.Encoder().encode


class Call:
    """One call, as a method sees it."""

    def __init__(self, connection: _Connection, call: _Call) -> None:
        self._connection = connection
        self._call = call
        self.peer = connection.peer
        self.more = call.more

    def parameters(self, kind: type[T]) -> T:
        """The parameters as a struct that forbids unknown fields; InvalidParameter for anything else."""
        raw = bytes(self._call.parameters)
        try:
            return msgspec.json.decode(b"{}" if raw == b"null" else raw, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise invalid_parameter(_parameter_of(str(exc))) from None

    async def reply_more(self, parameters: object) -> None:
        """One answer of several; only when `more` was asked for."""
        if not self._call.oneway:
            await self._connection.send({"parameters": parameters, "continues": True})


Method = Callable[[Call], Awaitable[object]]


@dataclass(frozen=True)
class Service:
    """What is served: methods by full name, interface descriptions by interface name."""

    product: str
    version: str
    url: str
    methods: Mapping[str, Method]
    abandoned: frozenset[str]  # methods that, like every stream, end when their client goes away; others run on
    interfaces: Mapping[str, str]
    error: Callable[[Exception], VarlinkError]  # what a method raised, as a reply


class Server:
    """Serves connections in the caller's nursery."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._connections: Counter[int] = Counter()
        self._calls = 0  # under way whose one answer somebody waits for
        self._none = trio.lowlevel.ParkingLot()
        self._methods: dict[str, Method] = {
            **service.methods,
            f"{SERVICE}.GetInfo": self._get_info,
            f"{SERVICE}.GetInterfaceDescription": self._get_interface_description,
        }

    async def serve(self, sock: socket.socket) -> None:
        """Accept for ever on a listening socket."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        async with trio.open_nursery() as nursery:
            await trio.serve_listeners(self._handle, [listener], handler_nursery=nursery)

    async def quiet(self) -> None:
        """Until each call that is under way has been answered; streams do not count."""
        while self._calls:
            await self._none.park()

    async def _handle(self, stream: trio.SocketStream) -> None:
        async with stream:
            try:
                peer = Peer.of(stream.socket)
            except OSError:
                return  # it has gone already
            connection = _Connection(stream, peer)
            bound = MAX_CONNECTIONS if rights.is_trusted(peer.identity) else MAX_CONNECTIONS_OF_OTHERS
            if self._connections[peer.uid] >= bound:
                await connection.refuse("too many connections: close some of them")
                return
            self._connections[peer.uid] += 1
            try:
                await self._converse(connection)
            finally:
                self._connections[peer.uid] -= 1
                if not self._connections[peer.uid]:
                    del self._connections[peer.uid]

    async def _converse(self, connection: _Connection) -> None:
        """One call after the other. While one runs we go on reading: a client that leaves ends its call."""
        async with trio.open_nursery() as nursery:
            calls_in, calls_out = trio.open_memory_channel[bytes](MAX_WAITING)
            nursery.start_soon(connection.read_messages, calls_in, nursery.cancel_scope)
            async with calls_out:
                async for data in calls_out:
                    if not await self._one(connection, data):
                        break
            nursery.cancel_scope.cancel()

    async def _one(self, connection: _Connection, data: bytes) -> bool:
        """Answer one message; whether the connection goes on."""
        try:
            call = _call_decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False  # not Varlink: there is no reply to something that is no call
        counts = not call.more and not call.oneway
        self._calls += counts
        try:
            with connection.running(abandoned=call.more or call.method in self._service.abandoned) as scope:
                reply = await self._reply(connection, call)
            if scope.cancelled_caught:
                return False
            if not call.oneway:
                await connection.send(reply)
        except ClientGoneError:
            return False
        finally:
            self._calls -= counts
            if not self._calls:
                self._none.unpark_all()
        return True

    async def _reply(self, connection: _Connection, call: _Call) -> dict[str, object]:
        method = self._methods.get(call.method)
        try:
            if call.upgrade:
                raise invalid_parameter("upgrade")
            if method is None:
                raise self._unknown(call.method)
            result = await method(Call(connection, call))
        except VarlinkError as exc:
            return {"error": exc.name, "parameters": exc.parameters}
        except ClientGoneError:
            raise
        except Exception as exc:  # the border: whatever a method raises becomes one error reply
            error = self._service.error(exc)
            return {"error": error.name, "parameters": error.parameters}
        return {"parameters": {} if result is None else result}

    def _unknown(self, name: str) -> VarlinkError:
        interface, _, method = name.rpartition(".")
        if interface in self._service.interfaces or interface == SERVICE:
            return VarlinkError(f"{SERVICE}.MethodNotFound", {"method": method})
        return VarlinkError(f"{SERVICE}.InterfaceNotFound", {"interface": interface})

    async def _get_info(self, call: Call) -> object:
        call.parameters(_NoParameters)
        service = self._service
        return {
            "vendor": "UDF",
            "product": service.product,
            "version": service.version,
            "url": service.url,
            "interfaces": [SERVICE, *service.interfaces],
        }

    async def _get_interface_description(self, call: Call) -> object:
        name = call.parameters(_InterfaceName).interface
        if name == SERVICE:
            return {"description": _SERVICE_DESCRIPTION}
        if name not in self._service.interfaces:
            raise VarlinkError(f"{SERVICE}.InterfaceNotFound", {"interface": name})
        return {"description": self._service.interfaces[name]}


class _NoParameters(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _InterfaceName(msgspec.Struct, forbid_unknown_fields=True):
    interface: str


class _Connection:
    def __init__(self, stream: trio.SocketStream, peer: Peer) -> None:
        self._stream = stream
        self.peer = peer
        self._at_end = False
        self._sending = trio.Lock()
        self._abandoned: trio.CancelScope | None = None

    @contextmanager
    def running(self, *, abandoned: bool) -> Iterator[trio.CancelScope]:
        """A call runs; if it is `abandoned` with its client, the client's end cancels it."""
        with trio.CancelScope() as scope:
            if abandoned:
                if self._at_end:
                    scope.cancel()
                self._abandoned = scope
            try:
                yield scope
            finally:
                self._abandoned = None

    async def read_messages(self, calls: trio.MemorySendChannel[bytes], connection: trio.CancelScope) -> None:
        """Pass on each message until the client's end. One that breaks a bound is cut off."""
        buffer = bytearray()
        async with calls:
            while chunk := await self._receive():
                searched = len(buffer)
                buffer += chunk
                try:
                    while 0 <= (end := buffer.find(b"\0", searched)) <= MAX_MESSAGE:
                        calls.send_nowait(bytes(buffer[:end]))
                        del buffer[: end + 1]
                        searched = 0
                except trio.WouldBlock:
                    await self._cut_off("too many calls at once: wait for their answers", connection)
                except trio.BrokenResourceError:
                    return  # the conversation is over
                if len(buffer) > MAX_MESSAGE:
                    await self._cut_off(f"a message of more than {MAX_MESSAGE} bytes", connection)
        self._at_end = True
        if self._abandoned is not None:
            self._abandoned.cancel()

    async def _receive(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(65536))
        except trio.BrokenResourceError:
            return b""

    async def _cut_off(self, sentence: str, connection: trio.CancelScope) -> None:
        await self.refuse(sentence)
        connection.cancel()
        await trio.lowlevel.checkpoint()

    async def send(self, reply: Mapping[str, object]) -> None:
        """One reply; ClientGoneError when the client does not take it."""
        data = _encode(reply) + b"\0"
        try:
            with trio.fail_after(SEND_TIMEOUT):
                async with self._sending:  # a last word may come while an answer is on its way
                    await self._stream.send_all(data)
        except trio.TooSlowError:
            log.info("a client (process %d) read nothing for %g s and was cut off", self.peer.pid, SEND_TIMEOUT)
            raise ClientGoneError from None
        except trio.BrokenResourceError as exc:
            raise ClientGoneError from exc

    async def refuse(self, sentence: str) -> None:
        """A last word to a client that is cut off; it may not get it."""
        with trio.move_on_after(1), suppress(ClientGoneError):
            await self.send({"error": "io.udf.Supervisor.TooMany", "parameters": {"sentence": sentence}})


def _parameter_of(text: str) -> str:
    """The name of the parameter that a decoding error is about, as far as its text tells."""
    for mark in ("`$.", "field `"):
        if mark in text:
            return text.rpartition(mark)[2].rstrip("`")
    return "parameters"


_SERVICE_DESCRIPTION = """\
# The Varlink Service Interface is provided by every varlink service. It
# describes the service and the interfaces it implements.
interface org.varlink.service

# Get a list of all the interfaces a service provides and information
# about the implementation.
method GetInfo() -> (
  vendor: string,
  product: string,
  version: string,
  url: string,
  interfaces: []string
)

# Get the description of an interface that is implemented by this service.
method GetInterfaceDescription(interface: string) -> (description: string)

# The requested interface was not found.
error InterfaceNotFound (interface: string)

# The requested method was not found
error MethodNotFound (method: string)

# The interface defines the requested method, but the service does not
# implement it.
error MethodNotImplemented (method: string)

# One of the passed parameters is invalid.
error InvalidParameter (parameter: string)

# Client is denied access
error PermissionDenied ()

# Method is expected to be called with 'more' set to true, but wasn't
error ExpectedMore ()
"""
