"""An emulated USB bus inside a test: what the fixture `usb_bus` gives.

Owns: what is plugged in, the numbers of the calls, the rules, open handles, and what went wrong without anybody being
told. Must never: start a thread or open a descriptor, or let a driver wait for longer than `longest_wait`.
Called by: tests, trial.py, and backend.py on behalf of a driver.
"""

from __future__ import annotations

import gc
import threading
from base64 import b64encode
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple

from udf.errors import UserError
from udf.messages import DeviceSpec
from udf.testing.devices.device import Device
from udf.testing.hotplug import backend, steps
from udf.testing.hotplug.direct import Here, Link
from udf.testing.hotplug.left import GRACE, Before, describe_thread
from udf.testing.hotplug.report import Report
from udf.testing.hotplug.running import GivenUpError
from udf.testing.hotplug.steps import Fault, Rule, Step
from udf.usb.backend import Backend

# Seconds, in an exploration: nothing in one process takes longer, so a longer time-out is shortened to this.
LONGEST_WAIT = 0.2


class Problem(NamedTuple):
    """Something that no exception tells."""

    check: str
    text: str
    step: str = ""
    stack: str = ""


class Plugged:
    """One arrival of a device. After a replug there is another one."""

    def __init__(self, bus: UsbBus, model: Device, port: int, address: int, *, configured: bool) -> None:
        self.bus = bus
        self.model = model
        self.port = port
        self.address = address
        self.name = f"{model.product_name} {model.serial or ''}".strip() + f" at 1-{port}, address {address}"
        self.present = True
        self.kernel: set[int] = set()  # interfaces that a kernel driver has
        self.detached: set[int] = set()  # those that it was taken from
        self.others: set[int] = set()  # interfaces that another program has
        self.rest: dict[int, bytes] = {}  # endpoint -> what a fault has kept back
        self.link = Link(bus.here, model, self.name)
        with bus.here:
            model._engine = self.link.engine
            model.on_plugged()
            value = model.configured
            if not value and configured and model.configurations:
                value = model.configurations[0].value  # a host chooses the first one, as Linux does
            chosen = next((each for each in model.configurations if each.value == value), None)
            if chosen is not None:
                self.link.engine.configure(chosen)
                model.on_configured(value)
        self.spec = _spec(self, value if chosen is not None else 0)
        self.backend: Any = Backend(self.link, self.spec)  # type: ignore[arg-type]  # Link is what Connection is
        self.inner: Any = next(iter(self.backend.enumerate_devices()))

    def __repr__(self) -> str:
        return f"<{self.name}{'' if self.present else ', gone'}>"

    def halt(self, endpoint: int) -> None:
        """Stall an endpoint until the host clears it."""
        with self.bus.here:
            self.link.engine.halt(endpoint, False)

    def packet_size(self, endpoint: int) -> int:
        """Of an endpoint that is in use; else 64."""
        pipe = self.link.engine.pipes.get(endpoint)
        return pipe.size if pipe is not None else 64

    def take_rest(self, endpoint: int, view: memoryview) -> int:
        """What a fault has kept back of an endpoint's data, as far as there is room; the number of bytes."""
        rest = self.rest.pop(endpoint, b"") if self.present else b""
        now, later = rest[: len(view)], rest[len(view) :]
        view[: len(now)] = now
        if later:
            self.rest[endpoint] = later
        return len(now)

    def remove(self) -> None:
        """Out of the port."""
        self.present = False
        self.link.end()


class UsbBus:
    """Plug in models, and let the code under test find them with plain pyusb."""

    def __init__(self) -> None:
        self.here = Here()
        self.transfers: list[Step] = []  # every call of the driver, also those that are no transfers
        self.problems: list[Problem] = []
        self.longest_wait = float("inf")  # seconds; time-outs that are longer are shortened
        self.grace = GRACE
        self.spare: Callable[[], Device] | None = None  # makes what a replug brings; None: the same model again
        self.armed: Fault | None = None
        self.fired: Step | None = None  # what the armed fault was done to
        self.most = 0  # calls, then the driver is given up; 0: as many as it likes
        self.given_up = ""  # why
        self._plugged: list[Plugged] = []
        self._models: dict[Device, None] = {}  # all that ever were plugged in
        self._handles: list[backend.Handle] = []
        self._rules: list[Rule] = []
        self._ports = count(1)
        self._addresses = count(2)  # 1 is the root hub
        self._number = 0
        self._current: dict[int, Step] = {}  # thread -> its last call
        self._lock = threading.Lock()

    # ---- what tests do

    @property
    def devices(self) -> list[Plugged]:
        """What is plugged in, in the order of its arrival."""
        return list(self._plugged)

    def plug(
        self,
        model: Device | type[Device],
        *,
        configured: bool = True,
        kernel_driver: Iterable[int] = (),
        in_use: Iterable[int] = (),
        port: int | None = None,
    ) -> Plugged:
        """Plug a model in. `configured`: the host has chosen a configuration, as Linux does.

        `kernel_driver`: interfaces that a kernel driver has bound itself to. `in_use`: those that another program has.
        """
        made = model() if isinstance(model, type) else model
        plugged = Plugged(self, made, port or next(self._ports), next(self._addresses), configured=configured)
        plugged.link.patience = self.longest_wait
        plugged.link.endless = lambda: self.endless(self._current.get(threading.get_ident()))
        plugged.kernel.update(kernel_driver)
        plugged.others.update(in_use)
        with self._lock:
            self._plugged.append(plugged)
            self._models[made] = None
        return plugged

    def unplug(self, plugged: Plugged) -> None:
        """Pull it out: every call on it fails with ENODEV, and who waits is woken with that. Twice is once."""
        with self._lock:
            if plugged in self._plugged:
                self._plugged.remove(plugged)
        plugged.remove()

    def replug(self, plugged: Plugged, model: Device | None = None) -> Plugged:
        """Pull it out, if it is in, and plug it in again: the same port, a new address."""
        self.unplug(plugged)
        if model is None and self.spare is not None:
            plugged.model.close()  # both may want the same file
            model = self.spare()
        model = model or plugged.model
        return self.plug(model, port=plugged.port)

    def fault(self, kind: str, *, at: int = 1, endpoint: int | None = None, count: int = 1, seed: int = 0) -> Rule:
        """Have something go wrong once: with the `at`-th call from now on that can have this fault.

        Kinds are in `udf.testing.hotplug.FAULTS`. A rule that was never reached fails the test.
        """
        if at < 1 or count < 1:
            raise UserError("at and count begin with 1")
        rule = Rule(steps.known(kind), at, endpoint, count, seed)
        self._rules.append(rule)
        return rule

    def explore(self, scenario: Callable[[], object], plug: Callable[[], Device], **how: Any) -> Report:
        """Try every fault at every call of a scenario: see explore.explore for the keywords."""
        from udf.testing.hotplug.explore import explore

        __tracebackhide__ = True  # pytest shows the test's line and the report
        return explore(scenario, plug, **how)

    def explore_driver(
        self,
        driver: type[Any],
        plug: Callable[[], Device],
        use: Callable[[Any], Awaitable[object]],
        *,
        options: Mapping[str, object] | None = None,
        **how: Any,
    ) -> Report:
        """The same for a UsbDriver: each run makes one, as a driver host does, and `use` is awaited with it.

        The device is the first that is plugged in. What a process leaves to its end is not looked at.
        """
        from udf.testing.hotplug.explore import explore
        from udf.testing.hotplug.hosting import SETTLED, hosted

        __tracebackhide__ = True
        how["without"] = (*how.get("without", ()), *SETTLED)
        return explore(hosted(driver, use, options or {}), plug, leaves=True, **how)

    # ---- at the end

    @contextmanager
    def checked(self) -> Iterator[UsbBus]:
        """Be the bus that pyusb sees; at the end nothing may be left. AssertionError if something is."""
        before = Before.now()
        with backend.current(self):
            yield self
            findings = [str(problem.text) for problem in (*self.problems, *self.left(before))]
            findings += [f"the fault rule {rule} was never reached" for rule in self._rules if not rule.fired]
        self.end()
        findings += [problem.text for problem in self.descriptors_left(before)]
        if findings:
            raise AssertionError("after the test:\n  " + "\n  ".join(findings))

    def left(self, before: Before) -> list[Problem]:
        """What is left behind now: threads, and handles with their claims."""
        problems: list[Problem] = []
        for thread in before.threads_left(self.grace):
            text, stack = describe_thread(thread)
            problems.append(Problem("thread", text, stack=stack))
        for handle in self._handles:
            problems.append(Problem("claim" if handle.claims else "handle", f"{handle} is left open"))
        return problems

    def end(self) -> None:
        """Nothing is plugged in any more, and no model has a file open."""
        for plugged in self.devices:
            self.unplug(plugged)
        for model in self._models:
            model.close()

    def descriptors_left(self, before: Before) -> list[Problem]:
        """What is left open after the end."""
        if before.descriptors_left():
            gc.collect()  # what only waits for the collector is not left behind
        return [
            Problem("descriptor", f"descriptor {number} is left open on {target}")
            for number, target in before.descriptors_left()
        ]

    # ---- what the backend tells

    def begin(self, step: Step, dev: Plugged) -> str:
        """A call begins: number it. The fault that is done to it, or nothing; GivenUpError if the run is over."""
        with self._lock:
            if self.given_up:
                raise GivenUpError
            self._number += 1
            step.number = self._number
            self.transfers.append(step)
            self._current[threading.get_ident()] = step
            if self.armed is not None and self.armed.number == step.number and dev.present:
                self.fired = step
                return self.armed.kind
            for rule in self._rules:
                if dev.present and rule.wants(step):
                    rule.fired.append(step.number)
                    return rule.kind
        if self.most and step.number > self.most:
            self.give_up("retries")  # not under the lock: models may be at work, and call the bus
            raise GivenUpError
        return ""

    def over(self) -> None:
        """A call ends; GivenUpError if the run is over, so that what it got is not taken for an answer."""
        if self.given_up:
            raise GivenUpError

    def endless(self, step: Step | None) -> None:
        """A call without a time-out gets no answer: the driver will wait for ever."""
        text = "it waits for ever: the call has no time-out, and the device does not answer"
        self.problem("hang", text, step)
        self.give_up("hang")
        raise GivenUpError(text)

    def problem(self, check: str, text: str, step: Step | None = None) -> None:
        """Something is wrong that no exception tells."""
        self.problems.append(Problem(check, text, str(step) if step is not None else ""))

    def give_up(self, why: str) -> None:
        """Have every call of the driver fail with GivenUpError from now on."""
        self.given_up = self.given_up or why
        for plugged in self.devices:
            plugged.remove()

    def opened(self, handle: backend.Handle) -> None:
        """A handle was opened."""
        with self._lock:
            self._handles.append(handle)

    def closed(self, handle: backend.Handle) -> None:
        """It was closed."""
        with self._lock:
            if handle in self._handles:
                self._handles.remove(handle)

    def handles_of(self, plugged: Plugged) -> list[backend.Handle]:
        """All that are open on a device."""
        return [handle for handle in self._handles if handle.plugged is plugged]

    @property
    def calls(self) -> int:
        """How many calls there were."""
        return self._number


def _spec(plugged: Plugged, configuration: int) -> DeviceSpec:
    model = plugged.model
    configurations = [model.configuration_descriptor(index) or b"" for index in range(len(model.configurations))]
    return DeviceSpec(
        bus="usbip",
        key=f"1-{plugged.port}/{plugged.address}",
        busnum=1,
        devnum=plugged.address,
        port=f"1-{plugged.port}",
        speed=int(model.speed),
        device_descriptor=b64encode(model.device_descriptor()).decode(),
        configurations=[b64encode(each).decode() for each in configurations],
        configuration=configuration,
        manufacturer=model.manufacturer or "",
        product=model.product_name or "",
        serial=model.serial or "",
    )
