"""Descriptors of honest devices are read as they are, of hostile ones within bounds."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from udf.usb import descriptors as d

DEVICE = bytes.fromhex("12 01 00 02 00 00 00 40 09 12 57 7e 00 01 01 02 03 01")


def configuration(*parts: bytes, interfaces: int, total: int | None = None) -> bytes:
    body = b"".join(parts)
    return struct.pack("<BBHBBBBB", 9, 2, 9 + len(body) if total is None else total, interfaces, 1, 4, 0x80, 50) + body


def interface(number: int, alternate: int = 0, endpoints: int = 0, cls: int = 0xFF) -> bytes:
    return bytes([9, 4, number, alternate, endpoints, cls, 6, 0x50, 5])


def endpoint(address: int, attributes: int = 2, size: int = 512, interval: int = 0) -> bytes:
    return struct.pack("<BBBBHB", 7, 5, address, attributes, size, interval)


CDC = configuration(
    b"\x08\x0b\x00\x02\x02\x02\x01\x00",  # an interface association before the first interface
    interface(0, endpoints=1, cls=2),
    b"\x05\x24\x00\x10\x01",
    endpoint(0x83, 3, 16, 9),
    interface(1),
    interface(1, 1, endpoints=2, cls=10),
    endpoint(0x81),
    b"\x03\x25\x07",
    endpoint(0x02),
    interfaces=2,
)
GOOD = configuration(interface(0, endpoints=1), endpoint(0x81), interfaces=1)


def test_a_device_descriptor_is_read_field_by_field() -> None:
    assert d.parse_device(DEVICE) == d.Device(0x200, 0, 0, 0, 64, 0x1209, 0x7E57, 0x100, 1, 2, 3, 1)


@pytest.mark.parametrize("data", [b"", DEVICE[:17], b"\x11" + DEVICE[1:], b"\x12\x02" + DEVICE[2:]])
def test_what_is_no_device_descriptor_is_refused(data: bytes) -> None:
    with pytest.raises(d.DescriptorError):
        d.parse_device(data)


def test_a_configuration_keeps_alternates_endpoints_and_class_descriptors_apart() -> None:
    found = d.parse_configuration(CDC)
    assert (found.value, found.name_index, found.attributes, found.max_power) == (1, 4, 0x80, 50)
    assert found.extra == b"\x08\x0b\x00\x02\x02\x02\x01\x00"
    control, data = found.interfaces
    assert [each.alternate for each in data] == [0, 1]
    assert control[0].triple == (2, 6, 0x50)
    assert control[0].extra == b"\x05\x24\x00\x10\x01"
    assert (control[0].endpoints[0].type, control[0].endpoints[0].interval) == (d.INTERRUPT, 9)
    assert [each.address for each in data[1].endpoints] == [0x81, 0x02]
    assert data[1].endpoints[0].extra == b"\x03\x25\x07"
    assert found.interface(1, 1) is data[1]
    assert found.interface(7) is None


def test_interfaces_that_belong_together_are_one_function() -> None:
    found = d.parse_configuration(CDC)
    assert found.function(0) == found.function(1) == {0, 1}, "an association says so"
    union = configuration(
        interface(0), interface(2, cls=2), b"\x05\x24\x06\x02\x03", interface(3, cls=10), interfaces=3
    )
    found = d.parse_configuration(union)
    assert found.function(2) == found.function(3) == {2, 3}, "a union says so"
    assert found.function(0) == {0}
    lying = configuration(b"\x08\x0b\xff\xff\x02\x02\x01\x00", b"\x02\x0b", interface(0), interfaces=1)
    assert d.parse_configuration(lying).function(0) == {0}


def test_a_high_bandwidth_endpoint_carries_up_to_three_packets_in_a_microframe() -> None:
    assert d.Endpoint(0x81, 1, 0x1400, 1).packet_bytes == 3 * 1024
    assert d.Endpoint(0x81, 1, 0x0040, 1).packet_bytes == 64


@pytest.mark.parametrize(
    ("data", "said", "kept"),
    [
        (b"", "no configuration", 0),
        (GOOD[:8], "no configuration", 0),
        (b"\x09\x04" + GOOD[2:], "no configuration", 0),
        (GOOD[:-1], "announces 25 bytes", 1),
        (configuration(interface(0), interfaces=1, total=3), "less than itself", 0),
        (configuration(interface(0), b"\x00\x05\x81\x02", interfaces=1), "descriptor of 0 bytes", 1),
        (configuration(interface(0), b"\x01\x05", interfaces=1), "descriptor of 1 bytes", 1),
        (configuration(interface(0), b"\x40\x05", interfaces=1), "descriptor of 64 bytes", 1),
        (configuration(endpoint(0x81), interface(0), interfaces=1), "without an interface", 0),
        (configuration(interface(0), interfaces=2), "announces 2 interfaces", 1),
        (configuration(interface(0, endpoints=2), endpoint(0x81), interfaces=1), "announces 2 endpoints", 1),
        (configuration(interface(0), endpoint(0x81), interfaces=1), "more endpoints", 1),
        (configuration(interface(0, endpoints=1), endpoint(0x80), interfaces=1), "address 0x80", 1),
        (configuration(interface(0, endpoints=2), endpoint(0x81), endpoint(0x81), interfaces=1), "twice", 1),
        (configuration(interface(0), interface(0), interfaces=1), "alternate setting 0 twice", 1),
        (configuration(b"\x08\x04" + bytes(6), interfaces=1), "interface descriptor of 8", 0),
        (configuration(interface(0, endpoints=1), b"\x06\x05" + bytes(4), interfaces=1), "endpoint descriptor of 6", 1),
        (configuration(interface(0), GOOD, interfaces=1), "type 2 inside", 1),
        (configuration(*(interface(n) for n in range(255)), interfaces=255), "more than 32 interfaces", 32),
        (configuration(*(interface(0, n) for n in range(200)), interfaces=1), "more than 128 alternate", 1),
    ],
)
def test_nonsense_is_refused_or_leniently_survived(data: bytes, said: str, kept: int) -> None:
    with pytest.raises(d.DescriptorError, match=said):
        d.parse_configuration(data)
    assert len(d.parse_configuration(data, lenient=True).interfaces) == kept


def test_what_lies_behind_the_announced_total_is_not_looked_at() -> None:
    assert d.parse_configuration(GOOD + b"\x00\x00") == d.parse_configuration(GOOD)


@given(st.binary(max_size=300))
@example(CDC)
def test_no_bytes_make_the_parsers_raise_anything_else(data: bytes) -> None:
    for attempt in (data, CDC[:9] + data, GOOD[:2] + b"\xff\xff" + GOOD[4:] + data, DEVICE[:2] + data):
        for parse in (d.parse_device, d.parse_configuration):
            try:
                parse(attempt)
            except d.DescriptorError:
                pass
        lenient = d.parse_configuration(attempt, lenient=True)
        assert len(lenient.interfaces) <= d.MAX_INTERFACES
        assert all(len(each.endpoints) <= d.MAX_ENDPOINTS for each in lenient.all_interfaces())
        assert lenient.function(0) <= {0, *(each.number for each in lenient.all_interfaces())}
        d.parse_string(attempt)
        d.parse_languages(attempt)
        d.total_length(attempt)


@given(st.lists(st.tuples(st.integers(0, len(CDC) - 1), st.integers(0, 255)), max_size=8))
def test_flipped_bytes_of_a_real_configuration_are_survived(flips: list[tuple[int, int]]) -> None:
    data = bytearray(CDC)
    for where, value in flips:
        data[where] = value
    try:
        d.parse_configuration(data)
    except d.DescriptorError:
        pass
    d.parse_configuration(data, lenient=True)


def test_strings_are_utf16_and_bounded_by_their_own_length() -> None:
    text = "Größe 5°".encode("utf-16-le")
    assert d.parse_string(bytes([2 + len(text), 3]) + text) == "Größe 5°"
    assert d.parse_string(bytes([4, 3]) + text) == "G"
    assert d.parse_string(b"\x05\x03a\x00b") == "a"
    assert d.parse_string(b"\x04\x03\x00\xd8") == "�"
    assert d.parse_string(b"\x04\x02a\x00") is None
    assert d.parse_languages(b"\x06\x03\x09\x04\x07\x04") == (0x409, 0x407)
    assert d.parse_languages(b"\x02\x03") == ()
