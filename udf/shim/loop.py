"""The event loop: the kernel's requests, the driver's messages, the supervisor's; it sleeps as little as it can.

Owns: the epoll set, the spinning, the clock. One request costs two wake-ups of a sleeping CPU if the loop sleeps
between them, which is more than all the work in it; so it may look again for a bounded moment before it sleeps, as
long as that has lately been worth it.

A little over 400 lines: one turn, and who may begin or end something in it, are to be read in one place.
"""

from __future__ import annotations

import errno
import os
import select
import sys
import threading
import traceback
from functools import partial
from time import monotonic
from typing import Any

from udf.fuse.mount import MountError, unmount
from udf.fuse.structs import IN_HEADER
from udf.shim import replies
from udf.shim.away import NOTHING_KNOWN
from udf.shim.control import Control, SupervisorGone
from udf.shim.elsewhere import Elsewhere
from udf.shim.graph import Unresolved
from udf.shim.last_sync import LastSync
from udf.shim.link import Link, LinkClosed
from udf.shim.patience import check_time, give_up
from udf.shim.requests import HANDLERS
from udf.shim.resolve import resolve_then_again
from udf.shim.service import Service
from udf.shim.spin import Spin
from udf.shim.stale import first_looks
from udf.shim.trace import Tracer

REQUEST_BUFFER = 128 * 1024 + 8192  # the kernel wants at least max_write + 80 and 8192
_HEARTBEAT = 1.0
_LOOK = 0.25  # how often what waits is looked at
_TICK = 0.05  # how often deadlines of interrupted requests are looked at
_SWEEP = 0.002  # how long the notifier has before it is given more
_BROKEN_AFTER = 1.0  # seconds that the rest of a reply in several packets is waited for
_DRAINED = 4096  # messages of a driver whose device is gone; what it had said by then counts
_IN, _OUT, _HUP, _ERR = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP, select.EPOLLERR


class Unmounted(Exception):
    """The kernel has let go of the mount."""


class Loop:
    """Serves one mount until it is unmounted."""

    def __init__(self, service: Service, control: Control, spin: Spin) -> None:
        self.s = service
        self.control = control
        self._spin = spin
        self._buffer = bytearray(REQUEST_BUFFER)
        self._view = memoryview(self._buffer)
        self._buffers = [self._buffer]
        self._epoll = select.epoll()
        self._epoll.register(service.device, _IN)
        self._epoll.register(service.link.fd, _IN)
        self._linked = True  # the link is in the set
        service.recovery.wants_quiet = self._be_quiet
        service.recovery.away.knows_nothing = self._know_nothing
        self._epoll.register(control.fd, _IN)
        self._wake, self._waker = os.pipe()
        self._epoll.register(self._wake, _IN)
        self._elsewhere = Elsewhere(service, self._epoll)
        self._unmounting: threading.Thread | None = None
        self._unmount_lazily = False
        self._asked_to_unmount = False
        self._unmount_error: MountError | None = None
        self._usual_handlers = [HANDLERS.get(op) for op in range(max(HANDLERS) + 1)]
        self._nothing_known = [NOTHING_KNOWN.get(op) for op in range(max(HANDLERS) + 1)]
        self._handlers = self._usual_handlers
        self._last_sync: LastSync | None = None  # the mount is gone, and the driver is saving what it has
        service.tell = self.tell
        service.dispatch = self.handle
        service.complete = partial(replies.complete, service)
        service.link.wants_writable = self.wants_writable

    def tell(self, message: dict[str, object]) -> None:
        """Send a message to the supervisor; without one there is nobody to tell, and the loop will see that."""
        try:
            self.control.post(message)
        except SupervisorGone:
            pass

    def wants_writable(self, wanted: bool) -> None:
        """Have the link's queue flushed when the socket takes more."""
        if self._linked:
            self._epoll.modify(self.s.link.fd, _IN | _OUT if wanted else _IN)

    def run(self) -> None:
        """Serve. Raises SupervisorGone; returns when the mount is gone and the driver has saved what it kept back."""
        self._look_around()
        self._serve()
        self._epoll.unregister(self.s.device)
        self._last_sync = LastSync(self.s, lambda: os.write(self._waker, b"s"))
        if not self._last_sync.is_over:
            self._serve()

    @property
    def unsaved(self) -> str:
        """What the driver could not save before the end, as a sentence; "" if it has saved everything."""
        return "" if self._last_sync is None else self._last_sync.error

    def _serve(self) -> None:
        s = self.s
        poll = self._epoll.poll
        spin = self._spin
        device, recovery = s.device, s.recovery
        away = recovery.away
        next_beat = next_look = 0.0
        forgets = s.nodes.forgets
        try:
            while True:
                events = spin.poll(poll) if spin.wanted else None
                if not events:
                    timeout = (
                        _TICK
                        if s.interrupted or s.link.incomplete
                        else _SWEEP
                        if away.sweeping
                        else _LOOK
                        if s.waiting or s.tasks or recovery.waits or self._last_sync or self._elsewhere.is_gone
                        else _HEARTBEAT
                    )
                    events = poll(timeout)
                for fd, event in events:
                    if fd == device:
                        self._from_kernel()
                        spin.worked()
                    elif fd == s.link.fd:
                        self._from_driver(event)
                        spin.worked()
                    elif fd == self.control.fd:
                        self._from_supervisor()
                    elif fd == self._wake:
                        self._woken()
                    elif fd == self._elsewhere.fd:
                        self._elsewhere.look()
                    # else: a link that an event before this one has replaced
                if forgets and s.connected:
                    self._send_forgets(forgets)
                if recovery.alone and not s.is_waiting(recovery.alone):
                    recovery.next_suspect()
                if away.sweeping:
                    away.sweep()
                now = monotonic()
                if now >= next_look or s.interrupted or s.link.incomplete:
                    next_look = now + _LOOK
                    self._tick(now)
                    if now >= next_beat:
                        next_beat = now + _HEARTBEAT
                        self.tell({"t": "heartbeat"})
        except Unmounted:
            return

    def _look_around(self) -> None:
        """Learn what programs will ask for when there is no driver, and remove what an earlier shim has left."""
        s = self.s
        if not s.config.recover:
            return
        if s.config.hide and not s.config.read_only:
            s.start_own(s.hiding.clean_up(s))
        s.start_own(first_looks(s))

    def _be_quiet(self, quiet: bool) -> None:
        """Leave the kernel's requests unread, or read them again."""
        self._epoll.modify(self.s.device, 0 if quiet else _IN)

    def _know_nothing(self, nothing: bool) -> None:
        """Answer nothing from what is known, or as ever."""
        self._handlers = self._nothing_known if nothing else self._usual_handlers

    def _send_forgets(self, forgets: list[tuple[int, int]]) -> None:
        try:
            self.s.link.send_forgets(forgets)
        except LinkClosed as closed:
            forgets.clear()
            self._lose_link(str(closed))

    def _tick(self, now: float) -> None:
        s = self.s
        check_time(s, now)
        self._let_go_of_refused()
        if s.link.incomplete and now >= s.link.partial_since + _BROKEN_AFTER:
            replies.give_up_broken(s, s.link)
        if s.tracer is not None and s.tracer.closed:
            self._trace(None)
        if self._elsewhere.is_over(now) if self._last_sync is None else self._last_sync.check_time(now):
            raise Unmounted
        s.counters.spins, s.counters.spins_won = self._spin.spins, self._spin.won

    def _from_kernel(self) -> None:
        try:
            size = os.readv(self.s.device, self._buffers)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EINTR, errno.ENOENT):
                return  # nothing there, or the request was taken back while it was being read
            if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                raise Unmounted from None  # or aborted, which an administrator does: no request will come any more
            raise
        _, op, unique, node_id, _, _, _, _ = IN_HEADER.unpack_from(self._buffer)
        s = self.s
        s.counters.requests += 1
        message = self._view[:size]
        if s.tracer is not None:
            s.tracer.requested(op, unique, node_id, message)
        self.handle(op, unique, node_id, message)

    def handle(self, op: int, unique: int, node_id: int, message: memoryview) -> None:
        """Handle one request of the kernel's; it is answered whatever goes wrong in here."""
        s = self.s
        handler = self._handlers[op] if op < len(self._handlers) else None
        if handler is None:
            s.answer_error(unique, errno.ENOSYS)
            return
        try:
            handler(s, unique, node_id, message)
        except Unresolved as unknown:  # raised before anything of the message was changed
            request = bytes(message)
            s.start(unique, op, request, resolve_then_again(s, unique, node_id, request, unknown.slot))
        except LinkClosed as closed:
            self._lose_link(str(closed))
        except Exception:
            traceback.print_exc()
            s.waiting.pop(unique, None)
            s.answer_error(unique, errno.EIO)

    def _from_driver(self, event: int) -> None:
        s = self.s
        link = s.link
        if not s.connected and not s.recovery.greeting:
            return  # lost by what came before this event in the same batch
        if event & _OUT:
            link.flush()
        if not event & (_IN | _HUP | _ERR):
            return
        try:
            size = link.receive(s.expected)
            if size and s.connected:
                replies.on_message(s, link, size)
            elif size:
                s.recovery.greeted(size)
                self._let_go_of_refused()
                if self._last_sync is not None:
                    self._last_sync.begin()
        except LinkClosed as closed:
            self._lose_link(str(closed))
        except Exception:  # ours: whoever waits for this reply meets its deadline
            traceback.print_exc()

    def _lose_link(self, reason: str) -> None:
        s = self.s
        if s.connected or s.recovery.greeting:
            self._forget_link()
            if s.connected:
                s.link_lost(reason)
            else:
                s.recovery.refuse(f"the driver is gone before it answered INIT ({reason})")

    def _forget_link(self) -> None:
        if self._linked:
            self._linked = False
            self._epoll.unregister(self.s.link.fd)

    def _let_go_of_refused(self) -> None:
        """A driver that was refused says nothing more that matters, and its end would wake us again and again."""
        if not self.s.connected and not self.s.recovery.greeting:
            self._forget_link()

    def _from_supervisor(self) -> None:
        message, fds = self.control.receive()
        kind = message.get("t")
        if kind == "trace":
            self._trace(fds.pop(0) if message.get("on") and fds else None)
        elif kind == "unmount":
            self._start_unmount(bool(message.get("lazy")))
        elif kind == "counters":
            self.tell({"t": "counters", "id": message.get("id", 0), "counters": self.counters()})
        elif kind == "attach" and fds:
            self._attach(fds, message)
        elif kind == "fail":
            self.s.recovery.fail()
        elif kind == "detach":
            self._detach(float(message.get("wait", 0.0)), float(message.get("max_stale", 0.0)))
        elif kind == "requests":
            self.tell({"t": "requests", "id": message.get("id", 0), **self.s.recovery.requests()})
        elif kind == "abort":
            give_up(self.s, int(message.get("request", 0)), errno.EIO)
        for fd in fds:
            os.close(fd)

    def _detach(self, wait: float, max_stale: float) -> None:
        """The device is gone. What the driver has said by now is true; what it would say yet, nobody waits to hear."""
        s = self.s
        for _ in range(_DRAINED):
            if not s.connected:
                break
            try:
                size = s.link.receive(s.expected)
                if not size:
                    break
                replies.on_message(s, s.link, size)
            except LinkClosed:
                break
            except Exception:  # ours, as in _from_driver
                traceback.print_exc()
        s.recovery.detach(wait, max_stale)
        self._lose_link("the device is gone")

    def _attach(self, fds: list[int], message: dict[str, Any]) -> None:
        if self.s.connected or self.s.recovery.greeting:
            self._lose_link("another generation is attached")
        link = Link(fds.pop(0))
        problem = link.take_window(fds)
        self.s.recovery.attach(link, int(message["generation"]), bool(message.get("counted", True)))
        link.wants_writable = self.wants_writable
        self._epoll.register(link.fd, _IN)
        self._linked = True
        if problem:
            self.s.recovery.refuse(problem)

    def counters(self) -> dict[str, Any]:
        """Return the counters and the sizes of the tables."""
        s = self.s
        counts: dict[str, Any] = dict(s.counters.snapshot())
        counts.update(
            nodes=len(s.nodes),
            handles=len(s.handles),
            waiting=len(s.waiting) + len(s.tasks),
            late=len(s.late),
            unanswered=len(s.asks),
            remembered=len(s.remembered),
            notifying=len(s.notifier),
            away=int(s.recovery.away.is_away),
            stale_for=round(s.recovery.away.stale_for, 3),
            kernel_lookups=s.nodes.total_lookups(),
            driver_lookups=s.nodes.total_driver_lookups(),
        )
        return counts

    def _trace(self, fd: int | None) -> None:
        if self.s.tracer is not None:
            self.s.tracer.close()
        self.s.tracer = None if fd is None else Tracer(fd, self.s.nodes)

    # ---- unmounting: the thread waits in the kernel while the loop answers what that asks

    def _start_unmount(self, lazy: bool) -> None:
        if self._unmounting is not None:
            return
        self._asked_to_unmount = True
        self._unmount_lazily = lazy
        self.s.recovery.unmount_begins(lazy=lazy)
        self._unmounting = threading.Thread(target=self._unmount, args=(lazy,), name="unmount", daemon=True)
        self._unmounting.start()

    def _unmount(self, lazy: bool) -> None:
        self._unmount_error = None
        try:
            unmount(self.s.config.mountpoint, lazy=lazy)
        except MountError as error:
            self._unmount_error = error
        os.write(self._waker, b"u")

    def _woken(self) -> None:
        said = os.read(self._wake, 16)
        if b"u" in said:
            self._unmount_ended()
        if b"s" in said:
            raise Unmounted

    def _unmount_ended(self) -> None:
        if self._unmounting is not None:
            self._unmounting.join()
        self._unmounting = None
        self.s.recovery.unmounting = False
        error = self._unmount_error
        if error is None:
            if self._unmount_lazily:
                self.tell({"t": "detached"})
            return  # ENODEV on the device follows, at once or when the last file is closed
        self._asked_to_unmount = False
        if error.errno == errno.EBUSY:
            self.tell({"t": "busy"})
        elif error.errno in (errno.EINVAL, errno.ENOENT):
            print(f"udf-shim: {error}; it is not there any more", file=sys.stderr)
        else:
            self.tell({"t": "busy", "error": str(error)})

    def terminate(self) -> None:
        """SIGTERM: unmount, lazily if it is in use."""
        self._start_unmount(lazy=True)

    @property
    def external(self) -> bool:
        """Whether the mount went without our doing."""
        return not self._asked_to_unmount
