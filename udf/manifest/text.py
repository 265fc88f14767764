"""Reading the text that a person wrote for us: a manifest in a .py or a .toml, a rules file.

Owns: bounded reading of regular files only, finding the manifest block, TOML's own mistakes as one sentence.
Must never: run, import or compile what it reads. Called by: check.py, udf.usb.rules.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from typing import Any

from udf.errors import UserError

MAX_MANIFEST = 64 * 1024

_BLOCK = re.compile(r"^# /// udf[ \t]*\r?\n((?:#(?:[ \t][^\n]*)?\r?\n)*?)# ///[ \t]*\r?$", re.MULTILINE)
_BLOCK_START = re.compile(r"^# /// udf[ \t]*\r?$", re.MULTILINE)


def read_text(path: str, what: str) -> tuple[str, bool]:
    """The first 64 KiB of a regular file, and whether that is all of it."""
    # Not blocking: a name on the search path may be a FIFO.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise UserError(f"{path}: {what} cannot be read: {os.strerror(exc.errno or 0)}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: {what} is not a regular file")
    with open(descriptor, "rb") as file:
        data = file.read(MAX_MANIFEST + 1)
    whole = len(data) <= MAX_MANIFEST
    try:
        # A file that is longer may be cut inside a character, or be odd far behind its manifest.
        return data[:MAX_MANIFEST].decode("utf-8", "strict" if whole else "replace"), whole
    except UnicodeDecodeError:
        raise UserError(f"{path}: the file is not UTF-8 text") from None


def manifest_block(text: str, path: str, whole: bool) -> str:
    """The TOML in the one block of a Python file."""
    blocks = _BLOCK.findall(text)
    if len(blocks) == 1 and len(_BLOCK_START.findall(text)) == 1:
        return "\n".join(line.rstrip("\r")[2:] for line in blocks[0].split("\n"))
    if len(_BLOCK_START.findall(text)) > 1:
        raise UserError(f"{path}: the file has more than one manifest block '# /// udf'")
    if _BLOCK_START.search(text):
        raise UserError(f"{path}: the manifest block '# /// udf' has no end '# ///' (each line begins with '# ')")
    where = "" if whole else f" in its first {MAX_MANIFEST // 1024} KiB"
    raise UserError(f"{path}: the file has no manifest block '# /// udf'{where}, so it is not a driver")


def parse(text: str, path: str, what: str = "the manifest") -> dict[str, Any]:
    """TOML, or one sentence."""
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as exc:
        raise UserError(f"{path}: {what} is not valid TOML: {exc}") from None


def shown(value: Any) -> str:
    """A wrong value, short enough for a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
