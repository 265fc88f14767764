"""What the binder decides about drivers that have a device, have lost it or have failed at one: pure functions.

Owns: who may keep a device, who may get one beside others, whose device has come back, and when a failed start is tried
again.
Must never: do I/O or know the time. Called by: binder.py.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from udf.usb.matching import PREFERRED, Binding, DeviceFacts, Verdict

RETRIES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds; then only a change (of the driver, a rule, a replug) helps


def retry_delay(failures: int) -> float | None:
    """How long to wait after so many failures in a row; None: do not try again by itself."""
    return RETRIES[failures - 1] if failures <= len(RETRIES) else None


def may_stay(held: Binding, verdict: Verdict) -> bool:
    """Whether a driver that has a device may keep it."""
    mine, interface = held.driver.name, held.interface
    if any(binding.driver.name == mine and binding.interface == interface for binding in verdict.bindings):
        return all(held.options == b.options for b in verdict.bindings if b.driver.name == mine)
    if verdict.word in ("denied", "hub"):
        return False
    # The driver's file is gone or cannot be read: what serves goes on. It is no candidate then.
    about_mine = [each for each in verdict.candidates if each.driver == mine]
    if about_mine and not any(each.score and each.interface == interface for each in about_mine):
        return False
    return not any(each.chosen and each.score >= PREFERRED for each in verdict.candidates)


def may_begin(wanted: Binding, others: Sequence[Binding], shared: bool) -> bool:
    """Whether a driver may be started for a device of which others have a part, or are just giving one back.

    A device has one connection. It can be shared by drivers that have an interface each, if the first of them was
    started so; whoever has the connection for himself keeps all others waiting until he gives it back.
    """
    if not others:
        return True
    parts = [each.interface for each in (wanted, *others)]
    return shared and None not in parts and len(set(parts)) == len(parts)


@dataclass(frozen=True)
class Absent:
    """A driver whose device is away: the device as it was, and which arrivals have turned out to be others."""

    facts: DeviceFacts
    binding: Binding
    refused: Collection[str] = ()


def whose_device(arrived: Binding, facts: DeviceFacts, absent: Sequence[Absent]) -> int | None:
    """Which of those who wait is to be offered what has come, for this driver; None: nobody.

    What is on it decides in the end, so of several with the same serial number (copied sticks) one is asked after the
    other, first the one whose device was in the same port.
    """
    fitting = [
        number
        for number, each in enumerate(absent)
        if facts.key not in each.refused and is_same(facts, each.facts) and _is_same_use(arrived, each.binding)
    ]
    return min(fitting, key=lambda number: (not _in_one_port(facts, absent[number].facts), number), default=None)


def is_same(one: DeviceFacts, other: DeviceFacts) -> bool:
    """Whether these may be two arrivals of one device: without a serial number nobody can say."""
    return bool(one.serial) and (one.vendor, one.product, one.serial) == (other.vendor, other.product, other.serial)


def is_replaced(absent: Absent, facts: DeviceFacts) -> bool:
    """Whether what is there now is another device in the place of the one that is away."""
    return _in_one_port(facts, absent.facts) and not is_same(facts, absent.facts)


def is_taken_over(absent: Absent, begun: Binding, facts: DeviceFacts) -> bool:
    """Whether what is away cannot come back because this device, which may be it, is begun with anew."""
    return is_same(facts, absent.facts) and _shares(begun.interface, absent.binding.interface)


def _is_same_use(one: Binding, other: Binding) -> bool:
    return (one.driver.name, one.interface, one.options) == (other.driver.name, other.interface, other.options)


def _in_one_port(one: DeviceFacts, other: DeviceFacts) -> bool:
    return bool(one.port) and (one.bus, one.port) == (other.bus, other.port)


def _shares(one: int | None, other: int | None) -> bool:
    return one is None or other is None or one == other
