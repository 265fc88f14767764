"""Images of every kind for fs/fat: what mkfs.fat makes and mtools fills, and oddities that no tool of ours would write.

Owns: the list of geometries, the tree of files that fills them, and the hand-made oddities with what is to be seen of
each. Must never: import the driver. Called by: test_zoo*.py, and the fuzzer for its sound beginnings.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable
from pathlib import Path

from tests.t3_fat import oracle
from tests.t3_fat.rawfat import (
    ARCHIVE,
    DIRECTORY,
    END,
    HIDDEN,
    LABEL,
    LONG,
    READ_ONLY,
    SYSTEM,
    Image,
    long_entries,
    packed,
    short_entry,
    stamp,
)

KIB, MIB = 1 << 10, 1 << 20
EPOCH = 315532800  # 1980-01-01 in UTC
LAST = 4107542398  # 2100-02-28 23:59:58: mtools counts 2100 as a leap year


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What mkfs.fat is told."""

    kind: int
    cluster: int
    sector: int = 512
    fats: int = 2
    size: int = 0  # 0: about `clusters` clusters
    clusters: int = 200
    offset: int = 0  # where on the device the volume begins
    more: tuple[str, ...] = ()
    few: bool = False  # FAT32 with few clusters

    def __str__(self) -> str:
        where = f"-at{self.offset}" if self.offset else ""
        more = "".join(self.more).replace("-", "")
        return f"fat{self.kind}-c{self.cluster}-s{self.sector}-f{self.fats}{where}{'-' + more if more else ''}"

    def make(self, path: Path, label: str = "") -> Path:
        """A new, empty volume; its file is sparse."""
        # A little over the least count, because mkfs.fat rounds down. FAT32 may have fewer clusters for Linux, fsck.fat
        # and us (see `odd`), but not for mtools.
        clusters = max(self.clusters, {12: 0, 16: 4200, 32: 0 if self.few else 65700}[self.kind])
        # mkfs.fat -F 12 counts in whole blocks; what is over is left unused.
        size = self.size or clusters * (self.cluster + 4 * self.fats) + 64 * self.sector + 32 * KIB
        return oracle.made(
            path, -(-size // self.cluster) * self.cluster, kind=self.kind, cluster=self.cluster, sector=self.sector,
            fats=self.fats, label=label, offset=self.offset, more=self.more,
        )  # fmt: skip


GEOMETRIES = [
    *(Geometry(kind, 512 << shift) for kind in (12, 16, 32) for shift in range(8)),
    *(Geometry(kind, max(4096, sector), sector) for kind in (12, 16, 32) for sector in (1024, 2048, 4096)),
    *(Geometry(kind, 1024, fats=fats) for kind in (12, 16, 32) for fats in (1, 3, 4)),
    *(Geometry(kind, 2048, offset=MIB) for kind in (12, 16, 32)),
    Geometry(12, 512, size=1440 * KIB, more=("-r", "224")),  # a floppy disk
    Geometry(12, 512, clusters=3950),
    Geometry(12, 1024, more=("-r", "16")),
    Geometry(16, 512, more=("-r", "1024")),
    Geometry(16, 2048, clusters=65000),
    Geometry(32, 4096, clusters=70000, more=("-R", "64")),
    Geometry(32, 512, more=("-a",)),
]

# What people and programs call their files. No two may differ only in case in one directory.
NAMES = [
    "README.TXT", "readme2.txt", "Mixed.Txt", "lower", "UPPER", "lower.EXT", "UPPER.ext", "no extension at all",
    ".hidden", ".profile.swp", "two.dots.txt", "archive.tar.gz", "a", "B.c", "123", "12345678.123", "123456789.123",
    "with space.txt", "WITH SPACE.TXT.bak", "plus+comma,semi;[x]=y", "tilde~1.txt", "PROGRA~1", "under_score",
    "%percent&and'quote`", "{curly}(round)!#$@^-", "trailing.extension.", "._Mixed.Txt", ".DS_Store", "desktop.ini",
    "Ünïcödé.txt", "ÅNGSTRÖM.DOC", "ñandú bird", "русский файл.txt", "日本語.txt", "한국어", "עברית", "ελληνικά",
    "x" * 11, "y" * 12 + ".z", "z" * 13, "w" * 26, "v" * 27, "L" * 120 + ".txt", "m" * 251 + ".ext", "e." + "e" * 200,
    "nul1", "aux_.txt", "com", "conx", "1.2.3.4.5", "a.b.c", "o'brien", "semi;colon", "ﬁ ligature", "İstanbul", "ß.txt",
]  # fmt: skip


def tree(top: Path, cluster: int, *, seed: int = 1) -> Path:
    """Files and directories on the host that a volume is to be filled with; most sizes are about whole clusters."""
    dice = random.Random(seed)
    top.mkdir()
    sizes = [0, 1, 511, 512, 513, cluster - 1, cluster, cluster + 1, 2 * cluster, min(3 * cluster + 7, 50_000)]
    small = [size for size in sizes if size <= 4 * 4096] if cluster > 8192 else sizes

    def file(path: Path, size: int) -> None:
        path.write_bytes(dice.randbytes(size))
        when = dice.randrange(EPOCH + 86400, LAST - 86400) & -2
        os.utime(path, (when, when))

    for number, name in enumerate(NAMES):
        if not name.endswith("."):  # mtools drops it, as does everybody
            file(top / name, sizes[number] if number < len(sizes) else dice.choice(small))
    (top / "empty").mkdir()
    same = top / "same beginnings"
    same.mkdir()
    for number in range(25):
        file(same / f"a long name, number {number:03}.txt", dice.choice((0, 1, 300)))
    deep = top / "deep"
    for level in range(12):
        deep.mkdir()
        file(deep / f"file of level {level}", dice.choice((0, 5)))
        deep /= f"Directory {level}"
    windows = top / "System Volume Information"
    windows.mkdir()
    file(windows / "IndexerVolumeGuid", 76)
    file(windows / "WPSettings.dat", 12)
    for name in (".fseventsd", ".Trashes", ".Spotlight-V100", "$RECYCLE.BIN"):
        (top / name).mkdir()
        file(top / name / "no_log", 0)
    file(top / "$RECYCLE.BIN" / "desktop.ini", 129)
    return top


# ---- oddities: each changes an image, and says what is then to be seen: path -> contents, None for a directory

Expected = dict[str, bytes | None]
ODDITIES: dict[str, Callable[[Image], Expected]] = {}
NOON = ((46 << 9) | (3 << 5) | 14, 12 << 11)


def oddity(make: Callable[[Image], Expected]) -> Callable[[Image], Expected]:
    ODDITIES[make.__name__] = make
    return make


def _file(image: Image, short: bytes, data: bytes = b"", long: str = "", directory: int = 0, **fields: object) -> None:
    cluster = image.store(data)
    entry = short_entry(short, cluster=cluster, size=len(data), **fields)  # type: ignore[arg-type]
    image.add(directory, (long_entries(long, short) if long else b"") + entry)


def _directory(
    image: Image, short: bytes, parent: int = 0, attributes: int = DIRECTORY, size: int = 0, count: int = 1
) -> int:
    cluster = image.allocate(count)
    image.add(parent, short_entry(short, attributes, cluster, size, modified=NOON))
    image.add(cluster, short_entry(b".          ", DIRECTORY, cluster, modified=NOON))
    image.add(cluster, short_entry(b"..         ", DIRECTORY, parent, modified=NOON))
    return cluster


@oddity
def deleted_entries_between(image: Image) -> Expected:
    for number in range(6):
        _file(image, b"FILE%d   TXT" % number, b"%d" % number, long=f"a file with a long name {number}.txt")
    for number in (1, 2, 4):
        found = image.find(f"a file with a long name {number}.txt")
        for at in range(found.place - 96, found.place + 32, 32):  # 3 slots of the long name and the entry
            image.put(at, b"\xe5")
        image.link(found.cluster, 0)
    return {f"a file with a long name {number}.txt": b"%d" % number for number in (0, 3, 5)}


@oddity
def long_name_without_its_file(image: Image) -> Expected:
    image.add(0, long_entries("an orphan that nobody owns.txt", b"ORPHAN~1TXT"))
    _file(image, b"AFTER   TXT", b"after")
    image.add(0, long_entries("another orphan", b"ANOTHE~1   ")[:32])
    _file(image, b"LAST    TXT", b"last", long="the last one.txt")
    return {"AFTER.TXT": b"after", "the last one.txt": b"last"}


@oddity
def long_name_with_another_checksum(image: Image) -> Expected:
    image.add(0, long_entries("not the name of it.txt", b"WRONG   TXT", sum_=7))
    _file(image, b"WRONG   TXT", b"short")
    return {"WRONG.TXT": b"short"}


@oddity
def long_name_with_a_slot_missing(image: Image) -> Expected:
    slots = long_entries("a name that takes three slots of them", b"THREE   TXT")
    image.add(0, slots[:32] + slots[64:])
    _file(image, b"THREE   TXT", b"3")
    return {"THREE.TXT": b"3"}


@oddity
def volume_label_in_the_middle(image: Image) -> Expected:
    _file(image, b"BEFORE     ", b"b")
    image.add(0, short_entry(b"MY STICK   ", LABEL))
    _file(image, b"AFTER      ", b"a")
    image.add(0, short_entry(b"BACKUP     ", LABEL | ARCHIVE))
    return {"BEFORE": b"b", "AFTER": b"a"}


@oddity
def first_byte_5_stands_for_e5(image: Image) -> Expected:
    _file(image, b"\x05IGMA   TXT", b"sigma")
    image.add(0, b"\xe5ELETED TXT" + short_entry(b"XXXXXXXXXXX")[11:])
    return {"\N{GREEK SMALL LETTER SIGMA}IGMA.TXT": b"sigma"}


@oddity
def letters_of_the_code_page(image: Image) -> Expected:
    _file(image, b"\x9aBER    TXT", b"u")
    _file(image, b"M\x90      \xa5  ", b"n")
    return {"ÜBER.TXT": b"u", "MÉ.Ñ": b"n"}


@oddity
def case_bits_of_windows_nt(image: Image) -> Expected:
    for number, case in enumerate((0, 0x08, 0x10, 0x18)):
        _file(image, b"CASE%d   TXT" % number, b"%d" % number, case=case)
    return {"CASE0.TXT": b"0", "case1.TXT": b"1", "CASE2.txt": b"2", "case3.txt": b"3"}


@oddity
def something_behind_the_end_of_a_directory(image: Image) -> Expected:
    inside = _directory(image, b"DIR        ")
    _file(image, b"REAL       ", b"real", directory=inside)
    slots = image.slots(inside)
    for place in slots[5:]:
        image.put(place, short_entry(b"GHOST      "))
    _file(image, b"ROOT       ", b"root")
    return {"DIR": None, "DIR/REAL": b"real", "ROOT": b"root"}


@oddity
def full_directory_without_an_end_mark(image: Image) -> Expected:
    inside = _directory(image, b"FULL       ")
    count = len(image.slots(inside)) - 2
    expected: Expected = {"FULL": None}
    for number in range(count):
        image.add(inside, short_entry(b"F%07d   " % number))
        expected[f"FULL/F{number:07}"] = b""
    return expected


@oddity
def directory_in_pieces(image: Image) -> Expected:
    free = image.free()
    inside = _directory(image, b"PIECES     ")
    tail = image.allocate(3, [free[20], free[5], free[11]])
    image.link(inside, tail)
    count = len(image.slots(inside)) - 2
    expected: Expected = {"PIECES": None}
    for number in range(count):
        image.put(image.slots(inside)[number + 2], short_entry(b"P%07d   " % number, modified=NOON))
        expected[f"PIECES/P{number:07}"] = b""
    return expected


@oddity
def file_in_pieces_backwards(image: Image) -> Expected:
    free = image.free()
    chosen = [free[9], free[7], free[8], free[1], free[12]]
    first = image.allocate(5, chosen)
    data = random.Random(5).randbytes(4 * image.cluster + 3)
    for number, cluster in enumerate(chosen):
        image.put(image.place(cluster), data[number * image.cluster :][: image.cluster])
    image.add(0, short_entry(b"PIECES  BIN", cluster=first, size=len(data)))
    return {"PIECES.BIN": data}


@oddity
def directory_entry_with_a_size(image: Image) -> Expected:
    inside = _directory(image, b"SIZED      ", size=12345)
    _file(image, b"X          ", b"x", directory=inside)
    return {"SIZED": None, "SIZED/X": b"x"}


@oddity
def habits_of_windows(image: Image) -> Expected:
    inside = image.allocate(1)
    short, name = b"SYSTEM~1   ", "System Volume Information"
    entry = short_entry(short, DIRECTORY | HIDDEN | SYSTEM, inside, modified=NOON, created=NOON)
    image.add(0, long_entries(name, short) + entry)
    image.add(inside, short_entry(b".          ", DIRECTORY, inside, modified=NOON))
    image.add(inside, short_entry(b"..         ", DIRECTORY, 0, modified=NOON))
    guid = "{7F9E}".encode("utf-16-le")
    _file(image, b"INDEXE~1   ", guid, long="IndexerVolumeGuid", directory=inside)
    _file(image, b"BOOTMGR    ", b"!", attributes=READ_ONLY | HIDDEN | SYSTEM | ARCHIVE)
    _file(image, b"NORMAL  TXT", b"n", attributes=0)
    return {name: None, f"{name}/IndexerVolumeGuid": guid, "BOOTMGR": b"!", "NORMAL.TXT": b"n"}


@oddity
def habits_of_macos(image: Image) -> Expected:
    _file(image, b"_~1     TXT", b"\0\5\x16\7", long="._photo.txt", attributes=HIDDEN | ARCHIVE)
    _file(image, b"PHOTO   TXT", b"jpeg", case=0x18)
    trashes = _directory(image, b"TRASHE~1   ", attributes=DIRECTORY | HIDDEN)
    place = image.find("TRASHE~1").place
    image.put(place, b"\xe5")
    image.add(0, long_entries(".Trashes", b"TRASHE~1   "))
    image.add(0, short_entry(b"TRASHE~1   ", DIRECTORY | HIDDEN, trashes, modified=NOON))
    return {"._photo.txt": b"\0\5\x16\7", "photo.txt": b"jpeg", ".Trashes": None}


@oddity
def times_that_are_none(image: Image) -> Expected:
    _file(image, b"ZERO       ", b"0", modified=(0, 0))
    _file(image, b"MONTH15    ", b"1", modified=(15 << 5 | 31, 0), created=(0x5A01, 0xFFFF), accessed=0xFFFF)
    _file(image, b"DAY0       ", b"2", modified=(46 << 9 | 3 << 5, 31 << 11 | 63 << 5 | 31), tenth=255)
    _file(image, b"LASTDAY    ", b"3", modified=(0xFF9F, 0xBF7D), created=(0xFF9F, 0xBF7D), tenth=199, accessed=0xFF9F)
    return {"ZERO": b"0", "MONTH15": b"1", "DAY0": b"2", "LASTDAY": b"3"}


@oddity
def names_that_fill_their_slots(image: Image) -> Expected:
    expected: Expected = {}
    for number, length in enumerate((12, 13, 14, 25, 26, 27, 254, 255)):
        name = (chr(ord("a") + number) + "ö") * (length // 2) + "x" * (length % 2)
        _file(image, b"NAME%d~1 TXT" % number, b"%d" % length, long=name)
        expected[name] = b"%d" % length
    return expected


@oddity
def names_beyond_the_first_plane(image: Image) -> Expected:
    _file(image, b"_~1     TXT", b"smile", long="😀 smile.txt")
    _file(image, b"_~2     TXT", b"cut", long="twelve units" + "😀" + "cut between slots.txt")
    return {"😀 smile.txt": b"smile", "twelve units😀cut between slots.txt": b"cut"}


@oddity
def attributes_of_devices(image: Image) -> Expected:
    _file(image, b"DEVICE     ", b"d", attributes=ARCHIVE | 0x40)
    _file(image, b"HIGH       ", b"h", attributes=ARCHIVE | 0x80)
    return {"DEVICE": b"d", "HIGH": b"h"}


@oddity
def size_zero_with_a_first_cluster_of_zero(image: Image) -> Expected:
    _file(image, b"EMPTY      ")
    _file(image, b"EMPTY2     ", long="also empty")
    return {"EMPTY": b"", "also empty": b""}


@oddity
def ends_of_chains_of_all_kinds(image: Image) -> Expected:
    expected: Expected = {}
    for number in range(8):
        data = b"%d" % number * image.cluster
        first = image.store(data)
        image.link(first, image.end + number)
        image.add(0, short_entry(b"END%d       " % number, cluster=first, size=len(data)))
        expected[f"END{number}"] = data
    return expected


@oddity
def reserved_bits_of_fat32_entries(image: Image) -> Expected:
    data = random.Random(6).randbytes(3 * image.cluster)
    first = image.store(data)
    if image.kind == 32:
        for cluster in image.chain(first):
            for copy in range(image.fats):
                at = image.reserved + copy * image.fat_size + 4 * cluster + 3
                image.put(at, bytes([image.get(at, 1)[0] | 0xA0]))
    image.add(0, short_entry(b"BITS       ", cluster=first, size=len(data)))
    return {"BITS": data}


@oddity
def free_clusters_marked_bad(image: Image) -> Expected:
    _file(image, b"GOOD       ", b"good")
    for cluster in image.free()[2:60:3]:
        image.link(cluster, image.end - 1)
    return {"GOOD": b"good"}


def odd(path: Path, name: str, kind: int) -> Expected:
    """Make the image of one oddity."""
    Geometry(kind, 512, few=True).make(path)
    image = Image.of(path, in_place=True)
    expected = ODDITIES[name](image)
    if "information" not in name:
        image.count()
    return expected


@oddity
def no_information_sector(image: Image) -> Expected:
    if image.kind == 32:
        image.put(image.fsinfo, bytes(image.sector))
        image.put(48, b"\xff\xff")
    _file(image, b"FILE       ", b"x")
    return {"FILE": b"x"}


@oddity
def information_that_is_unknown(image: Image) -> Expected:
    if image.kind == 32:
        image.put(image.fsinfo + 488, b"\xff" * 8)
    _file(image, b"FILE       ", b"x")
    return {"FILE": b"x"}


@oddity
def information_that_lies(image: Image) -> Expected:
    if image.kind == 32:
        image.put(image.fsinfo + 488, (image.clusters + 99).to_bytes(4, "little") + b"\xf0\xff\xff\x7f")
    _file(image, b"FILE       ", b"x")
    return {"FILE": b"x"}


@oddity
def root_of_fat32_elsewhere_and_in_pieces(image: Image) -> Expected:
    if image.kind == 32:
        free = image.free()
        old = image.root_cluster
        image.allocate(2, [free[30], free[3]])
        image.link(old, 0)
        image.put(44, free[30].to_bytes(4, "little"))
        image.root_cluster = free[30]
    expected: Expected = {}
    for number in range(min(40, len(image.slots(0)) - 4)):
        _file(image, b"ROOT%04d   " % number, b"%d" % number)
        expected[f"ROOT{number:04}"] = b"%d" % number
    return expected


@oddity
def only_the_second_table_counts(image: Image) -> Expected:
    data = random.Random(7).randbytes(3 * image.cluster)
    _file(image, b"FILE       ", data)
    if image.kind == 32 and image.fats > 1:
        image.put(40, b"\x81\0")
        image.active = 1
        image.put(image.reserved + 12, bytes(400))  # what the first table says is not true any more
    return {"FILE": data}


@oddity
def parent_of_a_first_level_directory_is_the_root_by_number(image: Image) -> Expected:
    inside = _directory(image, b"DIR        ")
    if image.kind == 32:
        image.put(image.slots(inside)[1] + 20, (image.root_cluster >> 16).to_bytes(2, "little"))
        image.put(image.slots(inside)[1] + 26, (image.root_cluster & 0xFFFF).to_bytes(2, "little"))
    _file(image, b"X          ", b"x", directory=inside)
    return {"DIR": None, "DIR/X": b"x"}


@oddity
def directory_without_its_dots(image: Image) -> Expected:
    inside = image.allocate(1)
    image.add(0, short_entry(b"NODOTS     ", DIRECTORY, inside))
    _file(image, b"X          ", b"x", directory=inside)
    return {"NODOTS": None, "NODOTS/X": b"x"}


# What a tool may find fault with though it can be read: no clean bill is asked for.
COMPLAINED_OF = {
    "long_name_without_its_file", "long_name_with_another_checksum", "long_name_with_a_slot_missing",
    "volume_label_in_the_middle", "directory_entry_with_a_size", "times_that_are_none", "attributes_of_devices",
    "information_that_lies", "information_that_is_unknown", "no_information_sector", "only_the_second_table_counts",
    "parent_of_a_first_level_directory_is_the_root_by_number", "directory_without_its_dots",
    "something_behind_the_end_of_a_directory", "reserved_bits_of_fat32_entries",
    "root_of_fat32_elsewhere_and_in_pieces",
}  # fmt: skip

__all__ = ["END", "GEOMETRIES", "LONG", "NAMES", "ODDITIES", "Expected", "Geometry", "packed", "stamp", "tree"]
