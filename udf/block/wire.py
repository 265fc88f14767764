"""The NBD wire, both sides: pure packing and unpacking, no sockets.

Owns: the layout of every message of the fixed newstyle protocol. Source: NetworkBlockDevice/nbd, doc/proto.md.
Must never: do I/O, or believe a length: who reads a message checks it against the bounds here first.
Called by: handshake.py and server.py toward a client, client.py toward a server.

A connection has two phases. First the options: the server greets, the client asks and the server replies, one option
at a time, until EXPORT_NAME or GO. Then requests of 28 bytes, each answered by a simple reply or by chunks.
All numbers are big-endian. TLS is not spoken: the sockets are local ones.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from udf.errors import UdfError

PORT = 10809

# ---- bounds: what is longer is a broken peer

MAX_NAME = 4096  # bytes of an export's name, as the protocol says for every string
MAX_OPTION = 64 * 1024  # bytes of an option or its reply: the longest ones carry names and queries
MAX_OPTIONS = 1024  # options in one handshake, and replies to one of them
MAX_QUERIES = 64  # metadata contexts asked for at once
MAX_PAYLOAD = 32 * 1024 * 1024  # what a client may ask for without having been told a maximum
MAX_EXTENTS = 4096  # descriptors in one BLOCK_STATUS chunk of ours
MAX_SIZE = (1 << 63) - 1  # of an export: offsets are signed in too many places to go further
MAX_ERROR_TEXT = 4096

# ---- handshake

GREETING = struct.Struct(">QQH")  # NBDMAGIC, IHAVEOPT, handshake flags
NBD_MAGIC = 0x4E42444D41474943
OPTION_MAGIC = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x0003E889045565A9

FLAG_FIXED_NEWSTYLE = 1 << 0
FLAG_NO_ZEROES = 1 << 1
CLIENT_FLAGS = struct.Struct(">I")

OPTION = struct.Struct(">QII")  # IHAVEOPT, option, length
OPTION_REPLY = struct.Struct(">QIII")  # magic, option, type, length
EXPORT_REPLY = struct.Struct(">QH")  # of EXPORT_NAME: size, transmission flags (then 124 zeros unless NO_ZEROES)
ZEROES = 124

OPT_EXPORT_NAME = 1
OPT_ABORT = 2
OPT_LIST = 3
OPT_STARTTLS = 5
OPT_INFO = 6
OPT_GO = 7
OPT_STRUCTURED_REPLY = 8
OPT_LIST_META_CONTEXT = 9
OPT_SET_META_CONTEXT = 10
OPT_CLAIM = 0x55444601  # ours: be the one writer of an export; u32 length and its name. Others answer ERR_UNSUP.
OPT_WATCH = 0x55444602  # ours, without a payload: FLAG_WATCH is understood from here on. Others answer ERR_UNSUP.
# Ours, without a payload, but with the descriptor of a window (udf/window.py), and after STRUCTURED_REPLY: FLAG_WINDOW
# is understood from here on. Others answer ERR_UNSUP.
OPT_WINDOW = 0x55444603

REP_ACK = 1
REP_SERVER = 2
REP_INFO = 3
REP_META_CONTEXT = 4
REP_ERROR = 1 << 31  # every type with this bit is an error; a sentence may follow
REP_ERR_UNSUP = REP_ERROR | 1
REP_ERR_POLICY = REP_ERROR | 2
REP_ERR_INVALID = REP_ERROR | 3
REP_ERR_UNKNOWN = REP_ERROR | 6
REP_ERR_SHUTDOWN = REP_ERROR | 7
REP_ERR_TOO_BIG = REP_ERROR | 9

INFO_EXPORT = 0
INFO_NAME = 1
INFO_DESCRIPTION = 2
INFO_BLOCK_SIZE = 3
EXPORT_INFO = struct.Struct(">HQH")  # INFO_EXPORT, size, transmission flags
BLOCK_SIZE_INFO = struct.Struct(">HIII")  # INFO_BLOCK_SIZE, minimum, preferred, maximum

BASE_ALLOCATION = "base:allocation"

# ---- transmission flags: what an export can do

HAS_FLAGS = 1 << 0
READ_ONLY = 1 << 1
SEND_FLUSH = 1 << 2
SEND_FUA = 1 << 3
ROTATIONAL = 1 << 4
SEND_TRIM = 1 << 5
SEND_WRITE_ZEROES = 1 << 6
SEND_DF = 1 << 7
CAN_MULTI_CONN = 1 << 8
SEND_CACHE = 1 << 10
SEND_FAST_ZERO = 1 << 11

# ---- transmission

REQUEST = struct.Struct(">IHHQQI")  # magic, command flags, command, cookie, offset, length
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY = struct.Struct(">IIQ")  # magic, error, cookie
SIMPLE_REPLY_MAGIC = 0x67446698
CHUNK = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length
CHUNK_MAGIC = 0x668E33EF
OFFSET_DATA = struct.Struct(">IHHQIQ")  # a chunk of that type up to its data
OFFSET = struct.Struct(">Q")
OFFSET_HOLE = struct.Struct(">QI")  # its payload: offset, length
ERROR_CHUNK = struct.Struct(">IH")  # its payload's beginning: error, length of the text
CONTEXT = struct.Struct(">I")
EXTENT = struct.Struct(">II")  # length, status

CMD_READ = 0
CMD_WRITE = 1
CMD_DISC = 2
CMD_FLUSH = 3
CMD_TRIM = 4
CMD_CACHE = 5
CMD_WRITE_ZEROES = 6
CMD_BLOCK_STATUS = 7

CMD_FLAG_FUA = 1 << 0
CMD_FLAG_NO_HOLE = 1 << 1
CMD_FLAG_DF = 1 << 2
CMD_FLAG_REQ_ONE = 1 << 3
CMD_FLAG_FAST_ZERO = 1 << 4
# Ours, of READ after OPT_WINDOW: eight bytes follow the request, an offset in the window where its data belongs; the
# reply is an empty chunk.
FLAG_WINDOW = 1 << 14
FLAG_WATCH = 1 << 15  # ours, of READ and WRITE after OPT_WATCH: this has to be the same when the device comes back

CHUNK_DONE = 1 << 0
CHUNK_NONE = 0
CHUNK_OFFSET_DATA = 1
CHUNK_OFFSET_HOLE = 2
CHUNK_BLOCK_STATUS = 5
CHUNK_ERROR_BIT = 1 << 15
CHUNK_ERROR = CHUNK_ERROR_BIT | 1
CHUNK_ERROR_OFFSET = CHUNK_ERROR_BIT | 2

STATE_HOLE = 1 << 0
STATE_ZERO = 1 << 1

# ---- error numbers: the only ones there are; they are Linux's by luck and by history

EPERM = 1
EIO = 5
ENOMEM = 12
EINVAL = 22
ENOSPC = 28
EOVERFLOW = 75
ENOTSUP = 95
ESHUTDOWN = 108
ERRORS = frozenset((EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN))


class WireError(UdfError):
    """The peer said something that the protocol does not allow; the connection is of no use any more."""


class MalformedError(WireError):
    """An option's payload does not hold together; the option is refused and the connection goes on."""


class OptionReply(NamedTuple):
    """One reply of a server to an option."""

    option: int
    type: int
    payload: bytes


class BlockSizes(NamedTuple):
    """INFO_BLOCK_SIZE, in bytes."""

    minimum: int = 1
    preferred: int = 4096
    maximum: int = MAX_PAYLOAD


class Reader:
    """Takes an option's payload apart, never reading behind its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, size: int) -> int:
        """The next unsigned number of `size` bytes."""
        return int.from_bytes(self.take(size), "big")

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        end = self._at + size
        if end > len(self._data):
            raise MalformedError(f"it ends {end - len(self._data)} bytes early")
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def text(self) -> str:
        """The next string: its length in 32 bits, then UTF-8."""
        size = self.number(4)
        if size > MAX_NAME:
            raise MalformedError(f"a string of {size} bytes is longer than {MAX_NAME}")
        return decode_text(self.take(size))

    def rest(self) -> bytes:
        """What is left."""
        return self.take(len(self._data) - self._at)

    def end(self) -> None:
        """Nothing may be left."""
        if self._at != len(self._data):
            raise MalformedError(f"{len(self._data) - self._at} bytes are left over")


def decode_text(raw: bytes) -> str:
    """A string of the protocol: UTF-8 without NUL."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise MalformedError("a string is not UTF-8") from None
    if "\0" in text:
        raise MalformedError("a string has a NUL in it")
    return text


# ---- what a client sends


def pack_option(option: int, payload: bytes = b"") -> bytes:
    """One option."""
    return OPTION.pack(OPTION_MAGIC, option, len(payload)) + payload


def pack_text(text: str) -> bytes:
    """A string with its length in front. This is also all of OPT_CLAIM's payload."""
    raw = text.encode()
    return struct.pack(">I", len(raw)) + raw


def pack_go(name: str, infos: Sequence[int] = (INFO_BLOCK_SIZE,)) -> bytes:
    """The payload of GO and INFO."""
    return pack_text(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def pack_contexts(name: str, queries: Sequence[str] = (BASE_ALLOCATION,)) -> bytes:
    """The payload of SET_META_CONTEXT and LIST_META_CONTEXT."""
    return pack_text(name) + struct.pack(">I", len(queries)) + b"".join(map(pack_text, queries))


def unpack_go(payload: bytes) -> tuple[str, list[int]]:
    """The export's name and the kinds of information that are asked for."""
    reader = Reader(payload)
    name = reader.text()
    infos = [reader.number(2) for _ in range(reader.number(2))]
    reader.end()
    return name, infos


def unpack_contexts(payload: bytes) -> tuple[str, list[str]]:
    """The export's name and the queries."""
    reader = Reader(payload)
    name, count = reader.text(), reader.number(4)
    if count > MAX_QUERIES:
        raise MalformedError(f"{count} queries are more than {MAX_QUERIES}")
    queries = [reader.text() for _ in range(count)]
    reader.end()
    return name, queries


def unpack_claim(payload: bytes) -> str:
    """The name of the export that is claimed."""
    reader = Reader(payload)
    name = reader.text()
    reader.end()
    return name


# ---- what a server sends


def pack_option_reply(option: int, kind: int, payload: bytes = b"") -> bytes:
    """One reply to an option."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(payload)) + payload


def unpack_server(payload: bytes) -> str:
    """The export's name in a reply to LIST; what follows it is text for people."""
    reader = Reader(payload)
    name = reader.text()
    reader.rest()
    return name


def unpack_context(payload: bytes) -> tuple[int, str]:
    """Id and name in a reply to SET_META_CONTEXT."""
    reader = Reader(payload)
    return reader.number(4), decode_text(reader.rest())


def pack_chunk(kind: int, cookie: int, payload: bytes = b"", *, done: bool = True) -> bytes:
    """One chunk of a structured reply."""
    return CHUNK.pack(CHUNK_MAGIC, CHUNK_DONE if done else 0, kind, cookie, len(payload)) + payload


def pack_error(cookie: int, error: int, text: str = "") -> bytes:
    """A structured reply that is an error, with a sentence for people."""
    raw = text.encode(errors="replace")[:MAX_ERROR_TEXT]
    return pack_chunk(CHUNK_ERROR, cookie, ERROR_CHUNK.pack(error, len(raw)) + raw)


def pack_extents(cookie: int, context: int, extents: Iterable[tuple[int, int]]) -> bytes:
    """A BLOCK_STATUS reply for one context; an extent is its length and its status."""
    payload = CONTEXT.pack(context) + b"".join(EXTENT.pack(*extent) for extent in extents)
    return pack_chunk(CHUNK_BLOCK_STATUS, cookie, payload)


def unpack_error(payload: bytes) -> tuple[int, str]:
    """The error number and its text of an error chunk of any kind; what is no number of the protocol is EINVAL."""
    if len(payload) < ERROR_CHUNK.size:
        raise WireError("an error chunk is too short")
    error, size = ERROR_CHUNK.unpack_from(payload)
    if ERROR_CHUNK.size + size > len(payload):
        raise WireError("the text of an error chunk is longer than the chunk")
    text = payload[ERROR_CHUNK.size : ERROR_CHUNK.size + size].decode(errors="replace")
    return error if error in ERRORS else EINVAL, text


def unpack_extents(payload: bytes) -> tuple[int, list[tuple[int, int]]]:
    """The context and its extents (length, status) of a BLOCK_STATUS chunk."""
    body = len(payload) - CONTEXT.size
    if body < EXTENT.size or body % EXTENT.size:
        raise WireError(f"a block status of {len(payload)} bytes is none")
    extents = list(EXTENT.iter_unpack(payload[CONTEXT.size :]))
    if not all(length for length, _ in extents):
        raise WireError("a block status has an empty extent")
    return CONTEXT.unpack_from(payload)[0], extents
