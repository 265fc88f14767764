"""The restart policy: what follows which death."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udf.supervisor import restart
from udf.supervisor.restart import Death, Decision, History, Kind, classify

AT_ONCE = Decision(delay=0.0)
QUARANTINE = Decision(quarantine=True)
COUNTED = [kind for kind in Kind if kind.is_counted]

deaths = st.builds(
    Death,
    time=st.floats(0, 5000),
    kind=st.sampled_from(Kind),
    served=st.none() | st.floats(0, 300),
)


def history_of(*deaths: Death) -> History:
    history = History()
    for death in deaths:
        history = history.after(death)
    return history


def crashes(times: list[float], served: float | None = 1.0, kind: Kind = Kind.FAULT) -> History:
    return history_of(*(Death(time, kind, served) for time in times))


@pytest.mark.parametrize(
    ("status", "memory", "kind"),
    [
        (-signal.SIGKILL, False, Kind.EXTERNAL),
        (-signal.SIGKILL, True, Kind.MEMORY),
        (-signal.SIGTERM, True, Kind.EXTERNAL),
        (-signal.SIGSEGV, False, Kind.FAULT),
        (-signal.SIGABRT, False, Kind.FAULT),
        (-signal.SIGBUS, True, Kind.FAULT),
        (0, False, Kind.EXITED),
        (3, True, Kind.EXITED),
        (None, False, Kind.REFUSED),
    ],
)
def test_a_death_is_told_from_its_exit_status(status: int | None, memory: bool, kind: Kind) -> None:
    assert classify(status, out_of_memory=memory) is kind


def test_what_the_driver_did_not_cause_is_not_counted() -> None:
    assert {kind for kind in Kind if not kind.is_counted} == {Kind.EXTERNAL, Kind.OPERATOR}


@pytest.mark.parametrize("interval", [0.02, 0.2])
@pytest.mark.parametrize("served", [None, 0.01])
def test_a_storm_of_kills_from_outside_goes_on_for_ever_without_delay(interval: float, served: float | None) -> None:
    history = History()
    for number in range(10_000):
        history = history.after(Death(number * interval, Kind.EXTERNAL, served))
        assert history.decide(number * interval, 1.0) == AT_ONCE
    assert history.restarts_left(10_000 * interval) == restart.QUARANTINE_AFTER - 1


@pytest.mark.parametrize("kind", COUNTED)
def test_the_first_crash_is_followed_at_once_and_the_next_ones_after_twice_the_time_each(kind: Kind) -> None:
    delays = [crashes([float(n) for n in range(count)], kind=kind).decide(5.0, 0.0).delay for count in range(1, 5)]
    assert delays == [0.0, 1.0, 2.0, 4.0]


def test_one_that_fails_before_it_serves_is_never_followed_at_once() -> None:
    delays = [crashes([float(n) for n in range(count)], None).decide(5.0, 0.0).delay for count in range(1, 5)]
    assert delays == [1.0, 2.0, 4.0, 8.0]


def test_the_fifth_counted_death_in_ten_minutes_is_followed_by_quarantine() -> None:
    assert crashes([0, 100, 200, 300]).decide(300, 0.0) != QUARANTINE
    assert crashes([0, 100, 200, 300, 400]).decide(400, 0.0) == QUARANTINE
    assert crashes([0, 100, 200, 300, 601]).decide(601, 0.0) != QUARANTINE


def test_kills_from_outside_between_crashes_neither_count_nor_forgive() -> None:
    history = crashes([0, 1, 2, 3])
    history = history.after(Death(3.5, Kind.EXTERNAL, 0.5))
    assert history.decide(3.5, 0.0) == AT_ONCE
    assert history.restarts_left(3.5) == 0
    assert history.after(Death(4.0, Kind.EXITED, 0.5)).decide(4.0, 0.0) == QUARANTINE


def test_a_healthy_period_forgives_the_delay_and_ten_minutes_the_count() -> None:
    history = crashes([0, 1, 2])
    assert history.decide(2, 0.0).delay == 2.0
    history = history.after(Death(70, Kind.FAULT, restart.HEALTHY))
    assert history.decide(70, 0.0) == AT_ONCE
    assert history.restarts_left(70) == 0
    assert history.restarts_left(601.5) == 2
    assert history.restarts_left(700) == 4


def test_health_is_the_service_of_several_generations_that_were_killed_from_outside() -> None:
    history = crashes([0, 1])
    for number in range(3):
        history = history.after(Death(20.0 * number, Kind.EXTERNAL, 20.0))
    assert history.after(Death(70, Kind.EXITED, 0.5)).decide(70, 0.0) == AT_ONCE


@pytest.mark.parametrize("gap", [0.0, 3.0])
def test_a_crash_loop_ends_in_quarantine_after_five_starts(gap: float) -> None:
    """One that dies at once, and one that dies every three seconds."""
    history, now = History(), 0.0
    for _ in range(restart.QUARANTINE_AFTER):
        now += gap
        history = history.after(Death(now, Kind.EXITED, gap))
        decision = history.decide(now, 0.0)
        now += decision.delay
    assert decision == QUARANTINE
    assert now < 30


@given(st.lists(deaths, max_size=40), st.floats(0, 6000), st.floats(-1, 1))
def test_whatever_happened_the_decision_is_bounded_and_the_history_too(
    many: list[Death], later: float, jitter: float
) -> None:
    many.sort(key=lambda death: death.time)
    history = history_of(*many)
    now = (many[-1].time if many else 0.0) + later
    decision = history.decide(now, jitter)
    assert 0.0 <= decision.delay <= restart.MAX_DELAY
    assert len(history.counted) <= restart.QUARANTINE_AFTER
    assert 0 <= history.restarts_left(now) < restart.QUARANTINE_AFTER
    assert history.decide(now, jitter) == decision
    counted = [death for death in many if death.kind.is_counted and death.time > now - restart.WINDOW]
    if decision.quarantine:
        assert len(counted) >= restart.QUARANTINE_AFTER
        assert many[-1].kind.is_counted
    if many and not many[-1].kind.is_counted:
        assert decision == AT_ONCE
    if many and many[-1].kind.is_counted and len(counted) >= restart.QUARANTINE_AFTER:
        assert decision.quarantine


@given(st.lists(deaths, max_size=20), st.lists(st.floats(0, 300), min_size=1, max_size=20), st.floats(-1, 1))
def test_deaths_from_outside_never_make_what_follows_worse(
    many: list[Death], storm: list[float], jitter: float
) -> None:
    many.sort(key=lambda death: death.time)
    history = history_of(*many)
    now = many[-1].time if many else 0.0
    stormy = history
    for served in storm:
        stormy = stormy.after(Death(now, Kind.EXTERNAL, served))
    crash = Death(now, Kind.FAULT, 1.0)
    assert stormy.restarts_left(now) == history.restarts_left(now)
    assert stormy.after(crash).decide(now, jitter).delay <= history.after(crash).decide(now, jitter).delay


@given(st.lists(deaths, min_size=1, max_size=20), st.floats(-1, 1), st.floats(-1, 1))
def test_jitter_moves_a_delay_by_a_quarter_at_most(many: list[Death], one: float, other: float) -> None:
    many.sort(key=lambda death: death.time)
    history = history_of(*many)
    first, second = (history.decide(many[-1].time, jitter).delay for jitter in (one, other))
    assert min(first, second) >= max(first, second) * (1 - restart.JITTER) / (1 + restart.JITTER) - 1e-9
