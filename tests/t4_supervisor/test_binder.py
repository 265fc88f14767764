"""The binder alone, in a world in which every moment can be held: what is wanted comes about whatever happens when.

The instances are scripted (world.py); tests/t5_cli/test_devices.py has the same with a daemon, emulated devices and
drivers, and test_returns.py the devices that were pulled out while they were used.
"""

from __future__ import annotations

import os
import random

import pytest
import trio
from trio.testing import MockClock
from world import STICK, STORAGE, THERMOMETER, driver, quiet, world_of

from udf.supervisor.binder import HEALTHY, LOOK, NAME_WAIT
from udf.supervisor.instance import Reason
from udf.supervisor.rebinding import RETRIES, may_begin, retry_delay
from udf.usb.matching import Binding, InterfaceFacts
from udf.usb.rules import check_rules


async def test_a_device_is_bound_when_it_arrives_and_freed_when_it_goes() -> None:
    async with world_of(STORAGE, THERMOMETER) as world:
        key = world.plug(manufacturer="Acme", product_name="T 1000", serial="7/../7")
        await quiet()
        assert list(world.running) == ["thermometer0"]
        assert world.links == {"Acme-T_1000-7_.._7": "thermometer0"}
        assert world.words() == {key: "bound"}
        world.unplug(key)
        await quiet()
        assert world.all_is_over()
        stories = [(event.state, event.reason) for event in world.events.past() if event.kind == "device"]
        assert stories == [("STARTING", "starting"), ("ACTIVE", "bound"), ("GONE", "unplugged")]


async def test_a_device_that_comes_back_gets_its_name_back() -> None:
    async with world_of(STORAGE) as world:
        first = world.plug("1-1", **STICK, serial="A")
        second = world.plug("1-2", **STICK, serial="B")
        await quiet()
        assert sorted(world.running) == ["disk0", "disk1"]
        world.unplug(first)
        await quiet()
        world.plug("1-3", **STICK, serial="C")
        await quiet()
        assert sorted(world.running) == ["disk1", "disk2"]
        world.unplug(second)
        world.plug("1-9", **STICK, serial="B")  # in another port
        world.plug("1-1", **STICK, serial="A")
        await quiet()
        assert sorted(world.running) == ["disk0", "disk1", "disk2"]


async def test_two_identical_sticks_have_different_names_and_links() -> None:
    async with world_of(STORAGE) as world:
        keys = [world.plug(port, **STICK, serial="same") for port in ("1-1", "1-2")]
        await quiet()
        assert sorted(world.running) == ["disk0", "disk1"]
        assert sorted(world.links.values()) == ["disk0", "disk1"]
        assert {"0781-5567-same", "0781-5567-same-port_1_2"} == set(world.links)
        world.unplug(keys[0])
        world.plug("1-1", **STICK, serial="same")
        await quiet()
        assert world.links["0781-5567-same"] == "disk0"


async def test_a_replug_waits_for_the_old_instance_and_gets_its_name() -> None:
    async with world_of(THERMOMETER) as world:
        key = world.plug()
        await quiet()
        world.let_end = trio.Event()
        world.unplug(key)
        await quiet()
        world.plug()
        await quiet()
        assert len(world.started) == 1  # the old one has not ended
        world.let_end.set()
        await quiet()
        assert world.started == [("thermometer0", "thermometer")] * 2
        assert list(world.running) == ["thermometer0"]


async def test_an_old_instance_that_does_not_end_does_not_keep_the_device_waiting_for_ever(
    autojump_clock: MockClock,
) -> None:
    async with world_of(THERMOMETER) as world:
        key = world.plug()
        await quiet()
        world.let_end = trio.Event()
        world.unplug(key)
        world.plug()
        await trio.sleep(NAME_WAIT + 1)
        assert sorted(world.running) == ["thermometer0", "thermometer1"]


async def test_a_device_that_goes_before_its_driver_started_leaves_nothing() -> None:
    async with world_of(THERMOMETER) as world:
        world.let_start = trio.Event()
        key = world.plug()
        await quiet()
        world.unplug(key)
        await quiet()
        again = world.plug()
        await quiet()
        assert world.started == [("thermometer0", "thermometer")]
        world.let_start.set()
        await quiet()
        assert list(world.running) == ["thermometer0"]
        assert list(world.words()) == [again]


async def test_removal_and_arrival_in_one_batch_are_two_devices() -> None:
    async with world_of(THERMOMETER) as world:
        first = world.plug()
        await quiet()
        lease = world.leases[0]
        world.unplug(first)
        world.plug()  # before anybody could look
        await quiet()
        assert lease.gone
        assert lease.closed
        assert len(world.started) == 2
        assert list(world.running) == ["thermometer0"]


async def test_a_burst_of_events_is_one_pass() -> None:
    async with world_of(THERMOMETER) as world:
        passes = world.binder._passes
        for number in range(100):
            world.plug(f"1-{number}")
        await quiet()
        assert len(world.running) == 100
        assert world.binder._passes - passes <= 3  # the arrivals, and that what was started serves


async def test_a_lost_event_is_healed_by_a_slow_look(autojump_clock: MockClock) -> None:
    async with world_of(THERMOMETER, pokes=False) as world:
        key = world.plug()
        await trio.sleep(LOOK + 1)
        assert list(world.running) == ["thermometer0"]
        world.unplug(key)
        await trio.sleep(LOOK + 1)
        assert world.all_is_over()


async def test_a_driver_that_appears_after_its_device_gets_it() -> None:
    async with world_of() as world:
        key = world.plug()
        await quiet()
        assert world.words() == {key: "no_driver"}
        world.offers(STORAGE, THERMOMETER)
        await quiet()
        assert list(world.running) == ["thermometer0"]
        stories = [(event.state, event.reason) for event in world.events.past() if event.kind == "device"]
        assert stories[1:] == [("FAILED", "no_driver"), ("RECOVERING", "starting"), ("ACTIVE", "bound")]


async def test_what_serves_goes_on_when_a_better_driver_appears_or_its_own_file_goes() -> None:
    better = driver("better", {"vendor": 0x1209, "product": 0x7E57, "serial": "*"})
    async with world_of(THERMOMETER) as world:
        key = world.plug()
        await quiet()
        world.offers(THERMOMETER, better)
        await quiet()
        world.offers(better)
        await quiet()
        world.offers()
        await quiet()
        assert world.started == [("thermometer0", "thermometer")]
        assert list(world.running) == ["thermometer0"]
        world.offers(THERMOMETER, better)
        world.unplug(key)
        world.plug()
        await quiet()
        assert list(world.running) == ["better0"]


async def test_the_operators_word_takes_a_device_away() -> None:
    other = driver("other", {"vendor": 0x1209})
    async with world_of(THERMOMETER, other) as world:
        world.plug()
        await quiet()
        prefer = check_rules({"prefer": [{"driver": "other"}]}, "r")
        world.offers(THERMOMETER, other, rules=prefer)
        await quiet()
        assert list(world.running) == ["other0"]
        world.offers(THERMOMETER, other, rules=check_rules({"deny": [{"driver": "other"}]}, "r"))
        await quiet()
        assert list(world.running) == ["thermometer0"]
        world.offers(THERMOMETER, other, rules=check_rules({"deny": [{}]}, "r"))
        await quiet()
        assert not world.running
        world.offers(THERMOMETER, other)
        await quiet()
        assert list(world.running) == ["thermometer0"]
        world.binder.disabled = frozenset({"thermometer"})
        world.changed()
        await quiet()
        assert list(world.running) == ["other0"]


async def test_other_options_by_a_rule_start_the_driver_anew() -> None:
    with_options = [{"driver": "thermometer", "options": {"unit": unit}} for unit in ("K", "F")]
    async with world_of(THERMOMETER) as world:
        world.offers(THERMOMETER, rules=check_rules({"prefer": with_options[:1]}, "r"))
        world.plug()
        await quiet()
        world.offers(THERMOMETER, rules=check_rules({"prefer": with_options[1:]}, "r"))
        await quiet()
        assert len(world.started) == 2
        assert [tenant.binding.options for tenant in world.binder.tenants] == [{"unit": "F"}]


async def test_a_requisite_comes_first() -> None:
    needy = driver("needy", {"vendor": 0x1209, "product": 0x7E57}, requires=["drivers:storage"])
    async with world_of(STORAGE, needy) as world:
        key = world.plug("1-1")
        await quiet()
        assert world.words() == {key: "waiting"}
        assert world.binder.known[key].verdict.text == "the driver needy waits: nothing serves storage yet"  # type: ignore[union-attr]
        world.let_start = trio.Event()
        world.plug("1-2", **STICK)
        await quiet()
        assert [name for name, _ in world.started] == ["disk0"]
        world.let_start.set()
        await quiet()
        assert [name for name, _ in world.started] == ["disk0", "needy0"]


async def test_a_requisite_may_be_named_by_what_it_provides() -> None:
    needy = driver("needy", {"vendor": 0x1209, "product": 0x7E57}, requires=["drivers:block"])
    async with world_of(STORAGE, needy) as world:
        world.plug("1-1")
        world.plug("1-2", **STICK)
        await quiet()
        assert sorted(world.running) == ["disk0", "needy0"]


async def test_a_driver_that_lacks_a_program_waits_for_it() -> None:
    async with world_of(THERMOMETER) as world:
        world.offers(THERMOMETER, missing={"thermometer": "the program frob is not installed"})
        key = world.plug()
        await quiet()
        assert world.words() == {key: "waiting"}
        world.offers(THERMOMETER)
        await quiet()
        assert list(world.running) == ["thermometer0"]


async def test_a_start_that_fails_is_tried_again_later_and_later_but_not_for_ever(autojump_clock: MockClock) -> None:
    async with world_of(THERMOMETER) as world:
        world.refuse = lambda _: "it smells of smoke"
        key = world.plug()
        await trio.sleep(sum(RETRIES) + 1)
        assert len(world.started) == 1 + len(RETRIES)
        await trio.sleep(1000)
        assert len(world.started) == 1 + len(RETRIES)
        assert list(world.binder.failures_of(key)) == [("thermometer", None, "it smells of smoke", False)]
        world.refuse = lambda _: None
        world.offers(driver("thermometer", {"vendor": 0x1209, "product": 0x7E57}, description="mended"))
        await quiet()
        assert list(world.running) == ["thermometer0"]


async def test_a_replug_tries_a_failed_driver_at_once() -> None:
    async with world_of(THERMOMETER) as world:
        world.refuse = lambda _: "no"
        key = world.plug()
        await quiet()
        world.refuse = lambda _: None
        world.unplug(key)
        world.plug()
        await quiet()
        assert list(world.running) == ["thermometer0"]


async def test_an_instance_that_ends_by_itself_is_started_again_and_one_that_was_ended_is_not(
    autojump_clock: MockClock,
) -> None:
    async with world_of(THERMOMETER) as world:
        key = world.plug()
        await quiet()
        world.running["thermometer0"].die(Reason.CRASHED)
        await trio.sleep(RETRIES[0] / 2)
        assert not world.running
        await trio.sleep(RETRIES[0])
        assert list(world.running) == ["thermometer0"]
        await trio.sleep(HEALTHY + 1)
        world.running["thermometer0"].die(Reason.CRASHED)
        await trio.sleep(RETRIES[0] + 0.1)  # what had served long is as good as new
        assert list(world.running) == ["thermometer0"]
        world.running["thermometer0"].die(Reason.OPERATOR)
        await trio.sleep(1000)
        assert not world.running
        world.binder.retry(key)
        await quiet()
        assert list(world.running) == ["thermometer0"]


def test_retries_double_and_end() -> None:
    assert [retry_delay(failures) for failures in range(1, 7)] == [*RETRIES, None]


async def test_a_mistake_of_ours_in_one_start_leaves_the_others_alone(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(binding: Binding) -> str | None:
        if binding.driver is THERMOMETER:
            world.leases[-1].close()
            raise RuntimeError("a bug")
        return None

    async with world_of(STORAGE, THERMOMETER) as world:
        world.refuse = refuse
        key = world.plug("1-1")
        await quiet()
        world.plug("1-2", **STICK)
        await quiet()
        assert list(world.running) == ["disk0"]
        (failure,) = world.binder.failures_of(key)
        assert failure[2] == "the supervisor made a mistake (RuntimeError): see its log"
    assert "failed by our own mistake" in caplog.text


async def test_names_that_others_have_are_left_to_them() -> None:
    async with world_of(THERMOMETER) as world:
        world.taken = {"thermometer0", "thermometer1"}
        world.plug()
        await quiet()
        assert list(world.running) == ["thermometer2"]


async def test_the_interfaces_of_a_composite_device_share_its_connection() -> None:
    acm = driver("acm", {"class": 2})
    parts = (InterfaceFacts(0, ((8, 6, 0x50),)), InterfaceFacts(1, ((2, 2, 1),)), InterfaceFacts(2, ((10, 0, 0),)))
    async with world_of(STORAGE, acm) as world:
        key = world.plug(interfaces=parts)
        await quiet()
        assert sorted(world.running) == ["acm0", "disk0"]
        assert world.shared == [True, True]
        assert sorted(world.links) == ["1209-7e57-0-if00", "1209-7e57-0-if01"]
        world.unplug(key)
        await quiet()
        assert world.all_is_over()


async def test_who_has_a_device_for_himself_keeps_others_waiting_until_it_is_plugged_in_again() -> None:
    acm = driver("acm", {"class": 2})
    parts = (InterfaceFacts(0, ((8, 6, 0x50),)), InterfaceFacts(1, ((2, 2, 1),)))
    async with world_of(STORAGE) as world:
        key = world.plug(interfaces=parts)
        await quiet()
        world.offers(STORAGE, acm)
        await quiet()
        assert list(world.running) == ["disk0"]
        assert world.shared == [False]
        world.unplug(key)
        world.plug(interfaces=parts)
        await quiet()
        assert sorted(world.running) == ["acm0", "disk0"]


def test_a_part_of_a_device_can_be_had_beside_other_parts_only() -> None:
    parts = [Binding("k", STORAGE, interface) for interface in (0, 1, None)]
    table = [
        (may_begin(wanted, others, shared), wanted.interface, [each.interface for each in others], shared)
        for wanted in parts
        for others in ([], parts[:1], parts[:2], parts[2:])
        for shared in (False, True)
    ]
    assert [row[1:] for row in table if row[0] and row[2]] == [(1, [0], True)]
    assert all(row[0] for row in table if not row[2])


async def test_settled_says_when_nothing_is_under_way_any_more(autojump_clock: MockClock) -> None:
    async with world_of(THERMOMETER) as world:
        world.let_start = trio.Event()
        key = world.plug()
        assert not await world.binder.settled(key, 2.0)
        world.let_start.set()
        assert await world.binder.settled(key, 2.0)
        assert await world.binder.settled("nothing", 2.0)


async def test_after_close_nothing_is_started() -> None:
    async with world_of(THERMOMETER) as world:
        world.binder.close()
        world.plug()
        await quiet()
        assert not world.started


@pytest.mark.parametrize("seed", range(int(os.environ.get("UDF_BINDER_SEEDS", "20"))))
async def test_whatever_happens_in_whatever_order_state_is_what_is_plugged_in(
    seed: int, autojump_clock: MockClock
) -> None:
    """Plugs, pulls, lost events, starts and ends that take their time, drivers that come and go, crashes."""
    chance = random.Random(seed)
    async with world_of(STORAGE, THERMOMETER, pokes=False) as world:
        for _ in range(60):
            for _ in range(chance.randrange(1, 12)):
                match chance.randrange(8):
                    case 0 | 1 | 2:
                        kind = STICK if chance.random() < 0.5 else {}
                        world.plug(f"1-{chance.randrange(40)}", **kind, serial=chance.choice(["", "A", "B"]))
                    case 3 | 4 if world.devices:
                        world.unplug(chance.choice(list(world.devices)))
                    case 5:
                        world.hold()
                    case 6 if world.running:
                        world.running[chance.choice(list(world.running))].die(Reason.CRASHED)
                    case 7:
                        world.offers(*chance.choice([(STORAGE, THERMOMETER), (STORAGE, THERMOMETER), (STORAGE,)]))
                if chance.random() < 0.3:
                    world.binder.poke()
                if chance.random() < 0.3:
                    await trio.sleep(chance.random())
                if chance.random() < 0.3:
                    world.let_start.set()
                    world.let_end.set()
            # A quiet moment: everything that is held is let go.
            world.let_start.set()
            world.let_end.set()
            world.offers(STORAGE, THERMOMETER)
            for known in world.binder.known.values():
                known.failures.clear()
            await trio.sleep(LOOK + sum(RETRIES))
            serving = {tenant.binding.key for tenant in world.binder.tenants if tenant.serves}
            assert serving == set(world.devices), [
                (key, world.words().get(key), list(world.binder.failures_of(key)))
                for key in serving ^ set(world.devices)
            ]
            assert len(world.running) == len(world.devices)
            assert sorted(world.links.values()) == sorted(world.running)
            assert set(world.words().values()) <= {"bound"}
