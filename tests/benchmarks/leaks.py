"""What is left after many mounts: descriptors, processes, mounts, memory of the daemon.

Memory is judged as pages from outside, and only once the daemon is warm: its log of events is full (it keeps the last
1,000; a mount makes 9), and it has had as many mounts at once as it will have again (pages that were needed once are
kept for reuse). Then the same work is done in rounds, and all but the largest growth count: a leak grows in every
round, a table of the interpreter that doubles (that of interned strings: 533 KiB) does so in one. Pages cannot tell a
small leak from fragments: that no object of an ended mount stays is shown by tests/t4_supervisor/test_freed.py.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from itertools import pairwise
from pathlib import Path
from time import perf_counter

from tests.benchmarks import machine
from tests.benchmarks.lab import UDF, Lab
from tests.benchmarks.report import Result, Table, Target, median, percentile
from udf.cli.holders import describe
from udf.supervisor.client import Connection, ControlError

MEMORY_LIMIT = 200.0  # KiB over four rounds of 40 or 50 mounts: about 1 for each; its objects are 10 and more
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
    warming, rounds, cycles, at_once = (4, 3, 4, 8) if the_lab.quick else (120, 5, 40, 50)
    result = Result("leaks")
    if not the_lab.peers([UDF]):
        result.notes.append(the_lab.why_missing(UDF))
        return result
    source = the_lab.folder("leaks")
    (source / "file").write_text("here\n")
    mounts = _Mounts(the_lab.daemon.socket, source)
    points = [the_lab.folder(f"point-{number}") for number in range(at_once)]
    start = _held(the_lab)
    cycled: list[_Held] = []
    crowded: list[_Held] = []
    with ThreadPoolExecutor(LANES, initializer=mounts.connect) as lanes:
        try:
            list(lanes.map(mounts.cycle, points[:LANES], [warming // LANES] * LANES))
            list(lanes.map(mounts.mount, points))
            full = _held(the_lab)
            resident = [machine.memory(pid).own for pid in machine.descendants(the_lab.daemon.pid)]
            list(lanes.map(mounts.unmount, points))
            warm = _settled(the_lab)
            mounts.times.clear()
            for _ in range(rounds):
                list(lanes.map(mounts.cycle, points[:LANES], [cycles // LANES] * LANES))
                cycled.append(_settled(the_lab))
            for _ in range(rounds):
                list(lanes.map(mounts.mount, points))
                list(lanes.map(mounts.unmount, points))
                crowded.append(_settled(the_lab))
        except BaseException:
            lanes.shutdown(cancel_futures=True)
            raise
        finally:
            mounts.close()
    held = {
        "at the start": start,
        f"{at_once} mounts at once": full,
        "warm": warm,
        **{f"after {cycles} cycles, round {number}": one for number, one in enumerate(cycled, 1)},
        **{f"after {at_once} at once, round {number}": one for number, one in enumerate(crowded, 1)},
    }
    table = Table("held by the daemon", ["", *(f.name if f.name != "kib" else "own KiB" for f in fields(_Held))])
    table.rows = [[name, *(f"{value:.0f}" for value in astuple(one))] for name, one in held.items()]
    result.tables.append(table)
    result.data = {name: vars(one) for name, one in held.items()}
    result.notes += [
        f"{rounds * cycles} cycles of mount, read and unmount, {LANES} at a time: median"
        f" {median(mounts.times) * 1e3:.0f} ms, p99 {percentile(mounts.times, 0.99) * 1e3:.0f} ms",
        f"{at_once} mounts at once: {len(resident)} processes with {sum(resident) / 1e6:.0f} MB of their own",
        f"not judged: the {warm.kib - start.kib:.0f} KiB that {warming} cycles and {at_once} mounts at once have left",
    ]
    _judge(result, f"{cycles} cycles", [warm, *cycled], is_warm=not the_lab.quick)
    _judge(result, f"{at_once} mounts at once", [cycled[-1], *crowded], is_warm=not the_lab.quick)
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


def _judge(result: Result, work: str, held: list[_Held], *, is_warm: bool) -> None:
    """`held`: before the first round and after each."""
    before, after = held[0], held[-1]
    left = [
        f"{getattr(after, key) - getattr(before, key):+d} {key}"
        for key in ("descriptors", "processes", "mounts")
        if getattr(after, key) != getattr(before, key)
    ]
    result.targets.append(Target(f"nothing left after rounds of {work}", ", ".join(left) or "nothing", not left))
    grown = [later.kib - earlier.kib for earlier, later in pairwise(held)]
    growth = sum(grown) - max(grown)
    text = f"the warm daemon's own pages grow over rounds of {work}, the largest left out, ≤ {MEMORY_LIMIT:g} KiB"
    measured = f"{growth:.0f} KiB (rounds: {', '.join(f'{each:.0f}' for each in grown)})"
    result.targets.append(Target(text, measured, growth <= MEMORY_LIMIT if is_warm else None))


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
