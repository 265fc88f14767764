"""The driver is killed again and again while programs work: they see no error, no difference, and they end.

`UDF_STORM_SECONDS` makes it longer; `UDF_STORM_PROGRAMS` adds programs of the machine's own, one command with {} for a
directory in the mount for each line.
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
from typing import Any

import pytest

from tests.t5_cli.conftest import Daemon, running_daemon
from tests.t6_stack.workloads import WORKLOADS
from udf.supervisor.client import Connection

SECONDS = float(os.environ.get("UDF_STORM_SECONDS", "6"))
PROGRAMS = [line for line in os.environ.get("UDF_STORM_PROGRAMS", "").splitlines() if line.strip()]
BETWEEN = 0.2  # seconds
SCRIPT = Path(__file__).with_name("workloads.py")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount with all options")


class Storm:
    """Kills one mount's driver, whatever process that is."""

    def __init__(self, daemon: Daemon, root: Path) -> None:
        self._connection = Connection(daemon.socket)
        self._root = str(root)
        self.kills = 0
        self._dice = random.Random(0)

    def mount(self) -> dict[str, Any]:
        mounts = self._connection.call("Status")["mounts"]
        return next(mount for mount in mounts if mount["mountpoint"] == self._root)

    def kill(self) -> None:
        """Kill the driver that serves. One that is coming is spared mostly: where it takes longer to come than there
        is between two kills nobody would get on.
        """
        mount = self.mount()
        pid = mount["driver_pid"]
        if pid and (mount["state"] == "ACTIVE" or self._dice.random() < 0.1):
            try:
                os.kill(pid, signal.SIGKILL)
                self.kills += 1
            except ProcessLookupError:
                pass

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def daemon(runtime_dir: Path) -> Iterator[Daemon]:
    with running_daemon(runtime_dir) as running:
        yield running


@pytest.fixture(params=["passthrough", "memfs"])
def storm(request: pytest.FixtureRequest, daemon: Daemon, tmp_path: Path) -> Iterator[Storm]:
    root = tmp_path / "mount"
    root.mkdir()
    (tmp_path / "source").mkdir()
    source = [tmp_path / "source"] if request.param == "passthrough" else []
    daemon.udf.done("mount", "-t", request.param, *source, root, "-o", "allow_other,suid,dev")
    storm = Storm(daemon, root)
    try:
        yield storm
    finally:
        storm.close()
        ended = daemon.udf("umount", root)
        if ended.returncode:
            subprocess.run(["umount", "-l", root], check=False)
    assert ended.returncode == 0, ended.stderr
    left = list((tmp_path / "source").glob(".udf*"))
    assert not left, "hidden files are removed with their last close"


@pytest.mark.timeout(4 * SECONDS + 500)
def test_programs_notice_nothing_of_drivers_that_are_killed(storm: Storm, tmp_path: Path) -> None:
    root = tmp_path / "mount"
    seed = int(os.environ.get("UDF_STORM_SEED", "1"))
    commands = [[sys.executable, "-I", str(SCRIPT), name, str(root), str(SECONDS), str(seed)] for name in WORKLOADS]
    for number, line in enumerate(PROGRAMS):
        place = root / f"program{number}"
        subprocess.run(["mkdir", place], check=True)
        commands.append([word.replace("{}", str(place)) for word in shlex.split(line)])
    running = [
        (command, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        for command in commands
    ]
    end = time.monotonic() + 2 * SECONDS + 400
    try:
        while any(process.poll() is None for _, process in running):
            assert time.monotonic() < end, f"still running: {[c for c, p in running if p.poll() is None]}"
            storm.kill()
            time.sleep(BETWEEN)
    finally:
        for _, process in running:
            process.kill()
    operations = 0
    for command, process in running:
        said, wrong = process.communicate()
        assert process.returncode == 0, f"{command}: {said[-500:]}{wrong[-2000:]}"
        if str(SCRIPT) in command:
            operations += json.loads(said)["operations"]
    mount = storm.mount()
    print(f"{mount['driver']}: {mount['generation']} generations, {storm.kills} kills, {operations} operations")
    assert mount["generation"] > 3, "it was a storm"
    assert mount["faults"] == 0, mount
