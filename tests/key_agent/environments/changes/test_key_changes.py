"""What the manager writes about keys: never none, never two, and waiting for whom it should."""

import itertools

import msgspec
import pytest

from envelope.keys import TRANSITIONS, KeyId, KeyState, KeyUse, NetworkService
from key_agent.environments.changes import key_changes as changes
from key_agent.environments.changes.key_changes import DAY_MS, WantedKey
from key_agent.environments.shared.documents import (
    DekBody,
    EnvironmentBody,
    Kind,
    RingBody,
    ServiceBody,
    TenantBody,
)
from key_agent.environments.shared.draft import Draft
from key_agent.environments.shared.shared_view import Shared
from key_agent.environments.states import EnvironmentState
from key_agent.registry.store import RefusedChangeError
from key_agent.sources.source import WrapMethod, WrappedKey

FILES = NetworkService("acme", "files")
RING = "ab" * 16
NOW_MS = 1_800_000_000_000
E = EnvironmentState
P, A, D = KeyState.PRE_ACTIVE, KeyState.ACTIVE, KeyState.DEACTIVATED


def environment(name: str, state: EnvironmentState = E.ACTIVE) -> EnvironmentBody:
    return EnvironmentBody(name=name, agent_id=f"agent-{name}", api_url="-", state=state, since_ms=0)


def dek(owner: str, state: KeyState, version: int, **more: object) -> DekBody:
    body = DekBody(
        ring=RING,
        service=str(FILES),
        owner_environment=owner,
        generator_environment="a",
        use=KeyUse.DATA,
        version=version,
        kcv="00" * 16,
        state=state,
        since_ms=0,
        created_at_ms=0,
    )
    return msgspec.structs.replace(body, **more)


def view(deks: dict[str, DekBody], **states: EnvironmentState) -> Shared:
    names = states or dict.fromkeys("abc", E.ACTIVE)
    return Shared(
        term=1,
        epoch=1,
        tenant=TenantBody(home_environment="a"),
        environments={name: environment(name, state) for name, state in names.items()},
        services={str(FILES): ServiceBody()},
        rings={RING: RingBody(service=str(FILES), use=KeyUse.DATA)},
        deks=deks,
    )


def draft(shared: Shared) -> Draft:
    return Draft(shared, tenant_id="acme", now_ms=NOW_MS)


def wrapped(owner: NetworkService = FILES) -> WrappedKey:
    return WrappedKey(
        owner=owner,
        key_id=KeyId.random(),
        kek_id="kek-a",
        environment_id="a",
        method=WrapMethod.GCM,
        wrapped=b"-",
        kcv=bytes(16),
        token_serial="-",
        created_at_ms=0,
    )


def test_a_first_key_is_wanted_by_who_serves_or_joins_and_has_none_but_destroyed_ones() -> None:
    shared = view(
        {"1": dek("a", D, 1), "2": dek("b", KeyState.DESTROYED, 2), "3": dek("d", KeyState.COMPROMISED, 3)},
        a=E.ACTIVE, b=E.ACTIVE, c=E.JOINING, d=E.ACTIVE, e=E.HEALING, f=E.PROVISIONING, g=E.DRAINING,
        h=E.REJOINING, i=E.HEALED, j=E.RETIRED,
    )  # fmt: skip
    assert [one.owner_environment for one in changes.first_keys(shared)] == ["b", "c", "g"]
    removed = draft(shared)
    changes.remove_service(removed, FILES)
    assert changes.first_keys(removed.shared) == []


def test_new_keys_are_numbered_in_their_ring_and_no_place_gets_two() -> None:
    shared = view({"1": dek("a", A, 7), "2": dek("b", P, 8)})
    into = draft(shared)
    places = [WantedKey(ring=RING, owner_environment=name, predecessor="1") for name in "aabc"]
    keys = [wrapped() for _ in places]
    placed = changes.put_new(into, list(zip(places, keys, strict=True)), generator="c")
    assert placed == [str(keys[0].key_id), str(keys[3].key_id)]
    assert [into.shared.deks[key].version for key in placed] == [9, 10]
    assert {into.shared.deks[key].state for key in placed} == {P}
    assert {into.shared.deks[key].generator_environment for key in placed} == {"c"}
    foreign = [(WantedKey(ring=RING, owner_environment="c"), wrapped(NetworkService("acme", "mail")))]
    assert changes.put_new(draft(shared), foreign, generator="a") == []


def test_activation_ends_the_key_before_in_the_same_epoch_and_can_be_repeated() -> None:
    shared = view({"1": dek("a", A, 1), "2": dek("b", A, 2), "3": dek("a", P, 3), "4": dek("b", P, 4)})
    into = draft(shared)
    assert changes.activate(into, ["3", "4", "1", "unknown"]) == ["3", "4"]
    assert {key: body.state for key, body in into.shared.deks.items()} == {"1": D, "2": D, "3": A, "4": A}
    assert (into.shared.deks["1"].successor, into.shared.deks["3"].activated_at_ms) == ("3", NOW_MS)
    again = draft(into.shared)
    assert changes.activate(again, ["3", "4"]) == []
    assert again.changed == {}


def test_of_two_keys_for_one_place_only_one_is_active_in_the_end() -> None:
    into = draft(view({"1": dek("a", A, 1), "2": dek("a", P, 2), "3": dek("a", P, 3)}))
    changes.activate(into, ["2", "3"])
    assert [key for key, body in into.shared.deks.items() if body.state is A] == ["3"]


def test_a_successor_is_named_by_a_key_that_was_taken_away() -> None:
    taken = dek("a", KeyState.COMPROMISED, 1)
    into = draft(view({"1": taken, "2": dek("a", P, 2, predecessor="1")}))
    changes.activate(into, ["2"])
    assert into.shared.deks["1"].successor == "2"
    assert into.shared.deks["1"].state is KeyState.COMPROMISED


def test_a_key_waits_for_everybody_who_counts_and_for_nobody_else() -> None:
    shared = view({"1": dek("a", P, 1)}, a=E.ACTIVE, b=E.DRAINING, c=E.HEALING, d=E.JOINING)
    everywhere: dict[str, set[str]] = {"a": {"1"}, "b": {"1"}}
    answers: dict[str, dict[str, str]] = {"a": {}, "b": {}}
    assert changes.ready(shared, answers, everywhere) == (["1"], {})
    for name in "ab":
        left = {other: found for other, found in answers.items() if other != name}
        assert changes.ready(shared, left, everywhere) == ([], {"1": {name: "it does not answer"}})
        unproven = everywhere | {name: set()}
        assert changes.ready(shared, answers, unproven) == ([], {"1": {name: "its wrap"}})
        waits = answers | {name: {"1": "proxies p"}}
        assert changes.ready(shared, waits, everywhere) == ([], {"1": {name: "proxies p"}})
    alone = view({"1": dek("a", P, 1)}, a=E.HEALING)
    assert changes.ready(alone, {}, {})[0] == []  # nobody counts: nothing becomes active


def test_with_too_few_wraps_no_key_becomes_active() -> None:
    shared = view({"1": dek("a", P, 1)}, a=E.ACTIVE, b=E.HEALING)
    assert shared.tenant is not None
    strict = Shared(
        **{
            name: getattr(shared, name)
            for name in ("term", "epoch", "environments", "services", "rings", "deks")
        },
        tenant=msgspec.structs.replace(shared.tenant, min_wraps=2),
    )
    may, held = changes.ready(strict, {"a": {}}, {"a": {"1"}})
    assert (may, list(held["1"])) == ([], ["*"])
    assert changes.ready(strict, {"a": {}}, {"a": {"1"}, "b": {"1"}}) == (["1"], {})


def test_due_keys_are_old_active_and_owned_by_who_serves() -> None:
    old = {"activated_at_ms": NOW_MS - 2 * DAY_MS}
    shared = view(
        {
            "1": dek("a", A, 1, activated_at_ms=NOW_MS - 3 * DAY_MS),
            "2": dek("b", A, 2, activated_at_ms=NOW_MS),
            "3": dek("c", A, 3, **old),
            "4": dek("c", P, 4),
            "5": dek("d", A, 5, **old),
            "6": dek("e", A, 6, **old),
        },
        a=E.ACTIVE, b=E.ACTIVE, c=E.ACTIVE, d=E.HEALING, e=E.DRAINING,
    )  # fmt: skip
    due = changes.due_keys(shared, default_days=1, now_ms=NOW_MS, limit=9)
    assert [one.predecessor for one in due] == ["1", "6"]
    assert len(changes.due_keys(shared, default_days=1, now_ms=NOW_MS, limit=1)) == 1
    assert changes.due_keys(shared, default_days=0, now_ms=NOW_MS, limit=9) == []
    never = draft(shared)
    changes.set_rotate_after(never, FILES, 0)
    assert changes.due_keys(never.shared, default_days=1, now_ms=NOW_MS, limit=9) == []


def test_the_next_keys_follow_the_newest_of_each_place() -> None:
    shared = view({"1": dek("a", D, 1), "2": dek("a", KeyState.COMPROMISED, 2), "3": dek("b", P, 3)})
    found = changes.next_keys(shared)
    assert [(one.owner_environment, one.predecessor) for one in found] == [("a", "2"), ("c", None)]
    assert changes.next_keys(shared, services={"acme/mail"}) == []
    assert changes.next_keys(shared, use=KeyUse.SIGN) == []


@pytest.mark.parametrize(("old", "new"), list(itertools.product(KeyState, KeyState)))
def test_a_command_changes_a_key_as_the_table_says_and_destroys_none_that_sealed(
    old: KeyState, new: KeyState
) -> None:
    into = draft(view({"1": dek("a", old, 1)}))
    allowed = old is new or (
        new in TRANSITIONS[old] and (new is not KeyState.DESTROYED or old is KeyState.PRE_ACTIVE)
    )
    if not allowed:
        with pytest.raises(RefusedChangeError):
            changes.change_key(into, "1", new, "why")
        return
    assert changes.change_key(into, "1", new, "why") is old
    assert into.shared.deks["1"].state is new
    if new is KeyState.SUSPENDED is not old:
        assert changes.resume_key(into, "1") is old


def test_what_an_incident_has_suspended_no_command_resumes() -> None:
    into = draft(view({"1": dek("a", KeyState.SUSPENDED, 1, incident_id="inc-1", suspended_from=A)}))
    with pytest.raises(RefusedChangeError, match="inc-1"):
        changes.resume_key(into, "1")


def test_a_ring_keeps_its_algorithm() -> None:
    into = draft(view({}))
    assert changes.put_ring(into, FILES, KeyUse.DATA, None, new_id="cd" * 16) == RING
    made = changes.put_ring(into, FILES, KeyUse.SIGN, "ES256", new_id="cd" * 16)
    assert into.shared.rings[made].algorithm == "ES256"
    with pytest.raises(RefusedChangeError):
        changes.put_ring(into, FILES, KeyUse.SIGN, "EdDSA", new_id="ef" * 16)


def test_an_environment_enters_from_joining_and_from_draining_but_not_from_an_incident() -> None:
    for state in E:
        for incident in (None, "inc-1"):
            body = msgspec.structs.replace(environment("b", state), incident_id=incident)
            may = state is E.JOINING or (state is E.REJOINING and incident is None)
            assert changes.may_enter(body) is may
            shared = view({})
            into = draft(shared)
            into.put(Kind.ENVIRONMENT, "b", body)
            assert changes.enter(into, "b") is may
            assert (into.shared.environments["b"].state is E.ACTIVE) is (may or state is E.ACTIVE)
