"""What signals and closed terminals do, as the README's table has it: each row is a test."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, mounts_below, wait_for_end, wait_for_mounts

from .conftest import PATIENCE, Command, Daemon
from .test_bad_input import GOOD, write_driver

SLOW = "import time\ntime.sleep(600)\n"


class Terminal:
    """A command as the leader of a session on a terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        self.master, slave = pty.openpty()
        code = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            start_new_session=True,
        )
        os.close(slave)

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.write(self.master, b"\x03")

    def close(self) -> None:
        """The window is closed."""
        if self.master >= 0:
            os.close(self.master)
            self.master = -1

    def read(self) -> str:
        """All that it prints until nobody has the terminal open."""
        text = b""
        with contextlib.suppress(OSError):
            while data := os.read(self.master, 4096):
                text += data
        return text.decode()


@contextlib.contextmanager
def terminal(command: list[str]) -> Iterator[Terminal]:
    opened = Terminal(command)
    try:
        yield opened
    finally:
        opened.close()
        if opened.process.poll() is None:
            opened.process.kill()
        opened.process.wait()


@pytest.fixture
def udf(no_system_daemon: None) -> Command:
    return Command()


def unmount(udf: Command, mountpoint: Path) -> None:
    udf.done("umount", mountpoint)
    assert mounts_below(mountpoint) == []


# ---- udf mount


def shell_that_mounts(udf: Command, mountpoint: Path) -> list[str]:
    """Stands for an interactive shell. (dash may take a Ctrl-C between two commands for one that never came.)"""
    command = udf.argv("mount", "-t", "hello", mountpoint)
    code = (
        "import signal, subprocess; signal.signal(signal.SIGINT, signal.SIG_DFL);"
        f"subprocess.run({command!r}, check=True); print('mounted', flush=True); signal.pause()"
    )
    return [sys.executable, "-c", code]


def test_mount_outlives_the_terminal_it_was_made_in(udf: Command, mountpoint: Path) -> None:
    with terminal(shell_that_mounts(udf, mountpoint)) as window:
        while b"mounted" not in os.read(window.master, 4096):
            pass
        window.close()
        window.process.wait(PATIENCE)
    assert (mountpoint / "hello.txt").read_text() == "Hello, world!\n"
    unmount(udf, mountpoint)


def test_mount_outlives_ctrl_c_in_the_shell_it_was_made_in(udf: Command, mountpoint: Path) -> None:
    with terminal(shell_that_mounts(udf, mountpoint)) as window:
        while b"mounted" not in os.read(window.master, 4096):
            pass
        window.interrupt()
        window.process.wait(PATIENCE)
    assert (mountpoint / "hello.txt").read_text() == "Hello, world!\n"
    unmount(udf, mountpoint)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_mount_that_is_interrupted_while_it_starts_leaves_nothing(
    udf: Command, mountpoint: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """The driver says when it is being loaded, and would take ten minutes."""
    started = tmp_path / "started"
    os.mkfifo(started)
    driver = write_driver(tmp_path, GOOD)
    driver.write_text(driver.read_text() + f"\nopen({str(started)!r}, 'w').close()\n{SLOW}")
    with subprocess.Popen(udf.argv("mount", "-t", driver, mountpoint), stderr=subprocess.PIPE, cwd=ROOT) as process:
        with open(started, "rb"):  # opens when the driver opens it
            process.send_signal(number)
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(PATIENCE) == {signal.SIGINT: 130}.get(number, -number)
    assert mounts_below(mountpoint) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_foreground_mount_unmounts_when_it_is_told_to_end(
    udf: Command, mountpoint: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(udf.argv("mount", "-f", "-t", "hello", mountpoint), stderr=subprocess.DEVNULL, cwd=ROOT)
    wait_for_mounts(mountpoint, 1)
    wait_active(udf, mountpoint)
    process.send_signal(number)
    assert process.wait(PATIENCE) == 0
    assert mounts_below(mountpoint) == []


def wait_active(udf: Command, mountpoint: Path) -> None:
    """The mount is in the kernel's table a moment before its supervisor has heard so; the first answer is after it."""
    assert (mountpoint / "hello.txt").read_text() == "Hello, world!\n"
    assert any(row["mountpoint"] == str(mountpoint) for row in udf.mounts())


def test_ctrl_c_ends_a_foreground_mount(udf: Command, mountpoint: Path) -> None:
    with terminal(udf.argv("mount", "-f", "-t", "hello", mountpoint)) as window:
        wait_for_mounts(mountpoint, 1)
        wait_active(udf, mountpoint)
        window.interrupt()
        assert "Traceback" not in window.read()
        assert window.process.wait(PATIENCE) == 0
    assert mounts_below(mountpoint) == []


def test_closed_terminal_ends_a_foreground_mount(udf: Command, mountpoint: Path) -> None:
    with terminal(udf.argv("mount", "-f", "-t", "hello", mountpoint)) as window:
        wait_for_mounts(mountpoint, 1)
        wait_active(udf, mountpoint)
        window.close()
        window.process.wait(PATIENCE)
    assert mounts_below(mountpoint) == []


def test_foreground_mount_in_use_is_detached_and_nothing_hangs(udf: Command, mountpoint: Path) -> None:
    process = subprocess.Popen(udf.argv("mount", "-f", "-t", "hello", mountpoint), stderr=subprocess.DEVNULL, cwd=ROOT)
    wait_for_mounts(mountpoint, 1)
    with (mountpoint / "hello.txt").open():
        wait_active(udf, mountpoint)
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)
        assert mounts_below(mountpoint) == []


def private_supervisor(udf: Command, mountpoint: Path) -> int:
    row = next(row for row in udf.mounts() if row["mountpoint"] == str(mountpoint))
    status = Path(f"/proc/{row['shim_pid']}/status").read_text()
    return int(status.split("PPid:")[1].split()[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_end_of_a_background_supervisor_ends_its_mount(udf: Command, mountpoint: Path, number: signal.Signals) -> None:
    udf.done("mount", "-t", "hello", mountpoint)
    supervisor = private_supervisor(udf, mountpoint)
    os.kill(supervisor, number)
    wait_for_end(supervisor)
    wait_for_mounts(mountpoint, 0)
    assert all(row["mountpoint"] != str(mountpoint) for row in json_mounts(udf))


def json_mounts(udf: Command) -> list[dict[str, object]]:
    """Also where no supervisor is left at all."""
    said = udf("status", "--json")
    return list(json.loads(said.stdout)["mounts"]) if said.returncode == 0 else []


def test_hang_up_does_not_end_a_background_supervisor(udf: Command, mountpoint: Path) -> None:
    udf.done("mount", "-t", "hello", mountpoint)
    os.kill(private_supervisor(udf, mountpoint), signal.SIGHUP)
    assert (mountpoint / "hello.txt").read_text() == "Hello, world!\n"
    unmount(udf, mountpoint)


def test_supervisor_and_shim_killed_together_leave_a_mount_that_umount_takes_away(
    udf: Command, mountpoint: Path
) -> None:
    udf.done("mount", "-t", "hello", mountpoint)
    row = next(row for row in udf.mounts() if row["mountpoint"] == str(mountpoint))
    supervisor = private_supervisor(udf, mountpoint)
    os.kill(supervisor, signal.SIGSTOP)
    for pid in (row["shim_pid"], supervisor):
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGKILL)
        wait_for_end(pid)
    assert mounts_below(mountpoint) == [str(mountpoint)]
    result = udf("umount", mountpoint)
    assert result.returncode == 0, result
    assert "server was gone" in result.stderr
    assert mounts_below(mountpoint) == []


# ---- the daemon and what it runs


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_daemon_unmounts_everything_and_ends(daemon: Daemon, tmp_path: Path, number: signal.Signals) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        daemon.udf.done("mount", "-t", "hello", tmp_path / name)
    assert len(mounts_below(tmp_path)) == 2
    assert daemon.stop(number) == 0
    assert mounts_below(tmp_path) == []
    assert not daemon.socket.exists()


def test_daemon_ignores_hang_up(daemon: Daemon, mountpoint: Path) -> None:
    daemon.udf.done("mount", "-t", "hello", mountpoint)
    daemon.process.send_signal(signal.SIGHUP)
    assert (mountpoint / "hello.txt").read_text() == "Hello, world!\n"
    assert daemon.udf.mounts()[0]["state"] == "ACTIVE"
    unmount(daemon.udf, mountpoint)


def test_killed_daemon_takes_its_mounts_along_and_its_socket_can_be_used_again(
    daemon: Daemon, mountpoint: Path
) -> None:
    daemon.udf.done("mount", "-t", "hello", mountpoint)
    row = daemon.udf.mounts()[0]
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    wait_for_mounts(mountpoint, 0)
    for pid in (row["shim_pid"], row["driver_pid"]):
        wait_for_end(pid)
    daemon.udf.refused("status", code=3)
    second = Daemon(daemon.socket.parent)
    assert second.udf.mounts() == []
    assert second.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_shim_and_driver_ignore_what_a_terminal_sends(daemon: Daemon, mountpoint: Path, number: signal.Signals) -> None:
    daemon.udf.done("mount", "-t", "hello", mountpoint)
    row = daemon.udf.mounts()[0]
    for pid in (row["shim_pid"], row["driver_pid"]):
        os.kill(pid, number)
    assert (mountpoint / "hello.txt").read_text() == "Hello, world!\n"
    assert daemon.udf.mounts()[0]["state"] == "ACTIVE"
    unmount(daemon.udf, mountpoint)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_end_of_a_shim_leaves_a_clean_mountpoint(daemon: Daemon, mountpoint: Path, number: signal.Signals) -> None:
    daemon.udf.done("mount", "-t", "hello", mountpoint)
    row = daemon.udf.mounts()[0]
    os.kill(row["shim_pid"], number)
    wait_for_mounts(mountpoint, 0)
    wait_for_end(row["driver_pid"])
    assert os.listdir(mountpoint) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_end_of_a_driver_is_followed_by_the_next_one_and_programs_go_on(
    daemon: Daemon, mountpoint: Path, number: signal.Signals
) -> None:
    daemon.udf.done("mount", "-t", "hello", mountpoint)
    with subprocess.Popen(daemon.udf.argv("events", "-f"), stdout=subprocess.PIPE, text=True, cwd=ROOT) as events:
        assert events.stdout is not None
        os.kill(daemon.udf.mounts()[0]["driver_pid"], number)
        for line in events.stdout:
            if "mount" in line and "→ ACTIVE" in line and "generation 2 after" in line:
                break
        events.send_signal(signal.SIGINT)
        assert events.wait(PATIENCE) == 130
    assert daemon.udf.mounts()[0]["state"] == "ACTIVE"
    with pytest.raises(FileNotFoundError):
        (mountpoint / "never-seen").stat()
    assert (mountpoint / "hello.txt").read_text() == "Hello, world!\n"
    unmount(daemon.udf, mountpoint)


# ---- commands that look on


@pytest.mark.parametrize("command", [("events", "-f"), ("trace", "MOUNT")])
def test_ctrl_c_ends_a_follower_without_a_word(daemon: Daemon, mountpoint: Path, command: tuple[str, ...]) -> None:
    daemon.udf.done("mount", "-t", "hello", mountpoint)
    arguments = [str(mountpoint) if word == "MOUNT" else word for word in command]
    with terminal(daemon.udf.argv(*arguments)) as window:
        assert select.select([window.master], [], [], PATIENCE)[0]
        window.interrupt()
        text = window.read()
        assert window.process.wait(PATIENCE) == 130
    assert "Traceback" not in text
    unmount(daemon.udf, mountpoint)
