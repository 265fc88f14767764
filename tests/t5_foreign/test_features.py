"""What foreign programs can and drivers on pyfuse3 cannot gets through; what they ask of their mount is done."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.t5_cli.conftest import NOBODY, Command, Daemon
from tests.t5_foreign import probe
from tests.t5_foreign.conftest import mount
from tests.t5_foreign.programs import PROGRAMS, direct_mount, directory, layers, need, run, squashfs

CAPABILITIES = ["CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "SETUID", "SETGID", "MKNOD", "LEASE"]


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    return tmp_path / "mnt"


def manifest(path: Path, command: str, **more: object) -> Path:
    """A driver that may do to files what root may."""
    keys = {"kind": "fs", "interface": 1, "source": "directory", "command": command, "locks": True, **more}
    keys["capabilities"] = [f"CAP_{name}" for name in CAPABILITIES]
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()))
    return path


def tried(path: Path) -> dict[str, Any]:
    return dict(json.loads(run(sys.executable, probe.__file__, path)))


def compare(daemon: Daemon, command: str, tmp_path: Path, work: Path) -> dict[str, Any]:
    """The results through UDF, which are the same as those of a direct mount."""
    results = []
    for through in (True, False):
        place = work / ("through" if through else "direct")
        (place / "empty").mkdir(parents=True)
        layers(place / "empty", place)
        words, source = command.replace("{work}", str(place)), str(place / "source")
        if through:
            driver = manifest(place / "foreign.toml", words)
            with mount(daemon, tmp_path / "mnt", "-t", driver, source) as mounted:
                results.append(tried(tmp_path / "mnt"))
                row = mounted.row()
                assert (row["faults"], row["counters"]["timeouts"]) == (0, 0)
        else:
            with direct_mount(words, source, tmp_path / "direct"):
                results.append(tried(tmp_path / "direct"))
    # fuse-overlayfs gives an open file that was removed a link too many; the shim keeps it under a name of its own and
    # tells how many programs can see.
    assert results[0]["unlinked files"][1] == 0
    assert results[1].pop("unlinked files")[0] == results[0].pop("unlinked files")[0]
    assert results[0] == results[1]
    return dict(results[0])


def test_all_that_fuse_overlayfs_can(daemon: Daemon, tmp_path: Path) -> None:
    need("fuse-overlayfs")
    command = next(each.command for each in PROGRAMS if each.name == "fuse-overlayfs")
    results = compare(daemon, command, tmp_path, tmp_path / "work")
    assert results["fallocate"][:2] == [1 << 20, 2048]
    assert results["copy_file_range"] == [300_000, "x" * 10]
    assert results["extended attributes"] == [[100, ["user.key"]], []]


def test_all_that_bindfs_can(daemon: Daemon, tmp_path: Path) -> None:
    need("bindfs")
    command = "bindfs -f --multithreaded --enable-lock-forwarding {source} {mountpoint}"
    results = compare(daemon, command, tmp_path, tmp_path / "work")
    assert results["flock"] == [True, "locked\n"]
    assert results["extended attributes"] == [[100, ["user.key"]], []]
    assert results["posix_fallocate"] == 1 << 20


def test_all_that_passthrough_ll_can(daemon: Daemon, passthrough_ll: Path, tmp_path: Path) -> None:
    command = f"{passthrough_ll} -f -o flock,xattr,default_permissions,source={{source}} {{mountpoint}}"
    results = compare(daemon, command, tmp_path, tmp_path / "work")
    assert results["fallocate"][:2] == [1 << 20, 2048]
    assert results["lseek"] == [1 << 20, (1 << 20) + 65536]
    assert results["flock"] == [True, "locked\n"]


def test_a_lock_is_waited_for_longer_than_any_deadline(daemon: Daemon, tmp_path: Path, mountpoint: Path) -> None:
    """It was given up with ETIMEDOUT, although whoever holds a lock may hold it for days."""
    need("bindfs")
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").touch()
    driver = manifest(
        tmp_path / "foreign.toml", "bindfs -f --multithreaded --enable-lock-forwarding {source} {mountpoint}"
    )
    with (
        mount(daemon, mountpoint, "-t", driver, "-o", "deadline=0.5", source) as mounted,
        (source / "file").open("r+") as held,
    ):
        fcntl.flock(held, fcntl.LOCK_EX)  # in the source: that it is seen in the mount shows that locks get through
        argv = [sys.executable, "-c", probe.HOLDER, str(mountpoint / "file"), "flock"]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as waiter:
            with pytest.raises(subprocess.TimeoutExpired):
                waiter.wait(2.5)
            fcntl.flock(held, fcntl.LOCK_UN)
            assert waiter.stdout is not None
            assert waiter.stdout.readline() == b"locked\n"
            assert waiter.communicate(b"") == (b"", b"")
        assert mounted.row()["faults"] == 0


def test_whoever_waits_for_a_lock_can_be_ended(daemon: Daemon, tmp_path: Path, mountpoint: Path) -> None:
    """bindfs does not hear of an interrupt, so the deadline begins with it."""
    need("bindfs")
    (tmp_path / "source").mkdir()
    (tmp_path / "source/file").touch()
    driver = manifest(
        tmp_path / "foreign.toml", "bindfs -f --multithreaded --enable-lock-forwarding {source} {mountpoint}"
    )
    with (
        mount(daemon, mountpoint, "-t", driver, "-o", "deadline=1", tmp_path / "source") as mounted,
        (tmp_path / "source/file").open("r+") as held,
    ):
        fcntl.flock(held, fcntl.LOCK_EX)
        argv = [sys.executable, "-c", probe.HOLDER, str(mountpoint / "file"), "flock"]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as waiter:
            before = mounted.row()["counters"]["driver_round_trips"]
            while mounted.row()["counters"]["waiting"] == 0:
                assert waiter.poll() is None, before
            waiter.kill()
            waiter.wait(40)


@pytest.mark.parametrize("words", ["-f -o ro", "-r -f", "-o ro"])
def test_a_program_that_mounts_read_only_gets_a_read_only_mount(
    daemon: Daemon, tree: Path, tmp_path: Path, mountpoint: Path, words: str
) -> None:
    need("bindfs")
    source = directory(tree, tmp_path)
    with mount(daemon, mountpoint, "--exec", f"bindfs {words} {{source}} {{mountpoint}}", source):
        assert os.statvfs(mountpoint).f_flag & os.ST_RDONLY or "-r" in words
        with pytest.raises(OSError, match=r"Read-only file system|Permission denied"):
            (mountpoint / "new").touch()
        assert (mountpoint / "program").read_bytes() == (tree / "program").read_bytes()


def test_other_options_of_a_program_are_the_mounts_too(daemon: Daemon, tree: Path, mountpoint: Path) -> None:
    need("bindfs")
    command = f"bindfs -f -o noexec,noatime {tree} {{mountpoint}}"
    with mount(daemon, mountpoint, "--exec", command):
        line = next(line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {mountpoint} " in line)
        assert {"noexec", "noatime", "nosuid", "nodev"} <= set(line.split()[5].split(","))
        assert f" fuse.udfd {tree} " in line, "bindfs gives its source as the name"
        with pytest.raises(PermissionError):
            subprocess.run([mountpoint / "program"], check=True)


def test_a_program_in_the_background_is_served_as_well(daemon: Daemon, tree: Path, mountpoint: Path) -> None:
    need("bindfs")
    with mount(daemon, mountpoint, "--exec", f"bindfs {tree} {{mountpoint}}"):
        assert (mountpoint / "program").read_bytes() == (tree / "program").read_bytes()


def test_paths_in_the_command_stay_visible(daemon: Daemon, tree: Path, tmp_path: Path, mountpoint: Path) -> None:
    """A driver does not see other FUSE mounts; but what a command names it must see, as with a source."""
    need("bindfs", "squashfuse_ll")
    squashfs(tree, tmp_path)
    outer = tmp_path / "outer"
    with (
        mount(daemon, outer, "--exec", f"bindfs -f {tmp_path} {{mountpoint}}"),
        mount(daemon, mountpoint, "--exec", f"squashfuse_ll -f {outer}/image {{mountpoint}}"),
    ):
        assert (mountpoint / "big").read_bytes() == (tree / "big").read_bytes()


def test_an_archive_is_written_to_its_end_however_long_it_takes(
    daemon: Daemon, tree: Path, tmp_path: Path, mountpoint: Path
) -> None:
    """fuse-zip writes when it is unmounted, and was ended by a SIGTERM in the middle of that: nothing was saved."""
    program = next(each for each in PROGRAMS if each.name == "fuse-zip")
    command, source = program.prepare(tree, tmp_path / "work")
    contents = os.urandom(24_000_000)
    with mount(daemon, mountpoint, "--exec", command, source):
        (mountpoint / "large").write_bytes(contents)
    assert program.written is not None
    assert program.written(tmp_path / "work", "large") == contents


def test_a_mount_without_a_daemon(tree: Path, tmp_path: Path, mountpoint: Path, no_system_daemon: None) -> None:
    program = next(each for each in PROGRAMS if each.name == "fuse-zip")
    command, source = program.prepare(tree, tmp_path / "work")
    mountpoint.mkdir()
    udf = Command()
    udf.done("mount", "--exec", command, source, mountpoint)
    (mountpoint / "new").write_bytes(b"from a supervisor of its own")
    udf.done("umount", mountpoint)
    assert program.written is not None
    assert program.written(tmp_path / "work", "new") == b"from a supervisor of its own"


@pytest.mark.skipif(
    not os.path.exists("/dev/fuse") or os.stat("/dev/fuse").st_mode & 0o006 != 0o006,
    reason="/dev/fuse is root's alone here",
)
def test_programs_of_a_user_without_rights(as_nobody: Any, runtime_dir: Path, tree: Path) -> None:
    """No CAP_SYS_ADMIN, no root: libfuse 2 and 3 both come to their mount by the stand-in for fusermount."""
    need("bindfs", "squashfuse_ll", "fusermount3")
    runtime_dir.chmod(0o755)
    for name in ("mnt", "run", "source"):
        (runtime_dir / name).mkdir(mode=0o700)
        os.chown(runtime_dir / name, 65534, 65534)
    image = squashfs(tree, runtime_dir)
    environment = {"XDG_RUNTIME_DIR": str(runtime_dir / "run")}
    point = runtime_dir / "mnt"
    for command in (
        f"squashfuse_ll -f {image} {{mountpoint}}",
        f"bindfs -f --no-allow-other {runtime_dir}/source {{mountpoint}}",
    ):
        made = as_nobody("mount", "--exec", command, point, **environment)
        assert (made.returncode, made.stderr) == (0, "")
        try:
            with pytest.raises(PermissionError):
                os.listdir(point)  # root is another user than nobody
            listed = as_nobody("status", "--json", **environment)
            row = next(row for row in json.loads(listed.stdout)["mounts"] if row["mountpoint"] == str(point))
            assert (row["state"], row["uid"]) == ("ACTIVE", 65534)
            script = 'cd "$0" || exit; cat big program 2>/dev/null | sha256sum; touch new && rm new'
            used = subprocess.run(["sh", "-c", script, point], capture_output=True, check=False, **NOBODY)
            if "squashfuse" in command:
                expected = run("sh", "-c", "cat big program | sha256sum", cwd=tree)
                assert used.stdout == expected
                assert used.stderr.startswith(b"touch: cannot touch")
            else:
                assert used.stderr == b""
            gone = as_nobody("umount", point, **environment)
            assert (gone.returncode, gone.stderr) == (0, "")
        finally:
            subprocess.run(["umount", "-l", point], capture_output=True, check=False)


def test_a_program_that_cannot_mount_is_one_sentence(daemon: Daemon, tmp_path: Path, mountpoint: Path) -> None:
    need("squashfuse_ll")
    (tmp_path / "image").write_bytes(b"no image")
    mountpoint.mkdir()
    sentence = daemon.udf.refused(
        "mount", "--exec", "squashfuse_ll -f {source} {mountpoint}", tmp_path / "image", mountpoint
    )
    assert "squashfuse_ll exited with status" in sentence
