"""What is kept of acknowledged writes, against a model; and that it is bounded."""

from __future__ import annotations

import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.t3_block.lab import MIB, Client, Driver, NbdError, serving
from udf.block import wire
from udf.block.shim.buffers import Pool
from udf.block.shim.kept import Kept

SPACE = 64
writes = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, SPACE - 1), st.integers(1, 20)),
        st.tuples(st.just("zero"), st.integers(0, SPACE - 1), st.integers(1, 20)),
        st.tuples(st.just("flush"), st.integers(0, 5), st.just(0)),
    ),
    max_size=40,
)


@given(writes)
def test_written_again_in_any_order_it_gives_what_was_written_last(steps: list[tuple[str, int, int]]) -> None:
    pool = Pool()
    kept = Kept(pool)
    durable = bytearray(SPACE * 2)
    model = bytearray(SPACE * 2)
    states = [(kept.version, bytes(model))]  # what a flush that began then makes durable
    for number, (what, at, size) in enumerate(steps, 1):
        if what == "flush":
            version, content = states[max(0, len(states) - 1 - at)]  # one that began some writes ago
            kept.covered(version)
            durable[:] = content
            states = [state for state in states if state[0] >= version]
            continue
        data = bytes(size) if what == "zero" else bytes([number]) * size
        buffer = None
        if what == "write":
            buffer = pool.take(size)
            buffer.view[:size] = data
        op = wire.CMD_WRITE if buffer is not None else wire.CMD_WRITE_ZEROES
        kept.add(at, size, op, 0, buffer)
        if buffer is not None:
            pool.drop(buffer)
        model[at : at + size] = data
        states.append((kept.version, bytes(model)))
        entries = kept.entries()
        assert all(one.end <= two.start for one, two in pairwise(entries))
    for entry in reversed(kept.entries()):
        size = entry.end - entry.start
        data = bytes(size) if entry.buffer is None else bytes(entry.buffer.view[entry.at : entry.at + size])
        durable[entry.start : entry.end] = data
    assert durable == model
    kept.clear()
    assert kept.bytes == 0
    assert len(kept) == 0


def test_it_flushes_by_itself_before_it_keeps_too_much(runtime_dir: Path) -> None:
    target = runtime_dir / "target"
    target.write_bytes(bytes(96 * MIB))
    source = runtime_dir / "source"
    source.write_bytes(b"\x5a" * 96 * MIB)
    with serving(runtime_dir, Driver("nbdkit", "file", str(target))) as shim:
        subprocess.run(["nbdcopy", "--allocated", str(source), shim.uri()], check=True)
        counters = shim.counters()
        assert counters["flushes_own"] >= 2
        assert counters["kept_bytes"] <= 72 * MIB  # and what was under way
        with Client(shim.path) as client:
            client.flush()
        assert shim.counters()["kept_bytes"] == 0
    assert target.read_bytes() == source.read_bytes()


def test_a_flush_of_its_own_that_fails_is_told_to_whoever_flushes_next(runtime_dir: Path) -> None:
    disk = runtime_dir / "disk.img"
    disk.write_bytes(bytes(48 * MIB))
    with serving(runtime_dir, Driver("disk", disk, "cache", "fail:flush:1")) as shim, Client(shim.path) as client:
        for index in range(40):
            client.write(index * MIB, b"x" * MIB)
        shim.until(lambda: shim.counters()["flushes_own"] > 0)
        cookie = client.ask(wire.CMD_FLUSH, 0, 0)
        assert client.answer()[:2] == (cookie, wire.EIO)


def test_what_was_not_flushed_is_written_again_and_in_order(runtime_dir: Path, disk: Path) -> None:
    """The medium loses its cache with each of its drivers, as a stick does when it is pulled out."""
    with serving(runtime_dir, Driver("disk", disk, "cache")) as shim, Client(shim.path) as client:
        client.write(0, b"a" * 8192)
        client.flush()
        client.write(0, b"b" * 4096)
        client.write(2048, b"c" * 4096)
        client.zero(512, 512)
        client.write(MIB, b"d" * 100 * 1024)
        assert disk.read_bytes()[:8192] == b"a" * 8192
        expected = b"b" * 512 + bytes(512) + b"b" * 1024 + b"c" * 4096 + b"a" * 2048
        assert client.read(0, 8192) == expected
        shim.send("detach")
        with pytest.raises(NbdError) as caught:
            client.read(0, 512)
        assert caught.value.number == wire.ESHUTDOWN
        second = Driver("disk", disk, "cache")
        shim.attach(second)
        shim.expect("attached")
        assert client.read(0, 8192) == expected
        client.flush()
        assert disk.read_bytes()[:8192] == expected
        assert disk.read_bytes()[MIB : MIB + 100 * 1024] == b"d" * 100 * 1024
        assert shim.counters()["kept_bytes"] == 0


def test_a_flush_is_not_acknowledged_once_a_write_before_it_is_lost(runtime_dir: Path, disk: Path) -> None:
    driver = Driver("disk", disk, "cache")
    with serving(runtime_dir, driver) as shim, Client(shim.path) as client:
        client.write(0, b"a" * 512)
        driver.kill()
        shim.expect("link_lost")
        second = Driver("disk", disk, "cache", "fail:write:1")
        shim.attach(second)
        shim.expect("attached")
        assert "written again" in shim.expect("fault")["error"]
        for _ in range(2):
            with pytest.raises(NbdError):
                client.flush()
        with Client(shim.path) as other:
            other.flush()


def test_unplugged_again_while_it_is_written_again_nothing_is_lost(runtime_dir: Path, disk: Path) -> None:
    driver = Driver("disk", disk, "cache")
    with serving(runtime_dir, driver) as shim, Client(shim.path) as client:
        client.write(0, b"a" * 512)
        client.write(4096, b"b" * 512)
        shim.send("detach")
        shim.attach(Driver("disk", disk, "cache", "gone:write:2"), 2)
        shim.expect("attached")
        cookie = client.ask(wire.CMD_READ, 0, 512)
        shim.until(lambda: shim.requests()["total"] == 1)
        shim.send("detach")
        assert client.answer()[:2] == (cookie, wire.ESHUTDOWN)
        shim.attach(Driver("disk", disk, "cache"), 3)
        shim.expect("attached")
        client.flush()
        assert disk.read_bytes()[:512] == b"a" * 512
        assert disk.read_bytes()[4096:4608] == b"b" * 512


def test_drivers_that_die_soon_get_done_with_what_is_written_again(runtime_dir: Path) -> None:
    """Each began with the first of it and died before the last: a copy under a storm of deaths did not get on."""
    disk = runtime_dir / "disk.img"
    disk.write_bytes(bytes(24 * MIB))
    driver = Driver("disk", disk, "cache")
    with serving(runtime_dir, driver) as shim, Client(shim.path) as client:
        for index in range(20):
            client.write(index * MIB, bytes([index + 1]) * MIB)
        driver.kill()
        shim.expect("link_lost")
        cookie = client.ask(wire.CMD_FLUSH, 0, 0)
        for generation in range(2, 12):
            shim.attach(Driver("disk", disk, "cache", "die:write:10"), generation)
            shim.expect("attached")
            shim.until(lambda n=generation: shim.counters()["kept_writes"] == 0 or len(shim.said("link_lost")) >= n)
            if shim.counters()["kept_writes"] == 0:
                break
        assert client.answer()[:2] == (cookie, 0)
        assert disk.read_bytes() == b"".join(bytes([index + 1]) * MIB for index in range(20)) + bytes(4 * MIB)


def test_a_write_that_kills_each_driver_that_gets_it_again_is_given_up(runtime_dir: Path, disk: Path) -> None:
    driver = Driver("disk", disk, "cache")
    with serving(runtime_dir, driver) as shim, Client(shim.path) as client:
        for index in range(3):
            client.write(index * 4096, bytes([65 + index]) * 512)
        driver.kill()
        for generation in range(2, 12):
            shim.expect("link_lost")
            shim.attach(Driver("disk", disk, "cache", "deadly:4096"), generation, counted=True)
            shim.expect("attached")
            if shim.counters()["kept_lost"]:
                break
        assert client.read(0, 512) == b"A" * 512
        assert client.read(8192, 512) == b"C" * 512
        with pytest.raises(NbdError):
            client.flush()
