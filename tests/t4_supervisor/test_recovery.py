"""A driver that is lost is replaced, by scripted processes: every way to lose it, every stage of its replacement."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import pytest
import trio
from real import PATIENCE
from staging import GOOD_HOST, Stage, generation_of, gone, state_of, unmount, until

from udf.errors import UserError
from udf.supervisor import process
from udf.supervisor.instance import Reason, State
from udf.supervisor.options import MountOptions
from udf.supervisor.plan import BusyError

READY = ("receive", "started", "ready")
SERVING = (*READY, "until-mounted")  # what follows is done by the first generation when the mount is there


def shim_that(attaches: str) -> tuple[str, ...]:
    return ("receive", "mounted", f"attaches={attaches}", "serve")


async def test_a_killed_driver_is_replaced_at_once_and_not_counted(stage: Stage) -> None:
    mount = await stage.mounted()
    first = mount.driver.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await generation_of(mount, 2)
    assert mount.driver.pid not in (None, first)
    assert stage.life("mount") == [
        ("STARTING", "starting"),
        ("ACTIVE", "ready"),
        ("RECOVERING", "external"),
        ("ACTIVE", "ready"),
    ]
    assert stage.life("driver") == stage.life("mount")
    (death,) = stage.told("death")
    assert (death.reason, death.text) == ("external", "the driver was ended by SIGKILL")
    recovered = stage.events.past()[-1]
    assert recovered.figures["generation"] == 2
    assert (recovered.figures["replayed"], recovered.figures["parked"]) == (3, 1)
    assert recovered.figures["pause_ms"] > 0
    assert mount.recovery.restarts_left == 4
    await unmount(mount)


@pytest.mark.parametrize(
    ("end", "reason", "text"),
    [
        (("print=ValueError: boom", "exit=1"), "exited", "the driver ended with exit status 1 (ValueError: boom)"),
        (("exit=0",), "exited", "the driver ended with exit status 0"),
        (("kill=11",), "fault", "the driver was ended by SIGSEGV"),
        (("kill=15",), "external", "the driver was ended by SIGTERM"),
        (("raw=%%%", "hang"), "contract", "cannot be read"),
        (('raw={"t":"heartbeat","loop_age":31.5}', "hang"), "hung", "the driver's loop has not turned for 32 s"),
        (("deaf", "hang"), "hung", "the driver gave no sign of life for 10 s"),
    ],
)
async def test_every_way_to_lose_a_driver_is_told_and_followed_by_the_next_one(
    stage: Stage, end: tuple[str, ...], reason: str, text: str
) -> None:
    stage.hosts = [(*SERVING, "beats=5", *end)]
    mount = await stage.mounted()
    first = mount.driver.pid
    await generation_of(mount, 2)
    (death,) = stage.told("death")
    assert text in death.text
    assert death.reason == ("external" if reason == "external" else "counted")
    assert stage.life("mount")[2:] == [("RECOVERING", reason), ("ACTIVE", "ready")]
    assert mount.recovery.restarts_left == (4 if reason == "external" else 3)
    (report,) = mount.recovery.crashes.reports()
    assert (report.kind, report.generation, report.pending) == (reason, 1, 3)
    assert report.operations == ["LOOKUP /a", "READ /a"]
    assert not os.path.exists(f"/proc/{first}")
    await unmount(mount)


async def test_a_crash_report_has_the_last_words(stage: Stage) -> None:
    words = "Traceback (most recent call last):", '  File "x.py"', "ValueError: \x1b[31mred"
    stage.hosts = [(*SERVING, "fault=KeyError: 1", *(f"print={word}" for word in words), "exit=1")]
    mount = await stage.mounted()
    await generation_of(mount, 2)
    (report,) = mount.recovery.crashes.reports()
    await until(lambda: report.output)
    assert report.output == [words[0], words[1], "ValueError: \\x1b[31mred"]
    assert report.fault == ["in READ: KeyError: 1"]
    assert (report.status, report.signal, report.counted) == (1, None, True)
    assert report.served is not None
    await unmount(mount)


async def test_a_driver_that_closes_its_link_and_lives_on_is_ended_and_replaced(stage: Stage) -> None:
    stage.hosts = [(*SERVING, "let-go", "beats=1000")]
    mount = await stage.mounted()
    await generation_of(mount, 2)
    (death,) = stage.told("death")
    assert death.text == "the driver closed its link and did not end"
    await unmount(mount)


async def test_a_request_that_is_overdue_means_that_the_driver_hangs(stage: Stage) -> None:
    stage.shim = ("receive", "mounted", "overdue=2.1", "serve")
    stage.hosts = [(*SERVING, "beats=1000")]
    mount = await stage.mounted()
    await generation_of(mount, 2)
    (death,) = stage.told("death")
    assert death.text == "the driver has not answered READ for 2 s"
    assert stage.life("mount")[2] == ("RECOVERING", "hung")
    await unmount(mount)


async def test_the_shim_is_told_whether_the_death_counted(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "udf.output")
    stage.hosts = [(*SERVING, "exit=1"), (*SERVING, "beats=5", "kill=9")]
    mount = await stage.mounted()
    await generation_of(mount, 3)
    await until(lambda: "attached 3" in caplog.text)
    assert "attached 2 counted True" in caplog.text
    assert "attached 3 counted False" in caplog.text
    await unmount(mount)


async def test_a_new_driver_is_told_nothing_before_the_old_one_is_dead_for_certain(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    end, send = process.Process.end, process.Process.send

    async def slow_end(self: process.Process[object], grace: float) -> bool:
        await trio.sleep(0.3)
        gone = await end(self, grace)
        order.append("gone")
        return gone

    async def noted_send(self: process.Process[object], message: object, fds: object = ()) -> bool:
        order.append(type(message).__name__)
        return await send(self, message, fds)  # type: ignore[arg-type]

    stage.hosts = [(*SERVING, "beats=5", "raw=%%%", "hang")]
    mount = await stage.mounted()
    monkeypatch.setattr(process.Process, "end", slow_end)
    monkeypatch.setattr(process.Process, "send", noted_send)
    await generation_of(mount, 2)
    assert len(stage.started) == 2
    assert order == ["gone", "Start", "Attach"]
    monkeypatch.undo()
    await unmount(mount)


# ---- a generation that fails on its way


@pytest.mark.parametrize(
    ("host", "attaches", "text"),
    [
        (("receive", "failed=no such source"), "ok", "did not start: no such source"),
        (("print=it hurts", "exit=3"), "ok", "the driver ended with exit status 3 (it hurts) before it was ready"),
        (("receive", "exit=3"), "ok", "the driver ended with exit status 3 before it was ready"),
        ((*SERVING, "beats=1000"), "refuse", "the mount cannot go on with this driver: it has no locks"),
        ((*SERVING, "sleep=0.3", "kill=11"), "wait", "the driver was ended by SIGSEGV"),
        ((*SERVING, "sleep=0.3", "let-go", "beats=1000"), "wait", "the mount cannot go on with this driver: it closed"),
    ],
)
async def test_a_generation_that_fails_before_it_serves_is_counted_and_followed_by_another(
    stage: Stage, host: tuple[str, ...], attaches: str, text: str
) -> None:
    stage.hosts = [(*SERVING, "kill=9"), host]
    stage.shim = shim_that(attaches)
    mount = await stage.mounted()
    await until(lambda: len(stage.told("death")) == 2)
    await state_of(mount, State.ACTIVE)
    assert text in stage.told("death")[1].text
    assert stage.told("death")[1].reason == "counted"
    assert mount.recovery.restarts_left == 3
    assert [report.served is None for report in mount.recovery.crashes.reports()] == [False, True]
    assert len(stage.started) == 3
    await unmount(mount)


@pytest.mark.parametrize(
    ("host", "attaches"),
    [
        (("kill=9",), "ok"),
        (("receive", "kill=9"), "ok"),
        (("receive", "started", "ready", "kill=9"), "ok"),
        (("receive", "started", "ready", "sleep=0.2", "kill=9"), "wait"),
        (("receive", "started", "ready", "sleep=0.2", "kill=9"), "ok"),
    ],
)
async def test_a_kill_from_outside_at_any_stage_of_a_recovery_is_not_counted(
    stage: Stage, host: tuple[str, ...], attaches: str
) -> None:
    stage.hosts = [(*SERVING, "kill=9"), host]
    stage.shim = shim_that(attaches)
    mount = await stage.mounted()
    await until(lambda: len(stage.told("death")) == 2)
    await state_of(mount, State.ACTIVE)
    assert mount.recovery.restarts_left == 4
    await unmount(mount)


async def test_one_that_is_not_ready_in_time_is_hung(stage: Stage) -> None:
    stage.hosts = [(*SERVING, "sleep=1", "kill=9"), ("receive", "deaf", "hang")]
    mount = await stage.mounted()
    object.__setattr__(mount.plan, "start_timeout", 0.5)
    await until(lambda: len(stage.told("death")) == 2)
    assert stage.told("death")[1].text == "the driver was not ready within 0.5 s"
    object.__setattr__(mount.plan, "start_timeout", 10.0)
    await state_of(mount, State.ACTIVE)
    await unmount(mount)


# ---- quarantine and restart


async def test_a_crash_loop_ends_in_quarantine_and_a_restart_brings_the_mount_back(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "udf.output")
    stage.host = (*SERVING, "exit=1")
    mount = await stage.mounted()
    await state_of(mount, State.FAILED)
    assert mount.instance.reason is Reason.QUARANTINE
    assert "exit status 1; it died too often" in mount.instance.text
    assert mount.recovery.restarts_left == 0
    assert len(stage.told("death")) == 5
    await until(lambda: "told to fail: the driver ended with exit status 1; it died too often" in caplog.text)
    assert mount.driver.pid is None
    await trio.sleep(0.2)
    assert len(stage.told("death")) == 5, "nothing is started any more"
    stage.host = GOOD_HOST
    assert await mount.restart() == mount.generation
    assert mount.instance.state is State.ACTIVE
    assert mount.recovery.restarts_left == 4
    assert mount.shim.state is State.ACTIVE
    await unmount(mount)


async def test_a_restart_that_fails_says_why(stage: Stage) -> None:
    stage.host = (*SERVING, "exit=1")
    mount = await stage.mounted()
    await state_of(mount, State.FAILED)
    stage.host = ("receive", "failed=the disk is gone")
    with pytest.raises(UserError, match=r"was not restarted: .*the disk is gone"):
        await mount.restart()
    await state_of(mount, State.FAILED)
    await unmount(mount)


async def test_a_restart_of_an_active_mount_ends_the_driver_in_order_and_counts_nothing(stage: Stage) -> None:
    stage.hosts = [(*SERVING, "beats=1", "serve", "print=goodbye", "exit=0")]
    mount = await stage.mounted()
    first = mount.driver.pid
    assert await mount.restart() == 2
    assert mount.driver.pid != first
    assert stage.told("death") == []
    assert stage.life("mount")[2:] == [("RECOVERING", "operator"), ("ACTIVE", "ready")]
    assert mount.recovery.restarts_left == 4
    await unmount(mount)


async def test_a_restart_cuts_a_delay_short(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("udf.supervisor.restart.FIRST_DELAY", 1000.0)
    monkeypatch.setattr("udf.supervisor.restart.MAX_DELAY", 1000.0)
    stage.hosts = [(*SERVING, "exit=1"), (*SERVING, "beats=3", "exit=1")]
    mount = await stage.mounted()
    await until(lambda: len(stage.told("death")) == 2)
    with trio.fail_after(PATIENCE):
        assert await mount.restart() == 3
    await unmount(mount)


# ---- a process that cannot be ended


async def test_a_host_that_cannot_be_reaped_makes_the_mount_failed_and_no_other_is_started(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D state cannot be made to order: here the kernel is said not to have ended it yet."""
    stage.hosts = [(*SERVING, "beats=5", "raw=%%%", "hang")]
    stuck = True
    end = process.Process.end

    async def stuck_end(self: process.Process[object], grace: float) -> bool:
        return not (stuck and self.instance.kind == "driver") and await end(self, grace)

    monkeypatch.setattr(process.Process, "end", stuck_end)
    monkeypatch.setattr(process.Process, "kill", lambda self: None)
    mount = await stage.mounted()
    await state_of(mount, State.FAILED)
    assert mount.instance.reason is Reason.STUCK
    assert "waits in the kernel" in mount.instance.text
    with pytest.raises(UserError, match=r"cannot be restarted: .*waits in the kernel"):
        await mount.restart()
    assert mount.instance.state is State.FAILED
    stuck = False
    assert await mount.restart() == 2
    await unmount(mount)


# ---- unmount at any moment


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("stop", ["before-ready", "attaching", "delay", "failed"])
async def test_an_unmount_does_not_wait_for_a_driver(
    stage: Stage, stop: str, lazy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.hosts = [(*SERVING, "kill=9")]
    match stop:
        case "before-ready":
            stage.host = ("receive", "deaf", "hang")
        case "attaching":
            stage.shim = shim_that("ignore")
        case "delay":
            monkeypatch.setattr("udf.supervisor.restart.FIRST_DELAY", 1000.0)
            monkeypatch.setattr("udf.supervisor.restart.MAX_DELAY", 1000.0)
            stage.host = ("receive", "failed=no")
        case "failed":
            stage.host = ("receive", "failed=no")
    mount = await stage.mounted()
    await until(
        lambda: {
            "before-ready": mount.driver.text == "waiting for ready",
            "attaching": mount.generation == 2,
            "delay": "it is started again in" in mount.driver.text,
            "failed": mount.instance.state is State.FAILED,
        }[stop]
    )
    assert mount.instance.state in (State.RECOVERING, State.FAILED)
    with trio.fail_after(PATIENCE):
        await mount.unmount(Reason.OPERATOR, lazy=lazy)
        await gone(mount)
    assert mount.instance.reason is Reason.OPERATOR


async def test_an_unmount_without_a_driver_that_the_shim_does_not_answer_is_not_waited_for(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("udf.supervisor.mounts.UNMOUNT_WITHOUT_DRIVER", 0.3)
    stage.hosts = [(*SERVING, "kill=9")]
    stage.host = ("receive", "hang")
    stage.shim = ("receive", "mounted", "sleep=0.2", "link_lost", "hang")
    mount = await stage.mounted()
    await state_of(mount, State.RECOVERING)
    with pytest.raises(BusyError, match="has no driver now"):
        await mount.unmount(Reason.OPERATOR, lazy=False)
    with trio.fail_after(PATIENCE):
        await mount.end(Reason.SHUTDOWN)
    assert mount.is_gone


@pytest.mark.parametrize("attaches", ["die", "ignore"])
async def test_a_shims_death_ends_the_mount_at_any_stage_of_a_recovery(
    stage: Stage, attaches: str, caplog: pytest.LogCaptureFixture
) -> None:
    stage.hosts = [(*SERVING, "kill=9")]
    stage.shim = shim_that(attaches)
    mount = await stage.mounted()
    if attaches == "ignore":
        await until(lambda: mount.generation == 2)
        assert mount.shim.pid
        os.kill(mount.shim.pid, signal.SIGKILL)
    await gone(mount)
    assert mount.instance.reason is Reason.CRASHED
    assert stage.cleaned == [mount.plan.mountpoint]


# ---- spares, store, poison, storms


async def test_a_spare_stands_ready_takes_over_and_is_followed_by_another(stage: Stage) -> None:
    stage.options = MountOptions(spare=True)
    spare = ("receive", "receive", "started", "ready", "serve")  # start, then take_over
    stage.hosts = [GOOD_HOST, spare, spare]
    mount = await stage.mounted()
    await until(lambda: mount.recovery.spare_pid)
    waiting = mount.recovery.spare_pid
    assert mount.driver.pid
    os.kill(mount.driver.pid, signal.SIGKILL)
    await generation_of(mount, 2)
    assert mount.driver.pid == waiting
    await until(lambda: mount.recovery.spare_pid not in (None, waiting))
    await unmount(mount)


async def test_a_spare_that_dies_is_replaced_and_the_mount_does_not_notice(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    stage.options = MountOptions(spare=True)
    stage.hosts = [GOOD_HOST, ("receive", "exit=1"), ("receive", "kill=9")]
    stage.host = ("receive", "hang")
    mount = await stage.mounted()
    await until(lambda: len(stage.started) == 4 and mount.recovery.spare_pid)
    assert stage.life("mount") == [("STARTING", "starting"), ("ACTIVE", "ready")]
    assert stage.told("death") == []
    assert mount.recovery.restarts_left == 4
    assert "a spare is replaced" in caplog.text
    await unmount(mount)


async def test_spares_that_die_too_often_are_given_up(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.options = MountOptions(spare=True)
    stage.hosts = [GOOD_HOST]
    stage.host = ("receive", "exit=1")
    mount = await stage.mounted()
    await until(lambda: "it goes on without one" in caplog.text)
    assert len(stage.started) == 6
    assert mount.instance.state is State.ACTIVE
    await unmount(mount)


async def test_each_generation_gets_the_same_store(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "udf.output")
    stage.durability = "store"
    stage.host = ("receive", "count=store", *READY[1:], "serve")
    mount = await stage.mounted()
    for number in (2, 3):
        assert mount.driver.pid
        os.kill(mount.driver.pid, signal.SIGKILL)
        await generation_of(mount, number)
    await until(lambda: caplog.text.count("bytes in the store") == 3)
    assert [f"{count} bytes in the store" in caplog.text for count in range(1, 4)] == [True] * 3
    await unmount(mount)


async def test_poison_is_an_event_and_named_by_the_report_of_the_death(stage: Stage) -> None:
    stage.shim = ("receive", "mounted", "attaches=poison", "serve")
    stage.hosts = [(*SERVING, "exit=1")]
    mount = await stage.mounted()
    await generation_of(mount, 2)
    await until(lambda: stage.told("poison"))
    (poison,) = stage.told("poison")
    assert poison.text == "LOOKUP /cursed was given up: the driver died at it each time"
    (report,) = mount.recovery.crashes.reports()
    assert report.poison == ["LOOKUP /cursed"]
    await unmount(mount)


async def test_two_hundred_deaths_leave_no_descriptor_no_process_and_no_memory(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills from outside go on for ever without delay."""
    mount = await stage.mounted()

    async def storm(deaths: int) -> None:
        for _ in range(deaths):
            number, pid = mount.generation, mount.driver.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await generation_of(mount, number + 1)

    await storm(20)
    held = len(os.listdir("/proc/self/fd"))
    await storm(180)
    assert mount.generation == 201
    assert len(mount.recovery.crashes.reports()) == 20
    await until(lambda: len(os.listdir("/proc/self/fd")) <= held)
    assert len(mount.recovery._hosts.alive) == 1
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert len(set(children) & {str(pid) for pid in stage.started}) == 1
    await unmount(mount)
