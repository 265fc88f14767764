"""What the tests of the block shim share: the shim's process with its supervisor's end, drivers, and a raw client."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from udf.block import wire

ROOT = Path(__file__).resolve().parents[2]
DRIVERS = Path(__file__).with_name("drivers")
MIB = 1 << 20
LONG = 40.0  # seconds that anything may take on a busy machine
AT_ONCE = 10.0  # seconds: that much less than any patience, and more than a busy machine takes


class Driver:
    """A driver's process, and the shim's end of its link until it is handed over."""

    def __init__(self, name: str, *arguments: object, fds: tuple[int, ...] = ()) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(DRIVERS / f"{name}.py"), str(theirs.fileno()), *map(str, arguments)],
                pass_fds=(theirs.fileno(), *fds),
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )
        self.link = ours

    def kill(self) -> None:
        """SIGKILL, with everything that it has started."""
        self.link.close()
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit status."""
        status = self.process.wait(LONG)
        self.kill()
        return status


class Shim:
    """A block shim's process and the supervisor's end of its control socket; a thread collects what it says."""

    def __init__(self, directory: Path, driver: Driver | socket.socket, **config: object) -> None:
        self.path = directory / "nbd.sock"
        self.messages: list[dict[str, Any]] = []
        self.exports: list[dict[str, Any]] = []
        self.drivers = [] if isinstance(driver, socket.socket) else [driver]
        self._taken: set[int] = set()
        self._news = threading.Condition()
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener = socket.socket(socket.AF_UNIX)
        with listener, theirs:
            listener.bind(str(self.path))
            listener.listen(128)
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-S", "-m", "udf.block.shim", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
                stderr=subprocess.PIPE,
            )
            self._reader = threading.Thread(target=self._read)
            self._reader.start()
            link = driver if isinstance(driver, socket.socket) else driver.link
            message = {"name": "disk0", "driver": "test", **config}
            self.send("serve", (listener.fileno(), link.fileno()), **message)
            link.close()

    def _read(self) -> None:
        while True:
            try:
                data = self.control.recv(1 << 17)
            except OSError:
                data = b""
            with self._news:
                self.messages.append(json.loads(data) if data else {"t": "end"})
                self._news.notify_all()
            if not data:
                return

    def send(self, kind: str, fds: tuple[int, ...] = (), **fields: object) -> None:
        socket.send_fds(self.control, [json.dumps({"t": kind, **fields}).encode()], list(fds))

    def expect(self, kind: str, seconds: float = LONG, *, or_else: str = "") -> dict[str, Any]:
        """The next message of a kind (or of two) that nobody has taken."""
        until = time.monotonic() + seconds
        with self._news:
            while True:
                for index, message in enumerate(self.messages):
                    if index not in self._taken and message["t"] in (kind, or_else):
                        self._taken.add(index)
                        return message
                assert self.messages[-1:] != [{"t": "end"}], f"no {kind}, but the end: {self.messages}"
                left = until - time.monotonic()
                assert left > 0, f"no {kind}: {[m for m in self.messages if m['t'] != 'heartbeat']}"
                self._news.wait(left)

    def said(self, kind: str) -> list[dict[str, Any]]:
        """Everything of a kind so far."""
        with self._news:
            return [message for message in self.messages if message["t"] == kind]

    def serving(self) -> list[dict[str, Any]]:
        exports: list[dict[str, Any]] = self.expect("serving")["exports"]
        return exports

    def attach(self, driver: Driver, generation: int = 2, *, counted: bool = False) -> None:
        self.drivers.append(driver)
        self.send("attach", (driver.link.fileno(),), generation=generation, counted=counted)
        driver.link.close()

    def counters(self) -> dict[str, int]:
        self.send("counters", id=7)
        counters: dict[str, int] = self.expect("counters")["counters"]
        return counters

    def requests(self) -> dict[str, Any]:
        self.send("requests", id=8)
        return self.expect("requests")

    def until(self, condition: Callable[[], bool], seconds: float = LONG) -> None:
        """Until a condition that only asking can tell is true."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"it does not come to that: {self.counters()}"
            time.sleep(0.01)

    def uri(self, export: str = "") -> str:
        return f"nbd+unix:///{export}?socket={self.path}"

    def stop(self) -> int:
        """Stop in order; its exit status."""
        self.send("unmount")
        self.expect("unmounted")
        return self.process.wait(LONG)

    def close(self) -> str:
        """End it, in whatever state it is; what it wrote to its output."""
        if self.process.poll() is None:
            self.process.kill()
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            text = stderr.read().decode()
        self.process.wait()
        self._reader.join()
        self.control.close()
        self.path.unlink(missing_ok=True)
        for driver in self.drivers:
            driver.kill()
        return text


@contextlib.contextmanager
def serving(directory: Path, driver: Driver, **config: object) -> Iterator[Shim]:
    """A shim that serves a driver; neither is left, and the shim has not complained."""
    shim = Shim(directory, driver, **config)
    try:
        shim.exports = shim.serving()
        yield shim
        crashed = shim.process.poll() not in (None, 0)
    finally:
        text = shim.close()
        if text:
            print(text, file=sys.stderr)
    assert not crashed, "the shim ended by itself"
    assert "Traceback" not in text


def pull(shim: Shim) -> None:
    """The supervisor's word that the device is gone; the driver ends, and with it the device's cache."""
    shim.send("detach")
    shim.until(lambda: shim.counters()["waiting"] == 0)
    shim.drivers[-1].kill()


def plug(shim: Shim, *arguments: object, generation: int = 2) -> None:
    shim.attach(Driver("disk", *arguments), generation)


def back(shim: Shim, *arguments: object, generation: int = 2) -> None:
    """It is plugged in, and is taken for the same."""
    plug(shim, *arguments, generation=generation)
    assert shim.expect("attached")["generation"] == generation


class NbdError(Exception):
    """An error reply."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Client:
    """A blocking NBD client that sends whatever it is told to."""

    def __init__(
        self,
        path: Path,
        export: str | None = "",
        *,
        claim: bool = False,
        structured: bool = True,
        watch: bool = False,
        window: int = -1,
    ) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(LONG)
        self.sock.connect(str(path))
        self.take(wire.GREETING.size)
        self.sock.sendall(wire.CLIENT_FLAGS.pack(3))
        self.structured = structured
        self._cookie = 0
        if structured:
            assert self.option(wire.OPT_STRUCTURED_REPLY)[-1][0] == wire.REP_ACK
        if window >= 0:
            assert self.option(wire.OPT_WINDOW, fds=(window,))[-1] == (wire.REP_ACK, b"")
        if watch:
            assert self.option(wire.OPT_WATCH)[-1] == (wire.REP_ACK, b"")
        if claim and export is not None:
            kind, text = self.option(wire.OPT_CLAIM, wire.pack_text(export))[-1]
            if kind != wire.REP_ACK:
                self.sock.close()
                raise PermissionError(text.decode())
        if export is not None:
            self.go(export)

    def go(self, export: str) -> None:
        replies = self.option(wire.OPT_GO, wire.pack_go(export))
        if replies[-1][0] != wire.REP_ACK:
            self.sock.close()
            raise FileNotFoundError(f"{replies[-1][0]:#x} {replies[-1][1]!r}")
        _, self.size, self.flags = next(
            wire.EXPORT_INFO.unpack(body) for _, body in replies if body[:2] == b"\0\0" and len(body) == 12
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.sock.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def option(self, option: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> list[tuple[int, bytes]]:
        if fds:
            socket.send_fds(self.sock, [wire.pack_option(option, payload)], fds)
        else:
            self.sock.sendall(wire.pack_option(option, payload))
        replies = []
        while True:
            _, _, kind, size = wire.OPTION_REPLY.unpack(self.take(20))
            replies.append((kind, self.take(size)))
            if kind == wire.REP_ACK or kind & wire.REP_ERROR:
                return replies

    def ask(self, op: int, offset: int, length: int, data: bytes = b"", flags: int = 0) -> int:
        """Send a request; its cookie."""
        self._cookie += 1
        self.sock.sendall(wire.REQUEST.pack(wire.REQUEST_MAGIC, flags, op, self._cookie, offset, length) + data)
        return self._cookie

    def answer(self) -> tuple[int, int, bytes]:
        """The next whole reply: cookie, error, data."""
        data = b""
        error = 0
        while True:
            magic = struct.unpack(">I", self.take(4))[0]
            if magic == wire.SIMPLE_REPLY_MAGIC:
                error, cookie = struct.unpack(">IQ", self.take(12))
                return cookie, error, data
            flags, kind, cookie, size = struct.unpack(">HHQI", self.take(16))
            body = self.take(size)
            if kind & wire.CHUNK_ERROR_BIT:
                error = wire.unpack_error(body)[0]
            else:
                data += body[8:] if kind == wire.CHUNK_OFFSET_DATA else body
            if flags & wire.CHUNK_DONE:
                return cookie, error, data

    def call(self, op: int, offset: int, length: int, data: bytes = b"", flags: int = 0) -> bytes:
        cookie = self.ask(op, offset, length, data, flags)
        if op == wire.CMD_READ and not self.structured:
            _, error, _ = self.answer()
            if not error:
                return self.take(length)
        else:
            answered, error, body = self.answer()
            assert answered == cookie
            if not error:
                return body
        raise NbdError(error)

    def read(self, offset: int, size: int, flags: int = 0) -> bytes:
        return self.call(wire.CMD_READ, offset, size, flags=flags)

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        self.call(wire.CMD_WRITE, offset, len(data), data, flags)

    def flush(self) -> None:
        self.call(wire.CMD_FLUSH, 0, 0)

    def trim(self, offset: int, size: int) -> None:
        self.call(wire.CMD_TRIM, offset, size)

    def zero(self, offset: int, size: int) -> None:
        self.call(wire.CMD_WRITE_ZEROES, offset, size)

    def disconnect(self) -> None:
        self.ask(wire.CMD_DISC, 0, 0)
        assert self.sock.recv(1) == b""
        self.sock.close()
