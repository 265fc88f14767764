"""Requests that go on where the one before ends are asked for in one command; nobody sees that but by its speed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.t3_block.lab import MIB, Client, Driver, Shim, serving
from udf.block import wire

SIZE = 256 * 1024
COUNT = 48
ALONE = 13  # at most are asked for as they come
BAD = 31


@pytest.fixture
def content(runtime_dir: Path) -> bytes:
    data = random.Random(7).randbytes(COUNT * SIZE)
    (runtime_dir / "large.img").write_bytes(data)
    return data


def ask_all(client: Client, op: int, data: bytes) -> dict[int, int]:
    """One request behind the other; each one's number by its cookie."""
    parts = [data[at : at + SIZE] for at in range(0, len(data), SIZE)]
    return {
        client.ask(op, number * SIZE, SIZE, part if op == wire.CMD_WRITE else b""): number
        for number, part in enumerate(parts)
    }


def answers(client: Client, asked: dict[int, int]) -> dict[int, tuple[int, bytes]]:
    """Error and data by number; each is answered once."""
    found = {}
    for _ in asked:
        cookie, error, data = client.answer()
        assert asked[cookie] not in found
        found[asked[cookie]] = error, data
    return found


def trips(shim: Shim) -> int:
    return shim.counters()["driver_round_trips"]


def test_each_gets_its_own_part(runtime_dir: Path, content: bytes) -> None:
    new = content[::-1]
    driver = Driver("disk", runtime_dir / "large.img", "slow:0.05")
    with serving(runtime_dir, driver) as shim, Client(shim.path) as client:
        before = trips(shim)
        for number, (error, data) in answers(client, ask_all(client, wire.CMD_READ, content)).items():
            assert not error
            assert data == content[number * SIZE : number * SIZE + SIZE]
        assert trips(shim) - before < COUNT
        before = trips(shim)
        assert {error for error, _ in answers(client, ask_all(client, wire.CMD_WRITE, new)).values()} == {0}
        assert trips(shim) - before < COUNT
        client.flush()
        assert shim.counters()["kept_bytes"] == 0
        assert (runtime_dir / "large.img").read_bytes() == new


@pytest.mark.parametrize("op", [wire.CMD_READ, wire.CMD_WRITE])
def test_only_the_one_with_the_bad_block_fails(runtime_dir: Path, content: bytes, op: int) -> None:
    new = content[::-1]
    driver = Driver("disk", runtime_dir / "large.img", "slow:0.05", f"bad:{BAD * SIZE + 512}")
    with serving(runtime_dir, driver) as shim, Client(shim.path) as client:
        asked = ask_all(client, op, new)
        found = answers(client, asked)
        assert [number for number, (error, _) in found.items() if error] == [BAD]
        assert found[BAD][0] == wire.EIO
        if op == wire.CMD_WRITE:
            client.flush()
        else:
            new = content
            assert all(data == new[number * SIZE :][:SIZE] for number, (_, data) in found.items() if number != BAD)
        for number in {*range(COUNT)} - {BAD}:
            assert client.read(number * SIZE, SIZE) == new[number * SIZE : number * SIZE + SIZE]


@pytest.mark.parametrize("op", [wire.CMD_READ, wire.CMD_WRITE])
def test_the_next_generation_answers_all_of_them(runtime_dir: Path, content: bytes, op: int) -> None:
    new = content[::-1]
    driver = Driver("disk", runtime_dir / "large.img", "slow:0.3")
    with serving(runtime_dir, driver) as shim, Client(shim.path) as client:
        before = trips(shim)
        asked = ask_all(client, op, new)
        shim.until(lambda: trips(shim) > before + ALONE)  # some of them merged
        driver.kill()
        assert shim.expect("link_lost")["pending"]
        shim.attach(Driver("disk", runtime_dir / "large.img"))
        found = answers(client, asked)
        assert {error for error, _ in found.values()} == {0}
        if op == wire.CMD_WRITE:
            client.flush()
            assert (runtime_dir / "large.img").read_bytes() == new
        else:
            assert all(data == content[number * SIZE :][:SIZE] for number, (_, data) in found.items())


def test_one_of_them_is_given_up_and_the_others_are_not(runtime_dir: Path, content: bytes) -> None:
    new = content[::-1]
    driver = Driver("disk", runtime_dir / "large.img", "slow:1")
    with serving(runtime_dir, driver) as shim, Client(shim.path) as client:
        asked = ask_all(client, wire.CMD_WRITE, new)
        shim.until(lambda: shim.counters()["requests"] >= COUNT)
        shim.until(lambda: shim.requests()["total"] <= COUNT - ALONE)
        stuck = shim.requests()["requests"][0]
        shim.send("abort", request=stuck["id"])
        shim.until(lambda: stuck["id"] not in [row["id"] for row in shim.requests()["requests"]])
        # Whoever writes there now must wait until nobody else can.
        late = client.ask(wire.CMD_WRITE, int(stuck["path"].split()[1].split("+")[0]), 512, b"L" * 512)
        driver.kill()
        shim.expect("link_lost")
        shim.attach(Driver("disk", runtime_dir / "large.img"))
        found = answers(client, {**asked, late: COUNT})
        assert sorted(error for error, _ in found.values()) == [0] * COUNT + [wire.EIO]
        assert found[COUNT][0] == 0
        client.flush()
        for number in (number for number in range(COUNT) if not found[number][0]):
            assert client.read(number * SIZE, SIZE) == new[number * SIZE : number * SIZE + SIZE]
        assert shim.counters()["charged_bytes"] <= MIB


def test_what_could_be_merged_does_not_wait_for_a_command_that_hangs(runtime_dir: Path, content: bytes) -> None:
    driver = Driver("disk", runtime_dir / "large.img", "hang:write:1")
    with serving(runtime_dir, driver) as shim, Client(shim.path) as client:
        hangs = client.ask(wire.CMD_WRITE, 0, MIB, bytes(MIB))
        goes_on = client.ask(wire.CMD_WRITE, MIB, 4096, bytes(4096))
        assert client.answer()[:2] == (goes_on, 0)
        driver.kill()
        shim.expect("link_lost")
        shim.attach(Driver("disk", runtime_dir / "large.img"))
        assert client.answer()[:2] == (hangs, 0)
