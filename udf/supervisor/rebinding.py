"""What the binder decides about drivers that have a device already, or have failed at one: pure functions.

Owns: who may keep a device, who may get one beside others, and when a failed start is tried again.
Must never: do I/O or know the time. Called by: binder.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from udf.usb.matching import PREFERRED, Binding, Verdict

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
