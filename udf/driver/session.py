"""What all operations of one served FsDriver share.

Owns: the driver, its tree, its gate and its open handles. Must never: call more than `stat` of the driver.
Called by: names.py, attributes.py and contents.py, which are parts of one object (paths.py).
"""

from __future__ import annotations

import errno
import os

import pyfuse3

from udf.driver.absent import MissingVerbs
from udf.driver.convert import MAX_NAME, Converter
from udf.driver.fs import Attr, FsDriver, verbs_of
from udf.driver.gate import Gate
from udf.driver.handles import Handles
from udf.driver.hiding import Hiding
from udf.driver.tree import Node, Tree


class Session(pyfuse3.Operations):
    """One FsDriver being served."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, driver: FsDriver) -> None:
        super().__init__()
        self._driver = driver
        self._verbs = verbs_of(driver)
        self._missing = MissingVerbs(self._verbs)
        self._convert = Converter(type(driver).__name__, float(driver.valid))
        self._tree = Tree()
        self._gate = Gate(self._tree)
        self._handles = Handles()
        self._hiding = Hiding(driver, self._tree, self._verbs)
        self._changes = 0  # counts mutations: attributes noted before one are not believed after it

    def _node(self, node_id: int) -> Node:
        node = self._tree.get(node_id)
        if node is None:
            raise OSError(errno.ESTALE, "forgotten")
        return node

    async def _stat(self, path: str) -> Attr:
        return self._convert.attr("stat", await self._driver.stat(path))

    def _found(self, parent: Node, name: str, attr: Attr) -> pyfuse3.EntryAttributes:
        node = self._tree.bind(parent, name, attr.kind == "dir", attr.ino)
        try:
            entry = self._entry(node, attr)
            node.lookups += 1
        finally:
            self._tree.prune(node)
        return entry

    def _entry(self, node: Node, attr: Attr) -> pyfuse3.EntryAttributes:
        if (attr.kind == "dir") != node.is_dir:
            # Another file has the path now; the open one is not to be confused with it.
            raise OSError(errno.ESTALE, "replaced")
        node.is_dated = attr.mtime_ns is not None
        node.is_sized = attr.size is not None
        entry = self._convert.entry("stat", attr, node.id)
        if node.hidden is not None:
            entry.st_nlink = max(0, entry.st_nlink - 1)
        return entry


def decode(name: bytes) -> str:
    """A name as authors get it."""
    if len(name) > MAX_NAME:
        raise OSError(errno.ENAMETOOLONG, "name too long")
    return os.fsdecode(name)


def join(directory: str, name: str) -> str:
    """The path of a name in a directory."""
    return directory + name if directory == "/" else f"{directory}/{name}"
