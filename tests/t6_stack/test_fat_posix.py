"""What pjdfstest asks of POSIX and Linux' own vfat can give, fs/fat gives too: assertion by assertion.

vfat.json is what passed on the vfat of Linux 6.1 (Debian's, in a VM), mounted by root with default options, on what
`mkfs.fat -F 32` makes of 64 MiB: what `python -m tests.t6_stack.pjdfstest DIRECTORY` printed there. BESIDES is what FAT
can do and vfat does not. All else asks for owners, modes, links, special files or finer times, which FAT has not, or
(open/25.t, which passes) for a volume with room for 2 GiB. Three scripts that rename and chown as every user whatever
belongs to every other are left out unless `UDF_POSIX=all`: they are two thirds of all assertions.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.t3_fat.lab import MIB, fsck, make
from tests.t5_cli.conftest import Command
from tests.t6_stack.pjdfstest import SOURCE, Suite, counted, read, written

APPLICABLE = Path(__file__).with_name("pjdfstest") / "vfat.json"
BESIDES = {  # vfat looks for a name of 256 characters, and says that there is none; POSIX wants ENAMETOOLONG
    "chmod/02.t": "5", "chown/02.t": "5,10", "ftruncate/02.t": "5", "link/02.t": "8,10", "mkfifo/02.t": "4",
    "mknod/02.t": "4,8,12", "rename/01.t": "8", "rmdir/02.t": "4", "symlink/02.t": "5", "truncate/02.t": "5",
    "unlink/02.t": "4",
}  # fmt: skip
SLOW = ("rename/09.t", "rename/10.t", "chown/00.t")
ALL = os.environ.get("UDF_POSIX") == "all"
PATIENCE = 1200.0 if ALL else 150.0


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A FAT32 volume behind a block service and a shim; it is clean when the test has ended."""
    image = make(tmp_path / "image", 64 * MIB, kind=32)
    path = tmp_path / f"mnt-{os.getpid()}"
    path.mkdir()
    udf = Command()
    udf.done("mount", "-t", "fat", image, path, "-o", "allow_other")
    try:
        yield path
    finally:
        ended = udf("umount", path)
        if ended.returncode:
            subprocess.run(["umount", "-l", path], check=False)
    assert ended.returncode == 0, ended.stderr
    fsck(image)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to act as other users")
@pytest.mark.skipif(
    not SOURCE, reason="PJDFSTEST names no checkout of pjdfstest (commit 85a8aea), which no package has"
)
@pytest.mark.timeout(2 * PATIENCE)
def test_what_pjdfstest_finds_right_in_the_kernels_vfat_it_finds_right_here(root: Path) -> None:
    applicable = {name: numbers for name, numbers in read(APPLICABLE).items() if ALL or name not in SLOW}
    for name, text in BESIDES.items():
        applicable[name] = applicable.get(name, frozenset()) | counted(text)
    with Suite() as suite:
        found = suite.run_all(applicable, root, PATIENCE)
    wrong = {name: numbers - found[name].passed for name, numbers in applicable.items()}
    sentences = [
        f"{name}: {found[name].said.get(number, f'{number} was not reached')}"
        for name, numbers in wrong.items()
        for number in sorted(numbers)
    ]
    print(f"{sum(map(len, applicable.values()))} assertions of {len(applicable)} scripts")
    assert not sentences, "\n".join(sentences)
    assert os.listdir(root) == []


def test_lists_of_assertions_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "list"
    for numbers, text in (({1, 2, 3, 7}, "1-3,7"), ({4}, "4"), ({1, 3, 4}, "1,3-4")):
        assert written(numbers) == text
        assert counted(text) == numbers
        path.write_text(f'{{"open/00.t": "{text}"}}')
        assert read(path) == {"open/00.t": numbers}
