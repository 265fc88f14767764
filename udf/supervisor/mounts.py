"""One mount: an endpoint whose front is a shim that owns /dev/fuse.

Owns: what is particular to mounts: the mountpoint's start and end, lazy unmounts, files that are in use.
Must never: touch the mountpoint (paths.py does, in a process of its own), or believe a driver.
Called by: registry.py, and blocks.py for the files of a block device.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from udf import messages
from udf.supervisor import paths, unplugged
from udf.supervisor.absence import NEVER, UNPLUGGED
from udf.supervisor.bell import Bell
from udf.supervisor.endpoint import Endpoint
from udf.supervisor.hosts import TERM_GRACE
from udf.supervisor.instance import EventLog, Instance, Reason, State
from udf.supervisor.plan import BusyError, MountPlan
from udf.supervisor.shim import NOBODY, SILENCE, Listeners, MountShim
from udf.supervisor.trace import TraceFeed

if TYPE_CHECKING:
    from udf.supervisor.blocks import BlockEndpoint

UNMOUNT_TIMEOUT = 40.0  # longer than a driver's usual deadline: an unmount writes back first
UNMOUNT_WITHOUT_DRIVER = 5.0  # there is nobody to write back to
LINKED_GRACE = 1.0  # for a foreign program to end its loop at a signal; what it saves then may take longer
GHOST = 60.0  # what is open when a device is unplugged goes on being told so, even if the mount is gone

log = logging.getLogger("udf.mounts")


class Mount(Endpoint):
    """A mount from its start to GONE."""

    kind = "mount"
    plan: MountPlan
    shim: Instance
    _front: MountShim

    def __init__(
        self,
        plan: MountPlan,
        events: EventLog,
        reaper: trio.Nursery,
        below: BlockEndpoint | None = None,
        export: messages.Export | None = None,
    ) -> None:
        """`below` and `export`: it is a volume of these block devices, which is on that export."""
        super().__init__(plan, events, reaper, None if below is None else below.bell)
        self.below = below
        self.export = export
        self._front.listeners = Listeners(
            fault=self._fault,
            failed=self.recovery.broke_contract,
            overdue=self.recovery.overdue,
            poison=self.recovery.poison,
            detached=self._note_detached,
        )
        self.trace = TraceFeed(self._front.trace)
        self._unmounting = trio.Lock()
        self._has_ghost = False

    def _make_front(self) -> MountShim:
        self.shim = Instance(self.plan.name, "shim", self._events)
        return MountShim(self.shim, self._bell, self.plan.shim_as, self.plan.driver.window)

    @property
    def is_lazy(self) -> bool:
        """Whether it is out of the tree already and only serves what is still open."""
        return self._front.detached

    # ---- life

    async def _open(self, ready: messages.Ready, link: list[int]) -> None:
        self.shim.note("waiting for the driver's first answer, then mounting")
        await self._front.process.send(self.plan.mount_message(ready), link)

    def _problem_of_front(self) -> tuple[str, Reason]:
        text, reason = self._front.problem()
        if reason is not Reason.CONTRACT and self.plan.mountpoint not in text:
            text = f"cannot mount on {self.plan.mountpoint}: {text}"
        return text, reason

    async def _linger(self) -> None:
        shim = self._front
        if not shim.is_over:  # its device is gone, and all that waited has been told
            await shim.process.send(messages.Unmount(lazy=True))
            await self._bell.within(TERM_GRACE, lambda: shim.is_over or shim.detached)
        elif shim.unmounted and self.plan.driver.command is not None:
            await self.recovery.stop_linked(LINKED_GRACE)  # the end of its link comes next: see udf/shim/__main__.py

    async def _end_front(self) -> str:
        if self.recovery.absence.is_lost and self._front.detached and not self._front.process.over:
            # Files are open there. The shim goes on answering ENODEV until they are closed; nothing else is left.
            self._has_ghost = True
            self._reaper.start_soon(_end_ghost, self._front, self._bell)
            return ""
        orderly = await self._front.finish(TERM_GRACE)  # it unmounts lazily and exits
        self._front.drop_device()  # or programs would wait for ever on a connection that nobody serves
        left = ""
        if self._is_open and not orderly:
            left = await paths.clean(self.plan.mountpoint, self.plan.shim_as)
        if left:
            log.warning("%s: %s", self.plan.name, left)
        return left

    def _abandon_front(self) -> None:
        if not self._has_ghost:
            self._front.process.abandon()

    def _let_go(self) -> None:
        self.trace.close()
        self._front.listeners = NOBODY
        if self.below is not None:
            self.below.drop(self)

    def _why_gone(self) -> tuple[Reason, str]:
        shim = self._front
        if shim.is_silent:
            return Reason.HUNG, f"the shim gave no sign of life for {SILENCE} s and was ended"
        if shim.unmounted:
            if shim.external and self._stopping is None:
                return Reason.EXTERNAL, "unmounted by somebody else"
            cut_off = self.recovery.cut_off
            text = "unmounted, but the driver was ended before it had finished" if cut_off else "unmounted"
            if shim.unsaved:
                text = f"unmounted, but {shim.unsaved}"
                log.warning("%s: %s", self.plan.name, text)
            return self._stopping or Reason.EXTERNAL, text
        if self._stopping is not None:
            return self._stopping, "unmounted lazily"
        if shim.process.broken is not None:
            return Reason.CONTRACT, shim.process.broken
        text = f"the shim {shim.process.how()}"
        log.error("%s: %s; %s is unmounted", self.plan.name, text, self.plan.mountpoint)
        return Reason.CRASHED, text

    def _note_detached(self) -> None:
        self.instance.note("unmounted lazily; files that are open are still served")

    # ---- while the device that it is a volume of is away

    @property
    def is_worth_waiting(self) -> bool:
        """Whether somebody wants it to go on when the device is plugged in again."""
        return (
            self.was_started
            and self.below is not None
            and self.plan.options.grace > 0
            and self._stopping is None
            and self.recovery.absence.loss is None
            and not (self.is_gone or self.is_lazy or self._front.is_over)
        )

    def waits_until(self) -> float:
        """See Waiter."""
        absence = self.recovery.absence
        if not self.is_worth_waiting or self.below is None or not self.below.has_identity:
            return NEVER
        if absence.is_expected:
            return float("inf")
        return (trio.current_time() if absence.since is None else absence.since) + self.plan.options.grace

    @property
    def text(self) -> str:
        """Its state as a sentence; of a mount that waits for its device also for how long."""
        since, until = self.recovery.absence.since, self.waits_until()
        if self.instance.state is not State.DETACHED or since is None or until == NEVER:
            return super().text
        now, options = trio.current_time(), self.plan.options
        return unplugged.text_of(until - now, readable=since + options.max_stale - now, wait=options.on_unplug_wait)

    def patience(self) -> tuple[float, float]:
        """See Waiter."""
        if self.waits_until() == NEVER:
            return 0.0, 0.0
        return self.plan.options.on_unplug_wait, self.plan.options.max_stale

    def why_given_up(self) -> tuple[Reason, str]:
        """See Waiter."""
        if self.is_worth_waiting and self.waits_until() != NEVER:
            return Reason.EXPIRED, f"the device was not plugged in again within {self.plan.options.grace:g} s"
        return Reason.UNPLUGGED, UNPLUGGED

    # ---- what the operator asks

    async def unmount(self, reason: Reason, *, lazy: bool) -> None:
        """Unmount and wait until it is GONE (or, `lazy`, out of the tree). BusyError when files are open."""
        async with self._unmounting:
            shim = self._front
            if self.is_gone or shim.process.over:
                await self.ended.wait()
                return
            if shim.detached:
                return
            if self.recovery.is_unplugged and self.was_started:
                await self._unmount_without_device(reason)
                return
            before, was = shim.busy, self._stopping
            self._stopping = reason
            await shim.process.send(messages.Unmount(lazy=lazy))
            limit = UNMOUNT_TIMEOUT if self.instance.state is State.ACTIVE else UNMOUNT_WITHOUT_DRIVER
            done = await self._bell.within(
                limit,
                lambda: (
                    shim.process.over
                    or shim.unmounted
                    or shim.detached
                    or shim.busy > before
                    or self.recovery.is_unplugged
                ),
            )
            if shim.process.over or shim.unmounted:
                await self.ended.wait()
                return
            if shim.detached:
                return
            if self.recovery.is_unplugged:
                await self._unmount_without_device(reason)
                return
            self._stopping = was
        if done:
            text = f"{self.plan.mountpoint} is in use: close the files on it, or unmount it lazily"
        elif limit == UNMOUNT_TIMEOUT:
            text = f"{self.plan.mountpoint} was not unmounted within {limit:g} s: it is written back still"
        else:
            text = (
                f"{self.plan.mountpoint} has no driver now and was not unmounted within {limit:g} s: unmount it lazily"
            )
        raise BusyError(self.plan.mountpoint, text)

    async def _unmount_without_device(self, reason: Reason) -> None:
        # There is nothing to write back to, and programs that have files open there are told so until they close them.
        self._stopping = reason
        self.lose(reason, "unmounted while its device was unplugged")
        await self.ended.wait()

    def _hang_up(self) -> None:
        self._front.process.hang_up()

    def _kill_front(self) -> None:
        self._front.process.kill()

    def traced(self) -> TraceFeed:
        """The live trace of its operations."""
        return self.trace


async def _end_ghost(shim: MountShim, bell: Bell) -> None:
    """Wait until nothing is open any more, not for ever."""
    try:
        await bell.within(GHOST, lambda: shim.process.over)
    finally:
        with trio.CancelScope(shield=True):
            await shim.finish(TERM_GRACE)
            shim.drop_device()
            shim.process.abandon()
