"""`udf doctor` says what is there and what is missing, and tells by its exit code whether mounting can work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from udf import doctor
from udf.fuse.flags import Init

from .conftest import Command, elsewhere

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mount namespaces need root")


def test_report_covers_every_check_and_has_a_fix_for_all_that_is_bad(udf: Command) -> None:
    report = json.loads(udf.done("doctor", "--json"))
    assert report["can_mount"] is True
    names = [check["name"] for check in report["checks"]]
    for name in ("python", "pyfuse3", "libfuse", "/dev/fuse", "kernel", "fusermount3", "namespaces", "open files"):
        assert name in names
    for check in report["checks"]:
        assert check["state"] in ("ok", "note", "bad")
        assert check["state"] != "bad" or check["fix"], check


def test_text_ends_with_the_verdict(udf: Command) -> None:
    assert udf.done("doctor").splitlines()[-1] == "This machine can mount."


@needs_root
def test_probe_asks_the_kernel_and_leaves_no_mount() -> None:
    before = _mounts()
    probe = doctor.probe_init()
    assert probe.error == ""
    assert (probe.major, probe.minor) >= (7, doctor.OLDEST_MINOR)
    assert probe.flags & Init.ASYNC_READ
    assert _mounts() == before


def _mounts() -> list[str]:
    """All but those of other tests, which may run at the same time."""
    table = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in table if not line.split()[4].startswith(("/tmp/udf-t", "/tmp/pytest-of-"))]


@needs_root
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3", "does not exist"),
        ("mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && touch /dev/fuse", "not a character device"),
        ("mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod /dev/fuse c 10 222", "cannot be opened"),
    ],
)
def test_machine_without_a_usable_device_is_exit_code_1(change: str, sentence: str, udf: Command) -> None:
    command = " ".join(udf.argv("doctor", "--json"))
    result = subprocess.run(
        elsewhere(f"{change} && exec {command}"),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 1, result
    report = json.loads(result.stdout)
    assert report["can_mount"] is False
    device = next(check for check in report["checks"] if check["name"] == "/dev/fuse")
    assert device["state"] == "bad"
    assert sentence in device["text"]
    assert device["fix"]


@needs_root
def test_root_without_the_right_to_mount_is_told_so() -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is missing")
    command = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable, "-m", "udf", "doctor"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 1, result
    assert "SYS_ADMIN" in result.stdout
    assert result.stderr == ""


@needs_root
def test_user_who_may_not_open_the_device_is_told_so() -> None:
    """Everything is imported before the rights go: the interpreter itself may be root's alone."""
    code = """
import os, sys
from udf import doctor
from udf.cli import commands, show
doctor.examine()
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
os.environ["XDG_RUNTIME_DIR"] = ""
from udf.cli import main
sys.exit(main(["doctor"]))
"""
    program = (
        'mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 600 /dev/fuse c 10 229 && exec $1 -c "$2"'
    )
    result = subprocess.run(
        elsewhere(program, sys.executable, code),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 1, result
    assert "chmod 666 /dev/fuse" in result.stdout
    assert result.stderr == ""


@needs_root
@pytest.mark.parametrize("is_mount_point", [False, True])
def test_chroot_whose_root_is_no_mount_point_is_told_so(is_mount_point: bool, udf: Command, tmp_path: Path) -> None:
    """The advice was `--cap-add SYS_ADMIN`: root in a chroot has it, and no mount can be made there all the same."""
    root = tmp_path / "root"
    root.mkdir()
    program = """
        ! $2 || mount --bind "$1" "$1" || exit 99
        for entry in /*; do
            if [ -L "$entry" ]; then cp -a "$entry" "$1"
            elif [ -d "$entry" ]; then mkdir "$1$entry" && mount --rbind "$entry" "$1$entry" || exit 99
            fi
        done
        cd "$1" || exit 99  # a new mount is seen by who looks the path up again
        root=$1 && shift 2 && exec chroot "$root" "$@"
    """
    result = subprocess.run(
        elsewhere(program, root, str(is_mount_point).lower(), *udf.argv("doctor", "--json")),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert result.returncode == (0 if is_mount_point else 1), result
    report = json.loads(result.stdout)
    assert report["can_mount"] is is_mount_point
    (kernel,) = [check for check in report["checks"] if check["name"] == "kernel"]
    assert ("/ is no mount point" in kernel["text"]) is not is_mount_point
    assert ("mount --bind DIR DIR" in kernel["fix"]) is not is_mount_point
    assert "SYS_ADMIN" not in kernel["fix"]
