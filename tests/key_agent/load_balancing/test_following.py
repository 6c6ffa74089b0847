"""How long a companion goes on with the rows it has: while enough environments say that they are of now."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from envelope.errors import FormatError, IntegrityError
from envelope.keys import KeyState
from key_agent.environments.shared.documents import Delta, EnvironmentBody, Kind, TermBody, sign_head
from key_agent.environments.shared.terms import term_id
from key_agent.environments.states import EnvironmentState
from key_agent.load_balancing.following import NEVER_S, Follower
from tests.key_agent.environments.forger import Forger
from tests.key_agent.environments.registries import ADMINS, KID, NOW_MS, TENANT, Holder, key, registry_of


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[list[Holder]]:
    """a is the manager; b and c know what it has written."""
    async with AsyncExitStack() as stack:
        a, b, c = [await stack.enter_async_context(registry_of(tmp_path, name)) for name in "abc"]
        await a.write(*a.first_rows())
        await a.write((Kind.ENVIRONMENT, "b", b.environment()), (Kind.ENVIRONMENT, "c", c.environment()))
        for one in (b, c):
            one.shared.pin("agent-a", a.public)
            await one.take(await a.shared.since(0))
        yield [a, b, c]


@pytest.fixture
async def rows(three: list[Holder]) -> tuple[Holder, Delta]:
    """The manager a, and the rows of a, b and c."""
    return three[0], await three[0].shared.since(0)


def follower(a: Holder, names: str = "abc") -> Follower:
    return Follower(TENANT, agents=[f"agent-{name}" for name in names], manager=("agent-a", a.public))


async def test_one_agent_alone_keeps_nothing_alive(rows: tuple[Holder, Delta]) -> None:
    """Cut off from the others, a companion would believe one that keeps a withdrawal to itself."""
    a, delta = rows
    found = follower(a)
    assert (found.heard_boot_s(), found.proven_boot_s()) == (NEVER_S, NEVER_S)
    found.take(delta, agent="agent-a", asked_boot_s=10)
    assert found.proven_boot_s() == NEVER_S
    found.take(delta, agent="agent-b", asked_boot_s=20)
    assert found.proven_boot_s() == 10
    for asked_boot_s in (100, 200, 300):
        found.take(delta, agent="agent-b", asked_boot_s=asked_boot_s)
    assert (found.heard_boot_s(), found.proven_boot_s()) == (300, 10)
    found.take(delta, agent="agent-c", asked_boot_s=290)
    assert found.proven_boot_s() == 290
    assert found.lease_s == 300


async def test_of_two_the_managers_is_enough_and_the_other_is_not(rows: tuple[Holder, Delta]) -> None:
    a, delta = rows
    found = follower(a, "ab")
    found.take(delta, agent="agent-b", asked_boot_s=10)
    assert found.proven_boot_s() == NEVER_S
    found.take(delta, agent="agent-a", asked_boot_s=20)
    assert found.proven_boot_s() == 20
    found.take(delta, agent="agent-b", asked_boot_s=30)
    assert found.proven_boot_s() == 20


async def test_a_withdrawn_environments_word_is_not_counted(rows: tuple[Holder, Delta]) -> None:
    a, delta = rows
    found = follower(a)
    found.take(delta, agent="agent-a", asked_boot_s=1)
    body = (await a.shared.snapshot()).environments["c"]
    healing = await a.write((Kind.ENVIRONMENT, "c", _healing(body)))
    found.take(healing, agent="agent-a", asked_boot_s=10)
    found.take(healing, agent="agent-c", asked_boot_s=50)
    assert found.proven_boot_s() == 10  # half of the two that count, the manager's
    assert found.states()["c"] is EnvironmentState.HEALING


async def test_who_answers_with_older_rows_has_not_been_heard(rows: tuple[Holder, Delta]) -> None:
    a, delta = rows
    found = follower(a)
    body = (await a.shared.snapshot()).environments["c"]
    await a.write((Kind.ENVIRONMENT, "c", _healing(body)))
    found.take(await a.shared.since(0), agent="agent-a", asked_boot_s=10)
    assert not found.take(delta, agent="agent-b", asked_boot_s=50)
    assert found.heard_boot_s() == 10


async def test_of_two_promotions_in_a_split_the_one_that_holds_is_followed_though_it_is_shorter(
    three: list[Holder],
) -> None:
    a, b, c = three
    old = await a.shared.since(0)
    for holder, at_ms in ((b, NOW_MS), (c, NOW_MS + 1)):
        signed = ADMINS.promotion(holder, await holder.shared.snapshot(), at_ms=at_ms)
        await holder.shared.begin_term(2, cause="-", now_ms=NOW_MS + 2, approval=signed)
    longer = [
        await b.write((Kind.DEK, KID, key("a", KeyState.COMPROMISED, since_ms=NOW_MS + number)), term=2)
        for number in range(3)
    ]
    theirs, ours = await b.shared.since(0), await c.shared.since(0)
    found = follower(a)
    found.take(old, agent="agent-a", asked_boot_s=1)
    assert found.take(theirs, agent="agent-b", asked_boot_s=2)
    kept = found.anchor()
    assert ours.epoch_to < found.epoch
    # What is only late, of this history or the term before, is no reason to ask for more.
    for late in (old, longer[0], await a.shared.since(found.needs())):
        assert not found.take(late, agent="agent-a", asked_boot_s=3)
    with pytest.raises(FormatError, match="another history"):
        found.take(await c.shared.since(found.needs()), agent="agent-c", asked_boot_s=4)
    assert found.take(ours, agent="agent-c", asked_boot_s=5)
    assert found.position == (2, ours.epoch_to)
    assert found.anchor() != kept  # the next life begins with it
    for again in (theirs, await b.shared.since(found.needs())):
        with pytest.raises(IntegrityError):
            found.take(again, agent="agent-b", asked_boot_s=6)
    for one in (a, b):
        await one.take(ours)
        found.take(await one.shared.since(found.needs()), agent=f"agent-{one.name}", asked_boot_s=7)
    assert found.proven_boot_s() == 7


async def test_nothing_older_is_taken_as_another_history(three: list[Holder]) -> None:
    """What a breached agent can make of the rows that it has seen, with its key."""
    a, b, _ = three
    old = await a.shared.since(0)
    await a.write((Kind.DEK, KID, key("a", KeyState.COMPROMISED)))
    found = follower(a)
    found.take(await a.shared.since(0), agent="agent-a", asked_boot_s=1)
    before = found.position
    by_itself = sign_head(b.key, tenant=TENANT, term=1, epoch=old.epoch_to, digest=old.digest)
    forger = Forger(b, old)
    forger.put(Kind.TERM, term_id(1), _first_term(b), epoch=1)
    for forged in (msgspec.structs.replace(old, signature=by_itself.signature), forger.delta()):
        with pytest.raises(IntegrityError):
            found.take(forged, agent="agent-b", asked_boot_s=2)
    assert found.position == before


def _first_term(holder: Holder) -> TermBody:
    return TermBody(
        agent=f"agent-{holder.name}",
        environment=holder.name,
        registry_key=holder.public,
        since_ms=NOW_MS,
        cause="env init",
    )


def _healing(body: EnvironmentBody) -> EnvironmentBody:
    return msgspec.structs.replace(body, state=EnvironmentState.HEALING)
