"""What one small operation costs: cold 4 KiB reads and stats (one request each), create and unlink, and cached ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from tests.benchmarks import clients, lab, machine
from tests.benchmarks.lab import BEFORE, DIRECT, UDF, C, Lab
from tests.benchmarks.peers import Mount
from tests.benchmarks.report import Result, Series, Table, at_least, at_most, compared, median, micro, times

MEASURES = {
    "cold read": "cold 4 KiB random read",
    "cold stat": "cold stat",
    "create": "create, close, unlink",
    "warm read": "4 KiB random read of cached pages",
    "warm stat": "stat of cached names",
}
GLUE_LIMIT = 1.3
WARM_SHARE = 0.9
COST_LIMITS = {"cold read": 1.05, "cold stat": 1.05, "create": 1.15}  # against the checkout before


@dataclass
class _Bench:
    """One contestant's mount and what is open on it."""

    mount: Mount
    has_own_cache: bool
    big: int
    names: int
    work: int
    series: dict[str, Series] = field(default_factory=lambda: {key: Series() for key in MEASURES})
    cpu: float = 0.0
    cold_operations: int = 0


def run(the_lab: Lab) -> Result:
    quick = the_lab.quick
    rounds, count, pairs = (7, 200, 60) if quick else (25, 400, 120)
    pages = (32 if quick else 64) * lab.MIB // lab.PAGE
    counted = 100
    source = the_lab.folder("glue")
    lab.make_big_file(source / "big", pages * lab.PAGE)
    (source / "names").mkdir()
    names = lab.make_names(source / "names", rounds * count + counted)
    result = Result("glue")
    result.notes = [
        f"{rounds} rounds of {count} reads, {count} stats and {pairs} create+unlink, the contestants in turn in each;",
        "median: of the rounds' medians; p99: of all operations; ratios: medians of the rounds' ratios.",
        "cold read: the mount's pages dropped, no readahead, the source's pages stay cached (for native: never cold).",
        "cold stat: the first stat of a name in this mount (passthrough_ll searches a list of all names it has given).",
    ]
    with ExitStack() as stack:
        mounts = stack.enter_context(the_lab.all_mounted(source))
        benches = {}
        for peer in the_lab.peers():
            if peer.name in mounts:
                benches[peer.name] = _open(stack, mounts[peer.name], peer.name, peer.has_own_cache)
        others = []
        for number, order in the_lab.rounds(rounds, list(benches)):
            sample = the_lab.random.sample(range(pages), count)
            part = names[number * count : (number + 1) * count]
            for name in order:
                watch = machine.Watch(benches[name].mount.pids)
                _round(benches[name], sample, part, pairs)
                others.append(watch.stop().others)
        requests = _requests(the_lab, benches, names[-counted:])
    result.notes.append(f"CPUs used by others meanwhile: median {median(others):.2f}, most {max(others):.2f}")
    result.notes += requests
    for key, title in MEASURES.items():
        series = {name: bench.series[key] for name, bench in benches.items()}
        table = Table(title, ["", "median µs", "p99 µs", "ops/s", "x direct", "x C", "CPU µs/op"])
        for name, bench in benches.items():
            summary = series[name].summary()
            cpu = f"{bench.cpu / bench.cold_operations * 1e6:.0f}" if key == "cold read" and bench.mount.pids else "-"
            ratios = [times(compared(series, name, base)) for base in (DIRECT, C)]
            figures = [micro(summary["median"]), micro(summary["p99"]), f"{1 / summary['median']:,.0f}"]
            table.rows.append([name, *figures, *ratios, cpu])
            result.data.setdefault(key, {})[name] = {**summary, "x_direct": compared(series, name, DIRECT)}
        if key != "cold read":
            table.columns = table.columns[:-1]
            table.rows = [row[:-1] for row in table.rows]
        result.tables.append(table)
        if key in ("cold read", "cold stat"):
            result.targets.append(
                at_most(f"{title}, {UDF} against direct", compared(series, UDF, DIRECT), GLUE_LIMIT, " x")
            )
        if BEFORE in series and key in COST_LIMITS:
            ratio = compared(series, UDF, BEFORE)
            result.targets.append(at_most(f"{title}, {UDF} against {BEFORE}", ratio, COST_LIMITS[key], " x"))
        if key in ("warm read", "warm stat"):
            share = compared(series, C, UDF)
            result.targets.append(at_least(f"{title}, speed of {UDF} against C", share, WARM_SHARE, " x"))
    return result


def _open(stack: ExitStack, mount: Mount, name: str, has_own_cache: bool) -> _Bench:
    work = mount.path / f"work-{name.replace(' ', '-')}"
    work.mkdir()
    big = clients.open_random(mount.path / "big")
    names, created = (os.open(path, os.O_RDONLY) for path in (mount.path / "names", work))
    for fd in (big, names, created):
        stack.callback(os.close, fd)
    return _Bench(mount, has_own_cache, big, names, created)


def _round(bench: _Bench, pages: list[int], names: list[str], pairs: int) -> None:
    if bench.has_own_cache:
        clients.drop_pages(bench.big)
    clients.stats(bench.work, ["."])  # awake, and its code is in the CPU's caches again
    watch = machine.Watch(bench.mount.pids)
    bench.series["cold read"].add(clients.reads(bench.big, pages))
    bench.cpu += watch.stop().served
    bench.cold_operations += len(pages)
    bench.series["cold stat"].add(clients.stats(bench.names, names))
    bench.series["create"].add(clients.creates(bench.work, [f"new-{number}" for number in range(pairs)]))
    bench.series["warm read"].add(clients.reads(bench.big, pages))
    bench.series["warm stat"].add(clients.stats(bench.names, names))


def _requests(the_lab: Lab, benches: dict[str, _Bench], names: list[str]) -> list[str]:
    """How many requests each operation is, in a pass that is not timed."""
    if the_lab.counter is None:
        return [the_lab.why_not_counted]
    lines = ["requests per operation, counted by the kernel's tracepoint in a pass of its own:"]
    pages = list(range(len(names)))
    for name, bench in benches.items():
        if not bench.has_own_cache:
            continue
        clients.drop_pages(bench.big)
        steps: dict[str, Callable[[], object]] = {
            "cold read": partial(clients.reads, bench.big, pages),
            "cold stat": partial(clients.stats, bench.names, names),
            "create": partial(clients.creates, bench.work, [f"new-{number}" for number in pages]),
            "warm read": partial(clients.reads, bench.big, pages),
            "warm stat": partial(clients.stats, bench.names, names),
        }
        parts = []
        for key, step in steps.items():
            with the_lab.counter.counting(bench.mount.path) as counts:
                step()
            each = " ".join(f"{op} {count / len(names):.2f}" for op, count in sorted(counts.items()))
            parts.append(f"{key}: {each or 'none'}")
        lines.append(f"  {name}: " + "; ".join(parts))
    return lines
