"""What the instances of device drivers are called: numbers that come back, and names that follow the device.

Owns: disk0, disk1 …, the names below by-id, and what is left of a text that a device gave.
Must never: do I/O, or let two present devices have one name. Called by: binder.py, devices.py.
"""

from __future__ import annotations

import re
import unicodedata
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

MAX_REMEMBERED = 512  # devices that have been here; of more the oldest are forgotten
MAX_PART = 40
_UNSAFE = re.compile(r"[^A-Za-z0-9.+]+")


@dataclass(frozen=True)
class Identity:
    """By what a device is known again."""

    bus: str
    vendor: int
    product: int
    serial: str
    port: str
    interface: int | None

    def without_port(self) -> Identity | None:
        """The same wherever it is plugged in; only a serial number makes that out."""
        return Identity(self.bus, self.vendor, self.product, self.serial, "", self.interface) if self.serial else None


class Numbers:
    """Which device had which number, for each base name. In one daemon's life a device gets its number back."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, Identity], int] = OrderedDict()

    def name(self, base: str, identity: Identity, taken: Collection[str]) -> str:
        """The name to use for this device. `taken` are those of other devices that are present."""
        number = self._known.get((base, identity))
        if number is None or f"{base}{number}" in taken:
            number = self._moved(base, identity, taken)
        if number is None:
            number = self._new(base, taken)
        key = (base, identity)
        self._known[key] = number
        self._known.move_to_end(key)
        while len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)
        return f"{base}{number}"

    def _moved(self, base: str, identity: Identity, taken: Collection[str]) -> int | None:
        """The number of the same device in another port, unless that is here too (a copied serial number)."""
        wanted = identity.without_port()
        if wanted is None:
            return None
        for (other_base, other), number in reversed(self._known.items()):
            if other_base == base and other.without_port() == wanted and f"{base}{number}" not in taken:
                return number
        return None

    def _new(self, base: str, taken: Collection[str]) -> int:
        reserved = {number for (other, _), number in self._known.items() if other == base}
        number = 0
        while number in reserved or f"{base}{number}" in taken:
            number += 1
        return number


def safe(text: str, instead: str = "") -> str:
    """A text that a device gave as a part of a file name: letters, digits, . + and _, at most 40 characters."""
    return _UNSAFE.sub("_", text).strip("._+")[:MAX_PART] or instead


def volume(filesystem: str, label: str, uuid: str) -> str:
    """What the directory of a volume is called: its label, or what it is and its id. Letters of all languages stay.

    Never empty, never hidden, never with anything in it that a path or a terminal would act on.
    """
    named = _part(unicodedata.normalize("NFC", label))
    return named or "-".join(filter(None, (_part(filesystem) or "volume", _part(uuid))))


def _part(text: str) -> str:
    kept = "".join(each if each.isalnum() or each in ".+-_" else "_" for each in text[:MAX_PART])
    return re.sub("_+", "_", kept).strip("._+-")


def by_id(identity: Identity, manufacturer: str, product: str, taken: Collection[str]) -> str:
    """VENDOR-PRODUCT-SERIAL[-ifN], by the device's texts where it has them; with its port if that name is taken."""
    parts = [
        safe(manufacturer, f"{identity.vendor:04x}"),
        safe(product, f"{identity.product:04x}"),
        safe(identity.serial, "0"),
    ]
    name = "-".join(parts) + ("" if identity.interface is None else f"-if{identity.interface:02d}")
    if name in taken:
        name = f"{name}-port_{safe(identity.port, '0')}"
    number, base = 2, name
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    return name
