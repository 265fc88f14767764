"""Drivers of devices as instances: files, blocks and terminals, over deaths of the driver and the end of the device."""

from __future__ import annotations

import errno
import gc
import os
import signal
import weakref

import pytest
import trio
from lab import Lab, errno_of_read, gone, read, serves, warm_spare
from real import AT_ONCE, PATIENCE, needs_fuse

from udf.errors import UserError
from udf.fuse.mountinfo import find_mount
from udf.supervisor import restart
from udf.supervisor.instance import Reason, State
from udf.supervisor.plan import BusyError, StartFailedError
from udf.testing.devices.thermometer import Thermometer

pytestmark = needs_fuse


async def test_files_of_a_device_are_there_until_it_is_unplugged(lab: Lab) -> None:
    lease = await lab.plug(Thermometer(celsius=21.5))
    endpoint = await lab.start("t0", "sensor", lease)
    assert endpoint.plan.where == str(lab.place("t0"))
    assert await read(lab.place("t0") / "celsius") == b"21.50\n"
    assert lab.registry.is_taken("t0")
    await lab.unplug(lease)
    await gone(endpoint)
    assert lab.life("t0", "mount") == [
        ("STARTING", "starting"),
        ("ACTIVE", "ready"),
        ("DETACHED", "unplugged"),
        ("GONE", "unplugged"),
    ]
    assert not lab.place("t0").exists()
    assert not lab.registry.is_taken("t0")
    assert lease.closed


async def test_a_driver_that_is_killed_is_replaced_with_a_connection_of_its_own(lab: Lab) -> None:
    lease = await lab.plug(Thermometer())
    endpoint = await lab.start("t0", "sensor", lease)
    assert await read(lab.place("t0") / "celsius") == b"21.50\n"
    for generation in range(2, 6):
        assert endpoint.driver.pid is not None
        os.kill(endpoint.driver.pid, signal.SIGKILL)
        assert await read(lab.place("t0") / "celsius") == b"21.50\n"
        await serves(endpoint, generation)
    assert lease.opened == 5
    await lab.unplug(lease)
    await gone(endpoint)


async def test_what_waits_for_a_device_ends_with_enodev_when_it_is_unplugged(lab: Lab) -> None:
    lease = await lab.plug(Thermometer())
    endpoint = await lab.start("t0", "sensor", lease)
    file = os.open(lab.place("t0") / "celsius", os.O_RDONLY)
    failures: list[int] = []

    async def wait() -> None:
        failures.append(await errno_of_read(lab.place("t0") / "slow"))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(wait)
        while (await endpoint.requests()).total < 1:  # type: ignore[union-attr]
            await trio.sleep(0.005)
        with trio.fail_after(AT_ONCE):
            await lab.unplug(lease)
            await endpoint.ended.wait()
    assert len(failures) == 3
    assert errno.ENODEV in failures
    assert set(failures) <= {errno.ENODEV, errno.ENOENT}, "a thread that comes late finds nothing"
    assert find_mount(str(lab.place("t0"))) is None
    with pytest.raises(OSError) as failure:
        os.read(file, 10)
    assert failure.value.errno == errno.ENODEV  # its mount is gone, and still that is what is told
    os.close(file)


async def test_an_unplug_that_only_the_connection_tells_of_is_one_too(lab: Lab) -> None:
    lease = await lab.plug(Thermometer())
    endpoint = await lab.start("t0", "sensor", lease)
    await lab.unplug(lease, told=False)
    await gone(endpoint)
    assert endpoint.instance.reason is Reason.UNPLUGGED


async def test_a_connection_that_ends_without_the_device_is_followed_by_another(lab: Lab) -> None:
    lease = await lab.plug(Thermometer())
    endpoint = await lab.start("t0", "sensor", lease)
    tenancy = endpoint.recovery.absence.tenancy
    assert tenancy is not None
    tenancy.cut()
    await serves(endpoint, 2)
    assert await read(lab.place("t0") / "celsius") == b"21.50\n"
    assert lab.told("death")[0].reason == "external"
    await lab.registry.end(endpoint, Reason.OPERATOR)


async def test_a_device_that_is_busy_is_tried_again(lab: Lab) -> None:
    lease = await lab.plug(Thermometer())
    lease.refuse = [OSError(errno.EBUSY, "busy")] * 3
    endpoint = await lab.start("t0", "sensor", lease)
    assert await read(lab.place("t0") / "celsius") == b"21.50\n"
    await lab.registry.end(endpoint, Reason.OPERATOR)
    assert endpoint.instance.reason is Reason.OPERATOR


async def test_a_device_that_cannot_be_opened_is_a_sentence(lab: Lab) -> None:
    lease = await lab.plug(Thermometer())
    lease.refuse = [OSError(errno.ECONNREFUSED, "Connection refused")]
    with pytest.raises(StartFailedError, match="the device cannot be opened: Connection refused"):
        await lab.start("t0", "sensor", lease)
    assert lease.closed


@pytest.mark.parametrize("told", [True, False])
async def test_a_device_that_is_gone_before_its_driver_starts_is_said_to_be(lab: Lab, told: bool) -> None:
    lease = await lab.plug(Thermometer())
    await lab.unplug(lease, told=told)
    with pytest.raises(StartFailedError, match="unplugged") as failure:
        await lab.start("t0", "sensor", lease)
    assert failure.value.reason is Reason.UNPLUGGED
    assert not lab.place("t0").exists()


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.03, 0.06, 0.1])
async def test_a_device_may_be_unplugged_at_any_moment_of_a_start(lab: Lab, delay: float) -> None:
    lease = await lab.plug(Thermometer())

    async def pull() -> None:
        await trio.sleep(delay)
        await lab.unplug(lease)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pull)
        with trio.fail_after(AT_ONCE):
            reason = None
            try:
                await gone(await lab.start("t0", "sensor", lease))
            except StartFailedError as exc:
                reason = exc.reason
        assert reason in (None, Reason.UNPLUGGED)


async def test_a_device_may_be_unplugged_while_its_driver_is_replaced(lab: Lab) -> None:
    for delay in (0.0, 0.005, 0.02, 0.05):
        lease = await lab.plug(Thermometer())
        endpoint = await lab.start("t0", "sensor", lease)
        assert endpoint.driver.pid is not None
        os.kill(endpoint.driver.pid, signal.SIGKILL)
        await trio.sleep(delay)
        await lab.unplug(lease)
        await gone(endpoint)
        assert endpoint.instance.reason is Reason.UNPLUGGED
        assert not lab.place("t0").exists()


@pytest.mark.parametrize("state", [State.RECOVERING, State.FAILED])
async def test_a_driver_that_rests_or_is_given_up_is_unplugged_like_any_other(
    lab: Lab, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restart, "FIRST_DELAY", 30.0 if state is State.RECOVERING else 0.01)
    lease = await lab.plug(Thermometer())
    endpoint = await lab.start("t0", "sensor", lease)

    async def kill_it() -> None:
        while endpoint.instance.state is not State.GONE:
            await errno_of_read(lab.place("t0") / "die")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kill_it)
        with trio.fail_after(PATIENCE):
            while endpoint.instance.state is not state or (state is State.RECOVERING and not lab.is_resting(endpoint)):
                await trio.sleep(0.01)
        await lab.unplug(lease)
        await gone(endpoint)
    assert endpoint.instance.reason is Reason.UNPLUGGED


async def test_a_spare_has_no_connection_before_its_turn(lab: Lab) -> None:
    lease = await lab.plug(Thermometer())
    endpoint = await lab.start("t0", "sensor", lease, options={"spare": ""})
    spare = await warm_spare(endpoint)
    assert lease.opened == 1
    assert endpoint.driver.pid is not None
    os.kill(endpoint.driver.pid, signal.SIGKILL)
    assert await read(lab.place("t0") / "celsius") == b"21.50\n"
    await serves(endpoint, 2)
    assert endpoint.driver.pid == spare
    assert lease.opened == 2
    await lab.unplug(lease)
    await gone(endpoint)


async def test_a_name_or_place_that_is_taken_is_refused(lab: Lab) -> None:
    lease = await lab.plug(Thermometer())
    endpoint = await lab.start("t0", "sensor", lease)
    other = await lab.plug(Thermometer())
    with pytest.raises(BusyError, match="t0"):
        await lab.start("t0", "sensor", other)
    assert other.closed
    await lab.registry.end(endpoint, Reason.OPERATOR)
    assert not lab.place("t0").exists()


async def test_what_a_device_serves_is_not_unmounted_but_unplugged(lab: Lab) -> None:
    lease = await lab.plug(Thermometer())
    endpoint = await lab.start("t0", "sensor", lease)
    with pytest.raises(UserError, match="unplug it"):
        await lab.registry.unmount(endpoint, lazy=False)
    assert await read(lab.place("t0") / "celsius") == b"21.50\n"


@pytest.mark.parametrize("driver", ["sensor", "sensor_line", "sensor_blocks"])
async def test_an_ended_endpoint_leaves_nothing_in_memory(lab: Lab, driver: str) -> None:
    gc.collect()
    gc.disable()
    try:
        freed = trio.Event()

        async def live() -> None:
            lease = await lab.plug(Thermometer())
            endpoint = await lab.start("t0", driver, lease)
            weakref.finalize(endpoint, freed.set)
            assert endpoint.driver.pid is not None
            os.kill(endpoint.driver.pid, signal.SIGKILL)
            await serves(endpoint, 2)
            await lab.unplug(lease)
            await gone(endpoint)

        await live()
        with trio.fail_after(PATIENCE):
            await freed.wait()
    finally:
        gc.enable()


async def test_a_place_that_a_killed_supervisor_left_is_used_again(lab: Lab) -> None:
    lab.place("t0").mkdir(parents=True)
    (lab.place("t0") / "tty").symlink_to("/dev/pts/99")
    lease = await lab.plug(Thermometer())
    endpoint = await lab.start("t0", "sensor", lease)
    assert find_mount(str(lab.place("t0"))) is not None
    await lab.registry.end(endpoint, Reason.OPERATOR)


async def test_a_driver_is_restarted_by_an_operator_and_stopped_in_order(lab: Lab) -> None:
    lease = await lab.plug(Thermometer())
    endpoint = await lab.start("t0", "sensor", lease)
    assert await endpoint.restart() == 2
    assert await read(lab.place("t0") / "celsius") == b"21.50\n"
    with trio.fail_after(PATIENCE):
        await lab.registry.end(endpoint, Reason.OPERATOR)
    assert endpoint.instance.state is State.GONE
