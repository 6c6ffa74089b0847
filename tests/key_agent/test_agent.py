"""The agent as a whole, on fakes: who gets keys when, and who loses them when consent ends."""

import asyncio
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import delete

from envelope.certificates import CertificateError
from envelope.keys import KeyState, NetworkService
from key_agent.command_line.status_cli import status_text
from key_agent.consent import Standing
from key_agent.errors import KeySourceError
from key_agent.registry.model import KekRow
from key_agent.registry.states import KekState
from key_agent.registry.store import RefusedChangeError, Registry
from key_agent.registry.tables import dek_wrap
from key_agent.sources.source import Kek, Verdict
from runtime.audit import AuditUnavailableError
from tests.fakes.proxies import pem
from tests.key_agent.conftest import RHYTHM, Bench, until
from tests.pki import Tenant

S3 = NetworkService("acme", "s3")


async def test_a_new_service_gets_its_key_at_once(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await operations.kek_create()
        await operations.proxy_add(proxy="p1", url="https://p1.example:8443", ca_pem=_root(bench))
        result = await operations.service_add(service="s3", proxy="p1", certificate_pem=bench.host("s3"))
        assert result["proxies"] == [{"proxy": "p1", "outcome": "accepted", "error": None}]
        assert bench.proxy().valid_keys(S3) == [result["new_key"]]
        [row] = await agent.registry.data_keys()
        assert (str(row.key_id), row.state) == (result["new_key"], KeyState.ACTIVE)


async def test_a_new_key_of_a_hosted_service_is_known_to_all_its_proxies_before_one_seals_with_it(
    bench: Bench,
) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, proxy="p1")
        await bench.provision(operations, proxy="p2")
        await bench.provision(operations, "box", proxy="p3")
        [key] = [row for row in await agent.registry.data_keys() if row.owner == S3]
        # The registry lost the active key's only wrap (a disk; a backup made before): `service add` mends it.
        await _lose_wrap(agent.registry, str(key.key_id))
        posts = bench.proxy("p3").posts
        calls: list[str] = []
        bench.source.on_call = calls.append
        result = await operations.service_add(
            service="s3", proxy="p1", certificate_pem=pem(bench.proxy("p1").services[S3].certificate)
        )
        assert result["proxies"] == [
            {"proxy": name, "outcome": "accepted", "error": None} for name in ("p1", "p2")
        ]
        for name in ("p1", "p2"):
            assert bench.proxy(name).valid_keys(S3) == [result["new_key"]]
            states = [claims.keys[-1].state for claims in bench.proxy(name).accepted[-2:]]
            assert states == [KeyState.PRE_ACTIVE, KeyState.ACTIVE]
        assert calls.count("seal_envelopes") == 3, (
            "one for both proxies in each phase, one to be sure between"
        )
        assert bench.proxy("p3").posts == posts


async def _lose_wrap(registry: Registry, key_id: str) -> None:
    await registry._database.transact(
        lambda c: c.execute(delete(dek_wrap).where(dek_wrap.c.dek_id == key_id))
    )


async def test_refresh_every_interval_to_every_proxy(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        await bench.provision(operations, proxy="p1")
        await bench.provision(operations, proxy="p2")
        one, two = bench.proxy("p1"), bench.proxy("p2")
        before = len(one.accepted), len(two.accepted)
        sessions = one.sessions
        for round_ in range(1, 4):
            await bench.clock.advance(300)
            await until(lambda: len(one.accepted) == before[0] + round_)  # noqa: B023 - awaited here
            await until(lambda: len(two.accepted) == before[1] + round_)  # noqa: B023
        assert one.valid_keys(S3) == two.valid_keys(S3) != []
        assert one.sessions == sessions, "a challenge that is good needs no new session"
        sequences = [claims.sequence for claims in one.accepted]
        assert sequences == sorted(set(sequences))


async def test_both_proxies_share_one_unwrapping(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        await bench.provision(operations, proxy="p1")
        await bench.provision(operations, proxy="p2")
        await until(lambda: bench.proxy("p1").accepted and bench.proxy("p2").accepted)
        bench.source.calls.clear()
        ones, twos = len(bench.proxy("p1").accepted), len(bench.proxy("p2").accepted)
        await bench.clock.advance(300)
        await until(lambda: len(bench.proxy("p1").accepted) > ones and len(bench.proxy("p2").accepted) > twos)
        assert bench.source.calls.count("seal_envelopes") == 1


async def test_jitter_makes_the_refresh_a_tenth_early_at_most(bench: Bench) -> None:
    bench.jitter = 1.0
    async with bench.agent() as (_, operations):
        await bench.provision(operations)
        accepted = len(bench.proxy().accepted)
        await bench.clock.advance(269)
        assert len(bench.proxy().accepted) == accepted
        await bench.clock.advance(1)
        await until(lambda: len(bench.proxy().accepted) == accepted + 1)


async def test_a_dead_proxy_is_retried_alone_and_the_others_keep_their_interval(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, proxy="p1")
        await bench.provision(operations, proxy="p2")
        good, bad = bench.proxy("p1"), bench.proxy("p2")
        await until(lambda: good.accepted and bad.accepted)
        bad.down = True
        posts = good.posts
        await bench.clock.advance(300)
        await until(lambda: agent.refresh.schedule.failures("p2") == 1)
        for failures, delay_s in ((2, 1), (3, 2), (4, 4), (5, 8)):
            await bench.clock.advance(delay_s)
            await until(lambda: agent.refresh.schedule.failures("p2") == failures)  # noqa: B023
        assert good.posts == posts + 1
        assert agent.deliveries["p2"].code == "unreachable"
        bad.down = False
        await bench.clock.advance(16)
        await until(lambda: bad.valid_keys(S3))
        await until(lambda: agent.refresh.schedule.failures("p2") == 0)


async def test_a_hanging_proxy_delays_nobody_and_times_out(bench: Bench) -> None:
    # The time-out of a request is real time, longer than `until` waits: the healthy one must not wait for it.
    async with bench.agent(rhythm=replace(RHYTHM, request_timeout_s=60.0)) as (agent, operations):
        await bench.provision(operations, proxy="p1")
        hanging = bench.proxy("p2")
        hanging.hanging = True
        adding = asyncio.create_task(bench.provision(operations, proxy="p2"))
        accepted = len(bench.proxy("p1").accepted)
        await until(lambda: "p2" in agent.targets.fed())
        agent.refresh.at_once(["p1"])
        await until(lambda: len(bench.proxy("p1").accepted) > accepted)
        adding.cancel()


async def test_a_restarted_proxy_gets_its_keys_with_a_new_session_in_the_same_push(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        proxy = bench.proxy()
        sessions = proxy.sessions
        proxy.restart()
        await bench.clock.advance(300)
        await until(lambda: proxy.valid_keys(S3))
        assert proxy.sessions == sessions + 1
        assert agent.refresh.schedule.failures("p1") == 0


async def test_one_refused_service_does_not_hurt_the_others(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, "s3")
        await bench.provision(operations, "box")
        proxy = bench.proxy()
        proxy.refuse[S3] = "owner"
        await bench.clock.advance(300)
        await until(lambda: agent.deliveries["p1"].outcome == "partial")
        assert (agent.deliveries["p1"].accepted, agent.deliveries["p1"].refused) == (1, 1)
        assert agent.deliveries["p1"].code == "owner"
        status = await operations.status()
        errors = {row["service"]: row["proxies"][0]["error"] for row in _rows(status["services"])}
        assert errors["acme/box"] is None
        assert str(errors["acme/s3"]).startswith("owner:")


async def test_one_spoiled_key_leaves_the_others_alone(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, "s3")
        await bench.provision(operations, "box")
        keys = await agent.registry.data_keys()
        bench.source.spoil(next(key.key_id for key in keys if key.owner == S3))
        before = len(bench.proxy().accepted)
        await bench.clock.advance(300)
        await until(lambda: len(bench.proxy().accepted) == before + 1)
        assert agent.consent.standing is Standing.CONSENTED
        assert bench.proxy().accepted[-1].owner.service == "box"


# The end of consent.


@pytest.mark.parametrize("act", ["destroy", "disable", "replace"])
async def test_a_revoked_kek_withdraws_within_one_watch_and_stays_withdrawn(bench: Bench, act: str) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, proxy="p1")
        await bench.provision(operations, proxy="p2")
        kek = _kek(await _current(agent.registry))
        getattr(bench.source, act)(kek)
        await bench.clock.advance(5)
        for name in ("p1", "p2"):
            await until(lambda: not bench.proxy(name).valid_keys(S3))  # noqa: B023
            assert bench.proxy(name).accepted[-1].keys == ()
        assert agent.consent.standing is Standing.REVOKED
        row = await _wait_for_state(agent.registry, KekState.REVOKED)
        assert row.reason is not None
        # Nothing brings it back by itself: not time, not the key's return.
        if act == "disable":
            bench.source.disable(kek, enabled=True)
        await bench.clock.advance(1000)
        assert not bench.proxy("p1").valid_keys(S3)
        assert bench.proxy("p1").accepted[-1].keys == ()
    assert '"kek-standing"' in bench.audit()


async def test_revocation_found_by_the_push_itself_is_acted_on_without_waiting_for_the_watch(
    bench: Bench,
) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        bench.source.destroy(_kek(await _current(agent.registry)))
        agent.refresh.at_once()
        await until(lambda: agent.consent.standing is Standing.REVOKED)
        await until(lambda: not bench.proxy().valid_keys(S3))


async def test_an_outage_pushes_nothing_withdraws_nothing_and_ends_by_itself(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        proxy = bench.proxy()
        accepted = len(proxy.accepted)
        bench.source.fail(Verdict.UNREACHABLE)
        await bench.clock.advance(5)
        assert agent.consent.standing is Standing.SILENT
        await bench.clock.advance(400)
        assert len(proxy.accepted) == accepted, "neither keys nor withdrawals"
        assert not proxy.valid_keys(S3), "the validity ran out"
        assert agent.reasons_not_ready()
        bench.source.recover()
        await bench.clock.advance(5)
        await until(lambda: proxy.valid_keys(S3))
        assert (await _current(agent.registry)).state is KekState.ACTIVE


async def test_a_changed_token_withdraws_and_resumes_when_it_is_back(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        proxy = bench.proxy()
        bench.source.fail(Verdict.TOKEN_CHANGED)
        await bench.clock.advance(5)
        await until(lambda: not proxy.valid_keys(S3))
        await _wait_for_state(agent.registry, KekState.SUSPENDED)
        bench.source.recover()
        await bench.clock.advance(5)
        await until(lambda: proxy.valid_keys(S3))
        await _wait_for_state(agent.registry, KekState.ACTIVE)


async def test_a_refused_pin_pushes_nothing_and_says_so(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        bench.source.fail(Verdict.AUTH_PIN)
        await bench.clock.advance(5)
        assert agent.consent.standing is Standing.LOGIN_REFUSED
        accepted = len(bench.proxy().accepted)
        await bench.clock.advance(300)
        assert len(bench.proxy().accepted) == accepted


async def test_withdrawals_reach_a_proxy_that_comes_back_and_stop_when_nothing_can_be_valid(
    bench: Bench,
) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, proxy="p1")
        await bench.provision(operations, proxy="p2")
        await until(lambda: bench.proxy("p1").accepted and bench.proxy("p2").accepted)
        bench.proxy("p1").down = bench.proxy("p2").down = True
        bench.source.destroy(_kek(await _current(agent.registry)))
        await bench.clock.advance(5)
        await until(lambda: agent.withdrawals.schedule.failures("p1") >= 1)
        assert set(agent.withdrawals.pending()) == {"p1", "p2"}
        bench.proxy("p1").down = False
        while bench.proxy("p1").valid_keys(S3):
            await bench.clock.advance(1)
            await asyncio.sleep(0.01)
        await until(lambda: set(agent.withdrawals.pending()) == {"p2"})
        await bench.clock.advance(400)
        assert not agent.withdrawals.pending(), "what was issued to p2 cannot be valid any more"
        status = await operations.status()
        places = {p["proxy"]: p["state"] for p in _rows(_rows(status["services"])[0]["proxies"])}
        assert places == {"p1": "withdrawn", "p2": "withdrawn"}


async def test_what_was_acknowledged_before_a_revocation_is_not_called_valid_after_reinstating(
    bench: Bench,
) -> None:
    async with bench.agent() as (_, operations):
        await bench.provision(operations)
        await bench.clock.advance(10)
        bench.proxy().down = True
        result = await operations.kek_revoke()
        assert _rows(result["proxies"])[0]["error"]
        await bench.clock.advance(1)
        await operations.reinstate()

        async def place() -> dict[str, Any]:
            status = await operations.status()
            assert status["standing"] == Standing.CONSENTED
            status_text(status)
            return _rows(_rows(status["services"])[0]["proxies"])[0]

        now = await place()
        assert (now["state"], now["valid_for_s"]) == ("withdrawing", None)
        assert now["may_hold_keys_until_ms"]
        bench.proxy().down = False
        while not bench.proxy().valid_keys(S3) or (await place())["state"] == "withdrawing":
            await bench.clock.advance(1)
            await asyncio.sleep(0.01)
        assert (await place())["state"] == "valid"


async def test_a_confirmed_withdrawal_is_shown_until_the_keys_of_the_next_kek_are_acknowledged(
    bench: Bench,
) -> None:
    async with bench.agent() as (_, operations):
        await bench.provision(operations)
        await bench.clock.advance(10)
        await operations.kek_revoke()
        bench.proxy().down = True
        await bench.clock.advance(1)
        await operations.reinstate()
        status = await operations.status()
        [place] = _rows(_rows(status["services"])[0]["proxies"])
        assert (place["state"], place["valid_for_s"]) == ("withdrawn", None)
        assert "p1: withdrawn 20" in status_text(status)


async def test_a_lost_answer_to_keys_still_counts_as_held(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        proxy = bench.proxy()
        await operations.service_remove(service="s3")
        assert not proxy.valid_keys(S3)
        proxy.lose_answers = 1
        await operations.service_add(service="s3", proxy="p1", certificate_pem=bench.host("s3"))
        assert proxy.valid_keys(S3)
        bench.source.destroy(_kek(await _current(agent.registry)))
        await bench.clock.advance(5)
        await until(lambda: not proxy.valid_keys(S3))


async def test_no_database_stops_a_revocation(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        await agent.registry.close()
        bench.source.destroy(_kek_of(agent.consent.kek))
        await bench.clock.advance(5)
        await until(lambda: not bench.proxy().valid_keys(S3))
        assert any("registry" in reason for reason in agent.reasons_not_ready())


async def test_no_hanging_disk_stops_a_revocation(bench: Bench) -> None:
    """Neither the registry's nor the audit log's thread ever comes back, and the event loop does not wait."""
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        await agent.pusher.settle()
        mended = threading.Event()
        for writer in (agent.registry._database._writer, agent.journal._writer):
            writer.submit(mended.wait)
        try:
            bench.source.destroy(_kek_of(agent.consent.kek))
            await bench.clock.advance(5)
            await until(lambda: not bench.proxy().valid_keys(S3), timeout_s=30)
            assert bench.proxy().accepted[-1].keys == ()
        finally:
            mended.set()
        await _wait_for_state(agent.registry, KekState.REVOKED)


async def test_no_audit_log_stops_a_revocation_but_every_refresh(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        accepted = len(bench.proxy().accepted)
        (bench.directory / "audit.jsonl").unlink()
        await bench.clock.advance(300)
        await until(lambda: agent.refresh.schedule.failures("p1") >= 1)
        assert len(bench.proxy().accepted) == accepted
        bench.source.destroy(_kek_of(agent.consent.kek))
        await bench.clock.advance(5)
        await until(lambda: not bench.proxy().valid_keys(S3))


async def test_the_next_life_of_the_agent_remembers_the_revocation_and_goes_on_withdrawing(
    bench: Bench,
) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        bench.proxy().down = True
        bench.source.disable(_kek_of(agent.consent.kek))
        await bench.clock.advance(5)
        await _wait_for_state(agent.registry, KekState.REVOKED)
        kek = _kek_of(agent.consent.kek)
    bench.source.disable(kek, enabled=True)
    bench.proxy().down = False
    async with bench.agent() as (agent, _):
        assert agent.consent.standing is Standing.REVOKED
        await until(lambda: not bench.proxy().valid_keys(S3))
        assert bench.proxy().accepted[-1].keys == ()


# Commands.


async def test_kek_revoke_destroys_withdraws_and_reinstate_starts_anew(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        [old] = bench.proxy().valid_keys(S3)
        result = await operations.kek_revoke()
        assert result["destroyed"]
        assert result["problems"] == []
        assert not bench.proxy().valid_keys(S3)
        assert not bench.source.keks
        assert (await _current(agent.registry)).state is KekState.DESTROYED
        with pytest.raises(RefusedChangeError):
            await operations.service_add(service="box", proxy="p1", certificate_pem=bench.host("box"))

        await operations.reinstate()
        [new] = bench.proxy().valid_keys(S3)
        assert new != old
        states = {str(key.key_id): key.state for key in await agent.registry.data_keys()}
        assert states == {old: KeyState.DEACTIVATED, new: KeyState.ACTIVE}
        assert all(str(key.key_id) != old for key in bench.proxy().accepted[-1].keys)
        with pytest.raises(RefusedChangeError, match="is not back: kek_destroyed"):
            await operations.reinstate(restore=True)


async def test_kek_revoke_withdraws_though_the_hsm_does_not_answer(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        bench.source.fail(Verdict.UNREACHABLE)
        result = await operations.kek_revoke()
        assert not result["destroyed"]
        assert result["problems"]
        assert not bench.proxy().valid_keys(S3)
        assert (await _wait_for_state(agent.registry, KekState.REVOKED)).state.is_sticky


async def test_restore_takes_the_old_kek_back_only_with_proof(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        [old] = bench.proxy().valid_keys(S3)
        kek = _kek_of(agent.consent.kek)
        bench.source.disable(kek)
        await bench.clock.advance(5)
        await _wait_for_state(agent.registry, KekState.REVOKED)
        with pytest.raises(RefusedChangeError, match="not back"):
            await operations.reinstate(restore=True)
        bench.source.disable(kek, enabled=True)
        await operations.reinstate(restore=True)
        assert bench.proxy().valid_keys(S3) == [old]


async def test_nothing_is_reinstated_while_the_kek_is_active(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        await operations.kek_create()
        with pytest.raises(RefusedChangeError, match="nothing to reinstate"):
            await operations.reinstate()
        with pytest.raises(RefusedChangeError, match="a KEK already"):
            await operations.kek_create()


async def test_a_crash_between_naming_and_making_the_kek_leaves_no_second_one(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        bench.source.fail()
        with pytest.raises(KeySourceError):
            await operations.kek_create()
        bench.source.recover()
        await operations.kek_create()
        assert len(bench.source.keks) == 1


async def test_removing_a_service_withdraws_it_and_erases_its_keys(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, "s3")
        await bench.provision(operations, "box")
        await operations.service_remove(service="s3")
        assert not bench.proxy().valid_keys(S3)
        assert bench.proxy().valid_keys(NetworkService("acme", "box"))
        [gone] = [key for key in await agent.registry.data_keys() if key.owner == S3]
        assert gone.state is KeyState.DESTROYED
        assert gone.wrapped_by == ()
        await bench.clock.advance(300)
        assert bench.proxy().accepted[-1].owner != S3 or bench.proxy().accepted[-1].keys == ()
        with pytest.raises(RefusedChangeError):
            await operations.service_remove(service="s3")


async def test_removing_a_proxy_withdraws_there_and_nowhere_else(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        await bench.provision(operations, proxy="p1")
        await bench.provision(operations, proxy="p2")
        await until(lambda: bench.proxy("p2").valid_keys(S3))
        result = await operations.proxy_remove(proxy="p1")
        assert result["services"] == ["acme/s3"]
        assert not bench.proxy("p1").valid_keys(S3)
        assert bench.proxy("p2").valid_keys(S3)


async def test_certificates_of_others_are_refused(bench: Bench, globex: Tenant) -> None:
    async with bench.agent() as (_, operations):
        await operations.kek_create()
        await operations.proxy_add(proxy="p1", url="https://p1.example:8443", ca_pem=_root(bench))
        for wrong in (
            pem(globex.service("s3").certificate),
            pem(bench.tenant.service("box").certificate),
            pem(bench.tenant.agent_signing("hq").certificate),
            pem(bench.tenant.root.certificate),
            "no certificate",
        ):
            with pytest.raises(CertificateError):
                await operations.service_add(service="s3", proxy="p1", certificate_pem=wrong)
        with pytest.raises(RefusedChangeError, match="tenant"):
            await operations.service_add(
                service="globex/s3", proxy="p1", certificate_pem=pem(globex.service("s3").certificate)
            )
        assert "generate" not in bench.source.calls


async def test_a_command_that_cannot_be_audited_is_refused(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await operations.kek_create()
        await operations.proxy_add(proxy="p1", url="https://p1.example:8443", ca_pem=_root(bench))
        (bench.directory / "audit.jsonl").unlink()
        with pytest.raises(AuditUnavailableError):
            await operations.service_add(service="s3", proxy="p1", certificate_pem=bench.host("s3"))
        assert await agent.registry.data_keys() == []


async def test_no_secret_reaches_registry_or_audit_log(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        await bench.provision(operations)
        [secret] = [bytes(key.secret) for key in bench.proxy().held[S3].claims.keys]
    for path in bench.directory.iterdir():
        content = path.read_bytes()
        assert secret not in content, path
        assert secret.hex().encode() not in content, path


def _root(bench: Bench) -> str:
    return pem(bench.tenant.root.certificate)


def _rows(value: Any) -> list[dict[str, Any]]:
    assert isinstance(value, list)
    return value


async def _current(registry: Registry) -> KekRow:
    row = await registry.current_kek()
    assert row is not None
    return row


def _kek(row: KekRow) -> Kek:
    return _kek_of(row.kek)


def _kek_of(kek: Kek | None) -> Kek:
    assert kek is not None
    return kek


async def _wait_for_state(registry: Registry, state: KekState) -> KekRow:
    deadline_s = time.monotonic() + 60
    while (row := await _current(registry)).state is not state:
        assert time.monotonic() < deadline_s, row.state
        await asyncio.sleep(0.005)
    return row


async def test_a_slow_hsm_is_said_and_changes_nothing_else(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        bench.source.pace.late(1.2)
        assert agent.reasons_not_ready() == ["slow: the HSM did not answer within 1 s"]
        assert (await operations.status())["problems"] == agent.reasons_not_ready()
        assert agent.consent.standing is Standing.CONSENTED
        accepted = len(bench.proxy().accepted)
        agent.refresh.at_once()
        await until(lambda: len(bench.proxy().accepted) > accepted)
        assert bench.proxy().valid_keys(S3)
        for _ in range(2):
            bench.source.pace.answered(0.01)
        assert agent.reasons_not_ready() == []
    events = [line for line in bench.audit().splitlines() if '"hsm-pace"' in line]
    assert ['"slow"' in events[0], '"quick"' in events[1], len(events)] == [True, True, 2]
