"""A driver that points at what was read, in memory that it shares with the shim; and one that points elsewhere."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from tests.t3_shim.raw_driver import Answer, Packets, Request
from tests.t3_shim.supervising import Mount, can_mount, mounted
from udf.driver.window import PIECE
from udf.fuse import structs
from udf.fuse.opcodes import Opcode
from udf.window import HEAD, IN_WINDOW, MAX_READ, MAX_SPANS, SPAN, create_window

pytestmark = can_mount

SIZE = 4 * MAX_READ
DATA = bytes(range(256)) * (SIZE // 256)


def points(request: Request, *spans: tuple[int, int], error: int = IN_WINDOW) -> Answer:
    """An answer that says where it is."""
    body = b"".join(SPAN.pack(*span) for span in spans)
    return Packets([structs.OUT_HEADER.pack(structs.OUT_HEADER.size + len(body), error, request.unique) + body])


def wanted(request: Request) -> tuple[int, int]:
    """Offset and size of a READ."""
    fields = dict(zip(structs.READ_IN.fields, structs.READ_IN.unpack_from(request.body), strict=True))
    return fields["offset"], fields["size"]


def serve(mount: Mount, pieces: int = 1) -> None:
    """Answer every READ out of the window, in so many pieces that do not lie in order."""

    def read(request: Request) -> Answer:
        window = mount.window
        assert window is not None
        offset, size = wanted(request)
        data = DATA[offset : offset + size]
        if not data:
            return b""
        buffer = window.take()
        assert buffer is not None, "the shim keeps what it has dealt with"
        length = -(-len(data) // pieces)
        parts = [data[at : at + length] for at in range(0, len(data), length)]
        spans = []
        at = 0
        for part in reversed(parts):
            buffer[at : at + len(part)] = part
            span = window.span(buffer[at : at + len(part)])
            assert span is not None
            spans.append(span)
            at += len(part)
        window.answered()
        window.give_back(buffer)
        return points(request, *reversed(spans))

    mount.driver.answers[Opcode.READ] = read


def grow(driver) -> None:
    driver.tree.file("file", DATA)


@pytest.fixture
def mount():
    with mounted(grow, window=True) as mount:
        serve(mount)
        yield mount


def read_all(mount: Mount) -> bytes:
    fd = mount.do("open", "file", os.O_RDONLY)
    try:
        parts = []
        while part := mount.usual.do("pread", fd, 128 * 1024, sum(map(len, parts))):
            parts.append(part)
        mount.usual.do("posix_fadvise", fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return b"".join(parts)
    finally:
        mount.usual.do("close", fd)


@pytest.mark.parametrize("pieces", [1, 2, MAX_SPANS])
def test_what_a_driver_points_at_is_what_programs_read(mount, pieces):
    serve(mount, pieces)
    assert read_all(mount) == DATA
    assert not mount.faults()


def test_the_kernel_reads_more_at_once_through_a_window(mount):
    assert read_all(mount) == DATA
    sizes = [wanted(request)[1] for request in mount.driver.log if request.op == Opcode.READ]
    assert max(sizes) == MAX_READ


def test_without_a_window_it_asks_for_no_more_than_a_message_carries():
    with mounted(grow) as mount:
        assert read_all(mount) == DATA
        sizes = [wanted(request)[1] for request in mount.driver.log if request.op == Opcode.READ]
        assert max(sizes) == 128 * 1024


def test_a_direct_read_has_its_bytes_from_the_window_too(mount):
    assert mount.do("direct_read", "file", MAX_READ, MAX_READ) == DATA[MAX_READ : 2 * MAX_READ]


def test_the_shim_counts_every_answer_whatever_becomes_of_it(mount):
    """`serve` asserts that there is room: four pieces for many reads."""
    for _ in range(10):
        assert read_all(mount) == DATA


@pytest.mark.parametrize(
    "spans",
    [
        [],
        [(0, 100)],
        [(HEAD - 1, 100)],
        [(HEAD, 0)],
        [(1 << 31, 100)],
        [(HEAD + 4 * PIECE + 2 * MAX_READ - 1, 2)],
        [(0xFFFFFFFF, 0xFFFFFFFF)],
        [(HEAD, 1)] * (MAX_SPANS + 1),
        [(HEAD, PIECE)],
    ],
)
def test_what_points_outside_or_is_too_long_is_an_error_and_a_fault(mount, spans):
    mount.driver.answers[Opcode.READ] = lambda request: points(request, *spans)
    assert mount.fails("slurp", "file") == errno.EIO
    assert mount.faults()
    serve(mount)
    assert read_all(mount) == DATA


def test_spans_that_are_cut_off_are_an_error(mount):
    whole = structs.OUT_HEADER.size + SPAN.size - 1
    mount.driver.answers[Opcode.READ] = lambda request: Packets(
        [structs.OUT_HEADER.pack(whole, IN_WINDOW, request.unique) + bytes(SPAN.size - 1)]
    )
    assert mount.fails("slurp", "file") == errno.EIO


@pytest.mark.parametrize(("op", "call"), [(Opcode.LOOKUP, "stat"), (Opcode.MKDIR, "mkdir"), (Opcode.STATFS, "statfs")])
def test_only_a_read_has_an_answer_in_the_window(mount, op, call):
    mount.driver.answers[op] = lambda request: points(request, (HEAD, 128))
    assert mount.fails(call, "other" if op != Opcode.STATFS else "") == errno.EIO
    assert mount.faults()


def test_a_driver_without_a_window_cannot_point():
    with mounted(grow) as mount:
        mount.driver.answers[Opcode.READ] = lambda request: points(request, (HEAD, 100))
        assert mount.fails("slurp", "file") == errno.EIO
        assert mount.faults()


def test_an_answer_to_nothing_and_a_second_one_are_faults_and_no_more(mount):
    mount.driver.send(*points(Request(0, 999_998, 0, 0, 0, 0, b"", b""), (HEAD, 10)).packets)
    assert ("opcode 0", "a reply to a request that was not made, or a second reply to one") in mount.faults()
    assert read_all(mount) == DATA


def test_the_next_generation_has_a_window_of_its_own(mount):
    assert read_all(mount) == DATA
    mount.lose_driver()
    mount.next_driver()
    serve(mount)
    assert read_all(mount) == DATA
    assert not mount.faults()


def test_a_generation_whose_window_is_none_can_still_send(mount):
    mount.lose_driver()
    mount.close_window()
    mount.next_driver()
    assert read_all(mount) == DATA


@pytest.mark.parametrize("kind", ["file", "unsealed", "small"])
def test_what_could_be_cut_off_under_the_shim_is_not_mapped(kind, tmp_path):
    """It would be its death by SIGBUS."""
    if kind == "file":
        path = tmp_path / "file"
        path.write_bytes(bytes(PIECE))
        fd = os.open(path, os.O_RDWR)
    elif kind == "unsealed":
        fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, HEAD + 4 * PIECE)
    else:
        fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    try:
        with mounted(grow, window=True) as mount:
            mount.lose_driver()
            mount.close_window()
            mount.generation += 1
            real = mount.shim.send
            mount.shim.send = lambda message, *fds: real(message, *fds, fd)  # type: ignore[method-assign]
            mount.send_attach(lambda driver: None)
            mount.shim.send = real  # type: ignore[method-assign]
            refused = mount.shim.wait_for("refused", generation=mount.generation)
            assert "window cannot be mapped" in refused["error"]
            mount.next_driver()
            assert read_all(mount) == DATA
    finally:
        os.close(fd)


def test_the_side_that_wants_to_cut_a_window_off_cannot():
    fd = create_window("test", PIECE)
    try:
        for size in (0, 100 * PIECE):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with mmap.mmap(fd, 0) as memory:
            assert memory[HEAD] == 0
    finally:
        os.close(fd)


def test_it_reads_ahead_what_it_is_told(mount):
    device = os.stat(mount.root).st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    if not os.access(setting, os.W_OK):
        pytest.skip("/sys cannot be written to")
    assert int(setting.read_text()) == MAX_READ // 1024
