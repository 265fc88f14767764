"""The block devices of one driver: an endpoint whose front is a block shim, the mount that shows them as files, and the
volumes that are mounted from them.

Owns: the socket on which the shim serves the world, the order of shim, files, volumes and driver at start and end, and
their order when the device is unplugged and comes back.
Must never: speak NBD, or let files or volumes outlive what they come from.
Called by: registry.py.

At an unplug the volumes are told first, and their drivers are dead before the block shim answers anybody that there is
no device: no filesystem driver ever sees its disk vanish. The files end and are started again when the device is back;
volumes wait for it, each for its own time, and as long as one does, so do we.
"""

from __future__ import annotations

import logging
import os
import socket
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import trio

from udf import messages
from udf.errors import UserError
from udf.supervisor.absence import NEVER, UNPLUGGED
from udf.supervisor.bell import Bell
from udf.supervisor.endpoint import Endpoint
from udf.supervisor.hosts import TERM_GRACE
from udf.supervisor.instance import EventLog, Instance, Reason, State
from udf.supervisor.mounts import UNMOUNT_TIMEOUT, UNMOUNT_WITHOUT_DRIVER, Mount
from udf.supervisor.plan import BlockPlan, BusyError, StartFailedError
from udf.supervisor.shim import NOBODY, SILENCE, BlockShim, Listeners
from udf.supervisor.trace import TraceFeed

BACKLOG = 128
TELL_GRACE = 0.6  # for the end of the volumes' drivers at an unplug; programs hear of that within a second
VOLUMES_FIRST = 2.0  # seconds for which the files wait for the volumes when the device is back
FILES_PAUSE = 0.5  # seconds after which lost files are started again: what ends them each time must not keep a CPU
_LOST = (Reason.CRASHED, Reason.HUNG, Reason.CONTRACT, Reason.EXTERNAL)

log = logging.getLogger("udf.mounts")


class BlockEndpoint(Endpoint):
    """Block devices from their start to GONE."""

    kind = "block"
    plan: BlockPlan
    shim: Instance
    _front: BlockShim

    def __init__(self, plan: BlockPlan, events: EventLog, reaper: trio.Nursery) -> None:
        super().__init__(plan, events, reaper)
        self._front.listeners = Listeners(
            fault=self._fault,
            failed=self.recovery.broke_contract,
            overdue=self.recovery.overdue,
            poison=self.recovery.poison,
            detached=lambda: None,
            exports=self._exports_changed,
        )
        self.files = None if plan.files is None else Mount(plan.files, events, reaper)
        self._volumes: list[Mount] = []
        self._last_loss: tuple[Reason, str] | None = None  # of a volume
        self._files_scope = trio.CancelScope()
        self._files_done = self.files is None  # they can be used, or will not be
        self._files_over: trio.Event | None = None  # their supervision has ended
        self._unmounting = trio.Lock()

    def _make_front(self) -> BlockShim:
        self.shim = Instance(self.plan.name, "shim", self._events)
        return BlockShim(self.shim, self._bell)

    @property
    def dependants(self) -> list[Endpoint]:
        """Its files."""
        return [self.files] if self.files is not None and not self.files.is_gone else []

    @property
    def exports(self) -> list[messages.Export]:
        """What it serves now."""
        return self._front.exports

    # ---- volumes

    @property
    def bell(self) -> Bell:
        """Whoever depends on it rings it too."""
        return self._bell

    @property
    def volumes(self) -> list[Mount]:
        """What is mounted from it, in the order of their start."""
        return [volume for volume in self._volumes if not volume.is_gone]

    def find(self, name: str) -> messages.Export:
        """What it exports by this name. UserError says why nothing can be mounted from it."""
        if self.instance.state not in (State.ACTIVE, State.RECOVERING) or self._stopping is not None:
            raise UserError(f"{self.plan.name} serves nothing now ({self.instance.state}): {self.instance.text}")
        for export in self.exports:
            if export.name == name:
                if not export.size:
                    raise UserError(f"{self.plan.name} has no medium: put one in")
                return export
        names = ", ".join(export.name for export in self.exports[:20]) or "nothing"
        raise UserError(f"{self.plan.name} has no {name[:80]}: it has {names}")

    def uri(self, export: str) -> str:
        """Where drivers find an export."""
        return f"nbd+unix:///{quote(export)}?socket={quote(str(self.plan.socket))}"

    def carry(self, volume: Mount) -> None:
        """A volume of it is about to be started."""
        self._volumes.append(volume)

    def drop(self, volume: Mount) -> None:
        """A volume has ended."""
        if volume in self._volumes:
            self._volumes.remove(volume)
            self._last_loss = volume.recovery.absence.loss
            self._bell.ring()

    # ---- life

    async def _open(self, ready: messages.Ready, link: list[int]) -> None:
        self.shim.note("waiting for the driver's units")
        try:
            listener = _listen(self.plan.socket, self.plan.owner.uid)
        except OSError as exc:
            self._front.failed = f"cannot listen on {self.plan.socket}: {exc.strerror or exc}"
            return
        with listener:
            await self._front.process.send(self.plan.serve_message(), [listener.fileno(), *link])

    def _problem_of_front(self) -> tuple[str, Reason]:
        return self._front.problem()

    async def _start(self, nursery: trio.Nursery) -> StartFailedError | None:
        if self.files is not None:
            self.files.hold()
            self._files_over = trio.Event()
            nursery.start_soon(self._run_files, self._files_over)
        return await super()._start(nursery)

    async def _start_dependants(self, nursery: trio.Nursery) -> None:
        if self.files is not None:
            self.files.let()
            await self._bell.until(lambda: self._files_done)

    async def _run_files(self, over: trio.Event) -> None:
        """They start beside the driver, and wait for the socket: a process takes longer to start than to use.

        What serves goes on serving without them, so they are started again when they are lost, and when the device is
        back.
        """
        try:
            with self._files_scope:
                while self.files is not None and await self._files_ended(self.files):
                    assert self.plan.files is not None
                    self.files = Mount(self.plan.files, self._events, self._reaper)
        finally:
            self._files_settled()
            over.set()

    async def _files_ended(self, files: Mount) -> bool:
        """Run them; whether they shall be run once more."""
        reason = Reason.UNPLUGGED
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(files.run)
                self._files_settled()
            reason = files.instance.reason
        except* StartFailedError as group:
            if self._front.is_up and not self.recovery.is_unplugged:
                log.warning("%s: it has no files: %s", self.plan.name, group.exceptions[0])
                reason = Reason.REFUSED
        self._files_settled()
        if reason is Reason.UNPLUGGED and self.was_started:
            return await self._device_is_back()
        if reason not in _LOST:
            return False  # somebody who may had them end
        if not await self._bell.within(FILES_PAUSE, lambda: self._front.is_over or self.recovery.is_unplugged):
            return True
        return await self._device_is_back()

    async def _device_is_back(self) -> bool:
        """Wait for it; False if nobody does so any more."""

        def is_over() -> bool:
            return self._front.is_over or self._stopping is not None or self.recovery.absence.loss is not None

        await self._bell.until(
            lambda: is_over() or (self.instance.state is State.ACTIVE and not self.recovery.is_unplugged)
        )
        # Programs wait for the volumes, and nobody has had files open here.
        await self._bell.within(
            VOLUMES_FIRST, lambda: is_over() or all(v.instance.state is not State.DETACHED for v in self.volumes)
        )
        return not is_over()

    def _files_settled(self) -> None:
        self._files_done = True
        self._bell.ring()

    async def _end_front(self) -> str:
        await self._end_volumes()
        files, over = self.files, self._files_over
        if files is not None and over is not None:
            if self.recovery.is_unplugged:
                files.recovery.absence.unplug()
                with trio.move_on_after(TERM_GRACE):
                    await over.wait()
            if files.was_started and not files.is_gone:
                await files.end(self._stopping or Reason.SHUTDOWN)
            self._files_scope.cancel()
            await over.wait()
        await self._front.finish(TERM_GRACE)
        with suppress(FileNotFoundError):
            self.plan.socket.unlink()
        return ""

    async def _end_volumes(self) -> None:
        """What they are on ends, in order or not, and they with it."""
        reason, text = self.recovery.absence.loss or (
            self._stopping or Reason.CRASHED,
            "the disk that it was on has ended",
        )
        for volume in self.volumes:
            volume.lose(reason, text)
        async with trio.open_nursery() as nursery:
            for volume in self.volumes:
                nursery.start_soon(_see_the_end_of, volume, reason)

    def _abandon_front(self) -> None:
        self._front.process.abandon()

    def _let_go(self) -> None:
        self._front.listeners = NOBODY

    def _why_gone(self) -> tuple[Reason, str]:
        shim = self._front
        if shim.is_silent:
            return Reason.HUNG, f"the shim gave no sign of life for {SILENCE} s and was ended"
        if self._stopping is not None:
            cut_off = self.recovery.cut_off
            return self._stopping, "ended, but the driver was ended before it had finished" if cut_off else "ended"
        if shim.process.broken is not None:
            return Reason.CONTRACT, shim.process.broken
        text = f"the shim {shim.process.how()}"
        log.error("%s: %s", self.plan.name, text)
        return Reason.CRASHED, text

    def _exports_changed(self) -> None:
        if self._front.is_up:
            names = ", ".join(export.name[:80] for export in self._front.exports[:20])
            self.instance.tell("exports", "changed", f"it serves {names or 'nothing'}")
        there = [_place_of(export) for export in self._front.exports]
        for volume in self.volumes:
            if volume.export is not None and _place_of(volume.export) not in there:
                volume.lose(Reason.UNPLUGGED, "its medium was taken out, or has other partitions now")

    # ---- while the device is away

    @property
    def has_identity(self) -> bool:
        """Whether the device can be known again; without a serial number nobody can say which one it is."""
        lease = self.plan.lease
        return lease is not None and bool(lease.spec.serial)

    @property
    def may_return(self) -> bool:
        """See Endpoint: somebody must want it to."""
        return (
            self.has_identity
            and self.was_started
            and self._stopping is None
            and self.recovery.absence.loss is None
            and not self._front.is_over
            and any(volume.is_worth_waiting for volume in self._volumes)
        )

    def waits_until(self) -> float:
        """See Waiter. Each volume has its own time; we wait as long as one of them does."""
        return float("inf") if self.may_return or any(volume.was_started for volume in self._volumes) else NEVER

    async def tell_dependants(self) -> None:
        """See Waiter."""
        if self.files is not None:
            self.files.recovery.absence.unplug()
        volumes = self.volumes
        for volume in volumes:
            volume.recovery.absence.unplug()
        await self._bell.within(
            TELL_GRACE, lambda: all(volume.is_gone or volume.recovery.absence.is_settled for volume in volumes)
        )

    def expect_dependants(self, expected: bool) -> None:
        """See Waiter."""
        for volume in self.volumes:
            volume.recovery.absence.expect(expected)
            if expected:
                volume.recovery.expect_device()

    def recall_dependants(self) -> None:
        """See Waiter."""
        for volume in self.volumes:
            volume.recovery.absence.plugged()

    def why_given_up(self) -> tuple[Reason, str]:
        """See Waiter."""
        if self._last_loss is not None and self._last_loss[0] is Reason.EXPIRED:
            return self._last_loss
        return Reason.UNPLUGGED, UNPLUGGED

    def lose(self, reason: Reason, text: str) -> None:
        """See Endpoint."""
        text = self._in_better_words(reason, text)
        for volume in self.volumes:
            volume.lose(reason, text)
        super().lose(reason, text)

    # ---- what the operator asks

    async def unmount(self, reason: Reason, *, lazy: bool) -> None:
        """End volumes, files, shim and driver in order, flushed. BusyError when files are open."""
        async with self._unmounting:
            for volume in reversed(self.volumes):
                await volume.unmount(reason, lazy=lazy)
                if not volume.is_gone:
                    await volume.end(reason)  # it was lazy, and there will be nothing to serve from
            if self.recovery.is_unplugged and self.was_started:
                self._stopping = self._stopping or reason
                self.lose(reason, "ended while its device was unplugged")
                await self.ended.wait()
                return
            if self.files is not None and self.files.was_started:
                await self.files.unmount(reason, lazy=lazy)
            shim = self._front
            self._stopping = reason
            if not shim.process.over:
                await shim.process.send(messages.Unmount(lazy=lazy))
                limit = UNMOUNT_TIMEOUT if self.instance.state is State.ACTIVE else UNMOUNT_WITHOUT_DRIVER
                done = await self._bell.within(
                    limit, lambda: shim.process.over or shim.unmounted or self.recovery.absence.is_lost
                )
                if not done:
                    text = f"{self.plan.name} was not ended within {limit:g} s: it is written back still"
                    raise BusyError(self.plan.where, text)
            await self.ended.wait()

    async def end(self, reason: Reason) -> None:
        """Make it GONE whatever it takes, its volumes and files first."""
        self._stopping = self._stopping or reason
        for volume in reversed(self.volumes):
            await volume.end(reason)
        if self.files is not None and self.files.was_started:
            await self.files.end(reason)
        await super().end(reason)

    def _hang_up(self) -> None:
        self._front.process.hang_up()

    def _kill_front(self) -> None:
        self._front.process.kill()

    def traced(self) -> TraceFeed:
        """The live trace of its files."""
        if self.files is None or self.files.is_gone:
            raise UserError(f"{self.plan.name} has no files whose use could be traced")
        return self.files.trace


async def _see_the_end_of(volume: Mount, reason: Reason) -> None:
    with trio.move_on_after(2 * TERM_GRACE):
        await volume.ended.wait()
    if not volume.is_gone:
        await volume.end(reason)


def _place_of(export: messages.Export) -> tuple[str, int, int]:
    return export.unit, export.offset, export.size


def _listen(path: Path, uid: int) -> socket.socket:
    """A socket on which nobody but this user can connect, at any moment."""
    with suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o777)
    try:
        listener.bind(os.fspath(path))
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(umask)
    try:
        os.chown(path, uid, -1)
        os.chmod(path, 0o600)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener
