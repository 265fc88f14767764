"""Who keeps a directory busy is found without looking below it."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from udf.cli.holders import describe, find_holders

WAIT = "import sys; print('ready', flush=True); sys.stdin.read()"
HOLDS = {
    "descriptor": f"f = open('file'); import os; os.chdir('/'); {WAIT}",
    "directory": f"import os; os.chdir('.'); {WAIT}",
    "mapping": f"import mmap, os; f = open('file', 'rb'); m = mmap.mmap(f.fileno(), 1, prot=1); f.close();"
    f"os.chdir('/'); {WAIT}",
    "root": f"import os; os.chroot('.'); os.chdir('/'); {WAIT}",
}


@pytest.fixture
def held(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """The pid of a process that holds something below tmp_path."""
    (tmp_path / "file").write_bytes(b"x" * mmap.PAGESIZE)
    code = HOLDS[request.param]
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
        process.communicate()


@pytest.mark.parametrize("held", list(HOLDS), indirect=True)
def test_process_with_any_kind_of_hold_is_named(held: int, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("chroot needs root")
    found, _ = find_holders(str(tmp_path))
    assert [holder.pid for holder in found] == [held]
    assert str(found[0]).startswith(f"python ({held}): {tmp_path}") or f"({held})" in str(found[0])


@pytest.mark.parametrize("held", ["directory"], indirect=True)
def test_neighbour_with_a_longer_name_is_not_held(held: int, tmp_path: Path) -> None:
    assert find_holders(str(tmp_path)[:-1])[0] == []
    assert find_holders(f"{tmp_path}/other")[0] == []


@pytest.mark.parametrize("held", ["directory"], indirect=True)
def test_number_and_time_are_bounded(held: int, tmp_path: Path) -> None:
    assert find_holders(str(tmp_path), most=0) == ([], True)
    assert find_holders(str(tmp_path), seconds=-1.0) == ([], True)


def test_nobody_found_is_said_too(tmp_path: Path) -> None:
    assert describe(str(tmp_path)).startswith("a process that cannot be seen from here")
