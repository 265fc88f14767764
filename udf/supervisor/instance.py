"""What is running, and in which state: the state enum, its only transitions, and the events that tell of them.

Owns: `State`, `Reason`, the table of transitions, `Instance` and the bounded log of events.
Must never: do I/O, know processes or trio. It is the only module that changes a state.
Called by: mounts.py (changes), registry.py and control.py (reading, subscribing).
"""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec

from udf.errors import InternalError

MAX_EVENTS = 1000  # kept for `udf events` and for a subscriber that asks for the past
MAX_TEXT = 1000  # a text may quote a driver, so it is bounded


class State(enum.StrEnum):
    """One life of a mount, a driver or a shim."""

    STARTING = "STARTING"
    ACTIVE = "ACTIVE"
    RECOVERING = "RECOVERING"
    DETACHED = "DETACHED"
    FAILED = "FAILED"
    GONE = "GONE"


class Reason(enum.StrEnum):
    """Why a state changed, as a word that programs may compare."""

    STARTING = "starting"  # somebody asked for it
    READY = "ready"  # it said so itself
    REFUSED = "refused"  # it could not start, and said why
    TIMEOUT = "timeout"  # it did not get ready in time
    EXITED = "exited"  # the driver's process ended by itself
    CRASHED = "crashed"  # the shim's process ended by itself
    HUNG = "hung"  # its heartbeat stopped
    CONTRACT = "contract"  # it broke the rules of a wire
    OPERATOR = "operator"  # `udf umount`
    EXTERNAL = "external"  # umount(8), or somebody else's signal
    FAULT = "fault"  # a signal of the driver's own making: SIGSEGV, SIGABRT and their like
    MEMORY = "memory"  # the OOM killer took the driver
    QUARANTINE = "quarantine"  # the driver died too often by its own making
    STUCK = "stuck"  # the driver's process waits in the kernel and cannot be ended
    SHUTDOWN = "shutdown"  # the supervisor ends
    BOUND = "bound"  # a driver serves the device
    NO_DRIVER = "no_driver"  # nothing serves the device
    UNPLUGGED = "unplugged"  # the device is gone
    REATTACHED = "reattached"  # the device came back, and what was open goes on
    CHANGED = "changed"  # what came back is another device, or what is on it is not what it was
    EXPIRED = "expired"  # the device did not come back in time


# The only transitions there are. GONE is final: a name may be used again, by another Instance.
TRANSITIONS: dict[State, frozenset[State]] = {
    State.STARTING: frozenset({State.ACTIVE, State.FAILED, State.GONE}),
    State.ACTIVE: frozenset({State.RECOVERING, State.DETACHED, State.FAILED, State.GONE}),
    State.RECOVERING: frozenset({State.ACTIVE, State.DETACHED, State.FAILED, State.GONE}),
    State.DETACHED: frozenset({State.ACTIVE, State.RECOVERING, State.FAILED, State.GONE}),
    State.FAILED: frozenset({State.RECOVERING, State.DETACHED, State.GONE}),
    State.GONE: frozenset(),
}


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to an instance, as `udf events` shows it."""

    seq: int  # 1, 2, 3 … in one supervisor's life
    time: float  # seconds since the epoch
    what: str  # state | fault | death | poison
    kind: str  # mount | driver | shim
    name: str
    state: State
    previous: State | None  # None: the instance is new
    reason: str
    text: str
    figures: dict[str, float] = {}  # what a program may want to read out of the text


class EventLog:
    """The last events, and who wants to hear of new ones. Subscribers are called at once and must not block."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._seq = 0
        self._subscribers: dict[int, Callable[[Event], None]] = {}
        self._next_subscriber = 0

    def past(self, after: int = 0) -> list[Event]:
        """The kept events with a number above `after`, oldest first."""
        return [event for event in self._events if event.seq > after]

    @contextmanager
    def subscribed(self, subscriber: Callable[[Event], None]) -> Iterator[None]:
        """Call `subscriber` for each event as long as the context lasts."""
        key = self._next_subscriber
        self._next_subscriber += 1
        self._subscribers[key] = subscriber
        try:
            yield
        finally:
            del self._subscribers[key]

    def add(
        self,
        instance: Instance,
        what: str,
        previous: State | None,
        reason: str,
        text: str,
        figures: dict[str, float] | None = None,
    ) -> Event:
        """Number and keep one event, and tell the subscribers."""
        self._seq += 1
        event = Event(
            seq=self._seq,
            time=instance.since if what == "state" else instance.now(),
            what=what,
            kind=instance.kind,
            name=instance.name,
            state=instance.state,
            previous=previous,
            reason=reason,
            text=text[:MAX_TEXT],
            figures=figures or {},
        )
        self._events.append(event)
        for subscriber in list(self._subscribers.values()):
            subscriber(event)
        return event


class Instance:
    """A mount, a driver or a shim, with what it needs below it."""

    def __init__(
        self,
        name: str,
        kind: str,
        events: EventLog,
        *,
        needs: Sequence[Instance] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.name = name
        self.kind = kind
        self.needs = list(needs)
        self.process: Instance | None = None  # whose process it shows, if that is not its own
        self._pid: int | None = None
        self._events = events
        self._clock = clock
        self._state = State.STARTING
        self._reason = Reason.STARTING
        self._text = ""
        self._since = clock()
        events.add(self, "state", None, self._reason, "")

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return self._pid if self.process is None else self.process.pid

    @pid.setter
    def pid(self, pid: int | None) -> None:
        self._pid = pid

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self._state

    @property
    def reason(self) -> Reason:
        """Why it is there."""
        return self._reason

    @property
    def text(self) -> str:
        """The same as a sentence, or what it is doing."""
        return self._text

    @property
    def since(self) -> float:
        """When the state was entered, in seconds since the epoch."""
        return self._since

    def now(self) -> float:
        """The time of its clock."""
        return self._clock()

    def can(self, state: State) -> bool:
        """Whether the table allows this change now."""
        return state in TRANSITIONS[self._state]

    def change(self, state: State, reason: Reason, text: str = "", **figures: float) -> Event:
        """Enter another state. A change that the table does not have is our own mistake."""
        if not self.can(state):
            raise InternalError(f"{self.kind} {self.name} cannot go from {self._state} to {state} ({reason})")
        previous, self._state = self._state, state
        self._reason, self._text, self._since = reason, text[:MAX_TEXT], self._clock()
        return self._events.add(self, "state", previous, reason, text, figures)

    def note(self, text: str) -> None:
        """What it is doing now, for the tree; no event."""
        self._text = text[:MAX_TEXT]

    def fault(self, operation: str, text: str) -> Event:
        """A mistake that it made and survived: an event, no change of state."""
        return self.tell("fault", operation, text)

    def tell(self, what: str, reason: str, text: str, **figures: float) -> Event:
        """Something that happened to it: an event, no change of state."""
        return self._events.add(self, what, self._state, reason[:MAX_TEXT], text, figures)

    def tree(self, indent: str = "") -> list[str]:
        """The instance and what it needs, one line each: what a start-up time-out prints."""
        process = f" (process {self.pid})" if self.pid else ""
        text = f": {self._text}" if self._text else ""
        lines = [f"{indent}{self.kind} {self.name}{process} {self._state}, {self._reason}{text}"]
        for needed in self.needs:
            lines += needed.tree(indent + "  ")
        return lines
