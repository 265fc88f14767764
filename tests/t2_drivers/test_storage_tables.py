"""The pure parts of usb_storage: packets, answers and decisions, against the specifications' tables."""

from __future__ import annotations

import errno
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from . import lab

wire: Any = lab.module("usb_storage", "wire")
scsi: Any = lab.module("usb_storage", "scsi")
sense: Any = lab.module("usb_storage", "sense")
probe: Any = lab.module("usb_storage", "probe")
Outcome, Turn, Action = wire.Outcome, wire.Turn, sense.Action


def csw(tag: int = 7, residue: int = 0, status: int = 0, signature: bytes = b"USBS") -> bytes:
    return struct.pack("<4sIIB", signature, tag, residue, status)


def test_a_cbw_has_31_bytes_in_the_order_of_the_specification() -> None:
    packet = wire.pack_cbw(0x01020304, 512, True, 3, bytes((0x28,)) + bytes(9))
    assert len(packet) == 31
    assert packet[:4] == b"USBC"
    assert packet[4:8] == bytes((4, 3, 2, 1))
    assert packet[8:12] == (512).to_bytes(4, "little")
    assert packet[12:15] == bytes((0x80, 3, 10))
    assert packet[15:] == bytes((0x28,)) + bytes(15)


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (csw(), wire.Csw(wire.Status.PASSED, 0)),
        (csw(status=1, residue=512), wire.Csw(wire.Status.FAILED, 512)),
        (csw(status=2), "phase error"),
        (csw(status=3), "no meaning"),
        (csw(tag=8), "not 0x7"),
        (csw(residue=513), "left 513 bytes of 512"),
        (csw(signature=b"USBC"), "signature"),
        (csw()[:12], "12 bytes"),
        (csw() + b"\0", "14 bytes"),
        (b"", "0 bytes"),
    ],
)
def test_a_csw_is_believed_only_if_valid_and_meaningful(data: bytes, answer: Any) -> None:
    found = wire.read_csw(data, 7, 512)
    assert answer in found if isinstance(answer, str) else found == answer


AFTER_COMMAND = {Outcome.OK: Turn.GO_ON, Outcome.GONE: Turn.GIVE_UP}
AFTER_DATA = {Outcome.OK: Turn.GO_ON, Outcome.STALL: Turn.CLEAR_AND_GO_ON, Outcome.GONE: Turn.GIVE_UP}


@pytest.mark.parametrize("outcome", Outcome)
def test_every_outcome_of_every_stage_has_its_turn(outcome: Any) -> None:
    assert wire.after_command(outcome) is AFTER_COMMAND.get(outcome, Turn.RECOVER)
    assert wire.after_data(outcome) is AFTER_DATA.get(outcome, Turn.RECOVER)
    for attempt in range(2):
        turn = wire.after_status(outcome, 13, attempt)
        if outcome is Outcome.OK:
            assert turn is Turn.GO_ON
        elif outcome is Outcome.GONE:
            assert turn is Turn.GIVE_UP
        elif outcome is Outcome.STALL and not attempt:
            assert turn is Turn.CLEAR_AND_READ_STATUS_AGAIN
        else:
            assert turn is Turn.RECOVER


def test_one_empty_status_is_read_again_and_no_second_one() -> None:
    assert wire.after_status(Outcome.OK, 0, 0) is Turn.READ_STATUS_AGAIN
    assert wire.after_status(Outcome.OK, 0, 1) is Turn.GO_ON  # and read_csw refuses it
    assert isinstance(wire.read_csw(b"", 7, 0), str)


@pytest.mark.parametrize(
    ("form", "lba", "blocks", "cdb"),
    [
        (6, 0x012345, 256, "080123450000"),
        (10, 0x01020304, 0x0506, "28000102030400050600"),
        (12, 0x01020304, 0x05060708, "a80001020304050607080000"),
        (16, 0x0102030405060708, 0x090A0B0C, "880001020304050607080" + "90a0b0c0000"),
    ],
)
def test_a_read_has_the_layout_of_its_form(form: int, lba: int, blocks: int, cdb: str) -> None:
    assert scsi.fits(form, lba, blocks)
    assert scsi.read_write_cdb(scsi.READ_CODES, form, lba, blocks).hex() == cdb


@pytest.mark.parametrize(
    ("form", "lba", "blocks", "does"),
    [
        (6, (1 << 21) - 1, 1, True),
        (6, (1 << 21) - 1, 2, False),
        (6, 0, 257, False),
        (10, 0xFFFFFFFF, 1, True),
        (10, 0x100000000, 1, False),
        (10, 0, 0x10000, False),
        (12, 0, 0x10000, True),
        (16, 1 << 40, 1 << 20, True),
    ],
)
def test_a_form_is_used_for_what_it_can_name(form: int, lba: int, blocks: int, does: bool) -> None:
    assert scsi.fits(form, lba, blocks) is does


def test_unmap_carries_its_ranges_and_their_lengths() -> None:
    command = scsi.unmap([(0x10, 0x20), (0x30, 0x40)])
    assert command.cdb.hex() == "42000000000000002800"
    assert command.data.hex() == "0026002000000000" + "000000000000001000000020" + "00000000" + (
        "000000000000003000000040" + "00000000"
    )


def fixed(key: int, asc: int = 0, ascq: int = 0) -> bytes:
    return bytes((0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, asc, ascq, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (fixed(6, 0x29), (6, 0x29, 0)),
        (fixed(3, 0x11, 2)[:13], (3, 0x11, 0)),  # cut
        (bytes((0x72, 5, 0x20, 1, 0, 0, 0, 0)), (5, 0x20, 1)),
        (bytes((0x70, 0, 2)), (2, 0, 0)),
        (bytes((0x70, 0, 2, 0, 0, 0, 0, 0)) + bytes((0, 0, 0, 0, 0x3A, 0)), (2, 0, 0)),  # it says that nothing follows
        (bytes(18), None),
        (b"", None),
    ],
)
def test_sense_data_are_read_in_both_formats_and_no_further_than_they_go(data: bytes, found: Any) -> None:
    assert sense.parse_sense(data) == found


@pytest.mark.parametrize(
    ("key", "asc", "ascq", "action", "number"),
    [
        (0, 0, 0, Action.RETRY, errno.EIO),
        (1, 0x17, 1, Action.DONE, errno.EIO),
        (2, 0x04, 1, Action.WAIT, errno.EIO),
        (2, 0x04, 2, Action.START, errno.EIO),
        (2, 0x04, 3, Action.FAIL, errno.EIO),
        (2, 0x3A, 1, Action.EMPTY, errno.ENOMEDIUM),
        (3, 0x11, 0, Action.FAIL, errno.EIO),
        (3, 0x0C, 0, Action.RETRY, errno.EIO),
        (4, 0x44, 0, Action.RETRY, errno.EIO),
        (5, 0x20, 0, Action.UNSUPPORTED, errno.EOPNOTSUPP),
        (5, 0x21, 0, Action.LOOK, errno.EIO),
        (5, 0x24, 0, Action.UNSUPPORTED, errno.EINVAL),
        (5, 0x26, 0, Action.FAIL, errno.EINVAL),
        (6, 0x28, 0, Action.CHANGED, errno.ENOMEDIUM),
        (6, 0x29, 0, Action.RESET, errno.EIO),
        (6, 0x2A, 9, Action.LOOK, errno.EIO),
        (6, 0x7F, 0, Action.RETRY, errno.EIO),
        (7, 0x27, 0, Action.PROTECTED, errno.EROFS),
        (8, 0, 0, Action.FAIL, errno.EIO),
        (0x0B, 0, 0, Action.RETRY, errno.EIO),
        (0x0D, 0, 0, Action.FAIL, errno.ENOSPC),
        (0x0E, 0x1D, 0, Action.FAIL, errno.EIO),
    ],
)
def test_each_sense_has_its_verdict(key: int, asc: int, ascq: int, action: Any, number: int) -> None:
    verdict = sense.decide(sense.Sense(key, asc, ascq))
    assert (verdict.action, verdict.errno) == (action, number)


def test_no_row_of_the_sense_table_is_hidden_by_one_before_it() -> None:
    for index, ((key, asc, ascq), _) in enumerate(sense.TABLE):
        probe_sense = (key, 0x7E if asc is None else asc, 0x7E if ascq is None else ascq)
        first = next(i for i, (row, _) in enumerate(sense.TABLE) if _fits(row, probe_sense))
        assert first == index, f"row {index} is never reached"


def _fits(row: tuple[Any, ...], found: tuple[int, ...]) -> bool:
    return all(want is None or want == have for want, have in zip(row, found, strict=True))


@given(st.binary(max_size=300))
def test_no_answer_of_a_device_breaks_a_parser(data: bytes) -> None:
    sense.parse_sense(data)
    scsi.parse_inquiry(data)
    scsi.parse_capacity_10(data)
    scsi.parse_capacity_16(data)
    scsi.parse_mode(data)
    scsi.parse_supported_pages(data)
    scsi.parse_limits(data)
    scsi.parse_provisioning(data)
    wire.read_csw(data, 1, 512)


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 32) - 1))
def test_a_capacity_is_served_only_if_a_disk_can_have_it(last: int, size: int) -> None:
    capacity = scsi.parse_capacity_16(struct.pack(">QI20x", last, size))
    if probe.size_refusal(capacity):
        assert size not in (512, 1024, 2048, 4096) or (last + 1) * size >= 1 << 63
    else:
        assert size >= 256
        assert (last + 1) * size < 1 << 63


@pytest.mark.parametrize("size", [0, 1, 3, 128, 520, 1 << 17, 1 << 31])
def test_odd_block_sizes_are_refused_with_a_sentence(size: int) -> None:
    assert f"{size} bytes" in probe.size_refusal(scsi.Capacity(1000, size))


def test_the_text_of_an_inquiry_is_cleaned() -> None:
    found = scsi.parse_inquiry(b"\0\x80\x04\x02\x1f\0\0\0Ev\x1b[2J\0 " + b"Disk\nof doom    " + b"1.0\xff")
    assert (found.vendor, found.product, found.revision) == ("Ev [2J", "Disk of doom", "1.0")
    assert found.removable
    assert found.is_present
