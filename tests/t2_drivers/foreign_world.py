"""What a driver host is to unmodified pyusb programs: a process in which pyusb sees one device.

Run as a program: takes the device's connection by number, its spec, and a program's text that knows nothing of UDF.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import msgspec

from udf.messages import DeviceSpec
from udf.testing.devices import Plugged

ROOT = Path(__file__).resolve().parents[2]


def run_program(text: str, plugged: Plugged) -> str:
    """Run a program on a device to its end; its output."""
    from . import lab

    with plugged.connect() as sock:
        spec = msgspec.json.encode(lab.spec_of(plugged)).decode()
        done = subprocess.run(
            [sys.executable, "-m", "tests.t2_drivers.foreign_world", str(sock.fileno()), spec, text],
            pass_fds=[sock.fileno()],
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _main(fd: str, spec: str, text: str) -> None:
    from udf.driver.usb import open_device

    open_device(socket.socket(fileno=int(fd)), msgspec.json.decode(spec, type=DeviceSpec))
    exec(compile(text, "program", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    _main(*sys.argv[1:])
