"""Each program: mounted, listed, read, written, unmounted, killed; and under load it makes no error that it alone
would not make."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.t5_cli.conftest import Daemon
from tests.t5_foreign.conftest import mount
from tests.t5_foreign.programs import PROGRAMS, Program, direct_mount, directory, every_program, in_directory, tree_of

NEW = random.Random(3).randbytes(1_200_000)


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    return tmp_path / "mnt"


def serve(daemon: Daemon, program: Program, tree: Path, tmp_path: Path, mountpoint: Path) -> None:
    work = tmp_path / "work"
    command, source = program.prepare(tree, work)
    with mount(daemon, mountpoint, "--exec", command, source) as mounted:
        row = mounted.row()
        assert (row["driver"], row["source"]) == (shlex.split(command)[0].rpartition("/")[2], source)
        found = tree_of(mountpoint)
        found.pop("lost+found", None)  # mkfs makes one
        assert found == tree_of(tree)
        assert (mountpoint / "link/grüße, 'quoted' name").read_text() == "found\n"
        assert os.statvfs(mountpoint).f_namemax > 0
        if program.written is None:
            with pytest.raises(OSError) as refused:
                (mountpoint / "new").write_bytes(NEW)
            assert refused.value.errno in (errno.EROFS, errno.ENOSYS, errno.EACCES)
        else:
            (mountpoint / "new").write_bytes(NEW)
            assert (mountpoint / "new").read_bytes() == NEW
            (mountpoint / "made").mkdir()
            (mountpoint / "new").rename(mountpoint / "made/moved")
            (mountpoint / "many/file 00").unlink()
            assert "file 00" not in os.listdir(mountpoint / "many")
        assert mounted.row()["counters"]["driver_round_trips"] > 0
    if program.written is not None:
        assert program.written(work, "made/moved") == NEW


def die(daemon: Daemon, program: Program, tree: Path, tmp_path: Path, mountpoint: Path) -> None:
    command, source = program.prepare(tree, tmp_path / "again")
    with mount(daemon, mountpoint, "--exec", command, source) as mounted:
        assert (mountpoint / "program").stat().st_size > 0
        file = os.open(mountpoint / "big", os.O_RDONLY)
        mounted.kill_program()
        for act in (lambda: os.pread(file, 4096, 2 << 20), lambda: os.listdir(mountpoint / "many")):
            assert errno_in_time(act, 60.0) is None
        os.close(file)
        row = mounted.row()
        assert (row["state"], row["generation"]) == ("ACTIVE", 2)


def errno_in_time(act: Callable[[], object], seconds: float = 20.0) -> int | None:
    """In a thread, so that what hangs fails the test instead of hanging it."""
    result: list[int | None] = []

    def call() -> None:
        try:
            act()
            result.append(None)
        except OSError as error:
            result.append(error.errno)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert result, f"no answer within {seconds} s"
    return result[0]


@every_program
def test_program_serves_its_source(
    daemon: Daemon, program: Program, tree: Path, tmp_path: Path, mountpoint: Path
) -> None:
    serve(daemon, program, tree, tmp_path, mountpoint)


@every_program
def test_a_program_that_is_killed_is_replaced(
    daemon: Daemon, program: Program, tree: Path, tmp_path: Path, mountpoint: Path
) -> None:
    die(daemon, program, tree, tmp_path, mountpoint)


def test_sshfs(daemon: Daemon, sshfs: Program, tree: Path, tmp_path: Path, mountpoint: Path) -> None:
    serve(daemon, sshfs, tree, tmp_path, mountpoint)
    die(daemon, sshfs, tree, tmp_path, mountpoint)


def test_sshfs_by_its_manifest(daemon: Daemon, sshfs: Program, tree: Path, tmp_path: Path, mountpoint: Path) -> None:
    command, source = sshfs.prepare(tree, tmp_path / "work")
    options = next(word for word in shlex.split(command) if "IdentityFile" in word).partition(",")[2]
    escaped = options.replace(",", "\\,")
    with mount(daemon, mountpoint, "-t", "sshfs", "-o", f"ssh={escaped}", source):
        assert tree_of(mountpoint) == tree_of(tree)


@pytest.mark.parametrize(("driver", "program"), [("squashfuse", "squashfuse_ll"), ("fuse2fs", "fuse2fs")])
def test_manifests_of_images(
    daemon: Daemon, driver: str, program: str, tree: Path, tmp_path: Path, mountpoint: Path
) -> None:
    _, source = next(each for each in PROGRAMS if each.name == program).prepare(tree, tmp_path / "work")
    with mount(daemon, mountpoint, "-t", driver, source):
        assert (mountpoint / "big").read_bytes() == (tree / "big").read_bytes()


def test_a_missing_program_is_one_sentence(daemon: Daemon, tmp_path: Path, mountpoint: Path) -> None:
    manifest = tmp_path / "missing.toml"
    manifest.write_text('kind = "fs"\ninterface = 1\nrequires = ["no-such-fs"]\ncommand = "sh {mountpoint}"\n')
    mountpoint.mkdir()
    sentence = daemon.udf.refused("mount", "-t", manifest, mountpoint)
    assert sentence == "udf: the driver missing needs the program no-such-fs: install it first"


# ---- killed again and again

READER = """
import hashlib, json, os, sys, time
top, wanted, seconds = sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3])
end, rounds = time.monotonic() + seconds, 0
while time.monotonic() < end:
    found = {}
    for root, _, files in os.walk(top):
        for name in files:
            path = os.path.join(root, name)
            if not os.path.islink(path):
                with open(path, "rb") as file:
                    found[os.path.relpath(path, top)] = hashlib.sha256(file.read()).hexdigest()
    assert found == wanted, sorted(set(found.items()) ^ set(wanted.items()))[:3]
    rounds += 1
print(rounds)
"""
LOAD_SECONDS = 3.0


def survive(daemon: Daemon, program: Program, tree: Path, tmp_path: Path, mountpoint: Path) -> None:
    """Read everything, and write where it can, while the program is killed every 300 ms: no error, no difference."""
    command, source = program.prepare(tree, tmp_path / "storm")
    sums = {name: what[1][1] for name, what in tree_of(tree).items() if what[0] == "file"}  # type: ignore[index]
    with mount(daemon, mountpoint, "--exec", command, source) as mounted:
        place = mountpoint if program.written is None else mountpoint / "work"
        argv = [sys.executable, "-I", "-c", READER, str(place), json.dumps(sums), str(LOAD_SECONDS)]
        if program.written is not None:
            place.mkdir()
            workloads = Path(__file__).parent.parent / "t6_stack/workloads.py"
            argv = [sys.executable, "-I", str(workloads), "contents", str(place), str(LOAD_SECONDS), "1"]
        kills = 0
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as worker:
            try:
                while worker.poll() is None:
                    time.sleep(0.3)
                    row = mounted.row()
                    if row["state"] == "ACTIVE":
                        os.kill(row["driver_pid"], signal.SIGKILL)
                        kills += 1
                    assert kills < 200, "it does not get on"
            finally:
                worker.kill()
            said, wrong = worker.communicate()
            assert worker.returncode == 0, (said, wrong[-2000:])
        assert kills
        assert errno_in_time(lambda: os.listdir(mountpoint), 60.0) is None


@pytest.mark.parametrize(
    "program",
    [each for each in PROGRAMS if each.name in ("squashfuse_ll", "squashfuse", "bindfs")],
    ids=lambda p: p.name,
)
def test_a_program_that_is_killed_again_and_again_makes_no_error(
    daemon: Daemon, program: Program, tree: Path, tmp_path: Path, mountpoint: Path
) -> None:
    survive(daemon, program, tree, tmp_path, mountpoint)


def test_sshfs_that_is_killed_again_and_again(
    daemon: Daemon, sshfs: Program, tree: Path, tmp_path: Path, mountpoint: Path
) -> None:
    survive(daemon, sshfs, tree, tmp_path, mountpoint)


def test_passthroughfs_that_is_killed_again_and_again(
    daemon: Daemon, examples: Path, tree: Path, tmp_path: Path, mountpoint: Path
) -> None:
    command = f"{sys.executable} {examples}/passthroughfs.py {{source}} {{mountpoint}}"
    survive(daemon, Program("passthroughfs", command, directory, in_directory), tree, tmp_path, mountpoint)


# ---- pyfuse3's examples


def test_pyfuse3_hello(daemon: Daemon, examples: Path, mountpoint: Path) -> None:
    command = f"{sys.executable} {examples}/hello.py {{mountpoint}}"
    with mount(daemon, mountpoint, "--exec", command) as mounted:
        assert os.listdir(mountpoint) == ["message"]
        assert (mountpoint / "message").read_bytes() == b"hello world\n"
        with pytest.raises(OSError, match=r"Permission denied|not implemented"):
            (mountpoint / "message").write_bytes(b"x")
        mounted.kill_program()
        assert errno_in_time((mountpoint / "other").stat, 30.0) == errno.ENOENT
        assert (mountpoint / "message").read_bytes() == b"hello world\n"


def test_pyfuse3_tmpfs(daemon: Daemon, examples: Path, mountpoint: Path) -> None:
    command = f"{sys.executable} {examples}/tmpfs.py {{mountpoint}}"
    with mount(daemon, mountpoint, "--exec", command) as mounted:
        (mountpoint / "directory").mkdir()
        (mountpoint / "directory/new").write_bytes(NEW)
        (mountpoint / "link").symlink_to("directory/new")
        os.link(mountpoint / "directory/new", mountpoint / "hard")
        (mountpoint / "directory/new").rename(mountpoint / "moved")
        assert (mountpoint / "moved").read_bytes() == NEW
        assert (mountpoint / "moved").stat().st_nlink == 2
        (mountpoint / "moved").unlink()
        assert sorted(os.listdir(mountpoint)) == ["directory", "hard", "link"]
        assert os.readlink(mountpoint / "link") == "directory/new"
        mounted.kill_program()
        assert errno_in_time((mountpoint / "other").touch, 60.0) is None, "it begins anew"
        assert os.listdir(mountpoint) == ["other"], "what it had is gone"


def test_pyfuse3_passthroughfs(daemon: Daemon, examples: Path, tree: Path, tmp_path: Path, mountpoint: Path) -> None:
    command = f"{sys.executable} {examples}/passthroughfs.py {{source}} {{mountpoint}}"
    program = Program("passthroughfs", command, directory, in_directory)
    serve(daemon, program, tree, tmp_path, mountpoint)
    die(daemon, program, tree, tmp_path, mountpoint)


# ---- load


def walk(top: Path) -> Iterator[Path]:
    for root, directories, files in os.walk(top):
        yield from (Path(root, name) for name in directories + files)


def load(top: Path, tree: Path) -> list[str]:
    """Eight readers, a storm of stats and a `find | xargs cat` at once; what went wrong."""
    wanted = {str(path.relative_to(tree)): path for path in walk(tree) if path.is_file() and not path.is_symlink()}
    sums = {name: hashlib.sha256(path.read_bytes()).digest() for name, path in wanted.items()}
    wrong: list[str] = []

    def read(seed: int) -> None:
        names = sorted(wanted)
        random.Random(seed).shuffle(names)
        for name in names:
            try:
                if hashlib.sha256((top / name).read_bytes()).digest() != sums[name]:
                    wrong.append(f"{name} has other contents")
            except OSError as error:
                wrong.append(f"reading {name}: {error.strerror}")

    def look() -> None:
        for _ in range(5):
            for path in walk(top):
                try:
                    path.lstat()
                except OSError as error:
                    wrong.append(f"stat {path}: {error.strerror}")

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    threads += [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    piped = subprocess.run(
        "find . -type f -print0 | xargs -0 -n 8 -P 4 cat | wc -c",
        shell=True,
        cwd=top,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    for thread in threads:
        thread.join()
    total = sum(path.stat().st_size for path in wanted.values())
    if piped.stderr or int(piped.stdout) != total:
        wrong.append(f"find | xargs cat: {piped.stdout.strip()} bytes of {total}, {piped.stderr[:500]}")
    return wrong


@every_program
def test_load_makes_no_errors_that_a_direct_mount_does_not_make(
    daemon: Daemon, program: Program, tree: Path, tmp_path: Path, mountpoint: Path
) -> None:
    command, source = program.prepare(tree, tmp_path / "work")
    with mount(daemon, mountpoint, "--exec", command, source) as mounted:
        through_us = load(mountpoint, tree)
        row = mounted.row()
        assert (row["faults"], row["counters"]["timeouts"]) == (0, 0)
    with direct_mount(command, source, tmp_path / "direct"):
        directly = load(tmp_path / "direct", tree)
    assert through_us == directly == []


def test_load_on_sshfs(daemon: Daemon, sshfs: Program, tree: Path, tmp_path: Path, mountpoint: Path) -> None:
    command, source = sshfs.prepare(tree, tmp_path / "work")
    with mount(daemon, mountpoint, "--exec", command, source):
        assert load(mountpoint, tree) == []
