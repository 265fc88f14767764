"""Faults by rule: what goes wrong with which transfers of a device, reproducibly.

Owns: the rules, their text form and how they choose. Must never: draw from a clock or an unseeded source: the same
transfers in the same order meet the same faults. Called by: plugged.py, for every transfer in the order of arrival.

A rule is a fault, then `key=value` words that say for which transfers and how:

    stall ep=0x81 at=5            the fifth transfer on endpoint 0x81 is stalled
    unplug at=12 back=500         the device vanishes at its twelfth transfer and is back after 500 ms
    delay ep=2 rate=0.1 ms=50 seed=7
    eio every=100 count=3
    unplug import=2 at=1          counted from the second import on

Faults: stall, eio (the controller reports a broken transfer), short (fewer bytes: bytes=N, else half), babble (more
than was asked), delay (ms=N), corrupt (bytes=N changed, else one), drop (no answer at all), unplug (back=MS).
Which: ep=N (0 control; with the direction bit: 0x81), request=N (control requests only), at=N or at=N,M,…, every=N,
rate=P with seed=N, after=N (skip so many), count=N (at most so often), import=N (only in the N-th import since the
plug, counted from its begin). Numbers count the transfers that ep= and request= select. `late=yes`: the device does
its part first and the answer is what suffers. Several rules are separated by `;`, the first that applies wins.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from udf.errors import UserError
from udf.testing.devices.transfers import Action, Transfer

KINDS = ("stall", "eio", "short", "babble", "delay", "corrupt", "drop", "unplug")
_NEVER_LATE = ("short", "corrupt")
_MAX_DELAY = 3600_000
_MAX_RULES = 256


class Rule(Protocol):
    """Anything that decides; the text form makes a Fault, a test may bring its own."""

    def decide(self, transfer: Transfer, imports: int) -> Action | None:
        """What happens to this transfer, in the `imports`-th import since the plug; None: nothing."""

    def plugged(self) -> None:
        """The device has just got power: count from the beginning."""


@dataclass
class Fault:
    """One rule. Every transfer that `endpoint` and `request` select counts, from 1."""

    kind: str
    endpoint: int | None = None
    request: int | None = None
    at: Sequence[int] = ()
    every: int = 0
    rate: float | None = None
    seed: int = 0
    after: int = 0
    count: int | None = None
    in_import: int | None = None
    ms: float = 0.0
    size: int | None = None
    late: bool = False
    seen: int = field(default=0, init=False)
    fired: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.plugged()

    def plugged(self) -> None:
        """Count anew, and draw the same numbers again. What is bounded by `count` stays spent: a replugged device is
        not broken for ever.
        """
        self.seen = 0
        self._choice = random.Random(self.seed)  # noqa: S311 - reproducible on purpose

    def decide(self, transfer: Transfer, imports: int) -> Action | None:
        """As in Rule."""
        if self.in_import is not None and imports != self.in_import:
            return None
        if not self._selects(transfer):
            return None
        self.seen += 1
        number = self.seen - self.after
        # Drawn for every selected transfer, so that one decision does not depend on another.
        drawn = self._choice.random() if self.rate is not None else 0.0
        if number <= 0 or (self.count is not None and self.fired >= self.count):
            return None
        if self.at and number not in self.at:
            return None
        if self.every and number % self.every:
            return None
        if self.rate is not None and drawn >= self.rate:
            return None
        self.fired += 1
        return Action(self.kind, self.late, self.ms / 1000, self.size, self.seed + self.seen)

    def _selects(self, transfer: Transfer) -> bool:
        setup = transfer.setup
        if self.request is not None and (setup is None or setup.request != self.request):
            return False
        if self.endpoint is None:
            return not (self.kind == "babble" and not transfer.is_in)
        return transfer.address & 0x7F == 0 if self.endpoint == 0 else transfer.address == self.endpoint


def parse(text: str) -> list[Fault]:
    """Rules from text; UserError with one sentence for what is wrong."""
    rules = [_rule(part.split()) for part in text.replace("\n", ";").split(";") if part.split()]
    if not rules:
        raise UserError("A fault rule is empty; it begins with one of " + ", ".join(KINDS) + ".")
    return rules


def parse_all(texts: Iterable[str]) -> list[Fault]:
    """Rules from several texts."""
    rules = [rule for text in texts for rule in parse(text)]
    if len(rules) > _MAX_RULES:
        raise UserError(f"There are {len(rules)} fault rules; {_MAX_RULES} is the most.")
    return rules


def _rule(words: list[str]) -> Fault:
    kind = words[0]
    if kind not in KINDS:
        raise UserError(f"There is no fault {kind!r}; there are {', '.join(KINDS)}.")
    fault = Fault(kind)
    given = set()
    for word in words[1:]:
        key, equals, value = word.partition("=")
        reader = _KEYS.get(key)
        if reader is None or not equals:
            raise UserError(f"{word!r} says nothing about the fault {kind!r}; words are {'=, '.join(_KEYS)}=.")
        if key in given:
            raise UserError(f"The fault {kind!r} says {key}= twice.")
        given.add(key)
        try:
            reader(fault, value)
        except ValueError as error:
            raise UserError(f"{word!r} of the fault {kind!r} is wrong: {error}.") from None
    _check(fault, given)
    fault.plugged()
    return fault


def _check(fault: Fault, given: set[str]) -> None:
    kind = fault.kind
    if kind == "delay" and not fault.ms:
        raise UserError("The fault 'delay' must say how long: ms=50.")
    for key, kinds in (("ms", ("delay",)), ("back", ("unplug",)), ("bytes", ("short", "corrupt"))):
        if key in given and kind not in kinds:
            raise UserError(f"{key}= belongs to the fault {' or '.join(kinds)}, not to {kind!r}.")
    if fault.late and kind in _NEVER_LATE:
        raise UserError(f"late= makes no difference for the fault {kind!r}.")
    if kind == "babble" and fault.endpoint and not fault.endpoint & 0x80:
        raise UserError(f"Endpoint {fault.endpoint:#x} takes data from the host, so the device cannot babble there.")
    if "request" in given and fault.endpoint not in (None, 0):
        raise UserError("request= is about control transfers, so it goes with ep=0 or without ep=.")
    if "seed" in given and fault.rate is None and kind != "corrupt":
        raise UserError("seed= goes with rate= or the fault 'corrupt'; without them nothing is drawn.")


def _whole(text: str, least: int, most: int) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        raise ValueError(f"{text!r} is no whole number") from None
    if not least <= value <= most:
        raise ValueError(f"it must be from {least} to {most}")
    return value


def _real(text: str, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number") from None
    if not 0 <= value <= most:
        raise ValueError(f"it must be from 0 to {most:g}")
    return value


def _endpoint(text: str) -> int:
    value = _whole(text, 0, 0x8F)
    if 0x0F < value <= 0x80:
        raise ValueError("an endpoint is 0 to 0x0f, or 0x81 to 0x8f for data to the host")
    return value


def _late(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError("it is yes or no")
    return text == "yes"


def _set(name: str, convert: Callable[[str], object]) -> Callable[[Fault, str], None]:
    return lambda fault, text: setattr(fault, name, convert(text))


_MOST = 1 << 40
_KEYS: dict[str, Callable[[Fault, str], None]] = {
    "ep": _set("endpoint", _endpoint),
    "request": _set("request", lambda text: _whole(text, 0, 255)),
    "at": _set("at", lambda text: tuple(_whole(each, 1, _MOST) for each in text.split(","))),
    "every": _set("every", lambda text: _whole(text, 1, _MOST)),
    "rate": _set("rate", lambda text: _real(text, 1)),
    "seed": _set("seed", lambda text: _whole(text, 0, _MOST)),
    "after": _set("after", lambda text: _whole(text, 0, _MOST)),
    "count": _set("count", lambda text: _whole(text, 1, _MOST)),
    "import": _set("in_import", lambda text: _whole(text, 1, _MOST)),
    "ms": _set("ms", lambda text: _real(text, _MAX_DELAY)),
    "back": _set("ms", lambda text: _real(text, _MAX_DELAY)),
    "bytes": _set("size", lambda text: _whole(text, 0, 1 << 24)),
    "late": _set("late", _late),
}
