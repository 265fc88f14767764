"""Mounting, looking on and unmounting as a user does it, with a daemon and without."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import ROOT, mounts_below, wait_for_end

from .conftest import Command, Daemon


@pytest.fixture(params=["daemon", "private"])
def udf(request: pytest.FixtureRequest) -> Command:
    """Every test here runs twice: asked of a daemon, and by a supervisor of the mount's own."""
    if request.param == "daemon":
        daemon: Daemon = request.getfixturevalue("daemon")
        return daemon.udf
    request.getfixturevalue("no_system_daemon")
    return Command()


def row_of(udf: Command, mountpoint: Path) -> dict[str, object]:
    rows = [row for row in udf.mounts() if row["mountpoint"] == str(mountpoint)]
    assert len(rows) == 1
    return dict(rows[0])


def test_mount_is_used_shown_and_unmounted(udf: Command, mountpoint: Path) -> None:
    assert udf.done("mount", "-t", "hello", mountpoint) == ""
    assert (mountpoint / "hello.txt").read_text() == "Hello, world!\n"
    row = row_of(udf, mountpoint)
    assert (row["state"], row["driver"], row["source"]) == ("ACTIVE", "hello", None)
    counters = row["counters"]
    assert isinstance(counters, dict)
    assert counters["requests"] >= counters["driver_round_trips"] > 0
    text = udf.done("status")
    assert "ACTIVE" in text
    assert str(mountpoint) in text
    assert udf.done("umount", mountpoint) == ""
    assert mounts_below(mountpoint) == []
    for pid in (row["shim_pid"], row["driver_pid"]):
        assert isinstance(pid, int)
        wait_for_end(pid)


def test_answers_are_json_when_asked_for(udf: Command, mountpoint: Path) -> None:
    answer = json.loads(udf.done("mount", "-t", "hello", mountpoint, "--json"))
    assert answer == {"name": mountpoint.name, "mountpoint": str(mountpoint)}
    assert json.loads(udf.done("umount", mountpoint, "--json")) == {"mountpoint": str(mountpoint)}
    names = [driver["name"] for driver in json.loads(udf.done("drivers", "--json"))["drivers"]]
    assert {"hello", "memfs", "passthrough"} <= set(names)


def test_mountpoint_may_be_spelt_in_any_way(udf: Command, mountpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(mountpoint)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    udf.done("mount", "-t", "hello", "link", cwd=tmp_path, env=environment)
    assert mounts_below(mountpoint) == [str(mountpoint)]
    udf.done("umount", f"./{mountpoint.name}/", cwd=tmp_path, env=environment)
    assert mounts_below(mountpoint) == []


def test_driver_is_guessed_where_only_one_takes_the_source(udf: Command, mountpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("content")
    udf.done("mount", source, mountpoint, "-o", "ro")
    assert (mountpoint / "file").read_text() == "content"
    with pytest.raises(OSError, match="Read-only"):
        (mountpoint / "new").touch()
    assert row_of(udf, mountpoint)["driver"] == "passthrough"
    udf.done("umount", mountpoint)
    assert "-t" in udf.refused("mount", "https://example.org/x", mountpoint)


def test_lazy_unmount_serves_open_files_to_their_end(udf: Command, mountpoint: Path) -> None:
    udf.done("mount", "-t", "hello", mountpoint)
    row = row_of(udf, mountpoint)
    with (mountpoint / "hello.txt").open() as file:
        assert f"({os.getpid()})" in udf.refused("umount", mountpoint)
        udf.done("umount", "-l", mountpoint)
        assert mounts_below(mountpoint) == []
        assert file.read() == "Hello, world!\n"
    assert isinstance(row["shim_pid"], int)
    wait_for_end(row["shim_pid"])


def test_events_tell_the_life_of_a_mount(udf: Command, mountpoint: Path) -> None:
    udf.done("mount", "-t", "hello", mountpoint)
    events = [json.loads(line) for line in udf.done("events", "--json").splitlines()]
    states = [event["state"] for event in events if event["kind"] == "mount" and event["name"] == mountpoint.name]
    assert states == ["STARTING", "ACTIVE"]
    assert "STARTING → ACTIVE" in udf.done("events")
    udf.done("umount", mountpoint)


def test_trace_shows_requests_until_the_mount_ends(udf: Command, mountpoint: Path) -> None:
    udf.done("mount", "-t", "hello", mountpoint)
    with subprocess.Popen(udf.argv("trace", mountpoint), stdout=subprocess.PIPE) as trace:
        assert trace.stdout is not None
        assert trace.stdout.readline().split()[:2] == [b"TIME", b"OP"]
        shown, number = b"", 0
        while b"absent-" not in shown:  # tracing begins a moment after the heading
            number += 1
            assert not (mountpoint / f"absent-{number}").exists()
            if select.select([trace.stdout], [], [], 0.5)[0]:
                shown += os.read(trace.stdout.fileno(), 65536)
        assert b"LOOKUP" in shown
        udf.done("umount", mountpoint)
        trace.stdout.read()
        assert trace.wait() == 0


def test_two_shells_mount_and_unmount_the_same_place_at_once(udf: Command, mountpoint: Path) -> None:
    """Of two mounts one wins, of two unmounts at least one; never two mounts, never a half one."""
    for _ in range(5):
        with ThreadPoolExecutor(2) as shells:
            results = list(shells.map(lambda _: udf("mount", "-t", "hello", mountpoint), range(2)))
            assert sorted(r.returncode for r in results) == [0, 1], results
            assert mounts_below(mountpoint) == [str(mountpoint)]
            assert (mountpoint / "hello.txt").read_text() == "Hello, world!\n"
            results = list(shells.map(lambda _: udf("umount", mountpoint), range(2)))
            assert 0 in [r.returncode for r in results], results
            assert all("Traceback" not in r.stderr for r in results), results
        assert mounts_below(mountpoint) == []


def test_mount_while_another_shell_unmounts(udf: Command, mountpoint: Path) -> None:
    """Whoever wins, the mount is there in full or not at all."""
    for _ in range(5):
        udf.done("mount", "-t", "hello", mountpoint)
        with ThreadPoolExecutor(2) as shells:
            gone = shells.submit(udf, "umount", mountpoint)
            again = shells.submit(udf, "mount", "-t", "hello", mountpoint)
            assert gone.result().returncode == 0, gone.result()
        if again.result().returncode == 0:
            assert (mountpoint / "hello.txt").read_text() == "Hello, world!\n"
            udf.done("umount", mountpoint)
        assert mounts_below(mountpoint) == []


def test_mount_helper_takes_what_mount_gives_it(udf: Command, mountpoint: Path, tmp_path: Path) -> None:
    """As mount(8) calls it for `mount -t fuse.udfd -o driver=hello,x-a=b none MOUNTPOINT`."""
    wrapper = tmp_path / "udf"
    at = f" --socket {udf.socket}" if udf.socket else ""
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -m udf "$@"{at}\n')
    wrapper.chmod(0o755)
    helper = ROOT / "packaging" / "mount.fuse.udfd"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def mount(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(helper), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    result = mount("none", str(mountpoint), "-o", "rw,noauto,driver=hello,x-a=b,noexec")
    assert (result.returncode, result.stderr) == (0, "")
    assert (mountpoint / "hello.txt").read_text() == "Hello, world!\n"
    assert "noexec" in Path("/proc/self/mountinfo").read_text().split(str(mountpoint))[1].split(" - ")[0]
    udf.done("umount", mountpoint)
    assert mount("none", str(mountpoint), "-f", "-o", "driver=hello").returncode == 0
    assert mounts_below(mountpoint) == []
    assert mount("none", str(mountpoint), "-o", "driver=nosuch").returncode == 1
    assert mount("none").returncode == 1


def test_umount_helper_waits_and_leaves_the_rest_to_the_kernel(udf: Command, mountpoint: Path, tmp_path: Path) -> None:
    """As umount(8) calls it for a mount of type fuse.udfd."""
    wrapper = tmp_path / "udf"
    at = f" --socket {udf.socket}" if udf.socket else ""
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -m udf "$@"{at}\n')
    wrapper.chmod(0o755)
    helper = ROOT / "packaging" / "umount.fuse.udfd"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def umount(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(helper), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    udf.done("mount", "-t", "hello", mountpoint)
    with (mountpoint / "hello.txt").open("rb"):
        said = umount(str(mountpoint))
        assert said.returncode == 1
        assert "is in use by python" in said.stderr
    assert umount(str(mountpoint), "-n").returncode == 0
    assert mounts_below(mountpoint) == []
    assert umount(str(mountpoint)).returncode != 0
    assert umount().returncode == 1
