"""The exploration: every fault at every call of a scenario.

The scenario runs undisturbed, which numbers its calls. Then it runs once for each call and each fault that can happen
to that call, and after that once more without a fault: on the replugged device if it was pulled out, else on the same
one. Conditions, under which a driver must work or say that it cannot, are tried in the same way.

Owns: what is tried, in which order. Must never: depend on a clock or on chance. Called by: UsbBus.explore.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from udf.errors import UserError
from udf.testing.devices.device import Device
from udf.testing.hotplug import steps
from udf.testing.hotplug.left import GRACE
from udf.testing.hotplug.report import ONE, HotplugError, Report
from udf.testing.hotplug.running import Outcome
from udf.testing.hotplug.steps import CONDITIONS, DEFAULT, FAULTS, KERNEL_CLASSES, LOST, Fault, Step
from udf.testing.hotplug.trial import Subject, Trial, same

_FEW = 0.2  # of the faults may miss their call, because threads do not always come in the same order
_SHORT_GRACE = 0.05  # seconds
_BY_THE_CLOCK = {"hang", "thread"}
_ENOUGH = 30  # findings, then the rest tells nothing new


def explore(
    scenario: Callable[[], object],
    plug: Callable[[], Device],
    *,
    faults: Sequence[str] = DEFAULT,
    also: Sequence[str] = (),
    without: Sequence[str] = (),
    errors: type[BaseException] | Sequence[type[BaseException]] = (),
    state: Callable[[Any], object] | None = None,
    close: Callable[[], object] | None = None,
    twin: Callable[[], Device] | None = None,
    replacement: Callable[[], Device] | None = None,
    optional: Mapping[tuple[int, int], str] = steps.OPTIONAL,
    only: str | None = None,
    bound: float = 2.0,
    leaves: bool = False,
    check: bool = True,
) -> Report:
    """Try it all; HotplugError if something is wrong, or with check=False the report.

    `scenario`: finds the device with plain pyusb, uses it, and returns a value that is the same each time (or a
    coroutine). `plug`: makes the model of the device, a new one each time.
    `faults`, `also`, `without`: what is tried, of FAULTS and CONDITIONS; by itself all but EXTRA.
    `errors`: what the scenario may raise besides an OSError (after an unplug: besides one with errno ENODEV).
    `state`: what of the model belongs to the result: `lambda model: bytes(model.memory)`, for a scenario that writes.
    It may assert what must be so after a run without an error.
    `close`: ends a driver that keeps its device from one run to the next. Without it, each run must leave nothing.
    `twin`: makes another device of the same kind, which must be left alone. `replacement`: makes what is plugged in
    after an unplug: the same kind of device, about which something else is true, so that the result differs.
    `optional`: requests (bmRequestType, bRequest) that a device may refuse by their specification.
    `only`: one of them, as a report names it; the environment's UDF_HOTPLUG says the same.
    `bound`: seconds for one run. `leaves`: what is left behind is not looked at, because a process ends after each run.
    """
    __tracebackhide__ = True
    listed = (errors,) if isinstance(errors, type) else tuple(errors)
    subject = Subject(scenario, plug, listed, state, close, twin, replacement, bound, leaves, optional)
    report = Report(getattr(scenario, "__qualname__", "the scenario"))
    kinds = [each for each in map(_known, (*faults, *also)) if each not in set(map(_known, without))]
    one = only or os.environ.get(ONE)
    _Exploration(subject, report, kinds).all(Fault.parse(one) if one else None)
    if check and not report:
        raise HotplugError(report)
    return report


def _known(kind: str) -> str:
    return kind if kind in CONDITIONS else steps.known(kind)


class _Exploration:
    def __init__(self, subject: Subject, report: Report, kinds: Sequence[str]) -> None:
        self._subject = subject
        self._report = report
        self._kinds = kinds
        self._steps: list[Step] = []
        self._first = 0  # calls of the first run
        self._expected = Outcome("value")
        self._replaced = Outcome("value")
        self._unclaimed: list[int] = []
        self._kernel: list[int] = []
        self._grace = GRACE
        self._slow = False  # something by the clock was found twice

    def all(self, one: Fault | None) -> None:
        report = self._report
        if not self._note(self._certain(self._healthy)):
            return
        if not self._steps:
            raise UserError("the scenario makes no call to a device: does it use usb.core.find() when it runs?")
        if self._subject.replacement is not None and not self._note(self._certain(self._replacement)):
            return
        if one is not None and one.kind in ("healthy", "replacement"):
            return
        for fault in [one] if one is not None else self._faults():
            found = not self._note(self._certain(partial(self._try, fault)))
            if found and not self._works_again():
                report.notes.append(
                    f"after {fault} it does not work any more, also without a fault: the rest is untried"
                )
                break
            if len(report.findings) >= _ENOUGH:
                report.notes.append(f"{len(report.findings)} findings are enough: the rest is untried")
                break
        if len(report.missed) > max(1, len(report.tried) * _FEW):
            report.notes.append(
                f"{len(report.missed)} faults did not find their call: the scenario is not the same each time"
            )

    def _certain(self, attempt: Callable[[], Trial]) -> Trial:
        """What only the clock says is said by it twice: a busy machine is no failure."""
        trial = attempt()
        if trial.findings and not self._slow and trial.checks <= _BY_THE_CLOCK:
            trial = attempt()
            self._slow = bool(trial.findings)
        return trial

    def _note(self, trial: Trial) -> bool:
        """Into the report; whether nothing was found."""
        self._report.tried.append(str(trial.fault))
        self._report.findings += trial.findings
        if "thread" in trial.checks:
            self._grace = _SHORT_GRACE  # it is known now that threads are left: do not wait for each
        if trial.missed:
            self._report.missed.append(str(trial.fault))
        return not trial.findings

    def _faults(self) -> list[Fault]:
        found = [Fault(kind) for kind in self._kinds if kind in CONDITIONS and self._can_be(kind)]
        for step in self._steps:
            found += [Fault(kind, step.number) for kind in self._kinds if kind in FAULTS and FAULTS[kind][0](step)]
        if self._subject.close is not None:  # between two runs, while it keeps the device
            found += [Fault(kind, len(self._steps) + 1) for kind in self._kinds if kind in LOST]
        return found

    def _can_be(self, kind: str) -> bool:
        if kind == "kernel_driver":
            return bool(self._kernel)
        if kind == "in_use":
            return bool(self._unclaimed)
        if kind in ("twin", "twin_alone"):
            return self._subject.twin is not None
        return True

    # ---- without a fault

    def _healthy(self) -> Trial:
        """Two undisturbed runs on one device: the numbers, and the result."""
        trial = Trial(self._subject, Fault("healthy"))
        with trial.begun():
            device = trial.plug()
            first = trial.run(device)
            self._first = trial.bus.calls
            self._steps = list(trial.bus.transfers)
            if first.kind == "error":
                trial.wrong("healthy", f"it fails without any fault: {first.error}", stack=first.stack)
            elif first.kind == "value":
                trial.look_for_rests(final=False)
                second = trial.run(device)
                trial.expect_success(
                    second, first, "the second run on the same device is not like the first one:", "healthy"
                )
                if self._subject.close is not None:
                    self._steps = list(trial.bus.transfers)
                trial.finish()
                trial.look_for_rests(final=True)
            claimed = {each for step in self._steps if step.call == steps.CLAIM for each in [step.length]}
            present = self._interfaces(device.model)
            self._unclaimed = [number for number in present if number not in claimed] if len(present) > 1 else []
            self._kernel = [number for number, kind in present.items() if kind in KERNEL_CLASSES]
        self._report.steps = [str(step) for step in self._steps]
        self._expected = first
        return trial

    @staticmethod
    def _interfaces(model: Device) -> dict[int, int]:
        if not model.configurations:
            return {}
        return {number: each.device_class for number, each in enumerate(model.configurations[0].interfaces)}

    def _replacement(self) -> Trial:
        """What a healthy run gives on the device that will be plugged in after the first one."""
        trial = Trial(self._subject, Fault("replacement"))
        with trial.begun():
            assert self._subject.replacement is not None
            device = trial.bus.plug(self._subject.replacement())
            self._replaced = outcome = trial.run(device)
            if outcome.kind == "error":
                trial.wrong("replacement", f"it fails with the replacement: {outcome.error}", stack=outcome.last_line)
            elif outcome.kind == "value" and same(outcome, self._expected):
                trial.wrong("replacement", f"with the replacement it still returns {outcome}: something is remembered")
            trial.finish()
            trial.look_for_rests(final=True)
        return trial

    def _works_again(self) -> bool:
        """After a finding: whether a healthy run is one, at the second attempt at the latest."""
        for _ in range(2):
            trial = Trial(self._subject, Fault("healthy"), self._first)
            with trial.begun():
                device = trial.plug()
                outcome = trial.run(device)
                fine = trial.expect_success(outcome, self._expected, "")
                trial.finish()
            if fine:
                return True
        return False

    # ---- with one

    def _try(self, fault: Fault) -> Trial:
        if fault.kind in CONDITIONS:
            return self._condition(fault)
        steps.known(fault.kind)
        if not fault.number:
            raise UserError(f"{fault} does not say at which call: {fault}@7")
        if fault.number > len(self._steps) + (self._subject.close is not None):
            raise UserError(f"{fault} is not there: a healthy run makes {len(self._steps)} calls")
        return self._between(fault) if fault.number > len(self._steps) else self._at(fault)

    def _at(self, fault: Fault) -> Trial:
        trial = Trial(self._subject, fault, self._first, self._grace)
        with trial.begun():
            trial.bus.spare = self._subject.replacement or self._subject.plug
            device = trial.plug()
            trial.bus.armed = fault
            first = last = trial.run(device)
            if trial.bus.fired is None and fault.number > self._first:
                trial.expect_success(first, self._expected, "before the fault")
                last = trial.run(device)
            if trial.bus.fired is None:
                trial.missed = True
                trial.expect_success(last, self._expected, f"no call had the number {fault.number}, and")
            else:
                self._after(trial, device, last)
        return trial

    def _after(self, trial: Trial, device: Any, outcome: Outcome) -> None:
        kind = trial.fault.kind
        expected = self._expected
        current = device if device.present else next(iter(trial.bus.devices), None)
        if (
            kind == "replug"
            and self._subject.replacement is not None
            and outcome.kind == "value"
            and same(outcome, self._replaced)
        ):
            expected = self._replaced  # it has gone over to the new one
        trial.judge_fault(outcome, expected)
        trial.look_for_rests(final=False)
        if trial.hung or trial.findings:
            trial.finish()
            return
        device.rest.clear()
        if kind in LOST:
            expected = self._replaced if self._subject.replacement is not None else self._expected
            current = current or trial.bus.replug(device)
            when = "after it was plugged in again"
        else:
            when = "when it is used again"
        trial.expect_success(trial.run(current), expected, when)
        trial.finish()
        trial.look_for_rests(final=True)

    def _between(self, fault: Fault) -> Trial:
        """A driver that keeps its device open loses it while nobody asks for anything."""
        trial = Trial(self._subject, fault, self._first, self._grace)
        with trial.begun():
            trial.bus.spare = self._subject.replacement or self._subject.plug
            expected = self._replaced if self._subject.replacement is not None else self._expected
            device = trial.plug()
            if trial.expect_success(trial.run(device), self._expected, "before the fault"):
                if fault.kind == "replug":
                    current = trial.bus.replug(device)
                    outcome = trial.run(current)
                    if outcome.kind != "value":  # it learns only now that the device was gone in between
                        trial.judge_fault(outcome, expected)
                else:
                    trial.bus.unplug(device)
                    trial.judge_absence(trial.run(None))
                    current = trial.bus.replug(device)
                if not trial.findings:
                    trial.expect_success(trial.run(current), expected, "after it was plugged in again")
                trial.finish()
                trial.look_for_rests(final=True)
        return trial

    def _condition(self, fault: Fault) -> Trial:
        if not self._can_be(fault.kind):
            raise UserError(f"{fault} cannot be tried here: {CONDITIONS[fault.kind]}")
        trial = Trial(self._subject, fault, self._first, self._grace)
        with trial.begun():
            if fault.kind == "absent":
                trial.judge_absence(trial.run(None))
            elif fault.kind in ("twin", "twin_alone"):
                assert self._subject.twin is not None
                twin = trial.bus.plug(self._subject.twin())
                if fault.kind == "twin":
                    trial.expect_success(trial.run(trial.plug()), self._expected, "beside a twin", "twin")
                else:
                    trial.judge_absence(trial.run(None))
                trial.judge_twin(twin)
            else:
                how: dict[str, dict[str, Any]] = {
                    "unconfigured": {"configured": False},
                    "kernel_driver": {"kernel_driver": self._kernel},
                    "in_use": {"in_use": self._unclaimed},
                }
                device = trial.plug(**how[fault.kind])
                trial.expect_success(trial.run(device), self._expected, CONDITIONS[fault.kind], fault.kind)
            trial.finish()
            trial.look_for_rests(final=True)
        return trial
