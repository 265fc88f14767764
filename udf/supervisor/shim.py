"""The shim of one mount as the supervisor sees it: its process, what it has said, and what it can be asked.

Owns: the shim's process, the duplicate of its /dev/fuse descriptor, and the questions that wait for their answers.
Must never: decide what the shim's words mean for the mount (mounts.py and recovery.py do), or believe its texts.
Called by: mounts.py, recovery.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from udf import messages
from udf.supervisor import spawn
from udf.supervisor.bell import Bell
from udf.supervisor.instance import Instance
from udf.supervisor.output import printable, sentence
from udf.supervisor.plan import MountPlan
from udf.supervisor.process import Process

ANSWER_TIMEOUT = 1.0  # a shim that is busy for longer is reported without its figures

T = TypeVar("T")


@dataclass(frozen=True)
class Listeners:
    """Who is told at once of what the shim says by itself."""

    fault: Callable[[str, str], object]  # the driver broke the link's rules: operation, sentence
    failed: Callable[[str], object]  # the shim gave the driver up: sentence
    overdue: Callable[[str, float], object]  # a request passed its deadline: operation, age
    poison: Callable[[str, str], object]  # a request was given up: operation, path
    detached: Callable[[], object]  # a lazy unmount is done


@dataclass
class _Questions:
    """Answers by the number of the question; None until one has come."""

    counters: dict[int, dict[str, int | float] | None] = field(default_factory=dict)
    requests: dict[int, messages.Requests | None] = field(default_factory=dict)


class Shim:
    """One shim. `process` is over when it has ended."""

    listeners: Listeners  # set before it is started

    def __init__(self, instance: Instance, bell: Bell) -> None:
        self.process = Process(instance, messages.decode_from_shim, bell.ring)
        self.mounted = False
        self.failed: str | None = None  # why it cannot mount
        self.busy = 0  # unmounts that it had to refuse
        self.unmounted = False
        self.external = False  # somebody else unmounted it
        self.detached = False  # out of the tree, and serves what is open
        self.linked = True  # it has a link whose end it has not seen
        self.lost: messages.LinkLost | None = None  # the last loss of a link
        self.answer: messages.Attached | messages.Refused | None = None  # to the last `attach`
        self._bell = bell
        self._questions = _Questions()
        self._number = 0
        self._device = -1  # a duplicate of the shim's /dev/fuse: a restarted shim will continue with it

    @property
    def is_over(self) -> bool:
        """Whether the mount has ended, as far as the shim's part goes."""
        return self.process.over or self.process.broken is not None or self.unmounted

    @property
    def has_trouble(self) -> bool:
        """Whether it cannot get to the point of having mounted."""
        return self.failed is not None or self.process.over or self.process.broken is not None

    def start(self, plan: MountPlan, nursery: trio.Nursery, reaper: trio.Nursery) -> None:
        """Start the process and look after it."""
        self.process.start(lambda control, output: spawn.start_shim(plan.name, control, output, plan.shim_as))
        nursery.start_soon(self.process.run, self._on_message, reaper)

    async def attach(self, generation: int, *, counted: bool, link: int) -> None:
        """Offer a new generation; `answer` will be set, or its link is lost without one."""
        self.linked, self.lost, self.answer = True, None, None
        await self.process.send(messages.Attach(generation=generation, counted=counted), [link])

    async def counters(self) -> dict[str, int | float]:
        """Its counters, or nothing if it does not answer in time."""
        waiting = self._questions.counters
        answer = await self._ask(waiting, lambda number: messages.AskCounters(id=number))
        return {printable(key.encode()[:60]): value for key, value in (answer or {}).items()}

    async def requests(self) -> messages.Requests | None:
        """The requests that wait, or None if it does not answer in time."""
        return await self._ask(self._questions.requests, lambda number: messages.AskRequests(id=number))

    async def _ask(self, waiting: dict[int, T | None], question: Callable[[int], messages.Message]) -> T | None:
        if not self.mounted:
            return None  # the first thing that the shim may be told is what to mount
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
        return self.mounted and await self.process.send(messages.Abort(request=request))

    async def trace(self, write_end: int | None) -> bool:
        """Switch tracing to this descriptor, or off; whether the shim was told."""
        message = messages.Trace(on=write_end is not None)
        return self.mounted and await self.process.send(message, [] if write_end is None else [write_end])

    def drop_device(self) -> None:
        """Let go of the device: without the shim nobody will answer on it."""
        if self._device >= 0:
            os.close(self._device)
            self._device = -1

    def _on_message(self, message: messages.FromShim, fds: list[int]) -> None:
        match message:
            case messages.Mounted():
                self.drop_device()
                self._device = fds[0]
                self.mounted = True
            case messages.ShimFailed(error=error):
                self.failed = sentence(error)
            case messages.Busy():
                self.busy += 1
            case messages.Unmounted(external=external):
                self.unmounted, self.external = True, external
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
