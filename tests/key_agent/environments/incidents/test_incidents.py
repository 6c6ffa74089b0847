"""Incidents over real registries, TLS and a network that fails: one transaction, told at once, repeated."""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from envelope.keys import KeyState
from key_agent.consent import EnvironmentStanding
from key_agent.environments.changes import incident_changes
from key_agent.environments.commands import incident_cli
from key_agent.environments.incidents.acknowledgements import Place
from key_agent.environments.incidents.evidence import verify_bundle
from key_agent.environments.incidents.incidents import EnvironmentAck, check_none_seals
from key_agent.environments.peers.standing import lease_s_of
from key_agent.environments.shared.approvals import Action, ApprovalError
from key_agent.environments.states import EnvironmentState
from key_agent.registry.access import RefusedChangeError
from key_agent.registry.database import RegistryError
from key_agent.registry.model import RECEIPT_SLACK_MS
from tests.environments.breaches import BreachedSite, breached_members
from tests.key_agent.conftest import until
from tests.pki import Tenant

E, S = EnvironmentState, KeyState


@pytest.fixture
async def site(tmp_path: Path, acme: Tenant) -> AsyncIterator[BreachedSite]:
    async with breached_members(tmp_path, acme, "abc") as made:
        yield made


async def open_it(site: BreachedSite, environment: str = "b", kind: str = "runtime", **more: Any) -> Any:
    return await site.commands(site.leader.name).incident_open(
        environment=environment, kind=kind, reason="IR-2214", **more
    )


async def test_exactly_the_breached_environments_key_is_disabled_in_every_database(
    site: BreachedSite,
) -> None:
    opened = await open_it(site)
    assert opened["told"] == {"b": True, "c": True}
    assert opened["durable"] is True
    wanted = {"a": S.ACTIVE, "b": S.COMPROMISED, "c": S.ACTIVE}
    for name in "abc":
        assert site.states(name) == wanted
        stored = {str(key.key_id): key.state for key in await site[name].registry.data_keys()}
        assert {owner: stored[key] for owner, key in site.keys.items()} == wanted
        assert site.environment("b", seen_by=name) is E.HEALING
    assert site["b"].consent.environment.name == "WITHDRAWN"
    actions = (site["a"].directory / "audit.jsonl").read_text()
    assert '"action":"incident-open","outcome":"ok"' in actions


async def test_an_environment_that_cannot_be_reached_holds_up_nothing_and_learns_later(
    site: BreachedSite,
) -> None:
    site["b"].cut_off()
    opened = await open_it(site)
    assert opened["told"] == {"b": False, "c": True}
    assert site.states("c")["b"] is S.COMPROMISED
    assert site.states("b")["b"] is S.ACTIVE
    found = await site.commands("a").incident_status(incident="INC-1")
    by_name = {row["environment"]: row for row in found["environments"]}
    assert (by_name["c"]["has_it"], by_name["c"]["clear"]) == (True, True)
    assert by_name["b"]["has_it"] is False
    assert by_name["b"]["error"]
    assert found["contained"] is False
    site["b"].reconnect()
    await until(lambda: site.states("b")["b"] is S.COMPROMISED)
    found = await site.commands("a").incident_status(incident="inc-1")
    assert (found["contained"], found["state"]) == (True, "contained")


async def test_many_callers_at_once_open_one_incident(site: BreachedSite) -> None:
    epoch = site.leader.peering.view.epoch
    found = await asyncio.gather(*(open_it(site, idempotency_key="one") for _ in range(50)))
    assert {row["incident"] for row in found} == {"inc-1"}
    assert sum(row["new"] for row in found) == 1
    assert site.leader.peering.view.epoch == epoch + 1


async def test_only_the_manager_opens_one_and_anybody_gives_itself_up(site: BreachedSite) -> None:
    with pytest.raises(RefusedChangeError, match="not the manager"):
        await site.commands("b").incident_open(environment="b", kind="runtime", reason="IR")
    declared = await site.commands("b").env_declare(reason="core dump found")
    assert declared["state"] == "healing"
    await until(lambda: "inc-1" in site.leader.peering.view.incidents)
    body = site.leader.peering.view.incidents["inc-1"]
    assert (body.kind, body.reason, body.opened_by) == ("suspected", "core dump found", "agent agent-b")
    await site.members.in_step()
    assert site.states("c")["b"] is S.SUSPENDED
    # The word was ratified once, though it is repeated until the rows say it.
    await asyncio.sleep(0.5)
    assert list(site.leader.peering.view.incidents) == ["inc-1"]


async def test_a_word_that_reaches_no_manager_counts_at_once_and_is_ratified_later(
    site: BreachedSite,
) -> None:
    site["b"].cut_off("a")
    await site.commands("b").env_declare(reason="found")
    assert "b" in site["c"].peering.notices
    assert site["b"].peering.verdict.state == "healing"
    assert site.leader.peering.view.incidents == {}
    await site["b"].stop()
    await site["b"].start()  # it says so still
    assert site["b"].peering.verdict.state == "healing"
    site["b"].reconnect()
    site["b"].peering._verify.set()
    await until(lambda: "inc-1" in site.leader.peering.view.incidents)


async def test_a_managers_own_word_is_told_though_its_database_is_away(
    site: BreachedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = site["a"]

    async def away(_work: object) -> object:
        raise RegistryError("the database is away")

    with monkeypatch.context() as patch:
        patch.setattr(a.registry, "transact", away)
        await a.peering.declare("core dump found")
        assert a.consent.environment is EnvironmentStanding.WITHDRAWN
        assert "a" in site["b"].peering.notices
        assert "a" in site["c"].peering.notices
    assert site.environment("a", seen_by="b") is E.ACTIVE
    await a.peering.tell_notice()
    await until(lambda: site.environment("a", seen_by="b") is E.HEALING)


async def test_two_persons_decide_about_further_keys(site: BreachedSite) -> None:
    await open_it(site)
    keys = [site.keys["c"]]
    payload = incident_changes.compromise_payload(keys)
    alone = await site.approve(Action.INCIDENT_COMPROMISE, "inc-1", payload, by="ann")
    with pytest.raises(ApprovalError):
        await site.commands("a").incident_compromise(incident="inc-1", keys=keys, approval=alone)
    both = await site.approve(Action.INCIDENT_COMPROMISE, "inc-1", payload)
    await site.commands("a").incident_compromise(incident="inc-1", keys=keys, approval=both)
    assert site.states("b") == {"a": S.ACTIVE, "b": S.COMPROMISED, "c": S.COMPROMISED}
    again = await site.commands("a").incident_compromise(incident="inc-1", keys=keys, approval=both)
    assert again["incident"] == "inc-1"


async def test_a_false_alarm_gives_every_database_its_keys_back(site: BreachedSite) -> None:
    await open_it(site, kind="suspected")
    assert site.states("c")["b"] is S.SUSPENDED
    approval = await site.approve(Action.INCIDENT_CANCEL, "inc-1", {})
    found = await site.commands("a").incident_cancel(incident="inc-1", approval=approval)
    await site.members.in_step()
    for name in "abc":
        assert set(site.states(name).values()) == {S.ACTIVE}
    assert site.environment("b") is E.HEALING
    told = incident_cli.cancelled_text(found)  # nobody is to think that this was all
    assert "`key-agent env heal-complete b --attest CHANGE`, then `key-agent env rejoin b`" in told
    assert "heals" not in incident_cli.cancelled_text({**found, "environment_state": E.ACTIVE})


async def test_new_keys_come_from_whom_the_administrator_names(site: BreachedSite) -> None:
    await open_it(site)
    commands = site.commands("a")
    with pytest.raises(RefusedChangeError, match="healing"):
        await commands.incident_rekey(incident="inc-1", generator="b")
    with pytest.raises(RefusedChangeError, match="no environment"):
        await commands.incident_rekey(incident="inc-1", generator="z")
    found = await commands.incident_rekey(incident="inc-1", generator="c")
    assert (found["done"], found["state"], len(found["made"])) == (True, "rekeyed", 1)
    new = site.leader.peering.view.deks[found["made"][0]]
    assert (new.owner_environment, new.generator_environment) == ("b", "c")
    assert new.predecessor == site.keys["b"]
    again = await commands.incident_rekey(incident="inc-1")
    assert (again["made"], again["done"]) == ([], True)


async def test_a_manager_that_was_breached_gives_way_and_the_incident_goes_on(site: BreachedSite) -> None:
    await open_it(site, environment="a")
    await site.members.in_step()
    await site.members.promote(site["b"])
    await site.members.in_step()
    with pytest.raises(RefusedChangeError, match="not the manager"):
        await site.commands("a").incident_rekey(incident="inc-1")
    found = await site.commands("b").incident_rekey(incident="inc-1")
    assert (found["done"], found["state"]) == (True, "rekeyed")
    await site.members.in_step()
    assert site.states("c")["a"] is S.COMPROMISED


async def test_a_manager_killed_between_any_two_steps_is_followed_by_its_next_life(
    site: BreachedSite,
) -> None:
    """Whatever of it was committed is there, the rest is not; the same command again ends it."""
    steps: list[Callable[[], Awaitable[Any]]] = [
        lambda: open_it(site, idempotency_key="one"),
        lambda: site.commands("a").incident_rekey(incident="inc-1"),
        lambda: site.commands("a").incident_rekey(incident="inc-1"),
    ]
    for step in steps:
        task = asyncio.ensure_future(step())
        await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await site["a"].stop()
        await site["a"].start()
        await step()
    view = site.leader.peering.view
    assert list(view.incidents) == ["inc-1"]
    assert view.incidents["inc-1"].state == "rekeyed"
    active = [dek for dek in view.deks.values() if dek.state is S.ACTIVE]
    assert sorted(dek.owner_environment for dek in active) == ["a", "b", "c"]


async def test_objects_are_not_looked_for_while_an_old_key_may_still_seal(site: BreachedSite) -> None:
    """What comes in behind the last pass, where nobody has heard of the breach, would be lost."""
    site["c"].cut_off()
    await open_it(site)
    shared, keys = site.leader.peering.view, [site.keys["b"]]
    with pytest.raises(RefusedChangeError, match=r"may still seal, for \d+ s: (b, )?c$") as refused:
        await site.commands("a").reencryption_begin(incident="inc-1", connector="-")
    assert "incident status" in refused.value.next_step

    unheard = EnvironmentAck(environment="c", has_it=False, places=(), error="no answer")
    taken_ms, lease_ms = shared.deks[keys[0]].since_ms, lease_s_of(shared) * 1000 + RECEIPT_SLACK_MS
    with pytest.raises(RefusedChangeError, match="for 1 s: c"):
        check_none_seals(shared, keys, [unheard], now_ms=taken_ms + lease_ms - 1)
    check_none_seals(shared, keys, [unheard], now_ms=taken_ms + lease_ms)

    place = Place(service="acme/s3", proxy="edge-1", is_clear=False, cause="silent", holds_until_ms=90_000)
    for now_ms in (30_000, 90_000):  # it says itself when it is clear
        ack = EnvironmentAck(environment="a", has_it=True, places=(place,))
        with pytest.raises(RefusedChangeError, match="acme/s3 at edge-1"):
            check_none_seals(shared, keys, [ack], now_ms=now_ms)
    clear = msgspec.structs.replace(place, is_clear=True, holds_until_ms=None)
    ack = EnvironmentAck(environment="a", has_it=True, places=(clear,))
    check_none_seals(shared, keys, [ack], now_ms=30_000)


async def test_evidence_of_a_running_system_verifies_offline(site: BreachedSite, acme: Tenant) -> None:
    await open_it(site)
    await site.commands("a").incident_rekey(incident="inc-1")
    site["c"].cut_off()
    written = await site.commands("a").incident_evidence(incident="inc-1")
    content = base64.b64decode(written["content_base64"])
    found = verify_bundle(content, root=acme.root.certificate, tenant=acme.name)
    assert found.incident.state == "rekeyed"
    assert found.key_states[site.keys["b"]] is S.COMPROMISED
    assert found.keys[site.keys["b"]].replaced_by is not None
    assert found.digest == site.leader.peering.view.digest
    actions = [json.loads(line)["action"] for line in found.evidence.parts["audit.jsonl"].splitlines()]
    assert {"incident-open", "incident-rekey", "incident-evidence"} <= set(actions)
    acks: Any = found.acknowledgements
    assert [row["environment"] for row in acks if row["error"]] == ["c"]


async def test_what_makes_no_sense_is_refused_before_anything_changes(site: BreachedSite) -> None:
    epoch = site.leader.peering.view.epoch
    future_ms = site.leader.now_ms() + 60_000
    for wrong in (
        {"kind": "flood"},
        {"kind": "dek"},
        {"kind": "dek", "keys": ["xyz"]},
        {"keys": [site.keys["b"]]},
        {"service": "s3"},
        {"keep_keys": True},
        {"environment": "z"},
        {"since_ms": future_ms},
    ):
        with pytest.raises(RefusedChangeError):
            await open_it(site, **wrong)
    for name in ("inc-9", "x"):
        with pytest.raises(RefusedChangeError, match="no incident"):
            await site.commands("a").incident_scope(incident=name)
    assert site.leader.peering.view.epoch == epoch


async def test_a_single_key_is_replaced_while_its_environment_serves(site: BreachedSite) -> None:
    await open_it(site, kind="dek", keys=[site.keys["b"].upper()])
    assert site.states("c") == {"a": S.ACTIVE, "b": S.COMPROMISED, "c": S.ACTIVE}
    assert site.environment("b") is E.ACTIVE
    found = await site.commands("a").incident_rekey(incident="inc-1", generator="b")  # patent B, ¶13
    assert found["done"]
    closed = await site.commands("a").incident_close(incident="inc-1")
    assert closed["state"] == "closed"
