"""One logical unit: commands with everything that devices want before, between and after them.

Owns: retries with their bounds, what a medium is and when it is another one, transfer sizes, and whether a flush may
be called done. Must never: acknowledge a flush when a write before it may be lost, repeat a command for another medium
than it was meant for, or try anything without an end.
Called by: driver.py, in the one thread that talks to the device. Every failure is an OSError with a sentence.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable

from . import scsi
from .probe import Facts, NotUsable, facts_of
from .scsi import Command, Data
from .sense import ATTENTION, ILLEGAL, Action, Sense, Verdict, decide, parse_sense
from .transport import Reply, Transport, TransportFault
from .wire import Status

log = logging.getLogger("usb_storage")

QUICK, SLOW = 10.0, 20.0  # seconds for a command without data and for one that moves some, or spins something up
FAREWELL = 1.0  # seconds for the last command
OPTIONAL = 3.0  # seconds for a question that the device need not know
PATIENCE = 20.0  # seconds for which a unit may be about to become ready
BUDGET = 45.0  # seconds for a request with everything that is tried for it
MAX_ATTENTIONS = 8  # for one command; each should tell of one event
MAX_RETRIES = 2  # for the same trouble of one command
PAUSES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SMALL_TRANSFER = 32 * 1024  # below this a transfer is not what the device chokes on
MAX_RANGES = 64  # of one UNMAP

_NO_REASON = Verdict(Action.RETRY)


class Failed(OSError):
    """A command failed for good: errno, a sentence, and what the device's reason was taken for."""

    def __init__(
        self,
        number: int,
        text: str,
        sense: Sense | None = None,
        action: Action = Action.FAIL,
        *,
        is_fault: bool = False,
    ) -> None:
        super().__init__(number, text)
        self.sense = sense
        self.action = action
        self.is_fault = is_fault  # the transport broke: there is no telling why


class LogicalUnit:
    """One LUN of a device, with the medium that is in it now."""

    def __init__(
        self,
        transport: Transport,
        lun: int,
        *,
        max_transfer: int,
        pause: Callable[[float], object] = time.sleep,
        notice: Callable[[LogicalUnit], None] = lambda unit: None,
        lost: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """`notice` is called when the unit should be looked at again, `lost` when written data may have been lost."""
        self.lun = lun
        self.facts: Facts | None = None
        self.medium = 0  # the number of the medium: a request for another one is refused
        self.left_at = 0.0  # when a medium was last found to be gone, or to be another one
        self.is_lost = False
        self._transport = transport
        self._max_transfer = max_transfer
        self._transfer = max_transfer
        self._pause, self._notice, self._lost = pause, notice, lost
        self._until = 0.0  # the end of the request that is at work
        self._is_looking = False
        self._is_dirty = False  # this generation has written since the last flush
        self._must_sync = True  # something may be in the cache; that of the generation before us, too
        self._has_no_cache = False
        self._forms = {True: 10, False: 10}  # of READ and WRITE; 12 or 6 where a device does not know 10

    # ---- requests

    def look(self) -> Facts | None:
        """See what is there now. None: no unit with blocks behind this LUN. A medium that is another one is counted."""
        self._start_clock()
        before, number = self.facts, self.medium
        self._is_looking = True
        facts: Facts | None
        try:
            facts = facts_of(self)
        except NotUsable as exc:
            log.warning("LUN %d cannot be used: %s", self.lun, exc)
            facts = exc.facts
        except OSError as exc:
            log.warning("LUN %d cannot be used: %s", self.lun, exc.strerror)
            facts = before and Facts(before.name, before.removable)
        finally:
            self._is_looking = False
        if before and self.medium == number and (facts is None or facts.shape != before.shape):
            self._forget_medium()
        self.facts = facts
        if facts and facts.max_transfer:
            self._transfer = min(self._transfer, max(facts.max_transfer, facts.block_size))
        return facts

    def poll(self) -> None:
        """Whether the medium is still the one that it was; cheap, for a unit that nobody asks for anything."""
        self._start_clock()
        had_one = bool(self.facts and self.facts.size)
        number = self.medium
        try:
            self.execute(scsi.test_unit_ready(), QUICK, patience=0.0)
            has_one = True
        except OSError:
            has_one = False
        if has_one != had_one and self.medium == number:
            self._notice(self)

    def read(self, medium: int, offset: int, size: int) -> Data:
        """`size` bytes; both numbers are multiples of the block size."""
        buffer = bytearray(size)
        self.read_into(medium, offset, memoryview(buffer))
        return buffer

    def read_into(self, medium: int, offset: int, target: memoryview) -> None:
        """The same into a buffer."""
        self._move(self._facts(medium), offset, target, is_read=True)

    def write(self, medium: int, offset: int, data: Data) -> None:
        """Write whole blocks; done when the device says so."""
        facts = self._facts(medium)
        if facts.read_only:
            raise OSError(errno.EROFS, "the medium is write protected")
        self._is_dirty = self._must_sync = True
        self._move(facts, offset, memoryview(data), is_read=False)

    def flush(self, medium: int) -> None:
        """Everything that was written is on the medium, or this fails, and goes on failing."""
        self._facts(medium)
        self._check_lost()
        if self._must_sync and not self._has_no_cache:
            try:
                self.execute(scsi.synchronize_cache(), SLOW)
            except Failed as exc:
                if exc.action is not Action.UNSUPPORTED:
                    raise
                self._has_no_cache = True  # it does not know the command, so it has nothing to write back
            self._check_lost()
        self._must_sync = self._is_dirty = False

    def trim(self, medium: int, offset: int, size: int) -> None:
        """Tell the device that these blocks are of no use."""
        facts = self._facts(medium)
        if not facts.trim_by or facts.read_only:
            raise OSError(errno.EOPNOTSUPP, "the device cannot be told what is of no use")
        lba, blocks = offset // facts.block_size, size // facts.block_size
        self._is_dirty = self._must_sync = True
        while blocks:
            count = min(blocks, facts.max_trim)
            if facts.trim_by == "unmap":
                command = scsi.unmap([(lba, count)])
            else:
                command = scsi.write_same(lba, count, bytes(facts.block_size), unmap=True)
            self.execute(command, SLOW)
            lba, blocks = lba + count, blocks - count

    def eject(self) -> None:
        """Tell the device that it is about to be taken out; with the next power it is as before.

        It cannot refuse: what it was written is flushed. Some do not know the command.
        """
        if self.facts is None:
            return
        self._start_clock()
        try:
            self._run(scsi.stop_unit(eject=self.facts.removable), FAREWELL, None, faults=0)
        except OSError as exc:
            log.info("LUN %d is not stopped: %s", self.lun, exc)

    # ---- questions (probe.Asker)

    def demand(self, command: Command, least: int) -> bytes:
        """The answer, of so many bytes at least, to a question that every device must know."""
        buffer = bytearray(command.length)
        for _ in range(1 + MAX_RETRIES):
            moved = self.execute(command, QUICK, memoryview(buffer))
            if moved >= least:
                return bytes(buffer[:moved])
        raise Failed(errno.EIO, f"{command.name}: the device answers {moved} bytes, and {least} are the least")

    def ask(self, command: Command) -> bytes | None:
        """The answer to a question that the device need not know; None if it has none."""
        buffer = bytearray(command.length)
        try:
            return bytes(buffer[: self.execute(command, OPTIONAL, memoryview(buffer), faults=1)])
        except Failed as exc:
            if exc.action in (Action.EMPTY, Action.CHANGED):
                raise
            return None

    def ready(self) -> Action:
        """DONE when the unit is ready, EMPTY without a medium; Failed when it does not become ready."""
        try:
            self.execute(scsi.test_unit_ready(), QUICK)
        except Failed as exc:
            if exc.action not in (Action.EMPTY, Action.UNSUPPORTED):
                raise
            return Action.EMPTY if exc.action is Action.EMPTY else Action.DONE
        return Action.DONE

    # ---- one command

    def execute(
        self,
        command: Command,
        timeout: float,
        buffer: memoryview | None = None,
        *,
        patience: float | None = None,
        faults: int = MAX_RETRIES,
    ) -> int:
        """Run a command until the device has done it; how many bytes were moved. Failed says why it did not.

        Every command that is sent here may be sent again, whatever became of it.
        """
        started = time.monotonic()
        patience = PATIENCE if patience is None else patience
        attentions = retries = waits = 0
        while True:
            reply = self._run(command, timeout, buffer, faults)
            if reply.status is Status.PASSED:
                return reply.moved
            sense = self._sense()
            action, number = decide(sense) if sense else _NO_REASON
            text = f"{command.name}: {sense or 'the device does not say why it failed'}"
            if action is Action.DONE:
                return reply.moved
            self._take_notice(action, text)
            failure = Failed(number, text, sense, action)
            if action in (Action.CHANGED, Action.EMPTY) and self._medium_left(action):
                raise failure
            if sense and sense.key == ATTENTION:
                attentions += 1
                if attentions > MAX_ATTENTIONS:
                    raise Failed(errno.EIO, f"{text}, one unit attention after another", sense)
            elif action in (Action.WAIT, Action.START):
                if time.monotonic() - started >= patience:
                    raise failure
                if action is Action.START and not waits:
                    self._start_unit()
                self._pause(PAUSES[min(waits, len(PAUSES) - 1)])
                waits += 1
            else:
                retries += 1
                if action not in (Action.RETRY, Action.LOOK) or retries > MAX_RETRIES:
                    raise failure

    def _run(self, command: Command, timeout: float, buffer: memoryview | None, faults: int = MAX_RETRIES) -> Reply:
        """Again if the transport broke, so many times."""
        while True:
            left = self._until - time.monotonic()
            if left <= 0:
                raise Failed(errno.EIO, f"{command.name}: not done in {BUDGET:.0f} s, with all that was tried")
            try:
                return self._transport.run(self.lun, command, min(timeout, left), buffer)
            except TransportFault as exc:
                if faults <= 0 or exc.is_dead:
                    raise Failed(errno.EIO, str(exc), is_fault=not exc.is_dead) from exc
                faults -= 1
                log.info("LUN %d: %s: tried again", self.lun, exc)

    def _sense(self) -> Sense | None:
        buffer = bytearray(18)
        reply = self._run(scsi.request_sense(), QUICK, memoryview(buffer))
        return parse_sense(bytes(buffer[: reply.moved])) if reply.status is Status.PASSED else None

    def _start_unit(self) -> None:
        try:
            self._run(scsi.start_unit(), SLOW, None)
        except Failed as exc:
            log.info("LUN %d does not start: %s", self.lun, exc)

    # ---- moving data

    def _move(self, facts: Facts, offset: int, view: memoryview, *, is_read: bool) -> None:
        """READ or WRITE in pieces that the device takes; smaller ones when it has choked twice at the same place."""
        faults = 0
        while view:
            count = min(len(view), max(facts.block_size, self._transfer - self._transfer % facts.block_size))
            try:
                self._move_piece(offset // facts.block_size, count // facts.block_size, view[:count], is_read)
            except Failed as exc:
                if not exc.is_fault or faults > 2 * MAX_RETRIES or (faults and count <= SMALL_TRANSFER):
                    raise
                faults += 1
                if faults > 1:
                    self._transfer = max(SMALL_TRANSFER, count // 2)
                    log.warning("LUN %d: at most %d bytes at once from now on", self.lun, self._transfer)
                continue
            offset, view, faults = offset + count, view[count:], 0

    def _move_piece(self, lba: int, blocks: int, part: memoryview, is_read: bool) -> None:
        for _ in range(1 + MAX_RETRIES):
            command = self._command(lba, blocks, part, is_read)
            try:
                moved = self.execute(command, SLOW, part if is_read else None, faults=0)
            except Failed as exc:
                if exc.action is Action.UNSUPPORTED and self._take_other_form(lba, blocks, is_read):
                    continue
                if exc.sense and not is_read and (exc.sense.key, exc.sense.asc) == (ILLEGAL, 0x21):
                    raise OSError(errno.ENOSPC, f"{exc.strerror}: the device has fewer blocks than it said") from exc
                raise
            if moved == len(part):
                return
            log.info("LUN %d: %s moved %d bytes of %d: tried again", self.lun, command.name, moved, len(part))
        raise Failed(errno.EIO, f"{command.name}: the device never moves all {len(part)} bytes")

    def _command(self, lba: int, blocks: int, part: memoryview, is_read: bool) -> Command:
        form = self._forms[is_read] if scsi.fits(self._forms[is_read], lba, blocks) else 16
        name = f"{'READ' if is_read else 'WRITE'}({form}) of {blocks} blocks at {lba}"
        if is_read:
            return Command(name, scsi.read_write_cdb(scsi.READ_CODES, form, lba, blocks), len(part))
        return Command(name, scsi.read_write_cdb(scsi.WRITE_CODES, form, lba, blocks), data=part)

    def _take_other_form(self, lba: int, blocks: int, is_read: bool) -> bool:
        other = {10: 12, 12: 6}.get(self._forms[is_read])
        if other is None or not scsi.fits(other, lba, blocks):
            return False
        self._forms[is_read] = other
        return True

    # ---- what has happened to the unit

    def _facts(self, medium: int) -> Facts:
        self._start_clock()
        if medium != self.medium or self.facts is None or not self.facts.size:
            raise OSError(errno.ENOMEDIUM, "the medium that was here is not here any more")
        return self.facts

    def _start_clock(self) -> None:
        self._until = time.monotonic() + BUDGET

    def _take_notice(self, action: Action, text: str) -> None:
        if action is Action.RESET and self._is_dirty and not self._has_no_cache and not self.is_lost:
            self.is_lost = True
            self._lost(f"{text}: the device was reset, and what was written since the last flush may be lost")
        elif action in (Action.LOOK, Action.PROTECTED) and not self._is_looking:
            self._notice(self)

    def _medium_left(self, action: Action) -> bool:
        """The medium that was here is not here any more; whether the command is not to be repeated for what is now.

        What looks at the unit is meant for any medium.
        """
        if self.facts and self.facts.size:
            self._forget_medium()
            if not self._is_looking:
                self.facts = Facts(self.facts.name, self.facts.removable)
                self._notice(self)
                return True
        return action is Action.EMPTY

    def _forget_medium(self) -> None:
        if self.facts and self.facts.size:
            self.left_at = time.monotonic()
        self.medium += 1
        self._is_dirty = self.is_lost = False
        self._must_sync = True

    def _check_lost(self) -> None:
        if self.is_lost:
            raise OSError(errno.EIO, "the device was reset: what was written since the last flush may be lost")
