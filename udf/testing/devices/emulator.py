"""A bus of emulated devices: ports, a USB/IP server, and the thread in which all of it happens.

    with Emulator() as bus:
        stick = bus.plug(Storage("stick.img"))
        connection = bus.connect(stick)      # a socket that speaks URBs
        stick.unplug()

Owns: which device is in which port, names, arrivals, the list of clients. Must never: leave its thread, its sockets or
their files behind. Called by: tests in their own process, `python -m udf.testing.devices` as a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from udf.errors import UserError
from udf.testing.devices.device import Device
from udf.testing.devices.faults import Rule
from udf.testing.devices.loop import Loop
from udf.testing.devices.plugged import Plugged
from udf.testing.devices.server import Client, Listener, describe
from udf.usb.usbip import MAX_DEVICES

log = logging.getLogger("udf.devices")
_PORTS = 126  # addresses of one bus, without the default one and the root hub
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Emulator:
    """Start it with `with`, or start() and stop()."""

    def __init__(self, path: str | os.PathLike[str] | None = None, *, listen: tuple[str, int] | None = None) -> None:
        """*path*: where its unix socket shall be; None: in a directory of its own. *listen*: TCP too; port 0: any."""
        self._own_directory: tempfile.TemporaryDirectory[str] | None = None
        self._path = os.fspath(path) if path is not None else None
        self._listen = listen
        self.address: tuple[str, int] | None = None  # where TCP listens
        self.loop = Loop()
        self.clients: set[Client] = set()
        self.closed = False
        self._on_end: list[Callable[[], object]] = []
        self._listeners: list[Listener] = []
        self._plugged: dict[str, Plugged] = {}
        self._arrivals = 0
        self._devnums: dict[int, int] = {}
        self._thread: threading.Thread | None = None

    # --- life ---

    def start(self) -> None:
        """Listen and work. OSError if the path or the address is taken."""
        if self._path is None:
            self._own_directory = tempfile.TemporaryDirectory(prefix="udf-usb-")
            self._path = os.path.join(self._own_directory.name, "usbip.sock")
        sockets: list[tuple[socket.socket, bool]] = []
        try:
            sockets.append((_unix(self._path), True))
            if self._listen is not None:
                tcp = socket.create_server(
                    self._listen, family=socket.AF_INET6 if ":" in self._listen[0] else socket.AF_INET
                )
                sockets.append((tcp, False))
                self.address = tcp.getsockname()[:2]
        except BaseException:
            for sock, _ in sockets:
                sock.close()
            if not sockets:
                self._path = None  # it is somebody else's
            self.stop()
            raise
        self._listeners = [Listener(self, sock, trusted=trusted) for sock, trusted in sockets]
        self._thread = threading.Thread(target=self._run, name="udf-devices", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End all devices and connections; wait for that, unless the emulator itself calls."""
        self.loop.soon(self._close)
        if self._thread is None and not self.loop.ended:
            self._run()  # it was never started: there is only the loop to be ended
        elif self._thread is not None and not self.loop.inside:
            self._thread.join()

    def __enter__(self) -> Emulator:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def path(self) -> str:
        """Its unix socket."""
        assert self._path is not None, "the emulator is not started"
        return self._path

    # --- devices, from any thread ---

    def plug(self, device: Device, name: str | None = None, faults: Iterable[str | Rule] = ()) -> Plugged:
        """Put a device into the first free port. UserError if the name is taken or a fault is wrong."""
        rules = list(faults)
        return self.loop.call(lambda: self._plug(device, name, rules))

    def unplug(self, plugged: Plugged) -> None:
        """Pull a device and forget it; its port and its name are free again."""
        self.loop.call(lambda: self._forget(plugged))

    def connect(self, plugged: Plugged) -> socket.socket:
        """A connection to a device that is imported already. OSError EBUSY or ENODEV."""
        return plugged.connect()

    def find(self, name: str) -> Plugged:
        """By name. UserError if there is none."""
        plugged = self._plugged.get(name)
        if plugged is None:
            raise UserError(f"No emulated device is called {name!r}: `udf devices` lists those that are plugged in.")
        return plugged

    def adopt(self, control: socket.socket) -> None:
        """Take commands from this connection, and end when it ends."""

        def adopt() -> None:
            client = Client(self, control, trusted=True, commands=True)
            client.tell({"t": "ready", "socket": self.path, "listen": list(self.address) if self.address else None})

        self.loop.call(adopt)

    def when_ended(self, call: Callable[[], object]) -> None:
        """Call when it has ended by itself or by stop(), in its thread."""
        self._on_end.append(call)

    # --- in the loop's thread ---

    def present(self) -> Sequence[Plugged]:
        """What is plugged in, by ports."""
        return sorted((p for p in self._plugged.values() if p.present), key=lambda p: (p.busnum, p.port))

    def next_arrival(self, plugged: Plugged) -> tuple[int, int]:
        """The number of an arrival and the device's address on its bus, not used by another one."""
        self._arrivals += 1
        taken = {p.devnum for p in self._plugged.values() if p.present and p.busnum == plugged.busnum}
        devnum = self._devnums.get(plugged.busnum, 1)
        while True:
            devnum = devnum + 1 if devnum < 127 else 2
            if devnum not in taken:
                break
        self._devnums[plugged.busnum] = devnum
        return self._arrivals, devnum

    def tell(self, what: str, plugged: Plugged) -> None:
        """Tell who watches."""
        watchers = [each for each in self.clients if each.watches]
        if not watchers:
            return
        message = {"busid": plugged.busid, "arrival": plugged.arrival} if what == "removed" else describe(plugged)
        for each in watchers:
            each.tell({"t": what, **message})

    def command(self, line: bytes) -> dict[str, Any]:
        """Do what a line of the control connection says; every failure is one sentence."""
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise UserError("A command is a JSON object.")
            do = _COMMANDS.get(str(request.get("do")))
            if do is None:
                raise UserError(f"There is no command {request.get('do')!r}; there are {', '.join(_COMMANDS)}.")
            return {"ok": True, **do(self, request)}
        except UserError as error:
            return {"ok": False, "error": str(error)}
        except (ValueError, RecursionError):
            return {"ok": False, "error": "A command is one line of JSON."}
        except Exception as error:
            log.exception("a command failed")
            return {"ok": False, "error": f"The command failed: {error}."}

    def _plug(self, device: Device, name: str | None, faults: list[str | Rule]) -> Plugged:
        if self.closed:
            raise UserError("The emulator has ended.")
        if any(each.device is device for each in self._plugged.values()):
            raise UserError("This device is plugged in already.")
        if len(self._plugged) >= MAX_DEVICES:
            raise UserError(f"There are {MAX_DEVICES} devices already.")
        if name is None:
            base = type(device).__name__.lower()
            name = next(n for i in range(MAX_DEVICES + 1) if (n := f"{base}{i}") not in self._plugged)
        if not _NAME.fullmatch(name):
            raise UserError(f"{name!r} is no name for a device: letters, digits, '.', '_' and '-', 64 at most.")
        if name in self._plugged:
            raise UserError(f"An emulated device is called {name!r} already.")
        taken = {(each.busnum, each.port) for each in self._plugged.values()}
        busnum, port = next(
            place for i in range(MAX_DEVICES) if (place := (1 + i // _PORTS, 1 + i % _PORTS)) not in taken
        )
        plugged = Plugged(self, name, device, busnum, port)
        plugged.set_faults(faults)
        self._plugged[name] = plugged
        plugged.arrive()
        return plugged

    def _forget(self, plugged: Plugged) -> None:
        plugged.remove()
        plugged.forgotten = True
        if self._plugged.get(plugged.name) is plugged:
            del self._plugged[plugged.name]
            try:
                plugged.device.close()
            except Exception:
                log.exception("%s: a handler failed", plugged.device)

    def _run(self) -> None:
        try:
            self.loop.run()
        finally:
            self._remove_files()
            for call in self._on_end:
                call()

    def _close(self) -> None:
        if self.closed:
            return
        for plugged in list(self._plugged.values()):
            self._forget(plugged)
        self.closed = True
        for listener in self._listeners:
            listener.close()
        for client in list(self.clients):
            client.close()
        self.loop.stop()

    def _remove_files(self) -> None:
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        if self._own_directory is not None:
            self._own_directory.cleanup()


def _unix(path: str) -> socket.socket:
    """A listening socket that only its owner can reach; one that a dead emulator left behind is replaced."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        if Path(path).is_socket() and not _answers(path):
            os.unlink(path)
        os.fchmod(sock.fileno(), 0o600)  # before bind, so that nobody else can ever reach it
        sock.bind(path)
        sock.listen(128)
    except BaseException:
        sock.close()
        raise
    return sock


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except OSError:
            pass
        return True


# --- commands ---


def _text(request: dict[str, Any], key: str) -> str:
    value = request.get(key)
    if not isinstance(value, str) or not value:
        raise UserError(f"The command must say {key!r}, as text.")
    return value


def _texts(request: dict[str, Any], key: str) -> list[str]:
    value = request.get(key) or []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise UserError(f"{key!r} is a list of texts.")
    return value


def _do_plug(emulator: Emulator, request: dict[str, Any]) -> dict[str, Any]:
    from udf.testing.devices.models import make

    options = request.get("options") or {}
    if not isinstance(options, dict):
        raise UserError("'options' is a JSON object.")
    name = _text(request, "name") if request.get("name") is not None else None
    device = make(_text(request, "model"), options)
    try:
        plugged = emulator.plug(device, name, _texts(request, "faults"))
    except BaseException:
        device.close()
        raise
    return {"name": plugged.name, "busid": plugged.busid, "arrival": plugged.arrival}


def _do_unplug(emulator: Emulator, request: dict[str, Any]) -> dict[str, Any]:
    emulator.unplug(emulator.find(_text(request, "name")))
    return {}


def _do_replug(emulator: Emulator, request: dict[str, Any]) -> dict[str, Any]:
    plugged = emulator.find(_text(request, "name"))
    after = request.get("after", 0)
    if not isinstance(after, int | float) or not 0 <= after <= 3600:
        raise UserError("'after' is a number of seconds.")
    plugged.replug(after)
    return {"name": plugged.name, "busid": plugged.busid, "arrival": plugged.arrival}


def _do_faults(emulator: Emulator, request: dict[str, Any]) -> dict[str, Any]:
    emulator.find(_text(request, "name")).set_faults(_texts(request, "faults"))
    return {}


def _do_list(emulator: Emulator, _request: dict[str, Any]) -> dict[str, Any]:
    return {
        "devices": [
            {**describe(each), "present": each.present, "transfers": each.transfers}
            for each in emulator._plugged.values()
        ]
    }


def _do_medium(emulator: Emulator, request: dict[str, Any]) -> dict[str, Any]:
    plugged = emulator.find(_text(request, "name"))
    change = getattr(plugged.device, "change_medium", None)
    if change is None:
        raise UserError(f"{plugged.name!r} has no medium that could be changed.")
    file = _text(request, "file") if request.get("file") is not None else None
    lun = request.get("lun", 0)
    if not isinstance(lun, int):
        raise UserError("'lun' is a number.")
    change(file, lun)
    return {}


_COMMANDS: dict[str, Callable[[Emulator, dict[str, Any]], dict[str, Any]]] = {
    "plug": _do_plug,
    "unplug": _do_unplug,
    "replug": _do_replug,
    "faults": _do_faults,
    "list": _do_list,
    "medium": _do_medium,
}
