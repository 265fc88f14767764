"""Requests under way: what each kernel request waits for, and the shim's own requests to the driver.

A request leaves `waiting` only by its one reply, whatever the driver does. One that the kernel has been answered for
early (interrupted, past its deadline) moves to `late` until the driver's reply settles what it changed.
"""

from __future__ import annotations

from collections.abc import Generator

OWN_UNIQUE = 1 << 62  # ids of our own requests start here; the kernel's and RESEND's bit 63 never meet them
INTERRUPT_UNIQUE = OWN_UNIQUE + 3  # drivers answer an INTERRUPT or not: what comes is dropped


class Pending:
    """A kernel request that was sent to the driver."""

    __slots__ = ("before", "began", "handle", "node_id", "op", "request", "sent", "slot", "version")

    def __init__(
        self, op: int, slot: int, node_id: int, request: bytes, sent: float, version: int, handle: object = None
    ) -> None:
        self.op = op
        self.slot = slot
        self.node_id = node_id
        self.request = request  # as the kernel sent it, with its ids: what another generation can be sent again
        self.sent = self.began = sent  # the first begins anew when the driver says that it gets on
        self.version = version  # of the node's attributes when this was sent
        self.before: bool | None = None  # SETXATTR to create, REMOVEXATTR: whether the attribute was there before
        self.handle = handle


class Refuse(Exception):
    """A task's request is answered with this errno."""

    def __init__(self, errno: int) -> None:
        super().__init__(errno)
        self.errno = errno


class Ask:
    """A request of the shim's own to the driver, on behalf of a program (uid, gid, pid) or of nobody."""

    __slots__ = ("body", "caller", "node", "op")

    def __init__(self, op: int, node: int, body: bytes, caller: tuple[int, int, int] = (0, 0, 0)) -> None:
        self.op = op
        self.node = node
        self.body = body
        self.caller = caller


class Wait:
    """A task waits until another task has opened this handle."""

    __slots__ = ("handle_number",)

    def __init__(self, handle_number: int) -> None:
        self.handle_number = handle_number


Answer = tuple[int, bytes]  # errno (0: success) and the reply's body
Steps = Generator["Ask | Wait", "Answer", None]


class Task:
    """A kernel request that takes several steps at the driver; each step's answer resumes the generator."""

    __slots__ = ("asked", "began", "op", "pending", "request", "slot", "steps", "unique")

    def __init__(
        self,
        unique: int,
        op: int,
        slot: int,
        request: bytes,
        steps: Steps,
        started: float,
        pending: Pending | None = None,
    ) -> None:
        self.unique = unique
        self.op = op
        self.slot = slot  # pinned: it stays this node's as long as the steps take
        self.request = request
        self.steps = steps
        self.asked = self.began = started  # when the step under way was sent, and when the first was
        self.pending = pending  # the request was sent to a driver that died, and these steps find out what became of it
