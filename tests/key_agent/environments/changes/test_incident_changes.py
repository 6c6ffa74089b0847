"""Each step of an incident changes what it says in one draft, and can be repeated; or it changes nothing."""

import dataclasses
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from envelope.keys import KeyState
from key_agent.environments.breaches import (
    Declaration,
    Disposition,
    IncidentEvent,
    IncidentKind,
    IncidentState,
)
from key_agent.environments.changes import incident_changes as changes
from key_agent.environments.changes.incident_changes import Opening
from key_agent.environments.shared.approvals import Action, ApprovalError
from key_agent.environments.states import EnvironmentState
from key_agent.registry.access import RefusedChangeError
from tests.key_agent.environments.rows import NOW_MS, TENANT, World

K, S = IncidentKind, KeyState


@pytest.fixture
def world() -> World:
    return World()


def opening(
    kind: IncidentKind = K.RUNTIME, environment: str = "a", *, key: str = "k1", **more: Any
) -> Opening:
    if kind is K.SERVICE_CERT:
        more.setdefault("service", "acme/s3")
    return Opening(
        declared=Declaration(kind=kind, environment=environment, **more),
        reason="IR-2214",
        since_ms=NOW_MS - 60_000,
        opened_by="ada",
        idempotency_key=key,
    )


def open_it(world: World, what: Opening, exposed: frozenset[str] | None = None) -> tuple[str, bool]:
    seen = frozenset(world.rows.deks) if exposed is None else exposed
    return world.change(lambda draft: changes.open_incident(draft, what, exposed=seen, now_ms=world.now_ms))


def test_a_breached_runtime_disables_exactly_its_own_keys_and_heals(world: World) -> None:
    incident_id, is_new = open_it(world, opening())
    assert (incident_id, is_new) == ("inc-1", True)
    assert world.states() == {
        "s3-a": S.COMPROMISED,
        "box-a": S.COMPROMISED,
        "s3-b": S.ACTIVE,
        "s3-c": S.ACTIVE,
        "box-b": S.ACTIVE,
        "box-c": S.ACTIVE,
    }
    environment = world.rows.environments["a"]
    assert (environment.state, environment.incident_id) == (EnvironmentState.HEALING, "inc-1")
    assert {world.rows.environments[name].state for name in "bc"} == {EnvironmentState.ACTIVE}
    body = world.rows.incidents["inc-1"]
    assert body.state is IncidentState.OPEN
    assert body.opened_epoch == world.rows.epoch == 2
    keys = changes.keys_of(world.rows, "inc-1")
    assert {key.disposition for key in keys.values()} == {Disposition.COMPROMISED, Disposition.REVIEW}
    assert keys[world.dek["s3-a"]].previous_state is S.ACTIVE
    assert world.rows.deks[world.dek["s3-a"]].incident_id == "inc-1"
    assert world.rows.keks["kek-a"].state == "active", "only kind kek says that the KEK is lost"


def test_of_a_thousand_calls_with_one_key_one_opens(world: World) -> None:
    found = [open_it(world, opening()) for _ in range(1000)]
    assert found == [("inc-1", True)] + [("inc-1", False)] * 999
    assert world.rows.epoch == 2


def test_the_same_breach_under_another_key_is_the_same_incident(world: World) -> None:
    open_it(world, opening())
    assert open_it(world, opening(key="k2")) == ("inc-1", False)
    assert open_it(world, opening(environment="b", key="k3")) == ("inc-2", True)


def test_a_service_that_is_breached_once_more_loses_its_new_keys_too(world: World) -> None:
    open_it(world, opening(K.SERVICE_CERT))
    new = [world.add_key("s3", owner, S.ACTIVE) for owner in "abc"]
    assert open_it(world, opening(K.SERVICE_CERT, key="k2")) == ("inc-1", False)
    assert succeed(world)
    assert {world.rows.deks[key_id].state for key_id in new} == {S.ACTIVE}
    assert open_it(world, opening(K.SERVICE_CERT, key="k3")) == ("inc-2", True)
    assert {world.rows.deks[key_id].state for key_id in new} == {S.COMPROMISED}


@pytest.mark.parametrize(
    "state", [EnvironmentState.HEALED, EnvironmentState.REJOINING, EnvironmentState.ACTIVE]
)
@pytest.mark.parametrize("kind", [K.SUSPECTED, K.RUNTIME, K.KEK])
def test_whoever_is_breached_on_its_way_back_heals_anew(
    world: World, kind: IncidentKind, state: EnvironmentState
) -> None:
    """Its first incident is not over; it says nothing of what was exposed since."""
    open_it(world, opening(kind))
    world.rows.environments["a"] = msgspec.structs.replace(world.rows.environments["a"], state=state)
    assert open_it(world, opening(kind, key="k2")) == ("inc-2", True)
    environment = world.rows.environments["a"]
    assert (environment.state, environment.incident_id) == (EnvironmentState.HEALING, "inc-2")
    assert open_it(world, opening(kind, key="k3")) == ("inc-2", False)


@pytest.mark.parametrize("kind", [K.RUNTIME, K.KEK, K.DB])
def test_a_new_kek_that_is_lost_as_well_is_another_incident(world: World, kind: IncidentKind) -> None:
    open_it(world, opening(kind))
    world.rows.keks["kek-a2"] = world.kek("a", created_at_ms=NOW_MS + 1, version=2)
    world.rows.environments["a"] = msgspec.structs.replace(world.rows.environments["a"], kek_id="kek-a2")
    world.now_ms = NOW_MS + 2
    assert open_it(world, opening(kind, key="k2")) == ("inc-2", True)
    assert (world.rows.keks["kek-a2"].state == "active") is (kind is not K.KEK)
    body = world.rows.incidents["inc-2"]
    assert not changes.has_newer_kek(world.rows, world.rows.environments["a"], body)
    assert open_it(world, opening(kind, key="k3")) == ("inc-2", False)


@pytest.mark.parametrize("kind", [K.RUNTIME, K.KEK, K.DB])
def test_a_kek_that_says_it_was_made_later_is_not_newer(world: World, kind: IncidentKind) -> None:
    """It dates itself; the rows had it before the incident."""
    dated_ahead = msgspec.structs.replace(world.rows.keks["kek-a"], created_at_ms=NOW_MS + 10**9)
    world.rows.keks["kek-a"] = dated_ahead
    incident_id, _ = open_it(world, opening(kind))
    if kind is K.KEK:  # what the incident ended
        world.rows.keks["kek-a"] = dated_ahead
    body = world.rows.incidents[incident_id]
    assert not changes.has_newer_kek(world.rows, world.rows.environments["a"], body)


@pytest.mark.parametrize("kind", [K.SUSPECTED, K.RUNTIME, K.KEK, K.DB, K.SERVICE_CERT])
def test_a_breached_runtime_alone_exposes_the_agents_registry_key(world: World, kind: IncidentKind) -> None:
    """Nothing that it signs begins a term from then on."""
    open_it(world, opening(kind))
    exposed = {name: body.registry_key_exposed for name, body in world.rows.environments.items()}
    assert exposed == {"a": kind is K.RUNTIME, "b": False, "c": False}


def test_a_key_of_another_incident_is_refused(world: World) -> None:
    open_it(world, opening())
    before = world.rows
    with pytest.raises(RefusedChangeError, match="inc-1"):
        open_it(world, opening(K.SUSPECTED))
    assert world.rows is before


def test_a_worse_kind_follows_a_suspicion(world: World) -> None:
    open_it(world, opening(K.SUSPECTED))
    assert world.states()["s3-a"] is S.SUSPENDED
    assert world.rows.deks[world.dek["s3-a"]].suspended_from is S.ACTIVE
    assert open_it(world, opening(K.RUNTIME, key="k2")) == ("inc-2", True)
    assert world.states()["s3-a"] is S.COMPROMISED
    assert world.rows.environments["a"].incident_id == "inc-2"
    assert world.rows.incidents["inc-1"].state is IncidentState.OPEN


@pytest.mark.parametrize("kind", [K.DEK, K.DB, K.SERVICE_CERT])
def test_an_environment_that_is_sound_goes_on(world: World, kind: IncidentKind) -> None:
    more: dict[str, Any] = {"keys": frozenset([world.dek["s3-a"]])} if kind is K.DEK else {}
    open_it(world, opening(kind, **more))
    assert world.rows.environments["a"].state is EnvironmentState.ACTIVE
    changed = {name for name, state in world.states().items() if state is not S.ACTIVE}
    assert changed == {K.DEK: {"s3-a"}, K.DB: set(), K.SERVICE_CERT: {"s3-a", "s3-b", "s3-c"}}[kind]


def test_a_lost_kek_is_ended_and_every_key_waits_for_a_decision(world: World) -> None:
    open_it(world, opening(K.KEK))
    assert world.rows.keks["kek-a"].state == changes.KEK_COMPROMISED
    assert world.rows.keks["kek-b"].state == "active"
    assert set(world.states().values()) == {S.ACTIVE}
    dispositions = {key.disposition for key in changes.keys_of(world.rows, "inc-1").values()}
    assert dispositions == {Disposition.REVIEW}


def test_what_does_not_fit_is_refused_and_changes_nothing(world: World) -> None:
    before = world.rows
    wrong: list[Opening] = [
        opening(environment="nowhere"),
        opening(K.DEK, keys=frozenset(["00" * 16])),
        opening(K.SERVICE_CERT, service="acme/other"),
    ]
    for one in wrong:
        with pytest.raises(RefusedChangeError):
            open_it(world, one)
    world.rows.environments["a"] = msgspec.structs.replace(
        world.rows.environments["a"], state=EnvironmentState.RETIRED
    )
    with pytest.raises(RefusedChangeError, match="retired"):
        open_it(world, opening())
    assert world.rows is before
    assert world.rows.incidents == {}


def test_a_reason_of_any_length_fits(world: World) -> None:
    open_it(world, dataclasses.replace(opening(), reason="ü" * 5000))
    assert len(world.rows.incidents["inc-1"].reason) == changes.MAX_REASON


# Further keys.


def compromise(world: World, keys: list[str], approval: str, incident: str = "inc-1") -> bool:
    return world.change(
        lambda draft: changes.compromise_more(
            draft, incident, keys, tenant=TENANT, approval_id=approval, now_ms=world.now_ms
        )
    )


def approve(world: World, keys: list[str], **more: Any) -> str:
    return world.approve(Action.INCIDENT_COMPROMISE, "inc-1", changes.compromise_payload(keys), **more)


def test_two_persons_compromise_further_keys_and_everybody_hears_of_it_anew(world: World) -> None:
    open_it(world, opening())
    world.change(
        lambda draft: changes.advance(draft, "inc-1", IncidentEvent.ACKNOWLEDGED, now_ms=world.now_ms)
    )
    keys = [world.dek["s3-b"], world.dek["box-c"]]
    approval = approve(world, keys)
    assert compromise(world, keys, approval)
    assert [world.states()[name] for name in ("s3-b", "box-c", "s3-c")] == [
        S.COMPROMISED,
        S.COMPROMISED,
        S.ACTIVE,
    ]
    assert world.rows.incidents["inc-1"].state is IncidentState.OPEN
    assert world.rows.approvals[approval].used_at_ms == world.now_ms
    decided = changes.keys_of(world.rows, "inc-1")[keys[0]]
    assert (decided.decided_by, decided.disposition) == (approval, Disposition.COMPROMISED)
    assert compromise(world, keys, approval) is False, "repeated, it changes nothing and asks for nothing"


def test_without_two_persons_nothing_more_is_compromised(world: World) -> None:
    open_it(world, opening())
    keys = [world.dek["s3-b"]]
    before = world.rows.deks
    cases = [
        approve(world, keys, by="ada"),
        approve(world, [world.dek["s3-c"]]),
        world.approve(Action.INCIDENT_CANCEL, "inc-1", changes.compromise_payload(keys)),
        "a-none",
    ]
    for approval in cases:
        with pytest.raises(ApprovalError):
            compromise(world, keys, approval)
    assert world.rows.deks == before


def test_keys_of_no_concern_are_refused(world: World) -> None:
    open_it(world, opening(K.SUSPECTED))
    keys = [world.dek["s3-b"]]
    with pytest.raises(RefusedChangeError, match="does not concern"):
        compromise(world, keys, approve(world, keys))


# A false alarm.


def cancel(world: World, incident: str = "inc-1", **more: Any) -> bool:
    approval = world.approve(Action.INCIDENT_CANCEL, incident, {}, **more)
    return world.change(
        lambda draft: changes.cancel(
            draft, incident, tenant=TENANT, approval_id=approval, now_ms=world.now_ms
        )
    )


def test_a_false_alarm_gives_the_keys_back_and_nothing_else(world: World) -> None:
    old = world.add_key("s3", "a", S.DEACTIVATED)
    coming = world.add_key("s3", "a", S.PRE_ACTIVE)
    before = world.rows.deks[old]
    open_it(world, opening(K.SUSPECTED))
    assert world.rows.deks[old].state is S.SUSPENDED
    assert world.rows.deks[coming].state is S.DESTROYED
    assert cancel(world)
    assert set(world.states().values()) == {S.ACTIVE}
    found = world.rows.deks[old]
    assert (found.state, found.suspended_from, found.incident_id) == (before.state, None, None)
    assert world.rows.deks[coming].state is S.DESTROYED
    assert world.rows.environments["a"].state is EnvironmentState.HEALING, "it returns by its one road"
    assert world.rows.incidents["inc-1"].state is IncidentState.FALSE_ALARM
    assert cancel(world) is False


def test_a_key_whose_place_was_taken_comes_back_to_open_only(world: World) -> None:
    open_it(world, opening(K.SUSPECTED))
    world.add_key("s3", "a", S.ACTIVE)
    cancel(world)
    assert world.states()["s3-a"] is S.DEACTIVATED
    assert world.states()["box-a"] is S.ACTIVE


@pytest.mark.parametrize("kind", [K.RUNTIME, K.SERVICE_CERT])
def test_what_is_compromised_is_no_false_alarm(world: World, kind: IncidentKind) -> None:
    open_it(world, opening(kind))
    with pytest.raises(RefusedChangeError, match="not taken back"):
        cancel(world)


def test_one_person_cancels_nothing(world: World) -> None:
    open_it(world, opening(K.SUSPECTED))
    with pytest.raises(ApprovalError):
        cancel(world, by="bob")
    assert world.states()["s3-a"] is S.SUSPENDED


# Successors.


def succeed(world: World) -> bool:
    return world.change(lambda draft: changes.succeed(draft, "inc-1", now_ms=world.now_ms))


def test_an_incident_is_rekeyed_when_each_place_has_an_active_key(world: World) -> None:
    world.add_key("s3", "a", S.DEACTIVATED)  # sealed before, and needs no successor
    open_it(world, opening())
    places = sorted([world.dek["s3-a"], world.dek["box-a"]])
    assert changes.without_successor(world.rows, "inc-1") == places
    with pytest.raises(RefusedChangeError, match="2 keys"):
        succeed(world)
    new = world.add_key("s3", "a", S.ACTIVE)
    world.add_key("box", "a", S.PRE_ACTIVE)
    assert changes.without_successor(world.rows, "inc-1") == [world.dek["box-a"]]
    world.add_key("box", "a", S.ACTIVE)
    assert succeed(world)
    assert world.rows.incidents["inc-1"].state is IncidentState.REKEYED
    keys = changes.keys_of(world.rows, "inc-1")
    assert keys[world.dek["s3-a"]].replaced_by == new
    assert succeed(world) is False


def test_a_service_that_is_gone_needs_no_keys(world: World) -> None:
    open_it(world, opening())
    world.rows.services["acme/box"] = msgspec.structs.replace(world.rows.services["acme/box"], removed=True)
    assert changes.without_successor(world.rows, "inc-1") == [world.dek["s3-a"]]


def test_suspended_keys_have_to_be_decided_about_first(world: World) -> None:
    open_it(world, opening(K.SUSPECTED))
    with pytest.raises(RefusedChangeError, match="nobody has decided"):
        succeed(world)
    keys = changes.undecided(world.rows, "inc-1")
    assert sorted(keys) == sorted([world.dek["s3-a"], world.dek["box-a"]])
    compromise(world, keys, approve(world, keys))
    for service in ("s3", "box"):
        world.add_key(service, "a", S.ACTIVE)
    assert succeed(world)


# The end.


def close(world: World) -> bool:
    return world.change(lambda draft: changes.close(draft, "inc-1", now_ms=world.now_ms))


def test_it_is_not_closed_while_its_environment_heals(world: World) -> None:
    open_it(world, opening())
    with pytest.raises(RefusedChangeError, match="healing"):
        close(world)


def test_a_single_key_is_closed_once_it_is_replaced(world: World) -> None:
    open_it(world, opening(K.DEK, keys=frozenset([world.dek["s3-a"]])))
    with pytest.raises(RefusedChangeError, match="open"):
        close(world)
    world.add_key("s3", "a", S.ACTIVE)
    succeed(world)
    assert close(world)
    assert close(world) is False
    steps: Callable[[str], bool] = world.rows.incidents["inc-1"].steps.__contains__
    assert all(map(steps, ("open", "rekeyed", "closed")))


def test_a_database_that_leaked_needs_a_new_kek_before_it_is_closed(world: World) -> None:
    open_it(world, opening(K.DB))
    succeed(world)
    with pytest.raises(RefusedChangeError, match="KEK"):
        close(world)
    world.rows.keks["kek-a2"] = world.kek("a", created_at_ms=NOW_MS + 1, version=2)
    world.rows.environments["a"] = msgspec.structs.replace(world.rows.environments["a"], kek_id="kek-a2")
    assert close(world)


# Single keys.


def test_keys_held_by_an_incident_are_not_resumed_past_it(world: World) -> None:
    open_it(world, opening(K.SUSPECTED))
    with pytest.raises(RefusedChangeError, match="suspended by inc-1"):
        changes.suspended(world.rows, [world.dek["s3-a"]])
    assert changes.suspended(world.rows, [world.dek["s3-b"]]) == []
