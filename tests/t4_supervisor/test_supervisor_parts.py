"""The small parts: options, output, environment, sockets and locks, path checks, sd_notify, drivers by command."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from real import PATIENCE

from udf.errors import UserError
from udf.manifest.check import MOUNT_WORDS
from udf.supervisor import catalog, logs, options, output, pathcheck, paths, sockets, spawn, unplugged
from udf.supervisor.client import Connection, NoSupervisorError, find_daemon, supervisors
from udf.supervisor.notify import Notifier
from udf.supervisor.options import MountOptions
from udf.supervisor.spawn import Identity

PACKAGING = Path(__file__).resolve().parents[2] / "packaging" / "systemd"

# ---- options


def test_our_options_are_taken_and_the_others_are_the_drivers() -> None:
    ours, drivers = options.split({"ro": "", "suid": "", "max_read": "65536", "size": "64M", "x-systemd.automount": ""})
    assert ours == MountOptions(read_only=True, nosuid=False, max_read=65536)
    assert drivers == {"size": "64M"}


def test_a_spare_and_the_patience_of_requests_are_asked_for() -> None:
    assert options.split({"spare": "", "patience": "5"}) == (MountOptions(spare=True, patience=5.0), {})
    assert options.split({"spare": "1"})[0].spare
    assert not options.split({"spare": "0"})[0].spare


@pytest.mark.parametrize(
    ("given_options", "wait", "max_stale", "grace"),
    [
        ({}, 0, 30, 30),
        ({"on_unplug": "fail"}, 0, 30, 30),
        ({"on_unplug": "wait:5s"}, 5, 30, 30),
        ({"on_unplug": "wait:5"}, 5, 30, 30),
        ({"on_unplug": "wait:60s"}, 60, 60, 60),
        ({"grace": "10"}, 0, 10, 10),
        ({"grace": "0"}, 0, 0, 0),
        ({"max_stale": "0"}, 0, 0, 30),
        ({"on_unplug": "wait:2", "max_stale": "1.5s", "grace": "90s"}, 2, 1.5, 90),
    ],
)
def test_what_is_said_of_an_unplug_decides_what_is_not(
    given_options: dict[str, str], wait: float, max_stale: float, grace: float
) -> None:
    ours, drivers = options.split(given_options)
    assert (ours.on_unplug_wait, ours.max_stale, ours.grace, drivers) == (wait, max_stale, grace, {})


def test_what_fstab_says_for_others_is_skipped() -> None:
    assert options.split({"defaults": "", "noauto": "", "_netdev": "", "comment": "x", "rw": ""}) == (
        MountOptions(),
        {},
    )


@pytest.mark.parametrize(
    ("given_options", "words"),
    [
        ({"ro": "1"}, "takes no value"),
        ({"ro": "", "rw": ""}, "contradict"),
        ({"max_read": ""}, "not a number"),
        ({"max_read": "-4096"}, "not a number"),
        ({"max_read": "1"}, "not a number"),
        ({"fsname": ""}, "printable"),
        ({"fsname": "a\nb"}, "printable"),
        ({"deadline": "nan"}, "not a number"),
        ({"deadline": "0"}, "not a number"),
        ({"deadline": "soon"}, "not a number"),
        ({"patience": "-1"}, "patience=-1 is not a number"),
        ({"spare": "2"}, "neither spare=1 nor spare=0"),
        ({"on_unplug": ""}, "neither on_unplug=fail nor on_unplug=wait:SECONDS"),
        ({"on_unplug": "wait"}, "neither on_unplug=fail nor on_unplug=wait:SECONDS"),
        ({"on_unplug": "wait:"}, "on_unplug=wait: is not a number of seconds from 0.1 to 3600"),
        ({"on_unplug": "wait:0"}, "on_unplug=wait:0 is not a number"),
        ({"on_unplug": "wait:30m"}, "on_unplug=wait:30m is not a number"),
        ({"on_unplug": "wait:nan"}, "not a number"),
        ({"grace": "-1"}, "grace=-1 is not a number of seconds from 0 to 3600"),
        ({"max_stale": "inf"}, "max_stale=inf is not a number"),
        ({"on_unplug": "wait:30", "grace": "20"}, "on_unplug=wait:30 is longer than grace=20"),
        ({"on_unplug": "wait:1", "grace": "0"}, "give a longer grace"),
        ({"max_stale": "60"}, "max_stale=60 is longer than the 30 s"),
        ({"x" * 5000: ""}, "too long"),
        ({str(n): "" for n in range(300)}, "more than 200 options"),
    ],
)
def test_a_wrong_option_is_refused_in_one_sentence(given_options: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        options.split(given_options)
    assert "\n" not in str(caught.value)


@given(st.dictionaries(st.text(max_size=12), st.text(max_size=12) | st.just(""), max_size=5))
def test_any_options_are_split_or_refused(given_options: dict[str, str]) -> None:
    try:
        options.split(given_options)
    except UserError:
        pass


def test_a_manifest_cannot_declare_what_a_mount_understands() -> None:
    taken = {*options._FLAGS, "max_read", "fsname", "deadline", "patience", "spare", "on_unplug", "max_stale", "grace"}
    assert taken <= MOUNT_WORDS <= taken | options._IGNORED


def test_a_foreign_program_adds_options_and_gains_no_rights() -> None:
    asked = {"fsname": "mine"}
    merged = options.merge_foreign(
        MountOptions(fsname="mine"),
        {"ro": True, "suid": True, "dev": True, "fsname": "theirs", "allow_other": True, "max_read": "99999999"},
        asked,
    )
    assert merged == MountOptions(read_only=True, allow_other=True, fsname="mine")
    assert not options.merge_foreign(MountOptions(), {"ro": True}, {"rw": ""}).read_only


# ---- output


async def print_through(name: str, data: bytes) -> output.Output:
    out = output.Output(name)
    write_end = os.dup(out.write_end)
    out.started()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(out.read)
        await trio.to_thread.run_sync(_write, write_end, data)
    return out


def _write(write_end: int, data: bytes) -> None:
    with open(write_end, "wb") as file:
        file.write(data)


async def test_what_a_driver_prints_is_logged_with_its_name(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "udf.output")
    out = await print_through("d", b"one\ntwo\n\nthree")
    assert [record.getMessage() for record in caplog.records] == ["d: one", "d: two", "d: three"]
    assert out.last_line == "three"


async def test_what_a_driver_prints_cannot_steer_a_terminal_or_forge_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "udf.output")
    await print_through("d", b"\x1b[2J\rforged\xff\xfe\n" + b"x" * 5000 + b"\n")
    first, second = (record.getMessage() for record in caplog.records)
    assert first == r"d: \x1b[2J\x0dforged\xff\xfe"
    assert len(second) <= output.MAX_LINE + 3


async def test_a_flood_is_counted_and_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "udf.output")
    began = trio.current_time()
    with trio.fail_after(PATIENCE):
        out = await print_through("d", b"spam\n" * 200_000 + b"the last words\n")
    assert len(caplog.records) < 1.5 * output.BURST + 2 * output.RATE * (trio.current_time() - began)
    assert out.last_line == "the last words"
    counted = sum(int(r.getMessage().split("(")[1].split()[0]) for r in caplog.records if "more were" in r.getMessage())
    logged = len([r for r in caplog.records if "more were" not in r.getMessage()])
    assert counted + logged == 200_001


async def test_a_line_without_end_uses_no_memory(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "udf.output")
    with trio.fail_after(PATIENCE):
        await print_through("d", b"x" * 3_000_000)
    assert all(len(record.getMessage()) < 1100 for record in caplog.records)


# ---- processes


def test_a_daemons_environment_is_not_the_drivers() -> None:
    environment = {"SECRET": "x", "LANG": "C", "LC_ALL": "C", "NOTIFY_SOCKET": "/n", "PYTHONPATH": "/evil"}
    found = spawn.daemon_environment(environment, "/home/x", "x")
    assert {key: found[key] for key in ("LANG", "LC_ALL", "HOME", "USER")} == {
        "LANG": "C",
        "LC_ALL": "C",
        "HOME": "/home/x",
        "USER": "x",
    }
    assert not {"SECRET", "NOTIFY_SOCKET", "PYTHONPATH"} & set(found)


def test_a_private_environment_is_the_users_without_what_is_meant_for_us() -> None:
    environment = {"SSH_AUTH_SOCK": "/s", "NOTIFY_SOCKET": "/n", "PYTHONSTARTUP": "/x", "LD_PRELOAD": "/y"}
    assert spawn.private_environment(environment) == {"SSH_AUTH_SOCK": "/s"}


async def test_a_child_is_ended_by_term_or_by_kill_and_reaped(nursery: trio.Nursery) -> None:
    for ignore, signalled in ((False, signal.SIGTERM), (True, signal.SIGKILL)):
        program = "import signal,sys,time\n"
        program += "signal.signal(15, signal.SIG_IGN)\n" if ignore else ""
        program += "print('up', flush=True); time.sleep(1000)"
        popen = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert popen.stdout
        await trio.to_thread.run_sync(popen.stdout.readline)
        child = spawn.Child(popen)
        nursery.start_soon(child.watch)
        assert await child.end(0.3)
        popen.stdout.close()
        assert child.status == -signalled
        assert child.how() == f"was ended by {signalled.name}"
        child.signal(signal.SIGTERM)  # harmless now


# ---- sockets and locks


def test_a_lock_is_held_once_and_free_again_when_released(tmp_path: Path) -> None:
    lock = sockets.Lock.take(tmp_path / "lock", b"/note")
    assert lock
    assert sockets.Lock.take(tmp_path / "lock") is None
    assert sockets.Lock.holder(tmp_path / "lock") == str(os.getpid())
    lock.release()
    lock.release()
    assert not (tmp_path / "lock").exists()


def test_a_dead_holders_lock_is_free_and_its_note_is_told(own_rundir: Path) -> None:
    sockets.make_directory(own_rundir / "locks")
    path = own_rundir / "locks" / "x.lock"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys,time\nfrom pathlib import Path\nfrom udf.supervisor import sockets\n"
            "sockets.Lock.take(Path(sys.argv[1]), b'/left/behind')\nprint(flush=True)\ntime.sleep(1000)",
            str(path),
        ],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": str(PACKAGING.parents[1])},
    )
    assert holder.stdout
    holder.stdout.readline()
    assert sockets.abandoned_mountpoints() == []
    holder.kill()
    holder.communicate()
    ((mountpoint, lock),) = sockets.abandoned_mountpoints()
    assert mountpoint == "/left/behind"
    lock.release()
    assert sockets.abandoned_mountpoints() == []


def test_a_socket_is_replaced_when_its_supervisor_is_dead_and_only_then(tmp_path: Path) -> None:
    first = sockets.ControlSocket.bind(tmp_path / "s")
    with pytest.raises(UserError, match=f"process {os.getpid()}\\) already listens on"):
        sockets.ControlSocket.bind(tmp_path / "s")
    first.sock.close()  # as if it had died: the name stays, the lock goes
    first._lock.release()
    second = sockets.ControlSocket.bind(tmp_path / "s")
    second.remove()
    assert os.listdir(tmp_path) == []


def test_a_socket_in_a_directory_that_others_can_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UserError, match="can be written by others"):
        sockets.ControlSocket.bind(tmp_path / "open" / "s")


def test_a_socket_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too long"):
        sockets.ControlSocket.bind(tmp_path / ("x" * 200))


def test_nobody_there_is_none_by_default_and_an_error_when_asked_for(tmp_path: Path) -> None:
    assert find_daemon() is None
    assert list(supervisors()) == []
    with pytest.raises(NoSupervisorError, match="start `udf daemon`"):
        find_daemon(tmp_path / "nothing")


def test_the_client_says_so_when_it_is_not_varlink(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()

        def answer() -> None:
            connection, _ = listening.accept()
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 400\r\n\r\n\0")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(UserError, match="does not speak Varlink"):
            Connection(tmp_path / "s")
        thread.join()


def test_a_private_supervisor_that_ends_while_it_is_greeted_is_not_there(own_rundir: Path) -> None:
    """Whoever asked for the mounts of all supervisors was told that this one had closed the connection."""
    socket_, lock_ = (sockets.private_directory() / f"m.sock{end}" for end in ("", ".lock"))
    sockets.make_directory(own_rundir)
    sockets.make_directory(socket_.parent)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import socket,sys\nfrom pathlib import Path\nfrom udf.supervisor import sockets\n"
            "sockets.Lock.take(Path(sys.argv[2]))\nlistening = socket.socket(socket.AF_UNIX)\n"
            "listening.bind(sys.argv[1])\nlistening.listen()\nprint(flush=True)\n"
            "connection, _ = listening.accept()\nconnection.recv(1)",
            str(socket_),
            str(lock_),
        ],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": str(PACKAGING.parents[1])},
    )
    assert holder.stdout
    holder.stdout.readline()
    assert sockets.private_sockets() == [socket_]
    assert list(supervisors()) == []
    holder.communicate()
    assert sockets.private_sockets() == []


# ---- paths


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.mkdir()
    return path


def refusal(mountpoint: Path, source: Path | None = None, kind: str = "none", nonempty: bool = False) -> str:
    return str(pathcheck.check(str(mountpoint), str(source) if source else None, kind, nonempty).get("refused", ""))


def test_a_mountpoint_must_be_an_empty_directory(target: Path, tmp_path: Path) -> None:
    assert refusal(target) == ""
    assert "does not exist" in refusal(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    assert "is not a directory" in refusal(tmp_path / "file")
    assert "cannot be used: Not a directory" in refusal(tmp_path / "file" / "below")
    (target / "x").write_text("")
    assert "is not empty" in refusal(target)
    assert refusal(target, nonempty=True) == ""
    assert "is a mountpoint already (proc)" in refusal(Path("/proc"))


def test_a_mountpoint_is_told_by_its_real_path(target: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(target)
    assert pathcheck.check(str(tmp_path / "link"), None, "none", False)["mountpoint"] == str(target)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("directory", "is not a directory"), ("file", ""), ("device", "is not a device"), ("any", ""), ("url", "")],
)
def test_a_source_must_be_of_the_kind_that_the_driver_serves(
    target: Path, tmp_path: Path, kind: str, words: str
) -> None:
    (tmp_path / "file").write_text("")
    found = refusal(target, tmp_path / "file", kind)
    assert words in found
    assert bool(words) == bool(found)


def test_a_source_that_does_not_exist_is_refused_unless_it_need_not_be_a_path(target: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert f"the source {missing} does not exist" in refusal(target, missing, "file")
    assert refusal(target, missing, "any") == ""


async def test_a_path_that_hangs_does_not_hang_us(
    target: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "python").write_text("#!/bin/sh\nexec sleep 1000\n")
    (fake / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake / "python"))
    monkeypatch.setattr(paths, "CHECK_TIMEOUT", 0.2)
    with pytest.raises(UserError, match="does not answer"):
        await paths.check(str(target), None, "none", nonempty=False, run_as=None)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_another_user_may_mount_only_on_what_he_owns_or_may_write(runtime_dir: Path) -> None:
    runtime_dir.chmod(0o755)
    target = runtime_dir / "target"
    target.mkdir()
    for mode, owner, allowed in ((0o755, 0, False), (0o755, 4242, True), (0o777, 0, True), (0o1777, 0, False)):
        os.chown(target, owner, owner)
        os.chmod(target, mode)
        pid = os.fork()
        if pid == 0:
            code = 2
            try:
                os.setgroups([])
                os.setgid(4242)
                os.setuid(4242)
                pathcheck._right(str(target), os.stat(target))
                code = 0
            except pathcheck._RefusedError:
                code = 1
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (0 if allowed else 1), (oct(mode), owner)


# ---- drivers by command


def test_a_command_says_where_its_source_goes() -> None:
    assert catalog.from_command("/usr/bin/sshfs {source} {mountpoint}", "h:/").name == "sshfs"
    with pytest.raises(UserError, match=r"no \{source\} in it"):
        catalog.from_command("x {mountpoint}", "/y")
    with pytest.raises(UserError, match=r"has \{source\} in it"):
        catalog.from_command("x {source} {mountpoint}", None)
    with pytest.raises(UserError, match="is not one of a mount"):
        catalog.from_command("x {mountpoint}", None).check_options({"size": "3"})


# ---- systemd


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(5)
        yield sock


def test_the_service_manager_is_told_in_its_own_words(listening: socket.socket, tmp_path: Path) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "3000000"})
    assert notifier.watchdog == 1.5
    notifier.say(READY=1, STATUS="two\nlines")
    assert listening.recv(1000) == b"READY=1\nSTATUS=two"
    notifier.close()


def test_what_a_full_socket_does_not_take_is_said_later(listening: socket.socket, tmp_path: Path) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
    for _ in range(5000):
        notifier.say(WATCHDOG=1)
    notifier.say(READY=1, STATUS="x")
    listening.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            assert listening.recv(1000) == b"WATCHDOG=1"
    notifier.say(WATCHDOG=1)
    assert listening.recv(1000) == b"READY=1\nSTATUS=x\nWATCHDOG=1"
    notifier.close()


def test_an_abstract_address_is_understood() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0udf-test-notify")
        notifier = Notifier({"NOTIFY_SOCKET": "@udf-test-notify"})
        notifier.say(WATCHDOG=1)
        assert sock.recv(100) == b"WATCHDOG=1"
        notifier.close()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"NOTIFY_SOCKET": "relative"},
        {"NOTIFY_SOCKET": "/nobody/there", "WATCHDOG_PID": "1", "WATCHDOG_USEC": "5"},
        {"NOTIFY_SOCKET": "/nobody/there", "WATCHDOG_USEC": "x"},
    ],
)
def test_without_a_service_manager_nothing_happens(environment: dict[str, str]) -> None:
    notifier = Notifier(environment)
    assert notifier.watchdog is None
    notifier.say(READY=1)
    notifier.close()


def test_log_lines_carry_their_level_when_the_journal_reads_them() -> None:
    formatter = logs._JournalFormatter("%(message)s")
    record = logging.LogRecord("udf", logging.WARNING, "", 0, "a\nb", None, None)
    assert formatter.format(record) == "<4>a\n<4>b"


def test_a_log_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_FILE", 2000)
    logger = logging.getLogger("udf")
    before = (logger.handlers[:], logger.level, logger.propagate)
    try:
        logs.to_file(tmp_path / "log")
        for _ in range(200):
            logger.warning("x" * 90)
        assert 0 < (tmp_path / "log").stat().st_size < 2300
        assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600
    finally:
        logger.handlers[0].close()
        logger.handlers[:], logger.level, logger.propagate = before


# ---- packaging


def test_the_unit_is_accepted_by_systemd(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    unit = (PACKAGING / "udf.service").read_text()
    # The program and the manual page are where the package puts them, which need not be so here.
    unit = unit.replace("/usr/bin/udf", "/bin/true").replace("Documentation=man:udf(1)\n", "")
    (tmp_path / "udf.service").write_text(unit)
    done = subprocess.run(
        [analyze, "verify", str(tmp_path / "udf.service")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_unit_gives_the_service_no_mount_namespace_of_its_own() -> None:
    keys = [line.partition("=")[0] for line in (PACKAGING / "udf.service").read_text().splitlines() if "=" in line]
    keys = [key for key in keys if not key.startswith("#")]
    makers = (
        "Private",
        "Protect",
        "ReadWrite",
        "ReadOnly",
        "Inaccessible",
        "Bind",
        "Temporary",
        "Mount",
        "Root",
        "NoNew",
    )
    assert not [key for key in keys if key.startswith(makers)]
    assert {"Type", "NotifyAccess", "WatchdogSec", "Restart", "KillMode", "RuntimeDirectory"} <= set(keys)


def test_tmpfiles_and_sysusers_are_accepted_by_systemd(tmp_path: Path) -> None:
    for tool in ("systemd-tmpfiles", "systemd-sysusers"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    (tmp_path / "etc").mkdir()
    shutil.copy("/etc/passwd", tmp_path / "etc")
    shutil.copy("/etc/group", tmp_path / "etc")
    subprocess.run(
        ["systemd-tmpfiles", "--create", f"--root={tmp_path}", str(PACKAGING / "udf.tmpfiles.conf")], check=True
    )
    assert (tmp_path / "run/udf/mounts").is_dir()
    subprocess.run(["systemd-sysusers", f"--root={tmp_path}", str(PACKAGING / "udf.sysusers.conf")], check=True)
    assert "\nudf:" in (tmp_path / "etc/group").read_text()


def test_an_identity_is_the_process_itself() -> None:
    assert Identity.own() == Identity(os.geteuid(), os.getegid(), tuple(os.getgroups()))


# ---- a device that is away


@pytest.mark.parametrize(
    ("left", "readable", "wait", "text"),
    [
        (
            25.0,
            19.8,
            0,
            "the device was unplugged; cached files can be read for 20 s more; plug it back within 25 s to go on",
        ),
        (24.1, -1, 0, "the device was unplugged; nothing can be read; plug it back within 25 s to go on"),
        (
            0.5,
            0,
            5,
            "the device was unplugged; nothing can be read; requests wait for it, 5 s at most;"
            " plug it back within 1 s to go on",
        ),
        (
            float("inf"),
            3,
            0,
            "the device was unplugged; cached files can be read for 3 s more; one was plugged in and is looked at",
        ),
        (0, 10, 5, "the device was unplugged"),
        (float("-inf"), 10, 0, "the device was unplugged"),
    ],
)
def test_a_mount_without_its_device_says_how_long_that_goes_well(
    left: float, readable: float, wait: float, text: str
) -> None:
    assert unplugged.text_of(left, readable=readable, wait=wait) == text
