"""The link: whole messages out of whatever packets a driver sends, and a queue for one that is slow to read."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.t3_shim.tree import whole
from udf.fuse import structs
from udf.fuse.opcodes import Opcode
from udf.shim.link import BUFFER_SIZE, QUEUE_LIMIT, Link, LinkClosed

KNOWN = frozenset((2, 4, 6))


@contextlib.contextmanager
def some_link(size: int = 1 << 20) -> Iterator[tuple[Link, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
    theirs.settimeout(5)
    link = Link(ours.detach())
    with theirs:
        try:
            yield link, theirs
        finally:
            link.close()


def received(link: Link, known: frozenset[int] = KNOWN) -> bytes | None:
    size = link.receive(known)
    return bytes(link.view[:size]) if size > 0 else None


def send_often(link: Link, message: bytes, count: int) -> None:
    for _ in range(count):
        link.send(message)


def test_nothing_is_there():
    with some_link() as (link, _):
        assert link.receive(KNOWN) == 0


def test_a_whole_reply_is_taken_as_it_is():
    with some_link() as (link, driver):
        driver.send(whole(2, b"data"))
        assert received(link) == whole(2, b"data")


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=9), st.randoms())
@settings(max_examples=40, deadline=None)
def test_a_reply_in_any_number_of_packets_is_put_together(cuts, random):
    message = whole(2, random.randbytes(sum(cuts)))
    with some_link() as (link, driver):
        driver.send(message[:16])
        at, got = 16, received(link)
        for cut in cuts:
            assert got is None
            assert link.incomplete
            driver.send(message[at : at + cut])
            at += cut
            got = received(link)
        assert got == message
        assert not link.incomplete


def test_a_whole_reply_in_between_is_not_data():
    with some_link() as (link, driver):
        driver.send(whole(2, b"x" * 100)[:50])
        assert received(link) is None
        driver.send(whole(4, b"ok"))
        assert received(link) == whole(4, b"ok")
        assert link.incomplete
        assert link.take_broken() == 2
        assert not link.incomplete


def test_a_notification_in_between_is_not_data():
    message = whole(2, b"x" * 100)
    with some_link() as (link, driver):
        driver.send(message[:50])
        assert received(link) is None
        driver.send(whole(0, b"n" * 24, error=2))
        assert received(link) == whole(0, b"n" * 24, error=2)
        driver.send(message[50:])
        assert received(link) == message


def test_two_replies_in_pieces_at_once_are_never_mixed():
    """The pieces of one were taken for the data of the other: a program read another file's bytes."""
    one, two = whole(2, b"1" * 100), whole(4, b"2" * 60)
    with some_link() as (link, driver):
        driver.send(one[:20])
        assert received(link) is None
        driver.send(two[:24])
        assert received(link) == two[:24], "it goes to the caller, who sees that it is cut"
        assert link.take_broken() == 2


def test_more_than_was_announced_is_not_put_together():
    with some_link() as (link, driver):
        driver.send(whole(2, b"x" * 100)[:50])
        assert received(link) is None
        driver.send(b"\xff" * 67)
        assert received(link) == b"\xff" * 67
        assert link.take_broken() == 2


@pytest.mark.parametrize("length", [0, 15, 16, 3, BUFFER_SIZE, BUFFER_SIZE + 1, 2**32 - 1])
def test_an_impossible_length_waits_for_nothing(length):
    with some_link() as (link, driver):
        packet = length.to_bytes(4, "little") + whole(2)[4:]
        driver.send(packet)
        assert received(link) == packet
        assert not link.incomplete


def test_a_packet_that_is_too_long_is_cut_and_does_not_look_whole():
    with some_link() as (link, driver):
        message = whole(2, bytes(BUFFER_SIZE + 5))
        driver.send(message)
        size = link.receive(KNOWN)
        assert size == BUFFER_SIZE
        assert int.from_bytes(link.view[:4], "little") != size


def test_an_empty_packet_is_not_the_end():
    """It was taken for the end of file, and the mount was lost."""
    with some_link() as (link, driver):
        driver.send(b"")
        assert link.receive(KNOWN) < 0
        driver.send(whole(2))
        assert received(link) == whole(2)


def test_the_end_is_the_end_after_what_was_sent_before():
    with some_link() as (link, driver):
        driver.send(whole(2))
        driver.close()
        assert received(link) == whole(2)
        with pytest.raises(LinkClosed):
            link.receive(KNOWN)


def test_what_does_not_fit_waits_and_keeps_its_order():
    wanted: list[bool] = []
    with some_link(64 * 1024) as (link, driver):
        link.wants_writable = wanted.append
        messages = [bytes([number]) * 20_000 for number in range(20)]
        for message in messages:
            link.send(message)
        assert wanted == [True]
        got = []
        while len(got) < len(messages):
            got.append(driver.recv(1 << 20))
            link.flush()
        assert got == messages
        assert wanted[:2] == [True, False]


def test_a_queue_has_an_end():
    with some_link(64 * 1024) as (link, _):
        message = bytes(48 * 1024)
        for _ in range(QUEUE_LIMIT // len(message) - 10):
            link.send(message)
        with pytest.raises(LinkClosed):
            send_often(link, message, 30)


def test_a_closed_link_swallows_what_is_sent():
    with some_link() as (link, driver):
        driver.close()
        link.send(b"x" * 100)
        link.send_forgets([(5, 1), (6, 2)])


@given(st.lists(st.tuples(st.integers(2, 2**64 - 1), st.integers(1, 2**32)), max_size=9000))
@settings(max_examples=10, deadline=None)
def test_forgets_arrive_as_they_were(forgets):
    expected, got = list(forgets), []
    with some_link() as (link, driver):
        link.send_forgets(forgets)
        assert not forgets
        while len(got) < len(expected):
            message = driver.recv(1 << 20)
            length, op, unique, node, *_ = structs.IN_HEADER.unpack_from(message)
            assert length == len(message) <= 128 * 1024
            assert unique == 0
            if op == Opcode.FORGET:
                got.append((node, structs.FORGET_IN.unpack_from(message, 40)[0]))
            else:
                assert op == Opcode.BATCH_FORGET
                (count,) = structs.BATCH_FORGET_IN.unpack_from(message, 40)
                got += [structs.FORGET_ONE.unpack_from(message, 48 + 16 * at) for at in range(count)]
    assert sorted(got) == sorted(expected)


@given(st.lists(st.binary(min_size=1, max_size=400) | st.binary(max_size=60).map(lambda b: whole(2, b)), max_size=20))
@settings(max_examples=60, deadline=None)
def test_any_packets_end_in_messages_or_one_beginning(packets):
    with some_link() as (link, driver):
        for packet in packets:
            driver.send(packet)
            size = link.receive(KNOWN)
            assert size <= BUFFER_SIZE
            if size and link.incomplete and size >= 16 and int.from_bytes(link.view[8:16], "little"):
                link.take_broken()
        driver.send(whole(6, b"still"))
        link.take_broken()
        assert received(link) == whole(6, b"still")
