"""mtools and fsck.fat as peers: what they write is read, what we write is read by them, and is clean."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from udf import DeviceGone

from .formats import directory, entries
from .tiny import Volume

SECOND = 1_000_000_000
KINDS = {12: (2880, 1), 16: (40000, 4), 32: (140000, 1)}  # sectors, sectors of a cluster
ENVIRONMENT = {**os.environ, "LC_ALL": "C.UTF-8", "PATH": "/usr/sbin:/sbin:" + os.environ["PATH"]}
# mtools knows no characters beyond 16 bits; those are in what fsck.fat looks at.
NAMES = [
    *("README.TXT", "readme.txt2", "lower.txt", "mixed.TXT", "UPPER.txt", "Each.Txt", "noext", "A", "a.b.c.d"),
    *("a long name with blanks.text", ".hidden", "..two", "trailing~1", "plus+comma,semi;eq=.[x]", "x" * 255),
    *("common prefix 1.txt", "common prefix 2.txt", "common prefix 3.txt", "\u00e4\u00f6\u00fc.txt", "\u03a9mega"),
    *(
        "\u65e5\u672c\u8a9e.txt",
        "12345678.123",
        "123456789.1234",
        "$%'-_@~`!(){}^#&",
        "exactly thirteen"[:13],
        "y" * 26,
    ),
]


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, (command, done.stdout.decode(), done.stderr.decode())
    return done.stdout.decode()


def checked(image: Path) -> None:
    """Clean, without a word about long names either, of which fsck.fat only warns."""
    said = run("fsck.fat", "-n", "-v", image)
    for complaint in ("long file name", "Orphaned", "Checksum", "Duplicate", "Bad short", "Unexpected", "differ"):
        assert complaint not in said, said


@pytest.fixture(params=KINDS)
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    sectors, per = KINDS[request.param]
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(sectors * 512)
    run("mkfs.fat", "-F", str(request.param), "-s", str(per), "-n", "PEER", path)
    return path


async def test_what_mtools_writes_is_read_as_it_is(image: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "sub").mkdir(parents=True)
    pick = random.Random(1)
    wanted: dict[str, tuple[bytes, int, int]] = {}
    for place in ("", "sub/"):
        # mtools cannot grow a directory by two clusters at once.
        for number, name in enumerate(name[:180] for name in NAMES):
            path = outside / place / name
            contents = pick.randbytes(pick.choice((0, 1, 511, 512, 513)))
            path.write_bytes(contents)
            stamp = pick.randrange(315_700_000, 4_100_000_000)
            os.utime(path, (stamp, stamp))
            attributes = (entries.ARCHIVE, 0, 7)[number % 3]
            wanted[place + name] = (contents, stamp // 2 * 2 * SECOND, attributes)
    run("mcopy", "-m", "-s", "-Q", "-i", image, *(outside / name for name in os.listdir(outside)), "::/")
    places = [(f"::/{name.replace('[', '?')}", want[2]) for name, want in wanted.items()]  # '[' is a pattern
    for how, attributes in (("-a", 0), ("+r", 7), ("+h", 7), ("+s", 7), ("-a", 7)):
        run("mattrib", how, "-i", image, *(place for place, want in places if want == attributes))

    volume = Volume(image)
    found: dict[str, tuple[bytes, int, int]] = {}
    root = volume.root()
    assert await root.label() == "PEER"
    for entry in await root.list():
        if entry.is_directory:
            assert entry.name == "sub"
            for inner in await volume.below(entry.cluster).list():
                found["sub/" + inner.name] = (volume.contents(inner), inner.modified_ns, inner.attributes)
        else:
            found[entry.name] = (volume.contents(entry), entry.modified_ns, entry.attributes)
            assert await root.find(entry.name.upper()) == entry
    assert found == wanted


async def test_what_we_write_is_read_by_mtools_and_clean(image: Path, tmp_path: Path) -> None:
    volume = Volume(image)
    root = volume.root()
    sub, cluster = await volume.mkdir(root, "A directory of ours", 0, 1_600_000_000 * SECOND)
    pick = random.Random(2)
    wanted: dict[str, tuple[bytes, int]] = {}
    attributes: dict[str, int] = {}
    for place, where in (("", root), ("A directory of ours/", sub)):
        for number, name in enumerate(NAMES):
            contents = pick.randbytes(pick.choice((0, 1, 511, 512)))
            stamp = pick.randrange(315_700_000, 4_100_000_000) * SECOND
            bits = (entries.ARCHIVE, 0, entries.READ_ONLY | entries.HIDDEN | entries.SYSTEM)[number % 3]
            await where.insert(
                name,
                attributes=bits,
                cluster=volume.allocate(contents) if contents else 0,
                size=len(contents),
                created_ns=stamp,
                modified_ns=stamp,
                accessed_ns=stamp,
            )
            wanted[place + name] = (contents, stamp // SECOND // 2 * 2)
            attributes[place + name] = bits
    # And many more, so that the directory grows; then fewer, and other names, and a directory in a directory.
    stamps = {"created_ns": 0, "modified_ns": 0, "accessed_ns": 0}
    more = [await sub.insert(f"one of many {n}.dat", attributes=0, **stamps) for n in range(120)]
    for number, entry in enumerate(more):
        if number % 3 == 0:
            await sub.remove(entry)
        elif number % 3 == 1:
            await sub.rename(entry, f"{'renamed ' * (number % 9)}{number}")
    await volume.mkdir(sub, "below", cluster, 0)
    volume.save()
    checked(image)

    listing = {line.removeprefix("::/") for line in run("mdir", "-/", "-b", "-a", "-i", image, "::").splitlines()}
    ours = {"A directory of ours/", *wanted}
    ours |= {f"A directory of ours/{e.name}{'/' * e.is_directory}" for e in await sub.list()}
    assert listing == ours

    outside = tmp_path / "outside"
    outside.mkdir()
    run("mcopy", "-m", "-s", "-n", "-Q", "-i", image, "::/*", outside)
    for name, (contents, stamp) in wanted.items():
        assert (outside / name).read_bytes() == contents
        assert (outside / name).stat().st_mtime == stamp
    said = {}
    for line in run("mattrib", "-/", "-i", image, "::").splitlines():
        letters, _, name = line.partition("::/")
        said[name] = sum(bit for letter, bit in zip("AHSR", (32, 2, 4, 1), strict=True) if letter in letters)
    assert {name: said[name] for name in attributes} == attributes


async def test_hundreds_of_changes_of_every_kind_are_clean(image: Path) -> None:
    volume = Volume(image, utc=True)
    sub, _ = await volume.mkdir(volume.root(), "sub", 0, SECOND)
    pick = random.Random(3)
    stamps = {"created_ns": 0, "modified_ns": 0, "accessed_ns": 0}
    there: dict[str, Any] = {}
    names = [*NAMES, "\U0001f600 \U0001f4be", "\U0001f600" * 127]
    for step in range(600):
        name = pick.choice(names) + str(step)[: pick.randrange(4)]
        entry = there.pop(pick.choice(list(there))) if there and pick.random() < 0.6 else None
        if len(name.encode("utf-16-le")) > 510 or await sub.find(name) is not None:
            name = f"step {step}"
        if entry is None:
            there[name] = await sub.insert(name, attributes=0, **stamps)
        elif pick.random() < 0.5:
            await sub.remove(entry)
        else:
            there[name] = await sub.rename(entry, name)
        if step % 150 == 149:
            volume.save()
            checked(image)
    assert {e.name: e for e in await sub.list()} == there


class Failing:
    """A stream whose device goes away after so many writes."""

    def __init__(self, stream: Any, left: int) -> None:
        self.stream, self.left = stream, left
        self.read, self.grow = stream.read, stream.grow

    @property
    def size(self) -> int:
        return int(self.stream.size)

    async def write(self, offset: int, data: bytes) -> None:
        if not self.left:
            raise DeviceGone("pulled")
        self.left -= 1
        await self.stream.write(offset, data)


@pytest.mark.parametrize("image", [12, 16], indirect=True)
async def test_what_a_cut_leaves_is_repaired_by_fsck_alone(image: Path) -> None:
    """After each write of changes that need several: one automatic run, and then it is clean and all are there."""
    volume = Volume(image)
    sub, cluster = await volume.mkdir(volume.root(), "sub", 0, SECOND)
    stamps = {"created_ns": 0, "modified_ns": 0, "accessed_ns": 0}
    long = await sub.insert("l" * 250, attributes=0, cluster=volume.allocate(b"long"), size=4, **stamps)
    short = await sub.insert("short", attributes=0, cluster=volume.allocate(b"short"), size=5, **stamps)
    for n in range(30):
        await sub.insert(f"F{n}", attributes=0, **stamps)
    before, cuts = bytes(volume.data), 0

    async def add(d: Any) -> None:
        await d.insert("m" * 250, attributes=0, **stamps)

    for change, changed in (
        (add, ()),
        (lambda d: d.remove(long), (long.name,)),
        (lambda d: d.rename(long, "another " * 29 + "another"), ("l" * 250, "another " * 29 + "another")),
        (lambda d: d.rename(short, "n" * 200), ("short", "n" * 200)),
    ):
        for left in range(8):
            volume.data[:] = before
            d = directory.Directory(Failing(volume.below(cluster)._stream, left), volume.settings)
            try:
                await change(d)
            except DeviceGone:
                cuts += 1
            else:
                break
            volume.save()
            subprocess.run(["fsck.fat", "-a", image], env=ENVIRONMENT, capture_output=True, check=False)
            checked(image)
            repaired = Volume(image)
            found = {e.name: repaired.contents(e) for e in await repaired.below(cluster).list()}
            assert {f"F{n}" for n in range(30)} <= set(found)
            for name, contents in (("l" * 250, b"long"), ("short", b"short")):
                if name not in changed:
                    assert found[name] == contents
                elif len(changed) == 2:
                    assert contents in found.values()
    assert cuts >= 8


def test_the_check_sees_what_is_wrong(image: Path) -> None:
    volume = Volume(image)
    name = entries.long_slots("an orphan".encode("utf-16-le"), b"NOBODY     ")
    at = volume.data.index(b"PEER       ", volume.geometry.fat_offset) + 32
    volume.data[at : at + len(name)] = name
    volume.save()
    with pytest.raises(AssertionError):
        checked(image)
