"""Programs that use pyusb and know nothing of us, unmodified, inside driver hosts with all of their sandbox.

Each is wrapped into a driver of a few lines, whose file is what the program is used by; the devices come by USB/IP over
TCP from small models in this process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.t2_drivers.test_peers import Instrument, Printer
from tests.t5_cli.test_devices import Lab, running_lab
from udf.testing.devices import Device, Emulator

PRINTER = '''"""What is written is printed."""
# /// udf
# kind = "usb"
# interface = 1
# class = "Paper"
# match = [{ vendor = 0x04b8, product = 0x0e15 }]
# ///
import trio

from udf import Attr, UsbDriver


class Paper(UsbDriver):
    async def list(self, path):
        return ["paper"]

    async def stat(self, path):
        return Attr("dir") if path == "/" else Attr(size=0, mode=0o600)

    async def read(self, path, offset, size):
        return b""

    async def truncate(self, path, size):
        pass

    async def write(self, path, offset, data):
        def use():
            from escpos.printer import Usb

            printer = Usb(0x04B8, 0x0E15, timeout=5000, profile="TM-T88III")
            printer.text(data.decode())
            printer.cut()
            printer.close()

        await trio.to_thread.run_sync(use)
'''
METER = '''"""A voltage."""
# /// udf
# kind = "usb"
# interface = 1
# class = "Meter"
# match = [{ class = 0xfe, subclass = 3 }]
# ///
import trio

from udf import Attr, UsbDriver


class Meter(UsbDriver):
    async def list(self, path):
        return ["volts"]

    async def stat(self, path):
        return Attr("dir") if path == "/" else Attr(size=None)

    async def read(self, path, offset, size):
        def use():
            import pyvisa

            manager = pyvisa.ResourceManager("@py")
            (name,) = manager.list_resources("USB?*INSTR")
            with manager.open_resource(name) as instrument:
                instrument.timeout = 5000
                return instrument.query("MEAS:VOLT?")

        return (await trio.to_thread.run_sync(use)).encode()
'''


def needs(module: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed")


@contextlib.contextmanager
def served(device: Device, name: str, driver: str, home: Path, runtime_dir: Path) -> Iterator[tuple[Lab, Path]]:
    """The daemon, and where the device's driver has its files."""
    with Emulator(listen=("127.0.0.1", 0)) as emulator:
        assert emulator.address is not None
        emulator.plug(device)
        address = f"127.0.0.1:{emulator.address[1]}"

        def install(lab: Lab) -> None:
            (lab.drivers / f"{name}.py").write_text(driver)

        with running_lab(home, runtime_dir, "--usbip", address, before=install) as lab:
            until = time.monotonic() + 20
            while [row["state"] for row in lab.devices()] != ["bound"]:
                assert time.monotonic() < until, (lab.devices(), lab.daemon.text())
            yield lab, lab.dev / f"{name}0"


@needs("escpos")
def test_python_escpos_prints_in_a_driver_host(tmp_path: Path, runtime_dir: Path) -> None:
    printer = Printer()
    with served(printer, "paper", PRINTER, tmp_path / "home", runtime_dir) as (_, place):
        with (place / "paper").open("wb", buffering=0) as file:
            file.write(b"Thank you\n")
        assert b"Thank you\n" in printer.printed
        assert b"\x1dV" in printer.printed  # the cut


@needs("pyvisa_py")
def test_pyvisa_py_measures_in_a_driver_host(tmp_path: Path, runtime_dir: Path) -> None:
    instrument = Instrument()
    with served(instrument, "meter", METER, tmp_path / "home", runtime_dir) as (lab, place):
        for volts in (1.25, 2.5):
            instrument.volts = volts
            assert float((place / "volts").read_text()) == volts
        assert lab.daemon.udf.mounts()[0]["faults"] == 0
