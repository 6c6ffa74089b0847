"""How long a companion goes on with the rows it has: while enough environments say that they are of now."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from key_agent.environments.documents import Delta, EnvironmentBody, Kind
from key_agent.environments.states import EnvironmentState
from key_agent.load_balancing.following import NEVER_S, Follower
from tests.key_agent.environments.registries import TENANT, Holder, registry_of


@pytest.fixture
async def rows(tmp_path: Path) -> AsyncIterator[tuple[Holder, Delta]]:
    """The manager a, and the rows of a, b and c."""
    async with AsyncExitStack() as stack:
        a, b, c = [await stack.enter_async_context(registry_of(tmp_path, name)) for name in "abc"]
        await a.write(*a.first_rows())
        await a.write((Kind.ENVIRONMENT, "b", b.environment()), (Kind.ENVIRONMENT, "c", c.environment()))
        yield a, await a.shared.since(0)


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


def _healing(body: EnvironmentBody) -> EnvironmentBody:
    return msgspec.structs.replace(body, state=EnvironmentState.HEALING)
