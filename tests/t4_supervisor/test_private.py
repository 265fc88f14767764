"""The supervisor of one mount: in the foreground, in the background, and all the ways in which it is ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real import ROOT, is_alive, mounted_at, needs_fuse, start_private, wait_for

from udf.supervisor import launch, sockets
from udf.supervisor.client import Connection, ControlError

pytestmark = needs_fuse

_LAUNCH = """
import json, sys
from udf.supervisor.launch import launch_private
print(json.dumps(launch_private(json.loads(sys.argv[1]))), flush=True)
"""


@pytest.fixture
def mnt(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


@pytest.fixture
def rundir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The machine's own: a background supervisor cannot be told another one."""
    monkeypatch.setattr(sockets, "rundir", lambda: Path("/run/udf"))
    return Path("/run/udf")


def connect_to(rundir: Path, pid: int) -> Connection:
    path = rundir / "mounts" / f"{pid}.sock"
    wait_for(path.exists)
    return Connection(path)


def supervisor_of(mnt: Path) -> tuple[Path, dict[str, Any]]:
    for path in sockets.private_sockets():
        with Connection(path) as connection:
            for row in connection.call("Status")["mounts"]:
                if row["mountpoint"] == str(mnt):
                    return path, {**row, "supervisor": connection.info["pid"]}
    raise AssertionError(f"no supervisor has {mnt}")


def foreground(tmp_path: Path, mnt: Path, **parameters: Any) -> subprocess.Popen[str]:
    request = {"driver": "hello", "mountpoint": str(mnt), **parameters}
    process = start_private(json.dumps(request), str(tmp_path / "run"))
    assert process.stdout is not None
    process.answer = process.stdout.readline()  # type: ignore[attr-defined]
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_in_the_foreground_a_signal_unmounts_and_ends_it(tmp_path: Path, mnt: Path, number: signal.Signals) -> None:
    process = foreground(tmp_path, mnt)
    assert (mnt / "hello.txt").read_text() == "Hello, world!\n"
    process.send_signal(number)
    _, log = process.communicate(timeout=30)
    assert process.returncode == 0
    assert mounted_at(mnt) is None
    assert f"{number.name}: unmounting" in log
    assert os.listdir(tmp_path / "run" / "mounts") == []
    assert os.listdir(tmp_path / "run" / "locks") == []


def test_in_the_foreground_an_unmount_ends_it(tmp_path: Path, mnt: Path) -> None:
    process = foreground(tmp_path, mnt)
    subprocess.run(["umount", str(mnt)], check=True)
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_mount_that_is_lost_ends_it_with_an_error(tmp_path: Path, mnt: Path) -> None:
    process = foreground(tmp_path, mnt)
    with connect_to(tmp_path / "run", process.pid) as connection:
        (row,) = connection.call("Status")["mounts"]
    os.kill(row["shim_pid"], signal.SIGKILL)
    _, log = process.communicate(timeout=30)
    assert process.returncode == 1
    assert mounted_at(mnt) is None
    assert "the shim was ended by SIGKILL" in log


def test_it_serves_its_own_mount_and_takes_no_others(tmp_path: Path, mnt: Path) -> None:
    process = foreground(tmp_path, mnt, options={"ro": ""})
    with connect_to(tmp_path / "run", process.pid) as connection:
        assert connection.info["private"] is True
        with pytest.raises(ControlError, match="serves one mount"):
            connection.call("Mount", driver="hello", mountpoint="/mnt")
        (row,) = connection.call("Status")["mounts"]
        assert row["options"] == {"ro": ""}
        connection.call("Unmount", name=row["name"])
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_refused_mount_is_one_sentence_and_an_exit_code(tmp_path: Path, mnt: Path) -> None:
    process = foreground(tmp_path, mnt, driver="nonesuch")
    _, log = process.communicate(timeout=30)
    assert process.returncode == 1
    assert log.startswith("udf: there is no driver named 'nonesuch'")
    assert log.count("\n") == 1
    assert os.listdir(tmp_path / "run" / "mounts") == []


def test_two_private_supervisors_do_not_mount_over_each_other(tmp_path: Path, mnt: Path) -> None:
    first, second = foreground(tmp_path, mnt), None
    second = foreground(tmp_path, mnt)
    _, log = second.communicate(timeout=30)
    assert second.returncode == 1
    assert "is a mountpoint already" in log
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=30)
    assert mounted_at(mnt) is None


def test_a_killed_one_leaves_no_mount_and_its_socket_is_cleared_away(tmp_path: Path, mnt: Path) -> None:
    process = foreground(tmp_path, mnt)
    with connect_to(tmp_path / "run", process.pid) as connection:
        (row,) = connection.call("Status")["mounts"]
    process.kill()
    process.communicate(timeout=30)
    wait_for(lambda: mounted_at(mnt) is None)
    wait_for(lambda: not is_alive(row["shim_pid"]) and not is_alive(row["driver_pid"]))
    assert os.listdir(tmp_path / "run" / "mounts")
    again = foreground(tmp_path, mnt)
    assert sorted(os.listdir(tmp_path / "run" / "mounts")) == [f"{again.pid}.sock", f"{again.pid}.sock.lock"]
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=30)


def test_in_the_background_it_goes_on_without_its_caller(mnt: Path, rundir: Path) -> None:
    caller = subprocess.run(
        [sys.executable, "-c", _LAUNCH, json.dumps({"driver": "hello", "mountpoint": str(mnt)})],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert json.loads(caller.stdout) == {"name": "mnt", "mountpoint": str(mnt)}
    assert caller.stderr == ""
    assert (mnt / "hello.txt").read_text() == "Hello, world!\n"
    path, row = supervisor_of(mnt)
    pid = row["supervisor"]
    assert os.getsid(pid) == pid  # no terminal's hang-up reaches it
    targets = {os.readlink(f"/proc/{pid}/fd/{number}") for number in (0, 1, 2)}
    assert targets == {"/dev/null"}
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert path.with_suffix(".log").read_text()
    os.kill(pid, signal.SIGHUP)
    with Connection(path) as connection:
        connection.call("Unmount", mountpoint=str(mnt))
    wait_for(lambda: not is_alive(pid))
    assert mounted_at(mnt) is None
    assert not path.exists()
    assert not path.with_suffix(".log").exists()


def test_in_the_background_sigterm_unmounts(mnt: Path, rundir: Path) -> None:
    launch.launch_private({"driver": "hello", "mountpoint": str(mnt)})
    _, row = supervisor_of(mnt)
    os.kill(row["supervisor"], signal.SIGTERM)
    wait_for(lambda: not is_alive(row["supervisor"]))
    assert mounted_at(mnt) is None


def test_in_the_background_a_refusal_is_told_to_the_caller(mnt: Path, rundir: Path) -> None:
    with pytest.raises(ControlError) as caught:
        launch.launch_private({"driver": "nonesuch", "mountpoint": str(mnt)})
    assert caught.value.name == "Refused"
    assert str(caught.value).startswith("there is no driver named 'nonesuch'")
    with pytest.raises(ControlError, match="cannot be understood"):
        launch.launch_private({"driver": "hello", "mountpoint": 3})
    with pytest.raises(ControlError, match="exited with status 1") as caught:
        launch.launch_private({"exec": "false {mountpoint}", "mountpoint": str(mnt)})
    assert caught.value.tree


def test_an_interrupted_launch_leaves_nothing(mnt: Path, rundir: Path) -> None:
    before = set(sockets.private_sockets())
    request = {"exec": "sh -c 'sleep 1000' {mountpoint}", "mountpoint": str(mnt)}
    caller = subprocess.Popen(
        [sys.executable, "-c", _LAUNCH, json.dumps(request)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    (path,) = wait_for(lambda: set(sockets.private_sockets()) - before)
    with Connection(path) as connection:
        events = connection.stream("Events")
        seen: list[Any] = []
        while not seen:
            seen += next(events)["events"]
        pid = connection.info["pid"]
        caller.send_signal(signal.SIGINT)
        caller.communicate(timeout=30)
        wait_for(lambda: not is_alive(pid))
    assert mounted_at(mnt) is None
    assert not path.exists()
