"""NBD URIs and how to connect to them.

Owns: the syntax (NetworkBlockDevice/nbd, doc/uri.md, without TLS) and the first connect. Must never: resolve or
connect while only a URI is read. Called by: client.py.
"""

from __future__ import annotations

import errno
import socket
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import trio

from udf.block import wire
from udf.errors import UserError

MAX_URI = 16 * 1024


class Place(NamedTuple):
    """Where an export is: a unix socket's path, or a host and its port."""

    path: str
    host: str
    port: int
    export: str


def parse(uri: str) -> Place:
    """nbd+unix:///EXPORT?socket=PATH or nbd://HOST[:PORT]/EXPORT; UserError says what is wrong with it."""
    if len(uri) > MAX_URI or "\0" in uri:
        raise UserError("this is no NBD URI: it is too long, or has a NUL in it")
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname or "", parts.port or wire.PORT
    except ValueError as exc:
        raise UserError(f"{uri}: this is no URI: {exc}") from None
    export = unquote(parts.path.removeprefix("/"))
    if parts.scheme == "nbd+unix":
        path = parse_qs(parts.query).get("socket", [""])[0]
        if not path:
            raise UserError(f"{uri}: the URI must name a socket, as in nbd+unix:///?socket=/run/disk.sock")
        return Place(path, "", 0, export)
    if parts.scheme == "nbd":
        return Place("", host or "localhost", port, export)
    raise UserError(f"{uri}: the URI must begin with nbd:// or nbd+unix://")


async def connect(place: Place) -> socket.socket:
    """Connect; OSError if nobody listens there."""
    if not place.path:
        stream = await trio.open_tcp_stream(place.host, place.port)
        return socket.socket(fileno=stream.socket.detach())
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await sock.connect(place.path)
    except BaseException as exc:
        sock.close()
        if isinstance(exc, OSError) and exc.errno is None:
            raise OSError(errno.ENAMETOOLONG, f"{place.path}: {exc}") from None  # as sockets say it
        raise
    return socket.socket(fileno=sock.detach())
