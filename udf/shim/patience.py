"""How long a request may wait: interrupts, callers that are being killed, deadlines.

Owns: every answer that does not wait for the driver's. What the driver has been told of is only settled by its reply,
however late; a request that a dead driver left, or that has come since, is parked (recovery.py) and waits as well.
Called by: the loop, and the handler of INTERRUPT.
"""

from __future__ import annotations

import errno
from time import monotonic
from typing import TYPE_CHECKING

from udf.fuse.opcodes import Opcode
from udf.fuse.structs import IN_HEADER, INTERRUPT_IN
from udf.shim.inflight import INTERRUPT_UNIQUE, Pending
from udf.shim.replay import PURE, REPLAY, Replay
from udf.shim.stale import stale_attributes

if TYPE_CHECKING:
    from udf.shim.service import Service

GRACE = 0.2  # seconds that an interrupted request still has when its caller is not dying
_EXTENSIONS = 10  # deadlines that a request may take when its driver says that it gets on
_LOOKS = 64  # callers looked at in one round
_SIGKILL_BIT = 1 << 8
_PF_EXITING = 1 << 2  # of the kernel's flags of a thread
_LATE_REQUEST = 9000  # bytes: two names of the greatest length and what is before them


def interrupt(s: Service, target: int) -> None:
    """FUSE_INTERRUPT: a signal came for the caller of *target*.

    A caller that is being killed gets EINTR at once; another one after a moment of grace, because for a signal that
    is merely handled (a timer, a window change) an answer that is under way is better than an EINTR that programs
    do not expect from a filesystem. What may have changed something waits for the driver's reply.
    """
    s.counters.interrupts += 1
    if (pending := s.waiting.get(target)) is not None:
        pending.sent = min(pending.sent, monotonic())  # one that waits for a lock has a deadline from now on
        body = INTERRUPT_IN.pack(target)
        size = IN_HEADER.size + len(body)
        s.link.send(IN_HEADER.pack(size, Opcode.INTERRUPT, INTERRUPT_UNIQUE, 0, 0, 0, 0, 0) + body)
        request, harmless = pending.request, pending.op in PURE
    elif (task := s.tasks.get(target)) is not None:
        request, harmless = task.request, task.op in PURE
    elif (parked := s.recovery.parked.get(target)) is not None:
        request, harmless = parked.request, not parked.sent or parked.op in PURE
        # A device may stay away for long. What can be done twice may be tried again by whoever was interrupted.
        harmless = harmless or (s.recovery.away.is_away and REPLAY[parked.op] is Replay.IDEMPOTENT)
    else:
        return
    if harmless:
        s.interrupted[target] = monotonic() + (0.0 if _is_dying(IN_HEADER.unpack_from(request)[6]) else GRACE)


def give_up(s: Service, unique: int, error: int) -> bool:
    """Answer *unique* with *error* now; what the driver says later is only settled. False if it does not wait."""
    s.interrupted.pop(unique, None)
    pending = s.waiting.pop(unique, None)
    if pending is not None:
        _remember_late(s, unique, pending)
    elif (task := s.tasks.get(unique)) is not None:
        s.end_task(task, error)  # its steps go on, to note what they have changed
        return True
    elif s.recovery.drop(unique) is None:
        return False
    s.answer_error(unique, error)
    return True


def _remember_late(s: Service, unique: int, pending: Pending) -> None:
    """Wait for the reply to settle it; its node lives as long, and what it was to write is not needed any more."""
    pending.request = pending.request[:_LATE_REQUEST]
    s.nodes.pins[pending.slot] += 1
    s.late[unique] = pending


def check_time(s: Service, now: float) -> None:
    """Give up what is past its deadline or was interrupted."""
    for unique, when in list(s.interrupted.items()):
        if when <= now:
            give_up(s, unique, errno.EINTR)
    _free_dying(s, now - GRACE)
    s.recovery.check_time(now)
    # With recovery a driver that is late is replaced, and the request goes to the next one; should nobody
    # replace it, the program has its answer all the same.
    deadline = s.config.deadline
    oldest, hopeless = now - deadline, now - (2 * deadline if s.config.recover else deadline)
    for unique, pending in list(s.waiting.items()):
        if pending.sent > oldest:
            continue
        _timed_out(s, pending.op, now - pending.sent)
        attributes = stale_attributes(s, pending.slot) if pending.op == Opcode.GETATTR else None
        if pending.op == Opcode.STATFS and s.statfs is not None:
            _remember_late(s, unique, s.waiting.pop(unique))
            s.answer(unique, s.statfs, by="cache")
        elif attributes is not None and s.config.recover:
            _remember_late(s, unique, s.waiting.pop(unique))
            s.answer(unique, attributes, by="cache")
        elif pending.sent <= hopeless:
            give_up(s, unique, errno.ETIMEDOUT)
    for unique, task in list(s.tasks.items()):
        if task.asked <= oldest:
            _timed_out(s, task.op, now - task.asked)
            if task.asked <= hopeless:
                give_up(s, unique, errno.ETIMEDOUT)
    if len(s.late) > 4096:  # a driver that never answers is not remembered for ever
        for unique in list(s.late)[:2048]:
            s.unpin(s.late.pop(unique).slot)
    if len(s.asks) > 4096:
        for unique in [unique for unique, asker in s.asks.items() if asker is None][:-1024]:
            del s.asks[unique]


def still_working(s: Service, op: int) -> None:
    """The driver gets on with requests of this opcode: their deadlines begin anew, up to a bound.

    What takes several steps may wait for one of them with another opcode than its own, so it is given time as well.
    """
    now = monotonic()
    most = _EXTENSIONS * s.config.deadline
    for pending in s.waiting.values():
        if pending.op == op:
            pending.sent = max(pending.sent, min(now, pending.began + most))
    for task in s.tasks.values():
        task.asked = max(task.asked, min(now, task.began + most))


def _free_dying(s: Service, before: float) -> None:
    """Let go of callers that are being killed without an INTERRUPT: the kernel sends none for direct I/O.

    One that exits closes its files, and what a FLUSH says is nobody's concern then: a device that may stay away for
    long is not waited for.
    """
    away = s.recovery.away.is_away
    waiting = [(unique, p.op in PURE, p.request, p.sent) for unique, p in s.waiting.items()]
    waiting += [(unique, task.op in PURE, task.request, task.asked) for unique, task in s.tasks.items()]
    waiting += [
        (unique, not parked.sent or parked.op in PURE or away, parked.request, parked.since)
        for unique, parked in s.recovery.parked.items()
    ]
    for unique, harmless, request, since in waiting[:_LOOKS]:
        thread = IN_HEADER.unpack_from(request)[6]
        if since < before and harmless and (_is_dying(thread) or (away and _is_exiting(thread))):
            give_up(s, unique, errno.EINTR)


def _timed_out(s: Service, op: int, age: float) -> None:
    s.counters.timeouts += 1
    s.fault(op, "deadline", f"no answer within {s.config.deadline:g} s")
    s.recovery.overdue(op, age)


def _is_dying(thread: int) -> bool:
    """Whether SIGKILL is pending for *thread*; the kernel makes every fatal signal one."""
    try:
        with open(f"/proc/{thread}/status", "rb") as status:
            for line in status:
                if line.startswith((b"SigPnd:", b"ShdPnd:")) and int(line.split()[1], 16) & _SIGKILL_BIT:
                    return True
    except (OSError, ValueError):
        pass  # not visible from here: it gets the grace
    return False


def _is_exiting(thread: int) -> bool:
    """Whether *thread* has ended and is closing what it had open."""
    try:
        with open(f"/proc/{thread}/stat", "rb") as stat:
            return bool(int(stat.read().rpartition(b")")[2].split()[6]) & _PF_EXITING)
    except (OSError, ValueError, IndexError):
        return False
