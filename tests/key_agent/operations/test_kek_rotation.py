"""`kek rotate`: killed between any two steps, met by a revocation, or by keys that do not open.

(Real processes, a real HSM module and kill -9: test_kek_rotation_killed.py.)
"""

import asyncio
from typing import Any

import pytest
from sqlalchemy import update

from envelope.keys import KeyState, NetworkService
from key_agent.agent import Agent
from key_agent.consent import Standing
from key_agent.errors import KekRevokedError, KeySourceError
from key_agent.operations import kek_rotation
from key_agent.operations.operations import Operations
from key_agent.registry.states import TRANSITIONS, KekState
from key_agent.registry.store import RefusedChangeError
from key_agent.registry.tables import dek_wrap
from key_agent.sources.source import Diagnosis, Kek, Verdict
from tests.key_agent.conftest import RHYTHM, Bench, until
from tests.key_agent.test_crash import dies

S3, BOX = NetworkService("acme", "s3"), NetworkService("acme", "box")
MOST_STEPS = 35  # one more than the command has with two keys in two batches, and its test asserts so


def test_there_is_one_road_from_one_working_kek_to_the_next() -> None:
    assert TRANSITIONS[KekState.STAGED] == {KekState.ACTIVE, KekState.RETIRED}
    before_active = {state for state, after in TRANSITIONS.items() if KekState.ACTIVE in after}
    assert KekState.DEACTIVATED not in before_active
    assert KekState.RETIRED not in before_active


async def _provisioned(bench: Bench, agent: Agent, operations: Operations) -> Kek:
    await bench.provision(operations, "s3")
    await bench.provision(operations, "box")
    kek = agent.consent.kek
    assert kek is not None
    return kek


async def _states(agent: Agent) -> list[KekState]:
    return [row.state for row in await agent.registry.keks()]


async def test_the_keys_stay_and_nobody_notices(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        old = await _provisioned(bench, agent, operations)
        before = bench.proxy().valid_keys(S3)
        withdrawals = [claims for claims in bench.proxy().accepted if not claims.keys]
        result = await operations.kek_rotate()
        assert (result["replaced"], result["moved"], result["retired"]) == (old.reference.kek_id, 2, True)
        assert agent.consent.standing is Standing.CONSENTED
        assert agent.consent.kek is not None
        assert agent.consent.kek.reference.kek_id == result["kek"]
        assert await _states(agent) == [KekState.RETIRED, KekState.ACTIVE]
        assert len(bench.source.keks) == 1
        pushes = len(bench.proxy().accepted)
        agent.refresh.at_once()
        await until(lambda: len(bench.proxy().accepted) >= pushes + 2)
        assert bench.proxy().valid_keys(S3) == before
        assert [claims for claims in bench.proxy().accepted if not claims.keys] == withdrawals
        keys = await agent.registry.data_keys()
        assert [(key.state, key.wrapped_by) for key in keys] == [(KeyState.ACTIVE, (result["kek"],))] * 2
        # The watch looks at the new one.
        bench.source.destroy(agent.consent.kek)
        await bench.clock.advance(5)
        await until(lambda: not bench.proxy().valid_keys(S3))
    assert "succeeding" in bench.audit()


async def test_status_calls_nothing_withdrawn_because_of_a_rotation(bench: Bench) -> None:
    async def place() -> Any:
        status: Any = await operations.status()
        return status["services"][0]["proxies"][0]

    async with bench.agent() as (agent, operations):
        await _provisioned(bench, agent, operations)
        for _ in range(2):
            await bench.clock.advance(1)
            await operations.kek_rotate()
            assert (await place())["state"] == "valid"
        # What is taken back unheard stays so, whichever KEK follows.
        bench.proxy().down = True
        await operations.kek_revoke()
        await bench.clock.advance(1)
        await operations.reinstate()
        assert (await place())["state"] == "withdrawing"
        await bench.clock.advance(1)
        await operations.kek_rotate()
        assert (await place())["state"] == "withdrawing"


async def test_states_of_keys_move_along(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await _provisioned(bench, agent, operations)
        [first] = bench.proxy().valid_keys(S3)
        await operations.rotate(service="s3")
        await operations.key_suspend(service="s3", kid=first)
        before = {key.key_id: key.state for key in await agent.registry.data_keys()}
        await operations.kek_rotate()
        assert {key.key_id: key.state for key in await agent.registry.data_keys()} == before
        await operations.key_resume(service="s3", kid=first)
        assert len(bench.proxy().valid_keys(S3)) == 2


@pytest.mark.parametrize("fatal", range(MOST_STEPS))
async def test_killed_between_any_two_steps(
    bench: Bench, fatal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kek_rotation, "BATCH_SIZE", 1)
    async with bench.agent() as (agent, operations):
        await _provisioned(bench, agent, operations)
        held = {owner: bench.proxy().valid_keys(owner) for owner in (S3, BOX)}
    died_at = await dies(bench, fatal, lambda operations: operations.kek_rotate())
    assert (died_at is None) == (fatal == MOST_STEPS - 1), "every step is tried"
    bench.proxy().restart()
    async with bench.agent() as (agent, operations):
        # Whatever the moment: one KEK pushes, and every key opens under it.
        await until(lambda: {owner: bench.proxy().valid_keys(owner) for owner in (S3, BOX)} == held)
        result = await operations.kek_rotate()
        assert result["retired"]
        states = await _states(agent)
        assert states.count(KekState.ACTIVE) == 1
        assert set(states) == {KekState.ACTIVE, KekState.RETIRED}
        assert len(bench.source.keks) == 1, "one KEK in the HSM"
        keys = await agent.registry.data_keys()
        assert [key.wrapped_by for key in keys] == [(result["kek"],)] * 2
        pushes = len(bench.proxy().accepted)
        agent.refresh.at_once()
        await until(lambda: len(bench.proxy().accepted) >= pushes + 2)
        assert {owner: bench.proxy().valid_keys(owner) for owner in (S3, BOX)} == held


async def test_a_key_that_does_not_open_stops_it_before_anything_is_lost(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        old = await _provisioned(bench, agent, operations)
        bad = (await agent.registry.data_keys())[0]
        bench.source.spoil(bad.key_id)
        with pytest.raises(RefusedChangeError, match=f"1 keys do not open.*{bad.key_id}"):
            await operations.kek_rotate()
        assert await _states(agent) == [KekState.ACTIVE, KekState.STAGED]
        assert (await bench.source.diagnose(old)).verdict is Verdict.OK
        assert bench.proxy().valid_keys(S3)
        # What the message proposes.
        await operations.rotate(service=bad.owner.service)
        await operations.key_destroy(service=bad.owner.service, kid=str(bad.key_id), confirm=str(bad.key_id))
        assert (await operations.kek_rotate())["retired"]
        assert await _states(agent) == [KekState.RETIRED, KekState.ACTIVE]


async def test_a_wrap_damaged_in_the_registry_stops_it_too(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await _provisioned(bench, agent, operations)
        await agent.registry._database.transact(
            lambda c: c.execute(update(dek_wrap).values(wrapped=b"damaged"))
        )
        with pytest.raises(RefusedChangeError, match=r"2 keys do not open.*damaged in the registry"):
            await operations.kek_rotate()
        assert KekState.RETIRED not in await _states(agent)


async def test_an_old_kek_that_cannot_be_destroyed_is_said_and_finished_later(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await _provisioned(bench, agent, operations)
        bench.source.indestructible = True
        result = await operations.kek_rotate()
        assert not result["retired"]
        assert "not destroyed in the HSM" in str(result["problem"])
        assert await _states(agent) == [KekState.DEACTIVATED, KekState.ACTIVE]
        status: Any = await operations.kek_status()
        assert [row["rotated_to"] for row in status["older"]] == [result["kek"]]
        with pytest.raises(RefusedChangeError, match="nothing to restore"):
            await operations.reinstate(restore=True)
        bench.source.indestructible = False
        again = await operations.kek_rotate()
        assert (again["kek"], again["retired"]) == (result["kek"], True), "finished, and not begun anew"
        assert len(bench.source.keks) == 1


@pytest.mark.parametrize("at", ["create_kek", "rewrap", "destroy_kek"])
async def test_revoked_in_the_middle_both_keks_are_destroyed(bench: Bench, at: str) -> None:
    async with bench.agent() as (agent, operations):
        await _provisioned(bench, agent, operations)
        revoking: list[asyncio.Task[Any]] = []

        def revoke_at(call: str) -> None:
            if call == at and not revoking:
                revoking.append(asyncio.create_task(operations.kek_revoke()))
                agent.consent.revoke("by the administrator, in this very moment")

        bench.source.on_call = revoke_at
        if at == "destroy_kek":
            await operations.kek_rotate()
        else:
            with pytest.raises((RefusedChangeError, KeySourceError)):
                await operations.kek_rotate()
        result = await revoking[0]
        assert result["destroyed"], result
        assert bench.source.keks == {}, "no KEK is left that opens the keys"
        await until(lambda: not bench.proxy().valid_keys(S3))
        bench.source.on_call = None
        await operations.reinstate()
        await until(lambda: len(bench.proxy().valid_keys(S3)) == 1)
        assert (await operations.kek_rotate())["moved"] == 2


async def test_a_kek_destroyed_by_other_hands_in_the_middle(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        old = await _provisioned(bench, agent, operations)

        def destroy_at(call: str) -> None:
            if call == "rewrap":
                bench.source.on_call = None
                bench.source.destroy(old)

        bench.source.on_call = destroy_at
        with pytest.raises(KekRevokedError):
            await operations.kek_rotate()
        await bench.clock.advance(5)
        await until(lambda: not bench.proxy().valid_keys(S3))
        with pytest.raises(RefusedChangeError, match="only one that works"):
            await operations.kek_rotate()
        await operations.reinstate()
        assert len(bench.source.keks) == 1, "the staged one is gone"
        await until(lambda: bench.proxy().valid_keys(S3))
        # It returns after all: its keys can still be had.
        bench.source.bring_back(old)
        await operations.reinstate(restore=True)
        await until(lambda: len(bench.proxy().valid_keys(S3)) == 2)


@pytest.mark.parametrize("by", ["proof", "command"])
async def test_a_revocation_while_the_keks_change_places_holds_for_the_new_one(
    bench: Bench, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench.agent() as (agent, operations):
        old = await _provisioned(bench, agent, operations)
        succeed = agent.registry.succeed_kek

        async def after_the_last_look(new_kek_id: str, *, now_ms: int) -> int:
            if by == "proof":
                agent.consent.observe(old, Diagnosis(Verdict.KEK_DISABLED, "in the HSM, in this moment"))
            else:
                agent.consent.revoke("by the administrator, in this moment")
            return await succeed(new_kek_id, now_ms=now_ms)

        monkeypatch.setattr(agent.registry, "succeed_kek", after_the_last_look)
        with pytest.raises(RefusedChangeError):
            await operations.kek_rotate()
        await until(lambda: not bench.proxy().valid_keys(S3))
        await bench.clock.advance(RHYTHM.interval_s)
        assert agent.consent.standing is Standing.REVOKED
        assert not bench.proxy().valid_keys(S3), "no key was pushed again"
        await until(lambda: agent._to_persist is None)
    async with bench.agent() as (agent, operations):
        assert agent.consent.standing is Standing.REVOKED, "in the agent's next life, too"
        # What is under the new KEK is not lost: it is back as soon as an administrator says so.
        await operations.reinstate(restore=True)
        await until(lambda: bench.proxy().valid_keys(S3))


async def test_an_outage_stops_it_and_it_goes_on_afterwards(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await _provisioned(bench, agent, operations)

        def fail_at(call: str) -> None:
            if call == "rewrap":
                bench.source.fail(Verdict.UNREACHABLE)

        bench.source.on_call = fail_at
        with pytest.raises(KeySourceError):
            await operations.kek_rotate()
        bench.source.on_call = None
        bench.source.recover()
        assert (await operations.kek_rotate())["retired"]
        assert await _states(agent) == [KekState.RETIRED, KekState.ACTIVE]


async def test_there_must_be_one_that_works(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        with pytest.raises(RefusedChangeError, match="no KEK yet"):
            await operations.kek_rotate()
        await _provisioned(bench, agent, operations)
        await operations.kek_revoke()
        with pytest.raises(RefusedChangeError, match="only one that works"):
            await operations.kek_rotate()
