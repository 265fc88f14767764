"""The end of a mount: nobody hears that it is unmounted before the driver has saved what it was told."""

from __future__ import annotations

import errno
import threading

import pytest

from tests.t3_shim.program import PATIENCE
from tests.t3_shim.supervising import Mount, can_mount, mounted
from tests.t3_shim.test_recovery import grow
from udf.fuse.opcodes import Opcode

pytestmark = can_mount
LAST = (Opcode.SYNCFS, Opcode.FSYNCDIR, Opcode.DESTROY)


def used(prepare=grow, **config):
    return mounted(prepare, **{"recover": True, "hide": False, **config})


def end(mount: Mount, how: str) -> None:
    """Have it unmounted, and do not wait for that."""
    mount.end_programs()
    if how == "by the supervisor":
        mount.shim.send({"t": "unmount", "lazy": False})
    elif how == "lazily":
        mount.shim.send({"t": "unmount", "lazy": True})
    else:
        mount.umount()


def last_words(mount: Mount) -> str:
    unsaved: str = mount.shim.wait_for("unmounted")["unsaved"]
    assert mount.shim.process.wait(PATIENCE) == 0
    return unsaved


EVERY_WAY = pytest.mark.parametrize("how", ["by the supervisor", "lazily", "by umount(8)"])


@EVERY_WAY
@pytest.mark.parametrize("op", [Opcode.SYNCFS, Opcode.FSYNCDIR])
def test_whoever_unmounts_the_driver_saves_first(how, op):
    """The kernel asks for nothing at an unmount, so the driver was only told by the end of its link."""
    with used() as mount:
        mount.do("spill", "new", b"data")
        mount.driver.hold(op)
        end(mount, how)
        mount.driver.wait_for(op)
        mount.counters()
        assert not mount.is_mounted()
        assert not mount.shim.said("unmounted")
        request = mount.driver.unanswered.pop()
        mount.driver.reply(request, b"")
        assert last_words(mount) == ""
        asked = [request.op for request in mount.driver.log if request.op in LAST]
        assert asked == [Opcode.SYNCFS, Opcode.DESTROY] if op == Opcode.SYNCFS else list(LAST)


def test_what_was_changed_through_a_mapping_is_written_before():
    with used() as mount:
        program = mount.program()
        program.do("map_open", mount.path("file"))
        program.do("map_write", 0, b"MAPPED")
        end(mount, "lazily")
        assert last_words(mount) == ""
        asked = [request.op for request in mount.driver.log if request.op in (*LAST, Opcode.WRITE)]
        assert asked == [Opcode.WRITE, *LAST]


def test_of_a_read_only_mount_nothing_is_saved():
    with used(read_only=True) as mount:
        mount.do("slurp", "file")
        end(mount, "by umount(8)")
        assert last_words(mount) == ""
        assert mount.driver.count(*LAST) == 0


@pytest.mark.parametrize("op", [Opcode.SYNCFS, Opcode.FSYNCDIR, Opcode.OPENDIR])
def test_what_cannot_be_saved_is_said(op):
    with used() as mount:
        mount.counters()
        mount.driver.answers[op] = lambda request: errno.EIO
        end(mount, "by the supervisor")
        assert last_words(mount) == "the driver could not save everything: Input/output error"


@pytest.mark.parametrize("op", LAST)
def test_a_driver_that_does_not_answer_has_no_longer_than_for_any_request(op):
    with used(deadline=1.5) as mount:
        mount.counters()
        mount.driver.hold(op)
        end(mount, "by the supervisor")
        assert last_words(mount) == "the driver did not say within 1.5 s that everything is saved"


def test_a_driver_that_needs_nothing_of_the_kind_is_not_asked_for_more():
    with used() as mount:
        mount.counters()
        mount.driver.answers[Opcode.FSYNCDIR] = mount.driver.answers[Opcode.DESTROY] = lambda request: errno.ENOSYS
        end(mount, "by the supervisor")
        assert last_words(mount) == ""


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_driver_that_has_just_died_is_waited_for(when):
    """What the dead one has left half done is the next one's business, and it used to come too late for that."""
    with used() as mount:
        mount.do("stat")
        if when == "before":
            mount.lose_driver()
            end(mount, "by the supervisor")
        else:
            mount.driver.die_in(Opcode.FSYNCDIR, after=False)
            end(mount, "by the supervisor")
            mount.wait_lost()
        mount.counters()
        assert not mount.shim.said("unmounted")
        mount.next_driver()
        assert last_words(mount) == ""
        assert [request.op for request in mount.driver.log if request.op in LAST] == list(LAST)


@pytest.mark.parametrize("message", ["fail", "detach"])
def test_a_driver_that_will_not_come_is_not_waited_for(message):
    with used() as mount:
        mount.do("stat")
        mount.lose_driver()
        end(mount, "by the supervisor")
        mount.counters()
        assert not mount.shim.said("unmounted")
        mount.shim.send({"t": message})
        said = last_words(mount)
        assert said == "the driver died, and no other came, before it had saved everything" or message == "detach"


def test_a_driver_that_comes_and_is_refused_is_not_the_end():
    with used() as mount:
        mount.do("stat")
        mount.lose_driver()
        end(mount, "by the supervisor")
        mount.generation = 2
        mount.send_attach(lambda driver: None, max_write=4096)
        mount.shim.wait_for("refused", generation=2)
        mount.next_driver()
        assert last_words(mount) == ""


def test_a_connection_that_is_aborted_is_saved_too():
    with used() as mount:
        asked = threading.Event()
        mount.do("spill", "new", b"data")
        mount.driver.answers[Opcode.DESTROY] = lambda request: (asked.set(), b"")[1]
        mount.abort()
        assert last_words(mount) == ""
        assert asked.is_set()
