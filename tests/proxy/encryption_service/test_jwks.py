"""Key sets: what is one, when it is fetched, and how long it counts."""

import asyncio
import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.encryption_service.jwks import (
    MAX_AGE_S,
    MAX_KEYS,
    MAX_STALE_S,
    MIN_INTERVAL_S,
    KeySetError,
    KeySets,
    parse_key_set,
)
from proxy.encryption_service.tokens import KeysNeededError, KeysUnavailableError
from tests.fakes.clock import ManualClock
from tests.proxy.encryption_service.token_mint import Mint, Pages

URL = "https://idp.example/keys"
OLD = Mint("https://idp.example", "kacls")
NEW = Mint("https://idp.example", "kacls", number=2, kid="key-2")


def key_set(*keys: object) -> bytes:
    return json.dumps({"keys": keys}).encode()


def changed(**members: Any) -> dict[str, Any]:
    jwk = OLD.jwk() | members
    return {name: value for name, value in jwk.items() if value is not None}


def test_a_set_is_read() -> None:
    found = parse_key_set(
        key_set(OLD.jwk(), NEW.jwk(), changed(kid="x", use=None, alg=None, key_ops=["verify"]))
    )
    assert set(found) == {"key-1", "key-2", "x"}
    assert found["key-1"].as_dict()["n"] == OLD.jwk()["n"]
    assert parse_key_set(key_set()) == {}


@pytest.mark.parametrize(
    "members",
    [
        {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
        {"kty": "oct", "k": "c2VjcmV0"},
        {"use": "enc"},
        {"alg": "RS512"},
        {"alg": "HS256"},
        {"key_ops": ["encrypt"]},
        {"key_ops": "verify"},
        {"d": "AQ"},
        {"kid": None},
        {"kid": ""},
        {"kid": 1},
        {"kid": "k" * 300},
    ],
)
def test_keys_that_are_not_for_us_are_passed_over(members: dict[str, Any]) -> None:
    assert set(parse_key_set(key_set(changed(**members), NEW.jwk()))) == {"key-2"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"keys":{}}',
        b'{"keys":["x"]}',
        b'{"keys":[],"keys":[]}',
        b"[" * 100_000,
        b'{"keys":' + b"[" * 100_000,
        b"\xff\xfe",
        key_set(OLD.jwk(), OLD.jwk()),
        key_set(OLD.jwk(), changed(n=NEW.jwk()["n"])),
        key_set(*[{}] * (MAX_KEYS + 1)),
        key_set(changed(n=None)),
        key_set(changed(n="AQ")),
        key_set(changed(n="!")),
        key_set(changed(n="A" * 10_000)),
        key_set(changed(e="AQ")),  # 1: anything is its own signature
        key_set(changed(e="AAI")),  # even
        key_set(changed(e="A" * 100)),
    ],
)
def test_what_is_no_set_is_a_failed_fetch(body: bytes) -> None:
    with pytest.raises(KeySetError):
        parse_key_set(body)


@given(
    st.binary(max_size=200) | st.text(max_size=200).map(lambda text: json.dumps({"keys": [text]}).encode())
)
def test_whatever_comes_is_a_set_or_an_error(body: bytes) -> None:
    with contextlib.suppress(KeySetError):
        assert parse_key_set(body) == {}


class Held:
    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.pages = Pages()
        self.pages.bodies[URL] = OLD.key_set()
        self.sets = KeySets(self.pages.get, clock)

    async def found(self, kid: str) -> bool:
        """As the dialect does: fetch where that is asked for, then look again."""
        for _ in range(4):
            try:
                return self.sets.find(URL, kid) is not None
            except KeysNeededError as needed:
                await self.sets.refresh(needed.url, patient=needed.patient)
        raise AssertionError("it asks for ever")

    @property
    def fetches(self) -> int:
        return len(self.pages.asked)


@pytest.fixture
def held(clock: ManualClock) -> Held:
    return Held(clock)


async def test_a_set_is_fetched_once_and_kept(held: Held) -> None:
    for _ in range(5):
        assert await held.found("key-1")
    assert held.fetches == 1


async def test_an_unknown_key_is_looked_for_but_not_at_everyones_bidding(held: Held) -> None:
    assert await held.found("key-1")
    for number in range(100):
        assert not await held.found(f"invented-{number}")
    assert held.fetches == 1  # the first was just now
    held.clock.shift(MIN_INTERVAL_S)
    for number in range(100):
        assert not await held.found(f"invented-{number}")
    assert held.fetches == 2


async def test_a_new_key_counts_as_soon_as_it_is_used(held: Held) -> None:
    assert await held.found("key-1")
    held.clock.shift(MIN_INTERVAL_S)
    held.pages.bodies[URL] = key_set(OLD.jwk(), NEW.jwk())
    assert await held.found("key-2")
    assert held.fetches == 2


async def test_a_key_that_is_gone_ends_with_the_sets_age(held: Held) -> None:
    assert await held.found("key-1")
    held.pages.bodies[URL] = NEW.key_set()
    held.clock.shift(MAX_AGE_S - 1)
    assert await held.found("key-1")
    held.clock.shift(1)
    assert not await held.found("key-1")


async def test_a_failed_fetch_leaves_the_old_set_for_a_day(held: Held) -> None:
    assert await held.found("key-1")
    for broken in (b"<html>", None):
        if broken is None:
            del held.pages.bodies[URL]
        else:
            held.pages.bodies[URL] = broken
        held.clock.shift(MAX_AGE_S)
        before = held.fetches
        assert await held.found("key-1")
        assert await held.found("key-1")
        assert held.fetches == before + 1
    held.clock.shift(MAX_STALE_S - 2 * MAX_AGE_S)
    with pytest.raises(KeysUnavailableError):
        await held.found("key-1")
    held.pages.bodies[URL] = OLD.key_set()
    with pytest.raises(KeysUnavailableError):  # tried a moment ago
        await held.found("key-1")
    held.clock.shift(MIN_INTERVAL_S)
    assert await held.found("key-1")


async def test_those_who_wait_share_one_fetch(held: Held) -> None:
    go_on = asyncio.Event()
    held.pages.before = go_on.wait
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(held.found("key-1")) for _ in range(20)]
        await held.clock.settle()
        waiting[3].cancel()  # one client goes away
        await held.clock.settle()
        go_on.set()
    assert [task.result() for task in waiting if not task.cancelled()] == [True] * 19
    assert held.fetches == 1


async def test_a_token_by_a_new_key_joins_the_fetch_that_runs(held: Held) -> None:
    assert await held.found("key-1")
    held.clock.shift(MIN_INTERVAL_S)
    held.pages.bodies[URL] = key_set(OLD.jwk(), NEW.jwk())
    go_on = asyncio.Event()
    held.pages.before = go_on.wait
    async with asyncio.TaskGroup() as group:
        first = group.create_task(held.found("key-2"))
        second = group.create_task(held.found("key-2"))
        await held.clock.settle()
        assert await held.found("key-1")  # who has a key does not wait
        go_on.set()
    assert first.result()
    assert second.result()
    assert held.fetches == 2


async def test_who_has_an_old_key_does_not_wait_for_a_slow_issuer(held: Held) -> None:
    assert await held.found("key-1")
    held.clock.shift(MAX_AGE_S)
    never = asyncio.Event()
    held.pages.before = never.wait
    async with asyncio.timeout(5):
        assert await held.found("key-1")
        assert await held.found("key-1")
    assert held.fetches == 2
    await held.sets.aclose()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("jwks:")]
