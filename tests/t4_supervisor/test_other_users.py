"""A root daemon that serves another user, and that user's own supervisor: each mount has its owner's rights only."""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real import DAEMON_PROGRAM, PRIVATE_PROGRAM, ROOT, mounted_at, needs_fuse, wait_for

USER = pwd.getpwnam("nobody").pw_uid  # fusermount3 insists on a user with a name
pytestmark = [
    needs_fuse,
    pytest.mark.skipif(not os.path.exists("/usr/bin/fusermount3"), reason="needs fusermount3 (package fuse3)"),
    pytest.mark.skipif(
        not os.path.exists("/dev/fuse") or os.stat("/dev/fuse").st_mode & 0o006 != 0o006,
        reason="/dev/fuse is root's alone here",
    ),
]
_CALL = """
import json, sys
from udf.supervisor.client import Connection, ControlError
with Connection(sys.argv[1]) as connection:
    for method, parameters in json.loads(sys.argv[2]):
        try:
            print(json.dumps([None, connection.call(method, **parameters)]))
        except ControlError as error:
            print(json.dumps([error.name, str(error)]))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An interpreter with our packages that every user may run; ours may lie in somebody's home."""
    if _may_run(sys.executable):
        yield sys.executable
        return
    system = "/usr/bin/python3"
    same = [system, "-c", f"import sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]!r})"]
    if not os.path.exists(system) or subprocess.run(same, check=False).returncode != 0:
        pytest.skip("this interpreter cannot be run by other users, and there is no other one of its version")
    place = Path(f"/tmp/udf-t{os.getpid()}-venv")
    made = subprocess.run([system, "-m", "venv", "--without-pip", str(place)], capture_output=True, check=False)
    packages = place / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    if made.returncode != 0 or not packages.is_dir():
        pytest.skip("no interpreter for other users can be made here")
    (packages / "ours.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    interpreter = str(place / "bin" / "python")
    try:
        if not _may_run(interpreter):
            pytest.skip("our packages cannot be read by other users")
        yield interpreter
    finally:
        subprocess.run(["rm", "-rf", str(place)], check=True)


def _may_run(interpreter: str) -> bool:
    try:
        done = subprocess.run(
            [interpreter, "-c", "import trio, msgspec, pyfuse3, udf.host"],
            env={"PYTHONPATH": str(ROOT)},
            **as_user(),
            capture_output=True,
            check=False,
        )
    except PermissionError:
        return False
    return done.returncode == 0


def as_user() -> dict[str, Any]:
    return {"user": USER, "group": USER, "extra_groups": [], "cwd": "/"}


@pytest.fixture
def place(runtime_dir: Path) -> Path:
    runtime_dir.chmod(0o755)
    own = runtime_dir / "mnt"
    own.mkdir()
    os.chown(own, USER, USER)
    return runtime_dir


class RootDaemon:
    def __init__(self, python: str, place: Path) -> None:
        self.python = python
        self.path = place / "run" / "control"
        self.process = subprocess.Popen(
            [python, "-c", DAEMON_PROGRAM, str(self.path), str(place / "run")],
            env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda: self.path.exists() or self.process.poll() is not None)
        self.path.chmod(0o666)  # as an administrator would open it

    def ask(self, *calls: tuple[str, dict[str, Any]], user: bool = True) -> list[Any]:
        done = subprocess.run(
            [self.python, "-c", _CALL, str(self.path), json.dumps(calls)],
            env={"PYTHONPATH": str(ROOT)},
            **(as_user() if user else {}),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def daemon(python: str, place: Path) -> Iterator[RootDaemon]:
    running = RootDaemon(python, place)
    yield running
    running.process.send_signal(signal.SIGTERM)
    _, log = running.process.communicate(timeout=30)
    assert running.process.returncode == 0, log


def test_a_users_mount_runs_with_the_users_rights_only(daemon: RootDaemon, place: Path) -> None:
    ((error, answer),) = daemon.ask(("Mount", {"driver": "hello", "mountpoint": str(place / "mnt")}))
    assert error is None, answer
    there = mounted_at(place / "mnt")
    assert there is not None
    assert (there.super_option("user_id"), "nosuid" in there.options, "nodev" in there.options) == (
        str(USER),
        True,
        True,
    )
    ((_, status),) = daemon.ask(("Status", {}))
    (row,) = status["mounts"]
    assert row["uid"] == USER
    for pid in (row["shim_pid"], row["driver_pid"]):
        fields = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert fields["Uid"].split() == [str(USER)] * 4
        assert fields["Gid"].split() == [str(USER)] * 4
        assert int(fields["CapEff"], 16) == 0
        assert int(fields["CapPrm"], 16) == 0
    read = subprocess.run(["cat", str(place / "mnt" / "hello.txt")], **as_user(), capture_output=True, check=True)
    assert read.stdout == b"Hello, world!\n"
    ((error, answer),) = daemon.ask(("Unmount", {"mountpoint": str(place / "mnt")}))
    assert error is None, answer
    assert mounted_at(place / "mnt") is None


def test_a_user_mirrors_only_what_the_user_may_read(daemon: RootDaemon, place: Path) -> None:
    secret = place / "secret"
    secret.mkdir()
    (secret / "file").write_text("of root")
    secret.chmod(0o700)
    request = {"driver": "passthrough", "source": str(secret), "mountpoint": str(place / "mnt")}
    ((error, sentence),) = daemon.ask(("Mount", request))
    assert (error, sentence) == ("Refused", f"you may not read the source {secret}")
    secret.chmod(0o755)
    (secret / "file").chmod(0o600)
    ((error, answer),) = daemon.ask(("Mount", request))
    assert error is None, answer
    read = subprocess.run(["cat", str(place / "mnt" / "file")], **as_user(), capture_output=True, check=False)
    assert read.returncode != 0
    assert b"of root" not in read.stdout
    daemon.ask(("Unmount", {"name": "mnt"}))


def test_a_user_sees_and_unmounts_only_his_own(daemon: RootDaemon, place: Path) -> None:
    roots = place / "roots"
    roots.mkdir()
    ((error, answer),) = daemon.ask(("Mount", {"driver": "hello", "mountpoint": str(roots)}), user=False)
    assert error is None, answer
    answers = daemon.ask(
        ("Status", {}),
        ("Status", {"mountpoint": str(roots)}),
        ("Unmount", {"mountpoint": str(roots)}),
        ("Unmount", {"name": "roots", "lazy": True}),
        ("Events", {}),
        ("Mount", {"driver": "hello", "mountpoint": str(place / "run")}),
        ("Mount", {"driver": "hello", "mountpoint": str(place / "mnt"), "options": {"suid": ""}}),
        ("Mount", {"driver": str(ROOT / "fs" / "hello.py"), "mountpoint": str(place / "mnt")}),
    )
    assert answers[0] == [None, {"mounts": []}]
    assert [error for error, _ in answers[1:4]] == ["NotFound"] * 3
    assert answers[4] == [None, {"events": [], "lost": 0}]
    assert answers[5] == [
        "Refused",
        f"you may not mount on {place / 'run'}: it must be your own directory, or one that you may write",
    ]
    assert [error for error, _ in answers[6:]] == ["Denied", "Denied"]
    assert mounted_at(roots) is not None
    daemon.ask(("Unmount", {"name": "roots"}), user=False)


def test_a_mountpoint_that_is_a_link_to_elsewhere_is_judged_by_where_it_leads(daemon: RootDaemon, place: Path) -> None:
    link = place / "mnt" / "link"
    link.symlink_to("/etc")
    ((error, sentence),) = daemon.ask(
        ("Mount", {"driver": "hello", "mountpoint": str(link), "options": {"nonempty": ""}})
    )
    assert (error, sentence) == (
        "Refused",
        "you may not mount on /etc: it must be your own directory, or one that you may write",
    )


def test_a_shim_of_a_user_that_dies_leaves_a_clean_mountpoint(daemon: RootDaemon, place: Path) -> None:
    daemon.ask(("Mount", {"driver": "hello", "mountpoint": str(place / "mnt")}))
    ((_, status),) = daemon.ask(("Status", {}))
    os.kill(status["mounts"][0]["shim_pid"], signal.SIGKILL)
    wait_for(lambda: daemon.ask(("Status", {})) == [[None, {"mounts": []}]])
    assert mounted_at(place / "mnt") is None


def test_a_user_supervises_his_own_mount_without_root(python: str, place: Path) -> None:
    own = place / "own"
    own.mkdir()
    os.chown(own, USER, USER)
    request = json.dumps({"driver": "hello", "mountpoint": str(place / "mnt")})
    process = subprocess.Popen(
        [python, "-c", PRIVATE_PROGRAM, request, str(own / "run")],
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **as_user(),
    )
    assert process.stdout is not None
    answer = process.stdout.readline()
    if not answer:
        pytest.fail(process.communicate()[1])
    read = subprocess.run(["cat", str(place / "mnt" / "hello.txt")], **as_user(), capture_output=True, check=True)
    assert read.stdout == b"Hello, world!\n"
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=30)
    assert process.returncode == 0, log
    assert mounted_at(place / "mnt") is None
