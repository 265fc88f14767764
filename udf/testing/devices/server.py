"""The operations of USB/IP: list and import for any client, watch and control for our own.

Owns: connections before an import, and those that watch or command. Must never: read more than an operation has,
keep a silent client, or let a client from the network command: only a unix socket may (its file is 0600).
Called by: emulator.py, in the loop's thread.

As with usbipd, a connection is for one operation; the server closes it afterwards, or speaks URBs after an import.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from udf.testing.devices.loop import ENDED, READ, WRITE
from udf.usb.usbip import (
    BUSID_SIZE,
    COUNT,
    OPERATION,
    REPLY_DEVLIST,
    REPLY_IMPORT,
    REQUEST_DEVLIST,
    REQUEST_IMPORT,
    ST_DEV_BUSY,
    ST_NODEV,
    ST_OK,
    VERSION,
)

if TYPE_CHECKING:
    from udf.testing.devices.emulator import Emulator
    from udf.testing.devices.plugged import Plugged

log = logging.getLogger("udf.devices")
REQUEST_WATCH, REQUEST_CONTROL = 0x8055, 0x8056  # private to this project; usbipd closes on them
PATIENCE = 10.0  # seconds for a client to say what it wants
PAUSE = 0.5  # seconds without accepting when the system has no descriptor left
MAX_LINE = 64 * 1024
MAX_UNSENT = 8 * 1024 * 1024  # a watcher that does not read is cut off; it can list again
MAX_CLIENTS = 1024


def describe(plugged: Plugged) -> dict[str, Any]:
    """A device as WATCH tells of it."""
    device = plugged.device
    configurations: list[str] = []
    while (data := device.configuration_descriptor(len(configurations))) is not None and len(configurations) < 255:
        configurations.append(base64.b64encode(data).decode())
    return {
        "busid": plugged.busid,
        "arrival": plugged.arrival,
        "busnum": plugged.busnum,
        "devnum": plugged.devnum,
        "speed": int(device.speed),
        "device_descriptor": base64.b64encode(device.device_descriptor()).decode(),
        "configurations": configurations,
        "configuration": device.configuration,
        "manufacturer": device.manufacturer or "",
        "product": device.product_name or "",
        "serial": device.serial or "",
        "name": plugged.name,
        "imported": plugged.imported,
    }


class Listener:
    """Accepts, as long as there are not too many."""

    def __init__(self, emulator: Emulator, sock: socket.socket, *, trusted: bool) -> None:
        self._emulator = emulator
        self._sock = sock
        self._trusted = trusted
        sock.setblocking(False)
        emulator.loop.add(sock.fileno(), READ, self._accept)

    def close(self) -> None:
        """Accept no more."""
        self._emulator.loop.remove(self._sock.fileno())
        self._sock.close()

    def _accept(self, _events: int) -> None:
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, ConnectionError):
            return  # it is gone already
        except OSError as error:
            # No descriptor is left, and epoll would say at once that somebody waits.
            log.warning("cannot accept a connection: %s", error.strerror)
            self._emulator.loop.change(self._sock.fileno(), 0)
            self._emulator.loop.later(PAUSE, self._resume)
            return
        if len(self._emulator.clients) >= MAX_CLIENTS:
            sock.close()
            return
        Client(self._emulator, sock, trusted=self._trusted)

    def _resume(self) -> None:
        if self._sock.fileno() >= 0:
            self._emulator.loop.change(self._sock.fileno(), READ)


class Client:
    """A connection that is not (yet) an import."""

    def __init__(self, emulator: Emulator, sock: socket.socket, *, trusted: bool, commands: bool = False) -> None:
        """*commands*: it speaks commands from the first byte on, and the emulator ends with it."""
        self._emulator = emulator
        self._loop = emulator.loop
        self._sock = sock
        self._fd = sock.fileno()
        self._trusted = trusted
        self._input = bytearray()
        self._unsent = bytearray()
        self._last = False  # close when everything is sent
        self._vital = commands
        self.watches = False
        self._wants: Callable[[], None] = self._commands if commands else self._operation
        sock.setblocking(False)
        emulator.clients.add(self)
        self._loop.add(self._fd, READ, self._ready)
        self._timer = self._loop.later(PATIENCE, lambda: None if commands else self.close())

    def close(self) -> None:
        """End the connection."""
        if self._release():
            self._sock.close()
            if self._vital:
                self._loop.soon(self._emulator.stop)

    def tell(self, message: dict[str, Any]) -> None:
        """One line."""
        self._send(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    def _release(self) -> bool:
        """Not ours any more; False if it was not before."""
        if self not in self._emulator.clients:
            return False
        self._timer.cancel()
        self._emulator.clients.discard(self)
        self._loop.remove(self._fd)
        return True

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if not events & (READ | ENDED) or self not in self._emulator.clients:
            return
        # Until an operation is known, exactly its bytes are read: what follows an import belongs to the session.
        line_wise = self.watches or self._wants == self._commands
        try:
            data = self._sock.recv(MAX_LINE if line_wise else self._missing())
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._input += data
        self._wants()

    def _missing(self) -> int:
        size = OPERATION.size
        if len(self._input) >= size:
            size += BUSID_SIZE
        return size - len(self._input)

    # --- operations ---

    def _operation(self) -> None:
        if len(self._input) < OPERATION.size:
            return
        version, code, _status = OPERATION.unpack_from(self._input)
        if version != VERSION:
            log.info("a client speaks version %#06x of USB/IP, not %#06x", version, VERSION)
            self.close()
        elif code == REQUEST_DEVLIST:
            self._list()
        elif code == REQUEST_IMPORT:
            if len(self._input) >= OPERATION.size + BUSID_SIZE:
                self._import(bytes(self._input[OPERATION.size :]))
        elif code == REQUEST_WATCH:
            self._begin_watch()
        elif code == REQUEST_CONTROL and self._trusted:
            self._timer.cancel()
            self._input.clear()
            self._wants = self._commands
        else:
            log.info("a client asks for operation %#06x", code)
            self.close()

    def _list(self) -> None:
        records = [each.record_for_list() for each in self._emulator.present() if not each.imported]
        self._last = True
        self._send(
            OPERATION.pack(VERSION, REPLY_DEVLIST, ST_OK)
            + COUNT.pack(len(records))
            + b"".join(record.pack(interfaces=True) for record in records)
        )

    def _import(self, raw: bytes) -> None:
        busid = raw.partition(b"\0")[0].decode(errors="replace")
        plugged = next((each for each in self._emulator.present() if each.busid == busid), None)
        status = ST_NODEV if plugged is None else ST_DEV_BUSY if plugged.imported else ST_OK
        reply = OPERATION.pack(VERSION, REPLY_IMPORT, status)
        if plugged is None or status != ST_OK:
            self._last = True
            self._send(reply)
            return
        reply += plugged.record_for_list().pack(interfaces=False)
        try:
            sent = self._sock.send(reply)
        except OSError:
            sent = 0
        if sent != len(reply):  # 320 bytes into an empty buffer: whoever has none is no client
            self.close()
            return
        self._release()
        plugged.open(self._sock)

    # --- watch and control ---

    def _begin_watch(self) -> None:
        self._timer.cancel()
        self._input.clear()
        self.watches = True
        self._wants = self._input.clear  # a watcher has nothing to say
        self.tell({"t": "devices", "devices": [describe(each) for each in self._emulator.present()]})

    def _commands(self) -> None:
        while b"\n" in self._input:
            line, _, rest = bytes(self._input).partition(b"\n")
            self._input[:] = rest
            self.tell(self._emulator.command(line))
        if len(self._input) > MAX_LINE:
            self.close()

    # --- out ---

    def _send(self, data: bytes) -> None:
        if self not in self._emulator.clients:
            return
        self._unsent += data
        if len(self._unsent) > MAX_UNSENT:
            self.close()
            return
        self._flush()

    def _flush(self) -> None:
        try:
            sent = self._sock.send(self._unsent) if self._unsent else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close()
            return
        del self._unsent[:sent]
        if self._last and not self._unsent:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
            self.close()
            return
        self._loop.change(self._fd, READ | (WRITE if self._unsent else 0))
