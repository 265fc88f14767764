"""One process of a mount with everything that belongs to it: child, control channel, output, heartbeat, instance.

Owns: the descriptors and tasks of one shim or host, and their end. Must never: decide what the end of a process means
for the mount. Called by: mounts.py.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import trio

from udf.errors import ContractError, UserError
from udf.messages import Message
from udf.supervisor import spawn
from udf.supervisor.channel import Channel, ChannelClosedError
from udf.supervisor.child import REAP_TIMEOUT, Child, send_signal
from udf.supervisor.instance import Instance
from udf.supervisor.output import Output

MAX_GENERATIONS = 4  # between a launcher and the driver
DRAIN = 0.5  # after the end: for last messages and last lines, should something else hold the pipe open

T = TypeVar("T")


class Process(Generic[T]):
    """A shim or a driver host. `dead` when nothing of it runs; `over` when nothing more comes from it either."""

    def __init__(self, instance: Instance, decode: Callable[[bytes], T], wake: Callable[[], None]) -> None:
        self.instance = instance
        self.child: Child | None = None
        self.over = False
        self.worker_pid = 0  # a host's driver, once it is known; kept when it has ended
        self.dead = False  # it and all that it started have ended for certain; its last words may be still to come
        self.broken: str | None = None  # the rule of the wire that it broke
        self.silent = 0  # ticks since its last sign of life
        self._decode = decode
        self._wake = wake
        self._channel: Channel[T] | None = None
        self._output: Output | None = None
        self._received_all = trio.Event()
        self._worker_pidfd = -1
        self._problem = "was not started"
        self._scope = trio.CancelScope()

    def start(self, start: Callable[[socket.socket, int], Child]) -> None:
        """Start it; `run` must follow at once, whether that worked or not.

        Not awaited: a start that is cancelled half-way would leave a process that nobody looks after.
        """
        ours, theirs = spawn.control_pair()
        self._channel = Channel(ours, self._decode, f"{self.instance.kind} {self.instance.name}")
        self._output = Output(f"{self.instance.name} ({self.instance.kind})")
        try:
            with theirs:
                self.child = start(theirs, self._output.write_end)
        except (OSError, UserError) as exc:
            self._problem = f"could not be started: {exc}"
        else:
            self.instance.pid = self.child.pid
            self.instance.note("process started")
        finally:
            self._output.started()

    async def run(self, on_message: Callable[[T, list[int]], None], reaper: trio.Nursery) -> None:
        """Look after it until it is over. `reaper` outlives the mount: it reaps what ends late."""
        assert self._channel is not None
        assert self._output is not None
        # Shielded: who cancels the mount must still be able to end its processes in order and hear their last words.
        with trio.CancelScope(shield=True) as self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._output.read)
                if self.child is not None:
                    reaper.start_soon(self.child.watch)
                    nursery.start_soon(self._receive, self._channel, on_message)
                    await self._wait_for_death(self.child)
                    await self.child.ended.wait()
                    with trio.move_on_after(DRAIN):
                        await self._received_all.wait()
                        await self._output.closed.wait()
                nursery.cancel_scope.cancel()
        self._channel.close()
        if self._worker_pidfd >= 0:
            os.close(self._worker_pidfd)
            self._worker_pidfd = -1
        if self.child is None or (self.dead and self.child.ended.is_set()):
            self.dead = True
            self.over = True
            self.instance.pid = None  # the number may be somebody else's soon
        self._wake()

    async def _wait_for_death(self, child: Child) -> None:
        await child.dead.wait()
        if self._worker_pidfd >= 0:  # without a PID namespace it might have outlived an anchor that was killed
            await trio.lowlevel.wait_readable(self._worker_pidfd)
        self.dead = True
        self._wake()

    async def _receive(self, channel: Channel[T], on_message: Callable[[T, list[int]], None]) -> None:
        try:
            while True:
                message, fds = await channel.receive()
                self.silent = 0
                on_message(message, fds)
        except ChannelClosedError:
            pass
        except ContractError as exc:
            self.broken = str(exc)
        finally:
            self._received_all.set()
            self._wake()

    async def send(self, message: Message, fds: Sequence[int] = ()) -> bool:
        """Send; whether it was taken."""
        if self._channel is None:
            return False
        try:
            await self._channel.send(message, fds)
        except ChannelClosedError:
            return False
        return True

    def hang_up(self) -> None:
        """Close our end: a shim then unmounts lazily and exits, a host dies."""
        if self._channel is not None:
            self._channel.close()

    @property
    def last_line(self) -> str:
        """The last that it printed."""
        return self._output.last_line if self._output else ""

    @property
    def last_lines(self) -> list[str]:
        """The last lines that it printed."""
        return self._output.last_lines if self._output else []

    def how(self) -> str:
        """How it ended, with its last words, for the text of an event."""
        how = self.child.how() if self.child else self._problem
        return f"{how} ({self.last_line})" if self.last_line else how

    def adopt_worker(self, pid: int) -> bool:
        """Note the process that a host's launcher started, to be sure of its end; False if it is not its child.

        The pid comes from a process that we do not trust, and we may be root: it is believed only when the kernel
        says that it descends from the launcher, and used only by a descriptor that was opened before that check.
        """
        if self.child is None or self._worker_pidfd >= 0:
            return False
        try:
            descriptor = os.pidfd_open(pid)
        except (OSError, ValueError, OverflowError):
            return False
        if not _descends_from(pid, self.child.pid):
            os.close(descriptor)
            return False
        self._worker_pidfd, self.worker_pid = descriptor, pid
        self.instance.pid = pid
        return True

    async def end(self, grace: float) -> bool:
        """End it and what it started; whether they are gone for certain."""
        if self.child is None:
            return True
        gone = await self.child.end(grace, self._worker_pidfd)
        if self._worker_pidfd >= 0:
            descriptor = os.dup(self._worker_pidfd)
            try:
                send_signal(descriptor, signal.SIGKILL)
                with trio.move_on_after(REAP_TIMEOUT) as scope:
                    await trio.lowlevel.wait_readable(descriptor)
                gone = gone and not scope.cancelled_caught
            finally:
                os.close(descriptor)
        return gone

    def abandon(self) -> None:
        """Stop looking after it; for the end of the mount, when it is over or cannot be ended."""
        self._scope.cancel()

    def kill(self) -> None:
        """SIGKILL for it and what it started, at once and without waiting; `dead` and `over` follow."""
        if self.child is not None:
            self.child.kill(self._worker_pidfd)

    @property
    def status(self) -> int | None:
        """The exit status (a host: its driver's), minus the signal if one ended it; None while it is not known."""
        return None if self.child is None else self.child.status

    @property
    def max_rss(self) -> int:
        """The largest resident set of a host's driver in KiB, known when it is dead; 0 if it is not known."""
        return 0 if self.child is None else self.child.max_rss


def _descends_from(pid: int, ancestor: int) -> bool:
    for _ in range(MAX_GENERATIONS):
        parent = _parent_of(pid)
        if parent == ancestor:
            return True
        if parent is None or parent <= 1:
            return False
        pid = parent
    return False


def _parent_of(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        return int(stat.rpartition(")")[2].split()[1])  # the command, in parentheses, may contain anything
    except (OSError, ValueError, IndexError):
        return None
