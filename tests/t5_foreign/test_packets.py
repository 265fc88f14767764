"""Replies in several packets, as splice(2) sends them to a socket, from one thread and from several at once."""

from __future__ import annotations

import hashlib
import random
import threading
from pathlib import Path

from tests.t3_shim.raw_driver import RawDriver, Request, whole
from tests.t3_shim.supervising import can_mount, mounted
from tests.t5_cli.conftest import Daemon
from tests.t5_foreign.conftest import mount
from udf.fuse import structs
from udf.fuse.opcodes import Opcode

CHUNK = 131072
CONTENTS = {name: random.Random(name).randbytes(CHUNK) for name in ("one", "two", "three")}


def test_a_splicing_program_with_many_readers(daemon: Daemon, splicing_ll: Path, tmp_path: Path) -> None:
    """Its threads' packets come in turn; readers waited for 30 s, again and again."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(8):
        (source / f"file{number}").write_bytes(random.Random(number).randbytes(4_000_001))
    wrong = []
    with mount(daemon, tmp_path / "mnt", "--exec", f"{splicing_ll} -f -o source={source} {{mountpoint}}") as mounted:

        def read(name: str) -> None:
            got = hashlib.sha256((tmp_path / "mnt" / name).read_bytes()).digest()
            if got != hashlib.sha256((source / name).read_bytes()).digest():
                wrong.append(name)

        read("file0")
        threads = [threading.Thread(target=read, args=(f"file{number}",)) for number in range(1, 8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        row = mounted.row()
        assert (row["state"], row["counters"]["timeouts"], wrong) == ("ACTIVE", 0, [])


def grow(driver: RawDriver) -> None:
    for name, contents in CONTENTS.items():
        driver.tree.file(name, contents)


def reply_to(driver: RawDriver, request: Request) -> bytes:
    answer = driver.usual(request)
    assert isinstance(answer, bytes)
    return whole(request.unique, answer)


def size_of(request: Request) -> int:
    return request.fields(structs.READ_IN)["size"]


@can_mount
def test_packets_of_two_replies_in_turn_never_become_one() -> None:
    """The rest of one reply was added to the next that began: a program read another file's bytes."""
    with mounted(grow) as shim:
        driver = shim.driver
        held: list[bytes] = []

        def mix(request: Request) -> None:
            if size_of(request) < CHUNK:
                driver.send(reply_to(driver, request))  # small enough for one packet
                return
            held.append(reply_to(driver, request))
            if len(held) == 3:
                first, second, third = held
                driver.send(first[:60000], second[:60000], third[:60000], first[60000:], third[60000:], second[60000:])

        driver.answers = {Opcode.READ: mix}
        programs = {name: shim.program() for name in CONTENTS}
        for name, program in programs.items():
            program.start("direct_read", shim.path(name), CHUNK)
        for name, program in programs.items():
            assert program.wait() == CONTENTS[name]
        asked = driver.count(Opcode.READ)
        for name, contents in CONTENTS.items():
            assert shim.do("direct_read", name, CHUNK) == contents
        assert driver.count(Opcode.READ) == asked + 3 * 3, "each in three pieces"
        assert "READ" in [operation for operation, _ in shim.faults()]


@can_mount
def test_whole_messages_between_the_packets_of_a_reply_do_no_harm() -> None:
    with mounted(grow) as shim:
        driver = shim.driver
        rest: list[bytes] = []

        def begin(request: Request) -> None:
            reply = reply_to(driver, request)
            driver.send(reply[:60000])
            rest.append(reply[60000:])

        driver.answers = {Opcode.READ: begin}
        reader = shim.program()
        reader.start("direct_read", shim.path("one"), CHUNK)
        driver.wait_until(lambda: bool(rest))
        assert shim.do("stat", "two")["st_size"] == CHUNK
        assert shim.fails("stat", "absent") == 2
        driver.send(rest[0])
        assert reader.wait() == CONTENTS["one"]
        assert shim.faults() == []


@can_mount
def test_many_replies_in_pieces_one_after_the_other() -> None:
    """Their time was counted from the first one: after a second the next was given up."""
    with mounted(grow) as shim:
        driver = shim.driver

        def split(request: Request) -> None:
            reply = reply_to(driver, request)
            driver.send(*(reply[at : at + 50000] for at in range(0, len(reply), 50000)))

        driver.answers = {Opcode.READ: split}
        readers = [shim.program() for _ in range(3)]
        for name, reader in zip(CONTENTS, readers, strict=True):
            reader.start("times", 2500, "direct_read", shim.path(name), CHUNK)
        for reader in readers:
            reader.wait(60)
        assert shim.faults() == []
