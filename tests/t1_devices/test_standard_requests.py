"""Chapter 9 of USB 2.0, as every model answers it, and the rules of packets."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator

import pytest

from tests.t1_devices.raw import Failed, Raw, connected
from udf.testing.devices import (
    BulkIn,
    BulkOut,
    Configuration,
    Device,
    Emulator,
    Interface,
    InterruptIn,
    Nak,
    Setup,
    Speed,
    Stall,
)
from udf.testing.devices.loopback import Loopback, Request

EPIPE, EPROTO, EOVERFLOW, ECONNRESET, ESHUTDOWN = -32, -71, -75, -104, -108


@pytest.fixture
def loop() -> Iterator[Raw]:
    with Emulator() as bus, connected(bus, bus.plug(Loopback())) as raw:
        yield raw


def descriptor(raw: Raw, kind: int, index: int = 0, language: int = 0, length: int = 4096) -> bytes:
    return raw.control(0x80, 6, kind << 8 | index, language, length)


def test_device_descriptor_has_its_fields(loop: Raw) -> None:
    data = descriptor(loop, 1)
    fields = struct.unpack("<BBHBBBBHHHBBBB", data)
    assert fields == (18, 1, 0x0200, 0xFF, 0, 0, 64, 0x1209, 0x7E50, 0x0100, 1, 2, 3, 2)
    assert descriptor(loop, 1, length=8) == data[:8]


def test_configuration_descriptor_is_as_long_as_it_says(loop: Raw) -> None:
    for index in (0, 1):
        data = descriptor(loop, 2, index)
        assert int.from_bytes(data[2:4], "little") == len(data)
        position = 0
        while position < len(data):
            assert data[position] >= 2
            position += data[position]
        assert position == len(data)
    with pytest.raises(Failed):
        descriptor(loop, 2, 2)


def test_strings_are_given_by_language(loop: Raw) -> None:
    assert descriptor(loop, 3) == bytes((4, 3, 9, 4))
    assert descriptor(loop, 3, 2, 0x0409)[2:].decode("utf-16-le") == "Loopback"
    for index, language in ((2, 0x0407), (99, 0x0409), (0xEE, 0)):
        with pytest.raises(Failed):
            descriptor(loop, 3, index, language)


def test_high_speed_devices_have_a_qualifier_and_others_not(loop: Raw) -> None:
    assert descriptor(loop, 6)[:2] == bytes((10, 6))
    assert descriptor(loop, 7)[1] == 7
    with Emulator() as bus, connected(bus, bus.plug(Loopback(speed=Speed.FULL))) as raw, pytest.raises(Failed):
        descriptor(raw, 6)


def test_configuration_is_chosen_read_and_taken_back(loop: Raw) -> None:
    assert loop.control(0x80, 8, data=1) == b"\x01"
    loop.configure(2)
    assert loop.control(0x80, 8, data=1) == b"\x02"
    with pytest.raises(Failed):
        loop.configure(3)
    loop.configure(0)
    assert loop.control(0x80, 8, data=1) == b"\x00"
    assert loop.wait(loop.submit(1, b"x")).status == EPROTO


def test_device_has_no_configuration_when_it_is_plugged_in_unless_it_is_told() -> None:
    with Emulator() as bus:
        for device, value in ((Loopback(), b"\0"), (Loopback(configured=2), b"\x02")):
            with connected(bus, bus.plug(device), 0) as raw:
                assert raw.control(0x80, 8, data=1) == value


def test_alternate_settings_bring_and_take_endpoints(loop: Raw) -> None:
    assert loop.control(0x81, 10, 0, 0, 1) == b"\0"
    assert loop.wait(loop.submit(3, bytes(192), packets=[192])).status == EPROTO
    loop.control(0x01, 11, 1, 0)
    assert loop.control(0x81, 10, 0, 0, 1) == b"\x01"
    assert loop.wait(loop.submit(3, bytes(192), packets=[192])).status == 0
    for interface, alternate in ((0, 2), (1, 1), (2, 0)):
        with pytest.raises(Failed):
            loop.control(0x01, 11, alternate, interface)


def test_what_waits_on_an_endpoint_ends_when_the_endpoint_goes(loop: Raw) -> None:
    waiting = loop.submit(0x81, 64)
    loop.control(0x01, 11, 1, 0)
    assert loop.wait(waiting).status == ESHUTDOWN


def test_halt_is_set_seen_and_cleared(loop: Raw) -> None:
    waiting = loop.submit(0x81, 64)
    loop.control(0x02, 3, 0, 0x81)
    assert loop.wait(waiting).status == EPIPE
    assert loop.control(0x82, 0, 0, 0x81, 2) == b"\x01\0"
    assert loop.wait(loop.submit(0x81, 64)).status == EPIPE
    loop.clear_halt(0x81)
    assert loop.control(0x82, 0, 0, 0x81, 2) == b"\0\0"
    loop.write(1, b"again")
    assert loop.read(0x81, 64) == b"again"
    for endpoint in (0x85, 5):
        with pytest.raises(Failed):
            loop.clear_halt(endpoint)


def test_reset_of_the_port_restores_configuration_and_settings(loop: Raw) -> None:
    loop.control(0x01, 11, 1, 0)
    loop.write(1, b"lost")
    loop.control(0x02, 3, 0, 0x81)
    loop.control(0x23, 3, 4, 1)
    assert loop.control(0x80, 8, data=1) == b"\x01"
    assert loop.control(0x81, 10, 0, 0, 1) == b"\x01"
    loop.write(1, b"new")
    assert loop.read(0x81, 64) == b"new"


def test_control_requests_carry_data_both_ways(loop: Raw) -> None:
    loop.control(0x40, Request.ECHO, 1, 2, b"hello")
    assert loop.control(0xC0, Request.ECHO, data=64) == b"hello"
    assert loop.control(0xC0, Request.ECHO, data=2) == b"he"
    assert loop.control(0xC0, Request.SETUP, 0x1234, 0x5678, 8) == bytes.fromhex("c002341278560800")


def test_short_packet_ends_a_transfer_and_a_full_one_does_not(loop: Raw) -> None:
    loop.write(1, b"a" * 512)
    waiting = loop.submit(0x81, 2048)
    loop.write(1, b"b" * 10)
    assert loop.wait(waiting).data == b"a" * 512 + b"b" * 10
    loop.control(0x40, Request.PUSH, 1, 0x81, b"c" * 512)  # with a packet of length zero
    assert loop.read(0x81, 2048) == b"c" * 512


def test_zero_length_packet_is_a_transfer(loop: Raw) -> None:
    loop.write(1, b"")
    assert loop.read(0x81, 512) == b""


def test_transfer_takes_whole_packets_and_leaves_the_rest(loop: Raw) -> None:
    loop.write(1, bytes(range(256)) * 8)
    assert loop.read(0x81, 512) + loop.read(0x81, 1024) + loop.read(0x81, 512) == bytes(range(256)) * 8


def test_packet_that_does_not_fit_is_an_overflow(loop: Raw) -> None:
    loop.write(1, bytes(100))
    with pytest.raises(Failed) as caught:
        loop.read(0x81, 64)
    assert caught.value.status == EOVERFLOW


def test_unlinked_transfer_is_not_answered_and_the_next_one_works(loop: Raw) -> None:
    waiting = loop.submit(0x81, 64)
    assert loop.wait(loop.unlink(waiting)).status == ECONNRESET
    never = loop.submit(0x80, 8, bytes((0xC0, Request.NEVER, 0, 0, 0, 0, 8, 0)))
    assert loop.wait(loop.unlink(never)).status == ECONNRESET
    loop.write(1, b"x")
    assert loop.read(0x81, 64) == b"x"


def test_unlink_after_the_answer_says_so(loop: Raw) -> None:
    loop.write(1, b"x")
    done = loop.submit(0x81, 64)
    assert loop.wait(done).data == b"x"
    assert loop.wait(loop.unlink(done)).status == 0


def test_unlinked_transfer_hands_over_what_it_has(loop: Raw) -> None:
    loop.write(1, b"a" * 512)
    waiting = loop.submit(0x81, 2048)
    unlinked = loop.unlink(waiting)
    answer = loop.wait(waiting)
    assert (answer.status, answer.data) == (ECONNRESET, b"a" * 512)
    assert loop.wait(unlinked).status == 0


def test_isochronous_packets_take_their_time_and_lose_nothing(loop: Raw) -> None:
    loop.control(0x01, 11, 1, 0)
    assert loop.wait(loop.submit(3, b"a" * 100 + b"b" * 192, packets=[100, 192])).packets == [
        (0, 100, 100, 0),
        (100, 192, 192, 0),
    ]
    answer = loop.wait(loop.submit(0x83, 576, packets=[192, 192, 192]))
    assert answer.data == b"a" * 100 + b"b" * 192
    assert [(row[2], row[3]) for row in answer.packets] == [(100, 0), (192, 0), (0, 0)]


def test_handler_that_fails_is_a_stall_and_a_line_in_the_log(loop: Raw, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Failed) as caught:
        loop.control(0x40, Request.FAIL)
    assert caught.value.status == EPIPE
    assert "a handler failed" in caplog.text
    loop.control(0x40, Request.ECHO, data=b"it lives")


def test_endpoints_that_are_not_there_do_not_answer(loop: Raw) -> None:
    for endpoint in (5, 0x85, 0x8F):
        assert loop.wait(loop.submit(endpoint, 0 if endpoint & 0x80 else b"x")).status == EPROTO


class Lamp(Device):
    """The example of device.py."""

    configurations = [Configuration([Interface(0xFF, endpoints=[InterruptIn(1)])])]
    lit = False

    def on_control(self, setup: Setup, data: bytes) -> bytes | None:
        if setup.request != 1:
            raise Stall
        self.lit = bool(setup.value)
        self.push(1, b"on" if self.lit else b"off")
        return None


def test_smallest_model_works() -> None:
    with Emulator() as bus, connected(bus, bus.plug(Lamp())) as raw:
        raw.control(0x40, 1, 1)
        assert raw.read(0x81, 8) == b"on"
        with pytest.raises(Failed):
            raw.control(0x40, 2)


class Slow(Device):
    """Takes data only when it is told to."""

    configurations = [Configuration([Interface(0xFF, endpoints=[BulkIn(1), BulkOut(2)])])]
    open = False

    def on_out(self, endpoint: int, data: bytes) -> None:
        if not self.open:
            raise Nak
        self.push(1, data)


def test_data_that_are_refused_for_now_wait_in_order() -> None:
    with Emulator() as bus:
        device = Slow()
        with connected(bus, bus.plug(device)) as raw:
            first, second = raw.submit(2, b"1"), raw.submit(2, b"2")
            raw.control(0x80, 8, data=1)
            assert not raw.answers
            device.open = True
            device.ready(2)
            assert raw.wait(second).status == 0
            assert raw.wait(first).status == 0
            assert raw.read(0x81, 8) + raw.read(0x81, 8) == b"12"


def test_push_from_any_thread_reaches_who_waits() -> None:
    with Emulator() as bus:
        device = Slow()
        with connected(bus, bus.plug(device)) as raw:
            waiting = raw.submit(0x81, 8)
            thread = threading.Thread(target=device.push, args=(1, b"late"))
            thread.start()
            thread.join()
            assert raw.wait(waiting).data == b"late"


def test_unknown_keyword_is_refused() -> None:
    with pytest.raises(TypeError, match="no option 'colour'"):
        Lamp(colour="red")


def test_data_toggle_follows_the_packets_and_begins_anew() -> None:
    device = Loopback()
    with Emulator() as bus, connected(bus, bus.plug(device)) as raw:
        for length, toggle in ((1, 1), (512, 0), (513, 0), (0, 1), (1024, 1)):
            raw.write(4, bytes(length))
            assert device.toggle(4) == toggle
        raw.clear_halt(4)
        assert device.toggle(4) == 0
        raw.read(0x84, 512)
        assert device.toggle(0x84) == 1
        raw.control(0x01, 11, 0, 1)
        assert device.toggle(0x84) == 0
