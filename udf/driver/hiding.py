"""Files that are removed while they are open.

Owns: keeping them until their last handle closes. A driver with `rename` has them moved to a hidden name in its root
(there they are in no directory's way); for one without, the removal itself waits, and the name is taken for absent.
Must never: show a hidden name to anyone. Called by: paths.py, with the nodes concerned frozen.
"""

from __future__ import annotations

import errno
import secrets

from udf.driver.fs import FsDriver
from udf.driver.tree import Node, Tree

HIDDEN_PREFIX = ".udf-open-"  # not the shim's, which hides files itself where it can, so that they outlive us


class Hiding:
    """The hidden files of one driver."""

    def __init__(self, driver: FsDriver, tree: Tree, verbs: frozenset[str]) -> None:
        self._driver = driver
        self._tree = tree
        self._can_rename = "rename" in verbs
        self._can_link = "link" in verbs
        self._hidden: dict[str, Node] = {}  # by the path they have at the driver

    def is_hidden(self, parent: Node, name: str) -> bool:
        """Whether this name must not be seen."""
        if parent is self._tree.root and name.startswith(HIDDEN_PREFIX):
            return True
        return bool(self._hidden) and self._tree.child_path(parent, name) in self._hidden

    def is_hidden_path(self, path: str) -> bool:
        """The same for a path."""
        return path.startswith("/" + HIDDEN_PREFIX) or path in self._hidden

    def refuse_name(self, parent: Node, name: str) -> None:
        """Nothing may be made at a hidden name."""
        if self.is_hidden(parent, name):
            raise OSError(errno.EBUSY, "the name is still in use by an open file")

    async def remove(self, path: str, node: Node | None) -> None:
        """Remove what is at the path; `node` is what is known there. The caller takes the name away."""
        if node is None or not self._must_live(node):
            await self._driver.remove(path)
        elif self._can_rename:
            hidden = self._new_path()
            await self._driver.rename(path, hidden)
            self._note(node, hidden)
        else:
            self._note(node, path)

    async def replace(self, old: str, new: str, target: Node | None) -> None:
        """Rename, keeping what is replaced if it is open."""
        if target is None or not self._must_live(target):
            await self._driver.rename(old, new)
            return
        hidden = self._new_path()
        if self._can_link:
            # With a second name for the open file the rename itself stays one step.
            await self._driver.link(new, hidden)
            try:
                await self._driver.rename(old, new)
            except BaseException:
                await self._driver.remove(hidden)
                raise
        else:
            await self._driver.rename(new, hidden)
            try:
                await self._driver.rename(old, new)
            except BaseException:
                await self._driver.rename(hidden, new)
                raise
        self._note(target, hidden)

    async def bury(self, node: Node) -> None:
        """The last handle is closed: remove the file for good."""
        path = node.hidden
        if path is None:
            return
        try:
            await self._driver.remove(path)
        finally:
            # Also when it failed: no handle is left that could try again.
            self._hidden.pop(path, None)
            node.hidden = None

    async def bury_all(self) -> None:
        """The driver ends: nobody will close what is still open."""
        for node in list(self._hidden.values()):
            try:
                await self.bury(node)
            except Exception:  # noqa: S112 - the next one may go, and nobody is left to tell
                continue

    def _must_live(self, node: Node) -> bool:
        return node.opens > 0 and not node.is_dir and len(node.names) == 1

    def _note(self, node: Node, path: str) -> None:
        node.hidden = path
        self._hidden[path] = node

    @staticmethod
    def _new_path() -> str:
        return f"/{HIDDEN_PREFIX}{secrets.token_hex(8)}"
