"""The mount's state and its two exits: one reply to the kernel for each request, and requests to the driver.

Owns: every way by which a request is answered. `requests` decides what to do with each opcode, `replies` checks what
the driver says, `tasks` holds what takes several steps; all of them come here to answer, forward or ask. Must never:
touch a path, wait, or send a notification to the kernel itself (the notifier thread does).
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections import ChainMap
from collections.abc import Callable
from struct import Struct
from time import monotonic
from typing import TYPE_CHECKING

from udf.fuse.opcodes import Opcode
from udf.fuse.structs import IN_HEADER, INTERRUPT_IN, OUT_HEADER, RELEASE_IN
from udf.shim.contract import DriverTerms
from udf.shim.counters import Counters
from udf.shim.handles import Handle, HandleTable
from udf.shim.inflight import OWN_UNIQUE, PURE, Ask, Pending, Refuse, Steps, Task, Wait
from udf.shim.link import Link
from udf.shim.nodes import Admitted, NodeTable

if TYPE_CHECKING:
    from udf.shim.config import Config
    from udf.shim.listings import ListingCache
    from udf.shim.notifier import Notifier
    from udf.shim.trace import Tracer

HEADER = IN_HEADER.size
OUT = OUT_HEADER.size
_U64 = Struct("=Q")
_pack_header = IN_HEADER.pack
_pack_out = OUT_HEADER.pack
_OP_NAMES = {int(op): op.name for op in Opcode}
_LOOKS = 64  # callers looked at in one round
GRACE = 0.2  # seconds that an interrupted request still has when its caller is not dying
_SIGKILL_BIT = 1 << 8
_LATE_REQUEST = 9000  # bytes: two names of the greatest length and what is before them
INTERRUPT_UNIQUE = OWN_UNIQUE + 3  # drivers answer an INTERRUPT or not: what comes is dropped


class InternalError(Exception):
    """A defect of the shim's own."""


def op_name(op: int) -> str:
    """Return an opcode's name."""
    return _OP_NAMES.get(op, f"opcode {op}")


class Service:
    """One mount, one driver generation."""

    def __init__(
        self,
        config: Config,
        terms: DriverTerms,
        device: int,
        link: Link,
        notifier: Notifier,
        listings: ListingCache,
        tell: Callable[[dict[str, object]], None],
    ) -> None:
        self.config = config
        self.terms = terms
        self.device = device
        self.link = link
        self.notifier = notifier
        self.listings = listings
        self.tell = tell
        self.dispatch: Callable[[int, int, int, memoryview], None] = self._not_serving
        self.exclusive = config.exclusive
        self.nodes = NodeTable()
        self.handles = HandleTable()
        self.counters = Counters()
        self.waiting: dict[int, Pending] = {}
        self.late: dict[int, Pending] = {}
        self.tasks: dict[int, Task] = {}
        self.asks: dict[int, Task | None] = {}
        self.expected = ChainMap[int, object](self.waiting, self.asks, self.late)  # type: ignore[arg-type]
        self.opening: dict[int, list[Task]] = {}
        self.interrupted: dict[int, float] = {}
        self.refused: dict[int, int] = {}  # opcode -> errno that we answer without asking the driver again
        self.statfs: bytes | None = None
        self.tracer: Tracer | None = None
        # A LOOKUP whose answer the kernel gets before the tables do; nothing else happens in between.
        self.unsettled: tuple[Pending, Admitted] | None = None
        self.alive = True
        self._next_own = OWN_UNIQUE + 4
        self._faults: set[tuple[int, str]] = set()

    def _not_serving(self, op: int, unique: int, node_id: int, message: memoryview) -> None:
        raise InternalError(f"{op_name(op)} before the loop runs")

    # ---- toward the kernel

    def answer(self, unique: int, body: bytes | bytearray | memoryview = b"", *, by: str = "shim") -> None:
        """Answer a request with success."""
        if self.tracer is not None:
            self.tracer.answered(unique, 0, len(body), by)
        self._to_kernel(_pack_out(OUT + len(body), 0, unique), body)

    def answer_error(self, unique: int, error: int, *, by: str = "shim") -> None:
        """Answer a request with an errno."""
        if self.tracer is not None:
            self.tracer.answered(unique, error, 0, by)
        self._to_kernel(_pack_out(OUT, -error, unique), b"")

    def _to_kernel(self, header: bytes, body: bytes | bytearray | memoryview) -> None:
        try:
            os.writev(self.device, (header, body) if body else (header,))
        except OSError as failure:
            if failure.errno not in (errno.ENOENT, errno.ENODEV):  # given up by the kernel; unmounted
                self._broken_reply(header, failure)

    def pass_on(self, unique: int, message: memoryview) -> None:
        """Answer a request with the driver's own, checked reply."""
        if self.tracer is not None:
            error = OUT_HEADER.unpack_from(message)[1]
            self.tracer.answered(unique, -error, len(message) - OUT, "driver")
        try:
            os.write(self.device, message)
        except OSError as failure:
            if failure.errno not in (errno.ENOENT, errno.ENODEV):
                self._broken_reply(bytes(message[:OUT]), failure)

    def _broken_reply(self, header: bytes, failure: OSError) -> None:
        """The kernel refused a reply: the request must be answered all the same."""
        unique = OUT_HEADER.unpack_from(header)[2]
        print(f"udf-shim: the kernel refused a reply ({failure}); answering EIO", file=sys.stderr)
        try:
            os.write(self.device, _pack_out(OUT, -errno.EIO, unique))
        except OSError:
            pass

    # ---- toward the driver

    def forward(
        self, op: int, unique: int, node_id: int, slot: int, message: memoryview, handle: Handle | None = None
    ) -> None:
        """Send a request on, with the driver's ids of its node and of *handle* (at the body's start) put in."""
        if not self.alive:
            self.answer_error(unique, errno.EIO)
            return
        nodes = self.nodes
        request = bytes(message)
        _U64.pack_into(message, 16, nodes.driver_id[slot])
        if handle is not None:
            _U64.pack_into(message, HEADER, handle.driver_handle or 0)
        self.counters.driver_round_trips += 1
        try:
            self.link.send(message)
        finally:  # after the send, which wakes the driver: the reply is not looked at before we are back in the loop
            self.waiting[unique] = Pending(op, slot, node_id, request, monotonic(), nodes.version[slot], handle)

    def keep(self, op: int, node_id: int, slot: int, message: memoryview) -> Pending:
        """Return what is remembered of a request whose ids the caller puts in itself, before it does."""
        return Pending(op, slot, node_id, bytes(message), monotonic(), self.nodes.version[slot])

    def send(self, pending: Pending, unique: int, message: memoryview | bytearray) -> None:
        """Send *message*, with the driver's ids in it, and remember *pending* until its reply."""
        if not self.alive:
            self.answer_error(unique, errno.EIO)
            return
        self.waiting[unique] = pending
        self.counters.driver_round_trips += 1
        self.link.send(message)

    def ask(self, ask: Ask, task: Task | None) -> None:
        """Send a request of our own; *task* (None: nobody) is resumed with the answer."""
        unique = self._next_own
        self._next_own = unique + 2
        self.asks[unique] = task
        if task is not None:
            task.asked = monotonic()
        self.counters.driver_round_trips += 1
        self.link.send(_pack_header(HEADER + len(ask.body), ask.op, unique, ask.node, *ask.caller, 0) + ask.body)

    def post_release(self, handle: Handle) -> None:
        """Have the driver close a handle that no program has."""
        if handle.driver_handle is not None and self.alive:
            body = RELEASE_IN.pack(handle.driver_handle, handle.flags, 0, 0)
            op = Opcode.RELEASEDIR if handle.is_dir else Opcode.RELEASE
            self.ask(Ask(op, self.nodes.driver_id[handle.slot], body), None)

    # ---- several steps

    def start(self, unique: int, op: int, request: bytes, steps: Steps) -> None:
        """Serve a request by *steps*, which answers it, or raises Refuse."""
        if not self.alive:
            self.answer_error(unique, errno.EIO)
            return
        slot = self.nodes.slot(IN_HEADER.unpack_from(request)[3])
        self.nodes.pins[slot] += 1
        task = Task(unique, op, slot, request, steps, monotonic())
        self.tasks[unique] = task
        self.resume(task, None)

    def resume(self, task: Task, answer: tuple[int, bytes] | None) -> None:
        """Give a task the answer that it waits for, and do what it wants next."""
        try:
            step = task.steps.send(answer)  # type: ignore[arg-type]  # the first send of a generator takes None
        except StopIteration:
            # Its last step may have made another task of the same request: that one stays.
            if self.tasks.get(task.unique) is task:
                del self.tasks[task.unique]
            self.unpin(task.slot)
            return
        except Refuse as refusal:
            self.end_task(task, refusal.errno)
            self.unpin(task.slot)
            return
        except Exception:
            traceback.print_exc()
            self.end_task(task, errno.EIO)
            self.unpin(task.slot)
            return
        if isinstance(step, Wait):
            self.opening.setdefault(step.handle_number, []).append(task)
        else:
            self.ask(step, task)

    def end_task(self, task: Task, error: int) -> None:
        """Answer a task's request with *error*, unless it has been answered."""
        if self.tasks.get(task.unique) is task:
            del self.tasks[task.unique]
            self.interrupted.pop(task.unique, None)
            self.answer_error(task.unique, error)

    def opened(self, handle: Handle) -> None:
        """Resume the tasks that waited for *handle* to be opened (or to fail: they try by themselves)."""
        for task in self.opening.pop(handle.number, ()):
            self.resume(task, (0, b""))

    # ---- a driver that does not keep to the rules

    def fault(self, op: int, kind: str, sentence: str) -> None:
        """Report a driver's fault, once for each operation and kind."""
        self.counters.driver_faults += 1
        if (op, kind) not in self._faults and len(self._faults) < 1000:
            self._faults.add((op, kind))
            self.tell({"t": "fault", "op": op_name(op), "error": sentence})

    def interrupt(self, target: int) -> None:
        """FUSE_INTERRUPT: a signal came for the caller of *target*.

        A caller that is being killed gets EINTR at once; another one after a moment of grace, because for a signal that
        is merely handled (a timer, a window change) an answer that is under way is better than an EINTR that programs
        do not expect from a filesystem. What may change something waits for the driver's reply.
        """
        self.counters.interrupts += 1
        pending = self.waiting.get(target)
        task = self.tasks.get(target)
        request = pending.request if pending is not None else task.request if task is not None else None
        op = pending.op if pending is not None else task.op if task is not None else 0
        if request is None:
            return
        if pending is not None:
            pending.sent = min(pending.sent, monotonic())  # one that waits for a lock has a deadline from now on
            body = INTERRUPT_IN.pack(target)
            self.link.send(_pack_header(HEADER + len(body), Opcode.INTERRUPT, INTERRUPT_UNIQUE, 0, 0, 0, 0, 0) + body)
        if op in PURE:
            self.interrupted[target] = monotonic() + (0.0 if _is_dying(IN_HEADER.unpack_from(request)[6]) else GRACE)

    def give_up(self, unique: int, error: int) -> None:
        """Answer *unique* with *error* now; what the driver says later is only settled."""
        self.interrupted.pop(unique, None)
        pending = self.waiting.pop(unique, None)
        if pending is not None:
            self._remember_late(unique, pending)
            self.answer_error(unique, error)
            return
        task = self.tasks.get(unique)
        if task is not None:
            self.end_task(task, error)  # its steps go on, to note what they have changed

    def _remember_late(self, unique: int, pending: Pending) -> None:
        """Wait for the reply to settle it; its node lives as long, and what it was to write is not needed any more."""
        pending.request = pending.request[:_LATE_REQUEST]
        self.nodes.pins[pending.slot] += 1
        self.late[unique] = pending

    def unpin(self, slot: int) -> None:
        """What needed *slot* is settled, or will never be."""
        self.nodes.pins[slot] -= 1
        self.nodes.release(slot)

    def check_time(self, now: float) -> None:
        """Give up what is past its deadline or was interrupted."""
        for unique, when in list(self.interrupted.items()):
            if when <= now:
                self.give_up(unique, errno.EINTR)
        self._free_dying(now - GRACE)
        oldest = now - self.config.deadline
        for unique, pending in list(self.waiting.items()):
            if pending.sent > oldest:
                continue
            self._timed_out(pending.op)
            if pending.op == Opcode.STATFS and self.statfs is not None:
                self._remember_late(unique, self.waiting.pop(unique))
                self.answer(unique, self.statfs, by="cache")
            else:
                self.give_up(unique, errno.ETIMEDOUT)
        for unique, task in list(self.tasks.items()):
            if task.asked <= oldest:
                self._timed_out(task.op)
                self.give_up(unique, errno.ETIMEDOUT)
        if len(self.late) > 4096:  # a driver that never answers is not remembered for ever
            for unique in list(self.late)[:2048]:
                self.unpin(self.late.pop(unique).slot)
        if len(self.asks) > 4096:
            for unique in [unique for unique, asker in self.asks.items() if asker is None][:-1024]:
                del self.asks[unique]

    def _free_dying(self, before: float) -> None:
        """Let go of callers that are being killed without an INTERRUPT: the kernel sends none for direct I/O."""
        waiting = [(unique, pending.op, pending.request, pending.sent) for unique, pending in self.waiting.items()]
        waiting += [(unique, task.op, task.request, task.asked) for unique, task in self.tasks.items()]
        for unique, op, request, since in waiting[:_LOOKS]:
            if since < before and op in PURE and _is_dying(IN_HEADER.unpack_from(request)[6]):
                self.give_up(unique, errno.EINTR)

    def _timed_out(self, op: int) -> None:
        self.counters.timeouts += 1
        self.fault(op, "deadline", f"no answer within {self.config.deadline:g} s")

    def link_lost(self, reason: str) -> None:
        """The driver is gone: everything that waits for it fails, cached things go on."""
        if not self.alive:
            return
        self.alive = False
        self.link.give_up()
        pending = len(self.waiting) + len(self.tasks)
        for unique in list(self.waiting):
            del self.waiting[unique]
            self.answer_error(unique, errno.EIO)
        for task in list(self.tasks.values()):
            self.end_task(task, errno.EIO)
        tasks = {task for task in self.asks.values() if task is not None}.union(*self.opening.values())
        for slot in [late.slot for late in self.late.values()] + [task.slot for task in tasks]:
            self.unpin(slot)
        for table in (self.late, self.asks, self.opening, self.interrupted):
            table.clear()
        self.nodes.forgets.clear()
        self.tell({"t": "link_lost", "pending": pending})
        self.tell({"t": "state", "state": "FAILED", "reason": "exited", "text": reason})


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
