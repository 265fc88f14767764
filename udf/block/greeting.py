"""The client's side of the options: from the server's greeting to an export.

Owns: what is asked of a server and in which order, also of old ones. Must never: believe a length or wait for more
replies than the bounds in wire.py allow. Called by: client.py.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

from udf.block import wire
from udf.block.stream import Ended, Stream
from udf.errors import DeviceGone


@dataclass
class Offer:
    """What the server offers, and what was agreed on."""

    size: int = 0
    flags: int = 0
    sizes: wire.BlockSizes = field(default_factory=wire.BlockSizes)
    structured: bool = False
    context: int | None = None  # the id of base:allocation, if the server has it
    claimed: bool = False
    watching: bool = False  # the server compares what is called metadata when its device comes back
    window: bool = False  # the server puts what is read into our window

    @property
    def read_only(self) -> bool:
        """Nothing can be changed."""
        return bool(self.flags & wire.READ_ONLY)


class Greeting:
    """One connection's options. WireError and Ended: the connection is of no use."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._fixed = False
        self._zeroes = True
        self._greeted = False

    async def choose(self, export: str, *, claim: bool = False, watch: bool = False, window: int = -1) -> Offer:
        """Agree on all that the server can do, and enter the export. `window`: a descriptor."""
        await self._greet()
        offer = Offer()
        if not self._fixed:
            await self._enter_by_name(export, offer)
            return offer
        if claim:
            offer.claimed = await self._claim(export)
        if watch:
            offer.watching = (await self._ask(wire.OPT_WATCH))[-1].type == wire.REP_ACK
        replies = await self._ask(wire.OPT_STRUCTURED_REPLY)
        offer.structured = replies[-1].type == wire.REP_ACK
        if offer.structured:
            offer.context = await self._allocation(export)
            if window >= 0 and self._stream.is_local:
                offer.window = (await self._ask(wire.OPT_WINDOW, fd=window))[-1].type == wire.REP_ACK
        replies = await self._ask(wire.OPT_GO, wire.pack_go(export))
        last = replies[-1]
        if last.type == wire.REP_ERR_UNSUP:
            await self._enter_by_name(export, offer)
            return offer
        _refuse(last, export)
        self._infos(replies[:-1], offer)
        return offer

    async def exports(self) -> dict[str, Offer]:
        """All exports of the server by name; then leave. "" is there if the server tells of it."""
        await self._greet()
        if not self._fixed:
            raise OSError(errno.EOPNOTSUPP, "the server cannot tell what it exports")
        replies = await self._ask(wire.OPT_LIST)
        _refuse(replies[-1], "")
        names = [wire.unpack_server(reply.payload) for reply in replies[:-1] if reply.type == wire.REP_SERVER]
        found: dict[str, Offer] = {}
        for name in dict.fromkeys(names):
            *infos, last = await self._ask(wire.OPT_INFO, wire.pack_go(name))
            if last.type == wire.REP_ACK:  # else it went meanwhile, or is not for us
                found[name] = Offer()
                self._infos(infos, found[name])
        await self._stream.send(wire.pack_option(wire.OPT_ABORT))
        return found

    async def _greet(self) -> None:
        stream = self._stream
        magic, option, flags = wire.GREETING.unpack(await stream.exactly(wire.GREETING.size))
        if magic != wire.NBD_MAGIC or option != wire.OPTION_MAGIC:
            raise wire.WireError("what is there is no NBD server, or one of an old kind")
        self._fixed = bool(flags & wire.FLAG_FIXED_NEWSTYLE)
        self._zeroes = not flags & wire.FLAG_NO_ZEROES
        await stream.send(wire.CLIENT_FLAGS.pack(flags & (wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES)))

    async def _ask(self, option: int, payload: bytes = b"", fd: int = -1) -> list[wire.OptionReply]:
        """Send an option and collect its replies: the last one is an ACK or an error, and nothing before it is."""
        message = wire.pack_option(option, payload)
        if fd >= 0:
            message = self._stream.send_with(fd, message)
        await self._stream.send(message)
        replies: list[wire.OptionReply] = []
        while len(replies) < wire.MAX_OPTIONS:
            head = await self._stream.exactly(wire.OPTION_REPLY.size)
            magic, answered, kind, size = wire.OPTION_REPLY.unpack(head)
            if magic != wire.OPTION_REPLY_MAGIC or answered != option or size > wire.MAX_OPTION:
                raise wire.WireError("the server answers an option with something else")
            replies.append(wire.OptionReply(option, kind, await self._stream.exactly(size)))
            if kind == wire.REP_ACK or kind & wire.REP_ERROR:
                return replies
        raise wire.WireError("the server answers an option without an end")

    async def _claim(self, export: str) -> bool:
        last = (await self._ask(wire.OPT_CLAIM, wire.pack_text(export)))[-1]
        if last.type in (wire.REP_ERR_UNSUP, wire.REP_ERR_INVALID):
            return False  # a server that does not know claims
        _refuse(last, export)
        return True

    async def _allocation(self, export: str) -> int | None:
        replies = await self._ask(wire.OPT_SET_META_CONTEXT, wire.pack_contexts(export))
        if replies[-1].type != wire.REP_ACK:
            return None
        for reply in replies[:-1]:
            if reply.type == wire.REP_META_CONTEXT:
                number, name = wire.unpack_context(reply.payload)
                if name == wire.BASE_ALLOCATION:
                    return number
        return None

    def _infos(self, replies: list[wire.OptionReply], offer: Offer) -> None:
        told = False
        for reply in replies:
            payload = reply.payload
            kind = int.from_bytes(payload[:2], "big")
            if reply.type != wire.REP_INFO or len(payload) < 2:
                continue
            if kind == wire.INFO_EXPORT and len(payload) == wire.EXPORT_INFO.size:
                _, offer.size, offer.flags = wire.EXPORT_INFO.unpack(payload)
                told = True
            elif kind == wire.INFO_BLOCK_SIZE and len(payload) == wire.BLOCK_SIZE_INFO.size:
                offer.sizes = _sane(*wire.BLOCK_SIZE_INFO.unpack(payload)[1:])
        if not told or offer.size > wire.MAX_SIZE:
            raise wire.WireError("the server does not tell a size that can be")

    async def _enter_by_name(self, export: str, offer: Offer) -> None:
        await self._stream.send(wire.pack_option(wire.OPT_EXPORT_NAME, export.encode()))
        try:
            offer.size, offer.flags = wire.EXPORT_REPLY.unpack(await self._stream.exactly(wire.EXPORT_REPLY.size))
        except Ended:
            raise FileNotFoundError(errno.ENOENT, f"the server has no export {export!r}") from None
        if self._zeroes:
            await self._stream.skip(wire.ZEROES)
        if offer.size > wire.MAX_SIZE:
            raise wire.WireError("the server does not tell a size that can be")


def _sane(minimum: int, preferred: int, maximum: int) -> wire.BlockSizes:
    power = minimum & (minimum - 1) == 0 and preferred & (preferred - 1) == 0
    if not (power and 0 < minimum <= 64 * 1024 and minimum <= preferred <= wire.MAX_PAYLOAD and maximum >= minimum):
        raise wire.WireError(f"the server tells block sizes that cannot be: {minimum}, {preferred}, {maximum}")
    return wire.BlockSizes(minimum, preferred, min(maximum, wire.MAX_PAYLOAD) // minimum * minimum)


def _refuse(reply: wire.OptionReply, export: str) -> None:
    """Raise what an error reply means."""
    if reply.type == wire.REP_ACK:
        return
    text = reply.payload[: wire.MAX_ERROR_TEXT].decode(errors="replace")
    if reply.type == wire.REP_ERR_UNKNOWN:
        raise FileNotFoundError(errno.ENOENT, text or f"the server has no export {export!r}")
    if reply.type == wire.REP_ERR_POLICY:
        raise PermissionError(errno.EPERM, text or f"the server does not allow the export {export!r}")
    if reply.type == wire.REP_ERR_SHUTDOWN:
        raise DeviceGone(text or "the server shuts down, or its device is gone")
    raise OSError(errno.EIO, text or f"the server refuses (error {reply.type & ~wire.REP_ERROR})")
