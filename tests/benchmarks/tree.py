"""`find` and `cat` over a tree of small files, on a new mount and again."""

from __future__ import annotations

import subprocess
from pathlib import Path
from time import perf_counter

from tests.benchmarks import machine
from tests.benchmarks.lab import DIRECT, UDF, C, Lab
from tests.benchmarks.machine import RequestCounter
from tests.benchmarks.peers import Peer, UnavailableError
from tests.benchmarks.report import Result, Series, Table, at_least, compared, median, times

FIND = "find . -type f -printf '%s\\n' | awk '{ s += $1 } END { print s }'"
CAT = "find . -type f -print0 | xargs -0 cat | wc -c"
STEPS = (("cold find", FIND), ("cold cat", CAT), ("warm find", FIND), ("warm cat", CAT))
FOLDERS = 100
WARM_SHARE = 0.9
TRIES = 3
BUDGET = 100.0  # seconds after which no new round is begun


def run(the_lab: Lab) -> Result:
    rounds, files = (1, 2000) if the_lab.quick else (3, 10000)
    source = the_lab.folder("tree")
    total = _make_tree(source, files, the_lab)
    result = Result("tree")
    result.notes = [
        f"{rounds} rounds over {files:,} files of 0.2 to 8 KB in {FOLDERS} directories, {total / 1e6:.1f} MB.",
        "cold: a new mount, the source cached (for native: never cold); find asks for each file's size, cat reads all.",
        "warm: the same again on that mount. Opening is a request each time, so a warm cat is not all cached;",
        f"{C} drops a file's pages at each open.",
    ]
    series: dict[str, dict[str, Series]] = {key: {} for key, _ in STEPS}
    requests: list[str] = []
    others: list[float] = []
    out: set[str] = set()
    began = perf_counter()
    for number, order in the_lab.rounds(rounds, [peer.name for peer in the_lab.peers()]):
        if number and perf_counter() - began > BUDGET:
            result.notes.append(f"stopped after {number} rounds, because they took longer than {BUDGET:.0f} s")
            break
        for name in order:
            for peer in the_lab.peers({name} - out):
                try:
                    seconds = _undisturbed(the_lab, peer, source, total, others)
                    for key, _ in STEPS:
                        series[key].setdefault(name, Series()).rounds.append(seconds[key])
                    if number == 0 and peer.has_own_cache and the_lab.counter is not None:
                        requests += _requests(the_lab, the_lab.counter, peer, source, total)
                except UnavailableError as error:
                    the_lab.skip(name, str(error))
                    out.add(name)
                    for measured in series.values():
                        measured.pop(name, None)
    result.notes.append(f"CPUs used by others meanwhile: median {median(others):.2f}, most {max(others):.2f}")
    if the_lab.counter is None:
        result.notes.append(the_lab.why_not_counted)
    result.notes += requests
    _add_tables(result, series)
    return result


def _undisturbed(the_lab: Lab, peer: Peer, source: Path, total: int, others: list[float]) -> dict[str, float]:
    """One mount's seconds for each step; again when somebody has dropped the caches meanwhile."""
    seconds: dict[str, float] = {}
    for _ in range(TRIES):
        drops = machine.cache_drops()
        with the_lab.mounted(peer, source) as mount:
            for key, command in STEPS:
                watch = machine.Watch(mount.pids)
                seconds[key] = _timed(command, mount.path, total)
                others.append(watch.stop().others)
        if machine.cache_drops() == drops:
            break
    return seconds


def _requests(the_lab: Lab, counter: RequestCounter, peer: Peer, source: Path, total: int) -> list[str]:
    """What the kernel asks for in each step, in a pass that is not timed."""
    lines = []
    with the_lab.mounted(peer, source) as mount:
        for key, command in STEPS:
            with counter.counting(mount.path) as counts:
                _timed(command, mount.path, total)
            each = ", ".join(f"{op} {count:,}" for op, count in counts.most_common(6))
            lines.append(f"  requests of a {key}, {peer.name}: {each}")
    return lines


def _add_tables(result: Result, series: dict[str, dict[str, Series]]) -> None:
    for state in ("cold", "warm"):
        both: dict[str, Series] = {}
        for name in series[f"{state} find"]:
            pairs = zip(series[f"{state} find"][name].rounds, series[f"{state} cat"][name].rounds, strict=True)
            both[name] = Series(rounds=[find + cat for find, cat in pairs])
        table = Table(f"{state} find + cat", ["", "find s", "cat s", "both s", "slowest s", "x direct", "x C"])
        for name, measured in both.items():
            parts = [f"{median(series[f'{state} {step}'][name].rounds):.3f}" for step in ("find", "cat")]
            ratios = [times(compared(both, name, base)) for base in (DIRECT, C)]
            seconds = [f"{median(measured.rounds):.3f}", f"{max(measured.rounds):.3f}"]
            table.rows.append([name, *parts, *seconds, *ratios])
            result.data.setdefault(state, {})[name] = {
                "find": series[f"{state} find"][name].rounds,
                "cat": series[f"{state} cat"][name].rounds,
            }
        result.tables.append(table)
        if state == "warm":
            share = compared(both, C, UDF)
            result.targets.append(at_least(f"warm find + cat, speed of {UDF} against C", share, WARM_SHARE, " x"))


def _make_tree(source: Path, files: int, the_lab: Lab) -> int:
    total = 0
    data = the_lab.random.randbytes(8192)
    for folder in range(FOLDERS):
        directory = source / f"folder-{folder:03}"
        directory.mkdir()
        for number in range(files // FOLDERS):
            size = the_lab.random.randrange(200, 8000)
            (directory / f"file-{number:03}.txt").write_bytes(data[:size])
            total += size
    return total


def _timed(command: str, folder: Path, expected: int) -> float:
    start = perf_counter()
    done = subprocess.run(
        ["sh", "-c", command], cwd=folder, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    seconds = perf_counter() - start
    if done.returncode or int(done.stdout or 0) != expected:
        raise RuntimeError(f"{command} in {folder}: {done.stdout.strip()} instead of {expected} bytes; {done.stderr}")
    return seconds
