"""Both drivers under a FAT stick's mount are killed again and again while programs work: they notice nothing.

usb_storage and fat die every 200 ms, one, the other or both. A program does random I/O on one file against a model,
another copies trees and compares them. In the end the image is looked at by fsck.fat and mtools. `UDF_STORM_SECONDS`
makes it longer; `UDF_STORM_PROGRAMS` adds programs, one command with {} for a directory in the mount for each line.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.t5_cli.conftest import Daemon, running_daemon
from tests.t6_stack.sticks import MIB, Desk, Stick
from tests.t6_stack.workloads import FAT_WORKLOADS

SECONDS = float(os.environ.get("UDF_STORM_SECONDS", "5"))
SEED = int(os.environ.get("UDF_STORM_SEED", "1"))
PROGRAMS = [line for line in os.environ.get("UDF_STORM_PROGRAMS", "").splitlines() if line.strip()]
BETWEEN = 0.2  # seconds
SCRIPT = Path(__file__).with_name("workloads.py")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount with all options")


@pytest.fixture
def daemon(runtime_dir: Path) -> Iterator[Daemon]:
    with running_daemon(runtime_dir) as running:
        yield running


@pytest.mark.timeout(6 * SECONDS + 500)
def test_programs_on_a_stick_notice_nothing_of_drivers_that_are_killed(daemon: Daemon, tmp_path: Path) -> None:
    root = tmp_path / "mnt"
    stick = Stick.made(tmp_path / "stick.img", "STORM", kind=32, size=128 * MIB)
    desk = Desk(daemon)
    disk = desk.disk(desk.plug(stick))
    desk.mount(f"{disk}/{stick.export}", root)
    rng = random.Random(SEED)

    def kill() -> int:
        """Kill one driver of the two, or both. One that is coming is spared now and then: who has never served
        long enough to answer gets nobody on, and on a busy machine that takes longer than a kill.
        """
        rows = [row for row in desk.rows() if row["driver_pid"] and (row["state"] == "ACTIVE" or rng.random() < 0.05)]
        pids = [row["driver_pid"] for row in rows]
        killed = 0
        for pid in pids if rng.random() < 0.4 else rng.sample(pids, min(1, len(pids))):
            try:
                os.kill(pid, signal.SIGKILL)
                killed += 1
            except ProcessLookupError:
                pass
        return killed

    commands = [[sys.executable, "-I", str(SCRIPT), name, str(root), str(SECONDS), str(SEED)] for name in FAT_WORKLOADS]
    for number, line in enumerate(PROGRAMS):
        place = root / f"program{number}"
        place.mkdir()
        commands.append([word.replace("{}", str(place)) for word in shlex.split(line)])
    running = [
        (command, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        for command in commands
    ]
    kills = 0
    operations: dict[str, int] = {}
    end = time.monotonic() + 4 * SECONDS + 400
    try:
        while any(process.poll() is None for _, process in running):
            assert time.monotonic() < end, f"still running: {[c for c, p in running if p.poll() is None]}"
            kills += kill()
            time.sleep(BETWEEN)
    finally:
        for _, process in running:
            process.kill()
    for command, process in running:
        said, wrong = process.communicate()
        assert process.returncode == 0, f"{command}: {said[-500:]}{wrong[-2000:]}{daemon.text()[-2000:]}"
        if str(SCRIPT) in command:
            operations |= {json.loads(said)["workload"]: json.loads(said)["operations"]}
    rows = {row["name"]: row for row in desk.rows()}
    print(f"{kills} kills, {operations} operations, generations {[row['generation'] for row in rows.values()]}")
    assert all(row["generation"] > 2 for row in rows.values()), "it was a storm"
    assert all(row["faults"] == 0 for row in rows.values()), rows
    stick.files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert len(stick.files) > len(FAT_WORKLOADS), "the copies are there"
    desk.umount(root)
    desk.unplug(stick)
    found = stick.check(clean=True)
    assert found == stick.files, "what mtools finds is what the programs saw, and nothing else"
    desk.nothing_is_left()
    desk.close()
