"""One generation of a driver: a host process from its start to its certain death.

Owns: the process, what it has said, and in which way it died. Must never: decide what follows (recovery.py does), or
believe a driver. Called by: recovery.py.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable

import trio

from udf import messages
from udf.supervisor import procfs, restart, spawn
from udf.supervisor.bell import Bell
from udf.supervisor.instance import EventLog, Instance
from udf.supervisor.lease import Lease
from udf.supervisor.output import printable, sentence
from udf.supervisor.plan import DriverPlan
from udf.supervisor.process import Process
from udf.supervisor.restart import Kind

MAX_FAULTS = 200  # told of one by one; a driver that finds more ways to misbehave is counted only
MAX_TRACEBACK = 50  # lines

log = logging.getLogger("udf.mounts")


class Generation:
    """A driver host. It has no link, and has touched nothing of its source, until `serve`."""

    def __init__(
        self, plan: DriverPlan, bell: Bell, on_fault: Callable[[str, str], bool], lease: Lease | None = None
    ) -> None:
        self.plan = plan
        # Not the endpoint's driver instance, which lives longer than any process; its events are nobody's.
        self.instance = Instance(plan.name, "driver", EventLog())
        self.process = Process(self.instance, messages.decode_from_host, self._on_change)
        self.number = 0  # the generation that it was offered as; 0: it was not yet
        self.ready: messages.Ready | None = None
        self.failed: str | None = None  # why it cannot serve, in its own words
        self.verdict: tuple[Kind, str] | None = None  # why we end it; the first reason stands
        self.loop_age = 0.0
        self.traceback: list[str] = []  # of the last mistake that it survived
        self._resident: int | None = None  # bytes, as last seen
        self.stopping = False  # it was told to end
        self.ejects = False  # and is to be told that its device is taken out
        self._bell = bell
        self._on_fault = on_fault
        self._lease = lease  # of its device, as that is plugged in now
        self._is_spare = False
        self.was_told = False  # it may have touched its source
        self._serving_since: float | None = None
        self._ended_at: float | None = None

    def start(self, nursery: trio.Nursery, reaper: trio.Nursery) -> None:
        """Start the process and look after it. It waits for its orders."""
        plan = self.plan
        self.process.start(lambda control, output: spawn.start_host(plan.name, control, output, plan.environment))
        nursery.start_soon(self.process.run, self._on_message, reaper)

    def _on_change(self) -> None:
        # What is left of its output is read later; the pause does not wait for that.
        if self._ended_at is None and self.is_ended:
            self._ended_at = trio.current_time()
        self._bell.ring()

    @property
    def _device(self) -> messages.DeviceSpec | None:
        return None if self._lease is None else self._lease.spec

    async def prepare(self) -> None:
        """Make it a spare: it gets as far as it can without link and source."""
        self._is_spare = True
        await self.process.send(self.plan.start_message(spare=True, device=self._device))

    async def serve(self, *fds: int) -> None:
        """Give it link, device and state store; from now on it may touch its source. `ready` or trouble follow."""
        self.was_told = True
        message = messages.TakeOver() if self._is_spare else self.plan.start_message(device=self._device)
        await self.process.send(message, fds)

    def serves(self, number: int) -> None:
        """The shim has taken it as this generation."""
        self.number, self._serving_since = number, trio.current_time()

    @property
    def is_ended(self) -> bool:
        """Whether it has ended for certain, with all that it started."""
        return self.process.dead

    @property
    def is_lost(self) -> bool:
        """Whether it will not serve any more, for a reason that is known on this side of the link."""
        return self.is_ended or self.verdict is not None or self.process.broken is not None

    @property
    def cannot_start(self) -> bool:
        """Whether `ready` will not come."""
        return self.is_lost or self.failed is not None

    @property
    def served(self) -> float | None:
        """So many seconds it has served, until now or its end; None if it never did."""
        if self._serving_since is None:
            return None
        return max(0.0, (self._ended_at or trio.current_time()) - self._serving_since)

    @property
    def status(self) -> int | None:
        """Its exit status, minus the signal if one ended it."""
        return self.process.child.status if self.process.child is not None else None

    def condemn(self, kind: Kind, text: str) -> None:
        """Say why it must be ended. What has ended by itself needs no reason of ours."""
        if not self.is_lost:
            self.verdict = (kind, text)
            self._bell.ring()

    def tick(self) -> None:
        """A heartbeat is due; look at its memory while it can be seen."""
        self.process.tick()
        if self.instance.pid is not None:
            self._resident = procfs.resident(self.instance.pid) or self._resident

    @property
    def memory(self) -> int | None:
        """The most bytes that it had in memory, or as many as were last seen; None if that is not known."""
        child = self.process.child
        return child.max_rss * 1024 if child is not None and child.max_rss else self._resident

    def cause(self) -> tuple[Kind, str]:
        """Why it is lost: the kind and a sentence."""
        if self.verdict is not None:
            return self.verdict
        if self.process.broken is not None:
            return Kind.CONTRACT, self.process.broken
        if self.failed is not None:
            return Kind.REFUSED, f"the driver {self.plan.driver_name} did not start: {self.failed}"
        kind = restart.classify(self.status, out_of_memory=self.process.oom_killed)
        when = "" if self.ready is not None or not self.was_told else " before it was ready"
        by = " (the kernel was out of memory)" if kind is Kind.MEMORY else ""
        return kind, f"the driver {self.process.how()}{by}{when}"

    async def hear_last_words(self, seconds: float) -> None:
        """Wait so long at most for the last that it printed; who was killed had no time for any."""
        if self.is_ended and self.status != -signal.SIGKILL:
            await self._bell.within(seconds, lambda: self.process.over)

    def kill(self) -> None:
        """SIGKILL, at once and without waiting."""
        self.process.kill()

    async def stop(self, grace: float, *, linked: bool = False) -> bool:
        """Have it end in an orderly way; whether it did so in time. `linked`: its link is kept until then."""
        self.stopping = True
        await self.process.send(messages.Stop(linked=linked, eject=self.ejects))
        return await self._bell.within(grace, lambda: self.is_ended)

    async def end(self, grace: float) -> bool:
        """End it with all that it started; whether that is gone for certain."""
        return self.is_ended or await self.process.end(grace)

    def _on_message(self, message: messages.FromHost, _fds: list[int]) -> None:
        match message:
            case messages.Started(pid=pid):
                if not self.process.adopt_worker(pid):
                    log.warning("%s: the driver host named process %d, which is not its child", self.plan.name, pid)
            case messages.Warm():
                pass  # a spare's; it is of use before that too
            case messages.Ready():
                if self.ready is None:
                    self.ready = message
            case messages.HostFailed(error=error):
                if self.failed is None:
                    self.failed = sentence(error)
            case messages.HostHeartbeat(loop_age=age):
                self.loop_age = age
            case messages.HostFault(op=op, error=error, traceback=traceback):
                lines = [printable(line.encode()[:300]) for line in traceback.splitlines()[-MAX_TRACEBACK:]]
                self.traceback = [f"in {printable(op.encode()[:40])}: {sentence(error)}", *lines]
                if self._on_fault(op, error):
                    for line in lines:
                        log.info("%s:   %s", self.plan.name, line)
        self._bell.ring()
