"""Unmodified programs from PyPI that use pyusb, against small models of their devices: python-escpos and pyvisa-py."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterator

import pytest

from udf.testing.devices import BulkIn, BulkOut, Configuration, Device, Emulator, Interface, Setup, Stall

from .foreign_world import run_program


@pytest.fixture
def bus() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


def needs(module: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed")


class Printer(Device):
    """A receipt printer: takes everything, and answers DLE EOT with its state."""

    vendor, product = 0x04B8, 0x0E15
    configurations = [Configuration([Interface(7, 1, 2, [BulkIn(2), BulkOut(1)])])]
    printed = b""

    def on_out(self, endpoint: int, data: bytes) -> None:
        self.printed += data
        if data[:2] == b"\x10\x04":
            self.push(2, b"\x12")

    def on_control(self, setup: Setup, data: bytes) -> bytes | None:
        if setup.request == 0:
            return b"MFG:UDF;MDL:Printer;CLS:PRINTER;"
        if setup.request == 1:
            return b"\x18"
        raise Stall


@needs("escpos")
def test_python_escpos_prints(bus: Emulator) -> None:
    printer = Printer()
    program = """
from escpos.printer import Usb
printer = Usb(0x04B8, 0x0E15, timeout=5000, profile="TM-T88III")
printer.text("Thank you\\n")
printer.barcode("4006381333931", "EAN13")
printer.qr("https://example.org")
print("online" if printer.is_online() else "offline")
printer.cut()
printer.close()
"""
    assert run_program(program, bus.plug(printer)).endswith("online\n")
    assert b"Thank you\n" in printer.printed
    assert b"4006381333931" in printer.printed
    assert b"\x1dV" in printer.printed  # the cut
    assert len(printer.printed) > 500  # the picture of the code


class Instrument(Device):
    """A USBTMC instrument that knows *IDN? and one measurement, and gives long answers in pieces."""

    vendor, product = 0x1209, 0x7E3C
    serial = "T1"
    configurations = [Configuration([Interface(0xFE, 3, 1, [BulkIn(1), BulkOut(1)])])]

    def __init__(self) -> None:
        super().__init__()
        self.answer = b""
        self.volts = 1.25

    def on_control(self, setup: Setup, data: bytes) -> bytes | None:
        if setup.request == 7:  # GET_CAPABILITIES
            return struct.pack("<BxHBB6xHBB8x", 1, 0x0100, 0, 0, 0x0100, 4, 0)
        if setup.request == 5:  # INITIATE_CLEAR
            self.answer = b""
            return b"\x01"
        if setup.request == 6:  # CHECK_CLEAR_STATUS
            return b"\x01\x00"
        if setup.request == 128:  # READ_STATUS_BYTE
            return bytes((1, setup.value & 0x7F, 0x10 if self.answer else 0))
        raise Stall

    def on_out(self, endpoint: int, data: bytes) -> None:
        kind, tag, inverse, size = struct.unpack_from("<BBBxI", data)
        if tag != ~inverse & 0xFF:
            raise Stall
        if kind == 1:
            self.command(data[12 : 12 + size].decode().strip())
        elif kind == 2:
            part, self.answer = self.answer[: min(size, 1000)], self.answer[min(size, 1000) :]
            head = struct.pack("<BBBxIB3x", 2, tag, inverse, len(part), 0 if self.answer else 1)
            self.push(1, head + part + bytes(-len(part) % 4), zlp=True)
        else:
            raise Stall

    def command(self, text: str) -> None:
        if text == "*IDN?":
            self.answer = b"UDF,Instrument,T1,1.0\n"
        elif text == "MEAS:VOLT?":
            self.answer = b"%.3f\n" % self.volts
        elif text.startswith("SOUR:VOLT "):
            self.volts = float(text.split()[1])
        elif text == "TRACE?":
            self.answer = b",".join(b"%d" % each for each in range(2000)) + b"\n"


@needs("pyvisa_py")
def test_pyvisa_py_measures(bus: Emulator) -> None:
    instrument = Instrument()
    program = """
import pyvisa
manager = pyvisa.ResourceManager("@py")
(name,) = manager.list_resources("USB?*INSTR")
print(name)
with manager.open_resource(name) as instrument:
    instrument.timeout = 5000
    print(instrument.query("*IDN?").strip())
    instrument.write("SOUR:VOLT 3.3")
    print(instrument.query_ascii_values("MEAS:VOLT?"))
    print(sum(instrument.query_ascii_values("TRACE?")))
    print(instrument.query("*IDN?").strip())
manager.close()
"""
    name, who, volts, trace, again = run_program(program, bus.plug(instrument)).splitlines()
    assert name == f"USB0::{0x1209}::{0x7E3C}::T1::0::INSTR"
    assert who == "UDF,Instrument,T1,1.0"
    assert volts == "[3.3]"
    assert float(trace) == sum(range(2000))
    assert again == who
    assert instrument.volts == 3.3
