"""The README's examples are executed, so that they stay true."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from udf.cli import build_parser
from udf.manifest import check as manifest

from .conftest import Daemon

PROGRAMS = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # not every user's PATH has those of administrators
README = (ROOT / "README.md").read_text()
SCRIPTS = re.findall(r"<!-- tested -->\n```sh\n(.*?)```", README, re.DOTALL)
FILES = re.findall(r"<!-- file (\S+) -->\n```\w+\n(.*?)```", README, re.DOTALL)


def test_smallest_filesystem_is_shown_verbatim() -> None:
    shown = re.search(r"fs/hello\.py`:\n\n```python\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    assert shown.group(1) == (ROOT / "fs" / "hello.py").read_text()


def test_smallest_usb_driver_is_shown_verbatim_and_is_small() -> None:
    shown = re.search(r"drivers/thermometer\.py`:\n\n```python\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    assert shown.group(1) == (ROOT / "drivers" / "thermometer.py").read_text()
    assert len(shown.group(1).splitlines()) <= 25


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.splitlines()[0] for script in SCRIPTS])
def test_example_works_as_it_stands(script: str, daemon: Daemon, tmp_path: Path) -> None:
    """In an empty directory, with `udf` on PATH bound to a daemon of the test's own."""
    if "mksquashfs" in script and shutil.which("mksquashfs") is None:
        pytest.skip("squashfs-tools are not installed")
    if "mkfs.fat" in script and shutil.which("mkfs.fat", path=PROGRAMS) is None:
        pytest.skip("dosfstools are not installed")
    if "squashfuse_ll" in script and shutil.which("squashfuse_ll") is None:
        pytest.skip("squashfuse is not installed")
    programs = tmp_path / "bin"
    programs.mkdir()
    wrapper = programs / "udf"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -m udf "$@" --socket {daemon.socket}\n')
    wrapper.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    for name, text in FILES:
        (work / name).write_text(text)
    path = f"{programs}:{PROGRAMS}"
    result = subprocess.run(
        ["sh", "-eux", "-c", script],
        cwd=work,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert daemon.udf.mounts() == []


def test_every_command_is_described() -> None:
    commands = build_parser()._subparsers
    assert commands is not None
    for name in next(iter(commands._group_actions)).choices or ():
        assert f"`udf {name}" in README, name


def test_every_key_of_the_manifest_is_described() -> None:
    for key in (*manifest._KEYS, "class", "command"):
        assert f"| `{key}` |" in README, key


def test_every_state_and_mount_option_is_described() -> None:
    from udf.supervisor.instance import State
    from udf.supervisor.options import _FLAGS

    for state in State:
        assert f"`{state}`" in README
    for option in _FLAGS:
        assert f"`{option}`" in README or option == "relatime", option
