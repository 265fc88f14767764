"""The thread beside a driver's loop: heartbeats, and the supervisor's word.

Owns: the driver's end of the control socket. Must never: touch the driver, or wait for its loop: it tells how long the
loop has shown no sign of life, which a loop that is stuck could not tell itself. Called by: serve.py.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

import trio

from udf import messages
from udf.errors import ContractError

_SEND_TIMEOUT = 10.0
_MIN_INTERVAL = 0.02


class Supervisor:
    """The way to the supervisor; any thread may send."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """For poll."""
        return self._control.fileno()

    def send(self, message: messages.Message) -> None:
        """Send what must arrive; a supervisor that does not read for long is as good as gone."""
        data = messages.encode(message)
        deadline = time.monotonic() + _SEND_TIMEOUT
        with self._sending:
            while not self._try_send(data) and time.monotonic() < deadline:
                select.select([], [self._control], [], 0.5)

    def try_send(self, message: messages.Message) -> None:
        """Send what may be lost."""
        self._try_send(messages.encode(message))

    def report_fault(self, op: str, error: str, trace: str) -> None:
        """A mistake in the driver. May be called on the driver's loop, so it does not wait."""
        self.try_send(messages.HostFault(op=op, error=error, traceback=trace))

    def _try_send(self, data: bytes) -> bool:
        try:
            self._control.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError:
            return True  # it is gone, and we shall be told by the end of the socket
        return True

    def wait_for_turn(self, interval: float) -> list[int] | None:
        """As a spare: heartbeats until `take_over` brings the link and the rest. None: it is to end instead."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        interval = max(_MIN_INTERVAL, interval)
        while True:
            if not poll.poll(interval * 1000):
                self.try_send(messages.HostHeartbeat(loop_age=0.0))
                continue
            flags = socket.MSG_CMSG_CLOEXEC
            data, fds, _, _ = socket.recv_fds(self._control, messages.MAX_MESSAGE, messages.MAX_DESCRIPTORS, flags)
            message = messages.decode_to_host(data) if data else None
            if isinstance(message, messages.TakeOver) and fds:
                return fds
            for fd in fds:
                os.close(fd)
            if message is None or isinstance(message, messages.Stop):
                return None

    def receive(self) -> messages.ToHost | None:
        """The next message; None when the supervisor is gone."""
        try:
            data = self._control.recv(messages.MAX_MESSAGE)
        except OSError:
            data = b""
        return messages.decode_to_host(data) if data else None


class Pulse:
    """Watches one loop. A loop that is idle costs one wake-up per heartbeat."""

    def __init__(
        self, supervisor: Supervisor, interval: float, token: trio.lowlevel.TrioToken, stop: Callable[[bool], None]
    ) -> None:
        self._supervisor = supervisor
        self._interval = max(_MIN_INTERVAL, interval)
        self._token = token
        self._stop = stop
        self._asked: float | None = None  # when the loop was asked for a sign that it has not given yet

    def start(self) -> None:
        """Begin; the thread ends with the process."""
        threading.Thread(target=self._run, name="udf-pulse", daemon=True).start()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._supervisor.fileno(), select.POLLIN)
        due = time.monotonic()
        while True:
            if poll.poll(max(0.0, due - time.monotonic()) * 1000):
                self._obey()
            now = time.monotonic()
            if now < due:
                continue
            due = now + self._interval
            age = 0.0
            if self._asked is None:
                self._asked = now
                self._on_loop(self._answer)
            else:
                age = now - self._asked
            self._supervisor.try_send(messages.HostHeartbeat(loop_age=age))

    def _answer(self) -> None:
        self._asked = None

    def _obey(self) -> None:
        try:
            message = self._supervisor.receive()
        except ContractError:
            return
        if message is None:
            os._exit(1)  # nothing of a driver outlives the supervisor that it serves
        if isinstance(message, messages.Stop):
            self._on_loop(partial(self._stop, message.eject))

    def _on_loop(self, call: Callable[[], None]) -> None:
        try:
            self._token.run_sync_soon(call)
        except trio.RunFinishedError:
            pass  # the loop has ended, and the process is about to
