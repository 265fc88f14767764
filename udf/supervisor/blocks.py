"""The block devices of one driver: an endpoint whose front is a block shim, and the mount that shows them as files.

Owns: the socket on which the shim serves the world, and the order of shim, files and driver at start and end.
Must never: speak NBD, or let the files outlive what they come from.
Called by: registry.py.
"""

from __future__ import annotations

import logging
import os
import socket
from contextlib import suppress
from pathlib import Path

import trio

from udf import messages
from udf.errors import UserError
from udf.supervisor.endpoint import Endpoint
from udf.supervisor.hosts import TERM_GRACE
from udf.supervisor.instance import EventLog, Instance, Reason, State
from udf.supervisor.mounts import UNMOUNT_TIMEOUT, UNMOUNT_WITHOUT_DRIVER, Mount
from udf.supervisor.plan import BlockPlan, BusyError, StartFailedError
from udf.supervisor.shim import NOBODY, SILENCE, BlockShim, Listeners
from udf.supervisor.trace import TraceFeed

BACKLOG = 128
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
        self.volumes: list[Mount] = []  # that are mounted from it
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

    # ---- life

    async def _open(self, ready: messages.Ready, link: int) -> None:
        self.shim.note("waiting for the driver's units")
        try:
            listener = _listen(self.plan.socket, self.plan.owner.uid)
        except OSError as exc:
            self._front.failed = f"cannot listen on {self.plan.socket}: {exc.strerror or exc}"
            return
        with listener:
            await self._front.process.send(self.plan.serve_message(), [listener.fileno(), link])

    def _problem_of_front(self) -> tuple[str, Reason]:
        return self._front.problem()

    async def _start(self, nursery: trio.Nursery) -> StartFailedError | None:
        if self.files is not None:
            self.files.hold()
            self._files_over = trio.Event()
            nursery.start_soon(self._run_files, self._files_over)
            nursery.start_soon(self._follow_unplug)
        return await super()._start(nursery)

    async def _start_dependants(self, nursery: trio.Nursery) -> None:
        if self.files is not None:
            self.files.let()
            await self._bell.until(lambda: self._files_done)

    async def _run_files(self, over: trio.Event) -> None:
        """They start beside the driver, and wait for the socket: a process takes longer to start than to use.

        What serves goes on serving without them, so they are started again when they are lost.
        """
        try:
            with self._files_scope:
                while self.files is not None:
                    async with trio.open_nursery() as nursery:
                        await nursery.start(self.files.run)
                        self._files_settled()
                    if self.plan.files is None or not await self._lost_files(self.files):
                        break
                    self.files = Mount(self.plan.files, self._events, self._reaper)
        except* StartFailedError as group:
            if self._front.is_up and not self.recovery.is_unplugged:
                log.warning("%s: it has no files: %s", self.plan.name, group.exceptions[0])
        finally:
            self._files_settled()
            over.set()

    async def _lost_files(self, files: Mount) -> bool:
        """Whether they ended though nobody who may had them end, and there is something for them to show."""
        if files.instance.reason not in _LOST:
            return False
        return not await self._bell.within(FILES_PAUSE, lambda: self._front.is_over or self.recovery.is_unplugged)

    def _files_settled(self) -> None:
        self._files_done = True
        self._bell.ring()

    async def _follow_unplug(self) -> None:
        await self._bell.until(lambda: self.recovery.is_unplugged)
        for volume in self.volumes:
            volume.recovery.unplug()
        if self.files is not None:
            self.files.recovery.unplug()

    async def _end_front(self) -> str:
        files, over = self.files, self._files_over
        if files is not None and over is not None:
            if self.recovery.is_unplugged:
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

    # ---- what the operator asks

    async def unmount(self, reason: Reason, *, lazy: bool) -> None:
        """End files, shim and driver in order, flushed. BusyError when files are open."""
        async with self._unmounting:
            for volume in [each for each in self.volumes if not each.is_gone]:
                await volume.unmount(reason, lazy=lazy)
            if self.files is not None and self.files.was_started:
                await self.files.unmount(reason, lazy=lazy)
            shim = self._front
            self._stopping = reason
            if not shim.process.over:
                await shim.process.send(messages.Unmount(lazy=lazy))
                limit = UNMOUNT_TIMEOUT if self.instance.state is State.ACTIVE else UNMOUNT_WITHOUT_DRIVER
                if not await self._bell.within(limit, lambda: shim.process.over or shim.unmounted):
                    text = f"{self.plan.name} was not ended within {limit:g} s: it is written back still"
                    raise BusyError(self.plan.where, text)
            await self.ended.wait()

    async def end(self, reason: Reason) -> None:
        """Make it GONE whatever it takes, its files first."""
        self._stopping = self._stopping or reason
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
