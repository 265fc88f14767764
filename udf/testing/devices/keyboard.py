"""A keyboard: HID 1.11, boot protocol, with its report descriptor and its lights.

Called by: models.py, tests; `press`, `let_go` and `type` from any thread.
"""

from __future__ import annotations

import struct
from typing import Any

from udf.testing.devices.device import Device, Option
from udf.testing.devices.layout import Configuration, Interface, InterruptIn
from udf.testing.devices.transfers import Setup, Stall

_HID, _REPORT = 0x21, 0x22
GET_REPORT, GET_IDLE, GET_PROTOCOL, SET_REPORT, SET_IDLE, SET_PROTOCOL = 1, 2, 3, 9, 10, 11
LEFT_CONTROL, LEFT_SHIFT, LEFT_ALT = 1, 2, 4

# HID 1.11 appendix B.1 and E.6: eight modifier bits, a reserved byte, five lights, six keys.
REPORT_DESCRIPTOR = bytes.fromhex(
    "05010906a101 050719e029e71500250175019508 8102 95017508 8103 95057501 05081901 2905 9102 95017503 9103"
    "95067508 15002565 0507 19002965 8100 c0"
)
_HID_DESCRIPTOR = struct.pack("<BBHBBBH", 9, _HID, 0x0111, 0, 1, _REPORT, len(REPORT_DESCRIPTOR))


def _row(usage: int, plain: str, shifted: str) -> dict[str, tuple[int, int]]:
    """Keys side by side, without and with shift; a blank in `shifted` is a key that shift does not change."""
    keys = {each: (usage + i, 0) for i, each in enumerate(plain)}
    return keys | {each: (usage + i, LEFT_SHIFT) for i, each in enumerate(shifted) if each != " "}


_KEYS = (
    _row(0x04, "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    | _row(0x1E, "1234567890", "!@#$%^&*()")
    | _row(0x28, "\n\x1b\b\t -=[]\\", "     _+{}|")
    | _row(0x33, ";'`,./", ':"~<>?')
)


class Keyboard(Device):
    """A US keyboard with six keys at once."""

    vendor, product = 0x1209, 0x7E4B
    product_name = "Keyboard"
    speed = Device.speed.FULL
    configurations = [
        Configuration([Interface(3, 1, 1, [InterruptIn(1, 8, interval=10)], extra=_HID_DESCRIPTOR)], remote_wakeup=True)
    ]
    options = {"text": Option(str, "what is typed as soon as it is configured")}

    def __init__(self, text: str = "", **identity: Any) -> None:
        super().__init__(**identity)
        self._check(text)
        self.lights = 0  # bit 0 num lock, 1 caps lock, 2 scroll lock
        self.boot = False  # which protocol is chosen; both have the same reports here
        self._text = text
        self._idle = 0
        self._modifiers = 0
        self._down: list[int] = []

    def on_plugged(self) -> None:
        """No key is down, no light is on."""
        self.lights = self._idle = self._modifiers = 0
        self._down = []
        self.boot = False

    def on_configured(self, value: int) -> None:
        """Somebody types."""
        if value and self._text:
            self.type(self._text)

    def on_control(self, setup: Setup, data: bytes) -> bytes | None:
        """Descriptors of the interface, and the requests of the class."""
        if setup.recipient != 1 or setup.index != 0:
            raise Stall
        if setup.is_standard:
            if not setup.is_in or setup.request != 6:
                raise Stall
            found = {_HID: _HID_DESCRIPTOR, _REPORT: REPORT_DESCRIPTOR}.get(setup.value >> 8)
            if found is None:
                raise Stall
            return found
        match setup.request, setup.is_in:
            case 1, True:
                return self.report() if setup.value >> 8 == 1 else bytes((self.lights,))
            case 2, True:
                return bytes((self._idle,))
            case 3, True:
                return bytes((not self.boot,))
            case 9, False:
                if setup.value >> 8 != 2 or len(data) != 1:
                    raise Stall
                self.lights = data[0] & 0x1F
            case 10, False:
                self._idle = setup.value >> 8
            case 11, False:
                self.boot = setup.value == 0
            case _:
                raise Stall
        return None

    def report(self) -> bytes:
        """What is down now; more keys than six are a roll-over error."""
        keys = bytes(self._down) if len(self._down) <= 6 else b"\x01" * 6
        return bytes((self._modifiers, 0)) + keys.ljust(6, b"\0")

    @staticmethod
    def _check(text: str) -> None:
        for each in text:
            if each not in _KEYS:
                raise ValueError(f"no key writes {each!r}")

    def press(self, usage: int, modifiers: int = 0) -> None:
        """A key goes down."""
        self._modifiers |= modifiers
        if usage and usage not in self._down:
            self._down.append(usage)
        self.push(1, self.report())

    def let_go(self) -> None:
        """All keys go up."""
        self._modifiers = 0
        self._down = []
        self.push(1, self.report())

    def type(self, text: str) -> None:
        """Key by key. ValueError for what no key of this keyboard writes."""
        self._check(text)
        for each in text:
            usage, modifiers = _KEYS[each]
            self.press(usage, modifiers)
            self.let_go()
