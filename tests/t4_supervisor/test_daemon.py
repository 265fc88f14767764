"""`udf daemon` with real shims, hosts and mounts."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real import Daemon, idle_children, is_alive, mounted_at, needs_fuse, wait_for

from udf.supervisor.client import Connection, ControlError, NoSupervisorError

pytestmark = needs_fuse


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    running = Daemon(tmp_path)
    yield running
    assert running.stop() == 0


@pytest.fixture
def mnt(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


def sentence(daemon: Daemon, mountpoint: Path, driver: str = "hello", **parameters: object) -> str:
    with pytest.raises(ControlError) as caught:
        daemon.mount(mountpoint, driver, **parameters)
    text = str(caught.value)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


def test_a_file_is_read_through_daemon_shim_and_driver(daemon: Daemon, mnt: Path) -> None:
    assert daemon.mount(mnt) == {"name": "mnt", "mountpoint": str(mnt)}
    assert (mnt / "hello.txt").read_text() == "Hello, world!\n"
    row = daemon.status(mnt)
    assert (row["state"], row["driver"], row["generation"], row["uid"]) == ("ACTIVE", "hello", 1, 0)
    assert row["counters"]
    assert is_alive(row["shim_pid"])
    assert is_alive(row["driver_pid"])
    daemon.call("Unmount", mountpoint=str(mnt))
    assert mounted_at(mnt) is None
    assert not is_alive(row["shim_pid"])
    assert not is_alive(row["driver_pid"])
    assert daemon.call("Status") == {"mounts": []}
    told = [(event["kind"], event["state"]) for event in daemon.call("Events")["events"]]
    assert told[-3:] == [("shim", "GONE"), ("driver", "GONE"), ("mount", "GONE")]


def test_a_directory_is_mirrored_and_what_is_written_arrives(daemon: Daemon, mnt: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    daemon.mount(mnt, "passthrough", source=str(source))
    (mnt / "new").write_bytes(b"x" * 100_000)
    assert (source / "new").read_bytes() == b"x" * 100_000
    daemon.call("Unmount", name="mnt")


def test_a_mount_that_is_busy_stays_and_a_lazy_one_serves_what_is_open(daemon: Daemon, mnt: Path) -> None:
    daemon.mount(mnt)
    with (mnt / "hello.txt").open() as file:
        with pytest.raises(ControlError, match="is in use") as caught:
            daemon.call("Unmount", mountpoint=str(mnt))
        assert caught.value.name == "Busy"
        assert daemon.status(mnt)["state"] == "ACTIVE"
        daemon.call("Unmount", mountpoint=str(mnt), lazy=True)
        assert mounted_at(mnt) is None
        assert file.read() == "Hello, world!\n"
        (row,) = daemon.call("Status")["mounts"]
        assert row["lazy"]
        # The place is free again while the old one still serves.
        again = daemon.mount(mnt)
        assert again["name"] != row["name"]
        assert (mnt / "hello.txt").read_text() == "Hello, world!\n"
    wait_for(lambda: len(daemon.call("Status")["mounts"]) == 1)
    daemon.call("Unmount", mountpoint=str(mnt))


def test_an_unmount_from_outside_is_noticed(daemon: Daemon, mnt: Path) -> None:
    daemon.mount(mnt)
    subprocess.run(["umount", str(mnt)], check=True)
    wait_for(lambda: not daemon.call("Status")["mounts"])
    last = daemon.call("Events")["events"][-1]
    assert (last["kind"], last["state"], last["reason"]) == ("mount", "GONE", "external")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_driver_that_dies_is_replaced_and_open_files_go_on(daemon: Daemon, mnt: Path, number: signal.Signals) -> None:
    daemon.mount(mnt)
    with (mnt / "hello.txt").open() as file:
        for generation in (2, 3):
            os.kill(daemon.status(mnt)["driver_pid"], number)
            row = serving(daemon, mnt, generation)
            assert (mnt / "hello.txt").read_text() == "Hello, world!\n"
            with pytest.raises(FileNotFoundError):
                (mnt / f"never-seen-{generation}").read_text()
            file.seek(0)
            assert file.read() == "Hello, world!\n"
            assert row["restarts_left"] == (4 if number == signal.SIGKILL else 5 - generation)
    daemon.call("Unmount", mountpoint=str(mnt))
    assert mounted_at(mnt) is None


def test_a_stopped_driver_is_hung_and_replaced_and_going_on_changes_nothing(daemon: Daemon, mnt: Path) -> None:
    daemon.mount(mnt, options={"deadline": "1"})
    pid = daemon.status(mnt)["driver_pid"]
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(FileNotFoundError):
        (mnt / "unknown").read_text()  # asked of the stopped one, answered by the next
    assert not is_alive(pid)
    row = serving(daemon, mnt, 2)
    assert row["restarts_left"] == 3
    (death,) = [event for event in daemon.call("Events")["events"] if event["what"] == "death"]
    assert death["reason"] == "counted"
    assert "has not answered " in death["text"]
    daemon.call("Unmount", mountpoint=str(mnt))


def serving(daemon: Daemon, mnt: Path, generation: int) -> dict[str, Any]:
    """Until this generation serves."""
    return wait_for(  # type: ignore[no-any-return]
        lambda: (row := daemon.status(mnt))["state"] == "ACTIVE" and row["generation"] == generation and row
    )


def test_a_killed_shim_leaves_a_clean_mountpoint(daemon: Daemon, mnt: Path) -> None:
    daemon.mount(mnt)
    row = daemon.status(mnt)
    descriptor = os.open(mnt / "hello.txt", os.O_RDONLY)
    os.kill(row["shim_pid"], signal.SIGKILL)
    wait_for(lambda: not daemon.call("Status")["mounts"])
    assert mounted_at(mnt) is None
    with pytest.raises(OSError, match="not connected"):
        os.fstatvfs(descriptor)  # what the kernel never answers from a cache
    with contextlib.suppress(OSError):
        os.close(descriptor)
    assert not is_alive(row["driver_pid"])
    last = daemon.call("Events")["events"][-1]
    assert (last["reason"], last["text"]) == ("crashed", "the shim was ended by SIGKILL")


def test_bad_requests_are_refused_in_one_sentence_and_leave_nothing(daemon: Daemon, mnt: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").write_text("")
    assert sentence(daemon, mnt, "nonesuch").startswith("there is no driver named 'nonesuch'")
    assert "has no option 'colour'" in sentence(daemon, mnt, options={"colour": "red"})
    assert "takes no source" in sentence(daemon, mnt, source="/usr")
    assert "needs a source (a directory)" in sentence(daemon, mnt, "passthrough")
    assert "does not exist" in sentence(daemon, mnt, "passthrough", source=str(tmp_path / "nothing"))
    assert "is not a directory" in sentence(daemon, mnt, "passthrough", source=str(file))
    assert "max_read=x is not a number" in sentence(daemon, mnt, options={"max_read": "x"})
    assert "contradict" in sentence(daemon, mnt, options={"ro": "", "rw": ""})
    assert "takes no value" in sentence(daemon, mnt, options={"ro": "yes"})
    assert "is no name" in sentence(daemon, mnt, name="../x")
    assert "is not empty" in sentence(daemon, full)
    with pytest.raises(ControlError, match="is not a directory"):
        daemon.call("Mount", driver="hello", mountpoint=str(file))
    with pytest.raises(ControlError, match="does not exist"):
        daemon.call("Mount", driver="hello", mountpoint=str(tmp_path / "missing"))
    daemon.mount(mnt, name="taken")
    assert "is a mountpoint already (fuse.udfd)" in sentence(daemon, mnt)
    assert "with the name taken exists" in sentence(daemon, tmp_path / "other", name="taken")
    daemon.mount(full, options={"nonempty": "", "ro": ""})
    assert "ro" in (mounted_at(full) or pytest.fail("not mounted")).options.split(",")
    for name in ("taken", "full"):
        daemon.call("Unmount", name=name)
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log


def test_a_stale_mount_at_the_mountpoint_is_cleaned_with_a_message(daemon: Daemon, mnt: Path, tmp_path: Path) -> None:
    other = Daemon(tmp_path / "b")
    other.mount(mnt)
    shim = other.status(mnt)["shim_pid"]
    os.kill(other.process.pid, signal.SIGSTOP)  # so that it cannot clean up
    os.kill(shim, signal.SIGKILL)
    os.kill(other.process.pid, signal.SIGKILL)
    other.finish()
    wait_for(lambda: not is_alive(shim))
    assert mounted_at(mnt) is not None
    daemon.mount(mnt)
    assert (mnt / "hello.txt").read_text() == "Hello, world!\n"
    daemon.call("Unmount", mountpoint=str(mnt))
    assert mounted_at(mnt) is None
    assert daemon.stop() == 0
    assert "whose server was gone" in daemon.log


def test_of_two_mounts_on_one_mountpoint_one_wins(daemon: Daemon, mnt: Path) -> None:
    results: list[str] = []

    def mount() -> None:
        try:
            daemon.mount(mnt)
            results.append("mounted")
        except ControlError as error:
            results.append(str(error))

    threads = [threading.Thread(target=mount) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count("mounted") == 1
    for text in results:
        assert text == "mounted" or str(mnt) in text
    daemon.call("Unmount", mountpoint=str(mnt))
    assert mounted_at(mnt) is None


def test_a_client_that_leaves_while_it_mounts_leaves_nothing(daemon: Daemon, mnt: Path, tmp_path: Path) -> None:
    slow = tmp_path / "slow.toml"
    slow.write_text("""kind = "fs"\ninterface = 1\ncommand = "sh -c 'sleep 1000' {mountpoint}"\n""")
    seen: list[dict[str, object]] = []
    with daemon.connect() as watching:
        events = watching.stream("Events")
        with daemon.connect() as connection:
            connection._send("Mount", {"driver": str(slow), "mountpoint": str(mnt)}, more=False)
            while not seen:
                seen += next(events)["events"]  # it has begun
        while (seen[-1]["kind"], seen[-1]["state"]) != ("mount", "GONE"):
            seen += next(events)["events"]
    assert seen[-1]["text"] == "given up while it started"
    assert mounted_at(mnt) is None


def test_the_trace_shows_operations_live(daemon: Daemon, mnt: Path) -> None:
    daemon.mount(mnt)
    with daemon.connect() as connection:
        stream = connection.stream("Trace", name="mnt")
        assert next(stream) == {"operations": [], "lost": 0}
        wait_for(lambda: (mnt / "hello.txt").read_bytes() and list(mnt.iterdir()))
        seen: set[str] = set()
        while "READDIR" not in " ".join(seen):
            list(mnt.iterdir())
            for operation in next(stream)["operations"]:
                seen.add(operation["op"])
                assert operation["by"] in ("cache", "driver", "shim")
    daemon.call("Unmount", name="mnt")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_daemon_unmounts_everything_in_reverse_order(tmp_path: Path, number: signal.Signals) -> None:
    daemon = Daemon(tmp_path)
    points = [tmp_path / name for name in ("a", "b", "c")]
    for point in points:
        daemon.mount(point)
    pids = [daemon.status(point)[key] for point in points for key in ("shim_pid", "driver_pid")]
    events: list[str] = []
    with daemon.connect() as connection:
        stream = connection.stream("Events")
        next(stream)
        daemon.process.send_signal(number)
        with contextlib.suppress(ControlError):  # the connection ends with the daemon
            for reply in stream:
                events += [e["name"] for e in reply["events"] if (e["kind"], e["state"]) == ("mount", "GONE")]
    daemon.finish()
    assert daemon.process.returncode == 0
    assert events == ["c", "b", "a"][: len(events)]
    assert len(events) >= 2  # the last one may be cut off by the end itself
    assert not any(mounted_at(point) for point in points)
    assert not any(is_alive(pid) for pid in pids)
    assert not daemon.path.exists()


def test_a_busy_mount_is_unmounted_lazily_when_the_daemon_ends(tmp_path: Path, mnt: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.mount(mnt)
    descriptor = os.open(mnt / "hello.txt", os.O_RDONLY)
    assert daemon.stop() == 0
    assert mounted_at(mnt) is None
    with contextlib.suppress(OSError):  # nobody is left to be told of it
        os.close(descriptor)
    assert "is in use and is unmounted lazily" in daemon.log


def test_a_hang_up_of_the_terminal_changes_nothing(daemon: Daemon, mnt: Path) -> None:
    daemon.mount(mnt)
    daemon.process.send_signal(signal.SIGHUP)
    assert daemon.status(mnt)["state"] == "ACTIVE"
    daemon.call("Unmount", mountpoint=str(mnt))
    assert daemon.stop() == 0
    assert "SIGHUP is ignored" in daemon.log


def test_a_killed_daemon_leaves_no_mount_and_no_process_and_the_next_one_starts(tmp_path: Path, mnt: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.mount(mnt)
    row = daemon.status(mnt)
    daemon.stop(signal.SIGKILL)
    wait_for(lambda: mounted_at(mnt) is None)
    wait_for(lambda: not is_alive(row["shim_pid"]) and not is_alive(row["driver_pid"]))
    assert daemon.path.exists()  # nobody was left to remove it
    successor = Daemon(tmp_path)
    wait_for(lambda: _answers(successor))
    successor.mount(mnt)
    successor.call("Unmount", mountpoint=str(mnt))
    assert successor.stop() == 0


def test_a_daemon_clears_away_the_mounts_of_a_killed_one_whose_shims_were_killed_too(tmp_path: Path, mnt: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.mount(mnt)
    shim = daemon.status(mnt)["shim_pid"]
    daemon.process.send_signal(signal.SIGSTOP)  # so that it cannot clean up
    os.kill(shim, signal.SIGKILL)
    daemon.stop(signal.SIGKILL)
    wait_for(lambda: not is_alive(shim))
    assert mounted_at(mnt) is not None
    successor = Daemon(tmp_path)
    wait_for(lambda: _answers(successor))
    assert mounted_at(mnt) is None
    assert successor.stop() == 0
    assert "whose server was gone" in successor.log


def _answers(daemon: Daemon) -> bool:
    try:
        return bool(daemon.call("Info")["pid"] == daemon.process.pid)
    except NoSupervisorError:
        return False


def test_a_second_daemon_is_refused_in_one_sentence(daemon: Daemon, tmp_path: Path) -> None:
    pid = daemon.call("Info")["pid"]
    second = Daemon(tmp_path)
    second.finish()
    assert second.process.returncode == 1
    assert second.log == f"udf: a supervisor (process {pid}) already listens on {daemon.path}\n"
    assert daemon.call("Info")["pid"] == pid


def test_systemd_is_told_ready_status_watchdog_and_stopping(tmp_path: Path, mnt: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(address)
        listening.settimeout(20)
        daemon = Daemon(tmp_path, {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "200000"})

        def until(text: str) -> list[str]:
            heard: list[str] = []
            while not any(text in datagram for datagram in heard):
                heard.append(listening.recv(4096).decode())
            return heard

        before = until("READY=1")
        assert not any("STOPPING" in text for text in before)
        with Connection(daemon.path):  # true readiness: it listens now
            pass
        until("WATCHDOG=1")
        until("WATCHDOG=1")
        daemon.mount(mnt)
        until("STATUS=1 ACTIVE")
        daemon.process.send_signal(signal.SIGTERM)
        until("STOPPING=1")
        daemon.finish()
    assert daemon.process.returncode == 0


def test_a_path_that_is_not_a_socket_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run" / "control"
    path.parent.mkdir()
    path.write_text("precious")
    daemon = Daemon(tmp_path)
    daemon.finish()
    assert daemon.process.returncode == 1
    assert "is not a socket" in daemon.log
    assert path.read_text() == "precious"


def test_the_socket_is_for_its_owner_alone(daemon: Daemon) -> None:
    daemon.call("Info")
    assert daemon.path.stat().st_mode & 0o777 == 0o600
    assert daemon.path.parent.stat().st_mode & 0o777 == 0o755


def test_two_hundred_mounts_leave_no_descriptor_and_no_child(daemon: Daemon, mnt: Path) -> None:
    pid = daemon.call("Info")["pid"]

    def held() -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    cycles = int(os.environ.get("UDF_TEST_CYCLES", "10"))
    daemon.mount(mnt)
    daemon.call("Unmount", mountpoint=str(mnt))
    idle_children(pid)
    before = wait_for(held)
    for _ in range(cycles):
        daemon.mount(mnt)
        daemon.call("Unmount", mountpoint=str(mnt))
    wait_for(lambda: held() <= before)

    def children() -> list[int]:
        return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    wait_for(lambda: children() == sorted(idle_children(pid)))  # another is forked ahead for each that was taken
