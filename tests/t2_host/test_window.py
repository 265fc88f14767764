"""A window as a driver has it: large reads that libfuse never sees, and memory that is not given away too early."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.t2_host.drivers.window import SIZE, content
from tests.t2_host.peer import TIMEOUT, Host, Link, Refused, named
from udf.driver.window import PIECE, Window
from udf.fuse import structs
from udf.fuse.opcodes import Opcode
from udf.window import HEAD, IN_WINDOW, MAX_READ, SPAN, Mapped, create_window


@pytest.fixture
def descriptor() -> Iterator[int]:
    fd = create_window("test", 2 * PIECE)
    yield fd
    os.close(fd)


class Shim:
    """The other side of the window."""

    def __init__(self, link: Link, fd: int) -> None:
        self.link = link
        self._mapped = Mapped(fd)
        self._count = self._mapped.view[:8].cast("Q")

    def ask(self, offset: int, size: int) -> int:
        return self.link.send(Opcode.READ, 2, named(structs.READ_IN, fh=2, offset=offset, size=size))

    def answer(self, *, dealt_with: bool = True) -> tuple[int, bytes, bool]:
        """The next answer: to what, its bytes, and whether they were pointed at."""
        packet = self.link.sock.recv(2 * MAX_READ)
        _, error, unique = structs.OUT_HEADER.unpack_from(packet)
        body = packet[structs.OUT_HEADER.size :]
        if error == IN_WINDOW:
            data = b"".join(bytes(self._mapped.piece(*span)) for span in SPAN.iter_unpack(body))
            if dealt_with:
                self._count[0] += 1
            return unique, data, True
        if error:
            raise Refused(-error)
        return unique, body, False

    def deal_with(self, count: int) -> None:
        self._count[0] += count


@pytest.fixture
def start(host: Host, drivers: Path, descriptor: int):
    def start(class_name: str) -> Shim:
        host.link.sock.settimeout(TIMEOUT)
        host.start(drivers / "window.py", class_name, store=(descriptor,), window=2 * PIECE)
        host.ready()
        host.link.init()
        assert host.link.lookup("file")["nodeid"] == 2
        return Shim(host.link, descriptor)

    return start


@pytest.mark.parametrize("class_name", ["Reads", "Points"])
def test_what_no_message_carries_is_pointed_at(start, class_name: str) -> None:
    shim = start(class_name)
    for offset in (100, MAX_READ + 7, SIZE - 1000, 100):
        unique = shim.ask(offset, MAX_READ)
        assert shim.answer() == (unique, content(offset, MAX_READ), offset < SIZE - 1000)


def test_what_a_message_carries_is_libfuses_unless_the_driver_has_it(start) -> None:
    shim = start("Reads")
    unique = shim.ask(0, 128 * 1024)
    assert shim.answer() == (unique, content(0, 128 * 1024), False)


@pytest.mark.parametrize(("offset", "error"), [(1, "No such device"), (2, "Input/output"), (3, "Input/output")])
def test_a_large_read_that_fails_is_the_error_that_it_would_be_anyway(start, offset: int, error: str) -> None:
    shim = start("Reads")
    shim.ask(offset, MAX_READ)
    with pytest.raises(Refused, match=error):
        shim.answer()
    unique = shim.ask(0, MAX_READ)
    assert shim.answer() == (unique, content(0, MAX_READ), True)


def test_nothing_is_written_again_until_the_shim_has_dealt_with_it(start) -> None:
    """Two stages: the third answer waits for the shim."""
    shim = start("Reads")
    asked = {shim.ask(number * MAX_READ, MAX_READ): number for number in range(4)}
    answers = [shim.answer(dealt_with=False) for _ in range(2)]
    shim.link.sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        shim.answer()
    shim.link.sock.settimeout(TIMEOUT)
    shim.deal_with(2)
    answers += [shim.answer() for _ in range(2)]
    assert {unique for unique, _, _ in answers} == set(asked)
    for unique, data, _ in answers:  # in any order
        assert data == content(asked[unique] * MAX_READ, MAX_READ)


def test_a_host_that_waits_for_the_shim_ends_with_the_link(start, host: Host) -> None:
    shim = start("Reads")
    for number in range(4):
        shim.ask(number * MAX_READ, MAX_READ)
    shim.answer(dealt_with=False)
    host.link.sock.close()
    host.wait()


# ---- the memory


def test_pieces_come_back_in_turn_and_not_before_their_answers_are_dealt_with() -> None:
    window = Window(create_window("test", 2 * PIECE))
    try:
        mapped = Mapped(window.fd)
        first, second = window.take(), window.take()
        assert first is not None
        assert second is not None
        assert window.take() is None
        assert window.span(first) == (HEAD, PIECE)
        assert window.span(second[5:9]) == (HEAD + PIECE + 5, 4)
        assert window.span(memoryview(bytearray(10))) is None
        assert window.span(memoryview(b"abc")) is None
        window.answered()
        window.give_back(first)
        assert window.take() is None
        mapped.view[:8] = struct.pack("=Q", 1)
        assert window.take() is not None
    finally:
        window.close()
