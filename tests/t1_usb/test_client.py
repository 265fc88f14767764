"""The URB client against a scripted peer: time-outs, unlinks, the end, lies, many threads."""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import usb.core
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.t1_usb.peer import Answer, echo, scripted, silent
from udf.usb import client, table, usbip
from udf.usb.client import Connection

LIE = b"\xee" * usbip.URB_SIZE


def test_an_in_transfer_fills_the_callers_buffer_and_returns_the_count() -> None:
    with scripted(lambda submit, data: (0, b"abc")) as (connection, _):
        buffer = array.array("B", bytes(8))
        assert connection.transfer(0x81, buffer, timeout=40).actual == 3
        assert buffer.tobytes() == b"abc" + bytes(5)
        assert connection.transfer(0x81, 8, timeout=40).data == b"abc"


def test_a_submit_says_what_the_transfer_is() -> None:
    with scripted(echo) as (connection, peer):
        connection.transfer(0x02, b"12345", interval=4, timeout=40)
        submit = peer.submits.get(timeout=40)
        assert (submit.devid, submit.direction, submit.endpoint, submit.length) == (0x10002, 0, 2, 5)
        assert (submit.interval, submit.packets) == (4, 0)
        connection.control(0xC0, 7, 0x1234, 0x5678, 9, timeout=40)
        submit = peer.submits.get(timeout=40)
        assert (submit.direction, submit.endpoint, submit.length) == (1, 0, 9)
        assert submit.setup == bytes.fromhex("c0 07 34 12 78 56 09 00")
        connection.control(0xC0, 7, timeout=40)
        assert peer.submits.get(timeout=40).direction == 0, "without a data stage nothing comes in"


def test_a_timed_out_transfer_is_unlinked_and_raises() -> None:
    with scripted(silent) as (connection, peer):
        begun = time.monotonic()
        with pytest.raises(usb.core.USBTimeoutError) as caught:
            connection.transfer(0x81, 64, timeout=0.05)
        assert time.monotonic() - begun < 10
        assert (caught.value.errno, caught.value.backend_error_code) == (errno.ETIMEDOUT, -7)
        assert caught.value.strerror == "Operation timed out"
        assert peer.unlinks.get(timeout=40) == peer.submits.get(timeout=40).seqnum
        assert not connection.gone


def test_what_came_before_the_time_was_over_is_returned() -> None:
    with scripted(silent) as (connection, peer):
        peer.partial = b"half"
        assert connection.transfer(0x81, 64, timeout=0.05).data == b"half"


def test_an_unlink_that_nobody_answers_does_not_hold_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "UNLINK_TIMEOUT", 0.05)
    with scripted(silent) as (connection, peer):
        peer.answers_unlinks = False
        buffer = array.array("B", bytes(4))
        with pytest.raises(usb.core.USBTimeoutError):
            connection.transfer(0x81, buffer, timeout=0.05)
        first = peer.submits.get(timeout=40)
        peer.answer(first, 0, b"late")  # must be dropped: the buffer is the caller's again
        peer.handler = echo
        assert connection.transfer(0x81, 4, timeout=40).actual == 4
        assert buffer.tobytes() == bytes(4)
        assert not connection.gone


def test_an_answer_after_its_unlink_was_answered_is_dropped() -> None:
    with scripted(silent) as (connection, peer):
        with pytest.raises(usb.core.USBTimeoutError):
            connection.transfer(0x81, 4, timeout=0.02)
        peer.answer(peer.submits.get(timeout=40), 0, b"late")
        peer.handler = echo
        assert connection.transfer(0x81, 4, timeout=40).actual == 4


def test_a_silent_end_of_a_packet_after_an_unanswered_unlink_ends_the_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client, "UNLINK_TIMEOUT", 0.05)
    with scripted(silent) as (connection, peer):
        peer.answers_unlinks = False
        transfer = connection.submit(0x81, 10)
        peer.say(usbip.RetSubmit(peer.submits.get(timeout=40).seqnum, 0, 10).pack() + b"half")
        with pytest.raises(usb.core.USBTimeoutError):
            transfer.wait(0.05)
        assert connection.gone
    assert "in the middle" in caplog.text


def test_a_cancelled_transfer_says_so() -> None:
    with scripted(silent) as (connection, peer):
        transfer = connection.submit(0x81, 4)
        peer.submits.get(timeout=40)
        transfer.cancel()
        transfer.cancel()
        with pytest.raises(usb.core.USBError, match="cancelled") as caught:
            transfer.wait(40)
        assert caught.value.errno == errno.EIO
        assert peer.unlinks.get(timeout=40)
        assert peer.unlinks.empty()


def test_a_transfer_can_be_cancelled_while_its_thread_reads() -> None:
    with scripted(silent) as (connection, peer), ThreadPoolExecutor() as pool:
        transfer = connection.submit(0x81, 4)
        waiting = pool.submit(transfer.wait, 30)
        peer.submits.get(timeout=40)
        transfer.cancel()
        with pytest.raises(usb.core.USBError, match="cancelled"):
            waiting.result(40)


def test_the_end_wakes_everyone_with_enodev_within_a_second() -> None:
    with scripted(silent) as (connection, peer), ThreadPoolExecutor(8) as pool:
        told = threading.Event()
        connection.on_end(told.set)
        waiting = [pool.submit(connection.transfer, 0x81, 4, timeout=None) for _ in range(8)]
        for _ in range(8):
            peer.submits.get(timeout=40)
        begun = time.monotonic()
        peer.hang_up()
        for each in waiting:
            with pytest.raises(usb.core.USBError) as caught:
                each.result(40)
            assert (caught.value.errno, caught.value.backend_error_code) == (errno.ENODEV, -4)
        assert told.wait(40)
        assert time.monotonic() - begun < 10
        with pytest.raises(usb.core.USBError) as caught:
            connection.transfer(0x81, 4, timeout=40)
        assert caught.value.errno == errno.ENODEV


def test_the_end_is_seen_although_nobody_waits_and_what_came_before_counts() -> None:
    with scripted(lambda submit, data: (0, b"last words")) as (connection, peer):
        told = threading.Event()
        connection.on_end(told.set)
        transfer = connection.submit(0x81, 32)
        peer.submits.get(timeout=40)
        with peer.lock:  # the answer is on its way
            peer.hang_up()
        assert told.wait(40)
        assert connection.gone
        assert transfer.wait(40) == 10
        assert transfer.data == b"last words"
        late = threading.Event()
        connection.on_end(late.set)
        assert late.is_set()


def test_closing_ends_what_waits_and_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    with scripted(silent) as (connection, peer), ThreadPoolExecutor(4) as pool:
        told = threading.Event()
        connection.on_end(told.set)
        waiting = [pool.submit(connection.transfer, 0x81, 4, timeout=None) for _ in range(4)]
        for _ in range(4):
            peer.submits.get(timeout=40)
        connection.close()
        connection.close()
        for each in waiting:
            with pytest.raises(usb.core.USBError) as caught:
                each.result(40)
            assert caught.value.errno == errno.ENODEV
        assert not told.is_set(), "that is for the peer's end"
    assert set(threading.enumerate()) <= before


def test_closing_in_the_end_callback_is_allowed() -> None:
    with scripted(silent) as (connection, peer):
        done = threading.Event()
        connection.on_end(lambda: (connection.close(), done.set()))  # type: ignore[arg-type, func-returns-value]
        peer.hang_up()
        assert done.wait(40)


@pytest.mark.parametrize(
    "lie",
    [
        LIE,
        usbip.RetSubmit(99, 0, 0).pack(),
        usbip.RetSubmit(1, 0, -1).pack(),
        usbip.RetSubmit(1, 0, 65).pack(),
        usbip.RetSubmit(1, 0, 4, packets=3).pack(),
        usbip.pack_ret_unlink(77, 0),
        usbip.pack_unlink(1, 2, 3),
    ],
    ids=["noise", "unknown number", "negative", "too much", "packets", "unlink", "command"],
)
def test_a_peer_that_lies_has_lost_the_device_and_the_log_says_it_once(
    lie: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with scripted(silent) as (connection, peer):
        transfer = connection.submit(0x81, 64)
        peer.say(lie)
        with pytest.raises(usb.core.USBError) as caught:
            transfer.wait(40)
        assert caught.value.errno == errno.ENODEV
        assert connection.gone
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1


@pytest.mark.parametrize(
    ("status", "number", "code"),
    [
        (-errno.EPIPE, errno.EPIPE, -9),
        (-errno.EOVERFLOW, errno.EOVERFLOW, -8),
        (-errno.ENODEV, errno.ENODEV, -4),
        (-errno.ESHUTDOWN, errno.ENODEV, -4),
        *((-e, errno.EIO, -1) for e in (errno.EPROTO, errno.EILSEQ, errno.ETIME, errno.ENOSR, errno.ECOMM)),
        *((-e, errno.EIO, -1) for e in (errno.EXDEV, errno.EIO, errno.ETIMEDOUT)),
        (-12345, errno.EIO, -1),
    ],
)
def test_a_status_becomes_the_error_that_libusb_gives(status: int, number: int, code: int) -> None:
    with scripted(lambda submit, data: (status, b"")) as (connection, _):
        with pytest.raises(usb.core.USBError) as caught:
            connection.transfer(0x81, 4, timeout=40)
        assert (caught.value.errno, caught.value.backend_error_code) == (number, code)
        assert not connection.gone


@pytest.mark.parametrize("status", [-errno.EREMOTEIO, -errno.ENOENT, -errno.ECONNRESET])
def test_a_status_that_libusb_calls_completed_is_a_success(status: int) -> None:
    with scripted(lambda submit, data: (status, b"")) as (connection, _):
        assert connection.transfer(0x81, 4, timeout=40).actual == 0


def test_many_threads_transfer_at_once_and_each_gets_its_own() -> None:
    def serve(submit: usbip.Submit, data: bytes) -> Answer:
        if submit.direction == usbip.DIRECTION_OUT:
            return 0, submit.length
        return 0, bytes([submit.endpoint]) * submit.length

    def work(number: int) -> None:
        for length in range(1, 3000, 97):
            assert connection.transfer(0x80 | number, length, timeout=40).data == bytes([number]) * length
            assert connection.transfer(number, bytes(length), timeout=40).actual == length

    with scripted(serve) as (connection, _), ThreadPoolExecutor(10) as pool:
        for each in [pool.submit(work, number) for number in range(1, 11)]:
            each.result(60)


def test_time_outs_of_some_threads_do_not_disturb_the_others() -> None:
    def serve(submit: usbip.Submit, data: bytes) -> Answer | None:
        return None if submit.endpoint == 1 else (0, bytes(submit.length))

    def wait_in_vain() -> None:
        for _ in range(10):
            with pytest.raises(usb.core.USBTimeoutError):
                connection.transfer(0x81, 8, timeout=0.01)

    def read() -> None:
        for _ in range(300):
            assert connection.transfer(0x82, 512, timeout=40).actual == 512

    with scripted(serve) as (connection, _), ThreadPoolExecutor(8) as pool:
        for each in [pool.submit(work) for work in (wait_in_vain, read) * 4]:
            each.result(60)


def test_transfers_queued_ahead_are_answered_in_order_by_one_wait_each() -> None:
    with scripted(echo) as (connection, _):
        queued = [connection.submit(0x81, 1000 + n) for n in range(50)]
        assert [each.wait(10) for each in queued] == [1000 + n for n in range(50)]


def test_a_large_write_goes_through_although_nobody_has_taken_the_answers() -> None:
    # The peer blocks in sending what nobody reads, and so reads nothing: the sender must take the answers itself.
    with scripted(echo) as (connection, _):
        reads = [connection.submit(0x81, 1 << 20) for _ in range(8)]
        assert connection.transfer(0x02, bytes(4 << 20), timeout=40).actual == 4 << 20
        assert [each.wait(10) for each in reads] == [1 << 20] * 8


def test_a_peer_that_takes_no_data_has_lost_the_device(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client, "STALL_TIMEOUT", 0.1)
    block = threading.Event()

    def stuck(submit: usbip.Submit, data: bytes) -> None:
        block.wait(30)

    with scripted(stuck) as (connection, peer), ThreadPoolExecutor() as pool:
        other = pool.submit(connection.transfer, 0x81, 4, timeout=None)
        peer.submits.get(timeout=40)
        with pytest.raises(usb.core.USBError) as caught:
            connection.transfer(0x02, bytes(8 << 20), timeout=1)
        assert caught.value.errno == errno.ENODEV
        with pytest.raises(usb.core.USBError):
            other.result(40)
        block.set()
    assert "takes no data" in caplog.text


def test_too_much_is_refused_before_anything_is_sent() -> None:
    with scripted(echo) as (connection, peer):
        for bad in (lambda: connection.submit(0x81, usbip.MAX_TRANSFER + 1),):
            with pytest.raises(usb.core.USBError) as caught:
                bad()
            assert caught.value.errno == errno.ENOMEM
        with pytest.raises(usb.core.USBError) as caught:
            connection.control(0x40, 1, 0x12345, timeout=1)
        assert caught.value.errno == errno.EINVAL
        assert peer.submits.empty()


def test_the_number_of_transfers_under_way_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "MAX_PENDING", 3)
    with scripted(silent) as (connection, _):
        for _ in range(3):
            connection.submit(0x81, 1)
        with pytest.raises(usb.core.USBError) as caught:
            connection.submit(0x81, 1)
        assert caught.value.errno == errno.ENOMEM


HEADERS = st.builds(
    usbip.RET_SUBMIT.pack,
    st.sampled_from([0, 1, 2, 3, 3, 3, 4, 99]),
    st.integers(0, 4),
    *[st.integers(0, 2)] * 3,
    st.sampled_from([0, -32, -104, -(2**31)]),
    st.sampled_from([0, 1, 7, 8, 9, -1, 2**31 - 1]),
    st.integers(0, 2),
    st.sampled_from([0, 0, -1, 2, 3]),
    st.integers(0, 2),
)


@settings(max_examples=150)
@given(st.lists(st.one_of(HEADERS, st.binary(max_size=60)), max_size=5), st.booleans())
def test_whatever_a_peer_says_nothing_hangs_and_only_usb_errors_come(noise: list[bytes], alone: bool) -> None:
    ours, theirs = socket.socketpair()
    logging.disable(logging.WARNING)  # what it is told about each lie is another test's
    try:
        with theirs, Connection(ours) as connection:
            transfers = [] if alone else [connection.submit(0x81, 8), connection.submit(0x81, 8, packets=[4, 4])]
            theirs.sendall(b"".join(noise))
            theirs.shutdown(socket.SHUT_WR)
            for wait in [partial(connection.move, 0x81, bytearray(8), 2000), *(t.wait for t in transfers)]:
                with contextlib.suppress(usb.core.USBError):
                    assert 0 <= wait() <= 8
    finally:
        logging.disable(logging.NOTSET)


def test_isochronous_packets_are_put_where_they_belong() -> None:
    def serve(submit: usbip.Submit, data: bytes) -> None:
        assert submit.packets == 3
        layout = list(usbip.ISO_PACKET.iter_unpack(data[-48:]))
        assert [each[:2] for each in layout] == [(0, 4), (4, 4), (8, 2)]
        actual = [(2, 0), (0, -errno.EXDEV), (2, 0)]
        body = b"aabb" if submit.direction == usbip.DIRECTION_IN else b""
        packets = b"".join(usbip.ISO_PACKET.pack(0, 0, *each) for each in actual)
        peer.say(usbip.RetSubmit(submit.seqnum, 0, 4, packets=3).pack() + body + packets)

    with scripted(serve) as (connection, peer):
        buffer = bytearray(10)
        transfer = connection.transfer(0x81, buffer, packets=[4, 4, 2], timeout=40)
        assert transfer.packets == [(2, 0), (0, -errno.EXDEV), (2, 0)]
        assert (bytes(buffer[:2]), bytes(buffer[8:])) == (b"aa", b"bb")
        assert connection.transfer(0x01, b"aaaabbbbcc", packets=[4, 4, 2], timeout=40).actual == 4


def test_isochronous_packets_that_do_not_add_up_end_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    def serve(submit: usbip.Submit, data: bytes) -> None:
        packets = usbip.ISO_PACKET.pack(0, 0, 3, 0) * 2
        peer.say(usbip.RetSubmit(submit.seqnum, 0, 4, packets=2).pack() + b"aabb" + packets)

    with scripted(serve) as (connection, peer):
        with pytest.raises(usb.core.USBError):
            connection.transfer(0x81, 8, packets=[4, 4], timeout=40)
        assert connection.gone
    assert "do not add up" in caplog.text
