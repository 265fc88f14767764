"""The notifications and ioctls of udf.fuse.device, taken by the running kernel: accepted, and with effect."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from rawserver import DATA, FILE, RawServer, can_mount, finish, parse, run, serving, start, until

from udf.fuse import device, structs
from udf.fuse.flags import UNIQUE_RESEND, Fopen, Init
from udf.fuse.opcodes import Notify, Opcode

pytestmark = can_mount


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RawServer]:
    with serving(tmp_path, Init.AUTO_INVAL_DATA) as server:
        server.open_flags = Fopen.KEEP_CACHE
        yield server


def notify(server: RawServer, message: bytes, since: int) -> None:
    """Send a notification that kernels have since 7.`since`."""
    server.ready()
    try:
        server.notify(message)
    except OSError as error:
        if error.errno != errno.EINVAL or server.minor >= since:
            raise
        pytest.skip(f"this kernel speaks 7.{server.minor}, the notification came with 7.{since}")


def asked_again(server: RawServer, program: str) -> list[Opcode]:
    server.clear()
    run(server, program)
    quiet = (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.RELEASE, Opcode.FLUSH)
    # What was in the root changed, so its attributes are asked for too.
    about_root = [request for request in server.requests if (request.opcode, request.nodeid) == (Opcode.GETATTR, 1)]
    return [Opcode(r.opcode) for r in server.requests if r.opcode not in quiet and r not in about_root]


def test_inval_inode_makes_attributes_unknown(server: RawServer) -> None:
    run(server, "os.stat('file')")
    assert asked_again(server, "os.stat('file')") == []
    notify(server, device.notify_inval_inode(FILE, -1), since=12)
    assert asked_again(server, "os.stat('file')") == [Opcode.GETATTR]


def test_inval_inode_drops_data(server: RawServer) -> None:
    read = "print(os.pread(os.open('file', os.O_RDONLY), 5, 4096).decode())"
    run(server, read)
    assert asked_again(server, read) == [Opcode.OPEN]
    notify(server, device.notify_inval_inode(FILE, 0, 0), since=12)
    assert Opcode.READ in asked_again(server, read)


@pytest.mark.parametrize("expire_only", [False, True])
def test_inval_entry_has_the_name_looked_up_again(server: RawServer, expire_only: bool) -> None:
    run(server, "os.stat('file')")
    since = 38 if expire_only else 12
    notify(server, device.notify_inval_entry(1, b"file", expire_only=expire_only), since=since)
    if not expire_only:
        until(lambda: FILE in server.forgotten())  # the name is gone, and the node with it
    run(server, "os.stat('file')")
    assert len(server.of(Opcode.LOOKUP)) == 2
    assert (FILE in server.forgotten()) is not expire_only


def test_inval_entry_of_an_unknown_name_is_enoent(server: RawServer) -> None:
    server.ready()
    with pytest.raises(FileNotFoundError):
        server.notify(device.notify_inval_entry(1, b"never seen"))


def test_delete_removes_the_name_of_that_node_only(server: RawServer) -> None:
    run(server, "os.stat('file')")
    with pytest.raises(FileNotFoundError):
        server.notify(device.notify_delete(1, FILE + 40, b"file"))
    run(server, "os.stat('file')")
    notify(server, device.notify_delete(1, FILE, b"file"), since=18)
    assert asked_again(server, "os.stat('file')") == [Opcode.LOOKUP]


def test_store_puts_data_where_reads_find_it(server: RawServer) -> None:
    run(server, "os.stat('file')")
    notify(server, device.notify_store(FILE, 0, b"stored".ljust(4096, b"!")), since=15)
    server.clear()
    shown = run(server, "print(os.pread(os.open('file', os.O_RDONLY), 8, 0).decode())")
    assert shown.strip() == "stored!!"
    assert not server.of(Opcode.READ)


def test_store_by_its_head_and_a_view_of_the_data(server: RawServer) -> None:
    run(server, "os.stat('file')")
    view = memoryview(DATA)[5 : 5 + 4096]
    length = os.writev(server.fd, [device.notify_store_head(FILE, 4096, len(view)), view])
    assert length == len(device.notify_store(FILE, 4096, view))
    shown = run(server, "print(os.pread(os.open('file', os.O_RDONLY), 5, 4096).decode())")
    assert shown.strip() == "56789"


def test_retrieve_returns_the_cached_data(server: RawServer) -> None:
    run(server, "os.stat('file')")
    notify(server, device.notify_store(FILE, 0, DATA[:8192]), since=15)
    notify(server, device.notify_retrieve(77, FILE, 100, 5000), since=15)
    (reply,) = server.wait(Opcode.NOTIFY_REPLY)
    values, data = reply.split(structs.NOTIFY_RETRIEVE_IN)
    assert (reply.unique, reply.nodeid) == (77, FILE)
    assert values == {"offset": 100, "size": 5000}
    assert data == DATA[100:5100]


def test_resend_delivers_unanswered_requests_again_and_marked(tmp_path: Path) -> None:
    with serving(tmp_path, Init.HAS_RESEND) as server:
        server.ready()
        if not server.offered & Init.HAS_RESEND:
            pytest.skip(f"this kernel (7.{server.minor}) does not offer HAS_RESEND")
        server.open_flags = Fopen.DIRECT_IO
        server.handlers[Opcode.READ] = lambda request: DATA[:4] if request.unique & UNIQUE_RESEND else None
        program = start(server, "print(os.read(os.open('file', os.O_RDONLY), 4).decode())")
        server.wait(Opcode.READ)
        server.notify(device.notify_resend())
        assert finish(server, program).strip() == "0123"
        first, second = server.of(Opcode.READ)
        assert second.unique == first.unique | UNIQUE_RESEND
        assert second.body == first.body


def test_inc_epoch_expires_names_and_keeps_attributes(server: RawServer) -> None:
    run(server, "os.stat('file')")
    notify(server, device.notify_inc_epoch(), since=44)
    assert asked_again(server, "os.stat('file')") == [Opcode.LOOKUP]
    assert asked_again(server, "os.stat('file')") == []


def test_prune_makes_the_kernel_forget_unused_nodes(server: RawServer) -> None:
    run(server, "for name in range(1, 4): os.stat(f'file{name}')")
    notify(server, device.notify_prune([101, 103]), since=45)
    until(lambda: len(server.forgotten()) >= 2)
    assert server.forgotten() == {101: 1, 103: 1}


def test_an_unknown_notification_is_einval(server: RawServer) -> None:
    server.ready()
    with pytest.raises(OSError) as caught:
        server.notify(structs.OUT_HEADER.pack(structs.OUT_HEADER.size, max(Notify) + 50, 0))
    assert caught.value.errno == errno.EINVAL


def test_a_backing_file_is_read_without_the_server(tmp_path: Path) -> None:
    with serving(tmp_path, Init.PASSTHROUGH) as server:
        server.ready()
        if not server.offered & Init.PASSTHROUGH:
            pytest.skip(f"this kernel (7.{server.minor}) does not offer PASSTHROUGH")
        (tmp_path / "backing").write_bytes(b"from the backing file")
        backing = os.open(tmp_path / "backing", os.O_RDONLY)
        try:
            server.backing_id = device.backing_open(server.fd, backing)
        finally:
            os.close(backing)
        assert server.backing_id >= 1
        server.open_flags = Fopen.PASSTHROUGH
        shown = run(server, "print(os.pread(os.open('file', os.O_RDONLY), 12, 9).decode())")
        assert shown.strip() == "backing file"
        assert not server.of(Opcode.READ)
        server.wait(Opcode.RELEASE)
        device.backing_close(server.fd, server.backing_id)
        with pytest.raises(FileNotFoundError):
            device.backing_close(server.fd, server.backing_id)


def test_backing_files_need_the_negotiated_flag(server: RawServer) -> None:
    server.ready()
    if server.minor < 40:
        pytest.skip(f"this kernel (7.{server.minor}) has no passthrough")
    with pytest.raises(PermissionError), open("/dev/null", "rb") as file:
        device.backing_open(server.fd, file.fileno())


def test_a_clone_reads_and_answers_requests_of_its_connection(server: RawServer) -> None:
    run(server, "pass")  # the root's attributes are known now
    copy = device.clone(server.fd)
    try:
        with server.gate:  # only the clone reads
            program = start(server, "os.stat('file')")
            request = parse(os.read(copy, 1 << 18))
        assert request.opcode == Opcode.LOOKUP
        server.answer(request, server.handlers[Opcode.LOOKUP](request) or b"", fd=copy)
        finish(server, program)
    finally:
        os.close(copy)


def test_clone_refuses_what_is_no_connection() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError):
        device.clone(0)
    assert os.listdir("/proc/self/fd") == before


def test_the_device_is_closed_on_exec_and_waits_only_if_asked_to() -> None:
    for nonblocking in (False, True):
        fd = device.open_device(nonblocking=nonblocking)
        try:
            assert os.get_blocking(fd) is not nonblocking
            assert not os.get_inheritable(fd)
        finally:
            os.close(fd)


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOENT, FileNotFoundError, "modprobe fuse"),
        (errno.ENODEV, OSError, "modprobe fuse"),
        (errno.EACCES, PermissionError, "readable and writable"),
        (errno.EPERM, PermissionError, "container"),
        (errno.EMFILE, OSError, "Too many open files"),
    ],
)
def test_a_device_that_cannot_be_opened_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, number: int, kind: type[OSError], words: str
) -> None:
    def refuse(path: str, flags: int) -> int:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(kind) as caught:
        device.open_device()
    assert caught.value.errno == number
    assert words in str(caught.value)
