"""Which devices a USB driver is for: the entries of a manifest's key `match`, read and checked.

Owns: one entry's keys and their limits; what an entry is worth is udf.usb.matching's. Must never: see a device.
Called by: check.py; udf.usb.rules, whose patterns have the same keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from udf.manifest.text import shown

MAX_ENTRIES = 200
MAX_PATTERN = 126  # a USB string has no more characters
_NUMBERS = {"vendor": 0xFFFF, "product": 0xFFFF, "class": 0xFF, "subclass": 0xFF, "protocol": 0xFF, "interface": 0xFF}
_TEXTS = ("manufacturer", "product_name", "serial")
_FLAGS = ("device", "any")
_ABOVE = {"product": "vendor", "subclass": "class", "protocol": "subclass"}
KEYS = (*_NUMBERS, *_TEXTS, *_FLAGS)

Refuse = Callable[[str, str], Exception]  # a key and what is wrong with it


@dataclass(frozen=True)
class Match:
    """One entry: all that it says must be so. Texts may have `*` and `?` in them.

    `device`: the class words mean the device's own class, not an interface's, and the driver gets the whole device.
    """

    vendor: int | None = None
    product: int | None = None
    class_code: int | None = None
    subclass: int | None = None
    protocol: int | None = None
    interface: int | None = None
    manufacturer: str | None = None
    product_name: str | None = None
    serial: str | None = None
    device: bool = False
    any: bool = False

    @property
    def whole_device(self) -> bool:
        """Whether it is about the device as a whole, so that its driver gets all the interfaces."""
        return self.device or (self.class_code is None and self.interface is None)

    def __str__(self) -> str:
        """In the words of a person: `vendor 1209, product 7e57`."""
        words = []
        for name, value, digits in (("vendor", self.vendor, 4), ("product", self.product, 4)):
            if value is not None:
                words.append(f"{name} {value:0{digits}x}")
        if self.class_code is not None:
            triple = [self.class_code, self.subclass, self.protocol]
            shown = "/".join("*" if value is None else f"{value:02x}" for value in triple)
            words.append(f"{'device' if self.device else 'interface'} class {shown}")
        if self.interface is not None:
            words.append(f"interface {self.interface}")
        for name in _TEXTS:
            if getattr(self, name) is not None:
                words.append(f"{name.replace('_', ' ')} {getattr(self, name)!r}")
        return ", ".join(words) or "any device"


def check_entry(table: Any, key: str, refuse: Refuse) -> Match:
    """Check one entry that a driver declares."""
    match = check_pattern(table, key, refuse)
    if match.any and (match.vendor, match.class_code) != (None, None):
        raise refuse(f"{key}.any", "makes no sense beside a vendor or a class")
    if not match.any and match.vendor is None and match.class_code is None:
        raise refuse(key, "names neither a vendor nor a class: say any = true if the driver is for all devices")
    return match


def check_pattern(table: Any, key: str, refuse: Refuse) -> Match:
    """Check the keys of one entry, or of a rule's pattern, which may be empty."""
    if not isinstance(table, Mapping):
        raise refuse(key, f"must be a table such as {{ vendor = 0x1209, product = 0x7e57 }}, not {shown(table)}")
    values: dict[str, Any] = {}
    for name, value in table.items():
        where = f"{key}.{name}"
        if name in _NUMBERS:
            if type(value) is not int or not 0 <= value <= _NUMBERS[name]:
                raise refuse(where, f"must be a number from 0 to {_NUMBERS[name]:#x}, not {shown(value)}")
        elif name in _TEXTS:
            if not isinstance(value, str) or not 1 <= len(value) <= MAX_PATTERN or not value.isprintable():
                raise refuse(where, f"must be a printable text of 1 to {MAX_PATTERN} characters, not {shown(value)}")
        elif name in _FLAGS:
            if not isinstance(value, bool):
                raise refuse(where, f"must be true or false, not {shown(value)}")
        else:
            raise refuse(where, f"is not known there: what matches a device is {', '.join(KEYS)}")
        values["class_code" if name == "class" else name] = value
    for name, above in _ABOVE.items():
        if name in table and above not in table:
            raise refuse(f"{key}.{name}", f"means nothing without {above}")
    if values.get("device") and "interface" in values:
        raise refuse(f"{key}.interface", "contradicts device = true, which is about the whole device")
    return Match(**values)
