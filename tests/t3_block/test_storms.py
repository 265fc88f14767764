"""Drivers that die all the time, or at each request in turn, under programs that check everything."""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.t3_block.lab import LONG, MIB, Client, Driver, Shim, back, plug, serving
from udf.block import wire


class Killer(threading.Thread):
    """Kills one driver after the other, and is the supervisor that starts the next one."""

    def __init__(self, shim: Shim, driver: Driver, start: object, seconds: float) -> None:
        super().__init__()
        self.shim, self.driver, self.new, self.seconds = shim, driver, start, seconds
        self.deaths = 0
        self.error: BaseException | None = None
        self.enough = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            while not self.enough.wait(self.seconds):
                self.driver.kill()
                self.shim.expect("link_lost")
                self.deaths += 1
                self.driver = self.new()  # type: ignore[operator]
                self.shim.attach(self.driver, self.deaths + 1)
                self.shim.expect("attached")
        except BaseException as error:
            self.error = error

    def finish(self) -> None:
        self.enough.set()
        self.join(2 * LONG)
        self.driver.kill()
        assert self.error is None
        assert self.deaths > 0


def test_a_copy_does_not_notice_that_its_driver_is_killed_ten_times_a_second(runtime_dir: Path) -> None:
    source = runtime_dir / "source"
    source.write_bytes(random.Random(4).randbytes(64 * MIB))
    target = runtime_dir / "target"
    target.write_bytes(bytes(64 * MIB))
    arguments = ("file", str(target), "--filter=delay", "wdelay=2ms", "rdelay=2ms")
    driver = Driver("nbdkit", *arguments)
    with serving(runtime_dir, driver) as shim:
        killer = Killer(shim, driver, lambda: Driver("nbdkit", *arguments), 0.1)
        try:
            for command in (
                ["nbdcopy", "--flush", str(source), shim.uri()],
                ["qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), shim.uri()],
                ["nbdcopy", shim.uri(), str(runtime_dir / "back")],
            ):
                subprocess.run(command, check=True, timeout=90)
        finally:
            killer.finish()
        assert (runtime_dir / "back").read_bytes() == source.read_bytes()
        assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("seed", [1, 2])
def test_no_acknowledged_write_is_lost_with_the_cache_of_a_dying_medium(
    runtime_dir: Path, disk: Path, seed: int
) -> None:
    """A writer with a model of its own; after each flush the medium itself is compared."""
    rng = random.Random(seed)
    model = bytearray(4 * MIB)
    driver = Driver("disk", disk, "cache")
    with serving(runtime_dir, driver) as shim, Client(shim.path) as client:
        killer = Killer(shim, driver, lambda: Driver("disk", disk, "cache"), 0.1)
        try:
            until = time.monotonic() + 4
            while time.monotonic() < until or (killer.deaths < 5 and killer.error is None):
                under_way: dict[int, tuple[int, bytes]] = {}
                for _ in range(rng.randint(1, 8)):
                    size = 512 * rng.randint(1, 200)
                    at = 512 * rng.randint(0, (4 * MIB - size) // 512)
                    if any(at < start + len(data) and start < at + size for start, data in under_way.values()):
                        continue  # the order of those that are under way together is nobody's
                    data = rng.randbytes(size)
                    under_way[client.ask(wire.CMD_WRITE, at, size, data)] = (at, data)
                while under_way:
                    cookie, error, _ = client.answer()
                    assert not error
                    at, data = under_way.pop(cookie)
                    model[at : at + len(data)] = data
                what = rng.random()
                if what < 0.2:
                    at = 512 * rng.randint(0, 8191 - 64)
                    client.zero(at, 32768)
                    model[at : at + 32768] = bytes(32768)
                elif what < 0.5:
                    at = 512 * rng.randint(0, 4096)
                    assert client.read(at, 256 * 1024) == model[at : at + 256 * 1024]
                elif what < 0.7:
                    client.flush()
                    assert disk.read_bytes() == model
            client.flush()
            assert disk.read_bytes() == model
        finally:
            killer.finish()
        assert shim.counters()["kept_again"] > 0


@pytest.mark.parametrize("number", range(2, 10))
def test_a_reply_that_was_lost_after_the_work_is_made_good(runtime_dir: Path, disk: Path, number: int) -> None:
    """The driver dies at each request of a program in turn, the work done and the reply not sent; 1 was its table."""
    driver = Driver("disk", disk, "cache", f"die:any:{number}:done")
    with serving(runtime_dir, driver) as shim, Client(shim.path) as client:
        supervisor = threading.Thread(target=lambda: (shim.expect("link_lost"), shim.attach(Driver("disk", disk))))
        supervisor.start()
        try:
            client.write(0, b"a" * 1024)
            client.write(512, b"b" * 1024)
            client.flush()
            assert client.read(0, 2048) == b"a" * 512 + b"b" * 1024 + bytes(512)
            client.zero(0, 512)
            client.write(256, b"c" * 512)
            client.flush()
            expected = bytes(256) + b"c" * 512 + b"b" * 768 + bytes(512)
            assert client.read(0, 2048) == expected
            assert disk.read_bytes()[:2048] == expected
        finally:
            driver.kill()
            supervisor.join(LONG)


@pytest.mark.parametrize("seed", range(int(os.environ.get("UDF_TEST_SEEDS", "2"))))
def test_pulled_out_at_any_moment_it_comes_back_with_all_that_was_acknowledged(
    runtime_dir: Path, disk: Path, seed: int
) -> None:
    """A medium with a cache that is lost each time; sometimes the driver dies instead, or while it is compared."""
    rng = random.Random(seed)
    disk.write_bytes(rng.randbytes(4 * MIB))
    model = bytearray(disk.read_bytes())
    rounds = int(os.environ.get("UDF_TEST_EPISODES", "8"))
    generation = 1
    with serving(runtime_dir, Driver("disk", disk, "cache"), idle_flush=0.02) as shim:
        client = Client(shim.path, watch=True)
        with client:
            for _ in range(rounds):
                under_way: dict[int, tuple[int, bytes]] = {}
                for _ in range(rng.randint(1, 12)):
                    size = 512 * rng.randint(1, 64)
                    at = 512 * rng.randint(0, (4 * MIB - size) // 512)
                    what = rng.random()
                    if what < 0.3:
                        under_way[client.ask(wire.CMD_READ, at, size, flags=wire.FLAG_WATCH)] = (at, b"")
                    elif what < 0.4:
                        under_way[client.ask(wire.CMD_FLUSH, 0, 0)] = (0, b"")
                    elif not any(at < start + len(old) and start < at + size for start, old in under_way.values()):
                        data = rng.randbytes(size)
                        flags = rng.choice([0, wire.FLAG_WATCH])
                        under_way[client.ask(wire.CMD_WRITE, at, size, data, flags)] = (at, data)
                for _ in range(rng.randint(0, len(under_way))):
                    cookie, error, _ = client.answer()
                    assert not error
                    at, data = under_way.pop(cookie)
                    model[at : at + len(data)] = data
                died = rng.random() < 0.2
                if died:
                    shim.drivers[-1].kill()
                    shim.expect("link_lost")
                else:
                    shim.send("detach")
                    failed = {}
                    while under_way:
                        cookie, error, _ = client.answer()
                        at, data = under_way.pop(cookie)
                        if error:
                            assert error == wire.ESHUTDOWN
                            failed[at] = len(data)
                        else:
                            model[at : at + len(data)] = data
                    shim.drivers[-1].kill()
                    generation += 1
                    if rng.random() < 0.3:
                        plug(shim, disk, "cache", f"die:read:{rng.randint(1, 4)}", generation=generation)
                        if shim.expect("refused", or_else="attached")["t"] == "attached":
                            shim.drivers[-1].kill()
                            shim.expect("link_lost")
                        shim.drivers[-1].kill()
                    generation += 1
                generation += died
                back(shim, disk, "cache", generation=generation)
                while under_way:
                    cookie, error, _ = client.answer()
                    assert not error
                    at, data = under_way.pop(cookie)
                    model[at : at + len(data)] = data
                if not died:
                    for at, size in failed.items():
                        if size:  # what its program was told has failed may be there or not
                            model[at : at + size] = client.read(at, size)
            client.flush()
            assert disk.read_bytes() == model
