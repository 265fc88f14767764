"""Every wrong input gets one sentence and an exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.conftest import ROOT, mounts_below

from .conftest import Command, Daemon, elsewhere, running_daemon

AsNobody = Callable[..., subprocess.CompletedProcess[str]]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

GOOD = {
    "kind": '"fs"',
    "interface": "1",
    "class": '"Tiny"',
}
CODE = '''
from udf import Attr, FsDriver


class Tiny(FsDriver):
    """One empty directory."""

    def __init__(self, number: int = 0, **options: object) -> None:
        self.number = number

    async def list(self, path):
        return []

    async def stat(self, path):
        if path != "/":
            raise FileNotFoundError(path)
        return Attr("dir")

    async def read(self, path, offset, size):
        return b""
'''


def write_driver(directory: Path, lines: Mapping[str, str], extra: str = "", *, name: str = "tiny") -> Path:
    """A Python driver with this manifest."""
    block = [f"{key} = {value}" for key, value in lines.items()] + extra.splitlines()
    path = directory / f"{name}.py"
    path.write_text("# /// udf\n" + "".join(f"# {line}".rstrip() + "\n" for line in block) + "# ///\n" + CODE)
    path.chmod(0o644)
    return path


@pytest.fixture
def drivers(tmp_path: Path) -> Path:
    path = tmp_path / "drivers"
    path.mkdir(mode=0o755)
    return path


@pytest.fixture
def udf(shared_daemon: Daemon, tmp_path: Path) -> Iterator[Command]:
    """Bound to the table's daemon, in which nothing may be left."""
    yield shared_daemon.udf
    assert shared_daemon.udf.mounts() == []
    assert mounts_below(tmp_path) == []


def test_the_good_driver_of_these_tests_is_good(udf: Command, drivers: Path, mountpoint: Path) -> None:
    driver = write_driver(drivers, GOOD, '[option.number]\ntype = "int"\ndefault = 1\nhelp = "a number"')
    udf.done("mount", "-t", driver, mountpoint, "-o", "number=3")
    assert os.listdir(mountpoint) == []
    udf.done("umount", mountpoint)


def test_unknown_driver(udf: Command, mountpoint: Path) -> None:
    assert "nosuch" in udf.refused("mount", "-t", "nosuch", mountpoint)


def test_driver_path_that_does_not_exist(udf: Command, mountpoint: Path) -> None:
    assert "nosuch.py" in udf.refused("mount", "-t", "./nosuch.py", mountpoint)


BAD_MANIFESTS = {
    "kind missing": ({"kind": None}, "", "kind"),
    "kind unknown": ({"kind": '"floppy"'}, "", "floppy"),
    "kind not yet": ({"kind": '"usb"'}, "", "usb"),
    "kind of wrong type": ({"kind": "1"}, "", "kind"),
    "interface missing": ({"interface": None}, "", "interface"),
    "interface of another version": ({"interface": "2"}, "", "interface"),
    "interface of wrong type": ({"interface": '"1"'}, "", "interface"),
    "class missing": ({"class": None}, "", "class"),
    "class of wrong type": ({"class": "[]"}, "", "class"),
    "class that is not there": ({"class": '"Absent"'}, "", "Absent"),
    "command in a Python driver": ({"command": '"cat {mountpoint}"'}, "", "command"),
    "description of wrong type": ({"description": "1"}, "", "description"),
    "source unknown": ({"source": '"tape"'}, "", "source"),
    "capabilities of wrong type": ({"capabilities": '"CAP_CHOWN"'}, "", "capabilities"),
    "capability unknown": ({"capabilities": '["CAP_FLY"]'}, "", "CAP_FLY"),
    "capability of the kernel's root": ({"capabilities": '["CAP_SYS_ADMIN"]'}, "", "CAP_SYS_ADMIN"),
    "exclusive of wrong type": ({"exclusive": '"yes"'}, "", "exclusive"),
    "acl of wrong type": ({"acl": "1"}, "", "acl"),
    "locks of wrong type": ({"locks": "1"}, "", "locks"),
    "open unknown": ({"open": '"eager"'}, "", "open"),
    "durability unknown": ({"durability": '"hope"'}, "", "durability"),
    "deadline of wrong type": ({"deadline": '"soon"'}, "", "deadline"),
    "deadline of nothing": ({"deadline": "0"}, "", "deadline"),
    "deadline below nothing": ({"deadline": "-1.0"}, "", "deadline"),
    "deadline without end": ({"deadline": "inf"}, "", "deadline"),
    "requires of wrong type": ({"requires": '"cat"'}, "", "requires"),
    "requires what is not there": ({"requires": '["no-such-program"]'}, "", "no-such-program"),
    "unknown key": ({"colour": '"red"'}, "", "colour"),
    "option of unknown type": ({}, '[option.a]\ntype = "colour"', "colour"),
    "option default of wrong type": ({}, '[option.a]\ntype = "int"\ndefault = "x"', "default"),
    "option with unknown key": ({}, '[option.a]\ntype = "int"\nshape = 1', "shape"),
    "not TOML": ({"kind": "fs fs"}, "", "TOML"),
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_bad_manifest(udf: Command, drivers: Path, mountpoint: Path, case: str) -> None:
    changes, extra, word = BAD_MANIFESTS[case]
    lines = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    driver = write_driver(drivers, lines, extra)
    assert word in udf.refused("mount", "-t", driver, mountpoint)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "kind"),
        ('kind = "fs"\ninterface = 1\n', "command"),
        ('kind = "fs"\ninterface = 1\ncommand = "no-such-program {mountpoint}"\n', "no-such-program"),
        ('kind = "fs"\ninterface = 1\ncommand = 3\n', "command"),
        ('kind = "fs"\ninterface = 1\nclass = "A"\ncommand = "cat {mountpoint}"\n', "class"),
        ("kind = = 1\n", "TOML"),
    ],
)
def test_bad_manifest_of_a_foreign_program(udf: Command, drivers: Path, mountpoint: Path, text: str, word: str) -> None:
    driver = drivers / "foreign.toml"
    driver.write_text(text)
    assert word in udf.refused("mount", "-t", driver, mountpoint)


def test_driver_without_a_manifest(udf: Command, drivers: Path, mountpoint: Path) -> None:
    driver = drivers / "bare.py"
    driver.write_text(CODE)
    assert "bare.py" in udf.refused("mount", "-t", driver, mountpoint)


@pytest.mark.parametrize("writable", ["file", "directory"])
def test_driver_that_others_can_write(udf: Command, drivers: Path, mountpoint: Path, writable: str) -> None:
    driver = write_driver(drivers, GOOD)
    (driver if writable == "file" else drivers).chmod(0o777)
    assert "written" in udf.refused("mount", "-t", driver, mountpoint)


@needs_root
def test_driver_of_another_user(udf: Command, drivers: Path, mountpoint: Path) -> None:
    driver = write_driver(drivers, GOOD)
    os.chown(driver, 65534, 65534)
    udf.refused("mount", "-t", driver, mountpoint)


OPTIONS = """
[option.number]
type = "int"
[option.share]
type = "float"
[option.fast]
type = "bool"
[option.room]
type = "size"
"""


@pytest.mark.parametrize(
    "option",
    [
        "colour=red",
        "number=many",
        "number=",
        "number",
        "number=1.5",
        "share=half",
        "fast=perhaps",
        "room=big",
        "room=-1",
    ],
)
def test_option_that_is_unknown_or_of_the_wrong_type(
    udf: Command, drivers: Path, mountpoint: Path, option: str
) -> None:
    driver = write_driver(drivers, GOOD, OPTIONS)
    assert option.partition("=")[0] in udf.refused("mount", "-t", driver, mountpoint, "-o", option)


def test_option_that_is_required(udf: Command, drivers: Path, mountpoint: Path) -> None:
    driver = write_driver(drivers, GOOD, '[option.number]\ntype = "int"\nrequired = true')
    assert "number" in udf.refused("mount", "-t", driver, mountpoint)


@pytest.mark.parametrize("option", ["ro=1", "max_read=x", "max_read=1", "ro,rw"])
def test_mount_option_with_a_wrong_value(udf: Command, drivers: Path, mountpoint: Path, option: str) -> None:
    udf.refused("mount", "-t", write_driver(drivers, GOOD), mountpoint, "-o", option)


def test_source_for_a_driver_that_takes_none(udf: Command, drivers: Path, mountpoint: Path) -> None:
    udf.refused("mount", "-t", write_driver(drivers, GOOD), "/usr", mountpoint)


@pytest.mark.parametrize("source", [(), ("absent",), ("file",)])
def test_source_that_is_missing_or_of_the_wrong_kind(
    udf: Command, drivers: Path, mountpoint: Path, tmp_path: Path, source: tuple[str, ...]
) -> None:
    (tmp_path / "file").touch()
    driver = write_driver(drivers, {**GOOD, "source": '"directory"'})
    udf.refused("mount", "-t", driver, *(tmp_path / name for name in source), mountpoint)


def test_mountpoint_that_does_not_exist(udf: Command, drivers: Path, tmp_path: Path) -> None:
    assert "absent" in udf.refused("mount", "-t", write_driver(drivers, GOOD), tmp_path / "absent")


def test_mountpoint_that_is_a_file(udf: Command, drivers: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "file" in udf.refused("mount", "-t", write_driver(drivers, GOOD), tmp_path / "file")


def test_mountpoint_that_is_not_empty(udf: Command, drivers: Path, mountpoint: Path) -> None:
    (mountpoint / "precious").touch()
    driver = write_driver(drivers, GOOD)
    assert "empty" in udf.refused("mount", "-t", driver, mountpoint)
    udf.done("mount", "-t", driver, mountpoint, "-o", "nonempty")
    udf.done("umount", mountpoint)
    assert os.listdir(mountpoint) == ["precious"]


def test_mountpoint_that_is_taken(udf: Command, drivers: Path, mountpoint: Path) -> None:
    driver = write_driver(drivers, GOOD)
    udf.done("mount", "-t", driver, mountpoint)
    udf.refused("mount", "-t", driver, mountpoint)
    assert len(udf.mounts()) == 1
    assert len(mounts_below(mountpoint)) == 1
    udf.done("umount", mountpoint)


@pytest.mark.parametrize("command", ["cat", "cat /etc/passwd", "no-such-program {mountpoint}", "'{mountpoint}", ""])
def test_program_that_cannot_be_run(udf: Command, mountpoint: Path, command: str) -> None:
    udf.refused("mount", "--exec", command, mountpoint)


def test_program_that_is_no_filesystem(udf: Command, mountpoint: Path) -> None:
    udf.refused("mount", "--exec", "true {mountpoint}", mountpoint)


@pytest.mark.parametrize("command", ["umount", "trace"])
def test_command_for_what_is_no_mount(udf: Command, mountpoint: Path, command: str) -> None:
    assert "not a mount" in udf.refused(command, mountpoint)


def test_busy_mount_names_who_holds_it_and_goes_on(udf: Command, drivers: Path, mountpoint: Path) -> None:
    udf.done("mount", "-t", write_driver(drivers, GOOD), mountpoint)
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
        cwd=mountpoint,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert f"({holder.pid})" in udf.refused("umount", mountpoint)
        assert os.listdir(mountpoint) == []
        holder.communicate()
    udf.done("umount", mountpoint)


def test_second_daemon_on_the_same_socket(shared_daemon: Daemon) -> None:
    sentence = shared_daemon.udf.refused("daemon")
    assert str(shared_daemon.process.pid) in sentence
    assert shared_daemon.udf.mounts() == []


def test_socket_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 200)):
        Command(path).refused("daemon")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_supervisor_of_another_version(runtime_dir: Path) -> None:
    """What an old `udf` says to a new daemon."""
    path = runtime_dir / "future"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(4096)
                reply = {"parameters": {"version": "9", "pid": 1, "protocol": 99, "private": False, "uid": 0}}
                peer.sendall(json.dumps(reply).encode() + b"\0")
                peer.recv(1)

        thread = threading.Thread(target=answer)
        thread.start()
        assert "protocol 99" in Command(path).refused("status")
        thread.join()
    path.unlink()


def test_client_of_another_version(shared_daemon: Daemon) -> None:
    """What a new daemon says to an old or a future `udf`."""
    call = {"method": "io.udf.Supervisor.Info", "parameters": {"protocol": 99}}
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(shared_daemon.socket))
        client.sendall(json.dumps(call).encode() + b"\0")
        reply = json.loads(client.recv(65536).rstrip(b"\0"))
    assert reply["error"] == "io.udf.Supervisor.VersionMismatch"
    assert "99" in reply["parameters"]["sentence"]


def test_socket_that_speaks_something_else(runtime_dir: Path) -> None:
    path = runtime_dir / "other"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n\0")

        thread = threading.Thread(target=answer)
        thread.start()
        Command(path).refused("status")
        thread.join()
    path.unlink()


def one_sentence(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1, result
    assert len(result.stderr.splitlines()) == 1, result
    assert result.stderr.startswith("udf: "), result
    return result.stderr


def test_user_at_roots_daemon(shared_daemon: Daemon, as_nobody: AsNobody) -> None:
    shared_daemon.socket.parent.chmod(0o755)
    sentence = one_sentence(as_nobody("status", "--socket", shared_daemon.socket))
    assert "permission" in sentence


def test_user_on_a_mountpoint_that_is_not_theirs(as_nobody: AsNobody, runtime_dir: Path) -> None:
    """Without a daemon, so that nothing but the user's own rights can help."""
    home, target = runtime_dir / "home", runtime_dir / "target"
    runtime_dir.chmod(0o755)
    for path in (home, target):
        path.mkdir()
    os.chown(home, 65534, 65534)
    sentence = one_sentence(as_nobody("mount", "-t", "hello", target, XDG_RUNTIME_DIR=str(home), HOME=str(home)))
    assert str(target) in sentence
    assert not any(path.is_file() or path.is_socket() for path in home.rglob("*"))


@needs_root
def test_machine_without_the_fuse_device(tmp_path: Path, drivers: Path, mountpoint: Path, runtime_dir: Path) -> None:
    """In a mount namespace whose /dev has no fuse, by a private supervisor and by a daemon."""
    driver = write_driver(drivers, GOOD)
    hide = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9"
    command = [sys.executable, "-m", "udf", "mount", "-f", "-t", str(driver), str(mountpoint)]
    result = subprocess.run(
        elsewhere(f'{hide} && exec "$@"', *command),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1, result
    assert "/dev/fuse" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_daemon_ends_with_nothing_left_after_all_that(runtime_dir: Path, drivers: Path, mountpoint: Path) -> None:
    with running_daemon(runtime_dir) as daemon:
        daemon.udf.refused("mount", "-t", write_driver(drivers, {**GOOD, "interface": "7"}), mountpoint)
        assert daemon.stop() == 0
    assert sorted(p.name for p in runtime_dir.iterdir()) == ["daemon.log"]
