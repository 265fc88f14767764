"""Whatever a handler does, its caller gets an errno, the supervisor hears of it once, and the rest goes on."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.t2_host.peer import Host, Refused, structs
from udf import messages
from udf.fuse.opcodes import Opcode


def serve(host: Host, path: Path, class_name: str) -> None:
    host.start(path, class_name)
    host.ready()
    host.link.init()


def faults(host: Host) -> list[messages.HostFault]:
    """Those that were reported: each is sent before the reply to its request."""
    host.drain()
    return [message for message in host.messages if isinstance(message, messages.HostFault)]


@pytest.mark.parametrize(
    ("name", "number", "is_fault"),
    [
        ("notfound", errno.ENOENT, False),
        ("permission", errno.EACCES, False),
        ("oserror28", errno.ENOSPC, False),
        ("oserrorodd", errno.EIO, False),
        ("fuse13", errno.EACCES, False),
        ("fuseodd", errno.EIO, True),
        ("gone", errno.ENODEV, False),
        ("value", errno.EIO, True),
        ("zero", errno.EIO, True),
        ("odd", errno.EIO, True),
        ("interrupt", errno.EIO, True),
        ("generator", errno.EIO, True),
        ("memory", errno.ENOMEM, True),
        ("unicode", errno.EIO, True),
        ("exit", errno.EIO, True),
        ("grouped", errno.ENOENT, False),
        ("stopiteration", errno.EIO, True),
        ("recursion", errno.EIO, True),
    ],
)
def test_each_exception_becomes_its_errno(host: Host, drivers: Path, name: str, number: int, is_fault: bool) -> None:
    host.start(drivers / "raises.py", "Raises")
    host.ready()
    host.link.init()
    node = host.link.lookup(name)["nodeid"]
    handle = host.link.open(node)
    for _ in range(3):
        with pytest.raises(Refused) as caught:
            host.link.read(node, handle)
        assert caught.value.errno == number
    fine = host.link.lookup("fine")["nodeid"]
    assert host.link.read(fine, host.link.open(fine)) == b"fine"
    reported = faults(host)
    assert len(reported) == is_fault
    if is_fault:
        assert reported[0].op == "read"
        assert name == "odd" or "Traceback" in reported[0].traceback


def test_a_fault_is_reported_once_per_operation_and_type(host: Host, drivers: Path) -> None:
    host.start(drivers / "raises.py", "Raises")
    host.ready()
    host.link.init()
    for name in ("value", "zero", "value"):
        node = host.link.lookup(name)["nodeid"]
        with pytest.raises(Refused):
            host.link.read(node, host.link.open(node))
        with pytest.raises(Refused):
            host.link.write(node, host.link.open(node, os.O_WRONLY), b"x")
    assert sorted((fault.op, fault.error.split(":")[0]) for fault in faults(host)) == [
        ("read", "ValueError"),
        ("read", "ZeroDivisionError"),
        ("write", "ValueError"),
    ]


@pytest.mark.parametrize(
    "name", ["slash", "nul", "dot", "empty", "number", "string", "none", "long", "surrogate", "mapping", "endless"]
)
def test_a_wrong_listing_is_eio(host: Host, drivers: Path, name: str) -> None:
    serve(host, drivers / "wrong.py", "Wrong")
    node = host.link.walk(f"/list/{name}")["nodeid"]
    with pytest.raises(Refused, match="Input/output"):
        host.link.listing(node)
    assert "ContractError" in host.wait_for(messages.HostFault).error
    good = host.link.walk("/list/good")["nodeid"]
    assert [entry for entry, _ in host.link.listing(good)] == [".", "..", "a", "b"]


@pytest.mark.parametrize(
    "name", ["none", "tuple", "kind", "unhashable", "size", "negative", "mode", "uid", "time", "nlink", "ino"]
)
def test_wrong_attributes_are_eio(host: Host, drivers: Path, name: str) -> None:
    serve(host, drivers / "wrong.py", "Wrong")
    with pytest.raises(Refused, match="Input/output"):
        host.link.walk(f"/stat/{name}")
    assert "Wrong.stat() answered" in host.wait_for(messages.HostFault).error
    host.link.walk("/stat/fine")


@pytest.mark.parametrize("name", ["long", "text", "none", "number", "list"])
def test_wrong_contents_are_eio(host: Host, drivers: Path, name: str) -> None:
    serve(host, drivers / "wrong.py", "Wrong")
    node = host.link.walk(f"/read/{name}")["nodeid"]
    with pytest.raises(Refused, match="Input/output"):
        host.link.read(node, host.link.open(node))
    assert "Wrong.read() answered" in host.wait_for(messages.HostFault).error


@pytest.mark.parametrize("name", ["bytearray", "view"])
def test_other_kinds_of_bytes_are_fine(host: Host, drivers: Path, name: str) -> None:
    serve(host, drivers / "wrong.py", "Wrong")
    node = host.link.walk(f"/read/{name}")["nodeid"]
    assert host.link.read(node, host.link.open(node)) == b"fine"


@pytest.mark.parametrize(
    ("name", "written"), [("text", None), ("many", None), ("negative", None), ("bool", None), ("none", 4), ("half", 2)]
)
def test_only_a_count_of_what_was_written_is_taken(host: Host, drivers: Path, name: str, written: int | None) -> None:
    serve(host, drivers / "wrong.py", "Wrong")
    node = host.link.walk(f"/write/{name}")["nodeid"]
    handle = host.link.open(node, os.O_WRONLY)
    if written is None:
        with pytest.raises(Refused, match="Input/output"):
            host.link.write(node, handle, b"four")
    else:
        assert host.link.write(node, handle, b"four") == written


@pytest.mark.parametrize("name", ["none", "nul", "empty", "bytes"])
def test_a_wrong_target_is_eio(host: Host, drivers: Path, name: str) -> None:
    serve(host, drivers / "wrong.py", "Wrong")
    with pytest.raises(Refused, match="Input/output"):
        host.link.ask(Opcode.READLINK, host.link.walk(f"/link/{name}")["nodeid"])
    assert host.link.ask(Opcode.READLINK, host.link.walk("/link/good")["nodeid"]) == b"target"


@pytest.mark.parametrize("name", ["user.none", "user.text", "user.long"])
def test_a_wrong_extended_attribute_is_eio(host: Host, drivers: Path, name: str) -> None:
    serve(host, drivers / "wrong.py", "Wrong")
    body = structs.GETXATTR_IN.pack(65536)
    with pytest.raises(Refused, match="Input/output"):
        host.link.ask(Opcode.GETXATTR, 1, body + name.encode() + b"\0")
    assert host.link.ask(Opcode.GETXATTR, 1, body + b"user.good\0") == b"v"
    for wrong in ("none", "bytes", "nul"):
        with pytest.raises(Refused, match="Input/output"):
            host.link.ask(Opcode.LISTXATTR, host.link.walk(f"/x/{wrong}")["nodeid"], body)
    assert host.link.ask(Opcode.LISTXATTR, 1, body) == b"user.good\0"
    with pytest.raises(Refused, match="Input/output"):
        host.link.ask(Opcode.STATFS, 1)


def test_raw_operations_with_wrong_answers_do_not_end_the_loop(host: Host, drivers: Path) -> None:
    """Each of these ends pyfuse3's main loop when nothing stands between."""
    serve(host, drivers / "raw.py", "Raw")
    link = host.link
    xattr = structs.GETXATTR_IN.pack(1000)

    def refused(call: object, *arguments: object) -> int:
        with pytest.raises(Refused) as caught:
            call(*arguments)  # type: ignore[operator]
        return caught.value.errno

    assert refused(link.lookup, "entry") == errno.EIO
    assert refused(link.lookup, "unknown") == errno.EIO
    text, long, write, number, good = (link.lookup(name)["nodeid"] for name in NAMES[1:])
    assert refused(link.getattr, text) == errno.EIO
    assert link.getattr(good)["attr.size"] == 100
    assert refused(link.open, number) == errno.EIO
    assert refused(link.read, text, link.open(text)) == errno.EIO
    assert refused(link.read, long, link.open(long)) == errno.EIO
    assert refused(link.write, write, link.open(write), b"four") == errno.EIO
    assert refused(link.listing) == errno.EIO
    assert refused(link.ask, Opcode.READLINK, good) == errno.EIO
    assert refused(link.ask, Opcode.STATFS, 1) == errno.EIO
    assert refused(link.ask, Opcode.GETXATTR, 1, xattr + b"user.x\0") == errno.EIO
    assert refused(link.ask, Opcode.LISTXATTR, 1, xattr) == errno.EIO
    assert refused(link.create, "new") == errno.EIO
    link.forget(good, 1)
    assert refused(link.mkdir, "directory") == errno.ENOSYS
    assert link.read(good, link.open(good)) == b"fine"
    host.process.terminate()
    assert host.wait() == 0


NAMES = ("entry", "read_text", "read_long", "write_text", "open_number", "good")
