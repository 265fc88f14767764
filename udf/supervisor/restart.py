"""When a driver that died is started again: a pure function of how its generations died.

Owns: the kinds of death, which of them count, and the decision. Must never: read a clock, draw a random number or do
I/O; times and jitter are passed in. Called by: recovery.py (decides), control.py (restarts left).

The policy:
- Deaths that the driver did not cause are external: a signal that somebody sent, an operator's restart, an upgrade.
  They are not counted, and the next generation starts at once, however many there were before.
- All others count: its own end, a fault (a signal of its own making), a hang, the OOM killer, a breach of contract, a
  refusal to start. The first starts again at once, the next ones after a delay that doubles up to a cap.
- A generation that fails before it serves is never followed at once: it has shown that it cannot serve now, while one
  that crashed later had served, and its programs wait.
- HEALTHY seconds of service forgive the delay: the next crash is a first one again.
- The fifth counted death within ten minutes is followed by quarantine: no new generation until an operator asks for it.
"""

from __future__ import annotations

import enum
import signal
from dataclasses import dataclass

QUARANTINE_AFTER = 5  # counted deaths
WINDOW = 600.0  # in so many seconds
FIRST_DELAY = 1.0
MAX_DELAY = 30.0
HEALTHY = 60.0  # seconds of service since the last counted death
JITTER = 0.25  # the part of a delay by which it may be longer or shorter, so that many mounts do not start as one

# What somebody else sends to end a process; a fault of its own has other signals. SIGKILL may be the OOM killer's.
_SENT = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})


class Kind(enum.StrEnum):
    """How a generation died; the same words as the reasons of a state."""

    EXTERNAL = "external"  # somebody else's signal
    OPERATOR = "operator"  # `udf restart`
    EXITED = "exited"  # it ended by itself
    FAULT = "fault"  # SIGSEGV, SIGABRT and their like
    HUNG = "hung"  # no heartbeat, no answer, not ready in time
    MEMORY = "memory"  # the OOM killer
    CONTRACT = "contract"  # it broke the rules of a wire
    REFUSED = "refused"  # it said that it cannot serve, or its process could not be started

    @property
    def is_counted(self) -> bool:
        """Whether it is the driver's own making."""
        return self not in (Kind.EXTERNAL, Kind.OPERATOR)


@dataclass(frozen=True)
class Death:
    """One death; `time` in seconds of a clock that never goes back."""

    time: float
    kind: Kind
    served: float | None  # so many seconds; None: it failed before it served


@dataclass(frozen=True)
class History:
    """What the policy has to know of all deaths so far. Bounded, however many there were."""

    last: Death | None = None
    counted: tuple[float, ...] = ()  # times of the last counted deaths, oldest first
    streak: int = 0  # counted deaths without a healthy period between them
    served: float = 0.0  # seconds of service since the last counted death

    def after(self, death: Death) -> History:
        """The history with one death more."""
        served = self.served + (death.served or 0.0)
        if not death.kind.is_counted:
            return History(death, self.counted, self.streak, served)
        return History(
            last=death,
            counted=(*self.counted, death.time)[-QUARANTINE_AFTER:],
            streak=1 if served >= HEALTHY else self.streak + 1,
        )

    def restarts_left(self, now: float) -> int:
        """So many counted deaths more are followed by a new generation, if they come now."""
        return max(0, QUARANTINE_AFTER - 1 - self._recent(now))

    def _recent(self, now: float) -> int:
        return sum(time > now - WINDOW for time in self.counted)

    def decide(self, now: float, jitter: float) -> Decision:
        """What follows the last death. `jitter` is from -1 to 1."""
        last = self.last
        if last is None or not last.kind.is_counted:
            return Decision(delay=0.0)
        if self._recent(now) >= QUARANTINE_AFTER:
            return Decision(quarantine=True)
        step = self.streak - 1 if last.served is not None else self.streak
        if step == 0:
            return Decision(delay=0.0)
        doubled = FIRST_DELAY * 2.0 ** min(step - 1, 32)
        return Decision(delay=min(MAX_DELAY, doubled * (1.0 + JITTER * jitter)))


@dataclass(frozen=True)
class Decision:
    """Start again after so many seconds, or quarantine."""

    delay: float = 0.0
    quarantine: bool = False


def classify(status: int | None, *, out_of_memory: bool) -> Kind:
    """The kind of a death that nobody of ours caused, from the exit status (minus the signal if one ended it).

    None: there was no process.
    """
    if status is None:
        return Kind.REFUSED
    if status >= 0:
        return Kind.EXITED
    if status == -signal.SIGKILL and out_of_memory:
        return Kind.MEMORY
    return Kind.EXTERNAL if -status in _SENT else Kind.FAULT
