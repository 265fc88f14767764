"""The live trace: one line of JSON for each answered request, to a descriptor that never makes the loop wait.

Exists only while somebody watches. A watcher that does not keep up misses lines, and is told how many.
"""

from __future__ import annotations

import errno
import json
import os
import time
from typing import TYPE_CHECKING

from udf.fuse.opcodes import Opcode
from udf.fuse.structs import IN_HEADER
from udf.shim.request_names import with_name
from udf.shim.service import op_name

if TYPE_CHECKING:
    from udf.shim.nodes import NodeTable

_UNANSWERED = frozenset((Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY))


class Tracer:
    """One watcher."""

    def __init__(self, fd: int, nodes: NodeTable) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self._nodes = nodes
        self._open: dict[int, tuple[int, int, str | None, int, int, float]] = {}
        self._missed = 0
        self.closed = False

    def requested(self, op: int, unique: int, node_id: int, message: memoryview) -> None:
        """Note a request when it arrives."""
        if op in _UNANSWERED:
            return
        uid, _, pid = IN_HEADER.unpack_from(message)[4:7]
        slot = self._nodes.slot(node_id)
        name = self._nodes.path(slot) if slot else None
        if name is not None:
            name = with_name(name, op, message)
        self._open[unique] = (op, node_id, name, pid, uid, time.monotonic())

    def answered(self, unique: int, error: int, size: int, by: str) -> None:
        """Write the line of a request that is being answered."""
        known = self._open.pop(unique, None)
        if known is None:
            return
        op, node_id, name, pid, uid, started = known
        line = {
            "time": round(time.time(), 6),
            "op": op_name(op),
            "node": node_id,
            "name": name,
            "pid": pid,
            "uid": uid,
            "us": round((time.monotonic() - started) * 1e6, 1),
            "result": errno.errorcode.get(error, str(error)) if error else "ok",
            "by": by,
            "bytes": size,
        }
        if self._missed:
            line["missed"] = self._missed
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        try:
            # Up to PIPE_BUF a pipe takes a line whole or not at all; a longer one could be cut.
            if len(data) > 4096:
                raise BlockingIOError
            os.write(self.fd, data)
            self._missed = 0
        except BlockingIOError:
            self._missed += 1
        except OSError:
            self.closed = True

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)
