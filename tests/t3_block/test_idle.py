"""A device is told to flush when nobody has written for a moment: a stick that is pulled out then is clean."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.t3_block.lab import MIB, Client, Driver, NbdError, serving
from udf.block import wire

IDLE = 0.1


def test_after_the_last_write_it_is_on_the_medium_without_anybody_asking(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk, "cache"), idle_flush=IDLE) as shim, Client(shim.path) as client:
        client.write(0, b"a" * 512)
        client.write(MIB, b"b" * 512)
        shim.until(lambda: shim.counters()["kept_writes"] == 0)
        assert disk.read_bytes()[:512] == b"a" * 512
        assert disk.read_bytes()[MIB : MIB + 512] == b"b" * 512
        assert shim.counters()["flushes_idle"] in (1, 2)  # two, if there was a moment between the writes
        client.flush()


def test_without_anything_to_flush_it_is_not_told(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk, "cache"), idle_flush=IDLE) as shim, Client(shim.path) as client:
        client.read(0, 512)
        client.write(0, b"a" * 512)
        client.flush()
        client.write(0, b"b" * 512, wire.CMD_FLAG_FUA)
        before = shim.counters()["flushes_idle"]  # more than none, if there was a moment after the first write
        time.sleep(3 * IDLE)  # for something that must not happen
        assert shim.counters()["flushes_idle"] == before
    with serving(runtime_dir, Driver("disk", disk, "cache")) as shim, Client(shim.path) as client:
        client.write(0, b"a" * 512)
        time.sleep(3 * IDLE)
        counters = shim.counters()
        assert (counters["flushes_idle"], counters["kept_writes"]) == (0, 1)  # it was not asked to


def test_it_waits_for_whoever_writes_or_flushes(runtime_dir: Path, disk: Path) -> None:
    idle = 5 * IDLE  # longer than the pauses that a busy machine makes for us
    words = ("cache", "slow:0.05")
    with serving(runtime_dir, Driver("disk", disk, *words), idle_flush=idle) as shim, Client(shim.path) as client:
        for _ in range(10):
            shim.until(lambda: shim.counters()["kept_writes"] == 0)
            before, longest, last = shim.counters()["flushes_idle"], 0.0, time.monotonic()
            until = last + 3 * idle
            while last < until:
                client.write(0, b"a" * 512)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
            after = shim.counters()["flushes_idle"]
            if max(longest, time.monotonic() - last) < idle:
                break  # else there was one
        assert after == before
        shim.until(lambda: shim.counters()["kept_writes"] == 0)
        assert shim.counters()["flushes_idle"] == after + 1
    driver = Driver("disk", disk, "cache", "hang:flush:1")
    with serving(runtime_dir, driver, idle_flush=idle) as shim, Client(shim.path) as client:
        client.write(0, b"a" * 512)
        client.ask(wire.CMD_FLUSH, 0, 0)
        time.sleep(3 * idle)
        assert shim.counters()["flushes_idle"] == 0


def test_each_client_is_told_once_of_a_flush_that_failed(runtime_dir: Path, disk: Path) -> None:
    driver = Driver("disk", disk, "cache", "fail:flush:1")
    with (
        serving(runtime_dir, driver, idle_flush=IDLE) as shim,
        Client(shim.path) as client,
        Client(shim.path) as other,
    ):
        client.write(0, b"a" * 512)
        shim.until(lambda: shim.counters()["flushes_idle"] == 1 and shim.counters()["waiting"] == 0)
        time.sleep(2 * IDLE)
        assert shim.counters()["flushes_idle"] == 1  # not again and again
        for one in (client, other):
            with pytest.raises(NbdError) as caught:
                one.flush()
            assert caught.value.number == wire.EIO
            one.flush()
        with Client(shim.path) as third:
            third.flush()
        assert disk.read_bytes()[:512] == b"a" * 512


def test_after_a_death_what_is_kept_is_flushed_all_the_same(runtime_dir: Path, disk: Path) -> None:
    driver = Driver("disk", disk, "cache")
    with serving(runtime_dir, driver, idle_flush=IDLE) as shim, Client(shim.path) as client:
        client.write(0, b"a" * 512)
        driver.kill()
        shim.expect("link_lost")
        shim.attach(Driver("disk", disk, "cache"))
        shim.expect("attached")
        shim.until(lambda: shim.counters()["kept_writes"] == 0)
        assert disk.read_bytes()[:512] == b"a" * 512
