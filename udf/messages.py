"""The messages between the supervisor and its shims (S, M) and its driver hosts (S, H), one type each.

Owns: the private wire of the supervisor: one JSON object per SOCK_SEQPACKET packet, at most 64 KiB, the key "t" is
the tag; descriptors travel beside it by SCM_RIGHTS.
Must never: be imported by the shim or by the host's launcher stage (they use `json` with the same keys and stay small).
Called by: udf/supervisor for everything it sends and receives, udf/host once its launcher stage is over.

A little over 400 lines: it is one wire, and its types are read beside each other.
A packet from a host or a shim is as untrusted as one from a network: `decode_*` raise ContractError and nothing else.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from udf.errors import ContractError, InternalError

MAX_MESSAGE = 64 * 1024
MAX_DESCRIPTORS = 4  # no message carries more; a receiver asks for this many so that none leaks unseen


class Message(msgspec.Struct, tag_field="t", kw_only=True):
    """What all messages have in common: the tag "t"."""


# ---- supervisor -> shim


class Mount(Message, tag="mount"):
    """Serve one mount; comes with the shim's end of the link, and with a window if its driver has one."""

    mountpoint: str
    name: str
    driver: str
    fsname: str
    subtype: str = ""
    read_only: bool = False
    allow_other: bool = False
    nosuid: bool = True
    nodev: bool = True
    noexec: bool = False
    noatime: bool = False
    uid: int = 0
    gid: int = 0
    max_read: int = 0
    exclusive: bool = False
    acl: bool = False
    locks: bool = False
    open: str = "known"
    deadline: float = 30.0
    start_timeout: float = 30.0
    spin: bool | None = None
    recover: bool = False  # the driver's death is not the end: requests are parked until `attach` or `fail`
    hide: bool = True  # a file that is removed while open is kept under a hidden name
    stable_nodes: bool = False  # the driver's node ids mean the same file in each generation
    inodes: str = "stable"  # by what a file is known again: its number, its entry's generation, nothing (volatile)
    patience: float = 60.0  # seconds that a parked request waits for a new generation
    outlive: bool = False  # once unmounted, keep the link until the driver has ended


class Serve(Message, tag="serve"):
    """Serve the block devices of one driver over NBD; the first thing a block shim is told.

    Comes with the listening socket (AF_UNIX, SOCK_STREAM) and the shim's end of the link. On a link of a block driver
    each packet that the shim sends is one byte with one descriptor: a stream socket on which the driver host answers
    as an NBD server whose exports are the driver's units ("" is the first). Each packet of the driver is one JSON
    object; {"t": "changed"} says that a unit came, went or changed its size: look again.
    """

    name: str
    driver: str
    read_only: bool = False
    deadline: float = 30.0
    start_timeout: float = 30.0
    patience: float = 60.0
    idle_flush: float = 0.0  # seconds after the last write after which the device is told to flush; 0: it is not


class Detach(Message, tag="detach"):
    """The device behind the driver is gone: what waits and what comes fails with ENODEV. `attach` may follow.

    To a mount's shim: with `wait` a request is parked instead, and fails with ENODEV when it has waited so many
    seconds. What is cached is answered for `max_stale` seconds since the driver was lost, then nothing is. Another
    `detach` changes both.
    """

    text: str = ""
    wait: float = 0.0
    max_stale: float = 0.0


class Attach(Message, tag="attach"):
    """A new generation of the driver is ready; comes with the shim's end of its link, and its window if it has one.

    `counted`: the death before was the driver's own making, so requests that were under way then are suspects.
    """

    generation: int
    counted: bool = True


class Fail(Message, tag="fail"):
    """There will be no new generation for now: what is parked fails, and so does what comes. `attach` may follow."""

    text: str = ""


class AskRequests(Message, tag="requests"):
    """Ask for the requests that wait; the answer carries the same id."""

    id: int


class Abort(Message, tag="abort"):
    """Answer one request that waits with EIO; the driver may finish it or not."""

    request: int


class Unmount(Message, tag="unmount"):
    """Unmount; `lazy` detaches at once and serves what is still open."""

    lazy: bool = False


class AskCounters(Message, tag="counters"):
    """Ask for the counters; the answer carries the same id."""

    id: int


class Trace(Message, tag="trace"):
    """Switch tracing; comes with the write end for the lines when `on`."""

    on: bool


ToShim = Mount | Serve | Unmount | AskCounters | Trace | Attach | Detach | Fail | AskRequests | Abort


# ---- shim -> supervisor


class Mounted(Message, tag="mounted"):
    """The mount is there; comes with a duplicate of its /dev/fuse descriptor."""


class Export(msgspec.Struct, kw_only=True):
    """One export of a block shim: a whole unit, or a partition of it."""

    name: str  # as NBD clients ask for it, and as its file is called: disk, part1, disk1, disk1-part1
    unit: str  # the driver's name for the unit
    offset: int
    size: int  # bytes; 0: there is no medium
    block_size: int
    read_only: bool = False
    partition: int = 0  # its number; 0: the whole unit
    type: str = ""  # of a partition: 0x0c, or a GUID
    label: str = ""


class Serving(Message, tag="serving"):
    """What a block shim exports now; sent when it begins and whenever that changes."""

    exports: list[Export]


class ShimFailed(Message, tag="failed"):
    """The mount could not be made; one sentence."""

    error: str
    errno: int = 0


class Busy(Message, tag="busy"):
    """The unmount that was asked for found the mount in use; it goes on."""


class Unmounted(Message, tag="unmounted"):
    """The mount is gone; `external` when someone else unmounted it.

    `unsaved`: a sentence, if the driver did not say before that all it had been told is saved.
    """

    external: bool = False
    unsaved: str = ""


class LinkLost(Message, tag="link_lost"):
    """The driver's end of the link is closed and all that it had said is taken; so many requests had no answer.

    `recent`: its last operations, oldest first, one line each, for the crash report.
    """

    pending: int = 0
    recent: list[str] = []


class Attached(Message, tag="attached"):
    """A new generation serves; so many requests of the one before are being asked again, so many were parked."""

    generation: int
    replayed: int = 0
    parked: int = 0


class Refused(Message, tag="refused"):
    """A new generation cannot serve this mount (it lacks what the kernel was promised, or did not answer INIT).

    `changed`: after a Detach, the device that is back is another one, or what is on it has changed: no generation can.
    """

    generation: int
    error: str
    changed: bool = False


class Overdue(Message, tag="overdue"):
    """The driver has not answered a request in its deadline: it counts as hung. Once for each generation."""

    op: str
    age: float


class Poison(Message, tag="poison"):
    """A request at which driver after driver died was answered EIO."""

    op: str
    path: str = ""


class WaitingRequest(msgspec.Struct, kw_only=True):
    """One request that waits: for the driver, or `parked` for a new generation of it."""

    id: int
    op: str
    path: str = ""
    age: float
    pid: int
    parked: bool = False


class Requests(Message, tag="requests"):
    """The answer to AskRequests, oldest first, bounded; `total` counts them all."""

    id: int
    total: int
    requests: list[WaitingRequest]


class StateChange(Message, tag="state"):
    """The mount's state as the shim serves it."""

    state: str
    reason: str
    text: str = ""


class ShimFault(Message, tag="fault"):
    """The driver broke the wire's rules; at most once per operation and kind."""

    op: str
    error: str


class Counters(Message, tag="counters"):
    """The answer to AskCounters."""

    id: int
    counters: dict[str, int | float]


class Detached(Message, tag="detached"):
    """A lazy unmount is done; open files are still served."""


class ShimHeartbeat(Message, tag="heartbeat"):
    """The shim's loop turns."""


FromShim = (
    Mounted
    | Serving
    | ShimFailed
    | Busy
    | Unmounted
    | LinkLost
    | Attached
    | Refused
    | Overdue
    | Poison
    | Requests
    | StateChange
    | ShimFault
    | Counters
    | Detached
    | ShimHeartbeat
)


# ---- supervisor -> host


class DriverSpec(msgspec.Struct, kw_only=True):
    """Which code a host runs: a class in a file, or a command (a foreign FUSE program)."""

    path: str = ""
    class_name: str | None = msgspec.field(default=None, name="class")
    command: str | None = None
    kind: str = "fs"
    provides: str = "files"  # what a driver of a device serves: files, block, terminal
    window: int = 0  # bytes of memory that it shares with its shim, see udf/window.py


class DeviceSpec(msgspec.Struct, kw_only=True):
    """The device that a driver was bound to, as the bus has read it. Its connection comes beside the message."""

    bus: str  # how the connection is spoken: usbip
    key: str  # names this arrival of the device on its bus
    busnum: int
    devnum: int
    port: str = ""  # where it is plugged in: 1-1.4
    speed: int = 0  # usbip.Speed
    device_descriptor: str = ""  # base64, as the device gave them
    configurations: list[str] = []  # base64, one for each
    configuration: int = 0  # the active one; 0: not configured
    manufacturer: str = ""
    product: str = ""
    serial: str = ""
    interface: int | None = None  # bound to this interface only; None: to the whole device


class Sandbox(msgspec.Struct, kw_only=True):
    """What the driver's process may be and have."""

    uid: int
    gid: int
    groups: list[int] = []
    capabilities: list[str] = []
    namespaces: bool = True
    nofile: int = 4096
    keep_paths: list[str] = []


class Start(Message, tag="start"):
    """Load and serve a driver. Comes with the driver's end of the link, its window if it has one, the device's
    connection if there is a `device`, then the memfds of its state store, if any.

    A `spare` gets none of them yet: it is made ready as far as that goes without touching the source; `take_over`
    follows.
    """

    name: str
    driver: DriverSpec
    sandbox: Sandbox
    source: str | None = None
    options: dict[str, bool | int | float | str] = {}
    heartbeat: float = 1.0
    spare: bool = False
    store: bool = False  # the driver has a state store (durability = "store")
    read_only: bool = False  # nothing will be changed through the mount: a driver that wants to know has `read_only`
    device: DeviceSpec | None = None


class TakeOver(Message, tag="take_over"):
    """A spare's turn: comes with what `start` would have come with."""


class Stop(Message, tag="stop"):
    """End in an orderly way; a SIGTERM means the same.

    `linked`: a foreign program still has its link, though nothing will come over it; the end of that would do too.
    `eject`: the device is about to be taken out.
    """

    linked: bool = False
    eject: bool = False


ToHost = Start | TakeOver | Stop


# ---- host -> supervisor


class Started(Message, tag="started"):
    """The process that runs the driver, by the pid that the supervisor sees."""

    pid: int


class Warm(Message, tag="warm"):
    """A spare is as ready as it can be without its link; heartbeats follow until its turn comes."""


class Ready(Message, tag="ready"):
    """The driver serves. `mount_options` are those a foreign program gave to its fusermount."""

    services: list[str] = []
    mount_options: dict[str, str | bool] = {}


class HostFailed(Message, tag="failed"):
    """The driver will not serve; one sentence."""

    error: str


class HostHeartbeat(Message, tag="heartbeat"):
    """The age in seconds of the driver loop's last sign of life, as a thread beside it sees it."""

    loop_age: float


class HostFault(Message, tag="fault"):
    """A handler raised something that is not an errno; once per operation and exception type."""

    op: str
    error: str
    traceback: str = ""


FromHost = Started | Warm | Ready | HostFailed | HostHeartbeat | HostFault


# ---- a host's anchor -> supervisor, on the report socket, which no driver has


class Tree(Message, tag="tree"):
    """The host's processes are about to be started; comes with a pidfd of the first of them.

    `private`: they are a PID namespace, so that with the first all of them have ended. Otherwise the first ends the
    others before it ends itself, unless it is killed.
    """

    private: bool


class Ended(Message, tag="ended"):
    """How the driver ended: its exit status, minus the signal if one ended it; its largest resident set in KiB.

    The rest of its processes end in this moment; when they are gone, the pidfd tells.
    """

    status: int
    max_rss: int = 0


FromAnchor = Tree | Ended


# ---- supervisor -> a process that was forked ahead (its report socket), and its answer


class Become(Message, tag="become"):
    """Be a host now; comes with its control socket and its output."""

    name: str
    environment: dict[str, str]


class Standing(Message, tag="standing"):
    """A process that can become a host; the kernel adds its pid."""


_encoder = msgspec.json.Encoder()
_to_shim: msgspec.json.Decoder[ToShim] = msgspec.json.Decoder(ToShim)
_from_shim: msgspec.json.Decoder[FromShim] = msgspec.json.Decoder(FromShim)
_to_host: msgspec.json.Decoder[ToHost] = msgspec.json.Decoder(ToHost)
_from_host: msgspec.json.Decoder[FromHost] = msgspec.json.Decoder(FromHost)
_from_anchor: msgspec.json.Decoder[FromAnchor] = msgspec.json.Decoder(FromAnchor)


def encode(message: Message) -> bytes:
    """One packet. A message that does not fit is our own mistake: senders cut long texts before."""
    data = _encoder.encode(message)
    if len(data) > MAX_MESSAGE:
        raise InternalError(f"a {type(message).__name__} message of {len(data)} bytes is larger than {MAX_MESSAGE}")
    return data


_T = TypeVar("_T")


def decode_to_shim(data: bytes) -> ToShim:
    """What a shim received."""
    return _decode(_to_shim, data, "supervisor")


def decode_from_shim(data: bytes) -> FromShim:
    """What a shim sent."""
    return _decode(_from_shim, data, "shim")


def decode_to_host(data: bytes) -> ToHost:
    """What a host received."""
    return _decode(_to_host, data, "supervisor")


def decode_from_host(data: bytes) -> FromHost:
    """What a driver host sent."""
    return _decode(_from_host, data, "driver host")


def decode_from_anchor(data: bytes) -> FromAnchor:
    """What a host's anchor sent on its report socket."""
    return _decode(_from_anchor, data, "driver host")


def _decode(decoder: msgspec.json.Decoder[_T], data: bytes, sender: str) -> _T:
    if len(data) > MAX_MESSAGE:
        raise ContractError(f"the {sender} sent a message of {len(data)} bytes, more than {MAX_MESSAGE}")
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ContractError(f"the {sender} sent a message that cannot be read: {exc}") from exc
