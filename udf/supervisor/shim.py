"""A shim as the supervisor sees it: its process, what it has said, and what it can be asked.

Owns: the shim's process, a mount's duplicate of its /dev/fuse descriptor, and the questions that wait for their
answers. Must never: decide what the shim's words mean for the endpoint (endpoint.py and recovery.py do), or believe
its texts. Called by: mounts.py, blocks.py, recovery.py.
"""

from __future__ import annotations

import logging
import os
import socket
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from udf import messages
from udf.supervisor import spawn
from udf.supervisor.bell import Bell
from udf.supervisor.child import Child
from udf.supervisor.front import Front, LinkEnd
from udf.supervisor.instance import Instance, Reason
from udf.supervisor.output import printable, sentence
from udf.supervisor.process import Process
from udf.window import create_window

ANSWER_TIMEOUT = 1.0  # a shim that is busy for longer is reported without its figures
SILENCE = 30  # heartbeats; more patient than with a driver: with the shim the endpoint goes

log = logging.getLogger("udf.mounts")
T = TypeVar("T")


@dataclass(frozen=True)
class Listeners:
    """Who is told at once of what the shim says by itself."""

    fault: Callable[[str, str], object]  # the driver broke the link's rules: operation, sentence
    failed: Callable[[str], object]  # the shim gave the driver up: sentence
    overdue: Callable[[str, float], object]  # a request passed its deadline: operation, age
    poison: Callable[[str, str], object]  # a request was given up: operation, path
    detached: Callable[[], object]  # a lazy unmount is done
    exports: Callable[[], object] = lambda: None  # what a block shim exports has changed


def _nobody(*_: object) -> None:
    pass


NOBODY = Listeners(fault=_nobody, failed=_nobody, overdue=_nobody, poison=_nobody, detached=_nobody)


@dataclass
class _Questions:
    """Answers by the number of the question; None until one has come."""

    counters: dict[int, dict[str, int | float] | None] = field(default_factory=dict)
    requests: dict[int, messages.Requests | None] = field(default_factory=dict)


class Shim(Front):
    """One shim. `process` is over when it has ended."""

    listeners: Listeners  # set before it is started

    def __init__(self, instance: Instance, bell: Bell) -> None:
        super().__init__()
        self.instance = instance
        self.process = Process(instance, messages.decode_from_shim, bell.ring)
        self.up = False
        self.failed: str | None = None  # why it cannot begin
        self.busy = 0  # unmounts that it had to refuse
        self.unmounted = False
        self.external = False  # somebody else unmounted it
        self.unsaved = ""  # a sentence: what the driver may not have saved by then
        self.detached = False  # out of the tree, and serves what is open
        self.is_silent = False  # it gave no sign of life for too long and was ended
        self._bell = bell
        self._questions = _Questions()
        self._number = 0

    @property
    def is_up(self) -> bool:
        """Whether programs can use it."""
        return self.up

    @property
    def is_over(self) -> bool:
        """Whether the endpoint has ended, as far as the shim's part goes."""
        return self.process.over or self.process.broken is not None or self.unmounted

    @property
    def has_trouble(self) -> bool:
        """Whether it cannot get to the point of being up."""
        return self.failed is not None or self.process.over or self.process.broken is not None

    def problem(self) -> tuple[str, Reason]:
        """Why that is so."""
        if self.failed is not None:
            return self.failed, Reason.REFUSED
        if self.process.broken is not None:
            return self.process.broken, Reason.CONTRACT
        return f"the shim {self.process.how()}", Reason.CRASHED

    def start(self, nursery: trio.Nursery, reaper: trio.Nursery) -> None:
        """Start the process and look after it; it may outlive its endpoint (see Mount)."""
        self.process.start(self._spawn)
        reaper.start_soon(self._look_after, reaper)

    async def _look_after(self, reaper: trio.Nursery) -> None:
        try:
            await self.process.run(self._on_message, reaper)
        except Exception:
            # In the nursery of all, where a mistake with one shim must not be the end of every other.
            log.exception("%s: looking after its shim failed by our own mistake", self.instance.name)
            self.process.broken = "the supervisor made a mistake: see its log"
            self.process.kill()
            self._bell.ring()

    @abstractmethod
    def _spawn(self, control: socket.socket, output: int) -> Child:
        """Start the process itself."""

    def link(self) -> tuple[LinkEnd, LinkEnd]:
        """A link for one generation: the shim's end, the driver's end."""
        ours, theirs = spawn.link_pair()
        return LinkEnd(ours), LinkEnd(theirs)

    async def attach(self, generation: int, *, counted: bool, link: list[int]) -> None:
        """Offer a new generation; `answer` will be set, or its link is lost without one."""
        self.linked, self.lost, self.answer = True, None, None
        await self.process.send(messages.Attach(generation=generation, counted=counted), link)

    async def fail(self, text: str) -> None:
        """There is no new generation for now."""
        await self.process.send(messages.Fail(text=text))

    async def detach(self, text: str, *, wait: float = 0.0, max_stale: float = 0.0) -> None:
        """The device is gone; only a mount has what is cached, and requests that may wait."""
        await self.process.send(messages.Detach(text=text, wait=wait, max_stale=max_stale))
        self.linked = False  # it lets go of its link without a word

    def tick(self) -> None:
        """A sign of life is due; without one for too long it is ended."""
        self.process.silent += 1
        if self.process.silent > SILENCE and not self.process.over:
            log.error("%s: the shim gave no sign of life for %d s and is ended", self.instance.name, SILENCE)
            self.is_silent = True
            self.process.kill()

    async def finish(self, grace: float) -> bool:
        """Hang up and have it end; whether it did so in order. Bounded in time."""
        process = self.process
        if process.over:
            return self.unmounted
        process.hang_up()  # it lets go of all that it serves and exits
        await self._bell.within(grace, lambda: process.over)
        orderly = process.over and process.status == 0
        await process.end(grace)
        return self.unmounted or orderly

    async def counters(self) -> dict[str, int | float]:
        """Its counters, or nothing if it does not answer in time."""
        waiting = self._questions.counters
        answer = await self._ask(waiting, lambda number: messages.AskCounters(id=number))
        return {printable(key.encode()[:60]): value for key, value in (answer or {}).items()}

    async def requests(self) -> messages.Requests | None:
        """The requests that wait, or None if it does not answer in time."""
        return await self._ask(self._questions.requests, lambda number: messages.AskRequests(id=number))

    async def _ask(self, waiting: dict[int, T | None], question: Callable[[int], messages.Message]) -> T | None:
        if not self.up:
            return None  # the first thing that a shim may be told is what to serve
        self._number += 1
        number = self._number
        waiting[number] = None
        try:
            if await self.process.send(question(number)):
                await self._bell.within(ANSWER_TIMEOUT, lambda: waiting[number] is not None or self.process.over)
            return waiting[number]
        finally:
            del waiting[number]

    async def abort(self, request: int) -> bool:
        """Have one request answered EIO; whether the shim was told."""
        return self.up and await self.process.send(messages.Abort(request=request))

    @abstractmethod
    def _begins(self, message: messages.Mounted | messages.Serving, fds: list[int]) -> None:
        """It says that it serves; the descriptors are ours from now on."""

    def _on_message(self, message: messages.FromShim, fds: list[int]) -> None:
        match message:
            case messages.Mounted() | messages.Serving():
                self._begins(message, fds)
                self.up = True
            case messages.ShimFailed(error=error):
                self.failed = sentence(error)
            case messages.Busy():
                self.busy += 1
            case messages.Unmounted(external=external, unsaved=unsaved):
                self.unmounted, self.external, self.unsaved = True, external, sentence(unsaved)
            case messages.Detached():
                self.detached = True
                self.listeners.detached()
            case messages.LinkLost():
                self.linked, self.lost = False, message
            case messages.Attached():
                self.answer = message
            case messages.Refused():
                self.linked, self.answer = False, message
            case messages.Overdue(op=op, age=age):
                self.listeners.overdue(printable(op.encode()[:40]), age)
            case messages.Poison(op=op, path=path):
                self.listeners.poison(printable(op.encode()[:40]), sentence(path))
            case messages.StateChange(state=state, text=text):
                # The shim's own view: it can lower ours, never raise it. A lost link has its own message.
                if state == "FAILED" and self.linked:
                    self.listeners.failed(sentence(text))
            case messages.ShimFault(op=op, error=error):
                self.listeners.fault(op, error)
            case messages.Counters(id=number, counters=counters):
                if number in self._questions.counters:
                    self._questions.counters[number] = counters
            case messages.Requests(id=number):
                if number in self._questions.requests:
                    self._questions.requests[number] = message
            case messages.ShimHeartbeat():
                pass
        self._bell.ring()


class MountShim(Shim):
    """The shim of a mount."""

    def __init__(self, instance: Instance, bell: Bell, run_as: spawn.Identity | None, window: int = 0) -> None:
        """`window`: bytes of memory that each generation of the driver shares with the shim; 0: none."""
        super().__init__(instance, bell)
        self._run_as = run_as
        self._window = window
        self._device = -1  # a duplicate of the shim's /dev/fuse: a restarted shim will continue with it

    def _spawn(self, control: socket.socket, output: int) -> Child:
        return spawn.start_shim(self.instance.name, control, output, self._run_as)

    def link(self) -> tuple[LinkEnd, LinkEnd]:
        """A link for one generation, and its window."""
        if not self._window:
            return super().link()
        window = create_window(self.instance.name, self._window)
        ours, theirs = spawn.link_pair()
        return LinkEnd(ours, window), LinkEnd(theirs, os.dup(window))

    async def trace(self, write_end: int | None) -> bool:
        """Switch tracing to this descriptor, or off; whether the shim was told."""
        message = messages.Trace(on=write_end is not None)
        return self.up and await self.process.send(message, [] if write_end is None else [write_end])

    def drop_device(self) -> None:
        """Let go of the device: without the shim nobody will answer on it."""
        if self._device >= 0:
            os.close(self._device)
            self._device = -1

    def _begins(self, message: messages.Mounted | messages.Serving, fds: list[int]) -> None:
        self.drop_device()
        if fds:
            self._device = fds[0]


class BlockShim(Shim):
    """The shim of the block devices of one driver."""

    def __init__(self, instance: Instance, bell: Bell) -> None:
        super().__init__(instance, bell)
        self.exports: list[messages.Export] = []

    def _spawn(self, control: socket.socket, output: int) -> Child:
        return spawn.start_block_shim(self.instance.name, control, output)

    def _begins(self, message: messages.Mounted | messages.Serving, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        if isinstance(message, messages.Serving):
            self.exports = message.exports
            self.listeners.exports()
