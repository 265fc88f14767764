"""A stick's speed through model, USB/IP, driver and block shim, beside bare bulk transfers on the same bus; and the
time from a device's arrival to its first block.

The emulator is one process for all: the bare loop imports a source-and-sink device from it and does nothing but pyusb
bulk transfers; UDF's driver has a stick on it, which nbdcopy reads and writes. Run as a script this file is the loop.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import trio

MIB = 1 << 20
_TRANSFER = 128 * 1024  # bytes
_SOURCE, _SINK = 0x84, 0x04  # of the loop-back model
_BULK_IN, _BULK_OUT = 0x81, 0x02  # of the stick


def bare(path: str, source: str, stick: str, megabytes: int) -> None:
    """Plain pyusb, one transfer after the other: what a source and a sink carry, and a stick by SCSI commands.

    Prints the seconds of reading and writing for each of the two.
    """
    import struct

    device, connection = _device(path, source)
    count = megabytes * MIB // _TRANSFER
    data = bytes(_TRANSFER)
    took = []
    with contextlib.closing(connection):
        began = time.perf_counter()
        for _ in range(count):
            _whole(device.read(_SOURCE, _TRANSFER, 5000), _TRANSFER)
        took.append(time.perf_counter() - began)
        began = time.perf_counter()
        for _ in range(count):
            device.write(_SINK, data, 5000)
        took.append(time.perf_counter() - began)
    device, connection = _device(path, stick)
    blocks = _TRANSFER // 512
    with contextlib.closing(connection):
        # TEST UNIT READY tells that the stick is new, REQUEST SENSE ends that.
        device.write(_BULK_OUT, struct.pack("<4sIIBBB16s", b"USBC", 1, 0, 0, 0, 6, b""))
        device.read(_BULK_IN, 13, 5000)
        device.write(_BULK_OUT, struct.pack("<4sIIBBB16s", b"USBC", 2, 18, 0x80, 0, 6, b"\x03\0\0\0\x12"))
        device.read(_BULK_IN, 18, 5000)
        device.read(_BULK_IN, 13, 5000)
        for opcode, flags in ((0x28, 0x80), (0x2A, 0)):
            began = time.perf_counter()
            for number in range(count):
                command = struct.pack(">BBIBHB", opcode, 0, number * blocks, 0, blocks, 0).ljust(16, b"\0")
                device.write(_BULK_OUT, struct.pack("<4sIIBBB", b"USBC", number, _TRANSFER, flags, 0, 10) + command)
                if flags:
                    _whole(device.read(_BULK_IN, _TRANSFER, 5000), _TRANSFER)
                else:
                    device.write(_BULK_OUT, data, 5000)
                status = device.read(_BULK_IN, 13, 5000)
                if len(status) != 13 or status[12]:
                    raise OSError("the stick refuses a command")
            took.append(time.perf_counter() - began)
    print(*took)


def _whole(data: Sequence[int], size: int) -> None:
    if len(data) != size:
        raise OSError("a short transfer")


def _device(path: str, name: str) -> tuple[Any, Any]:
    import usb.core

    from udf.usb import backend
    from udf.usb.client import Connection
    from udf.usb.remote import UsbipBus

    async def connect() -> tuple[Any, Any]:
        bus = UsbipBus(path)
        async with trio.open_nursery() as nursery:
            await nursery.start(bus.run, lambda: None)
            device = next(each for each in bus.devices().values() if each.name == name)
            sock = (await bus.open(device.key)).dup()  # the bus ends its connections with itself
            nursery.cancel_scope.cancel()
        return sock, device.spec()

    sock, spec = trio.run(connect)
    connection = Connection(sock, spec.busnum << 16 | spec.devnum)
    backend.install(connection, spec)
    device = usb.core.find()
    device.set_configuration()
    return device, connection


if __name__ == "__main__":
    bare(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
    sys.exit(0)

from tests.benchmarks import machine  # noqa: E402 - the loop needs none of it
from tests.benchmarks.lab import Lab  # noqa: E402
from tests.benchmarks.report import (  # noqa: E402
    Result,
    Table,
    at_least,
    at_most,
    median,
    percentile,
    ratio_of_rounds,
)
from udf.supervisor.client import Connection  # noqa: E402

_DIRECTIONS = ("read", "write")
_SIDES = ("bulk", "BOT", "UDF")
_STAGES = ("known → NBD served", "→ its files are there", "→ first block read from the file")


def run(the_lab: Lab) -> Result:
    result = Result("devices")
    the_lab.daemon.start(the_lab.root)
    with Connection(the_lab.daemon.socket) as connection:
        _speed(the_lab, connection, result)
        _attach(the_lab, connection, result)
    return result


def _speed(the_lab: Lab, connection: Connection, result: Result) -> None:
    megabytes, rounds = (32, 3) if the_lab.quick else (256, 7)
    folder = the_lab.folder("devices")
    image, other, copy = folder / "stick.img", folder / "other.img", folder / "copy"
    for path in (image, other, copy):
        with path.open("wb") as file:
            for _ in range(megabytes):
                file.write(the_lab.random.randbytes(MIB))
    identity = {"serial": "B1", "speed": "super"}
    row = connection.call("Plug", model="storage", name="bench", options={"file": str(image), **identity})["device"]
    uri = f"nbd+unix:///disk?socket={the_lab.root / 'block' / row['instances'][0]['name']}.sock"
    seconds: dict[str, dict[str, list[float]]] = {side: {d: [] for d in _DIRECTIONS} for side in _SIDES}
    watch = machine.Watch({})
    try:
        with emulator(folder / "bus", ["loopback", f"storage,file={other},speed=super"]) as bus:
            for _ in range(rounds):
                loop = [sys.executable, __file__, str(bus), "loopback0", "storage0", str(megabytes)]
                figures = iter(_output(loop).split())
                for side in _SIDES[:2]:
                    for direction in _DIRECTIONS:
                        seconds[side][direction].append(float(next(figures)))
                for direction, ends in (("read", [uri, "null:"]), ("write", [str(copy), uri])):
                    began = time.perf_counter()
                    _output(["nbdcopy", "--flush", *ends])
                    seconds["UDF"][direction].append(time.perf_counter() - began)
    finally:
        connection.call("Unplug", name="bench")
    size = _TRANSFER // 1024
    result.notes += [
        f"{rounds} rounds of {megabytes} MiB each way, all by USB/IP from an emulator in a process of its own;",
        f"bulk: plain pyusb, bulk transfers of {size} KiB from a source of zeros and to a sink, one after the other;",
        f"BOT: plain pyusb, SCSI commands of {size} KiB on a stick, one after the other; UDF: nbdcopy on such a stick",
        f"CPUs used by others meanwhile: {watch.stop().others:.2f}",
    ]
    table = Table(
        "sequential, MiB/s (medians; ratios: medians of the rounds' ratios)", ["", *_SIDES, "x bulk", "x BOT"]
    )
    for direction in _DIRECTIONS:
        speeds = [megabytes / median(seconds[side][direction]) for side in _SIDES]
        ratios = [ratio_of_rounds(seconds[side][direction], seconds["UDF"][direction]) for side in _SIDES[:2]]
        table.rows.append([direction, *(f"{speed:.0f}" for speed in speeds), *(f"{ratio:.2f}" for ratio in ratios)])
        for side, ratio in zip(_SIDES, ratios, strict=False):
            result.targets.append(at_least(f"sequential {direction} of a stick, against bare {side}", ratio, 0.7))
    result.tables.append(table)
    result.data["seconds"] = seconds


@contextlib.contextmanager
def emulator(path: Path, plugs: list[str]) -> Iterator[Path]:
    """An emulator with these devices; its socket."""
    command = [sys.executable, "-P", "-m", "udf.testing.devices", "--socket", str(path)]
    command += [word for plug in plugs for word in ("--plug", plug)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            if b"ready" not in process.stdout.readline():
                raise OSError("the emulator does not start")
            yield path
        finally:
            process.terminate()


def _attach(the_lab: Lab, connection: Connection, result: Result) -> None:
    count = 10 if the_lab.quick else 50
    image = the_lab.folder("attach") / "stick.img"
    image.write_bytes(the_lab.random.randbytes(MIB))
    spans: list[list[float]] = []
    for _ in range(count):
        since = max((event["seq"] for event in connection.call("Events")["events"]), default=0)
        row = connection.call("Plug", model="storage", name="attach", options={"file": str(image), "serial": "A1"})
        instance = row["device"]["instances"][0]
        with Path(instance["path"]).open("rb", buffering=0) as file:
            file.read(4096)
        read = time.time()
        moments = _moments(connection.call("Events", since=since)["events"], instance["name"])
        spans.append([b - a for a, b in zip([*moments], [*moments[1:], read], strict=True)])
        connection.call("Unplug", name="attach")
    whole = [sum(each) * 1000 for each in spans]
    table = Table("from a device's arrival to its first block, ms", ["", "median", "p90", "most"])
    for number, stage in enumerate(_STAGES):
        stage_ms = [each[number] * 1000 for each in spans]
        table.rows.append(
            [stage, f"{median(stage_ms):.1f}", f"{percentile(stage_ms, 0.9):.1f}", f"{max(stage_ms):.1f}"]
        )
    table.rows.append(["all", f"{median(whole):.1f}", f"{percentile(whole, 0.9):.1f}", f"{max(whole):.1f}"])
    result.tables.append(table)
    result.targets.append(at_most("attach to first block read, median", median(whole), 200.0, " ms"))
    result.data["attach"] = spans


def _output(command: list[str]) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _moments(events: list[dict[str, Any]], name: str) -> list[float]:
    """When the device was known, its block device served, and its files there."""
    wanted = {("device", "STARTING"): 0, ("block", "ACTIVE"): 1, ("mount", "ACTIVE"): 2}
    moments = [0.0, 0.0, 0.0]
    for event in events:
        stage = wanted.get((event["kind"], event["state"]))
        if stage is not None and (event["kind"] == "device" or event["name"].startswith(name)):
            moments[stage] = event["time"]
    return moments
