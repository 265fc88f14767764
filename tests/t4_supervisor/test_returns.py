"""Devices that were pulled out while they were used, and what is offered to their drivers: the binder alone."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import trio
from trio.testing import MockClock
from world import STICK, STORAGE, World, driver, quiet, world_of

from udf.supervisor.binder import LOOK
from udf.supervisor.instance import Reason
from udf.supervisor.rebinding import RETRIES, Absent, whose_device
from udf.usb.matching import Binding, DeviceFacts, InterfaceFacts
from udf.usb.rules import check_rules

ACM = driver("acm", {"class": 2})
SEEDS = int(os.environ.get("UDF_BINDER_SEEDS", "10"))
S1 = {**STICK, "serial": "S1"}


async def used_stick(world: World, port: str = "1-1", name: str = "disk0", **facts: Any) -> str:
    key = world.plug(port, **{**S1, **facts})
    await world.used(name)
    return key


async def test_a_device_that_comes_back_is_given_to_its_driver() -> None:
    async with world_of(STORAGE) as world:
        key = await used_stick(world)
        tenant = world.binder.tenants[0]
        world.unplug(key)
        await quiet()
        assert list(world.running) == ["disk0"]
        assert not world.links
        assert not tenant.serves
        assert world.binder.tenants_of(key) == []  # nobody need wait for it
        again = world.plug("1-7", **S1)  # in another port
        await quiet()
        assert world.started == [("disk0", "storage")]
        assert world.offered == [("disk0", again)]
        assert world.binder.tenants == [tenant]
        assert tenant.serves
        assert tenant.binding.key == again
        assert world.links == {"0781-5567-S1": "disk0"}
        assert world.words() == {again: "bound"}
        world.unplug(again)
        await quiet()
        assert list(world.running) == ["disk0"]


async def test_a_replug_that_is_faster_than_the_unplug_is_one_all_the_same() -> None:
    async with world_of(STORAGE) as world:
        key = await used_stick(world)
        world.unplug(key)
        again = world.plug(**S1)  # before anybody could look
        await quiet()
        assert world.offered == [("disk0", again)]
        assert world.started == [("disk0", "storage")]
        assert world.leases[0].gone
        assert world.leases[0].closed


async def test_what_nobody_uses_is_begun_anew() -> None:
    async with world_of(STORAGE) as world:
        key = world.plug(**S1)
        await quiet()
        world.unplug(key)
        world.plug(**S1)
        await quiet()
        assert world.offered == []
        assert world.started == [("disk0", "storage")] * 2


async def test_without_a_serial_number_nobody_can_say_whether_it_is_the_same() -> None:
    async with world_of(STORAGE) as world:
        key = await used_stick(world, serial="")
        world.unplug(key)
        world.plug("1-2", **STICK, serial="")
        await quiet()
        assert world.offered == []
        assert sorted(world.running) == ["disk0", "disk1"]


async def test_what_is_refused_is_begun_anew_and_ends_what_waited() -> None:
    async with world_of(STORAGE) as world:
        key = await used_stick(world)
        world.unplug(key)
        world.accepts = lambda _name, _key: False
        again = world.plug(**S1)
        await quiet()
        assert world.offered == [("disk0", again)]
        assert world.started == [("disk0", "storage")] * 2  # and its name is free
        ends = [(e.name, e.reason) for e in world.events.past() if e.state == "GONE" and e.kind == "mount"]
        assert ends == [("disk0", "changed")]
        assert world.words() == {again: "bound"}


async def test_a_copied_stick_gets_nothing_of_the_other_one_while_that_is_there() -> None:
    async with world_of(STORAGE) as world:
        await used_stick(world)
        copy = world.plug("1-2", **S1)
        await quiet()
        assert world.offered == []
        assert sorted(world.running) == ["disk0", "disk1"]
        world.running["disk1"].is_used = True
        world.unplug(copy)
        again = world.plug("1-3", **S1)
        await quiet()
        assert world.offered == [("disk1", again)]


async def test_of_two_copies_that_are_away_each_gets_its_own() -> None:
    async with world_of(STORAGE) as world:
        first = await used_stick(world)
        second = await used_stick(world, "1-2", "disk1")
        world.unplug(first)
        world.unplug(second)
        await quiet()
        in_its_port = world.plug("1-2", **S1)
        await quiet()
        assert world.offered == [("disk1", in_its_port)]
        world.unplug(in_its_port)
        world.offered.clear()
        # In another port what is on it decides: the first refuses it and goes on waiting, the second takes it.
        world.accepts = lambda name, _key: name == "disk1"
        elsewhere = world.plug("1-9", **S1)
        await quiet()
        assert world.offered == [("disk0", elsewhere), ("disk1", elsewhere)]
        assert sorted(world.running) == ["disk0", "disk1"]
        assert world.running["disk0"].may_return
        # And what neither takes ends what is away, and nothing else.
        world.accepts = lambda _name, _key: False
        third = world.plug("1-11", **S1)
        await quiet()
        assert world.offered[2:] == [("disk0", third)]
        assert sorted(world.running) == ["disk0", "disk1"]
        assert world.started[-1] == ("disk0", "storage")


async def test_another_device_in_its_place_ends_the_waiting_and_one_beside_it_does_not() -> None:
    async with world_of(STORAGE) as world:
        key = await used_stick(world)
        world.unplug(key)
        world.plug("1-2", **STICK, serial="S2")
        await quiet()
        assert sorted(world.running) == ["disk0", "disk1"]
        world.plug("1-1", **STICK, serial="S3")
        await quiet()
        assert sorted(world.running) == ["disk1", "disk2"]
        ends = [(e.name, e.reason) for e in world.events.past() if e.state == "GONE" and e.kind == "mount"]
        assert ends == [("disk0", "changed")]


async def test_what_a_rule_gives_to_another_driver_or_with_other_options_does_not_come_back() -> None:
    other = driver("other", {"vendor": 0x0781})
    for rules in (
        {"prefer": [{"driver": "other"}]},
        {"prefer": [{"driver": "storage", "options": {"ro": ""}}]},
    ):
        async with world_of(STORAGE, other) as world:
            world.offers(STORAGE, other, rules=check_rules({"prefer": [{"driver": "storage"}]}, "r"))
            key = await used_stick(world)
            world.unplug(key)
            world.offers(STORAGE, other, rules=check_rules(rules, "r"))
            await quiet()
            assert list(world.running) == ["disk0"]
            world.plug(**S1)
            await quiet()
            assert world.offered == []
            assert len(world.running) == 1
            assert len(world.started) == 2


async def test_of_a_composite_device_the_used_part_comes_back_and_the_others_are_begun() -> None:
    parts = (InterfaceFacts(0, ((8, 6, 0x50),)), InterfaceFacts(1, ((2, 2, 1),)))
    async with world_of(STORAGE, ACM) as world:
        key = world.plug(serial="S1", interfaces=parts)
        await world.used("disk0")
        world.unplug(key)
        await quiet()
        assert list(world.running) == ["disk0"]
        again = world.plug(serial="S1", interfaces=parts)
        await quiet()
        assert world.offered == [("disk0", again)]
        assert sorted(world.running) == ["acm0", "disk0"]
        assert world.shared == [True] * 4


async def test_a_device_may_be_pulled_out_while_it_is_looked_at() -> None:
    async with world_of(STORAGE) as world:
        key = await used_stick(world)
        world.unplug(key)
        world.let_return = trio.Event()
        for _ in range(3):
            key = world.plug(**S1)
            await quiet()
            assert not world.links
            assert len(world.binder.tenants) == 1  # nothing else is begun with it while that is under way
            world.unplug(key)
            await quiet()
        key = world.plug(**S1)
        await quiet()
        world.let_return.set()
        await quiet()
        assert list(world.running) == ["disk0"]
        assert len(world.offered) == 2  # the two in between were gone before anybody could ask
        assert world.offered[-1] == ("disk0", key)
        assert world.links == {"0781-5567-S1": "disk0"}
        assert len(world.started) == 1


async def test_what_ends_while_its_device_is_looked_at_is_begun_anew() -> None:
    async with world_of(STORAGE) as world:
        key = await used_stick(world)
        world.unplug(key)
        world.let_return = trio.Event()
        world.plug(**S1)
        await quiet()
        world.running["disk0"].die(Reason.CRASHED)
        await quiet()
        world.let_return.set()
        await quiet()
        assert world.started == [("disk0", "storage")] * 2
        assert list(world.running) == ["disk0"]


async def test_a_plug_is_settled_when_it_is_known_whether_the_device_came_back(autojump_clock: MockClock) -> None:
    async with world_of(STORAGE) as world:
        key = await used_stick(world)
        world.unplug(key)
        world.let_return = trio.Event()
        again = world.plug(**S1)
        assert not await world.binder.settled(again, 2.0)
        world.let_return.set()
        assert await world.binder.settled(again, 2.0)


async def test_a_rule_takes_a_device_away_that_is_being_looked_at() -> None:
    async with world_of(STORAGE) as world:
        key = await used_stick(world)
        world.unplug(key)
        world.let_return = trio.Event()
        world.plug(**S1)
        await quiet()
        world.offers(STORAGE, rules=check_rules({"deny": [{}]}, "r"))
        world.let_return.set()
        await quiet()
        assert not world.running


def test_who_is_offered_a_device_is_a_function_of_what_is_known_of_it() -> None:
    def facts(**more: Any) -> DeviceFacts:
        return DeviceFacts(
            **{"key": "new", "vendor": 1, "product": 2, "serial": "S", "port": "1-1", "bus": "b", **more}
        )

    def absent(interface: int | None = None, refused: tuple[str, ...] = (), **more: Any) -> Absent:
        return Absent(facts(key="old", **more), Binding("old", STORAGE, interface), refused)

    arrived = Binding("new", STORAGE, None)
    assert whose_device(arrived, facts(), []) is None
    assert whose_device(arrived, facts(), [absent()]) == 0
    assert whose_device(arrived, facts(), [absent(port="1-2"), absent(port="1-3")]) == 0
    assert whose_device(arrived, facts(), [absent(port="1-2"), absent(), absent()]) == 1
    assert whose_device(arrived, facts(), [absent(refused=("new",)), absent(port="1-2")]) == 1
    for other in (
        absent(serial="T"),
        absent(vendor=3),
        absent(product=3),
        absent(interface=0),
        absent(refused=("new",)),
        Absent(facts(), Binding("old", ACM, None)),
        Absent(facts(), Binding("old", STORAGE, None, {"ro": ""})),
    ):
        assert whose_device(arrived, facts(), [other]) is None
    assert whose_device(arrived, facts(serial=""), [absent(serial="")]) is None


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_whatever_comes_back_in_whatever_order_each_has_what_is_its_own(
    seed: int, autojump_clock: MockClock
) -> None:
    """Sticks with copied serial numbers, used or not, pulled and plugged while what was before is looked at.

    The world knows which is which: a driver that is offered another stick than its own refuses.
    """
    chance = random.Random(seed)
    async with world_of(STORAGE, pokes=False) as world:
        stick_of: dict[str, int] = {}  # by arrival
        holds: dict[object, int] = {}  # what each instance has known from its start

        def accepts(name: str, key: str) -> bool:
            endpoint = world.running[name]
            return holds[endpoint] == stick_of[key]

        def learn() -> None:
            for tenant in world.binder.tenants:
                if tenant.endpoint is not None and not tenant.is_returning:
                    holds.setdefault(tenant.endpoint, stick_of[tenant.binding.key])

        world.accepts = accepts
        for _ in range(60):
            for _ in range(chance.randrange(1, 10)):
                out = sorted({0, 1, 2, 3} - {stick_of[key] for key in world.devices})
                match chance.randrange(8):
                    case 0 | 1 | 2 if out:
                        stick = chance.choice(out)
                        key = world.plug(f"1-{chance.randrange(5)}", **STICK, serial="AABB"[stick])
                        stick_of[key] = stick
                    case 3 | 4 if world.devices:
                        world.unplug(chance.choice(list(world.devices)))
                    case 5:
                        world.hold()
                    case 6 if world.running:
                        world.running[chance.choice(list(world.running))].is_used = chance.random() < 0.7
                    case 7 if world.running and chance.random() < 0.3:
                        name = chance.choice(list(world.running))
                        world.running[name].lose(Reason.EXPIRED, "")
                if chance.random() < 0.3:
                    world.binder.poke()
                if chance.random() < 0.5:
                    await trio.sleep(chance.random())
                learn()
                if chance.random() < 0.3:
                    for event in (world.let_start, world.let_end, world.let_return):
                        event.set()
            for event in (world.let_start, world.let_end, world.let_return):
                event.set()
            for known in world.binder.known.values():
                known.failures.clear()
            await trio.sleep(LOOK + sum(RETRIES))
            learn()
            serving = [tenant for tenant in world.binder.tenants if tenant.serves]
            assert {tenant.binding.key for tenant in serving} == set(world.devices)
            for tenant in serving:
                assert holds[tenant.endpoint] == stick_of[tenant.binding.key]
            assert len({tenant.name for tenant in world.binder.tenants}) == len(world.binder.tenants)
            assert sorted(world.links.values()) == sorted(tenant.name for tenant in serving)
