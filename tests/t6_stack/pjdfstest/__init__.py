"""pjdfstest, the foreign suite of what POSIX asks of a filesystem: which of its assertions pass in a directory.

Owns: how its source is built and run, and lists of assertions as text. The source is no part of this project, and no
package has it: the environment's PJDFSTEST is a checkout of github.com/pjd/pjdfstest at commit 85a8aea.
Must never: know which driver serves that directory.
Called by: test_fat_posix.py; by hand to make such a list of whatever is mounted there, as root:
`python -m tests.t6_stack.pjdfstest DIRECTORY [PATTERN…]`, with patterns such as 'rename/0*.t'.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

SOURCE = os.environ.get("PJDFSTEST", "")
# What its configure finds with glibc on Linux.
FOUND = (
    "FACCESSAT", "FCHMODAT", "FCHOWNAT", "FSTATAT", "LCHMOD", "LINKAT", "MKDIRAT", "MKFIFOAT", "MKNODAT", "OPENAT",
    "POSIX_FALLOCATE", "READLINKAT", "RENAMEAT", "SYMLINKAT", "UTIMENSAT", "STRUCT_STAT_ST_ATIM",
    "STRUCT_STAT_ST_CTIM", "STRUCT_STAT_ST_MTIM", "SYS_SYSMACROS_H",
)  # fmt: skip
# These replace functions of its misc.sh and say the same with one process for each assertion instead of eight.
# What is passed over on this system passes no assertion. Two are about FAT: its times go by two seconds, and its names
# have 255 UTF-16 units, of which Linux' vfat says that they are up to 1,530 bytes, and then refuses names of so many.
QUICKER = r"""
expect()
{
	wanted="${1}"
	shift
	r=`${fstest} $* 2>/dev/null`
	r="${r##*
}"
	if [ "${r}" = "${wanted}" ] || echo "${r}" | ${GREP} -Eq '^'${wanted}'$'; then
		echo "ok ${ntest}"
	else
		echo "not ok ${ntest} - tried '$*', expected ${wanted}, got ${r}"
	fi
	: $(( ntest += 1 ))
}
test_check()
{
	if [ $* ] 2>/dev/null; then echo "ok ${ntest}"; else echo "not ok ${ntest} - checked $*"; fi
	: $(( ntest += 1 ))
}
namegen_len()
{
	name=""
	while [ ${#name} -lt ${1} ]; do
		read part </proc/sys/kernel/random/uuid
		name="${name}${part}"
	done
	printf "%.${1}s" "${name}"
}
namegen() { read part </proc/sys/kernel/random/uuid; echo "pjdfstest_${part}"; }
namegen_max() { namegen_len 255; }
dirgen_max()
{
	name=""
	while [ ${#name} -lt 4095 ]; do
		name="${name}`namegen_len 127`/"
	done
	printf "%.4095s" "${name}" | sed -E 's@/$@x@'
}
quick_exit() { exit 0; }
sleep() { command sleep 2; }
"""
_LINE = re.compile(r"(not )?ok (\d+)(.*)")
_AT_ONCE = 6

Numbers = frozenset[int]


class Suite:
    """pjdfstest, built in a directory of its own; a context manager."""

    def __init__(self) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="pjdfstest-"))
        self._home.chmod(0o755)
        self.scripts = self._home / "tests"

    def __enter__(self) -> Suite:
        try:
            shutil.copy(Path(SOURCE) / "pjdfstest.c", self._home)
            shutil.copytree(Path(SOURCE) / "tests", self.scripts)
            (self._home / "config.h").write_text("".join(f"#define HAVE_{name} 1\n" for name in FOUND))
            compiler = ["gcc", "-O1", "-D_GNU_SOURCE", "-I.", "-o", "pjdfstest", "pjdfstest.c"]
            subprocess.run(compiler, cwd=self._home, check=True)
            with (self.scripts / "misc.sh").open("a") as file:
                file.write(QUICKER)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._home)

    def names(self, *patterns: str) -> list[str]:
        """The scripts that fit, such as "open/00.t"."""
        return sorted({str(path.relative_to(self.scripts)) for each in patterns for path in self.scripts.glob(each)})

    def run(self, name: str, place: Path, patience: float) -> Outcome:
        """Run one script in a new directory of `place`, for so many seconds at most."""
        directory = place / name.replace("/", "-")
        directory.mkdir()
        done = subprocess.run(
            ["sh", self.scripts / name], cwd=directory, capture_output=True, text=True, errors="replace",
            timeout=patience, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        shutil.rmtree(directory)
        return Outcome(done.stdout)

    def run_all(self, names: Iterable[str], place: Path, patience: float) -> dict[str, Outcome]:
        """Run them beside each other, as most of them wait for a clock or for a process; the longest come first."""
        order = sorted(names, key=lambda name: -(self.scripts / name).stat().st_size)
        with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
            return dict(zip(order, pool.map(lambda name: self.run(name, place, patience), order), strict=True))


class Outcome:
    """What one script said: `passed` are the numbers of the assertions that hold, `said` a sentence for each."""

    def __init__(self, output: str) -> None:
        found = [match for match in map(_LINE.match, output.splitlines()) if match]
        self.passed: Numbers = frozenset(int(match[2]) for match in found if not match[1])
        self.said = {int(match[2]): match[0] for match in found}


# ---- lists of assertions


def written(numbers: Iterable[int]) -> str:
    """As text: "1-4,7"."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(f"{first}-{last}" if first < last else str(first) for first, last in ranges)


def counted(text: str) -> Numbers:
    """The numbers of such a text."""
    found: set[int] = set()
    for each in text.split(","):
        first, _, last = each.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def read(path: Path) -> dict[str, Numbers]:
    """A list that `python -m tests.t6_stack.pjdfstest` printed."""
    return {name: counted(text) for name, text in json.loads(path.read_text()).items()}
