"""The devices that the planted drivers drive."""

from __future__ import annotations

from udf.testing.devices import BulkIn, BulkOut, Configuration, Device, Interface, InterruptIn, Stall


class Thermometer(Device):
    """Control IN 1: hundredths of a degree, 16 bits. Control IN 2: its factor, one byte."""

    vendor, product = 0x1209, 0x7E57
    configurations = [Configuration([Interface(0xFF)])]
    raw, factor = 2150, 1

    def __init__(self, raw: int = 2150, factor: int = 1, **identity):
        super().__init__(**identity)
        self.raw, self.factor = raw, factor

    def on_control(self, setup, data):
        if setup.request == 1:
            return self.raw.to_bytes(2, "little")
        if setup.request == 2:
            return bytes([self.factor])
        raise Stall


class Scale(Device):
    """Interrupt IN 1: a report of six bytes, always the same weight: 3, 2, unit, exponent, weight."""

    vendor, product = 0x0922, 0x8003
    configurations = [Configuration([Interface(0xFF, endpoints=[InterruptIn(1, 8)])])]

    def on_in(self, endpoint, length):
        return bytes([3, 2, 11, 0xFF]) + (1234).to_bytes(2, "little")


class HidScale(Scale):
    """The same, of a class that kernels have a driver for."""

    configurations = [Configuration([Interface(3, endpoints=[InterruptIn(1, 8)])])]

    def on_control(self, setup, data):
        if (setup.request_type, setup.request) == (0x21, 0x0A):
            return  # SET IDLE
        raise Stall


class CombinedScale(Scale):
    """The same, beside an interface for something else."""

    configurations = [Configuration([Interface(0xFF, endpoints=[InterruptIn(1, 8)]), Interface(0xFF)])]


class Meter(Device):
    """Bulk OUT 1 takes a question, bulk IN 1 gives the answer. Control OUT 5 forgets all answers."""

    vendor, product = 0x1209, 0x0003
    configurations = [Configuration([Interface(0xFF, endpoints=[BulkIn(1), BulkOut(1)])])]
    name = "UDF,Meter,1"

    def __init__(self, name: str = "UDF,Meter,1", **identity):
        super().__init__(**identity)
        self.name = name

    def on_out(self, endpoint, data):
        answers = {b"*IDN?\n": self.name, b"READ?\n": "+1.2345E+00"}
        answer = answers.get(bytes(data))
        if answer is None:
            raise Stall
        self.push(0x81, answer.encode() + b"\n")

    def on_control(self, setup, data):
        if setup.request != 5:
            raise Stall
        self.clear(0x81)


class Printer(Device):
    """Bulk OUT 1 takes a page, which control OUT 1 begins. `page` is what has arrived of it."""

    vendor, product = 0x1209, 0x0004
    configurations = [Configuration([Interface(0xFF, endpoints=[BulkOut(1, 64)])])]
    page = b""

    def on_control(self, setup, data):
        self.page = b""

    def on_out(self, endpoint, data):
        self.page += bytes(data)


class Display(Printer):
    """A picture is complete, and `shown`, when a packet is shorter than the endpoint's 64 bytes."""

    shown = b""

    def on_control(self, setup, data):
        self.page = self.shown = b""

    def on_out(self, endpoint, data):
        self.page += bytes(data)
        if len(data) % 64 or not data:
            self.shown, self.page = self.page, b""


class Logger(Device):
    """Control OUT 1 rewinds; bulk IN 1 gives records of 16 bytes, one each; one of zeros is the end."""

    vendor, product = 0x1209, 0x0005
    configurations = [Configuration([Interface(0xFF, endpoints=[BulkIn(1, 64)])])]

    def on_control(self, setup, data):
        self.clear(0x81)
        for number in range(1, 4):
            self.push(0x81, bytes([number]) * 16)
        self.push(0x81, bytes(16))


class Button(Device):
    """Interrupt IN 1: one byte for each press; it is pressed once, by control OUT 1."""

    vendor, product = 0x1209, 0x0006
    configurations = [Configuration([Interface(0xFF, endpoints=[InterruptIn(1, 8)])])]

    def on_control(self, setup, data):
        self.clear(0x81)
        self.push(0x81, b"\x07")


class Camera(Device):
    """Its endpoint is there in setting 1 only, where bulk IN 1 always gives a small picture."""

    vendor, product = 0x1209, 0x0007
    configurations = [
        Configuration([Interface(0xFF, alternates=[Interface(0xFF, endpoints=[BulkIn(1, 64)])])]),
    ]

    def on_in(self, endpoint, length):
        return b"picture."


class Stick(Device):
    """A bit of mass storage: control IN FE gives the highest LUN, 0. Many real ones stall that instead."""

    vendor, product = 0x1209, 0x0008
    configurations = [Configuration([Interface(8, 6, 0x50, endpoints=[BulkIn(1), BulkOut(2)])])]

    def on_control(self, setup, data):
        if (setup.request_type, setup.request) != (0xA1, 0xFE):
            raise Stall
        return b"\0"
