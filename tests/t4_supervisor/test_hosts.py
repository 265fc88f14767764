"""Real driver hosts under a real zygote: starts, deaths, and what is left when any of it is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from real import PATIENCE, ROOT, children_named, is_alive, wait_for

from udf import messages
from udf.supervisor import oom, spawn, zygote
from udf.supervisor.bell import Bell
from udf.supervisor.child import Host as HostChild
from udf.supervisor.instance import EventLog, Instance
from udf.supervisor.process import Process
from udf.supervisor.zygote import Zygote

DRIVERS = ROOT / "tests" / "t2_host" / "drivers"
ENVIRONMENT = {**spawn.daemon_environment(os.environ, "/", "root"), "MARK": "mine"}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


class Running:
    """One host, as a mount has it."""

    def __init__(self, bell: Bell) -> None:
        self.bell = bell
        self.process = Process(Instance("m", "driver", EventLog()), messages.decode_from_host, bell.ring)
        self.heard: dict[type, Any] = {}
        self.link, self._theirs = spawn.link_pair()

    def on_message(self, message: messages.FromHost, _fds: list[int]) -> None:
        self.heard[type(message)] = message
        if isinstance(message, messages.Started):
            # One that exits at once may be gone before its first word is read.
            assert self.process.adopt_worker(message.pid) or not os.path.exists(f"/proc/{message.pid}/exe")
        self.bell.ring()

    async def start(self, nursery: trio.Nursery, class_name: str = "Plain", **sandbox: Any) -> None:
        limits = {"uid": os.geteuid(), "gid": os.getegid(), "keep_paths": [str(ROOT)], **sandbox}
        driver = messages.DriverSpec(path=str(DRIVERS / "odd_starts.py"), class_name=class_name)
        self.process.start(lambda control, output: spawn.start_host("m", control, output, ENVIRONMENT))
        nursery.start_soon(self.process.run, self.on_message, nursery)
        with self._theirs:
            start = messages.Start(name="m", driver=driver, sandbox=messages.Sandbox(**limits), heartbeat=0.1)
            await self.process.send(start, [self._theirs.fileno()])

    async def ready(self) -> int:
        """The driver's pid."""
        await self.until(lambda: messages.Ready in self.heard or self.process.over)
        assert messages.Ready in self.heard, (self.heard, self.process.how())
        pid = self.heard[messages.Started].pid
        assert isinstance(pid, int)
        return pid

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(PATIENCE):
            await self.bell.until(condition)

    async def end(self) -> None:
        self.link.close()
        if not self.process.over:
            assert await self.process.end(0)
        await self.until(lambda: self.process.over)
        self.process.abandon()


@contextlib.asynccontextmanager
async def a_zygote() -> AsyncIterator[Zygote]:
    """A zygote with one fork that stands by; nothing of it is left afterwards."""
    found = spawn.new_zygote()
    async with trio.open_nursery() as nursery, trio.open_nursery() as inner:
        inner.start_soon(found.run, nursery)
        await stands_by(found)
        yield found
        inner.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def hosts(*class_names: str, **sandbox: Any) -> AsyncIterator[list[Running]]:
    """Hosts that are ready."""
    found = [Running(Bell()) for _ in class_names]
    async with trio.open_nursery() as nursery:
        try:
            for each, class_name in zip(found, class_names, strict=True):
                await each.start(nursery, class_name, **sandbox)
            for each in found:
                await each.ready()
            yield found
        finally:
            with trio.CancelScope(shield=True):
                for each in found:
                    await each.end()


async def stands_by(found: Zygote) -> int:
    """Wait for a fork that stands by; its pid."""
    with trio.fail_after(PATIENCE):
        while not found.standing:
            await trio.sleep(0.005)
    return found.standing[0]


def family(pid: int) -> set[int]:
    found: set[int] = set()
    pending = [pid]
    while pending:
        for task in Path(f"/proc/{pending.pop()}/task").glob("*/children"):
            children = {int(child) for child in task.read_text().split()}
            found |= children
            pending += children
    return found


async def test_a_host_is_the_fork_that_stood_by_and_another_one_follows() -> None:
    async with a_zygote() as found:
        fork = await stands_by(found)
        async with hosts("Plain") as (host,):
            assert isinstance(host.process.child, HostChild)
            assert host.process.child.pid == fork
            assert host.process.instance.pid == host.heard[messages.Started].pid
            assert await stands_by(found) != fork


async def test_without_a_zygote_hosts_are_executed() -> None:
    async with hosts("Plain") as (host,):
        assert host.process.child is not None
        assert b"udf.host.zygote" not in Path(f"/proc/{host.process.child.pid}/cmdline").read_bytes()


async def test_an_environment_that_an_interpreter_reads_at_its_start_gets_an_interpreter() -> None:
    async with a_zygote() as found:
        ours, theirs = spawn.control_pair()
        with ours, theirs:
            assert found.take("m", theirs, 2, {"PYTHONHASHSEED": "7"}) is None
            assert found.take("m", theirs, 2, {"X": "x" * messages.MAX_MESSAGE}) is None
            assert found.take("m", theirs, 2, {"X": "\udc80"}) is None
        assert found.standing


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGSTOP])
async def test_a_zygote_that_is_ended_or_stopped_is_replaced_and_no_start_fails(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zygote, "ANSWER_TIMEOUT", 2.0)
    async with a_zygote() as found:
        first = found.pid
        assert first is not None
        os.kill(first, number)
        async with hosts("Plain", "Plain", "Plain"):  # the fork that stood by, and two without
            pass
        with trio.fail_after(PATIENCE):
            while found.pid in (None, first):
                await trio.sleep(0.005)
        await stands_by(found)


async def test_a_zygote_that_cannot_be_started_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn.sys, "executable", "/bin/false")
    found = spawn.new_zygote()
    async with trio.open_nursery() as reaper, trio.open_nursery() as nursery:
        nursery.start_soon(found.run, reaper)
        with trio.fail_after(PATIENCE):
            while found.lives < 2:
                await trio.sleep(0.005)
        monkeypatch.undo()
        async with hosts("Plain"):
            pass
        nursery.cancel_scope.cancel()


async def test_a_fork_that_is_killed_while_it_stands_by_is_replaced() -> None:
    async with a_zygote() as found:
        fork = await stands_by(found)
        os.kill(fork, signal.SIGKILL)
        wait_for(lambda: not is_alive(fork))  # without letting our loop see it
        async with hosts("Plain", "Plain"):
            assert await stands_by(found) != fork
        assert not is_alive(fork)


async def test_the_tree_of_a_fork_may_be_killed_while_it_stands_by() -> None:
    async with a_zygote() as found:
        for pid in family(await stands_by(found)):
            os.kill(pid, signal.SIGKILL)
        running = Running(Bell())
        async with trio.open_nursery() as nursery:
            await running.start(nursery)
            await running.until(lambda: running.process.over or messages.Ready in running.heard)
            await running.end()
        async with hosts("Plain"):
            pass


async def test_fifty_hosts_at_once() -> None:
    async with a_zygote(), hosts(*["Plain"] * 50) as found:
        assert len({host.heard[messages.Started].pid for host in found}) == 50
        assert all(host.process.dead is False for host in found)


@pytest.mark.parametrize("namespaces", [True, False])
async def test_a_killed_driver_is_dead_when_all_that_it_started_is(namespaces: bool) -> None:
    async with a_zygote(), hosts("Parent", namespaces=namespaces) as (host,):
        child = host.process.child
        assert child is not None
        everyone = family(child.pid)
        assert len(everyone) >= 3
        os.kill(host.heard[messages.Started].pid, signal.SIGKILL)
        await host.until(lambda: host.process.dead)
        assert not [pid for pid in everyone if is_alive(pid)]
        assert host.process.status == -signal.SIGKILL
        assert host.process.max_rss > 5000
        assert not host.process.oom_killed
        assert host.process.how().startswith("was ended by SIGKILL")


@pytest.mark.parametrize("namespaces", [True, False])
async def test_kill_leaves_nothing(namespaces: bool) -> None:
    async with hosts("Parent", namespaces=namespaces) as (host,):
        child = host.process.child
        assert child is not None
        everyone = family(child.pid)
        host.process.kill()
        await host.until(lambda: host.process.dead)
        assert not [pid for pid in everyone if is_alive(pid)]
        await host.until(lambda: host.process.over)


async def test_a_host_whose_anchor_was_killed_is_dead_when_its_driver_is() -> None:
    async with a_zygote(), hosts("Parent") as (host,):
        child = host.process.child
        assert child is not None
        everyone = family(child.pid)
        child.signal(signal.SIGKILL)
        await host.until(lambda: host.process.dead)
        assert not [pid for pid in everyone if is_alive(pid)]
        assert host.process.status == -signal.SIGKILL


async def test_a_driver_that_exits_tells_how() -> None:
    async with a_zygote(), trio.open_nursery() as nursery:
        host = Running(Bell())
        await host.start(nursery, "HardExitAtStart")
        await host.until(lambda: host.process.dead)
        assert host.process.status == 7
        await host.end()


async def test_a_stopped_tree_is_ended() -> None:
    async with a_zygote(), hosts("Plain") as (host,):
        child = host.process.child
        assert child is not None
        for pid in [child.pid, *family(child.pid)]:
            os.kill(pid, signal.SIGSTOP)
        host.process.kill()
        await host.until(lambda: host.process.dead)  # the anchor, which is stopped, is not waited for
        child.signal(signal.SIGKILL)


def test_nothing_of_a_zygote_outlives_a_killed_supervisor() -> None:
    code = (
        "import trio; from udf.supervisor import spawn\n"
        "async def main():\n"
        "    zygote = spawn.new_zygote()\n"
        "    async with trio.open_nursery() as nursery:\n"
        "        nursery.start_soon(zygote.run, nursery)\n"
        "        while not zygote.standing: await trio.sleep(0.005)\n"
        "        print('up', flush=True); await trio.sleep_forever()\n"
        "trio.run(main)"
    )
    supervisor = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert supervisor.stdout is not None
    with supervisor.stdout:
        assert supervisor.stdout.readline() == b"up\n"
        assert len(children_named(supervisor.pid, "udf-zygote", "udf-standby")) == 2
        pidfds = [os.pidfd_open(pid) for pid in family(supervisor.pid)]
        supervisor.kill()
        supervisor.wait()

    async def all_end() -> None:
        with trio.fail_after(PATIENCE):
            for pidfd in pidfds:
                await trio.lowlevel.wait_readable(pidfd)
                os.close(pidfd)

    trio.run(all_end)


# ---- memory


@pytest.fixture
def memory_limit() -> Any:
    """A memory cgroup of 128 MiB; its `cgroup.procs`."""
    for base, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(base, f"udf-test-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(128 << 20))
            yield group / "cgroup.procs"
            return
        except FileNotFoundError:
            continue
        finally:
            group.rmdir()
    pytest.skip("no memory cgroup can be made here")


@needs_root
async def test_a_driver_that_ran_out_of_memory_is_told_from_one_that_was_killed(memory_limit: Path) -> None:
    async with a_zygote(), hosts("Hungry") as (host,):
        driver = host.heard[messages.Started].pid
        memory_limit.write_text(str(driver))
        before = oom.kills()
        os.kill(driver, signal.SIGUSR1)
        await host.until(lambda: host.process.dead)
        assert host.process.status == -signal.SIGKILL
        assert before is not None
        assert oom.kills() > before
        assert host.process.oom_killed
        assert host.process.max_rss > 100_000


@needs_root
def test_in_a_pid_namespace_the_numbers_of_the_kernels_log_are_not_ours() -> None:
    """In a container an out-of-memory death passed for a kill from outside: the driver was replaced for ever."""
    code = "from udf.supervisor import oom; print(oom.was_killed(1, 5, 6))"
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]
    assert subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout == b"True\n"


def test_a_kill_is_not_the_oom_killers_when_it_counts_none() -> None:
    assert not oom.was_killed(1, 5, 5)
    assert not oom.was_killed(1, None, 5)
    assert not oom.was_killed(1, 5, None)
