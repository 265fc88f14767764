"""The live trace: one line for each answered request, for a watcher who never makes the mount wait."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator

from tests.t3_shim.raw_driver import RawDriver
from tests.t3_shim.supervising import Mount, can_mount, mounted

pytestmark = can_mount


def grow(driver: RawDriver) -> None:
    directory = driver.tree.directory("d")
    driver.tree.file("file", b"contents", parent=directory.ino)


@contextlib.contextmanager
def watched(mount: Mount) -> Iterator[int]:
    reader, writer = os.pipe()
    mount.shim.send({"t": "trace", "on": True}, writer)
    os.close(writer)
    mount.counters()
    try:
        yield reader
    finally:
        os.close(reader)


def lines(reader: int) -> list[dict[str, object]]:
    return [json.loads(line) for line in os.read(reader, 1 << 16).splitlines()]


def test_each_answer_is_one_line_with_what_a_reader_wants_to_know():
    with mounted(grow, exclusive=True) as mount, watched(mount) as reader:
        mount.do("slurp", "d/file")
        mount.do("slurp", "d/file")
        mount.fails("stat", "d/missing")
        mount.counters()
        trace = lines(reader)
        assert {line["pid"] for line in trace} <= {mount.usual.pid, 0}  # 0: what the kernel asks in nobody's name
        seen = [(line["op"], line["name"], line["result"], line["by"]) for line in trace]
        assert ("LOOKUP", "/d/file", "ok", "driver") in seen
        assert ("READ", "/d/file", "ok", "driver") in seen
        assert ("OPEN", "/d/file", "ok", "driver") in seen
        assert ("OPEN", "/d/file", "ok", "cache") in seen
        (read,) = [line for line in trace if line["op"] == "READ"]
        assert read["bytes"] == 8
        assert float(read["us"]) > 0
        mount.shim.send({"t": "trace", "on": False})
        mount.counters()
        mount.do("names", "d")
        assert os.read(reader, 1 << 16) == b""


def test_a_watcher_that_does_not_read_makes_nobody_wait():
    with mounted(grow, open="driver") as mount, watched(mount) as reader:
        mount.usual.do("times", 500, "access_open", mount.path("d/file"))
        first = lines(reader)
        assert len(first) > 100
        mount.do("names", "d")
        assert any(line.get("missed") for line in lines(reader))


def test_a_watcher_that_goes_away_is_forgotten():
    with mounted(grow) as mount:
        with watched(mount):
            mount.do("names", "d")
        mount.do("slurp", "d/file")
        time.sleep(1.1)  # the next heartbeat closes it
        assert mount.do("slurp", "d/file") == b"contents"
