"""What is left after many mounts: descriptors, processes, mounts, files, memory of the daemon."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from time import perf_counter

from tests.benchmarks import machine
from tests.benchmarks.lab import UDF, Lab
from tests.benchmarks.report import Result, Table, Target, median, percentile
from udf.cli.holders import describe
from udf.supervisor.client import Connection, ControlError

MEMORY_LIMIT = 1024.0  # KiB; a leak of 16 KiB for each mount would show
SETTLE = 5.0
LANES = 4  # threads that mount at the same time
TRIES = 50


@dataclass
class _Held:
    """What the daemon and the machine hold because of its mounts."""

    descriptors: int
    processes: int
    mounts: int
    threads: int  # not judged: idle worker threads end by themselves after some seconds
    kib: float


def run(the_lab: Lab) -> Result:
    cycles, warming, at_once = (12, 4, 8) if the_lab.quick else (200, 20, 50)
    result = Result("leaks")
    if not the_lab.peers([UDF]):
        result.notes.append(the_lab.why_missing(UDF))
        return result
    source = the_lab.folder("leaks")
    (source / "file").write_text("here\n")
    mounts = _Mounts(the_lab.daemon.socket, source)
    points = [the_lab.folder(f"point-{number}") for number in range(at_once)]
    table = Table("held by the daemon", ["", *(f.name if f.name != "kib" else "own KiB" for f in fields(_Held))])
    held: dict[str, _Held] = {}
    with ThreadPoolExecutor(LANES, initializer=mounts.connect) as lanes:
        try:
            list(lanes.map(mounts.cycle, points[:LANES], [warming // LANES] * LANES))
            held[f"after {warming} cycles"] = _settled(the_lab)
            list(lanes.map(mounts.cycle, points[:LANES], [(cycles - warming) // LANES] * LANES))
            held[f"after {cycles} cycles"] = _settled(the_lab)
            list(lanes.map(mounts.mount, points))
            held[f"{at_once} mounts at once"] = _held(the_lab)
            resident = [machine.memory(pid).own for pid in machine.descendants(the_lab.daemon.pid)]
            list(lanes.map(mounts.unmount, points))
            held["after their unmount"] = _settled(the_lab)
            # A second time: what is kept for reuse is not a leak, what grows again is.
            list(lanes.map(mounts.mount, points))
            list(lanes.map(mounts.unmount, points))
            held["and once more"] = _settled(the_lab)
        except BaseException:
            lanes.shutdown(cancel_futures=True)
            raise
        finally:
            mounts.close()
    table.rows = [[name, *(f"{value:.0f}" for value in astuple(one))] for name, one in held.items()]
    result.tables.append(table)
    result.data = {name: vars(one) for name, one in held.items()}
    result.notes += [
        f"{cycles} cycles of mount, read and unmount, {LANES} at a time: median {median(mounts.times) * 1e3:.0f} ms,"
        f" p99 {percentile(mounts.times, 0.99) * 1e3:.0f} ms",
        f"{at_once} mounts at once: {len(resident)} processes with {sum(resident) / 1e6:.0f} MB of their own",
    ]
    _judge(result, list(held.items()))
    refused = len(mounts.refused)
    result.notes += mounts.refused[:5]
    result.targets.append(Target("no unmount refused as busy", f"{refused} refused", not refused))
    return result


class _Mounts:
    """Mounts and unmounts through the daemon's control socket, as the command line does; each thread by its own."""

    def __init__(self, socket: Path, source: Path) -> None:
        self._socket, self._source = socket, source
        self._local = threading.local()
        self._connections: list[Connection] = []
        self.times: list[float] = []
        self.refused: list[str] = []

    def connect(self) -> None:
        """Called in each thread."""
        self._local.connection = Connection(self._socket)
        self._connections.append(self._local.connection)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def mount(self, point: Path) -> None:
        call = self._local.connection.call
        call("Mount", driver="passthrough", source=str(self._source), mountpoint=str(point), options={})
        if (point / "file").read_text() != "here\n":
            raise RuntimeError(f"{point} shows something else")

    def unmount(self, point: Path) -> None:
        for _ in range(TRIES):
            try:
                self._local.connection.call("Unmount", mountpoint=str(point))
            except ControlError as error:
                if error.name != "Busy":
                    raise
                self.refused.append(f"{point.name} was busy: used by {describe(str(point))}")
                time.sleep(0.1)
            else:
                return
        raise RuntimeError(f"{point} cannot be unmounted")

    def cycle(self, point: Path, count: int) -> None:
        for _ in range(count):
            start = perf_counter()
            self.mount(point)
            self.unmount(point)
            self.times.append(perf_counter() - start)


def _judge(result: Result, held: list[tuple[str, _Held]]) -> None:
    (_, first), (cycled, second), _, (unmounted, third), (_, fourth) = held
    for label, before, after in ((cycled, first, second), (unmounted, second, third)):
        left = [
            f"{getattr(after, key) - getattr(before, key):+d} {key}"
            for key in ("descriptors", "processes", "mounts")
            if getattr(after, key) != getattr(before, key)
        ]
        result.targets.append(Target(f"nothing left {label}", ", ".join(left) or "nothing", not left))
    for label, growth in (("the cycles", second.kib - first.kib), ("mounting all once more", fourth.kib - third.kib)):
        text = f"the daemon's memory grows over {label} ≤ {MEMORY_LIMIT:g} KiB"
        result.targets.append(Target(text, f"{growth:.0f} KiB", growth <= MEMORY_LIMIT))


def _held(the_lab: Lab) -> _Held:
    pid = the_lab.daemon.pid
    return _Held(
        machine.descriptors(pid),
        len(machine.descendants(pid)),
        len(machine.mounts_below(the_lab.root)),
        len(list(Path(f"/proc/{pid}/task").iterdir())),
        machine.memory(pid).own / 1024,
    )


def _settled(the_lab: Lab) -> _Held:
    """When processes that are ending have been reaped, or after a grace. Idle worker threads end by themselves too."""
    end = time.monotonic() + SETTLE
    held = _held(the_lab)
    while time.monotonic() < end and (held.processes or held.mounts):
        time.sleep(0.05)
        held = _held(the_lab)
    return held
