"""Bulk-Only Transport 1.0 as a stick speaks it: the thirteen cases, invalid commands, reset recovery."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from tests.t1_devices.bot import (
    EPIPE,
    INQUIRY,
    READY,
    cbw,
    command,
    good,
    read_10,
    reset_recovery,
    sense,
    take_csw,
    write_10,
)
from tests.t1_devices.raw import Failed, Raw, connected
from udf.testing.devices import Emulator
from udf.testing.devices.storage import Storage


@pytest.fixture
def stick() -> Iterator[Raw]:
    with Emulator() as bus, connected(bus, bus.plug(Storage(size=1 << 20))) as raw:
        sense(raw)  # power on
        yield raw


# What the host expects (bytes, and whether it reads), what the command does, then: bytes that the host gets or can
# give, residue, status, and the endpoint that is stalled. Clause 6.7 numbers them.
NOTHING, READS, WRITES = READY, read_10(0, 2), write_10(0, 2)
CASES = {
    "1 Hn=Dn": (0, True, NOTHING, 0, 0, 0, None),
    "2 Hn<Di": (0, True, READS, 0, 0, 2, None),
    "3 Hn<Do": (0, False, WRITES, 0, 0, 2, None),
    "4 Hi>Dn": (512, True, NOTHING, 0, 512, 0, 0x81),
    "5 Hi>Di, whole packets": (2048, True, READS, 1024, 1024, 0, 0x81),
    "5 Hi>Di, a short packet": (512, True, INQUIRY, 36, 476, 0, None),
    "6 Hi=Di": (1024, True, READS, 1024, 0, 0, None),
    "7 Hi<Di": (512, True, READS, 512, 0, 2, None),
    "8 Hi<>Do": (1024, True, WRITES, 0, 1024, 2, 0x81),
    "9 Ho>Dn": (512, False, NOTHING, 0, 512, 0, 2),
    "10 Ho<>Di": (1024, False, READS, 0, 1024, 2, 2),
    "11 Ho>Do": (2048, False, WRITES, 1024, 1024, 0, 2),
    "12 Ho=Do": (1024, False, WRITES, 1024, 0, 0, None),
    "13 Ho<Do": (512, False, WRITES, 512, 0, 2, None),
}


@pytest.mark.parametrize("packets", [1 << 20, 512], ids=["in one transfer", "in single packets"])
@pytest.mark.parametrize("case", CASES)
def test_thirteen_cases(stick: Raw, case: str, packets: int) -> None:
    length, reads, cdb, moved, residue, status, stalled = CASES[case]
    stick.write(2, cbw(cdb, length, reads=reads))
    done, halted = 0, None
    while done < length:
        part = min(packets, length - done)
        answer = stick.wait(stick.submit(0x81, part) if reads else stick.submit(2, bytes(part)))
        done += answer.actual
        if answer.status:
            assert answer.status == EPIPE
            halted = 0x81 if reads else 2
            stick.clear_halt(halted)
            break
        if answer.actual < part:
            break
    assert halted == stalled
    if reads or halted is None:
        assert done == moved
    assert take_csw(stick) == (residue, status)
    assert good(stick, INQUIRY, 36)[8:11] == b"UDF"


def test_stick_that_stalls_after_every_short_answer() -> None:
    with Emulator() as bus, connected(bus, bus.plug(Storage(size=1 << 20, stall_short=True))) as raw:
        raw.write(2, cbw(INQUIRY, 64))
        assert len(raw.read(0x81, 64)) == 36
        with pytest.raises(Failed):
            raw.read(0x81, 13)
        raw.clear_halt(0x81)
        assert take_csw(raw) == (28, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"USBC",
        cbw(READY)[:30],
        cbw(READY) + b"\0",
        b"USBX" + cbw(READY)[4:],
        cbw(READY)[:14] + b"\x00" + cbw(READY)[15:],
        cbw(READY)[:14] + b"\x11" + cbw(READY)[15:],
        cbw(READY)[:13] + b"\x10" + cbw(READY)[14:],
    ],
    ids=["empty", "short", "30 bytes", "32 bytes", "signature", "no command", "17 bytes of command", "LUN 16"],
)
def test_invalid_command_stalls_both_pipes_until_reset_recovery(stick: Raw, data: bytes) -> None:
    with pytest.raises(Failed):
        stick.write(2, data)
    for _ in range(2):  # clearing alone does not help
        stick.clear_halt(2)
        stick.clear_halt(0x81)
        assert stick.wait(stick.submit(2, cbw(READY))).status == EPIPE
        assert stick.wait(stick.submit(0x81, 13)).status == EPIPE
    stick.control(0x21, 0xFF)
    assert stick.wait(stick.submit(0x81, 13)).status == EPIPE  # a reset keeps the halts
    stick.clear_halt(0x81)
    stick.clear_halt(2)
    good(stick, READY)


@pytest.mark.parametrize("moved", [None, 0, 512], ids=["before the data", "at the status", "in the data"])
def test_reset_recovery_ends_a_command_that_its_host_left(stick: Raw, moved: int | None) -> None:
    length = {None: 1024, 0: 0, 512: 1024}[moved]
    stick.write(2, cbw(read_10(0, 2) if length else READY, length))
    if moved:
        stick.read(0x81, moved)
    reset_recovery(stick)
    assert good(stick, INQUIRY, 36)[8:11] == b"UDF"


def test_reset_recovery_between_command_and_data_to_the_device_writes_nothing(stick: Raw) -> None:
    stick.write(2, cbw(write_10(0, 2), 1024, reads=False))
    stick.write(2, b"\xff" * 512)
    reset_recovery(stick)
    good(stick, INQUIRY, 36)
    assert good(stick, read_10(1, 1), 512) == bytes(512)


def test_next_command_waits_until_the_status_is_taken(stick: Raw) -> None:
    stick.write(2, cbw(READY, tag=1))
    waiting = stick.submit(2, cbw(READY, tag=2))
    assert take_csw(stick, 1) == (0, 0)
    assert stick.wait(waiting).status == 0
    assert take_csw(stick, 2) == (0, 0)


def test_class_requests_are_checked(stick: Raw) -> None:
    assert stick.control(0xA1, 0xFE, data=1) == b"\0"
    for kind, request, value, index, data in [
        (0xA1, 0xFE, 1, 0, 1),
        (0xA1, 0xFE, 0, 1, 1),
        (0x21, 0xFF, 1, 0, b""),
        (0x21, 0xFF, 0, 0, b"x"),
        (0x21, 0xFD, 0, 0, b""),
    ]:
        with pytest.raises(Failed):
            stick.control(kind, request, value, index, data)


def test_unit_that_is_not_there_says_so() -> None:
    with Emulator() as bus, connected(bus, bus.plug(Storage(size=1 << 20, luns=["", ""]))) as raw:
        assert raw.control(0xA1, 0xFE, data=1) == b"\x02"
        assert good(raw, INQUIRY, 36, lun=5)[0] == 0x7F
        assert command(raw, READY, lun=5)[2] == 1
        assert sense(raw, lun=5) == (5, 0x25, 0)


def test_big_read_in_many_transfers(stick: Raw) -> None:
    pattern = struct.pack("<1024I", *range(1024)) * 64
    good(stick, write_10(0, 512), data=pattern)
    stick.write(2, cbw(read_10(0, 512), len(pattern)))
    numbers = [stick.submit(0x81, 65536) for _ in range(4)]
    status = stick.submit(0x81, 13)
    assert b"".join(stick.wait(each).data for each in numbers) == pattern
    assert stick.wait(status).data[-1] == 0
