"""The transfers under way on a connection, by the numbers that URBs have.

Owns: which answer belongs to which transfer, and that each transfer is done exactly once. Must never: block, or touch
the socket. Called by: client.py, replies.py.
"""

from __future__ import annotations

import errno
import threading

from udf.usb.errors import Failure, usb_error
from udf.usb.turns import Turns
from udf.usb.urb import Transfer

MAX_PENDING = 1024  # transfers under way on one connection
MAX_LATE = 256  # answers that may still come for transfers that were given up


class Table:
    """Every method takes the lock, but for those that say that it is held."""

    def __init__(self, state: threading.Lock, turns: Turns) -> None:
        self._state = state
        self._turns = turns
        self.pending: dict[int, Transfer] = {}
        self._unlinks: dict[int, Transfer] = {}  # by the UNLINK's own number
        self._late: dict[int, Transfer] = {}  # answered by RET_UNLINK or given up; the oldest are forgotten
        self._last = 0
        self.ended = False

    def next_seqnum(self) -> int:
        """A number for a URB; the lock is held. 32 bits, never 0, never one whose answer may still come."""
        while True:
            self._last = self._last % 0xFFFFFFFF + 1
            if self._last not in self.pending and self._last not in self._late:
                return self._last

    def add(self, transfer: Transfer, seqnum: int | None = None) -> int:
        """It is going to be sent, or has been with this number. ENODEV after the end, ENOMEM if there are too many."""
        with self._state:
            if self.ended:
                raise usb_error(Failure.NO_DEVICE)
            if seqnum is None and len(self.pending) >= MAX_PENDING:
                raise usb_error(Failure.NO_MEM)
            transfer.seqnum = self.next_seqnum() if seqnum is None else seqnum
            self.pending[transfer.seqnum] = transfer
            return transfer.seqnum

    def drop(self, transfer: Transfer) -> None:
        """It was not sent after all."""
        with self._state:
            self.pending.pop(transfer.seqnum, None)

    def find(self, seqnum: int) -> Transfer | None:
        """Whom an answer is for; one that was given up is found once."""
        return self.pending.get(seqnum) or self._late.pop(seqnum, None)

    def finish(self, transfer: Transfer) -> None:
        """Its answer has been read to the end."""
        with self._state:
            self.pending.pop(transfer.seqnum, None)
            self._complete(transfer)

    def give_up(self, transfer: Transfer) -> bool:
        """Its UNLINK was not answered: the caller's buffer must be its own again. False if it was done meanwhile."""
        with self._state:
            if transfer.done:
                return False
            self._unlinks = {number: each for number, each in self._unlinks.items() if each is not transfer}
            self._forsake(transfer)
            return True

    def begin_unlink(self, transfer: Transfer) -> int | None:
        """A number for its UNLINK; None if there is no need any more."""
        with self._state:
            if self.ended or transfer.done:
                return None
            number = self.next_seqnum()
            self._unlinks[number] = transfer
            return number

    def unlinked(self, number: int) -> bool:
        """An UNLINK was answered. False: nobody had sent it."""
        with self._state:
            transfer = self._unlinks.pop(number, None)
            if transfer is None:
                return 0 < number <= self._last  # of a transfer that was given up meanwhile
            if not transfer.done:
                # Its own answer would have come before this one, had it been on its way.
                self._forsake(transfer)
            return True

    def _forsake(self, transfer: Transfer) -> None:
        # However sloppy the server: if the answer comes nevertheless, it is read and dropped, up to a bound.
        self.pending.pop(transfer.seqnum, None)
        transfer.status, transfer.actual, transfer.view = -errno.ECONNRESET, 0, None
        self._late[transfer.seqnum] = transfer
        if len(self._late) > MAX_LATE:
            del self._late[next(iter(self._late))]
        self._complete(transfer)

    def _complete(self, transfer: Transfer) -> None:
        transfer.done = True
        for waiter in transfer.waiters:
            self._turns.wake(waiter, leads=False)
        transfer.waiters.clear()

    def end(self) -> None:
        """Everything under way has failed, and so will what comes. The lock is held."""
        self.ended = True
        for transfer in self.pending.values():
            transfer.status, transfer.actual, transfer.view = -errno.ENODEV, 0, None
            self._complete(transfer)
        self.pending.clear()
        self._unlinks.clear()
        self._late.clear()
        self._turns.wake_all()
