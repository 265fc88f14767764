"""Mounts a USB driver that provides files directly on /dev/fuse, without shim or supervisor.

Owns the child process and the mount. Run as a program it is that child: it takes the device's connection by number.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from udf.messages import DeviceSpec
from udf.testing.devices import Plugged

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def mounted(driver: str, class_name: str, plugged: Plugged, mountpoint: Path) -> Iterator[Path]:
    """The files of a driver, served by a process of its own."""
    from . import lab

    mountpoint.mkdir()
    with plugged.connect() as sock:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.t2_drivers.mounted", str(ROOT / "drivers" / driver), class_name),
                *(str(sock.fileno()), msgspec.json.encode(lab.spec_of(plugged)).decode(), str(mountpoint)),
            ],
            pass_fds=[sock.fileno()],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
    assert process.stdout is not None
    try:
        readable, _, _ = select.select([process.stdout], [], [], 20)
        assert readable
        assert process.stdout.readline() == b"READY\n"
        yield mountpoint
    finally:
        subprocess.run(["umount", "-l", str(mountpoint)], check=False)
        process.wait(10)
        process.stdout.close()


def _serve(path: str, class_name: str, fd: str, spec: str, mountpoint: str) -> None:
    import socket

    import pyfuse3
    import trio

    from udf.driver.paths import PathOperations
    from udf.driver.usb import open_device
    from udf.host.guard import Guard
    from udf.host.load import load_class

    cls = load_class(path, class_name)
    driver = cls.__new__(cls)
    driver.device, driver.usb = open_device(socket.socket(fileno=int(fd)), msgspec.json.decode(spec, type=DeviceSpec))
    driver.__init__()  # type: ignore[misc]
    pyfuse3.init(Guard(PathOperations(driver), print), mountpoint, {"fsname=thermometer"})
    os.write(1, b"READY\n")
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
