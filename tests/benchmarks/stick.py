"""A FAT volume on a stick that mounts itself: the time from the plug to the first byte of a file, by stages, and the
speed of a large file through model, USB/IP, driver, NBD, FAT and shim, beside bare bulk transfers on the same bus.

Peers that know FAT too read the same file of the same stick through the file that stands for it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks import clients, devices, lab, machine, peers
from tests.benchmarks.lab import Lab
from tests.benchmarks.report import Result, Table, at_least, at_most, median, percentile, ratio_of_rounds
from udf.supervisor.client import Connection

LABEL = "BENCH"
BLOCK = 128 * 1024
STAGES = (
    "plugged → known",
    "→ its block device is served",
    "→ what is on it is known",
    "→ mounted",
    "→ first byte of a file read",
)
_DISK, _FAT = "usb_storage", "fat"
_COLD_SHARE, _WARM_SHARE, _READABLE = 0.6, 0.9, 300.0
_SHM = Path("/dev/shm")
_WAIT = 30.0


def run(the_lab: Lab) -> Result:
    result = Result("stick")
    folder = the_lab.folder("stick")
    daemon = peers.Daemon(peers.TREE, "stick", "--automount", str(folder / "media"))
    daemon.start(folder)
    try:
        with Connection(daemon.socket) as connection:
            _plugs(the_lab, connection, folder, result)
            _speed(the_lab, connection, daemon, folder, result)
    finally:
        daemon.stop()
    return result


class Stick:
    """An image with a FAT32 volume and one file on it, and what it is when it is plugged in."""

    def __init__(self, connection: Connection, folder: Path, name: str, size: int, payload: int) -> None:
        self.name = name
        self.size = payload
        self.image = folder / f"{name}.img"
        self.source = folder / f"{name}.file"
        self.root = folder / "media" / LABEL
        self._connection = connection
        lab.make_big_file(self.source, payload)
        with self.image.open("wb") as image:
            image.truncate(size)
        _tool("mkfs.fat", "-F", "32", "-s", "8", "-n", LABEL, str(self.image))
        _tool("mcopy", "-i", str(self.image), str(self.source), "::file")

    def plug(self) -> dict[str, Any]:
        """Plug it in; the device's row when its volume is mounted."""
        options = {"file": str(self.image), "serial": self.name, "speed": "super"}
        return dict(self._connection.call("Plug", model="storage", name=self.name, options=options)["device"])

    def unplug(self) -> None:
        """Take it out in order, so that nothing waits for it."""
        self._connection.call("Eject", device=self.rows()[_DISK]["name"])
        self._connection.call("Unplug", name=self.name)

    @contextlib.contextmanager
    def plugged(self) -> Iterator[dict[str, Any]]:
        row = self.plug()
        try:
            yield row
        finally:
            self.unplug()

    def rows(self) -> dict[str, dict[str, Any]]:
        """What serves it, by drivers."""
        return {row["driver"]: row for row in self._connection.call("Status")["mounts"]}


# ---- plug to readable


def _plugs(the_lab: Lab, connection: Connection, folder: Path, result: Result) -> None:
    count = 8 if the_lab.quick else 40
    stick = Stick(connection, folder, "plugs", 320 * lab.MIB, lab.MIB)
    with stick.plugged():  # the emulator is there, and every program was read from the disk once
        pass
    spans: list[list[float]] = []
    watch = machine.Watch({})
    for _ in range(count):
        moments = _readable(stick, connection)
        spans.append([b - a for a, b in itertools.pairwise(moments)])
        stick.unplug()
    others = watch.stop().others
    whole = [sum(each) * 1000 for each in spans]
    table = Table("from the plug to the first byte of a file, ms", ["", "median", "p90", "most"])
    for stage, times in zip((*STAGES, "all"), (*zip(*spans, strict=True), [ms / 1000 for ms in whole]), strict=True):
        ms = [each * 1000 for each in times]
        table.rows.append([stage, f"{median(ms):.1f}", f"{percentile(ms, 0.9):.1f}", f"{max(ms):.1f}"])
    result.tables.append(table)
    result.notes.append(f"{count} plugs; CPUs used by others meanwhile: {others:.2f}")
    result.targets.append(at_most("plug to first byte of a file, median", median(whole), _READABLE, " ms"))
    result.data["plugs"] = spans


def _readable(stick: Stick, connection: Connection) -> list[float]:
    """The moments from the plug to the first byte."""
    since = max((event["seq"] for event in connection.call("Events")["events"]), default=0)
    failures: list[BaseException] = []

    def plug() -> None:
        try:
            stick.plug()
        except BaseException as exc:
            failures.append(exc)

    began = time.time()
    plugging = threading.Thread(target=plug)
    plugging.start()
    path = stick.root / "file"
    try:
        end = time.monotonic() + _WAIT
        while True:  # as a program that waits for the file would: nobody is told of a mount by the kernel
            with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
                if file.read(1):
                    break
            if time.monotonic() > end or failures:
                raise TimeoutError(f"no {path}: {failures}")
            time.sleep(0.0005)
        read = time.time()
    finally:
        plugging.join()
    return [began, *_moments(connection.call("Events", since=since)["events"]), read]


def _moments(events: list[dict[str, Any]]) -> list[float]:
    """When the device was known, its block device served, what is on it known, and that mounted."""
    wanted = [
        ("device", "STARTING", ""),
        ("block", "ACTIVE", ""),
        ("mount", "STARTING", LABEL),
        ("mount", "ACTIVE", LABEL),
    ]
    return [
        next(
            event["time"]
            for event in events
            if (event["kind"], event["state"]) == (kind, state) and event["name"].startswith(name)
        )
        for kind, state, name in wanted
    ]


# ---- speed


def _speed(the_lab: Lab, connection: Connection, daemon: peers.Daemon, folder: Path, result: Result) -> None:
    megabytes, rounds = (48, 3) if the_lab.quick else (256, 7)
    size = megabytes * lab.MIB
    stick = Stick(connection, folder, "speed", 4 * size + 320 * lab.MIB, size)
    other = folder / "other.img"
    shutil.copyfile(stick.source, other)
    buffer = bytearray(BLOCK)
    bare: dict[str, list[float]] = {"read": [], "write": []}
    seconds: dict[str, list[float]] = {"cold read": [], "write": []}
    cpu: dict[str, dict[str, float]] = {"cold read": {}, "write": {}}
    watch = machine.Watch({})
    with devices.emulator(folder / "bus", ["loopback", f"storage,file={other},speed=super"]) as bus:
        for _ in range(rounds):
            loop = [sys.executable, devices.__file__, str(bus), "loopback0", "storage0", str(megabytes)]
            figures = [float(word) for word in _tool(*loop).split()]
            bare["read"].append(figures[0])
            bare["write"].append(figures[1])
            with stick.plugged():
                pids = _processes(stick, daemon)
                with _metered(pids, seconds["cold read"], cpu["cold read"]):
                    _read(stick.root / "file", buffer, size)
                with _metered(pids, seconds["write"], cpu["write"]):
                    _write(stick.source, stick.root / "written", buffer)
                os.unlink(stick.root / "written")
    with stick.plugged():
        warm = _warm(the_lab, stick, folder, buffer, rounds)
    result.notes += [
        f"{rounds} rounds of one file of {megabytes} MiB, in pieces of {BLOCK // 1024} KiB, on a stick that was just",
        "plugged in (cold: nothing of it was read before), by USB/IP from an emulator in a process of its own;",
        f"bulk: plain pyusb, transfers of {BLOCK // 1024} KiB from a source of zeros and to a sink, one by one;",
        "write: to a new file, with fsync; warm: from the page cache, in turn with the same file elsewhere (neither",
        "a FUSE mount nor tmpfs has the large folios of what the scratch folder is on);",
        f"CPUs used by others meanwhile: {watch.stop().others:.2f}",
    ]
    table = Table("a large file, MiB/s (medians; ratios: medians of the rounds' ratios)", ["", "bare", "UDF", "ratio"])
    ratios: dict[str, float] = {}
    for kind, name, base, ours in (
        ("cold read", "bulk", bare["read"], seconds["cold read"]),
        ("write", "bulk", bare["write"], seconds["write"]),
        *(("warm read", name, took, warm["UDF"]) for name, took in warm.items() if name != "UDF"),
    ):
        ratios[f"{kind}, {name}"] = ratio_of_rounds(base, ours)
        speeds = [f"{megabytes / median(each):.0f}" for each in (base, ours)]
        table.rows.append([f"{kind}, against {name}", *speeds, f"{ratios[f'{kind}, {name}']:.2f}"])
    result.tables.append(table)
    result.tables.append(_cpu_table(cpu, rounds * megabytes))
    result.targets += [
        at_least("cold read through the mount, against bare bulk transfers", ratios["cold read, bulk"], _COLD_SHARE),
    ]
    if "tmpfs" in warm:
        share = ratios["warm read, tmpfs"]
        result.targets.append(at_least("warm read through the mount, against tmpfs", share, _WARM_SHARE))
    result.data["speed"] = {"bare": bare, "udf": seconds, "warm": warm, "cpu": cpu}
    _peers(the_lab, stick, daemon, folder, buffer, result)


@contextlib.contextmanager
def _metered(pids: dict[str, int], seconds: list[float], cpu: dict[str, float]) -> Iterator[None]:
    """Note how long something takes, and what CPU each of the processes uses for it."""
    before = {name: machine.cpu_seconds([pid]) for name, pid in pids.items()}
    began = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - began)
    for name, pid in pids.items():
        cpu[name] = cpu.get(name, 0.0) + machine.cpu_seconds([pid]) - before[name]


def _processes(stick: Stick, daemon: peers.Daemon) -> dict[str, int]:
    """Everybody who takes part when a file of the stick is read, by what they are."""
    rows = stick.rows()
    model = next(
        pid
        for pid in machine.descendants(daemon.pid)
        if b"udf.testing.devices" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    )
    return {
        "model": model,
        "usb_storage": rows[_DISK]["driver_pid"],
        "block shim": rows[_DISK]["shim_pid"],
        "fat": rows[_FAT]["driver_pid"],
        "mount shim": rows[_FAT]["shim_pid"],
        "client": os.getpid(),
    }


def _cpu_table(cpu: dict[str, dict[str, float]], megabytes: int) -> Table:
    names = list(cpu["cold read"])
    table = Table("CPU time, ms per MiB", ["", *names, "all"])
    for kind, used in cpu.items():
        figures = [used[name] * 1000 / megabytes for name in names]
        table.rows.append([kind, *(f"{figure:.2f}" for figure in figures), f"{sum(figures):.2f}"])
    return table


def _read(path: Path, buffer: bytearray, size: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        clients.sequential(fd, buffer, size)
    finally:
        os.close(fd)


def _write(source: Path, target: Path, buffer: bytearray) -> None:
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with source.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                view = memoryview(buffer)[:count]
                while view:
                    view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _warm(the_lab: Lab, stick: Stick, folder: Path, buffer: bytearray, rounds: int) -> dict[str, list[float]]:
    """The seconds that it takes to read what is in the page cache, from the stick and from elsewhere, in turn."""
    with contextlib.ExitStack() as stack:
        files = {"UDF": stick.root / "file", "the scratch folder": stick.source}
        if os.access(_SHM, os.W_OK) and shutil.disk_usage(_SHM).free > 2 * stick.size:
            files["tmpfs"] = _SHM / f"udf-bench-{os.getpid()}"
            stack.callback(files["tmpfs"].unlink, missing_ok=True)
            shutil.copyfile(stick.source, files["tmpfs"])
        else:
            the_lab.skip("tmpfs", f"{_SHM} has no room")
        if shutil.which("bindfs") is not None:
            at = folder / "bindfs"
            at.mkdir()
            stack.callback(at.rmdir)
            _tool("bindfs", "-o", "kernel_cache", str(folder), str(at))
            stack.callback(peers.unmount, at)
            files["bindfs"] = at / stick.source.name
        else:
            the_lab.skip("bindfs", "it is not installed")
        for path in files.values():
            _read(path, buffer, stick.size)
        seconds: dict[str, list[float]] = {name: [] for name in files}
        for _ in range(rounds):
            for name, path in files.items():
                began = time.perf_counter()
                _read(path, buffer, stick.size)
                seconds[name].append(time.perf_counter() - began)
    return seconds


# ---- others that know FAT


def _peers(the_lab: Lab, stick: Stick, daemon: peers.Daemon, folder: Path, buffer: bytearray, result: Result) -> None:
    """The same file of the same stick, read by others through R/dev/NAME/disk, which is mounted by nobody then."""
    rounds = 2 if the_lab.quick else 5
    seconds: dict[str, list[float]] = {"UDF": [], "mtools": [], "fusefat": []}
    for _ in range(rounds):
        with stick.plugged():
            began = time.perf_counter()
            _read(stick.root / "file", buffer, stick.size)
            seconds["UDF"].append(time.perf_counter() - began)
            daemon.udf("umount", str(stick.root))
            disk = Path(stick.rows()[_DISK]["mountpoint"]) / "disk"
            for name, work in (("mtools", _by_mtools), ("fusefat", _by_fusefat)):
                with disk.open("rb") as file:
                    clients.drop_pages(file.fileno())
                try:
                    seconds[name].append(work(disk, folder, buffer, stick.size))
                except peers.UnavailableError as error:
                    the_lab.skip(name, str(error))
    table = Table("others on the same stick, through its raw device file, MiB/s", ["", "cold read", "x UDF's time"])
    for name, took in seconds.items():
        if took:
            ratio = ratio_of_rounds(took, seconds["UDF"][: len(took)])
            table.rows.append([name, f"{stick.size / lab.MIB / median(took):.0f}", f"{ratio:.2f}"])
    result.tables.append(table)
    result.data["peers"] = seconds


def _by_mtools(disk: Path, folder: Path, buffer: bytearray, size: int) -> float:
    target = folder / "copy"
    began = time.perf_counter()
    _tool("mcopy", "-n", "-o", "-i", str(disk), "::file", str(target))
    took = time.perf_counter() - began
    if target.stat().st_size != size:
        raise OSError("mtools read another size")
    target.unlink()
    return took


def _by_fusefat(disk: Path, folder: Path, buffer: bytearray, size: int) -> float:
    if shutil.which("fusefat") is None:
        raise peers.UnavailableError("fusefat is not installed")
    at = folder / "fusefat"
    at.mkdir()
    try:
        _tool("fusefat", "-o", "ro", str(disk), str(at))
        try:
            began = time.perf_counter()
            _read(at / "file", buffer, size)
            return time.perf_counter() - began
        finally:
            peers.unmount(at)
    finally:
        at.rmdir()


def _tool(*command: str) -> str:
    path = shutil.which(command[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise peers.UnavailableError(f"{command[0]} is not installed")
    done = subprocess.run([path, *command[1:]], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
