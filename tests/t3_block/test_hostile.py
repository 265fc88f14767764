"""Drivers and clients that break the rules: each is its own trouble and nobody else's."""

from __future__ import annotations

import os
import random
import resource
import socket
import struct
from pathlib import Path

import pytest

from tests.t3_block.lab import LONG, MIB, Client, Driver, NbdError, Shim, serving
from udf.block import wire

OPENING = ["greeting", "silent", "none", "names", "twice", "long", "size", "gone", "link"]
REPLYING = [
    *("cookie", "noise", "offset", "longer", "shorter", "simple", "huge", "kind", "empty", "hole", "again", "end")
]


def start_timeout(wrong: str) -> float:
    """Short where nothing else ends the wait; right drivers have to start in it as well."""
    return 5.0 if wrong == "silent" else LONG


@pytest.mark.parametrize("wrong", OPENING)
def test_a_driver_that_does_not_open_its_units_is_one_sentence(runtime_dir: Path, wrong: str) -> None:
    shim = Shim(runtime_dir, Driver("garbage", wrong), start_timeout=start_timeout(wrong))
    try:
        failed = shim.expect("failed")
        assert failed["error"].startswith("the driver test does not serve: ")
        assert shim.process.wait(LONG) == 1
    finally:
        assert "Traceback" not in shim.close()


@pytest.mark.parametrize("wrong", OPENING)
def test_a_new_driver_that_does_not_open_its_units_is_refused(runtime_dir: Path, disk: Path, wrong: str) -> None:
    driver = Driver("disk", disk)
    with serving(runtime_dir, driver, start_timeout=start_timeout(wrong)) as shim, Client(shim.path) as client:
        driver.kill()
        shim.expect("link_lost")
        cookie = client.ask(wire.CMD_READ, 0, 512)
        shim.attach(Driver("garbage", wrong), 2)
        assert shim.expect("refused")["generation"] == 2
        shim.attach(Driver("disk", disk), 3)
        shim.expect("attached")
        assert client.answer() == (cookie, 0, bytes(512))


@pytest.mark.parametrize("wrong", REPLYING)
def test_a_driver_that_answers_wrongly_is_given_up_and_its_requests_are_not(
    runtime_dir: Path, disk: Path, wrong: str
) -> None:
    disk.write_bytes(os.urandom(MIB))
    with serving(runtime_dir, Driver("garbage", wrong)) as shim, Client(shim.path) as client:
        # The driver is right below 64 KiB, and wrong from there on.
        assert client.read(4096, 512) == bytes(512)
        cookie = client.ask(wire.CMD_READ, 65536, 4096)
        if wrong in ("again", "longer"):
            client.ask(wire.CMD_READ, 65536, 4096)
        lost = shim.expect("link_lost")
        if wrong != "end":
            shim.expect("fault")
        shim.attach(Driver("garbage", "nothing"), 2)
        shim.expect("attached")
        if not (wrong == "again" and not lost["pending"]):
            answered, error, data = client.answer()
            assert (answered, error, len(data)) == (cookie, 0, 4096)


def raw(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(str(path))
    return sock


def is_closed(sock: socket.socket) -> bool:
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def test_clients_that_talk_nonsense_are_closed_and_others_go_on(runtime_dir: Path, disk: Path) -> None:
    rng = random.Random(5)
    go = wire.pack_option(wire.OPT_GO, wire.pack_go("disk"))
    flags = wire.CLIENT_FLAGS.pack(3)
    nonsense = [
        b"\xff" * 4,
        flags + b"GET / HTTP/1.1\r\n\r\n",
        flags + wire.OPTION.pack(wire.OPTION_MAGIC, wire.OPT_LIST, 1 << 31),
        flags + wire.pack_option(wire.OPT_EXPORT_NAME, b"nothing"),
        flags + wire.pack_option(wire.OPT_EXPORT_NAME, b"\xff\0"),
        flags + go + bytes(28),
        flags + go + wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.CMD_WRITE, 1, 0, (1 << 32) - 1),
        flags + wire.pack_option(wire.OPT_INFO, wire.pack_go("disk")) * 1100,
        *(flags + rng.randbytes(rng.randint(20, 3000)) for _ in range(20)),
        *(flags + go + rng.randbytes(rng.randint(28, 3000)) for _ in range(20)),
    ]
    with serving(runtime_dir, Driver("disk", disk)) as shim, Client(shim.path) as client:
        for bad in nonsense:
            with raw(shim.path) as sock:
                sock.sendall(bad)
                sock.shutdown(socket.SHUT_WR)
                assert is_closed(sock), bad[:60]
            assert client.read(0, 512) == bytes(512)
        shim.until(lambda: shim.counters()["connections"] == 1)
        assert shim.counters()["charged_bytes"] == 0


def test_options_with_a_broken_payload_are_refused_and_the_handshake_goes_on(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk)) as shim, Client(shim.path, None, structured=False) as client:
        for option, payload, kind in (
            (wire.OPT_LIST, b"x", wire.REP_ERR_INVALID),
            (wire.OPT_GO, b"\xff\xff\xff\xff", wire.REP_ERR_INVALID),
            (wire.OPT_GO, b"", wire.REP_ERR_INVALID),
            (wire.OPT_GO, wire.pack_go("nothing"), wire.REP_ERR_UNKNOWN),
            (wire.OPT_INFO, struct.pack(">IH", 0, 9), wire.REP_ERR_INVALID),
            (wire.OPT_STRUCTURED_REPLY, b"x", wire.REP_ERR_INVALID),
            (wire.OPT_SET_META_CONTEXT, wire.pack_contexts("disk"), wire.REP_ERR_INVALID),
            (wire.OPT_STARTTLS, b"", wire.REP_ERR_UNSUP),
            (wire.OPT_CLAIM, b"\0\0\0\x09disk", wire.REP_ERR_INVALID),
            (wire.OPT_CLAIM, wire.pack_text("nothing"), wire.REP_ERR_UNKNOWN),
            (0xDEADBEEF, b"", wire.REP_ERR_UNSUP),
        ):
            assert client.option(option, payload)[-1][0] == kind, option
        client.go("disk")
        client.write(0, bytes(512))


def test_a_client_that_does_not_read_is_not_read_either(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk)) as shim, Client(shim.path) as client:
        client.sock.setblocking(False)
        asked = 0
        try:
            while asked < 10000:
                client.ask(wire.CMD_READ, 0, MIB)
                asked += 1
        except BlockingIOError:
            pass
        assert asked < 10000
        with Client(shim.path) as other:
            for _ in range(10):
                assert other.read(0, 512) == bytes(512)
        assert shim.counters()["charged_bytes"] <= 17 * MIB
        assert memory_of(shim) < 300 * MIB


def memory_of(shim: Shim) -> int:
    pages = int(Path(f"/proc/{shim.process.pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_clients_that_hold_memory_and_do_not_move_give_way_to_others(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk)) as shim:
        stuck = []
        for _ in range(12):
            client = Client(shim.path, "disk")
            client.sock.sendall(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.CMD_READ, 1, 0, 4 * MIB) * 3)
            stuck.append(client)
        shim.until(lambda: shim.counters()["charged_bytes"] > 120 * MIB)
        with Client(shim.path) as other:
            assert other.read(0, 512) == bytes(512)  # small ones always go
            assert other.read(0, 4 * MIB) == bytes(4 * MIB)
        assert memory_of(shim) < 400 * MIB
        for client in stuck:
            client.sock.close()
        shim.until(lambda: shim.counters()["charged_bytes"] == 0)


def test_a_hundred_clients_are_served_and_leave_nothing(runtime_dir: Path, disk: Path) -> None:
    disk.write_bytes(random.Random(6).randbytes(4 * MIB))
    content = disk.read_bytes()
    with serving(runtime_dir, Driver("disk", disk)) as shim:
        clients = [Client(shim.path) for _ in range(100)]
        for client in clients:
            for index in range(4):
                client.ask(wire.CMD_READ, index * 65536, 65536)
        for client in clients:
            got = dict(client.answer()[::2] for _ in range(4))  # type: ignore[arg-type,misc]
            assert b"".join(got[cookie] for cookie in sorted(got)) == content[: 4 * 65536]
        for client in clients[::2]:
            client.disconnect()
        for client in clients:
            client.sock.close()
        shim.until(lambda: shim.counters()["connections"] == 0)
        counters = shim.counters()
        assert counters["charged_bytes"] == counters["waiting"] == counters["claims"] == 0
        assert counters["requests"] == 400


def test_more_clients_than_it_serves_wait_for_their_turn(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk)) as shim:
        clients = [Client(shim.path) for _ in range(256)]
        late = raw(shim.path)
        late.settimeout(0.3)
        with pytest.raises(TimeoutError):
            late.recv(18)
        clients.pop().sock.close()
        late.settimeout(LONG)
        assert late.recv(18, socket.MSG_WAITALL)
        late.close()
        for client in clients:
            client.sock.close()


def test_what_was_asked_before_a_goodbye_is_done(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk, "slow:0.005")) as shim:
        with Client(shim.path) as client:
            for index in range(200):
                client.ask(wire.CMD_WRITE, index * 512, 512, bytes([index]) * 512)
            client.ask(wire.CMD_DISC, 0, 0)
        shim.until(lambda: shim.counters()["connections"] == 0)
        assert disk.read_bytes()[: 200 * 512] == b"".join(bytes([index]) * 512 for index in range(200))


def test_a_write_that_never_comes_whole_is_not_done(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk)) as shim:
        with Client(shim.path) as client:
            client.sock.sendall(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.CMD_WRITE, 1, 0, MIB) + b"x" * (MIB - 1))
            shim.until(lambda: shim.requests()["total"] == 1)
            shim.send("fail")
        shim.until(lambda: shim.counters()["connections"] == 0)
        assert shim.counters()["charged_bytes"] == 0
        assert disk.read_bytes()[:MIB] == bytes(MIB)


def test_refused_writes_do_not_confuse_what_follows(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("disk", disk)) as shim, Client(shim.path) as client:
        bad = client.ask(wire.CMD_WRITE, 4 * MIB, 3 * MIB, b"x" * 3 * MIB)
        good = client.ask(wire.CMD_READ, 0, 512)
        answers = {cookie: error for cookie, error, _ in (client.answer(), client.answer())}
        assert answers == {bad: wire.ENOSPC, good: 0}


def test_misaligned_requests_are_refused_where_the_driver_has_blocks(runtime_dir: Path, disk: Path) -> None:
    with serving(runtime_dir, Driver("garbage", "nothing")) as shim, Client(shim.path) as client:
        assert client.read(1, 3) == bytes(3)
        with pytest.raises(NbdError):
            client.write(1 << 20, b"x")
