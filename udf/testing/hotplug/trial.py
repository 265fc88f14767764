"""One trial: a device is plugged in, a scenario runs, one thing goes wrong, and the scenario runs once more.

Owns: the order of a trial and what counts as right in it. Must never: forgive what a program would notice, or let one
trial reach into the next: each has a bus of its own, and what is left of it is ended. Called by: explore.py.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from udf.errors import DeviceGone
from udf.testing.devices.device import Device
from udf.testing.hotplug import backend, steps
from udf.testing.hotplug.bus import LONGEST_WAIT, Plugged, Problem, UsbBus
from udf.testing.hotplug.left import GRACE, Before
from udf.testing.hotplug.report import Finding
from udf.testing.hotplug.running import GivenUpError, Outcome, end, run
from udf.testing.hotplug.steps import LOST, Fault, Step

# A programming error that an author did not think of, rather than a way to say that something is wrong.
_CRASHES = (AttributeError, TypeError, NameError, AssertionError, IndexError, KeyError, StopIteration)
_SPARE_CALLS = 32  # that a driver may make after a fault, besides three times what it makes without


@dataclass(frozen=True)
class Subject:
    """What is explored, and what its author has said about it."""

    scenario: Callable[[], object]
    plug: Callable[[], Device]
    errors: tuple[type[BaseException], ...] = ()
    state: Callable[[Any], object] | None = None
    close: Callable[[], object] | None = None
    twin: Callable[[], Device] | None = None
    replacement: Callable[[], Device] | None = None
    bound: float = 2.0
    leaves: bool = False
    optional: Mapping[tuple[int, int], str] = field(default_factory=dict)


class Trial:
    """One bus and what happens on it."""

    def __init__(self, subject: Subject, fault: Fault, calls: int = 0, grace: float = GRACE) -> None:
        self.subject = subject
        self.fault = fault
        self.bus = UsbBus()
        self.bus.grace = grace
        self.bus.longest_wait = LONGEST_WAIT
        self.findings: list[Finding] = []
        self.hung = False
        self.missed = False  # the call that was numbered did not come
        self._calls = calls  # of a healthy run; 0: not known yet
        self._before = Before.now()
        self._died: list[str] = []

    @property
    def checks(self) -> set[str]:
        """The rules that were broken."""
        return {finding.check for finding in self.findings}

    # ---- its parts

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Let pyusb see this bus, listen to threads that die, and at the end leave nothing."""
        hook, threading.excepthook = threading.excepthook, self._thread_died
        try:
            with backend.current(self.bus):
                try:
                    yield
                finally:
                    self._clean_up()
        finally:
            threading.excepthook = hook

    def plug(self, **how: Any) -> Plugged:
        """Plug the device in."""
        return self.bus.plug(self.subject.plug(), **how)

    def run(self, device: Plugged | None) -> Outcome:
        """One run; its value has the device's state in it, if the author wants that."""
        if self._calls:
            self.bus.most = self.bus.calls + 3 * self._calls + _SPARE_CALLS
        at = len(self.bus.transfers)
        outcome = self._bounded(self.subject.scenario)
        if outcome.kind == "value" and self.subject.state is not None and device is not None:
            # If it was replugged, the one or the other may have been meant.
            outcome = self._with_state(outcome, [device.model, *(each.model for each in self.bus.devices)])
        self.bus.most = 0  # a thread that goes on now is found as one
        if self.bus.given_up == "retries":  # whichever thread it was
            self.hung = True
            fired = self.bus.fired
            since = [step for step in self.bus.transfers[at:] if fired is None or step.number > fired.number]
            last = f", the last one {since[-1]}" if since else ""
            self.wrong("retries", f"it does not stop: {len(since)} calls after the fault{last}")
        elif outcome.kind == "hang":
            self.hung = True
            if not any(problem.check == "hang" for problem in self.bus.problems):
                self.wrong("hang", f"it does not end within {self.subject.bound:g} s", stack=outcome.stack)
        return outcome

    def finish(self) -> None:
        """Close the driver, if the author has said how."""
        if self.subject.close is None or self.hung:
            return
        outcome = self._bounded(self.subject.close)
        if outcome.kind != "value":
            self.wrong("close", f"close does not work afterwards: {outcome}", stack=outcome.stack)

    def look_for_rests(self, *, final: bool) -> None:
        """Whatever is left behind is wrong, once the driver is closed, if its author has said how."""
        if self.hung or self.subject.leaves or (not final and self.subject.close is not None):
            return
        for problem in self.bus.left(self._before):
            hint = ""
            if (
                problem.check in ("handle", "claim", "thread")
                and self.fault.kind == "healthy"
                and self.subject.close is None
            ):
                hint = " (if the driver keeps it for the next run, say close=…)"
            self._add(problem._replace(text=problem.text + hint))

    def wrong(self, check: str, text: str, *, stack: str = "") -> None:
        """Note a finding."""
        step = self.bus.fired
        self.findings.append(Finding(str(self.fault), check, text, str(step) if step else "", stack))

    # ---- what counts as right

    def expect_success(self, outcome: Outcome, expected: Outcome, when: str, check: str = "after") -> bool:
        """A run without a fault must be like any other healthy run."""
        if self.hung:
            return False
        if outcome.kind == "error":
            self.wrong(check, f"{when} it fails: {outcome.error}", stack=outcome.last_line)
            return False
        if not same(outcome, expected):
            self.wrong(check, f"{when} {_difference(outcome, expected)}")
            return False
        return True

    def judge_fault(self, outcome: Outcome, expected: Outcome) -> None:
        """After a fault: the healthy result, or an error that says what has happened."""
        step, kind = self.bus.fired, self.fault.kind
        if self.hung:
            return
        if outcome.kind == "value":
            if not same(outcome, expected):
                self.wrong("wrong", f"no error, but {_difference(outcome, expected)}")
            return
        name = self._optional(step)
        if kind == "stall" and name:
            self.wrong("optional", f"a device may refuse {name}, but it fails: {outcome.error}")
        elif outcome.bases == (AssertionError,):
            self.wrong("wrong", outcome.error)
        elif not self._may_raise(outcome, kind):
            wanted = "an error with errno ENODEV" if kind in LOST else "a USBError or OSError"
            self.wrong("raised", f"{outcome.error}, where {wanted} was to be expected", stack=outcome.last_line)

    def judge_absence(self, outcome: Outcome) -> None:
        """Without a device: an error that is meant."""
        if outcome.kind == "value":
            self.wrong("absent", f"without the device it returns {outcome}")
        elif outcome.kind == "error" and not self._declared(outcome) and issubclass(outcome.bases[0], _CRASHES):
            self.wrong("absent", f"without the device: {outcome.error}", stack=outcome.last_line)

    def judge_twin(self, twin: Plugged) -> None:
        """Another device of the same kind may be looked at, no more."""
        for step in self.bus.transfers:
            if step.device == twin.name and not step.is_harmless:
                self.wrong("twin", f"it talks to the wrong device: {step}")
                return

    def _may_raise(self, outcome: Outcome, kind: str) -> bool:
        if self._declared(outcome):
            return True
        if DeviceGone in outcome.bases:  # UDF's word for ENODEV
            return kind in LOST
        if not issubclass(outcome.bases[0], OSError):
            return False
        return kind not in LOST or outcome.errno == errno.ENODEV

    def _declared(self, outcome: Outcome) -> bool:
        return any(each in self.subject.errors for each in outcome.bases)

    def _optional(self, step: Step | None) -> str:
        if step is None or step.call != steps.CONTROL:
            return ""
        return self.subject.optional.get((step.setup[0], step.setup[1]), "")

    # ---- inside

    def _with_state(self, outcome: Outcome, candidates: list[Device]) -> Outcome:
        assert self.subject.state is not None
        said = ""
        for model in dict.fromkeys(candidates):
            try:
                with self.bus.here:
                    outcome.states.append(self.subject.state(model))
            except AssertionError as error:
                said = said or str(error)
            except Exception as error:  # a model that has gone need not tell
                said = said or f"{type(error).__name__}: {error}"
        if not outcome.states:
            return Outcome("error", error=f"it reports success, and state says: {said}", bases=(AssertionError,))
        return outcome

    def _bounded(self, call: Callable[[], object]) -> Outcome:
        return run(call, self.subject.bound, lambda: self.bus.give_up("hang"), backend.BACKEND.abandoned.add)

    def _thread_died(self, args: Any) -> None:
        if args.exc_type is not GivenUpError and args.exc_type is not SystemExit:
            name = args.thread.name if args.thread is not None else "?"
            self._died.append(f"the thread {name!r} died of {args.exc_type.__name__}: {args.exc_value}")

    def _add(self, problem: Problem) -> None:
        step = problem.step or (str(self.bus.fired) if self.bus.fired else "")
        finding = Finding(str(self.fault), problem.check, problem.text, step, problem.stack)
        if finding not in self.findings:  # what is left after one run is left after the next one too
            self.findings.append(finding)

    def _clean_up(self) -> None:
        self.bus.armed = None
        self.bus.give_up("the trial is over")
        self.bus.end()
        for thread in self._before.new_threads():
            if not end(thread):
                backend.BACKEND.abandoned.add(thread)
        for problem in self.bus.problems:
            self._add(problem)
        if not self.hung and not self.subject.leaves:
            for problem in self.bus.descriptors_left(self._before):
                self._add(problem)
        for text in self._died:
            self.wrong("died", text)


def same(one: Outcome, other: Outcome) -> bool:
    """Whether a run gave what another one did; of the other's devices the first is meant."""
    return bool(one.value == other.value) and (not other.states or other.states[0] in one.states)


def _difference(outcome: Outcome, expected: Outcome) -> str:
    if outcome.value != expected.value:
        return f"it returns {_short(outcome.value)} instead of {_short(expected.value)}"
    has, should = (_short(each.states[0]) for each in (outcome, expected))
    return f"it reports success, and the device has {has} instead of {should}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:80] + f"… ({len(text)} characters)"
