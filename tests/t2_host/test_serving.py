"""A host serves a driver over the link, and ends when it should."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.t2_host.peer import REPO, TIMEOUT, Host, Refused, named
from udf import messages
from udf.fuse import structs
from udf.fuse.opcodes import Opcode


def test_hello_is_listed_looked_up_and_read(host: Host) -> None:
    host.start(REPO / "fs/hello.py", "Hello")
    host.ready()
    host.link.init()
    node = host.link.lookup("hello.txt")["nodeid"]
    assert host.link.read(node, host.link.open(node)) == b"Hello, world!\n"
    assert [name for name, _ in host.link.listing()] == [".", "..", "hello.txt"]


def test_the_driver_is_started_before_it_is_ready(host: Host) -> None:
    host.start(REPO / "fs/hello.py", "Hello")
    pid = host.wait_for(messages.Started).pid
    assert pid != host.process.pid
    assert "udf:test" in Path(f"/proc/{pid}/comm").read_text()
    host.ready()


def test_a_name_that_is_not_there_is_answered_as_absent(host: Host) -> None:
    host.start(REPO / "fs/hello.py", "Hello")
    host.ready()
    host.link.init()
    entry = host.link.lookup("nothing")
    assert (entry["nodeid"], entry["entry_valid"]) == (0, 1)


def test_hello_lets_nobody_write(host: Host) -> None:
    host.start(REPO / "fs/hello.py", "Hello")
    host.ready()
    host.link.init()
    with pytest.raises(Refused, match="Read-only"):
        host.link.create("new")
    with pytest.raises(Refused, match="Read-only"):
        host.link.open(host.link.lookup("hello.txt")["nodeid"], 1)


def test_source_and_options_reach_the_driver(host: Host, drivers: Path) -> None:
    host.start(drivers / "odd_starts.py", "WantsOption", source="thing", options={"colour": "blue"})
    host.ready()


def test_sigterm_is_an_orderly_end(host: Host) -> None:
    host.start(REPO / "fs/hello.py", "Hello")
    host.ready()
    host.link.init()
    host.process.terminate()
    assert host.wait() == 0


def test_stop_is_an_orderly_end(host: Host) -> None:
    host.start(REPO / "fs/hello.py", "Hello")
    host.ready()
    host.control.send(messages.encode(messages.Stop()))
    assert host.wait() == 0


def test_stop_before_start_ends_the_host(host: Host) -> None:
    host.control.send(messages.encode(messages.Stop()))
    assert host.wait() == 0


def test_the_end_of_the_link_ends_the_driver(host: Host) -> None:
    host.start(REPO / "fs/hello.py", "Hello")
    host.ready()
    host.link.init()
    host.link.sock.close()
    assert host.wait() == 0


def test_the_end_of_the_control_socket_ends_the_driver(host: Host) -> None:
    host.start(REPO / "fs/hello.py", "Hello")
    host.ready()
    host.control.close()
    assert host.wait() != 0


def test_the_host_ends_the_way_the_driver_did(host: Host, drivers: Path) -> None:
    host.start(drivers / "raises.py", "Raises")
    pid = host.driver_pid()
    host.ready()
    os.kill(pid, signal.SIGSEGV)
    assert host.wait() == -signal.SIGSEGV


@pytest.mark.parametrize(("name", "status"), [("kill", -9), ("abort", -6), ("exit", 5)])
def test_a_driver_can_end_itself_in_any_way(host: Host, drivers: Path, name: str, status: int) -> None:
    """A driver that was the first process of its namespace could not kill or abort itself."""
    host.start(drivers / "raises.py", "Raises")
    host.ready()
    host.link.init()
    node = host.link.lookup(name)["nodeid"]
    handle = host.link.open(node, 1)
    with pytest.raises(AssertionError, match="closed"):
        host.link.write(node, handle, b"x")
    assert host.wait() == status


def test_heartbeats_tell_the_age_of_a_loop_that_is_stuck(host: Host, drivers: Path) -> None:
    host.start(drivers / "odd_starts.py", "Stuck", heartbeat=0.05)
    host.ready()
    host.link.init()
    assert host.wait_for(messages.HostHeartbeat).loop_age < 5
    node = host.link.lookup("file")["nodeid"]
    handle = host.link.open(node)
    host.link.send(Opcode.READ, node, named(structs.READ_IN, fh=handle, size=10))
    until = time.monotonic() + 40
    ages = [0.0]
    while ages[-1] < 0.5 and time.monotonic() < until:
        ages.append(host.wait_for(messages.HostHeartbeat).loop_age)
    assert ages[-1] >= 0.5
    host.process.kill()


def test_what_a_driver_prints_for_ever_hurts_nothing(host: Host, drivers: Path) -> None:
    host.start(drivers / "odd_starts.py", "Chatty")
    host.ready()
    host.link.init()
    for _ in range(200):
        node = host.link.lookup("file")["nodeid"]
        assert host.link.read(node, host.link.open(node)) == b"text"
    until = time.monotonic() + TIMEOUT  # the thread that reads it may not have had its turn
    while "chatter" not in host.text():
        assert time.monotonic() < until, host.text()
        time.sleep(0.01)
    host.process.terminate()
    assert host.wait() == 0


@pytest.mark.parametrize(
    ("class_name", "sentence"),
    [
        ("RaisesAtStart", "could not be started: ValueError: no such thing as this"),
        ("ExitsAtStart", "could not be started: SystemExit: good bye"),
        ("NoRead", "the class NoRead has no read(), which every filesystem needs"),
        ("NotADriver", "is neither an FsDriver nor a pyfuse3.Operations"),
        ("not_a_class", "is not a class"),
        ("Missing", "there is no class Missing"),
    ],
)
def test_a_driver_that_cannot_start_is_one_sentence(host: Host, drivers: Path, class_name: str, sentence: str) -> None:
    host.start(drivers / "odd_starts.py", class_name)
    error = host.wait_for(messages.HostFailed).error
    assert sentence in error
    assert "\n" not in error
    assert host.wait() == 1


def test_a_driver_that_exits_while_it_starts_is_seen_by_its_status(host: Host, drivers: Path) -> None:
    host.start(drivers / "odd_starts.py", "HardExitAtStart")
    assert host.wait() == 7


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("def x(:\n", "SyntaxError"), ("import nothing_like_this\n", "ModuleNotFoundError"), ("1/0\n", "(line 1)")],
)
def test_a_file_that_cannot_be_loaded_is_one_sentence(host: Host, tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "bad.py").write_text(text)
    host.start(tmp_path / "bad.py", "Bad", sandbox={"keep_paths": [str(REPO), str(tmp_path)]})
    assert sentence in host.wait_for(messages.HostFailed).error
    assert host.wait() == 1


def test_a_package_may_import_its_own_files(host: Host, tmp_path: Path) -> None:
    package = tmp_path / "two-files"
    package.mkdir()
    (package / "__init__.py").write_text("from .other import Hello\n")
    (package / "other.py").write_text((REPO / "fs/hello.py").read_text())
    host.start(package / "__init__.py", "Hello")
    host.ready()
