"""Which driver a device gets: tables of devices, manifests and rules, and what is wanted of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udf.manifest import Manifest, check_manifest
from udf.usb.matching import DeviceFacts, InterfaceFacts, Verdict, fits, score, wanted
from udf.usb.rules import NO_RULES, Rules, check_rules

STORAGE = InterfaceFacts(0, ((8, 6, 0x50),))
ACM = InterfaceFacts(1, ((2, 2, 1),))
ACM_DATA = InterfaceFacts(2, ((0x0A, 0, 0),))


def driver(name: str, *match: dict[str, Any], **more: Any) -> Manifest:
    table = {"kind": "usb", "interface": 1, "class": "X", "match": list(match), **more}
    return check_manifest(table, f"/drivers/{name}.py", name, foreign=False)


def device(**more: Any) -> DeviceFacts:
    return DeviceFacts(**{"key": "k", "vendor": 0x1209, "product": 0x7E57, **more})


def rules(**more: Any) -> Rules:
    return check_rules(more, "/r.toml")


def judge(found: DeviceFacts, *manifests: Manifest, **more: Any) -> Verdict:
    return wanted([found], manifests, **more)["k"]


def bound(verdict: Verdict) -> list[tuple[str, int | None]]:
    return [(binding.driver.name, binding.interface) for binding in verdict.bindings]


ANY = driver("any", {"any": True})
CLASS = driver("class", {"class": 8})
TRIPLE = driver("triple", {"class": 8, "subclass": 6, "protocol": 0x50})
VENDOR = driver("vendor", {"vendor": 0x1209})
PRODUCT = driver("product", {"vendor": 0x1209, "product": 0x7E57})
SERIAL = driver("serial", {"vendor": 0x1209, "product": 0x7E57, "serial": "A*"})
ACM_DRIVER = driver("acm", {"class": 2, "subclass": 2})
STICK = device(interfaces=(STORAGE,), serial="A1", manufacturer="Acme")


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [
        (SERIAL, PRODUCT, ("serial", None)),
        (PRODUCT, VENDOR, ("product", None)),
        (VENDOR, TRIPLE, ("vendor", None)),
        (TRIPLE, CLASS, ("triple", 0)),
        (CLASS, ANY, ("class", 0)),
        (driver("exact", {"vendor": 0x1209, "product": 0x7E57, "interface": 0}), PRODUCT, ("exact", 0)),
        (driver("both", {"vendor": 0x1209, "class": 8}), VENDOR, ("both", 0)),
        (PRODUCT, driver("b", {"vendor": 0x1209, "class": 8, "subclass": 6, "protocol": 80, "serial": "*"}),
         ("product", None)),
    ],
)  # fmt: skip
def test_the_more_specific_driver_wins(better: Manifest, worse: Manifest, expected: tuple[str, int | None]) -> None:
    for order in ([better, worse], [worse, better]):
        verdict = judge(STICK, *order)
        assert (verdict.word, bound(verdict)) == ("bound", [expected])
        loser = next(each for each in verdict.candidates if each.driver == worse.name)
        assert not loser.chosen
        assert "more specific" in loser.reason or "better match" in loser.reason


@pytest.mark.parametrize(
    ("match", "what"),
    [
        ({"vendor": 0x1209}, [None]),
        ({"vendor": 0x1209, "product": 1}, []),
        ({"vendor": 0x120A}, []),
        ({"class": 8}, [0]),
        ({"class": 8, "subclass": 5}, []),
        ({"class": 2}, [1]),
        ({"class": 0xEF, "device": True}, [None]),
        ({"class": 8, "device": True}, []),
        ({"vendor": 0x1209, "interface": 2}, [2]),
        ({"vendor": 0x1209, "interface": 9}, []),
        ({"vendor": 0x1209, "serial": "A1"}, [None]),
        ({"vendor": 0x1209, "serial": "a1"}, []),
        ({"vendor": 0x1209, "manufacturer": "Ac*", "product_name": "*"}, [None]),
        ({"vendor": 0x1209, "product_name": "?*"}, []),
        ({"any": True}, [None]),
    ],
)
def test_an_entry_fits_when_all_that_it_says_is_so(match: dict[str, Any], what: list[int | None]) -> None:
    found = device(device_class=(0xEF, 2, 1), interfaces=(STORAGE, ACM, ACM_DATA), serial="A1", manufacturer="Acme")
    assert fits(driver("x", match).match[0], found) == what


def test_each_interface_of_a_composite_device_gets_its_own_driver() -> None:
    verdict = judge(device(interfaces=(STORAGE, ACM, ACM_DATA)), TRIPLE, CLASS, ACM_DRIVER)
    assert bound(verdict) == [("triple", 0), ("acm", 1)]
    assert verdict.text == "triple, acm"


def test_interfaces_that_belong_together_have_one_driver() -> None:
    pair = frozenset({1, 2})
    port = (InterfaceFacts(1, ((2, 2, 1),), pair), InterfaceFacts(2, ((0x0A, 0, 0),), pair))
    data = driver("data", {"class": 0x0A})
    verdict = judge(device(interfaces=(STORAGE, *port)), TRIPLE, ACM_DRIVER, data)
    assert bound(verdict) == [("triple", 0), ("acm", 1)]
    loser = next(each for each in verdict.candidates if each.driver == "data")
    assert (
        loser.reason == "matches interface 2 (interface class 0a/*/*), which belongs to interface 1, and acm has that"
    )
    both = driver("both", {"class": 2}, {"class": 0x0A})
    assert bound(judge(device(interfaces=port), both)) == [("both", 1)]
    assert bound(judge(device(interfaces=port), driver("exact", {"vendor": 0x1209, "interface": 2}), both)) == [
        ("exact", 2)
    ]


def test_a_class_in_any_alternate_setting_counts() -> None:
    found = device(interfaces=(InterfaceFacts(3, ((0xFF, 0, 0), (8, 6, 0x50))),))
    assert bound(judge(found, TRIPLE)) == [("triple", 3)]


def test_two_drivers_that_fit_equally_well_are_a_tie_and_nothing_is_bound() -> None:
    other = driver("other", {"vendor": 0x1209, "product": 0x7E57})
    verdict = judge(device(), PRODUCT, other, VENDOR)
    assert (verdict.word, verdict.bindings) == ("tie", ())
    assert "the drivers other and product fit the device equally well" in verdict.text
    assert all(not each.chosen for each in verdict.candidates)


def test_a_tie_about_one_interface_leaves_the_others_alone() -> None:
    verdict = judge(device(interfaces=(STORAGE, ACM)), TRIPLE, ACM_DRIVER, driver("acm2", {"class": 2, "subclass": 2}))
    assert (verdict.word, bound(verdict)) == ("bound", [("triple", 0)])
    assert "acm and acm2 fit interface 1 equally well" in verdict.text


def test_the_whole_device_and_an_interface_can_tie_too() -> None:
    verdict = judge(
        device(device_class=(8, 0, 0), interfaces=(STORAGE,)), CLASS, driver("whole", {"class": 8, "device": True})
    )
    assert (verdict.word, verdict.bindings) == ("tie", ())
    same = driver("same", {"class": 8, "device": True}, {"class": 8})
    assert bound(judge(device(device_class=(8, 0, 0), interfaces=(STORAGE,)), same)) == [("same", None)]


def test_hubs_are_left_alone() -> None:
    assert judge(device(device_class=(9, 0, 0)), ANY).word == "hub"


def test_a_disabled_driver_is_passed_over() -> None:
    verdict = judge(STICK, PRODUCT, TRIPLE, disabled={"product"})
    assert bound(verdict) == [("triple", 0)]
    only = judge(STICK, PRODUCT, disabled={"product"})
    assert (only.word, only.text) == ("no_driver", "the driver product is disabled")


def test_a_device_waits_for_what_its_best_driver_requires_and_no_lesser_one_is_started() -> None:
    verdict = judge(STICK, PRODUCT, TRIPLE, missing={"product": "the program frob is not installed"})
    assert (verdict.word, verdict.bindings) == ("waiting", ())
    assert verdict.text == "the driver product waits: the program frob is not installed"
    lesser = judge(STICK, PRODUCT, TRIPLE, missing={"triple": "the program frob is not installed"})
    assert bound(lesser) == [("product", None)]


def test_without_a_driver_every_one_that_was_looked_at_says_what_it_is_for() -> None:
    verdict = judge(device(vendor=1), PRODUCT, CLASS)
    assert (verdict.word, verdict.text) == ("no_driver", "no driver is for it")
    assert [(each.driver, each.reason) for each in verdict.candidates] == [
        ("product", "is not for it: it is for vendor 1209, product 7e57"),
        ("class", "is not for it: it is for interface class 08/*/*"),
    ]


def test_drivers_of_other_kinds_are_not_candidates() -> None:
    image = check_manifest(
        {"kind": "block", "interface": 1, "class": "X", "source": "file"}, "/image.py", "image", foreign=False
    )
    assert judge(STICK, image).candidates == ()


RULES: list[tuple[dict[str, Any], list[tuple[str, int | None]], str]] = [
    ({"deny": [{"vendor": 0x1209}]}, [], "denied"),
    ({"deny": [{"class": 8}]}, [], "denied"),
    ({"deny": [{}]}, [], "denied"),
    ({"deny": [{"port": "1-*"}]}, [], "denied"),
    ({"deny": [{"port": "2-*"}]}, [("product", None)], "bound"),
    ({"deny": [{"bus": "emulated"}]}, [], "denied"),
    ({"deny": [{}], "allow": [{"serial": "A1"}]}, [("product", None)], "bound"),
    ({"deny": [{}], "allow": [{"serial": "B1"}]}, [], "denied"),
    ({"deny": [{}], "allow": [{"driver": "triple"}]}, [("triple", 0)], "bound"),
    ({"deny": [{"driver": "product"}]}, [("triple", 0)], "bound"),
    ({"deny": [{"driver": "product"}], "allow": [{"driver": "product", "serial": "A1"}]}, [("product", None)], "bound"),
    ({"prefer": [{"driver": "triple"}]}, [("triple", 0)], "bound"),
    ({"prefer": [{"driver": "triple", "serial": "B*"}]}, [("product", None)], "bound"),
    ({"prefer": [{"driver": "acm"}]}, [("acm", None)], "bound"),
    ({"prefer": [{"driver": "acm", "class": 8}]}, [("acm", 0)], "bound"),
    ({"prefer": [{"driver": "triple"}, {"driver": "acm"}]}, [("triple", 0)], "bound"),
    ({"prefer": [{"driver": "acm"}, {"driver": "triple"}]}, [("acm", None)], "bound"),
    ({"prefer": [{"driver": "missing"}]}, [("product", None)], "bound"),
    ({"prefer": [{"driver": "triple"}], "deny": [{"driver": "triple"}]}, [("product", None)], "bound"),
]


@pytest.mark.parametrize(("table", "expected", "word"), RULES, ids=[str(table) for table, _, _ in RULES])
def test_rules_deny_allow_and_prefer(table: dict[str, Any], expected: list[tuple[str, int | None]], word: str) -> None:
    found = device(interfaces=(STORAGE,), serial="A1", port="1-1", bus="emulated")
    verdict = judge(found, PRODUCT, TRIPLE, ACM_DRIVER, rules=rules(**table))
    assert (verdict.word, bound(verdict)) == (word, expected)


def test_a_preference_settles_a_tie_and_brings_its_options() -> None:
    other = driver("other", {"vendor": 0x1209, "product": 0x7E57})
    table = rules(prefer=[{"driver": "other", "options": {"speed": 3, "quiet": True}}])
    verdict = judge(device(), PRODUCT, other, rules=table)
    assert bound(verdict) == [("other", None)]
    assert verdict.bindings[0].options == {"speed": "3", "quiet": "1"}
    assert verdict.candidates[0].reason == "is chosen for the device: preferred by rule prefer[0] of /r.toml"


def test_what_an_entry_is_worth_is_ordered_as_the_words_say() -> None:
    rows = [
        {"any": True},
        {"class": 8},
        {"class": 8, "interface": 1, "manufacturer": "x", "product_name": "y", "serial": "z"},
        {"class": 8, "subclass": 6},
        {"class": 8, "subclass": 6, "protocol": 80},
        {"vendor": 1},
        {"vendor": 1, "class": 8},
        {"vendor": 1, "class": 8, "subclass": 6, "protocol": 80, "serial": "z", "interface": 0},
        {"vendor": 1, "product": 1},
        {"vendor": 1, "product": 1, "interface": 0},
        {"vendor": 1, "product": 1, "serial": "z"},
        {"vendor": 1, "product": 1, "class": 8, "serial": "z"},
    ]
    worth = [score(driver("x", row).match[0]) for row in rows]
    assert worth == sorted(set(worth))


byte = st.integers(0, 255)
interfaces = st.lists(
    st.builds(InterfaceFacts, byte, st.lists(st.tuples(byte, byte, byte), max_size=40).map(tuple)), max_size=300
)


@given(st.text(max_size=300), st.text(max_size=300), st.tuples(byte, byte, byte), interfaces)
def test_whatever_a_device_says_matching_ends_with_a_verdict(
    serial: str, name: str, triple: tuple[int, int, int], found: list[InterfaceFacts]
) -> None:
    thing = device(serial=serial, product_name=name, device_class=triple, interfaces=tuple(found))
    odd = driver("odd", {"vendor": 0x1209, "serial": "*[a*?*" * 20, "product_name": "*a" * 60})
    everything = [odd, ANY, CLASS, TRIPLE, ACM_DRIVER, driver("hid", *[{"class": code} for code in range(200)])]
    verdict = judge(thing, *everything)
    assert verdict.word in ("bound", "tie", "no_driver", "hub")
    assert len(verdict.candidates) <= 32 * len(everything)
    assert judge(thing, *everything) == verdict
    assert wanted([], everything, NO_RULES) == {}
