"""Programs that a filesystem must serve rightly whatever happens to its driver; each checks itself against a model.

Run as a script: `workloads.py NAME DIRECTORY SECONDS SEED`. It works in rounds until the time is over, prints what it
did as one JSON line, and ends with 1 and a sentence at the first error or difference. Standard library only.
"""

from __future__ import annotations

import errno
import filecmp
import json
import mmap
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


class Different(Exception):
    """What is there is not what was written."""


class Clock:
    """How long to go on."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.operations = 0

    def goes_on(self) -> bool:
        self.operations += 1
        return time.monotonic() < self._end


# ---- contents


def contents(top: Path, clock: Clock, rng: random.Random) -> None:
    """One file against a copy in memory: pwrite, pread, truncate, mmap, fsync, close and open, in random order."""
    path = top / "contents"
    size = 1 << 20
    shadow = bytearray()
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    while clock.goes_on():
        what = rng.randrange(12)
        at = rng.randrange(size)
        length = rng.randrange(1, 70_000)
        if what < 4:
            data = rng.randbytes(length)
            if os.pwrite(fd, data, at) != length:
                raise Different("a short write")
            shadow.extend(bytes(max(0, at - len(shadow))))
            shadow[at : at + length] = data
        elif what < 8:
            if os.pread(fd, length, at) != shadow[at : at + length]:
                raise Different(f"{length} bytes at {at} are not what was written")
        elif what == 8:
            os.ftruncate(fd, at)
            del shadow[at:]
            shadow.extend(bytes(at - len(shadow)))
        elif what == 9 and shadow:
            with mmap.mmap(fd, len(shadow)) as view:
                start = rng.randrange(len(shadow))
                data = rng.randbytes(min(4096, len(shadow) - start))
                view[start : start + len(data)] = data
                shadow[start : start + len(data)] = data
                view.flush()
        elif what == 10:
            os.fsync(fd)
        else:
            os.close(fd)
            fd = os.open(path, os.O_RDWR)
            if os.fstat(fd).st_size != len(shadow):
                raise Different(f"{os.fstat(fd).st_size} bytes instead of {len(shadow)}")
    os.close(fd)
    if path.read_bytes() != shadow:
        raise Different("the file is not what was written")


# ---- names


class Names:
    """A tree of names in memory, and the same in the filesystem; both do the same, and are compared."""

    def __init__(self, top: Path, rng: random.Random) -> None:
        self.top = top
        self.rng = rng
        self.dirs: dict[str, set[str]] = {"": set()}  # directory -> names in it
        self.files: dict[str, int] = {}  # path -> number of the file; several paths may have one
        self.held: list[tuple[int, int]] = []  # open descriptors of files that may have no name any more
        self.next = 0

    def path(self, name: str) -> str:
        return f"{self.top}/{name}" if name else str(self.top)

    def fresh(self) -> tuple[str, str]:
        parent = self.rng.choice(sorted(self.dirs))
        self.next += 1
        name = f"n{self.next:05}"
        return parent, f"{parent}/{name}" if parent else name

    def links(self, number: int) -> int:
        return sum(1 for other in self.files.values() if other == number)

    def _remove(self, path: str) -> None:
        del self.files[path]
        parent, _, name = path.rpartition("/")
        self.dirs[parent].discard(name)

    def _add(self, path: str, number: int) -> None:
        self.files[path] = number
        parent, _, name = path.rpartition("/")
        self.dirs[parent].add(name)

    def create(self) -> None:
        _, path = self.fresh()
        fd = os.open(self.path(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
        os.write(fd, b"%d" % self.next)
        self._add(path, self.next)
        if self.rng.random() < 0.2 and len(self.held) < 8:
            self.held.append((fd, self.next))
        else:
            os.close(fd)

    def mkdir(self) -> None:
        parent, path = self.fresh()
        if path.count("/") < 5 and len(self.dirs) < 40:
            os.mkdir(self.path(path), 0o750)
            self.dirs[path] = set()
            self.dirs[parent].add(path.rpartition("/")[2])

    def rmdir(self) -> None:
        empty = [path for path, names in self.dirs.items() if path and not names]
        full = [path for path, names in self.dirs.items() if path and names]
        if full and self.rng.random() < 0.3:
            try:
                os.rmdir(self.path(self.rng.choice(full)))
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            else:
                raise Different("a directory that is not empty was removed")
        elif empty:
            path = self.rng.choice(empty)
            os.rmdir(self.path(path))
            del self.dirs[path]
            parent, _, name = path.rpartition("/")
            self.dirs[parent].discard(name)

    def unlink(self) -> None:
        if self.files:
            path = self.rng.choice(sorted(self.files))
            os.unlink(self.path(path))
            self._remove(path)

    def link(self) -> None:
        if self.files:
            old = self.rng.choice(sorted(self.files))
            _, path = self.fresh()
            os.link(self.path(old), self.path(path))
            self._add(path, self.files[old])

    def rename(self) -> None:
        if not self.files:
            return
        old = self.rng.choice(sorted(self.files))
        new = self.rng.choice(sorted(self.files)) if self.rng.random() < 0.5 else self.fresh()[1]
        os.rename(self.path(old), self.path(new))
        if new in self.files and self.files[new] == self.files[old]:
            return  # two names of one file: nothing happens
        number = self.files[old]
        self._remove(old)
        self._add(new, number)

    def check_one(self) -> None:
        if self.files:
            path = self.rng.choice(sorted(self.files))
            found = os.stat(self.path(path))
            wanted = self.links(self.files[path])
            if found.st_nlink != wanted:
                raise Different(f"{path} has {found.st_nlink} links instead of {wanted}")
            if Path(self.path(path)).read_bytes() != b"%d" % self.files[path]:
                raise Different(f"{path} is another file")

    def check_held(self) -> None:
        if self.held:
            fd, number = self.held.pop(self.rng.randrange(len(self.held)))
            if os.pread(fd, 20, 0) != b"%d" % number:
                raise Different("an open file is another file")
            if os.fstat(fd).st_nlink != self.links(number):
                raise Different(f"an open file has {os.fstat(fd).st_nlink} links instead of {self.links(number)}")
            os.close(fd)

    def check_all(self) -> None:
        for path, names in self.dirs.items():
            found = set(os.listdir(self.path(path)))
            if found != names:
                raise Different(f"in {path or '/'}: {sorted(found ^ names)[:5]} are there or not, wrongly")


def names(top: Path, clock: Clock, rng: random.Random) -> None:
    """Create, link, rename, unlink, mkdir, rmdir and look, against a model."""
    model = Names(top, rng)
    doings: list[Callable[[], None]] = [
        *[model.create] * 4,
        *[model.check_one] * 4,
        *[model.rename] * 3,
        *[model.unlink] * 3,
        *[model.link] * 2,
        *[model.check_held] * 2,
        model.mkdir,
        model.rmdir,
    ]
    while clock.goes_on():
        rng.choice(doings)()
        if clock.operations % 100 == 0:
            model.check_all()
    while model.held:
        model.check_held()
    model.check_all()


# ---- programs


def sqlite(top: Path, clock: Clock, rng: random.Random) -> None:
    """Transactions, some rolled back, against sums in memory; the database checks itself."""
    path = top / "data.sqlite"
    balance = [1000] * 20
    db = sqlite3.connect(path, isolation_level=None, timeout=60)
    db.execute("PRAGMA journal_mode=DELETE" if rng.random() < 0.7 else "PRAGMA journal_mode=TRUNCATE")
    db.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER, note BLOB)")
    db.executemany("INSERT INTO account VALUES (?, ?, ?)", [(i, 1000, b"") for i in range(20)])
    while clock.goes_on():
        a, b = rng.sample(range(20), 2)
        amount = rng.randrange(100)
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE account SET balance = balance - ?, note = ? WHERE id = ?", (amount, rng.randbytes(3000), a))
        db.execute("UPDATE account SET balance = balance + ? WHERE id = ?", (amount, b))
        if rng.random() < 0.2:
            db.execute("ROLLBACK")
        else:
            db.execute("COMMIT")
            balance[a] -= amount
            balance[b] += amount
        if clock.operations % 20 == 0:
            found = [row[0] for row in db.execute("SELECT balance FROM account ORDER BY id")]
            if found != balance:
                raise Different("the accounts are not what was committed")
            if db.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
                raise Different("the database is damaged")
    db.close()


def run(*argv: str | Path, cwd: Path) -> None:
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise Different(f"{' '.join(map(str, argv))} ended with {done.returncode}: {done.stderr[-500:]}")


def git(top: Path, clock: Clock, rng: random.Random) -> None:
    """A repository that grows, is cloned, checked and packed."""
    origin = top / "origin"
    origin.mkdir()
    os.environ.update(GIT_CONFIG_GLOBAL="/dev/null", GIT_AUTHOR_NAME="a", GIT_AUTHOR_EMAIL="a@b", HOME=str(top))
    os.environ.update(GIT_COMMITTER_NAME="a", GIT_COMMITTER_EMAIL="a@b")
    run("git", "init", "-q", "-b", "main", cwd=origin)
    while clock.goes_on():
        for _ in range(10):
            name = origin / f"d{rng.randrange(5)}" / f"f{rng.randrange(50)}"
            name.parent.mkdir(exist_ok=True)
            name.write_bytes(rng.randbytes(rng.randrange(5000)))
        run("git", "add", "-A", cwd=origin)
        run("git", "commit", "-q", "--allow-empty", "-m", str(clock.operations), cwd=origin)
        clone = top / f"clone{clock.operations}"
        run("git", "clone", "-q", "--no-hardlinks", origin, clone, cwd=top)
        run("git", "fsck", "--full", "--strict", cwd=clone)
        run("git", "gc", "-q", "--aggressive" if rng.random() < 0.1 else "--auto", cwd=origin)
        run("rm", "-rf", clone, cwd=top)
    run("git", "gc", "-q", cwd=origin)
    run("git", "fsck", "--full", "--strict", cwd=origin)


def tar(top: Path, clock: Clock, rng: random.Random) -> None:
    """A tree that is packed, unpacked and compared."""
    source = top / "source"
    source.mkdir()
    for number in range(120):
        path = source / f"d{number % 7}" / f"file{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(rng.randbytes(rng.randrange(30_000)))
        if number % 10 == 0:
            os.symlink(path.name, path.with_suffix(".link"))
        if number % 15 == 0:
            os.link(path, path.with_suffix(".hard"))
    while clock.goes_on():
        target = top / f"target{clock.operations}"
        target.mkdir()
        run("tar", "cf", top / "all.tar", "-C", source, ".", cwd=top)
        run("tar", "xf", top / "all.tar", "-C", target, cwd=top)
        _compare(source, target)
        run("rm", "-rf", target, cwd=top)


def _compare(one: Path, other: Path) -> None:
    for directory, names, files in os.walk(one):
        twin = other / Path(directory).relative_to(one)
        if sorted(os.listdir(twin)) != sorted(names + files):
            raise Different(f"the names in {twin} are not those in {directory}")
        for name in files:
            a, b = Path(directory, name), twin / name
            if stat.S_IFMT(a.lstat().st_mode) != stat.S_IFMT(b.lstat().st_mode):
                raise Different(f"{b} has another type than {a}")
            if a.is_symlink():
                if os.readlink(a) != os.readlink(b):
                    raise Different(f"{b} points elsewhere than {a}")
            elif not filecmp.cmp(a, b, shallow=False):
                raise Different(f"{b} has other contents than {a}")


def copies(top: Path, clock: Clock, rng: random.Random) -> None:
    """A tree of files and directories that `cp -r` copies, and copies from the copy; each is compared, then removed.

    One stays.
    """
    source = Path(tempfile.mkdtemp())
    try:
        for number in range(24):
            path = source / f"directory {number % 4}" / f"a file with the number {number}.bin"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(rng.randbytes(rng.randrange(1 << rng.randrange(4, 18))))
        while clock.goes_on():
            one, other = top / f"one{clock.operations}", top / f"other{clock.operations}"
            run("cp", "-r", source, one, cwd=top)
            _compare(source, one)
            run("cp", "-r", one, other, cwd=top)
            _compare(source, other)
            run("rm", "-rf", one, cwd=top)
            run("rm", "-rf", other, cwd=top)
        run("cp", "-r", source, top / "last", cwd=top)
        _compare(source, top / "last")
    finally:
        shutil.rmtree(source)


def reads(top: Path, clock: Clock, rng: random.Random) -> None:
    """Two files larger than what is read ahead of them, from end to end, here and there, past the page cache, and while
    parts are written again as they were."""
    files: dict[Path, bytes] = {}
    for number in range(2):
        files[top / f"reads{number}"] = rng.randbytes(rng.randrange(5 << 20, 7 << 20))
    for path, data in files.items():
        path.write_bytes(data)
    while clock.goes_on():
        path, data = rng.choice([*files.items()])
        kind = rng.randrange(4)
        size = rng.choice((4096, 65536, 1 << 17, 1 << 19, 3 << 20))
        fd = os.open(path, os.O_RDWR | (os.O_DIRECT if kind == 1 else 0))
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if kind == 0:
                _same(_whole(fd, size), data, 0)
            for _ in range(8 if kind else 0):
                at = rng.randrange(len(data))
                if kind == 1:
                    at -= at % 4096
                    with mmap.mmap(-1, size) as memory:
                        _same(memory[: os.preadv(fd, [memory], at)], data[at : at + size], at)
                elif kind == 2:
                    _same(os.pread(fd, size, at), data[at : at + size], at)
                else:
                    os.pwrite(fd, data[at : at + 70_000], at)
                    _same(os.pread(fd, size, at), data[at : at + size], at)
        finally:
            os.close(fd)


def _whole(fd: int, size: int) -> bytes:
    parts: list[bytes] = []
    while part := os.read(fd, size):
        parts.append(part)
    return b"".join(parts)


def _same(seen: bytes, wanted: bytes, at: int) -> None:
    if seen != wanted:
        raise Different(f"{len(seen)} bytes at {at} instead of {len(wanted)}, or other ones")


WORKLOADS = {each.__name__: each for each in (contents, names, sqlite, git, tar)}
FAT_WORKLOADS = {each.__name__: each for each in (contents, copies, reads)}  # without links and symbolic links


def main() -> int:
    """Run one workload."""
    name, directory, seconds, seed = sys.argv[1:]
    top = Path(directory) / name
    top.mkdir()
    clock = Clock(float(seconds))
    try:
        {**WORKLOADS, **FAT_WORKLOADS}[name](top, clock, random.Random(int(seed)))
    except Exception as error:
        print(f"{name} (seed {seed}), operation {clock.operations}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"workload": name, "operations": clock.operations}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
