"""The life of a mount with scripted processes in the place of shim and host: every way in which it can go wrong."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest
import trio
from real import PATIENCE
from staging import Stage, gone, until

from udf.supervisor import output, shim
from udf.supervisor.instance import Reason, State
from udf.supervisor.plan import BusyError


async def test_a_mount_lives_from_starting_over_active_to_gone(stage: Stage) -> None:
    mount = await stage.mounted()
    assert mount.instance.state is State.ACTIVE
    assert mount.driver.pid
    assert mount.shim.pid
    assert await mount.counters() == {"requests": 7.0, "ratio": 0.5}
    await mount.unmount(Reason.OPERATOR, lazy=False)
    await gone(mount)
    for kind in ("mount", "driver", "shim"):
        assert stage.life(kind) == [("STARTING", "starting"), ("ACTIVE", "ready"), ("GONE", "operator")]
    assert stage.cleaned == []
    order = [event.kind for event in stage.events.past() if event.state is State.GONE]
    assert order == ["shim", "driver", "mount"]


@pytest.mark.parametrize(
    ("host", "sentence", "reason"),
    [
        (("receive", "failed=no such class"), "the driver scripted did not start: no such class", "refused"),
        (("print=it hurts", "exit=3"), r"scripted ended with exit status 3 \(it hurts\) before it was ready", "exited"),
        (("kill=11",), "scripted was ended by SIGSEGV before it was ready", "exited"),
        (("raw=nonsense", "hang"), "cannot be read", "contract"),
        (("raw={}", "hang"), "cannot be read", "contract"),
        (("flood",), "more than 2000 messages in a second", "contract"),
    ],
)
async def test_a_driver_that_cannot_start_is_told_in_one_sentence_and_nothing_stays(
    stage: Stage, host: tuple[str, ...], sentence: str, reason: str
) -> None:
    stage.host = host
    error = await stage.refused()
    assert re.search(sentence, str(error))
    assert "\n" not in str(error)
    assert stage.life("mount") == [("STARTING", "starting"), ("GONE", reason)]
    assert len(error.tree) == 3


@pytest.mark.parametrize(
    ("shim", "sentence"),
    [
        (("receive", "failed=no /dev/fuse"), "cannot mount on .*: no /dev/fuse"),
        (("receive", "exit=1"), "the shim ended with exit status 1"),
        (("raw=[]", "hang"), "cannot be read"),
        (("receive", 'raw={"t":"mounted"}', "hang"), "without its descriptor"),
    ],
)
async def test_a_shim_that_cannot_mount_is_told_in_one_sentence_and_nothing_stays(
    stage: Stage, shim: tuple[str, ...], sentence: str
) -> None:
    stage.shim = shim
    error = await stage.refused()
    assert re.search(sentence, str(error))
    assert stage.life("mount")[-1][0] == "GONE"


@pytest.mark.parametrize(("role", "what"), [("host", "waiting for ready"), ("shim", "waiting for the driver's first")])
async def test_a_start_time_out_shows_the_state_of_each_process(stage: Stage, role: str, what: str) -> None:
    stage.start_timeout = 3.0
    if role == "host":
        stage.host = ("receive", "hang")
    else:
        stage.shim = ("receive", "hang")
    error = await stage.refused()
    assert "was not mounted in 3 s" in str(error)
    assert any(what in line for line in error.tree)
    assert error.tree[0] == "mount m STARTING, starting"
    assert stage.life("mount") == [("STARTING", "starting"), ("GONE", "timeout")]


@pytest.mark.parametrize("seconds", [0, 0.001, 0.01, 0.05, 0.5])
async def test_a_start_that_is_given_up_leaves_nothing(stage: Stage, seconds: float) -> None:
    """One that was given up while its processes were being started used to wait for them for ever."""
    stage.host = ("receive", "deaf", "hang")
    with trio.fail_after(PATIENCE), trio.move_on_after(seconds) as scope:
        await stage.nursery.start(stage.make().run)
    assert scope.cancelled_caught
    assert stage.life("mount") == [("STARTING", "starting"), ("GONE", "operator")]


async def test_a_shims_death_ends_the_mount_and_cleans_the_mountpoint(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    stage.shim = ("receive", "mounted", "sleep=0.2", "print=MemoryError", "kill=9")
    mount = await stage.mounted()
    await gone(mount)
    assert (mount.instance.reason, mount.instance.text) == (
        Reason.CRASHED,
        "the shim was ended by SIGKILL (MemoryError)",
    )
    assert stage.cleaned == [mount.plan.mountpoint]
    assert "m: the shim was ended by SIGKILL (MemoryError)" in caplog.text


async def test_a_shim_without_heartbeat_is_hung_and_the_mount_is_gone(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shim, "SILENCE", 5)
    stage.shim = ("receive", "mounted", "deaf", "hang")
    mount = await stage.mounted()
    await gone(mount)
    assert mount.instance.reason is Reason.HUNG
    assert stage.cleaned == [mount.plan.mountpoint]


async def test_an_unmount_by_somebody_else_ends_the_mount(stage: Stage) -> None:
    stage.shim = ("receive", "mounted", "sleep=0.2", "unmounted=external", "exit=0")
    mount = await stage.mounted()
    await gone(mount)
    assert mount.instance.reason is Reason.EXTERNAL
    assert stage.cleaned == []


async def test_a_busy_mount_goes_on_as_before(stage: Stage) -> None:
    stage.shim = ("receive", "mounted", "receive", "busy", "serve")
    mount = await stage.mounted()
    with pytest.raises(BusyError, match="is in use"):
        await mount.unmount(Reason.OPERATOR, lazy=False)
    assert mount.instance.state is State.ACTIVE
    await mount.unmount(Reason.OPERATOR, lazy=False)
    await gone(mount)


async def test_a_lazy_unmount_answers_when_the_mount_is_out_of_the_tree(stage: Stage) -> None:
    stage.shim = ("receive", "mounted", "receive", "detached", "sleep=0.5", "unmounted", "exit=0")
    mount = await stage.mounted()
    await mount.unmount(Reason.OPERATOR, lazy=True)
    assert mount.is_lazy
    assert mount.instance.state is State.ACTIVE
    await gone(mount)
    assert mount.instance.reason is Reason.OPERATOR


async def test_the_end_does_not_wait_for_what_does_not_end(stage: Stage) -> None:
    stage.host = ("receive", "ready", "stubborn")
    stage.shim = ("receive", "mounted", "stubborn")
    mount = await stage.mounted()
    with trio.fail_after(PATIENCE):
        await mount.end(Reason.SHUTDOWN)
    assert mount.is_gone
    assert mount.instance.reason is Reason.SHUTDOWN


async def test_a_pid_that_is_not_the_hosts_own_is_not_believed(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.host = ("receive", f"started={os.getppid()}", "ready", "serve")
    mount = await stage.mounted()
    assert mount.driver.pid != os.getppid()
    assert "is not its child" in caplog.text
    await mount.unmount(Reason.OPERATOR, lazy=False)
    await gone(mount)


async def test_faults_are_events_and_named_in_the_log(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.host = ("receive", "ready", "fault=ValueError: \x1b[31mred\n", "serve")
    mount = await stage.mounted()
    with trio.fail_after(PATIENCE):
        while not mount.faults:
            await trio.sleep(0.01)
    (fault,) = [event for event in stage.events.past() if event.what == "fault"]
    assert (fault.reason, fault.text) == ("READ", "ValueError: \\x1b[31mred")
    assert "m: the driver scripted broke in READ: ValueError" in caplog.text
    await mount.unmount(Reason.OPERATOR, lazy=False)
    await gone(mount)


async def test_a_driver_that_prints_for_ever_neither_blocks_nor_fills_the_log(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "udf.output")
    stage.host = ("receive", "ready", "print-for-ever")
    mount = await stage.mounted()
    await until(lambda: len(caplog.records) >= output.BURST)
    began = trio.current_time()
    await trio.sleep(0.2)
    await mount.unmount(Reason.OPERATOR, lazy=False)
    await gone(mount)
    assert len(caplog.records) < output.BURST + 50 + 2 * output.RATE * (trio.current_time() - began)
    assert any("lines more were not logged" in record.getMessage() for record in caplog.records)


async def test_children_are_started_by_the_thread_that_lasts(stage: Stage) -> None:
    mount = await stage.mounted()
    own = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert {str(mount.shim.pid), str(mount.driver.pid)} <= set(own)
    await mount.unmount(Reason.OPERATOR, lazy=False)
    await gone(mount)
