"""The event loop: clients, the driver's connections and its link, the supervisor.

Owns: the epoll set, the clock, and the driver generation that is connected. What is to be sent is collected over one
turn and sent at its end, except what is large. A descriptor is closed at the end of a turn only, so that no event of
the turn can be taken for one of a descriptor that came after it.

A little over 400 lines: one turn is to be read in one place.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

from udf.block import wire
from udf.block.shim.client import Client
from udf.block.shim.config import Config
from udf.block.shim.driver import DriverConnection
from udf.block.shim.generation import Generation, Look, enlarge
from udf.block.shim.phase import Phase
from udf.block.shim.service import Service
from udf.block.shim.stop import Stop
from udf.block.shim.streams import Ended
from udf.block.shim.terms import BrokenDriver
from udf.shim.control import Control, SupervisorGone

MOST_CLIENTS = 256
_ACCEPTS = 16  # in one turn
_HEARTBEAT = 1.0
_LOOK = 0.25  # how often what waits is looked at
_STUCK = 10.0  # seconds that a client may hold memory which others wait for without taking or giving a byte
_MOMENT = 0.001  # seconds in which a program that has read something mostly asks for more
_IDLE = 5.0  # seconds without a request after which idle memory is let go
_IN, _OUT, _HUP, _ERR = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP, select.EPOLLERR


class StartFailed(Exception):
    """The first driver does not get to the point of serving; one sentence."""


class Loop:
    """Serves one device until it is told to stop."""

    def __init__(self, config: Config, control: Control, listener: socket.socket, link: int) -> None:
        self.s = Service(config, self.tell)
        self.control = control
        self._listener = listener
        self._listening = False
        self._no_accept_until = 0.0  # after an error that is not the client's
        listener.setblocking(False)
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._masks: dict[int, int] = {}
        self._closing: list[socket.socket] = []
        self._generation: Generation | None = None
        self._look: Look | None = None
        self._look_until = 0.0
        self._look_again = False
        self._stop: Stop | None = None
        self._last_count = 0
        self._last_moved = 0.0
        self._watch(control.fd, self._from_supervisor)
        self._connect(link, 1)

    def tell(self, message: dict[str, object]) -> None:
        """Send a message to the supervisor; without one there is nobody to tell, and the loop will see that."""
        try:
            self.control.post(message)
        except SupervisorGone:
            pass

    # ---- the epoll set

    def _watch(self, fd: int, handler: Callable[[int], None], mask: int = _IN) -> None:
        self._handlers[fd] = handler
        self._masks[fd] = mask
        self._epoll.register(fd, mask)

    def _want(self, fd: int, mask: int) -> None:
        if self._masks.get(fd, mask) != mask:
            self._masks[fd] = mask
            self._epoll.modify(fd, mask)

    def _forget(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            del self._masks[fd]
            self._epoll.unregister(fd)

    def _close(self, sock: socket.socket) -> None:
        self._forget(sock.fileno())
        self._closing.append(sock)

    # ---- turning

    def run(self) -> None:
        """Serve until stopped. Raises SupervisorGone, StartFailed."""
        now = next_beat = next_look = 0.0
        s = self.s
        while True:
            busy = s.requests or self._look is not None or s.hungry or self._stop is not None
            pause = _LOOK if busy else _HEARTBEAT
            if s.alarm < now + pause:
                pause = max(0.0, s.alarm - monotonic())
            if s.readers:
                pause = min(pause, _MOMENT)
            events = self._epoll.poll(pause)
            for fd, event in events:
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler(event)
            self._end_turn()
            if s.readers and (s.requests or not events):
                s.digest()  # while the driver works, not while a program waits for us to take its next request
            now = monotonic()
            if now >= s.alarm:
                s.ring(now)
                self._end_turn()
            if now >= next_look:
                next_look = now + _LOOK
                self._tick(now)
                self._end_turn()
                if now >= next_beat:
                    next_beat = now + _HEARTBEAT
                    self.tell({"t": "heartbeat"})
            if self._stop is not None and self._stop.is_done(now):
                self._end()
                return

    def _end_turn(self) -> None:
        """Send what was collected, and read on where that made room."""
        s = self.s
        while s.touched or s.broken or s.freed or s.recovery.is_decided:
            if s.recovery.is_decided:
                self._decide()
            if s.touched:
                touched, s.touched = s.touched, set()
                for peer in touched:
                    self._flush(peer)
            if s.freed:
                s.freed = False
                for client in [*s.hungry, *(one for one in s.clients if one.paused and one not in s.hungry)]:
                    self._guard(client, client.go_on)
            while s.broken:
                self._end_client(s.broken.pop())
            s.recovery.look_at_suspect()
        for sock in self._closing:
            sock.close()
        self._closing.clear()
        if not self._listening:
            self._listen()  # programs wait for the moment in which the units are open

    def _flush(self, peer: Client | DriverConnection) -> None:
        out = peer.out
        if isinstance(peer, Client):
            if peer.closed:
                return
            if out.queued and not out.blocked:
                self._guard(peer, out.flush)
            if peer.finished:
                self.s.broken.add(peer)
            reads = not peer.paused and not peer.leaving and not self.s.stopping
            if not peer.mute:
                self._want(peer.fd, (_IN if reads else 0) | (_OUT if out.blocked else 0))
            return
        if out.queued and not out.blocked:
            try:
                out.flush()
            except Ended:
                return  # the end of file tells, after what was answered
        self._want(peer.fd, _IN | _OUT if out.blocked else _IN)

    def _guard(self, client: Client, act: Callable[[], None]) -> None:
        """Do something for a client; whatever goes wrong is its own trouble and nobody else's."""
        try:
            act()
        except Ended:
            client.hang_up()
        except wire.WireError:
            self.s.broken.add(client)
        except Exception:  # ours
            traceback.print_exc()
            self.s.broken.add(client)
        self.s.touched.add(client)

    def _tick(self, now: float) -> None:
        s = self.s
        s.recovery.check_time(now)
        if self._look_again and self._look is None and s.phase is Phase.SERVING:
            self._start_look()
        if self._look is not None and now > self._look_until:
            self._driver_ended(f"it did not open its units within {s.config.start_timeout:g} s")
        for client in s.clients:
            if client.is_late(now) or (s.hungry and client.is_stuck(now - _STUCK)):
                s.broken.add(client)
        if s.counters.requests != self._last_count:
            self._last_count, self._last_moved = s.counters.requests, now
        elif s.pool.idle_bytes and now - self._last_moved > _IDLE:
            s.pool.clear()
        self._listen()

    # ---- clients

    def _listen(self) -> None:
        s = self.s
        wanted = len(s.clients) < MOST_CLIENTS and s.phase is not Phase.OPENING and not s.stopping
        if wanted and self._no_accept_until:
            wanted = monotonic() >= self._no_accept_until
        if wanted and not self._listening:
            self._watch(self._listener.fileno(), self._accept)
        elif self._listening and not wanted:
            self._forget(self._listener.fileno())
        self._listening = wanted

    def _accept(self, _: int) -> None:
        for _ in range(_ACCEPTS):
            if len(self.s.clients) >= MOST_CLIENTS:
                self._listen()
                return
            try:
                sock, _ = self._listener.accept()
                client = Client(self.s, sock)
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptors, no memory
                print(f"udf-block-shim: accept: {error}", file=sys.stderr)
                self._no_accept_until = monotonic() + _HEARTBEAT
                self._listen()
                return
            enlarge(sock)
            self.s.clients.add(client)
            self.s.counters.connections_total += 1
            self._watch(client.fd, partial(self._from_client, client))
            self.s.touched.add(client)

    def _from_client(self, client: Client, event: int) -> None:
        if client.closed:
            return
        if event & _OUT:
            client.flush()
        if event & (_IN | _HUP | _ERR):
            if client.leaving or client.paused or self.s.stopping:
                if event & (_HUP | _ERR):
                    self._forget(client.fd)
                    client.hang_up()
            else:
                self._guard(client, client.on_readable)
        self.s.touched.add(client)

    def _end_client(self, client: Client) -> None:
        if client.closed:
            return
        client.close()
        self.s.clients.discard(client)
        self._close(client.sock)
        self._listen()

    # ---- the driver

    def _connect(self, fd: int, number: int) -> None:
        generation = Generation(fd, number, self._watch_connection, lambda connection: self._close(connection.sock))
        self._generation = generation
        self._watch(generation.link.fileno(), self._from_link)
        self._start_look()

    def _watch_connection(self, connection: DriverConnection) -> None:
        self._watch(connection.fd, partial(self._from_driver, connection))

    def _start_look(self) -> None:
        assert self._generation is not None
        self._look_until = monotonic() + self.s.config.start_timeout
        self._look_again = False
        try:
            self._look = Look(self._generation, self._looked)
        except Ended as ended:
            self._driver_ended(str(ended))

    def _looked(self, found: dict[str, DriverConnection]) -> None:
        generation = self._generation
        assert generation is not None
        self._look = None
        for connection in self.s.recovery.opened(found):
            generation.release(connection)

    def _decide(self) -> None:
        """What is back has been compared with what was pulled out."""
        generation = self._generation
        unneeded = self.s.recovery.decide()
        if unneeded is None or generation is None:
            self._drop_generation()
        else:
            for connection in unneeded:
                generation.release(connection)

    def _from_driver(self, connection: DriverConnection, event: int) -> None:
        if event & _OUT:
            connection.out.blocked = False
            self.s.touched.add(connection)
        if event & (_IN | _HUP | _ERR):
            try:
                connection.on_readable()
            except Ended as ended:
                generation = self._generation
                if generation is not None and connection.over:
                    generation.release(connection)
                elif generation is not None and connection in generation.connections:
                    self._driver_ended(f"it closed a connection ({ended})")
            except BrokenDriver as broken:
                self._driver_ended(str(broken), broken)
            except StartFailed:
                raise
            except Exception as error:  # ours; whatever state it has left goes with this generation
                traceback.print_exc()
                self._driver_ended(str(error), BrokenDriver("reply", f"it could not be understood: {error!r}"))

    def _from_link(self, _: int) -> None:
        assert self._generation is not None
        try:
            if self._generation.receive():
                self._look_again = True  # at the next tick: a slot that is being filled says so more than once
        except Ended as ended:
            self._driver_ended(str(ended))
        except BrokenDriver as broken:
            self._driver_ended(str(broken), broken)

    def _driver_ended(self, reason: str, broken: BrokenDriver | None = None) -> None:
        """This generation is over: by its end, or because it is given up."""
        s = self.s
        generation = self._generation
        if generation is None:
            return
        if broken is None:
            try:
                generation.drain()
            except BrokenDriver as wrong:
                broken = wrong
        if broken is not None:
            s.fault(broken.op, f"{s.config.driver}: {broken}")
        phase = s.phase
        self._drop_generation()
        if phase is Phase.OPENING:
            raise StartFailed(f"the driver {s.config.driver} does not serve: {reason}")
        if phase in (Phase.GREETING, Phase.VERIFYING):
            s.recovery.refuse(reason)
        elif phase in (Phase.SERVING, Phase.REPLAYING):
            s.recovery.lost(reason)

    def _drop_generation(self) -> None:
        generation = self._generation
        if generation is not None:
            self._generation = self._look = None
            for connection in list(generation.connections):
                generation.release(connection)
            self._close(generation.link)

    # ---- the supervisor

    def _from_supervisor(self, _: int) -> None:
        message, fds = self.control.receive()
        kind = message.get("t")
        if kind == "attach" and fds:
            self._attach(fds.pop(0), message)
        elif kind == "detach":
            self.s.recovery.detach()
            self._drop_generation()
        elif kind == "fail":
            self.s.recovery.fail()
            self._drop_generation()
        elif kind == "counters":
            self.tell({"t": "counters", "id": message.get("id", 0), "counters": self.s.figures()})
        elif kind == "requests":
            self.tell({"t": "requests", "id": message.get("id", 0), **self.s.waiting()})
        elif kind == "abort":
            request = self.s.requests.get(int(message.get("request", 0)))
            if request is not None and request.client is not None and not request.client.is_receiving(request):
                self.s.give_up(request, wire.EIO)
        elif kind == "unmount":
            self.stop()
        for fd in fds:
            os.close(fd)

    def _attach(self, fd: int, message: dict[str, Any]) -> None:
        if self._generation is not None:
            self._driver_ended("another generation is attached")
        self.s.recovery.greeting(int(message["generation"]), bool(message.get("counted", True)))
        self._connect(fd, int(message["generation"]))

    # ---- the end

    def stop(self) -> None:
        """Let no new client in, finish what is under way, flush, end. Also what SIGTERM asks for."""
        if self._stop is None:
            self._stop = Stop(self.s, monotonic())
            self._listen()

    def _end(self) -> None:
        """Let go of everybody."""
        s = self.s
        s.give_up_all(wire.ESHUTDOWN)
        self._end_turn()
        if self._generation is not None:
            for connection in self._generation.connections:
                connection.goodbye()
        self._drop_generation()
        for client in list(s.clients):
            self._end_client(client)
        self._end_turn()
