"""Every kind of breach, every state of a key, own and foreign: exactly what the runbook says, no more."""

import itertools
from dataclasses import dataclass

import pytest

from envelope.errors import MisuseError
from envelope.keys import TRANSITIONS as KEY_TRANSITIONS
from envelope.keys import KeyState
from key_agent.environments.breaches import (
    TRANSITIONS,
    Declaration,
    Disposition,
    IncidentEvent,
    IncidentKind,
    IncidentState,
    follow,
    scope,
)

S, D, K = KeyState, Disposition, IncidentKind


@dataclass(frozen=True)
class Key:
    owner_environment: str
    state: KeyState
    service: str = "s3"


LIVE = (S.PRE_ACTIVE, S.ACTIVE, S.SUSPENDED, S.DEACTIVATED)
ENDED = (S.COMPROMISED, S.DESTROYED)

# By kind: what becomes of an own key, of a foreign one that was exposed, and of one that was not.
# One disposition for all live states, or one per state.
EXPECTED: dict[IncidentKind, tuple[object, object, object]] = {
    K.SUSPECTED: (
        {
            S.PRE_ACTIVE: D.CANCELLED,
            S.ACTIVE: D.SUSPENDED,
            S.SUSPENDED: None,
            S.DEACTIVATED: D.SUSPENDED,
        },
        None,
        None,
    ),
    K.RUNTIME: (D.COMPROMISED, D.REVIEW, None),
    K.KEK: (D.REVIEW, D.REVIEW, None),
    K.DB: (D.REWRAPPED, D.REWRAPPED, None),
    K.SERVICE_CERT: (D.COMPROMISED, D.COMPROMISED, None),
}


def declaration(kind: IncidentKind, **more: object) -> Declaration:
    if kind is K.SERVICE_CERT:
        more.setdefault("service", "s3")
    return Declaration(kind=kind, environment="a", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_scope_is_exactly_what_the_kind_says(kind: IncidentKind) -> None:
    keys, exposed, expected = {}, set(), {}
    own, foreign, hidden = EXPECTED[kind]
    for state in S:
        for name, owner, wanted in (("own", "a", own), ("foreign", "b", foreign), ("hidden", "b", hidden)):
            kid = f"{name}-{state}"
            keys[kid] = Key(owner, state)
            if name != "hidden":
                exposed.add(kid)
            found = wanted[state] if isinstance(wanted, dict) and state in LIVE else wanted
            if state in LIVE and found is not None:
                expected[kid] = found
    assert scope(declaration(kind), keys, exposed=exposed) == expected


def test_keys_of_other_services_are_no_matter_of_a_certificate() -> None:
    keys = {"x": Key("a", S.ACTIVE, "s3"), "y": Key("a", S.ACTIVE, "box")}
    found = scope(declaration(K.SERVICE_CERT, service="box"), keys, exposed=keys)
    assert found == {"y": D.COMPROMISED}


def test_a_single_key_is_all_that_kind_dek_touches() -> None:
    keys = {name: Key("a", S.ACTIVE) for name in "xyz"} | {"gone": Key("a", S.COMPROMISED)}
    found = scope(declaration(K.DEK, keys=frozenset("y")), keys, exposed=keys)
    assert found == {"y": D.COMPROMISED}
    with pytest.raises(MisuseError, match="no key q"):
        scope(declaration(K.DEK, keys=frozenset("yq")), keys, exposed=keys)
    with pytest.raises(MisuseError, match="compromised already"):
        scope(declaration(K.DEK, keys=frozenset(["gone"])), keys, exposed=keys)


def test_own_keys_that_are_to_be_kept_stay() -> None:
    keys = {"own": Key("a", S.ACTIVE), "foreign": Key("b", S.ACTIVE)}
    assert scope(declaration(K.SUSPECTED, keep_keys=True), keys, exposed=keys) == {"own": D.KEPT}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (K.DEK, {}),
        (K.RUNTIME, {"keys": frozenset("x")}),
        (K.RUNTIME, {"keep_keys": True}),
        (K.DEK, {"keys": frozenset("x"), "keep_keys": True}),
        (K.KEK, {"service": "s3"}),
        (K.SERVICE_CERT, {"service": None}),
    ],
)
def test_what_does_not_fit_the_kind_is_refused(kind: IncidentKind, more: dict[str, object]) -> None:
    with pytest.raises(MisuseError):
        declaration(kind, **more)


@pytest.mark.parametrize(("kind", "state"), [*itertools.product(IncidentKind, LIVE)])
def test_no_disposition_asks_for_a_step_that_the_keys_table_forbids(
    kind: IncidentKind, state: KeyState
) -> None:
    keys = {"x": Key("a", state)}
    declared = declaration(kind, keys=frozenset("x") if kind is K.DEK else frozenset())
    for disposition in scope(declared, keys, exposed=keys).values():
        assert disposition.disables == (disposition.state is not None)
        if disposition.state is not None:
            assert disposition.state in KEY_TRANSITIONS[state]


def test_what_can_be_undone_is_only_what_was_suspended() -> None:
    """A kind that compromises by itself cannot be a false alarm once its keys are gone: incidents.py asks."""
    assert {kind for kind in K if kind.heals} == {K.SUSPECTED, K.RUNTIME, K.KEK}
    assert {kind for kind in K if kind.ends_kek} == {K.KEK}


# The life of an incident.


def test_every_state_has_its_row_and_every_event_leads_somewhere() -> None:
    assert set(TRANSITIONS) == set(IncidentState)
    assert {event for row in TRANSITIONS.values() for event in row} == set(IncidentEvent)


def test_nothing_leads_out_of_the_end() -> None:
    for state in IncidentState:
        assert state.is_over == (not TRANSITIONS[state])


def test_a_false_alarm_is_one_before_anything_was_replaced() -> None:
    roads = {state for state, row in TRANSITIONS.items() if IncidentState.FALSE_ALARM in row.values()}
    assert roads == {IncidentState.OPEN, IncidentState.CONTAINED}


def test_further_keys_can_be_compromised_until_it_is_over_and_open_it_anew() -> None:
    for state, row in TRANSITIONS.items():
        assert row.get(IncidentEvent.COMPROMISED_MORE) == (None if state.is_over else IncidentState.OPEN)


def test_an_environment_rejoins_only_after_every_key_has_its_successor() -> None:
    for state, row in TRANSITIONS.items():
        if IncidentEvent.REJOIN_BEGUN in row:
            assert state in (IncidentState.REKEYED, IncidentState.REJOINING)


def test_what_the_table_does_not_know_is_refused() -> None:
    for state, event in itertools.product(IncidentState, IncidentEvent):
        if event in TRANSITIONS[state]:
            assert follow(state, event) is TRANSITIONS[state][event]
        else:
            with pytest.raises(MisuseError):
                follow(state, event)
