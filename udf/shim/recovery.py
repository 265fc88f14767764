"""Between two generations of the driver: what waits, and how it goes on.

Owns: the requests that are parked, from the end of one link to the first answers over the next; the agreement with the
new driver; and which requests are suspected of killing drivers. Must never: decide whether or when there is a new
generation (the supervisor does), or lose a request: what is parked leaves only by being sent on, answered, or given
up with an errno.

    lost ──▶ parked ──▶ attach: INIT ──▶ agreed: unanswered ones by replay class, oldest first, then what came since
      │         └─▶ fail: EIO for all, until another attach
      └─▶ detach, the device is gone: ENODEV for all, at once or for what has waited so long, until another attach

`detach` comes in any of these states, and `attach`, `fail` and another `detach` after it; away.py has what is cached.
"""

from __future__ import annotations

import errno
from collections import deque
from math import isinf
from time import monotonic
from typing import TYPE_CHECKING

from udf.fuse.structs import IN_HEADER, OUT_HEADER
from udf.shim.away import Away
from udf.shim.contract import INIT_UNIQUE, ContractRefused, driver_init, lacks, parse_driver_init
from udf.shim.doubt import doubt, is_from_page_cache
from udf.shim.inflight import Pending, Task
from udf.shim.link import Link
from udf.shim.looks import look_first
from udf.shim.replay import PURE, REPLAY, Replay
from udf.shim.request_names import with_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from udf.shim.service import Service

_MOST = 4096  # parked requests; and bytes of them: past either the kernel keeps what comes, unread
_MOST_BYTES = 64 << 20
_RECENT = 50  # operations in a crash report
_SHOWN = 100  # waiting requests that are shown
_SUSPECT = 2  # deaths of the driver's own making at which a request was under way


class Parked:
    """A request of the kernel's that waits for a generation."""

    __slots__ = ("deaths", "node_id", "op", "parked_at", "pending", "request", "sent", "since", "unique")

    def __init__(self, unique: int, op: int, node_id: int, request: bytes, since: float) -> None:
        self.unique = unique
        self.op = op
        self.node_id = node_id
        self.request = request
        self.since = since  # when the kernel asked
        self.parked_at = since
        self.sent = False  # the driver that died had been told of it, at least in part
        self.pending: Pending | None = None  # it had been told of all of it
        self.deaths = 0


class Recovery:
    """The requests of one mount that no driver has, and the way to the next one."""

    def __init__(self, service: Service) -> None:
        self._s = service
        self.generation = 1
        self.parked: dict[int, Parked] = {}
        self.away = Away(service)
        self.active = False  # what comes is parked: lost, and neither agreed nor failed
        self.greeting = False  # INIT is under way
        self.alone = 0  # the suspect that is being tried with nothing else under way
        self.recent: deque[tuple[int, int]] = deque(maxlen=_RECENT)
        self.wants_quiet: Callable[[bool], None] = lambda _: None  # told when no more can be parked, and when it can
        self._bytes = 0
        self._quiet = False
        self.error: int = errno.EIO  # of what comes when there is no driver and will be none, and of who has waited
        self.unmounting = False
        self._patience = service.config.patience
        self._known: dict[int, Parked] = {}  # sent on, and not answered yet as far as we know
        self._unanswered: list[int] = []  # under way at the last death
        self._suspects: deque[int] = deque()
        self._counted = False
        self._greet_until = 0.0
        self._told_overdue = False

    @property
    def waits(self) -> bool:
        """Whether something must be looked at from time to time."""
        return bool(self.parked) or self.greeting or self.away.clock_runs

    # ---- without a driver

    def lets(self, unique: int, op: int, node_id: int, message: bytes | bytearray | memoryview) -> bool:
        """Whether a request may go to the driver although not all may; if not, it is parked or answered here."""
        if unique == self.alone:
            return True
        from_page_cache = is_from_page_cache(op, message)
        if not self.active or (from_page_cache and self.unmounting and self.away.is_away):
            self._s.answer_error(unique, self.error)
            if from_page_cache:
                self.away.not_saved(node_id)
            return False
        parked = self._known.pop(unique, None) or Parked(unique, op, node_id, bytes(message), monotonic())
        self._park(parked)
        return False

    def _park(self, parked: Parked) -> None:
        parked.parked_at = monotonic()
        self.parked[parked.unique] = parked
        self._bytes += len(parked.request)
        self._s.counters.parked += 1
        if not self._quiet and (len(self.parked) >= _MOST or self._bytes >= _MOST_BYTES):
            self._quiet = True
            self.wants_quiet(True)

    def take(self, unique: int) -> Parked | None:
        """Take a request out, to answer it."""
        parked = self.parked.pop(unique, None)
        if parked is not None:
            self._bytes -= len(parked.request)
            if self._quiet and len(self.parked) < _MOST // 2 and self._bytes < _MOST_BYTES // 2:
                self._quiet = False
                self.wants_quiet(False)
        return parked

    def lost(self) -> None:
        """The link is closed, and all that the driver had said is taken: park what it had not answered."""
        s = self._s
        under_way = [self._from_pending(unique, pending) for unique, pending in s.waiting.items()]
        under_way += [self._from_task(task) for task in s.tasks.values()]
        under_way.sort(key=lambda parked: parked.since)
        self._doubt_what_was_answered_early()
        s.drop_driver()
        self._known.clear()
        self._unanswered = [parked.unique for parked in under_way]
        self.greeting = False
        self.alone = 0
        self._suspects.clear()
        s.tell({"t": "link_lost", "pending": len(under_way), "recent": self._recent_lines()})
        self.recent.clear()
        since, self.parked, self._bytes = self.parked, {}, 0
        if not self.away.is_away:
            self.active, self.error, self._patience = s.config.recover, errno.EIO, s.config.patience
        for parked in [*under_way, *since.values()]:
            if self.active:
                self._park(parked)
            else:
                self._give_up(parked)

    def _doubt_what_was_answered_early(self) -> None:
        """What a program has been told of before the driver had answered is settled by nobody any more."""
        s = self._s
        for pending in s.late.values():
            doubt(s, pending.op, pending.request)
        for task in s.asks.values():
            if task is not None and task.unique and s.tasks.get(task.unique) is not task:
                doubt(s, task.op, task.request)

    def _from_pending(self, unique: int, pending: Pending) -> Parked:
        parked = self._known.get(unique) or Parked(
            unique, pending.op, pending.node_id, pending.request, monotonic() if isinf(pending.sent) else pending.sent
        )
        parked.sent, parked.pending = True, pending
        return parked

    def _from_task(self, task: Task) -> Parked:
        parked = self._known.get(task.unique) or Parked(
            task.unique, task.op, IN_HEADER.unpack_from(task.request)[3], task.request, task.began
        )
        parked.sent, parked.pending = True, task.pending or parked.pending
        return parked

    def _recent_lines(self) -> list[str]:
        s = self._s
        lines = []
        for op, slot in self.recent:
            path = s.nodes.path(slot) if slot else None
            lines.append(f"{s.op_name(op)} {(path or '')[:200]}".rstrip())
        return lines

    def requests(self) -> dict[str, object]:
        """Return what waits, for people: the oldest first, not more than one message holds."""
        s = self._s
        now = monotonic()
        waiting = [(p.sent, unique, p.op, p.node_id, p.request, False) for unique, p in s.waiting.items()]
        waiting += [
            (task.began, unique, task.op, s.nodes.node_id(task.slot), task.request, False)
            for unique, task in s.tasks.items()
        ]
        waiting += [(p.since, p.unique, p.op, p.node_id, p.request, True) for p in self.parked.values()]
        waiting.sort(key=lambda one: one[0])
        shown = [
            {
                "id": unique,
                "op": s.op_name(op),
                "path": self._path(op, node_id, request)[:200],
                "age": 0.0 if isinf(since) else round(now - since, 3),
                "pid": IN_HEADER.unpack_from(request)[6],
                "parked": parked,
            }
            for since, unique, op, node_id, request, parked in waiting[:_SHOWN]
        ]
        return {"total": len(waiting), "requests": shown}

    def _path(self, op: int, node_id: int, request: bytes) -> str:
        slot = self._s.nodes.slot(node_id)
        path = (self._s.nodes.path(slot) or "") if slot else ""
        return with_name(path, op, request)

    def drop(self, unique: int) -> Parked | None:
        """Take a request out that nobody is going to serve, whatever has become of it."""
        parked = self.take(unique)
        if parked is not None and parked.sent:
            doubt(self._s, parked.op, parked.request)
        return parked

    def _give_up(self, parked: Parked, error: int = 0) -> None:
        """Answer a request that nobody is going to serve."""
        if self.drop(parked.unique) is None and parked.sent:
            doubt(self._s, parked.op, parked.request)
        self._s.interrupted.pop(parked.unique, None)
        self._s.answer_error(parked.unique, error or self.error)
        if is_from_page_cache(parked.op, parked.request):
            self.away.not_saved(parked.node_id)

    def fail(self) -> None:
        """There is no new generation for now: everything that waits fails, and so does what comes."""
        self.active, self.error = False, errno.EIO
        for parked in list(self.parked.values()):
            self._give_up(parked)

    def detach(self, wait: float, max_stale: float) -> None:
        """The device is gone: what waits and what comes fails with ENODEV, or when it has waited for so long.

        A driver that is there is lost right after this. Each request has the whole time to wait from the unplug on.
        """
        self.active, self.error, self._patience = wait > 0, errno.ENODEV, wait
        now = monotonic()
        for parked in list(self.parked.values()):
            if not self.active:
                self._give_up(parked)
            elif not self.away.is_away:
                parked.parked_at = now
        self.away.begin(max_stale)

    def unmount_begins(self, *, lazy: bool) -> None:
        """The kernel writes back what is dirty first, and with the device away that must not wait for it.

        Nor does anybody whose mount is out of the tree: it is not kept for a device any more.
        """
        self.unmounting = True
        if self.away.is_away:
            self.active = self.active and not lazy
            for parked in list(self.parked.values()):
                if lazy or is_from_page_cache(parked.op, parked.request):
                    self._give_up(parked)

    def check_time(self, now: float) -> None:
        """Give up what has waited too long, and a new driver that does not answer."""
        s = self._s
        self.away.check_time(now)
        before = now - self._patience
        for parked in list(self.parked.values()):
            if parked.parked_at < before:
                self._give_up(parked)
        if self._known:
            self._known = {unique: parked for unique, parked in self._known.items() if s.is_waiting(unique)}
        if self.greeting and now > self._greet_until:
            self.refuse(f"the driver did not answer INIT within {s.config.start_timeout:g} s")

    def overdue(self, op: int, age: float) -> None:
        """A request has passed its deadline: the supervisor is told, once, that this generation hangs."""
        if self._s.config.recover and not self._told_overdue:
            self._told_overdue = True
            self._s.tell({"t": "overdue", "op": self._s.op_name(op), "age": round(age, 3)})

    # ---- a new generation

    def attach(self, link: Link, generation: int, counted: bool) -> None:
        """Begin with a new driver over a link."""
        s = self._s
        s.link.close()
        s.link = link
        self.generation = generation
        self._counted = counted and not self.away.is_away  # an unplug is nobody's making
        self.greeting = True
        self._greet_until = monotonic() + s.config.start_timeout
        s.link.send(driver_init(locks=s.config.locks))

    def refuse(self, why: str) -> None:
        """This driver will not do; go on waiting for another."""
        self.greeting = False
        self._s.link.give_up()
        self._s.tell({"t": "refused", "generation": self.generation, "error": why})

    def greeted(self, size: int) -> None:
        """Take the driver's first message: its answer to INIT."""
        s = self._s
        view = s.link.view
        length, error, unique = OUT_HEADER.unpack_from(view) if size >= OUT_HEADER.size else (0, 0, 0)
        if unique != INIT_UNIQUE:
            return  # a notification before INIT means nothing
        if error or length != size:
            self.refuse(f"the driver refused INIT (error {-error})")
            return
        try:
            terms = parse_driver_init(view[OUT_HEADER.size : size], locks=s.config.locks)
        except ContractRefused as refused:
            self.refuse(str(refused))
            return
        missing = lacks(s.terms, terms)
        if missing:
            self.refuse(f"the driver lacks what this mount was promised: {missing}")
            return
        self.greeting = self._told_overdue = False
        s.take_driver(terms)
        self.away.back()
        self._go_on()

    def _go_on(self) -> None:
        s = self._s
        waiting = len(self.parked)
        unanswered = [self.parked[unique] for unique in self._unanswered if unique in self.parked]
        self._unanswered = []
        if self._counted:
            for parked in unanswered:
                parked.deaths += 1
        s.tell(
            {
                "t": "attached",
                "generation": self.generation,
                "replayed": len(unanswered),
                "parked": waiting - len(unanswered),
            }
        )
        s.counters.replayed += len(unanswered)
        suspects = [parked for parked in unanswered if parked.deaths >= _SUSPECT] if self._counted else []
        if len(suspects) == 1:
            self._poison(suspects[0])
        elif suspects:
            self._suspects.extend(parked.unique for parked in suspects)
            self.next_suspect()
            return
        self._open()

    def _open(self) -> None:
        """Send everything on, and let through what comes."""
        s = self._s
        self.alone = 0
        self.active = False
        s.alive = True
        waiting, self.parked, self._bytes = self.parked, {}, 0
        if self._quiet:
            self._quiet = False
            self.wants_quiet(False)
        for parked in waiting.values():
            self._send_on(parked)

    def next_suspect(self) -> None:
        """With one suspect answered, try the next; with none left, go on with everything."""
        s = self._s
        while self._suspects:
            parked = self.take(self._suspects.popleft())
            if parked is not None:
                self.alone = parked.unique
                self._send_on(parked)
                if s.is_waiting(parked.unique):
                    return
        self._open()

    def _send_on(self, parked: Parked) -> None:
        s = self._s
        unique = parked.unique
        self._known[unique] = parked
        replay = REPLAY[parked.op] if parked.sent else Replay.PURE
        if parked.op not in PURE:
            s.interrupted.pop(unique, None)  # from here on the driver's answer counts
        pending = parked.pending
        if replay is Replay.REFUSED:
            self._give_up(parked, errno.EIO)
        elif replay is Replay.ONCE and pending is not None:
            s.start(unique, parked.op, parked.request, look_first(s, unique, pending), pending)
        else:
            s.dispatch(parked.op, unique, parked.node_id, memoryview(bytearray(parked.request)))

    def _poison(self, parked: Parked) -> None:
        s = self._s
        s.counters.poisoned += 1
        path = self._path(parked.op, parked.node_id, parked.request)
        s.tell({"t": "poison", "op": s.op_name(parked.op), "path": path[:1000]})
        self._give_up(parked, errno.EIO)
