"""Drivers die under a block shim; programs do not notice, and nothing that was acknowledged is lost."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.t3_block.lab import AT_ONCE, LONG, MIB, Client, Driver, NbdError, serving
from udf.block import wire


def test_a_request_that_was_under_way_is_answered_by_the_next_generation(runtime_dir: Path, disk: Path) -> None:
    for verb, done in (("write", ""), ("write", ":done"), ("read", ""), ("read", ":done"), ("flush", ":done")):
        driver = Driver("disk", disk, f"die:{verb}:{2 if verb == 'read' else 1}{done}")
        with serving(runtime_dir, driver) as shim, Client(shim.path) as client:
            cookies = {
                client.ask(wire.CMD_WRITE, 8192, 4096, bytes([len(verb + done)]) * 4096),
                client.ask(wire.CMD_READ, 0, 512),
                client.ask(wire.CMD_FLUSH, 0, 0),
            }
            lost = shim.expect("link_lost")
            assert lost["pending"] >= 1
            assert any(line.startswith(verb) for line in lost["recent"])
            second = Driver("disk", disk)
            shim.attach(second)
            assert shim.expect("attached")["replayed"] == lost["pending"]
            answers = [client.answer() for _ in cookies]
            assert {cookie for cookie, _, _ in answers} == cookies
            assert {error for _, error, _ in answers} == {0}
            assert client.read(8192, 4096) == bytes([len(verb + done)]) * 4096
            assert shim.stop() == 0


def test_a_medium_of_another_size_is_another_medium(runtime_dir: Path, disk: Path) -> None:
    driver = Driver("disk", disk, "lun:1")
    with serving(runtime_dir, driver) as shim, Client(shim.path) as client, Client(shim.path, "disk1") as other:
        driver.kill()
        shim.expect("link_lost")
        client.ask(wire.CMD_READ, 0, 512)
        second = Driver("disk", disk, f"size:{2 * MIB}", "lun:1")
        shim.attach(second)
        assert client.answer()[1] == wire.ESHUTDOWN
        assert [(one["name"], one["size"]) for one in shim.serving()] == [("disk", 2 * MIB), ("disk1", MIB)]
        with pytest.raises(NbdError) as caught:
            client.write(0, bytes(512))
        assert caught.value.number == wire.ESHUTDOWN
        assert other.read(0, 512) == bytes(512)
        with Client(shim.path) as fresh:
            assert fresh.size == 2 * MIB
            assert fresh.read(0, 512) == bytes(512)


def test_a_driver_without_units_can_be_replaced_by_one_with_some(runtime_dir: Path, disk: Path) -> None:
    driver = Driver("disk", disk)
    with serving(runtime_dir, driver) as shim:
        driver.kill()
        shim.expect("link_lost")
        broken = Driver("garbage", "none")
        shim.attach(broken)
        assert "unit" in shim.expect("refused")["error"]
        third = Driver("disk", disk)
        shim.attach(third, 3)
        assert shim.expect("attached")["generation"] == 3
        with Client(shim.path) as client:
            client.write(0, b"x" * 512)


def test_a_request_at_which_drivers_die_is_given_up_and_named(runtime_dir: Path, disk: Path) -> None:
    driver = Driver("disk", disk, f"poison:{MIB}")
    with serving(runtime_dir, driver) as shim, Client(shim.path) as client, Client(shim.path) as other:
        bad = client.ask(wire.CMD_READ, MIB, 512)
        client.ask(wire.CMD_READ, 0, 512)
        for generation in range(2, 9):
            shim.expect("link_lost")
            shim.attach(Driver("disk", disk, f"poison:{MIB}"), generation, counted=True)
            shim.expect("attached")
            if shim.counters()["poisoned"]:
                break
        assert shim.expect("poison")["op"] == "read"
        answers = {cookie: error for cookie, error, _ in (client.answer(), client.answer())}
        assert answers.pop(bad) == wire.EIO
        assert list(answers.values()) == [0]
        assert other.read(0, 512) == bytes(512)


def test_parked_requests_fail_after_their_patience(runtime_dir: Path, disk: Path) -> None:
    driver = Driver("disk", disk)
    with serving(runtime_dir, driver, patience=0.5) as shim, Client(shim.path) as client:
        driver.kill()
        shim.expect("link_lost")
        with pytest.raises(NbdError) as caught:
            client.write(0, b"x" * 512)
        assert caught.value.number == wire.EIO
        second = Driver("disk", disk)
        shim.attach(second)
        shim.expect("attached")
        client.write(0, b"x" * 512)


def test_told_to_fail_it_fails_everything_until_the_next_generation(runtime_dir: Path, disk: Path) -> None:
    driver = Driver("disk", disk)
    with serving(runtime_dir, driver) as shim, Client(shim.path) as client:
        driver.kill()
        shim.expect("link_lost")
        cookie = client.ask(wire.CMD_WRITE, 0, 512, b"x" * 512)
        shim.until(lambda: shim.requests()["total"] == 1)
        [waiting] = shim.requests()["requests"]
        assert (waiting["op"], waiting["path"], waiting["pid"]) == ("write", "disk 0+512", os.getpid())
        assert waiting["parked"] is True
        shim.send("fail")
        assert client.answer()[:2] == (cookie, wire.EIO)
        with pytest.raises(NbdError):
            client.read(0, 512)
        second = Driver("disk", disk)
        shim.attach(second)
        shim.expect("attached")
        assert client.read(0, 512) == bytes(512)


def test_one_request_can_be_given_up(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk, "hang:write:1")) as shim, Client(shim.path) as client:
        cookie = client.ask(wire.CMD_WRITE, 0, 512, b"x" * 512)
        shim.until(lambda: shim.requests()["total"] == 1)
        shim.send("abort", request=shim.requests()["requests"][0]["id"])
        assert client.answer()[:2] == (cookie, wire.EIO)
        assert client.read(0, 512) == bytes(512)


def test_a_driver_that_hangs_is_told_of_once_and_the_program_gets_an_answer(runtime_dir: Path, disk: Path) -> None:
    driver = Driver("disk", disk, "hang:write:1")
    with serving(runtime_dir, driver, deadline=0.3) as shim, Client(shim.path) as client:
        client.ask(wire.CMD_WRITE, 0, 512, b"x" * 512)
        overdue = shim.expect("overdue")
        assert overdue["op"] == "write"
        assert overdue["age"] >= 0.3
        assert client.answer()[1] == wire.EIO
        assert client.read(0, 512) == bytes(512)
        assert len(shim.said("overdue")) == 1


@pytest.mark.parametrize("verb", ["read", "write", "flush", "zero", "trim"])
def test_unplugged_at_any_request_everything_that_waits_ends_at_once(runtime_dir: Path, disk: Path, verb: str) -> None:
    first = 2 if verb == "read" else 1  # its partition table has been read before
    driver = Driver("disk", disk, f"hang:{'write' if verb == 'zero' else verb}:{first}")
    with serving(runtime_dir, driver) as shim, Client(shim.path) as client:
        op = {
            "read": wire.CMD_READ,
            "write": wire.CMD_WRITE,
            "flush": wire.CMD_FLUSH,
            "zero": wire.CMD_WRITE_ZEROES,
            "trim": wire.CMD_TRIM,
        }[verb]
        size = 0 if verb == "flush" else 512
        cookie = client.ask(op, 0, size, bytes(size) if verb == "write" else b"")
        shim.until(lambda: shim.requests()["total"] == 1)
        before = time.monotonic()
        shim.send("detach")
        assert client.answer()[:2] == (cookie, wire.ESHUTDOWN)
        assert time.monotonic() - before < AT_ONCE
        with pytest.raises(NbdError) as caught:
            client.flush()
        assert caught.value.number == wire.ESHUTDOWN
        with pytest.raises(FileNotFoundError):
            Client(shim.path)
        assert shim.stop() == 0


def test_units_come_and_go_while_the_driver_lives(runtime_dir: Path, disk: Path) -> None:
    """A card reader: SIGUSR1 puts a card into its second slot, or takes it out."""
    driver = Driver("disk", disk, "slot")
    with serving(runtime_dir, driver) as shim, Client(shim.path) as client:
        client.write(0, b"x" * 512)
        os.kill(driver.process.pid, signal.SIGUSR1)
        assert [(one["name"], one["size"]) for one in shim.serving()] == [("disk", 4 * MIB), ("disk1", MIB)]
        with Client(shim.path, "disk1") as card:
            card.write(512, b"y" * 512)
            os.kill(driver.process.pid, signal.SIGUSR1)
            assert [one["name"] for one in shim.serving()] == ["disk"]
            with pytest.raises(NbdError) as caught:
                card.read(0, 512)
            assert caught.value.number == wire.ESHUTDOWN
        os.kill(driver.process.pid, signal.SIGUSR1)
        assert [one["name"] for one in shim.serving()] == ["disk", "disk1"]
        with Client(shim.path, "disk1") as card:
            assert card.read(512, 512) == b"y" * 512
        assert client.read(0, 512) == b"x" * 512


def test_its_end_of_the_control_socket_is_its_end(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk)) as shim, Client(shim.path):
        shim.control.shutdown(socket.SHUT_RDWR)
        assert shim.process.wait(LONG) == 1
        shim.process.returncode = 0  # as it should be


def test_sigterm_stops_it_in_order(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk, "cache")) as shim, Client(shim.path) as client:
        client.write(0, b"x" * 512)
        shim.process.terminate()
        shim.expect("unmounted")
        assert shim.process.wait(LONG) == 0
        assert disk.read_bytes()[:512] == b"x" * 512


def test_a_driver_is_replaced_while_it_serves(runtime_dir: Path, disk: Path) -> None:
    driver = Driver("disk", disk, "slow:0.05")
    with serving(runtime_dir, driver) as shim, Client(shim.path) as client:
        cookies = {client.ask(wire.CMD_WRITE, 512 * index, 512, b"x" * 512) for index in range(32)}
        shim.attach(Driver("disk", disk))
        shim.expect("attached")
        answers = [client.answer() for _ in cookies]
        assert {cookie for cookie, _, _ in answers} == cookies
        assert {error for _, error, _ in answers} == {0}
        driver.kill()
        assert client.read(0, 32 * 512) == b"x" * 32 * 512


def test_it_stops_although_there_is_no_driver_and_tells_who_waits(runtime_dir: Path, disk: Path) -> None:
    driver = Driver("disk", disk, "cache")
    with serving(runtime_dir, driver) as shim, Client(shim.path) as client:
        client.write(0, b"x" * 512)
        driver.kill()
        shim.expect("link_lost")
        cookie = client.ask(wire.CMD_READ, 0, 512)
        shim.until(lambda: shim.requests()["total"] == 1)
        assert shim.stop() == 0
        assert client.answer()[:2] == (cookie, wire.ESHUTDOWN)


def test_nobody_writes_where_a_write_that_was_given_up_may_still_come(runtime_dir: Path, disk: Path) -> None:
    driver = Driver("disk", disk, "late:write:1")
    with serving(runtime_dir, driver) as shim, Client(shim.path) as client:
        old = client.ask(wire.CMD_WRITE, 0, 1024, b"o" * 1024)
        shim.until(lambda: any(not one["parked"] for one in shim.requests()["requests"]))
        shim.send("abort", request=shim.requests()["requests"][0]["id"])
        assert client.answer()[:2] == (old, wire.EIO)
        client.write(512, b"n" * 512)
        assert disk.read_bytes()[512:1024] == b"n" * 512
