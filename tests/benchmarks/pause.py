"""How long a program waits that reads uncached data when its driver is killed, once for each kill.

A reader in a process of its own reads 4 KiB with O_DIRECT without a break, and notes each read that took longer than a
millisecond; the driver that serves is killed with SIGKILL at random moments. Run as a script this file is the reader.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PAGE = 4096
_NOTED = 1e-3  # seconds
_PAGES = 2048
_LIMITS = {"spare": (5.0, 15.0), "prewarmed": (12.0, 30.0)}  # milliseconds: median, p99


def read_on(path: str) -> None:
    """Read until standard input ends; prints what took long as JSON: [when it ended, how long], in seconds."""
    import mmap

    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, PAGE)
    long: list[tuple[float, float]] = []
    count, number = 0, 1
    os.preadv(fd, [buffer], 0)
    print("reading", flush=True)
    while not select.select([0], [], [], 0)[0]:
        for _ in range(20):
            number = number * 1103515245 + 12345 & 0x7FFFFFFF
            began = time.monotonic()
            if os.preadv(fd, [buffer], number % _PAGES * PAGE) != PAGE:
                raise OSError("a short read")
            took = time.monotonic() - began
            count += 1
            if took > _NOTED:
                long.append((began + took, took))
    print(json.dumps({"reads": count, "long": long}))


if __name__ == "__main__":
    read_on(sys.argv[1])
    sys.exit(0)

from tests.benchmarks import lab, machine  # noqa: E402 - the reader needs none of it
from tests.benchmarks.lab import Lab  # noqa: E402
from tests.benchmarks.peers import UnavailableError  # noqa: E402
from tests.benchmarks.report import Result, Table, at_most, median, percentile  # noqa: E402
from udf.supervisor.client import Connection  # noqa: E402


def run(the_lab: Lab) -> Result:
    kills = 40 if the_lab.quick else 250
    source = the_lab.folder("pause")
    lab.make_big_file(source / "big", _PAGES * PAGE)
    result = Result("pause")
    result.notes = [
        f"{kills} kills each, at random moments 150 to 300 ms apart; one reader, 4 KiB, O_DIRECT",
        "peers: a mount by libfuse or pyfuse3 answers ENOTCONN for ever after the first kill",
    ]
    table = Table("pause of an uncached reader, ms", ["", "median", "p90", "p99", "most", "kills", "reads"])
    for name, options in (("prewarmed", ""), ("spare", "spare")):
        watch = machine.Watch({})
        pauses, reads = _storm(the_lab, source, options, kills)
        others = watch.stop().others
        shown = [median(pauses), percentile(pauses, 0.9), percentile(pauses, 0.99), max(pauses)]
        table.rows.append([f"UDF {name}", *(f"{value:.1f}" for value in shown), str(len(pauses)), str(reads)])
        result.data[name] = pauses
        result.notes.append(f"{name}: CPUs used by others meanwhile: {others:.2f}")
        middle, most = _LIMITS[name]
        result.targets.append(at_most(f"pause, {name}, median", shown[0], middle, " ms"))
        result.targets.append(at_most(f"pause, {name}, p99", shown[2], most, " ms"))
    result.tables.append(table)
    return result


@contextlib.contextmanager
def _mounted(the_lab: Lab, source: Path, options: str) -> Iterator[Path]:
    at = the_lab.folder(f"pause-mount-{options or 'default'}")
    more = ",".join(filter(None, ("timeout=1000", options)))
    done = the_lab.daemon.udf("mount", "-t", "passthrough", "-o", more, str(source), str(at))
    if done.returncode:
        raise UnavailableError(done.stderr.strip())
    try:
        yield at
    finally:
        done = the_lab.daemon.udf("umount", str(at))
        if done.returncode:
            print(f"{at} was not unmounted: {done.stderr.strip()}", file=sys.stderr)
            the_lab.daemon.udf("umount", "-l", str(at))


def _storm(the_lab: Lab, source: Path, options: str, kills: int) -> tuple[list[float], int]:
    """The pauses in milliseconds, and how many reads there were."""
    with _mounted(the_lab, source, options) as at, Connection(the_lab.daemon.socket) as supervisor:
        reader = subprocess.Popen(
            [sys.executable, "-I", __file__, str(at / "big")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert reader.stdout is not None
        times = []
        try:
            reader.stdout.readline()
            while len(times) < kills:
                time.sleep(0.15 + the_lab.random.random() * 0.15)
                row = _row(supervisor, at)
                if row["state"] != "ACTIVE" or (options and not row["spare_pid"]):
                    continue
                times.append(time.monotonic())
                os.kill(row["driver_pid"], signal.SIGKILL)
            time.sleep(0.3)
            said = json.loads(reader.communicate("", timeout=60)[0])
        finally:
            reader.kill()
            reader.wait()
    return _pauses(times, said["long"]), said["reads"]


def _row(supervisor: Connection, at: Path) -> dict[str, Any]:
    return next(row for row in supervisor.call("Status")["mounts"] if row["mountpoint"] == str(at))


def _pauses(times: Sequence[float], long: Sequence[tuple[float, float]]) -> list[float]:
    """For each kill the longest read that ended between it and the next one."""
    pauses = []
    for number, when in enumerate(times):
        until = times[number + 1] if number + 1 < len(times) else float("inf")
        pauses.append(max((took for ended, took in long if when < ended <= until), default=_NOTED) * 1000)
    return pauses
