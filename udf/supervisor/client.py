"""A small synchronous client for the control socket, for the command line.

Owns: one connection, the client's side of the Varlink wire, and finding the sockets of daemons and private supervisors.
Must never: import trio or msgspec (`udf status` should be quick), print, or exit. Called by: udf.cli.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from udf.errors import UserError
from udf.supervisor import sockets

INTERFACE = sockets.INTERFACE
PROTOCOL = 1
MAX_MESSAGE = 1024 * 1024
CONNECT_TIMEOUT = 5.0


class ControlError(UserError):
    """The supervisor's answer was an error; `str()` is its sentence."""

    def __init__(self, name: str, sentence: str, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__(sentence)
        self.name = name.rpartition(".")[2]  # Refused, Denied, NotFound, Busy, Failed, …
        self.parameters = dict(parameters or {})

    @property
    def tree(self) -> list[str]:
        """The processes of a failed start, one line each, when that explains something."""
        tree = self.parameters.get("tree")
        return [str(line) for line in tree] if isinstance(tree, list) else []


class NoSupervisorError(UserError):
    """Nobody listens on the socket (exit code 3 of the command line)."""


class Connection:
    """A connection to one supervisor. One call at a time."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._buffer = bytearray()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(CONNECT_TIMEOUT)
        try:
            self._sock.connect(os.fspath(path))
        except PermissionError:
            self._sock.close()
            raise UserError(f"no permission for {path}: ask as root, or as the user whose supervisor it is") from None
        except OSError as exc:
            self._sock.close()
            raise NoSupervisorError(
                f"no supervisor listens on {path} ({exc.strerror or exc}): start `udf daemon`"
            ) from exc
        try:
            self._check_peer()
            self.info = self.call("Info", protocol=PROTOCOL)
            if self.info.get("protocol") != PROTOCOL:
                raise ControlError(
                    "VersionMismatch",
                    f"the supervisor on {path} speaks control protocol {self.info.get('protocol')} and this udf speaks"
                    f" {PROTOCOL}: use the udf that it was started with, or start it again",
                )
        except BaseException:
            self.close()
            raise
        self._sock.settimeout(None)

    def _check_peer(self) -> None:
        # A socket in a place that others can write to may be anybody's; what we send and believe is not for anybody.
        _, uid, _ = struct.unpack("=iII", self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if os.geteuid() != 0 and uid not in (0, os.geteuid()):
            raise UserError(f"the supervisor on {self.path} belongs to the user {uid} and is not trusted")

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close; a stream or a mount that is being made ends with it."""
        self._sock.close()

    def call(self, method: str, /, **parameters: Any) -> dict[str, Any]:
        """One call, one answer. Parameters that are None are left out. ControlError is the supervisor's refusal."""
        self._send(method, parameters, more=False)
        return self._receive()[0]

    def stream(self, method: str, /, **parameters: Any) -> Iterator[dict[str, Any]]:
        """One call and all its answers, until the supervisor says that it was the last."""
        self._send(method, parameters, more=True)
        continues = True
        while continues:
            answer, continues = self._receive()
            yield answer

    def _send(self, method: str, parameters: Mapping[str, Any], *, more: bool) -> None:
        call: dict[str, Any] = {
            "method": method if "." in method else f"{INTERFACE}.{method}",
            "parameters": {key: value for key, value in parameters.items() if value is not None},
        }
        if more:
            call["more"] = True
        try:
            data = json.dumps(call, ensure_ascii=False).encode() + b"\0"
        except UnicodeEncodeError:
            raise UserError("a path or option is not UTF-8 text, which cannot be told: rename it") from None
        if len(data) > MAX_MESSAGE:
            raise UserError("the request is too large")
        try:
            self._sock.sendall(data)
        except OSError as exc:
            raise self._broken() from exc

    def _receive(self) -> tuple[dict[str, Any], bool]:
        while (end := self._buffer.find(b"\0")) < 0:
            try:
                chunk = self._sock.recv(65536)
            except OSError as exc:
                raise self._broken() from exc
            if not chunk:
                raise self._broken()
            self._buffer += chunk
        data = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            reply = json.loads(data)
            parameters = reply.get("parameters") or {}
            error, continues = reply.get("error"), bool(reply.get("continues"))
            if not isinstance(parameters, dict):
                raise TypeError
        except (ValueError, AttributeError, TypeError):
            raise ControlError("Protocol", f"what listens on {self.path} does not speak Varlink") from None
        if error:
            raise _error(str(error), parameters)
        return parameters, continues

    def _broken(self) -> ControlError:
        return ControlError("Disconnected", f"the supervisor on {self.path} has closed the connection")


def _error(name: str, parameters: Mapping[str, Any]) -> ControlError:
    sentence = parameters.get("sentence")
    if not isinstance(sentence, str):
        word = name.rpartition(".")[2]
        detail = parameters.get("parameter") or parameters.get("method") or parameters.get("interface") or ""
        sentence = f"the supervisor refused the call: {word} {detail}".rstrip() + " (is it of another version?)"
    return ControlError(name, sentence, parameters)


def find_daemon(path: str | os.PathLike[str] | None = None) -> Connection | None:
    """A connection to the daemon at `path`, or to this user's, or to the system's if it lets this user in.

    None when no daemon runs. With an explicit path, NoSupervisorError.
    """
    if path is not None:
        return Connection(path)
    for candidate in dict.fromkeys((sockets.daemon_socket(), sockets.ROOT_RUNDIR / INTERFACE)):
        try:
            return Connection(candidate)
        except NoSupervisorError:
            continue
        except ControlError:
            raise
        except UserError:
            continue  # the system's daemon, and its socket is not for us
    return None


def supervisors(path: str | os.PathLike[str] | None = None) -> Iterator[Connection]:
    """Connections to the daemon (if one runs) and to every private supervisor of this user, one after the other.

    With an explicit path only that one. Each connection is closed when the next one is asked for.
    """
    daemon = find_daemon(path)
    if daemon is not None:
        with daemon:
            yield daemon
    if path is not None:
        return
    for private in sockets.private_sockets():
        try:
            connection = Connection(private)
        except NoSupervisorError:
            continue  # it has ended since we looked
        except ControlError as error:
            if error.name != "Disconnected":
                raise
            continue  # it has ended since it took our connection
        with connection:
            yield connection
