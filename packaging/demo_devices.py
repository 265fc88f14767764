"""The second act of `make demo-parts`: devices that are plugged in, lose their drivers, and are pulled out.

Owns: an image of a stick, three emulated devices on the demo's daemon, and what is done with them.
Called by: demo_parts.py, with the stage on which everything goes through the command line.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
import tty
from pathlib import Path
from typing import Any

from demo_stage import DemoError, Stage, check

MIB = 1 << 20
STICK = 24 * MIB
PATIENCE = 20.0


def run(stage: Stage) -> None:
    """Plug in, use, kill, pull out."""
    stage.title("A USB stick, a thermometer and a serial adapter, emulated and plugged in")
    image = stage.scratch / "stick.img"
    image.write_bytes(random.Random(4).randbytes(STICK))
    stage.udf("plug", str(image), "--serial", "DEMO0001", show=True)
    stage.udf("plug", "thermometer", "-o", "celsius=21.5", show=True)
    stage.udf("plug", "serial", show=True)
    stage.udf("devices", show=True)

    stage.title("Each is served by a process of its own, which may be killed")
    devices = Devices(stage)
    read_thermometer(devices)
    copy_stick(devices, image)
    talk(devices)

    stage.title("Pull everything out, while a program reads and another one holds the serial line")
    pull_out(devices)
    image.unlink()


class Devices:
    """The instances that serve what is plugged in."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.killed: list[str] = []
        rows = json.loads(stage.udf("devices", "--json"))["devices"]
        self.names: dict[str, str] = {}  # of the emulated device, by its driver
        self.places: dict[str, Path] = {}
        self.instances: dict[str, str] = {}
        for row in rows:
            check(row["state"] == "bound", f"{row['name']} is not bound: {row['text']}")
            for each in row["instances"]:
                self.names[each["driver"]] = row["name"]
                path = Path(each["path"])  # of the device's directory, or of the file in it
                self.places[each["driver"]] = path if path.is_dir() else path.parent
                self.instances[each["driver"]] = each["name"]
        for driver in ("usb_storage", "thermometer", "cdc_acm"):
            check(driver in self.names, f"no device is served by {driver}")

    def status(self, driver: str) -> dict[str, Any]:
        rows = json.loads(self.stage.udf("status", "--json"))["mounts"]
        for row in rows:
            if row["name"] == self.instances[driver]:
                return dict(row)
        raise DemoError(f"udf status does not know {self.instances[driver]}")

    def kill(self, driver: str) -> None:
        """SIGKILL for the process that serves it now."""
        pid = self.status(driver)["driver_pid"]
        os.kill(pid, signal.SIGKILL)
        print(f"$ kill -9 {pid}    # {driver}", flush=True)
        self.killed.append(driver)


def read_thermometer(devices: Devices) -> None:
    celsius = devices.places["thermometer"] / "celsius"
    for _ in range(2):
        text = celsius.read_text()
        print(f"$ cat {celsius}\n{text.rstrip()}", flush=True)
        check(text == "21.50\n", f"the thermometer says {text!r}, not 21.50")
        if not devices.killed:
            devices.kill("thermometer")


def copy_stick(devices: Devices, image: Path) -> None:
    want = hashlib.sha256(image.read_bytes()).hexdigest()
    disk = devices.places["usb_storage"] / "disk"
    copy = image.with_name("copy.img")
    try:
        command = ["dd", f"if={disk}", f"of={copy}", "bs=64K", "status=none"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as dd:
            print("$ " + " ".join(command) + " &", flush=True)
            wait_until(lambda: dd.poll() is not None or (copy.exists() and copy.stat().st_size > MIB))
            devices.kill("usb_storage")
        check(dd.returncode == 0, f"dd ended with {dd.returncode}")
        check(hashlib.sha256(copy.read_bytes()).hexdigest() == want, "dd's copy differs from the stick")
        generation = devices.status("usb_storage")["generation"]
        print(f"sha256 of the copy: equal; generation {generation} of the driver serves now", flush=True)
        copy.unlink()
        if shutil.which("nbdcopy") is None:
            print("(nbdcopy is not installed here, so nobody speaks NBD to the stick)")
            return
        socket = disk.parents[2] / "block" / f"{disk.parent.name}.sock"
        uri = f"nbd+unix:///disk?socket={socket}"
        with subprocess.Popen(["nbdcopy", uri, str(copy)], stdin=subprocess.DEVNULL) as nbdcopy:
            print(f"$ nbdcopy '{uri}' {copy} &", flush=True)
            devices.kill("usb_storage")
        check(nbdcopy.returncode == 0, f"nbdcopy ended with {nbdcopy.returncode}")
        check(hashlib.sha256(copy.read_bytes()).hexdigest() == want, "nbdcopy's copy differs from the stick")
        print("sha256 of the copy: equal", flush=True)
    finally:
        copy.unlink(missing_ok=True)


def talk(devices: Devices) -> None:
    path = devices.places["cdc_acm"] / "tty"
    line = os.open(path, os.O_RDWR | os.O_NOCTTY)
    try:
        tty.setraw(line)
        for text in ("hello", "still there?"):
            os.write(line, f"{text}\n".encode())
            heard = hear(line, len(text) + 1)
            print(f"> {text}\n< {heard.decode().rstrip()}    # {path}, which echoes", flush=True)
            check(heard == f"{text}\n".encode(), f"the serial line answered {heard!r}")
            if text == "hello":
                devices.kill("cdc_acm")
    finally:
        os.close(line)


def pull_out(devices: Devices) -> None:
    disk = devices.places["usb_storage"] / "disk"
    line = os.open(devices.places["cdc_acm"] / "tty", os.O_RDWR | os.O_NOCTTY)
    reader = os.open(disk, os.O_RDONLY)
    try:
        for driver in ("usb_storage", "thermometer", "cdc_acm"):
            devices.stage.udf("unplug", devices.names[driver], show=True)
        try:
            os.posix_fadvise(reader, 0, 0, os.POSIX_FADV_DONTNEED)
            os.pread(reader, 4096, STICK - 4096)
            word = "nothing"
        except OSError as error:
            word = errno.errorcode[error.errno or 0]
        check(word == "ENODEV", f"a program that reads the stick which was pulled out is told {word}, not ENODEV")
        heard = hear(line, 1)
        check(heard == b"", f"the serial line that was pulled out still says {heard!r}")
    finally:
        os.close(reader)
        os.close(line)
    rows = json.loads(devices.stage.udf("devices", "--json"))["devices"]
    check(rows == [], f"udf devices still lists {rows}")
    for place in devices.places.values():
        wait_until(lambda: not place.exists())  # noqa: B023 - awaited
        check(not place.exists(), f"{place} is left")
    names = ", ".join(devices.killed)
    print(
        "\nWhat happened: three devices were plugged in, and bound to drivers by what they say of themselves.\n"
        f"Drivers were killed while programs used them ({names}):\n"
        "each was replaced, the programs waited a moment, and not a byte was lost or changed. Then everything was\n"
        f"pulled out: the program that still read the stick was told {word}, the serial line was hung up, and\n"
        "nothing is left of the drivers and of their directories."
    )


def hear(line: int, count: int) -> bytes:
    """What comes on a terminal within a moment; nothing when it is hung up."""
    heard = b""
    until = time.monotonic() + PATIENCE
    while len(heard) < count and time.monotonic() < until:
        if select.select([line], [], [], 0.5)[0]:
            try:
                data = os.read(line, 4096)
            except OSError:
                break
            if not data:
                break
            heard += data
    return heard


def wait_until(holds: Any) -> None:
    until = time.monotonic() + PATIENCE
    while not holds() and time.monotonic() < until:
        time.sleep(0.01)


if __name__ == "__main__":
    print("run `make demo-parts`, of which this is a part", file=sys.stderr)
    sys.exit(2)
