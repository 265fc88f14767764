"""`make demo` is what a newcomer sees first: it must work, and leave nothing behind however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, mounts_below

COMMAND = [sys.executable, str(ROOT / "packaging" / "demo.py")]


def environment(scratch: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": str(ROOT)}


def test_demo_shows_everything_and_leaves_nothing(runtime_dir: Path) -> None:
    result = subprocess.run(
        COMMAND,
        env=environment(runtime_dir),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    expected = (
        "pass 2: all equal",
        "Hello, world!",
        "still open",
        "CACHE HITS",
        "LOOKUP",
        "udf umount",
        "All checks passed",
    )
    for word in expected:
        assert word in result.stdout
    assert list(runtime_dir.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["A real directory", "$ udf status", "$ udf trace", "$ udf umount"])
def test_interrupted_demo_leaves_nothing(runtime_dir: Path, number: signal.Signals, moment: str) -> None:
    with subprocess.Popen(
        COMMAND,
        env=environment(runtime_dir),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
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
