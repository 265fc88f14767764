"""A mount whose driver dies or hangs, with everything real: programs go on, and the commands tell what happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, mounts_below, wait_for_end

from .conftest import PATIENCE, Command, Daemon

KILLS = int(os.environ.get("UDF_TEST_KILLS", "8"))


@pytest.fixture(autouse=True)
def unmounted(daemon: Daemon, mountpoint: Path) -> Iterator[None]:
    yield
    if mounts_below(mountpoint):
        daemon.udf("umount", "-l", mountpoint)


class Events:
    """What the daemon tells as it happens."""

    def __init__(self, daemon: Daemon) -> None:
        self.process = subprocess.Popen(
            daemon.udf.argv("events", "-f", "--json"), stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event: dict[str, Any] = json.loads(line)
            if condition(event):
                return event
        raise AssertionError("the events ended")

    def generation(self, number: int) -> dict[str, Any]:
        """Until this generation serves."""
        return self.until(lambda event: event["kind"] == "mount" and event["figures"].get("generation") == number)

    def state(self, state: str) -> dict[str, Any]:
        return self.until(lambda event: event["kind"] == "mount" and event["state"] == state)


@pytest.fixture
def events(daemon: Daemon) -> Iterator[Events]:
    with Events(daemon) as following:
        yield following


def kill_driver(daemon: Daemon, number: signal.Signals = signal.SIGKILL) -> int:
    pid: int = daemon.udf.mounts()[0]["driver_pid"]
    os.kill(pid, number)
    return pid


def in_background(act: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


DRIVER = '''# /// udf
# kind = "fs"
# interface = 1
# class = "Tiny"
# ///
"""One file that never changes."""
import os
import time
import trio
from udf import Attr, FsDriver

AT_START


class Tiny(FsDriver):
    async def list(self, path):
        return ["file"]

    async def stat(self, path):
        AT_STAT
        if path not in ("/", "/file"):
            raise FileNotFoundError(path)
        return Attr("dir") if path == "/" else Attr(size=7)

    async def read(self, path, offset, size):
        return b"content"[offset : offset + size]
'''


def write_driver(tmp_path: Path, *, at_start: str = "pass", at_stat: str = "pass") -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(DRIVER.replace("AT_START", at_start).replace("AT_STAT", at_stat))
    path.chmod(0o644)
    return path


# ---- programs go on


@pytest.mark.parametrize("options", [(), ("-o", "deadline=5")])
def test_hello_is_read_while_its_driver_is_killed_again_and_again(
    daemon: Daemon, mountpoint: Path, events: Events, options: tuple[str, ...]
) -> None:
    daemon.udf.done("mount", "-t", "hello", *options, mountpoint)
    for generation in range(2, KILLS + 2):
        kill_driver(daemon)
        with pytest.raises(FileNotFoundError):
            os.stat(mountpoint / f"unknown-{generation}")  # never cached: asked of the new driver
        assert (mountpoint / "hello.txt").read_text() == "Hello, world!\n"
        assert events.generation(generation)["figures"]["pause_ms"] > 0
    row = daemon.udf.mounts()[0]
    assert (row["state"], row["generation"], row["restarts_left"]) == ("ACTIVE", KILLS + 1, 4)
    daemon.udf.done("umount", mountpoint)


@pytest.mark.parametrize("driver", ["passthrough", "memfs"])
def test_a_program_writes_and_reads_back_while_the_driver_is_killed(
    daemon: Daemon, mountpoint: Path, tmp_path: Path, events: Events, driver: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    if driver == "memfs" and durability_of(daemon, "memfs") == "none":
        pytest.skip("this memfs keeps its files in the process that dies")
    daemon.udf.done("mount", "-t", driver, *([source] if driver == "passthrough" else []), mountpoint)
    stop, problems, rounds = threading.Event(), list[str](), [0]

    def work() -> None:
        while not stop.is_set():
            name = mountpoint / f"file-{rounds[0] % 20}"
            data = os.urandom(9000)
            try:
                with open(name, "wb") as file:
                    file.write(data)
                os.rename(name, mountpoint / "renamed")
                if (mountpoint / "renamed").read_bytes() != data:
                    problems.append("other bytes than were written")
                os.unlink(mountpoint / "renamed")
            except OSError as error:
                problems.append(str(error))
            rounds[0] += 1

    worker = in_background(work)
    for generation in range(2, KILLS + 2):
        before = rounds[0]
        kill_driver(daemon)
        events.generation(generation)
        while rounds[0] < before + 2 and worker.is_alive():
            worker.join(0.01)
    stop.set()
    worker.join(PATIENCE)
    assert not worker.is_alive()
    assert problems == []
    assert daemon.udf.mounts()[0]["restarts_left"] == 4
    daemon.udf.done("umount", mountpoint)


def durability_of(daemon: Daemon, driver: str) -> str:
    drivers = json.loads(daemon.udf.done("drivers", "--json"))["drivers"]
    return str(next(row["durability"] for row in drivers if row["name"] == driver))


@pytest.mark.parametrize("whom", ["driver", "init", "anchor"])
def test_whichever_process_of_the_host_is_killed_it_is_replaced_and_nothing_of_it_stays(
    daemon: Daemon, mountpoint: Path, events: Events, whom: str
) -> None:
    daemon.udf.done("mount", "-t", "hello", mountpoint)
    driver = daemon.udf.mounts()[0]["driver_pid"]
    init = parent_of(driver)
    anchor = parent_of(init)
    os.kill({"driver": driver, "init": init, "anchor": anchor}[whom], signal.SIGKILL)
    events.generation(2)
    for pid in (driver, init, anchor):
        wait_for_end(pid)
    assert daemon.udf.mounts()[0]["restarts_left"] == 4
    daemon.udf.done("umount", mountpoint)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("PPid:")[1].split()[0])


@pytest.mark.parametrize("driver", ["hello", "memfs", "passthrough"])
def test_a_spare_is_the_next_driver(
    daemon: Daemon, mountpoint: Path, tmp_path: Path, events: Events, driver: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    arguments = [source] if driver == "passthrough" else []
    daemon.udf.done("mount", "-t", driver, "-o", "spare", *arguments, mountpoint)
    for generation in (2, 3):
        spare = None
        while spare is None:
            spare = daemon.udf.mounts()[0]["spare_pid"]
        kill_driver(daemon)
        with pytest.raises(FileNotFoundError):
            os.stat(mountpoint / f"unknown-{generation}")
        events.generation(generation)
        # It was known by its first process until the one that runs the driver was there.
        driver_pid = daemon.udf.mounts()[0]["driver_pid"]
        assert spare in (driver_pid, parent_of(driver_pid), parent_of(parent_of(driver_pid)))
    daemon.udf.done("umount", mountpoint)


def test_a_stopped_driver_under_load_is_replaced_in_its_deadline_and_going_on_changes_nothing(
    daemon: Daemon, mountpoint: Path, events: Events
) -> None:
    daemon.udf.done("mount", "-t", "hello", "-o", "deadline=3", mountpoint)
    pid = kill_driver(daemon, signal.SIGSTOP)
    with pytest.raises(FileNotFoundError):
        os.stat(mountpoint / "unknown")
    assert events.state("RECOVERING")["reason"] == "hung"
    wait_for_end(pid)  # SIGCONT has nobody to go to any more
    assert daemon.udf.mounts()[0]["generation"] == 2
    daemon.udf.done("umount", mountpoint)


# ---- quarantine, restart, crashes


@pytest.mark.parametrize("says_so", [True, False], ids=["says so", "silent"])
def test_a_driver_that_is_slow_is_replaced_unless_it_says_that_it_gets_on(
    daemon: Daemon, mountpoint: Path, tmp_path: Path, says_so: bool
) -> None:
    slow = "for _ in range(10 if path == '/slow' else 0): await trio.sleep(0.5); " + (
        "still_working()" if says_so else ""
    )
    driver = write_driver(tmp_path, at_start="from udf import still_working", at_stat=slow)
    daemon.udf.done("mount", "-t", driver, "-o", "deadline=2.5", mountpoint)
    done = subprocess.run(["stat", mountpoint / "slow"], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1
    row = daemon.udf.mounts()[0]
    if says_so:
        assert "No such file" in done.stderr
        assert row["generation"] == 1
    else:
        assert "Input/output error" in done.stderr, "a request at which driver after driver hangs is given up"
        assert row["generation"] == 3
    assert (mountpoint / "file").read_text() == "content"
    daemon.udf.done("umount", mountpoint)


def test_a_crash_loop_ends_in_quarantine_and_restart_brings_the_mount_back_with_its_open_files(
    daemon: Daemon, mountpoint: Path, tmp_path: Path, events: Events
) -> None:
    flag = tmp_path / "broken"
    driver = write_driver(tmp_path, at_start=f"if os.path.exists({str(flag)!r}):\n    raise ValueError('broken')")
    daemon.udf.done("mount", "-t", driver, mountpoint)
    with open(mountpoint / "file", "rb") as file:
        content = file.read()
        flag.touch()
        kill_driver(daemon)
        failed = events.state("FAILED")
        assert failed["reason"] == "quarantine"
        with pytest.raises(OSError, match="Input/output error"):
            os.stat(mountpoint / "unknown")
        file.seek(0)
        assert file.read() == content, "what is cached goes on"
        sentence = daemon.udf.refused("restart", mountpoint)
        assert "was not restarted" in sentence
        assert "broken" in sentence
        flag.unlink()
        daemon.udf.done("restart", mountpoint)
        row = daemon.udf.mounts()[0]
        assert (row["state"], row["restarts_left"]) == ("ACTIVE", 4)
        with pytest.raises(FileNotFoundError):
            os.stat(mountpoint / "unknown")
        file.seek(0)
        assert file.read() == content
    reports = json.loads(daemon.udf.done("crashes", "--json", mountpoint))["crashes"]
    assert [report["counted"] for report in reports][:6] == [False] + [True] * 5
    assert any("ValueError: broken" in line for line in reports[1]["output"])
    assert "quarantine" in daemon.udf.done("events")
    daemon.udf.done("umount", mountpoint)


def test_restart_of_an_active_mount_is_an_orderly_one(daemon: Daemon, mountpoint: Path) -> None:
    daemon.udf.done("mount", "-t", "hello", mountpoint)
    before = daemon.udf.mounts()[0]
    with (mountpoint / "hello.txt").open() as file:
        assert json.loads(daemon.udf.done("restart", "--json", mountpoint))["generation"] == 2
        assert file.read() == "Hello, world!\n"
    row = daemon.udf.mounts()[0]
    assert row["driver_pid"] != before["driver_pid"]
    assert row["shim_pid"] == before["shim_pid"]
    assert daemon.udf.done("crashes").strip() == "No driver has died."
    daemon.udf.done("umount", mountpoint)


def test_one_cursed_name_is_given_up_and_everything_else_goes_on(
    daemon: Daemon, mountpoint: Path, tmp_path: Path
) -> None:
    daemon.udf.done("mount", "-t", write_driver(tmp_path, at_stat="if path == '/cursed': os._exit(7)"), mountpoint)
    with pytest.raises(OSError, match="Input/output error"):
        os.stat(mountpoint / "cursed")
    with pytest.raises(FileNotFoundError):
        os.stat(mountpoint / "unknown")
    row = daemon.udf.mounts()[0]
    assert (row["state"], row["generation"], row["restarts_left"]) == ("ACTIVE", 3, 2)
    reports = json.loads(daemon.udf.done("crashes", "--json"))["crashes"]
    assert [report["status"] for report in reports] == [7, 7]
    assert reports[-1]["poison"] == ["LOOKUP /cursed"]
    text = daemon.udf.done("crashes", mountpoint)
    assert "the driver ended with exit status 7" in text
    assert "LOOKUP /cursed" in text
    assert " poison " in daemon.udf.done("events")
    daemon.udf.done("umount", mountpoint)


# ---- hung


def test_hung_names_who_waits_and_abort_lets_one_go(daemon: Daemon, mountpoint: Path, tmp_path: Path) -> None:
    assert daemon.udf.done("hung").strip() == "No request waits."
    started = tmp_path / "started"
    os.mkfifo(started)
    slow = f"if path == '/slow':\n            open({str(started)!r}, 'w').close()\n            await trio.sleep(600)"
    daemon.udf.done("mount", "-t", write_driver(tmp_path, at_stat=slow), mountpoint)
    with subprocess.Popen(["stat", str(mountpoint / "slow")], stderr=subprocess.PIPE, text=True) as waiting:
        with open(started, "rb"):  # opens when the driver has the request
            pass
        answer = json.loads(daemon.udf.done("hung", "--json", mountpoint))
        (request,) = answer["requests"]
        assert (request["op"], request["path"], request["parked"]) == ("LOOKUP", "/slow", False)
        assert (request["pid"], request["command"]) == (waiting.pid, "stat")
        assert "stat" in daemon.udf.done("hung")
        assert "no request 999999 waits" in daemon.udf.refused("hung", mountpoint, "--abort", "999999")
        daemon.udf.done("hung", mountpoint, "--abort", str(request["id"]))
        assert waiting.stderr is not None
        assert "Input/output error" in waiting.stderr.read()
    assert "on which mount" in daemon.udf.refused("hung", "--abort", "1")
    daemon.udf.done("umount", mountpoint)


@pytest.mark.parametrize("command", ["restart", "hung", "crashes"])
def test_what_is_not_mounted_is_told_in_one_sentence(daemon: Daemon, tmp_path: Path, command: str) -> None:
    sentence = daemon.udf.refused(command, tmp_path)
    assert "is not a mount of udf" in sentence


def test_a_mount_without_a_daemon_is_replaced_restarted_and_asked_just_the_same(
    no_system_daemon: None, mountpoint: Path
) -> None:
    udf = Command()
    udf.done("mount", "-t", "hello", mountpoint)
    row = next(row for row in udf.mounts() if row["mountpoint"] == str(mountpoint))
    os.kill(row["driver_pid"], signal.SIGKILL)
    with pytest.raises(FileNotFoundError):
        os.stat(mountpoint / "unknown")
    assert json.loads(udf.done("restart", "--json", mountpoint))["generation"] == 3
    (report,) = json.loads(udf.done("crashes", "--json", mountpoint))["crashes"]
    assert (report["signal"], report["counted"]) == ("SIGKILL", False)
    assert json.loads(udf.done("hung", "--json", mountpoint))["requests"] == []
    udf.done("umount", mountpoint)


def test_status_shows_generation_restarts_left_and_durability(daemon: Daemon, mountpoint: Path, tmp_path: Path) -> None:
    daemon.udf.done("mount", "-t", write_driver(tmp_path, at_stat="if path == '/x': os._exit(3)"), mountpoint)
    heading, line = daemon.udf.done("status").splitlines()
    assert "GENERATION  RESTARTS LEFT  DURABILITY" in heading
    assert line.split()[4:7] == ["1", "4", "source"]
    with pytest.raises(OSError, match="Input/output error"):
        os.stat(mountpoint / "x")
    (line,) = daemon.udf.done("status").splitlines()[1:]
    assert line.split()[4:7] == ["3", "2", "source"]
    daemon.udf.done("umount", mountpoint)


# ---- unmount without a driver


@pytest.mark.parametrize("lazy", [False, True])
def test_an_unmount_without_a_driver_does_not_wait_for_one(
    daemon: Daemon, mountpoint: Path, tmp_path: Path, events: Events, lazy: bool
) -> None:
    flag = tmp_path / "slow"
    driver = write_driver(tmp_path, at_start=f"if os.path.exists({str(flag)!r}):\n    time.sleep(600)")
    daemon.udf.done("mount", "-t", driver, mountpoint)
    os.listdir(mountpoint)
    flag.touch()
    kill_driver(daemon)
    events.state("RECOVERING")
    parked = subprocess.Popen(["stat", str(mountpoint / "unknown")], stderr=subprocess.DEVNULL)
    assert daemon.udf.mounts()[0]["state"] == "RECOVERING"
    assert os.statvfs(mountpoint) is not None
    if lazy:
        daemon.udf.done("umount", "-l", mountpoint)
    else:
        parked.kill()  # a request that waits holds the mount, as it would with a driver
        parked.wait(PATIENCE)
        daemon.udf.done("umount", mountpoint)
    assert mounts_below(mountpoint) == []
    parked.kill()
    parked.wait(PATIENCE)
    assert daemon.stop() == 0


def test_a_daemon_ends_in_order_while_a_mount_has_no_driver(
    daemon: Daemon, mountpoint: Path, tmp_path: Path, events: Events
) -> None:
    daemon.udf.done("mount", "-t", write_driver(tmp_path), mountpoint)
    write_driver(tmp_path, at_start="time.sleep(600)")
    kill_driver(daemon)
    events.state("RECOVERING")
    assert daemon.stop(signal.SIGTERM) == 0
    assert mounts_below(mountpoint) == []
