"""A driver says that its device is gone before anybody else does: who waits hears of it only when that is decided."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from tests.t3_block.lab import AT_ONCE, MIB, Client, Driver, NbdError, Shim, serving
from udf.block import wire


def held(shim: Shim, count: int = 1) -> None:
    shim.until(lambda: shim.counters()["held"] >= count)


def silent(client: Client) -> bool:
    client.sock.setblocking(False)
    try:
        return not client.sock.recv(1)
    except BlockingIOError:
        return True
    finally:
        client.sock.settimeout(20)


def test_the_answer_waits_for_the_supervisors_word(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk, "gone:write:1")) as shim, Client(shim.path) as client:
        cookies = {client.ask(wire.CMD_WRITE, at * 8192, 512, b"x" * 512) for at in range(3)}
        held(shim)
        cookies.add(client.ask(wire.CMD_READ, 0, 512))
        shim.until(lambda: shim.requests()["total"] == 4)
        assert silent(client)
        shim.send("detach")
        answers = {cookie: error for cookie, error, _ in (client.answer() for _ in cookies)}
        assert answers == dict.fromkeys(cookies, wire.ESHUTDOWN)


@pytest.mark.parametrize("dies", [False, True])
def test_another_generation_is_asked_again(runtime_dir: Path, disk: Path, dies: bool) -> None:
    driver = Driver("disk", disk, "gone:read:2")
    with serving(runtime_dir, driver) as shim, Client(shim.path) as client:
        cookies = [client.ask(wire.CMD_READ, 0, 512), client.ask(wire.CMD_READ, MIB, 512)]
        held(shim)
        replacement = Driver("disk", disk)
        if dies:
            driver.kill()
            shim.expect("link_lost")
        shim.attach(replacement)
        assert {client.answer()[:2] for _ in cookies} == {(cookie, 0) for cookie in cookies}


@pytest.mark.parametrize("dies", [False, True])
def test_when_nobody_decides_programs_know_within_a_second(runtime_dir: Path, disk: Path, dies: bool) -> None:
    driver = Driver("disk", disk, "gone:read:2")
    with serving(runtime_dir, driver) as shim, Client(shim.path) as client:
        cookie = client.ask(wire.CMD_READ, 0, 512)
        held(shim)
        began = time.monotonic()
        if dies:
            driver.kill()
            shim.expect("link_lost")
        assert client.answer()[:2] == (cookie, wire.ESHUTDOWN)
        assert time.monotonic() - began < AT_ONCE
        if not dies:  # from here on it is told what the driver says
            for _ in range(3):
                with pytest.raises(NbdError) as caught:
                    client.write(0, bytes(512))
                assert caught.value.number == wire.ESHUTDOWN
            assert shim.counters()["held"] == 1
        shim.attach(Driver("disk", disk), 2)
        shim.expect("attached")
        assert client.read(0, 512) == bytes(512)


def test_what_is_merged_is_held_too(runtime_dir: Path, disk: Path) -> None:
    with (
        serving(runtime_dir, Driver("disk", disk, "late:write:1", "gone:write:2")) as shim,
        Client(shim.path) as client,
    ):
        cookies = {client.ask(wire.CMD_WRITE, at * 65536, 65536, b"x" * 65536) for at in range(40)}
        held(shim)
        shim.send("detach")
        errors = [error for _, error, _ in (client.answer() for _ in cookies)]
        assert set(errors) <= {0, wire.ESHUTDOWN}
        assert errors.count(wire.ESHUTDOWN) == 40


def test_one_who_leaves_while_its_request_is_held_leaves_nothing(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk, "gone:write:1")) as shim:
        with Client(shim.path, claim=True) as client:
            client.ask(wire.CMD_WRITE, 0, 512, b"x" * 512)
            held(shim)
        shim.until(lambda: shim.counters()["connections"] == 0)
        shim.until(lambda: shim.counters()["claims"] == 0)
        assert shim.counters()["charged_bytes"] == 0


def test_kept_writes_of_a_device_that_is_gone_are_not_lost(runtime_dir: Path, disk: Path) -> None:
    """Its own flush was answered so as well, and was taken for a flush that had failed."""
    driver = Driver("disk", disk, "cache", "gone:flush:1")
    with serving(runtime_dir, driver, idle_flush=0.05) as shim, Client(shim.path) as client:
        client.write(0, b"k" * 512)
        shim.until(lambda: shim.counters()["flushes_idle"] == 1)
        shim.send("detach")
        driver.kill()
        shim.attach(Driver("disk", disk, "cache"))
        shim.expect("attached")
        shim.until(lambda: shim.counters()["kept_writes"] == 0)
        assert disk.read_bytes()[:512] == b"k" * 512
        client.flush()


def test_gone_while_it_writes_again_programs_know_within_a_second(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk, "cache")) as shim, Client(shim.path) as client:
        client.write(0, b"k" * 512)
        shim.send("detach")
        shim.attach(Driver("disk", disk, "cache", "gone:write:1"))
        shim.expect("attached")
        began = time.monotonic()
        for _ in range(2):
            with pytest.raises(NbdError) as caught:
                client.read(0, 512)
            assert caught.value.number == wire.ESHUTDOWN
        assert time.monotonic() - began < AT_ONCE
        shim.send("detach")
        shim.attach(Driver("disk", disk), 3)
        shim.expect("attached")
        assert client.read(0, 512) == b"k" * 512


def test_it_stops_while_answers_are_held(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk, "gone:read:2")) as shim, Client(shim.path) as client:
        cookie = client.ask(wire.CMD_READ, 0, 512)
        held(shim)
        assert shim.stop() == 0
        assert client.answer()[:2] == (cookie, wire.ESHUTDOWN)
        client.sock.shutdown(socket.SHUT_RDWR)
