"""A driver that says anything at all while programs work: nobody hangs, the shim lives, and afterwards all is well."""

from __future__ import annotations

import itertools
import os
import struct
import time

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.t3_shim.program import Program, StillWaiting
from tests.t3_shim.raw_driver import RawDriver
from tests.t3_shim.supervising import Mount, can_mount, mounted
from tests.t3_shim.tree import Answer, Packets, Request, whole
from udf.fuse.opcodes import Opcode

pytestmark = can_mount

EXAMPLES = int(os.environ.get("UDF_FUZZ_EXAMPLES", "10"))  # more of them by night
SETTINGS = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
SECONDS = 30.0  # for one operation: its requests, each with a deadline of a second or two
MEMORY = 60 << 20


def grow(driver: RawDriver) -> None:
    tree = driver.tree
    tree.file("file", b"0123456789" * 2000)
    directory = tree.directory("d")
    for number in range(40):
        tree.file(f"f{number}", b"x", parent=directory.ino)
    tree.add(1, b"pointer", 0o120777, b"file")
    tree.nodes[2].xattrs[b"user.x"] = b"value"
    tree.valid = 0.0


WORK = (
    (("stat", "file"), ("direct_read", "file"), ("names", "d"), ("readlink", "pointer"), ("slurp", "file")),
    (("scan", "d"), ("spill", "d/new", b"new"), ("rename_to", "d/new", "moved"), ("unlink", "d/moved")),
    (("getxattr", "file", "user.x"), ("listxattr", "file"), ("statfs", ""), ("mkdir", "e"), ("rmdir", "e")),
    (("overwrite", "file", b"w"), ("truncate", "file", 100), ("link_to", "file", "l"), ("unlink", "l")),
)

# One change to a reply: its kind and three numbers that mean what the kind makes of them.
CHANGES = st.tuples(
    st.sampled_from(
        (
            *("right",) * 3,
            *("bytes",) * 6,
            *("word",) * 4,
            *("length", "error", "unique", "cut", "longer", "twice", "split", "noise", "notification", "silence"),
        )
    ),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from((0, 1, 2, 3, 15, 16, 17, 255, 4095, 4096, 2**31, 2**32 - 1, 2**63, 2**64 - 1)),
)


def changed(request: Request, answer: Answer, change: tuple[str, int, int, int]) -> Answer:
    """The right answer with one thing wrong."""
    kind, a, b, special = change
    if kind == "right" or answer is None or isinstance(answer, Packets):
        return answer
    right = whole(request.unique, answer) if isinstance(answer, bytes) else whole(request.unique, b"", -answer)
    message = bytearray(right)
    at = 16 + a % (len(message) - 16) if len(message) > 16 else a % 16
    if kind == "bytes":
        noise = struct.pack("=II", a, b)
        message[at : at + b % 8] = noise[: b % 8]
    elif kind == "word":
        at -= at % 8
        message[at : at + 8] = struct.pack("=Q", special)[: max(0, len(message) - at)]
    elif kind == "length":
        message[:4] = struct.pack("=I", special & 0xFFFFFFFF)
    elif kind == "error":
        message[4:8] = struct.pack("=I", a if b % 2 else special & 0xFFFFFFFF)
    elif kind == "unique":
        message[8:16] = struct.pack("=Q", special if b % 2 else request.unique + 2)
    elif kind == "cut":
        message = message[: a % len(message)]
    elif kind == "longer":
        message += bytes(a % 70_000)
    elif kind == "twice":
        return Packets([bytes(message)] * 2)
    elif kind == "split":
        return Packets([bytes(message[:at]), bytes(message[at : at + b % 100]), bytes(message[at + b % 100 :])])
    elif kind == "noise":
        return Packets([struct.pack("=II", a, b) * (b % 50), bytes(message)])
    elif kind == "notification":
        body = struct.pack("=QQQ", a % 8, special, b % 4096) + bytes(b % 300)
        return Packets([struct.pack("=IiQ", 16 + len(body), a % 10, 0) + body, bytes(message)])
    elif kind == "silence":
        return None
    return Packets([bytes(message)])


def work(mount: Mount, programs: list[Program]) -> None:
    """Everything, four at a time; each operation may fail, none may hang."""
    for step in itertools.zip_longest(*WORK):
        busy = []
        for program, operation in zip(programs, step, strict=True):
            if operation is not None:
                call, name, *args = operation
                program.start(call, mount.path(name), *args)
                busy.append(program)
        for program in busy:
            try:
                program.wait(SECONDS)
            except OSError:
                pass
            except StillWaiting:
                raise AssertionError(f"{step} hangs: {mount.shim.log()}") from None
            except AssertionError:
                pass  # what cannot be decoded is the program's trouble: a name that is not UTF-8, say


NUMBERS = itertools.count(1 << 40, 1 << 20)


def is_well(mount: Mount) -> None:
    """With a driver that is right again, things that are new are right, and nothing has run away."""
    driver = mount.driver
    driver.answers.clear()
    driver.mangle = None
    driver.plant(grow)
    number = driver.tree._next = next(NUMBERS)
    name = f"new{number}"
    until = time.monotonic() + SECONDS
    while True:
        try:
            assert mount.do("spill", name, b"after all", seconds=SECONDS) == 9
            break
        except TimeoutError:  # of the driver, which is a thread of a busy process
            assert time.monotonic() < until
    assert mount.do("slurp", name, seconds=SECONDS) == b"after all"
    mount.do("unlink", name, seconds=SECONDS)
    counts = mount.counters()
    assert counts["late"] <= 4096
    assert mount.shim.memory() < MEMORY
    assert not mount.shim.said("link_lost")


def run(each, **config: object) -> None:
    """Put one example after the other to one mount: what one leaves behind must not hurt the next."""
    with mounted(grow, deadline=0.5, **config) as mount:
        programs = [mount.program() for _ in WORK]
        mount.driver.astray = True
        each(mount, programs)
        mount.end_programs()
        assert len(mount.faults()) < 1100


def test_right_answers_with_something_wrong_in_them():
    def each(mount: Mount, programs: list[Program]) -> None:
        @given(st.lists(CHANGES, min_size=1, max_size=12))
        @SETTINGS
        def example(changes: list[tuple[str, int, int, int]]) -> None:
            turn = itertools.cycle(changes)
            mount.driver.mangle = lambda request, answer: changed(request, answer, next(turn))
            work(mount, programs)
            is_well(mount)

        example()

    run(each)


def test_answers_that_are_nothing_but_noise():
    def each(mount: Mount, programs: list[Program]) -> None:
        @given(st.lists(st.tuples(st.booleans(), st.binary(max_size=300)), min_size=1, max_size=6))
        @SETTINGS
        def example(noise: list[tuple[bool, bytes]]) -> None:
            turn = itertools.cycle(noise)

            def answer(request: Request, _: Answer) -> Answer:
                addressed, data = next(turn)
                return Packets([whole(request.unique, data), data] if addressed else [data, whole(request.unique)])

            mount.driver.mangle = answer
            work(mount, programs)
            is_well(mount)

        example()

    run(each, open="lazy")


def test_notifications_that_are_nothing_but_noise():
    def each(mount: Mount, programs: list[Program]) -> None:
        body = st.builds(
            lambda numbers, tail: struct.pack("=QQII", *numbers) + tail,
            st.tuples(
                st.sampled_from((0, 1, 2, 3, 4, 2**64 - 1)),
                st.sampled_from((0, 1, 2, 4096, 2**63, 2**64 - 1)),
                st.sampled_from((0, 1, 4, 100, 2**32 - 1)),
                st.integers(0, 1),
            ),
            st.sampled_from((b"", b"file\0", b"d\0", b"x" * 100, b"a/b\0")) | st.binary(max_size=200),
        )

        @given(st.lists(st.tuples(st.integers(-1, 11), body | st.binary(max_size=60)), max_size=30))
        @SETTINGS
        def example(notifications: list[tuple[int, bytes]]) -> None:
            packets = [struct.pack("=IiQ", 16 + len(body), code, 0) + body for code, body in notifications]
            mount.driver.send(*packets)
            work(mount, programs)
            mount.driver.send(*packets)
            is_well(mount)

        example()

    run(each)


def test_listings_that_are_nothing_but_noise():
    def each(mount: Mount, programs: list[Program]) -> None:
        entry = st.builds(
            lambda plus, fields, name: plus + struct.pack("=QQII", *fields) + name + bytes(-len(name) % 8),
            st.sampled_from((b"", bytes(128), b"\xff" * 128)) | st.binary(min_size=128, max_size=128),
            st.tuples(
                st.sampled_from((0, 1, 2, 2**64 - 1)),
                st.sampled_from((0, 1, 2, 3, 2**63, 2**64 - 1)),
                st.sampled_from((0, 1, 4, 8, 300, 5000, 2**32 - 1)),
                st.integers(0, 20),
            ),
            st.sampled_from((b"", b"name", b"a/b", b"\0\0\0\0", b"long" * 75)),
        )

        @given(st.lists(entry | st.binary(max_size=40), max_size=6))
        @SETTINGS
        def example(entries: list[bytes]) -> None:
            for op in (Opcode.READDIR, Opcode.READDIRPLUS):
                mount.driver.answers[op] = lambda request: b"".join(entries)
            for program, call in zip(programs, ("names", "scan", "walk", "count_names"), strict=True):
                program.start(call, mount.path("d" if call != "walk" else ""))
            for program in programs:
                try:
                    program.wait(SECONDS)
                except OSError:
                    pass
                except StillWaiting:
                    raise
                except AssertionError:
                    pass
            is_well(mount)

        example()

    run(each)
