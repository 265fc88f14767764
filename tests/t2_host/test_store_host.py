"""A host gives the store to its driver, and the next host finds in it what the one before had answered."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests.t2_host.peer import REPO, TIMEOUT, Host, host
from udf import messages
from udf.driver.memory import create_memfds

MEMFS = REPO / "fs/memfs/__init__.py"


@pytest.fixture
def memfds() -> Iterator[list[int]]:
    fds = create_memfds("test")
    yield fds
    for fd in fds:
        os.close(fd)


def kill(peer: Host, pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    peer.wait(TIMEOUT)


def test_a_killed_memfs_is_followed_by_one_that_has_all_of_it(memfds: list[int]) -> None:
    with host() as first:
        first.start(MEMFS, "Memfs", memfds)
        first.ready()
        first.link.init()
        node, handle = first.link.create("file", mode=0o444)
        assert first.link.write(node, handle, b"acknowledged", 5000) == 12
        open_node, open_handle = first.link.create("open")
        first.link.write(open_node, open_handle, b"without a name")
        first.link.unlink("open")
        directory = first.link.mkdir("directory")
        kill(first, first.driver_pid())
    with host() as second:
        second.start(MEMFS, "Memfs", memfds)
        second.ready()
        second.link.init()
        assert second.link.walk("file")["nodeid"] == node
        assert second.link.walk("directory")["nodeid"] == directory
        assert second.link.read(node, second.link.open(node, os.O_RDWR), 5000) == b"acknowledged"
        assert second.link.read(open_node, second.link.open(open_node)) == b"without a name"
        assert [name for name, _ in second.link.listing()] == [".", "..", "file", "directory"]


def test_a_spare_gets_the_store_with_its_link(memfds: list[int]) -> None:
    with host() as first:
        first.start(MEMFS, "Memfs", memfds)
        first.ready()
        first.link.init()
        node, handle = first.link.create("file")
        first.link.write(node, handle, b"text")
        with host() as spare:
            spare.start(MEMFS, "Memfs", memfds, spare=True)
            spare.wait_for(messages.Warm)
            first.link.write(node, handle, b"later", 4)
            kill(first, first.driver_pid())
            spare.give_link(messages.TakeOver(), *memfds)
            spare.ready()
            spare.link.init()
            assert spare.link.read(node, spare.link.open(node)) == b"textlater"


def test_a_store_that_cannot_be_read_is_one_sentence(memfds: list[int]) -> None:
    with host() as first:
        first.start(MEMFS, "Memfs", memfds)
        first.ready()
        first.link.init()
        first.link.create("file")
        kill(first, first.driver_pid())
    os.pwrite(memfds[0], b"udfstor9", 0)
    with host() as second:
        second.start(MEMFS, "Memfs", memfds)
        failed = second.wait_for(messages.HostFailed)
        assert failed.error == "the state store was written by a version of udf that this one cannot read"
