"""An NBD server: units of a block driver, or whatever else reads and writes by ranges, to any NBD client.

Owns: connections, which exports there are, and the host's side of a block driver's link. Must never: let anything that
a client does reach its caller. Called by: the driver host (`serve_link`), the block shim (`Server`), tests.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import traceback
from collections.abc import Awaitable, Callable, Mapping

import trio

from udf.block import wire
from udf.block.access import Access
from udf.block.handshake import Claims, Handshake
from udf.block.requests import Connection
from udf.block.stream import Ended, Stream
from udf.driver.block import BlockSource, BlockUnit
from udf.errors import ContractError

HANDSHAKE_TIMEOUT = 30.0
MAX_CONNECTIONS = 64
MAX_UNITS = 256
_PAUSE = 0.1  # seconds without new connections when there are no descriptors for them
_MAX_FAULTS = 100  # kinds of mistakes that are reported; beyond that only the error tells

Units = Callable[[], Awaitable[Mapping[str, BlockUnit]]]
Report = Callable[[str, str, str], None]
"""Takes the operation, one line, and the traceback."""

_log = logging.getLogger("udf.block.server")


class Server:
    """Serves the same exports to many connections."""

    def __init__(self, units: Units, *, claims: Claims | None = None, report: Report | None = None) -> None:
        """`units` is asked whenever a client asks which exports there are: by name, "" is the default one.

        `claims` decides who may write. `report` is told of mistakes in the units, of each kind once.
        """
        self._units = units
        self._accesses: list[Access] = []
        self._claims = claims
        self._report = report or _log_fault
        self._reported: set[tuple[str, type]] = set()
        self._connections = 0

    async def _exports(self) -> dict[str, Access]:
        units = await self._units()
        if len(units) > MAX_UNITS:
            raise ContractError(f"{len(units)} units are more than {MAX_UNITS}")
        exports: dict[str, Access] = {}
        accesses: list[Access] = []
        for name, unit in units.items():
            if not isinstance(name, str) or len(name.encode()) > wire.MAX_NAME or not isinstance(unit, BlockUnit):
                raise ContractError(f"{name!r:.80} and {unit!r:.80} are not a name and a unit")
            # One Access for one unit, whatever its names are, as long as it is there.
            access = next((known for known in (*self._accesses, *accesses) if known.unit is unit), None) or Access(unit)
            exports[name] = access
            accesses.append(access)
        self._accesses = accesses
        return exports

    async def listen(self, listener: socket.socket) -> None:
        """Serve whoever connects, until cancelled."""
        listening = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    peer = await listening.accept()
                except OSError as exc:
                    if exc.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                        raise
                    await trio.sleep(_PAUSE)  # until others have closed something: nothing tells when
                    continue
                nursery.start_soon(self.serve, socket.socket(fileno=peer.socket.detach()))

    async def serve(self, sock: socket.socket) -> None:
        """Serve one connected socket until it ends; it is closed then. Nothing that the peer does raises."""
        if self._connections >= MAX_CONNECTIONS:
            sock.close()
            return
        self._connections += 1
        stream = Stream(sock)
        connection = Connection(stream, self._claims, self.fault)
        try:
            handshake = Handshake(stream, self._exports, self._claims, connection, self.fault)
            session = None
            with trio.move_on_after(HANDSHAKE_TIMEOUT):
                session = await handshake.run()
            if session is not None:
                await connection.run(session)
        except (Ended, wire.WireError) as exc:
            _log.debug("a connection ended: %s", exc)
        except Exception as exc:
            self.fault("connect", exc)
        finally:
            self._connections -= 1
            if self._claims is not None:
                self._claims.drop(connection)
            stream.close()

    def fault(self, operation: str, exc: BaseException) -> None:
        """Report a mistake, once for each operation and kind of it."""
        kind = operation, type(exc)
        if kind in self._reported or len(self._reported) >= _MAX_FAULTS:
            return
        self._reported.add(kind)
        self._report(operation, f"{type(exc).__name__}: {exc}"[:1000], "".join(traceback.format_exception(exc)))


def _log_fault(operation: str, line: str, text: str) -> None:
    _log.error("%s: %s\n%s", operation, line, text)


# ---- the host's side of a block driver's link


async def serve_link(
    link: socket.socket,
    driver: BlockSource,
    *,
    report: Report | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve a driver's units on every connection that the shim hands over, until the shim closes the link.

    `link` is a SOCK_SEQPACKET socket and stays open. Each packet that comes is one byte with one descriptor, a stream
    socket; each that goes is a JSON object, {"t": "changed"} when the driver says so.
    """
    server = Server(driver.units, report=report)
    link.setblocking(False)
    changed = trio.Event()

    def tell() -> None:
        changed.set()

    async def pass_on() -> None:
        nonlocal changed
        packet = json.dumps({"t": "changed"}).encode()
        while True:
            await changed.wait()
            changed = trio.Event()
            while True:
                try:
                    link.send(packet)
                    break
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(link)
                except OSError:
                    return  # whoever reads the link sees its end

    driver._units_listener = tell
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pass_on)
            task_status.started()
            while True:
                sockets = await _receive(link)
                if sockets is None:
                    nursery.cancel_scope.cancel()
                    return
                for sock in sockets:
                    nursery.start_soon(server.serve, sock)
    finally:
        driver._units_listener = None


async def _receive(link: socket.socket) -> list[socket.socket] | None:
    """The sockets that came with the next packet; None at the end of the link."""
    while True:
        await trio.lowlevel.wait_readable(link)
        try:
            data, fds, flags, _ = socket.recv_fds(link, 64, 4, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            continue
        except OSError:
            return None
        if not data and not fds:
            return None
        sockets = []
        for fd in fds:
            try:
                sock = socket.socket(fileno=fd)
            except OSError:
                os.close(fd)
                continue
            if sock.type != socket.SOCK_STREAM or data != b"n" or flags & socket.MSG_CTRUNC:
                sock.close()
                continue
            sockets.append(sock)
        return sockets
