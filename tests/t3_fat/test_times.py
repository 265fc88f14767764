"""Time stamps: granularity, range, time zones."""

from __future__ import annotations

import calendar
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .formats import times

SECOND = 1_000_000_000


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Berlin, for this test."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    times._seconds.cache_clear()
    times._words.cache_clear()
    yield
    monkeypatch.undo()
    time.tzset()
    times._seconds.cache_clear()
    times._words.cache_clear()


def at(*fields: int) -> int:
    return calendar.timegm((*fields, 0, 0, 0)) * SECOND


def test_a_moment_is_kept_to_ten_milliseconds() -> None:
    moment = at(2024, 2, 29, 23, 59, 59) + 678_901_234
    date, clock, hundredths = times.encode(moment, utc=True)
    assert (date, clock, hundredths) == (44 << 9 | 2 << 5 | 29, 23 << 11 | 59 << 5 | 29, 167)
    assert times.decode(date, clock, hundredths, utc=True) == moment // 10_000_000 * 10_000_000
    assert times.decode(date, clock, utc=True) == at(2024, 2, 29, 23, 59, 58)
    assert times.decode(date, utc=True) == at(2024, 2, 29, 0, 0, 0)


def test_what_is_too_early_or_too_late_becomes_the_nearest() -> None:
    first, last = at(1980, 1, 1, 0, 0, 0), at(2107, 12, 31, 23, 59, 59) + 990_000_000
    for moment in (-(10**30), -1, 0, first - 1, first):
        assert times.decode(*times.encode(moment, utc=True), utc=True) == first
    for moment in (last, last + 10_000_000, 10**30):
        assert times.decode(*times.encode(moment, utc=True), utc=True) == last


@pytest.mark.usefixtures("zone")
def test_local_time_has_its_daylight_saving_time() -> None:
    winter, summer = at(2024, 1, 15, 12, 0, 0), at(2024, 7, 15, 12, 0, 0)
    assert times.encode(winter, utc=False)[1] >> 11 == 13
    assert times.encode(summer, utc=False)[1] >> 11 == 14
    for moment in (winter, summer):
        assert times.decode(*times.encode(moment, utc=False), utc=False) == moment
    assert times.encode(at(1979, 12, 31, 23, 30, 0), utc=False) == (33, 30 << 5, 0)  # 1980 there already
    assert times.encode(at(1979, 12, 31, 22, 30, 0), utc=False) == (33, 0, 0)
    assert times.encode(at(2107, 12, 31, 23, 30, 0), utc=False) == (0xFF9F, 0xBF7D, 199)  # 2108 there


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.integers(0, 255), st.booleans())
def test_any_words_are_a_moment(date: int, clock: int, hundredths: int, utc: bool) -> None:
    moment = times.decode(date, clock, hundredths, utc=utc)
    assert at(1979, 12, 30, 0, 0, 0) <= moment <= at(2108, 1, 3, 0, 0, 0)


@given(st.integers(at(1980, 1, 2, 0, 0, 0), at(2107, 12, 30, 0, 0, 0)))
def test_what_is_read_back_is_the_moment_rounded_down(moment: int) -> None:
    date, clock, hundredths = times.encode(moment, utc=True)
    assert times.decode(date, clock, hundredths, utc=True) == moment - moment % 10_000_000
    assert times.decode(date, clock, utc=True) == moment - moment % (2 * SECOND)
    assert times.decode(date, utc=True) == moment - moment % (86400 * SECOND)
