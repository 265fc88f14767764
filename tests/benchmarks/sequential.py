"""Reading a large file from its start to its end, cold and from the cache."""

from __future__ import annotations

import os
from contextlib import ExitStack

from tests.benchmarks import clients, lab, machine
from tests.benchmarks.lab import DIRECT, UDF, C, Lab
from tests.benchmarks.report import Result, Series, Table, at_least, compared, median, micro, times

BLOCK = 128 * 1024
WARM_SHARE = 0.9


def run(the_lab: Lab) -> Result:
    rounds, size = (3, 32 * lab.MIB) if the_lab.quick else (9, 128 * lab.MIB)
    source = the_lab.folder("sequential")
    lab.make_big_file(source / "big", size)
    result = Result("sequential")
    result.notes = [
        f"{rounds} rounds of one pass over {size // lab.MIB} MiB in reads of {BLOCK // 1024} KiB, the file open.",
        "cold: the mount's pages dropped, the source's pages cached (for native: never cold). p99: of single reads.",
    ]
    buffer = bytearray(BLOCK)
    others = []
    cold: dict[str, Series] = {}
    warm: dict[str, Series] = {}
    cpu: dict[str, float] = {}
    with ExitStack() as stack:
        mounts = stack.enter_context(the_lab.all_mounted(source))
        own_cache = {peer.name: peer.has_own_cache for peer in the_lab.peers()}
        files = {}
        for name, mount in mounts.items():
            files[name] = os.open(mount.path / "big", os.O_RDONLY)
            stack.callback(os.close, files[name])
            cold[name], warm[name], cpu[name] = Series(), Series(), 0.0
        for _, order in the_lab.rounds(rounds, list(mounts)):
            for name in order:
                if own_cache[name]:
                    clients.drop_pages(files[name])
                watch = machine.Watch(mounts[name].pids)
                for series in (cold[name], warm[name]):
                    samples = clients.sequential(files[name], buffer, size)
                    series.samples += samples
                    series.rounds.append(sum(samples))
                cpu[name] += watch.stop().served
                others.append(watch.others)
    result.notes.append(f"CPUs used by others meanwhile: median {median(others):.2f}, most {max(others):.2f}")
    for title, measured in (("cold sequential read", cold), ("warm sequential read", warm)):
        table = Table(title, ["", "GB/s", "p99 µs of a read", "x direct", "x C", "CPU ms/GB"])
        for name, series in measured.items():
            summary = series.summary()
            ratios = [times(compared(measured, name, base)) for base in (DIRECT, C)]
            used = f"{cpu[name] / (rounds * size) * 1e12:.0f}" if mounts[name].pids and measured is cold else "-"
            table.rows.append([name, f"{size / summary['median'] / 1e9:.2f}", micro(summary["p99"]), *ratios, used])
            result.data.setdefault(title, {})[name] = {**summary, "bytes": size}
        result.tables.append(table)
    result.notes.append("x direct, x C: ratios of time, less is faster")
    result.targets.append(
        at_least(f"warm sequential read, speed of {UDF} against C", compared(warm, C, UDF), WARM_SHARE, " x")
    )
    return result
