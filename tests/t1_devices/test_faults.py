"""Fault rules: their text, and that the same transfers always meet the same faults."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from tests.t1_devices.raw import Failed, Raw, connected
from udf.errors import UserError
from udf.testing.devices import Action, Emulator, Fault, Plugged, Transfer
from udf.testing.devices.faults import KINDS, parse
from udf.testing.devices.loopback import Loopback, Request


def statuses(faults: list[str], count: int = 40) -> list[int]:
    """What so many writes to the sink meet."""
    with Emulator() as bus, connected(bus, bus.plug(Loopback(), faults=faults)) as raw:
        return [raw.wait(raw.submit(4, b"x")).status for _ in range(count)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "A fault rule is empty; it begins with one of stall, eio"),
        ("explode at=1", "There is no fault 'explode'; there are stall"),
        ("stall at", "'at' says nothing about the fault 'stall'"),
        ("stall when=5", "'when=5' says nothing about the fault 'stall'"),
        ("stall at=x", "'at=x' of the fault 'stall' is wrong: 'x' is no whole number."),
        ("stall at=0", "it must be from 1 to"),
        ("stall at=1 at=2", "says at= twice"),
        ("stall rate=2", "it must be from 0 to 1"),
        ("stall rate=often", "'often' is no number"),
        ("stall ep=0x20", "an endpoint is 0 to 0x0f, or 0x81 to 0x8f"),
        ("delay ep=2", "must say how long"),
        ("stall ms=5", "ms= belongs to the fault delay"),
        ("stall back=5", "back= belongs to the fault unplug"),
        ("stall bytes=5", "bytes= belongs to the fault short or corrupt"),
        ("short late=yes", "late= makes no difference"),
        ("stall late=perhaps", "it is yes or no"),
        ("babble ep=2", "cannot babble"),
        ("stall ep=2 request=1", "request= is about control transfers"),
        ("stall at=1 seed=3", "seed= goes with rate="),
        ("stall at=1; boom", "There is no fault 'boom'"),
    ],
)
def test_mistake_is_one_clear_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text)
    assert sentence in str(caught.value)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_every_fault_has_a_text_form() -> None:
    text = "; ".join(f"{kind} at=1" + (" ms=5" if kind == "delay" else "") for kind in KINDS)
    assert [rule.kind for rule in parse(text)] == list(KINDS)
    (rule,) = parse("unplug ep=0x81 at=3,5 after=1 count=2 import=2 back=500 late=yes")
    expected = Fault("unplug", endpoint=0x81, at=(3, 5), after=1, count=2, in_import=2, ms=500, late=True)
    assert rule == expected


def test_number_is_counted_among_what_is_selected() -> None:
    assert statuses(["eio ep=4 at=3,5"], 6) == [0, 0, -71, 0, -71, 0]
    assert statuses(["eio ep=4 every=3 after=1 count=1"], 8) == [0, 0, 0, -71, 0, 0, 0, 0]
    # SET_CONFIGURATION is the first transfer of all.
    assert statuses(["eio at=3"], 3) == [0, -71, 0]


def test_rate_is_reproducible_by_its_seed() -> None:
    first, again, other = (statuses([f"eio ep=4 rate=0.3 seed={seed}"], 100) for seed in (1, 1, 2))
    assert first == again != other
    assert 10 < first.count(-71) < 50


def test_first_rule_that_applies_wins() -> None:
    assert statuses(["eio ep=4 at=1; stall ep=4 at=1"], 1) == [-71]


@contextlib.contextmanager
def looped(faults: str) -> Iterator[tuple[Raw, Plugged]]:
    """A loop in which ten bytes wait."""
    with Emulator() as bus, connected(bus, plugged := bus.plug(Loopback(), faults=[faults])) as raw:
        raw.write(1, b"0123456789")
        yield raw, plugged


@pytest.mark.parametrize(
    ("faults", "status"),
    [("stall", -32), ("eio", -71), ("babble", -75), ("eio late=yes", -71), ("stall late=yes", -32)],
)
def test_fault_is_the_status_that_linux_gives(faults: str, status: int) -> None:
    with looped(f"{faults} ep=0x81 at=1") as (raw, _):
        assert raw.wait(raw.submit(0x81, 64)).status == status
        if status == -32:
            assert raw.wait(raw.submit(0x81, 64)).status == -32  # a stall lasts
            raw.clear_halt(0x81)
        if "late" not in faults:
            assert raw.read(0x81, 64) == b"0123456789"


def test_short_and_corrupt_change_the_data() -> None:
    with looped("short ep=0x81 at=1; short ep=0x81 at=1 bytes=3; corrupt ep=0x81 at=1") as (raw, plugged):
        plugged.set_faults(["short ep=0x81 at=1"])
        assert raw.read(0x81, 64) == b"01234"
        plugged.set_faults(["short ep=1 at=1 bytes=3"])
        assert raw.write(1, b"abcdef") == 3
        assert raw.read(0x81, 64) == b"abc"
        got = []
        for _ in range(2):
            plugged.set_faults(["corrupt ep=0x81 at=1 bytes=2 seed=5"])
            raw.write(1, b"0123456789")
            got.append(raw.read(0x81, 64))
        assert got[0] == got[1] != b"0123456789"
        assert sum(a != b for a, b in zip(got[0], b"0123456789", strict=True)) <= 2


def test_dropped_transfer_waits_until_it_is_given_up() -> None:
    with looped("drop ep=0x81 at=1") as (raw, _):
        first = raw.submit(0x81, 64)
        second = raw.submit(0x81, 64)
        assert raw.wait(raw.unlink(first)).status == -104
        assert raw.wait(second).data == b"0123456789"


def test_late_drop_means_that_the_device_has_done_it() -> None:
    with Emulator() as bus, connected(bus, bus.plug(Loopback(), faults=["drop ep=4 late=yes at=1"])) as raw:
        lost = raw.submit(4, b"12345")
        assert raw.wait(raw.unlink(lost)).status == -104
        assert raw.control(0xC0, Request.COUNT, data=8)[0] == 5


def test_delayed_transfer_holds_back_its_endpoint_only() -> None:
    with looped("delay ep=0x81 at=1 ms=200") as (raw, _):
        begin = time.monotonic()
        slow = raw.submit(0x81, 64)
        raw.control(0x80, 8, data=1)
        assert slow not in raw.answers
        assert raw.wait(slow).data == b"0123456789"
        assert time.monotonic() - begin >= 0.2


def test_late_delay_means_that_the_device_has_done_it_and_keeps_the_order() -> None:
    device = Loopback()
    with Emulator() as bus, connected(bus, bus.plug(device, faults=["delay ep=4 late=yes at=1 ms=200"])) as raw:
        first, second = raw.submit(4, b"12345"), raw.submit(4, b"6")
        raw.control(0x80, 8, data=1)
        assert device.sunk == 5
        assert not raw.answers
        assert raw.wait(second).status == 0
        assert first in raw.answers


@pytest.mark.parametrize("late", ["", " late=yes"])
def test_unplug_at_a_transfer_ends_the_connection_there(late: str) -> None:
    device = Loopback()
    with Emulator() as bus, connected(bus, plugged := bus.plug(device, faults=[f"unplug ep=4 at=3{late}"])) as raw:
        raw.write(4, b"1")
        raw.write(4, b"2")
        raw.submit(4, b"3")
        with pytest.raises((EOFError, ConnectionResetError)):
            raw.receive()
        bus.loop.call(lambda: None)
        assert not plugged.present
        assert device.sunk == (3 if late else 2)
        with pytest.raises(OSError, match="No such device"):
            plugged.connect()


def test_unplugged_device_comes_back_by_itself_and_counts_anew() -> None:
    with Emulator() as bus:
        plugged = bus.plug(Loopback(), faults=["unplug ep=4 at=2 back=20"])
        for arrival in (1, 2):
            assert plugged.arrival == arrival
            with connected(bus, plugged) as raw:
                raw.write(4, b"1")
                raw.submit(4, b"2")
                with pytest.raises((EOFError, ConnectionResetError)):
                    raw.receive()
            plugged.wait(lambda plugged, after=arrival: plugged.arrival > after)


def test_rule_can_be_for_one_import_only() -> None:
    with Emulator() as bus:
        plugged = bus.plug(Loopback(), faults=["eio import=2 at=2"])
        for number in (1, 2, 3):
            with connected(bus, plugged) as raw:
                status = raw.wait(raw.submit(4, b"x")).status
                assert status == (-71 if number == 2 else 0)
            plugged.wait(lambda plugged: not plugged.imported)


def test_transfers_are_numbered_and_shown() -> None:
    with Emulator() as bus:
        plugged = bus.plug(Loopback(), faults=["eio ep=4 at=1"])
        with plugged.record() as seen, connected(bus, plugged) as raw:
            raw.write(1, b"hello")
            raw.read(0x81, 64)
            with pytest.raises(Failed):
                raw.write(4, b"x")
        rows = [(s.number, s.import_number, s.imports, s.endpoint, s.length, s.actual, s.first, s.status) for s in seen]
        assert rows == [
            (1, 1, 1, 0, 0, 0, b"", 0),
            (2, 2, 1, 1, 5, 5, b"hello", 0),
            (3, 3, 1, 0x81, 64, 5, b"hello", 0),
            (4, 4, 1, 4, 1, 0, b"x", -71),
        ]
        assert seen[0].setup is not None
        assert seen[0].setup.request == 9
        assert seen[3].fault == "eio"


def test_rule_may_be_any_object() -> None:
    class EveryOther:
        def plugged(self) -> None:
            pass

        def decide(self, transfer: Transfer, imports: int) -> Action | None:
            return Action("eio") if transfer.number % 2 else None

    with Emulator() as bus, connected(bus, bus.plug(Loopback(), faults=[]), 0) as raw:
        bus.find("loopback0").set_faults([EveryOther()])
        assert [raw.wait(raw.submit(0x80, 1, bytes((0x80, 8, 0, 0, 0, 0, 1, 0)))).status for _ in range(4)] == [
            -71, 0, -71, 0
        ]  # fmt: skip
