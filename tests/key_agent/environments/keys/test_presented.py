"""Which key seals in which environment."""

import msgspec
import pytest

from envelope.keys import KeyState, KeyUse
from key_agent.environments.keys.presented import present, rescued
from key_agent.environments.shared.documents import EncryptPolicy, ServiceBody, TenantBody
from key_agent.environments.shared.shared_view import Shared
from key_agent.registry.model import HeldKey
from tests.key_agent.environments.rows import World

A, B, C = KeyState.ACTIVE, KeyState.DEACTIVATED, KeyState.COMPROMISED
SERVICE = "acme/files"


def held(key_id: str, owner: str, state: KeyState = KeyState.ACTIVE, *, ring: str = "r") -> HeldKey:
    return HeldKey(key_id=key_id, ring=ring, owner_environment=owner, state=state)


def view(**service: object) -> Shared:
    body = msgspec.structs.replace(ServiceBody(), **service)
    return Shared(tenant=TenantBody(home_environment="c"), services={SERVICE: body})


KEYS = (held("1", "a"), held("2", "b"), held("3", "c"))


@pytest.mark.parametrize("environment", ["a", "b", "c"])
def test_own_is_the_environments_own_key(environment: str) -> None:
    states = present(view(), environment, SERVICE, KEYS)
    (sealing,) = (key for key, state in states.items() if state is A)
    assert sealing == {"a": "1", "b": "2", "c": "3"}[environment]
    assert sorted(states.values()) == [A, B, B]


def test_origin_is_the_home_environments_key_everywhere() -> None:
    shared = view(encrypt_policy=EncryptPolicy.ORIGIN)
    assert {present(shared, one, SERVICE, KEYS)["3"] for one in "abc"} == {A}
    shared = view(encrypt_policy=EncryptPolicy.ORIGIN, home_environment="b")
    assert {present(shared, one, SERVICE, KEYS)["2"] for one in "abc"} == {A}


def test_pinned_is_that_key_while_it_is_active_and_of_that_ring_alone() -> None:
    shared = view(encrypt_policy=EncryptPolicy.PINNED, pinned_dek="1")
    assert [present(shared, one, SERVICE, KEYS)["1"] for one in "abc"] == [A, A, A]
    signing = [held("8", "a", ring="s"), held("9", "b", ring="s")]
    states = present(shared, "b", SERVICE, [*KEYS, *signing])
    assert {key for key, state in states.items() if state is A} == {"1", "9"}
    gone = (held("1", "a", C), *KEYS[1:])
    assert present(shared, "b", SERVICE, gone) == {"1": C, "2": A, "3": B}


def test_where_the_own_key_was_taken_away_another_environments_seals() -> None:
    lost = (KEYS[0], held("2", "b", C), KEYS[2])
    assert present(view(), "b", SERVICE, lost) == {"1": B, "2": C, "3": A}  # the tenant's home is c
    lost = (KEYS[0], held("2", "b", C), held("3", "c", KeyState.SUSPENDED))
    assert present(view(), "b", SERVICE, lost) == {"1": A, "2": C, "3": KeyState.SUSPENDED}


@pytest.mark.parametrize("state", [state for state in KeyState if state is not KeyState.ACTIVE])
def test_no_key_is_presented_with_more_than_it_has(state: KeyState) -> None:
    keys = [held("1", "a", state), held("2", "b", state)]
    for environment in "ab":
        assert present(view(), environment, SERVICE, keys) == {"1": state, "2": state}


def test_one_environment_alone_is_as_ever() -> None:
    assert present(Shared(), "a", SERVICE, [held("1", "a"), held("2", "a", B)]) == {"1": A, "2": B}


@pytest.mark.parametrize(("now_ms", "state"), [(99, KeyState.DEACTIVATED), (100, C), (101, C)])
def test_a_rescued_key_opens_until_that_ends_and_never_seals(now_ms: int, state: KeyState) -> None:
    world = World()
    rows, key_id = world.rows, world.dek["s3-a"]
    rows.deks[key_id] = msgspec.structs.replace(rows.deks[key_id], state=C, rescue_until_ms=100)
    other = world.dek["s3-b"]
    rows.deks[other] = msgspec.structs.replace(rows.deks[other], state=C)
    found = rescued(rows, {key_id: C, other: C, world.dek["s3-c"]: A}, now_ms=now_ms)
    assert found == {key_id: state, other: C, world.dek["s3-c"]: A}


def test_a_word_that_was_overruled_rescues_nothing() -> None:
    """A registry that holds a key for more restricted than the rows do is right."""
    world = World()
    rows, key_id = world.rows, world.dek["s3-a"]
    rows.deks[key_id] = msgspec.structs.replace(rows.deks[key_id], rescue_until_ms=100)
    assert rescued(rows, {key_id: C}, now_ms=1) == {key_id: C}


def test_a_signing_key_is_not_presented_as_rescued() -> None:
    """A row that says so was not written by a manager that is sound."""
    world = World()
    rows, key_id = world.rows, world.dek["s3-a"]
    rows.deks[key_id] = msgspec.structs.replace(
        rows.deks[key_id], state=C, use=KeyUse.SIGN, rescue_until_ms=100
    )
    assert rescued(rows, {key_id: C}, now_ms=1) == {key_id: C}
