"""What programs see of a real driver that dies, everything real: what was used before, and the same file or none.

The restart is held by stopping the daemon, so that there is no driver for as long as a test wants.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.t3_shim.program import Program
from tests.t5_cli.conftest import Daemon, running_daemon
from udf.supervisor.client import Connection

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount with all options")

SHELF = '''
# /// udf
# kind = "fs"
# interface = 1
# class = "Shelf"
# source = "directory"
# ///
"""A directory through FsDriver, without links."""
import os
from udf import Attr, FsDriver


class Shelf(FsDriver):
    def __init__(self, source):
        self.top = source

    async def list(self, path):
        return os.listdir(self.top + path)

    async def stat(self, path):
        st = os.lstat(self.top + path)
        kind = "dir" if os.path.isdir(self.top + path) else "file"
        return Attr(kind, size=st.st_size, mode=st.st_mode & 0o7777, ino=st.st_ino)

    async def read(self, path, offset, size):
        with open(self.top + path, "rb") as file:
            return os.pread(file.fileno(), size, offset)

    async def write(self, path, offset, data):
        with open(self.top + path, "r+b") as file:
            return os.pwrite(file.fileno(), data, offset)

    async def create(self, path, mode):
        os.close(os.open(self.top + path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))

    async def remove(self, path):
        os.unlink(self.top + path)

    async def rename(self, old, new):
        os.rename(self.top + old, self.top + new)
'''


class Scene:
    """A mount of a daemon, a program that uses it, and the source behind it."""

    def __init__(self, daemon: Daemon, source: Path, root: Path) -> None:
        self.daemon = daemon
        self.source = source
        self.root = str(root)
        self.program = Program()

    def do(self, call: str, name: str = "", *arguments: object) -> Any:
        return self.program.do(call, f"{self.root}/{name}" if name else self.root, *arguments)

    def fails(self, call: str, name: str, *arguments: object) -> int:
        return self.program.fails(call, f"{self.root}/{name}", *arguments)

    def status(self) -> dict[str, Any]:
        with Connection(self.daemon.socket) as connection:
            rows = connection.call("Status")["mounts"]
        return next(row for row in rows if row["mountpoint"] == self.root)

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds, which may be refused until then."""
        end = time.monotonic() + 40
        while True:
            with contextlib.suppress(OSError):
                if holds():
                    return
            assert time.monotonic() < end, "it never held"
            time.sleep(0.02)

    def kill(self) -> None:
        os.kill(self.status()["driver_pid"], signal.SIGKILL)

    def wait_for_generation(self, number: int) -> None:
        end = time.monotonic() + 40
        while (row := self.status())["generation"] < number or row["state"] != "ACTIVE":
            assert time.monotonic() < end, row
            time.sleep(0.01)

    @contextlib.contextmanager
    def no_driver(self) -> Iterator[None]:
        """Without a driver: it is killed, and nobody is there to start another."""
        row = self.status()
        os.kill(self.daemon.process.pid, signal.SIGSTOP)
        try:
            os.kill(row["driver_pid"], signal.SIGKILL)
            yield
        finally:
            os.kill(self.daemon.process.pid, signal.SIGCONT)
        self.wait_for_generation(row["generation"] + 1)


Mounting = Callable[..., Scene]


@pytest.fixture
def mounting(runtime_dir: Path, tmp_path: Path) -> Iterator[Mounting]:
    scenes: list[Scene] = []
    with running_daemon(runtime_dir) as daemon:
        source, root = tmp_path / "source", tmp_path / "mount"
        source.mkdir()
        root.mkdir()

        def mount(driver: str, *options: str) -> Scene:
            has_source = [] if driver == "memfs" else [source]
            daemon.udf.done("mount", "-t", driver, *has_source, root, "-o", ",".join(("allow_other", *options)))
            scenes.append(Scene(daemon, source, root))
            return scenes[-1]

        yield mount
        for scene in scenes:
            scene.program.end()
            ended = daemon.udf("umount", scene.root)
            if ended.returncode:
                subprocess.run(["umount", "-l", scene.root], check=False)
            assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("driver", ["passthrough", "memfs"])
def test_what_was_used_before_needs_no_driver(mounting: Mounting, driver: str) -> None:
    options = ["timeout=0.1"] if driver == "passthrough" else []
    scene = mounting(driver, *options)
    scene.do("mkdir", "d")
    for number in range(30):
        scene.do("spill", f"d/f{number}", b"%d" % number * 1000)
    for _ in range(2):  # the second time as the kernel has it then
        before = {name: scene.do("slurp", f"d/{name}") for name in scene.do("names", "d")}
        sizes = scene.do("scan", "d")
    shown = subprocess.run(["ls", "-l", f"{scene.root}/d"], check=True, capture_output=True, text=True).stdout
    scene.do("statfs")  # what `ls` has closed is released before that is answered
    trips = scene.status()["counters"]["driver_round_trips"]
    with scene.no_driver():
        time.sleep(0.3)  # what had a time is over
        for name, data in before.items():
            assert scene.do("slurp", f"d/{name}") == data
        assert scene.do("scan", "d") == sizes
        assert scene.do("statfs")[0] > 0
        for command in (["ls", "-l", f"{scene.root}/d"], ["df", scene.root], ["ls", "-l", os.path.dirname(scene.root)]):
            done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
            assert done.stdout == shown or command[-1] != f"{scene.root}/d"
    assert scene.status()["counters"]["driver_round_trips"] <= trips + 1, "but for the new driver's own start"


def test_an_open_file_is_the_same_file_or_none(mounting: Mounting) -> None:
    """Files are replaced, renamed and removed behind the mount while there is no driver."""
    scene = mounting("passthrough", "timeout=0.1")
    for name in ("kept", "removed", "replaced", "renamed", "moved_over"):
        (scene.source / name).write_bytes(f"this is {name}".encode() * 1000)
    descriptors = {name: scene.do("open", name, os.O_RDWR) for name in os.listdir(scene.source)}
    for fd in descriptors.values():
        scene.program.do("pread", fd, 10, 0)
    with scene.no_driver():
        (scene.source / "removed").unlink()
        (scene.source / "replaced").unlink()
        (scene.source / "replaced").write_bytes(b"another file" * 1000)  # may well get the inode number
        (scene.source / "renamed").rename(scene.source / "elsewhere")
        (scene.source / "new").write_bytes(b"something new" * 1000)
        (scene.source / "new").rename(scene.source / "moved_over")
        others = {path.name: path.read_bytes() for path in scene.source.iterdir()}
    for name, fd in descriptors.items():
        if name == "kept":
            assert scene.program.do("pwrite", fd, b"THIS", 0) == 4
        else:
            assert scene.program.fails("pwrite", fd, b"WRONG", 0) == errno.ESTALE, name
    others["kept"] = b"THIS" + others["kept"][4:]
    assert {path.name: path.read_bytes() for path in scene.source.iterdir()} == others
    for name, fd in descriptors.items():
        with contextlib.suppress(OSError):
            scene.program.do("close", fd)
        if name in others:
            scene.until(lambda name=name: scene.do("slurp", name) == others[name])  # names are believed for their time


def test_a_removed_open_file_of_an_fsdriver_outlives_the_driver(mounting: Mounting, tmp_path: Path) -> None:
    (tmp_path / "shelf.py").write_text(SHELF)
    scene = mounting(str(tmp_path / "shelf.py"))
    scene.do("spill", "f", b"some bytes")
    fd = scene.do("open", "f", os.O_RDWR)
    scene.program.do("pwrite", fd, b"SOME", 0)
    scene.do("unlink", "f")
    for number in (2, 3):
        scene.kill()
        scene.wait_for_generation(number)
        assert scene.program.do("pread", fd, 20, 0) == b"SOME bytes"
    assert scene.do("names") == []
    scene.program.do("close", fd)
    scene.until(lambda: not list(scene.source.iterdir()))


def test_a_database_is_whole_after_a_driver_died_in_each_transaction(mounting: Mounting) -> None:
    scene = mounting("memfs")
    code = (
        "import sqlite3,sys\n"
        "db=sqlite3.connect(sys.argv[1],isolation_level=None,timeout=60)\n"
        "db.execute('CREATE TABLE t (n INTEGER)')\n"
        "for n in range(40):\n"
        "    db.execute('INSERT INTO t VALUES (?)',(n,)); print(n,flush=True)\n"
    )
    generation = 1
    with subprocess.Popen(["python3", "-c", code, f"{scene.root}/db"], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) % 4 == 0:
                scene.kill()
                generation += 1
                scene.wait_for_generation(generation)
        assert writer.wait(60) == 0
    check = (
        "import sqlite3,sys; db=sqlite3.connect(sys.argv[1])\n"
        "print(*db.execute('PRAGMA integrity_check').fetchone(), *db.execute('SELECT count(*) FROM t').fetchone())"
    )
    found = subprocess.run(["python3", "-c", check, f"{scene.root}/db"], check=True, capture_output=True, text=True)
    assert found.stdout.split() == ["ok", "40"]
