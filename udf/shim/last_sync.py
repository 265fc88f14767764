"""The end of a mount: the driver saves what it has been told before anybody hears that it is unmounted.

The kernel sends no SYNCFS to such a mount and no DESTROY (only to those on a block device), whoever unmounts it. So
the shim asks: SYNCFS, or FSYNCDIR of the root where the driver does not know that, then DESTROY, at which programs
that are made with libfuse save. A driver that has just died is waited for, because the next one may have to clear
what the dead one has left; one whose device is gone, or that will not come, is not.

Owns: these requests and their bound in time. Called by: the loop, once the kernel has let go of the mount.
"""

from __future__ import annotations

import errno
import os
from time import monotonic
from typing import TYPE_CHECKING

from udf.fuse.opcodes import Opcode
from udf.fuse.structs import FSYNC_IN, OPEN_IN, OPEN_OUT, RELEASE_IN, SYNCFS_IN
from udf.shim.graph import ROOT
from udf.shim.inflight import Ask

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from udf.shim.service import Service

    Step = Generator[Ask, tuple[int, bytes], None]

NEXT_DRIVER = 4.0  # seconds for another generation to come


class LastSync:
    """What is still asked of the driver. `error` is why it may not have saved everything."""

    def __init__(self, service: Service, done: Callable[[], object]) -> None:
        self._s = s = service
        self._done = done
        self._until = 0.0
        self._begun = 0  # the generation that was asked
        self.error = ""
        self.is_over = False
        for unique in list(s.recovery.parked):
            s.recovery.take(unique)  # the kernel has answered them itself
        if s.config.read_only or s.recovery.away.is_away:
            self.is_over = True  # there is nothing to save, or nothing to save it on, as everybody knows
        else:
            self.error = "the driver died, and no other came, before it had saved everything"
            self.is_over = not self._is_somebody_there()
            self._until = monotonic() + NEXT_DRIVER
            self.begin()

    def _is_somebody_there(self) -> bool:
        """Whether there is a driver to ask, or one to wait for."""
        recovery = self._s.recovery
        return self._s.connected or recovery.greeting or (recovery.active and not recovery.away.is_away)

    def begin(self) -> None:
        """Ask the driver that serves now, if there is one."""
        s = self._s
        if s.connected and self._begun != s.recovery.generation:
            self._begun = s.recovery.generation
            self._until = monotonic() + s.config.deadline
            s.start_own(self._ask())

    def check_time(self, now: float) -> bool:
        """Whether it is over."""
        if now >= self._until and self._s.connected:
            self.error = f"the driver did not say within {self._s.config.deadline:g} s that everything is saved"
        return self.is_over or now >= self._until or not self._is_somebody_there()

    def _ask(self) -> Step:
        error, _ = yield Ask(Opcode.SYNCFS, ROOT, SYNCFS_IN.pack())
        if error == errno.ENOSYS:
            error = yield from self._sync_root()
        yield Ask(Opcode.DESTROY, 0, b"")
        self.error = f"the driver could not save everything: {os.strerror(error)}" if error else ""
        self.is_over = True
        self._done()

    def _sync_root(self) -> Generator[Ask, tuple[int, bytes], int]:
        error, reply = yield Ask(Opcode.OPENDIR, ROOT, OPEN_IN.pack(os.O_RDONLY | os.O_DIRECTORY, 0))
        if error and error != errno.ENOSYS:
            return error
        handle = OPEN_OUT.unpack_from(reply)[0] if len(reply) == OPEN_OUT.size else 0
        error, _ = yield Ask(Opcode.FSYNCDIR, ROOT, FSYNC_IN.pack(handle, 0))
        self._s.ask(Ask(Opcode.RELEASEDIR, ROOT, RELEASE_IN.pack(handle, 0, 0, 0)), None)
        return 0 if error == errno.ENOSYS else error
