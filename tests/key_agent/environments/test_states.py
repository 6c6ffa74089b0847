"""The table of an environment's states promises one road back, and that withdrawing is always possible."""

import itertools

import pytest

from envelope.errors import MisuseError
from envelope.keys import TRANSITIONS, KeyState
from key_agent.environments.states import (
    EnvironmentEvent,
    EnvironmentState,
    follow_environment,
    restrictiveness,
)

S, E = EnvironmentState, EnvironmentEvent


def roads() -> dict[tuple[EnvironmentState, EnvironmentEvent], EnvironmentState]:
    """Every step that the table knows."""
    found = {}
    for state, event in itertools.product(S, E):
        try:
            found[state, event] = follow_environment(state, event)
        except MisuseError:
            continue
    return found


def test_only_proven_keys_make_an_environment_active() -> None:
    into = {event for (_, event), after in roads().items() if after is S.ACTIVE}
    assert into == {E.KEYS_PROVEN}
    assert {state for (state, _), after in roads().items() if after is S.ACTIVE} == {S.JOINING, S.REJOINING}


def test_from_healing_there_is_one_road_back() -> None:
    steps = roads()
    healing = {event: after for (state, event), after in steps.items() if state is S.HEALING}
    assert healing == {E.ATTESTED: S.HEALED, E.WITHDRAWN: S.HEALING, E.RETIRED: S.RETIRED}
    healed = {event: after for (state, event), after in steps.items() if state is S.HEALED}
    assert healed == {E.ADMITTED: S.REJOINING, E.WITHDRAWN: S.HEALING, E.RETIRED: S.RETIRED}


@pytest.mark.parametrize("state", S)
def test_every_environment_can_be_withdrawn_but_one_that_is_gone(state: EnvironmentState) -> None:
    found = roads().get((state, E.WITHDRAWN))
    assert found is (None if state is S.RETIRED else S.HEALING)


def test_retired_is_the_end_and_nothing_that_serves_is_retired() -> None:
    assert not [event for (state, event) in roads() if state is S.RETIRED and event is not E.RETIRED]
    assert (S.ACTIVE, E.RETIRED) not in roads()


@pytest.mark.parametrize("state", S)
def test_what_serves_pushes_and_what_pushes_counts(state: EnvironmentState) -> None:
    assert state.serves is (state is S.ACTIVE)
    assert state.pushes is (state in (S.ACTIVE, S.DRAINING))
    assert state.counts is state.pushes


def test_no_key_becomes_less_restricted_but_by_a_step_that_people_take() -> None:
    """Of two histories the later state holds; only `resume` leads back to an earlier one, and activation."""
    back = {
        (old, new)
        for old, following in TRANSITIONS.items()
        for new in following
        if restrictiveness(new) < restrictiveness(old)
    }
    assert back == {(KeyState.SUSPENDED, KeyState.ACTIVE), (KeyState.SUSPENDED, KeyState.DEACTIVATED)}
