"""One mount: a shim and a driver host, started together, watched, and ended in order.

Owns: the life of the two processes and what their ends, silences and mistakes mean for the mount's state.
Must never: touch the mountpoint (paths.py does, in a process of its own), or believe a driver. The driver's death does
not end the mount: the shim goes on with what it knows, and the mount is FAILED (recovery will start here).
Called by: registry.py. A little over 400 lines, because start, watch and end share one state and are read together.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field

import trio

from udf import messages
from udf.supervisor import paths, spawn
from udf.supervisor.bell import Bell
from udf.supervisor.instance import EventLog, Instance, Reason, State
from udf.supervisor.output import printable
from udf.supervisor.plan import HEARTBEAT, BusyError, MountPlan, StartFailedError
from udf.supervisor.process import Process
from udf.supervisor.trace import TraceFeed

HOST_SILENCE = 10  # heartbeats; counted in our own ticks, so that our own sleep is never taken for a driver's
SHIM_SILENCE = 30  # more patient: with the shim the mount goes
LINK_GRACE = 2.0  # from the loss of the link to the end of the process behind it
STOP_GRACE = 5.0  # for the host to end after `stop`
TERM_GRACE = 2.0  # and after SIGTERM
COUNTERS_TIMEOUT = 1.0
UNMOUNT_TIMEOUT = 40.0  # longer than a driver's usual deadline: an unmount writes back first
MAX_FAULTS = 200  # told of one by one; a driver that finds more ways to misbehave is counted only

log = logging.getLogger("udf.mounts")


@dataclass
class _ShimNews:
    """What the shim has said so far."""

    mounted: bool = False
    failed: str | None = None
    busy: int = 0
    unmounted: bool = False
    external: bool = False
    detached: bool = False
    link_lost: bool = False
    counters: dict[int, dict[str, int | float]] = field(default_factory=dict)


class Mount:
    """A mount from its start to GONE."""

    def __init__(self, plan: MountPlan, events: EventLog, reaper: trio.Nursery) -> None:
        self.plan = plan
        self.driver = Instance(plan.name, "driver", events)
        self.shim = Instance(plan.name, "shim", events)
        self.instance = Instance(plan.name, "mount", events, needs=[self.driver, self.shim])
        self.generation = 1
        self.faults = 0
        self.was_started = False  # whether it could ever be used
        self.trace = TraceFeed(self._set_trace)
        self.ended = trio.Event()
        self._reaper = reaper
        self._bell = Bell()
        self._host = Process(self.driver, messages.decode_from_host, self._bell.ring)
        self._shim = Process(self.shim, messages.decode_from_shim, self._bell.ring)
        self._news = _ShimNews()
        self._ready: messages.Ready | None = None
        self._host_failed: str | None = None
        self._loop_age = 0.0
        self._asked_to_mount = False
        self._stopping: Reason | None = None
        self._cut_off = False  # the host had to be ended by a signal after an orderly unmount
        self._ending = False
        self._unmounting = trio.Lock()
        self._device = -1  # a duplicate of the shim's /dev/fuse: a restarted shim will continue with it
        self._counters_id = 0

    @property
    def is_lazy(self) -> bool:
        """Whether it is out of the tree already and only serves what is still open."""
        return self._news.detached

    @property
    def is_gone(self) -> bool:
        """Whether nothing of it is left."""
        return self.instance.state is State.GONE

    # ---- life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start, report `started` when it can be used, and return when it is GONE. UserError if it cannot start."""
        problem: StartFailedError | None = None
        try:
            async with trio.open_nursery() as nursery:
                try:
                    with trio.move_on_after(self.plan.start_timeout) as limit:
                        problem = await self._start(nursery)
                    if limit.cancelled_caught:
                        problem = self._too_slow()
                    if problem is None:
                        self._activate()
                        self.was_started = True
                        task_status.started()
                        nursery.start_soon(self._watch_host)
                        nursery.start_soon(self._watch_heartbeats)
                        await self._bell.until(
                            lambda: self._shim.over or self._shim.broken is not None or self._news.unmounted
                        )
                        await self._bell.within(TERM_GRACE, lambda: self._shim.over)
                finally:
                    with trio.CancelScope(shield=True):
                        await self._tear_down(problem)
                    nursery.cancel_scope.cancel()
        finally:
            self.trace.close()
            self.ended.set()
        if problem is not None:
            try:
                raise problem
            finally:
                del problem  # its traceback holds this frame: a circle that would keep the mount in memory

    async def _start(self, nursery: trio.Nursery) -> StartFailedError | None:
        plan = self.plan
        shim_end, driver_end = spawn.link_pair()
        with shim_end, driver_end:
            self._shim.start(lambda control, output: spawn.start_shim(plan.name, control, output, plan.shim_as))
            nursery.start_soon(self._shim.run, self._on_shim, self._reaper)
            self._host.start(lambda control, output: spawn.start_host(plan.name, control, output, plan.environment))
            nursery.start_soon(self._host.run, self._on_host, self._reaper)
            await self._host.send(plan.start_message(), [driver_end.fileno()])
            driver_end.close()  # the driver's end is the driver's alone, so that its death is seen on the other one
            self.driver.note("waiting for ready")
            await self._bell.until(lambda: self._ready is not None or self._host_trouble() or self._shim_trouble())
            if self._ready is None:
                return self._could_not_start()
            self.driver.note("serving")
            self.shim.note("waiting for the driver's first answer, then mounting")
            self._asked_to_mount = True
            await self._shim.send(plan.mount_message(self._ready), [shim_end.fileno()])
        await self._bell.until(lambda: self._news.mounted or self._shim_trouble() or self._host_trouble())
        return None if self._news.mounted and not self._shim_trouble() else self._could_not_start()

    def _activate(self) -> None:
        self.shim.change(State.ACTIVE, Reason.READY)
        self.driver.change(State.ACTIVE, Reason.READY)
        self.instance.change(State.ACTIVE, Reason.READY, f"{self.plan.driver_name} on {self.plan.mountpoint}")
        log.info("%s: %s is mounted on %s", self.plan.name, self.plan.driver_name, self.plan.mountpoint)

    def _host_trouble(self) -> bool:
        return self._host_failed is not None or self._host.over or self._host.broken is not None

    def _shim_trouble(self) -> bool:
        return self._news.failed is not None or self._shim.over or self._shim.broken is not None

    def _could_not_start(self) -> StartFailedError:
        name, reason = self.plan.driver_name, Reason.REFUSED
        if self._host_failed is not None:
            sentence = f"the driver {name} did not start: {self._host_failed}"
        elif self._host.broken is not None:
            sentence, reason = self._host.broken, Reason.CONTRACT
        elif self._host.over:
            sentence, reason = f"the driver {name} {self._host.how()} before it was ready", Reason.EXITED
        elif self._news.failed is not None:
            sentence = self._news.failed
            if self.plan.mountpoint not in sentence:
                sentence = f"cannot mount on {self.plan.mountpoint}: {sentence}"
        elif self._shim.broken is not None:
            sentence, reason = self._shim.broken, Reason.CONTRACT
        else:
            sentence, reason = f"cannot mount on {self.plan.mountpoint}: the shim {self._shim.how()}", Reason.CRASHED
        return StartFailedError(sentence, self.instance.tree(), reason)

    def _too_slow(self) -> StartFailedError:
        waiting = self.shim.text if self._ready is not None else f"the driver is {self.driver.text or 'not started'}"
        sentence = f"{self.plan.name} was not mounted in {self.plan.start_timeout:g} s ({waiting}): see its log lines"
        return StartFailedError(sentence, self.instance.tree(), Reason.TIMEOUT)

    async def _tear_down(self, problem: StartFailedError | None) -> None:
        """End both processes, the shim first, and leave the mountpoint clean. Bounded in time."""
        self._ending = True
        cancelled = problem is None and self.instance.state is State.STARTING
        orderly = self._news.unmounted
        if not self._shim.over:
            self._shim.hang_up()  # it unmounts lazily and exits
            await self._bell.within(TERM_GRACE, lambda: self._shim.over)
            orderly = orderly or (self._shim.over and self._shim.child is not None and self._shim.child.status == 0)
            await self._shim.end(TERM_GRACE)
        self._drop_device()  # or programs would wait for ever on a connection that nobody serves
        left = ""
        if self._asked_to_mount and not orderly:
            left = await paths.clean(self.plan.mountpoint, self.plan.shim_as)
        if left:
            log.warning("%s: %s", self.plan.name, left)
        await self._stop_host()
        self._shim.abandon()
        self._host.abandon()
        if problem is not None:
            word, text = problem.reason, str(problem)
        elif cancelled:
            word, text = Reason.OPERATOR, "given up while it started"
        else:
            word, text = self._why_gone()
        for instance in (self.shim, self.driver, self.instance):
            if instance.can(State.GONE):
                instance.change(State.GONE, word, f"{text} {left}".rstrip())

    def _why_gone(self) -> tuple[Reason, str]:
        if self._stopping is Reason.HUNG:
            return Reason.HUNG, f"the shim gave no sign of life for {SHIM_SILENCE} s and was ended"
        if self._news.unmounted:
            if self._news.external and self._stopping is None:
                return Reason.EXTERNAL, "unmounted by somebody else"
            text = "unmounted, but the driver was ended before it had finished" if self._cut_off else "unmounted"
            return self._stopping or Reason.EXTERNAL, text
        if self._stopping is not None:
            return self._stopping, "unmounted lazily"
        if self._shim.broken is not None:
            return Reason.CONTRACT, self._shim.broken
        text = f"the shim {self._shim.how()}"
        log.error("%s: %s; %s is unmounted", self.plan.name, text, self.plan.mountpoint)
        return Reason.CRASHED, text

    def _stop_grace(self) -> float:
        """Seconds for the host to end; a foreign program may have to save, and that takes as long as a request may."""
        if self._ready is None:
            return 0.0  # it has served nothing yet
        return STOP_GRACE if self.plan.driver.command is None else max(STOP_GRACE, self.plan.deadline)

    async def _stop_host(self) -> None:
        if self._host.child is None:
            return
        if not self._host.over and self.driver.state is not State.FAILED:
            await self._host.send(messages.Stop())
            if not await self._bell.within(self._stop_grace(), lambda: self._host.over):
                self._cut_off = True
                log.warning(
                    "%s: the driver did not end within %g s of its unmount and is ended; what it had not saved is lost",
                    self.plan.name,
                    self._stop_grace(),
                )
        if not await self._host.end(TERM_GRACE):
            log.error(
                "%s: process %s of the driver cannot be ended; it waits in the kernel", self.plan.name, self.driver.pid
            )

    # ---- watching

    async def _watch_host(self) -> None:
        await self._bell.until(lambda: self._host.over or self._host.broken is not None or self._news.link_lost)
        if self._host.broken is not None:
            self._driver_failed(Reason.CONTRACT, self._host.broken)
            return
        await self._bell.within(LINK_GRACE, lambda: self._host.over)
        if self._host.over:
            self._driver_failed(Reason.EXITED, f"the driver {self._host.how()}")
        else:
            self._driver_failed(Reason.EXITED, "the driver closed its link and did not end")

    async def _watch_heartbeats(self) -> None:
        while not self._shim.over:
            await trio.sleep(HEARTBEAT)
            self._shim.silent += 1
            self._host.silent += 1
            if self._shim.silent > SHIM_SILENCE and not self._shim.over:
                log.error("%s: the shim gave no sign of life for %d s and is ended", self.plan.name, SHIM_SILENCE)
                self._stopping = Reason.HUNG
                self._shim.kill()
                return
            if self.driver.state is not State.ACTIVE:
                continue
            if self._host.silent > HOST_SILENCE:
                self._driver_failed(Reason.HUNG, f"the driver gave no sign of life for {HOST_SILENCE} s")
            elif self._loop_age > max(self.plan.deadline, HOST_SILENCE):
                self._driver_failed(Reason.HUNG, f"the driver's loop has not turned for {self._loop_age:.0f} s")

    def _driver_failed(self, reason: Reason, text: str) -> None:
        """The driver is lost; recovery will begin here. The mount stays, with what the shim knows."""
        if self._ending or self._shim.over or self._news.unmounted or not self.driver.can(State.FAILED):
            return
        log.error("%s: %s; what is not cached fails now until it is unmounted", self.plan.name, text)
        self.driver.change(State.FAILED, reason, text)
        if self.instance.can(State.FAILED):
            self.instance.change(State.FAILED, reason, text)
        self._host.kill()

    # ---- what the processes say

    def _on_host(self, message: messages.FromHost, _fds: list[int]) -> None:
        match message:
            case messages.Started(pid=pid):
                if not self._host.adopt_worker(pid):
                    log.warning("%s: the driver host named process %d, which is not its child", self.plan.name, pid)
            case messages.Ready():
                if self._ready is None:
                    self._ready = message
            case messages.HostFailed(error=error):
                if self._host_failed is None:
                    self._host_failed = _sentence(error)
            case messages.HostHeartbeat(loop_age=age):
                self._loop_age = age
            case messages.HostFault(op=op, error=error, traceback=traceback):
                if self._fault(op, error):
                    for line in traceback.splitlines()[-50:]:
                        log.info("%s:   %s", self.plan.name, printable(line.encode()[:300]))
        self._bell.ring()

    def _on_shim(self, message: messages.FromShim, fds: list[int]) -> None:
        news = self._news
        match message:
            case messages.Mounted():
                self._drop_device()
                self._device = fds[0]
                news.mounted = True
            case messages.ShimFailed(error=error):
                news.failed = _sentence(error)
            case messages.Busy():
                news.busy += 1
            case messages.Unmounted(external=external):
                news.unmounted, news.external = True, external
            case messages.Detached():
                news.detached = True
                self.instance.note("unmounted lazily; files that are open are still served")
            case messages.LinkLost():
                news.link_lost = True
            case messages.StateChange(state=state, text=text):
                # The shim's own view: it can lower ours, never raise it. A lost link has its own message and watcher.
                if state == State.FAILED and not news.link_lost:
                    self._driver_failed(Reason.CONTRACT, _sentence(text))
            case messages.ShimFault(op=op, error=error):
                self._fault(op, error)
            case messages.Counters(id=number, counters=counters):
                if number in news.counters:
                    news.counters[number] = counters
            case messages.ShimHeartbeat():
                pass
        self._bell.ring()

    def _fault(self, operation: str, text: str) -> bool:
        self.faults += 1
        if self.faults > MAX_FAULTS:
            return False
        operation, text = printable(operation.encode()[:40]), _sentence(text)
        self.driver.fault(operation, text)
        log.warning("%s: the driver %s broke in %s: %s", self.plan.name, self.plan.driver_name, operation, text)
        return True

    # ---- what the operator asks

    async def unmount(self, reason: Reason, *, lazy: bool) -> None:
        """Unmount and wait until it is GONE (or, `lazy`, out of the tree). BusyError when files are open."""
        async with self._unmounting:
            if self.is_gone or self._shim.over:
                await self.ended.wait()
                return
            if self._news.detached:
                return
            before, was = self._news.busy, self._stopping
            self._stopping = reason
            await self._shim.send(messages.Unmount(lazy=lazy))
            done = await self._bell.within(
                UNMOUNT_TIMEOUT,
                lambda: self._shim.over or self._news.unmounted or self._news.detached or self._news.busy > before,
            )
            if self._shim.over or self._news.unmounted:
                await self.ended.wait()
                return
            if self._news.detached:
                return
            self._stopping = was
        if done:
            sentence = f"{self.plan.mountpoint} is in use: close the files on it, or unmount it lazily"
        else:
            sentence = (
                f"{self.plan.mountpoint} was not unmounted within {UNMOUNT_TIMEOUT:g} s: it is written back still"
            )
        raise BusyError(self.plan.mountpoint, sentence)

    async def end(self, reason: Reason) -> None:
        """Make it GONE whatever it takes: hang up on the shim, end the driver."""
        self._stopping = self._stopping or reason
        self._shim.hang_up()
        with trio.move_on_after(TERM_GRACE):
            await self.ended.wait()
        self._shim.kill()
        with trio.move_on_after(self._stop_grace() + 2 * TERM_GRACE + 2 * spawn.REAP_TIMEOUT):
            await self.ended.wait()

    async def counters(self) -> dict[str, int | float]:
        """The shim's counters, or nothing if it does not answer in time."""
        if not self._news.mounted:
            return {}  # the first thing that the shim may be told is what to mount
        self._counters_id += 1
        number = self._counters_id
        waiting = self._news.counters
        waiting[number] = {}
        try:
            if await self._shim.send(messages.AskCounters(id=number)):
                await self._bell.within(COUNTERS_TIMEOUT, lambda: bool(waiting[number]) or self._shim.over)
            return {printable(key.encode()[:60]): value for key, value in waiting[number].items()}
        finally:
            del waiting[number]

    async def _set_trace(self, write_end: int | None) -> bool:
        return self._news.mounted and await self._shim.send(
            messages.Trace(on=write_end is not None), [] if write_end is None else [write_end]
        )

    def _drop_device(self) -> None:
        if self._device >= 0:
            os.close(self._device)
            self._device = -1


def _sentence(text: str) -> str:
    """A text from a process that we do not trust, as one bounded line."""
    return printable(text.replace("\n", " ").encode("utf-8", "backslashreplace")[:600])
