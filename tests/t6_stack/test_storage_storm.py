"""The driver of a stick is killed again and again while programs read and write the stick: not a byte differs.

Three programs that know nothing of us work on a partition each, all at once: nbdcopy and qemu-img by NBD, fio through
the file of its partition. `UDF_STORM_SECONDS` makes it longer.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.t5_cli.conftest import Daemon, running_daemon
from udf.supervisor.client import Connection

SECONDS = float(os.environ.get("UDF_STORM_SECONDS", "6"))
BETWEEN = 0.2
MIB = 1 << 20
PART = 16 * MIB

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount with all options")


@pytest.fixture
def daemon(runtime_dir: Path) -> Iterator[Daemon]:
    with running_daemon(runtime_dir) as running:
        yield running


def partitioned(path: Path) -> Path:
    """An image with three partitions of PART bytes each, full of random bytes."""
    path.write_bytes(random.Random(1).randbytes(3 * PART + 2 * MIB))
    script = "label: dos\n" + "".join(f"start={1 + 16 * n}MiB, size=16MiB, type=83\n" for n in range(3))
    sfdisk = shutil.which("sfdisk") or "/sbin/sfdisk"
    subprocess.run([sfdisk, "--quiet", "--no-reread", path], input=script.encode(), check=True)
    return path


class Worker(threading.Thread):
    """Does one kind of work until the time is over; `wrong` says what went wrong."""

    def __init__(self, over: threading.Event) -> None:
        super().__init__()
        self.over = over
        self.rounds = 0
        self.wrong = ""

    def run(self) -> None:
        try:
            while not self.over.is_set() and not self.wrong:
                self.work()
                self.rounds += 1
        except BaseException as error:
            self.wrong = f"{type(error).__name__}: {error}"

    def work(self) -> None:
        raise NotImplementedError

    def do(self, *command: str | Path) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300 + SECONDS, check=False)
        if done.returncode:
            raise AssertionError(f"{' '.join(map(str, command))}: {done.stdout[-500:]}{done.stderr[-1500:]}")


class Copying(Worker):
    """nbdcopy there and back."""

    def __init__(self, over: threading.Event, uri: str, folder: Path) -> None:
        super().__init__(over)
        self.uri, self.folder = uri, folder

    def work(self) -> None:
        there, back = self.folder / "there", self.folder / "back"
        there.write_bytes(random.Random(self.rounds).randbytes(PART))
        self.do("nbdcopy", "--flush", there, self.uri)
        self.do("nbdcopy", self.uri, back)
        assert there.read_bytes() == back.read_bytes(), "nbdcopy brought other bytes back"


class Converting(Worker):
    """qemu-img writes an image and compares it."""

    def __init__(self, over: threading.Event, uri: str, folder: Path) -> None:
        super().__init__(over)
        self.uri, self.folder = uri, folder

    def work(self) -> None:
        image = self.folder / "image"
        image.write_bytes(random.Random(-1 - self.rounds).randbytes(PART))
        self.do("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, self.uri)
        self.do("qemu-img", "compare", "-f", "raw", "-F", "raw", image, self.uri)


class Verifying(Worker):
    """fio writes through a file and verifies what it wrote."""

    def __init__(self, over: threading.Event, path: Path) -> None:
        super().__init__(over)
        self.path = path

    def work(self) -> None:
        self.do(
            *("fio", "--name=verify", f"--filename={self.path}", f"--size={PART}", "--rw=randwrite"),
            *("--bsrange=4k-128k", "--allow_file_create=0", f"--randseed={self.rounds + 1}"),
            *("--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0"),
            *("--end_fsync=1", "--ioengine=psync"),
        )


@pytest.mark.timeout(4 * SECONDS + 700)
def test_programs_notice_nothing_of_storage_drivers_that_are_killed(daemon: Daemon, tmp_path: Path) -> None:
    image = partitioned(tmp_path / "stick.img")
    daemon.udf.done("plug", image, "--serial", "STORM1")
    with Connection(daemon.socket) as connection:
        device = next(iter(connection.call("Devices")["devices"]))
        place = Path(device["instances"][0]["path"]).parent
        name = device["instances"][0]["name"]
        socket = place.parents[1] / "block" / f"{place.name}.sock"
        over = threading.Event()
        for folder in ("copying", "converting"):
            (tmp_path / folder).mkdir()
        workers: list[Worker] = [
            Copying(over, f"nbd+unix:///part1?socket={socket}", tmp_path / "copying"),
            Converting(over, f"nbd+unix:///part2?socket={socket}", tmp_path / "converting"),
            Verifying(over, place / "part3"),
        ]

        def instance() -> dict[str, Any]:
            return next(row for row in connection.call("Status")["mounts"] if row["name"] == name)

        before = instance()["generation"]
        kills = 0
        dice = random.Random(0)
        for worker in workers:
            worker.start()
        try:
            end = time.monotonic() + SECONDS
            while any(worker.is_alive() for worker in workers):
                if time.monotonic() > end:
                    over.set()
                row = instance()
                pid = row["driver_pid"]
                # One that is coming is spared mostly: it may need longer than there is between two kills.
                if pid and (row["state"] == "ACTIVE" or dice.random() < 0.1):
                    try:
                        os.kill(pid, signal.SIGKILL)
                        kills += 1
                    except ProcessLookupError:
                        pass
                time.sleep(BETWEEN)
        finally:
            over.set()
            for worker in workers:
                worker.join()
        status = instance()
    said = {type(worker).__name__: (worker.rounds, worker.wrong) for worker in workers}
    print(f"{status['generation'] - before} generations, {kills} kills, rounds {json.dumps(said)}")
    assert not any(worker.wrong for worker in workers), said
    assert all(worker.rounds for worker in workers), said
    assert status["generation"] - before > 3, "it was a storm"
    assert status["faults"] == 0, status
    daemon.udf.done("unplug", "stick")
    written = image.read_bytes()
    assert written[MIB : MIB + PART] == (tmp_path / "copying" / "there").read_bytes(), (
        "what was flushed is on the stick"
    )
    assert written[MIB + PART : MIB + 2 * PART] == (tmp_path / "converting" / "image").read_bytes()
