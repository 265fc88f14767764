"""The time in which the device behind the driver is away: how long what is cached is still true, and how that ends.

Owns: the clock of `max_stale`, which runs from the loss of the driver to the next generation that serves, whatever
comes between; and, when it has run out, having the kernel forget names, attributes and pages, a few nodes at a time.
From then on nothing is answered out of a cache, neither the kernel's nor ours. Must never: wait (the notifier's thread
does), or decide what a request gets instead (recovery.py does). Called by: recovery.py and the loop.

    is_away ──max_stale──▶ is_over: the shim answers nothing ──▶ sweeping: the kernel forgets ──▶ done
        └────────────────────────┴──▶ back: a generation serves, and what is known is true again
"""

from __future__ import annotations

from math import inf
from time import monotonic
from typing import TYPE_CHECKING

from udf.fuse.opcodes import Opcode
from udf.fuse.structs import IN_HEADER
from udf.shim.graph import ROOT
from udf.shim.open_files import flush, release
from udf.shim.requests import HANDLERS, batch_forget, destroy, forget, interrupt, notify_reply
from udf.shim.stale import answer_stale, stale_attributes

if TYPE_CHECKING:
    from collections.abc import Callable

    from udf.shim.requests import Handler
    from udf.shim.service import Service

_SCANNED = 4096  # slots looked at in one turn
_ROOM = 512  # invalidations that may wait at the notifier; the next ones come when it has sent these
_UNSAVED = 4096  # nodes whose pages are dropped when the device is back
_EPOCHS_SINCE = 44  # the kernel's FUSE minor from which one notification expires all names
# What holds locked pages while it waits, and with them whoever would invalidate these.
_HOLDS_PAGES = frozenset((int(Opcode.READ), int(Opcode.WRITE), int(Opcode.READLINK)))


class Away:
    """Whether the device is away, and what may be answered meanwhile."""

    def __init__(self, service: Service) -> None:
        self._s = service
        self.is_away = False
        self.is_over = False  # what is cached is not to be had any more
        self.sweeping = False
        self.knows_nothing: Callable[[bool], None] = lambda _: None  # told when nothing is answered, and when it is
        self._since = 0.0
        self._until = inf
        self._at = 0
        self._postponed: list[int] = []
        self._unsaved: set[int] = set()

    @property
    def clock_runs(self) -> bool:
        """Whether the end of what is cached is still to come."""
        return self.is_away and not self.is_over

    @property
    def stale_for(self) -> float:
        """So many seconds more it is answered."""
        return max(0.0, self._until - monotonic()) if self.clock_runs else 0.0

    def begin(self, max_stale: float) -> None:
        """The device is gone, or still gone: what is known may be used for *max_stale* seconds since it went."""
        now = monotonic()
        if not self.is_away:
            self.is_away, self._since = True, now
            self._s.counters.detaches += 1
        self._until = self._since + max_stale
        self.check_time(now)

    def back(self) -> None:
        """Another generation serves."""
        self.is_away = self.sweeping = False
        self._postponed.clear()
        if self.is_over:
            self.is_over = False
            self.knows_nothing(False)
        for node_id in self._unsaved:
            self._s.notifier.invalidate(node_id)
        self._unsaved.clear()

    def not_saved(self, node_id: int) -> None:
        """Pages that a program changed through a mapping could not be written: they are not what the file has.

        The program that waits for it is told (msync, fsync); but to the kernel they are as good as written. They may
        be looked at as long as anything that is cached, and are read again when the device is back.
        """
        if not self.is_away or len(self._unsaved) >= _UNSAVED:
            self._s.notifier.invalidate(node_id)
        else:
            self._unsaved.add(node_id)

    def check_time(self, now: float) -> None:
        """End what has been true for long enough."""
        if self.clock_runs and now >= self._until:
            self.is_over = self.sweeping = True
            self._at = ROOT
            self.knows_nothing(True)
            self._s.notifier.expire_names()

    def sweep(self) -> None:
        """Have the kernel forget the next nodes. What a request holds comes last: the notifier has to wait for it."""
        s = self._s
        nodes = s.nodes
        room = _ROOM - len(s.notifier)
        if self._at < nodes.top:
            held = {nodes.slot(parked.node_id) for parked in s.recovery.parked.values() if parked.op in _HOLDS_PAGES}
            for slot in range(self._at, min(self._at + _SCANNED, nodes.top)):
                if room <= 0:
                    return
                self._at = slot + 1
                if not nodes.is_known(slot):
                    continue
                if slot in held:
                    self._postponed.append(nodes.node_id(slot))
                    continue
                room -= 1
                self._forget(slot)
        elif self._postponed and room > 0:
            for node_id in self._postponed[-room:]:
                if slot := nodes.slot(node_id):
                    self._forget(slot)
            del self._postponed[-room:]
        self.sweeping = self._at < nodes.top or bool(self._postponed)

    def _forget(self, slot: int) -> None:
        s = self._s
        s.counters.invalidated += 1
        s.notifier.invalidate(s.nodes.node_id(slot))
        if s.kernel_minor < _EPOCHS_SINCE:
            for parent, name in s.nodes.links_of(slot):
                s.notifier.expire(s.nodes.node_id(parent), name)


# ---- what is answered when nothing is known any more


def _nowhere(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """Nobody can answer this: it fails, or waits for the device."""
    s.recovery.lets(unique, IN_HEADER.unpack_from(message)[1], node_id, message)


def _getattr(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """GETATTR of the root is answered as ever: `ls -l` of the directory above is not about what the device has."""
    if s.nodes.slot(node_id) != ROOT or not answer_stale(s, unique, stale_attributes(s, ROOT)):
        _nowhere(s, unique, node_id, message)


def _statfs(s: Service, unique: int, node_id: int, message: memoryview) -> None:
    """STATFS does not wait: df looks at every mount, and means none of them."""
    s.answer_error(unique, s.recovery.error)


_AS_EVER: dict[int, Handler] = {
    Opcode.FORGET: forget,
    Opcode.BATCH_FORGET: batch_forget,
    Opcode.INTERRUPT: interrupt,
    Opcode.NOTIFY_REPLY: notify_reply,
    Opcode.DESTROY: destroy,
    Opcode.RELEASE: release,
    Opcode.RELEASEDIR: release,
    Opcode.FLUSH: flush,  # of what the driver never heard of there is nothing that could be lost
    Opcode.GETATTR: _getattr,
    Opcode.STATFS: _statfs,
}
NOTHING_KNOWN: dict[int, Handler] = {op: _AS_EVER.get(op, _nowhere) for op in HANDLERS}
