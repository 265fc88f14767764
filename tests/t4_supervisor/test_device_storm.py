"""Devices that come and go in random order, in every phase of the instances that they have: nothing is left of them.

How many: UDF_STORM_DEVICES (default 24); which: UDF_STORM_SEED.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal

import pytest
import trio
from lab import Lab, gone
from real import PATIENCE, needs_fuse

from udf.supervisor.instance import Reason, State
from udf.supervisor.plan import StartFailedError
from udf.testing.devices.thermometer import Thermometer

pytestmark = needs_fuse
DEVICES = int(os.environ.get("UDF_STORM_DEVICES", "24"))
SEED = int(os.environ.get("UDF_STORM_SEED", "0")) or random.randrange(1 << 32)
DRIVERS = ("sensor", "sensor_line", "sensor_blocks")
SLOTS = 6


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.timeout(60 + 20 * DEVICES)
async def test_devices_in_random_order_leave_nothing_behind(lab: Lab) -> None:
    print(f"UDF_STORM_SEED={SEED}")
    chance = random.Random(SEED)
    ends: list[Reason] = []
    slots = trio.CapacityLimiter(SLOTS)
    names = {f"x{number}": trio.Lock() for number in range(2 * DEVICES)}

    async def episode(number: int) -> None:
        driver, life, kills = chance.choice(DRIVERS), chance.expovariate(4), chance.randrange(3)
        told, reuse = chance.random() < 0.7, chance.random() < 0.5
        name = f"x{number % SLOTS if reuse else number + DEVICES}"
        async with slots, names[name]:
            assert not lab.registry.is_taken(name)
            lease = await lab.plug(Thermometer(), f"d{number}")
            async with trio.open_nursery() as nursery:

                async def pull() -> None:
                    await trio.sleep(life)
                    await lab.unplug(lease, told=told)

                nursery.start_soon(pull)
                try:
                    endpoint = await lab.start(name, driver, lease)
                except StartFailedError as exc:
                    ends.append(exc.reason)
                    return
                for _ in range(kills):
                    await trio.sleep(chance.random() * 0.1)
                    if endpoint.driver.pid is not None and endpoint.instance.state is State.ACTIVE:
                        with contextlib.suppress(ProcessLookupError):  # the device is being pulled
                            os.kill(endpoint.driver.pid, signal.SIGKILL)
                with trio.fail_after(life + PATIENCE):
                    await endpoint.ended.wait()
            ends.append(endpoint.instance.reason)
            assert not lab.place(name).exists()

    before = descriptors()
    async with trio.open_nursery() as nursery:
        for number in range(DEVICES):
            nursery.start_soon(episode, number)
    assert ends == [Reason.UNPLUGGED] * DEVICES
    assert lab.registry.endpoints(lab.registry_owner) == []
    lab.nothing_is_left()
    with trio.fail_after(PATIENCE):
        while descriptors() > before + 8:  # what stands by ahead of the next host
            await trio.sleep(0.05)


async def test_what_was_gone_before_it_could_start_is_told_so_however_often(lab: Lab) -> None:
    for number in range(5):
        lease = await lab.plug(Thermometer())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lab.unplug, lease)
            try:
                await gone(await lab.start("x", "sensor", lease))
            except StartFailedError as exc:
                reason = exc.reason
                assert reason is Reason.UNPLUGGED, number
