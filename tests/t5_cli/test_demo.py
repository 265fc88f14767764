"""`make demo` is what a newcomer sees first: it must work, and leave nothing behind however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, mounts_below

STICK, PARTS = "demo.py", "demo_parts.py"
EXPECTED = {
    STICK: (
        "HOLIDAY (vfat) is mounted on",
        "Thank you!",
        "    # usb_storage",
        "    # fat",
        "cp: No such device (ENODEV)",
        "DETACHED",
        "cp goes on at",
        "12293/81751 clusters",  # fsck.fat, of the film twice and the letters
        "disk0 may be pulled out",
        "All checks passed",
    ),
    PARTS: (
        "pass 2: all equal",
        "Hello, world!",
        "still open",
        "CACHE HITS",
        "LOOKUP",
        "udf umount",
        "All checks passed",
    ),
}
MOMENTS = {
    STICK: ["$ udf devices", "$ cp film.bin", "$ udf status"],
    PARTS: ["A real directory", "$ udf trace"],
}


def command(script: str) -> list[str]:
    return [sys.executable, str(ROOT / "packaging" / script)]


def environment(scratch: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("script", EXPECTED)
def test_demo_shows_everything_and_leaves_nothing(runtime_dir: Path, script: str) -> None:
    result = subprocess.run(
        command(script),
        env=environment(runtime_dir),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for word in EXPECTED[script]:
        assert word in result.stdout
    assert list(runtime_dir.iterdir()) == []


def running(script: str, runtime_dir: Path) -> subprocess.Popen[str]:
    """A demo whose words can be followed."""
    return subprocess.Popen(
        command(script),
        env=environment(runtime_dir),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("script", "moment", "number"),
    [
        (script, moment, (signal.SIGINT, signal.SIGTERM)[index % 2])
        for script, moments in MOMENTS.items()
        for index, moment in enumerate(moments)
    ],
)
def test_interrupted_demo_leaves_nothing(runtime_dir: Path, script: str, moment: str, number: signal.Signals) -> None:
    with running(script, runtime_dir) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if moment in line:
                process.send_signal(number)
                break
        process.stdout.read()
        complaint = process.stderr.read()
        assert process.wait() == 130, complaint
    assert "interrupted" in complaint
    assert "Traceback" not in complaint
    assert mounts_below(runtime_dir) == []
    assert list(runtime_dir.iterdir()) == []


def test_demo_goes_on_when_somebody_drops_the_kernels_caches(runtime_dir: Path) -> None:
    """A test of another program did, and the letter that should have been cached ended the demo with a traceback."""
    if os.geteuid() != 0:
        pytest.skip("dropping caches needs root")
    with running(STICK, runtime_dir) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        shown = ""
        for line in process.stdout:
            shown += line
            if line.startswith("DETACHED"):
                Path("/proc/sys/vm/drop_caches").write_text("2\n")
        complaint = process.stderr.read()
        assert process.wait() == 0, complaint
    assert complaint == ""
    for word in EXPECTED[STICK]:
        assert word in shown
    assert list(runtime_dir.iterdir()) == []
