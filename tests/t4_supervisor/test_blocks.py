"""Block devices: a socket that outlives the driver, files behind it, and an end in order."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import subprocess

import pytest
import trio
from lab import Lab, errno_of_read, gone, read, serves
from real import AT_ONCE, PATIENCE, needs_fuse

from udf.supervisor.instance import Reason, State
from udf.supervisor.plan import StartFailedError
from udf.testing.devices.thermometer import Thermometer

pytestmark = needs_fuse


def uri(lab: Lab, name: str, export: str = "disk") -> str:
    return f"nbd+unix:///{export}?socket={lab.home}/block/{name}.sock"


async def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return await trio.run_process(arguments, capture_stdout=True, capture_stderr=True, check=False)


async def test_a_block_device_is_served_on_a_socket_of_its_owner_and_as_a_file(lab: Lab) -> None:
    lease = await lab.plug(Thermometer(celsius=2.57))
    endpoint = await lab.start("disk0", "sensor_blocks", lease)
    path = lab.home / "block" / "disk0.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    size = await run("nbdinfo", "--size", uri(lab, "disk0"))
    assert (size.returncode, size.stdout) == (0, b"1048576\n"), size.stderr
    assert await read(lab.place("disk0") / "disk") == b"\x01\x01" * (1 << 19)
    assert [each.plan.name for each in endpoint.dependants] == ["disk0-files"]
    await lab.unplug(lease)
    await gone(endpoint)
    for name, kind in (("disk0", "block"), ("disk0-files", "mount")):
        assert lab.life(name, kind)[1:] == [("ACTIVE", "ready"), ("DETACHED", "unplugged"), ("GONE", "unplugged")]
    assert not path.exists()
    assert not lab.place("disk0").exists()


async def test_a_killed_driver_is_invisible_at_the_socket_and_in_the_file(lab: Lab) -> None:
    lease = await lab.plug(Thermometer(celsius=2.57))
    endpoint = await lab.start("disk0", "sensor_blocks", lease)
    done = trio.Event()

    async def kill() -> None:
        while not done.is_set():
            if endpoint.driver.pid is not None and endpoint.instance.state is State.ACTIVE:
                with contextlib.suppress(ProcessLookupError):  # of the last kill nobody has heard yet
                    os.kill(endpoint.driver.pid, signal.SIGKILL)
            await trio.sleep(0.1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kill)
        for _ in range(30):
            if endpoint.generation > 3:
                break
            copied = await run("nbdcopy", uri(lab, "disk0"), "-")
            assert (copied.returncode, copied.stdout == b"\x01\x01" * (1 << 19)) == (0, True), copied.stderr
            assert await read(lab.place("disk0") / "disk") == b"\x01\x01" * (1 << 19)
        done.set()
    await serves(endpoint, endpoint.generation)
    assert endpoint.generation > 3
    assert endpoint.recovery.restarts_left == 4
    await lab.registry.end(endpoint, Reason.OPERATOR)
    assert lab.life("disk0", "block")[-1] == ("GONE", "operator")


async def test_unplug_is_enodev_for_who_reads_and_writes(lab: Lab) -> None:
    lease = await lab.plug(Thermometer(celsius=2.57))
    endpoint = await lab.start("disk0", "sensor_blocks", lease)
    file = os.open(lab.place("disk0") / "disk", os.O_RDWR)
    failures: list[int] = []

    def write() -> None:
        try:
            while True:
                os.pwrite(file, b"x" * 4096, 0)
                os.fsync(file)
        except OSError as exc:
            failures.append(exc.errno or 0)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, write)
        await trio.sleep(0.2)
        with trio.fail_after(AT_ONCE):
            await lab.unplug(lease)
            await endpoint.ended.wait()
    assert failures == [errno.ENODEV]
    assert await errno_of_read(lab.place("disk0") / "disk") == errno.ENOENT
    with pytest.raises(OSError) as failure:
        os.pwrite(file, b"x", 0)
    assert failure.value.errno == errno.ENODEV
    with contextlib.suppress(OSError):  # what was not flushed is lost, and close(2) may say so too
        os.close(file)


async def test_the_next_plug_has_the_same_name_at_once(lab: Lab) -> None:
    for celsius in (2.57, 5.14, 7.71):
        lease = await lab.plug(Thermometer(celsius=celsius))
        endpoint = await lab.start("disk0", "sensor_blocks", lease)
        assert (await read(lab.place("disk0") / "disk"))[:1] == bytes([round(celsius / 2.57)])
        await lab.unplug(lease)
        await gone(endpoint)


async def test_a_shim_that_is_killed_ends_the_endpoint_with_its_files(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    lease = await lab.plug(Thermometer())
    endpoint = await lab.start("disk0", "sensor_blocks", lease)
    assert endpoint.shim is not None
    assert endpoint.shim.pid is not None
    os.kill(endpoint.shim.pid, signal.SIGKILL)
    await gone(endpoint)
    assert endpoint.instance.reason is Reason.CRASHED
    assert lab.life("disk0-files", "mount")[-1][0] == "GONE"


@pytest.mark.parametrize("how", ["its shim is killed", "umount(8)"])
async def test_files_that_are_lost_come_back(lab: Lab, how: str) -> None:
    """Nothing was left in the place of a device that went on being called bound there."""
    lease = await lab.plug(Thermometer(celsius=2.57))
    endpoint = await lab.start("disk0", "sensor_blocks", lease)
    path = lab.place("disk0") / "disk"
    for _ in range(2):
        (files,) = endpoint.dependants
        if how == "umount(8)":
            assert (await run("umount", str(lab.place("disk0")))).returncode == 0
        else:
            assert files.shim is not None
            assert files.shim.pid is not None
            os.kill(files.shim.pid, signal.SIGKILL)
        with trio.fail_after(PATIENCE):
            await files.ended.wait()
            while not endpoint.dependants or endpoint.dependants[0].instance.state is not State.ACTIVE:
                await trio.sleep(0.02)
        assert (await read(path))[:2] == b"\x01\x01"
    assert endpoint.instance.state is State.ACTIVE
    await lab.unplug(lease)
    await gone(endpoint)
    assert not lab.place("disk0").exists()


async def test_a_device_that_is_unplugged_while_its_units_are_read_is_said_to_be(lab: Lab) -> None:
    for delay in (0.0, 0.02, 0.04, 0.06, 0.08, 0.12):
        lease = await lab.plug(Thermometer())

        async def pull(lease=lease, delay=delay) -> None:  # type: ignore[no-untyped-def]
            await trio.sleep(delay)
            await lab.unplug(lease)

        reason = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pull)
            with trio.fail_after(AT_ONCE):
                try:
                    await gone(await lab.start("disk0", "sensor_blocks", lease))
                except StartFailedError as exc:
                    reason = exc.reason
        assert reason in (None, Reason.UNPLUGGED)
