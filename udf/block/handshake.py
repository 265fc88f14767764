"""The server's side of the options: from the greeting to the export that a connection serves.

Owns: what is answered to each option. Must never: let a client hold it longer or make it keep more than the bounds in
wire.py. Called by: server.py, once for each connection.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from udf.block import wire
from udf.block.access import Access, Terms
from udf.block.landing import Descriptors
from udf.block.stream import Ended, Stream
from udf.errors import DeviceGone, is_fault
from udf.window import Mapped

Exports = Callable[[], Awaitable[Mapping[str, Access]]]


class Claims(Protocol):
    """Who may write: at most one at a time, by whatever rule. Asked once for each connection and export."""

    def take(self, holder: object, export: str) -> None:
        """`holder` (a connection) wants to write; PermissionError with a sentence if it must not."""

    def drop(self, holder: object) -> None:
        """`holder` is gone, with all that it had claimed."""


@dataclass
class Session:
    """What was agreed on."""

    name: str = ""
    access: Access | None = None
    terms: Terms = field(default_factory=lambda: Terms(0, 0, wire.BlockSizes()))
    structured: bool = False
    window: Mapped | None = None  # where the client wants what it reads
    allocation: str | None = None  # the export for which base:allocation was chosen
    claimed: set[str] = field(default_factory=set)


ALLOCATION_ID = 1


class _Abort(Exception):
    pass


class Handshake:
    """One connection's options."""

    def __init__(
        self,
        stream: Stream,
        exports: Exports,
        claims: Claims | None,
        holder: object,
        fault: Callable[[str, BaseException], None],
    ) -> None:
        """`holder` is what claims; `fault` is told of mistakes in the units."""
        self._stream = stream
        self._exports = exports
        self._claims = claims
        self._holder = holder
        self._fault = fault
        self._no_zeroes = False
        self.session = Session()

    async def run(self) -> Session | None:
        """Until an export is chosen; None if the client left. WireError and Ended end the connection."""
        stream = self._stream
        if stream.is_local:
            stream.descriptors = Descriptors()
        await stream.send(
            wire.GREETING.pack(wire.NBD_MAGIC, wire.OPTION_MAGIC, wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES)
        )
        (flags,) = wire.CLIENT_FLAGS.unpack(await stream.exactly(wire.CLIENT_FLAGS.size))
        if flags & ~(wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES):
            raise wire.WireError(f"the client has unknown flags: {flags:#x}")
        self._no_zeroes = bool(flags & wire.FLAG_NO_ZEROES)
        for _ in range(wire.MAX_OPTIONS):
            magic, option, size = wire.OPTION.unpack(await stream.exactly(wire.OPTION.size))
            if magic != wire.OPTION_MAGIC or size > wire.MAX_OPTION:
                raise wire.WireError("the client speaks something else than NBD, or asks for too much")
            payload = await stream.exactly(size)
            try:
                if await self._option(option, payload):
                    stream.drop_descriptors()
                    return self.session
            except _Abort:
                return None
        raise wire.WireError("the client asks for more options than there are")

    async def _option(self, option: int, payload: bytes) -> bool:
        """Answer one option; True if it ends the handshake."""
        if option == wire.OPT_EXPORT_NAME:
            await self._export_name(payload)
            return True
        try:
            if option in (wire.OPT_GO, wire.OPT_INFO):
                return await self._go(option, payload)
            if option == wire.OPT_LIST:
                await self._list(payload)
            elif option == wire.OPT_ABORT:
                await self._reply(option, wire.REP_ACK)
                raise _Abort
            elif option == wire.OPT_STRUCTURED_REPLY:
                wire.Reader(payload).end()
                self.session.structured = True
                await self._reply(option, wire.REP_ACK)
            elif option == wire.OPT_WINDOW:
                came = self._stream.descriptors or Descriptors()
                self.session.window = came.window(payload, structured=self.session.structured)
                await self._reply(option, wire.REP_ACK)
            elif option in (wire.OPT_SET_META_CONTEXT, wire.OPT_LIST_META_CONTEXT):
                await self._contexts(option, payload)
            elif option == wire.OPT_CLAIM and self._claims is not None:
                await self._claim(self._claims, payload)
            elif option == wire.OPT_STARTTLS:
                await self._refuse(option, wire.REP_ERR_UNSUP, "there is no TLS here: the socket is a local one")
            else:
                await self._refuse(option, wire.REP_ERR_UNSUP, "there is no such option")
        except wire.MalformedError as exc:
            await self._refuse(option, wire.REP_ERR_INVALID, f"the option cannot be read: {exc}")
        except DeviceGone as exc:
            await self._refuse(option, wire.REP_ERR_SHUTDOWN, str(exc) or "the device is gone")
        except (Ended, wire.WireError, _Abort):
            raise
        except Exception as exc:  # the units cannot be told, or make no sense
            if is_fault(exc):
                self._fault("units", exc)
            await self._refuse(option, wire.REP_ERR_INVALID, f"the device does not tell what it has: {exc}")
        return False

    async def _reply(self, option: int, kind: int, payload: bytes = b"") -> None:
        await self._stream.send(wire.pack_option_reply(option, kind, payload))

    async def _refuse(self, option: int, kind: int, text: str) -> None:
        await self._reply(option, kind, text.encode(errors="replace")[: wire.MAX_ERROR_TEXT])

    # ---- which export

    async def _export_name(self, payload: bytes) -> None:
        # The one option that cannot be refused with a reason: the connection ends instead.
        try:
            name = wire.decode_text(payload)
            access = (await self._exports()).get(name)
        except (wire.MalformedError, DeviceGone) as exc:
            raise Ended(str(exc)) from None
        if access is None:
            raise Ended("there is no such export")
        self._choose(name, access, access.terms())
        terms = self.session.terms
        zeroes = b"" if self._no_zeroes else bytes(wire.ZEROES)
        await self._stream.send(wire.EXPORT_REPLY.pack(terms.size, terms.flags) + zeroes)

    async def _go(self, option: int, payload: bytes) -> bool:
        name, infos = wire.unpack_go(payload)
        access = (await self._exports()).get(name)
        if access is None:
            await self._refuse(option, wire.REP_ERR_UNKNOWN, "there is no such export")
            return False
        terms = access.terms()
        if option == wire.OPT_GO:
            self._choose(name, access, terms)
            terms = self.session.terms
        elif not self.session.structured:
            terms = terms._replace(flags=terms.flags & ~wire.SEND_DF)
        await self._reply(option, wire.REP_INFO, wire.EXPORT_INFO.pack(wire.INFO_EXPORT, terms.size, terms.flags))
        if wire.INFO_BLOCK_SIZE in infos:
            sizes = wire.BLOCK_SIZE_INFO.pack(wire.INFO_BLOCK_SIZE, *terms.sizes)
            await self._reply(option, wire.REP_INFO, sizes)
        await self._reply(option, wire.REP_ACK)
        return option == wire.OPT_GO

    def _choose(self, name: str, access: Access, terms: Terms) -> None:
        session = self.session
        if not session.structured:
            terms = terms._replace(flags=terms.flags & ~wire.SEND_DF)
        session.name, session.access, session.terms = name, access, terms

    async def _list(self, payload: bytes) -> None:
        wire.Reader(payload).end()
        for name in await self._exports():
            await self._reply(wire.OPT_LIST, wire.REP_SERVER, wire.pack_text(name))
        await self._reply(wire.OPT_LIST, wire.REP_ACK)

    # ---- what else is agreed on

    async def _contexts(self, option: int, payload: bytes) -> None:
        choose = option == wire.OPT_SET_META_CONTEXT
        if choose:
            self.session.allocation = None  # whatever comes of it, the last choice is void
        name, queries = wire.unpack_contexts(payload)
        if not self.session.structured:
            await self._refuse(option, wire.REP_ERR_INVALID, "structured replies must be agreed on first")
            return
        if name not in await self._exports():
            await self._refuse(option, wire.REP_ERR_UNKNOWN, "there is no such export")
            return
        wanted = wire.BASE_ALLOCATION in queries
        if not choose:
            wanted = wanted or not queries or "base:" in queries
        if wanted:
            number = ALLOCATION_ID if choose else 0
            if choose:
                self.session.allocation = name
            reply = wire.CONTEXT.pack(number) + wire.BASE_ALLOCATION.encode()
            await self._reply(option, wire.REP_META_CONTEXT, reply)
        await self._reply(option, wire.REP_ACK)

    async def _claim(self, claims: Claims, payload: bytes) -> None:
        name = wire.unpack_claim(payload)
        if name not in await self._exports():
            await self._refuse(wire.OPT_CLAIM, wire.REP_ERR_UNKNOWN, "there is no such export")
            return
        try:
            claims.take(self._holder, name)
        except PermissionError as exc:
            await self._refuse(wire.OPT_CLAIM, wire.REP_ERR_POLICY, exc.strerror or str(exc))
            return
        self.session.claimed.add(name)
        await self._reply(wire.OPT_CLAIM, wire.REP_ACK)
