"""Time stamps: two seconds, ten milliseconds or a day fine, from 1980 to 2107, in local time or UTC.

Owns: both directions between nanoseconds since 1970 and the words of a directory entry.
Must never: fail on a word, however senseless: days and hours that are none are taken to the nearest that is one.
Called by: entries.py.

Local time is that of this machine with its daylight saving time, as Windows and mtools have it. An hour that comes
twice in autumn is therefore one hour off for some of the stamps that are written in it: the format cannot tell.
"""

from __future__ import annotations

import calendar
import functools
import time

_SECOND = 1_000_000_000
_FIRST = (33, 0, 0)  # 1980-01-01 00:00
_LAST = (0xFF9F, 0xBF7D, 199)  # 2107-12-31 23:59:59.99
_EARLIEST, _LATEST = 315_360_000, 4_355_000_000  # seconds, a few days beyond what fits on either side


@functools.lru_cache(maxsize=4096)
def _seconds(date: int, clock: int, utc: bool) -> int:
    fields = (
        1980 + (date >> 9),
        min(max(date >> 5 & 15, 1), 12),
        max(date & 31, 1),  # the 31st of a shorter month is the day after its last
        min(clock >> 11, 23),
        min(clock >> 5 & 63, 59),
        min((clock & 31) * 2, 59),
    )
    if utc:
        return calendar.timegm(fields)
    return int(time.mktime((*fields, 0, 0, -1)))


def decode(date: int, clock: int = 0, hundredths: int = 0, *, utc: bool) -> int:
    """Nanoseconds since 1970. *hundredths* are those of the creation time: 0 to 199 within its two seconds."""
    return (_seconds(date, clock, utc) * 100 + min(hundredths, 199)) * (_SECOND // 100)


def encode(stamp: int, *, utc: bool) -> tuple[int, int, int]:
    """Date, time and hundredths of the moment that fits and is not after *stamp* (or the nearest to it)."""
    seconds, rest = divmod(stamp, _SECOND)
    if seconds <= _EARLIEST:
        return _FIRST
    if seconds >= _LATEST:
        return _LAST
    date, clock = _words(seconds // 2, utc)
    if date < 0:
        return _FIRST if clock < 0 else _LAST
    return date, clock, seconds % 2 * 100 + rest // (_SECOND // 100)


@functools.lru_cache(maxsize=256)
def _words(pair: int, utc: bool) -> tuple[int, int]:
    """Date and time of a pair of seconds; (-1, -1): before the first, (-1, 0): after the last."""
    # The offset of every time zone since 1980 is a multiple of a minute: the second is the same in all of them.
    at = time.gmtime(pair * 2) if utc else time.localtime(pair * 2)
    if not 1980 <= at.tm_year <= 2107:
        return -1, -1 if at.tm_year < 1980 else 0
    return (
        (at.tm_year - 1980) << 9 | at.tm_mon << 5 | at.tm_mday,
        at.tm_hour << 11 | at.tm_min << 5 | min(at.tm_sec, 59) >> 1,
    )
