"""A daemon of our own, a tree to serve, and the programs that have to be fetched, compiled or started first."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyfuse3
import pytest

from tests.conftest import make_runtime_dir, mounts_below, wait_for_end
from tests.t5_cli.conftest import Command, Daemon, as_nobody, no_system_daemon, running_daemon
from tests.t5_foreign.programs import Program, directory, grow, in_directory, need, run

__all__ = ["as_nobody", "no_system_daemon"]  # fixtures for the tests here, too
EXAMPLES = Path("/usr/share/doc/libfuse3-dev/examples")

can_mount = os.geteuid() == 0 and os.access("/dev/fuse", os.R_OK | os.W_OK)


@pytest.fixture(autouse=True)
def _only_where_mounting_is_possible() -> None:
    if not can_mount:
        pytest.skip("needs root and /dev/fuse")


@pytest.fixture(scope="package")
def daemon() -> Iterator[Daemon]:
    """One for all tests: none of them may leave anything in it."""
    with make_runtime_dir() as directory, running_daemon(directory) as running:
        yield running


@pytest.fixture(scope="package")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grow(tmp_path_factory.mktemp("foreign") / "tree")


@dataclass
class Mounted:
    """A mount of UDF in use."""

    udf: Command
    path: Path

    def row(self) -> dict[str, Any]:
        return next(row for row in self.udf.mounts() if row["mountpoint"] == str(self.path))

    def kill_program(self) -> None:
        pid = self.row()["driver_pid"]
        os.kill(pid, signal.SIGKILL)
        wait_for_end(pid)


@contextlib.contextmanager
def mount(daemon: Daemon, path: Path, *arguments: str | Path) -> Iterator[Mounted]:
    """A mount with these arguments, unmounted in order at the end, with nothing left of it."""
    path.mkdir(exist_ok=True)
    udf = daemon.udf
    udf.done("mount", *arguments, path)
    try:
        mounted = Mounted(udf, path)
        row = mounted.row()
        assert (row["state"], row["faults"]) == ("ACTIVE", 0), row
        yield mounted
        udf.done("umount", path)
    finally:
        if mounts_below(path):
            udf("umount", "-l", path)
    for pid in (row["shim_pid"], row["driver_pid"]):
        wait_for_end(pid)
    assert [each for each in udf.mounts() if each["mountpoint"] == str(path)] == []


@pytest.fixture(scope="session")
def examples(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples in pyfuse3's source distribution of the version that is installed; kept for the next run."""
    name = f"pyfuse3-{pyfuse3.__version__}"
    cache = getattr(request.config, "cache", None)  # pytest may have been told to keep none
    kept = Path(cache.mkdir(name)) if cache else tmp_path_factory.mktemp(name)
    if not (kept / "examples").is_dir():
        wanted = f"pyfuse3=={pyfuse3.__version__}"
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "pyfuse3", "-d", str(kept)]
        try:
            done = subprocess.run([*pip, wanted], capture_output=True, text=True, timeout=90, check=False)
        except subprocess.TimeoutExpired:
            pytest.skip("pyfuse3's source distribution cannot be downloaded in 90 s")
        if done.returncode:
            pytest.skip(f"pyfuse3's source distribution cannot be downloaded: {done.stderr.strip()[-200:]}")
        with tarfile.open(next(kept.glob("*.tar.gz"))) as archive:
            if hasattr(tarfile, "data_filter"):  # not yet in Debian 12's Python 3.11.2
                archive.extraction_filter = tarfile.data_filter
            archive.extractall(kept / "unpacked")
        shutil.move(next((kept / "unpacked").glob("*/examples")), kept / "examples")
    return kept / "examples"


def compiled(source: str, target: Path) -> Path:
    """A program that was one of libfuse's examples, perhaps changed."""
    need("gcc", "pkg-config")
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "fuse3"], capture_output=True, text=True, check=False
    ).stdout.split()
    if not flags:
        pytest.skip("libfuse3-dev is not installed")
    defines = ["-DHAVE_POSIX_FALLOCATE", "-DHAVE_COPY_FILE_RANGE"]
    file = target.with_suffix(".c")
    file.write_text(source)
    run("gcc", "-O1", "-w", *defines, f"-I{EXAMPLES}", "-o", target, file, *flags)
    return target


@pytest.fixture(scope="package")
def passthrough_source() -> str:
    if not (EXAMPLES / "passthrough_ll.c").is_file():
        pytest.skip("the examples of libfuse3-dev are not installed")
    return (EXAMPLES / "passthrough_ll.c").read_text()


@pytest.fixture(scope="package")
def passthrough_ll(passthrough_source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(passthrough_source, tmp_path_factory.mktemp("compiled") / "passthrough_ll")


@pytest.fixture(scope="package")
def splicing_ll(passthrough_source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It splices its replies although nobody has offered that."""
    spot = "\tif(conn->capable & FUSE_CAP_EXPORT_SUPPORT)\n"
    assert passthrough_source.count(spot) == 1
    force = "".join(
        f"\tconn->{word} |= FUSE_CAP_SPLICE_WRITE | FUSE_CAP_SPLICE_MOVE;\n" for word in ("capable", "want")
    )
    source = passthrough_source.replace(spot, force + spot)
    return compiled(source, tmp_path_factory.mktemp("compiled") / "splicing_ll")


@pytest.fixture(scope="package")
def sshfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """sshfs, with an SSH server of its own on the loopback interface."""
    need("sshfs", "ssh", "sshd", "ssh-keygen")
    place = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (place / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {place}/host\nAuthorizedKeysFile {place}/user.pub\n"
        "PermitRootLogin yes\nStrictModes no\nUsePAM no\nPidFile none\nSubsystem sftp internal-sftp\n"
    )
    room = Path("/run/sshd")  # where sshd locks up its unprivileged half
    made = not room.exists()
    room.mkdir(mode=0o755, exist_ok=True)
    server = subprocess.Popen(
        [shutil.which("sshd") or "sshd", "-D", "-e", "-f", str(place / "config")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        for line in server.stderr:
            if "Server listening" in line:
                break
        else:
            pytest.skip("sshd does not start here")
        public = (place / "host.pub").read_text().split()
        (place / "known").write_text(f"[127.0.0.1]:{port} {public[0]} {public[1]}\n")
        options = f"port={port},IdentityFile={place}/user,UserKnownHostsFile={place}/known"
        yield Program(
            "sshfs",
            f"sshfs -f -F /dev/null -o BatchMode=yes,{options} {{source}} {{mountpoint}}",
            lambda tree, work: f"root@127.0.0.1:{directory(tree, work)}",
            in_directory,
        )
    finally:
        server.terminate()
        server.communicate()
        if made:
            with contextlib.suppress(OSError):
                room.rmdir()
