"""The shim's memory: at rest, for each node that the kernel knows, and over a million requests."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.benchmarks import clients, lab, machine
from tests.benchmarks.lab import UDF, Lab
from tests.benchmarks.machine import Memory
from tests.benchmarks.peers import Mount, UnavailableError
from tests.benchmarks.report import Result, Table, Target, at_most

REST_LIMIT = 20.0  # MB
NODE_LIMIT = 250.0  # bytes
GROWTH_LIMIT = 256.0  # KiB: what is left of it is noise of the allocator
FOLDERS = 100
CLIENTS = 3
BUDGET = 240.0  # seconds after which no more requests are made


def run(the_lab: Lab) -> Result:
    nodes, requests = (10_000, 30_000) if the_lab.quick else (100_000, 1_000_000)
    result = Result("memory")
    peers = the_lab.peers([UDF])
    if not peers:
        result.notes.append(the_lab.why_missing(UDF))
        return result
    source = the_lab.folder("memory")
    for number in range(FOLDERS):
        folder = source / f"folder-{number:03}"
        folder.mkdir()
        lab.make_names(folder, nodes // FOLDERS)
    lab.make_big_file(source / "big", 16 * lab.MIB)
    result.notes.append("own: anonymous and shared pages, without those of programs and libraries (file)")
    try:
        with the_lab.mounted(peers[0], source) as mount:
            _at_rest(result, mount)
            _per_node(result, the_lab, mount)
        with the_lab.mounted(peers[0], source) as mount:
            _growth(result, the_lab, mount, requests)
    except UnavailableError as error:
        the_lab.skip(UDF, str(error))
        result.notes.append(the_lab.why_missing(UDF))
    return result


def _mb(size: float) -> str:
    return f"{size / 1e6:.2f}"


def _row(label: str, memory: Memory) -> list[str]:
    return [label, *(_mb(part) for part in (memory.total, memory.anonymous, memory.file, memory.shared))]


def _at_rest(result: Result, mount: Mount) -> None:
    time.sleep(1.0)
    table = Table("at rest, just mounted", ["MB", "resident", "anonymous", "file", "shared"])
    shim = machine.memory(mount.processes["shim"][0])
    table.rows.append(_row("shim", shim))
    for pid in mount.processes["driver"]:
        table.rows.append(_row("driver", machine.memory(pid)))
    result.tables.append(table)
    result.data["rest"] = vars(shim)
    result.targets.append(at_most("the shim at rest", shim.total / 1e6, REST_LIMIT, " MB"))


def _per_node(result: Result, the_lab: Lab, mount: Mount) -> None:
    shim, driver = mount.processes["shim"][0], mount.processes["driver"][-1]
    folders = sorted(path for path in mount.path.iterdir() if path.is_dir())
    _stat_all(folders[:1])  # what is allocated once must not count for the nodes
    before = machine.memory(shim), machine.memory(driver), the_lab.daemon.status(mount.path)["counters"]["nodes"]
    start = time.perf_counter()
    clients.together(CLIENTS, lambda number: _stat_all(folders[1 + number :: CLIENTS]))
    seconds = time.perf_counter() - start
    after = machine.memory(shim), machine.memory(driver), the_lab.daemon.status(mount.path)["counters"]["nodes"]
    known = after[2] - before[2]
    table = Table("for each node that the kernel knows", ["", "nodes", "more own bytes", "bytes/node"])
    for role, one, two in (("shim", before[0], after[0]), ("driver", before[1], after[1])):
        more = two.own - one.own
        table.rows.append([role, f"{known:,.0f}", f"{more:,}", f"{more / known:.0f}"])
    result.notes.append(f"{known:,.0f} more nodes made known by stat in {seconds:.1f} s")
    result.tables.append(table)
    each = (after[0].own - before[0].own) / known
    result.data["node"] = {"nodes": known, "bytes": each}
    result.targets.append(at_most("the shim for each node", each, NODE_LIMIT, " bytes"))


def _stat_all(folders: list[Path]) -> list[float]:
    """Stat by name, without listing: a listing would make itself a place in the caches."""
    for folder in folders:
        number = 0
        directory = os.open(folder, os.O_RDONLY)
        try:
            while True:
                os.stat(f"name-{number:06}", dir_fd=directory)
                number += 1
        except FileNotFoundError:
            pass
        finally:
            os.close(directory)
    return []


def _growth(result: Result, the_lab: Lab, mount: Mount, wanted: int) -> None:
    shim = mount.processes["shim"][0]
    work = mount.path / "work"
    work.mkdir()
    table = Table(
        f"while it serves {wanted:,} requests of {CLIENTS} clients",
        ["requests", "resident", "anonymous", "file", "shared", "nodes", "handles"],
    )
    points: list[tuple[float, Memory]] = []
    served = 0.0
    step = wanted / 10
    repeat = 20
    start = time.perf_counter()
    first = the_lab.daemon.status(mount.path)["counters"]["requests"]
    while served < wanted and time.perf_counter() - start < BUDGET:
        clients.together(CLIENTS, _mixed(mount.path, repeat))
        counters = the_lab.daemon.status(mount.path)["counters"]
        before, served = served, counters["requests"] - first
        repeat = max(1, int(repeat * step / (served - before)))
        memory = machine.memory(shim)
        points.append((served, memory))
        row = _row(f"{served:,.0f}", memory)
        table.rows.append([*row, f"{counters['nodes']:.0f}", f"{counters['handles']:.0f}"])
    seconds = time.perf_counter() - start
    result.notes.append(f"{served:,.0f} requests in {seconds:.0f} s: {served / seconds:,.0f} a second")
    result.tables.append(table)
    warm = [memory for count, memory in points if count >= served * 0.2]
    growth = (warm[-1].own - warm[0].own) / 1024
    result.data["growth"] = [{"requests": count, **vars(memory)} for count, memory in points]
    target = f"growth of the shim from {served * 0.2:,.0f} to {served:,.0f} requests ≤ {GROWTH_LIMIT:g} KiB"
    result.targets.append(Target(target, f"{growth:.0f} KiB", growth <= GROWTH_LIMIT))


def _mixed(root: Path, repeat: int) -> Callable[[int], list[float]]:
    """A bit of everything, with names that come and go."""

    def work(number: int) -> list[float]:
        big = clients.open_random(root / "big")
        for turn in _turns(repeat):
            path = root / "work" / f"file-{number}-{turn}"
            path.write_bytes(b"x" * 300)
            path.read_bytes()
            path.rename(path.with_suffix(".new"))
            os.listdir(root / "work")
            path.with_suffix(".new").unlink()
            if path.exists():
                raise RuntimeError(f"{path} is still there")
            clients.drop_pages(big)
            clients.reads(big, [(number * 1000 + turn * 40 + page) % 4096 for page in range(40)])
        os.close(big)
        return []

    return work


def _turns(repeat: int) -> Iterator[int]:
    yield from range(repeat)
