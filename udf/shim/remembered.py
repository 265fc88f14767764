"""The last answers about extended attributes and links, for the time when there is no driver to ask.

`ls -l` asks for the ACL of each file; it must not hang because a driver is dead. While one serves, nothing here
is used: the kernel or the driver decides how long such an answer is good. Bounded; the oldest node's goes first.
"""

from __future__ import annotations

from collections import OrderedDict

from udf.fuse.opcodes import Opcode

REMEMBERED = frozenset((int(Opcode.GETXATTR), int(Opcode.LISTXATTR), int(Opcode.READLINK)))
_NODES = 4096
_OF_ONE = 8
_LONGEST = 512

Answer = tuple[int, bytes]  # errno (0: success) and the body


class Remembered:
    """Answers by node id and question (opcode and body)."""

    def __init__(self) -> None:
        self._nodes: OrderedDict[int, dict[tuple[int, bytes], Answer]] = OrderedDict()

    def keep(self, node_id: int, op: int, question: bytes, error: int, body: bytes) -> None:
        """Note an answer of the driver's."""
        if len(body) > _LONGEST or len(question) > _LONGEST:
            return
        answers = self._nodes.get(node_id)
        if answers is None:
            answers = self._nodes[node_id] = {}
            if len(self._nodes) > _NODES:
                self._nodes.popitem(last=False)
        if len(answers) < _OF_ONE or (op, question) in answers:
            answers[op, question] = error, body

    def find(self, node_id: int, op: int, question: bytes) -> Answer | None:
        """Return what the driver last said to this."""
        return self._nodes.get(node_id, {}).get((op, question))

    def forget(self, node_id: int) -> None:
        """The node has changed."""
        self._nodes.pop(node_id, None)
