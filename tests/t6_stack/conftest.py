"""Both POSIX drivers, mounted by the command line."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.t5_cli.conftest import Command

Counters = Callable[[], dict[str, int]]


class Tree:
    """One mount of a driver under test."""

    def __init__(self, udf: Command, root: Path) -> None:
        self._udf = udf
        self.root = root

    def counters(self) -> dict[str, int]:
        rows = [row for row in self._udf.mounts() if row["mountpoint"] == str(self.root)]
        return dict(rows[0]["counters"])


@pytest.fixture(params=["passthrough", "memfs"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tree]:
    udf = Command()
    root = tmp_path / "mount"
    root.mkdir()
    (tmp_path / "source").mkdir()
    source = [tmp_path / "source"] if request.param == "passthrough" else []
    udf.done("mount", "-t", request.param, *source, root, "-o", "allow_other,suid,dev")
    try:
        yield Tree(udf, root)
    finally:
        ended = udf("umount", root)
        if ended.returncode:
            subprocess.run(["umount", "-l", root], check=False)
    assert ended.returncode == 0, ended.stderr
    assert str(root) not in udf("status").stdout
