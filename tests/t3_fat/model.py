"""A tree of files as FAT is to have it, in plain Python, and random operations on it and on the driver.

Owns: what the answer to each operation is to be, and the seeded choice of operations. Must never: look at an image or
at the driver. Called by: test_model.py (which compares), and the power cuts (for their workload).
"""

from __future__ import annotations

import dataclasses
import errno
import random
from collections.abc import Iterator

LARGEST = (1 << 32) - 1
BAD_LETTERS = set('"*/:<>?\\|') | {chr(number) for number in range(32)}


def key(name: str) -> str:
    """What makes two names the same."""
    return "".join(upper if len(upper := letter.upper()) == 1 else letter for letter in name.rstrip("."))


def swapped(letter: str) -> str:
    """The same letter in the other case, where that is one letter."""
    other = letter.swapcase()
    return other if len(other) == 1 and key(other) == key(letter) else letter


@dataclasses.dataclass
class Node:
    """A file (its bytes) or a directory (its children by key)."""

    name: str
    directory: bool
    data: bytearray = dataclasses.field(default_factory=bytearray)
    children: dict[str, Node] = dataclasses.field(default_factory=dict)
    modified: int | None = None  # seconds, where a program has said so; None: about now
    accessed: int | None = None
    read_only: bool = False
    synced: bytes | None = None  # the contents at the last fsync, if there was no change since


class World:
    """The tree. Each operation does it or raises OSError with the errno that a program is to see."""

    def __init__(self) -> None:
        self.root = Node("", True)

    def find(self, path: str) -> Node:
        node = self.root
        for part in path.split("/") if path else []:
            if not node.directory:
                raise OSError(errno.ENOTDIR, path)
            found = node.children.get(key(part))
            if found is None:
                raise OSError(errno.ENOENT, path)
            node = found
        return node

    def _parent(self, path: str) -> tuple[Node, str]:
        head, _, name = path.rpartition("/")
        parent = self.find(head)
        if not parent.directory:
            raise OSError(errno.ENOTDIR, path)
        return parent, name

    @staticmethod
    def allowed(name: str) -> None:
        if len(name.encode("utf-16-le")) // 2 > 255:
            raise OSError(errno.ENAMETOOLONG, name)
        if BAD_LETTERS & set(name) or not name.rstrip(".") or name.endswith(" "):
            raise OSError(errno.EINVAL, name)

    def _new(self, path: str, *, directory: bool) -> Node:
        parent, name = self._parent(path)
        self.allowed(name)
        if key(name) in parent.children:
            raise OSError(errno.EEXIST, path)
        node = parent.children[key(name)] = Node(name.rstrip("."), directory)
        parent.modified = None
        return node

    def create(self, path: str, data: bytes) -> None:
        self._new(path, directory=False).data = bytearray(data)

    def mkdir(self, path: str) -> None:
        self._new(path, directory=True)

    def _file(self, path: str) -> Node:
        node = self.find(path)
        if node.directory:
            raise OSError(errno.EISDIR, path)
        return node

    def write(self, path: str, offset: int, data: bytes) -> None:
        node = self._file(path)
        if offset + len(data) > LARGEST:
            raise OSError(errno.EFBIG, path)
        node.data.extend(bytes(max(0, offset - len(node.data))))
        node.data[offset : offset + len(data)] = data
        node.modified = None

    def truncate(self, path: str, size: int) -> None:
        node = self._file(path)
        if size > LARGEST:
            raise OSError(errno.EFBIG, path)
        if size != len(node.data):
            node.modified = None
        del node.data[size:]
        node.data.extend(bytes(size - len(node.data)))

    def unlink(self, path: str) -> None:
        node = self._file(path)
        parent, name = self._parent(path)
        del parent.children[key(name)]
        parent.modified = None
        node.name = ""

    def rmdir(self, path: str) -> None:
        node = self.find(path)
        if not node.directory:
            raise OSError(errno.ENOTDIR, path)
        if node.children:
            raise OSError(errno.ENOTEMPTY, path)
        parent, name = self._parent(path)
        del parent.children[key(name)]
        parent.modified = None

    def rename(self, old: str, new: str, *, replace: bool = True) -> None:
        parent, name = self._parent(old)
        other, wanted = self._parent(new)
        node = parent.children.get(key(name))
        if node is None:
            raise OSError(errno.ENOENT, old)
        self.allowed(wanted)
        if node.directory and self._inside(node, other):
            raise OSError(errno.EINVAL, new)
        target = other.children.get(key(wanted))
        if target is not None and target is not node:
            if not replace:
                raise OSError(errno.EEXIST, new)
            if node.directory and not target.directory:
                raise OSError(errno.ENOTDIR, new)
            if target.directory and not node.directory:
                raise OSError(errno.EISDIR, new)
            if target.children:
                raise OSError(errno.ENOTEMPTY, new)
        elif target is node and not replace:
            raise OSError(errno.EEXIST, new)
        del parent.children[key(name)]
        other.children[key(wanted)] = node
        # What is replaced gives its entry, with the name as it is spelled there, as Linux has it.
        node.name = wanted.rstrip(".") if target is None or target is node else target.name
        parent.modified = other.modified = None

    @staticmethod
    def _inside(node: Node, place: Node) -> bool:
        return node is place or any(World._inside(child, place) for child in node.children.values() if child.directory)

    def walk(self, node: Node | None = None, path: str = "") -> Iterator[tuple[str, Node]]:
        for child in (node or self.root).children.values():
            here = f"{path}/{child.name}" if path else child.name
            yield here, child
            if child.directory:
                yield from self.walk(child, here)

    def picture(self) -> dict[str, bytes | None]:
        return {path: None if node.directory else bytes(node.data) for path, node in self.walk()}


# ---- random operations

STEMS = [
    "a", "b", "file", "FILE", "Mixed", "longer name with spaces", "Longer Name With Other Letters", "LONGER",
    "x" * 60, "ünïcödé", "日本語の名前", "dot.dot.dot", ".hidden", "12345678", "123456789", "ab+cd", "[x]", "q" * 200,
]  # fmt: skip
SUFFIXES = ["", "", ".txt", ".TXT", ".Txt", ".longer", ".c"]
ODD_NAMES = ["a:b", "what?", "star*", "blank ", "tab\t", "del\x7f", "n" * 256, "...", "dots..", 'quote"', "back\\slash",
             "n" * 255, "smile 😀", "😀" * 60]  # fmt: skip

Operation = tuple[object, ...]  # the verb and its arguments


@dataclasses.dataclass
class Chooser:
    """Random operations that mostly succeed, on a world as it is at the time."""

    dice: random.Random
    cluster: int
    room: int  # about how many bytes of contents there may be
    astral: bool = True  # names beyond the first plane, which mtools does not know

    def name(self) -> str:
        if self.dice.random() < 0.04:
            return self.dice.choice(ODD_NAMES if self.astral else ODD_NAMES[:-2])
        number = str(self.dice.randrange(30)) if self.dice.random() < 0.5 else ""
        return self.dice.choice(STEMS) + number + self.dice.choice(SUFFIXES)

    def some(self, world: World, *, directory: bool | None = None) -> str:
        paths = [path for path, node in world.walk() if directory is None or node.directory == directory]
        if directory is not False and self.dice.random() < 0.4:
            paths.append("")
        path = self.dice.choice(paths) if paths else ""
        return self.cased(path)

    def cased(self, path: str) -> str:
        """Now and then the same path in other letters."""
        if self.dice.random() < 0.15:
            return "".join(map(swapped, path))
        return path

    def fresh(self, world: World) -> str:
        parent = self.some(world, directory=True)
        if parent.count("/") > 4:
            parent = ""
        return f"{parent}/{self.name()}" if parent else self.name()

    def size(self) -> int:
        near = self.cluster * self.dice.randrange(5) + self.dice.choice((-1, 0, 0, 1))
        return max(0, self.dice.choice((0, 1, 5, 512, near, near, self.dice.randrange(9 * self.cluster))))

    def bytes(self, size: int) -> bytes:
        return self.dice.randbytes(size)

    def choose(self, world: World) -> Operation:
        dice = self.dice
        files = [path for path, node in world.walk() if not node.directory]
        used = sum(len(node.data) // self.cluster + 1 for _, node in world.walk()) * self.cluster
        verbs = {
            "create": 14, "mkdir": 5, "write": 12, "append": 6, "truncate": 6, "rename": 12, "rename_keep": 1,
            "unlink": 4, "rmdir": 3, "utime": 4, "chmod": 2, "read": 4, "listing": 2, "look": 3, "missing": 2,
            "statfs": 1, "held": 2, "together": 3,
        }  # fmt: skip
        if used > self.room or len(files) > 60:
            verbs |= {"create": 1, "mkdir": 1, "write": 3, "append": 1, "truncate": 8, "unlink": 30, "rmdir": 10}
        verb = dice.choices(list(verbs), list(verbs.values()))[0]
        if verb == "create":
            return verb, self.fresh(world), self.bytes(self.size() if dice.random() < 0.6 else 0)
        if verb == "mkdir":
            return verb, self.fresh(world)
        if verb in ("write", "append"):
            path = self.some(world, directory=False)
            end = self._length(world, path)
            at = end if verb == "append" else dice.choice((0, 1, end, dice.randrange(end + 1), self.size()))
            return "write", path, at, self.bytes(max(1, self.size()))
        if verb == "truncate":
            path = self.some(world, directory=False)
            return verb, path, dice.choice((0, self._length(world, path), self.size(), self.size()))
        if verb.startswith("rename"):
            old = self.some(world)
            if not old:
                return ("statfs",)
            new = self.some(world) if dice.random() < 0.4 else self.fresh(world)
            if dice.random() < 0.1:
                new = "".join(map(swapped, old))
            if dice.random() < 0.05 and world.find(old).directory:
                new = f"{old}/{self.name()}"
            return verb, old, new or self.name()
        if verb == "unlink":
            return verb, self.some(world, directory=False)
        if verb == "rmdir":
            return verb, self.some(world, directory=True) or self.fresh(world)
        if verb == "utime":
            path = self.some(world)
            return (
                (verb, path, dice.randrange(315619200, 4102444800), dice.randrange(315619200, 4102444800))
                if path
                else ("statfs",)
            )
        if verb == "chmod":
            return verb, self.some(world, directory=False), dice.random() < 0.5
        if verb == "read":
            path = self.some(world, directory=False)
            return verb, path, dice.randrange(self._length(world, path) + 1), self.size()
        if verb == "listing":
            return verb, self.some(world, directory=True)
        if verb == "missing":
            return "look", self.fresh(world)
        if verb == "look":
            return verb, self.some(world)
        if verb == "held":
            return verb, self.some(world, directory=False), self.bytes(self.size() or 1)
        if verb == "together":
            chosen = dice.sample(files, min(len(files), 3))
            writes = [(path, self._length(world, path), self.bytes(max(1, self.size()))) for path in chosen]
            names = [f"together {dice.randrange(1000)} {number}" for number in range(3)]
            return verb, writes, [name for name in names if key(name) not in world.root.children]
        return ("statfs",)

    def _length(self, world: World, path: str) -> int:
        try:
            return len(world.find(path).data)
        except OSError:
            return 0
