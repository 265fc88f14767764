"""Driver hosts that are forked ahead, so that a start costs neither an interpreter's start nor imports.

Owns: the zygote (udf/host/zygote.py), its end and its successor, and the forks that stand by for their turn.
Must never: be needed (without it hosts are started by exec), wait long in the loop, or hand a fork out twice.
Called by: service.py (`run`), spawn.py (`take`, and what starts the process itself).

A fork is our own child from the start (CLONE_PARENT) and nobody else's. It is known by its report socket, made here
and passed along with the request: whatever happens to the zygote, the fork lives only as long as we hold our end, and
its pid is the one that the kernel adds to its first word.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress

import trio

from udf import messages
from udf.errors import InternalError
from udf.supervisor.child import Child, Host, reap, send_signal
from udf.supervisor.output import Output

STANDING = 1  # forks that stand by
REFILL_DELAY = 0.05  # seconds after a start: what has just been started needs the CPU first
TAKE_TIMEOUT = 0.005  # seconds in the loop, for a fork when none stands by; one takes about two milliseconds
ANSWER_TIMEOUT = 15.0  # for a fork that nobody waits for, the zygote's own start included
END_TIMEOUT = 1.0
_RETRY, _MAX_RETRY = 0.5, 60.0  # seconds between zygotes that are of no use
_UCRED = struct.Struct("iII")

# What an interpreter reads at its start: a fork has these from the zygote.
_READ_AT_START = ("LANG", "LC_", "PYTHON")

log = logging.getLogger("udf.zygote")

current: trio.lowlevel.RunVar[Zygote | None] = trio.lowlevel.RunVar("udf_zygote", None)


class _Fork:
    """A process that stands by, or will in a moment."""

    def __init__(self, useless: trio.Event) -> None:
        """`useless` is set when the zygote that is asked for it does not make it."""
        self.report, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.report.setblocking(False)
        self.report.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.pid = 0  # not known yet
        self.taken = False
        self.scope: trio.CancelScope | None = None  # of the task that minds it
        self.useless = useless

    def listen(self) -> bool:
        """Take its first word, if that has come; whether it stands by."""
        with suppress(OSError):
            data, control, _, _ = self.report.recvmsg(256, socket.CMSG_SPACE(_UCRED.size))
            for level, kind, value in control:
                if data and level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                    self.pid = _UCRED.unpack(value[: _UCRED.size])[0]
        return self.pid > 0


class Zygote:
    """The present zygote and its forks. One for each supervisor."""

    def __init__(self, start: Callable[[socket.socket, int], Child], environment: Mapping[str, str]) -> None:
        """`start` starts the process, by its end of the request socket and its output, with that environment."""
        self._start = start
        self._fixed = _fixed(environment)
        self._requests: socket.socket | None = None
        self._answers = False  # the present one has forked before
        self._pending: list[_Fork] = []
        self._forks: list[_Fork] = []  # that stand by
        self._nursery: trio.Nursery | None = None
        self._taken = trio.Event()
        self._stands = trio.Event()  # for who waits for the next one that stands by
        self._useless: trio.Event = trio.Event()
        self._reaper: trio.Nursery | None = None
        self.pid: int | None = None
        self.lives = 0  # zygotes that there have been

    @property
    def standing(self) -> list[int]:
        """The pids of what stands by."""
        return [fork.pid for fork in self._forks]

    async def wait(self) -> None:
        """Until one stands by, for who is not in such a hurry that a start by exec would be quicker."""
        while not self._forks:
            await self._stands.wait()

    async def run(self, reaper: trio.Nursery) -> None:
        """Have a zygote and forks that stand by, until it is cancelled. `reaper` outlives it and reaps the zygotes."""
        self._reaper = reaper
        current.set(self)
        try:
            async with trio.open_nursery() as self._nursery:
                await self._zygotes()
        finally:
            current.set(None)
            self._nursery = None

    async def _zygotes(self) -> None:
        delay = _RETRY
        while True:
            self._answers = False
            await self._one_life()
            self.lives += 1
            delay = _RETRY if self._answers else min(2 * delay, _MAX_RETRY)
            await trio.sleep(delay)

    async def _one_life(self) -> None:
        """From a zygote's start to its end."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        output = Output("zygote")
        self._useless = trio.Event()
        try:
            with theirs:
                child = self._start(theirs, output.write_end)
        except OSError as exc:
            ours.close()
            output.started()
            await output.read()
            log.warning("no process can be forked ahead: %s", exc)
            return
        output.started()
        self.pid, self._requests = child.pid, ours
        assert self._reaper is not None
        self._reaper.start_soon(child.watch)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(output.read)
            nursery.start_soon(self._refill)
            try:
                await _either(child.ended, self._useless)
                if not child.ended.is_set():
                    log.warning("the zygote (process %d) answers no more and is ended", child.pid)
                else:
                    log.info("the zygote (process %d) %s", child.pid, child.how())
            finally:
                self.pid = self._requests = None
                ours.close()
                with trio.CancelScope(shield=True, deadline=trio.current_time() + END_TIMEOUT):
                    await child.end(0)
                nursery.cancel_scope.cancel()

    async def _refill(self) -> None:
        while True:
            self._taken = trio.Event()
            while len(self._forks) + len(self._pending) < STANDING:
                fork = self._ask()
                if fork is None:
                    self._useless.set()
                    return
                self._start_minding(fork)
            await self._taken.wait()
            await trio.sleep(REFILL_DELAY)

    def _ask(self) -> _Fork | None:
        """Ask for a fork; None if the zygote takes no request."""
        if self._requests is None:
            return None
        fork = _Fork(self._useless)
        with fork.theirs:
            try:
                socket.send_fds(self._requests, [b"f"], [fork.theirs.fileno()], socket.MSG_NOSIGNAL)
            except OSError:
                fork.report.close()
                return None
        self._pending.append(fork)
        return fork

    def _start_minding(self, fork: _Fork) -> None:
        assert self._nursery is not None
        fork.scope = trio.CancelScope()
        self._nursery.start_soon(self._mind, fork, fork.scope)

    async def _mind(self, fork: _Fork, scope: trio.CancelScope) -> None:
        """From the request to the moment when the fork is taken (which cancels the scope) or has ended."""
        pidfd = -1
        try:
            with scope:
                with trio.move_on_after(ANSWER_TIMEOUT):
                    await trio.lowlevel.wait_readable(fork.report)
                if fork.taken:
                    return
                if not self._hear(fork):
                    fork.useless.set()
                    return
                pidfd = os.pidfd_open(fork.pid)
                self._forks.append(fork)
                self._stands.set()
                self._stands = trio.Event()
                await trio.lowlevel.wait_readable(pidfd)
        finally:
            if fork in self._pending:
                self._pending.remove(fork)
            if fork in self._forks:
                self._forks.remove(fork)
            if not fork.taken:
                fork.report.close()
                with trio.CancelScope(shield=True, deadline=trio.current_time() + END_TIMEOUT) as ending:
                    if pidfd >= 0:
                        send_signal(pidfd, signal.SIGKILL)
                        await trio.lowlevel.wait_readable(pidfd)
                if pidfd >= 0 and not ending.cancelled_caught:
                    reap(fork.pid)
            if pidfd >= 0:
                os.close(pidfd)
            self._taken.set()

    def _hear(self, fork: _Fork) -> bool:
        if not fork.listen():
            return False
        self._pending.remove(fork)
        self._answers = True
        return True

    def take(self, name: str, control: socket.socket, output: int, environment: Mapping[str, str]) -> Host | None:
        """Make a fork the host `name`. None, after some milliseconds at most, if there is none for it."""
        if _fixed(environment) != self._fixed:
            return None
        try:
            order = messages.encode(messages.Become(name=name, environment=dict(environment)))
        except (InternalError, UnicodeEncodeError):
            return None  # more than a packet holds, or no text
        while (fork := self._next()) is not None:
            fork.taken = True
            if fork.scope is not None:
                fork.scope.cancel()
            self._taken.set()
            try:
                host = Host(fork.pid, fork.report)
            except OSError:
                fork.report.close()
                return None
            try:
                fork.report.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
                socket.send_fds(fork.report, [order], [control.fileno(), output], socket.MSG_NOSIGNAL)
            except OSError:
                self._discard(host)
                continue
            return host
        return None

    def _discard(self, host: Host) -> None:
        """A fork has ended while it stood by."""
        assert self._nursery is not None
        self._nursery.start_soon(host.watch)
        self._nursery.start_soon(host.end, 0)

    def _next(self) -> _Fork | None:
        if self._forks:
            return self._forks.pop()
        if not self._answers or self._nursery is None:
            return None  # it is still starting, or ending
        fork = self._pending[0] if self._pending else self._ask()
        if fork is None:
            return None
        poll = select.poll()
        poll.register(fork.report, select.POLLIN)
        if poll.poll(TAKE_TIMEOUT * 1000) and self._hear(fork):
            return fork
        if fork.scope is None:
            self._start_minding(fork)  # it will be the next one
        return None


def _fixed(environment: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key.startswith(_READ_AT_START)}


async def _either(*events: trio.Event) -> None:
    async with trio.open_nursery() as nursery:

        async def wait(event: trio.Event) -> None:
            await event.wait()
            nursery.cancel_scope.cancel()

        for event in events:
            nursery.start_soon(wait, event)
