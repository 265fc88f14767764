"""Unmodified FUSE programs: they mount as they always do, and the link is what they get."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import mounts_below, wait_for_end
from tests.t2_host.peer import REPO, TIMEOUT, Host
from tests.t2_host.peer import host as make_host
from tests.t2_host.test_authority import NOBODY, descendants, needs_root, report_of
from udf import messages
from udf.host.standin import parse_arguments

CONTENT = b"from the source\n" * 1000

pytestmark = needs_root  # without root there are namespaces too, but no test can count on them


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "tree/sub").mkdir(parents=True)
    (tmp_path / "tree/sub/file.txt").write_bytes(CONTENT)
    return tmp_path / "tree"


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def image(source: Path, kind: str) -> Path:
    target = source.parent / f"image.{kind}"
    commands = {
        "squashfs": ["mksquashfs", ".", str(target)],
        "zip": ["zip", "-r", str(target), "."],
        "iso": ["genisoimage", "-R", "-o", str(target), "."],
        "ext4": ["mke2fs", "-t", "ext4", "-d", ".", str(target), "8M"],
    }
    need(commands[kind][0])
    subprocess.run(commands[kind], cwd=source, check=True, capture_output=True)
    return target


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("tree", "bindfs -f {source} {mountpoint}"),
        ("tree", "bindfs {source} {mountpoint}"),
        ("squashfs", "squashfuse -f {source} {mountpoint}"),
        ("squashfs", "squashfuse {source} {mountpoint}"),
        ("squashfs", "squashfuse_ll -f {source} {mountpoint}"),
        ("squashfs", "squashfuse_ll {source} {mountpoint}"),
        ("zip", "fuse-zip -f -r {source} {mountpoint}"),
        ("iso", "fuseiso {source} {mountpoint}"),
        ("iso", "fuseiso {source} {mountpoint} -f"),
        ("tree", "sshfs -o ssh_command={work}/ssh host:{source} {mountpoint}"),
        ("ext4", "fuse2fs -f -o ro,fakeroot {source} {mountpoint}"),
        ("tree", "fuse-overlayfs -f -o lowerdir={source},upperdir={work}/up,workdir={work}/tmp {mountpoint}"),
    ],
)
def test_a_program_is_served(host: Host, source: Path, kind: str, command: str) -> None:
    need(command.split(maxsplit=1)[0])
    work = source.parent
    (work / "up").mkdir()
    (work / "tmp").mkdir()
    (work / "ssh").write_text("#!/bin/sh\nexec /usr/lib/openssh/sftp-server\n")
    (work / "ssh").chmod(0o755)
    origin = source if kind == "tree" else image(source, kind)
    host.start(command=command.replace("{work}", str(work)), source=str(origin), sandbox={"keep_paths": [str(work)]})
    options = host.ready().mount_options
    assert options.get("nodev") is True
    host.link.init()
    node = host.link.walk("sub/file.txt")["nodeid"]
    handle = host.link.open(node)
    read = b""
    while chunk := host.link.read(node, handle, len(read), 8192):
        read += chunk
    assert read == CONTENT
    assert not mounts_below(work)
    host.wait_for(messages.HostHeartbeat)
    family = descendants(host.process.pid)
    host.process.terminate()
    host.wait()
    for pid in family:
        wait_for_end(pid)


def test_an_unmodified_pyfuse3_program_is_served(host: Host, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, stat, errno, pyfuse3, trio\n"
        "class One(pyfuse3.Operations):\n"
        "    async def lookup(self, parent, name, ctx=None):\n"
        "        entry = pyfuse3.EntryAttributes()\n"
        "        entry.st_ino, entry.st_mode = 2, stat.S_IFREG | 0o644\n"
        "        return entry\n"
        "    async def open(self, inode, flags, ctx): return pyfuse3.FileInfo(fh=inode)\n"
        "    async def read(self, fh, offset, size): return b'one'\n"
        "pyfuse3.init(One(), sys.argv[1], {'fsname=one', *pyfuse3.default_options})\n"
        "trio.run(pyfuse3.main)\n"
    )
    host.start(command=f"{sys.executable} {program} {{mountpoint}}", sandbox={"keep_paths": [str(tmp_path)]})
    assert host.ready().mount_options["fsname"] == "one"
    host.link.init()
    node = host.link.lookup("file")["nodeid"]
    assert host.link.read(node, host.link.open(node)) == b"one"


def comm_of(pid: int) -> str:
    """The name of a process; none when it has just ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_the_link_is_only_the_programs(host: Host, source: Path) -> None:
    need("bindfs")
    host.start(command="bindfs {source} {mountpoint}", source=str(source), sandbox={"keep_paths": [str(source)]})
    host.ready()
    host.link.init()
    # The parent of the daemon and the stand-in have gone, and init and the anchor have let go: with the program's
    # process the link ends.
    end = time.monotonic() + TIMEOUT
    while len(programs := [pid for pid in descendants(host.process.pid) if comm_of(pid) == "bindfs"]) != 1:
        assert time.monotonic() < end, "its parent stays when it has become a daemon"
        time.sleep(0.01)
    program = programs[0]
    os.kill(program, 9)
    wait_for_end(program)
    with pytest.raises((AssertionError, BrokenPipeError)):
        host.link.walk("sub")
    assert host.wait() == -9


def test_mount_options_of_the_program_are_reported(host: Host, source: Path) -> None:
    need("bindfs")
    host.start(
        command="bindfs -f -o ro,noexec {source} {mountpoint}",
        source=str(source),
        sandbox={"keep_paths": [str(source)]},
    )
    options = host.ready().mount_options
    assert options["ro"] is True
    assert options["noexec"] is True


def test_a_program_that_fails_before_it_mounts_is_one_sentence(host: Host) -> None:
    need("bindfs")
    host.start(command="bindfs -f /nonexistent {mountpoint}")
    error = host.wait_for(messages.HostFailed).error
    assert error.startswith("bindfs exited with status 1 before it mounted; it said: ")
    assert "/nonexistent" in error
    assert host.wait() == 1


def test_a_program_that_does_not_exist_is_one_sentence(host: Host) -> None:
    host.start(command="no-such-program {mountpoint}")
    assert "no-such-program: No such file" in host.wait_for(messages.HostFailed).error
    assert host.wait() == 127


def test_a_program_that_only_exits_is_one_sentence(host: Host) -> None:
    host.start(command="true {mountpoint}")
    assert host.wait_for(messages.HostFailed).error == "true exited with status 0 before it mounted"
    assert host.wait() == 0


def test_a_program_runs_as_another_user(source: Path, runtime_dir: Path) -> None:
    need("squashfuse_ll")
    runtime_dir.chmod(0o755)
    origin = image(source, "squashfs").rename(runtime_dir / "image")
    with make_host(sandbox_user=NOBODY) as host:
        host.start(
            command="squashfuse_ll -f {source} {mountpoint}",
            source=str(origin),
            sandbox={"keep_paths": [str(origin)]},
        )
        host.ready()
        host.link.init()
        host.link.walk("sub/file.txt")


def test_without_a_mount_namespace_libfuse_3_still_works(host: Host, source: Path) -> None:
    need("squashfuse_ll")
    host.start(
        command="squashfuse_ll -f {source} {mountpoint}",
        source=str(image(source, "squashfs")),
        sandbox={"namespaces": False},
    )
    host.ready()
    host.link.init()
    host.link.walk("sub/file.txt")


def test_values_are_one_word_each_whatever_is_in_them(host: Host, tmp_path: Path) -> None:
    host.start(
        command="sh -c 'echo \"$1|$2|$3\" >&2; exit 3' x {source} {level} {mountpoint}",
        source="a b {level}",
        options={"level": 7},
    )
    error = host.wait_for(messages.HostFailed).error
    assert "sh exited with status 3" in error
    assert "a b {level}|7|/" in error


def test_foreign_mounts_are_out_of_a_drivers_sight(drivers: Path, source: Path, tmp_path: Path) -> None:
    """A driver's namespace that still has a mount keeps it busy, and a look at it may never return."""
    need("bindfs")
    for name in ("kept", "other"):
        (tmp_path / name).mkdir()
        subprocess.run(["bindfs", str(source), str(tmp_path / name)], check=True)
    try:
        with make_host() as host:
            report = report_of(host, drivers, sandbox={"keep_paths": [str(REPO), str(tmp_path / "kept/sub")]})
            mounts = [line for line in report if line.startswith("mount ") and " - fuse" in line]
            assert [line.split()[5] for line in mounts] == [str(tmp_path / "kept")]
            assert len(mounts_below(tmp_path)) == 2, "outside nothing has changed"
    finally:
        for name in ("kept", "other"):
            subprocess.run(["umount", str(tmp_path / name)], check=True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-o", "rw,nosuid", "--", "/mnt"], (False, {"rw": True, "nosuid": True})),
        (["-oro", "/mnt"], (False, {"ro": True})),
        (["-o", r"fsname=a\,b\\c,max_read=4096", "/mnt"], (False, {"fsname": r"a,b\c", "max_read": "4096"})),
        (["-u", "-q", "-z", "--", "/mnt"], (True, {})),
        (["-uz", "/mnt"], (True, {})),
        (["--unmount", "/mnt"], (True, {})),
        (["/mnt"], (False, {})),
        ([], (False, {})),
    ],
)
def test_the_stand_in_understands_fusermounts_arguments(arguments: list[str], expected: object) -> None:
    assert parse_arguments(arguments) == expected
