"""The last answers about extended attributes and links, for the time when there is no driver to ask.

`ls -l` asks for the ACL of each file; it must not hang because a driver is dead. While one serves, nothing here
is used: the kernel or the driver decides how long such an answer is good. Bounded; the oldest node's goes first.
"""

from __future__ import annotations

import errno
from collections import OrderedDict
from struct import Struct

from udf.fuse.opcodes import Opcode

REMEMBERED = frozenset((int(Opcode.GETXATTR), int(Opcode.LISTXATTR), int(Opcode.READLINK)))
_SIZED = frozenset((int(Opcode.GETXATTR), int(Opcode.LISTXATTR)))
_HEAD = 8  # of a question about attributes: the size of the caller's buffer, and padding
_U32 = Struct("=I")
_NODES = 4096
_OF_ONE = 8
_LONGEST = 512

Answer = tuple[int, bytes]  # errno (0: success) and the body


class Remembered:
    """Answers by node id and question: what was asked for, whatever the size of the caller's buffer."""

    def __init__(self) -> None:
        self._nodes: OrderedDict[int, dict[tuple[int, bytes], tuple[int, int, bytes | None]]] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of nodes that something is remembered of."""
        return len(self._nodes)

    def keep(self, node_id: int, op: int, question: bytes, error: int, body: bytes) -> None:
        """Note an answer of the driver's."""
        if len(body) > _LONGEST or len(question) > _LONGEST or error == errno.ERANGE:
            return
        answers = self._nodes.get(node_id)
        if answers is None:
            answers = self._nodes[node_id] = {}
            if len(self._nodes) > _NODES:
                self._nodes.popitem(last=False)
        key = op, question[_HEAD:] if op in _SIZED else question
        if len(answers) >= _OF_ONE and key not in answers:
            return
        if op in _SIZED and not error and _U32.unpack_from(question)[0] == 0:
            length = _U32.unpack_from(body)[0]
            known = answers.get(key)
            answers[key] = 0, length, known[2] if known is not None and known[1] == length else None
        else:
            answers[key] = error, len(body), body

    def find(self, node_id: int, op: int, question: bytes) -> Answer | None:
        """Return what the driver last said to this."""
        known = self._nodes.get(node_id, {}).get((op, question[_HEAD:] if op in _SIZED else question))
        if known is None:
            return None
        error, length, body = known
        if error or op not in _SIZED:
            return error, body or b""
        size = _U32.unpack_from(question)[0]
        if size == 0:
            return 0, _U32.pack(length) + bytes(4)
        if length > size:
            return errno.ERANGE, b""
        return None if body is None else (0, body)

    def forget(self, node_id: int) -> None:
        """The node has changed."""
        self._nodes.pop(node_id, None)
