"""A stick's speed through model, USB/IP, driver and block shim, beside bare bulk transfers on the same bus; and the
time from a device's arrival to its first block.

The emulator is one process for all: the bare loop imports a source-and-sink device from it and does nothing but pyusb
bulk transfers; UDF's driver has a stick on it, which nbdcopy reads and writes. Run as a script this file is the loop.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import trio

MIB = 1 << 20
_TRANSFER = 128 * 1024  # bytes
_SOURCE, _SINK = 0x84, 0x04


def bare(path: str, name: str, megabytes: int) -> None:
    """Bulk transfers one after the other, in and out; prints the seconds that each direction took."""
    import usb.core

    from udf.usb import backend
    from udf.usb.client import Connection
    from udf.usb.remote import UsbipBus

    async def connect() -> tuple[Any, Any]:
        bus = UsbipBus(path)
        async with trio.open_nursery() as nursery:
            await nursery.start(bus.run, lambda: None)
            device = next(each for each in bus.devices().values() if each.name == name)
            sock = await bus.open(device.key)
            nursery.cancel_scope.cancel()
        return sock, device.spec()

    sock, spec = trio.run(connect)
    connection = Connection(sock, spec.busnum << 16 | spec.devnum)
    backend.install(connection, spec)
    device = usb.core.find()
    device.set_configuration()
    count = megabytes * MIB // _TRANSFER
    began = time.perf_counter()
    for _ in range(count):
        if len(device.read(_SOURCE, _TRANSFER, 5000)) != _TRANSFER:
            raise usb.core.USBError("a short transfer")
    middle = time.perf_counter()
    data = bytes(_TRANSFER)
    for _ in range(count):
        device.write(_SINK, data, 5000)
    print(middle - began, time.perf_counter() - middle)
    connection.close()


if __name__ == "__main__":
    bare(sys.argv[1], sys.argv[2], int(sys.argv[3]))
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
    image = the_lab.folder("devices") / "stick.img"
    with image.open("wb") as file:
        file.truncate(megabytes * MIB)
        for _ in range(megabytes):
            file.write(the_lab.random.randbytes(MIB))
    row = connection.call("Plug", model="storage", name="bench", options={"file": str(image), "serial": "B1"})["device"]
    connection.call("Plug", model="loopback", name="bare")
    socket = the_lab.root / "block" / f"{row['instances'][0]['name']}.sock"
    uri = f"nbd+unix:///disk?socket={socket}"
    seconds: dict[str, dict[str, list[float]]] = {side: {d: [] for d in _DIRECTIONS} for side in ("bare", "UDF")}
    watch = machine.Watch({})
    try:
        for _ in range(rounds):
            loop = [sys.executable, __file__, str(the_lab.root / "usbip.sock"), "bare", str(megabytes)]
            for direction, took in zip(_DIRECTIONS, _output(loop).split(), strict=True):
                seconds["bare"][direction].append(float(took))
            for direction, command in (("read", [uri, "null:"]), ("write", [str(image.with_name("copy")), uri])):
                if direction == "write" and not image.with_name("copy").exists():
                    _output(["nbdcopy", uri, str(image.with_name("copy"))])
                began = time.perf_counter()
                _output(["nbdcopy", "--flush", *command])
                seconds["UDF"][direction].append(time.perf_counter() - began)
    finally:
        for name in ("bench", "bare"):
            connection.call("Unplug", name=name)
    result.notes += [
        f"{rounds} rounds of {megabytes} MiB each way; bare: pyusb bulk transfers of {_TRANSFER // 1024} KiB, one by",
        "one, with a source and a sink; UDF: nbdcopy from and to a stick; both on the same emulator, by USB/IP",
        f"CPUs used by others meanwhile: {watch.stop().others:.2f}",
    ]
    table = Table("sequential, MiB/s (medians; ratios: medians of the rounds' ratios)", ["", "bare", "UDF", "x bare"])
    for direction in _DIRECTIONS:
        ratio = ratio_of_rounds(seconds["bare"][direction], seconds["UDF"][direction])
        speeds = [megabytes / median(seconds[side][direction]) for side in ("bare", "UDF")]
        table.rows.append([direction, *(f"{speed:.0f}" for speed in speeds), f"{ratio:.2f}"])
        result.targets.append(at_least(f"sequential {direction} of a stick, against bare bulk transfers", ratio, 0.7))
    result.tables.append(table)
    result.data["seconds"] = seconds


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
