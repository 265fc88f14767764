"""A child process of the supervisor, and a driver host, which is a child with a tree of processes below it.

Owns: pidfds, reaping, and the knowledge that something has ended. Must never: start a process (spawn.py and zygote.py
do), or believe anybody but the kernel and a host's anchor about an end.
Called by: spawn.py and zygote.py (make them), process.py and paths.py (look after them).
"""

from __future__ import annotations

import array
import os
import signal
import socket
import subprocess

import trio

from udf import messages
from udf.errors import ContractError

REAP_TIMEOUT = 5.0  # after SIGKILL; a process in D state takes longer, and nobody waits for it
_REPORT_TIMEOUT = 0.1  # for the anchor's word on how the driver ended, when it is certain that it did
_ANCHOR_TIMEOUT = 1.0
_FD_SIZE = array.array("i").itemsize


class Child:
    """One child process. `watch` must run in a nursery as long as the child lives: it reaps it."""

    def __init__(self, process: subprocess.Popen[bytes] | int) -> None:
        self._popen = None if isinstance(process, int) else process
        self.pid = process if isinstance(process, int) else process.pid
        self.ended = trio.Event()
        self.dead = self.ended  # all that it started has ended too; ours start nothing that outlives them
        self.max_rss = 0  # KiB; 0: not known
        self._status: int | None = None
        self._pidfd = os.pidfd_open(self.pid)

    @property
    def status(self) -> int | None:
        """The exit status, minus the signal if one ended it; None while it lives."""
        return self._status

    async def watch(self) -> None:
        """Wait for the end and reap."""
        try:
            await trio.lowlevel.wait_readable(self._pidfd)
            self._status = self._popen.wait() if self._popen is not None else reap(self.pid)
            self.ended.set()
        finally:
            os.close(self._pidfd)
            self._pidfd = -1

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens to a child that has ended."""
        if not self.ended.is_set():
            send_signal(self._pidfd, number)

    def kill(self, worker: int = -1) -> None:
        """SIGKILL for it and what it started, at once and without waiting. `worker`: see Host."""
        self.signal(signal.SIGKILL)

    async def end(self, grace: float, worker: int = -1) -> bool:
        """SIGTERM, SIGKILL after the grace; whether all that it started is gone for certain.

        A host's anchor, which has nothing any more and ends too, is not waited for.
        """
        if grace > 0:
            self.signal(signal.SIGTERM)
            await self._dead_within(grace)
        self.kill(worker)
        if not await self._dead_within(REAP_TIMEOUT):
            self.signal(signal.SIGKILL)  # whatever keeps an anchor from reporting
            await self._dead_within(_ANCHOR_TIMEOUT)
        return self.dead.is_set()

    async def _dead_within(self, seconds: float) -> bool:
        with trio.move_on_after(seconds) as limit:
            await self.dead.wait()
        return not limit.cancelled_caught

    def how(self) -> str:
        """How it ended, for a sentence."""
        return describe_status(self.status)


class Host(Child):
    """A driver host: the child is its anchor, which tells on the report socket what is below it and how that ends.

    `dead` says that the whole tree has ended: the kernel's word, by the pidfd of its first process.
    """

    def __init__(self, process: subprocess.Popen[bytes] | int, report: socket.socket) -> None:
        super().__init__(process)
        self.dead = trio.Event()
        report.setblocking(False)
        self._report = trio.socket.from_stdlib_socket(report)
        self._tree_pidfd = -1
        self._private = False
        self._told: int | None = None
        self._heard_all = trio.Event()

    @property
    def status(self) -> int | None:
        """The driver's exit status as soon as the anchor has told it, or the anchor's own."""
        return self._status if self._told is None else self._told

    async def watch(self) -> None:
        """Wait for the end of the tree and of the anchor, and reap the anchor."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(super().watch)
                nursery.start_soon(self._listen, nursery)
        finally:
            self._report.close()
            if self._tree_pidfd >= 0:
                os.close(self._tree_pidfd)
                self._tree_pidfd = -1

    async def _listen(self, nursery: trio.Nursery) -> None:
        room = socket.CMSG_SPACE(messages.MAX_DESCRIPTORS * _FD_SIZE)
        while True:
            try:
                data, control, _, _ = await self._report.recvmsg(4096, room, socket.MSG_CMSG_CLOEXEC)
            except OSError:
                data, control = b"", []
            fds = descriptors(control)
            if not data:
                break
            try:
                message = messages.decode_from_anchor(data)
            except ContractError:
                message = None
            if isinstance(message, messages.Tree) and fds and self._tree_pidfd < 0:
                self._private, self._tree_pidfd = message.private, fds.pop()
                nursery.start_soon(self._watch_tree)
            elif isinstance(message, messages.Ended):
                self._told, self.max_rss = message.status, message.max_rss
                self._heard_all.set()
            for fd in fds:
                os.close(fd)
        self._heard_all.set()
        if self._tree_pidfd < 0:
            # The anchor has said nothing of a tree, so it started no driver.
            await self.ended.wait()
            self.dead.set()

    async def _watch_tree(self) -> None:
        await trio.lowlevel.wait_readable(self._tree_pidfd)
        with trio.move_on_after(_REPORT_TIMEOUT):
            await self._heard_all.wait()
        self.dead.set()
        with trio.move_on_after(_ANCHOR_TIMEOUT):
            await self.ended.wait()
        self.signal(signal.SIGKILL)  # it has nothing left to do; perhaps somebody has stopped it

    def kill(self, worker: int = -1) -> None:
        """SIGKILL for the whole tree. `worker` is a pidfd of the driver, if there is one."""
        if self._tree_pidfd >= 0 and self._private:
            send_signal(self._tree_pidfd, signal.SIGKILL)  # the kernel ends the rest, the anchor reports and ends
        elif self._tree_pidfd >= 0 and worker >= 0:
            send_signal(worker, signal.SIGKILL)  # only the tree's first process can find and end all the others
        else:
            self.signal(signal.SIGKILL)


def reap(pid: int) -> int:
    """Wait for a child that has ended; its exit status, minus the signal if one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def send_signal(pidfd: int, number: signal.Signals) -> None:
    """Send a signal; nothing happens when the process has ended, or there is no descriptor (-1)."""
    if pidfd >= 0:
        try:
            signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            pass


def descriptors(control: list[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came with a packet; they are the caller's from now on."""
    fds = array.array("i")
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _FD_SIZE])
    return list(fds)


def describe_status(status: int | None) -> str:
    """An exit status in words."""
    if status is None:
        return "did not end"
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
