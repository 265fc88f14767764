"""What libfuse has to say.

Owns: libfuse's log function, so that the ordinary end of a link is not reported as an error at each unmount.
Must never: fail, on a libfuse without the function the messages just go to stderr. Called by: serve.py.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import pyfuse3

_log = logging.getLogger("libfuse")
_ERROR = 3  # enum fuse_log_level; what is above is only interesting to libfuse's authors
_END_OF_LINK = b"short read on fuse device"
_MAX_LINE = 1024

# void (*)(enum fuse_log_level level, const char *format, va_list arguments). A va_list is passed by reference or is a
# pointer in every ABI that Linux has, so it can be handed on to vsnprintf unseen.
_Function = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


def redirect() -> None:
    """Send libfuse's messages to our log."""
    try:
        # The symbol is looked up in what the extension module was linked with, wherever that libfuse lies.
        set_function: Any = ctypes.CDLL(pyfuse3.__file__).fuse_set_log_func
    except (AttributeError, OSError):
        return
    set_function.argtypes = [_Function]
    set_function.restype = None
    set_function(_function)


def _write(level: int, text: bytes | None, arguments: int | None) -> None:
    if not text or text.startswith(_END_OF_LINK):
        return
    buffer = ctypes.create_string_buffer(_MAX_LINE)
    _libc.vsnprintf(buffer, ctypes.c_size_t(_MAX_LINE), text, ctypes.c_void_p(arguments))
    _log.log(
        logging.WARNING if level <= _ERROR else logging.INFO, "%s", buffer.value.decode("utf-8", "replace").strip()
    )


_libc = ctypes.CDLL(None)
_function = _Function(_write)  # kept for as long as libfuse may call it
