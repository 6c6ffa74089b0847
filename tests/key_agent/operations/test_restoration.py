"""A KEK that had been replaced comes back: what its keys sealed opens again, and nothing new is sealed so.

(With a real HSM and a real agent process: test_agent_softhsm.py.)
"""

import asyncio
import json
from typing import Any

import pytest

from envelope.keys import KeyState, NetworkService
from key_agent.agent import Agent
from key_agent.command_line.reinstating_cli import restorable_text, restored_text
from key_agent.errors import KekRevokedError, KeySourceError
from key_agent.operations import restoration
from key_agent.operations.operations import Operations
from key_agent.registry.states import KekState
from key_agent.registry.store import RefusedChangeError
from key_agent.sources.source import Kek, Verdict
from runtime.audit import AuditUnavailableError
from tests.key_agent.conftest import Bench, until

S3, BOX = NetworkService("acme", "s3"), NetworkService("acme", "box")


def _current(agent: Agent) -> Kek:
    assert agent.consent.kek is not None
    return agent.consent.kek


def _rows(value: object) -> list[dict[str, Any]]:
    assert isinstance(value, list)
    return value


def _pushed(bench: Bench, owner: NetworkService, proxy: str = "p1") -> dict[str, KeyState]:
    """What the proxy holds."""
    return {str(key.key_id): key.state for key in bench.proxy(proxy).held[owner].claims.keys}


async def _replaced(bench: Bench, agent: Agent, operations: Operations) -> tuple[Kek, dict[str, bytes]]:
    """s3 and box, their KEK destroyed and replaced; the old KEK, and the old keys' kcv by key id."""
    await bench.provision(operations, "s3")
    await bench.provision(operations, "box")
    old = _current(agent)
    kcvs = {str(key.key_id): key.kcv for key in await agent.registry.data_keys()}
    bench.source.destroy(old)
    await bench.clock.advance(5)
    await until(lambda: not bench.proxy().valid_keys(S3))
    await _state(agent, KekState.REVOKED)
    await operations.reinstate()
    return old, kcvs


async def _state(agent: Agent, state: KekState) -> None:
    async with asyncio.timeout(60):
        while (row := await agent.registry.current_kek()) is None or row.state is not state:  # noqa: ASYNC110 - the state of a database
            await asyncio.sleep(0.002)


def _actions(bench: Bench) -> list[tuple[str, str]]:
    events = [json.loads(line) for line in bench.audit().splitlines()]
    return [(event["action"], event["outcome"]) for event in events]


async def test_old_keys_come_back_to_open_and_new_ones_go_on_sealing(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        old, kcvs = await _replaced(bench, agent, operations)
        [new] = bench.proxy().valid_keys(S3)
        bench.source.bring_back(old)
        plan = await operations.restorable()
        result = await operations.reinstate(restore=True)
        [one] = _rows(result["earlier"])
        assert (one["kek"], one["moved"], one["failed"]) == (old.reference.kek_id, 2, {})
        assert one["services"] == [{"service": "acme/box", "keys": 1}, {"service": "acme/s3", "keys": 1}]
        [delivery] = _rows(result["proxies"])
        assert delivery["outcome"] == "accepted"

        held = _pushed(bench, S3)
        [returned] = held.keys() - {new}
        assert held == {new: KeyState.ACTIVE, returned: KeyState.DEACTIVATED}
        assert returned in kcvs
        kcv_now = {str(key.key_id): key.kcv for key in await agent.registry.data_keys()}
        assert kcv_now.items() >= kcvs.items()
        status = await operations.status()
        assert [(row["keys"], row["unreadable_keys"]) for row in _rows(status["services"])] == [(2, 0)] * 2

        # What was said beforehand is what was done.
        text = restorable_text(plan)
        for part in (
            f"KEK {old.reference.kek_id} is back",
            "acme/s3 (1 key)",
            "acme/box (1 key)",
            "destroyed",
        ):
            assert part in text
        assert "acme/s3: open again: 1 key" in restored_text(result)


async def test_the_old_kek_is_needed_no_more_and_gone(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        old, _ = await _replaced(bench, agent, operations)
        bench.source.bring_back(old)
        await operations.reinstate(restore=True)
        assert list(bench.source.keks) == [
            (_current(agent).reference.label, _current(agent).reference.object_id)
        ]
        assert [row.state for row in await agent.registry.keks()] == [KekState.RETIRED, KekState.ACTIVE]
        accepted = len(bench.proxy().accepted)
        await bench.clock.advance(300)
        await until(lambda: len(bench.proxy().accepted) >= accepted + 2)
        assert len(_pushed(bench, S3)) == 2
        # The kill switch takes them all.
        await operations.kek_revoke()
        assert not bench.proxy().valid_keys(S3)
        assert not bench.source.keks
    actions = _actions(bench)
    order = [("kek-restore", "begun"), ("kek-restore", "ok"), ("kek-retire", "begun"), ("kek-retire", "ok")]
    assert [action for action in actions if action in order] == order


async def test_nothing_happens_without_proof(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        old, _ = await _replaced(bench, agent, operations)
        for verdict in (Verdict.KEK_DESTROYED, Verdict.KEK_REPLACED, Verdict.KEK_DISABLED):
            if verdict is Verdict.KEK_REPLACED:
                bench.source.replace(old)
            elif verdict is Verdict.KEK_DISABLED:
                bench.source.bring_back(old)
                bench.source.disable(old)
            for attempt in (operations.restorable(), operations.reinstate(restore=True)):
                with pytest.raises(RefusedChangeError, match=f"not back: {verdict}"):
                    await attempt
        assert await agent.registry.wraps_under(old.reference.kek_id) == 2
        assert len(_pushed(bench, S3)) == 1
        bench.source.disable(old, enabled=True)
        await operations.reinstate(restore=True)
        assert len(_pushed(bench, S3)) == 2
        for attempt in (operations.restorable(), operations.reinstate(restore=True)):
            with pytest.raises(RefusedChangeError, match="nothing to restore"):
                await attempt


async def test_no_key_goes_to_a_kek_that_is_not_proven(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        old, _ = await _replaced(bench, agent, operations)
        bench.source.bring_back(old)
        bench.source.fail(Verdict.UNREACHABLE)
        with pytest.raises(KeySourceError):
            await operations.reinstate(restore=True)
        bench.source.recover()
        bench.source.disable(_current(agent))
        with pytest.raises(KekRevokedError):
            await operations.reinstate(restore=True)
        assert await agent.registry.wraps_under(old.reference.kek_id) == 2
        # That look at it was a proof like any other.
        await until(lambda: not bench.proxy().valid_keys(S3))


async def test_a_key_that_does_not_open_stays_and_keeps_its_kek(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        old, _ = await _replaced(bench, agent, operations)
        [bad] = [
            key.key_id
            for key in await agent.registry.data_keys()
            if key.owner == S3 and old.reference.kek_id in key.wrapped_by
        ]
        bench.source.spoil(bad)
        bench.source.bring_back(old)
        result = await operations.reinstate(restore=True)
        [one] = _rows(result["earlier"])
        assert (one["moved"], list(one["failed"]), one["retired"]) == (1, [str(bad)], False)
        assert f"{bad} does not open" in restored_text(result)
        assert len(_pushed(bench, BOX)) == 2
        assert len(_pushed(bench, S3)) == 1
        assert (await bench.source.diagnose(old)).verdict is Verdict.OK
        assert [row.state for row in await agent.registry.keks()] == [KekState.DEACTIVATED, KekState.ACTIVE]
        bench.source.unspoil(bad)
        await operations.reinstate(restore=True)
        assert len(_pushed(bench, S3)) == 2
    assert ("kek-restore", "partial") in _actions(bench)


async def test_an_old_kek_that_cannot_be_destroyed_is_said_and_finished_later(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        old, _ = await _replaced(bench, agent, operations)
        bench.source.bring_back(old)
        bench.source.indestructible = True
        result = await operations.reinstate(restore=True)
        [one] = _rows(result["earlier"])
        assert one["moved"] == 2
        assert not one["retired"]
        assert "STILL in the HSM" in restored_text(result)
        assert len(_pushed(bench, S3)) == 2
        bench.source.indestructible = False
        assert "Nothing is wrapped by KEK" in restorable_text(await operations.restorable())
        [one] = _rows((await operations.reinstate(restore=True))["earlier"])
        assert (one["moved"], one["retired"]) == (0, True)
        assert (await bench.source.diagnose(old)).verdict is Verdict.KEK_DESTROYED


async def test_several_earlier_keks_each_for_itself(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        first, _ = await _replaced(bench, agent, operations)
        second = _current(agent)
        await operations.kek_revoke()
        await operations.reinstate()
        bench.source.bring_back(second)
        result = await operations.reinstate(restore=True)
        found = {one["kek"]: one for one in _rows(result["earlier"])}
        assert found[second.reference.kek_id]["moved"] == 2
        assert not found[first.reference.kek_id]["back"]
        assert "kek_destroyed" in found[first.reference.kek_id]["problem"]
        assert sorted(_pushed(bench, S3).values()) == [KeyState.ACTIVE, KeyState.DEACTIVATED]
        bench.source.bring_back(first)
        await operations.reinstate(restore=True)
        assert sorted(_pushed(bench, S3).values()) == [KeyState.ACTIVE, *[KeyState.DEACTIVATED] * 2]


async def test_todays_kek_and_an_earlier_one_come_back_together(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        first, _ = await _replaced(bench, agent, operations)
        second = _current(agent)
        await operations.kek_revoke()
        bench.source.bring_back(first)
        with pytest.raises(RefusedChangeError, match=f"{second.reference.kek_id} is not back"):
            await operations.reinstate(restore=True)
        bench.source.bring_back(second)
        text = restorable_text(await operations.restorable())
        assert f"KEK {second.reference.kek_id} will be trusted again" in text
        result = await operations.reinstate(restore=True)
        assert result["restored"]
        assert sorted(_pushed(bench, S3).values()) == [KeyState.ACTIVE, KeyState.DEACTIVATED]


async def test_an_erased_service_stays_erased(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        old, _ = await _replaced(bench, agent, operations)
        await operations.service_remove(service="s3")
        bench.source.bring_back(old)
        [one] = _rows((await operations.reinstate(restore=True))["earlier"])
        assert one["services"] == [{"service": "acme/box", "keys": 1}]
        assert one["retired"]


async def test_without_an_audit_log_nothing_is_restored(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        old, _ = await _replaced(bench, agent, operations)
        bench.source.bring_back(old)
        (bench.directory / "audit.jsonl").unlink()
        with pytest.raises(AuditUnavailableError):
            await operations.reinstate(restore=True)
        assert await agent.registry.wraps_under(old.reference.kek_id) == 2
        assert "rewrap" not in bench.source.calls


async def test_a_revocation_in_the_middle_stops_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restoration, "BATCH_SIZE", 1)
    async with bench.agent() as (agent, operations):
        old, _ = await _replaced(bench, agent, operations)
        bench.source.bring_back(old)

        def revoke_at(call: str) -> None:
            if call == "rewrap":
                agent.consent.revoke("by somebody else, meanwhile")

        bench.source.on_call = revoke_at
        with pytest.raises(RefusedChangeError):
            await operations.reinstate(restore=True)
        assert bench.source.calls.count("rewrap") == 1
        await until(lambda: not bench.proxy().valid_keys(S3))
    assert ("kek-restore", "failed") in _actions(bench)
