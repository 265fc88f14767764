"""Which driver each device gets: a pure function of what is there.

Owns: what a match entry is worth, who wins, and the reason why each candidate was or was not chosen.
Must never: do I/O, keep anything between two calls, or believe a device: whatever its descriptors and strings say, the
work is bounded and no exception comes of it. Called by: udf/supervisor/binder.py.

The binder calls `wanted` after every event with everything that it knows, so an event that was lost or came twice
changes nothing. More specific wins: vendor and product, then vendor, then class, subclass and protocol, then class,
then a driver for any device; texts and the interface's number only decide between entries that are equal otherwise. An
entry about an interface binds that interface, one about the device all of it; a device is bound as a whole when its
best entry is worth more than that of any of its interfaces.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from udf.manifest import Manifest, Match
from udf.usb.rules import NO_RULES, Rule, Rules

HUB_CLASS = 9
MAX_INTERFACES = 32  # USB_MAXINTERFACES; a device that claims more has the rest ignored
MAX_ALTERNATES = 16
PREFERRED = 1_000_000  # what an operator's word is worth

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class InterfaceFacts:
    """An interface by its number and the class triples of its alternate settings, the first one first.

    `function`: the numbers of those that belong together with it by the device's own word, as a serial port's two.
    """

    number: int
    triples: tuple[Triple, ...]
    function: frozenset[int] = frozenset()


@dataclass(frozen=True)
class DeviceFacts:
    """All that matching knows of a device. `key` is the bus's name for this arrival of it."""

    key: str
    vendor: int
    product: int
    device_class: Triple = (0, 0, 0)
    interfaces: tuple[InterfaceFacts, ...] = ()
    manufacturer: str = ""
    product_name: str = ""
    serial: str = ""
    port: str = ""
    bus: str = ""
    is_readable: bool = True  # its descriptors could be read

    @property
    def is_hub(self) -> bool:
        """Hubs are the bus's own business."""
        return self.device_class[0] == HUB_CLASS

    def bounded(self) -> tuple[InterfaceFacts, ...]:
        """Its interfaces, each number once."""
        found: dict[int, list[Triple]] = {}
        functions: dict[int, frozenset[int]] = {}
        for each in self.interfaces:
            if each.number in found or len(found) < MAX_INTERFACES:
                triples = found.setdefault(each.number, [])
                triples += each.triples[: MAX_ALTERNATES - len(triples)]
                functions.setdefault(each.number, each.function | {each.number})
        return tuple(
            InterfaceFacts(number, tuple(triples), functions[number]) for number, triples in sorted(found.items())
        )


@dataclass(frozen=True)
class Binding:
    """One driver for one device, or for one interface of it."""

    key: str
    driver: Manifest
    interface: int | None
    options: Mapping[str, str] = field(default_factory=dict)  # of the rule that prefers it


@dataclass(frozen=True)
class Candidate:
    """A driver that was looked at for a device, and why it was or was not chosen."""

    driver: str
    interface: int | None  # None: the whole device
    score: int  # 0: it does not match
    chosen: bool
    reason: str


@dataclass(frozen=True)
class Verdict:
    """What is wanted for one device. `word` is bound, denied, hub, tie, waiting or no_driver; `text` says it."""

    key: str
    word: str
    text: str
    bindings: tuple[Binding, ...] = ()
    candidates: tuple[Candidate, ...] = ()


@dataclass
class _Claim:
    """A driver that may have a device or an interface of it, with the entry that is worth most."""

    driver: Manifest
    interface: int | None
    score: int
    why: str
    options: Mapping[str, str] = field(default_factory=dict)
    verdict: str = ""  # set when it is decided

    @property
    def where(self) -> str:
        return "the device" if self.interface is None else f"interface {self.interface}"


def score(match: Match) -> int:
    """What an entry is worth when it fits; more is more specific."""
    if match.any:
        return 1
    value = 0
    if match.vendor is not None:
        value += 1000 + (1000 if match.product is not None else 0)
    for word in (match.class_code, match.subclass, match.protocol):
        value += 100 if word is not None else 0
    value += 16 if match.serial is not None else 0
    value += 8 if match.product_name is not None else 0
    value += 4 if match.manufacturer is not None else 0
    value += 2 if match.interface is not None else 0
    return value


def fits(match: Match, device: DeviceFacts) -> list[int | None]:
    """What of a device an entry or a rule's pattern fits: interface numbers, None for the whole, or nothing."""
    if (match.vendor, match.product) != (
        None if match.vendor is None else device.vendor,
        None if match.product is None else device.product,
    ):
        return []
    for pattern, text in (
        (match.manufacturer, device.manufacturer),
        (match.product_name, device.product_name),
        (match.serial, device.serial),
    ):
        if pattern is not None and not fnmatchcase(text, pattern):
            return []
    if match.whole_device:
        return [None] if _fits_class(match, device.device_class) else []
    return [
        each.number
        for each in device.bounded()
        if match.interface in (None, each.number) and any(_fits_class(match, triple) for triple in each.triples)
    ]


def _fits_class(match: Match, triple: Triple) -> bool:
    wanted = (match.class_code, match.subclass, match.protocol)
    return all(want is None or want == has for want, has in zip(wanted, triple, strict=True))


def wanted(
    devices: Iterable[DeviceFacts],
    manifests: Iterable[Manifest],
    rules: Rules = NO_RULES,
    disabled: Collection[str] = (),
    missing: Mapping[str, str] | None = None,
) -> dict[str, Verdict]:
    """What each device should be bound to, by its key.

    `disabled` drivers are passed over. A driver in `missing` lacks something that it requires (the sentence says what):
    if it is the best one the device waits for it, so that no lesser driver is started only to be in its way.
    """
    usable = [each for each in manifests if each.kind == "usb"]
    return {device.key: _judge(device, usable, rules, disabled, missing or {}) for device in devices}


def _judge(
    device: DeviceFacts, manifests: list[Manifest], rules: Rules, disabled: Collection[str], missing: Mapping[str, str]
) -> Verdict:
    if device.is_hub:
        return Verdict(device.key, "hub", "it is a hub, which needs no driver")
    if not device.is_readable:
        return Verdict(device.key, "no_driver", "it does not say what it is, so nothing can drive it")
    denial = _denial(device, rules, None)
    if denial is not None:
        return Verdict(device.key, "denied", f"it is denied by {denial.where}")
    claims: list[_Claim] = []
    rest: list[Candidate] = []
    barred = ""
    for driver in manifests:
        found = _claims(device, driver, rules)
        why_not = (
            f"is not for it: it is for {_shortly(driver.match)}" if not found else _bar(device, driver, rules, disabled)
        )
        if not why_not:
            claims += found
            continue
        rest.append(Candidate(driver.name, None, 0, False, why_not))
        if found:
            barred = barred or f"the driver {driver.name} {why_not}"
    winners, ties = _choose(claims)
    winners = _one_for_each_function(device, winners)
    bindings, waits = [], []
    for winner in winners:
        lack = missing.get(winner.driver.name)
        if lack is None:
            winner.verdict = f"is chosen for {winner.where}: {winner.why}"
            bindings.append(Binding(device.key, winner.driver, winner.interface, winner.options))
        else:
            winner.verdict = f"is the best for {winner.where} ({winner.why}), but it waits: {lack}"
            waits.append(f"the driver {winner.driver.name} waits: {lack}")
    chosen = {(binding.driver.name, binding.interface) for binding in bindings}
    candidates = [
        Candidate(
            each.driver.name, each.interface, each.score, (each.driver.name, each.interface) in chosen, each.verdict
        )
        for each in sorted(claims, key=lambda each: (-each.score, each.driver.name, each.interface or 0))
    ]
    names = ", ".join(dict.fromkeys(binding.driver.name for binding in bindings))
    text = "; ".join([*filter(None, [names]), *waits, *ties]) or barred or "no driver is for it"
    word = "bound" if bindings else "waiting" if waits else "tie" if ties else "no_driver"
    return Verdict(device.key, word, text, tuple(bindings), (*candidates, *rest))


def _claims(device: DeviceFacts, driver: Manifest, rules: Rules) -> list[_Claim]:
    """What of a device a driver fits, each with the entry that is worth most."""
    best: dict[int | None, _Claim] = {}
    for match in driver.match:
        for interface in fits(match, device):
            claim = _Claim(driver, interface, score(match), str(match))
            if interface not in best or best[interface].score < claim.score:
                best[interface] = claim
    # The operator's word counts more than any manifest, also where the driver's own does not fit; the first rule first.
    for number, rule in reversed(list(enumerate(rules.prefer))):
        if rule.driver == driver.name and _concerns(rule, device):
            named = fits(rule.match, device)
            for each in [each for each in best if named == [None] or each in named] or named:
                worth = PREFERRED * (len(rules.prefer) - number)
                best[each] = _Claim(driver, each, worth, f"preferred by {rule.where}", rule.options)
    return list(best.values())


def _bar(device: DeviceFacts, driver: Manifest, rules: Rules, disabled: Collection[str]) -> str:
    """Why a driver that fits may not have the device."""
    if driver.name in disabled:
        return "is disabled"
    denial = _denial(device, rules, driver.name)
    return "" if denial is None else f"is denied for it by {denial.where}"


def _choose(claims: list[_Claim]) -> tuple[list[_Claim], list[str]]:
    """The claims that win, and a sentence for each tie. Every claim gets its verdict, but for the winners."""
    by_target: dict[int | None, list[_Claim]] = {}
    for claim in claims:
        by_target.setdefault(claim.interface, []).append(claim)
    whole = max((claim.score for claim in by_target.get(None, [])), default=0)
    parts = max((claim.score for claim in claims if claim.interface is not None), default=0)
    if whole and whole == parts:
        # One driver that fits both ways gets the whole; two drivers that do are a tie, and nobody gets anything.
        equal = [claim for claim in claims if claim.score == whole]
        if len({claim.driver.name for claim in equal}) > 1:
            return [], [_tie(equal, "the device and its interfaces")]
    as_whole = whole >= parts and whole > 0
    winners, ties = [], []
    for target, group in by_target.items():
        if (target is None) != as_whole:
            better = "the whole device goes to a driver" if as_whole else "the interfaces go to drivers"
            for claim in group:
                claim.verdict = f"matches {claim.where} ({claim.why}), but {better} with a better match"
            continue
        top = max(claim.score for claim in group)
        best = [claim for claim in group if claim.score == top]
        for claim in group:
            claim.verdict = f"matches {claim.where} ({claim.why}), but {best[0].driver.name} is more specific"
        if len(best) > 1:
            ties.append(_tie(best, best[0].where))
        else:
            winners += best
    return sorted(winners, key=lambda claim: claim.interface or 0), ties


def _one_for_each_function(device: DeviceFacts, winners: list[_Claim]) -> list[_Claim]:
    """Interfaces that belong together have one driver: that with the best match, of equal ones that of the first."""
    functions = {each.number: each.function for each in device.bounded()}
    kept: list[_Claim] = []
    for claim in sorted(winners, key=lambda each: (-each.score, each.interface or 0)):
        function = functions.get(-1 if claim.interface is None else claim.interface, frozenset())
        holder = next((each for each in kept if each.interface in function), None)
        if holder is None:
            kept.append(claim)
        else:
            whose = f"belongs to {holder.where}, and {holder.driver.name} has that"
            claim.verdict = f"matches {claim.where} ({claim.why}), which {whose}"
    return sorted(kept, key=lambda each: each.interface or 0)


def _tie(equal: list[_Claim], where: str) -> str:
    names = sorted({claim.driver.name for claim in equal})
    text = (
        f"the drivers {' and '.join(names)} fit {where} equally well, so none is started:"
        " say which one with a [[prefer]] rule, or disable the others"
    )
    for claim in equal:
        claim.verdict = f"matches {claim.where} ({claim.why}), but {' and '.join(names)} fit it equally well"
    return text


def _denial(device: DeviceFacts, rules: Rules, driver: str | None) -> Rule | None:
    """The rule that denies the device to this driver (None: to every driver), unless another rule allows it."""
    for rule in rules.deny:
        if rule.driver in (None, driver) and _concerns(rule, device):
            allowing = (each for each in rules.allow if driver is None or each.driver in (None, driver))
            if not any(_concerns(each, device) for each in allowing):
                return rule
    return None


def _concerns(rule: Rule, device: DeviceFacts) -> bool:
    return (
        bool(fits(rule.match, device))
        and (rule.port is None or fnmatchcase(device.port, rule.port))
        and (rule.bus is None or fnmatchcase(device.bus, rule.bus))
    )


def volume_rule(device: DeviceFacts, label: str, rules: Rules) -> Rule | None:
    """The first rule about a volume with this label on a device."""
    for rule in rules.volume:
        if _concerns(rule, device) and (rule.label is None or fnmatchcase(label, rule.label)):
            return rule
    return None


def _shortly(matches: tuple[Match, ...]) -> str:
    more = f" and {len(matches) - 1} more" if len(matches) > 1 else ""
    return f"{matches[0]}{more}" if matches else "nothing"
