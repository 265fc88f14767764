"""What a fault does to one call.

Owns: the meaning of each name in steps.FAULTS. Must never: choose the call. Called by: backend.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from udf.testing.hotplug import steps
from udf.testing.hotplug.steps import Step
from udf.usb.errors import Failure, usb_error

if TYPE_CHECKING:
    from udf.testing.hotplug.bus import Plugged


def faulty(
    kind: str, dev: Plugged, step: Step, perform: Callable[[], int], view: memoryview | None, timeout: int | None
) -> int:
    """Do a call with a fault: the number of bytes that were moved, or the USBError that it ends with."""
    if kind == "unplug":
        dev.bus.unplug(dev)
    elif kind == "replug":
        dev.bus.replug(dev)
    elif kind == "busy":
        raise usb_error(Failure.BUSY)
    elif kind == "timeout":
        if timeout == 0:
            dev.bus.endless(step)
        raise usb_error(Failure.TIMEOUT)
    elif kind == "stall":
        if step.call == steps.CONTROL:
            raise usb_error(Failure.PIPE)
        dev.halt(step.endpoint)
    elif step.call == steps.WRITE and kind == "short":
        step.data = step.data[: max(step.packet, step.length // 2 // step.packet * step.packet)]
    elif kind == "eio" and not step.is_in:
        raise usb_error(Failure.IO)
    moved = perform()
    if not step.is_in or kind in ("unplug", "replug", "stall"):
        return moved
    assert view is not None
    if kind == "eio":
        raise usb_error(Failure.IO)
    if kind == "babble":
        raise usb_error(Failure.OVERFLOW)
    if kind == "corrupt" and moved:
        choice = random.Random(step.number)  # noqa: S311 - reproducible on purpose
        view[choice.randrange(moved)] ^= choice.randrange(1, 256)
    elif kind == "short":
        return moved // 2
    elif kind in ("split", "empty"):
        now = moved // 2 if kind == "split" else 0
        dev.rest[step.endpoint] = bytes(view[now:moved])
        return now
    return moved
