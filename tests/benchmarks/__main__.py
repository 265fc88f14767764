"""Runs the benchmarks: `python -m tests.benchmarks [NAME…] [--quick] [--json FILE]`.

Exit code 0 when all ran, whatever the targets; 1 when one could not be carried out. Nothing is left behind, also after
Ctrl-C.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
import time
import traceback
from types import FrameType

from tests.benchmarks import devices, glue, leaks, machine, memory, parallel, pause, sequential, spin, stick, tree
from tests.benchmarks.lab import Lab
from tests.benchmarks.report import Result

BENCHMARKS = {
    "glue": glue.run,
    "sequential": sequential.run,
    "tree": tree.run,
    "parallel": parallel.run,
    "spin": spin.run,
    "pause": pause.run,
    "devices": devices.run,
    "stick": stick.run,
    "memory": memory.run,
    "leaks": leaks.run,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=sys.modules[__name__].__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones (default: all): {', '.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: shows that all works, not how fast it is")
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file")
    parser.add_argument("--dir", metavar="FOLDER", help="where the scratch folder is made (default: TMPDIR or /tmp)")
    parser.add_argument("--seed", type=int, default=1, help="of the choice of pages and sizes (default: 1)")
    parser.add_argument("--before", metavar="FOLDER", help="another checkout, whose UDF takes part too")
    parser.add_argument("--nice", type=int, default=0, help="priority of everything that is measured (default: 0)")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)} (there are {', '.join(BENCHMARKS)})")
    os.nice(arguments.nice)  # inherited by clients and contestants alike
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("interrupted; everything is unmounted", file=sys.stderr)
        return 130


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(arguments: argparse.Namespace) -> int:
    for line in machine.describe():
        print(line)
    results: list[Result] = []
    failed: list[str] = []
    start = time.perf_counter()
    with Lab(quick=arguments.quick, folder=arguments.dir, seed=arguments.seed, before=arguments.before) as lab:
        print(f"sources on {machine.filesystem_of(lab.root)}; seed {arguments.seed}; nice {arguments.nice}")
        for peer in lab.peers():
            print(f"  {peer.name:12} {peer.text}")
        print(flush=True)
        for name in arguments.names or BENCHMARKS:
            gc.collect()
            gc.disable()  # a collection in the client would be a slow operation of whoever is measured
            began, drops = time.perf_counter(), machine.cache_drops()
            try:
                result = BENCHMARKS[name](lab)
            except Exception:
                traceback.print_exc()
                failed.append(name)
                continue
            finally:
                gc.enable()
            if machine.cache_drops() > drops:
                result.notes.append(f"DISTURBED: caches were dropped {machine.cache_drops() - drops} times by others")
            result.notes.append(f"{time.perf_counter() - began:.0f} s; {machine.load()}")
            results.append(result)
            print(result.text(), end="\n\n", flush=True)
        skipped = dict(lab.skipped)
    targets = [target for result in results for target in result.targets]
    if targets:
        print("== all targets", *(target.line() for target in targets), sep="\n")
    print(f"{time.perf_counter() - start:.0f} s in all; {machine.load()}")
    if failed:
        print(f"could not be carried out: {', '.join(failed)}", file=sys.stderr)
    if arguments.json:
        document = {
            "machine": machine.describe(),
            "quick": arguments.quick,
            "seed": arguments.seed,
            "skipped": skipped,
            "failed": failed,
            "results": [result.as_dict() for result in results],
        }
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
