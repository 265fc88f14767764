"""A model of a USB device: descriptors as data, behaviour as methods.

    class Lamp(Device):
        vendor, product = 0x1209, 0x0001
        configurations = [Configuration([Interface(0xFF, endpoints=[InterruptIn(1)])])]
        lit = False

        def on_control(self, setup, data):
            if setup.request != 1:
                raise Stall
            self.lit = bool(setup.value)
            self.push(1, b"on" if self.lit else b"off")

Owns: what an author of a model sees, and what every model does by itself (standard.py). Must never: know sockets.
Called by: the engine, in the emulator's one thread; so no handler runs beside another one, and none may block.
`push`, `ready` and `halt` may be called from any thread.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from udf.testing.devices import standard
from udf.testing.devices.layout import DEVICE, Configuration, Strings, pack_configuration
from udf.testing.devices.loop import READ, WRITE
from udf.testing.devices.transfers import Setup, Stall
from udf.usb.usbip import Speed

if TYPE_CHECKING:
    from udf.testing.devices.engine import Engine

T = TypeVar("T")
_DEVICE = struct.Struct("<BBHBBBBHHHBBBB")


class Option(NamedTuple):
    """A keyword of a model's constructor, as text gives it."""

    parse: Callable[[str], Any]
    help: str


def number(text: str) -> int:
    """A number, decimal or 0x…, with K, M, G or T behind it if it is a size."""
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}.get(text[-1:].upper(), 1)
    return int(text[:-1] if factor > 1 else text, 0) * factor


def yes_no(text: str) -> bool:
    """Yes or no."""
    if text.lower() in ("1", "yes", "true", "on"):
        return True
    if text.lower() in ("0", "no", "false", "off"):
        return False
    raise ValueError(f"{text!r} is neither yes nor no")


def speed(text: str) -> Speed:
    """A speed by its name."""
    try:
        return Speed[text.upper()]
    except KeyError:
        raise ValueError(f"{text!r} is none of low, full, high, super") from None


class Device:
    """Subclass it, say what it looks like, and override the handlers that it needs."""

    vendor: int = 0x1209
    product: int = 0x0001
    release: int = 0x0100
    device_class: tuple[int, int, int] = (0, 0, 0)
    speed: Speed = Speed.HIGH
    max_packet0: int = 64
    manufacturer: str | None = "UDF"
    product_name: str | None = None  # None: the class's name
    serial: str | None = None
    configurations: Sequence[Configuration] = ()
    configured: int = 0  # the configuration that it has when it is plugged in: 0 none, as hardware does

    options: ClassVar[Mapping[str, Option]] = {}  # of this model, beside those of every model

    _engine: Engine | None = None

    def __init__(self, **identity: Any) -> None:
        """Any attribute above by keyword: Thermometer(serial="A1")."""
        for name, value in identity.items():
            if name not in IDENTITY:
                raise TypeError(f"{type(self).__name__} has no option {name!r}")
            setattr(self, name, value)
        for name in ("vendor", "product", "release"):
            if not 0 <= getattr(self, name) <= 0xFFFF:
                raise ValueError(f"{name} is a number of 16 bits, not {getattr(self, name):#x}")
        if self.product_name is None:
            self.product_name = type(self).__name__
        self._watched: set[int] = set()
        self.strings = Strings()
        for text in (self.manufacturer, self.product_name, self.serial):
            self.strings.index(text)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.vendor:04x}:{self.product:04x} {self.serial or ''}>"

    # --- handlers: override what the device has ---

    def on_control(self, setup: Setup, data: bytes) -> bytes | None:
        """A control request that is not standard: the answer of an IN request, or raise Stall (or Nak)."""
        raise Stall

    def on_out(self, endpoint: int, data: bytes) -> None:
        """Data from the host; raise Stall to refuse, Nak to be asked again after `ready`."""

    def on_in(self, endpoint: int, length: int) -> bytes | memoryview | None:
        """Data for the host, `length` at most; None: nothing yet. By itself, what was pushed.

        Data that end on a full packet do not end the host's transfer: it asks for more, until a packet is short.
        """
        assert self._engine is not None
        pipe = self._engine.pipes.get(endpoint)
        return pipe.take(length) if pipe is not None else None

    def on_configured(self, value: int) -> None:
        """The host has chosen a configuration; 0: none."""

    def on_alternate(self, interface: int, alternate: int) -> None:
        """The host has chosen an alternate setting."""

    def on_clear_halt(self, endpoint: int) -> None:
        """The host has cleared a halted endpoint (and the endpoint works again)."""

    def on_reset(self) -> None:
        """The host has reset the port; the configuration is restored afterwards."""

    def on_plugged(self) -> None:
        """It has power. Also again after it was unplugged."""

    def on_unplugged(self) -> None:
        """It has lost its power; nothing can be sent any more."""

    def close(self) -> None:
        """It will not be plugged in again: release files and the like."""

    # --- what handlers and tests may call ---

    def push(self, endpoint: int, data: bytes, *, zlp: bool = False) -> None:
        """Queue data to the host. With *zlp*, a packet of length zero follows if the last packet is a full one."""
        self._do(lambda engine: engine.push(endpoint | 0x80, bytes(data), zlp))

    def ready(self, endpoint: int) -> None:
        """What on_in, on_out or (0) on_control refused may work now."""
        self._do(
            lambda engine: engine.pump(
                engine.control if not endpoint & 0x7F else engine.pipes.get(endpoint, engine.control)
            )
        )

    def halt(self, endpoint: int, *, wedge: bool = False) -> None:
        """Stall an endpoint from now on; if wedged, until `unhalt`, whatever the host clears."""
        self._do(lambda engine: engine.halt(endpoint, wedge))

    def unhalt(self, endpoint: int) -> None:
        """End a wedge: CLEAR_FEATURE works again."""

        def unwedge(engine: Engine) -> None:
            if (pipe := engine.pipes.get(endpoint)) is not None:
                pipe.wedged = False

        self._do(unwedge)

    def clear(self, endpoint: int) -> None:
        """Forget what is pushed and not yet taken."""

        def clear(engine: Engine) -> None:
            if (pipe := engine.pipes.get(endpoint)) is not None:
                pipe.queue.clear()

        self._do(clear)

    def queued(self, endpoint: int) -> int:
        """Bytes that are pushed and not yet taken."""
        pipe = self._engine.pipes.get(endpoint) if self._engine is not None else None
        return sum(map(len, list(pipe.queue))) if pipe is not None else 0

    def toggle(self, endpoint: int) -> int:
        """What its next packet carries, 0 for DATA0 or 1 for DATA1: it begins anew when a halt is cleared."""
        pipe = self._engine.pipes.get(endpoint) if self._engine is not None else None
        return pipe.toggle if pipe is not None else 0

    def later(self, seconds: float, call: Callable[[], object]) -> None:
        """Call in the emulator's thread after a time, if it is plugged in."""

        def plan(engine: Engine) -> None:
            engine.loop.later(seconds, lambda: call() if self._engine is engine else None)

        self._do(plan)

    def inside(self, call: Callable[[], T]) -> T:
        """Call where the handlers run, so that none of them runs meanwhile, and wait for it."""
        engine = self._engine
        return engine.loop.call(call) if engine is not None else call()

    def unplug(self, back: float = 0.0) -> None:
        """Vanish from the bus, and come back after so many seconds if that is not 0."""
        self._do(lambda engine: engine.loop.soon(lambda: engine.unplug(back)))

    def watch(self, fd: int, handler: Callable[[int], object], *, read: bool = True, write: bool = False) -> None:
        """Call *handler* with epoll's events while it is plugged in; again to wait for other ones. Handlers only."""
        if (engine := self._engine) is None:
            return
        events = (READ if read else 0) | (WRITE if write else 0)
        if fd in self._watched:
            engine.loop.change(fd, events)
        else:
            self._watched.add(fd)
            engine.loop.add(fd, events, handler)

    def unwatch(self, fd: int) -> None:
        """End that. It ends by itself with the power."""
        if fd in self._watched and self._engine is not None:
            self._watched.discard(fd)
            self._engine.loop.remove(fd)

    @property
    def configuration(self) -> int:
        """The value of the active configuration; 0: none."""
        engine = self._engine
        return engine.configuration.value if engine is not None and engine.configuration is not None else 0

    def _do(self, call: Callable[[Engine], None]) -> None:
        engine = self._engine
        if engine is None:
            return  # no power
        if engine.loop.inside:
            call(engine)
        else:
            engine.loop.soon(lambda: call(engine) if self._engine is engine else None)

    # --- descriptors: override to lie ---

    def device_descriptor(self) -> bytes:
        """18 bytes."""
        return _DEVICE.pack(
            18, DEVICE, 0x0300 if self.speed >= Speed.SUPER else 0x0200, *self.device_class,
            9 if self.speed >= Speed.SUPER else self.max_packet0, self.vendor, self.product, self.release,
            self.strings.index(self.manufacturer), self.strings.index(self.product_name),
            self.strings.index(self.serial), len(self.configurations),
        )  # fmt: skip

    def configuration_descriptor(self, index: int) -> bytes | None:
        """The configuration with this index, with all that follows it."""
        if index >= len(self.configurations):
            return None
        return pack_configuration(self.configurations[index], self.strings, self.speed)

    def string_descriptor(self, index: int, language: int) -> bytes | None:
        """A string; 0: the languages."""
        return self.strings.pack(index, language)

    # --- the engine's way in ---

    def power_off(self) -> None:
        """The engine is gone."""
        for fd in list(self._watched):
            self.unwatch(fd)
        self._engine = None

    def control(self, setup: Setup, data: bytes) -> bytes | None:
        """Any control request: standard ones are answered as USB 2.0 chapter 9 says, if the model does not."""
        assert self._engine is not None
        if standard.is_reset(setup):
            standard.reset(self, self._engine)
            return None
        if setup.is_standard:
            return standard.answer(self, self._engine, setup, data)
        return self.on_control(setup, data)


IDENTITY: dict[str, Option] = {
    "vendor": Option(number, "vendor id"),
    "product": Option(number, "product id"),
    "release": Option(number, "device release, BCD"),
    "manufacturer": Option(str, "manufacturer's name"),
    "product_name": Option(str, "product's name"),
    "serial": Option(str, "serial number"),
    "speed": Option(speed, "low, full, high or super"),
    "configured": Option(number, "configuration that is active from the plug on; 0 none"),
}
