"""A driver that speaks the link raw, over a filesystem of a few dictionaries, and says anything a test wants.

It runs in a thread of the test (which itself never touches the mount). Every answer can be replaced, by opcode or by a
function that is given the right answer; nothing here checks or repairs what is sent.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable

from tests.t3_shim.program import PATIENCE
from tests.t3_shim.tree import Answer, Handler, Packets, Request, Tree, whole
from udf.fuse import structs
from udf.fuse.flags import Init
from udf.fuse.opcodes import UNANSWERED, Notify, Opcode

HEADER = structs.IN_HEADER.size
USUAL_FLAGS = int(
    Init.ASYNC_READ
    | Init.BIG_WRITES
    | Init.DONT_MASK
    | Init.DO_READDIRPLUS
    | Init.READDIRPLUS_AUTO
    | Init.PARALLEL_DIROPS
    | Init.MAX_PAGES
)


class RawDriver(threading.Thread):
    """Serves the link until it is closed. `answers` replaces what the tree says; `log` has every request."""

    def __init__(self, link: socket.socket, *, flags: int = USUAL_FLAGS, minor: int = 45, max_write: int = 131072):
        super().__init__(name="raw driver", daemon=True)
        self.link = link
        self.tree = Tree()
        self.answers: dict[int, Handler] = {}
        self.mangle: Callable[[Request, Answer], Answer] | None = None  # given what would be answered
        self.init = structs.INIT_OUT.pack(7, minor, 131072, flags & 0xFFFFFFFF, 12, 9, max_write, 1, 32, 0, 0, 0, 0)
        self.log: list[Request] = []
        self.unanswered: list[Request] = []
        self.errors: list[BaseException] = []
        self.astray = False  # it has made up nodes, and may be asked for them
        self.reading = threading.Event()
        self.reading.set()
        self._table = self.tree.table()
        self._changed = threading.Condition()
        self._wake, self._waker = os.pipe()
        self._stopped = False
        self._dying = False

    # ---- for tests

    def count(self, *ops: int) -> int:
        """How many requests came (of these opcodes)."""
        return sum(not ops or request.op in ops for request in list(self.log))

    def counts(self) -> Counter[str]:
        """How many requests came, by name."""
        return Counter(Opcode(request.op).name for request in list(self.log))

    def forget_log(self) -> None:
        """Count from here."""
        self.log.clear()

    def wait_for(self, op: int, count: int = 1, seconds: float = PATIENCE) -> Request:
        """Return the *count*th request of this kind, when it has come."""
        until = time.monotonic() + seconds
        with self._changed:
            while True:
                found = [request for request in self.log if request.op == op]
                if len(found) >= count:
                    return found[count - 1]
                left = until - time.monotonic()
                assert left > 0, f"no {Opcode(op).name} came: {self.counts()}"
                self._changed.wait(left)

    def wait_until(self, true: Callable[[], bool], seconds: float = 10.0) -> None:
        """Wait until something is true, which only requests can make so; whoever asked looks again."""
        until = time.monotonic() + seconds
        with self._changed:
            while not true():
                left = until - time.monotonic()
                if left <= 0:
                    return
                self._changed.wait(left)

    def hold(self, *ops: int) -> None:
        """Do not answer these any more."""
        for op in ops:
            self.answers[op] = lambda request: None

    def die(self) -> None:
        """End, from within a handler, with nothing said any more."""
        self._dying = True

    def die_in(self, op: int, *, after: bool) -> None:
        """Die of the next such request: before it is looked at, or after the work and before the answer."""

        def handler(request: Request) -> Answer:
            if after:
                self.usual(request)
            self.die()
            return None

        self.answers[op] = handler

    def answer_late(self) -> None:
        """Answer everything that was held, rightly."""
        self.answers.clear()
        while self.unanswered:
            request = self.unanswered.pop(0)
            self.reply(request, self.usual(request))

    def usual(self, request: Request) -> Answer:
        """What the tree says."""
        handler = self._table.get(request.op)
        return errno.ENOSYS if handler is None else handler(request)

    def take_tree(self, tree: Tree) -> None:
        """Serve this filesystem."""
        self.tree = tree
        self._table = tree.table()

    def plant(self, grow: Callable[[RawDriver], object]) -> None:
        """Begin with a new tree, whose nodes the other side may know already."""
        self.tree = Tree()
        self._table = self.tree.table()
        grow(self)
        for node in self.tree.nodes.values():
            node.lookups = 1 << 40

    def reply(self, request: Request, answer: Answer) -> None:
        """Answer a request, now or later."""
        if isinstance(answer, bytes):
            answer = Packets([whole(request.unique, answer)])
        elif isinstance(answer, int):
            answer = Packets([whole(request.unique, error=-answer)])
        if answer is not None:
            self.send(*answer.packets)

    def send(self, *packets: bytes) -> None:
        """Send packets as they are."""
        for packet in packets:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.link.send(packet)

    def notify(self, code: Notify, body: bytes) -> None:
        """Send a notification."""
        self.send(structs.OUT_HEADER.pack(structs.OUT_HEADER.size + len(body), code, 0) + body)

    def stop(self) -> None:
        """Close the link, as a death would."""
        if self._stopped:
            return
        self._stopped = True
        self.reading.set()
        os.write(self._waker, b"x")
        self.join(10)
        assert not self.is_alive()
        os.close(self._wake)
        os.close(self._waker)

    # ---- the thread

    def run(self) -> None:
        """Serve."""
        poll = select.poll()
        poll.register(self.link, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        try:
            while True:
                ready = [fd for fd, _ in poll.poll()]
                if self._wake in ready:
                    break
                self.reading.wait()
                raw = self.link.recv(1 << 20)
                if not raw:
                    break
                self._serve(raw)
                if self._dying:
                    break
        except OSError:
            pass
        finally:
            self.link.close()

    def _serve(self, raw: bytes) -> None:
        _, op, unique, node, uid, gid, pid, _ = structs.IN_HEADER.unpack_from(raw)
        request = Request(op, unique, node, uid, gid, pid, raw[HEADER:], raw)
        if op == Opcode.INIT:
            answer = self.answers.get(op, lambda request: self.init)(request)
            self.reply(request, answer)
            return
        if op == Opcode.FORGET:
            self.tree.forget(node, structs.FORGET_IN.unpack_from(request.body)[0])
        elif op == Opcode.BATCH_FORGET:
            for at in range(structs.BATCH_FORGET_IN.size, len(request.body), structs.FORGET_ONE.size):
                self.tree.forget(*structs.FORGET_ONE.unpack_from(request.body, at))
        try:
            answer = None
            if op not in UNANSWERED:
                answer = self.answers.get(op, self.usual)(request)
                if self.mangle is not None:
                    answer = self.mangle(request, answer)
        except BaseException as error:
            if not self.astray:
                self.errors.append(error)
            answer = errno.ESTALE
        if answer is None and op not in UNANSWERED:
            self.unanswered.append(request)
        if self._dying:
            return
        with self._changed:
            self.log.append(request)
            self._changed.notify_all()
        self.reply(request, answer)
