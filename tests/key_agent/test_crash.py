"""The agent dies between any two steps of a command; its next life finishes it, nothing acknowledged is lost.

A "step" is a call of the HSM or of the registry: the process ends just before it or just after it took
effect. (tests/key_agent/test_agent_softhsm.py does it to real processes, by kill -9, where chance strikes.)
"""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from envelope.keys import KeyState, NetworkService
from key_agent.operations import restoration
from key_agent.operations.operations import Operations
from key_agent.registry.states import KekState
from key_agent.registry.store import RefusedChangeError
from key_agent.sources.source import Verdict
from tests.fakes.proxies import pem
from tests.key_agent.conftest import Bench, until

S3, BOX = NetworkService("acme", "s3"), NetworkService("acme", "box")
MOST_STEPS = 21  # one more than the longest command has, and its test asserts so
MOST_RESTORING_STEPS = 27  # the same of `reinstate --restore`


class Crash(BaseException):
    """The process is gone. No `except Exception` stops it."""


class Mortal:
    """Stands before another object and ends the process at the *fatal*-th call."""

    def __init__(self, behind: Any, steps: "Steps") -> None:
        self._behind = behind
        self._steps = steps

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._behind, name)
        if not callable(member):
            return member

        async def call(*arguments: Any, **named: Any) -> Any:
            self._steps.one(name + " not begun")
            result = await member(*arguments, **named)
            self._steps.one(name + " done")
            return result

        return call


class Steps:
    def __init__(self, fatal: int) -> None:
        self._left = fatal
        self.died_at: str | None = None

    def one(self, name: str) -> None:
        self._left -= 1
        if self._left < 0:
            self.died_at = self.died_at or name
            raise Crash(name)


async def dies(
    bench: Bench, fatal: int, command: Callable[[Operations], Awaitable[object]], *, working: bool = False
) -> str | None:
    """Run *command* in one life that ends at the *fatal*-th step; the step, None if it came through."""
    steps = Steps(fatal)
    try:
        async with bench.agent(working=working) as (agent, operations):
            agent.registry = Mortal(agent.registry, steps)  # type: ignore[assignment]
            agent.source = Mortal(agent.source, steps)  # type: ignore[assignment]
            await command(operations)
    except* Crash:
        pass
    return steps.died_at


@pytest.mark.parametrize("fatal", range(MOST_STEPS))
async def test_kek_create(bench: Bench, fatal: int) -> None:
    died_at = await dies(bench, fatal, lambda operations: operations.kek_create())
    async with bench.agent() as (agent, operations):
        try:
            await operations.kek_create()
        except RefusedChangeError:
            assert died_at is None or "complete_kek" not in died_at or "done" in died_at
        assert len(bench.source.keks) == 1, "one KEK in the HSM, whenever it died"
        assert await bench.provision(operations) == S3
        assert bench.proxy().valid_keys(S3)
        assert [row.state for row in await agent.registry.keks()] == [KekState.ACTIVE]


@pytest.mark.parametrize("fatal", range(MOST_STEPS))
async def test_service_add(bench: Bench, fatal: int) -> None:
    async with bench.agent() as (_, operations):
        await operations.kek_create()
        ca = pem(bench.tenant.root.certificate)
        await operations.proxy_add(proxy="p1", url="https://p1.example:8443", ca_pem=ca)
    certificate = bench.host("s3")

    async def add(operations: Operations) -> object:
        return await operations.service_add(service="s3", proxy="p1", certificate_pem=certificate)

    await dies(bench, fatal, add)
    async with bench.agent() as (agent, operations):
        await add(operations)
        [key] = await agent.registry.data_keys()
        assert bench.proxy().valid_keys(S3) == [str(key.key_id)]


@pytest.mark.parametrize("fatal", range(MOST_STEPS))
async def test_reinstate(bench: Bench, fatal: int) -> None:
    async with bench.agent() as (_, operations):
        await bench.provision(operations)
        [old] = bench.proxy().valid_keys(S3)
        await operations.kek_revoke()
    died_at = await dies(bench, fatal, lambda operations: operations.reinstate())
    assert (died_at is None) == (fatal == MOST_STEPS - 1), "every step is tried"
    async with bench.agent() as (agent, operations):
        row = await agent.registry.current_kek()
        assert row is not None
        if row.state is not KekState.ACTIVE:
            assert not bench.proxy().valid_keys(S3)
            await operations.reinstate()
        await until(lambda: bench.proxy().valid_keys(S3))
        assert len(bench.source.keks) == 1
        states = [(str(key.key_id), key.state) for key in await agent.registry.data_keys()]
        assert states == [(old, KeyState.DEACTIVATED), (bench.proxy().valid_keys(S3)[0], KeyState.ACTIVE)]


@pytest.mark.parametrize("fatal", range(MOST_RESTORING_STEPS))
async def test_restore_of_a_kek_that_had_been_replaced(
    bench: Bench, fatal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two keys in two batches: at every moment each is under exactly one of the two KEKs."""
    monkeypatch.setattr(restoration, "BATCH_SIZE", 1)
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, "s3")
        await bench.provision(operations, "box")
        old = agent.consent.kek
        assert old is not None
        await operations.kek_revoke()
        await operations.reinstate()
    bench.source.bring_back(old)
    died_at = await dies(bench, fatal, lambda operations: operations.reinstate(restore=True))
    assert (died_at is None) == (fatal == MOST_RESTORING_STEPS - 1), "every step is tried"
    async with bench.agent() as (agent, operations):
        keys = await agent.registry.data_keys()
        assert [len(key.wrapped_by) for key in keys] == [1] * 4
        if any(old.reference.kek_id in key.wrapped_by for key in keys):
            assert (await bench.source.diagnose(old)).verdict is Verdict.OK, "the old KEK is still needed"
        try:
            await operations.reinstate(restore=True)
        except RefusedChangeError as error:
            assert "nothing to restore" in str(error)  # noqa: PT017 - it may have been done already
        await until(lambda: len(bench.proxy().valid_keys(S3)) == len(bench.proxy().valid_keys(BOX)) == 2)
        assert [row.state for row in await agent.registry.keks()] == [KekState.RETIRED, KekState.ACTIVE]
        assert len(bench.source.keks) == 1


@pytest.mark.parametrize("fatal", range(12))
async def test_kek_revoke(bench: Bench, fatal: int) -> None:
    """Once begun, it ends with the keys withdrawn, whichever step was the last of this life."""
    async with bench.agent() as (_, operations):
        await bench.provision(operations)
    died_at = await dies(bench, fatal, lambda operations: operations.kek_revoke(), working=True)
    async with bench.agent() as (_, operations):
        if died_at is not None and bench.source.keks:
            await operations.kek_revoke()
        await bench.clock.advance(5)
        await until(lambda: not bench.proxy().valid_keys(S3))
        assert bench.proxy().accepted[-1].keys == ()


@pytest.mark.parametrize("fatal", range(0, MOST_STEPS, 2))
async def test_a_proxy_never_holds_what_the_registry_does_not_know(bench: Bench, fatal: int) -> None:
    """The rule: COMMIT, then push."""
    async with bench.agent() as (_, operations):
        await operations.kek_create()
        ca = pem(bench.tenant.root.certificate)
        await operations.proxy_add(proxy="p1", url="https://p1.example:8443", ca_pem=ca)
    certificate = bench.host("s3")

    async def add_and_push(operations: Operations) -> None:
        await operations.service_add(service="s3", proxy="p1", certificate_pem=certificate)
        agent = operations._agent
        await agent.watch.look()
        await agent.pusher.push_keys(agent.targets.fed().values(), lambda _: None)

    await dies(bench, fatal, add_and_push)
    held = bench.proxy().held.get(S3)
    async with bench.agent(working=False) as (agent, _):
        known = {key.key_id for key in await agent.registry.data_keys()}
        sequences = (await agent.registry.book()).sequences
    if held is not None:
        assert {key.key_id for key in held.claims.keys} <= known
        assert held.claims.sequence <= sequences[S3]
