"""What a driver's process has and is: as little as its manifest asks for, and nothing outlives the supervisor.

All of it twice: for a host in an interpreter of its own, and for one that was forked from a zygote.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_for_end
from tests.t2_host.peer import REPO, Host
from tests.t2_host.peer import host as make_host
from udf.host import capabilities

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become someone else")


@pytest.fixture(params=[False, True], ids=["executed", "forked"], autouse=True)
def forked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(Host, "forked", request.param)
    return bool(request.param)


@pytest.fixture
def host(forked: bool) -> Iterator[Host]:
    with make_host() as peer:
        yield peer


def report_of(host: Host, drivers: Path, class_name: str = "Reports", **fields: object) -> list[str]:
    """What the driver says of itself."""
    host.start(drivers / "odd_starts.py", class_name, **fields)
    host.ready()
    host.link.init()
    node = host.link.lookup("file")["nodeid"]
    return host.link.read(node, host.link.open(node), size=100_000).decode().splitlines()


def status_of(report: list[str], key: str) -> str:
    return next(line.partition(":")[2].strip() for line in report if line.startswith(key + ":"))


def test_a_driver_without_capabilities_has_none_and_gains_none(host: Host, drivers: Path) -> None:
    report = report_of(host, drivers)
    assert status_of(report, "NoNewPrivs") == "1"
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status_of(report, name), 16) == 0, name


@needs_root
def test_every_process_of_a_host_has_lost_its_rights(host: Host, drivers: Path) -> None:
    report_of(host, drivers)
    anchor = host.process.pid
    init = int(Path(f"/proc/{anchor}/task/{anchor}/children").read_text())
    driver = int(Path(f"/proc/{init}/task/{init}/children").read_text())
    assert driver == host.driver_pid()
    for pid in (anchor, init, driver):
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        assert status_of(status, "NoNewPrivs") == "1"
        for name in ("CapPrm", "CapEff", "CapBnd", "CapInh"):
            assert int(status_of(status, name), 16) == 0, (pid, name)


@needs_root
@pytest.mark.parametrize("uid", [0, NOBODY])
def test_capabilities_of_the_manifest_are_kept_and_only_those(drivers: Path, uid: int) -> None:
    names = ["CAP_CHOWN", "CAP_DAC_OVERRIDE"]
    with make_host(sandbox_user=uid) as host:
        report = report_of(host, drivers, sandbox={"capabilities": names})
        for name in ("CapPrm", "CapEff", "CapBnd"):
            assert int(status_of(report, name), 16) == capabilities.mask(names), name


@needs_root
def test_a_driver_runs_as_its_sandbox_says(drivers: Path) -> None:
    with make_host(sandbox_user=NOBODY) as host:
        report = report_of(host, drivers, sandbox={"groups": [12, 34]})
    assert status_of(report, "Uid").split() == [str(NOBODY)] * 4
    assert status_of(report, "Gid").split() == [str(NOBODY)] * 4
    assert status_of(report, "Groups").split() == ["12", "34"]


def test_a_driver_has_no_descriptor_but_its_own(host: Host, drivers: Path) -> None:
    report = report_of(host, drivers)
    kinds = [line.split(" ", 2)[2].split(":")[0] for line in report if line.startswith("fd ")]
    assert kinds[:3] == ["/dev/null", "pipe", "pipe"]
    # The link, the control socket, and what trio needs (epoll, a pair to be woken by).
    assert sorted(kind for kind in kinds[3:] if kind not in ("/proc/1/fd",))[:1] == ["anon_inode"]
    assert set(kinds[3:]) <= {"socket", "anon_inode", "pipe"} | {kind for kind in kinds if kind.startswith("/proc/")}
    assert len(kinds) <= 16


def test_descriptors_of_the_supervisor_stay_with_it(drivers: Path, tmp_path: Path) -> None:
    secret = os.open(tmp_path / "secret", os.O_CREAT | os.O_RDWR)
    os.set_inheritable(secret, True)
    try:
        with make_host() as host:
            assert not any("secret" in line for line in report_of(host, drivers))
    finally:
        os.close(secret)


@needs_root
def test_mounts_and_processes_are_the_drivers_own(host: Host, drivers: Path) -> None:
    report = report_of(host, drivers)
    for name in ("mnt", "pid"):
        inside = next(line.split()[2] for line in report if line.startswith(f"ns {name} "))
        assert inside != os.readlink(f"/proc/self/ns/{name}")
    assert next(line for line in report if line.startswith("processes ")) == "processes 1 2"


def test_limits_and_the_rest(host: Host, drivers: Path) -> None:
    report = report_of(host, drivers, sandbox={"nofile": 123})
    assert "umask 0" in report
    assert next(line.split()[3] for line in report if line.startswith("Max open files")) == "123"
    assert next(line.split()[4] for line in report if line.startswith("Max core file size")) == "0"
    assert int(next(line.split()[1] for line in report if line.startswith("oom "))) >= 300


def test_sources_under_a_kept_path_stay_visible(host: Host, drivers: Path, tmp_path: Path) -> None:
    report = report_of(host, drivers, sandbox={"keep_paths": [str(REPO), str(tmp_path)]})
    assert not [line for line in report if line.startswith("mount ") and " - fuse" in line]


@needs_root
def test_nothing_survives_a_killed_supervisor(drivers: Path, forked: bool) -> None:
    """The supervisor here is a process of its own: it starts a host that has children, and is killed."""
    code = (
        "import sys, time; from tests.t2_host.peer import Host\n"
        f"Host.forked = {forked}; host = Host()\n"
        f"host.start({str(drivers / 'odd_starts.py')!r}, 'Parent')\n"
        "host.ready(); print(host.process.pid, host.driver_pid(), flush=True); time.sleep(100)"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert supervisor.stdout is not None
    with supervisor.stdout:
        anchor, driver = map(int, supervisor.stdout.readline().split())
        family = {anchor, driver, *descendants(anchor)}
        assert len(family) >= 4, "the anchor, init, the driver, its child"
        supervisor.kill()
        supervisor.wait()
    for pid in family:
        wait_for_end(pid)


@pytest.mark.parametrize("namespaces", [True, False])
def test_nothing_survives_a_killed_driver(drivers: Path, namespaces: bool) -> None:
    with make_host() as host:
        host.start(drivers / "odd_starts.py", "Parent", sandbox={"namespaces": namespaces})
        driver = host.driver_pid()
        host.ready()
        family = descendants(host.process.pid)
        while len(family) < 4:  # init, the driver, its child, its grandchild in another session
            family = descendants(host.process.pid)
        os.kill(driver, signal.SIGKILL)
        assert host.wait() == -signal.SIGKILL
        for pid in family:
            wait_for_end(pid)


@needs_root
@pytest.mark.parametrize("namespaces", [True, False])
@pytest.mark.parametrize("uid", [0, NOBODY])
def test_nothing_survives_a_killed_anchor(drivers: Path, namespaces: bool, uid: int) -> None:
    """A change of the user clears the parent-death signal: it is armed again after each."""
    with make_host(sandbox_user=uid) as host:
        host.start(drivers / "odd_starts.py", "Plain", sandbox={"namespaces": namespaces})
        host.ready()
        family = descendants(host.process.pid)
        host.process.kill()
        for pid in family:
            wait_for_end(pid)


@needs_root
def test_a_user_can_run_a_driver_without_root(drivers: Path) -> None:
    with make_host(user=NOBODY) as host:
        report = report_of(host, drivers)
        assert int(status_of(report, "CapEff"), 16) == 0
        assert int(status_of(report, "CapBnd"), 16) == 0 or "no namespaces" in host.text()
        assert status_of(report, "Uid").split()[0] == str(NOBODY)
        host.process.terminate()
        assert host.wait() == 0


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    pending = [pid]
    while pending:
        try:
            children = Path(f"/proc/{(own := pending.pop())}/task/{own}/children").read_text().split()
        except OSError:
            continue
        pending += map(int, children)
        found |= set(map(int, children))
    return found


def test_an_author_cannot_tell_whether_a_host_was_forked(drivers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for forked in (False, True):
        monkeypatch.setattr(Host, "forked", forked)
        with make_host() as host:
            host.start(drivers / "odd_starts.py", "Surroundings")
            host.ready()
            host.link.init()
            node = host.link.lookup("file")["nodeid"]
            found.append(json.loads(host.link.read(node, host.link.open(node), size=100_000)))
    executed, forked_one = found
    assert executed["environment"]["PYTHONPATH"] == str(REPO)
    assert executed == forked_one
