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
from udf.fuse.structs import IN_HEADER, OUT_HEADER, RELEASE_IN
from udf.shim.contract import DriverTerms
from udf.shim.counters import Counters
from udf.shim.graph import HIDDEN
from udf.shim.handles import Handle, HandleTable
from udf.shim.hiding import Hiding
from udf.shim.inflight import OWN_UNIQUE, Ask, Pending, Refuse, Steps, Task, Wait
from udf.shim.link import Link
from udf.shim.nodes import Admitted, NodeTable
from udf.shim.recovery import Recovery
from udf.shim.remembered import Remembered

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


class InternalError(Exception):
    """A defect of the shim's own."""


def op_name(op: int) -> str:
    """Return an opcode's name."""
    return _OP_NAMES.get(op, f"opcode {op}")


class Service:
    """One mount, and one generation of its driver after the other."""

    op_name = staticmethod(op_name)

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
        self.complete: Callable[[int, Pending, bytes], None] = self._not_complete
        self.exclusive = config.exclusive
        self.nodes = NodeTable(stable_nodes=config.stable_nodes, inodes=config.inodes)
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
        self.kernel_minor = 45  # of the FUSE protocol
        self.tracer: Tracer | None = None
        # A LOOKUP whose answer the kernel gets before the tables do; nothing else happens in between.
        self.unsettled: tuple[int, bytes, Admitted] | None = None  # of a LOOKUP: parent, name
        self.hiding = Hiding()
        self.remembered = Remembered()
        self.alive = True  # requests go to the driver
        self.connected = True  # there is a driver; it is not `alive` while one request is tried alone
        self.recovery = Recovery(self)
        self._next_own = OWN_UNIQUE + 4
        self._faults: set[tuple[int, str]] = set()

    def _not_serving(self, op: int, unique: int, node_id: int, message: memoryview) -> None:
        raise InternalError(f"{op_name(op)} before the loop runs")

    def _not_complete(self, unique: int, pending: Pending, body: bytes) -> None:
        raise InternalError(f"{op_name(pending.op)} completed before the loop runs")

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

    def pass_on_parts(self, unique: int, parts: list[memoryview]) -> None:
        """Answer a READ with bytes that lie in several places."""
        size = sum(map(len, parts))
        if self.tracer is not None:
            self.tracer.answered(unique, 0, size, "driver")
        header = _pack_out(OUT + size, 0, unique)
        try:
            os.writev(self.device, (header, *parts))
        except OSError as failure:
            if failure.errno not in (errno.ENOENT, errno.ENODEV):
                self._broken_reply(header, failure)

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
        if not self.alive and not self.recovery.lets(unique, op, node_id, message):
            return
        nodes = self.nodes
        driver_id = nodes.driver(slot)
        request = bytes(message)
        _U64.pack_into(message, 16, driver_id)
        if handle is not None:
            _U64.pack_into(message, HEADER, handle.driver_handle or 0)
        self.counters.driver_round_trips += 1
        self.recovery.recent.append((op, slot))
        try:
            self.link.send(message)
        finally:  # after the send, which wakes the driver: the reply is not looked at before we are back in the loop
            self.waiting[unique] = Pending(op, slot, node_id, request, monotonic(), nodes.version[slot], handle)

    def keep(self, op: int, node_id: int, slot: int, message: memoryview) -> Pending:
        """Return what is remembered of a request whose ids the caller puts in itself, before it does."""
        return Pending(op, slot, node_id, bytes(message), monotonic(), self.nodes.version[slot])

    def send(self, pending: Pending, unique: int, message: memoryview | bytearray) -> None:
        """Send *message*, with the driver's ids in it, and remember *pending* until its reply."""
        if not self.alive and not self.recovery.lets(unique, pending.op, pending.node_id, pending.request):
            return
        self.waiting[unique] = pending
        self.counters.driver_round_trips += 1
        self.recovery.recent.append((pending.op, pending.slot))
        self.link.send(message)

    def ask(self, ask: Ask, task: Task | None) -> None:
        """Send a request of our own; *task* (None: nobody) is resumed with the answer."""
        unique = self._next_own
        self._next_own = unique + 2
        self.asks[unique] = task
        if task is not None:
            task.asked = monotonic()
        if task is None or task.unique:  # what no program has asked for is not on a program's account
            self.counters.driver_round_trips += 1
        self.link.send(_pack_header(HEADER + len(ask.body), ask.op, unique, ask.node, *ask.caller, 0) + ask.body)

    def post_release(self, handle: Handle) -> None:
        """Have the driver close a handle that no program has."""
        if handle.driver_handle is not None and self.connected:
            body = RELEASE_IN.pack(handle.driver_handle, handle.flags, 0, 0)
            op = Opcode.RELEASEDIR if handle.is_dir else Opcode.RELEASE
            self.ask(Ask(op, self.nodes.driver(handle.slot), body), None)

    def closed(self, slot: int) -> None:
        """One handle of *slot* is closed: with the last one, a file that was kept for it goes."""
        if self.nodes.flags[slot] & HIDDEN and self.nodes.opens[slot] == 1:
            self.hiding.closed(self, slot)
        self.nodes.closed(slot)

    def changes(self, slot: int) -> None:
        """A request that changes *slot*, or its data, has come: what is known of it will not be true any more.

        Without a driver it is not sent; what is known stays true until it is, should that ever be.
        """
        for handle in self.handles.of(slot):
            handle.written = True
        if self.connected:
            self.nodes.touch(slot)

    # ---- several steps

    def start_own(self, steps: Steps) -> None:
        """Run steps that serve no request of the kernel's. They end with the driver."""
        self.nodes.pins[0] += 1  # slot 0 is nobody's
        self.resume(Task(0, 0, 0, b"", steps, monotonic()), None)

    def start(self, unique: int, op: int, request: bytes, steps: Steps, pending: Pending | None = None) -> None:
        """Serve a request by *steps*, which answers it, or raises Refuse; *pending*: as a driver that died had it."""
        node_id = IN_HEADER.unpack_from(request)[3]
        if not self.alive and not self.recovery.lets(unique, op, node_id, request):
            steps.close()
            return
        slot = self.nodes.slot(node_id)
        self.nodes.pins[slot] += 1
        task = Task(unique, op, slot, request, steps, monotonic(), pending)
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

    # ---- between two drivers

    def unpin(self, slot: int) -> None:
        """What needed *slot* is settled, or will never be."""
        self.nodes.pins[slot] -= 1
        self.nodes.release(slot)

    def is_waiting(self, unique: int) -> bool:
        """Whether a request of the kernel's is with the driver."""
        return unique in self.waiting or unique in self.tasks

    def drop_driver(self) -> None:
        """The driver is gone: forget all that was asked of it, and what it had opened. Nobody is answered here."""
        self.alive = self.connected = False
        self.link.give_up()
        self.waiting.clear()
        # Tasks whose request has been answered early are only found by what they wait for.
        tasks = {task for task in self.asks.values() if task is not None}
        tasks.update(self.tasks.values(), *self.opening.values())
        self.tasks.clear()
        for late in self.late.values():
            self.unpin(late.slot)
        for table in (self.late, self.asks, self.opening):
            table.clear()
        for task in tasks:
            try:
                task.steps.close()
            except ValueError:
                pass  # it is these steps that found the link closed
            self.unpin(task.slot)
        self.handles.forget_driver()

    def take_driver(self, terms: DriverTerms) -> None:
        """Another generation serves from here on."""
        self.connected = True
        self.terms = terms
        self.nodes.begin_generation()
        self.hiding.remove(self)

    def link_lost(self, reason: str) -> None:
        """The driver is gone: what waits for it is parked, or fails if there will be no other; cached things go on."""
        self.recovery.lost()
        if not self.config.recover and not self.recovery.away.is_away:
            self.nodes.forgets.clear()
            self.tell({"t": "state", "state": "FAILED", "reason": "exited", "text": reason})

    def again(self, unique: int, node_id: int, request: bytes) -> None:
        """Handle the request of a task once more, now that what it needs is there."""
        if self.tasks.pop(unique, None) is None:
            return  # answered meanwhile: interrupted, or past its deadline
        self.dispatch(IN_HEADER.unpack_from(request)[1], unique, node_id, memoryview(bytearray(request)))
