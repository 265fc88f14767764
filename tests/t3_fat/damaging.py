"""Ways to damage a FAT image: each takes an image with files on it and some dice, and says what it did.

Owns: what can be wrong on a medium. Must never: import the driver. Called by: test_fuzz.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.t3_fat.rawfat import ARCHIVE, DIRECTORY, END, LABEL, LONG, Found, Image, long_entries, short_entry

Damage = Callable[[Image, random.Random], str]
WAYS: dict[str, Damage] = {}
# Fields of the boot sector: name, place, size.
FIELDS = [
    ("jump", 0, 3), ("sector size", 11, 2), ("cluster size", 13, 1), ("reserved", 14, 2), ("FATs", 16, 1),
    ("root entries", 17, 2), ("sectors 16", 19, 2), ("media", 21, 1), ("FAT size 16", 22, 2), ("track", 24, 2),
    ("heads", 26, 2), ("hidden", 28, 4), ("sectors 32", 32, 4), ("FAT size 32", 36, 4), ("flags", 40, 2),
    ("version", 42, 2), ("root cluster", 44, 4), ("FSInfo", 48, 2), ("backup", 50, 2), ("signature", 510, 2),
]  # fmt: skip


def way(damage: Damage) -> Damage:
    WAYS[damage.__name__] = damage
    return damage


def _everything(image: Image) -> list[Found]:
    return list(image.tree().values())


def _number(dice: random.Random, size: int) -> int:
    top = 256**size - 1
    return dice.choice(
        (0, 1, 2, top, top - 1, top // 2, top // 2 + 1, 1 << dice.randrange(8 * size), dice.randrange(top + 1))
    )


@way
def boot_field(image: Image, dice: random.Random) -> str:
    name, at, size = dice.choice(FIELDS)
    value = _number(dice, size)
    image.put(at, value.to_bytes(size, "little"))
    return f"{name} is {value:#x}"


@way
def boot_fields(image: Image, dice: random.Random) -> str:
    return ", ".join(boot_field(image, dice) for _ in range(3))


@way
def boot_noise(image: Image, dice: random.Random) -> str:
    at = dice.randrange(512)
    image.put(at, dice.randbytes(min(dice.randrange(1, 64), 512 - at)))
    return f"noise at {at} of the boot sector"


@way
def bit_flips(image: Image, dice: random.Random) -> str:
    places = []
    for _ in range(dice.choice((1, 3, 20))):
        at = dice.choice((dice.randrange(512), dice.randrange(image.start), dice.randrange(image.start, image.size)))
        image.put(at, bytes([image.get(at, 1)[0] ^ 1 << dice.randrange(8)]))
        places.append(at)
    return f"bits flipped at {places}"


@way
def table_noise(image: Image, dice: random.Random) -> str:
    for _ in range(dice.choice((1, 10))):
        at = image.reserved + dice.randrange(min(image.fat_size, 600))
        image.put(at, dice.randbytes(dice.choice((1, 2, 4, 100))))
    return "noise in the table"


@way
def table_of_one_value(image: Image, dice: random.Random) -> str:
    value = dice.choice((b"\0", b"\xff", b"\x01", b"\x02\0\0\0", dice.randbytes(4)))
    size = image.fat_size * image.fats
    image.put(image.reserved, (value * size)[:size])
    return f"the table is {value.hex()} all over"


@way
def a_link(image: Image, dice: random.Random) -> str:
    """Of some file or directory: a loop, a cross-link, a cluster that is free, reserved, bad or out of range."""
    said = []
    for _ in range(dice.choice((1, 1, 4))):
        chains = [image.chain(found.cluster) for found in _everything_left(image)]
        used = [cluster for chain in chains for cluster in chain]
        if not used:
            break
        cluster = dice.choice(used)
        target = dice.choice((
            cluster, dice.choice(used), chains[0][0], 0, 1, image.end - 1, image.end - 7, image.clusters + 1,
            image.clusters + 2, END >> 1, dice.randrange(image.clusters + 2), END,
        ))  # fmt: skip
        image.link(cluster, target)
        said.append(f"{cluster} -> {target}")
    return ", ".join(said)


def _everything_left(image: Image) -> list[Found]:
    """What can still be found after earlier damage."""
    found: list[Found] = []
    queue = [0]
    while queue:
        try:
            for entry in list(image.entries(queue.pop())):
                if entry.cluster:
                    image.chain(entry.cluster)
                    found.append(entry)
                if entry.is_directory and len(found) < 200:
                    queue.append(entry.cluster)
        except Exception:  # whatever is unsound is what we made so
            continue
    return found


@way
def an_entry(image: Image, dice: random.Random) -> str:
    """First cluster, size, kind or name of some entry."""
    said = []
    everything = _everything(image)
    for _ in range(dice.choice((1, 5))):
        found = dice.choice(everything)
        what = dice.randrange(6)
        if what == 0:
            cluster = dice.choice(
                (0, 1, 2, image.root_cluster, image.clusters + 2, 0xFFFFFFFF, dice.choice(everything).cluster)
            )
            image.put(found.place + 26, (cluster & 0xFFFF).to_bytes(2, "little"))
            image.put(found.place + 20, (cluster >> 16).to_bytes(2, "little"))
            said.append(f"{found.name} begins at {cluster}")
        elif what == 1:
            size = _number(dice, 4)
            image.put(found.place + 28, size.to_bytes(4, "little"))
            said.append(f"{found.name} has {size} bytes")
        elif what == 2:
            attributes = dice.choice(
                (0, DIRECTORY, LABEL, LONG, 0xFF, found.attributes ^ DIRECTORY, dice.randrange(256))
            )
            image.put(found.place + 11, bytes([attributes]))
            said.append(f"{found.name} has attributes {attributes:#x}")
        elif what == 3:
            odd = [
                b" " * 11,
                b"..         ",
                b".          ",
                b"A/B     C  ",
                b"\0" * 11,
                b"\x05" * 11,
                b"NUL".ljust(11, b"\0"),
            ]
            name = dice.choice([*odd, dice.randbytes(11), everything[0].short])
            image.put(found.place, name)
            said.append(f"{found.name} is called {name!r}")
        else:
            at = dice.randrange(32)
            image.put(found.place + at, dice.randbytes(dice.randrange(1, 33 - at)))
            said.append(f"noise at {at} of the entry of {found.name}")
    return ", ".join(said)


@way
def random_directory(image: Image, dice: random.Random) -> str:
    directories = [found.cluster for found in _everything(image) if found.is_directory and found.cluster]
    directory = dice.choice((0, *directories))
    slots = image.slots(directory)
    part = dice.choice((slots[2:], slots[2:20], slots))
    for place in part[:400]:
        entry = bytearray(dice.randbytes(32))
        if dice.random() < 0.5:
            entry[11] = dice.choice((ARCHIVE, DIRECTORY, LONG, LABEL))
        if dice.random() < 0.5:
            entry[26:28] = dice.randrange(image.clusters + 4).to_bytes(2, "little")
            entry[20:22] = b"\0\0"
        image.put(place, bytes(entry))
    return f"noise in {len(part)} slots of the directory at {directory}"


@way
def long_names_of_nonsense(image: Image, dice: random.Random) -> str:
    """Slashes, NULs, half surrogates, dots, names of 260 letters, names that are there already."""
    names = [
        "a/b",
        "..",
        ".",
        "x\0y",
        "\ud800",
        "a\udfffb",
        "/" * 20,
        "n" * 260,
        "same",
        "same",
        "SAME",
        "\uffff" * 5,
        "\r\n",
    ]
    dice.shuffle(names)
    for number, name in enumerate(names):
        short = b"BAD%05d   " % number
        image.add(0, long_entries(name, short) + short_entry(short))
    return "bad long names"


@way
def directories_in_circles(image: Image, dice: random.Random) -> str:
    first, second = image.allocate(1), image.allocate(1)
    image.add(0, short_entry(b"CIRCLE     ", DIRECTORY, first))
    for own, other in ((first, second), (second, first)):
        image.add(own, short_entry(b".          ", DIRECTORY, own) + short_entry(b"..         ", DIRECTORY, other))
        image.add(own, short_entry(b"ROUND      ", DIRECTORY, other) + short_entry(b"SELF       ", DIRECTORY, own))
        image.add(own, short_entry(b"ROOT       ", DIRECTORY, dice.choice((0, image.root_cluster))))
    return "directories that contain each other"


@way
def information_sector(image: Image, dice: random.Random) -> str:
    at = dice.choice((0, 484, 488, 492, 508))
    value = _number(dice, 4)
    image.put((image.fsinfo or 512) + at, value.to_bytes(4, "little"))
    return f"FSInfo has {value:#x} at {at}"


@way
def everything_is_used(image: Image, dice: random.Random) -> str:
    for cluster in image.free():
        image.link(cluster, dice.choice((END, image.end - 1, 1)))
    return "no cluster is free"
