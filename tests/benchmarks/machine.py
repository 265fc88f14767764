"""What the machine is and does meanwhile: CPU and memory of processes, load by others, requests that the kernel sends.

Owns: reading /proc, and one tracing instance for the count of FUSE requests. Must never: change a setting that
outlives the run. Called by every benchmark.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")
_OPCODE = re.compile(rb"opcode \d+ \(FUSE_(\w+)\)|opcode (\d+) ")


def describe() -> list[str]:
    model = "unknown processor"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    memory = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) // 1024  # type: ignore[index]
    return [
        f"{model}, {os.cpu_count()} CPUs, {memory} MiB; Linux {platform.release()}; Python {platform.python_version()}",
        load(),
    ]


def filesystem_of(path: Path) -> str:
    """Type and device of the filesystem that `path` is on."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[2] == wanted:
            kind, name = right.split()[:2]
            return f"{kind} ({name})"
    return "an unknown filesystem"


def load() -> str:
    return "load average " + " ".join(f"{value:.2f}" for value in os.getloadavg())


def cache_drops() -> int:
    """How often somebody has told the kernel to drop its caches (then nothing is warm any more)."""
    return sum(map(int, re.findall(r"^drop_(?:pagecache|slab) (\d+)", Path("/proc/vmstat").read_text(), re.MULTILINE)))


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU time of these processes' threads so far; 0 for one that is gone."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                total += int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0])
    return total / 1e9


def _busy_seconds() -> float:
    fields = [int(field) for field in Path("/proc/stat").read_text().split(None, 10)[1:9]]
    user, nice, system, _idle, _wait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / _TICK


def _own_seconds() -> float:
    own = os.times()
    return own.user + own.system + own.children_user + own.children_system


class Watch:
    """CPU used between its start and `stop()`: by some processes, by us, and by everybody else."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = list(pids)
        self._served, self._busy, self._own = cpu_seconds(self._pids), _busy_seconds(), _own_seconds()
        self._start = time.perf_counter()
        self.served = self.own = self.others = self.wall = 0.0

    def stop(self) -> Watch:
        self.wall = time.perf_counter() - self._start
        self.served = cpu_seconds(self._pids) - self._served
        self.own = _own_seconds() - self._own
        foreign = _busy_seconds() - self._busy - self.served - self.own
        self.others = max(0.0, foreign / self.wall) if self.wall else 0.0
        return self


@dataclass
class Memory:
    """Resident memory in bytes."""

    total: int
    anonymous: int
    file: int
    shared: int

    @property
    def own(self) -> int:
        """What is there because of this process: not the pages of programs and libraries."""
        return self.anonymous + self.shared


def memory(pid: int) -> Memory:
    found = dict(re.findall(r"(VmRSS|RssAnon|RssFile|RssShmem):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()))
    return Memory(*(int(found[key]) * 1024 for key in ("VmRSS", "RssAnon", "RssFile", "RssShmem")))


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, whichever of its threads started them."""
    found: list[int] = []
    pending = [pid]
    while pending:
        parent = pending.pop()
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                children = [int(child) for child in Path(f"/proc/{parent}/task/{task}/children").read_text().split()]
                found += children
                pending += children
    return found


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def mounts_below(base: Path) -> list[str]:
    """Mountpoints at or below `base`, innermost first."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    points = [point.encode().decode("unicode_escape") for point in points]
    return sorted((p for p in points if p == str(base) or p.startswith(f"{base}/")), key=len, reverse=True)


class RequestCounter:
    """Counts what the kernel sends to a FUSE server, whoever that is, by the tracepoint fuse_request_send."""

    def __init__(self, instance: Path) -> None:
        self._instance = instance

    @contextlib.contextmanager
    def counting(self, mountpoint: Path) -> Iterator[Counter[str]]:
        """Fill the counter with the requests of this mount when the block ends."""
        counts: Counter[str] = Counter()
        connection = os.minor(os.stat(mountpoint).st_dev)
        event = self._instance / "events/fuse/fuse_request_send"
        (event / "filter").write_text(f"connection=={connection}")
        (self._instance / "trace").write_text("")
        (event / "enable").write_text("1")
        try:
            yield counts
        finally:
            (event / "enable").write_text("0")
            for name, number in _OPCODE.findall((self._instance / "trace").read_bytes()):
                counts[(name or number).decode()] += 1


def _detach(point: Path) -> None:
    subprocess.run(["umount", "-l", point], check=False, capture_output=True)


@contextlib.contextmanager
def request_counter() -> Iterator[RequestCounter | str]:
    """A counter, or the reason why there is none."""
    with contextlib.ExitStack() as stack:
        root = Path("/sys/kernel/tracing")
        try:
            if not (root / "events").is_dir():
                if os.geteuid() != 0:
                    raise PermissionError("only root may trace the kernel")
                root = Path(tempfile.mkdtemp(prefix="udf-bench-tracing-"))
                stack.callback(os.rmdir, root)  # never a tree: it would be the kernel's
                subprocess.run(["mount", "-t", "tracefs", "tracefs", root], check=True, capture_output=True)
                stack.callback(_detach, root)
            instance = root / "instances" / f"udf-bench-{os.getpid()}"
            instance.mkdir()
            stack.callback(instance.rmdir)
            (instance / "buffer_size_kb").write_text("4096")
            if not (instance / "events/fuse/fuse_request_send").is_dir():
                raise FileNotFoundError("this kernel has no tracepoint fuse_request_send")
        except (OSError, subprocess.CalledProcessError) as error:
            yield f"requests cannot be counted: {error}"
            return
        yield RequestCounter(instance)
