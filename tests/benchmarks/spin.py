"""What looking again before sleeping costs and brings: CPU time of shim and driver, busy, paced and idle."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, field

from tests.benchmarks import clients, lab, machine
from tests.benchmarks.lab import DIRECT, NOSPIN, SPIN, C, Lab
from tests.benchmarks.peers import Mount
from tests.benchmarks.report import Result, Series, Table, compared, median, micro, times

PACES = {"back to back": 0.0, "0.2 ms pause": 0.0002, "2 ms pause": 0.002}


@dataclass
class _Use:
    """One contestant at one pace."""

    series: Series = field(default_factory=Series)
    cpu: dict[str, float] = field(default_factory=dict)
    operations: int = 0


def run(the_lab: Lab) -> Result:
    rounds, count, idle = (2, 300, 2.0) if the_lab.quick else (7, 600, 5.0)
    pages = 16 * lab.MIB // lab.PAGE
    source = the_lab.folder("spin")
    lab.make_big_file(source / "big", pages * lab.PAGE)
    result = Result("spin")
    result.notes = [
        f"{rounds} rounds of {count} cold 4 KiB reads at each pace, then {idle:g} s without any.",
        "CPU: seconds of user and system time for 10,000 reads, by role.",
    ]
    others = []
    uses: dict[str, dict[str, _Use]] = {pace: {} for pace in PACES}
    with ExitStack() as stack:
        mounts = stack.enter_context(the_lab.all_mounted(source, [SPIN, NOSPIN, DIRECT, C]))
        files = {}
        for name, mount in mounts.items():
            files[name] = clients.open_random(mount.path / "big")
            stack.callback(os.close, files[name])
        for _, order in the_lab.rounds(rounds, list(mounts)):
            sample = the_lab.random.sample(range(pages), count)
            for pace, pause in PACES.items():
                for name in order:
                    watch = machine.Watch(mounts[name].pids)
                    _paced(uses[pace].setdefault(name, _Use()), mounts[name], files[name], sample, pause)
                    others.append(watch.stop().others)
        at_rest = _idle(mounts, idle)
    result.notes.append(f"CPUs used by others meanwhile: median {median(others):.2f}, most {max(others):.2f}")
    for pace, measured in uses.items():
        all_series = {name: use.series for name, use in measured.items()}
        table = Table(
            f"cold reads, {pace}",
            ["", "median µs", "p99 µs", "x direct", "CPU s: shim", "CPU s: driver or server", "CPU s: both"],
        )
        for name, use in measured.items():
            summary = use.series.summary()
            cpu = {role: seconds / use.operations * 10_000 for role, seconds in use.cpu.items()}
            shim = f"{cpu['shim']:.2f}" if "shim" in cpu else "-"
            server = f"{cpu.get('driver', cpu.get('server', 0.0)):.2f}"
            row = [name, micro(summary["median"]), micro(summary["p99"]), times(compared(all_series, name, DIRECT))]
            table.rows.append([*row, shim, server, f"{sum(cpu.values()):.2f}"])
            result.data.setdefault(pace, {})[name] = {**summary, "cpu_per_10000": cpu}
        result.tables.append(table)
    table = Table("idle", ["", "% of a CPU: shim", "% of a CPU: driver or server"])
    for name, used in at_rest.items():
        shim = f"{used['shim'] * 100:.2f}" if "shim" in used else "-"
        table.rows.append([name, shim, f"{used.get('driver', used.get('server', 0.0)) * 100:.2f}"])
    result.data["idle"] = at_rest
    result.tables.append(table)
    return result


def _paced(use: _Use, mount: Mount, fd: int, pages: list[int], pause: float) -> None:
    clients.drop_pages(fd)
    before = {role: machine.cpu_seconds(pids) for role, pids in mount.processes.items()}
    if pause:
        samples = []
        for page in pages:
            time.sleep(pause)
            samples += clients.reads(fd, [page])
    else:
        samples = clients.reads(fd, pages)
    use.series.add(samples)
    use.operations += len(pages)
    for role, pids in mount.processes.items():
        use.cpu[role] = use.cpu.get(role, 0.0) + machine.cpu_seconds(pids) - before[role]


def _idle(mounts: dict[str, Mount], seconds: float) -> dict[str, dict[str, float]]:
    """Share of a CPU that each role uses when nobody asks for anything."""
    time.sleep(0.5)
    before = {
        (name, role): machine.cpu_seconds(pids)
        for name, mount in mounts.items()
        for role, pids in mount.processes.items()
    }
    time.sleep(seconds)
    used: dict[str, dict[str, float]] = {}
    for (name, role), was in before.items():
        used.setdefault(name, {})[role] = (machine.cpu_seconds(mounts[name].processes[role]) - was) / seconds
    return used
