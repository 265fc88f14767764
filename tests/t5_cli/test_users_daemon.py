"""A user without rights has a daemon of his own: devices, a stick's volume, open files over deaths and an unplug."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, mounts_below

from .conftest import NOBODY, PATIENCE

MKFS = shutil.which("mkfs.fat", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
FSCK = shutil.which("fsck.fat", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which needs root"),
    pytest.mark.skipif(not shutil.which("fusermount3"), reason="users mount with fusermount3"),
    pytest.mark.skipif(not (MKFS and FSCK), reason="needs dosfstools"),
    pytest.mark.skipif(
        not os.path.exists("/dev/fuse") or os.stat("/dev/fuse").st_mode & 0o006 != 0o006,
        reason="/dev/fuse is root's alone here",
    ),
]


class User:
    """Nobody, with a home, and with a daemon that serves R = home/udf."""

    def __init__(self, directory: Path, executable: str) -> None:
        self.home = directory / "home"
        self.home.mkdir(mode=0o700)
        os.chown(self.home, NOBODY["user"], NOBODY["group"])
        self.run = self.home / "udf"
        self.udf_command = [executable, "-m", "udf"]
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(installed(directory / "installed")),
            "XDG_RUNTIME_DIR": str(self.home),
            "HOME": str(self.home),
        }
        self.log = directory / "log"
        notify = directory / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, self.log.open("wb") as log:
            ready.bind(str(notify))
            notify.chmod(0o666)
            ready.settimeout(PATIENCE)
            self.daemon = subprocess.Popen(
                [*self.udf_command, "daemon", "--automount"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={**self.environment, "NOTIFY_SOCKET": str(notify)},
                start_new_session=True,
                **NOBODY,
            )
            try:
                while b"READY=1" not in ready.recv(4096):
                    pass
            except BaseException as exc:
                self.daemon.kill()
                self.daemon.wait()
                exc.add_note(self.log.read_text())
                raise
            finally:
                notify.unlink()

    def do(self, *command: str | Path) -> str:
        """Run a program as this user, which must succeed in silence."""
        done = self.tried(*command)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    def tried(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            list(map(str, command)),
            cwd="/",
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            **NOBODY,
        )

    def udf(self, *arguments: str | Path) -> str:
        return self.do(*self.udf_command, *arguments)

    def row(self, driver: str) -> dict[str, Any]:
        rows = json.loads(self.udf("status", "--json"))["mounts"]
        return next(dict(row) for row in rows if row["driver"] == driver)

    def image(self) -> Path:
        path = self.home / "stick.img"
        self.do("truncate", "-s", "16M", path)
        self.do(MKFS or "", "-n", "STICK", path)
        return path


def installed(directory: Path) -> Path:
    """A copy of the project and of what it needs that others can read: root's own checkout may be root's alone."""
    for name in ("udf", "fs", "drivers"):
        shutil.copytree(ROOT / name, directory / name)
    for name in ("pyfuse3", "trio", "msgspec", "pyusb", "attrs", "outcome", "sniffio", "sortedcontainers", "idna"):
        for file in metadata.files(name) or ():
            if ".." not in file.parts and file.locate().exists():
                target = directory / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file.locate(), target)
    return directory


def interpreter() -> str | None:
    """One of our version that others may run."""
    for executable in (sys.executable, "/usr/bin/python3"):
        command = [executable, "-c", f"import sys; assert sys.version_info[:2] == {sys.version_info[:2]}"]
        with contextlib.suppress(OSError):
            if subprocess.run(command, cwd="/", capture_output=True, check=False, **NOBODY).returncode == 0:
                return executable
    return None


@pytest.fixture
def user(runtime_dir: Path) -> Iterator[User]:
    executable = interpreter()
    if executable is None:
        pytest.skip("needs an interpreter of the same version that other users can run")
    runtime_dir.chmod(0o755)
    user = User(runtime_dir, executable)
    try:
        yield user
        user.daemon.send_signal(signal.SIGTERM)
        assert user.daemon.wait(PATIENCE) == 0, user.log.read_text()
        assert mounts_below(runtime_dir) == []
        assert not (user.run / "media").exists()
    finally:
        if user.daemon.poll() is None:
            user.daemon.kill()
            user.daemon.wait()


class Shell:
    """A program of the user's that has a file open for as long as it lives."""

    def __init__(self, user: User, path: Path) -> None:
        self._process = subprocess.Popen(
            ["sh"],
            cwd="/",
            env=user.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
            **NOBODY,
        )
        assert self.does(f"exec 5> '{path}'")

    def does(self, command: str) -> bool:
        """Whether a command of the shell's own succeeds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\necho $?\n")
        return self._process.stdout.readline() == "0\n"

    def end(self) -> None:
        self._process.communicate()


def test_open_file_on_a_users_stick_goes_on_over_deaths_and_an_unplug(user: User) -> None:
    image = user.image()
    told = user.udf("plug", image, "--serial", "U-1")
    at = user.run / "media" / "STICK"
    assert f"STICK (vfat) is mounted on {at}" in told
    shell = Shell(user, at / "letter")
    try:
        assert shell.does("echo one >&5")
        for driver in ("fat", "usb_storage"):
            os.kill(user.row(driver)["driver_pid"], signal.SIGKILL)
        assert shell.does("echo two >&5")
        user.udf("unplug", "stick")
        assert not shell.does("echo lost >&5")
        user.udf("plug", image, "--serial", "U-1")
        assert shell.does("echo three >&5")
    finally:
        shell.end()
    assert user.do("cat", at / "letter") == "one\ntwo\nthree\n"
    with pytest.raises(PermissionError):
        os.listdir(at)  # it is the user's alone: root is another one
    assert user.udf("eject", "STICK") == "disk0 may be pulled out.\n", user.log.read_text()
    user.udf("unplug", "stick")
    assert "2 files" in user.do(FSCK or "", "-n", image)  # the label counts as one


def test_user_mounts_a_stick_without_a_serial_number_and_is_told_what_that_means(user: User) -> None:
    at = user.home / "mnt"
    user.do("mkdir", at)
    user.udf("plug", user.image())
    user.udf("umount", "disk0")
    user.udf("mount", "LABEL=STICK", at)
    told = user.udf("status")
    assert f"{at}: disk0/disk has no serial number to know it again by: this mount does not live through an" in told
    user.do("touch", at / "file")
    user.udf("unplug", "stick")
    assert mounts_below(at) == []


def test_user_has_the_files_and_the_terminal_of_devices(user: User) -> None:
    user.udf("plug", "thermometer")
    assert user.do("cat", user.run / "dev" / "thermometer0" / "celsius") == "21.50\n"
    user.udf("plug", "serial")
    echo = 'exec 5<>"$0"; stty raw -echo <&5; echo hello >&5; head -n 1 <&5'
    assert user.do("sh", "-c", echo, user.run / "dev" / "serial0" / "tty") == "hello\n"


def test_runtime_directory_of_another_user_is_not_taken(user: User) -> None:
    """`su` keeps the environment: the mount failed with `PermissionError: [Errno 13] … '/run/user/0'`."""
    roots = user.home.parent / "roots"
    roots.mkdir(mode=0o700)
    for path in (roots, roots / "missing"):
        user.environment["XDG_RUNTIME_DIR"] = str(path)
        code = "from udf.supervisor.sockets import rundir; print(rundir())"
        taken = user.do(user.udf_command[0], "-c", code).strip()
        assert not taken.startswith(str(roots))
        assert f"{taken}, because XDG_RUNTIME_DIR is not set" in user.do(*user.udf_command, "doctor")


@pytest.mark.parametrize("how", ["udf umount", "udf umount -l", "fusermount3 -u"])
def test_mounts_of_a_user_do_not_keep_each_other(user: User, how: str) -> None:
    """The second one's driver has a copy of the first mount that is locked in its namespace.

    Where mounts are private (in containers), the unmount of the first one took until the second one had gone.
    """
    first, second = user.home / "first", user.home / "second"
    for at in (first, second):
        user.do("mkdir", at)
        user.udf("mount", "-t", "hello", at)
    command = [*user.udf_command, *how.split()[1:]] if how.startswith("udf") else how.split()
    user.do(*command, first)
    assert mounts_below(first) == []
    user.do("cat", second / "hello.txt")
    events = [*user.udf_command, "events", "--follow", "--json"]
    with subprocess.Popen(events, cwd="/", env=user.environment, stdout=subprocess.PIPE, text=True, **NOBODY) as told:
        assert told.stdout is not None
        for line in told.stdout:
            event = json.loads(line)
            if (event["kind"], event["name"], event["state"]) == ("mount", "first", "GONE"):
                break
        told.terminate()
    assert [Path(row["mountpoint"]) for row in json.loads(user.udf("status", "--json"))["mounts"]] == [second]


def test_open_file_of_a_users_lazy_unmount_is_served_to_its_end(user: User) -> None:
    first, second = user.home / "first", user.home / "second"
    for at, driver in ((first, "memfs"), (second, "hello")):
        user.do("mkdir", at)
        user.udf("mount", "-t", driver, at)
    shell = Shell(user, first / "file")
    try:
        assert f"{first} is in use" in user.tried(*user.udf_command, "umount", first).stderr
        user.udf("umount", "-l", first)
        for _ in range(5):
            assert shell.does("echo more >&5")
            user.udf("status")
    finally:
        shell.end()
