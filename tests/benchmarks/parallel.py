"""1 to 16 processes that read 4 KiB pages at the same time, each from its own part of a file, cold."""

from __future__ import annotations

import os

from tests.benchmarks import clients, lab, machine
from tests.benchmarks.lab import DIRECT, C, Lab
from tests.benchmarks.report import Result, Series, Table, compared, median, micro, times

READERS = (1, 2, 4, 8, 16)
FEW = (1, 4, 16)


def run(the_lab: Lab) -> Result:
    quick = the_lab.quick
    rounds, count = (2, 480) if quick else (7, 1600)
    pages = 16 * lab.MIB // lab.PAGE
    source = the_lab.folder("parallel")
    lab.make_big_file(source / "big", pages * lab.PAGE)
    result = Result("parallel")
    result.notes = [
        f"{rounds} rounds of {count} cold reads of 4 KiB (one request each), shared by the readers; each reader is a",
        "process with a descriptor of its own. p99: of single reads.",
    ]
    series: dict[int, dict[str, Series]] = {readers: {} for readers in (FEW if quick else READERS)}
    others = []
    with the_lab.all_mounted(source) as mounts:
        own_cache = {peer.name: peer.has_own_cache for peer in the_lab.peers()}
        for _, order in the_lab.rounds(rounds, list(mounts)):
            sample = the_lab.random.sample(range(pages), count)
            for readers, measured in series.items():
                for name in order:
                    path = mounts[name].path / "big"
                    if own_cache[name]:
                        _drop(path)
                    watch = machine.Watch(mounts[name].pids)
                    seconds, samples = _read(path, readers, sample)
                    others.append(watch.stop().others)
                    found = measured.setdefault(name, Series())
                    found.rounds.append(seconds / count)
                    found.samples += samples
    result.notes.append(f"CPUs used by others meanwhile: median {median(others):.2f}, most {max(others):.2f}")
    for readers, measured in series.items():
        table = Table(
            f"{readers} reader{'s' if readers > 1 else ''}", ["", "reads/s", "p99 µs of a read", "x direct", "x C"]
        )
        for name, one in measured.items():
            summary = one.summary()
            ratios = [times(compared(measured, name, base)) for base in (DIRECT, C)]
            table.rows.append([name, f"{1 / summary['median']:,.0f}", micro(summary["p99"]), *ratios])
            result.data.setdefault(str(readers), {})[name] = summary
        result.tables.append(table)
    result.notes.append("x direct, x C: ratios of time, less is faster")
    return result


def _drop(path: os.PathLike[str]) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        clients.drop_pages(fd)
    finally:
        os.close(fd)


def _read(path: os.PathLike[str], readers: int, pages: list[int]) -> tuple[float, list[float]]:
    fds = [clients.open_random(path) for _ in range(readers)]
    try:
        return clients.together(readers, lambda number: clients.reads(fds[number], pages[number::readers]))
    finally:
        for fd in fds:
            os.close(fd)
