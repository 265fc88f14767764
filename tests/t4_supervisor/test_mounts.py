"""The life of a mount with scripted processes in the place of shim and host: every way in which it can go wrong."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import trio

from udf import messages
from udf.supervisor import mounts, paths, process, spawn
from udf.supervisor.instance import EventLog, Reason, State
from udf.supervisor.mounts import Mount
from udf.supervisor.options import MountOptions
from udf.supervisor.plan import BusyError, MountPlan, StartFailedError
from udf.supervisor.spawn import Identity

PEER = str(Path(__file__).with_name("scripted_peer.py"))
GOOD_SHIM = ("receive", "mounted", "serve")
GOOD_HOST = ("receive", "started", "ready", "serve")


class Stage:
    """Makes mounts whose processes follow scripts."""

    def __init__(self, nursery: trio.Nursery, tmp_path: Path) -> None:
        self.nursery = nursery
        self.events = EventLog()
        self.shim: tuple[str, ...] = GOOD_SHIM
        self.host: tuple[str, ...] = GOOD_HOST
        self.cleaned: list[str] = []
        self.start_timeout = 10.0
        self._mountpoint = str(tmp_path / "mnt")

    def start(self, role: str, control: socket.socket, output: int) -> spawn.Child:
        steps = self.shim if role == "shim" else self.host
        argv = [sys.executable, "-S", PEER, str(control.fileno()), role, *steps]
        return spawn._start(argv, {}, output, output, None, control.fileno())

    def make(self) -> Mount:
        plan = MountPlan(
            name="m",
            mountpoint=self._mountpoint,
            driver_name="scripted",
            driver=messages.DriverSpec(path="/x"),
            source=None,
            driver_options={},
            asked_options={},
            options=MountOptions(),
            owner=Identity.own(),
            shim_as=None,
            sandbox=messages.Sandbox(uid=0, gid=0),
            environment={},
            start_timeout=self.start_timeout,
        )
        return Mount(plan, self.events, self.nursery)

    async def mounted(self) -> Mount:
        mount = self.make()
        await self.nursery.start(mount.run)
        return mount

    async def refused(self) -> StartFailedError:
        with pytest.raises(StartFailedError) as caught:
            await self.nursery.start(self.make().run)
        return caught.value

    def life(self, kind: str) -> list[tuple[str, str]]:
        return [(str(e.state), e.reason) for e in self.events.past() if e.kind == kind and e.what == "state"]


@pytest.fixture
async def stage(nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage(nursery, tmp_path)

    def start_shim(name: str, control: socket.socket, output: int, run_as: Identity | None) -> spawn.Child:
        return stage.start("shim", control, output)

    def start_host(name: str, control: socket.socket, output: int, environment: Mapping[str, str]) -> spawn.Child:
        return stage.start("host", control, output)

    async def clean(mountpoint: str, run_as: Identity | None) -> str:
        stage.cleaned.append(mountpoint)
        return ""

    monkeypatch.setattr(spawn, "start_shim", start_shim)
    monkeypatch.setattr(spawn, "start_host", start_host)
    monkeypatch.setattr(paths, "clean", clean)
    for name, value in {"LINK_GRACE": 0.2, "STOP_GRACE": 0.5, "TERM_GRACE": 0.3, "HEARTBEAT": 0.05}.items():
        monkeypatch.setattr(mounts, name, value)
    monkeypatch.setattr(process, "DRAIN", 0.2)
    return stage


async def gone(mount: Mount) -> None:
    with trio.fail_after(10):
        await mount.ended.wait()
    assert mount.is_gone


async def state_of(mount: Mount, state: State) -> None:
    with trio.fail_after(10):
        while mount.instance.state is not state:
            await trio.sleep(0.01)


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
    stage.start_timeout = 1.0
    if role == "host":
        stage.host = ("receive", "hang")
    else:
        stage.shim = ("receive", "hang")
    error = await stage.refused()
    assert "was not mounted in 1 s" in str(error)
    assert any(what in line for line in error.tree)
    assert error.tree[0] == "mount m STARTING, starting"
    assert stage.life("mount") == [("STARTING", "starting"), ("GONE", "timeout")]


@pytest.mark.parametrize("seconds", [0, 0.001, 0.01, 0.05, 0.5])
async def test_a_start_that_is_given_up_leaves_nothing(stage: Stage, seconds: float) -> None:
    """One that was given up while its processes were being started used to wait for them for ever."""
    stage.host = ("receive", "deaf", "hang")
    with trio.fail_after(10), trio.move_on_after(seconds) as scope:
        await stage.nursery.start(stage.make().run)
    assert scope.cancelled_caught
    assert stage.life("mount") == [("STARTING", "starting"), ("GONE", "operator")]


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (("print=Traceback: boom", "exit=1"), "the driver ended with exit status 1 (Traceback: boom)"),
        (("kill=9",), "the driver was ended by SIGKILL"),
        (("exit=0",), "the driver ended with exit status 0"),
    ],
)
async def test_a_drivers_death_makes_the_mount_failed_and_it_can_still_be_unmounted(
    stage: Stage, end: tuple[str, ...], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    stage.host = ("receive", "started", "ready", "sleep=0.3", *end)
    mount = await stage.mounted()
    await state_of(mount, State.FAILED)
    assert (mount.instance.reason, mount.instance.text) == (Reason.EXITED, text)
    assert mount.driver.state is State.FAILED
    assert mount.shim.state is State.ACTIVE
    await mount.unmount(Reason.OPERATOR, lazy=False)
    await gone(mount)
    assert stage.life("mount")[-2:] == [("FAILED", "exited"), ("GONE", "operator")]
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert errors == [f"m: {text}; what is not cached fails now until it is unmounted"]


async def test_a_driver_that_closes_its_link_and_lives_on_is_ended(stage: Stage) -> None:
    stage.shim = ("receive", "mounted", "sleep=0.2", "link_lost", "serve")
    mount = await stage.mounted()
    await state_of(mount, State.FAILED)
    assert mount.instance.text == "the driver closed its link and did not end"
    await mount.unmount(Reason.OPERATOR, lazy=False)
    await gone(mount)


async def test_a_driver_without_heartbeat_is_hung_and_ended(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.host = ("receive", "started", "ready", "deaf", "hang")
    mount = await stage.mounted()
    await state_of(mount, State.FAILED)
    assert mount.instance.reason is Reason.HUNG
    assert "no sign of life" in mount.instance.text
    await mount.unmount(Reason.OPERATOR, lazy=False)
    await gone(mount)


async def test_a_driver_whose_loop_does_not_turn_is_hung(stage: Stage) -> None:
    stage.host = ("receive", "ready", 'raw={"t":"heartbeat","loop_age":31.5}', "hang")
    mount = await stage.mounted()
    await state_of(mount, State.FAILED)
    assert mount.instance.reason is Reason.HUNG
    assert mount.instance.text == "the driver's loop has not turned for 32 s"
    await mount.unmount(Reason.OPERATOR, lazy=False)
    await gone(mount)


async def test_a_driver_that_breaks_the_wire_later_is_ended(stage: Stage) -> None:
    stage.host = ("receive", "ready", "sleep=0.2", "raw=%%%", "hang")
    mount = await stage.mounted()
    await state_of(mount, State.FAILED)
    assert mount.instance.reason is Reason.CONTRACT
    await mount.unmount(Reason.OPERATOR, lazy=False)
    await gone(mount)


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
    monkeypatch.setattr(mounts, "SHIM_SILENCE", 5)
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
    with trio.fail_after(8):
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
    with trio.fail_after(5):
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
    await trio.sleep(0.4)
    await mount.unmount(Reason.OPERATOR, lazy=False)
    await gone(mount)
    assert len(caplog.records) < 150
    assert any("lines more were not logged" in record.getMessage() for record in caplog.records)


async def test_children_are_started_by_the_thread_that_lasts(stage: Stage) -> None:
    mount = await stage.mounted()
    own = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert {str(mount.shim.pid), str(mount.driver.pid)} <= set(own)
    await mount.unmount(Reason.OPERATOR, lazy=False)
    await gone(mount)
