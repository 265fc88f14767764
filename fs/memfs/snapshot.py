"""The whole state of a memfs as records, for the compaction of its journal: node by node, while requests change it.

A node is told in one record; when all are told the names follow, a directory's in several records. Whatever changes
meanwhile is in the journal behind what was told before the change; what changes before it is told is skipped
there (load.py). Called by the journal, a few records at each append.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import chain, islice

from . import records
from .nodes import FIRST, Directory, File, Node, Symlink
from .tree import Tree

_CHUNK = 64  # names in one record


def take(tree: Tree) -> Iterator[bytes]:
    """Yield the records that make this tree."""
    yield records.state.pack(records.STATE, tree.last_ino)
    directories = []
    for ino in list(tree.nodes):
        node = tree.nodes.get(ino)
        if node is None:
            continue  # gone meanwhile
        yield node_record(node)
        if isinstance(node, Directory):
            directories.append(node)
    # Names behind nodes, because reading a name whose node is known already is quicker.
    for directory in directories:
        yield from _names(directory)


def node_record(node: Node) -> bytes:
    """Return the record that makes this node, without its names."""
    first = second = 0
    runs = target = b""
    if isinstance(node, File):
        if node.contents is not None:
            first = node.contents.slot + 1
            runs = array("Q", chain.from_iterable(node.contents.extents)).tobytes()
    elif isinstance(node, Directory):
        first, second = node.parent.ino, node.next_offset
    elif isinstance(node, Symlink):
        target = node.target
    xattrs = records.pack_xattrs(node.xattrs) if node.xattrs else b""
    head = records.node.pack(
        records.NODE, node.mode, node.uid, node.gid, node.rdev, node.nlink, node.ino, node.atime, node.mtime,
        node.ctime, first, second, len(runs) // records.run.size, len(xattrs), len(target),
    )  # fmt: skip
    return head + runs + xattrs + target


def _names(directory: Directory) -> Iterator[bytes]:
    last = FIRST - 1
    while True:
        # Asked anew for each record: the directory may have changed since the one before.
        part = list(islice(directory.after(last), _CHUNK))
        if not part:
            return
        last = part[-1][0]
        yield b"".join(
            (
                records.names.pack(records.NAMES, directory.ino, len(part)),
                *(records.entry.pack(offset, node.ino, len(name)) for offset, name, node in part),
                *(name for _, name, _ in part),
            )
        )
