"""Keys by command: each state reaches every proxy at once, and what destroys asks twice."""

from typing import Any

import pytest

from envelope.keys import KeyId, KeyState, NetworkService
from key_agent.command_line.key_cli import loss_text
from key_agent.operations.operations import Operations
from key_agent.registry.store import RefusedChangeError
from runtime.audit import AuditUnavailableError
from tests.fakes.proxies import FakeProxy
from tests.key_agent.conftest import Bench

S3 = NetworkService("acme", "s3")


def _states(proxy: FakeProxy) -> dict[str, KeyState]:
    """What the last push said of the keys of s3."""
    return {str(key.key_id): key.state for key in proxy.held[S3].claims.keys}


async def _provisioned(bench: Bench, operations: Operations) -> str:
    await bench.provision(operations, proxy="p1")
    await bench.provision(operations, proxy="p2")
    [kid] = bench.proxy("p1").valid_keys(S3)
    return kid


async def _keys(operations: Operations) -> dict[str, Any]:
    rows: Any = (await operations.key_list(service="s3"))["keys"]
    return {row["kid"]: row for row in rows}


async def test_suspend_and_resume_reach_every_proxy_before_the_command_returns(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        kid = await _provisioned(bench, operations)
        result: Any = await operations.key_suspend(service="s3", kid=kid, reason="looked at")
        assert (result["before"], result["state"], result["another_seals"]) == ("active", "suspended", False)
        assert [row["outcome"] for row in result["proxies"]] == ["accepted", "accepted"]
        assert _states(bench.proxy("p1")) == _states(bench.proxy("p2")) == {kid: KeyState.SUSPENDED}
        assert (await _keys(operations))[kid]["reason"] == "looked at"
        resumed: Any = await operations.key_resume(service="s3", kid=kid)
        assert (resumed["state"], resumed["another_seals"]) == ("active", True)
        assert _states(bench.proxy("p2")) == {kid: KeyState.ACTIVE}


async def test_a_dead_proxy_is_named(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        kid = await _provisioned(bench, operations)
        bench.proxy("p2").down = True
        result: Any = await operations.key_compromise(service="s3", kid=kid, reason="leaked")
        outcomes = {row["proxy"]: row["outcome"] for row in result["proxies"]}
        assert outcomes == {"p1": "accepted", "p2": "failed"}
        assert _states(bench.proxy("p1")) == {kid: KeyState.COMPROMISED}
        with pytest.raises(RefusedChangeError, match="from compromised"):
            await operations.key_suspend(service="s3", kid=kid)


async def test_after_a_compromise_rotate_makes_another_one_seal(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        kid = await _provisioned(bench, operations)
        await operations.key_compromise(service="s3", kid=kid)
        [row] = _rows((await operations.rotate(service="s3"))["rotations"])
        assert row["phase"] == "done"
        assert _states(bench.proxy("p2")) == {kid: KeyState.COMPROMISED, row["new_kid"]: KeyState.ACTIVE}


async def test_destroy_shows_the_loss_and_wants_the_name_twice(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        kid = await _provisioned(bench, operations)
        for call in (
            operations.key_loss(service="s3", kid=kid),
            operations.key_destroy(service="s3", kid=kid, confirm=kid),
        ):
            with pytest.raises(RefusedChangeError, match="only a deactivated or compromised"):
                await call
        await operations.rotate(service="s3")
        loss: Any = await operations.key_loss(service="s3", kid=kid)
        assert (loss["version"], loss["state"], loss["held_by"]) == (1, "deactivated", ["p1", "p2"])
        text = loss_text(loss)
        for word in (kid, "acme/s3", "version 1", "held by 2 proxies", "active from 2027-", "for ever"):
            assert word in text
        for wrong in ("", "yes", kid[:-1]):
            with pytest.raises(RefusedChangeError, match="not confirmed"):
                await operations.key_destroy(service="s3", kid=kid, confirm=wrong)
        await operations.key_destroy(service="s3", kid=kid, confirm=kid, reason="law")
        for name in ("p1", "p2"):
            assert _states(bench.proxy(name))[kid] is KeyState.DESTROYED
            assert all(
                not key.secret for key in bench.proxy(name).held[S3].claims.keys if str(key.key_id) == kid
            )
        row = (await _keys(operations))[kid]
        assert (row["state"], row["keks"], row["held_by"], row["reason"]) == ("destroyed", (), [], "law")
        assert await agent.registry.wrapped_keys(_kek_id(agent)) != []
    assert '"key-destroy"' in bench.audit()


async def test_the_last_keys_tombstone_travels_alone(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        kid = await _provisioned(bench, operations)
        await operations.key_deactivate(service="s3", kid=kid)
        await operations.key_destroy(service="s3", kid=kid, confirm=kid)
        assert _states(bench.proxy("p1")) == {kid: KeyState.DESTROYED}
        await operations.rotate(service="s3")
        assert sorted(_states(bench.proxy("p1")).values()) == [KeyState.ACTIVE, KeyState.DESTROYED]


async def test_a_key_that_does_not_open_is_no_reason_to_push_tombstones_alone(bench: Bench) -> None:
    """That would take the others back."""
    async with bench.agent() as (agent, operations):
        kid = await _provisioned(bench, operations)
        [row] = _rows((await operations.rotate(service="s3"))["rotations"])
        await operations.key_destroy(service="s3", kid=kid, confirm=kid)
        bench.source.spoil(KeyId.parse(row["new_kid"]))
        pushes = len(bench.proxy("p1").accepted)
        result: Any = await operations._pushed()
        assert [one["outcome"] for one in result] == ["failed", "failed"]
        assert len(bench.proxy("p1").accepted) == pushes
        assert agent.consent.may_push


async def test_who_holds_a_key(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        kid = await _provisioned(bench, operations)
        assert (await _keys(operations))[kid]["held_by"] == ["p1", "p2"]
        bench.proxy("p2").down = True
        [row] = _rows((await operations.rotate(service="s3"))["rotations"])
        keys = await _keys(operations)
        assert keys[row["new_kid"]]["held_by"] == ["p1"]
        assert keys[kid]["held_by"] == ["p1", "p2"], "what it has, it has until that ends"
        bench.proxy("p2").down = False
        await operations.kek_revoke()
        assert [key["held_by"] for key in (await _keys(operations)).values()] == [[], []]
        await operations.reinstate()
        held = {key["version"]: key["held_by"] for key in (await _keys(operations)).values()}
        assert held == {1: [], 2: [], 3: ["p1", "p2"]}, "nobody holds what the lost KEK wraps"


async def test_wrong_names_are_refused(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        kid = await _provisioned(bench, operations)
        for service, name in (("s3", "12"), ("s3", "0" * 32), ("other", kid)):
            with pytest.raises(RefusedChangeError):
                await operations.key_suspend(service=service, kid=name)
        with pytest.raises(RefusedChangeError, match="not of this agent's tenant"):
            await operations.key_list(service="globex/s3")


async def test_what_cannot_be_audited_is_not_done(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        kid = await _provisioned(bench, operations)
        (bench.directory / "audit.jsonl").unlink()
        for command in (operations.key_suspend, operations.key_deactivate, operations.key_compromise):
            with pytest.raises(AuditUnavailableError):
                await command(service="s3", kid=kid)
        [key] = await agent.registry.data_keys()
        assert key.state is KeyState.ACTIVE


@pytest.mark.parametrize(
    ("use", "algorithm"), [("data", "ES256"), ("sign", None), ("sign", "HS256"), ("seal", None)]
)
async def test_a_key_of_no_known_kind_is_not_made(bench: Bench, use: str, algorithm: str | None) -> None:
    async with bench.agent() as (agent, operations):
        await _provisioned(bench, operations)
        with pytest.raises(RefusedChangeError, match="no key has the use"):
            await operations.service_add(
                service="s3", proxy="p1", certificate_pem=bench.host("s3"), use=use, algorithm=algorithm
            )
        assert len(await agent.registry.data_keys()) == 1


def _kek_id(agent: Any) -> str:
    return str(agent.consent.kek.reference.kek_id)


def _rows(found: Any) -> list[Any]:
    return list(found)
