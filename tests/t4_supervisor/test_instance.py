"""The states of an instance, their transitions, and the events that tell of them."""

from __future__ import annotations

import itertools

import pytest

from udf.errors import InternalError
from udf.supervisor.instance import MAX_EVENTS, TRANSITIONS, Event, EventLog, Instance, Reason, State

ALLOWED = {
    ("STARTING", "ACTIVE"),
    ("STARTING", "FAILED"),
    ("STARTING", "GONE"),
    ("ACTIVE", "RECOVERING"),
    ("ACTIVE", "DETACHED"),
    ("ACTIVE", "FAILED"),
    ("ACTIVE", "GONE"),
    ("RECOVERING", "ACTIVE"),
    ("RECOVERING", "DETACHED"),
    ("RECOVERING", "FAILED"),
    ("RECOVERING", "GONE"),
    ("DETACHED", "ACTIVE"),
    ("DETACHED", "RECOVERING"),
    ("DETACHED", "FAILED"),
    ("DETACHED", "GONE"),
    ("FAILED", "DETACHED"),
    ("FAILED", "RECOVERING"),
    ("FAILED", "GONE"),
}
# The shortest way to each state, by allowed steps.
WAY = {
    State.STARTING: [],
    State.ACTIVE: [State.ACTIVE],
    State.RECOVERING: [State.ACTIVE, State.RECOVERING],
    State.DETACHED: [State.ACTIVE, State.DETACHED],
    State.FAILED: [State.FAILED],
    State.GONE: [State.GONE],
}


def in_state(state: State, log: EventLog) -> Instance:
    instance = Instance("x", "mount", log)
    for step in WAY[state]:
        instance.change(step, Reason.READY)
    return instance


@pytest.mark.parametrize(("old", "new"), list(itertools.product(State, State)), ids=str)
def test_only_the_transitions_of_the_table_are_possible(old: State, new: State) -> None:
    log = EventLog()
    instance = in_state(old, log)
    before = log.past()
    if (str(old), str(new)) in ALLOWED:
        assert instance.can(new)
        event = instance.change(new, Reason.OPERATOR, "because")
        assert (event.previous, event.state, event.reason, event.text) == (old, new, "operator", "because")
        assert (instance.state, instance.reason, instance.text) == (new, Reason.OPERATOR, "because")
        assert log.past() == [*before, event]
    else:
        assert not instance.can(new)
        with pytest.raises(InternalError, match=f"from {old} to {new}"):
            instance.change(new, Reason.OPERATOR)
        assert instance.state is old
        assert log.past() == before


def test_every_state_is_in_the_table_and_reachable() -> None:
    assert set(TRANSITIONS) == set(State)
    assert set().union(*TRANSITIONS.values()) == set(State) - {State.STARTING}


def test_a_new_instance_is_an_event_without_a_previous_state() -> None:
    log = EventLog()
    Instance("x", "driver", log, clock=lambda: 12.5)
    (event,) = log.past()
    assert (event.kind, event.name, event.state, event.previous, event.time) == ("driver", "x", "STARTING", None, 12.5)


def test_events_are_numbered_kept_up_to_a_bound_and_readable_from_a_number() -> None:
    log = EventLog()
    for _ in range(MAX_EVENTS + 50):
        Instance("x", "driver", log)
    assert len(log.past()) == MAX_EVENTS
    assert [event.seq for event in log.past(MAX_EVENTS + 48)] == [MAX_EVENTS + 49, MAX_EVENTS + 50]


def test_a_subscriber_hears_of_events_only_while_it_is_subscribed() -> None:
    log = EventLog()
    heard: list[Event] = []
    with log.subscribed(heard.append):
        instance = Instance("x", "driver", log)
        instance.fault("READ", "ValueError")
    instance.change(State.ACTIVE, Reason.READY)
    assert [(event.what, event.reason) for event in heard] == [("state", "starting"), ("fault", "READ")]


def test_the_tree_shows_each_instance_with_its_state_and_what_it_does() -> None:
    log = EventLog()
    driver, shim = Instance("m", "driver", log), Instance("m", "shim", log)
    mount = Instance("m", "mount", log, needs=[driver, shim])
    driver.pid = 42
    driver.note("waiting for ready")
    shim.change(State.FAILED, Reason.CRASHED, "was ended by SIGKILL")
    assert mount.tree() == [
        "mount m STARTING, starting",
        "  driver m (process 42) STARTING, starting: waiting for ready",
        "  shim m FAILED, crashed: was ended by SIGKILL",
    ]
