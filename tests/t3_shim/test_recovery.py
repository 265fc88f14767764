"""The driver dies and another one comes: programs see a pause, and each request has its effect exactly once."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

import pytest

from tests.t3_shim.program import StillWaiting
from tests.t3_shim.raw_driver import RawDriver
from tests.t3_shim.supervising import Mount, can_mount, mounted
from tests.t3_shim.tree import ROOT, Request
from udf.fuse import structs
from udf.fuse.opcodes import STILL_WORKING, Opcode
from udf.shim.replay import REPLAY, Replay

pytestmark = can_mount


def grow(driver: RawDriver) -> None:
    tree = driver.tree
    tree.file("file", b"0123456789" * 1000)
    tree.file("other", b"other")
    directory = tree.directory("d")
    tree.file("inner", b"inner", parent=directory.ino)
    tree.directory("empty")
    tree.add(ROOT, b"pointer", 0o120777, b"file")
    tree.nodes[2].xattrs[b"user.x"] = b"value"


def recovering(prepare=grow, **config):
    return mounted(prepare, **{"recover": True, "hide": False, **config})


# What a program does, the request that its driver dies over, and what must be true afterwards.
CHANGES = {
    "create": (("spill", "new", b"data"), Opcode.CREATE, lambda m: m.do("slurp", "new") == b"data"),
    "mkdir": (("mkdir", "new"), Opcode.MKDIR, lambda m: stat.S_ISDIR(m.do("stat", "new")["st_mode"])),
    "mknod": (("mkfifo", "new"), Opcode.MKNOD, lambda m: stat.S_ISFIFO(m.do("stat", "new")["st_mode"])),
    "symlink": (("symlinked", "new"), Opcode.SYMLINK, lambda m: stat.S_ISLNK(m.do("stat", "new")["st_mode"])),
    "link": (("link_to", "file", "new"), Opcode.LINK, lambda m: m.do("stat", "new")["st_nlink"] == 2),
    "unlink": (("unlink", "other"), Opcode.UNLINK, lambda m: m.fails("stat", "other") == errno.ENOENT),
    "rmdir": (("rmdir", "empty"), Opcode.RMDIR, lambda m: m.fails("stat", "empty") == errno.ENOENT),
    "rename": (
        ("rename_to", "other", "new"),
        Opcode.RENAME,
        lambda m: m.do("slurp", "new") == b"other" and m.fails("stat", "other") == errno.ENOENT,
    ),
    "rename over": (
        ("rename_to", "other", "file"),
        Opcode.RENAME,
        lambda m: m.do("slurp", "file") == b"other" and m.fails("stat", "other") == errno.ENOENT,
    ),
    "exchange": (
        ("renamed_2", "other", "file"),
        Opcode.RENAME2,
        lambda m: m.do("slurp", "file") == b"other" and len(m.do("slurp", "other")) == 10_000,
    ),
    "write": (("overwrite", "file", b"NEW"), Opcode.WRITE, lambda m: m.do("slurp", "file")[:3] == b"NEW"),
    "truncate": (("truncate", "file", 5), Opcode.SETATTR, lambda m: m.do("slurp", "file") == b"01234"),
    "chmod": (("chmod", "file", 0o600), Opcode.SETATTR, lambda m: m.do("stat", "file")["st_mode"] & 0o777 == 0o600),
    "setxattr": (
        ("setxattr", "file", "user.y", b"1"),
        Opcode.SETXATTR,
        lambda m: m.do("getxattr", "file", "user.y") == b"1",
    ),
    "create xattr": (
        ("setxattr", "file", "user.y", b"1", os.XATTR_CREATE),
        Opcode.SETXATTR,
        lambda m: m.do("getxattr", "file", "user.y") == b"1",
    ),
    "removexattr": (
        ("removexattr", "file", "user.x"),
        Opcode.REMOVEXATTR,
        lambda m: m.fails("getxattr", "file", "user.x") == errno.ENODATA,
    ),
    "fsync": (("fsync", "file"), Opcode.FSYNC, lambda m: True),
}
# Those that fail must fail in the same way when their driver dies over them.
FAILURES = {
    "create xattr that is there": (
        ("setxattr", "file", "user.x", b"value", os.XATTR_CREATE),
        Opcode.SETXATTR,
        errno.EEXIST,
    ),
    "remove xattr that is not there": (("removexattr", "file", "user.none"), Opcode.REMOVEXATTR, errno.ENODATA),
}
LOOKS = {
    "stat": (("stat", "d/inner"), Opcode.LOOKUP, lambda got: got["st_size"] == 5),
    "read": (("direct_read", "file", 4096, 0), Opcode.READ, lambda got: got == (b"0123456789" * 1000)[:4096]),
    "open": (("slurp", "other"), Opcode.OPEN, lambda got: got == b"other"),
    "readlink": (("readlink", "pointer"), Opcode.READLINK, lambda got: got == "file"),
    "list": (("names", "d"), Opcode.OPENDIR, lambda got: got == ["inner"]),
    "statfs": (("statfs", ""), Opcode.STATFS, lambda got: got == (1000, 600)),
    "getxattr": (("getxattr", "file", "user.x"), Opcode.GETXATTR, lambda got: got == b"value"),
    "listxattr": (("listxattr", "file"), Opcode.LISTXATTR, lambda got: got == ["user.x"]),
}
PLACES = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])


def does_while_drivers_die(mount: Mount, op: int, after: bool, call: str, name: str, *args: object) -> object:
    """Do something whose request kills the driver, and have the next one come."""
    mount.counters()  # what the shim asks at its start is asked
    mount.driver.die_in(op, after=after)
    mount.usual.start(call, mount.path(name), *args)
    mount.wait_lost()
    mount.next_driver()
    return mount.usual.wait()


@PLACES
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_takes_effect_exactly_once(what, after):
    (call, name, *args), op, holds = CHANGES[what]
    with recovering() as mount:
        does_while_drivers_die(mount, op, after, call, name, *args)
        assert holds(mount)
        assert mount.counters()["rebuilt"] == (after and REPLAY[op] is Replay.ONCE and what != "setxattr")


@PLACES
@pytest.mark.parametrize("what", FAILURES)
def test_a_change_that_fails_fails_in_the_same_way(what, after):
    (call, name, *args), op, number = FAILURES[what]
    with recovering() as mount, pytest.raises(OSError) as failure:
        does_while_drivers_die(mount, op, after, call, name, *args)
    assert failure.value.errno == number


@PLACES
@pytest.mark.parametrize("what", LOOKS)
def test_what_changes_nothing_is_asked_again(what, after):
    (call, name, *args), op, right = LOOKS[what]
    with recovering() as mount:
        assert right(does_while_drivers_die(mount, op, after, call, name, *args))


def test_every_opcode_has_its_replay_class():
    assert {int(op) for op in Opcode} == set(REPLAY)


# ---- nodes, handles, listings


def test_open_files_go_on_reading_and_writing():
    with recovering() as mount:
        fd = mount.do("open", "file", os.O_RDWR)
        deep = mount.do("open", "d/inner", os.O_RDONLY)
        mount.lose_driver()
        mount.next_driver()
        assert mount.usual.do("pwrite", fd, b"NEW", 0) == 3
        assert mount.usual.do("pread", deep, 10, 0) == b"inner"
        assert mount.tree.nodes[1002].data[:3] == b"NEW"
        mount.usual.do("close", fd)
        mount.usual.do("close", deep)


def test_programs_keep_the_inode_numbers_that_they_saw():
    with recovering(inodes="volatile") as mount:
        fd = mount.do("open", "d/inner", os.O_RDONLY)
        before = mount.usual.do("fstat", fd)["st_ino"]
        mount.lose_driver()

        def renumber(driver: RawDriver) -> None:
            driver.tree.valid = 0.0
            for node in driver.tree.nodes.values():
                node.ino = node.id

        mount.next_driver(renumber)
        mount.usual.do("drop_caches")
        assert mount.do("stat", "d/inner")["st_ino"] == before == mount.usual.do("fstat", fd)["st_ino"]
        mount.usual.do("close", fd)


def test_only_what_is_asked_for_is_looked_up_again():
    def many(driver: RawDriver) -> None:
        directory = driver.tree.directory("d")
        for number in range(300):
            driver.tree.file(f"f{number}", b"x", parent=directory.ino)

    with recovering(many) as mount:
        mount.do("walk")
        mount.lose_driver()
        mount.next_driver()
        mount.do("direct_read", "d/f7")
        assert mount.driver.count(Opcode.LOOKUP) == 2
        assert mount.counters()["resolved"] == 2


def test_both_names_of_a_file_stay_one_file():
    with recovering() as mount:
        mount.do("link_to", "file", "second")
        fd = mount.do("open", "file", os.O_RDWR)
        mount.lose_driver()
        mount.next_driver(lambda driver: setattr(driver.tree, "valid", 0.0))
        mount.usual.do("drop_caches")
        number = mount.do("stat", "second")["st_ino"]
        assert mount.usual.do("fstat", fd)["st_ino"] == number == mount.do("stat", "file")["st_ino"]
        mount.usual.do("pwrite", fd, b"NEW", 0)
        assert mount.do("slurp", "second")[:3] == b"NEW"


@pytest.mark.parametrize("change", ["inode number", "generation", "type", "gone"])
def test_an_open_file_is_never_another_file(change):
    def replace(driver: RawDriver) -> None:
        node = driver.tree.nodes[1002]
        if change == "inode number":
            node.ino += 5000
        elif change == "generation":
            node.generation += 1
        elif change == "type":
            node.mode = stat.S_IFIFO | 0o644
        else:
            del driver.tree.nodes[ROOT].children[b"file"]

    with recovering() as mount:
        fd = mount.do("open", "file", os.O_RDWR)
        mount.lose_driver()
        mount.next_driver(replace)
        assert mount.usual.fails("pwrite", fd, b"NEW", 0) == errno.ESTALE
        assert mount.usual.fails("close", fd) == errno.ESTALE  # what was not flushed cannot be
        assert mount.tree.nodes[1002].data[:3] == b"012"


def test_a_listing_goes_on_where_it_was():
    def many(driver: RawDriver) -> None:
        for number in range(3000):
            driver.tree.file(f"a_name_of_some_length_{number:06}", b"")

    with recovering(many) as mount:
        fd = mount.do("open", "", os.O_RDONLY | os.O_DIRECTORY)
        names = mount.usual.do("entries", fd)
        mount.lose_driver()

        def shuffle(driver: RawDriver) -> None:
            children = driver.tree.nodes[ROOT].children
            driver.tree.nodes[ROOT].children = dict(reversed(children.items()))

        mount.next_driver(shuffle)
        while more := mount.usual.do("entries", fd):
            names += more
        names = [name for name in names if name not in (".", "..")]
        mount.usual.do("close", fd)
        assert len(names) == len(set(names)) == 3000


# ---- unlinked but open


@pytest.mark.parametrize("links", [True, False], ids=["by link", "by rename"])
def test_a_removed_file_that_is_open_outlives_its_driver(links):
    def prepare(driver: RawDriver) -> None:
        grow(driver)
        if not links:
            driver.answers[Opcode.LINK] = lambda request: errno.EPERM

    with recovering(prepare, hide=True) as mount:
        fd = mount.do("open", "other", os.O_RDWR)
        assert mount.usual.do("pwrite", fd, b"kept!", 0) == 5
        mount.do("unlink", "other")
        assert mount.fails("stat", "other") == errno.ENOENT
        assert mount.usual.do("fstat", fd)["st_nlink"] == 0
        assert not [name for name in mount.do("names", "") if name.startswith(".udf")]
        for _ in range(2):
            mount.lose_driver()
            mount.next_driver()
            assert mount.usual.do("pread", fd, 10, 0) == b"kept!"
        mount.do("rmdir", "empty")
        mount.usual.do("close", fd)
        mount.driver.wait_until(lambda: not [n for n in mount.tree.nodes[ROOT].children if n.startswith(b".udf")])
        assert not [name for name in mount.tree.nodes[ROOT].children if name.startswith(b".udf")]


@PLACES
@pytest.mark.parametrize("op", [Opcode.LINK, Opcode.UNLINK])
def test_a_driver_may_die_while_a_removed_file_is_hidden(op, after):
    with recovering(hide=True) as mount:
        fd = mount.do("open", "other", os.O_RDWR)
        does_while_drivers_die(mount, op, after, "unlink", "other")
        assert mount.usual.do("pread", fd, 10, 0) == b"other"
        assert mount.fails("stat", "other") == errno.ENOENT
        mount.usual.do("close", fd)
        mount.driver.wait_until(lambda: not [n for n in mount.tree.nodes[ROOT].children if n.startswith(b".udf")])
        assert sorted(mount.tree.nodes[ROOT].children) == [b"d", b"empty", b"file", b"pointer"]


def test_a_file_that_is_replaced_while_open_is_kept():
    with recovering(hide=True) as mount:
        fd = mount.do("open", "other", os.O_RDONLY)
        mount.do("rename_to", "file", "other")
        mount.lose_driver()
        mount.next_driver()
        assert mount.usual.do("pread", fd, 10, 0) == b"other"
        assert mount.do("slurp", "other")[:5] == b"01234"
        mount.usual.do("close", fd)


def test_what_a_killed_shim_has_left_is_removed_by_the_next():
    def leave(driver: RawDriver) -> None:
        grow(driver)
        driver.tree.file(LEFT.decode(), b"old")
        driver.tree.file(".udf-hidden-00000000-00000000-4194000-1-5", b"another machine's")

    from udf.shim.hiding import HIDDEN_NAME, _owner

    machine, boot, _, _ = _owner(os.getpid()).split("-")
    LEFT = HIDDEN_NAME + f"{machine}-{boot}-4194000-1-7".encode()
    with recovering(leave, hide=True) as mount:
        mount.driver.wait_until(lambda: LEFT not in mount.tree.nodes[ROOT].children)
        assert [name for name in mount.tree.nodes[ROOT].children if name.startswith(b".udf")] == [
            b".udf-hidden-00000000-00000000-4194000-1-5"
        ]


def test_what_another_machine_has_left_on_a_stick_is_removed():
    """A stick that was pulled out for good while a removed file was open kept that file for ever, unseen."""
    left = b".udf-hidden-00000000-00000000-4194000-1-5"

    def leave(driver: RawDriver) -> None:
        grow(driver)
        driver.tree.file(left.decode(), b"another machine's")
        driver.tree.file(".udf-hidden-letters", b"somebody's own")

    with recovering(leave, hide=True, exclusive=True) as mount:
        mount.driver.wait_until(lambda: left not in mount.tree.nodes[ROOT].children)
        assert b".udf-hidden-letters" in mount.tree.nodes[ROOT].children


# ---- while there is none


def test_what_was_used_before_is_there_without_a_driver():
    with recovering(lambda driver: (grow(driver), setattr(driver.tree, "valid", 0.05))) as mount:
        mount.do("slurp", "file")
        mount.do("scan", "d")
        mount.fails("getxattr", "file", "user.none")
        mount.lose_driver()
        trips = mount.counters()["driver_round_trips"]
        assert mount.do("slurp", "file") == b"0123456789" * 1000
        assert mount.do("scan", "d")["inner"] == 5
        assert mount.fails("getxattr", "file", "user.none") == errno.ENODATA
        assert mount.do("statfs") == (1000, 600)
        assert mount.do("stat", "d")["st_nlink"] == 2
        assert mount.counters()["driver_round_trips"] == trips
        mount.next_driver()


def test_a_file_that_was_written_to_has_no_old_size_without_a_driver():
    """It used to be answered from the attributes of before the write, and the kernel then cut the file's pages."""
    with recovering() as mount:
        fd = mount.do("open", "other", os.O_RDWR)
        mount.usual.do("fstat", fd)
        mount.usual.do("pwrite", fd, b"x" * 1000, 0)
        mount.lose_driver()
        mount.usual.start("fstat", fd)
        (request,) = what_waits(mount)
        assert (request["op"], request["path"]) == ("GETATTR", "/other")
        mount.next_driver()
        assert mount.usual.wait()["st_size"] == 1000
        assert mount.usual.do("pread", fd, 2000, 0) == b"x" * 1000
        mount.usual.do("close", fd)


def what_waits(mount: Mount) -> list[dict[str, object]]:
    """What the shim says is waiting, as soon as something is."""
    for number in range(1000, 10_000):
        mount.shim.send({"t": "requests", "id": number})
        requests = mount.shim.wait_for("requests", id=number)["requests"]
        if requests:
            return requests
    raise AssertionError("nothing waits")


def test_nothing_is_remembered_of_files_that_are_gone():
    """The shim used to grow by half a kilobyte for each of thousands of files that came and went."""
    with recovering() as mount:
        for number in range(30):
            mount.do("spill", f"new{number}", b"x")
            mount.fails("getxattr", f"new{number}", "user.none")
            mount.do("unlink", f"new{number}")
        mount.do("getxattr", "file", "user.x")
        mount.usual.do("drop_caches")
        assert mount.counters()["remembered"] <= 2, "the root, and what the kernel holds still"


def test_a_request_that_waits_ends_with_its_caller():
    with recovering() as mount:
        mount.do("stat")
        mount.lose_driver()
        other = mount.program()
        other.start("stat", mount.path("d/inner"))
        (request,) = what_waits(mount)
        assert (request["op"], request["pid"], request["parked"]) == ("LOOKUP", other.pid, True)
        assert request["path"] == "/d"
        other.signal(9)
        assert other.ended()
        mount.next_driver()


def test_a_request_can_be_aborted():
    with recovering() as mount:
        mount.lose_driver()
        mount.usual.start("stat", mount.path("d"))
        mount.shim.send({"t": "abort", "request": what_waits(mount)[0]["id"]})
        with pytest.raises(OSError) as failure:
            mount.usual.wait()
        assert failure.value.errno == errno.EIO
        mount.next_driver()


def test_nobody_waits_longer_than_the_mount_is_patient():
    with recovering(patience=0.5) as mount:
        mount.lose_driver()
        assert mount.fails("stat", "d/inner") == errno.EIO
        mount.next_driver()
        assert mount.do("stat", "d/inner")["st_size"] == 5


def test_without_a_next_driver_everything_fails_until_there_is_one():
    with recovering() as mount:
        fd = mount.do("open", "file", os.O_RDWR)
        mount.lose_driver()
        mount.usual.start("stat", mount.path("d/inner"))
        mount.shim.send({"t": "fail", "text": "quarantine"})
        with pytest.raises(OSError) as failure:
            mount.usual.wait()
        assert failure.value.errno == errno.EIO
        assert mount.fails("stat", "d/inner") == errno.EIO
        mount.next_driver()
        assert mount.do("stat", "d/inner")["st_size"] == 5
        assert mount.usual.do("pwrite", fd, b"NEW", 0) == 3


def test_a_detach_after_a_detach_or_a_failure_changes_only_the_answer():
    with recovering() as mount:
        mount.lose_driver()
        mount.shim.send({"t": "fail", "text": "quarantine"})
        assert mount.fails("stat", "d/inner") == errno.EIO
        for _ in range(2):
            mount.shim.send({"t": "detach"})
            mount.counters()
            assert mount.fails("stat", "d/inner") == errno.ENODEV
        mount.next_driver()
        mount.lose_driver()
        mount.usual.start("stat", mount.path("d/inner"))  # and the next loss is one like any other
        mount.next_driver()
        assert mount.usual.wait()["st_size"] == 5


def test_a_driver_that_lacks_what_was_promised_is_refused():
    with recovering() as mount:
        mount.lose_driver()
        mount.generation = 2
        mount.send_attach(lambda driver: None, max_write=4096)
        assert "writes of" in mount.shim.wait_for("refused", generation=2)["error"]
        mount.next_driver()
        assert mount.do("stat", "d/inner")["st_size"] == 5


def test_a_driver_that_was_refused_costs_nothing_when_it_ends():
    """Its closed link used to wake the shim again and again until the next driver came."""
    with recovering() as mount:
        mount.lose_driver()
        mount.generation = 2
        mount.send_attach(lambda driver: None, max_write=4096)
        mount.shim.wait_for("refused", generation=2)
        mount.driver.stop()
        before = cpu_seconds(mount.shim.process.pid)
        mount.shim.wait_for_count("heartbeat", len(mount.shim.said("heartbeat")) + 1)
        assert cpu_seconds(mount.shim.process.pid) - before < 0.3
        mount.next_driver()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_change_that_waits_is_let_go_of_but_not_once_the_driver_has_it():
    with recovering() as mount:
        mount.do("stat")
        mount.lose_driver()
        other = mount.program()
        other.start("interruptible_mkdir", mount.path("new"))
        what_waits(mount)
        other.signal(10)  # SIGUSR1, which it handles
        assert other.wait() == errno.EINTR
        mount.next_driver()
        assert mount.fails("stat", "new") == errno.ENOENT


def test_a_driver_that_dies_before_it_answers_is_refused():
    with recovering() as mount:
        mount.lose_driver()
        mount.generation = 2
        mount.send_attach(lambda driver: driver.die_in(Opcode.INIT, after=False))
        mount.shim.wait_for("refused", generation=2)
        mount.next_driver()
        assert mount.do("stat", "d/inner")["st_size"] == 5


# ---- drivers that kill themselves, or hang


def test_a_request_at_which_drivers_die_is_found_and_the_rest_goes_on():
    def poison(request: Request, driver: RawDriver):
        if request.op == Opcode.LOOKUP and request.names()[0] == b"poison":
            driver.die()
            return None
        return driver.usual(request)

    def spoil(driver: RawDriver) -> None:
        driver.answers[Opcode.LOOKUP] = lambda request: poison(request, driver)

    with recovering(lambda driver: (grow(driver), spoil(driver))) as mount:
        mount.counters()
        mount.usual.start("stat", mount.path("poison"))
        for _ in range(2):
            mount.wait_lost()
            mount.next_driver(spoil, counted=True)
        with pytest.raises(OSError) as failure:
            mount.usual.wait()
        assert failure.value.errno == errno.EIO
        assert mount.shim.wait_for("poison") == {"t": "poison", "op": "LOOKUP", "path": "/poison"}
        assert mount.do("stat", "d/inner")["st_size"] == 5
        assert not mount.shim.said("link_lost")[2:]


def test_of_several_suspects_the_one_is_found_and_the_others_are_served():
    """All three are under way at two deaths, so each is tried alone; only then it shows which one kills."""

    generations: list[RawDriver] = []

    def spoil(driver: RawDriver) -> None:
        generations.append(driver)
        alone = len(generations) > 2

        def look(request: Request):
            name = request.names()[0]
            if name == b"poison" and (alone or sum(r.op == Opcode.LOOKUP for r in driver.unanswered) == 2):
                driver.die()
                return None
            return None if name.startswith((b"slow", b"poison")) and not alone else driver.usual(request)

        driver.answers[Opcode.LOOKUP] = look

    def prepare(driver: RawDriver) -> None:
        grow(driver)
        driver.tree.file("slow1", b"1")
        driver.tree.file("slow2", b"2")
        spoil(driver)

    with recovering(prepare) as mount:
        mount.counters()
        slow = [mount.program() for _ in range(2)]
        for number, program in enumerate(slow, 1):
            program.start("stat", mount.path(f"slow{number}"))
        mount.driver.wait_until(lambda: sum(r.op == Opcode.LOOKUP for r in mount.driver.unanswered) == 2)
        mount.usual.start("stat", mount.path("poison"))
        for _ in range(2):
            mount.wait_lost()
            mount.next_driver(spoil, counted=True)
        for program in slow:
            assert program.wait()["st_size"] == 1
        mount.wait_lost()
        mount.next_driver(spoil, counted=True)
        with pytest.raises(OSError) as failure:
            mount.usual.wait()
        assert failure.value.errno == errno.EIO
        assert mount.shim.wait_for("poison")["path"] == "/poison"
        assert mount.do("stat", "d/inner")["st_size"] == 5


def test_deaths_that_the_driver_did_not_cause_make_nothing_suspect():
    with recovering() as mount:
        mount.counters()
        for _ in range(4):
            mount.driver.hold(Opcode.LOOKUP)
            if mount.generation == 1:
                mount.usual.start("stat", mount.path("d/inner"))
            mount.driver.wait_for(Opcode.LOOKUP)
            mount.lose_driver()
            mount.next_driver(lambda driver: driver.hold(Opcode.LOOKUP) if mount.generation < 5 else None)
        assert mount.usual.wait()["st_size"] == 5


def test_a_driver_that_does_not_answer_in_time_is_reported_and_its_request_asked_again():
    with recovering(deadline=1.5) as mount:
        mount.counters()
        mount.driver.hold(Opcode.LOOKUP)
        mount.usual.start("stat", mount.path("d/inner"))
        assert mount.shim.wait_for("overdue")["op"] == "LOOKUP"
        mount.lose_driver()
        mount.next_driver(counted=True)
        assert mount.usual.wait()["st_size"] == 5
        assert len(mount.shim.said("overdue")) == 1


def say_still_working(mount: Mount, op: int) -> None:
    body = op.to_bytes(4, "little")
    mount.driver.send(structs.OUT_HEADER.pack(structs.OUT_HEADER.size + len(body), STILL_WORKING, 0) + body)


def test_a_driver_that_gets_on_slowly_does_not_hang():
    with recovering(deadline=2.0) as mount:
        mount.counters()
        mount.driver.hold(Opcode.LOOKUP)
        mount.usual.start("stat", mount.path("d/inner"))
        mount.driver.wait_for(Opcode.LOOKUP)
        for _ in range(6):
            with pytest.raises(StillWaiting):
                mount.usual.wait(0.4)
            say_still_working(mount, Opcode.LOOKUP)
        mount.driver.answer_late()
        assert mount.usual.wait()["st_size"] == 5
        assert not mount.shim.said("overdue")


@pytest.mark.parametrize("op", [Opcode.LOOKUP, Opcode.READ])
def test_it_must_be_that_kind_of_request_and_end_some_time(op):
    with recovering(deadline=0.1) as mount:
        mount.counters()
        mount.driver.hold(Opcode.LOOKUP)
        mount.usual.start("stat", mount.path("d/inner"))
        mount.driver.wait_for(Opcode.LOOKUP)
        while not mount.shim.said("overdue"):
            say_still_working(mount, op)
            with contextlib.suppress(StillWaiting, OSError):
                mount.usual.wait(0.02)
        assert mount.shim.wait_for("overdue")["op"] == "LOOKUP"
        mount.driver.answer_late()


def test_should_nobody_replace_a_driver_that_hangs_its_programs_do_not_wait_for_ever():
    with recovering(deadline=0.3) as mount:
        mount.counters()
        mount.driver.hold(Opcode.LOOKUP)
        assert mount.fails("stat", "d/inner") == errno.ETIMEDOUT
        mount.driver.answer_late()


def test_the_crash_report_has_the_last_operations():
    with recovering() as mount:
        mount.do("slurp", "d/inner")
        recent = mount.lose_driver()["recent"]
        assert "OPEN /d/inner" in recent
        assert len(recent) <= 50
        mount.next_driver()


# ---- ids that outlive the driver


def test_ids_that_outlive_the_driver_are_used_as_they_are():
    def same(driver: RawDriver) -> None:
        driver.take_tree(tree)

    with recovering(stable_nodes=True) as mount:
        tree = mount.tree
        fd = mount.do("open", "other", os.O_RDWR)
        mount.do("unlink", "other")
        mount.lose_driver()
        mount.next_driver(same)
        assert mount.usual.do("pread", fd, 10, 0) == b"other"
        assert mount.driver.count(Opcode.LOOKUP) == 0
        mount.usual.do("close", fd)
        mount.driver.wait_until(lambda: mount.driver.count(Opcode.FORGET, Opcode.BATCH_FORGET) > 0)
        mount.lose_driver()
        mount.next_driver(same)
        mount.driver.wait_until(lambda: mount.driver.count(Opcode.FORGET, Opcode.BATCH_FORGET) > 0)
        assert mount.driver.count(Opcode.FORGET, Opcode.BATCH_FORGET) > 0, "it may have died before it heard"
        assert tree.nodes[3].lookups < 0


def test_look_ups_balance_after_many_generations():
    with recovering() as mount:
        for _ in range(5):
            mount.do("walk")
            mount.do("slurp", "d/inner")
            mount.lose_driver()
            mount.next_driver()
        mount.do("walk")
        mount.usual.do("drop_caches")
        mount.driver.wait_until(lambda: mount.tree.lookups() == 0)
        assert mount.counters()["driver_lookups"] == mount.tree.lookups()
        assert not mount.tree.unknown_forgets


def test_what_a_look_has_counted_is_given_back_before_the_file_can_lose_its_name():
    """The FORGET used to follow the RMDIR: a driver that counts its own lookups dropped a directory that was open."""
    with recovering(stable_nodes=True) as mount:
        tree = mount.tree
        fd = mount.do("open", "empty", os.O_RDONLY | os.O_DIRECTORY)
        mount.counters()
        mount.driver.die_in(Opcode.RMDIR, after=False)
        mount.usual.start("rmdir", mount.path("empty"))
        mount.wait_lost()
        mount.next_driver(lambda driver: driver.take_tree(tree))
        mount.usual.wait()
        asked = [request.op for request in mount.driver.log]
        between = asked[asked.index(Opcode.LOOKUP) + 1 : asked.index(Opcode.RMDIR)]
        assert {Opcode.FORGET, Opcode.BATCH_FORGET} & set(between)
        mount.usual.do("close", fd)


# ---- directories without a name


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_directory_that_was_removed_while_open_is_still_known_to_who_has_it_open(after):
    """fstat(2) used to fail with ESTALE once the driver had died, because no name leads to such a directory."""
    with recovering() as mount:
        fd = mount.do("open", "empty", os.O_RDONLY | os.O_DIRECTORY)
        does_while_drivers_die(mount, Opcode.RMDIR, after, "rmdir", "empty")
        for _ in range(2):
            there = mount.usual.do("fstat", fd)
            assert (stat.S_ISDIR(there["st_mode"]), there["st_nlink"]) == (True, 0)
            mount.lose_driver()
            mount.next_driver()
        mount.usual.do("close", fd)


def test_a_driver_that_knows_directories_by_their_names_only_makes_no_difference():
    """It removes what it has never opened, and knows it no more: programs used to be told its ESTALE."""
    with recovering() as mount:
        fd = mount.do("open", "empty", os.O_RDONLY | os.O_DIRECTORY)
        mount.lose_driver()
        mount.next_driver()
        mount.do("stat", "empty")
        mount.do("rmdir", "empty")
        mount.driver.answers[Opcode.GETATTR] = lambda request: errno.ESTALE
        there = mount.usual.do("fstat", fd)
        assert (stat.S_ISDIR(there["st_mode"]), there["st_nlink"]) == (True, 0)
        assert mount.fails("stat", "") == errno.ESTALE, "the root has not been removed"
        del mount.driver.answers[Opcode.GETATTR]
        mount.usual.do("close", fd)
