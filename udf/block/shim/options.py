"""The handshake with a client: greeting, options, replies. A client is untrusted, and has a bounded time for it.

Owns: which option is answered how, and what an export's flags are. Must never: wait, or ask the driver: everything
that it says is known.
Called by: client.py, with bytes; it says when the connection is to serve an export.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from udf.block import wire
from udf.block.landing import Descriptors
from udf.block.shim.streams import Ended, Inbox, Outbox

if TYPE_CHECKING:
    from udf.block.shim.client import Client
    from udf.block.shim.exports import Region
    from udf.window import Mapped

_OURS = wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES
_PASSED_ON = wire.SEND_FLUSH | wire.SEND_FUA | wire.ROTATIONAL | wire.SEND_TRIM | wire.SEND_WRITE_ZEROES
_PASSED_ON |= wire.SEND_CACHE | wire.SEND_FAST_ZERO
_WRITERS = wire.SEND_FUA | wire.SEND_TRIM | wire.SEND_WRITE_ZEROES | wire.SEND_FAST_ZERO
CONTEXT_ID = 1
GREETING = wire.GREETING.pack(wire.NBD_MAGIC, wire.OPTION_MAGIC, _OURS)


def flags_of(region: Region) -> int:
    """The transmission flags of an export.

    Several connections see the same data, as all go through one to the driver. But a writer has its export alone, so
    only readers are told that they may open more than one.
    """
    flags = wire.HAS_FLAGS | wire.SEND_DF | (region.unit.terms.flags & _PASSED_ON)
    if region.read_only:
        flags = (flags & ~_WRITERS) | wire.READ_ONLY | wire.CAN_MULTI_CONN
    return flags


class Handshake:
    """One client's handshake."""

    def __init__(self, client: Client, inbox: Inbox, out: Outbox) -> None:
        self._client = client
        self._inbox = inbox
        self._out = out
        self._flags: int | None = None
        self._options = 0
        self._context_of: str | None = None  # the export for which base:allocation was asked
        self.structured = False
        self.watching = False
        self.window: Mapped | None = None
        inbox.descriptors = Descriptors()
        out.push(GREETING)

    def parse(self) -> Region | None:
        """Answer what has come; returns the export once one is chosen. Raises Ended, wire.WireError."""
        inbox = self._inbox
        if self._flags is None:
            if inbox.end - inbox.start < wire.CLIENT_FLAGS.size:
                return None
            self._flags = wire.CLIENT_FLAGS.unpack(inbox.take(wire.CLIENT_FLAGS.size))[0]
            if self._flags & ~_OURS or not self._flags & wire.FLAG_FIXED_NEWSTYLE:
                raise wire.WireError(f"client flags {self._flags:#x}")
        while inbox.end - inbox.start >= wire.OPTION.size:
            magic, option, size = wire.OPTION.unpack_from(inbox.buffer, inbox.start)
            if magic != wire.OPTION_MAGIC or size > len(inbox.buffer) - wire.OPTION.size:
                raise wire.WireError("not an option, or one that is too long")
            if inbox.end - inbox.start < wire.OPTION.size + size:
                return None
            at = inbox.start + wire.OPTION.size
            payload = bytes(inbox.buffer[at : at + size])
            if option == wire.OPT_CLAIM and self._claim_must_wait(payload):
                return None
            inbox.start = at + size
            self._options += 1
            if self._options > wire.MAX_OPTIONS:
                raise wire.WireError("too many options")
            region = self._option(option, payload)
            if region is not None:
                return region
        return None

    def _reply(self, option: int, kind: int, payload: bytes | str = b"") -> None:
        self._out.push(wire.pack_option_reply(option, kind, payload.encode() if isinstance(payload, str) else payload))

    def _option(self, option: int, payload: bytes) -> Region | None:
        try:
            if option == wire.OPT_EXPORT_NAME:
                return self._export_name(payload)
            if option in (wire.OPT_GO, wire.OPT_INFO):
                return self._go(option, payload)
            if option == wire.OPT_LIST:
                self._list(payload)
            elif option == wire.OPT_STRUCTURED_REPLY:
                if payload:
                    raise wire.MalformedError("it has a payload")
                self.structured = True
                self._reply(option, wire.REP_ACK)
            elif option == wire.OPT_WATCH:
                if payload:
                    raise wire.MalformedError("it has a payload")
                self.watching = True
                self._reply(option, wire.REP_ACK)
            elif option == wire.OPT_WINDOW:
                came = self._inbox.descriptors or Descriptors()
                self.window = came.window(payload, structured=self.structured)
                self._reply(option, wire.REP_ACK)
            elif option in (wire.OPT_SET_META_CONTEXT, wire.OPT_LIST_META_CONTEXT):
                self._contexts(option, payload)
            elif option == wire.OPT_CLAIM:
                self._claim(payload)
            elif option == wire.OPT_ABORT:
                self._reply(option, wire.REP_ACK)
                self._out.flush()
                raise Ended("aborted")
            else:
                self._reply(option, wire.REP_ERR_UNSUP)
        except wire.MalformedError as error:
            if option == wire.OPT_EXPORT_NAME:
                raise
            self._reply(option, wire.REP_ERR_INVALID, str(error))
        return None

    def _find(self, name: str) -> Region | None:
        return self._client.service.find_export(name)

    def _export_name(self, payload: bytes) -> Region:
        region = self._find(wire.decode_text(payload))
        if region is None or self._client.service.detached:
            raise wire.WireError("there is no such export")  # no reply for this is in the protocol
        self._out.push(wire.EXPORT_REPLY.pack(region.size, flags_of(region)))
        assert self._flags is not None
        if not self._flags & wire.FLAG_NO_ZEROES:
            self._out.push(bytes(wire.ZEROES))
        self._context_of = None if self._context_of != region.name else self._context_of
        return region

    def _go(self, option: int, payload: bytes) -> Region | None:
        name, infos = wire.unpack_go(payload)
        region = self._find(name)
        if self._client.service.detached:
            self._reply(option, wire.REP_ERR_SHUTDOWN, "the device is gone")
            return None
        if region is None:
            self._reply(option, wire.REP_ERR_UNKNOWN, f"there is no export {name[:100]!r}")
            return None
        terms = region.unit.terms
        flags = flags_of(region)
        self._reply(option, wire.REP_INFO, wire.EXPORT_INFO.pack(wire.INFO_EXPORT, region.size, flags))
        sizes = wire.BLOCK_SIZE_INFO.pack(wire.INFO_BLOCK_SIZE, terms.minimum, terms.preferred, wire.MAX_PAYLOAD)
        self._reply(option, wire.REP_INFO, sizes)
        if wire.INFO_NAME in infos:
            self._reply(option, wire.REP_INFO, struct.pack(">H", wire.INFO_NAME) + region.name.encode())
        if wire.INFO_DESCRIPTION in infos and region.partition:
            text = f"{region.type} {region.label}".strip()
            self._reply(option, wire.REP_INFO, struct.pack(">H", wire.INFO_DESCRIPTION) + text.encode())
        self._reply(option, wire.REP_ACK)
        if option == wire.OPT_INFO:
            return None
        if self._context_of is not None and self._find(self._context_of) is not region:
            self._context_of = None
        return region

    @property
    def has_context(self) -> bool:
        """Whether base:allocation was agreed on for the export that was chosen."""
        return self.structured and self._context_of is not None

    def _list(self, payload: bytes) -> None:
        if payload:
            raise wire.MalformedError("it has a payload")
        for name in self._client.service.exports:
            self._reply(wire.OPT_LIST, wire.REP_SERVER, wire.pack_text(name))
        self._reply(wire.OPT_LIST, wire.REP_ACK)

    def _contexts(self, option: int, payload: bytes) -> None:
        name, queries = wire.unpack_contexts(payload)
        if not self.structured:
            raise wire.MalformedError("structured replies come first")
        if option == wire.OPT_SET_META_CONTEXT:
            self._context_of = None
        if self._find(name) is None:
            self._reply(option, wire.REP_ERR_UNKNOWN, f"there is no export {name[:100]!r}")
            return
        listing = option == wire.OPT_LIST_META_CONTEXT
        if wire.BASE_ALLOCATION in queries or (listing and (not queries or "base:" in queries)):
            context = wire.CONTEXT.pack(0 if listing else CONTEXT_ID) + wire.BASE_ALLOCATION.encode()
            self._reply(option, wire.REP_META_CONTEXT, context)
            if not listing:
                self._context_of = name
        self._reply(option, wire.REP_ACK)

    # ---- claims

    def _claim_must_wait(self, payload: bytes) -> bool:
        try:
            region = self._find(wire.unpack_claim(payload))
        except wire.MalformedError:
            return False
        return region is not None and self._client.must_wait_for(region)

    def _claim(self, payload: bytes) -> None:
        name = wire.unpack_claim(payload)
        region = self._find(name)
        if region is None:
            self._reply(wire.OPT_CLAIM, wire.REP_ERR_UNKNOWN, f"there is no export {name[:100]!r}")
        elif region.read_only:
            self._reply(wire.OPT_CLAIM, wire.REP_ERR_POLICY, f"{region.name} is read-only")
        else:
            refusal = self._client.claim(region)
            if refusal is None:
                self._reply(wire.OPT_CLAIM, wire.REP_ACK)
            else:
                self._reply(wire.OPT_CLAIM, wire.REP_ERR_POLICY, refusal)
