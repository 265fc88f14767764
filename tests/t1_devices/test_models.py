"""The small models: thermometer, serial port, keyboard."""

from __future__ import annotations

import os
import socket
import struct

import pytest

from tests.t1_devices.raw import Failed, Raw, connected
from udf.errors import UserError
from udf.testing.devices import MODELS, Emulator, make
from udf.testing.devices.keyboard import REPORT_DESCRIPTOR, Keyboard
from udf.testing.devices.models import options_of
from udf.testing.devices.serial import Serial
from udf.testing.devices.thermometer import Thermometer


def test_thermometer_tells_the_temperature() -> None:
    device = Thermometer(serial="T1")
    with Emulator() as bus, connected(bus, bus.plug(device)) as raw:
        for celsius in (21.5, -3.25, 0.0):
            device.celsius = celsius
            assert struct.unpack("<h", raw.control(0xC0, 1, data=2)) == (round(celsius * 100),)
        for kind, request in ((0xC0, 2), (0x40, 1), (0xA0, 1)):
            with pytest.raises(Failed):
                raw.control(kind, request, data=2 if kind & 0x80 else b"")


def test_serial_port_echoes_by_itself() -> None:
    with Emulator() as bus, connected(bus, bus.plug(Serial())) as raw:
        raw.write(2, b"hello")
        assert raw.read(0x81, 64) == b"hello"


def test_serial_port_knows_its_line() -> None:
    device = Serial()
    with Emulator() as bus, connected(bus, bus.plug(device)) as raw:
        coding = struct.pack("<IBBB", 115200, 2, 1, 7)
        raw.control(0x21, 0x20, data=coding)
        assert raw.control(0xA1, 0x21, data=7) == coding
        raw.control(0x21, 0x22, 3)
        assert (device.dtr, device.rts) == (True, True)
        raw.control(0x21, 0x23, 250)
        assert device.breaks == [250]
        for wrong in (coding[:6], struct.pack("<IBBB", 1, 3, 0, 8), struct.pack("<IBBB", 1, 0, 5, 8)):
            with pytest.raises(Failed):
                raw.control(0x21, 0x20, data=wrong)
        assert device.coding.rate == 115200


def test_serial_port_notifies_of_the_modem_lines() -> None:
    device = Serial()
    with Emulator() as bus, connected(bus, bus.plug(device)) as raw:
        device.set_state(carrier=True, ready=False, ring=True)
        assert raw.read(0x83, 16) == bytes((0xA1, 0x20, 0, 0, 0, 0, 2, 0, 0b1001, 0))


def test_serial_port_has_a_pseudo_terminal_behind_it() -> None:
    device = Serial("pty")
    with Emulator() as bus:
        plugged = bus.plug(device)
        assert device.path is not None
        far = os.open(device.path, os.O_RDWR | os.O_NOCTTY)
        try:
            with connected(bus, plugged) as raw:
                raw.write(2, b"to the far end\n")
                assert os.read(far, 100) == b"to the far end\n"
                os.write(far, b"and back")
                assert raw.read(0x81, 64) == b"and back"
        finally:
            os.close(far)


def test_far_end_that_does_not_read_makes_the_port_say_nak() -> None:
    ours, theirs = socket.socketpair()
    with ours, Emulator() as bus, connected(bus, bus.plug(Serial(theirs))) as raw:
        sent: list[int] = []
        while True:
            sent.append(raw.submit(2, b"x" * 16384))
            raw.control(0x80, 8, data=1)  # by now the write is answered, if it ever will be
            if sent[-1] not in raw.answers:
                break
        left = len(sent) * 16384
        ours.settimeout(10)
        while left:
            left -= len(ours.recv(65536))
        assert all(raw.wait(each).status == 0 for each in sent)
        ours.close()
        assert raw.read(0x83, 16)[8] == 0  # the line is dead, the port is not
        raw.write(2, b"nobody")


def descriptors(raw: Raw, kind: int) -> bytes:
    return raw.control(0x81, 6, kind << 8, 0, 256)


def test_keyboard_types() -> None:
    device = Keyboard()
    with Emulator() as bus, connected(bus, bus.plug(device)) as raw:
        assert descriptors(raw, 0x22) == REPORT_DESCRIPTOR
        assert len(REPORT_DESCRIPTOR) == 63
        assert descriptors(raw, 0x21)[7] == 63
        assert descriptors(raw, 0x21) in raw.control(0x80, 6, 0x0200, 0, 256)
        device.type("aB")
        reports = [raw.read(0x81, 8) for _ in range(4)]
        assert reports == [
            bytes((0, 0, 4, 0, 0, 0, 0, 0)),
            bytes(8),
            bytes((2, 0, 5, 0, 0, 0, 0, 0)),
            bytes(8),
        ]
        for usage in range(4, 11):
            device.press(usage)
        last = [raw.read(0x81, 8) for _ in range(7)][-1]
        assert last == bytes((0, 0, 1, 1, 1, 1, 1, 1))


def test_keyboard_has_lights_and_protocols() -> None:
    device = Keyboard()
    with Emulator() as bus, connected(bus, bus.plug(device)) as raw:
        raw.control(0x21, 9, 0x0200, 0, b"\x02")
        assert device.lights == 2
        assert raw.control(0xA1, 1, 0x0200, 0, 1) == b"\x02"
        assert raw.control(0xA1, 3, data=1) == b"\x01"
        raw.control(0x21, 11, 0)
        assert raw.control(0xA1, 3, data=1) == b"\x00"
        raw.control(0x21, 10, 0x0500)
        assert raw.control(0xA1, 2, data=1) == b"\x05"
        for request in ((0x21, 9, 0x0100, 0, b"\0"), (0x81, 6, 0x2300, 0, 8), (0x21, 99, 0, 0, b"")):
            with pytest.raises(Failed):
                raw.control(*request)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_made_plugged_and_described(model: str) -> None:
    assert MODELS[model].help
    assert all(option.help for option in options_of(model).values())
    with Emulator() as bus:
        device = make(model, {"serial": "X", "vendor": "0x1234", "speed": "full"})
        plugged = bus.plug(device, "it")
        with connected(bus, plugged) as raw:
            assert raw.control(0x80, 6, 0x0100, 0, 18)[8:10] == b"\x34\x12"
            plugged.unplug()
            with pytest.raises((EOFError, ConnectionResetError)):
                raw.receive()
        plugged.replug()
        with connected(bus, plugged) as raw:
            assert raw.control(0x80, 8, data=1) == b"\x01"


def test_text_that_no_key_writes_is_refused() -> None:
    with pytest.raises(UserError, match="no key writes 'é'"):
        make("keyboard", {"text": "é"})


def test_model_that_does_not_exist_is_one_sentence() -> None:
    with pytest.raises(UserError, match="There is no file and no device model 'toaster'; the models are thermometer"):
        make("toaster", {})
