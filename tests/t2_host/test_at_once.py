"""What a driver has in memory is answered before libfuse sees the request; and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.t2_host.peer import Host, Link, Refused, named
from udf.fuse import structs
from udf.fuse.opcodes import Opcode

NOW, VIEW, LATER, MISTAKE, LONG, GONE, LATER_LONG, GO_ON, NEVER, NOTHING, AS_EVER = range(11)


@pytest.fixture
def link(host: Host, drivers: Path) -> Link:
    host.start(drivers / "at_once.py", "AtOnce")
    host.ready()
    host.link.init()
    assert host.link.lookup("file")["nodeid"] == 2
    return host.link


def ask(link: Link, offset: int) -> int:
    return link.send(Opcode.READ, 2, named(structs.READ_IN, fh=2, offset=offset, size=4096))


def test_what_is_in_memory_is_answered_without_a_read(link: Link) -> None:
    assert link.receive(ask(link, NOW)) == b"now"
    assert link.receive(ask(link, VIEW)) == b"a view"


@pytest.mark.parametrize("offset", [AS_EVER, MISTAKE, LONG, NOTHING])
def test_what_the_driver_does_not_say_at_once_is_read(link: Link, offset: int) -> None:
    assert link.receive(ask(link, offset)) == b"read"
    assert link.receive(ask(link, NOW)) == b"now"


def test_bytes_that_are_on_their_way_are_answered_when_they_come(link: Link) -> None:
    late = [ask(link, LATER) for _ in range(3)]
    assert link.receive(ask(link, NOW)) == b"now"  # nobody waits for them
    assert link.getattr(2)["attr_valid"] >= 0
    assert link.receive(ask(link, GO_ON)) == b"read"
    assert [link.receive(unique) for unique in late] == [b"later 0", b"later 1", b"later 2"]


def test_bytes_that_do_not_come_after_all_are_an_error(link: Link) -> None:
    with pytest.raises(Refused, match="No such device"):
        link.receive(ask(link, GONE))
    with pytest.raises(Refused, match="Input/output"):
        link.receive(ask(link, LATER_LONG))


def test_a_handler_that_waits_for_ever_delays_nothing(link: Link) -> None:
    ask(link, NEVER)
    for _ in range(20):
        assert link.receive(ask(link, NOW)) == b"now"
        assert link.receive(ask(link, AS_EVER)) == b"read"


def test_a_burst_of_all_kinds_gets_each_its_own_answer(link: Link) -> None:
    kinds = [NOW, AS_EVER, VIEW, LATER, MISTAKE] * 20
    asked = [(ask(link, kind), kind) for kind in kinds]
    link.receive(ask(link, GO_ON))
    want = {NOW: b"now", AS_EVER: b"read", VIEW: b"a view", MISTAKE: b"read"}
    for unique, kind in asked:
        got = link.receive(unique)
        assert got == want[kind] if kind in want else got.startswith(b"later")


def test_a_link_that_ends_ends_the_driver_also_while_answers_are_owed(host: Host, link: Link) -> None:
    ask(link, LATER)
    assert link.receive(ask(link, NOW)) == b"now"
    link.sock.close()
    assert host.wait() == 0
