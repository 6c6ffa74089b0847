"""An environment's return, over real registries and TLS: in that order, proven, or healing again."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest

from envelope.certificates import Role
from envelope.keys import KeyId, KeyState
from key_agent.consent import Change
from key_agent.environments.changes import healing_changes
from key_agent.environments.changes.incident_changes import KEK_COMPROMISED
from key_agent.environments.incidents.acknowledgements import LB_ACK_PATH, LbAck
from key_agent.environments.incidents.healing import KEK_PATH
from key_agent.environments.peers.peer_api import PeerCall
from key_agent.environments.peers.peer_transport import PeerError
from key_agent.environments.shared.approvals import Action
from key_agent.environments.shared.documents import Kind
from key_agent.environments.shared.draft import Draft
from key_agent.environments.states import EnvironmentState
from key_agent.errors import KekRevokedError, UnsupportedError
from key_agent.operations.kek_making import KekWish
from key_agent.operations.kek_rotation import KekRotation
from key_agent.reencryption.job import JobState, Progress
from key_agent.reencryption.ledger import FileLedger, LedgerError
from key_agent.registry.access import RefusedChangeError
from key_agent.registry.database import RegistryError
from key_agent.registry.states import KekState
from key_agent.sources.source import Diagnosis, Verdict
from tests.environments.breaches import BreachedSite, breached_members
from tests.environments.healing_site import healing_site
from tests.environments.key_site import states
from tests.key_agent.conftest import until
from tests.pki import Tenant

if TYPE_CHECKING:
    from key_agent.agent import Agent

E, S = EnvironmentState, KeyState


@pytest.fixture
async def site(tmp_path: Path, acme: Tenant) -> AsyncIterator[BreachedSite]:
    async with breached_members(tmp_path, acme, "abc") as made:
        yield made


async def breach(site: BreachedSite, kind: str = "runtime", environment: str = "b") -> None:
    """Opened, and its keys replaced."""
    leader = site.commands(site.leader.name)
    await leader.incident_open(environment=environment, kind=kind, reason="IR")
    await leader.incident_rekey(incident="inc-1")
    await site.members.in_step()


async def heal(site: BreachedSite, environment: str = "b") -> dict[str, Any]:
    """A new KEK, and the operator's word."""
    made: dict[str, Any] = await site.commands(environment).env_new_kek()
    await until(lambda: site.leader.peering.view.environments[environment].kek_id == made["kek"])
    await site.commands(site.leader.name).env_heal_complete(
        environment=environment, attestation="CHG-88", new_certificates=True, kek=made["fingerprint"]
    )
    await site.members.in_step()
    return made


@pytest.fixture
async def balancer(site: BreachedSite) -> AsyncIterator[None]:
    task = asyncio.create_task(site.balance(), name="lb-1")
    yield
    task.cancel()


async def rejoin(site: BreachedSite, environment: str = "b", *, patience_s: float = 10) -> Any:
    return await site.commands(site.leader.name).env_rejoin(environment=environment, patience_s=patience_s)


async def test_an_environments_agent_is_no_load_balancer(site: BreachedSite) -> None:
    """Its certificate is an agent's: the breached one would confirm its own return."""
    await breach(site)
    route = next(one for one in site["a"].environments.routes if one.path == LB_ACK_PATH)
    assert route.roles == {Role.BALANCER}
    ack = msgspec.json.encode(LbAck(load_balancer="lb-1", term=1 << 40, epoch=1))
    await route.handle(PeerCall(agent_id="lb-1", body=ack, query={}))
    own = msgspec.json.encode(LbAck(load_balancer=site["b"].agent_id, term=1 << 40, epoch=1))
    for forged in (own, ack):
        with pytest.raises(PeerError) as refused:
            await site["b"].environments.peers.post("a", LB_ACK_PATH, forged)
        assert refused.value.code == "identity"
    heard = site.parts["a"].load_balancers.all(now_boot_s=site["a"].clock.boot_s())
    assert [one.name for one in heard] == ["lb-1"]


async def test_an_agent_announces_no_other_environments_kek(site: BreachedSite) -> None:
    """Of one that heals no signature is asked for: any member would put its own KEK there."""
    await breach(site)
    kek = healing_changes.KekAnnouncement(
        environment="b", kek_id="kek-x", kek=site["a"].peering.view.keks["kek-b"]
    )
    with pytest.raises(PeerError) as refused:
        await site["c"].environments.peers.post("a", KEK_PATH, msgspec.json.encode(kek))
    assert refused.value.code == "not_believed"
    view = site["a"].peering.view
    assert (view.environments["b"].kek_id, "kek-x" in view.keks) == ("kek-b", False)
    await site["b"].environments.peers.post("a", KEK_PATH, msgspec.json.encode(kek))
    assert site["a"].peering.view.environments["b"].kek_id == "kek-x", "by its own agent it is"


@pytest.mark.usefixtures("balancer")
async def test_a_breached_runtime_comes_back_with_a_new_kek_and_every_key(site: BreachedSite) -> None:
    await breach(site)
    assert site["b"].consent.environment.name == "WITHDRAWN"
    before = await site.opens("b")
    made = await heal(site)
    assert await site.opens("b") == frozenset(), (
        "nothing is stored by the operator's word (system B, claim 7)"
    )
    assert site.proven == []
    found = await rejoin(site)
    assert (found["state"], found["problems"]) == ("active", {})
    assert site.proven == ["b"]
    await site.members.in_step()
    deks = site["b"].peering.view.deks
    live = {key for key, dek in deks.items() if dek.state in healing_changes.LIVE}
    opens = await site.opens("b")
    assert live <= opens
    assert before - opens <= {site.keys["b"]}
    await until(lambda: site["b"].consent.environment.name == "SERVES")
    row = await site.kek("b")
    assert (row.reference.kek_id, row.state) == (made["kek"], KekState.ACTIVE)
    view = site["c"].peering.view
    assert view.incidents["inc-1"].state == "reencrypting"
    assert view.keks["kek-b"].state == KEK_COMPROMISED
    assert (await rejoin(site))["state"] == "active", "it can be repeated"
    await site.commands("a").incident_close(incident="inc-1")


async def test_without_a_load_balancers_word_nothing_is_stored_and_nothing_changes(
    site: BreachedSite,
) -> None:
    await breach(site)
    await heal(site)
    with pytest.raises(RefusedChangeError, match="no live load balancer"):
        await rejoin(site, patience_s=0.3)
    assert (site.environment("b"), site.proven) == (E.HEALED, [])
    # One of two is no word of all.
    async with asyncio.TaskGroup() as group:
        one = group.create_task(site.balance("lb-1"))
        stale = site.parts["a"].load_balancers
        view = site["a"].peering.view
        late = LbAck(load_balancer="lb-2", term=view.term, epoch=view.epoch - 1)
        stale.acknowledged("lb-2", late, now_boot_s=site["a"].clock.boot_s())
        with pytest.raises(RefusedChangeError, match="lb-2 has not confirmed"):
            await rejoin(site, patience_s=0.3)
        assert (site.environment("b"), site.proven) == (E.HEALED, [])
        one.cancel()


@pytest.mark.usefixtures("balancer")
async def test_one_key_that_cannot_be_proven_shuts_it_again(site: BreachedSite) -> None:
    await breach(site)
    made = await heal(site)
    site.failing["b"] = {site.keys["a"]: "the wrap does not open"}
    found = await rejoin(site)
    assert (found["state"], found["problems"]) == ("healing", site.failing["b"])
    assert "the wrap does not open" in str(found["reason"])
    await site.members.in_step()
    assert site.environment("b", seen_by="b") is E.HEALING
    site.failing.clear()
    await site.commands("a").env_heal_complete(
        environment="b", attestation="CHG-89", new_certificates=True, kek=made["fingerprint"]
    )
    assert (await rejoin(site))["state"] == "active"


@pytest.mark.usefixtures("balancer")
async def test_a_wrap_that_went_bad_after_it_was_stored_is_found_by_the_canary(site: BreachedSite) -> None:
    await breach(site)
    await heal(site)
    [key] = [key for key in (await site["a"].registry.data_keys()) if str(key.key_id) == site.keys["c"]]

    carried = site.carry

    async def spoiling(environment: str) -> None:
        await carried(environment)
        site.members.source.spoil(key.key_id)

    site.carry = spoiling  # type: ignore[method-assign]
    found = await rejoin(site)
    assert found["state"] == "healing"
    assert any(str(key.key_id) in f"{name}{why}" for name, why in found["problems"].items())


@pytest.mark.usefixtures("balancer")
async def test_an_environment_that_does_not_answer_does_not_come_back(site: BreachedSite) -> None:
    await breach(site)
    await heal(site)
    site["b"].cut_off()
    found = await rejoin(site)
    assert found["state"] == "healing"
    assert "canary" in found["problems"]


@pytest.mark.usefixtures("balancer")
async def test_killed_on_the_way_it_goes_on_where_it_was(site: BreachedSite) -> None:
    await breach(site)
    await heal(site)
    admitted = asyncio.Event()
    carried = site.carry

    async def dying(environment: str) -> None:
        admitted.set()
        await asyncio.Event().wait()

    site.carry = dying  # type: ignore[method-assign]
    task = asyncio.create_task(rejoin(site))
    await asyncio.wait_for(admitted.wait(), 60)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await site["a"].stop()
    await site["a"].start()
    site.carry = carried  # type: ignore[method-assign]
    assert site.environment("b") is E.REJOINING
    assert (await rejoin(site))["state"] == "active"


async def test_the_road_is_not_left(site: BreachedSite) -> None:
    commands = site.commands("a")
    with pytest.raises(RefusedChangeError, match="does not heal"):
        await commands.env_heal_complete(environment="b", attestation="x")
    with pytest.raises(RefusedChangeError, match="does not heal"):
        await site.commands("b").env_new_kek()
    await commands.incident_open(environment="b", kind="runtime", reason="IR")
    await site.members.in_step()
    with pytest.raises(RefusedChangeError, match="healing"):
        await commands.env_rejoin(environment="b", patience_s=0)
    with pytest.raises(RefusedChangeError, match="not newer"):
        await commands.env_heal_complete(environment="b", attestation="x", new_certificates=True)
    await heal(site)
    with pytest.raises(RefusedChangeError, match="no successors"):
        await commands.env_rejoin(environment="b", patience_s=0)
    with pytest.raises(RefusedChangeError, match="not the manager"):
        await site.commands("c").env_rejoin(environment="b")


async def test_a_lost_kek_is_disabled_in_the_hsm_and_its_wraps_go_when_others_are_there(
    site: BreachedSite,
) -> None:
    old = (await site.kek("b")).kek
    assert old is not None
    changes: list[Change] = []
    site["b"].consent.listen(changes.append)
    await site.commands("a").incident_open(environment="b", kind="kek", reason="IR")
    await until(lambda: "set_kek_enabled" in site.members.source.calls)
    assert (await site.members.source.diagnose(old)).verdict == "kek_disabled"
    assert site["b"].consent.standing.is_withdrawn
    said = next(change.diagnosis for change in changes if change.new.is_withdrawn)
    assert said is not None
    assert "env new-kek" in said.detail, "among several environments `reinstate` is not the way"
    assert await site["b"].registry.wraps_under(old.reference.kek_id) > 0, "no key is lost in between"
    assert set(site.states("c").values()) == {S.ACTIVE}, "two persons decide about the keys"
    await site["b"].registry.set_kek_state("kek-b", KekState.REVOKED, "as the agent does", now_ms=1)
    await site.commands("a").incident_rekey(incident="inc-1")
    await heal(site)
    task = asyncio.create_task(site.balance(), name="lb-1")
    try:
        assert (await rejoin(site))["state"] == "active"

        async def erased() -> bool:
            return await site["b"].registry.wraps_under(old.reference.kek_id) == 0

        for _ in range(1500):
            if await erased():
                break
            await asyncio.sleep(0.02)
        assert await erased()
    finally:
        task.cancel()


async def test_an_hsm_that_cannot_disable_is_told_of_and_holds_up_nothing(
    site: BreachedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unable(kek: object, *, enabled: bool) -> None:
        raise UnsupportedError("CKA_DECRYPT cannot be changed")

    monkeypatch.setattr(site.members.source, "set_kek_enabled", unable)
    await site.commands("a").incident_open(environment="b", kind="kek", reason="IR")
    await until(lambda: site["b"].consent.standing.is_withdrawn)
    await until(lambda: '"kek-disable","outcome":"unsupported"' in _audit(site, "b"))
    assert site.parts["b"].reaction.problem is None


async def test_an_hsm_that_is_away_is_asked_again(site: BreachedSite) -> None:
    site.members.source.fail()
    await site.commands("a").incident_open(environment="b", kind="kek", reason="IR")
    await until(lambda: site.parts["b"].reaction.problem is not None)
    assert site["b"].consent.standing.is_withdrawn, "taking back waits for no HSM"
    site.members.source.recover()
    await until(lambda: '"action":"kek-disable","outcome":"ok"' in _audit(site, "b"))
    await until(lambda: site.parts["b"].reaction.problem is None)


async def test_a_kek_that_cannot_be_disabled_now_does_not_keep_the_next_one_back(
    site: BreachedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def moved(kek: object, *, enabled: bool) -> None:
        raise KekRevokedError(Diagnosis(Verdict.TOKEN_CHANGED, "another token is in the slot"))

    monkeypatch.setattr(site.members.source, "set_kek_enabled", moved)
    await site.commands("a").incident_open(environment="b", kind="kek", reason="IR")
    await until(lambda: site.parts["b"].reaction.problem is not None)
    made = await site.commands("b").env_new_kek()
    manager = site.members["a"].peering
    await until(lambda: manager.view.environments["b"].kek_id == made["kek"])
    assert site.parts["b"].reaction.problem is not None, "the one before is tried again"
    # Whatever else cannot be done hides nothing of it.
    await site.members.in_step()
    manager_is_away = "cut off by the test"
    site["b"].cut_off()
    assert (await site.commands("b").env_new_kek())["kek"] != made["kek"]
    await until(lambda: manager_is_away in str(site.parts["b"].reaction.problem))
    assert "another token is in the slot" in str(site.parts["b"].reaction.problem)


async def test_a_kek_that_is_gone_needs_no_disabling_and_one_that_may_come_back_does(
    site: BreachedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [Verdict.TOKEN_CHANGED, Verdict.KEK_EXPIRED, Verdict.KEK_DESTROYED]

    async def found(kek: object, *, enabled: bool) -> None:
        raise KekRevokedError(Diagnosis(said.pop(0), "as the HSM says"))

    monkeypatch.setattr(site.members.source, "set_kek_enabled", found)
    await site.commands("a").incident_open(environment="b", kind="kek", reason="IR")
    await until(lambda: '"action":"kek-disable","outcome":"gone"' in _audit(site, "b"))
    assert said == [], "it was asked again until the KEK was gone for good"
    await until(lambda: site.parts["b"].reaction.problem is None)


async def test_an_ended_kek_is_taken_back_though_the_registry_is_away(
    site: BreachedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away() -> object:
        raise RegistryError("the database is away")

    monkeypatch.setattr(site["b"].registry, "keks", away)
    await site.commands("a").incident_open(environment="b", kind="kek", reason="IR")
    await until(lambda: site.parts["b"].reaction.problem is not None)
    assert site["b"].consent.standing.is_withdrawn
    assert "set_kek_enabled" not in site.members.source.calls
    monkeypatch.undo()
    await until(lambda: '"action":"kek-disable","outcome":"ok"' in _audit(site, "b"))


def _audit(site: BreachedSite, name: str) -> str:
    return (site[name].directory / "audit.jsonl").read_text()


async def test_rescue_and_retirement_reach_every_database(site: BreachedSite) -> None:
    await breach(site)
    commands, keys = site.commands("a"), [site.keys["b"]]
    until_ms = site["a"].now_ms() + 3_600_000
    approval = await site.approve(Action.KEY_RESCUE, "inc-1", healing_changes.rescue_payload(keys, until_ms))
    await commands.keys_rescue(incident="inc-1", keys=keys, until_ms=until_ms, approval=approval)
    await site.members.in_step()
    assert site["c"].peering.view.deks[keys[0]].rescue_approval == approval
    ending = healing_changes.retire_payload(keys, accept_loss=True)
    approval = await site.approve(Action.KEYS_RETIRE, "acme", ending)
    with pytest.raises(RefusedChangeError, match="nothing shows"):
        await commands.keys_retire(keys=keys, approval=approval)
    done = await commands.keys_retire(keys=keys, approval=approval, accept_loss=True)
    assert done["keys"] == {keys[0]: S.DESTROYED}
    await site.members.in_step()
    for name in "ac":
        [row] = [row for row in await site[name].registry.data_keys() if str(row.key_id) == keys[0]]
        assert (row.state, row.wrapped_by) == (S.DESTROYED, ())


async def test_what_a_dropped_re_encryption_has_left_is_lost_by_word_only(site: BreachedSite) -> None:
    """A store that is gone for good holds up no key for ever, and ends none silently."""
    await breach(site)
    commands, key = site.commands("a"), site.keys["b"]
    gone, whole = (
        Progress(job_id=job_id, incident_id="inc-1", connector="-", sources=(KeyId.parse(key),), **more)
        for job_id, more in (("0a" * 8, {"met": 1}), ("0b" * 8, {"state": JobState.DONE}))
    )
    ledger = FileLedger(site["a"].directory)
    for one in (gone, whole):
        await ledger.save_progress(one)
    no_loss = await site.approve(
        Action.KEYS_RETIRE, "acme", healing_changes.retire_payload([key], accept_loss=False)
    )
    loss = await site.approve(
        Action.KEYS_RETIRE, "acme", healing_changes.retire_payload([key], accept_loss=True)
    )
    for accepts, approval in ((False, no_loss), (True, loss)):
        with pytest.raises(RefusedChangeError, match=f"not finished.*{gone.job_id}"):
            await commands.keys_retire(keys=[key], approval=approval, accept_loss=accepts)
    with pytest.raises(LedgerError, match="is done"):
        await commands.reencryption_drop(job=whole.job_id)
    dropped = await commands.reencryption_drop(job=gone.job_id)
    assert (dropped["may_have_left"], dropped["dropped_at_ms"] is None) == (True, False)
    listed = (await commands.reencryption_list())["reencryptions"]
    assert listed[0] == dropped
    with pytest.raises(RefusedChangeError, match="nothing shows"):
        await commands.keys_retire(keys=[key], approval=no_loss)
    known = await commands.keys_loss(keys=[key])
    assert ([job["job"] for job in known["jobs"]], known["not_looked"]) == ([gone.job_id], [])
    done = await commands.keys_retire(keys=[key], approval=loss, accept_loss=True)
    assert (done["keys"], done["loss"]) == ({key: S.DESTROYED}, known)
    assert f'"job":"{gone.job_id}"' in _audit(site, "a")
    assert '"action":"reencryption-drop","outcome":"ok"' in _audit(site, "a")


async def test_who_signs_a_loss_is_shown_what_is_known_of_it(site: BreachedSite) -> None:
    await breach(site)
    key = site.keys["b"]
    met = Progress(job_id="0a" * 8, incident_id="inc-1", connector="-", sources=(KeyId.parse(key),), met=1)
    await FileLedger(site["a"].directory).save_progress(met)

    async def shown(at: str, payload: dict[str, Any], action: Action = Action.KEYS_RETIRE) -> Any:
        asked = await site.commands("a").approval_request(action=action, subject="acme", payload=payload)
        await site.members.in_step()
        return (await site.commands(at).approval_show(approval=asked["approval"]))["loss"]

    accepted = healing_changes.retire_payload([key], accept_loss=True)
    known = await shown("a", accepted)
    assert ([job["job"] for job in known["jobs"]], known["not_looked"]) == ([met.job_id], [])
    assert await shown("c", accepted) == {"jobs": [], "not_looked": [key]}, "no job ran there, and it says so"
    for other in ({"accept_loss": False, "keys": [key]}, {"accept_loss": True, "keys": ["\x1b[2J"]}, {}):
        assert await shown("a", other) is None
    assert await shown("a", accepted, Action.KEY_RESUME) is None


async def test_a_store_says_nothing_of_another_services_keys(site: BreachedSite) -> None:
    """What is re-encrypted is one service's objects: no other key may end because of them."""
    await breach(site)
    commands, key, others = site.commands("a"), site.keys["b"], "0e" * 16

    def beside(draft: Draft) -> None:
        body = msgspec.structs.replace(draft.shared.deks[key], service="acme/box", version=99)
        draft.put(Kind.DEK, others, body)
        [(name, of_it)] = [row for row in draft.shared.incident_keys.items() if row[1].dek_id == key]
        draft.put(Kind.INCIDENT_KEY, name.replace(key, others), msgspec.structs.replace(of_it, dek_id=others))

    begun = await commands.reencryption_begin(incident="inc-1", connector="-")
    assert (begun["service"], begun["keys"]) == ("acme/s3", [key])
    sealing = [kid for kid, dek in site["a"].peering.view.deks.items() if dek.state is KeyState.ACTIVE]
    assert begun["sealing"] == sorted(sealing) != [], "by these its store is known"
    await site["a"].change(beside)
    with pytest.raises(RefusedChangeError, match="acme/box, acme/s3") as refused:
        await commands.reencryption_begin(incident="inc-1", connector="-")
    assert "--service" in refused.value.next_step
    begun = await commands.reencryption_begin(incident="inc-1", connector="-", service="acme/box")
    assert (begun["service"], begun["keys"], begun["sealing"]) == ("acme/box", [others], [])
    with pytest.raises(RefusedChangeError, match="no keys of acme/elsewhere"):
        await commands.reencryption_begin(incident="inc-1", connector="-", service="acme/elsewhere")


async def test_at_the_end_of_a_rescue_its_keys_are_pushed_anew(site: BreachedSite) -> None:
    await breach(site)
    keys, until_ms = [site.keys["b"]], site["a"].now_ms() + 6000  # a busy machine has begun it by then
    approval = await site.approve(Action.KEY_RESCUE, "inc-1", healing_changes.rescue_payload(keys, until_ms))
    await site.commands("a").keys_rescue(incident="inc-1", keys=keys, until_ms=until_ms, approval=approval)
    await site.members.in_step()
    agent = site.agents["c"]
    assert agent.at_once_calls == 0
    await until(lambda: agent.at_once_calls > 0)
    assert site["c"].now_ms() >= until_ms


async def test_a_sound_environment_that_rotates_its_kek_is_followed(tmp_path: Path, acme: Tenant) -> None:
    """Or the others would go on sending keys for the KEK that is gone, and none would become active."""
    async with healing_site(tmp_path, acme, "abc") as healing:
        for name in "ab":
            member = healing[name]
            old = await member.kek()
            kek = (await KekRotation(cast("Agent", member)).run(KekWish()))["kek"]

            def is_known(name: str = name, kek: object = kek) -> bool:
                views = [healing[one].peering.view for one in "abc"]
                return all(view.environments[name].kek_id == kek for view in views)

            await until(is_known, timeout_s=60)
            view = healing["c"].peering.view
            assert view.keks[old.reference.kek_id].state == "deactivated"
            assert view.environments[name].state is E.ACTIVE
        made = await healing["a"].manager.rotate(None, None)
        await until(lambda: {states(healing["c"]).get(key) for key in made} == {S.ACTIVE}, timeout_s=60)
        for name in "abc":
            assert await healing[name].opens(made)


async def test_a_kek_rotated_to_unseen_before_the_breach_ends_with_the_one_before_it(
    tmp_path: Path, acme: Tenant
) -> None:
    """It is in the HSM that was breached, and the rows do not know it when they end all that they know."""
    async with healing_site(tmp_path, acme, "abc") as site:
        a, b = site["a"], site["b"]
        b.cut_off()
        unseen = str((await KekRotation(cast("Agent", b)).run(KekWish()))["kek"])
        kek = await b.kek()
        assert kek.reference.kek_id == unseen
        await a.commands.incident_open(environment="b", kind="kek", reason="IR")
        assert unseen not in a.peering.view.keks
        b.reconnect()
        held = b.fake.keks[kek.reference.label, kek.reference.object_id]
        await until(lambda: not held.enabled, timeout_s=60)
        assert b.consent.standing.is_withdrawn
        assert a.peering.view.keks[unseen].state == KEK_COMPROMISED
        fingerprint = await site.renew("b", at="a")
        assert a.peering.view.environments["b"].kek_id not in ("kek-b", unseen)
        await site.rekey("inc-1", at="a")
        await site.complete("b", fingerprint, at="a")
        assert (await site.rejoin("b", at="a"))["problems"] == {}

        async def erased() -> bool:
            return await b.registry.wraps_under(unseen) == 0

        for _ in range(3000):
            if await erased():
                break
            await asyncio.sleep(0.02)
        assert await erased()


@pytest.mark.parametrize("is_there", [True, False], ids=["there", "token-exchanged"])
async def test_no_rotation_goes_on_to_a_kek_from_before_the_breach(
    tmp_path: Path, acme: Tenant, monkeypatch: pytest.MonkeyPatch, *, is_there: bool
) -> None:
    """It stopped halfway, and a later `kek rotate` would have found what it had made in the breached HSM."""
    async with healing_site(tmp_path, acme, "ab") as site:
        a, b = site["a"], site["b"]
        [key_id, *_] = sorted(states(b))
        b.fake.spoil(KeyId.parse(key_id))
        with pytest.raises(RefusedChangeError, match="do not open"):
            await KekRotation(cast("Agent", b)).run(KekWish())
        b.fake.unspoil(KeyId.parse(key_id))
        staged = (await b.registry.succession()).coming
        assert staged is not None
        assert staged.kek is not None
        await a.commands.incident_open(environment="b", kind="kek", reason="IR")
        await until(lambda: b.consent.standing.is_withdrawn, timeout_s=60)
        if not is_there:

            async def elsewhere(kek: object) -> None:
                raise KekRevokedError(Diagnosis(Verdict.TOKEN_CHANGED, "another token is in the slot"))

            monkeypatch.setattr(b.fake, "destroy_kek", elsewhere)
        await site.renew("b", at="a")
        state = await b.registry.succession()
        assert (state.coming, await b.registry.wraps_under(staged.reference.kek_id)) == (None, 0)
        in_hsm = (staged.kek.reference.label, staged.kek.reference.object_id) in b.fake.keks
        assert in_hsm is not is_there
        made = await KekRotation(cast("Agent", b)).run(KekWish())
        assert made["kek"] != staged.reference.kek_id
